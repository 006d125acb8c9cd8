"""Which dataset the next row comes from: mixing strategies, the schedule and the batch sampler.

**Mixing strategies** are pure functions from dataset sizes to probabilities, listed in `MIXING`. What they do:

- `proportional`: p ∝ n. Every row is equally likely, so *large datasets dominate*: beside 100,000 rows a dataset of
  1,000 gets one row in a hundred. It protects no small task.
- `temperature`: p ∝ n^α (α = 0.75 by default). Exponents below 1 soften the dominance; 1 is proportional, 0 uniform.
  Small datasets are then read more often than large ones; their rows repeat, which can overfit them.
- `uniform`, `round_robin`: every dataset the same share, whatever its size.
- `capped`: p ∝ min(n, K) (Raffel et al. 2020): proportional, but no dataset counts for more than K rows.
- `unimax` (Chung et al. 2023): as uniform as possible while no dataset is read more than a given number of times.
- `weighted`: the shares you give.
- `annealed` (Stickland & Murray 2019): p ∝ n^α with α falling linearly from 1 to 0.2 over the optimizer steps of the
  whole training, so that it begins proportional and ends nearly uniform, within a single epoch too.
- `performance_gap` (Gottumukkala et al. 2020): p ∝ how far a dataset's validation score is behind its single-task
  score, anew after each evaluation (see [`hf_multitask.gap_sampling`]).

How probabilities become a sequence of rows is told in [`hf_multitask.data.schedule`].
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..models.task import closest

__all__ = ["MIXING", "SIZELESS", "check_mixing", "follows_progress", "mixing_probabilities"]


def _normalized(weights: Sequence[float]) -> list[float]:
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def _check_exponent(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise ValueError(f"task_sampling_kwargs: {name} must lie in [0, 1], got {value!r}")


def _check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"task_sampling_kwargs: {name} must be a positive number, got {value!r}")


def proportional(sizes: Sequence[int]) -> list[float]:
    """Return p ∝ n."""
    return _normalized(sizes)


def temperature(sizes: Sequence[int], alpha: float = 0.75) -> list[float]:
    """Return p ∝ n^α, α in [0, 1]."""
    _check_exponent("alpha", alpha)
    return _normalized([size**alpha for size in sizes])


def uniform(sizes: Sequence[int]) -> list[float]:
    """Return equal shares."""
    return [1.0 / len(sizes)] * len(sizes)


def round_robin(sizes: Sequence[int]) -> list[float]:
    """Return equal shares; the schedule then takes the datasets in turn (as it does for `uniform`)."""
    return uniform(sizes)


def capped(sizes: Sequence[int], cap: int) -> list[float]:
    """Return p ∝ min(n, K) with `cap` = K rows (Raffel et al. 2020, section 3.5.2)."""
    _check_positive("cap", cap)
    return _normalized([min(size, cap) for size in sizes])


def unimax(sizes: Sequence[int], max_passes: float = 4.0, *, total_rows: int | None = None) -> list[float]:
    """Return UniMax shares (Chung et al. 2023, algorithm 1).

    The budget of rows is dealt out equally, smallest dataset first; one that would be read more than `max_passes`
    times gets `max_passes * n` rows and what it leaves goes to the others.

    Args:
        sizes: Rows of each dataset.
        max_passes: Most passes over any dataset in the whole training.
        total_rows: The budget: rows of the whole training. The trainer knows it; by default one pass over everything.
    """
    _check_positive("max_passes", max_passes)
    budget = float(sum(sizes) if total_rows is None else total_rows)
    rows = [0.0] * len(sizes)
    for done, index in enumerate(sorted(range(len(sizes)), key=lambda i: sizes[i])):
        rows[index] = min(budget / (len(sizes) - done), max_passes * sizes[index])
        budget -= rows[index]
    return _normalized(rows)


def weighted(sizes: Sequence[int], weights: Mapping[str, float], *, names: Sequence[str]) -> list[float]:
    """Return the given shares, `weights` by name of dataset, normalised to sum to 1; 0 leaves a dataset out."""
    if not isinstance(weights, Mapping):
        raise ValueError(f"task_sampling_kwargs: weights must map dataset names to numbers, got {weights!r}")
    for name in weights:
        if name not in names:
            raise ValueError(
                f"task_sampling_kwargs: weights names no dataset {name!r}{closest(name, names)}; "
                f"datasets are {', '.join(names)}"
            )
    missing = [name for name in names if name not in weights]
    if missing:
        raise ValueError(f"task_sampling_kwargs: weights lacks {', '.join(missing)}; give each dataset a number")
    for name, value in weights.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ValueError(f"task_sampling_kwargs: weight of {name!r} must be a number of at least 0, got {value!r}")
    if not any(weights.values()):
        raise ValueError("task_sampling_kwargs: all weights are 0, no row would be drawn")
    return _normalized([weights[name] for name in names])


def annealed(sizes: Sequence[int], start: float = 1.0, end: float = 0.2, *, progress: float) -> list[float]:
    """Return p ∝ n^α with α = start + (end - start) · progress.

    Stickland & Murray (2019, section 4.2) let α fall from 1 to 0.2 with the number of the epoch; here it falls with
    each step.

    Args:
        sizes: Rows of each dataset.
        start: α of the first optimizer step, in [0, 1].
        end: α of the last one, in [0, 1].
        progress: Part of the training that is over, from 0 (first step) to 1 (last step). The trainer knows it.
    """
    _check_exponent("start", start)
    _check_exponent("end", end)
    return temperature(sizes, start + (end - start) * progress)


_STARTS = ("proportional", "temperature", "uniform")


def performance_gap(
    sizes: Sequence[int],
    scores: Mapping[str, float] | None = None,
    comparison: str | None = None,
    start: str = "proportional",
    floor: float = 0.1,
    delay: int = 10,
    relative: bool = True,
    *,
    gaps: Sequence[float] | None = None,
) -> list[float]:
    """Return p ∝ gap to the single-task score (Gottumukkala et al. 2020), with a least share for every dataset.

    With T datasets and the gaps g, none below 0: p_i = floor / T + (1 - floor) · g_i / Σ g.

    Args:
        sizes: Rows of each dataset.
        scores: Single-task scores by task (or by dataset, where one task reads it); the trainer turns them into gaps.
        comparison: In place of `scores`, the `comparison.json` that `hf-multitask compare` wrote.
        start: Strategy of the shares before the first evaluation, and while no task is behind: `proportional`,
            `temperature` or `uniform`.
        floor: The least share of a dataset, in parts of an equal share, in [0, 1].
        delay: Optimizer steps from an evaluation to the first step with the new shares, at least 1. The rows of the
            next steps are drawn before an evaluation begins; loaders with workers draw further ahead.
        relative: Whether gaps are parts of the single-task score, so that metrics on different scales can be
            compared; else plain differences, as in the paper, whose metrics are all on one scale.
        gaps: Of each dataset, from the last evaluation; None before it.
    """
    if (scores is None) == (comparison is None):
        raise ValueError(
            "task_sampling 'performance_gap' needs task_sampling_kwargs={'scores': {task: single-task score}}, or "
            "{'comparison': 'path/to/comparison.json'}" + ("" if scores is None else ", not both")
        )
    if start not in _STARTS:
        raise ValueError(
            f"task_sampling_kwargs: start {start!r} is not known{closest(start, _STARTS)}; "
            f"choose from {', '.join(_STARTS)}"
        )
    _check_exponent("floor", floor)
    if isinstance(delay, bool) or not isinstance(delay, int) or delay < 1:
        raise ValueError(f"task_sampling_kwargs: delay must be a whole number of at least 1, got {delay!r}")
    if not isinstance(relative, bool):
        raise ValueError(f"task_sampling_kwargs: relative must be true or false, got {relative!r}")
    if gaps is None or not any(gap > 0 for gap in gaps):
        return MIXING[start](sizes)
    shares = _normalized([max(gap, 0.0) for gap in gaps])
    return _normalized([floor / len(sizes) + (1 - floor) * share for share in shares])


MIXING: dict[str, Callable[..., list[float]]] = {
    function.__name__: function
    for function in (
        proportional,
        temperature,
        uniform,
        round_robin,
        capped,
        unimax,
        weighted,
        annealed,
        performance_gap,
    )
}
"""Mixing strategies by name: sizes (and the strategy's own arguments) → probabilities that sum to 1."""

SIZELESS = ("uniform", "round_robin", "weighted")
"""Strategies whose probabilities do not depend on the sizes."""

# What the trainer tells a strategy that asks for it; all other arguments are the user's.
_CONTEXT = ("names", "progress", "total_rows", "gaps")


def check_mixing(name: str, kwargs: Mapping[str, Any] | None = None) -> None:
    """Check a strategy's name and the names of its arguments.

    Raises:
        ValueError: The strategy or an argument is unknown (the nearest name is given), or one is missing.
    """
    if name not in MIXING:
        raise ValueError(f"task_sampling {name!r} is not known{closest(name, MIXING)}; choose from {', '.join(MIXING)}")
    parameters = inspect.signature(MIXING[name]).parameters
    own = [p for p in list(parameters)[1:] if p not in _CONTEXT]
    for key in kwargs or {}:
        if key not in own:
            raise ValueError(
                f"task_sampling_kwargs: {name!r} takes no {key!r}{closest(key, own)}; "
                f"it takes {', '.join(own) or 'no arguments'}"
            )
    for key in own:
        if parameters[key].default is inspect.Parameter.empty and key not in (kwargs or {}):
            raise ValueError(f"task_sampling {name!r} needs task_sampling_kwargs={{{key!r}: ...}}")


def follows_progress(name: str) -> bool:
    """Return whether a strategy's probabilities change with the progress of the training."""
    return "progress" in inspect.signature(MIXING[name]).parameters


def mixing_probabilities(
    name: str,
    sizes: Mapping[str, int],
    kwargs: Mapping[str, Any] | None = None,
    *,
    progress: float = 0.0,
    total_rows: int | None = None,
    gaps: Sequence[float] | None = None,
) -> list[float]:
    """Return the probabilities of a strategy.

    Args:
        name: A key of `MIXING`.
        sizes: Rows by dataset.
        kwargs: The strategy's own arguments.
        progress: Part of the training that is over, in [0, 1].
        total_rows: Rows drawn in the whole training.
        gaps: Of each dataset, how far it is behind its single-task score.

    Raises:
        ValueError: A name or value does not fit.

    Example:
        >>> mixing_probabilities("temperature", {"large": 10_000, "small": 100}, {"alpha": 0.5})
        [0.9090909090909091, 0.09090909090909091]
    """
    check_mixing(name, kwargs)
    context: dict[str, Any] = {"names": list(sizes), "progress": progress, "total_rows": total_rows, "gaps": gaps}
    parameters = inspect.signature(MIXING[name]).parameters
    asked = {key: value for key, value in context.items() if key in parameters}
    return MIXING[name](list(sizes.values()), **(kwargs or {}), **asked)
