"""Loss weightings with a closed form: the weights follow from the losses, their past or chance, nothing is learned."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..models.task import Task, closest
from .weighting_base import START_WINDOWS, Observation, StatefulWeighting, check_number, masked_mean, masked_softmax

__all__ = [
    "DynamicWeightAverage",
    "GeometricLoss",
    "NormalizedLoss",
    "RandomWeighting",
    "SmoothTchebycheff",
    "StaticWeighting",
]


class StaticWeighting(StatefulWeighting):
    """Plain summation: w = 1 for every task (`Task.weight` is applied apart from this).

    Not scale-aware: the task with the largest gradients rules the shared parameters.
    """

    def weigh(self, observation: Observation) -> Tensor:
        """Return ones."""
        return torch.ones_like(observation.losses)


class NormalizedLoss(StatefulWeighting):
    """Each loss over its own running scale: w_t = 1 / m_t.

    m_t is the exponential moving average of L_t over the windows that held the task, the current one included, with
    Adam's correction for its start. In the task's first 10 windows w_t is at most 1, so that one lucky loss near 0 does
    not give a huge step. Weighted losses are thus near 1 whatever their unit. Weights are not brought to a common mean:
    that would tie the size of the step to the unit of the smallest loss. Since the average forgets, in the long run a
    task is trained on log L_t.

    Args:
        tasks: The model's tasks.
        decay: Share of the old average that is kept per window, in [0, 0.9999]; the average reaches back over about
            1 / (1 - decay) windows. With 0, w_t = 1 / L_t. The default of 0.99 evens out the noise of small windows.
    """

    scale_aware: ClassVar[bool] = True

    def __init__(self, tasks: Sequence[Task], *, decay: float = 0.99) -> None:
        super().__init__(tasks)
        check_number("decay", decay, 0, 0.9999)
        self.decay = decay
        self._average = self.vector("average")
        self._count = self.vector("count")

    def weigh(self, observation: Observation) -> Tensor:
        """Return 1 / m_t."""
        here = observation.present
        average = self.decay * self._average + (1 - self.decay) * observation.losses
        self._average[here] = average[here]
        self._count += here
        weights = (1 - self.decay**self._count) / torch.where(here, self._average, 1.0)
        return torch.where(self._count <= START_WINDOWS, weights.clamp(max=1.0), weights)


class DynamicWeightAverage(StatefulWeighting):
    """DWA (Liu, Johns & Davison 2019): tasks whose loss falls slowly get larger weights.

    w_t = T · softmax_t(r_t / temperature), r_t = (mean loss of the last period) / (mean loss of the period before).
    Weights stay as they are within a period; until a task has two periods behind it, its r_t is 1.

    Not scale-aware: ratios know nothing of the unit of a loss, and all weights are of the order of 1.

    Differences from the paper: a period is a number of windows instead of an epoch, since fine-tuning has few epochs,
    and each task counts those that held it; and ratios above 10 count as 10, so that no weight becomes 0.

    Args:
        tasks: The model's tasks.
        temperature: Larger values bring the weights closer to 1. The paper's 2 is the default.
        period_steps: Windows per period. With the default of 100, the weights begin to move after 200.
    """

    _HIGHEST_RATIO = 10.0

    def __init__(self, tasks: Sequence[Task], *, temperature: float = 2.0, period_steps: int = 100) -> None:
        super().__init__(tasks)
        check_number("temperature", temperature, 0.1)
        check_number("period_steps", period_steps, 1, whole=True)
        self.temperature = temperature
        self.period_steps = period_steps
        self._sum = self.vector("sum")
        self._count = self.vector("count")
        self._last = self.vector("last_period")
        self._ratio = self.vector("ratio", 1.0)

    def weigh(self, observation: Observation) -> Tensor:
        """Return the period's weights, then note the losses for the next one."""
        here, losses = observation.present, observation.losses
        weights = len(self.tasks) * (self._ratio / self.temperature).softmax(0)
        self._sum[here] += losses[here]
        self._count[here] += 1
        done = here & (self._count >= self.period_steps)
        mean = self._sum / self._count
        second = done & (self._last > 0)
        self._ratio[second] = (mean[second] / self._last[second]).clamp(max=self._HIGHEST_RATIO)
        self._last[done] = mean[done]
        self._sum[done] = 0.0
        self._count[done] = 0.0
        return weights


