"""What a task is: its name, its type, its labels and where its rows come from.

A [`Task`] is a plain description. It holds no weights and no data, it is written into a model's `config.json`
and read back from there, and every other part of the package asks it instead of guessing.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from torch import nn

from .limits import MOST_LABELS, MOST_TASKS, is_text, shown
from .task_options import check_columns, check_type_options, settle_labels, template_fields
from .task_type import TaskType
from .weight_schedule import settle_schedule

__all__ = ["Task", "TaskType", "check_tasks", "closest"]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")
# Device names that Windows refuses as a file name, whatever the extension.
_RESERVED_FILE_NAMES = frozenset(
    ["con", "prn", "aux", "nul", *(f"com{i}" for i in range(10)), *(f"lpt{i}" for i in range(10))]
)


_DEFAULT_TEXT_COLUMNS = {
    TaskType.TOKEN_CLASSIFICATION: ("tokens",),
    TaskType.QUESTION_ANSWERING: ("question", "context"),
    TaskType.MULTIPLE_CHOICE: ("question",),
}
_DEFAULT_LABEL_COLUMN = {
    TaskType.TOKEN_CLASSIFICATION: "tags",
    TaskType.MULTI_LABEL_CLASSIFICATION: "labels",
    TaskType.QUESTION_ANSWERING: "answers",
    TaskType.SEQ2SEQ_LM: "target",
}
_POOLINGS = ("mean", "first", "last")
_HEADS = ("mlp", "linear", "native")
_LARGEST = 1e30  # of a weight; losses are computed in float32


def closest(name: object, known: Iterable[str]) -> str:
    """Return ", did you mean 'x'?" for the known name nearest to a misspelt one, or an empty string."""
    matches = get_close_matches(str(name)[:100], list(known), n=1)
    return f", did you mean {matches[0]!r}?" if matches else ""


@dataclass(frozen=True)
class Task:
    """One thing to predict.

    Args:
        name: Letters, digits, `_` and `-`, at most 64 characters. It becomes a module name, a metric name and a
            file name.
        type: A [`TaskType`] or its name.
        labels: The names of the labels, in the order of their ids; whole numbers are written out. In a column, names
            and whole numbers from 0 (ids) stand for them; where all labels are numbers, as ratings from 1 to 5 are,
            whole numbers are names, too. Required for all types of classification; for `regression` the names of
            several target values (default: one nameless value). For `causal_lm` and `seq2seq_lm` the targets that
            there are, if they are a closed set: evaluation then picks the likeliest.
        dataset: The name of the dataset that feeds the task (default: the task's name). Tasks that name the same
            dataset and the same text columns are trained on the same rows with one pass of the encoder.
        text_columns: One column, or two for pairs of texts (default: `text`, or `tokens` for
            `token_classification`; the columns in `prompt`, where there is one). A column may hold strings or lists
            of words; for `causal_lm` and `seq2seq_lm` also chat messages, dictionaries with `role` and `content`, the
            last of which is the target. For `question_answering` the question and the context that holds the answer
            (default: `question` and `context`); for `multiple_choice` what the choices are about (default:
            `question`), of two columns the second stands in front of each choice.
        label_column: The column of the labels (default: `label`; `tags` for `token_classification`, `labels` for
            `multi_label_classification`). For `causal_lm` the column of the targets (default: `target` with a
            `prompt`; else None, and the whole text is predicted), for `seq2seq_lm` too (default: `target`; none with
            chat messages). `masked_lm` has none. For `question_answering`
            `answers`, dictionaries with lists `text` and `answer_start` (characters of the context), both empty where
            the context holds no answer; for `multiple_choice` the number of the right choice, from 0.
        weight: Factor of the task's loss, at least 0 (default: 1.0; 0.1 for an auxiliary task and for language
            modelling without targets).
        auxiliary: The task is trained only to help others: it counts in no average and is not predicted.
        pooling: How a text becomes one vector: `mean` over its real tokens, `first` or `last` real token (default:
            the model's). Not used where single tokens are labelled (`token_classification`, `question_answering`).
        head: `mlp` (dropout, linear to half the width, GELU, linear), `linear` (dropout, one linear layer), or
            `native`: what Transformers itself puts on the backbone, so that the exported task loads in its own
            `AutoModelForSequenceClassification` (or `...TokenClassification`, `...QuestionAnswering`,
            `...MultipleChoice`).
        head_dropout: Dropout in front of the head, in [0, 1) (default: the model's `head_dropout`).
        label_smoothing: Weight of the uniform distribution in the target of a cross-entropy, in [0, 1).
        max_length: Longest input in tokens, special tokens included (default: the training argument's). For
            `seq2seq_lm` that of the target, too.
        prompt: For `causal_lm` and `seq2seq_lm`, a template of what stands before the target, with columns in braces
            (`"Is this good? {text}"`), or several, of which each row gets one, drawn by the seed.
        chat: For the same, put prompt and target into the tokenizer's chat template, as the user's message and the
            assistant's (for `seq2seq_lm` the prompt alone: the target is a text of its own).
        held_out: For the same, never train the task, but evaluate it: what training on the other tasks does for
            tasks never seen. It counts in `eval_held_out_average`, and not in `eval_average`.
        generation: For the same, arguments of `generate` for evaluation and prediction (`max_new_tokens`, ...).
        mlm_probability: For `masked_lm`, the share of a row's tokens that are predicted, in (0, 1].
        whole_words: For `masked_lm`, take all tokens of a word together.
        stride: For `question_answering`, tokens of the context that two neighbouring windows share: a context that is
            too long for one window is read in several.
        max_answer_length: For `question_answering`, the most tokens of an answer that is given.
        null_answers: For `question_answering`, whether a question may have no answer. By default the training data
            decide, and the model keeps it: only where one of their questions has none (SQuAD 2, not SQuAD 1.1).
        choice_columns: For `multiple_choice`, one column of lists of strings, or one column of strings for each choice
            (default: `choices`).
        metric: The task's primary metric, one of those that are computed for it (default: by type, see
            [`hf_multitask.metrics`]).
        greater_is_better: Whether a larger value of `metric` is better (default: as its name says, see
            [`hf_multitask.metrics`]). Required for a metric of your own whose name does not say, once something picks,
            stops or compares by it.
        weight_schedule: How the weight changes over training, a name or a dictionary with `type` and arguments, such as
            `linear` or `{"type": "off", "after": 0.5}` (default: not at all; see
            [`hf_multitask.models.weight_schedule`]). Rows of the task come as before.

    Raises:
        ValueError: An argument does not fit; the message names the task, the argument and what is allowed.

    Example:
        >>> Task("topic", "single_label_classification", labels=["sport", "politics"], label_column="topic").weight
        1.0
    """

    name: str
    type: TaskType
    labels: tuple[str, ...] | None = None
    # None, the default of these four, is settled in __post_init__: read, they are never None.
    dataset: str = None  # type: ignore[assignment]
    text_columns: tuple[str, ...] = None  # type: ignore[assignment]
    label_column: str = None  # type: ignore[assignment]
    weight: float = None  # type: ignore[assignment]
    auxiliary: bool = False
    pooling: str | None = None
    head: str = "mlp"
    head_dropout: float | None = None
    label_smoothing: float = 0.0
    max_length: int | None = None
    metric: str | None = None
    prompt: tuple[str, ...] | None = None
    chat: bool = False
    held_out: bool = False
    generation: dict[str, Any] | None = dataclasses.field(default=None, hash=False)
    mlm_probability: float = 0.15
    whole_words: bool = False
    stride: int = 128
    max_answer_length: int = 30
    null_answers: bool | None = None
    choice_columns: tuple[str, ...] | None = None
    weight_schedule: str | dict[str, Any] | None = dataclasses.field(default=None, hash=False)
    greater_is_better: bool | None = None

    def __post_init__(self) -> None:
        """Fill in the defaults that depend on the type and check every field."""
        _check_name(self.name)
        try:
            task_type = TaskType(self.type)
        except ValueError:
            known = [t.value for t in TaskType]
            raise ValueError(
                f"task {self.name!r}: type {shown(self.type)} is not known{closest(self.type, known)}; "
                f"types are {', '.join(known)}"
            ) from None
        text_columns = (self.text_columns,) if isinstance(self.text_columns, str) else self.text_columns
        if not isinstance(text_columns, (list, tuple, type(None))):
            raise self._fail(f"text_columns must name one column, or two for pairs, got {shown(text_columns)}")
        if isinstance(self.prompt, (str, list, tuple)):
            self._set("prompt", (self.prompt,) if isinstance(self.prompt, str) else tuple(self.prompt))
        self._set("type", task_type)
        try:
            self._set("labels", settle_labels(self.labels))
        except ValueError as error:
            raise self._fail(str(error)) from None
        self._set("dataset", self.name if self.dataset is None else self.dataset)
        if (wrong := check_type_options(self)) is not None:
            raise self._fail(wrong)
        if task_type is TaskType.MULTIPLE_CHOICE:
            chosen = (self.choice_columns,) if isinstance(self.choice_columns, str) else self.choice_columns
            self._set("choice_columns", tuple(chosen or ("choices",)))
        if self.prompt is not None:
            found = tuple(dict.fromkeys(name for one in self.prompt for name in template_fields(one)))
            if text_columns is not None and tuple(text_columns) != found:
                raise self._fail(f"text_columns are those in the prompt, {', '.join(found)}; leave them out")
            text_columns = found
        self._set("text_columns", tuple(text_columns or _DEFAULT_TEXT_COLUMNS.get(task_type, ("text",))))
        default = "target" if self.prompt is not None else None if task_type.is_language else "label"
        self._set("label_column", self.label_column or _DEFAULT_LABEL_COLUMN.get(task_type, default))
        helps = self.auxiliary or (task_type.is_language and self.label_column is None)
        self._set("weight", self.weight if self.weight is not None else (0.1 if helps else 1.0))
        self._check_options()

    def _set(self, field: str, value: Any) -> None:
        object.__setattr__(self, field, value)

    def _fail(self, what: str) -> ValueError:
        return ValueError(f"task {self.name!r}: {what}")

    def _check_options(self) -> None:
        if self.type.has_labels:
            fewest = 2 if self.type is TaskType.SINGLE_LABEL_CLASSIFICATION else 1
            if not self.labels or len(self.labels) < fewest:
                raise self._fail(f"{self.type} needs labels=[...], at least {fewest}, got {self.labels!r}")
        elif self.labels == ():
            raise self._fail("labels is empty; leave it out" + (" for one value" if not self.is_classification else ""))
        elif self.labels and self.type in (TaskType.QUESTION_ANSWERING, TaskType.MULTIPLE_CHOICE):
            raise self._fail(f"{self.type} has no labels; leave them out, the answers are in {self.label_column!r}")
        elif self.type is TaskType.MASKED_LM and (self.labels or self.label_column):
            raise self._fail("masked_lm has no labels; leave out labels and label_column")
        elif self.type is TaskType.CAUSAL_LM and self.labels and self.label_column is None:
            raise self._fail("labels are the closed set of targets; give prompt or label_column too")
        if not isinstance(self.dataset, str) or not self.dataset:
            raise self._fail(f"dataset must be a name, got {shown(self.dataset)}")
        if (len(self.text_columns) > 2 and self.prompt is None) or not all(
            isinstance(c, str) and c for c in self.text_columns
        ):
            raise self._fail(f"text_columns must name one column, or two for pairs, got {shown(self.text_columns)}")
        if len(set(self.text_columns)) != len(self.text_columns):
            raise self._fail(f"text_columns names one column twice: {self.text_columns!r}")
        if self.label_column in self.text_columns:
            raise self._fail(f"column {self.label_column!r} cannot be the text and the label at once")
        if (wrong := check_columns(self)) is not None:
            raise self._fail(wrong)
        weight = self.weight
        if not _is_number(weight) or not 0 <= weight < _LARGEST:
            raise self._fail(f"weight must be a finite number of at least 0, got {shown(weight)}")
        if self.metric is not None and not is_text(self.metric):
            raise self._fail(f"metric must be the name of a metric, got {shown(self.metric)}")
        if self.greater_is_better is not None and not isinstance(self.greater_is_better, bool):
            raise self._fail(f"greater_is_better must be true or false, got {shown(self.greater_is_better)}")
        self._set("weight_schedule", settle_schedule(self.weight_schedule, f"task {self.name!r}: "))
        if self.pooling not in (None, *_POOLINGS):
            raise self._fail(f"pooling {shown(self.pooling)} is not one of {', '.join(_POOLINGS)}")
        if self.head not in _HEADS:
            raise self._fail(f"head {shown(self.head)} is not one of {', '.join(_HEADS)}")
        if self.type.is_language and (self.head != "mlp" or self.pooling is not None or self.head_dropout is not None):
            raise self._fail(f"the head of {self.type} is the backbone's own; leave out head, pooling and head_dropout")
        if self.head == "native" and (self.pooling is not None or self.head_dropout is not None):
            raise self._fail("pooling and head_dropout of head 'native' are the backbone's own; leave them out")
        for field in ("head_dropout", "label_smoothing"):
            value = getattr(self, field)
            if value is not None and not (_is_number(value) and 0.0 <= value < 1.0):
                raise self._fail(f"{field} must lie in [0, 1), got {shown(value)}")
        if self.label_smoothing and self.type not in (
            TaskType.SINGLE_LABEL_CLASSIFICATION,
            TaskType.TOKEN_CLASSIFICATION,
        ):
            raise self._fail(f"label_smoothing is for losses with a softmax, not for {self.type}")
        if not isinstance(self.auxiliary, bool):
            raise self._fail(f"auxiliary must be true or false, got {shown(self.auxiliary)}")
        length = self.max_length
        if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
            raise self._fail(f"max_length must be a positive whole number, got {shown(self.max_length)}")

    @property
    def is_classification(self) -> bool:
        """Whether the task predicts labels rather than numbers."""
        return self.type is not TaskType.REGRESSION

    @property
    def num_outputs(self) -> int:
        """Number of output units of the head: one per label, value of a regression, or end of an answer."""
        if self.type is TaskType.QUESTION_ANSWERING:
            return 2
        return len(self.labels) if self.labels else 1

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types, for a configuration."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["type"] = self.type.value
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Task:
        """Make a task from a dictionary of its fields.

        Raises:
            ValueError: A key is unknown (the closest known one is named) or a value does not fit.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"a task must be a dictionary of its fields, got {shown(values)}")
        name = shown(values.get("name"))
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(
                    f"task {name}: unknown key {shown(key)}{closest(key, known)}; keys are {', '.join(known)}"
                )
        for key in ("name", "type"):
            if key not in values:
                raise ValueError(f"task {name}: key {key!r} is missing")
        arguments: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**arguments)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_name(name: object) -> None:
    rule = "a task name is made of letters, digits, '_' and '-', starts with no '-' and has at most 64 characters"
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"task name {shown(name)} cannot be a module and file name: {rule}")
    if hasattr(nn.ModuleDict(), name):
        raise ValueError(f"task name {name!r} is taken by torch.nn.ModuleDict, which holds the heads; choose another")
    if name.lower() in _RESERVED_FILE_NAMES:
        raise ValueError(f"task name {name!r} is a reserved file name on some systems; choose another")


