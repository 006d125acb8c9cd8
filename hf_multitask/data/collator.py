"""Rows of several tasks → one batch, grouped by task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..models.heads import IGNORE_INDEX
from ..models.passes import Segment
from ..models.task import Task, TaskType
from .sources import label_key

__all__ = ["DataCollatorForMultiTask"]


class DataCollatorForMultiTask:
    """Pads rows of any mixture of tasks into one batch.

    The batch holds `input_ids`, `attention_mask` and, where a row has them, `token_type_ids`, all `[B, L]`;
    `task_ids` `[B]`, the index of the (first) task of each row; `segments`, per task the slice of its rows and the
    length of the longest; `labels`, per task its rows' labels only; `num_items`, per task the number of labelled
    items, as plain numbers. Rows are grouped by source, the source with the longest row first, so that slices of
    similar length lie side by side; within a source they keep their order. Padding is on the right.

    Args:
        tokenizer: Gives the padding ids (which are not 0 for every tokenizer).
        tasks: The model's tasks, in its order.
        pad_to_multiple_of: Round L up to a multiple of this, for hardware that prefers it.

    Raises:
        ValueError: The tokenizer has no pad token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], pad_to_multiple_of: int | None = None
    ) -> None:
        if tokenizer.pad_token_id is None:
            raise ValueError(f"tokenizer {type(tokenizer).__name__} has no pad token; set tokenizer.pad_token")
        self.pad_ids = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
        self.task_ids = {task.name: index for index, task in enumerate(tasks)}
        self.pad_to_multiple_of = pad_to_multiple_of or 1

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch of some rows of a [`MultiTaskDataset`]."""
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            groups.setdefault(row["source"].name, []).append(row)
        lengths = {name: max(len(row["input_ids"]) for row in group) for name, group in groups.items()}
        first = {name: self.task_ids[group[0]["source"].tasks[0].name] for name, group in groups.items()}
        order = sorted(groups, key=lambda name: (-lengths[name], first[name]))
        longest = max(lengths.values())
        longest += -longest % self.pad_to_multiple_of
        ordered = [row for name in order for row in groups[name]]

        batch: dict[str, Any] = {"input_ids": self._pad(ordered, "input_ids", longest)}
        true_lengths = torch.tensor([len(row["input_ids"]) for row in ordered])
        batch["attention_mask"] = (torch.arange(longest) < true_lengths.unsqueeze(1)).long()
        if any("token_type_ids" in row for row in ordered):
            batch["token_type_ids"] = self._pad(ordered, "token_type_ids", longest)
        batch["task_ids"] = torch.tensor([first[name] for name in order for _ in groups[name]])

        segments, labels, num_items = {}, {}, {}
        start = 0
        for name in order:
            group = groups[name]
            segment = Segment(start, start + len(group), lengths[name])
            for task in group[0]["source"].tasks:
                segments[task.name] = segment
                key = label_key(task.name)
                if key in group[0]:
                    labels[task.name], num_items[task.name] = _stack_labels([row[key] for row in group], task, segment)
            start = segment.stop
        batch["segments"] = segments
        if labels:
            batch["labels"] = labels
            batch["num_items"] = num_items
        return batch

    def _pad(self, rows: list[dict[str, Any]], key: str, length: int) -> Tensor:
        # Rows without token types are single texts, whose types are all 0.
        array = np.full((len(rows), length), self.pad_ids[key], dtype=np.int64)
        for i, row in enumerate(rows):
            array[i, : len(row["input_ids"])] = row.get(key, 0)
        return torch.from_numpy(array)


def _stack_labels(values: list[Any], task: Task, segment: Segment) -> tuple[Tensor, int]:
    """Return the labels of a task's rows as one tensor, and the number of labelled items in it."""
    if task.type is TaskType.TOKEN_CLASSIFICATION:
        array = np.full((segment.rows, segment.length), IGNORE_INDEX, dtype=np.int64)
        for i, row in enumerate(values):
            array[i, : len(row)] = row
        return torch.from_numpy(array), int((array != IGNORE_INDEX).sum())
    if task.type is TaskType.SINGLE_LABEL_CLASSIFICATION:
        return torch.tensor(values, dtype=torch.int64), segment.rows
    return torch.tensor(values, dtype=torch.float32), segment.rows
