"""Rows of several tasks → one batch, grouped by task."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..models.heads import IGNORE_INDEX
from ..models.passes import Segment
from ..models.task import Task, TaskType
from .choice_batch import ChoiceBatch, ChoiceTask
from .language_batch import LanguageRows, LanguageTask
from .sources import Source, label_key

__all__ = ["DataCollatorForMultiTask", "check_collator"]

# What gives the effect of a collator of Transformers here.
_IN_PLACE_OF = {
    "DataCollatorForLanguageModeling": "give a masked_lm task, Task(mlm_probability=...)",
    "DataCollatorForWholeWordMask": "give a masked_lm task, Task(whole_words=True)",
    "DataCollatorForSeq2Seq": "give a seq2seq_lm task",
    "DataCollatorWithFlattening": "set packing=True",
}


class _Plan(NamedTuple):
    """What the collator needs to know of a source: the id of its first task, and (name, column, type) of each.

    `expand` makes the sequences that the model reads, where they are not the rows as they are.
    """

    first: int
    tasks: tuple[tuple[str, str, TaskType], ...]
    expand: LanguageTask | ChoiceTask | None


class _Slice(NamedTuple):
    """Some rows of one source; slices are sorted, longest row first, and no two have the same `first`."""

    negative_length: int
    first: int
    plan: _Plan
    rows: list[dict[str, Any]]
    sequences: list[dict[str, Any]]
    expanded: LanguageRows | ChoiceBatch | None


class DataCollatorForMultiTask:
    """Pads rows of any mixture of tasks into one batch.

    The batch holds `input_ids`, `attention_mask` and, where a row has them, `token_type_ids`, all `[B, L]`;
    `task_ids` `[B]`, the index of the (first) task of each row; `segments`, per task the slice of its rows and the
    length of the longest; `labels`, per task its rows' labels only; `num_items`, per task the number of labelled
    items, and `num_tokens`, those of the batch without padding, as plain numbers. Rows are grouped by source, the
    source with the longest row first, so that slices of similar length lie side by side; within a source they keep
    their order. Padding is on the right.

    Each row of a `multiple_choice` task becomes a row of the batch for each choice; `label_positions` says which belong
    together. Tasks over the vocabulary have labels `[rows, K]` and, there, where each is predicted (see the model's
    `forward`; not for `seq2seq_lm`, whose labels are texts of their own). With packing, rows of `causal_lm` stand
    together in long sequences: then the batch holds `position_ids`, which begin anew with each row, and `packed` is
    True.

    Args:
        tokenizer: Gives the padding ids (which are not 0 for every tokenizer).
        tasks: The model's tasks, in its order.
        pad_to_multiple_of: Round L up to a multiple of this, for hardware that prefers it.
        seed: Seed of what `masked_lm` hides.
        packing: Whether short rows of `causal_lm` stand together in long sequences.
        packing_length: Most tokens in such a sequence; None for no limit.

    Raises:
        ValueError: The tokenizer has no pad token, or no mask token where a task needs one.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Sequence[Task],
        pad_to_multiple_of: int | None = None,
        *,
        seed: int = 0,
        packing: bool = False,
        packing_length: int | None = None,
    ) -> None:
        if tokenizer.pad_token_id is None:
            raise ValueError(f"tokenizer {type(tokenizer).__name__} has no pad token; set tokenizer.pad_token")
        self.pad_ids = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
        self.task_ids = {task.name: index for index, task in enumerate(tasks)}
        self.pad_to_multiple_of = pad_to_multiple_of or 1
        self._plans: dict[str, _Plan] = {}
        self._expand: dict[str, LanguageTask | ChoiceTask] = {
            task.name: LanguageTask(task, tokenizer, seed, packing, packing_length)
            for task in tasks
            if task.type.is_language
        }
        self._expand |= {task.name: ChoiceTask(task) for task in tasks if task.type is TaskType.MULTIPLE_CHOICE}

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
            expanded = None if plan.expand is None else plan.expand(group)
            seen = group if expanded is None else expanded.sequences
            length = max([len(row["input_ids"]) for row in seen]) if len(seen) > 1 else len(seen[0]["input_ids"])
            slices.append(_Slice(-length, plan.first, plan, group, seen, expanded))
        slices.sort()  # never looks beyond `first`, which is another for every source
        ordered = [row for part in slices for row in part.sequences]
        longest = -slices[0].negative_length
        longest += -longest % self.pad_to_multiple_of

        lengths = np.array([len(row["input_ids"]) for row in ordered])
        batch: dict[str, Any] = {
            "input_ids": self._pad(ordered, "input_ids", longest),
            "attention_mask": torch.from_numpy((np.arange(longest) < lengths[:, None]).astype(np.int64)),
        }
        if any("token_type_ids" in row for row in ordered):
            batch["token_type_ids"] = self._pad(ordered, "token_type_ids", longest)
        if any("position_ids" in row for row in ordered):
            batch["position_ids"], batch["packed"] = _positions(ordered, longest), True
        batch["task_ids"] = torch.tensor([part.first for part in slices for _ in part.sequences])
        batch["segments"], batch["labels"], batch["num_items"] = _group_labels(slices)
        if positions := _group_expanded(slices, longest, batch["labels"], batch["num_items"]):
            batch["label_positions"] = positions
        batch["num_tokens"] = int(lengths.sum())
        if not batch["labels"]:
            del batch["labels"], batch["num_items"], batch["num_tokens"]
        return batch

    def _plan(self, source: Source) -> _Plan:
        tasks = tuple((task.name, label_key(task.name), task.type) for task in source.tasks)
        self._plans[source.name] = _Plan(self.task_ids[tasks[0][0]], tasks, self._expand.get(tasks[0][0]))
        return self._plans[source.name]

    def _pad(self, rows: list[dict[str, Any]], key: str, length: int) -> Tensor:
        # Rows without token types are single texts, whose types are all 0.
        array = np.full((len(rows), length), self.pad_ids[key], dtype=np.int64)
        for i, row in enumerate(rows):
            array[i, : len(row["input_ids"])] = row.get(key, 0)
        return torch.from_numpy(array)


