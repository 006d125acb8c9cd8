r"""Which tasks belong into one model? The best split of T tasks into groups, from what each pair does to each other.

Every group is one model, and every task is served by one group. What task j gets out of its group S is, as Fifty et al.
(2021) approximate it, the mean over its companions,

    A(S → j) = mean over i in S \ {j} of Z_{i→j}          A({j} → j) = 0

and the score of a split is the mean of this over the tasks. Alone nobody helps j and nobody harms it: that is 0 here,
so that a task stays alone where its companions would do harm. (The authors' code gives a task alone -10⁶: it is never
alone unless nothing else is left, even where all affinities are negative.) Theirs may also train a task in several
groups of which one serves it. Here only helpers, auxiliary tasks, which no group has to serve, may be in several
groups, or in none.

Up to 12 tasks the best split is found by dynamic programming over subsets, beyond by merging the two groups that gain
most, then by moving and swapping single tasks as long as that gains.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["MOST_EXACT", "Split", "affinity_onto", "find_splits"]

MOST_EXACT = 12  # tasks, helpers included
_TIE = 1e-12  # of the largest affinity: differences below are rounding

Groups = list[frozenset[int]]


class Split(NamedTuple):
    """A split of tasks into groups.

    Args:
        groups: Of each group the numbers of its tasks, helpers included, in order.
        score: Mean over the served tasks of what each gets out of its group.
    """

    groups: tuple[tuple[int, ...], ...]
    score: float


def affinity_onto(affinity: np.ndarray, group: Sequence[int], task: int) -> float:
    """Return what a task gets out of a group that it is in: the mean of the others' affinity onto it, 0 alone.

    Args:
        affinity: `[T, T]`, in row i and column j what i does to j.
        group: Numbers of its tasks.
        task: Number of the task.

    Example:
        >>> affinity_onto(np.array([[1.0, 0.25], [0.5, 1.0]]), [0, 1], 1)
        0.25
    """
    others = [other for other in group if other != task]
    return float(np.mean(affinity[others, task])) if others else 0.0


def find_splits(affinity: np.ndarray, helpers: Sequence[int] = (), most: int | None = None) -> dict[int, Split]:
    """Return the best split into each number of groups.

    Args:
        affinity: `[T, T]`, in row i and column j what i does to j; the diagonal is not looked at.
        helpers: Numbers of the tasks that need not be served.
        most: The largest number of groups (default: as many as there are tasks to serve).

    Returns:
        By number of groups, which are not empty; exact up to [`MOST_EXACT`] tasks. The groups are in the order of
        their first tasks.

    Raises:
        ValueError: There is no task to serve, a number does not fit, or an affinity is not finite.

    Example:
        >>> z = np.array([[0.0, 0.5, -0.5], [0.25, 0.0, -0.5], [-0.5, -0.5, 0.0]])
        >>> find_splits(z)[2]
        Split(groups=((0, 1), (2,)), score=0.25)
    """
    tasks = len(affinity)
    served = [task for task in range(tasks) if task not in set(helpers)]
    most = len(served) if most is None else most
    if affinity.shape != (tasks, tasks) or not set(helpers) <= set(range(tasks)) or not 1 <= most <= len(served):
        raise ValueError(
            f"{len(served)} of {tasks} tasks cannot be split into up to {most} groups by affinities of shape "
            f"{affinity.shape}"
        )
    matrix = np.where(np.eye(tasks, dtype=bool), 0.0, affinity)
    if not np.isfinite(matrix).all():
        raise ValueError("affinities must be finite")
    found = (
        _split_exactly(matrix, served, helpers, most)
        if tasks <= MOST_EXACT
        else _split_greedily(matrix, served, helpers, most)
    )
    splits = {}
    for number, groups in found.items():
        ordered = tuple(tuple(sorted(group)) for group in sorted(groups, key=lambda group: min(group & set(served))))
        score = sum(affinity_onto(matrix, group, task) for group in ordered for task in group if task in served)
        splits[number] = Split(ordered, score / len(served))
    return splits


def _split_exactly(matrix: np.ndarray, served: Sequence[int], helpers: Sequence[int], most: int) -> dict[int, Groups]:
    """Return the best splits, by dynamic programming over the subsets of the served tasks."""
    values, company = _subset_values(matrix, served, helpers)
    subsets = np.arange(len(values))
    best = np.full((most + 1, len(values)), -np.inf)
    best[0, 0] = 0.0
    first = np.zeros((most + 1, len(values)), dtype=int)  # of the best split of a subset, the group of its first task
    for whole in range(1, len(values)):
        lowest = whole & -whole
        parts = subsets[(subsets & ~whole == 0) & (subsets & lowest != 0)]
        scores = values[parts] + best[:-1, whole ^ parts]  # [groups, parts]
        chosen = scores.argmax(1)
        best[1:, whole] = np.take_along_axis(scores, chosen[:, None], 1)[:, 0]
        first[1:, whole] = parts[chosen]
    found = {}
    for number in range(1, most + 1):
        groups, left = [], len(values) - 1
        for count in range(number, 0, -1):
            part = first[count, left]
            own = {task for bit, task in enumerate(served) if part >> bit & 1}
            groups.append(frozenset(own | {task for bit, task in enumerate(helpers) if company[part] >> bit & 1}))
            left ^= part
        found[number] = groups
    return found


def _subset_values(matrix: np.ndarray, served: Sequence[int], helpers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each subset of the served tasks, what its tasks get with the best helpers, and which these are."""
    order = [*served, *helpers]
    numbers = np.arange(2 ** len(order))
    members = (numbers[:, None] >> np.arange(len(order)) & 1).astype(np.float64)
    inflow = members @ matrix[np.ix_(order, order)] * members
    gained = inflow[:, : len(served)].sum(1) / np.maximum(members.sum(1) - 1, 1)
    by_company = gained.reshape(2 ** len(helpers), 2 ** len(served))
    # Of equal ones the fewest helpers.
    fewer = members[:: 2 ** len(served), len(served) :].sum(1, keepdims=True) * _tolerance(matrix)
    company = (by_company - fewer).argmax(0)
    return by_company[company, np.arange(by_company.shape[1])], company


