"""Conflict between tasks, as preflight measures it: on as many batches as there is time for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..models.base import MultiTaskModel
from .conflict import gradient_conflicts
from .conflict_result import GradientConflicts
from .preflight_result import Finding

__all__ = [
    "EFFORTS",
    "Effort",
    "choose_effort",
    "conflict_findings",
    "expected_seconds",
    "measure_conflicts",
    "not_measured",
]


class Effort(NamedTuple):
    """How much is measured.

    Args:
        batches: Batches of every dataset.
        batch_size: Rows of a batch.
        warmup_rows: Rows of every dataset on which heads are fitted.
        warmup_steps: Steps for which they are fitted.
    """

    batches: int
    batch_size: int
    warmup_rows: int
    warmup_steps: int


EFFORTS = (
    Effort(8, 32, 1024, 200),
    Effort(8, 16, 1024, 200),
    Effort(8, 16, 512, 200),
    Effort(6, 16, 512, 200),
    Effort(6, 8, 512, 200),
    Effort(5, 8, 256, 200),
    Effort(4, 8, 128, 100),
)
"""From the most to the least that says anything: the fewer rows, the wider the intervals, and they are shown."""

_ERROR = 0.05  # chance that the interval of any pair misses
_BACKWARD = 2.5  # what a backward pass costs, in forward passes


def choose_effort(
    seconds: float, forward: Mapping[str, float], tasks: Mapping[str, int], smallest: int
) -> Effort | None:
    """Return the most that fits into some seconds, or None if nothing does.

    Args:
        seconds: The time there is.
        forward: By source, seconds that a row takes forward.
        tasks: By source, how many tasks read it: each needs a backward pass.
        smallest: Rows of the smallest source; batches hold different rows, where there are enough.
    """
    for effort in EFFORTS:
        fits = effort.batches * effort.batch_size <= smallest or effort is EFFORTS[-1]
        if fits and expected_seconds(effort, forward, tasks) <= seconds:
            return effort
    return None


def expected_seconds(effort: Effort, forward: Mapping[str, float], tasks: Mapping[str, int]) -> float:
    """Return how long a measurement takes; the arguments are those of [`choose_effort`]."""
    rows = effort.batches * effort.batch_size
    return sum(f * (effort.warmup_rows + rows * (1 + _BACKWARD * tasks[source])) for source, f in forward.items())


def measure_conflicts(
    model: MultiTaskModel, rows: Any, tokenizer: Any, effort: Effort, max_length: int | None, seed: int
) -> GradientConflicts | str:
    """Return the conflicts between tasks, or why they cannot be measured.

    The intervals hold for all pairs together (Bonferroni): with many tasks some pair would look bad by chance.

    Args:
        model: The model.
        rows: Prepared training rows.
        tokenizer: The backbone's tokenizer.
        effort: How much to measure.
        max_length: Longest input in tokens.
        seed: Seed of the rows.
    """
    try:
        return gradient_conflicts(
            model,
            rows,
            tokenizer,
            effort.batches,
            batch_size=effort.batch_size,
            head_warmup_steps=effort.warmup_steps,
            head_warmup_rows=effort.warmup_rows,
            confidence=1 - _ERROR / math.comb(len(model.tasks), 2),
            max_length=max_length,
            seed=seed,
        )
    except ValueError as error:
        return str(error)


def not_measured(reason: str) -> Finding:
    """Return the finding that conflicts were not measured, and why."""
    return Finding("ok", "conflict", "conflict", "", f"not measured: {reason}")


def conflict_findings(conflicts: GradientConflicts) -> list[Finding]:
    """Return what is to be said of conflicts. A conflict is a hint and no proof, so none is a failure."""
    findings = []
    for pair in conflicts.pairs():
        message = f"cosine {pair.cosine:+.2f} ({pair.low:+.2f} to {pair.high:+.2f})"
        numbers = {"cosine": pair.cosine, "low": pair.low, "high": pair.high}
        level, mend = "ok", ""
        if pair.verdict == "negative" and pair.high < 0:
            level = "warn"
            message += ": they pull the shared parameters apart"
            mend = "see the advice on sharing and combination, and compare with single-task baselines"
        elif pair.low < conflicts.thresholds[0] and pair.high >= 0:
            message += ": not enough evidence for or against a conflict"
        findings.append(Finding(level, "conflict", "conflict", f"{pair.a}, {pair.b}", message, numbers, mend))
    return findings
