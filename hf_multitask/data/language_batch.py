"""Rows of tasks over the vocabulary → what the model reads, and which tokens it is to predict where.

What is predicted differs by task (hidden tokens, or the tokens of a target), what the model is told does not: for each
row, places in it and the token to predict at each. Only encoder-decoders, which do not read their targets, are told the
tokens alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..models.heads import IGNORE_INDEX
from ..models.task import Task, TaskType
from .masking import make_masking, masking_generator
from .packing import plan_packing
from .sources import label_key

__all__ = ["LanguageRows", "LanguageTask"]


@dataclass
class LanguageRows:
    """Some rows of one task over the vocabulary, as a batch takes them.

    Args:
        sequences: What the model reads: the rows, or several of them in one, with `position_ids` that begin anew.
        sequence_of: For each row, the number of its sequence.
        places: For each row, where in its sequence tokens are predicted; none where targets are texts of their own.
        tokens: For each row, the tokens to predict there.
    """

    sequences: list[dict[str, Any]]
    sequence_of: list[int]
    places: list[np.ndarray] = field(default_factory=list)
    tokens: list[np.ndarray] = field(default_factory=list)

    @property
    def num_items(self) -> int:
        """Number of tokens that are predicted."""
        return sum(map(len, self.tokens))

    def arrays(self, length: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return labels and places, both `[rows, K]`; a place is `sequence * length + place`, labels end in -100."""
        width = max([len(tokens) for tokens in self.tokens] + [1])
        labels = np.full((len(self.tokens), width), IGNORE_INDEX, dtype=np.int64)
        for row, tokens in enumerate(self.tokens):
            labels[row, : len(tokens)] = tokens
        if not self.places:
            return labels, None
        places = np.zeros_like(labels)
        for row, (own, sequence) in enumerate(zip(self.places, self.sequence_of, strict=True)):
            places[row, : len(own)] = sequence * length + own
        return labels, places


class LanguageTask:
    """Makes batches of the rows of one task over the vocabulary.

    Args:
        task: The task.
        tokenizer: Its tokenizer.
        seed: Seed of what is hidden.
        packing: Whether short rows stand together in long sequences.
        longest: Most tokens of such a sequence; None for no limit.

    Raises:
        ValueError: The tokenizer has no mask token.
    """

    def __init__(
        self, task: Task, tokenizer: PreTrainedTokenizerBase, seed: int, packing: bool, longest: int | None
    ) -> None:
        self.task = task
        self.seed = seed
        self.packing = packing and task.type is TaskType.CAUSAL_LM
        self.longest = longest
        self._key = label_key(task.name)
        self._masking = None
        if task.type is TaskType.MASKED_LM:
            self._masking = make_masking(tokenizer, task.name, task.mlm_probability, task.whole_words)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> LanguageRows:
        """Return what a batch takes of some rows of a prepared source; those without labels are to be read only."""
        batch = LanguageRows(list(rows), list(range(len(rows))))
        if self._key not in rows[0]:
            return batch
        for number, row in enumerate(rows):
            if self.task.type is TaskType.SEQ2SEQ_LM:
                batch.tokens.append(np.asarray(row[self._key]))
                continue
            ids = np.asarray(row["input_ids"])
            if self._masking is not None:
                generator = masking_generator(self.seed, self.task.name, *row.get("place", (0, number)))
                hidden, places, tokens = self._masking.apply(ids, np.asarray(row[self._key]), generator)
                batch.sequences[number] = {**row, "input_ids": hidden}
            else:
                places = np.arange(row[self._key] - 1, len(ids) - 1)
                tokens = ids[places + 1]
            batch.places.append(places)
            batch.tokens.append(tokens)
        return self._pack(batch) if self.packing else batch

    def _pack(self, batch: LanguageRows) -> LanguageRows:
        lengths = [len(row["input_ids"]) for row in batch.sequences]
        packed = LanguageRows([], [0] * len(lengths), list(batch.places), batch.tokens)
        for number, members in enumerate(plan_packing(lengths, self.longest)):
            start = 0
            for row in members:
                packed.sequence_of[row] = number
                packed.places[row] = batch.places[row] + start
                start += lengths[row]
            packed.sequences.append(
                {
                    "input_ids": np.concatenate([batch.sequences[row]["input_ids"] for row in members]),
                    "position_ids": np.concatenate([np.arange(lengths[row]) for row in members]),
                }
            )
        return packed
