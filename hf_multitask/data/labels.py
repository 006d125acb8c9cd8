"""From a column of labels to what a head reads, with every bad label named before training starts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from datasets import ClassLabel, Features, LargeList, List, Value

from ..models.limits import shown
from ..models.task import Task, TaskType, closest

__all__ = ["LabelEncoder", "LabelError", "infer_labels", "label_feature", "label_ids", "matches_names"]

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)", re.ASCII)


class LabelError(ValueError):
    """The labels of a task cannot be used; its texts may be good.

    Args:
        message: What is wrong, with the task's name.
        task: Name of the task.
    """

    def __init__(self, message: str, task: str) -> None:
        super().__init__(message, task)  # both, so that the error survives the way from another process
        self.task = task

    def __str__(self) -> str:
        return str(self.args[0])


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


def _numbers(labels: Sequence[str]) -> list[float | int | None]:
    """Return the number that each label spells out, or None for a label that does not.

    Example:
        >>> _numbers(["1", "02", "2.5", "x"])
        [1, 2, 2.5, None]
    """
    matches = [_NUMBER.fullmatch(label) for label in labels]
    return [None if m is None else float(m[0]) if "." in m[0] else int(m[0]) for m in matches]


def matches_names(labels: Sequence[str]) -> bool:
    """Return whether whole numbers stand for labels by name: all labels are numbers, and not 0, 1, 2, ... in order."""
    numbers = _numbers(labels)
    return None not in numbers and numbers != list(range(len(numbers)))


def label_ids(labels: Sequence[str], column: str, feature: Any) -> dict[Any, int]:
    """Return the place among some labels of every value that a column may hold.

    Strings are names, and so are the names of a `ClassLabel`. A whole number is the place of its label, from 0; where
    all labels are numbers themselves (ratings from 1 to 5) it is a name.

    Args:
        labels: The labels of a task.
        column: Name of the column, for messages.
        feature: The type of its values, or of the items of its lists.

    Raises:
        ValueError: The column holds whole numbers which could be places or names, and would mean different labels.
    """
    if isinstance(feature, ClassLabel):
        return {i: labels.index(name) for i, name in enumerate(feature.names) if name in labels}
    if _kind(feature) == "name":
        return {label: i for i, label in enumerate(labels)}
    numbers = _numbers(labels)
    names = {number: i for i, number in enumerate(numbers) if number is not None}
    conflicts = [n for i, n in enumerate(numbers) if n is not None and n != i and n in range(len(labels))]
    by_name = matches_names(labels)
    if len(names) < len(labels) and by_name:
        what = "two of them spell the same number"
    elif conflicts and (not by_name or set(names) == set(range(len(labels)))):
        number = int(conflicts[0])
        what = f"{number} would be {labels[number]!r} as an id, {labels[numbers.index(number)]!r} as a name"
    else:
        return names if by_name else {i: i for i in range(len(labels))}
    raise ValueError(
        f"column {column!r} holds whole numbers, and they could be ids or names of labels={shown(list(labels))}: "
        f"{what}; make the column strings (names), or a ClassLabel with names=[...] (ids)"
    )


def label_feature(task: Task) -> Any:
    """Return the Arrow type in which a task's encoded labels are stored."""
    if task.type in (TaskType.SINGLE_LABEL_CLASSIFICATION, TaskType.MULTIPLE_CHOICE):
        return Value("int32")
    whole = task.type in (TaskType.TOKEN_CLASSIFICATION, TaskType.QUESTION_ANSWERING, TaskType.MASKED_LM)
    return List(Value("int32" if whole else "float32"))


class LabelEncoder:
    """Turns one column's labels into ids or numbers, or raises an error that names task, column and row.

    What a column may hold:

    - `single_label_classification`: names, ids from 0, or a `ClassLabel` (matched by name). Where the labels are
      numbers, such as ratings from 1 to 5, whole numbers are names too (see [`label_ids`]).
    - `multi_label_classification`: lists of names (or of a `ClassLabel`), or one 0 or 1 per label.
    - `regression`: finite numbers; lists of them where the task names several values.
    - `token_classification`: lists like single labels, one per word.

    Args:
        task: The task.
        column: Name of the column, for messages.
        features: The dataset's features.
        encoded: Whether whole numbers are ids in any case, as in rows that this library prepared.
        ignored: Values that stay as they are, such as the -100 of tokens without a label.

    Attributes:
        ids: By value of the column, the place of its label.

    Raises:
        LabelError: The column's type cannot hold labels of this task, or its numbers could be ids or names.
    """

    def __init__(
        self, task: Task, column: str, features: Features, *, encoded: bool = False, ignored: Sequence[int] = ()
    ) -> None:
        self.task = task
        self.column = column
        feature = features[column]
        self._is_list = _inner(feature) is not None
        self._value = _inner(feature) if self._is_list else feature
        self._kind = _kind(self._value)
        self._check_type(feature)
        self.ids = {**self._known_values(encoded), **{value: value for value in ignored}}

    def _fail(self, what: str) -> LabelError:
        return LabelError(f"task {self.task.name!r}: {what}", self.task.name)

    def _known_values(self, encoded: bool) -> dict[Any, int]:
        labels = self.task.labels or ()
        if not self.task.is_classification:
            return {}
        if isinstance(self._value, ClassLabel) and not set(self._value.names) <= set(labels):
            raise self._fail(
                f"column {self.column!r} is a ClassLabel with the names {self._value.names}, the task has "
                f"labels={list(labels)}; give the task these names, in any order"
            )
        if self._kind != "name" and not isinstance(self._value, ClassLabel):
            if self.task.type is TaskType.MULTI_LABEL_CLASSIFICATION:  # one 0 or 1 per label, or numbers as names
                numbers = _numbers(labels)
                return {} if None in numbers else {number: i for i, number in enumerate(numbers)}
            if encoded or self._kind == "empty":
                return {i: i for i in range(len(labels))}
        try:
            return label_ids(labels, self.column, self._value)
        except ValueError as error:
            raise self._fail(str(error)) from None

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
            # Missing cells turn the whole numbers of a file into fractions.
            fix = "; cast it to int64 or string" if self._kind == "number" and "or ids" in wanted else ""
            raise self._fail(f"column {self.column!r} has the type {feature}; {task_type} needs {wanted}{fix}")

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
            return self.ids[value]
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
        is_vector = len(value) == len(labels) and all(item is not None and item in (0, 1) for item in value)
        vector = [float(item) for item in value] if is_vector else None
        if self._kind == "id" and self.ids and len(set(value)) == len(value) and all(v in self.ids for v in value):
            present = {self.ids[item] for item in value}
            named = [float(i in present) for i in range(len(labels))]
            if vector not in (None, named):
                raise self._fail(
                    f"row {row} of column {self.column!r} holds {value!r}, which could be one 0 or 1 for each of "
                    f"labels={shown(list(labels))}, or a list of names; make names strings"
                )
            return named
        if vector is None:
            raise self._fail(
                f"row {row} of column {self.column!r} holds {value!r}; it must hold {len(labels)} numbers, 0 or 1, "
                "one per label, or a list of label names"
            )
        return vector

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
        if self._kind == "id" and not isinstance(self._value, ClassLabel) and matches_names(labels):
            place = isinstance(value, int) and 0 <= value < len(labels)
            reading = f" (as an id it would be {labels[value]!r})" if place else ""
            return self._fail(
                f"label {value!r} {where} is not one of its labels, {shown(list(labels))}{reading}: where labels are "
                "numbers, whole numbers are matched by name; make a column of ids a ClassLabel, add a label that is "
                "missing, filter unlabelled rows out"
            )
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
