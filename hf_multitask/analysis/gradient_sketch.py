"""Short vectors whose inner products are those of long gradients, nearly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GradientSketch"]


class GradientSketch:
    """Folds the gradients of some parameters into W numbers (a count sketch, Charikar, Chen and Farach-Colton 2002).

    Every number gets a random sign, and number i is added to place i mod W. Inner products of two sketches are right in
    the mean, with an error of about the product of the norms over √W: 0.004 for the default width. So gradients of
    many batches can be compared where only one batch's fit into memory.

    Args:
        parameters: The parameters.
        width: W.
        seed: Seed of the signs; sketches can be compared if it is the same.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], width: int = 1 << 16, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.parameters = list(parameters)
        self.width = width
        self._signs = [
            torch.randint(0, 2, parameter.shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1)
            for parameter in self.parameters
        ]

    def __call__(self) -> Tensor:
        """Return the sketch `[W]`, float32 on the CPU, of the parameters' `.grad`; None counts as zeros."""
        total = torch.zeros(self.width, device=self.parameters[0].device)
        start = 0
        for i, parameter in enumerate(self.parameters):
            if parameter.grad is not None:
                if self._signs[i].device != parameter.device:
                    self._signs[i] = self._signs[i].to(parameter.device)
                signed = (parameter.grad.float() * self._signs[i]).flatten()
                signed = F.pad(signed, (start, -(start + len(signed)) % self.width))
                total += signed.view(-1, self.width).sum(0)
            start = (start + parameter.numel()) % self.width
        return total.cpu()