class RandomWeighting(StatefulWeighting):
    """Random loss weighting (RLW; Lin, Ye, Zhang & Tsang 2022): w = T · softmax(z), z_t ~ N(0, 1) anew in each step.

    A baseline: a method that does no better than this does no balancing. z_t is a function of seed, step and the
    task's name alone. Not scale-aware: all weights are of the order of 1.

    Difference from the paper: times T, so that weights average 1 as those of plain summation.

    Args:
        tasks: The model's tasks.
        seed: Seed of the draws.
    """

    def __init__(self, tasks: Sequence[Task], *, seed: int = 0) -> None:
        super().__init__(tasks)
        self.seed = seed

    def weigh(self, observation: Observation) -> Tensor:
        """Draw the step's weights."""
        draws = [random.Random(f"{self.seed}/{observation.step}/{task.name}").gauss(0, 1) for task in self.tasks]
        return len(self.tasks) * torch.tensor(draws, dtype=torch.float64).softmax(0)


class GeometricLoss(StatefulWeighting):
    """Geometric loss strategy (GLS; Chennupati et al. 2019): the gradient of the geometric mean of the losses.

    L = (Π_t L_t)^(1/T'), over the T' tasks of the window, so w_t = ∂L/∂L_t = L / (T' · L_t). Losses below 1e-8 count
    as 1e-8. All weighted losses w_t · L_t are equal; how large they are depends on the units of all losses, so prefer
    an optimizer that is indifferent to the scale of gradients, as Adam is.
    """

    scale_aware: ClassVar[bool] = True

    def weigh(self, observation: Observation) -> Tensor:
        """Return L / (T' · L_t)."""
        here, losses = observation.present, observation.losses
        return masked_mean(losses.log(), here).exp() / (here.sum() * losses)


class SmoothTchebycheff(StatefulWeighting):
    """Smooth Tchebycheff scalarization (STCH; Lin et al. 2024): attend to the worst task, smoothly.

    The paper minimises g = μ · log Σ_t exp(λ_t · (f_t - z_t) / μ), a smooth maximum whose gradient is
    Σ_t λ_t · q_t · ∇f_t with q = softmax(λ · (f - z) / μ). As in its experiments with networks, objectives are
    logarithms, f_t = log L_t, and z_t = log n_t, where n_t is the task's mean loss during a warm-up, in which the
    logarithms are just added up. Hence, with T' tasks in the window,

        w_t = 1 / L_t                     while a task of the window is warming up,
        w_t = T' · λ_t · q_t / L_t        afterwards.

    The factor T' makes both phases equally large: the weights of log L_t sum to T' (exactly so for equal λ).

    Differences from the paper: the warm-up is counted in windows that held the task, instead of epochs, and λ has
    mean 1 instead of sum 1, so that μ means the same for any number of tasks.

    Args:
        tasks: The model's tasks.
        mu: Smoothness μ, in units of log L. Small values approach the maximum: only the task that has come the least
            far since its warm-up is trained. With 1, the default, w_t becomes proportional to 1 / n_t.
        warmup_steps: Windows of the warm-up of each task.
        preferences: λ by name of task, positive; default 1 for each.
    """

    scale_aware: ClassVar[bool] = True

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        mu: float = 1.0,
        warmup_steps: int = 100,
        preferences: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(tasks)
        check_number("mu", mu, 1e-3)
        check_number("warmup_steps", warmup_steps, 1, whole=True)
        self.mu = mu
        self.warmup_steps = warmup_steps
        self.preferences = self._check_preferences(preferences or {})
        self._sum = self.vector("warmup_sum")
        self._count = self.vector("warmup_count")

    def _check_preferences(self, preferences: Mapping[str, float]) -> Tensor:
        names = [task.name for task in self.tasks]
        for name, value in preferences.items():
            if name not in names:
                raise ValueError(
                    f"loss_weighting_kwargs: preferences names no task {name!r}{closest(name, names)}; "
                    f"tasks are {', '.join(names)}"
                )
            check_number(f"preference of {name!r}", value, 1e-3, 1e3)
        values = torch.tensor([preferences.get(name, 1.0) for name in names], dtype=torch.float64)
        return values / values.mean()

    def weigh(self, observation: Observation) -> Tensor:
        """Return the gradient of the smooth maximum, times T'."""
        here, losses = observation.present, observation.losses
        warming = here & (self._count < self.warmup_steps)
        self._sum[warming] += losses[warming]
        self._count[warming] += 1
        if warming.any():
            return 1 / losses
        reference = torch.where(here, self._sum / self._count, 1.0)
        objectives = self.preferences * (losses / reference).log() / self.mu
        return here.sum() * self.preferences * masked_softmax(objectives, here) / losses
