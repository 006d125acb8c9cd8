"""Rows of encoder-decoders that write: a text that the encoder reads, and a target that the decoder writes.

What is prepared of a row is `input_ids`, the text as the tokenizer makes it, and in the task's label column the tokens
of the target, as the tokenizer makes those (some write targets in another way), with the end-of-sequence token behind
them. Each may have `max_length` tokens. A text that is too long loses the end of the longest of its columns, so that a
template's own words stay; a chat that comes as messages loses its beginning. A target that is too long is cut, which
teaches the model never to end: such rows are counted, and more than one in a hundred are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Features, List, Value

from .prompt_rows import ANSWER, PromptRows
from .shared_tokenizer import apply_chat_template, tokenize
from .sources import label_key

__all__ = ["Seq2SeqRows", "answer_ids"]


class Seq2SeqRows(PromptRows):
    """Rows of one `seq2seq_lm` task."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.special_tokens = self.tokenizer.num_special_tokens_to_add()
        if self.max_length <= self.special_tokens:
            raise ValueError(
                f"max_length={self.max_length} leaves no room: the tokenizer adds {self.special_tokens} special tokens"
            )

    def key(self) -> list[Any]:
        """Return what the result depends on, besides the dataset."""
        # Tokenizers of translation models write the language of a text beside it.
        languages = [getattr(self.tokenizer, name, None) for name in ("src_lang", "tgt_lang")]
        return [*super().key(), languages, self.tokenizer.truncation_side]

    @property
    def features(self) -> Features:
        """Columns and types of prepared rows."""
        tokens = {label_key(self.task.name): List(Value("int32"))} if self.with_target else {}
        return Features({**super().features, **tokens})

    def __call__(self, batch: Mapping[str, list], indices: list[int]) -> dict[str, list]:
        """Return the columns of prepared rows, for a batch of rows and their numbers (consecutive ones)."""
        result: dict[str, list] = {name: [] for name in self.features}
        for place, row in enumerate(indices):
            values = {name: column[place] for name, column in batch.items()}
            text, target = self._texts(values, row)
            ids = self._cut(self._shorten(text, 0, values, row))
            if not ids:
                raise ValueError(f"row {row} of column {self.task.text_columns[0]!r} has no token; filter it out")
            result["input_ids"].append(ids)
            if self.with_target:
                result[label_key(self.task.name)].append(answer_ids(self.tokenizer, str(target))[: self.max_length])
                if self.task.labels:
                    result[ANSWER].append(self.task.labels.index(str(target)))
        return result

    def _prompt_tokens(self, prompt: Any) -> list[int]:
        tokenizer: Any = self.tokenizer
        if isinstance(prompt, str):
            return tokenize(tokenizer, prompt, return_attention_mask=False)["input_ids"]
        return apply_chat_template(tokenizer, prompt, add_generation_prompt=True, return_dict=False)

    def _cut(self, text: Any) -> list[int]:
        if isinstance(text, str):  # what the tokenizer puts at the ends stays
            options = {"truncation": True, "max_length": self.max_length, "return_attention_mask": False}
            return tokenize(self.tokenizer, text, **options)["input_ids"]
        return self._prompt_tokens(text)[-self.max_length :]

    def cut_targets(self, columns: Mapping[str, Sequence[Any]]) -> int:
        """Return of how many prepared rows the target was cut."""
        targets = columns[label_key(self.task.name)] if self.with_target else ()
        return sum(not _ends(self.tokenizer, target) for target in targets)


def answer_ids(tokenizer: Any, target: str) -> list[int]:
    """Return the tokens of a target, with what ends it."""
    ids = tokenize(tokenizer, text_target=target, return_attention_mask=False)["input_ids"]
    return ids if _ends(tokenizer, ids) else [*ids, tokenizer.eos_token_id]


def _ends(tokenizer: Any, target: list[int]) -> bool:
    """Return whether a target has its end; some tokenizers write the language of the text behind it."""
    return tokenizer.eos_token_id in target[-2:]
