"""Gradient combination: from the Gramian of the tasks' gradients to one coefficient per task.

With G = J Jᵀ, where row t of J is the gradient g_t of task t on the shared parameters, a method is a function G → c
and the update is d = Σ_t c_t g_t. The functions stand in `COMBINATIONS`.

**Weights.** Methods see the gradients of the tasks' own losses, as in their papers. Had they been multiplied with small
weights before, a method that looks at norms would turn the weight around (`mgda` gives most to the shortest gradient)
and one that does not (`nash_mtl`, `config`) would ignore it. Instead, a weight says in which part of the update a task
takes part ([`Combination.weighted`]): with an auxiliary task of weight 0.1 beside tasks of weight 1, a tenth of the
update is what the method makes of all of them and nine tenths are what it makes of the others alone,

    d = Σ_k (v_k - v_(k+1)) · d(S_k),     v_1 > v_2 > ... the weights that occur, S_k the tasks of weight ≥ v_k.

For every method then: equal weights are a common factor; the part of a task in d is proportional to its weight (up to
the next larger one) and vanishes with it; a task of weight 0 is absent; and with `sum` this is the weighted sum. The
share of a task, its fraction of the rows, multiplies its part: the gradient it goes in with for methods that treat each
gradient for itself and in proportion (`pcgrad`, `gradvac`, `upgrad`, `dual_proj`; for the latter two this is their
preference), otherwise what comes out, c_t g_t. So it is with any object too. What a `preference` says counts within
each d(S_k), among its tasks. Guarantees of a method, such as "no task loses", hold for each d(S_k); for the whole
update they hold where weights are equal (and shares, for methods whose output they multiply).

What holds for all of the methods:

- **Shapes**: G is [T, T], symmetric and finite, T the tasks of the optimizer step; any dtype and device. The result is
  [T], float64, on the CPU.
- **Scale**: one task alone has the coefficient 1, and orthogonal gradients of equal norm have coefficients of 1, so
  that a learning rate can stay when the method is changed. Papers that define the update as an average are multiplied
  by T. How long the update is otherwise stands with each method. c does not change when G is multiplied by a number
  (as by a loss scale).
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

One more, `graddrop` (Chen et al. 2020), is not a function of the Gramian; it stands in
[`hf_multitask.balancing.elementwise`]. It takes the weighted gradients: at each number, a smaller gradient is less
likely to be kept.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

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
        takes_shares: Whether shares multiply the gradients that go into the method, rather than what comes out.
    """

    name: str
    function: Callable[..., Tensor]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    takes_shares: bool = False

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

    def weighted(
        self, gramian: Tensor, shares: Tensor, weights: Tensor, *, seed: int = 0, memory: Tensor | None = None
    ) -> Tensor:
        """Return the coefficients of a weighted update; see the module's text for what a weight means.

        Args:
            gramian: G, [T, T], of the gradients g_t of the tasks' own losses; finite.
            shares: s, [T], positive, float64 on the CPU: the tasks' shares of the rows.
            weights: v, [T], of at least 0, float64 on the CPU: all else that the tasks are weighted with.
            seed: Seed of random orders.
            memory: As for [`coefficients`].

        Returns:
            a, [T], float64, on the CPU: the update is Σ_t a_t s_t g_t. With equal weights v, a is v times the
            method's coefficients.
        """
        gramian = gramian.detach().to("cpu", torch.float64)
        if self.takes_shares:
            gramian = gramian * shares[:, None] * shares
        result, reached = torch.zeros_like(weights), 0.0
        before = None if memory is None else memory.clone()
        for level in sorted({value for value in weights.tolist() if value > 0}):
            tasks = (weights >= level).nonzero().flatten()
            # Only what all tasks of the step give is kept for the next one.
            last = reached == 0.0
            part = self.for_tasks(tasks.tolist(), len(weights), keeps_state=last)
            known = None if before is None else before[tasks[:, None], tasks]
            found = part.coefficients(
                gramian[tasks[:, None], tasks], generator=torch.Generator().manual_seed(seed), memory=known
            )
            result[tasks] += (level - reached) * found
            if last and memory is not None and known is not None:
                memory[tasks[:, None], tasks] = known
            reached = level
        return result

    def for_tasks(self, tasks: Sequence[int], count: int, keeps_state: bool = True) -> Combination:
        """Return the method for some of the tasks it was made for.

        Args:
            tasks: Their indices.
            count: Number of all tasks.
            keeps_state: Whether what an object remembers of its calls is to be changed by them.

        Raises:
            ValueError: There is a preference, and not for so many tasks.
        """
        kwargs = dict(self.kwargs)
        if kwargs.get("preference") is not None:
            preference = torch.as_tensor(kwargs["preference"])
            if preference.shape != (count,):
                raise ValueError(
                    f"gradient_combination {self.name}: preference must be of shape [{count}], a number per task, got "
                    f"{list(preference.shape)}"
                )
            kwargs["preference"] = preference[list(tasks)].tolist()
        if not keeps_state and isinstance(kwargs.get("weighting"), nn.Module):
            kwargs["weighting"] = copy.deepcopy(kwargs["weighting"])
        return replace(self, kwargs=kwargs)


