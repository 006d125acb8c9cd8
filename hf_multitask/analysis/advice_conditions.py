"""When the rules of the advisor hold: functions from evidence to the numbers that a recommendation rests on.

Each returns None where its rule does not hold. What they are for stands in [`hf_multitask.analysis.advice_rules`].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .evidence import Evidence, PairEvidence

__all__ = [
    "all_fine",
    "balanced",
    "conditioned",
    "conflict",
    "experts",
    "granularity",
    "hard",
    "little_data",
    "no_conflict",
    "no_losses",
    "no_sizes",
    "noisy",
    "not_compared",
    "not_measured",
    "of_verdict",
    "one_task",
    "repeats",
    "same_scale",
    "scale_aware",
    "scales_apart",
    "several",
    "soft",
    "unbalanced",
    "undecided_conflict",
    "unknown_relation",
    "very_unbalanced",
]

_AGAINST, _RELATED = -0.1, 0.1  # cosines beyond count as conflict and as help, as in `gradient_conflicts`
_SIMILAR_SIZES, _UNBALANCED, _VERY_UNBALANCED = 10.0, 3.0, 100.0
_STRONG_BACKBONE = 100_000_000
_LITTLE_DATA = 1000
_SCALES_APART = 10.0
_MANY_PASSES = 16.0
_SCALE_AWARE = ("normalized", "uncertainty", "gls", "stch", "imtl_l", "famo", "gradnorm", "db_mtl")

Numbers = dict[str, Any]


def _shown(pairs: list[PairEvidence]) -> Numbers | None:
    """Return the cosines of some pairs with their intervals, or None without any."""
    return {f"cosine of {p.a} and {p.b}": [p.cosine, p.low, p.high] for p in pairs} or None


def _against(e: Evidence) -> list[PairEvidence]:
    return [pair for pair in e.pairs or () if pair.cosine < _AGAINST and pair.high < 0]


def _related(e: Evidence) -> list[PairEvidence]:
    return [pair for pair in e.pairs or () if pair.cosine > _RELATED and pair.low > 0]


def _open(e: Evidence) -> list[PairEvidence]:
    """Return the pairs that may be in conflict or not: the interval holds 0, and reaches below the threshold."""
    return [pair for pair in e.pairs or () if pair.low < _AGAINST and pair.high >= 0]


def _mostly_related(e: Evidence) -> bool:
    return 2 * len(_related(e)) > len(e.pairs or ()) > 0


# ---- sharing ----


def one_task(e: Evidence) -> Numbers | None:
    """Hold where there is one task."""
    return {"tasks": 1} if len(e.tasks) == 1 else None


def hard(e: Evidence) -> Numbers | None:
    """Hold where most pairs of tasks are related, none is in conflict, and sizes are similar."""
    ratio = e.size_ratio
    if ratio is None or ratio > _SIMILAR_SIZES or _against(e) or not _mostly_related(e):
        return None
    return {"largest over smallest dataset": ratio, **(_shown(_related(e)) or {})}


def soft(e: Evidence) -> Numbers | None:
    """Hold where of two to four tasks some are related a little, and there is room for an encoder for each."""
    some = [pair for pair in e.pairs or () if pair.low > 0]
    if not 2 <= len(e.tasks) <= 4 or not some or _against(e) or _mostly_related(e):
        return None
    if e.parameter_budget is not None and e.parameter_budget < len(e.tasks):
        return None
    return {"tasks, and so encoders": len(e.tasks), **(_shown(some) or {})}


def conditioned(e: Evidence) -> Numbers | None:
    """Hold where four to ten tasks share a strong backbone."""
    strong = e.backbone_parameters is not None and e.backbone_parameters >= _STRONG_BACKBONE
    if not 4 <= len(e.tasks) <= 10 or not strong:
        return None
    return {"tasks": len(e.tasks), "parameters of the backbone": e.backbone_parameters}


def experts(e: Evidence) -> Numbers | None:
    """Hold where there are many tasks and much data."""
    rows = sum(e.sizes.values())
    return {"tasks": len(e.tasks), "rows": rows} if len(e.tasks) > 10 and rows >= 100_000 else None


def little_data(e: Evidence) -> Numbers | None:
    """Hold where the task that matters most, or else the smallest, has little data beside plenty."""
    if len(e.tasks) < 2 or e.size_ratio is None:
        return None
    name = e.primary or min(e.sizes, key=lambda task: e.sizes[task])
    rows, most = e.sizes[name], max(e.sizes.values())
    return {f"rows of {name}": rows, "rows of the largest": most} if rows < _LITTLE_DATA and most >= 10 * rows else None


def granularity(e: Evidence) -> Numbers | None:
    """Hold where some tasks answer per text, others per token."""
    kinds = {kind: sum(1 for other in e.granularity.values() if other == kind) for kind in e.granularity.values()}
    return {f"tasks by {kind}": count for kind, count in kinds.items()} if len(kinds) > 1 else None


def unknown_relation(e: Evidence) -> Numbers | None:
    """Hold where whether tasks are related was not measured, or no interval leaves 0 out."""
    if len(e.tasks) < 2:
        return None
    if e.pairs is None:
        return {"pairs measured": 0}
    return _shown(list(e.pairs)) if all(pair.low <= 0 <= pair.high for pair in e.pairs) else None


# ---- sampling ----


def balanced(e: Evidence) -> Numbers | None:
    """Hold where datasets are of about the same size."""
    ratio = e.size_ratio
    few = ratio is not None and len(e.tasks) > 1 and ratio <= _UNBALANCED
    return {"largest over smallest dataset": ratio} if few else None


def unbalanced(e: Evidence) -> Numbers | None:
    """Hold where datasets differ in size."""
    ratio = e.size_ratio
    if ratio is None or not _UNBALANCED < ratio <= _VERY_UNBALANCED:
        return None
    sizes = list(e.sizes.values())
    shares = {
        f"share of the smallest at alpha {a:g}": min(sizes) ** a / sum(n**a for n in sizes) for a in (1, 0.5, 0.3)
    }
    return {"largest over smallest dataset": ratio, **shares}


def very_unbalanced(e: Evidence) -> Numbers | None:
    """Hold where datasets differ in size by more than a hundred."""
    ratio = e.size_ratio
    return {"largest over smallest dataset": ratio} if ratio is not None and ratio > _VERY_UNBALANCED else None


def repeats(e: Evidence) -> Numbers | None:
    """Hold where some rows are read very often."""
    return {f"passes over {task}": passes for task, passes in e.passes.items() if passes > _MANY_PASSES} or None


def no_sizes(e: Evidence) -> Numbers | None:
    """Hold where sizes are not known."""
    known = sum(1 for task in e.tasks if task in e.sizes)
    return {"tasks of known size": known, "tasks": len(e.tasks)} if known < len(e.tasks) > 1 else None


# ---- weighting ----


def same_scale(e: Evidence) -> Numbers | None:
    """Hold where losses are of one scale."""
    ratio = e.loss_ratio
    near = ratio is not None and len(e.tasks) > 1 and ratio <= _SCALES_APART
    return {"largest over smallest loss": ratio} if near else None


def scales_apart(e: Evidence) -> Numbers | None:
    """Hold where losses are of different scales, and the loss weighting does not look at them."""
    ratio = e.loss_ratio
    if ratio is None or ratio <= _SCALES_APART or e.weighting in _SCALE_AWARE:
        return None
    return {"largest over smallest loss": ratio} | {f"weight of {task}": weight for task, weight in e.weights.items()}


def scale_aware(e: Evidence) -> Numbers | None:
    """Hold where losses are of different scales, and the loss weighting evens them out."""
    ratio = e.loss_ratio
    apart = ratio is not None and ratio > _SCALES_APART and e.weighting in _SCALE_AWARE
    return {"largest over smallest loss": ratio} if apart else None


def no_losses(e: Evidence) -> Numbers | None:
    """Hold where losses are not known."""
    if len(e.tasks) < 2 or e.loss_ratio is not None:
        return None
    return {"tasks of known loss": sum(1 for task in e.tasks if e.losses.get(task, 0) > 0), "tasks": len(e.tasks)}


def several(e: Evidence) -> Numbers | None:
    """Hold where there are several tasks."""
    return {"tasks": len(e.tasks)} if len(e.tasks) > 1 else None


# ---- combination ----


def conflict(e: Evidence) -> Numbers | None:
    """Hold where some pairs are in conflict, with certainty."""
    return _shown(_against(e))


def no_conflict(e: Evidence) -> Numbers | None:
    """Hold where no pair can be in conflict, as far as was measured."""
    return _shown(list(e.pairs)) if e.pairs and not _against(e) and not _open(e) and not noisy(e) else None


def not_measured(e: Evidence) -> Numbers | None:
    """Hold where conflicts were not measured."""
    return {"pairs measured": 0} if len(e.tasks) > 1 and e.pairs is None else None


def undecided_conflict(e: Evidence) -> Numbers | None:
    """Hold where some pairs may be in conflict or not."""
    return _shown(_open(e))


def noisy(e: Evidence) -> Numbers | None:
    """Hold where batches of one task disagree with each other, so that nothing shows."""
    if not e.pairs or _against(e):
        return None
    return {f"agreement of batches of {task}": r for task, r in e.reproducibility.items() if r < _RELATED} or None


# ---- comparison ----


def of_verdict(*verdicts: str) -> Callable[[Evidence], Numbers | None]:
    """Return the condition that some tasks came out of the comparison with one of these verdicts."""

    def condition(e: Evidence) -> Numbers | None:
        found = {task: row for task, row in (e.comparison or {}).items() if row.verdict in verdicts}
        return {f"difference of {task}": [row.difference, row.low, row.high] for task, row in found.items()} or None

    return condition


def all_fine(e: Evidence) -> Numbers | None:
    """Hold where every task is at least as good as its baseline."""
    fine = e.comparison and all(row.verdict in ("better", "equal") for row in e.comparison.values())
    return of_verdict("better", "equal")(e) if fine else None


def not_compared(e: Evidence) -> Numbers | None:
    """Hold where there was no comparison."""
    return {"tasks compared": 0} if len(e.tasks) > 1 and e.comparison is None else None
