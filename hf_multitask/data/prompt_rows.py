"""Rows of generating tasks: what the model is told, and what it is to answer.

A row is a text that is predicted as a whole, a prompt and a target, or a chat whose last message is the target. What
is prepared of it is `input_ids`, prompt and target in one, and in the task's label column the number of tokens that
come before the first one that is predicted. So the loss is on the target only.

Prompt and target are tokenized apart, exactly as at generation, where the target is not there. The end of the target is
the tokenizer's end-of-sequence token (what ends a turn, in a chat). Where a row is too long, the longest of its text
columns loses its end, so that a template's own words stay; if that is not enough (or in chats that come as messages)
the prompt loses tokens on its left; only a target that is too long by itself is cut. A target that was cut teaches the
model never to end: such rows are counted, and more than one in a hundred are refused.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Features, List, Value
from transformers import PreTrainedTokenizerBase

from ..models.task import Task, TaskType
from .labels import LabelError, label_ids
from .row_encoding import RowEncoder, tokenizer_key
from .shared_tokenizer import apply_chat_template, tokenize
from .sources import Source, label_key

__all__ = ["ANSWER", "MOST_CUT", "PromptRows", "target_tokens"]

ANSWER = "answer"
"""Column of prepared rows with the number of the target among the task's labels, where they are a closed set."""

MOST_CUT = 0.01
"""The largest share of rows whose targets may be cut."""

_ATTEMPTS = 4  # a text that was cut may come out as another number of tokens