def check_tasks(tasks: Iterable[Task | dict[str, Any]]) -> list[Task]:
    """Return the tasks as [`Task`] objects, after checking that they can live in one model.

    Raises:
        ValueError: There is no task, two names are equal or differ in case only, no task is trained for its own sake,
            all weights are zero, or there are more tasks or labels than a model can have.
    """
    tasks = list(itertools.islice(tasks, MOST_TASKS + 1))
    if len(tasks) > MOST_TASKS:
        raise ValueError(f"there are more tasks than the {MOST_TASKS:,} that a model can have")
    for task in tasks:
        if not isinstance(task, (Task, dict)):
            raise ValueError(f"tasks must be Task objects (or dictionaries of their fields), got {shown(task)}")
    checked = [task if isinstance(task, Task) else Task.from_dict(task) for task in tasks]
    if (count := sum(len(task.labels or ()) for task in checked)) > MOST_LABELS:
        raise ValueError(f"the tasks have {count:,} labels together, more than the {MOST_LABELS:,} of a model")
    if not checked:
        raise ValueError("tasks is empty: a multi-task model needs at least one task")
    seen: dict[str, str] = {}
    for task in checked:
        key = task.name.lower()
        if key in seen:
            raise ValueError(
                f"task names {seen[key]!r} and {task.name!r} are equal or differ only in case; "
                "names must be unique, in file systems that ignore case too"
            )
        seen[key] = task.name
    if all(task.auxiliary or task.held_out for task in checked):
        kinds = "auxiliary or held out" if any(task.held_out for task in checked) else "auxiliary"
        raise ValueError(f"all tasks are {kinds}: at least one must be trained for its own sake")
    if all(task.weight == 0 or task.held_out for task in checked):
        raise ValueError("the weights of all tasks are 0: nothing would be trained")
    return checked
