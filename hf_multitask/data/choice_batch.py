"""Rows of `multiple_choice` tasks → one row of the encoder for each choice, and which of them belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..models.task import Task
from .choice_rows import LENGTHS
from .sources import label_key

__all__ = ["ChoiceBatch", "ChoiceTask"]


@dataclass
class ChoiceBatch:
    """Some rows of one task, as a batch takes them.

    Args:
        sequences: What the model reads: the pairs of all rows.
        counts: For each row, the number of its choices.
        labels: For each row, the number of the right one; None where that is not known.
    """

    sequences: list[dict[str, Any]]
    counts: list[int]
    labels: list[int] | None

    @property
    def num_items(self) -> int:
        """Number of rows, each of which is one item."""
        return len(self.counts)

    def arrays(self, length: int) -> tuple[np.ndarray | None, np.ndarray]:
        """Return labels `[rows]` or None, and `[rows, C]`, the place `sequence * length` of each choice.

        Where a row has fewer choices, the sequence is -1.
        """
        numbers = np.full((len(self.counts), max(self.counts)), -1, dtype=np.int64)
        first = 0
        for row, count in enumerate(self.counts):
            numbers[row, :count] = np.arange(first, first + count)
            first += count
        return None if self.labels is None else np.array(self.labels, dtype=np.int64), numbers * length


class ChoiceTask:
    """Makes batches of the rows of one `multiple_choice` task."""

    def __init__(self, task: Task) -> None:
        self._key = label_key(task.name)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> ChoiceBatch:
        """Return what a batch takes of some rows of a prepared source."""
        sequences: list[dict[str, Any]] = []
        for row in rows:
            ends = np.cumsum(row[LENGTHS]).tolist()
            for start, end in zip([0, *ends], ends, strict=False):
                keys = [key for key in ("input_ids", "token_type_ids") if key in row]
                sequences.append({key: row[key][start:end] for key in keys})
        labels = [int(row[self._key]) for row in rows] if self._key in rows[0] else None
        return ChoiceBatch(sequences, [len(row[LENGTHS]) for row in rows], labels)
