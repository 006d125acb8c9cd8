"""One head per task type: from the encoder's hidden states to logits, losses and item counts.

A head never averages. It returns the sum of the item losses of every row (an item is a row, or a labelled token
for token-level tasks) and leaves the division to the caller, who knows how many items of the task the whole window
of an optimizer step holds. That is what makes one batch of 32 and eight batches of 4 the same update.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .native_head import NativeLayers
from .task import Task

__all__ = ["IGNORE_INDEX", "MultiLabelHead", "RegressionHead", "SingleLabelHead", "TaskHead", "TokenHead", "pool"]

IGNORE_INDEX = -100


def pool(hidden: Tensor, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """Reduce each row of hidden states to one vector.

    Args:
        hidden: `[B, L, H]`.
        attention_mask: `[B, L]`, 1 for real tokens, 0 for padding on either side; None means all are real.
        pooling: `mean` over the real tokens, or the `first` or `last` real token.

    Returns:
        `[B, H]` in the dtype of `hidden`. A row without a real token gives zeros for `mean`.
    """
    if attention_mask is None:
        return {"mean": hidden.mean(1), "first": hidden[:, 0], "last": hidden[:, -1]}[pooling]
    if pooling == "mean":
        mask = attention_mask.to(hidden.dtype).unsqueeze(-1)
        # In half precision a sum over hundreds of tokens, even their number, would be rounded.
        total = (hidden * mask).sum(1, dtype=torch.promote_types(hidden.dtype, torch.float32))
        return (total / attention_mask.sum(1, keepdim=True).clamp(min=1)).to(hidden.dtype)
    positions = torch.arange(hidden.shape[1], device=hidden.device)
    real = attention_mask.to(torch.bool)
    if pooling == "last":
        index = torch.where(real, positions, -1).amax(1).clamp(min=0)
    else:
        index = torch.where(real, positions, hidden.shape[1]).amin(1).clamp(max=hidden.shape[1] - 1)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), index]


class TaskHead(nn.Module, ABC):
    """Logits, losses and item counts of one task.

    Args:
        task: The task. Its `pooling` and `head_dropout` must have been settled by the model.
        hidden_size: Width H of the encoder's hidden states.
        pooling: Pooling used where the task leaves it open.
        dropout: Dropout probability used where the task leaves it open.
        backbone_config: The backbone's configuration, for the head that Transformers itself gives it.
    """

    layers: nn.Module

    def __init__(
        self,
        task: Task,
        hidden_size: int,
        pooling: str = "mean",
        dropout: float = 0.1,
        backbone_config: PreTrainedConfig | None = None,
    ) -> None:
        """Build the layers: `dropout, linear, GELU, linear` or `dropout, linear`, or those of Transformers."""
        super().__init__()
        self.pooling = task.pooling or pooling
        self.label_smoothing = task.label_smoothing
        if task.head == "native":
            if backbone_config is None:
                raise ValueError(f"task {task.name!r}: head 'native' needs the backbone's configuration")
            self.layers = NativeLayers(task, backbone_config)
            return
        layers: list[nn.Module] = [nn.Dropout(dropout if task.head_dropout is None else task.head_dropout)]
        width = hidden_size
        if task.head == "mlp":
            width = max(hidden_size // 2, 1)
            layers += [nn.Linear(hidden_size, width), nn.GELU()]
        layers.append(nn.Linear(width, task.num_outputs))
        self.layers = nn.Sequential(*layers)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return the logits, `[B, C]`, of hidden states `[B, L, H]`."""
        if isinstance(self.layers, NativeLayers):
            return self.layers(hidden, attention_mask)
        return self.layers(pool(hidden, attention_mask, self.pooling))

    @abstractmethod
    def row_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of the item losses of each row, `[B]`, in float32 or wider."""

    @staticmethod
    def row_items(labels: Tensor) -> Tensor:
        """Return the number of items (labels other than -100) of each row, `[B]`, int64."""
        return labels.ne(IGNORE_INDEX).long()


class SingleLabelHead(TaskHead):
    """Softmax over the labels; cross-entropy. Labels are `[B]`, int64, -100 for none."""

    def row_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return `[B]`: the cross-entropy of each row, 0 where the label is -100."""
        return F.cross_entropy(
            logits.float(), labels, reduction="none", ignore_index=IGNORE_INDEX, label_smoothing=self._smoothing()
        )

    def _smoothing(self) -> float:
        # The loss that is reported at evaluation is that of the labels as they are.
        return self.label_smoothing if self.training else 0.0


class MultiLabelHead(TaskHead):
    """A sigmoid per label; binary cross-entropy, mean over labels. Labels are `[B, C]`, float, 0 or 1."""

    def row_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return `[B]`: the mean binary cross-entropy over the C labels of each row."""
        losses = F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none")
        return losses.mean(-1)

    @staticmethod
    def row_items(labels: Tensor) -> Tensor:
        """Return ones, `[B]`: each row is one item."""
        return torch.ones(labels.shape[0], dtype=torch.long, device=labels.device)


class RegressionHead(TaskHead):
    """One or several real values; squared error, mean over values. Labels are `[B, C]`, float."""

    def row_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return `[B]`: the mean squared error over the C values of each row, in squared units of the label."""
        return F.mse_loss(logits.float(), labels.float(), reduction="none").mean(-1)

    @staticmethod
    def row_items(labels: Tensor) -> Tensor:
        """Return ones, `[B]`: each row is one item."""
        return torch.ones(labels.shape[0], dtype=torch.long, device=labels.device)


class TokenHead(SingleLabelHead):
    """Softmax over the labels at each token. Logits are `[B, L, C]`, labels `[B, L]`, -100 at tokens to ignore."""

    def forward(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return the logits of every token, `[B, L, C]`."""
        if isinstance(self.layers, NativeLayers):
            return self.layers(hidden, attention_mask)
        return self.layers(hidden)

    def row_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return `[B]`: the sum of the cross-entropies of each row's labelled tokens."""
        logits = logits[:, : labels.shape[1]]
        return super().row_losses(logits.flatten(0, 1), labels.flatten()).view_as(labels).sum(-1)

    @staticmethod
    def row_items(labels: Tensor) -> Tensor:
        """Return the number of labelled tokens of each row, `[B]`, int64."""
        return labels.ne(IGNORE_INDEX).sum(-1)
