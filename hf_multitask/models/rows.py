"""What modules inside a backbone may know of the rows that pass through: whose they are, and which tokens are real.

A backbone hands its layers hidden states and a mask, no tasks. Layers that treat the rows of each task in a way of
their own (adapters, prefixes, routers) ask a [`CurrentRows`], which the model sets before each pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .pass_local import PassLocal

__all__ = ["CurrentRows", "RowTasks"]


@dataclass(frozen=True)
class RowTasks:
    """The rows of one pass of a backbone.

    Args:
        slices: `(task, start, stop)` for each task of the pass, in plain numbers. Where the scheme treats the rows of
            each task in its own way they are disjoint and cover all rows, in their order.
        ids: `[rows]`, int64: the index of each row's task; None where the scheme has no use for it.
        attention_mask: `[rows, L]`, 1 for real tokens; None if all are.
        repeated: Whether the rows pass a second time, because a layer is computed again in the backward pass.
    """

    slices: tuple[tuple[str, int, int], ...]
    ids: Tensor | None = None
    attention_mask: Tensor | None = None
    repeated: bool = False


class CurrentRows(PassLocal):
    """Holds the [`RowTasks`] of the pass that the calling thread runs; None between passes.

    Activation checkpointing runs layers again in the backward pass, when other rows may have passed since, and on an
    accelerator in a thread of autograd's own. So the function that does it is wrapped by [`carry`], which brings the
    rows of that pass back.
    """

    value: RowTasks | None = None

    def carry(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a checkpointing function, `(function, *args) -> result`: repetitions see the rows of their pass."""
        return _WithRows(self, checkpoint)


class _WithRows:
    """What [`CurrentRows.carry`] returns: an object, so that the deep copy of a model carries the copy's own rows."""

    def __init__(self, current: CurrentRows, checkpoint: Callable[..., Any]) -> None:
        self.current, self.checkpoint = current, checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        rows, calls = self.current.value, 0

        def seeing(*inner: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            with self.current.use(rows if rows is None or calls == 1 else replace(rows, repeated=True)):
                return function(*inner, **options)

        return self.checkpoint(seeing, *args, **kwargs)
