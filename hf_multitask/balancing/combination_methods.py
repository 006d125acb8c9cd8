"""The methods of gradient combination: small pure functions from the Gramian of the gradients to coefficients.

What all of them share (shapes, scale, tasks without gradient) is told in [`hf_multitask.balancing.combination`]. Here
g_t is the gradient of task t, G = J Jᵀ their Gramian, c the coefficients, d = Jᵀ c = Σ_t c_t g_t the update and T the
number of tasks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .solvers import fair_point, lift, nonnegative_quadratic, nonnegative_quadratic_with_norm

__all__ = [
    "TAKE_SHARES",
    "aligned_mtl",
    "cagrad",
    "check_values",
    "config",
    "dual_proj",
    "fairgrad",
    "gradvac",
    "imtl_g",
    "mgda",
    "nash_mtl",
    "one_scale",
    "pcgrad",
    "sum",
    "upgrad",
]

_ZERO = 1e-16  # A squared norm below this, relative to the largest, is no gradient.
_RANK = 1e-12  # An eigenvalue below this, relative to the largest, is rounding error of float32 gradients.
_SOLVABLE = 1e-8  # What eigenvalues are raised to where coefficients would be infinite: these stay below 1e4.
_MODES = ("min", "median", "rmse")

TAKE_SHARES = ("sum", "pcgrad", "gradvac", "upgrad", "dual_proj")
"""Methods that treat each gradient, or their sum, in proportion to it: shares multiply what goes in."""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_preference(value: Any) -> bool:
    if isinstance(value, Tensor):
        value = value.tolist()
    return isinstance(value, Sequence) and len(value) > 0 and all(_is_number(entry) and entry > 0 for entry in value)


_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "c": (lambda value: _is_number(value) and value >= 0, "a number of at least 0"),
    "beta": (lambda value: _is_number(value) and 0 < value <= 1, "a number in (0, 1]"),
    "alpha": (lambda value: _is_number(value) and value >= 0, "a number of at least 0"),
    "leak": (lambda value: _is_number(value) and 0 <= value <= 1, "a number in [0, 1]"),
    "mode": (lambda value: isinstance(value, str) and value in _MODES, f"one of {', '.join(_MODES)}"),
    "preference": (lambda value: value is None or _is_preference(value), "one positive number per task"),
}


def check_values(kwargs: Mapping[str, Any]) -> None:
    """Check the values of methods' arguments.

    Raises:
        ValueError: A value is out of its range.
    """
    for key, value in kwargs.items():
        if key in _ALLOWED and not _ALLOWED[key][0](value):
            raise ValueError(f"gradient_combination_kwargs: {key} must be {_ALLOWED[key][1]}, got {value!r}")


def one_scale(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Give a method what all share: checks, float64 on the CPU, one scale, tasks without gradient set aside."""

    @functools.wraps(function)
    def combine(gramian: Tensor, **kwargs: Any) -> Tensor:
        check_values(kwargs)
        gramian = gramian.detach().to("cpu", torch.float64)
        size = len(gramian) if gramian.ndim else 0
        if gramian.shape != (size, size) or not size:
            raise ValueError(f"gramian must be of shape [T, T] with T of at least 1, got {list(gramian.shape)}")
        if not gramian.isfinite().all():
            raise ValueError(f"gramian of {size} tasks has entries that are not finite")
        scale, coefficients = gramian.diagonal().max(), gramian.new_ones(size)
        if scale <= 0:
            return coefficients
        there = gramian.diagonal() > _ZERO * scale
        if kwargs.get("preference") is not None:
            preference = torch.as_tensor(kwargs["preference"]).to("cpu", torch.float64)
            if preference.shape != (size,):
                raise ValueError(
                    f"preference must be of shape [{size}], a number per task, got {list(preference.shape)}"
                )
            kwargs["preference"] = preference[there] / preference[there].mean()
        memory = kwargs.get("memory")
        if memory is not None:
            if memory.shape != (size, size) or memory.dtype != torch.float64:
                raise ValueError(
                    f"memory must be float64 of shape [{size}, {size}], got {memory.dtype}, {list(memory.shape)}"
                )
            kwargs["memory"] = memory[there][:, there]
        gramian = gramian[there][:, there] / scale
        coefficients[there] = function((gramian + gramian.T) / 2, **kwargs)
        if memory is not None:
            memory[there.outer(there)] = kwargs["memory"].flatten()
        return coefficients

    return combine


