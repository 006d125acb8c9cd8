"""The sampling plan: which share each dataset gets, how often its rows are read, which are never read.

What is expected comes from the mixing strategy: over the steps of the training, the sum of its probabilities times the
rows of an epoch. What the sampler really yields is counted in the first windows (optimizer steps), and must agree to
within one row per dataset (one batch, where a batch has one task).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..data.dataset import MultiTaskDataset
from ..data.sampling import MIXING, check_mixing
from ..data.schedule import windows_per_epoch
from ..data.streaming import StreamingMixture
from ..loading import make_sampler, shares_over_training, total_steps
from ..training_args import MultiTaskTrainingArguments
from .preflight_limits import LIMITS
from .preflight_result import Finding

__all__ = ["SamplingPlan", "SourcePlan", "compare_strategies", "make_plan", "plan_findings"]

# The shares of `uniform`, and those of whatever it starts from.
_NOTHING_NEW = ("round_robin", "performance_gap")


@dataclass(frozen=True)
class SourcePlan:
    """What becomes of one source of rows.

    Args:
        source: Its name.
        tasks: The tasks that read it.
        size: Its rows.
        share: Its share of all rows that are drawn in the training.
        rows: Rows of it that are drawn.
        passes_per_epoch: Most passes over it in an epoch.
        unseen: Share of its rows that are never drawn.
        first_share: Its share in the first windows, as the sampler yields them; None if they were not counted.
        first_error: Rows that these are off the expected number.
    """

    source: str
    tasks: tuple[str, ...]
    size: int
    share: float
    rows: float
    passes_per_epoch: float
    unseen: float
    first_share: float | None = None
    first_error: float | None = None

    @property
    def passes(self) -> float:
        """How often each row is read in the training, on average."""
        return self.rows / self.size


@dataclass(frozen=True)
class SamplingPlan:
    """The sampling of a whole training.

    Args:
        strategy: Name of the mixing strategy.
        sources: Each source's plan.
        steps: Optimizer steps of the training.
        steps_per_epoch: Those of an epoch, which reads as many rows as there are.
        window_rows: Rows of an optimizer step, on all processes.
        windows_counted: Of how many steps the rows were counted.
        batch_rows: Rows of a batch of one task; 1 where batches are mixed.
    """

    strategy: str
    sources: tuple[SourcePlan, ...]
    steps: int
    steps_per_epoch: int
    window_rows: int
    windows_counted: int = 0
    batch_rows: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        sources = [asdict(one) | {"tasks": list(one.tasks), "passes": one.passes} for one in self.sources]
        return asdict(self) | {"sources": sources}


def make_plan(
    args: MultiTaskTrainingArguments, dataset: MultiTaskDataset | StreamingMixture, windows: int = 100
) -> SamplingPlan:
    """Return the sampling plan of some arguments.

    Args:
        args: The training arguments.
        dataset: The prepared training rows.
        windows: Of how many optimizer steps the rows are counted; with several processes none are, because each knows
            its own only.
    """
    sizes = dataset.sizes
    per_batch = args.per_device_train_batch_size
    window = per_batch * args.gradient_accumulation_steps * args.world_size
    per_epoch = windows_per_epoch(sum(sizes.values()), window, args.dataloader_drop_last)
    steps = total_steps(args, per_epoch)
    drawn, most = _expected(args.task_sampling, sizes, args.mixing_kwargs, steps, per_epoch, window)
    counted = min(windows, steps) if args.world_size == 1 else 0
    first, _ = _expected(args.task_sampling, sizes, args.mixing_kwargs, steps, per_epoch, window, counted)
    seen = _count_first(args, dataset, counted)
    sources = []
    for source in dataset.sources:
        name, rows = source.name, drawn[source.name]
        tasks = tuple(task.name for task in source.tasks)
        size = sizes[name]
        unseen = max(0.0, 1.0 - rows / size)
        in_first = (seen[name] / (counted * window), seen[name] - first[name]) if counted else (None, None)
        sources.append(
            SourcePlan(name, tasks, size, rows / (steps * window), rows, most[name] / size, unseen, *in_first)
        )
    batch_rows = per_batch if args.batch_composition == "single_task" else 1
    return SamplingPlan(args.task_sampling, tuple(sources), steps, per_epoch, window, counted, batch_rows)


def _expected(
    strategy: str,
    sizes: Mapping[str, int],
    kwargs: Mapping[str, Any],
    steps: int,
    per_epoch: int,
    window: int,
    until: int | None = None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the rows drawn of each source until a step (by default the last), and the most in a whole epoch."""
    total, most = dict.fromkeys(sizes, 0.0), dict.fromkeys(sizes, 0.0)
    probabilities, period = shares_over_training(strategy, sizes, kwargs, steps, window)
    period = per_epoch if period is None else period
    until = steps if until is None else until
    for epoch in range(math.ceil(steps / per_epoch)):
        rows, step, end = dict.fromkeys(sizes, 0.0), epoch * per_epoch, (epoch + 1) * per_epoch
        while step < end:
            number, offset = divmod(step, period)
            length = min(period - offset, end - step)
            for name, share in zip(sizes, probabilities(number), strict=True):
                rows[name] += share * length * window
                total[name] += share * max(min(until - step, length), 0) * window
            step += length
        most = {name: max(most[name], rows[name]) for name in sizes}
    return total, most


