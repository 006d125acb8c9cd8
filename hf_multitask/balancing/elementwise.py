"""Gradient combinations that are no function of the Gramian: they decide number by number."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["ELEMENTWISE", "graddrop", "uniform_blocks"]

_BLOCK = 1 << 17


def graddrop(gradients: Tensor, uniform: Tensor, leak: float = 0.0) -> Tensor:
    """Return GradDrop's gradient (Chen et al. 2020): at every number, only the gradients of one sign.

    The positive ones are kept with probability P = ½ (1 + Σ g / Σ |g|), otherwise the negative ones; of what is not
    kept, the fraction `leak` stays. Where all gradients agree this is their sum. The paper draws for activations that
    tasks share; this draws for the parameters.

    Args:
        gradients: `[T, n]`, multiplied with the tasks' shares and weights: at each number a smaller one is kept less
            often and counts less, and the result is at most Σ |g|.
        uniform: `[n]`, draws from [0, 1).
        leak: Fraction of the other sign that is kept, in [0, 1]; 1 is the plain sum.

    Returns:
        `[n]`.
    """
    total, size = gradients.sum(0), gradients.abs().sum(0)
    positive = 0.5 * (1 + torch.where(size > 0, total / size, 0.0)) > uniform
    kept = torch.where(positive, gradients > 0, gradients < 0).to(gradients.dtype)
    return ((leak + (1 - leak) * kept) * gradients).sum(0)


ELEMENTWISE: dict[str, Callable[..., Tensor]] = {"graddrop": graddrop}
"""Combinations by name: gradients `[T, n]`, uniform draws `[n]` (and the method's own arguments) → `[n]`."""


def uniform_blocks(start: int, stop: int, seed: int, device: torch.device) -> Iterator[tuple[int, int, Tensor]]:
    """Yield `(from, to, draws)` over a range of places; the draw of a place depends on the seed and the place alone.

    Args:
        start: First place.
        stop: Place after the last.
        seed: Seed.
        device: Device of the draws.
    """
    for block in range(start // _BLOCK, -(-stop // _BLOCK)):
        first, last = max(start, block * _BLOCK), min(stop, (block + 1) * _BLOCK)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + block)
        draws = torch.rand(_BLOCK, generator=generator)
        yield first, last, draws[first - block * _BLOCK : last - block * _BLOCK].to(device)
