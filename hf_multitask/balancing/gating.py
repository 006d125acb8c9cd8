"""Gates of auxiliary tasks: whether, and how much, the gradient of one may move the shared parameters.

An auxiliary task is there to help. Its gradient helps while it does not point against the gradient of the task that is
helped, and Du et al. ("Adapting Auxiliary Losses Using Gradient Similarity", 2018) let it count by the cosine φ between
the two, in each step anew: then the update descends on the task that is helped whatever the auxiliary task is. A gate
is a number m_t that the weight of task t is multiplied with in the update of the shared parameters, with a gradient
combination as without ([`hf_multitask.balancing.combination`]; a task whose gate is 0 is absent from it); the
auxiliary task's own parameters take their plain gradient. The functions stand in `GATINGS`:

- `cosine` (their unweighted version): 1 where φ ≥ 0, otherwise 0.
- `weighted_cosine` (their weighted version): max(0, φ).

What holds for both:

- **Shapes**: G is the Gramian [T, T] of the weighted gradients of the tasks of a step, finite, any dtype and device.
  The result is [T], float64, on the CPU, 1 for tasks that are not auxiliary.
- **Who is helped**: the primary task; without one, the sum of the weighted gradients of all tasks that are not
  auxiliary. The paper has one main task.
- **Nothing to compare**: where the primary task, or every task that is not auxiliary, has no rows in the step, or
  where one of the two gradients is zero, nothing is known against the auxiliary task and its gate is 1.
- **Scale**: gates do not change when G is multiplied by a number, nor when the gradient of an auxiliary task is.

The paper takes gradients of single steps as they are, and so do these: where gradients are noisy, φ is small and gates
open and close by chance (see `conflict_logging_steps` for how large the cosines are).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.task import Task

__all__ = ["GATINGS", "AuxiliaryGates", "cosine", "weighted_cosine"]

_CANCELLED = 1e-12  # A squared norm below this, relative to the squares that it is the sum of, is rounding error.


def _cosines(gramian: Tensor, auxiliary: Sequence[bool], primary: int | None) -> Tensor:
    """Return each task's cosine with what is helped, [T], NaN where there is none or the task is not auxiliary."""
    gramian = gramian.detach().to("cpu", torch.float64)
    size = len(auxiliary)
    if gramian.shape != (size, size):
        raise ValueError(f"gramian must be of shape [{size}, {size}], a row per task, got {list(gramian.shape)}")
    if not gramian.isfinite().all():
        raise ValueError(f"gramian of {size} tasks has entries that are not finite")
    is_auxiliary = torch.tensor(list(auxiliary), dtype=torch.bool)
    helped = (~is_auxiliary).double()
    if primary is not None:
        helped = torch.nn.functional.one_hot(torch.tensor(primary), size).double()
    squares = gramian.diagonal().clamp(min=0.0)
    length = helped @ gramian @ helped
    if length <= _CANCELLED * (helped * squares).sum():
        return torch.full((size,), float("nan"), dtype=torch.float64)
    cosines = gramian @ helped / length.sqrt() / squares.sqrt()
    return cosines.where(is_auxiliary & (squares > 0), torch.nan)


def cosine(gramian: Tensor, auxiliary: Sequence[bool], primary: int | None = None) -> Tensor:
    """Return gates that are open, 1, while the auxiliary gradient does not conflict, and shut, 0, otherwise.

    Args:
        gramian: G.
        auxiliary: Of each of the T tasks, whether it is auxiliary.
        primary: Index of the primary task among them; None to help all that are not auxiliary.

    Raises:
        ValueError: The Gramian is not of this shape, or not finite.

    Example:
        >>> cosine(torch.tensor([[1.0, -0.5], [-0.5, 4.0]]), [False, True])
        tensor([1., 0.], dtype=torch.float64)
    """
    return (~(_cosines(gramian, auxiliary, primary) < 0)).double()


