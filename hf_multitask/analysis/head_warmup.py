"""Heads fitted on frozen features, so that the gradients that come through them speak of their tasks.

What a task wants of the encoder reaches it through the task's head. A fresh head is a random projection, and the
gradient behind it is a random direction, whatever the task: two copies of one task then look unrelated, and so do
opposite ones. So the heads are fitted first, the encoder standing still: its outputs are computed once and kept, and
copies of the heads are trained on them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..models.base import MultiTaskModel
from ..models.heads import IGNORE_INDEX, TaskHead, TokenHead, pool
from ..models.native_head import NativeLayers
from .rows import draw_batches, move_to

__all__ = ["Features", "cache_features", "fit_head"]

_MOST_ITEMS = 8192  # labelled tokens kept per task: with 768 numbers each, 24 MiB
_ITEMS_PER_STEP = 64
_LEARNING_RATE = 1e-3
_WEIGHT_DECAY = 0.01

Features = tuple[Tensor, Tensor]


def cache_features(model: MultiTaskModel, batches: Iterable[Mapping[str, Any]]) -> dict[str, Features]:
    """Run the encoder over some rows and keep what the heads get to see of them.

    For heads on a pooled text that is one vector per row, for heads on tokens one per labelled token (at most 8,192
    per task). The encoder's other outputs are let go with every batch.

    Args:
        model: The model, in the mode that is to be measured.
        batches: Collated batches.

    Returns:
        Per task features `[N, H]`, float32 on the CPU, and the labels of these N items.

    Raises:
        ValueError: A head reads neither pooled texts nor single tokens.
    """
    kept: dict[str, list[Features]] = {}
    counts: dict[str, int] = {}
    for batch in batches:
        with _inputs_of_heads(model) as seen, torch.no_grad():
            model(**move_to(model.device, batch))
        for name, labels in batch["labels"].items():
            room = _MOST_ITEMS - counts.get(name, 0)
            features, targets = _items(name, cast(TaskHead, model.heads[name]), labels, *seen[name])
            kept.setdefault(name, []).append((features[:room].float().cpu(), targets[:room]))
            counts[name] = counts.get(name, 0) + len(kept[name][-1][0])
    return {name: (torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])) for name, parts in kept.items()}


@contextmanager
def _inputs_of_heads(model: MultiTaskModel) -> Iterator[dict[str, tuple[Any, ...]]]:
    """Note with what the heads are called: that is the same for every sharing scheme."""
    seen: dict[str, tuple[Any, ...]] = {}
    handles = [
        head.register_forward_pre_hook(lambda module, inputs, name=name: seen.update({name: inputs}))
        for name, head in model.heads.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _items(name: str, head: TaskHead, labels: Tensor, hidden: Tensor, mask: Tensor | None, *others: Any) -> Features:
    """Return `[N, H]` and the labels of N items: rows, or labelled tokens."""
    native = isinstance(head.layers, NativeLayers)
    if type(head).forward is TaskHead.forward and not native:
        return pool(hidden, mask, head.pooling), labels
    if type(head).forward is TokenHead.forward and not native:
        labelled = labels != IGNORE_INDEX
        # Labels `[N, 1]`: each token as a text of its own.
        return hidden[:, : labels.shape[1]][labelled.to(hidden.device)], labels[labelled].unsqueeze(1)
    raise ValueError(
        f"task {name!r}: the features of a {type(head).__name__} cannot be cached, because it reads neither pooled "
        "texts nor single tokens; set head_warmup_steps=0, after training the heads"
    )


def fit_head(head: TaskHead, features: Features, steps: int, generator: np.random.Generator) -> TaskHead:
    """Return a copy of a head, fitted to cached features; the head itself stays as it is.

    AdamW with a learning rate that falls from 1e-3 to 0, 64 items per step, no dropout, in float32. Frozen parameters
    stay as they are.

    Args:
        head: The head.
        features: `[N, H]` and labels, of [`cache_features`].
        steps: Steps of the optimizer.
        generator: Where the order of the items comes from.

    Returns:
        The copy, on the head's device and in its dtype.
    """
    first = next(head.parameters())
    fitted = copy.deepcopy(head).float().eval()
    parameters = [parameter for parameter in fitted.parameters() if parameter.requires_grad]
    inputs, labels = features
    if parameters and len(inputs):
        optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
        batches = draw_batches(len(inputs), _ITEMS_PER_STEP, generator)
        for step in range(steps):
            index = torch.from_numpy(next(batches))
            # One vector is a text of one token: whatever the pooling, it is its own pooled text.
            logits = fitted(inputs[index].unsqueeze(1).to(first.device), None)
            targets = labels[index].to(first.device)
            loss = fitted.row_losses(logits, targets).sum() / fitted.row_items(targets).sum().clamp(min=1)
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = _LEARNING_RATE * (1 - step / steps)
            optimizer.step()
        optimizer.zero_grad()
    return fitted.to(first.dtype)
