"""The head of `question_answering`: where in a text the answer begins, and where it ends."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .heads import TokenHead

__all__ = ["SpanHead"]


class SpanHead(TokenHead):
    """A softmax over the tokens of a row for the first token of the answer, and one for its last (Devlin et al. 2019).

    Logits are `[B, L, 2]`, of the lowest number there is at padding; labels `[B, 2]`, int64: the places of the two
    tokens, both that of the row's first token where the row holds no answer. A row is one item.
    """

    def forward(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return the logits of every token, `[B, L, 2]`."""
        logits = super().forward(hidden, attention_mask)
        if attention_mask is None:
            return logits
        return logits.masked_fill(~attention_mask.bool().unsqueeze(-1), torch.finfo(logits.dtype).min)

    def row_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return `[B]`: the mean of the cross-entropies of the two places."""
        by_end = logits.float().transpose(1, 2).flatten(0, 1)  # [B * 2, L]
        return F.cross_entropy(by_end, labels.flatten(), reduction="none").view(-1, 2).mean(-1)

    @staticmethod
    def row_items(labels: Tensor) -> Tensor:
        """Return ones, `[B]`: each row is one item."""
        return torch.ones(labels.shape[0], dtype=torch.long, device=labels.device)
