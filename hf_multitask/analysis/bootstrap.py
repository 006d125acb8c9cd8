"""How sure is a difference between two models? Resampled evaluation examples, seeds, and what follows from them.

A comparison of two ways of training has two sources of chance: which examples happen to be in the validation set, and
what another seed (heads, order of rows, dropout) would have given. The *paired bootstrap* (Efron & Tibshirani 1993;
for language tasks Koehn 2004, Berg-Kirkpatrick et al. 2012) draws the examples anew, with replacement, and computes the
metric of both models, of every seed, on the same draw: what makes an example hard for both cancels out. It says nothing
about seeds, and resampling three seeds as well would say too little (it underestimates their variance by a third, and
three values make few different draws). So the seeds' part is estimated from their spread. With S seeds, D the mean
difference, s² the variance of the seeds' differences, V the bootstrap variance of D over examples:

    Var(D) = V + max(0, s²/S - I)

where I is the part of chance that belongs to the combination of a seed and an example; it is in both terms and must
count once (with crossed sources, adding both overestimates: Owen 2007, "The pigeonhole bootstrap"). It shows in how
much more a single seed's difference varies over the draws, on the mean W, than their mean does: I = (W - V) / (S - 1).
The interval is D ± t √Var(D), with Student's t for Satterthwaite's (1946) degrees of freedom: near S - 1 where the
seeds' spread dominates, so that three seeds that disagree decide nothing, and many where the examples do. That chance
in training must count, and that few paired seeds beat many unpaired ones, show Bouthillier et al. (2021, "Accounting
for variance in machine learning benchmarks"). With one seed the interval is the bootstrap's, over examples only.

The training rows are given: none of this says what other training rows would have led to.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Estimate", "draw_counts", "estimate", "judge", "relative_changes", "resample"]

_BLOCK = 4_000_000  # numbers of a block of draws


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and how sure it is.

    Args:
        value: The mean over seeds.
        low: Lower end of the interval, over examples and seeds (over examples only with one seed).
        high: Its upper end.
        low_over_examples: Lower end of the paired bootstrap interval over examples, these seeds given.
        high_over_examples: Its upper end.
        seed_spread: Standard deviation over seeds, None with one.
        degrees_of_freedom: Of the interval, None with one seed.
    """

    value: float
    low: float
    high: float
    low_over_examples: float
    high_over_examples: float
    seed_spread: float | None
    degrees_of_freedom: float | None


def draw_counts(examples: int, resamples: int, seed: int, name: str = "") -> Iterator[np.ndarray]:
    """Yield blocks `[r, examples]` of how often each example comes in each draw; all together `resamples` draws.

    Args:
        examples: Number of examples, N; a draw has as many, with replacement.
        resamples: Number of draws.
        seed: Seed of the draws.
        name: Name of the examples; the same seed, name and number give the same draws.
    """
    generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode()), examples]))
    block = max(_BLOCK // examples, 1)
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        drawn = generator.integers(0, examples, (size, examples)) + np.arange(size)[:, None] * examples
        yield np.bincount(drawn.ravel(), minlength=size * examples).reshape(size, examples).astype(np.float64)


def resample(
    metrics: Sequence[Callable[[np.ndarray], np.ndarray]], examples: int, resamples: int, seed: int, name: str = ""
) -> np.ndarray:
    """Return `[len(metrics), resamples]`: metrics of the same examples on the same draws of them.

    Args:
        metrics: Functions from counts of examples `[r, N]` to values `[r]`.
        examples: Number of examples, N.
        resamples: Number of draws.
        seed: Seed of the draws.
        name: Name of the examples.
    """
    parts = [
        np.stack([metric(counts) for metric in metrics]) for counts in draw_counts(examples, resamples, seed, name)
    ]
    return np.concatenate(parts, axis=1)


def estimate(values: np.ndarray, draws: np.ndarray, confidence: float = 0.95) -> Estimate:
    """Return the mean over seeds of a quantity, with its interval over examples and seeds.

    Args:
        values: `[S]`, the quantity by seed, on all examples.
        draws: `[S, R]`, the same on R draws of the examples, the same draws for every seed.
        confidence: Coverage of the interval.

    Example:
        >>> found = estimate(np.array([0.1, 0.3]), np.array([[0.1, 0.1, 0.1], [0.3, 0.3, 0.3]]))
        >>> round(found.value, 3), found.degrees_of_freedom, round(found.high - found.low, 2)
        (0.2, 1.0, 2.54)
    """
    from scipy.stats import t

    seeds = len(values)
    mean, means = float(np.mean(values)), draws.mean(0)
    tail = (1 - confidence) / 2
    low, high = (float(end) for end in np.quantile(means, [tail, 1 - tail]))
    if seeds == 1:
        return Estimate(mean, low, high, low, high, None, None)
    spread = float(np.std(values, ddof=1))
    over_examples = float(means.var(ddof=1))
    over_seeds = spread**2 / seeds
    in_both = max(float(draws.var(axis=1, ddof=1).mean()) - over_examples, 0.0) / (seeds - 1)
    variance = over_examples + max(over_seeds - in_both, 0.0)
    # What the examples contribute is known as from many examples, what the seeds contribute as from their number.
    known = over_seeds**2 / (seeds - 1) + over_examples**2 / max(draws.shape[1] - 1, 1)
    freedom = max(variance**2 / known, float(seeds - 1)) if known else math.inf
    half = float(t.ppf(1 - tail, freedom)) * math.sqrt(variance)
    return Estimate(mean, mean - half, mean + half, low, high, spread, freedom if math.isfinite(freedom) else None)


def judge(low: float, high: float, margin: float) -> str:
    """Return the verdict on a difference, positive for better, from its interval.

    `equal` where the whole interval lies within ±margin, also where it leaves out 0: a difference that is sure but too
    small to matter. Otherwise `better` above 0, `worse` below, and `undecided` where it holds 0 and reaches beyond the
    margin.

    Example:
        >>> judge(0.002, 0.006, 0.01), judge(0.002, 0.03, 0.01), judge(-0.03, 0.002, 0.01)
        ('equal', 'better', 'undecided')
    """
    if -margin <= low and high <= margin:
        return "equal"
    if low > 0:
        return "better"
    return "worse" if high < 0 else "undecided"


def relative_changes(multi: np.ndarray, single: np.ndarray, greater_is_better: Sequence[bool]) -> np.ndarray:
    """Return the change of each task's metric in parts of its baseline, positive for better.

    Their mean over tasks is Δm (Maninis et al. 2019, "Attentive single-tasking of multiple tasks"):

        Δm = 1/T Σ_t (-1)^{l_t} (M_t - B_t) / B_t        l_t = 1 where less is better

    with B_t the single-task metric. It is divided by |B_t|, so that a correlation below 0 keeps the sign, and by the
    mean over seeds, so that the mean of the seeds' Δm is that of the means.

    Args:
        multi: `[T, S, ...]` metrics of the multi-task model, by task and seed.
        single: `[T, S, ...]` those of the baselines.
        greater_is_better: Direction of each task's metric.

    Returns:
        `[T, S, ...]`; NaN for a task whose baseline is 0 on the mean.
    """
    shape = (len(greater_is_better),) + (1,) * (multi.ndim - 1)
    base = np.abs(single.mean(axis=1, keepdims=True))
    sign = np.where(greater_is_better, 1.0, -1.0).reshape(shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(base > 0, sign * (multi - single) / base, np.nan)
