"""Loss weightings that look at the norms of the tasks' gradients on the shared parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..models.task import Task
from .weighting_base import (
    FirstWindows,
    MaskedAdam,
    Observation,
    StatefulWeighting,
    check_number,
    masked_mean,
    masked_softmax,
)

__all__ = ["DualBalancing", "GradNorm"]


def _norms(observation: Observation) -> Tensor:
    assert observation.gradient_norms is not None  # `StatefulWeighting` has refused an observation without
    return observation.gradient_norms


class GradNorm(StatefulWeighting):
    """GradNorm (Chen et al. 2018): weighted gradient norms follow the tasks' training rates.

    With n_t the norm of task t's unweighted gradient, G_t = w_t · n_t, r_t = (L_t / L_t(0)) divided by its mean over
    tasks (large for a task that learns slowly), L_t(0) its mean loss in its first 10 windows, and Ḡ the mean of G_t,
    the weights are learned to minimise

        Σ_t | G_t - Ḡ · r_t^α / mean(r^α) |      with the target held fixed.

    Weights sum to T', the number of tasks in the window.

    Differences from the paper: (1) w = T' · softmax(u), and u is what is learned, by an Adam of its own, so that no
    weight turns negative and weights can be as far apart as the units of the losses; steps leave the mean of u as it
    is. (2) r_t^α is divided by its mean. Without that, the targets add up to more than the norms can, no weights
    reach them, and where learning stops is left to chance. (3) u starts at -log n_t, where all G_t are equal, instead
    of at equal weights; n_t is the mean of the task's first 10 windows, during which its u follows that mean. (4)
    L_t(0) is a mean as well, where the paper takes the first loss. Both means leave out the largest value (see
    [`FirstWindows`]): by one lucky loss near 0, r_t would be huge for good.

    Args:
        tasks: The model's tasks.
        alpha: α, how strongly slow tasks are favoured (the paper's 1.5); 0 makes all weighted norms equal.
        learning_rate: Adam's step size for u, about the largest change of log w_t per window (the paper's 0.025).
        start_balanced: Start as told in (3); otherwise at equal weights, as the paper does.
    """

    needs_gradient_norms: ClassVar[bool] = True
    scale_aware: ClassVar[bool] = True

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        alpha: float = 1.5,
        learning_rate: float = 0.025,
        start_balanced: bool = True,
    ) -> None:
        super().__init__(tasks)
        check_number("alpha", alpha, 0, 10)
        check_number("learning_rate", learning_rate, 0)
        if not isinstance(start_balanced, bool):
            raise ValueError(f"loss_weighting_kwargs: start_balanced must be true or false, got {start_balanced!r}")
        self.alpha = alpha
        self.start_balanced = start_balanced
        self._logits = self.vector("logits")
        self._first_losses = FirstWindows(self, "first_losses")
        self._first_norms = FirstWindows(self, "first_norms")
        self._adam = MaskedAdam(self, learning_rate)

    def weigh(self, observation: Observation) -> Tensor:
        """Return the weights, then take one step on u."""
        here, losses, norms = observation.present, observation.losses, _norms(observation)
        moving = here
        self._first_losses.add(losses, here)
        starting = self._first_norms.add(norms, here)
        if self.start_balanced:
            self._logits[starting] = -self._first_norms.mean().log()[starting]
            moving = here & ~starting

        weights = here.sum() * masked_softmax(self._logits, here)
        weighted = weights * norms
        rates = torch.where(here, losses / self._first_losses.mean(), 1.0)
        wanted = (rates / masked_mean(rates, here)) ** self.alpha
        mean = masked_mean(weighted, here)
        excess = weighted - mean * wanted / masked_mean(wanted, here)
        # What is left at the balance is rounding, and its sign means nothing.
        side = torch.where(excess.abs() > 1e-9 * mean, excess.sign(), 0.0)
        # ∂G_t/∂u_t = G_t; over the mean norm, so that Adam sees the same numbers whatever the unit of the gradients.
        before = self._logits.clone()
        self._adam.step(self._logits, side * weighted / mean, moving)
        if moving.any():
            self._logits[moving] -= masked_mean(self._logits - before, moving)
        return weights


class DualBalancing(StatefulWeighting):
    """DB-MTL (Lin et al. 2023): logarithms of the losses, and their gradients brought to the largest norm.

    The gradient of log L_t has the norm h_t = n_t / L_t, with n_t the norm of task t's gradient, so

        w_t = (1 / L_t) · max_k h_k / h_t      and all weighted gradients w_t · ∇L_t have the norm max_k h_k .

    Differences from the paper: where it averages the gradients themselves over the steps, here `decay` averages their
    norms h_t (a float per task instead of a gradient per task), and it is constant; the maximum is over the tasks of
    the window; and the gradients of task parameters are scaled like the shared ones, since a loss has one weight.

    Args:
        tasks: The model's tasks.
        decay: Share of the old average of h_t that is kept per window, in [0, 0.9999], with Adam's correction for its
            start. The default of 0 takes the window's own norms, so that the balance is exact.
    """

    needs_gradient_norms: ClassVar[bool] = True
    scale_aware: ClassVar[bool] = True

    def __init__(self, tasks: Sequence[Task], *, decay: float = 0.0) -> None:
        super().__init__(tasks)
        check_number("decay", decay, 0, 0.9999)
        self.decay = decay
        self._average = self.vector("average")
        self._count = self.vector("count")

    def weigh(self, observation: Observation) -> Tensor:
        """Return max_k h_k / (h_t · L_t)."""
        here, losses = observation.present, observation.losses
        average = self.decay * self._average + (1 - self.decay) * _norms(observation) / losses
        self._average[here] = average[here]
        self._count += here
        norms = torch.where(here, self._average / (1 - self.decay**self._count), 1.0)
        return norms[here].max() / (norms * losses)
