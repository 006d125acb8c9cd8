"""Stop a run that went wrong: losses, gradients and weights that are NaN or infinite, and errors of other processes.

Losses and the norm of the gradients are looked at before each optimizer step, weights before a checkpoint is written
and at the end of training: a loss and a gradient can be finite and the step still be too large.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import logging

__all__ = [
    "BadLoss",
    "LossGuard",
    "NonFiniteLossError",
    "OtherProcessError",
    "any_process",
    "ends_together",
    "nonfinite_gradients",
    "nonfinite_saved_weights",
    "nonfinite_weights",
]


logger = logging.get_logger(__name__)


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


class OtherProcessError(RuntimeError):
    """Another process of a distributed run raised an error; the message names the process and the error."""


_GRACE = 5.0  # seconds that a process that raises waits for the others to raise as well
_PATIENCE = 20.0  # seconds that a process has to end by itself once another has raised
_MOST_TEXT = 4000
_episode = 0  # errors that all processes raised, and got over
_together = False


def ends_together(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let an error on one process end a trainer's method on all of them, with that error, within a minute.

    Otherwise the others would wait in their next collective operation for a process that never comes, half an hour by
    default, if the caller catches the error or nobody ends them.

    - A process that raises tells the others in the store of the process group. If all raise, each keeps its own error.
      If it ends, its connections close, which wakes the others: they raise [`OtherProcessError`].
    - If it stays (the caller caught the error), nothing wakes them. So a thread on each process asks the store once a
      second. Where another process has raised and this one has not ended by itself 20 seconds later, it aborts its
      process groups, which wakes it with some backends (NCCL), and after 20 more it logs the error and ends the
      process with exit status 1.

    The trainer needs `args` and `tasks`; without tasks, or with one process, nothing is done.
    """

    @wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.tasks or self.args.world_size == 1 or _together or not dist.is_initialized():
            return method(self, *args, **kwargs)
        with _ending_together(self.args.process_index, self.args.world_size):
            return method(self, *args, **kwargs)

    return wrapper


@contextmanager
def _ending_together(rank: int, num_processes: int) -> Iterator[None]:
    global _episode, _together
    errors = _SharedErrors(rank, num_processes, _episode)
    errors.watch()
    _together = True
    try:
        yield
    except BaseException as error:
        errors.stop_watching()
        cause = errors.first_other() if _is_of_connections(error) else None
        errors.tell(error)
        if errors.all_told(_GRACE):
            _episode += 1
        if cause is None and _is_of_connections(error):
            cause = errors.first_other()  # the connections may be faster than the store
        if cause is not None:
            raise OtherProcessError(cause) from error
        raise
    finally:
        errors.stop_watching()
        _together = False


def _is_of_connections(error: BaseException) -> bool:
    """Return whether an error comes of connections to other processes, and so may be the consequence of another."""
    text = str(error)
    words = ("gloo", "NCCL", "Connection", "connection", "process group", "ProcessGroup", "aborted")
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(w in text for w in words))


def _abort_process_groups() -> None:
    """Abort what waits for other processes, with the backends that can: a wait raises an error then."""
    for group in list(dist.distributed_c10d._world.pg_map):
        with suppress(Exception):
            group.abort()


class _SharedErrors:
    """What processes tell each other of their errors, in the store of the process group."""

    def __init__(self, rank: int, num_processes: int, episode: int) -> None:
        self._rank, self._processes = rank, num_processes
        self._keys = [f"hf_multitask/error/{episode}/{number}" for number in range(num_processes)]
        self._any = f"hf_multitask/error/{episode}/any"
        # A store of its own: the other one may be held by an operation that waits.
        store: Any = dist.distributed_c10d._get_default_store()
        self._store = store.clone() if hasattr(store, "clone") else store  # an older torch has none
        self._done = threading.Event()
        self._known: str | None = None

    def tell(self, error: BaseException) -> None:
        text = f"process {self._rank} raised {type(error).__name__}: {error}"
        with suppress(Exception):  # the process that holds the store may have ended
            self._store.set(self._keys[self._rank], text[:_MOST_TEXT])
            self._store.set(self._any, str(self._rank))

    def all_told(self, seconds: float) -> bool:
        """Return whether every process raises, after waiting for it."""
        end = time.monotonic() + seconds
        with suppress(Exception):
            while time.monotonic() < end:
                if self._store.check(self._keys):
                    return True
                time.sleep(0.05)
        return False

    def first_other(self) -> str | None:
        """Return the error that another process has raised, or None."""
        if self._known is not None:  # the store may have ended with the process that holds it
            return self._known
        with suppress(Exception):
            if self._store.check([self._any]):
                for rank, key in enumerate(self._keys):
                    if rank != self._rank and self._store.check([key]):
                        self._known = self._store.get(key).decode()
                        break
        return self._known

    def watch(self) -> None:
        threading.Thread(target=self._watch, name="errors of other processes", daemon=True).start()

    def stop_watching(self) -> None:
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(1.0):
            error = self.first_other()
            if error is None:
                continue
            if not self._done.wait(_PATIENCE):
                _abort_process_groups()
            if not self._done.wait(_PATIENCE):
                logger.error(f"{error}. This process, {self._rank}, waits for it and is ended.")
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(1)
            return