class PromptRows(RowEncoder):
    """Rows of one `causal_lm` task."""

    def __init__(
        self,
        columns: Features,
        source: Source,
        labels: bool | None,
        max_length: int,
        tokenizer: PreTrainedTokenizerBase | None,
        seed: int,
    ) -> None:
        (self.task,) = source.tasks
        if tokenizer is None:
            raise ValueError("processing_class is missing: the rows hold text and need the backbone's tokenizer")
        for column in self.task.text_columns:
            if column not in columns:
                what = "prompt asks for a column" if self.task.prompt else "no text column"
                raise ValueError(f"task {self.task.name!r}: {what} {column!r}; columns are {', '.join(columns)}")
        self.messages = _is_chat(columns[self.task.text_columns[0]]) and self.task.prompt is None
        self.column: str | None = self.task.label_column  # of the targets
        if self.messages and self.task.type is TaskType.SEQ2SEQ_LM and self.column not in columns:
            self.column = None  # the last message is the target
        self._check_columns(columns)
        super().__init__(columns, source, None if self.column is None else labels, max_length)
        self.tokenizer, self.seed = tokenizer, seed
        self.names = {name: feature.names for name, feature in columns.items() if isinstance(feature, ClassLabel)}
        self._targets = self._whole_numbers(columns) if labels is not False else {}
        self.with_target = self.messages and labels is not False
        if self.column is not None:
            self.with_target = labels is not False and self.column in columns
        elif not self.messages:
            self.with_target = labels is not False
        if (self.messages or self.task.chat) and not tokenizer.chat_template:
            raise ValueError(
                f"task {self.task.name!r}: tokenizer {type(tokenizer).__name__} has no chat template, which its chat "
                "messages need; set tokenizer.chat_template, or give prompt and target without chat"
            )
        if tokenizer.eos_token_id is None and self._has_prompt and not (self.messages or self.task.chat):
            raise ValueError(
                f"task {self.task.name!r}: tokenizer {type(tokenizer).__name__} has no end-of-sequence token, so that "
                "no target would end; set tokenizer.eos_token"
            )

    def _check_columns(self, columns: Features) -> None:
        """Raise ValueError where columns hold what cannot be read, or would not be read."""
        task = self.task
        for column in task.text_columns:
            feature = columns[column]
            inner = feature.feature if isinstance(feature, List) else feature
            if not isinstance(inner, (Value, ClassLabel)) and not self.messages:
                chat = "" if task.prompt else ", or chat messages (dictionaries with role and content)"
                raise ValueError(
                    f"task {task.name!r}: column {column!r} must hold texts, numbers or lists of words{chat}; it has "
                    f"the type {feature}"
                )
        if self.messages and self.column is not None:
            raise ValueError(
                f"task {task.name!r}: column {task.text_columns[0]!r} holds chat messages, the last of which is the "
                f"target: {self.column!r} would not be read, leave out label_column (and that column)"
            )
        if task.chat and not self.messages and self.column is None:
            raise ValueError(
                f"task {task.name!r}: chat=True needs a target for the assistant to say; give prompt or label_column"
            )

    def _whole_numbers(self, columns: Features) -> dict[int, str]:
        """Return what each whole number in the column of targets stands for; empty where it is no label."""
        column, labels = str(self.column), self.task.labels or ()
        feature = columns.get(column)
        if isinstance(feature, ClassLabel):
            return dict(enumerate(feature.names))
        if not labels or not isinstance(feature, Value) or "int" not in feature.dtype:
            return {}
        try:
            return {value: labels[place] for value, place in label_ids(labels, column, feature).items()}
        except ValueError as error:
            raise LabelError(f"task {self.task.name!r}: {error}", self.task.name) from None

    @property
    def _has_prompt(self) -> bool:
        return self.messages or self.column is not None

    def key(self) -> list[Any]:
        """Return what the result depends on, besides the dataset."""
        return [*super().key(), self.task.to_dict(), self.max_length, self.with_target, self.seed, self._tokenizer()]

    def _tokenizer(self) -> list[Any]:
        return [tokenizer_key(self.tokenizer), self.tokenizer.chat_template, self.tokenizer.eos_token]

    @property
    def features(self) -> Features:
        """Columns and types of prepared rows."""
        columns: dict[str, Any] = {"input_ids": List(Value("int32"))}
        if self.with_target:
            columns[label_key(self.task.name)] = Value("int32")
            if self.task.labels:
                columns[ANSWER] = Value("int32")
        return Features(columns)

    def __call__(self, batch: Mapping[str, list], indices: list[int]) -> dict[str, list]:
        """Return the columns of prepared rows, for a batch of rows and their numbers (consecutive ones)."""
        result: dict[str, list] = {name: [] for name in self.features}
        for place, row in enumerate(indices):
            values = {name: column[place] for name, column in batch.items()}
            prompt, target = self._texts(values, row)
            if target is None and self.with_target:  # a text as a whole
                ids, start = self._tokens(prompt)[: self.max_length], 1
                if len(ids) < 2:
                    raise ValueError(f"row {row} of column {self.task.text_columns[0]!r} has no token to predict")
            else:
                after = [] if target is None else target_ids(self.task.name, self.tokenizer, prompt, target)
                ids, start = self._join(self._shorten(prompt, len(after), values, row), target, row)
            result["input_ids"].append(ids)
            if self.with_target:
                result[label_key(self.task.name)].append(start)
                if self.task.labels:
                    result[ANSWER].append(self.task.labels.index(self._verbalize(values[str(self.column)], row)))
        return result

    # ---- from a row to texts ----

    def _texts(self, values: Mapping[str, Any], row: int) -> tuple[Any, str | None]:
        """Return prompt and target of a row; the prompt is a text or a list of messages."""
        task = self.task
        if self.messages:
            return self._chat(values[task.text_columns[0]], row)
        for column in task.text_columns:
            if _is_missing(values[column]):
                raise ValueError(f"text {values[column]} in row {row} of column {column!r}; filter such rows out")
        if task.prompt is None:
            prompt = "\n".join(self._cell(values, column) for column in task.text_columns)
        else:
            prompt = self._template(row).format(**{column: self._cell(values, column) for column in task.text_columns})
        if self.column is None:
            return prompt, None
        target = self._verbalize(values[self.column], row) if self.with_target else None
        return ([{"role": "user", "content": prompt}] if task.chat else prompt), target

    def _cell(self, values: Mapping[str, Any], column: str) -> str:
        """Return a cell as text: a label's name for the id of a `ClassLabel`."""
        value, names = values[column], self.names.get(column, ())
        return names[value] if isinstance(value, int) and 0 <= value < len(names) else _plain_text(value)

    def _template(self, row: int) -> str:
        prompts = self.task.prompt or ()
        if len(prompts) == 1:
            return prompts[0]
        generator = np.random.Generator(np.random.PCG64([self.seed, zlib.crc32(self.task.name.encode()), row]))
        return prompts[int(generator.integers(len(prompts)))]

    def _chat(self, messages: Any, row: int) -> tuple[list[dict[str, Any]], str | None]:
        column = self.task.text_columns[0]
        if not messages:
            raise ValueError(f"row {row} of column {column!r} has no messages; filter it out")
        messages = [{"role": message["role"], "content": message["content"]} for message in messages]
        last = messages[-1]
        if last["role"] != "assistant":
            if self.with_target:
                raise self._label_error(
                    f"row {row} of column {column!r} ends with a message of {last['role']!r}; the last message is the "
                    "target, and must be the assistant's"
                )
            return messages, None
        if self.with_target and not (last["content"] or "").strip():
            raise self._label_error(f"row {row} of column {column!r} has an empty target; filter it out")
        return messages[:-1], last["content"] if self.with_target else None

    def _verbalize(self, value: Any, row: int) -> str:
        """Return a target as text: a label's name for its id."""
        labels, where = self.task.labels, f"in row {row} of column {self.column!r}"
        if self._targets and isinstance(value, int) and not isinstance(value, bool):
            if value not in self._targets:
                names = self._targets
                by_id = list(names) == list(range(len(names)))
                known = (
                    f"an id of its {len(names)} labels (0 to {len(names) - 1})" if by_id else f"one of {list(names)}"
                )
                raise self._label_error(
                    f"target {value!r} {where} is not {known}; rows without a target must be filtered out"
                )
            value = self._targets[value]
        text = "" if _is_missing(value) else _plain_text(value)
        if not text.strip():
            raise self._label_error(
                f"target {value!r} {where} is empty; there is nothing to learn from it, filter it out"
            )
        if labels and text not in labels:
            raise self._label_error(
                f"target {value!r} {where} is not one of its {len(labels)} labels; add it to Task(labels=...)"
            )
        return text

    def _label_error(self, what: str) -> LabelError:
        return LabelError(f"task {self.task.name!r}: {what}", self.task.name)

    # ---- from texts to tokens ----

    def _tokens(self, text: str) -> list[int]:
        ids = tokenize(self.tokenizer, text, return_attention_mask=False)["input_ids"]
        eos = self.tokenizer.eos_token_id
        return ids + [eos] if eos is not None and (not ids or ids[-1] != eos) else ids

    def _prompt_tokens(self, prompt: Any) -> list[int]:
        return prompt_ids(self.tokenizer, prompt)

    def _shorten(self, prompt: Any, behind: int, values: Mapping[str, Any], row: int) -> Any:
        """Return a prompt that leaves room for tokens behind it, if that takes the end of its longest column only.

        The template's own words stay: they ask the question.
        """
        for _ in range(_ATTEMPTS):
            excess = len(self._prompt_tokens(prompt)) + behind - self.max_length
            if excess <= 0 or self.messages:
                break
            column = max(self.task.text_columns, key=lambda name: len(self._cell(values, name)))
            tokens = tokenize(self.tokenizer, self._cell(values, column), add_special_tokens=False)["input_ids"]
            if len(tokens) <= excess:
                break
            shorter = self.tokenizer.decode(tokens[: len(tokens) - excess], skip_special_tokens=True)
            values = {**values, column: shorter}
            prompt, _ = self._texts(values, row)
        return prompt

    def _join(self, prompt: Any, target: str | None, row: int) -> tuple[list[int], int]:
        """Return the tokens of prompt and target, and how many the prompt has."""
        before = prompt_ids(self.tokenizer, prompt)
        after = [] if target is None else target_ids(self.task.name, self.tokenizer, prompt, target)
        room = self.max_length - len(after)
        if room < 1 and before:
            after, room = after[: self.max_length - 1], 1
        if len(before) > room:
            before = before[len(before) - room :]
        if not before:
            raise ValueError(f"row {row} has an empty prompt: nothing would be there to begin from")
        return before + after, len(before)

    def check(self, rows: Any) -> None:
        """Raise ValueError where too many targets were cut; `rows` is the prepared table."""
        names = ["input_ids", label_key(self.task.name)]
        if self.with_target and self._has_prompt:
            self.check_cut(self.cut_targets({name: rows.column(name).to_pylist() for name in names}), len(rows))

    def check_cut(self, cut: int, seen: int, at_least: int = 0) -> None:
        """Raise ValueError where too many targets were cut of the rows that were seen; see [`RowEncoder`]."""
        if cut > MOST_CUT * max(seen, at_least):
            raise ValueError(
                f"task {self.task.name!r}: {cut} of {seen} targets do not fit into max_length={self.max_length} "
                "tokens and would be cut; raise max_length, or filter long targets out"
            )

    def cut_targets(self, columns: Mapping[str, Sequence[Any]]) -> int:
        """Return of how many prepared rows the target was cut: it fills all behind one token, and has no end."""
        if not self.with_target or not self._has_prompt:
            return 0
        end, most = self.tokenizer.eos_token_id, self.max_length
        rows = zip(columns["input_ids"], columns[label_key(self.task.name)], strict=True)
        return sum(start == 1 and len(ids) == most and (ids[-1] != end or most == 1) for ids, start in rows)