def _tolerance(matrix: np.ndarray) -> float:
    return _TIE * max(float(np.abs(matrix).max()), np.finfo(float).tiny)


class _Values:
    """What groups of served tasks get, and with which helpers; remembered."""

    def __init__(self, matrix: np.ndarray, helpers: Sequence[int]) -> None:
        self._matrix, self._helpers = matrix, helpers
        self._least = _tolerance(matrix)
        self._known: dict[frozenset[int], tuple[float, frozenset[int]]] = {}

    def __call__(self, group: frozenset[int]) -> float:
        return self.with_helpers(group)[0]

    def with_helpers(self, group: frozenset[int]) -> tuple[float, frozenset[int]]:
        """Return what its tasks get, and the group with the helpers that were found one by one to gain most."""
        if group not in self._known:
            own = sorted(group)
            whole, value = own, self._sum(own, own)
            while left := [helper for helper in self._helpers if helper not in whole]:
                helper = max(left, key=lambda helper, whole=whole: self._sum([*whole, helper], own))  # type: ignore[misc]
                gained = self._sum([*whole, helper], own)
                if gained <= value + self._least:
                    break
                whole, value = [*whole, helper], gained
            self._known[group] = value, frozenset(whole)
        return self._known[group]

    def _sum(self, whole: Sequence[int], own: Sequence[int]) -> float:
        return float(self._matrix[np.ix_(whole, own)].sum()) / max(len(whole) - 1, 1)


def _split_greedily(matrix: np.ndarray, served: Sequence[int], helpers: Sequence[int], most: int) -> dict[int, Groups]:
    """Return good splits: groups are merged pair by pair, and the tasks of few groups then moved and swapped."""
    value, least = _Values(matrix, helpers), _tolerance(matrix)
    groups: Groups = [frozenset({task}) for task in served]
    found = {}
    while True:
        if len(groups) <= most:
            groups = _improve(groups, value, least)
            found[len(groups)] = [value.with_helpers(group)[1] for group in groups]
        if len(groups) == 1:
            return found
        one, other = max(
            itertools.combinations(groups, 2),
            key=lambda pair: value(pair[0] | pair[1]) - value(pair[0]) - value(pair[1]),
        )
        groups = [group for group in groups if group not in (one, other)] + [one | other]


def _improve(groups: Groups, value: _Values, least: float) -> Groups:
    """Move a task to another group, or swap two, as long as that gains; the number of groups stays."""
    while True:
        gain, best = max(
            (
                (value(a) + value(b) - value(one) - value(other), (one, other, a, b))
                for one, other, a, b in _changes(groups)
            ),
            key=lambda change: change[0],
            default=(0.0, None),
        )
        if best is None or gain <= least:
            return groups
        one, other, a, b = best
        groups = [group for group in groups if group not in (one, other)] + [a, b]


def _changes(groups: Groups) -> Iterator[tuple[frozenset[int], frozenset[int], frozenset[int], frozenset[int]]]:
    """Yield two groups, and what they would be after a move or a swap."""
    for one, other in itertools.combinations(groups, 2):
        for source, target, turned in ((one, other, False), (other, one, True)):
            for task in source if len(source) > 1 else ():
                a, b = source - {task}, target | {task}
                yield (one, other, b, a) if turned else (one, other, a, b)
        for task, swapped in itertools.product(one, other):
            yield one, other, one - {task} | {swapped}, other - {swapped} | {task}
