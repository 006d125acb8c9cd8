"""The output of a multi-task model, and the losses in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .heads import TaskHead

__all__ = ["MultiTaskOutput", "task_losses"]


@dataclass
class MultiTaskOutput(ModelOutput):
    """Output of a multi-task model.

    Args:
        loss: Scalar, the weighted sum over tasks and `regularization`, when labels were given.
        task_losses: Scalar per task with labels: its summed item losses over its number of items.
        logits: Per task `[rows, C]`, or `[rows, L, C]` for token-level tasks.
        row_losses: Per task with labels `[rows]`: the summed item losses of each row.
        regularization: Scalar, what the sharing scheme itself adds to `loss` in training, where it adds anything.
        hidden_states: The backbone's, when asked for.
        attentions: The backbone's, when asked for.
    """

    loss: Tensor | None = None
    task_losses: dict[str, Tensor] | None = None
    logits: dict[str, Tensor] | None = None
    row_losses: dict[str, Tensor] | None = None
    regularization: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def task_losses(
    heads: Mapping[str, TaskHead],
    logits: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    num_items: Mapping[str, int | Tensor] | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return each task's loss, a scalar, and the losses of its rows, `[rows]`.

    Args:
        heads: By task.
        logits: By task, those of its rows.
        labels: By task, those of its rows.
        num_items: By task, what the sum of its item losses is divided by (default: its items in these rows).
    """
    row_losses = {name: heads[name].row_losses(logits[name], labels[name]) for name in labels}
    losses = {}
    for name, values in row_losses.items():
        if num_items is not None and name in num_items:
            items: int | Tensor = num_items[name]
        else:
            items = heads[name].row_items(labels[name]).sum()
        # A task whose rows hold no labelled item has a loss of 0, not of 0 / 0.
        losses[name] = values.sum() / (torch.clamp(items, min=1) if isinstance(items, Tensor) else max(items, 1))
    return losses, row_losses