def _count_first(
    args: MultiTaskTrainingArguments, dataset: MultiTaskDataset | StreamingMixture, windows: int
) -> dict[str, int]:
    """Return how many rows of each source the sampler yields in its first windows."""
    counts = dict.fromkeys(dataset.sizes, 0)
    sampler = make_sampler(args, dataset, args.per_device_train_batch_size)
    names = list(counts)
    batches, epoch = windows * args.gradient_accumulation_steps, 0
    while batches > 0:
        sampler.set_epoch(epoch)
        for _, batch in zip(range(batches), sampler, strict=False):
            batches -= 1
            for row in batch:
                name = dataset.locate(row)[0] if isinstance(dataset, MultiTaskDataset) else names[row]
                counts[name] += 1
        epoch += 1
    return counts


def compare_strategies(
    args: MultiTaskTrainingArguments, sizes: Mapping[str, int], plan: SamplingPlan
) -> list[dict[str, Any]]:
    """Return a row for each mixing strategy that needs no arguments, and for the one in use: shares and passes.

    Args:
        args: The training arguments.
        sizes: Rows by source.
        plan: The plan in use.
    """
    rows = []
    for name in MIXING:
        in_use = name == args.task_sampling
        kwargs = args.mixing_kwargs if in_use else {}
        if name in _NOTHING_NEW and not in_use:
            continue
        try:
            check_mixing(name, kwargs)
            drawn, _ = _expected(name, sizes, kwargs, plan.steps, plan.steps_per_epoch, plan.window_rows)
        except ValueError:
            continue  # it wants to be told more
        total = sum(drawn.values())
        rows.append(
            {
                "strategy": name,
                "in_use": in_use,
                "shares": {source: value / total for source, value in drawn.items()},
                "passes": {source: value / sizes[source] for source, value in drawn.items()},
            }
        )
    return rows


def plan_findings(plan: SamplingPlan) -> list[Finding]:
    """Return what is to be said of a sampling plan."""
    findings: list[Finding] = []
    for one in plan.sources:
        findings += _of_source(one, plan)
    findings += _of_first_windows(plan)
    if all(finding.level == "ok" for finding in findings):
        passes = {one.source: one.passes for one in plan.sources}
        message = f"{plan.steps} steps read each row {min(passes.values()):.2g} to {max(passes.values()):.2g} times"
        findings.append(Finding("ok", "plan", "passes", "", message, passes))
    return findings


def _of_source(one: SourcePlan, plan: SamplingPlan) -> list[Finding]:
    name = ", ".join(one.tasks)
    if one.rows == 0:
        mend = "give it a share, or leave its tasks out"
        return [Finding("fail", "plan", "share", name, "is never drawn: its share is 0", {"share": 0.0}, mend)]
    values = {
        "passes_per_epoch": (
            one.passes_per_epoch,
            f"{one.size:,} rows are read {one.passes_per_epoch:.3g} times in an epoch of {plan.steps_per_epoch} steps",
            "a larger alpha for task_sampling: temperature, or unimax with max_passes",
        ),
        "passes": (
            one.passes,
            f"each row is read {one.passes:.3g} times in {plan.steps} steps",
            "fewer steps or epochs, or task_sampling: unimax with max_passes",
        ),
        "unseen": (
            one.unseen,
            f"{one.unseen:.0%} of {one.size:,} rows are never read in {plan.steps} steps",
            "more steps or epochs, or a larger share; or keep it, where the rows that are read are enough",
        ),
        "rows_per_step": (
            one.share * plan.window_rows,
            f"{one.share * plan.window_rows:.2g} of {plan.window_rows} rows of a step are its own",
            "larger batches (gradient_accumulation_steps), or a larger share",
        ),
    }
    findings: list[Finding] = []
    for check, (value, message, mend) in values.items():
        level = LIMITS[check].level(value)
        if level != "ok" and not (check == "passes" and findings):
            findings.append(Finding(level, "plan", check, name, message, {check: value, "share": one.share}, mend))
    return findings


def _of_first_windows(plan: SamplingPlan) -> Sequence[Finding]:
    errors = {one.source: abs(one.first_error) / plan.batch_rows for one in plan.sources if one.first_error is not None}
    if not errors:
        return []
    worst = max(errors, key=errors.__getitem__)
    level = LIMITS["share_error"].level(errors[worst] - 1e-6)
    unit = "batches" if plan.batch_rows > 1 else "rows"
    message = (
        f"in the first {plan.windows_counted} steps every dataset is within {errors[worst]:.2g} {unit} of its share"
        if level == "ok"
        else f"in the first {plan.windows_counted} steps {worst!r} is {errors[worst]:.2g} {unit} off its share"
    )
    mend = "the schedule does not keep its promise: please report this" if level != "ok" else ""
    return [Finding(level, "plan", "share_error", "" if level == "ok" else worst, message, errors, mend)]
