"""The first steps of the training, as they will be: whether every task's loss falls, and how long a step takes.

The trial is the real training, stopped early: the same trainer, rows, batches and learning rates, on a copy of the
model. The losses of single steps are noisy, so what is judged is the loss of some training rows, the same before and
after, without dropout: their differences give an interval (Student's t, over rows).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..guard import NonFiniteLossError
from ..trainer import MultiTaskTrainer
from .preflight_limits import LIMITS
from .preflight_losses import Probe
from .preflight_result import Finding

__all__ = ["LossChange", "Trial", "run_trial", "time_findings", "trial_findings"]

FEWEST_STEPS = 3
_FEWEST_TO_JUDGE = 10
_CONFIDENCE = 0.99  # there are several tasks


@dataclass(frozen=True)
class LossChange:
    """What some steps did to the loss of a task on the same training rows.

    Args:
        before: Mean loss per item before.
        after: The same afterwards.
        low: Lower end of the interval of the change, after less before.
        high: Upper end.
    """

    before: float
    after: float
    low: float
    high: float


@dataclass(frozen=True)
class Trial:
    """The first steps of a training.

    Args:
        steps: How many were made.
        seconds: What each took.
        losses: By task, its training loss in each step in which it had rows.
        shares: By task, its mean share of the rows.
        changes: By task, what the steps did to its loss.
        error: Why it stopped, if it did not end by itself.
    """

    steps: int
    seconds: tuple[float, ...]
    losses: Mapping[str, Sequence[float]]
    shares: Mapping[str, float]
    changes: Mapping[str, LossChange] = field(default_factory=dict)
    error: str | None = None

    @property
    def seconds_per_step(self) -> float | None:
        """The median; the first steps, which prepare things, are left out where there are enough others."""
        return median(self.seconds[2:] if len(self.seconds) > 4 else self.seconds) if self.seconds else None


class _Stopwatch(TrainerCallback):
    """Notes when steps end, and stops the training."""

    def __init__(self, steps: int, deadline: float) -> None:
        self.ends: list[float] = []
        self._steps, self._deadline = steps, deadline

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note when the first step begins."""
        self.ends = self.ends or [perf_counter()]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time, and stop after so many steps or seconds."""
        self.ends.append(perf_counter())
        made = len(self.ends) - 1
        if made >= self._steps or (made >= FEWEST_STEPS and self.ends[-1] > self._deadline):
            control.should_training_stop = True


def run_trial(
    trainer: MultiTaskTrainer,
    probe: Probe,
    before: Mapping[str, tuple[float, np.ndarray]],
    steps: int,
    deadline: float,
) -> Trial:
    """Make the first steps of a training; the trainer's model is changed.

    Args:
        trainer: The trainer of the whole training; it evaluates and saves nothing.
        probe: The training rows on which losses are compared.
        before: Their losses so far.
        steps: Steps to make, at most.
        deadline: When to stop, on the clock `time.perf_counter`; a few steps are made in any case.
    """
    args = trainer.args
    args.eval_strategy, args.save_strategy, args.eval_on_start = IntervalStrategy.NO, SaveStrategy.NO, False
    args.logging_strategy, args.logging_steps, args.load_best_model_at_end = IntervalStrategy.STEPS, 1, False
    watch = _Stopwatch(steps, deadline)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(watch)
    error = None
    try:
        trainer.train()
    except NonFiniteLossError as problem:
        error = str(problem)
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    changes = {} if error else _changes(before, probe.losses(model))
    lines = [line for line in trainer.state.log_history if "learning_rate" in line]
    losses = {t.name: [line[f"loss/{t.name}"] for line in lines if f"loss/{t.name}" in line] for t in trainer.tasks}
    shares = {
        t.name: float(np.mean([line.get(f"share/{t.name}", 0.0) for line in lines])) for t in trainer.tasks if lines
    }
    seconds = tuple(np.diff(watch.ends).tolist())
    return Trial(len(seconds), seconds, losses, shares, changes, error)


def _changes(
    before: Mapping[str, tuple[float, np.ndarray]], after: Mapping[str, tuple[float, np.ndarray]]
) -> dict[str, LossChange]:
    """Return the change of each task's loss; a row's sum of losses counts over the mean items of a row."""
    from scipy.stats import t

    changes = {}
    for task, (loss, rows) in before.items():
        later, later_rows = after[task]
        difference = later_rows - rows
        items_per_row = float(rows.mean() / loss) if loss else 1.0
        half = math.inf
        if len(rows) > 1:
            error = difference.std(ddof=1) / math.sqrt(len(rows)) / items_per_row
            half = float(t.ppf((1 + _CONFIDENCE) / 2, len(rows) - 1) * error)
        changes[task] = LossChange(loss, later, later - loss - half, later - loss + half)
    return changes


def trial_findings(trial: Trial) -> list[Finding]:
    """Return what is to be said of the first steps."""
    if trial.error is not None:
        mend = "a lower learning rate, more warmup_steps, or gradient clipping (max_grad_norm); look at the rows named"
        return [Finding("fail", "trial", "loss_rise", "", f"the training stops: {trial.error}", {}, mend)]
    findings = []
    for task, change in trial.changes.items():
        numbers = {"before": change.before, "after": change.after, "low": change.low, "high": change.high}
        ratio = change.after / change.before if change.before > 0 else 1.0
        message = f"loss {change.before:.3g} before and {change.after:.3g} after {trial.steps} steps"
        level, mend = "ok", ""
        if not math.isfinite(change.after):
            level, mend = "fail", "a lower learning rate, or more warmup_steps"
        elif change.low > 0 and trial.steps >= _FEWEST_TO_JUDGE:
            level = LIMITS["loss_rise"].level(ratio)
            message += f" (change {change.low:+.3g} to {change.high:+.3g}): it rises on rows that are trained on"
            mend = "a lower learning rate; a larger weight or share, where other tasks drown it"
        elif change.low <= 0 <= change.high:
            message += f" (change {change.low:+.3g} to {change.high:+.3g}): not enough evidence that it falls"
        findings.append(Finding(level, "trial", "loss_rise", task, message, numbers, mend))
    return findings


def time_findings(
    trial: Trial, steps: int, steps_per_epoch: int, evaluation: float, evaluations: int, after: float = 0.0
) -> tuple[list[Finding], dict[str, Any]]:
    """Return what is to be said of the time that a training takes, and the numbers.

    Args:
        trial: The first steps.
        steps: Steps of the training.
        steps_per_epoch: Those of an epoch.
        evaluation: Seconds that an evaluation takes, from the seconds that rows take forward.
        evaluations: How often it is evaluated.
        after: Seconds of what comes at the end, such as the test rows.
    """
    per_step = trial.seconds_per_step
    if per_step is None:
        return [], {}
    numbers = {
        "seconds_per_step": per_step,
        "seconds_per_epoch": per_step * steps_per_epoch,
        "evaluation_seconds": evaluation,
        "evaluations": evaluations,
        "training_seconds": per_step * steps + evaluation * evaluations + after,
    }
    message = (
        f"{per_step:.3g} s per step, {in_words(numbers['seconds_per_epoch'])} per epoch, about "
        f"{in_words(numbers['training_seconds'])} for {steps} steps and {evaluations} evaluation(s)"
    )
    return [Finding("ok", "time", "time", "", message, numbers)], numbers


def in_words(seconds: float) -> str:
    """Return a time for people.

    Example:
        >>> in_words(42.3), in_words(600), in_words(9000)
        ('42 s', '10 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
