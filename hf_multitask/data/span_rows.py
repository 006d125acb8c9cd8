"""Rows of `question_answering` tasks: a question, and windows of the context that may hold its answer.

A context that is too long for one input is read in several windows, which overlap by `Task(stride=...)` tokens; the
question stands in front of each, whole. Every window is a prepared row. Its labels are the places of the answer's first
and last token, or twice that of the row's first token where the window does not hold the whole answer.

Beside what the model reads, a prepared row has `question`, the number of its question; `offsets`, for each token where
it begins and ends in the context, flat, -1 for tokens outside of it; and, in the first row of a question, its `context`
and its `references`, the texts of all right answers. These are for evaluation and go into no batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import pyarrow.compute as pc
from datasets import Features, List, Value
from transformers import PreTrainedTokenizerBase

from .labels import LabelError
from .row_encoding import RowEncoder, tokenizer_key
from .shared_tokenizer import tokenize
from .sources import Source, label_key

__all__ = ["CONTEXT", "OFFSETS", "QUESTION", "REFERENCES", "SpanRows"]

QUESTION, OFFSETS, CONTEXT, REFERENCES = "question", "offsets", "context", "references"

# An answer as (where it begins in the context, where it ends).
_Span = tuple[int, int]


class SpanRows(RowEncoder):
    """Rows of one `question_answering` task."""

    keeps_rows = False

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
        if not tokenizer.is_fast:
            raise ValueError(
                f"task {self.task.name!r}: {type(tokenizer).__name__} does not tell where its tokens lie in the text; "
                "question_answering needs a fast tokenizer"
            )
        for column in self.task.text_columns:
            if column not in columns:
                raise ValueError(
                    f"task {self.task.name!r}: no text column {column!r}; columns are {', '.join(columns)}"
                )
            feature = columns[column]
            if not isinstance(feature, Value) or feature.dtype not in ("string", "large_string"):
                raise ValueError(f"text column {column!r} has the type {feature}; it must hold strings")
        super().__init__(columns, source, labels, max_length)
        self.tokenizer = tokenizer
        self.special_tokens = tokenizer.num_special_tokens_to_add(pair=True)
        self.has_token_types = "token_type_ids" in tokenizer.model_input_names
        if self.task.stride >= max_length - self.special_tokens:
            raise self._no_room(f"max_length={max_length} leaves {max(max_length - self.special_tokens, 0)} tokens")

    def key(self) -> list[Any]:
        """Return what the result depends on, besides the dataset."""
        options = [self.max_length, self.task.stride, self.has_token_types, tokenizer_key(self.tokenizer)]
        return [*super().key(), self.task.text_columns, self.tokenizer.truncation_side, *options]

    @property
    def features(self) -> Features:
        """Columns and types of prepared rows."""
        columns = {**super().features, QUESTION: Value("int32"), OFFSETS: List(Value("int32"))}
        references = {REFERENCES: List(Value("string"))} if self.labelled else {}
        return Features({**columns, CONTEXT: Value("string"), **references})

    def _fail(self, what: str) -> ValueError:
        return ValueError(f"task {self.task.name!r}: {what}")

    def _bad_label(self, what: str) -> LabelError:
        return LabelError(f"task {self.task.name!r}: {what}", self.task.name)

    def check(self, rows: Any) -> None:
        """Raise LabelError where no question has an answer, although the task always gives one."""
        if self.labelled and self.task.null_answers is False:
            if not pc.any(pc.greater(pc.list_value_length(rows.column(REFERENCES)), 0)).as_py():
                raise self._bad_label(
                    f"no question has an answer in column {self.task.label_column!r}, but null_answers=False: there "
                    "always is one"
                )

    def _no_room(self, what: str) -> ValueError:
        return self._fail(
            f"{what} for the context, of which neighbouring windows share stride={self.task.stride}: give "
            "Task(stride=...) fewer (a third of the room is usual), raise max_length, or filter long questions out"
        )

    def _make_encoder(self, task: Any, column: str, columns: Features) -> Any:
        feature = columns[column]
        parts = ("text", "answer_start")
        if not isinstance(feature, dict) or not all(isinstance(feature.get(part), List) for part in parts):
            raise self._bad_label(
                f"column {column!r} has the type {feature}; it must hold dictionaries with the lists text and "
                "answer_start"
            )

    def __call__(self, batch: Mapping[str, list], indices: list[int]) -> dict[str, list]:
        """Return the columns of prepared rows, for a batch of rows and their numbers (consecutive ones)."""
        questions, contexts = (batch[column] for column in self.task.text_columns)
        self._check_texts(questions, contexts, indices)
        encoded = tokenize(
            self.tokenizer,
            questions,
            contexts,
            truncation="only_second",
            max_length=self.max_length,
            stride=self.task.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=self.has_token_types,
        )
        windows: list[list[int]] = [[] for _ in indices]
        for window, place in enumerate(encoded["overflow_to_sample_mapping"]):
            windows[place].append(window)
        result: dict[str, list] = {name: [] for name in self.features}
        for place, (row, own) in enumerate(zip(indices, windows, strict=True)):
            context = contexts[place]
            inside = [_context_tokens(encoded.sequence_ids(window)) for window in own]
            pairs = zip(own, inside, strict=True)
            offsets = [encoded["offset_mapping"][window][first:stop] for window, (first, stop) in pairs]
            if not any(offsets):
                raise ValueError(
                    f"row {row} of column {self.task.text_columns[1]!r} is empty and has no token; filter it out"
                )
            for key in ("input_ids", "token_type_ids") if self.has_token_types else ("input_ids",):
                result[key] += [encoded[key][window] for window in own]
            for window, (first, stop), part in zip(own, inside, offsets, strict=True):
                after = len(encoded["input_ids"][window]) - stop
                result[OFFSETS].append([-1] * (2 * first) + list(chain.from_iterable(part)) + [-1] * (2 * after))
            result[QUESTION] += [row] * len(own)
            result[CONTEXT] += [context] + [""] * (len(own) - 1)
            if self.labelled:
                answers = self._answers(batch[self.task.label_column][place], context, row)
                result[REFERENCES] += [[context[start:end] for start, end in answers]] + [[]] * (len(own) - 1)
                firsts = [first for first, _ in inside]
                result[label_key(self.task.name)] += self._labels(answers, offsets, firsts, context, row)
        return result

    def _check_texts(self, questions: list, contexts: list, rows: list[int]) -> None:
        for column, values in zip(self.task.text_columns, (questions, contexts), strict=True):
            for row, value in zip(rows, values, strict=True):
                if value is None:
                    raise ValueError(f"text None in row {row} of column {column!r}; filter such rows out")
        ids = tokenize(self.tokenizer, questions, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        for row, tokens in zip(rows, ids, strict=True):
            room = self.max_length - self.special_tokens - len(tokens)
            if room <= self.task.stride:
                column = self.task.text_columns[0]
                raise self._no_room(
                    f"the question in row {row} of column {column!r} has {len(tokens)} tokens; max_length="
                    f"{self.max_length} leaves {max(room, 0)}"
                )

    def _answers(self, cell: Any, context: str, row: int) -> list[_Span]:
        """Return the right answers of a row, checked against its context."""
        column = self.task.label_column
        where = f"row {row} of column {column!r}"
        if cell is None or cell["text"] is None or cell["answer_start"] is None:
            raise self._bad_label(f"{where} holds {cell!r}; where the context has no answer, both lists must be empty")
        texts, starts = cell["text"], cell["answer_start"]
        if len(texts) != len(starts):
            raise self._bad_label(
                f"{where} has {len(texts)} text and {len(starts)} answer_start; there must be as many"
            )
        spans = []
        for text, start in zip(texts, starts, strict=True):
            if not isinstance(text, str) or not text.strip():
                raise self._bad_label(
                    f"answer {text!r} in {where} is empty; where there is none, both lists must be empty"
                )
            found = context[start : start + len(text)] if isinstance(start, int) and start >= 0 else ""
            if found != text:
                raise self._bad_label(
                    f"answer {text!r} in {where} is not at answer_start={start!r} of column "
                    f"{self.task.text_columns[1]!r}, where {found!r} stands; it counts characters from 0"
                )
            start += len(text) - len(text.lstrip())
            spans.append((start, start + len(text.strip())))
        return spans

    def _labels(
        self, answers: list[_Span], offsets: list[list[_Span]], firsts: list[int], context: str, row: int
    ) -> list[list[int]]:
        """Return the places of the first answer's tokens in each window; `firsts` are those of the context's tokens."""
        if not answers:
            return [[0, 0] for _ in firsts]
        start, end = answers[0]
        # What the tokenizer dropped at the ends of the context counts to the windows there.
        bounds = min(part[0][0] for part in offsets if part), max(part[-1][1] for part in offsets if part)
        labels = []
        for part, first in zip(offsets, firsts, strict=True):
            begins = 0 if part[0][0] == bounds[0] else part[0][0]
            ends = len(context) if part[-1][1] == bounds[1] else part[-1][1]
            if start < begins or end > ends:
                labels.append([0, 0])
                continue
            tokens = [place for place, (left, right) in enumerate(part) if left < end and right > start]
            if not tokens:
                raise self._bad_label(
                    f"answer {context[start:end]!r} in row {row} of column {self.task.label_column!r} has no token; "
                    "filter such rows out"
                )
            labels.append([first + tokens[0], first + tokens[-1]])
        return labels


def _context_tokens(sequence_ids: list[int | None]) -> tuple[int, int]:
    """Return the places of the first token of the second text, and after its last."""
    if 1 not in sequence_ids:
        return 0, 0
    return sequence_ids.index(1), len(sequence_ids) - sequence_ids[::-1].index(1)
