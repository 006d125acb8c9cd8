"""Rows of generating tasks: what the model is told, and what it is to answer.

A row is a text that is predicted as a whole, a prompt and a target, or a chat whose last message is the target. What
is prepared of it is `input_ids`, prompt and target in one, and in the task's label column the number of tokens that
come before the first one that is predicted. So the loss is on the target only.

Prompt and target are tokenized apart, exactly as at generation, where the target is not there. The end of the target is
the tokenizer's end-of-sequence token (what ends a turn, in a chat). Where a row is too long, the longest of its text
columns loses its end, so that a template's own words stay; if that is not enough (or in chats that come as messages)
the prompt loses tokens on its left; only a target that is too long by itself is cut. A target that was cut teaches the model never to end: such
rows are counted, and more than one in a hundred are refused.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import ClassLabel, Features, List, Value
from transformers import PreTrainedTokenizerBase

from ..models.task import Task, TaskType
from .row_encoding import RowEncoder, tokenizer_key
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
        self.messages = _is_chat(columns[self.task.text_columns[0]])
        self.column: str | None = self.task.label_column  # of the targets
        if self.messages and self.task.type is TaskType.SEQ2SEQ_LM and self.column not in columns:
            self.column = None  # the last message is the target
        super().__init__(columns, source, None if self.column is None else labels, max_length)
        self.tokenizer, self.seed = tokenizer, seed
        self.names: list[str] | None = None
        self.with_target = self.messages and labels is not False
        if self.column is not None:
            self.with_target = labels is not False and self.column in columns
            feature = columns.get(self.column)
            self.names = feature.names if isinstance(feature, ClassLabel) else None
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
            if values[column] is None:
                raise ValueError(f"text None in row {row} of column {column!r}; filter such rows out")
        if task.prompt is None:
            prompt = "\n".join(_plain_text(values[column]) for column in task.text_columns)
        else:
            prompt = self._template(row).format(**{column: _plain_text(values[column]) for column in task.text_columns})
        if self.column is None:
            return prompt, None
        target = self._verbalize(values[self.column], row) if self.with_target else None
        return ([{"role": "user", "content": prompt}] if task.chat else prompt), target

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
                raise ValueError(
                    f"row {row} of column {column!r} ends with a message of {last['role']!r}; the last message is the "
                    "target, and must be the assistant's"
                )
            return messages, None
        if self.with_target and not (last["content"] or "").strip():
            raise ValueError(f"row {row} of column {column!r} has an empty target; filter it out")
        return messages[:-1], last["content"] if self.with_target else None

    def _verbalize(self, value: Any, row: int) -> str:
        """Return a target as text: a label's name for its id."""
        column, labels = self.column, self.task.labels
        names = self.names or (list(labels) if labels else None)
        if isinstance(value, int) and not isinstance(value, bool) and names is not None and 0 <= value < len(names):
            value = names[value]
        text = "" if value is None else _plain_text(value)
        if not text.strip():
            raise ValueError(
                f"task {self.task.name!r}: target {value!r} in row {row} of column {column!r} is empty; there is "
                "nothing to learn from it, filter it out"
            )
        if labels and text not in labels:
            raise ValueError(
                f"task {self.task.name!r}: target {value!r} in row {row} of column {column!r} is not one of its "
                f"{len(labels)} labels; add it to Task(labels=...)"
            )
        return text

    # ---- from texts to tokens ----

    def _tokens(self, text: str) -> list[int]:
        ids = self.tokenizer(text, return_attention_mask=False)["input_ids"]
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
            column = max(self.task.text_columns, key=lambda name: len(_plain_text(values[name])))
            tokens = self.tokenizer(_plain_text(values[column]), add_special_tokens=False)["input_ids"]
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
        if not self.with_target or not self._has_prompt:
            return
        lengths = np.asarray([len(ids) for ids in rows.column("input_ids").to_pylist()])
        starts = rows.column(label_key(self.task.name)).to_numpy()
        # A cut target fills all that is left behind one token of its prompt.
        cut = int(((lengths == self.max_length) & (starts == 1)).sum())
        if cut > MOST_CUT * len(lengths):
            raise ValueError(
                f"task {self.task.name!r}: {cut} of {len(lengths)} targets do not fit into max_length="
                f"{self.max_length} tokens and would be cut; raise max_length, or filter long targets out"
            )


def _plain_text(value: Any) -> str:
    """Return a cell as text; a list of words is joined by spaces, a fraction has four significant digits."""
    if isinstance(value, list):
        return " ".join(map(_plain_text, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_chat(feature: Any) -> bool:
    inner = feature.feature if isinstance(feature, List) else None
    return isinstance(inner, (dict, Features)) and {"role", "content"} <= set(inner)


def prompt_ids(tokenizer: Any, prompt: Any) -> list[int]:
    """Return the tokens of a prompt, a text or messages, as generation begins with them."""
    if isinstance(prompt, str):
        ids = tokenizer(prompt, return_attention_mask=False)["input_ids"]
        # Tokenizers that end every text with a token must not end this one.
        return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)


def target_ids(task: str, tokenizer: Any, prompt: Any, target: str) -> list[int]:
    """Return the tokens of a target behind a prompt, with what ends it.

    Raises:
        ValueError: In the tokenizer's chat template the two cannot be told apart.
    """
    if isinstance(prompt, str):
        joined = target if prompt[-1:].isspace() or not prompt else f" {target}"
        ids = tokenizer(joined, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return [*ids, tokenizer.eos_token_id]
    before = prompt_ids(tokenizer, prompt)
    whole = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": target}], return_dict=False)
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
