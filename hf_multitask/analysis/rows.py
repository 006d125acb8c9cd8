"""Which rows a measurement reads: seeded draws without replacement, and the batches made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["draw_batches", "move_to", "without_first"]


def draw_batches(rows: int, size: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield batches of row numbers without end: disjoint within a pass over the rows, shuffled anew for the next.

    Args:
        rows: Number of rows.
        size: Rows of a batch; all of them, where there are fewer.
        generator: Where the order comes from.

    Example:
        >>> batches = draw_batches(5, 2, np.random.default_rng(0))
        >>> first, second, third = (next(batches).tolist() for _ in range(3))
        >>> len({*first, *second}), len(third)
        (4, 2)
    """
    size = min(size, rows)
    while True:
        order = generator.permutation(rows)
        for start in range(0, rows - size + 1, size):
            yield order[start : start + size]


def without_first(rows: int, used: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Return row numbers in a random order: rows that were not used come first, used ones only where these are too few.

    Args:
        rows: Number of rows.
        used: Numbers of the rows that were used.
        count: How many are wanted; all, where there are fewer.
        generator: Where the order comes from.

    Example:
        >>> without_first(5, np.array([0, 1, 2]), 2, np.random.default_rng(0)).tolist() in ([3, 4], [4, 3])
        True
    """
    order = generator.permutation(rows)
    return order[np.argsort(np.isin(order, used), kind="stable")][:count]


def move_to(device: torch.device, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a collated batch with its tensors, and those of its labels, on a device."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        if isinstance(value, dict):
            return {key: moved(item) for key, item in value.items()}
        return value

    return {key: moved(value) for key, value in batch.items()}
