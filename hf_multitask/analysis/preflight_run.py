"""The sections of a preflight that need the model: each measures, notes its numbers and what is to be said of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor

from ..data.dataset import MultiTaskDataset
from ..recipe import RecipeParts
from ..trainer import MultiTaskTrainer
from .preflight_conflict import (
    EFFORTS,
    choose_effort,
    conflict_findings,
    expected_seconds,
    measure_conflicts,
    not_measured,
)
from .preflight_losses import Probe, loss_findings, scaled_losses, start_losses
from .preflight_memory import activation_bytes, available_memory, estimate_memory, memory_findings
from .preflight_plan import SamplingPlan, compare_strategies, make_plan, plan_findings
from .preflight_result import Finding
from .preflight_trial import run_trial, time_findings, trial_findings

__all__ = ["PreflightRun", "measure", "name_of"]

_TRIAL_STEPS = 100
_CONFLICT_TIME = 0.5  # of the time that is left when it begins
_PROBE_TIME = 0.08  # as above; it is measured twice
_FEW_ROWS = 8  # of each source
_MOST_STEPS_LOOKED_AT = 1000


class PreflightRun:
    """What was found so far, and how much time is left.

    Args:
        seconds: Time for everything.
        progress: Called with the name of each section when it begins.
    """

    def __init__(self, seconds: float, progress: Callable[[str], None]) -> None:
        self.findings: list[Finding] = []
        self.sections: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.deadline = perf_counter() + seconds
        self._progress = progress

    @property
    def left(self) -> float:
        """Seconds that are left; negative if none are."""
        return self.deadline - perf_counter()

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Note how long a section takes."""
        self._progress(name)
        begin = perf_counter()
        yield
        self.seconds[name] = perf_counter() - begin

    def skip(self, section: str, reason: str) -> None:
        """Note that a section was left out, and why."""
        self.findings.append(Finding("ok", section, section, "", f"not measured: {reason}"))


def name_of(method: Any) -> str:
    """Return the name of a method that is given by name or as an object."""
    return method if isinstance(method, str) else type(method).__name__


def measure(
    run: PreflightRun,
    parts: RecipeParts,
    trainer: MultiTaskTrainer,
    rows: MultiTaskDataset,
    variances: Mapping[str, float],
    evaluated: Mapping[str, Mapping[str, int]],
    probe_rows: int,
    seed: int,
) -> None:
    """Measure everything that needs the model, and train it a little.

    Args:
        run: Where findings and numbers go.
        parts: The recipe's parts; the model is changed at the end.
        trainer: The trainer of them.
        rows: Prepared training rows, of streams the first.
        variances: By task, the variance of a regression's labels.
        evaluated: By split, the rows of each dataset that is evaluated.
        probe_rows: Training rows of each source on which losses are measured.
        seed: Seed of the rows that are drawn.
    """
    model, args = parts.model, trainer.args
    with run.section("losses"):
        probe = _make_probe(run, trainer, rows, probe_rows, seed)
        measured = probe.losses(model)
        vocabulary = int(cast(Tensor, model.get_input_embeddings().weight).shape[0])
        losses = start_losses(model.tasks, measured, variances, vocabulary)
        run.findings += loss_findings(losses, name_of(args.loss_weighting))
        run.sections["losses"] = {"tasks": scaled_losses(losses), "rows": probe.count}
    with run.section("plan"):
        plan = make_plan(args, trainer.train_dataset)
        run.findings += plan_findings(plan)
        strategies = compare_strategies(args, trainer.train_dataset.sizes, plan)
        run.sections["plan"] = plan.to_dict() | {"strategies": strategies}
    with run.section("memory"):
        lacking = _memory(run, trainer, rows, plan)
    with run.section("conflict"):
        _conflict(run, parts, rows, probe, lacking, seed)
    with run.section("trial"):
        if lacking <= 0:
            _trial(run, parts, trainer, probe, measured, plan, evaluated)
        else:
            run.skip("trial", "there is not enough memory for a step")


def _make_probe(run: PreflightRun, trainer: MultiTaskTrainer, rows: MultiTaskDataset, count: int, seed: int) -> Probe:
    """Return a probe of some rows of each source; of fewer, where they would take long."""
    batch = min(trainer.args.per_device_train_batch_size, count)
    few = Probe(rows, trainer.data_collator, min(_FEW_ROWS, count), batch, seed)
    model: Any = trainer.model
    few.losses(model)  # the first passes are slower than all others
    few.losses(model)
    affordable = int(_PROBE_TIME * run.left / sum(few.seconds_per_row.values()))
    return Probe(rows, trainer.data_collator, min(max(affordable, _FEW_ROWS), count), batch, seed)


