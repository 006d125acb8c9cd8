"""Small convex problems in T unknowns, T the number of tasks, solved to float64 accuracy on the CPU.

The methods of [`hf_multitask.balancing.combination`] come down to three of them: a quadratic programme over
non-negative vectors, the same with one extra norm to meet, and a fixed point of the α-fair kind. All take tensors of
float64 and return new ones. Entries of the matrices are taken to be of the order of 1.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import brentq, nnls
from torch import Tensor

__all__ = ["fair_point", "lift", "nonnegative_quadratic", "nonnegative_quadratic_with_norm"]

_ROUNDING = float(np.finfo(np.float64).eps)


def lift(matrix: Tensor, floor: float) -> Tensor:
    """Return a positive definite matrix: eigenvalues below `floor` times the largest one are raised to that.

    Args:
        matrix: Symmetric, [T, T]; eigenvalues below zero count as rounding errors of zero.
        floor: Least eigenvalue of the result, as a fraction of the largest one. Where a problem has many solutions,
            this picks the smallest of them.

    Example:
        >>> lift(torch.ones(2, 2, dtype=torch.float64), floor=0.5)
        tensor([[1.5000, 0.5000],
                [0.5000, 1.5000]], dtype=torch.float64)
    """
    values, vectors = torch.linalg.eigh(matrix)
    if values[0] >= floor * values[-1]:
        return matrix
    lifted = (vectors * values.clamp(min=floor * float(values[-1]))) @ vectors.T
    return (lifted + lifted.T) / 2


def nonnegative_quadratic(matrix: Tensor, linear: Tensor) -> Tensor:
    """Return the x ≥ 0 that makes ½ xᵀ M x + qᵀ x least.

    Block principal pivoting (Portugal, Júdice & Vicente 1994): guess which entries are positive, solve for them, and
    exchange all that contradict the guess at once, or one at a time where that does not make progress. In the rare
    case that this turns in circles, the active-set method of Lawson & Hanson (1974) does the work.

    Args:
        matrix: M, positive definite, [T, T].
        linear: q, [T].

    Example:
        >>> nonnegative_quadratic(torch.eye(2, dtype=torch.float64), torch.tensor([-3.0, 2.0], dtype=torch.float64))
        tensor([3., 0.], dtype=torch.float64)
    """
    m, q = matrix.numpy(), linear.numpy()
    positive, fewest, patience = q < 0, len(q) + 1, 10
    for _ in range(100 + 5 * len(q)):
        x = np.zeros_like(q)
        x[positive] = np.linalg.solve(m[np.ix_(positive, positive)], -q[positive])
        slope = np.where(positive, 0.0, m @ x + q)
        tolerance = 100 * _ROUNDING * (np.abs(m) @ np.abs(x) + np.abs(q))
        wrong = np.where(positive, x < 0, slope < -tolerance)
        count = int(wrong.sum())
        if not count:
            return torch.from_numpy(x)
        if count < fewest:
            fewest, patience = count, 10
        elif patience > 0:
            patience -= 1
        else:
            wrong[: np.flatnonzero(wrong)[-1]] = False
        positive = positive ^ wrong
    root = np.linalg.cholesky(m)
    return torch.from_numpy(nnls(root.T, np.linalg.solve(root, -q), maxiter=100 * len(q))[0])


def nonnegative_quadratic_with_norm(
    matrix: Tensor, linear: Tensor, pull: Tensor, norm: float, highest: float
) -> Tensor:
    """Return the x ≥ 0 that makes ½ xᵀ M x + (q - τ p)ᵀ x least, with the τ at which √(xᵀ M x) is `norm`.

    √(xᵀ M x) grows with τ, from 0 at τ = min q / p, so the right τ is found by Brent's method.

    Args:
        matrix: M, positive definite, [T, T].
        linear: q, [T].
        pull: p, positive, [T].
        norm: Asked value of √(xᵀ M x), positive.
        highest: A value that τ does not exceed. If `norm` is not reached there, the x of that τ is returned.
    """
    lowest = float((linear / pull).min())

    def excess(threshold: float) -> float:
        x = nonnegative_quadratic(matrix, linear - threshold * pull)
        return float(x @ matrix @ x) ** 0.5 - norm

    threshold = highest
    if excess(highest) > 0:
        threshold = float(brentq(excess, lowest, highest, xtol=1e-16, rtol=1e-14))
    return nonnegative_quadratic(matrix, linear - threshold * pull)


def fair_point(matrix: Tensor, scales: Tensor, power: float) -> Tensor:
    """Return the b > 0 with M b = s^(p-1) b^(-p), the least point of ½ bᵀ M b - Σ_t s_t^(p-1) ∫ b_t^(-p).

    The function is convex. Newton's method starts from the solution for orthogonal tasks, b = s^((p-1)/(p+1)), in
    coordinates relative to b, and shortens steps that would pass the least point on their line.

    Raises:
        RuntimeError: The two sides, each times b, do not come within 1e-5 of their largest entry.

    Args:
        matrix: M, positive definite with ones on the diagonal, [T, T].
        scales: s, positive, [T].
        power: p > 0.

    Example:
        >>> fair_point(torch.eye(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64), power=1.0)
        tensor([1., 1.], dtype=torch.float64)
    """
    m, log_scales = matrix.numpy(), np.log(scales.numpy())
    b = np.exp(log_scales * (power - 1) / (power + 1))
    least = 1e-30 * b.max()

    def sides(point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Both sides times b. Powers of small numbers overflow far from the solution: the step is then shortened.
        with np.errstate(over="ignore"):
            return point * (m @ point), np.exp((power - 1) * (log_scales - np.log(point)))

    left, right = sides(b)
    for _ in range(500):
        # An entry may be zero for all that float64 can tell: it then stays at the bound.
        moving = (b > least) | (left < right)
        if (np.abs(left - right) <= 100 * _ROUNDING * (b * (np.abs(m) @ b) + right))[moving].all():
            break
        hessian = (b[:, None] * m * b + np.diag(power * right))[np.ix_(moving, moving)]
        root = np.sqrt(hessian.diagonal())
        step = np.zeros_like(b)
        step[moving] = np.linalg.solve(hessian / root[:, None] / root, (right - left)[moving] / root) / root
        slope = float(step @ (left - right))
        length = min(1.0, 0.99 / max(-float(step.min()), 0.99))
        while length > 1e-12:
            candidate = np.maximum(b * (1 + length * step), least)
            new_left, new_right = sides(candidate)
            if np.isfinite(new_right).all() and (step * b / candidate) @ (new_left - new_right) <= -0.1 * slope:
                break
            length /= 2
        else:
            break
        b, left, right = candidate, new_left, new_right
    moving = (b > least) | (left < right)
    if np.abs(left - right)[moving].max(initial=0.0) > 1e-5 * max(np.abs(left).max(), right.max()):
        raise RuntimeError("Newton's method did not converge")
    return torch.from_numpy(b)
