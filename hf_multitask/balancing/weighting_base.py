"""What every loss weighting is made of: the observation of a window, the interface, and state by task."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..models.task import Task

__all__ = [
    "SMALLEST",
    "START_WINDOWS",
    "FirstWindows",
    "LossWeighting",
    "MaskedAdam",
    "Observation",
    "StatefulWeighting",
    "check_number",
    "masked_mean",
    "masked_softmax",
]

SMALLEST = 1e-8
"""Losses and norms below this count as this, wherever a method divides by them or takes their logarithm."""

START_WINDOWS = 10
"""Windows of a task that a starting value is made of; until then no weight is larger than plain summation's."""


@dataclass(frozen=True)
class Observation:
    """What a loss weighting sees of the window whose losses it is about to weigh; the same on every process.

    Args:
        losses: `[T]`, float64 on the CPU: mean item loss of each task over the window and all processes, NaN where the
            task is absent. T is the number of tasks, in the model's order.
        present: `[T]`, bool: whether the window holds labelled items of the task.
        step: Number of the optimizer step, from 0.
        epoch: Number of the epoch, from 0.
        gradient_norms: `[T]`, float64: Euclidean norm of the gradient of each task's unweighted loss on the shared
            parameters, NaN where the task is absent; None unless the weighting needs it.
    """

    losses: Tensor
    present: Tensor
    step: int
    epoch: int
    gradient_norms: Tensor | None = None


class LossWeighting(ABC):
    """From the losses of a window to the weights they are multiplied with.

    `needs_gradient_norms` says whether `Observation.gradient_norms` must be there, `needs_losses_after_step` whether
    [`after_step`] is to be called, which costs a forward pass over the rows of each window. `scale_aware` says whether
    the weights make up for the unit of a loss: multiplying one task's loss by 1000 then leaves the balance between the
    tasks' weighted gradients as it is.
    """

    needs_gradient_norms: ClassVar[bool] = False
    needs_losses_after_step: ClassVar[bool] = False
    scale_aware: ClassVar[bool] = False

    def after_step(self, losses: Tensor) -> None:  # noqa: B027
        """Learn from the losses of the same rows after the optimizer step that followed the last [`weights`].

        It is not called after a step that was left out.

        Args:
            losses: `[T]`, float64 on the CPU, in training mode and over all processes; NaN where the task is absent.
        """

    @abstractmethod
    def weights(self, observation: Observation) -> Tensor:
        """Return the weights of this window's losses, and learn from them.

        A deterministic function of the observations so far: every process calls it with equal ones.

        Returns:
            `[T]`, float64, finite; those of absent tasks mean nothing.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain JSON types."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state; the next weights are bit-identical to those of the object that gave it.

        Raises:
            ValueError: A key is unknown or missing, or a value does not fit.
        """