def _memory(run: PreflightRun, trainer: MultiTaskTrainer, rows: MultiTaskDataset, plan: SamplingPlan) -> float:
    """Estimate the memory of a step; return by how many bytes the device falls short (0 or less if it does not)."""
    model: Any = trainer.model
    args, balancer = trainer.args, trainer.balancer
    logged = min(args.conflict_logging_steps, _MOST_STEPS_LOOKED_AT)
    by_task = any(balancer.needs_task_gradients(step) for step in range(max(logged, 1)))
    if args.activation_checkpointing:
        kwargs: dict[str, Any] = dict(args.activation_checkpointing_kwargs or {})  # type: ignore[arg-type]
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs or None)
    per_batch = args.per_device_train_batch_size
    single = args.batch_composition == "single_task"
    shares = {one.source: per_batch if single else math.ceil(one.share * per_batch) for one in plan.sources}
    activations = activation_bytes(
        model, rows, trainer.data_collator, shares, trainer.compute_loss_context_manager, by_task or single
    )
    embeddings = trainer._tables(model) if by_task else []
    estimate = estimate_memory(
        model,
        str(getattr(args.optim, "value", args.optim)),
        activations,
        by_task and not balancer.sketches,
        bool(embeddings),
    )
    device = args.device
    estimate = replace(estimate, available=available_memory(device, held=estimate.parameters), device=str(device))
    run.findings += memory_findings(estimate)
    run.sections["memory"] = estimate.to_dict()
    return estimate.total - (math.inf if estimate.available is None else estimate.available)


def _conflict(
    run: PreflightRun, parts: RecipeParts, rows: MultiTaskDataset, probe: Probe, lacking: float, seed: int
) -> None:
    model = parts.model
    shared = sum(parameter.numel() for parameter in model.shared_parameters())
    tasks = {source.name: len(source.tasks) for source in rows.sources}
    effort = choose_effort(_CONFLICT_TIME * run.left, probe.seconds_per_row, tasks, min(rows.sizes.values()))
    if len(model.tasks) < 2 or not shared:
        reason = "there is one task" if len(model.tasks) < 2 else "no shared parameter is trained"
    elif lacking + 4 * shared * len(model.tasks) > 0:
        reason = "there is not enough memory for the gradients of all tasks"
    elif effort is None:
        least = expected_seconds(EFFORTS[-1], probe.seconds_per_row, tasks)
        reason = f"it takes at least {least:.0f} s, too much of what is left; give more --budget-seconds"
    else:
        found = measure_conflicts(model, rows, parts.tokenizer, effort, parts.args.max_length, seed)
        if not isinstance(found, str):
            run.findings += conflict_findings(found)
            run.sections["conflict"] = {"result": found.to_dict()}
            return
        reason = found
    run.findings.append(not_measured(reason))


def _trial(
    run: PreflightRun,
    parts: RecipeParts,
    trainer: MultiTaskTrainer,
    probe: Probe,
    before: Mapping[str, Any],
    plan: SamplingPlan,
    evaluated: Mapping[str, Mapping[str, int]],
) -> None:
    evaluations = _evaluations(parts, plan) if evaluated.get("validation") else 0
    seconds = {
        split: sum(count * probe.seconds_per_row.get(source, 0.0) for source, count in counts.items())
        for split, counts in evaluated.items()
    }
    device = trainer.args.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    trial = run_trial(trainer, probe, before, min(_TRIAL_STEPS, plan.steps), run.deadline - probe.seconds)
    run.findings += trial_findings(trial)
    if device.type == "cuda":
        run.sections["memory"]["measured_peak"] = torch.cuda.max_memory_allocated(device)
    changes = {task: asdict(change) for task, change in trial.changes.items()}
    run.sections["trial"] = asdict(trial) | {"changes": changes, "seconds_per_step": trial.seconds_per_step}
    found, numbers = time_findings(
        trial, plan.steps, plan.steps_per_epoch, seconds.get("validation", 0.0), evaluations, seconds.get("test", 0.0)
    )
    run.findings += found
    run.sections["time"] = numbers


def _evaluations(parts: RecipeParts, plan: SamplingPlan) -> int:
    """Return how often a training is evaluated, its end included."""
    args = parts.args
    strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    if strategy == "epoch":
        return math.ceil(plan.steps / plan.steps_per_epoch)
    if strategy == "steps":
        every = args.eval_steps or args.logging_steps
        every = math.ceil(every * plan.steps) if every < 1 else int(every)
        return math.ceil(plan.steps / every)
    return 1
