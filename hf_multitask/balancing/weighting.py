"""Loss weightings: how much each task's loss counts, decided anew in every optimizer step.

What is trained on is `L = Σ_t share_t · Task.weight_t · w_t · L_t`; a weighting gives the w_t, which are constants for
the backward pass. It sees the losses of the very window they are for ([`Observation`]), so methods that are a function
of the current losses are exact. Shares and `Task.weight` come on top: with `loss_reduction="tasks"` every task of a
window has the same share, and the published objectives hold as they stand, up to that common factor.

- `static`: plain summation, w = 1.
- `normalized`: each loss over its running mean.
- `uncertainty` (Kendall, Gal & Cipolla 2018): learned noise of each task.
- `dwa` (Liu, Johns & Davison 2019): more for losses that fall slowly.
- `random` (Lin et al. 2022): random weights, a baseline.
- `gls` (Chennupati et al. 2019): gradient of the geometric mean of the losses.
- `stch` (Lin et al. 2024): gradient of a smooth maximum of log-losses.
- `imtl_l` (Liu et al. 2021): learned scales that bring all weighted losses to 1.
- `famo` (Liu et al. 2023): equal rates of improvement.
- `gradnorm` (Chen et al. 2018): gradient norms that follow the training rates.
- `db_mtl` (Lin et al. 2023): log-losses, gradients brought to the same norm.

All but `static`, `dwa` and `random` are scale-aware: they train a regression whose loss is in the thousands beside a
cross-entropy near 1. `gradnorm` and `db_mtl` need the norms of the tasks' gradients, which cost a backward pass per
task; `famo` needs the losses after the step, which cost a forward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.task import Task, closest
from .gradient_norm_weighting import DualBalancing, GradNorm
from .learned_weighting import Famo, ImpartialLoss, Uncertainty
from .loss_only_weighting import (
    DynamicWeightAverage,
    GeometricLoss,
    NormalizedLoss,
    RandomWeighting,
    SmoothTchebycheff,
    StaticWeighting,
)
from .weighting_base import LossWeighting, Observation, StatefulWeighting

__all__ = ["WEIGHTINGS", "CustomWeighting", "LossWeighting", "Observation", "check_weighting", "make_weighting"]

WEIGHTINGS: dict[str, type[LossWeighting]] = {
    "static": StaticWeighting,
    "normalized": NormalizedLoss,
    "uncertainty": Uncertainty,
    "dwa": DynamicWeightAverage,
    "random": RandomWeighting,
    "gls": GeometricLoss,
    "stch": SmoothTchebycheff,
    "imtl_l": ImpartialLoss,
    "famo": Famo,
    "gradnorm": GradNorm,
    "db_mtl": DualBalancing,
}
"""Loss weightings by name; each is made from the tasks and its own arguments."""

# What the trainer gives to a weighting that asks for it; all other arguments are the user's.
_CONTEXT = ("tasks", "seed")


class CustomWeighting(LossWeighting):
    """An object of the user's that has a method `weights(observation)`; what it returns is checked.

    Its `state_dict` and `load_state_dict` are used where it has both, otherwise its state is empty. Attributes that are
    true say what else it wants: `needs_gradient_norms` gradient norms, and `needs_losses_after_step` the losses of the
    same rows after the step, by a method `after_step(losses)`. With `scale_aware` its weights stand for the unit of
    each loss, and gradient combinations see the weighted losses; otherwise they are applied to what a combination makes
    of the losses, as `Task.weight` is.

    Args:
        weighting: The object.
        tasks: The model's tasks.

    Raises:
        ValueError: The object lacks the method, is a class, has only one of the methods for its state, or was made
            for other tasks.
    """

    def __init__(self, weighting: Any, tasks: Sequence[Task]) -> None:
        self.name = weighting.__name__ if isinstance(weighting, type) else type(weighting).__name__
        if isinstance(weighting, type):
            raise ValueError(f"loss_weighting {self.name} is a class; give an object, as {self.name}(...)")
        if not callable(getattr(weighting, "weights", None)):
            raise ValueError(
                f"loss_weighting must be a name or an object with a method weights(observation), got {weighting!r}; "
                f"names are {', '.join(WEIGHTINGS)}"
            )
        methods = [callable(getattr(weighting, name, None)) for name in ("state_dict", "load_state_dict")]
        if any(methods) and not all(methods):
            raise ValueError(f"loss_weighting {self.name} needs both state_dict and load_state_dict, or neither")
        names = [task.name for task in tasks]
        if isinstance(weighting, StatefulWeighting) and [task.name for task in weighting.tasks] != names:
            raise ValueError(
                f"loss_weighting {self.name} was made for other tasks than the model's: {', '.join(names)}"
            )
        self.weighting = weighting
        self.tasks = tuple(tasks)
        self.has_state = all(methods)
        self.needs_gradient_norms = bool(getattr(weighting, "needs_gradient_norms", False))  # type: ignore[misc]
        self.needs_losses_after_step = bool(getattr(weighting, "needs_losses_after_step", False))  # type: ignore[misc]
        if self.needs_losses_after_step and not callable(getattr(weighting, "after_step", None)):
            raise ValueError(f"loss_weighting {self.name} needs losses after the step, and has no after_step(losses)")
        self.scale_aware = bool(getattr(weighting, "scale_aware", False))  # type: ignore[misc]

    def weights(self, observation: Observation) -> Tensor:
        """Return the object's weights.

        Raises:
            ValueError: They are not T finite numbers of at least 0.
        """
        rule = f"loss_weighting {self.name}: weights() must return {len(self.tasks)} finite numbers of at least 0"
        result = self.weighting.weights(observation)
        try:
            weights = torch.as_tensor(result).detach().to(device="cpu", dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"{rule}, one per task, got {result!r}") from None
        if weights.shape != (len(self.tasks),):
            raise ValueError(f"{rule}, one per task, got the shape {list(weights.shape)}")
        for task, weight in zip(self.tasks, weights.tolist(), strict=True):
            if not 0 <= weight < float("inf"):
                raise ValueError(f"{rule}, got {weight} for task {task.name!r} in step {observation.step}")
        return weights

    def after_step(self, losses: Tensor) -> None:
        """Hand the losses after a step to the object."""
        self.weighting.after_step(losses)

    def state_dict(self) -> dict[str, Any]:
        """Return the object's state."""
        return self.weighting.state_dict() if self.has_state else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hand a state to the object.

        Raises:
            ValueError: There is a state and the object takes none.
        """
        if self.has_state:
            self.weighting.load_state_dict(state)
        elif state:
            raise ValueError(f"state of {self.name}: unknown {', '.join(sorted(state))}; it has no load_state_dict")


def check_weighting(name: str, kwargs: Mapping[str, Any] | None = None) -> None:
    """Check a weighting's name and the names of its arguments.

    Raises:
        ValueError: The weighting or an argument is unknown (the nearest name is given).
    """
    if name not in WEIGHTINGS:
        known = ", ".join(WEIGHTINGS)
        raise ValueError(f"loss_weighting {name!r} is not known{closest(name, WEIGHTINGS)}; choose from {known}")
    own = [key for key in inspect.signature(WEIGHTINGS[name]).parameters if key not in _CONTEXT]
    for key in kwargs or {}:
        if key not in own:
            raise ValueError(
                f"loss_weighting_kwargs: {name!r} takes no {key!r}{closest(key, own)}; "
                f"it takes {', '.join(own) or 'no arguments'}"
            )


def make_weighting(
    weighting: Any, tasks: Sequence[Task], kwargs: Mapping[str, Any] | None = None, seed: int = 0
) -> LossWeighting:
    """Return a weighting, by its name or from an object.

    Args:
        weighting: A key of [`WEIGHTINGS`], or an object with a method `weights(observation)` (see
            [`CustomWeighting`]).
        tasks: The model's tasks, in its order.
        kwargs: The weighting's own arguments, if it is given by name.
        seed: Seed of a weighting that draws.

    Raises:
        ValueError: A name or value does not fit, or an object comes with arguments.

    Example:
        >>> from hf_multitask.models.task import Task
        >>> tasks = [Task("price", "regression"), Task("topic", "single_label_classification", labels=["a", "b"])]
        >>> weighting = make_weighting("normalized", tasks, {"decay": 0.9})
        >>> losses = torch.tensor([4000.0, 0.5], dtype=torch.float64)
        >>> seen = Observation(losses, present=torch.tensor([True, True]), step=0, epoch=0)
        >>> for _ in range(11):  # in the first ten windows no weight is above 1
        ...     weights = weighting.weights(seen)
        >>> (weights * losses).round(decimals=6).tolist()
        [1.0, 1.0]
    """
    if isinstance(weighting, str):
        check_weighting(weighting, kwargs)
        made = WEIGHTINGS[weighting]
        context = {"seed": seed} if "seed" in inspect.signature(made).parameters else {}
        return made(tasks, **context, **(kwargs or {}))  # type: ignore[call-arg]
    if kwargs:
        raise ValueError(f"loss_weighting_kwargs go with a name; give them to {type(weighting).__name__} itself")
    return CustomWeighting(weighting, tasks)