def _plain_text(value: Any) -> str:
    """Return a cell as text; a list of words is joined by spaces, a fraction has four significant digits."""
    if isinstance(value, list):
        return " ".join(map(_plain_text, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_chat(feature: Any) -> bool:
    inner = feature.feature if isinstance(feature, List) else None
    return isinstance(inner, (dict, Features)) and {"role", "content"} <= set(inner)


def prompt_ids(tokenizer: Any, prompt: Any) -> list[int]:
    """Return the tokens of a prompt, a text or messages, as generation begins with them."""
    if isinstance(prompt, str):
        ids = tokenize(tokenizer, prompt, return_attention_mask=False)["input_ids"]
        # Tokenizers that end every text with a token must not end this one.
        return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
    return apply_chat_template(tokenizer, prompt, add_generation_prompt=True, return_dict=False)


def target_ids(task: str, tokenizer: Any, prompt: Any, target: str) -> list[int]:
    """Return the tokens of a target behind a prompt, with what ends it.

    Raises:
        ValueError: In the tokenizer's chat template the two cannot be told apart.
    """
    if isinstance(prompt, str):
        joined = target if prompt[-1:].isspace() or not prompt else f" {target}"
        ids = tokenize(tokenizer, joined, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return [*ids, tokenizer.eos_token_id]
    before = prompt_ids(tokenizer, prompt)
    whole = apply_chat_template(tokenizer, [*prompt, {"role": "assistant", "content": target}], return_dict=False)
    if whole[: len(before)] != before:
        raise ValueError(
            f"task {task!r}: the tokenizer's chat template writes the messages before an answer in another way when "
            "the answer is there, so that prompt and target cannot be told apart"
        )
    after = whole[len(before) :]
    # What a template writes behind the end of a turn is never reached in generation.
    ends = [place for place, token in enumerate(after) if token == tokenizer.eos_token_id]
    return after[: ends[-1] + 1] if ends else after


def target_tokens(task: Task, tokenizer: PreTrainedTokenizerBase) -> list[list[list[int]]]:
    """Return the tokens of every label of a closed set: for each way in which a prompt may end, one list per label.

    A target begins with a space unless the prompt ends in one; in a chat there is one way only.
    """
    prompts: list[Any] = [[{"role": "user", "content": "x"}]] if task.chat else ["x", "x "]
    return [[target_ids(task.name, tokenizer, prompt, label) for label in task.labels or ()] for prompt in prompts]