def check_collator(collator: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Check that a collator makes batches of several tasks, by trying it on some rows; no random state is changed.

    Args:
        collator: One that the user gave; any callable. A [`DataCollatorForMultiTask`] is not tried.
        rows: Some rows of a [`MultiTaskDataset`].

    Raises:
        ValueError: It is one of Transformers' own, which know one task only; it fails; or its batches lack what
            training needs.
    """
    if isinstance(collator, DataCollatorForMultiTask):
        return
    name = getattr(collator, "__name__", type(collator).__name__)
    module = str(getattr(collator, "__module__", ""))
    advice = "leave data_collator out, or derive yours from DataCollatorForMultiTask(tokenizer, model.tasks)"
    if module.partition(".")[0] == "transformers":
        instead = _IN_PLACE_OF.get(name)
        raise ValueError(
            f"data_collator {name} makes batches of one task, not of several: leave it out"
            + (f", and {instead}" if instead else "; DataCollatorForMultiTask pads, with pad_to_multiple_of if wanted")
        )
    if not rows:
        return
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            batch = collator([dict(row) for row in rows])
    except Exception as error:
        raise ValueError(
            f"data_collator {name} fails on rows of these tasks, {type(error).__name__}: {error}; {advice}"
        ) from error
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
    wrong = _wrong_batch(batch)
    if wrong:
        raise ValueError(f"data_collator {name} returns {wrong}; {advice}")


def _wrong_batch(batch: Any) -> str:
    """Return what a batch lacks for a training step; an empty text for a good one."""
    if not isinstance(batch, Mapping):
        return f"a {type(batch).__name__}, not a dictionary"
    if "input_ids" not in batch and "inputs_embeds" not in batch:
        return f"a batch without input_ids; its keys are {', '.join(map(str, batch))}"
    for key in ("segments", "labels", "num_items"):
        if not isinstance(batch.get(key), Mapping):
            return f"a batch whose {key!r} is not a dictionary by task, as in DataCollatorForMultiTask's"
    counted, labels, segments = (set(batch[key]) for key in ("num_items", "labels", "segments"))
    if counted != labels or not labels <= segments:
        return (
            f"a batch with labels of {sorted(labels)}, num_items of {sorted(counted)} and segments of "
            f"{sorted(segments)}; every task with labels needs all three"
        )
    return ""


def _positions(sequences: Sequence[dict[str, Any]], length: int) -> Tensor:
    """Return `[B, L]`, the place of each token in its row; padding counts as a row of its own."""
    array = np.zeros((len(sequences), length), dtype=np.int64)
    for i, sequence in enumerate(sequences):
        size = len(sequence["input_ids"])
        array[i, :size] = sequence.get("position_ids", np.arange(size))
        array[i, size:] = np.arange(length - size)
    return torch.from_numpy(array)


def _group_expanded(
    slices: Sequence[_Slice], length: int, labels: dict[str, Tensor], num_items: dict[str, int]
) -> dict[str, Tensor]:
    """Add labels and item counts of tasks with sequences of their own, and return where these predict, by task."""
    positions = {}
    for part in slices:
        if part.expanded is None or (isinstance(part.expanded, LanguageRows) and not part.expanded.tokens):
            continue
        name = part.plan.tasks[0][0]
        values, places = part.expanded.arrays(length)
        if places is not None:
            positions[name] = torch.from_numpy(places)
        if values is not None:
            labels[name], num_items[name] = torch.from_numpy(values), part.expanded.num_items
    return positions


def _group_labels(slices: Sequence[_Slice]) -> tuple[dict[str, Segment], dict[str, Tensor], dict[str, int]]:
    """Return segments by task, and labels and item counts of tasks whose rows are read as they are."""
    segments: dict[str, Segment] = {}
    labels: dict[str, Tensor] = {}
    num_items: dict[str, int] = {}
    class_ids: list[int] = []  # of all single-label tasks: one tensor, cut into views
    cuts: list[int] = []
    cut_tasks: list[str] = []
    single, tokens = TaskType.SINGLE_LABEL_CLASSIFICATION, TaskType.TOKEN_CLASSIFICATION
    start = 0
    for negative_length, _, plan, group, sequences, expanded in slices:
        first, count = group[0], len(group)
        segment = Segment(start, start + len(sequences), -negative_length)
        start += len(sequences)
        for name, key, task_type in plan.tasks:
            segments[name] = segment
            if key not in first or expanded is not None:
                continue
            num_items[name] = count
            if task_type is single:
                own = [row[key] for row in group]
                num_items[name] -= own.count(IGNORE_INDEX)
                class_ids += own
                cuts.append(count)
                cut_tasks.append(name)
            elif task_type is tokens:
                array = np.full((count, segment.length), IGNORE_INDEX, dtype=np.int64)
                for i, row in enumerate(group):
                    array[i, : len(row[key])] = row[key]
                labels[name] = torch.from_numpy(array)
                num_items[name] = int((array != IGNORE_INDEX).sum())
            else:
                kind = np.int64 if task_type is TaskType.QUESTION_ANSWERING else np.float32
                labels[name] = torch.from_numpy(np.asarray([row[key] for row in group], dtype=kind))
    if class_ids:
        labels.update(zip(cut_tasks, torch.tensor(class_ids).split(cuts), strict=True))
    return segments, labels, num_items
