"""Loss weightings that are learned from the losses, by gradient descent of their own."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..models.task import Task
from .weighting_base import (
    SMALLEST,
    FirstWindows,
    MaskedAdam,
    Observation,
    StatefulWeighting,
    check_number,
    masked_softmax,
)

__all__ = ["Famo", "ImpartialLoss", "Uncertainty"]

# Within this, exp(parameter) and the weights stay finite and positive for all losses that occur.
_WIDEST_LOG = 50.0


class _LearnedScale(StatefulWeighting):
    """One parameter s_t per task, moved by Adam so that the weighted loss w(s_t) · L_t comes to a fixed value.

    Without a given start, s_t is for the task's first 10 windows what is stationary at their mean loss (see
    [`FirstWindows`]), and the weight at most that of s_t = 0: one lucky batch with a loss near 0 would otherwise give a
    weight of many thousands, for hundreds of steps. Adam takes over afterwards.

    Gradients are clipped to [-1, 1]: they grow with the loss without bound on one side, and one outlier in Adam's
    second moment would halt the parameter for thousands of steps.
    """

    scale_aware: ClassVar[bool] = True

    def __init__(self, tasks: Sequence[Task], name: str, start: float | None, start_name: str, rate: float) -> None:
        super().__init__(tasks)
        check_number("learning_rate", rate, 0)
        if start is not None:
            check_number(start_name, start, -_WIDEST_LOG, _WIDEST_LOG)
        self._start = start
        self._parameter = self.vector(name, start or 0.0)
        self._first = FirstWindows(self, "first_losses")
        self._adam = MaskedAdam(self, rate)

    @abstractmethod
    def stationary(self, losses: Tensor) -> Tensor:
        """Return the parameters `[T]` at which the gradient of the objective is 0."""

    @abstractmethod
    def factors(self, parameters: Tensor) -> Tensor:
        """Return the weights `[T]` that parameters `[T]` stand for."""

    @abstractmethod
    def gradient(self, weighted: Tensor) -> Tensor:
        """Return the gradient `[T]` of the objective by the parameters, from the weighted losses."""

    def weigh(self, observation: Observation) -> Tensor:
        """Return the weights, then take one step on the parameters."""
        moving, losses, highest = observation.present, observation.losses, torch.full_like(observation.losses, math.inf)
        if self._start is None:
            starting = self._first.add(losses, observation.present)
            self._parameter[starting] = self.stationary(self._first.mean())[starting]
            highest[starting] = self.factors(torch.zeros_like(losses))[starting]
            moving = moving & ~starting
        weights = self.factors(self._parameter).minimum(highest)
        self._adam.step(self._parameter, self.gradient(weights * losses).clamp(-1, 1), moving)
        self._parameter.clamp_(-_WIDEST_LOG, _WIDEST_LOG)
        return weights


class Uncertainty(_LearnedScale):
    """Homoscedastic uncertainty (Kendall, Gal & Cipolla 2018): the noise of each task is learned along with it.

    With s_t = log σ_t², task t adds to what is minimised

        exp(-s_t) / 2 · L_t + s_t / 2     regression (Gaussian likelihood): w_t = exp(-s_t) / 2,
        exp(-s_t)     · L_t + s_t / 2     classification (softmax of scaled logits): w_t = exp(-s_t).

    The second line holds the paper's approximation of the normalising constant. It is used for token classification
    too, which is a softmax per token, and for multi-label classification: a sigmoid is a softmax over two. A
    regression of several values has one σ, as its loss is one mean. The minimum for a constant loss is exp(s_t) = L_t
    for regression and 2 · L_t for classification, so w_t · L_t = 1/2 for both.

    Differences from the paper: s_t has an Adam of its own with its gradient in closed form, clipped to [-1, 1], and it
    starts at that minimum for the mean loss of the task's first 10 windows, in which no weight is larger than with the
    paper's start, s_t = 0 (and one lucky window does not count much). From s_t = 0, a loss in the thousands takes s_t
    about 7 / learning_rate windows to get there, and rules the shared parameters until then. Shares and `Task.weight`
    do not enter the objective of s_t, otherwise s_t would undo them.

    Args:
        tasks: The model's tasks.
        learning_rate: Adam's step size, about the largest change of log w_t per window. The default of 0.01 follows a
            loss that falls by a factor of e per 100 windows.
        initial_log_variance: s_t at the start for all tasks, from -50 to 50; None for the minimum at the first losses.
    """

    def __init__(
        self, tasks: Sequence[Task], *, learning_rate: float = 0.01, initial_log_variance: float | None = None
    ) -> None:
        super().__init__(tasks, "log_variance", initial_log_variance, "initial_log_variance", learning_rate)
        halves = [1.0 if task.is_classification else 0.5 for task in self.tasks]
        self._factor = torch.tensor(halves, dtype=torch.float64)

    def stationary(self, losses: Tensor) -> Tensor:
        """Return log L_t for regression, log(2 · L_t) for classification."""
        return (2 * self._factor * losses).log()

    def factors(self, parameters: Tensor) -> Tensor:
        """Return exp(-s_t), halved for regression."""
        return self._factor * (-parameters).exp()

    def gradient(self, weighted: Tensor) -> Tensor:
        """Return 1/2 - w_t · L_t."""
        return 0.5 - weighted


class ImpartialLoss(_LearnedScale):
    """IMTL-L (Liu et al. 2021, "Towards Impartial Multi-Task Learning"): all weighted losses come to be 1.

    s_t is learned to minimise exp(s_t) · L_t - s_t, and w_t = exp(s_t); for a constant loss, w_t = 1 / L_t. It is
    `uncertainty` with the sign of s_t turned, twice the weight, and no difference between types of tasks.

    Differences from the paper: s_t has an Adam of its own with its gradient in closed form, clipped to [-1, 1], and it
    starts at -log of the mean loss of the task's first 10 windows, in which no weight is larger than 1, instead of 0
    (as for [`Uncertainty`]). Shares and `Task.weight` do not enter the objective of s_t.

    Args:
        tasks: The model's tasks.
        learning_rate: As for [`Uncertainty`].
        initial_log_scale: s_t at the start for all tasks, from -50 to 50 (0 in the paper); None for the minimum at the
            first losses. With a number, the unit of a loss matters until s_t has settled.
    """

    def __init__(
        self, tasks: Sequence[Task], *, learning_rate: float = 0.01, initial_log_scale: float | None = None
    ) -> None:
        super().__init__(tasks, "log_scale", initial_log_scale, "initial_log_scale", learning_rate)

    def stationary(self, losses: Tensor) -> Tensor:
        """Return -log L_t."""
        return -losses.log()

    def factors(self, parameters: Tensor) -> Tensor:
        """Return exp(s_t)."""
        return parameters.exp()

    def gradient(self, weighted: Tensor) -> Tensor:
        """Return w_t · L_t - 1."""
        return weighted - 1


class Famo(StatefulWeighting):
    """Fast adaptive multitask optimization (FAMO; Liu, Feng, Stone & Liu 2023): all losses fall at the same rate.

    z = softmax(ξ) over the T' tasks of the window, and

        w_t = T' · (z_t / L_t) / Σ_k (z_k / L_k) .

    After a step, δ_t = log L_t(before) - log L_t(after), both losses of the same rows, and ξ takes a step of Adam along
    Σ_k δ_k · ∂z_k/∂ξ, whose elements are z_t · (δ_t - Σ_k z_k · δ_k), with weight decay: a task that improves more than
    the others loses weight. The losses after the step cost a forward pass over the rows of the window, in training mode
    (as in the authors' code, with dropout of its own). Those of the next window would not do: rows differ by much more
    than a step changes, and what is left of the paper's adaptation of ξ are a tenth to a third of it.

    Difference from the paper: the weights sum to T' instead of 1, as those of plain summation.

    Args:
        tasks: The model's tasks.
        learning_rate: Adam's step size for ξ (the authors' 0.025).
        weight_decay: Pull of ξ towards equal weights (the paper's γ, 0.001).
    """

    needs_losses_after_step: ClassVar[bool] = True
    scale_aware: ClassVar[bool] = True

    def __init__(self, tasks: Sequence[Task], *, learning_rate: float = 0.025, weight_decay: float = 0.001) -> None:
        super().__init__(tasks)
        check_number("learning_rate", learning_rate, 0)
        check_number("weight_decay", weight_decay, 0)
        self._logits = self.vector("logits")
        self._adam = MaskedAdam(self, learning_rate, weight_decay)
        # Not part of the state: a step is through before a checkpoint is written.
        self._before: tuple[Tensor, Tensor] | None = None

    def weigh(self, observation: Observation) -> Tensor:
        """Return the weights, and keep the losses for [`after_step`]."""
        here, log_losses = observation.present, observation.losses.log()
        self._before = here, log_losses
        # softmax(ξ - log L) is (z / L) / Σ (z / L), and stays exact for losses of very different size.
        return here.sum() * masked_softmax(self._logits - log_losses, here)

    def after_step(self, losses: Tensor) -> None:
        """Learn from what the step has changed."""
        losses = self._check("losses", losses)
        if self._before is None:
            return
        (here, before), self._before = self._before, None
        here = here & losses.isfinite()
        if here.any():
            shares = masked_softmax(self._logits, here)
            gains = torch.where(here, before - losses.clamp(min=SMALLEST).log(), 0.0)
            self._adam.step(self._logits, shares * (gains - (shares * gains).sum()), here)
            self._logits.clamp_(-_WIDEST_LOG, _WIDEST_LOG)
