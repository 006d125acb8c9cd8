"""The head of `multiple_choice`: one score for each of the texts that stand to choose."""

from __future__ import annotations

import torch
from torch import Tensor

from .heads import SingleLabelHead

__all__ = ["ChoiceHead"]


class ChoiceHead(SingleLabelHead):
    """Softmax over the scores of several rows of the encoder, one for each choice; cross-entropy.

    An example has as many rows as it has choices. Labels are `[examples]`, int64, the number of the right choice; an
    example is one item.
    """

    def forward(  # type: ignore[override]
        self, hidden: Tensor, attention_mask: Tensor | None, positions: Tensor | None = None
    ) -> Tensor:
        """Return the scores of the choices.

        Args:
            hidden: `[rows, L, H]`.
            attention_mask: `[rows, L]`, 1 for real tokens.
            positions: `[examples, C]`, for each choice the place of the first token of its row, `row * L`; below 0
                where an example has fewer choices.

        Returns:
            `[examples, C]`, of the lowest number there is where a choice is missing; without positions `[rows, 1]`.
        """
        scores = super().forward(hidden, attention_mask)
        if positions is None:
            return scores
        rows = torch.div(positions, hidden.shape[1], rounding_mode="floor")
        return scores.squeeze(-1)[rows.clamp(min=0)].masked_fill(rows < 0, torch.finfo(scores.dtype).min)

    def row_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return `[examples]`: the cross-entropy of each; scores `[rows, 1]` are cut evenly among the examples."""
        return super().row_losses(logits.view(len(labels), -1), labels)
