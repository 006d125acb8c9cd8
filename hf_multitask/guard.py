"""Notice losses, gradients and weights that are NaN or infinite, before they do harm.

Losses and the norm of the gradients are looked at before each optimizer step, weights before a checkpoint is written
and at the end of training: a loss and a gradient can be finite and the step still be too large.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

__all__ = [
    "BadLoss",
    "LossGuard",
    "NonFiniteLossError",
    "any_process",
    "nonfinite_gradients",
    "nonfinite_saved_weights",
    "nonfinite_weights",
]


class NonFiniteLossError(RuntimeError):
    """A loss, a gradient or a weight is NaN or infinite; the message says which, and in which step."""


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

    Args:
        skipped: Steps left out so far.
        skipped_in_a_row: Of these, the ones since the last step that was taken.
    """

    def __init__(self, skipped: int = 0, skipped_in_a_row: int = 0) -> None:
        self.skipped, self.skipped_in_a_row = skipped, skipped_in_a_row
        self.skipped_before = skipped  # by the part of the run that ended with the checkpoint it was resumed from
        self._batches: list[tuple[int, dict[str, Tensor]]] = []

    def add(self, row_losses: Mapping[str, Tensor]) -> None:
        """Record the losses of the next micro-batch: by task, `[rows]`."""
        self._batches.append((len(self._batches), {task: losses.detach() for task, losses in row_losses.items()}))

    def check(self, device: torch.device, num_processes: int = 1, total: Tensor | None = None) -> list[BadLoss] | None:
        """Look at the window and forget it; with several processes this is a collective call.

        Args:
            device: Device of the losses.
            num_processes: Number of processes.
            total: The loss that was differentiated, a scalar: it may hold more than the losses of the rows.

        Returns:
            None if all is well on every process, otherwise what is wrong on this one (perhaps nothing).
        """
        batches, self._batches = self._batches, []
        sums = [losses.sum() for _, by_task in batches for losses in by_task.values()]
        sums += [] if total is None else [total.detach()]
        bad = (~torch.isfinite(torch.stack(sums))).any() if sums else torch.zeros((), dtype=torch.bool, device=device)
        if not any_process(bad, num_processes):
            return None
        return [
            BadLoss(task, number, torch.nonzero(~torch.isfinite(losses)).flatten().tolist())
            for number, by_task in batches
            for task, losses in by_task.items()
            if not bool(torch.isfinite(losses).all())
        ]

    def end_step(self, skipped: bool) -> None:
        """Count a step that was left out, or one that was taken."""
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0


def any_process(here: Tensor, num_processes: int) -> bool:
    """Return whether a boolean scalar is true on any process; with several processes this is a collective call."""
    flag = here.float()
    if num_processes > 1:
        torch.distributed.all_reduce(flag)
    return bool(flag.item())


def _local(tensor: Tensor) -> Tensor:
    """Return the numbers that this process holds of a tensor, which may be sharded or sparse."""
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return tensor.coalesce().values() if tensor.is_sparse else tensor


def nonfinite_gradients(
    parameters: Iterable[tuple[str, nn.Parameter]], device: torch.device, num_processes: int = 1
) -> list[str] | None:
    """Return the names of the parameters whose gradient is NaN or infinite; a collective call.

    The norm of all gradients together counts too: where it overflows float32, clipping multiplies all of them by 0.

    Args:
        parameters: Parameters by name.
        device: Where the gradients are.
        num_processes: Number of processes; they agree.

    Returns:
        None if all is well on every process, otherwise the names on this one (none, where only the norm overflows, or
        where it is another process's).
    """
    grads = [(name, _local(p.grad.detach())) for name, p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([grad for _, grad in grads]) if grads else torch.zeros(())
    if not any_process(~torch.isfinite(norm.to(device)), num_processes):
        return None
    return [name for name, grad in grads if not bool(torch.isfinite(grad).all())]


def nonfinite_weights(
    parameters: Iterable[tuple[str, nn.Parameter]], device: torch.device, num_processes: int = 1
) -> list[str] | None:
    """Return the names of the parameters that hold a NaN or an infinity; a collective call.

    Returns:
        None if all is well on every process, otherwise the names on this one.
    """
    named = [(name, _local(parameter.detach())) for name, parameter in parameters]
    flags = [torch.isfinite(weights).all().to(device) for _, weights in named]
    bad = ~torch.stack(flags).all() if flags else torch.zeros((), dtype=torch.bool, device=device)
    if not any_process(bad, num_processes):
        return None
    return [name for (name, _), finite in zip(named, flags, strict=True) if not bool(finite)]


def nonfinite_saved_weights(folder: str | Path) -> str | None:
    """Return the name of a tensor in a folder's `*.safetensors` that holds a NaN or an infinity, or None.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> folder = tempfile.mkdtemp()
        >>> save_file({"good": torch.ones(2), "bad": torch.tensor([1.0, float("nan")])}, f"{folder}/model.safetensors")
        >>> nonfinite_saved_weights(folder)
        'bad'
    """
    for path in sorted(Path(folder).rglob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                if not bool(torch.isfinite(file.get_tensor(name)).all()):
                    return name
    return None
