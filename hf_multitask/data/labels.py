"""From a column of labels to what a head reads, with every bad label named before training starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from datasets import ClassLabel, Features, LargeList, List, Value

from ..models.task import Task, TaskType, closest

__all__ = ["LabelEncoder", "infer_labels", "label_feature"]


def _inner(feature: Any) -> Any | None:
    """Return the feature of a list's items, or None for what is no list."""
    return feature.feature if isinstance(feature, (List, LargeList)) else None


def _kind(feature: Any) -> str:
    """Return `name` (strings), `id` (whole numbers), `number`, `empty` (only None) or what else it is."""
    if isinstance(feature, ClassLabel):
        return "id"
    if isinstance(feature, Value):
        dtype = feature.dtype
        if dtype in ("string", "large_string"):
            return "name"
        if dtype.startswith(("int", "uint")):
            return "id"
        if dtype.startswith(("float", "double", "decimal")):
            return "number"
        return "empty" if dtype == "null" else dtype
    return "list" if _inner(feature) is not None else type(feature).__name__


def label_feature(task: Task) -> Any:
    """Return the Arrow type in which a task's encoded labels are stored."""
    if task.type in (TaskType.SINGLE_LABEL_CLASSIFICATION, TaskType.MULTIPLE_CHOICE):
        return Value("int32")
    whole = task.type in (TaskType.TOKEN_CLASSIFICATION, TaskType.QUESTION_ANSWERING, TaskType.MASKED_LM)
    return List(Value("int32" if whole else "float32"))


