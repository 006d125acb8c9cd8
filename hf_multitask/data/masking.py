"""Which tokens of a text are hidden from an encoder, and what stands in their place.

A pure function of (seed, task, pass, row): the same row is masked the same way however rows fall into batches and
processes, another way in every pass over the data, and again the same way when a run is resumed.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

__all__ = ["Masking", "make_masking", "masking_generator"]


@dataclass(frozen=True)
class Masking:
    """How tokens are hidden (Devlin et al. 2019): of those chosen 80 % become the mask, 10 % another token, 10 % stay.

    Args:
        probability: Share of a row's tokens that are chosen, special tokens not counted; at least one is.
        whole_words: Choose words, with all of their tokens, in random order until the share is reached.
        mask_id: Id of the mask.
        ordinary_ids: Ids that another token is drawn from, uniformly.
    """

    probability: float
    whole_words: bool
    mask_id: int
    ordinary_ids: np.ndarray

    def apply(
        self, ids: np.ndarray, words: np.ndarray, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Hide tokens of one row.

        Args:
            ids: `[L]`, the row's tokens.
            words: `[L]`, the number of each token's word, rising along the row; -100 for special tokens.
            generator: Source of the choice.

        Returns:
            `[L]`, the tokens as the encoder gets them; `[K]`, the places that are predicted, rising; and `[K]`, the
            tokens that stood there. K is 0 for a row of special tokens only.

        Example:
            >>> masking = Masking(0.5, False, mask_id=4, ordinary_ids=np.arange(5, 9))
            >>> row, words = np.array([1, 5, 6, 7, 8, 2]), np.array([-100, 0, 1, 2, 3, -100])
            >>> _, places, tokens = masking.apply(row, words, masking_generator(0, "lm", 0, 0))
            >>> len(places), bool((row[places] == tokens).all())
            (2, True)
        """
        candidates = np.flatnonzero(words != _SPECIAL)
        wanted = max(round(self.probability * len(candidates)), 1)
        if self.whole_words:
            # Neighbours of one number are one word; a number may come again in the second text of a pair.
            own = words[candidates]
            starts = np.flatnonzero(np.diff(own, prepend=-1))
            sizes = np.diff(np.append(starts, len(own)))
            order = generator.permutation(len(starts))
            taken = order[: int(np.searchsorted(np.cumsum(sizes[order]), wanted)) + 1]
            places = np.concatenate([candidates[starts[i] : starts[i] + sizes[i]] for i in taken] or [candidates[:0]])
        else:
            places = generator.permutation(candidates)[:wanted]
        places = np.sort(places)
        tokens = ids[places]
        fate = generator.random(len(places))
        hidden = ids.copy()
        hidden[places[fate < 0.8]] = self.mask_id
        others = places[(fate >= 0.8) & (fate < 0.9)]
        hidden[others] = generator.choice(self.ordinary_ids, len(others))
        return hidden, places, tokens


_SPECIAL = -100


def masking_generator(seed: int, task: str, repeat: int, row: int) -> np.random.Generator:
    """Return the source of the choice for one row of a task in one pass over the data."""
    return np.random.Generator(np.random.PCG64([seed, zlib.crc32(task.encode()), repeat, row]))


def make_masking(tokenizer: PreTrainedTokenizerBase, task: str, probability: float, whole_words: bool) -> Masking:
    """Return the masking of a task.

    Raises:
        ValueError: The tokenizer has no mask token.
    """
    if tokenizer.mask_token_id is None:
        raise ValueError(
            f"task {task!r}: masked_lm needs a mask token, and tokenizer {type(tokenizer).__name__} has none; take the "
            "tokenizer of a masked language model"
        )
    special: Sequence[int] = tokenizer.all_special_ids
    ordinary = np.setdiff1d(np.arange(len(tokenizer)), np.asarray(special))
    return Masking(probability, whole_words, tokenizer.mask_token_id, ordinary)