def weighted_cosine(gramian: Tensor, auxiliary: Sequence[bool], primary: int | None = None) -> Tensor:
    """Return max(0, φ): gates that open as far as the gradients agree. Arguments and errors are those of [`cosine`].

    Example:
        >>> weighted_cosine(torch.tensor([[1.0, 0.5], [0.5, 4.0]]), [False, True])
        tensor([1.0000, 0.2500], dtype=torch.float64)
    """
    return _cosines(gramian, auxiliary, primary).clamp(0.0, 1.0).nan_to_num(nan=1.0)


GATINGS: dict[str, Callable[[Tensor, Sequence[bool], int | None], Tensor]] = {
    "cosine": cosine,
    "weighted_cosine": weighted_cosine,
}
"""Gates by name: Gramian of the weighted gradients, which tasks are auxiliary, index of the primary task → [T]."""


class AuxiliaryGates:
    """The gates of a run: decided in some steps, used again until the next decision, averaged for the log.

    Args:
        name: A key of [`GATINGS`], or None for gates that are always open.
        tasks: The model's tasks, T of them.
        primary_task: Name of the primary task, or None.

    Raises:
        ValueError: There should be gates, and no task is auxiliary.
    """

    def __init__(self, name: str | None, tasks: Sequence[Task], primary_task: str | None = None) -> None:
        self._function = None if name is None else GATINGS[name]
        self._names = [task.name for task in tasks]
        self._auxiliary = [task.auxiliary for task in tasks]
        if self._function is not None and not any(self._auxiliary):
            raise ValueError(
                f"auxiliary_gating={name!r} has nothing to do: none of the tasks {', '.join(self._names)} is "
                "auxiliary; set Task(auxiliary=True), or leave it out"
            )
        self._primary = self._names.index(primary_task) if primary_task in self._names else None
        self.values = [1.0] * len(tasks)
        self._sums = self._zeros()

    @property
    def is_on(self) -> bool:
        """Whether there are gates."""
        return self._function is not None

    def _zeros(self) -> dict[str, list[float]]:
        """Return, by auxiliary task, the sum of its gates since the last log line and their number."""
        pairs = zip(self._names, self._auxiliary, strict=True)
        return {name: [0.0, 0] for name, auxiliary in pairs if auxiliary and self.is_on}

    def decide(self, gramian: Tensor, tasks: Sequence[int]) -> Tensor:
        """Decide on every gate; it is 1 where the window lacks the task, or what it is compared with.

        Args:
            gramian: [T', T'], of the weighted gradients of the T' tasks of a window. If it is not finite, gates are 1.
            tasks: Their indices.

        Returns:
            Their gates, [T'], float64, on the CPU.
        """
        gates = torch.ones(len(tasks), dtype=torch.float64)
        comparable = self._primary is None or self._primary in tasks
        if self._function is not None and comparable and bool(gramian.isfinite().all()):
            primary = None if self._primary is None else list(tasks).index(self._primary)
            gates = self._function(gramian, [self._auxiliary[task] for task in tasks], primary)
        self.values = [1.0] * len(self._names)
        for task, gate in zip(tasks, gates.tolist(), strict=True):
            self.values[task] = gate
        return gates

    def end_step(self, present: Iterable[str]) -> None:
        """Take note of a step, with rows of the tasks `present`, for the log."""
        for name, gate in zip(self._names, self.values, strict=True):
            if name in self._sums and name in present:
                total, count = self._sums[name]
                self._sums[name] = [total + gate, count + 1]

    def logs(self) -> dict[str, float]:
        """Return `gate/<task>`, means over the steps with rows of the task since the last call, and begin anew."""
        sums, self._sums = self._sums, self._zeros()
        return {f"gate/{name}": total / count for name, (total, count) in sums.items() if count}

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain JSON types."""
        return {"values": self.values, "sums": self._sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of the same tasks."""
        self.values = list(state["values"])
        self._sums = {name: list(state["sums"][name]) for name in self._sums}
