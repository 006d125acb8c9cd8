"""Gradient combination: from the Gramian of the tasks' gradients to one coefficient per task.

With G = J Jᵀ, where row t of J is the gradient g_t of task t on the shared parameters, a method is a function G → c
and the update is d = Σ_t c_t g_t. The functions stand in `COMBINATIONS`. What holds for all of them:

- **Shapes**: G is [T, T], symmetric and finite, T the tasks of the optimizer step; any dtype and device. The result is
  [T], float64, on the CPU.
- **Scale**: where the tasks do not disagree the update is comparable to the plain sum, so that a learning rate can stay
  when the method is changed: one task alone has the coefficient 1, and orthogonal gradients of equal norm have
  coefficients of 1. Papers that define the update as an average are multiplied by T. c does not change when G is
  multiplied by a number (as by a loss scale).
- **No gradient**: a task whose gradient is zero (up to 1e-8 of the largest norm) is set aside with coefficient 1, and
  the method is applied to the others. Otherwise one such task would stop every other under `mgda`, and leave `nash_mtl`
  without a solution.
- **Degenerate G**: gradients that cancel or repeat give finite coefficients.
- **Randomness** comes from `generator` alone, and what is kept between steps is `memory`.

The methods:

- `sum`: the plain sum of the gradients.
- `pcgrad` (Yu et al. 2020), `gradvac` (Wang et al. 2021): each gradient turned away from conflict, pair by pair.
- `mgda` (Désidéri 2012), `upgrad` (Quinton & Rey 2024), `dual_proj` (Lopez-Paz & Ranzato 2017): no task loses.
- `cagrad` (Liu et al. 2021): the worst task gains most, near the mean gradient.
- `nash_mtl` (Navon et al. 2022), `fairgrad` (Ban & Ji 2024): progress is shared fairly.
- `imtl_g` (Liu et al. 2021), `config` (Liu et al. 2024): equal projections on all gradients.
- `aligned_mtl` (Senushkin et al. 2023): gradients replaced by the nearest orthogonal ones.

One more, `graddrop` (Chen et al. 2020), is no function of the Gramian; it stands in
[`hf_multitask.balancing.elementwise`].
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..models.task import closest
from . import combination_methods as methods
from .elementwise import ELEMENTWISE

__all__ = ["COMBINATIONS", "Combination", "check_combination", "make_combination"]

COMBINATIONS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        *(methods.sum, methods.pcgrad, methods.gradvac, methods.mgda, methods.cagrad, methods.nash_mtl),
        *(methods.imtl_g, methods.aligned_mtl, methods.upgrad, methods.fairgrad, methods.config, methods.dual_proj),
    )
}
"""Gradient combinations by name: Gramian (and the method's own arguments) → coefficients."""

# What the engine tells a method that asks for it; all other arguments are the user's.
_CONTEXT = ("generator", "memory")


@dataclass(frozen=True)
class Combination:
    """A method with its arguments.

    Args:
        name: A key of `COMBINATIONS`, or the class of a weighting object.
        function: Gramian → coefficients.
        kwargs: The function's own arguments.
    """

    name: str
    function: Callable[..., Tensor]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_elementwise(self) -> bool:
        """Whether the method takes the gradients themselves (see [`hf_multitask.balancing.elementwise`])."""
        return self.name in ELEMENTWISE and self.function is ELEMENTWISE[self.name]

    @property
    def needs_memory(self) -> bool:
        """Whether the method keeps a [T, T] float64 tensor between steps, zeros at first."""
        return "memory" in inspect.signature(self.function).parameters

    def coefficients(
        self, gramian: Tensor, *, generator: torch.Generator | None = None, memory: Tensor | None = None
    ) -> Tensor:
        """Return one coefficient per task.

        Args:
            gramian: G, [T, T], of the tasks of this step; finite.
            generator: Source of random orders, on the CPU; used by methods that draw.
            memory: Rows and columns of these tasks in what the method keeps; changed in place. Used by methods that
                need it.

        Returns:
            [T], float64, on the CPU.

        Raises:
            ValueError: The Gramian is not square or not finite, or another tensor does not fit it.
        """
        parameters = inspect.signature(self.function).parameters
        context = {"generator": generator, "memory": memory}
        asked = {key: value for key, value in context.items() if key in parameters}
        return self.function(gramian, **self.kwargs, **asked)


def _ask(gramian: Tensor, *, weighting: Callable[[Tensor], Tensor]) -> Tensor:
    gramian = gramian.detach().to("cpu", torch.float64)
    result = weighting(gramian)
    expected = f"gradient_combination: {type(weighting).__name__} must return {len(gramian)} finite numbers"
    if not isinstance(result, Tensor) or result.shape != (len(gramian),):
        raise ValueError(f"{expected}, got {list(result.shape) if isinstance(result, Tensor) else result!r}")
    if not result.isfinite().all():
        raise ValueError(f"{expected}, got {result.tolist()}")
    return result.detach().to("cpu", torch.float64)


def check_combination(method: str | Callable[[Tensor], Tensor], kwargs: Mapping[str, Any] | None = None) -> None:
    """Check a method's name and its arguments, as far as they can be without a Gramian.

    Args:
        method: A key of `COMBINATIONS`, or anything callable with a Gramian, such as a weighting of torchjd.
        kwargs: The method's own arguments.

    Raises:
        ValueError: The method or an argument is unknown (the nearest name is given), or a value is out of range.
    """
    kwargs = kwargs or {}
    if not isinstance(method, str):
        kinds = [kind.__name__ for kind in type(method).__mro__ if kind.__module__.startswith("torchjd.")]
        if not callable(method) or isinstance(method, type) or "Aggregator" in kinds:
            raise ValueError(
                f"gradient_combination must be a name or an object that is callable with a Gramian, got {method!r}; "
                "of torchjd give a weighting, such as UPGradWeighting(), not a class and not an aggregator"
            )
        if kwargs:
            raise ValueError(
                f"gradient_combination_kwargs go with a name; give them to {type(method).__name__} itself, got "
                f"{', '.join(map(str, kwargs))}"
            )
        return
    known = COMBINATIONS | ELEMENTWISE
    if method not in known:
        raise ValueError(
            f"gradient_combination {method!r} is not known{closest(method, known)}; choose from "
            f"{', '.join(known)}, or give a weighting object of torchjd (pip install hf_multitask[torchjd])"
        )
    hidden = (*_CONTEXT, "uniform")
    own = [name for name in list(inspect.signature(known[method]).parameters)[1:] if name not in hidden]
    for key in kwargs:
        if key not in own:
            raise ValueError(
                f"gradient_combination_kwargs: {method!r} takes no {key!r}{closest(key, own)}; "
                f"it takes {', '.join(own) or 'no arguments'}"
            )
    methods.check_values(kwargs)


def make_combination(method: str | Callable[[Tensor], Tensor], kwargs: Mapping[str, Any] | None = None) -> Combination:
    """Return a method with its arguments, both checked as by [`check_combination`].

    Example:
        >>> make_combination("upgrad").coefficients(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]))
        tensor([1.5000, 1.5000], dtype=torch.float64)
    """
    check_combination(method, kwargs)
    if isinstance(method, str):
        return Combination(method, (COMBINATIONS | ELEMENTWISE)[method], dict(kwargs or {}))
    return Combination(type(method).__name__, _ask, {"weighting": method})
