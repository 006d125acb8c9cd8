"""What to do when the loss of a task is NaN or infinite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["BadLoss", "LossGuard", "NonFiniteLossError"]


class NonFiniteLossError(RuntimeError):
    """The loss of a task is NaN or infinite; the message names the task, the step and the rows."""


class BadLoss(NamedTuple):
    """A micro-batch in which a task has rows with a loss that is NaN or infinite.

    Args:
        task: The task's name.
        micro_batch: Number of the micro-batch in its window, on this process.
        places: Which of the task's rows in it.
    """

    task: str
    micro_batch: int
    places: list[int]


class LossGuard:
    """Keeps the losses of the rows of one window, and looks at them before the optimizer does.

    The check reads one number per window from the device, in place of the one per micro-batch that `Trainer` reads
    for `logging_nan_inf_filter`.
    """

    def __init__(self) -> None:
        self.skipped = 0
        self._batches: list[tuple[int, dict[str, Tensor]]] = []

    def add(self, row_losses: Mapping[str, Tensor]) -> None:
        """Note the losses of the next micro-batch: by task, `[rows]`."""
        self._batches.append((len(self._batches), {task: losses.detach() for task, losses in row_losses.items()}))

    def check(self, device: torch.device, num_processes: int = 1) -> list[BadLoss] | None:
        """Look at the window and forget it; with several processes this is a collective call.

        Args:
            device: Device of the losses.
            num_processes: Number of processes.

        Returns:
            None if all is well on every process, otherwise what is wrong on this one (perhaps nothing).
        """
        batches, self._batches = self._batches, []
        sums = [losses.sum() for _, by_task in batches for losses in by_task.values()]
        bad = (~torch.isfinite(torch.stack(sums))).any().float() if sums else torch.zeros((), device=device)
        if num_processes > 1:
            torch.distributed.all_reduce(bad)
        if not bad.item():
            return None
        return [
            BadLoss(task, number, torch.nonzero(~torch.isfinite(losses)).flatten().tolist())
            for number, by_task in batches
            for task, losses in by_task.items()
            if not bool(torch.isfinite(losses).all())
        ]
