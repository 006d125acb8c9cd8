"""Rows of several tasks → one batch, grouped by task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..models.heads import IGNORE_INDEX
from ..models.passes import Segment
from ..models.task import Task, TaskType
from .sources import Source, label_key

__all__ = ["DataCollatorForMultiTask"]


class _Plan(NamedTuple):
    """What the collator needs to know of a source: the id of its first task, and (name, column, type) of each."""

    first: int
    tasks: tuple[tuple[str, str, TaskType], ...]


class DataCollatorForMultiTask:
    """Pads rows of any mixture of tasks into one batch.

    The batch holds `input_ids`, `attention_mask` and, where a row has them, `token_type_ids`, all `[B, L]`;
    `task_ids` `[B]`, the index of the (first) task of each row; `segments`, per task the slice of its rows and the
    length of the longest; `labels`, per task its rows' labels only; `num_items`, per task the number of labelled
    items, and `num_tokens`, those of the batch without padding, as plain numbers. Rows are grouped by source, the
    source with the longest row first, so that slices of similar length lie side by side; within a source they keep
    their order. Padding is on the right.

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
        self._plans: dict[str, _Plan] = {}

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch of some rows of a [`MultiTaskDataset`]."""
        # With hundreds of tasks nearly every row is a group of its own: what is done per group is kept to little.
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            name = row["source"].name
            if name in groups:
                groups[name].append(row)
            else:
                groups[name] = [row]
        slices = []
        for name, group in groups.items():
            plan = self._plans.get(name) or self._plan(group[0]["source"])
            length = max([len(row["input_ids"]) for row in group]) if len(group) > 1 else len(group[0]["input_ids"])
            slices.append((-length, plan.first, plan, group))
        slices.sort()  # never looks beyond `first`, which is another for every source
        ordered = [row for *_, group in slices for row in group]
        longest = -slices[0][0]
        longest += -longest % self.pad_to_multiple_of

        lengths = np.array([len(row["input_ids"]) for row in ordered])
        batch: dict[str, Any] = {
            "input_ids": self._pad(ordered, "input_ids", longest),
            "attention_mask": torch.from_numpy((np.arange(longest) < lengths[:, None]).astype(np.int64)),
        }
        if any("token_type_ids" in row for row in ordered):
            batch["token_type_ids"] = self._pad(ordered, "token_type_ids", longest)
        batch["task_ids"] = torch.tensor([first for _, first, _, group in slices for _ in group])
        batch["segments"], batch["labels"], batch["num_items"] = _group_labels(slices)
        batch["num_tokens"] = int(lengths.sum())
        if not batch["labels"]:
            del batch["labels"], batch["num_items"], batch["num_tokens"]
        return batch

    def _plan(self, source: Source) -> _Plan:
        tasks = tuple((task.name, label_key(task.name), task.type) for task in source.tasks)
        self._plans[source.name] = _Plan(self.task_ids[tasks[0][0]], tasks)
        return self._plans[source.name]

    def _pad(self, rows: list[dict[str, Any]], key: str, length: int) -> Tensor:
        # Rows without token types are single texts, whose types are all 0.
        array = np.full((len(rows), length), self.pad_ids[key], dtype=np.int64)
        for i, row in enumerate(rows):
            array[i, : len(row["input_ids"])] = row.get(key, 0)
        return torch.from_numpy(array)


def _group_labels(
    slices: Sequence[tuple[int, int, _Plan, list[dict[str, Any]]]],
) -> tuple[dict[str, Segment], dict[str, Tensor], dict[str, int]]:
    """Return segments, labels and item counts by task, for `(-longest row, first task, plan, rows)` in their order."""
    segments: dict[str, Segment] = {}
    labels: dict[str, Tensor] = {}
    num_items: dict[str, int] = {}
    class_ids: list[int] = []  # of all single-label tasks: one tensor, cut into views
    cuts: list[int] = []
    cut_tasks: list[str] = []
    single, tokens = TaskType.SINGLE_LABEL_CLASSIFICATION, TaskType.TOKEN_CLASSIFICATION
    start = 0
    for negative_length, _, plan, group in slices:
        first, count = group[0], len(group)
        segment = Segment(start, start + count, -negative_length)
        start += count
        for name, key, task_type in plan.tasks:
            segments[name] = segment
            if key not in first:
                continue
            num_items[name] = count
            if task_type is single:
                class_ids += [row[key] for row in group]
                cuts.append(count)
                cut_tasks.append(name)
            elif task_type is tokens:
                array = np.full((count, segment.length), IGNORE_INDEX, dtype=np.int64)
                for i, row in enumerate(group):
                    array[i, : len(row[key])] = row[key]
                labels[name] = torch.from_numpy(array)
                num_items[name] = int((array != IGNORE_INDEX).sum())
            else:
                labels[name] = torch.from_numpy(np.asarray([row[key] for row in group], dtype=np.float32))
    if class_ids:
        labels.update(zip(cut_tasks, torch.tensor(class_ids).split(cuts), strict=True))
    return segments, labels, num_items
