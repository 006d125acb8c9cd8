"""What follows for each task from a split into groups, and how sure it is.

A task that is in a group with others is judged by what it gets out of it: the mean of their affinity onto it, over the
measured steps. A task that is alone is judged by what all tasks together would gain or lose if it joined the group for
which that is best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["TaskAdvice", "advise_tasks", "series_interval", "weighted_interval"]

_BLOCKS = 10
_FEWEST = 5  # steps in which a pair came together, for an interval


@dataclass(frozen=True)
class TaskAdvice:
    """What follows for one task.

    Args:
        task: The task.
        companions: The others of its group, helpers included; empty for a task that is trained alone.
        affinity: What it gets out of its group: the mean of their affinity onto it, 0 alone.
        low: Lower end of the interval; NaN where there are too few steps.
        high: Upper end.
        joining: Of a task alone, what the sum over all tasks would change by if it joined the group for which that is
            best, with its interval; None otherwise.
        verdict: `together` (its companions help it), `alone` (in any other group more would be lost than gained),
            `harmed` (its companions cost it something, but the others gain more, or there is no room for another
            group), or `undecided` (the interval includes 0: there is not enough evidence).
        statement: The same in words.
    """

    task: str
    companions: tuple[str, ...]
    affinity: float
    low: float
    high: float
    joining: tuple[float, float, float] | None
    verdict: str
    statement: str


def series_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float, float]:
    """Return the mean of a quantity over steps, and the ends of its interval.

    Neighbouring steps have much in common, so the interval is Student's t of the means of ten blocks of consecutive
    steps (batch means, Schmeiser 1982). It is of this run: another seed is another run.

    Args:
        values: `[K]`, by step.
        confidence: Coverage of the interval.

    Example:
        >>> [round(number, 2) for number in series_interval(np.arange(20.0))]
        [9.5, 5.17, 13.83]
    """
    from scipy.stats import t

    blocks = min(_BLOCKS, len(values))
    mean = float(values.mean())
    if blocks < 2:
        return mean, np.nan, np.nan
    means = np.array([part.mean() for part in np.array_split(values, blocks)])
    half = float(t.ppf((1 + confidence) / 2, blocks - 1) * means.std(ddof=1) / blocks**0.5)
    return mean, mean - half, mean + half


def weighted_interval(
    values: np.ndarray, weights: Mapping[tuple[int, int], float], confidence: float = 0.95
) -> tuple[float, float, float]:
    """Return a weighted sum of mean affinities, and the ends of its interval.

    Args:
        values: `[K, T, T]`, affinities by step; NaN in steps without a pair, for which the others stand.
        weights: By row and column.
        confidence: Coverage of the interval.

    Returns:
        The ends are NaN where some pair came together in fewer than five steps.
    """
    total = np.zeros(len(values))
    few = False
    for (i, j), weight in weights.items():
        own = values[:, i, j]
        there = np.isfinite(own)
        few = few or int(there.sum()) < _FEWEST
        mean = own[there].mean()
        total += weight * (mean + np.where(there, own - mean, 0.0) * len(own) / there.sum())
    mean, low, high = series_interval(total, confidence)
    return (mean, np.nan, np.nan) if few else (mean, low, high)


def advise_tasks(
    values: np.ndarray,
    tasks: Sequence[str],
    helpers: Sequence[int],
    groups: Sequence[Sequence[int]],
    confidence: float = 0.95,
) -> list[TaskAdvice]:
    """Return what follows for each served task, group by group.

    Args:
        values: `[K, T, T]`, affinities by step.
        tasks: Names of the T tasks.
        helpers: Numbers of those that need not be served.
        groups: Of each group the numbers of its tasks.
        confidence: Coverage of the intervals.
    """
    advice = []
    for group in groups:
        for task in group:
            if task in helpers:
                continue
            if len(group) > 1:
                advice.append(_in_company(values, tasks, task, group, confidence))
            else:
                advice.append(_alone(values, tasks, helpers, task, [g for g in groups if g != group], confidence))
    return advice


def _in_company(
    values: np.ndarray, tasks: Sequence[str], task: int, group: Sequence[int], confidence: float
) -> TaskAdvice:
    others = [other for other in group if other != task]
    mean, low, high = weighted_interval(values, {(other, task): 1 / len(others) for other in others}, confidence)
    name, companions = tasks[task], tuple(tasks[other] for other in others)
    listed = ", ".join(companions)
    if low > 0:
        verdict, statement = "together", f"train with {listed}"
    elif high < 0:
        harm = "it harms" if len(others) == 1 else "they harm"
        verdict, statement = "harmed", f"train with {listed}, though {harm} {name}: on the whole other places cost more"
    else:
        verdict, statement = "undecided", f"train with {listed}? not enough evidence that this helps {name}"
    return TaskAdvice(name, companions, mean, low, high, None, verdict, statement)


def _alone(
    values: np.ndarray,
    tasks: Sequence[str],
    helpers: Sequence[int],
    task: int,
    groups: Sequence[Sequence[int]],
    confidence: float,
) -> TaskAdvice:
    changes = [weighted_interval(values, _joining(task, group, helpers), confidence) for group in groups]
    if not changes:
        statement = "alone: no other task has to be served, and no helper helps it"
        return TaskAdvice(tasks[task], (), 0.0, 0.0, 0.0, None, "alone", statement)
    best = max(range(len(groups)), key=lambda number: changes[number][0])
    listed = ", ".join(tasks[other] for other in groups[best])
    if changes[best][2] < 0:
        verdict, statement = "alone", f"alone: even with {listed} more would be lost than gained"
    else:
        verdict, statement = "undecided", f"alone? not enough evidence against training with {listed}"
    return TaskAdvice(tasks[task], (), 0.0, 0.0, 0.0, changes[best], verdict, statement)


def _joining(task: int, group: Sequence[int], helpers: Sequence[int]) -> dict[tuple[int, int], float]:
    """Return what all tasks together gain when a task that is alone joins a group, as weights of pairs."""
    size = len(group)
    weights = {(other, task): 1 / size for other in group}
    for receiver in group:
        if receiver in helpers:
            continue
        weights[(task, receiver)] = 1 / size
        for other in group:
            if other != receiver:
                weights[(other, receiver)] = 1 / size - 1 / (size - 1)
    return weights