def _norms_and_cosines(gramian: Tensor) -> tuple[Tensor, Tensor]:
    """Return the norms of the gradients and their cosines; quadratic problems are solved in units of the norms."""
    norms = gramian.diagonal().sqrt()
    return norms, (gramian / norms.outer(norms)).fill_diagonal_(1.0)


@one_scale
def sum(gramian: Tensor) -> Tensor:
    """Return ones: the plain sum of the gradients, ‖d‖ = ‖Σ g_t‖."""
    return gramian.new_ones(len(gramian))


def _orders(size: int, generator: torch.Generator | None) -> Tensor:
    """Return for each task an order of the others, [T, T - 1]; without a generator, the order of the tasks."""
    rows = [torch.arange(size) if generator is None else torch.randperm(size, generator=generator) for _ in range(size)]
    orders = torch.stack(rows)
    return orders[orders != torch.arange(size)[:, None]].view(size, size - 1)


@one_scale
def pcgrad(gramian: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Return PCGrad's coefficients (Yu et al. 2020, algorithm 1).

    Each gradient is projected, for the other tasks j in random order, onto the normal plane of g_j wherever it points
    against g_j: g_i ← g_i - (g_i·g_j / ‖g_j‖²) g_j if g_i·g_j < 0. The update is the sum of the projected gradients, as
    in the paper; since projections shorten, ‖d‖ ≤ Σ ‖g_t‖. Orders are drawn from `generator`, per task; without one
    they are the order of the tasks.
    """
    return _vaccinate(gramian, gramian.new_zeros(gramian.shape), 0.0, generator)


@one_scale
def gradvac(
    gramian: Tensor, *, beta: float = 0.01, generator: torch.Generator | None = None, memory: Tensor | None = None
) -> Tensor:
    """Return the coefficients of Gradient Vaccine (Wang et al. 2021, algorithm 1), for the whole model as one group.

    As [`pcgrad`], but gradient i is turned towards g_j wherever their cosine φ is below a target φ̂_ij, until it is
    φ̂_ij: g_i ← g_i + ‖g_i‖ (φ̂ √(1-φ²) - φ √(1-φ̂²)) / (‖g_j‖ √(1-φ̂²)) g_j; then φ̂_ij ← (1-β) φ̂_ij + β φ. With
    targets of zero it is `pcgrad`. What is turned towards a target above 0 becomes longer: each gradient keeps its part
    across g_j, so that ‖d‖ has no bound in the ‖g_t‖ (targets near 1 and gradients that disagree).

    Args:
        gramian: G.
        beta: β in (0, 1]: what one step counts in the targets.
        generator: As for `pcgrad`.
        memory: The targets φ̂, [T, T], float64, on the CPU, at first zeros; changed in place. Without it, zeros.

    Ours keeps targets within ±(1 - 1e-6) in the formula, where it would divide by zero.
    """
    memory = gramian.new_zeros(gramian.shape) if memory is None else memory
    return _vaccinate(gramian, memory, beta, generator)


def _vaccinate(gramian: Tensor, targets: Tensor, beta: float, generator: torch.Generator | None) -> Tensor:
    norms, each = gramian.diagonal().sqrt(), torch.arange(len(gramian))
    # Row i of `mixed` says how gradient i, as changed so far, is made of the given ones; `products` is mixed @ gramian.
    mixed, products = torch.eye(len(gramian), dtype=torch.float64), gramian.clone()
    for other in _orders(len(gramian), generator).T:
        length = (products * mixed).sum(1).clamp(min=0.0).sqrt()
        # What a projection left of a gradient opposite to another has no direction.
        alive = length > 1e-12 * norms
        cosine = (products[each, other] / (length * norms[other]).where(alive, torch.tensor(1.0))).clamp(-1.0, 1.0)
        target = targets[each, other].clamp(-1 + 1e-6, 1 - 1e-6)
        turn = (target * (1 - cosine**2).sqrt() / (1 - target**2).sqrt() - cosine) * length / norms[other]
        turn = turn.where(alive & (cosine < target), torch.tensor(0.0))
        mixed[each, other] += turn
        products += turn[:, None] * gramian[other]
        targets[each, other] += torch.where(alive, beta * (cosine - targets[each, other]), 0.0)
    return mixed.sum(0)


@one_scale
def mgda(gramian: Tensor) -> Tensor:
    """Return MGDA's coefficients (Désidéri 2012; Sener & Koltun 2018): T times the shortest convex combination.

    c = T w with w = argmin ‖Σ w_t g_t‖², w ≥ 0, Σ w = 1. No task loses, G c ≥ ‖d‖² / T, and d vanishes where no
    direction improves all tasks: ‖d‖ ≤ T min ‖g_t‖. The papers have no factor T. Solved exactly, not by Frank-Wolfe
    steps: the x ≥ 0 that minimises ½ xᵀ G x - Σ x is a multiple of w.
    """
    norms, cosines = _norms_and_cosines(gramian)
    x = nonnegative_quadratic(lift(cosines, _RANK), -1 / norms) / norms
    return x * (len(x) / x.sum())


@one_scale
def cagrad(gramian: Tensor, *, c: float = 0.4) -> Tensor:
    """Return CAGrad's coefficients (Liu et al. 2021): the best worst task within a ball around the mean gradient.

    d ∝ argmax_d min_t g_t·d subject to ‖d - g_0‖ ≤ c ‖g_0‖, g_0 the mean gradient. Ours is T / (1 + c) times this d,
    so that c = 0 is the sum and no c makes a step longer than it, (1 - c) / (1 + c) ≤ ‖d‖ / ‖Σ g_t‖ ≤ 1; the paper's
    code divides by 1 + c² or not at all.
    With d = g_0 + Jᵀ x, x ≥ 0 and g_t·d ≥ τ (= where x_t > 0), the τ is sought that puts d on the sphere. Where no
    direction improves all tasks, d is close to the nearest to g_0 that harms none.

    Args:
        gramian: G.
        c: Radius of the ball in units of ‖g_0‖, at least 0; the paper's experiments use 0.2 to 0.5.
    """
    size, (norms, cosines) = len(gramian), _norms_and_cosines(gramian)
    cosines = lift(cosines, _SOLVABLE)
    mean = norms / size  # In units of the norms, as all below.
    inner, length = cosines @ mean, float((mean @ cosines @ mean).clamp(min=0.0).sqrt())
    if c * length > 1e-10:
        highest = 2 * (1 + c) * length * float(norms.min())
        mean = mean + nonnegative_quadratic_with_norm(cosines, inner, 1 / norms, c * length, highest)
    return mean * (size / (1 + c)) / norms


@one_scale
def nash_mtl(gramian: Tensor) -> Tensor:
    """Return Nash-MTL's coefficients (Navon et al. 2022): the bargain in which every task gains alike.

    The positive solution of G c = m / c (element by element), m the mean squared norm of the gradients; it maximises
    Σ_t log(g_t·d) among updates of its length. The paper solves G c = 1 / c, whose update has the length √T whatever
    the gradients'; ours has √(Σ ‖g_t‖²), the sum's if gradients were orthogonal. The paper's code also clips it (use
    `max_grad_norm`). Ours is solved exactly, by Newton's method. Same as [`fairgrad`] with α = 1.
    """
    return _fair(gramian, 1.0)


@one_scale
def fairgrad(gramian: Tensor, *, alpha: float = 2.0) -> Tensor:
    """Return FairGrad's coefficients (Ban & Ji 2024): α-fair shares in the progress.

    c ∝ the positive solution of G x = x^(-1/α) (element by element), with the length √(Σ ‖g_t‖²) of the update, as for
    [`nash_mtl`]; the paper takes x itself, whose length depends on the unit of the losses. Solved exactly, not by
    least squares.

    Args:
        gramian: G.
        alpha: α of at least 0. 0 is the sum, 1 proportional fairness (`nash_mtl`), 2 the least sum of delays, large
            values max-min fairness.
    """
    return _fair(gramian, 1 / alpha) if alpha else gramian.new_ones(len(gramian))


def _fair(gramian: Tensor, power: float) -> Tensor:
    norms, cosines = _norms_and_cosines(gramian)
    cosines = lift(cosines, _SOLVABLE)
    x = fair_point(cosines, norms, power)
    return x * (norms.norm() / (x @ cosines @ x).sqrt()) / norms


@one_scale
def imtl_g(gramian: Tensor) -> Tensor:
    """Return the coefficients of IMTL-G (Liu et al. 2021): the update has equal projections on all gradients.

    c = T v / Σ v with v = G⁺ n, n the norms of the gradients and G⁺ the pseudoinverse (the paper: Σ c = 1, and an
    inverse), so that ‖d‖ = T √(nᵀ v) / Σ v. Gradients that cancel give zeros. Where the v nearly add up to zero, or to
    less, the paper's update grows without bound, or ascends on all tasks: ours divides by no less than Σ |v| / 100.
    """
    v = torch.linalg.pinv(gramian, rtol=_RANK, hermitian=True) @ gramian.diagonal().sqrt()
    total = v.abs().sum()
    return len(v) * v / v.sum().clamp(min=total / 100) if total > _RANK else torch.zeros_like(v)


@one_scale
def aligned_mtl(gramian: Tensor, *, mode: str = "min", preference: Tensor | None = None) -> Tensor:
    """Return the coefficients of Aligned-MTL (Senushkin et al. 2023): the nearest gradients that are orthogonal.

    c = T B w, B = σ V Λ^(-1/2) Vᵀ over the eigenvalues Λ of G that are not zero, w the preference (default 1/T). The
    update is Σ_t T w_t ĝ_t, ĝ_t orthogonal and of length σ: ‖d‖ = σ √T for equal w, less if G is singular.

    Args:
        gramian: G.
        mode: The common length σ: √ of the least eigenvalue (`min`, as in the paper), the lower `median` or the mean
            (`rmse`, as in its code).
        preference: Importance of each task, [T], positive; ratios count.
    """
    values, vectors = torch.linalg.eigh(gramian)
    kept = values > _RANK * values[-1]
    values, vectors = values[kept], vectors[:, kept]
    sigma = {"min": values[0], "median": values.median(), "rmse": values.mean()}[mode].sqrt()
    weights = gramian.new_ones(len(gramian)) if preference is None else preference
    return sigma * (vectors @ ((vectors.T @ weights) / values.sqrt()))


@one_scale
def upgrad(gramian: Tensor, *, preference: Tensor | None = None) -> Tensor:
    """Return UPGrad's coefficients (Quinton & Rey 2024): the sum of the gradients, each made harmless to all tasks.

    c = Σ_t u_t v_t, v_t = argmin vᵀ G v subject to v ≥ e_t: Jᵀ v_t is the point nearest to g_t in the cone of updates
    that conflict with no task. So G c ≥ 0, and ‖d‖ ≤ Σ u_t ‖g_t‖. The paper takes the mean (u = 1/T), ours the sum
    (u = 1).

    Args:
        gramian: G.
        preference: u, [T], positive, scaled to mean 1; default ones.
    """
    norms, cosines = _norms_and_cosines(gramian)
    cosines = lift(cosines, _RANK)
    coefficients = gramian.new_ones(len(gramian)) if preference is None else preference.clone()
    weights = coefficients * norms
    for task in (gramian < 0).any(1).nonzero().flatten().tolist():  # The other gradients are in the cone.
        coefficients += nonnegative_quadratic(cosines, cosines[:, task] * weights[task]) / norms
    return coefficients


@one_scale
def dual_proj(gramian: Tensor, *, preference: Tensor | None = None) -> Tensor:
    """Return the coefficients of GEM (Lopez-Paz & Ranzato 2017, equation 11): the sum made harmless to all tasks.

    c = argmin cᵀ G c subject to c ≥ u: d is the point nearest to Σ_t u_t g_t in the cone of updates that conflict with
    no task. So G c ≥ 0, and ‖d‖ ≤ ‖Σ u_t g_t‖. GEM projects the gradient of the task at hand; with several at once,
    their sum (u = 1).

    Args:
        gramian: G.
        preference: u, [T], positive, scaled to mean 1; default ones.
    """
    norms, cosines = _norms_and_cosines(gramian)
    cosines = lift(cosines, _RANK)
    weights = gramian.new_ones(len(gramian)) if preference is None else preference
    return weights + nonnegative_quadratic(cosines, cosines @ (weights * norms)) / norms


@one_scale
def config(gramian: Tensor, *, preference: Tensor | None = None) -> Tensor:
    """Return ConFIG's coefficients (Liu et al. 2024): equal cosines with all gradients.

    d = (Σ_t g_t·u) u, u the unit vector along U⁺ w, U the unit gradients, w the preference: u·g_t / ‖g_t‖ ∝ w_t. In
    terms of the cosines C = U Uᵀ, U⁺ w = Uᵀ C⁺ w. Gradients that cancel give zeros. Scale as in the paper:
    ‖d‖ = |Σ_t g_t·u| ≤ Σ ‖g_t‖.

    Args:
        gramian: G.
        preference: w, [T], positive; ratios count. Default: ones.
    """
    norms, cosines = _norms_and_cosines(gramian)
    weights = gramian.new_ones(len(gramian)) if preference is None else preference
    v = torch.linalg.pinv(cosines, rtol=_RANK, hermitian=True) @ weights
    squared = v @ cosines @ v
    return (norms @ cosines @ v) / squared * v / norms if squared > _RANK else torch.zeros_like(v)
