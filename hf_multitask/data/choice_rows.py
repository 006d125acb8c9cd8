"""Rows of `multiple_choice` tasks: what the choices are about, paired with each of the choices.

A prepared row holds the tokens of all its pairs, one behind the other, in `input_ids` (and `token_type_ids`), and the
number of tokens of each pair in `choice_lengths`. Where a pair is too long, the text that the choices are about is cut;
a choice never is, for two choices that were cut might look the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from datasets import ClassLabel, Features, LargeList, List, Value
from transformers import PreTrainedTokenizerBase

from .labels import LabelError
from .row_encoding import RowEncoder, tokenizer_key
from .shared_tokenizer import tokenize
from .sources import Source, label_key

__all__ = ["LENGTHS", "ChoiceRows"]

LENGTHS = "choice_lengths"
"""Column of prepared rows with the number of tokens of each pair."""


class ChoiceRows(RowEncoder):
    """Rows of one `multiple_choice` task."""

    def __init__(
        self,
        columns: Features,
        source: Source,
        labels: bool | None,
        max_length: int,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        (self.task,) = source.tasks
        if tokenizer is None:
            raise ValueError("processing_class is missing: the rows hold text and need the backbone's tokenizer")
        self.choices = self.task.choice_columns or ()
        self.in_lists = len(self.choices) == 1
        for column in (*self.task.text_columns, *self.choices):
            if column not in columns:
                what = "choices" if column in self.choices else "text"
                raise ValueError(
                    f"task {self.task.name!r}: no column {column!r} for the {what}; columns are {', '.join(columns)}"
                )
            wants_list = column in self.choices and self.in_lists
            if not _holds_strings(columns[column], wants_list):
                raise ValueError(
                    f"task {self.task.name!r}: column {column!r} has the type {columns[column]}; it must hold "
                    + ("lists of strings, the choices" if wants_list else "strings")
                )
        super().__init__(columns, source, labels, max_length)
        self.tokenizer = tokenizer
        self.added = tokenizer.num_special_tokens_to_add(pair=True)
        self.has_token_types = "token_type_ids" in tokenizer.model_input_names

    def key(self) -> list[Any]:
        """Return what the result depends on, besides the dataset."""
        side = self.tokenizer.truncation_side
        options = [self.max_length, self.has_token_types, side, tokenizer_key(self.tokenizer)]
        return [*super().key(), self.task.text_columns, self.choices, *options]

    @property
    def features(self) -> Features:
        """Columns and types of prepared rows."""
        return Features({**super().features, LENGTHS: List(Value("int32"))})

    def lengths(self, encoded: Mapping[str, list]) -> list[int]:
        """Return the tokens of the longest pair of each row."""
        return [max(lengths) for lengths in encoded[LENGTHS]]

    def _make_encoder(self, task: Any, column: str, columns: Features) -> Any:
        feature = columns[column]
        whole = isinstance(feature, Value) and feature.dtype.startswith(("int", "uint", "string", "large_string"))
        if not whole and not isinstance(feature, ClassLabel) and feature != Value("null"):
            raise self._label_error(
                f"column {column!r} has the type {feature}; it must hold the number of the right choice, from 0"
            )
        names = feature.names if isinstance(feature, ClassLabel) else []
        numbers = [int(name) for name in names if name.isdecimal()]
        # Of names that count the choices (or letters) the ids do so too; others are the ids of something else.
        if numbers and numbers not in ([*range(len(names))], [*range(1, len(names) + 1)]):
            raise self._label_error(
                f"column {column!r} is a ClassLabel with the names {names}, whose ids do not count the choices; cast "
                "it to int64 or string, with the number of the right choice, from 0"
            )

    def __call__(self, batch: Mapping[str, list], indices: list[int]) -> dict[str, list]:
        """Return the columns of prepared rows, for a batch of rows and their numbers (consecutive ones)."""
        texts, pairs, counts = [], [], []
        for place, row in enumerate(indices):
            context, *before = [self._text(batch[column][place], column, row) for column in self.task.text_columns]
            choices = self._choices({column: batch[column][place] for column in self.choices}, row)
            texts += [context] * len(choices)
            pairs += [" ".join([*before, choice]) for choice in choices]
            counts.append(len(choices))
        ends = list(accumulate(counts))
        starts = [end - count for end, count in zip(ends, counts, strict=True)]
        self._check_room(pairs, starts, indices)
        encoded = tokenize(
            self.tokenizer,
            texts,
            pairs,
            truncation="only_first",
            max_length=self.max_length,
            return_attention_mask=False,
            return_token_type_ids=self.has_token_types,
        )
        result: dict[str, list] = {LENGTHS: []}
        for key in ("input_ids", "token_type_ids") if self.has_token_types else ("input_ids",):
            result[key] = [sum(encoded[key][start:end], []) for start, end in zip(starts, ends, strict=True)]
        for start, end in zip(starts, ends, strict=True):
            result[LENGTHS].append([len(ids) for ids in encoded["input_ids"][start:end]])
        for task in self.labelled:
            values = zip(batch[task.label_column], counts, indices, strict=True)
            result[label_key(task.name)] = [self._label(value, count, row) for value, count, row in values]
        return result

    def _text(self, value: Any, column: str, row: int) -> str:
        if value is None:
            raise ValueError(f"text None in row {row} of column {column!r}; filter such rows out")
        return value

    def _choices(self, cells: Mapping[str, Any], row: int) -> list[str]:
        values = next(iter(cells.values())) if self.in_lists else list(cells.values())
        if values is None or len(values) < 2:
            raise ValueError(
                f"task {self.task.name!r}: row {row} of column {self.choices[0]!r} holds {values!r}; there must be at "
                "least two choices, filter such rows out"
            )
        for number, value in enumerate(values):
            if value is None or not value.strip():
                column = self.choices[0 if self.in_lists else number]
                raise ValueError(
                    f"task {self.task.name!r}: choice {number} in row {row} of column {column!r} is {value!r}; every "
                    "choice needs a text"
                )
        return list(values)

    def _check_room(self, pairs: list[str], starts: list[int], rows: list[int]) -> None:
        """Raise a `ValueError` where a choice alone fills a whole input."""
        ids = tokenize(self.tokenizer, pairs, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        for number, tokens in enumerate(ids):
            if len(tokens) + self.added >= self.max_length:
                place = max(i for i, start in enumerate(starts) if start <= number)
                raise ValueError(
                    f"task {self.task.name!r}: choice {number - starts[place]} in row {rows[place]} has {len(tokens)} "
                    f"tokens, which leaves no room for what it is about in max_length={self.max_length}; raise "
                    "max_length, or filter such rows out"
                )

    def _label(self, value: Any, count: int, row: int) -> int:
        label = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < count:
            raise self._label_error(
                f"label {value!r} in row {row} of column {self.task.label_column!r} is not the number of one of its "
                f"{count} choices (0 to {count - 1}); unlabelled rows must be filtered out"
            )
        return label

    def _label_error(self, what: str) -> LabelError:
        return LabelError(f"task {self.task.name!r}: {what}", self.task.name)


def _holds_strings(feature: Any, in_list: bool) -> bool:
    if in_list:
        return isinstance(feature, (List, LargeList)) and _holds_strings(feature.feature, False)
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")