class StatefulWeighting(LossWeighting):
    """A loss weighting whose state is a few floats per task.

    A subclass makes its state with [`vector`] when it is constructed, and implements [`weigh`]. This class takes care
    of tasks that do not count in a window: absent ones, and ones whose loss (or gradient norm, where it is needed) is
    NaN or infinite. Their state must not move, and they get the weight they had last (at first 1).

    Args:
        tasks: The model's tasks, in its order.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tuple(tasks)
        self._state: dict[str, Tensor] = {}
        self._last_weights = self.vector("last_weights", 1.0)

    def vector(self, name: str, value: float = 0.0) -> Tensor:
        """Add a vector `[T]`, filled with `value`, to the state and return it; it is to be changed in place only."""
        self._state[name] = torch.full((len(self.tasks),), value, dtype=torch.float64)
        return self._state[name]

    @abstractmethod
    def weigh(self, observation: Observation) -> Tensor:
        """Return weights `[T]`, positive, and update the state where `observation.present`.

        Here `present` holds the tasks that count (at least one), and losses and norms are at least [`SMALLEST`]; those
        of other tasks are 1, and what is returned for these is not looked at.
        """

    def weights(self, observation: Observation) -> Tensor:
        """Return the weights of this window's losses, and learn from them; see [`LossWeighting.weights`]."""
        needed = [self._check("losses", observation.losses)]
        if self.needs_gradient_norms:
            needed.append(self._check("gradient_norms", observation.gradient_norms))
        counts = self._check("present", observation.present).bool()
        for values in needed:
            counts = counts & torch.isfinite(values)
        if counts.any():
            safe = [torch.where(counts, values, 1.0).clamp(min=SMALLEST) for values in needed]
            norms = safe[1] if self.needs_gradient_norms else None
            weights = self.weigh(replace(observation, losses=safe[0], present=counts, gradient_norms=norms))
            self._last_weights[counts] = weights[counts]
        return self._last_weights.clone()

    def _check(self, name: str, values: Tensor | None) -> Tensor:
        shape = None if values is None else tuple(values.shape)
        if values is None or shape != (len(self.tasks),):
            raise ValueError(f"{type(self).__name__}: observation.{name} must be [{len(self.tasks)}], got {shape}")
        return values.to(device="cpu", dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        """Return the state: lists of T floats by name."""
        return {name: values.tolist() for name, values in self._state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state; nothing is changed unless all of it fits.

        Raises:
            ValueError: A key is unknown or missing, or a list is not one of T finite numbers.
        """
        where = f"state of {type(self).__name__}"
        for what, keys in (("unknown", state.keys() - self._state.keys()), ("missing", self._state.keys() - state)):
            if keys:
                raise ValueError(f"{where}: {what} {', '.join(sorted(keys))}; it consists of {', '.join(self._state)}")
        for name, own in self._state.items():
            values = state[name]
            if not isinstance(values, list) or len(values) != len(own) or not all(map(_is_finite, values)):
                raise ValueError(f"{where}: {name} must be {len(own)} finite numbers, one per task, got {values!r}")
        for name, own in self._state.items():
            own.copy_(torch.tensor(state[name], dtype=torch.float64))


class FirstWindows:
    """The size of a quantity at the start of training, by task, that no single window decides.

    The mean over the task's first [`START_WINDOWS`] windows so far, from the third one on without the largest value.
    One lucky batch (a loss near 0) then moves it by a tenth, and one outlier not at all; the mean of all others is
    kept, since losses of small windows may be near 0 in many of them.

    Args:
        owner: The weighting whose state holds the sums.
        name: Prefix of their names there.
    """

    def __init__(self, owner: StatefulWeighting, name: str) -> None:
        self._sum = owner.vector(f"{name}_sum")
        self._largest = owner.vector(f"{name}_largest")
        self._count = owner.vector(f"{name}_count")

    def add(self, values: Tensor, here: Tensor) -> Tensor:
        """Take in the values `[T]` of a window, and return for which tasks `[T]` they were still of the first."""
        starting = here & (self._count < START_WINDOWS)
        self._sum[starting] += values[starting]
        self._largest[starting] = torch.maximum(self._largest, values)[starting]
        self._count[starting] += 1
        return starting

    def mean(self) -> Tensor:
        """Return the mean `[T]`, 1 for a task that has not been seen."""
        many = self._count > 2
        total = torch.where(many, self._sum - self._largest, self._sum)
        mean = total / (self._count - many.double()).clamp(min=1)
        return torch.where(self._count > 0, mean, 1.0).clamp(min=SMALLEST)


class MaskedAdam:
    """Adam (Kingma & Ba 2015) on a vector of which only some elements take a step; each counts its own steps.

    Args:
        owner: The weighting whose state holds the moments.
        learning_rate: Step size.
        weight_decay: Factor of the parameter that is added to its gradient.
    """

    def __init__(self, owner: StatefulWeighting, learning_rate: float, weight_decay: float = 0.0) -> None:
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self._mean = owner.vector("adam_mean")
        self._square = owner.vector("adam_square")
        self._count = owner.vector("adam_count")

    def step(self, parameter: Tensor, gradient: Tensor, moves: Tensor) -> None:
        """Change `parameter` `[T]` in place where `moves`."""
        gradient = gradient + self.weight_decay * parameter
        mean = 0.9 * self._mean + 0.1 * gradient
        square = 0.999 * self._square + 0.001 * gradient**2
        count = self._count + 1
        step = mean / (1 - 0.9**count) / ((square / (1 - 0.999**count)).sqrt() + 1e-8)
        changes = ((self._mean, mean), (self._square, square), (self._count, count))
        for old, new in (*changes, (parameter, parameter - self.learning_rate * step)):
            old[moves] = new[moves]


def masked_mean(values: Tensor, counts: Tensor) -> Tensor:
    """Return the mean, a scalar, of the elements that count (at least one)."""
    return values[counts].mean()


def masked_softmax(values: Tensor, counts: Tensor) -> Tensor:
    """Return the softmax over the elements that count, 0 for the others."""
    return torch.where(counts, values, -math.inf).softmax(0)


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_number(name: str, value: Any, low: float, high: float = math.inf, *, whole: bool = False) -> None:
    """Raise a ValueError unless an argument is a finite (whole) number of at least `low` and at most `high`."""
    if not _is_finite(value) or not low <= value <= high or (whole and not isinstance(value, int)):
        kind = "whole number" if whole else "number"
        allowed = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise ValueError(f"loss_weighting_kwargs: {name} must be a {kind} {allowed}, got {value!r}")