def _ask(gramian: Tensor, *, weighting: Callable[[Tensor], Tensor]) -> Tensor:
    gramian = gramian.detach().to("cpu", torch.float64)
    result = weighting(gramian)
    expected = f"gradient_combination: {type(weighting).__name__} must return {len(gramian)} finite numbers"
    if not isinstance(result, Tensor) or result.shape != (len(gramian),):
        raise ValueError(f"{expected}, got {list(result.shape) if isinstance(result, Tensor) else result!r}")
    if not result.isfinite().all():
        raise ValueError(f"{expected}, got {result.tolist()}")
    return result.detach().to("cpu", torch.float64)


# Weightings of torchjd that are the method of a name here, and what theirs is multiplied with to have its scale.
_TORCHJD: dict[str, tuple[str, Callable[[Any, Tensor, Tensor], float]]] = {
    "SumWeighting": ("sum", lambda weighting, gramian, c: 1.0),
    "MeanWeighting": ("sum", lambda weighting, gramian, c: len(c)),
    "PCGradWeighting": ("pcgrad", lambda weighting, gramian, c: 1.0),
    "GradVacWeighting": ("gradvac", lambda weighting, gramian, c: 1.0),
    "MGDAWeighting": ("mgda", lambda weighting, gramian, c: len(c)),
    "CAGradWeighting": ("cagrad", lambda weighting, gramian, c: len(c) / (1 + weighting.c)),
    "IMTLGWeighting": ("imtl_g", lambda weighting, gramian, c: len(c)),
    "AlignedMTLWeighting": ("aligned_mtl", lambda weighting, gramian, c: len(c)),
    "UPGradWeighting": ("upgrad", lambda weighting, gramian, c: len(c)),
    "DualProjWeighting": ("dual_proj", lambda weighting, gramian, c: len(c)),
    "FairGradWeighting": (
        "fairgrad",
        lambda weighting, gramian, c: float((gramian.trace() / (c @ gramian @ c).clamp(min=1e-300)).sqrt()),
    ),
}
# These take a matrix of gradients and look at the number of its rows alone, which a Gramian has as well.
_COUNTS_ROWS = ("SumWeighting", "MeanWeighting", "ConstantWeighting", "RandomWeighting")


def _torchjd_classes(weighting: Any) -> list[str]:
    """Return the names of the classes of torchjd that an object is of, the nearest first."""
    return [kind.__name__ for kind in type(weighting).__mro__ if kind.__module__.startswith("torchjd.")]


@methods.one_scale
def _ask_torchjd(gramian: Tensor, *, weighting: Any, preference: Tensor | None = None) -> Tensor:
    """Return what a weighting of torchjd gives, in the scale of the method of that name."""
    factor = next(_TORCHJD[name][1] for name in _torchjd_classes(weighting) if name in _TORCHJD)
    if preference is not None:
        weighting = copy.deepcopy(weighting)
        weighting.pref_vector = preference / len(preference)
    found = _ask(gramian, weighting=weighting)
    return found * factor(weighting, gramian, found)


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
        kinds = _torchjd_classes(method)
        if not callable(method) or isinstance(method, type) or "Aggregator" in kinds:
            raise ValueError(
                f"gradient_combination must be a name or an object that is callable with a Gramian, got {method!r}; "
                "of torchjd give a weighting, such as UPGradWeighting(), not a class and not an aggregator"
            )
        if "_MatrixWeighting" in kinds and not set(kinds) & set(_COUNTS_ROWS):
            raise ValueError(
                f"gradient_combination {type(method).__name__}: it takes the gradients themselves, and would compute "
                f"something else from their Gramian; choose a name ({', '.join(COMBINATIONS | ELEMENTWISE)}), or a "
                "weighting of torchjd that takes a Gramian"
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
        return Combination(
            method, (COMBINATIONS | ELEMENTWISE)[method], dict(kwargs or {}), method in methods.TAKE_SHARES
        )
    known = next((_TORCHJD[name][0] for name in _torchjd_classes(method) if name in _TORCHJD), None)
    if known is None:
        return Combination(type(method).__name__, _ask, {"weighting": method})
    options = {"weighting": method, "preference": getattr(method, "pref_vector", None)}
    methods.check_values(options)
    return Combination(type(method).__name__, _ask_torchjd, options, known in methods.TAKE_SHARES)