class LabelEncoder:
    """Turns one column's labels into ids or numbers, or raises an error that names task, column and row.

    What a column may hold:

    - `single_label_classification`: names, ids from 0, or a `ClassLabel` (matched by name).
    - `multi_label_classification`: lists of names (or of a `ClassLabel`), or one 0 or 1 per label.
    - `regression`: finite numbers; lists of them where the task names several values.
    - `token_classification`: lists like single labels, one per word.

    Args:
        task: The task.
        column: Name of the column, for messages.
        features: The dataset's features.

    Raises:
        ValueError: The column's type cannot hold labels of this task.
    """

    def __init__(self, task: Task, column: str, features: Features) -> None:
        self.task = task
        self.column = column
        feature = features[column]
        self._is_list = _inner(feature) is not None
        self._value = _inner(feature) if self._is_list else feature
        self._kind = _kind(self._value)
        self._ids = self._known_values() if task.labels else {}
        self._check_type(feature)

    def _fail(self, what: str) -> ValueError:
        return ValueError(f"task {self.task.name!r}: {what}")

    def _known_values(self) -> dict[Any, int]:
        labels = self.task.labels or ()
        if isinstance(self._value, ClassLabel):
            names = self._value.names
            if self.task.is_classification and not set(names) <= set(labels):
                raise self._fail(
                    f"column {self.column!r} is a ClassLabel with the names {names}, the task has "
                    f"labels={list(labels)}; give the task these names, in any order"
                )
            return {i: labels.index(name) for i, name in enumerate(names) if name in labels}
        if self._kind == "name":
            return {label: i for i, label in enumerate(labels)}
        return {i: i for i in range(len(labels))}

    def _check_type(self, feature: Any) -> None:
        task_type = self.task.type
        wants_list = task_type in (TaskType.TOKEN_CLASSIFICATION, TaskType.MULTI_LABEL_CLASSIFICATION)
        if task_type is TaskType.REGRESSION:
            fits = self._kind in ("id", "number", "empty") and (self._is_list == bool(self.task.labels))
            wanted = "a list of numbers per row" if self.task.labels else "numbers"
        elif task_type is TaskType.MULTI_LABEL_CLASSIFICATION:
            fits = self._is_list and self._kind in ("name", "id", "number", "bool", "empty")
            wanted = "lists of label names, or one 0 or 1 per label"
        else:
            fits = self._is_list == wants_list and self._kind in ("name", "id", "empty")
            wanted = f"{'lists of ' if wants_list else ''}label names (strings) or ids (whole numbers)"
        if not fits and _kind(feature) != "empty":
            raise self._fail(f"column {self.column!r} has the type {feature}; {task_type} needs {wanted}")

    def encode(self, values: Sequence[Any], first_row: int) -> list[Any]:
        """Return the encoded labels of consecutive rows.

        Args:
            values: The column's values.
            first_row: Number of the first row in its dataset, for messages.

        Raises:
            ValueError: A label is missing, unknown or of the wrong form.
        """
        row_encoder = {
            TaskType.SINGLE_LABEL_CLASSIFICATION: self._single,
            TaskType.MULTI_LABEL_CLASSIFICATION: self._multi,
            TaskType.REGRESSION: self._number,
            TaskType.TOKEN_CLASSIFICATION: self._tokens,
        }[self.task.type]
        return [row_encoder(value, first_row + i) for i, value in enumerate(values)]

    def _single(self, value: Any, row: int) -> int:
        try:
            return self._ids[value]
        except (KeyError, TypeError):
            raise self._unknown(value, row) from None

    def _tokens(self, value: Any, row: int) -> list[int]:
        if value is None:
            raise self._unknown(value, row)
        return [self._single(item, row) for item in value]

    def _multi(self, value: Any, row: int) -> list[float]:
        if value is None:
            raise self._unknown(value, row)
        labels = self.task.labels or ()
        if self._kind == "name" or isinstance(self._value, ClassLabel):
            present = {self._single(item, row) for item in value}
            return [float(i in present) for i in range(len(labels))]
        if self._kind == "empty" and not value:
            return [0.0] * len(labels)
        if len(value) != len(labels) or any(item is None or item not in (0, 1) for item in value):
            raise self._fail(
                f"row {row} of column {self.column!r} holds {value!r}; it must hold {len(labels)} numbers, 0 or 1, "
                "one per label, or a list of label names"
            )
        return [float(item) for item in value]

    def _number(self, value: Any, row: int) -> list[float]:
        numbers = value if self._is_list else [value]
        if value is None or len(numbers) != self.task.num_outputs:
            raise self._fail(
                f"row {row} of column {self.column!r} holds {value!r}; it must hold {self.task.num_outputs} number(s)"
            )
        for number in numbers:
            if number is None or not math.isfinite(number):
                raise self._fail(f"label {number!r} in row {row} of column {self.column!r} is not a finite number")
        return [float(number) for number in numbers]

    def _unknown(self, value: Any, row: int) -> ValueError:
        where = f"in row {row} of column {self.column!r}"
        labels = self.task.labels or ()
        if value is None:
            return self._fail(f"label None {where}: every row needs a label; filter these rows out")
        if self._kind == "id":
            return self._fail(
                f"label {value!r} {where} is not an id of its {len(labels)} labels (0 to {len(labels) - 1}); "
                "unlabelled rows must be filtered out"
            )
        return self._fail(
            f"label {value!r} {where} is not one of its {len(labels)} labels{closest(value, labels)}; "
            "add it to Task(labels=...)"
        )


def infer_labels(dataset: Any, column: str) -> tuple[str, ...]:
    """Return the label names of a column: a `ClassLabel`'s, or the sorted distinct strings.

    Args:
        dataset: A `datasets.Dataset`.
        column: A column of labels or of lists of labels.

    Raises:
        ValueError: The column does not exist, or holds plain numbers, which have no names.
    """
    if column not in dataset.column_names:
        raise ValueError(f"no column {column!r} to take labels from; columns are {', '.join(dataset.column_names)}")
    feature = dataset.features[column]
    value = _inner(feature) or feature
    if isinstance(value, ClassLabel):
        return tuple(value.names)
    if _kind(value) != "name":
        raise ValueError(f"column {column!r} holds {feature}, from which no label names follow; give labels: [...]")
    distinct: set[str] = set()
    for cell in dataset.with_format(None)[column]:
        distinct.update([cell] if isinstance(cell, str) else [name for name in cell or () if name is not None])
    # BIO tags: O first, as everywhere.
    return tuple(sorted(distinct, key=lambda name: (name != "O", name)))
