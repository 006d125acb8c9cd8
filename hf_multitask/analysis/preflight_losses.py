"""Losses before the first step: whether they are those of guessing, and whether they are of one scale.

A fresh head guesses. Guessing costs ln C with C labels, ln 2 per label of several, the variance of the labels in a
regression, and ln V over a vocabulary of V tokens. A head that starts far above that answers something wrong with
confidence: most often a regression whose labels lie far from 0.

Losses of tasks add up, each times its weight, so a task whose loss is a hundred times as large makes all but 1 % of the
gradient. Tasks that only help have a small weight (0.1 by default) on purpose: it is no fault if they count little. The
proposed weights bring all losses to one scale: w_t = d_t · G / L_t, with d_t the weight that a task has by default and
G the geometric mean of what the losses of the other tasks, those that do not only help, count now. So the scale of the
gradient, and with it the learning rate, stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np
import torch

from ..data.dataset import MultiTaskDataset
from ..models.base import MultiTaskModel
from ..models.task import Task
from .preflight_limits import LIMITS
from .preflight_result import Finding
from .rows import move_to

__all__ = ["SCALE_AWARE", "Probe", "StartLoss", "chance_loss", "loss_findings", "scaled_losses", "start_losses"]

SCALE_AWARE = ("normalized", "uncertainty", "gls", "stch", "imtl_l", "famo", "gradnorm", "db_mtl")
"""Loss weightings that even out the scales of losses."""


class Probe:
    """Some training rows of every source, on which losses are measured again and again, without dropout.

    Args:
        rows: Prepared training rows.
        collate: The collator.
        count: Rows of each source.
        batch_size: Rows of a pass.
        seed: Seed of the rows.
    """

    def __init__(self, rows: MultiTaskDataset, collate: Any, count: int, batch_size: int, seed: int = 0) -> None:
        self.count = count
        self.batches: list[Any] = []
        self.seconds_per_row: dict[str, float] = {}
        self._sources: list[tuple[str, int]] = []  # of each batch, and its rows
        for part in rows.split():
            chosen = np.random.default_rng(seed).permutation(len(part))[:count]
            for start in range(0, len(chosen), batch_size):
                index = chosen[start : start + batch_size]
                self.batches.append(collate([part[int(i)] for i in index]))
                self._sources.append((part.sources[0].name, len(index)))

    @property
    def seconds(self) -> float:
        """Seconds that the last measurement took."""
        return sum(self.seconds_per_row[source] * rows for source, rows in self._sources if self.seconds_per_row)

    def losses(self, model: MultiTaskModel) -> dict[str, tuple[float, np.ndarray]]:
        """Return, by task, the mean loss per item, and the summed loss of each row `[N]`.

        The seconds that a row of each source takes, forward only, are in `seconds_per_row` afterwards.
        """
        sums: dict[str, list[float]] = {}
        items: dict[str, int] = {}
        taken: dict[str, list[float]] = {}
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                for (source, rows), batch in zip(self._sources, self.batches, strict=True):
                    begin = perf_counter()
                    output = model(**move_to(model.device, batch), return_dict=True)
                    for name, losses in output.row_losses.items():
                        sums.setdefault(name, []).extend(losses.double().tolist())
                        items[name] = items.get(name, 0) + int(batch["num_items"][name])
                    taken.setdefault(source, []).append((perf_counter() - begin) / rows)
        finally:
            model.train(training)
        self.seconds_per_row = {source: float(np.median(values)) for source, values in taken.items()}
        return {name: (sum(values) / max(items[name], 1), np.array(values)) for name, values in sums.items()}


@dataclass(frozen=True)
class StartLoss:
    """The loss of one task before training.

    Args:
        task: The task.
        loss: Mean loss per item.
        error: Its standard error, over rows.
        chance: The loss of guessing; None where that is not known.
    """

    task: Task
    loss: float
    error: float
    chance: float | None

    @property
    def default_weight(self) -> float:
        """The weight that the task has if none is given."""
        return replace(self.task, weight=None).weight  # type: ignore[arg-type]

    @property
    def helps(self) -> bool:
        """Whether the task is trained only to help others, and so counts little on purpose."""
        return self.default_weight < 1

    @property
    def weighted(self) -> float:
        """The loss as it counts: times the weight."""
        return self.loss * self.task.weight


def chance_loss(task: Task, variance: float | None, vocabulary: int) -> float | None:
    """Return the loss of guessing, or None where it is not known.

    Args:
        task: The task.
        variance: Of a regression's labels (mean over values), if they are known.
        vocabulary: Number of tokens.

    Example:
        >>> round(chance_loss(Task("tone", "single_label_classification", ("bad", "good")), None, 0), 3)
        0.693
    """
    kind = str(task.type)
    if kind in ("single_label_classification", "token_classification"):
        return math.log(task.num_outputs)
    if kind == "multi_label_classification":
        return math.log(2)
    if kind == "regression":
        return variance
    if kind in ("masked_lm", "causal_lm", "seq2seq_lm") and vocabulary > 1:
        return math.log(vocabulary)
    return None


def start_losses(
    tasks: Iterable[Task],
    measured: Mapping[str, tuple[float, np.ndarray]],
    variances: Mapping[str, float],
    vocabulary: int,
) -> list[StartLoss]:
    """Return the losses of the tasks that were measured."""
    found = []
    for task in tasks:
        if task.name in measured:
            loss, rows = measured[task.name]
            # Rows of several items: the error of the mean row, in units of the mean item.
            relative = float(rows.std(ddof=1) / rows.mean() / math.sqrt(len(rows))) if len(rows) > 1 and loss else 0.0
            found.append(
                StartLoss(task, loss, abs(relative * loss), chance_loss(task, variances.get(task.name), vocabulary))
            )
    return found


def scaled_losses(losses: Sequence[StartLoss]) -> list[dict[str, Any]]:
    """Return a row for each task: its loss, that of guessing, and the weight that would even out scales."""
    usable = [one for one in losses if math.isfinite(one.loss) and one.loss > 0]
    counted = [one for one in usable if one.task.weight > 0 and not one.helps]
    mean = math.exp(sum(math.log(one.weighted) for one in counted) / len(counted)) if counted else None
    rows = []
    for one in losses:
        proposed = float(f"{one.default_weight * mean / one.loss:.2g}") if one in usable and mean is not None else None
        rows.append(
            {
                "task": one.task.name,
                "loss": one.loss if math.isfinite(one.loss) else None,
                "error": one.error if math.isfinite(one.error) else None,
                "chance": one.chance,
                "weight": one.task.weight,
                "weighted": one.weighted if one in usable else None,
                "proposed_weight": proposed,
            }
        )
    return rows


def loss_findings(losses: Sequence[StartLoss], weighting: str) -> list[Finding]:
    """Return what is to be said of losses at the start.

    Args:
        losses: Of every task.
        weighting: Name of the loss weighting; some even out scales.
    """
    findings = []
    for one in losses:
        name = one.task.name
        if not math.isfinite(one.loss):
            message = f"the loss before the first step is {one.loss}"
            mend = "look at the labels, and load the model in float32"
            findings.append(Finding("fail", "losses", "start_over_chance", name, message, {}, mend))
        elif one.chance:
            ratio = one.loss / one.chance
            level = LIMITS["start_over_chance"].level(ratio)
            numbers = {"loss": one.loss, "chance": one.chance, "ratio": ratio}
            message = f"starts at {one.loss:.3g}; guessing costs {one.chance:.3g}"
            is_regression = str(one.task.type) == "regression"
            mend = "standardize the labels (mean 0)" if is_regression else "see whether the head starts from nothing"
            findings.append(
                Finding(level, "losses", "start_over_chance", name, message, numbers, mend if level != "ok" else "")
            )
    counted = [one for one in losses if math.isfinite(one.loss) and one.weighted > 0]
    if len(counted) > 1 and not all(one.helps for one in counted):
        findings.append(_scales(counted, weighting))
    return findings


def _scales(losses: Sequence[StartLoss], weighting: str) -> Finding:
    """Return the finding about the ratio of the largest loss to the smallest."""
    large = max(losses, key=lambda one: one.weighted)
    small = min((one for one in losses if not one.helps), key=lambda one: one.weighted)
    ratio = large.weighted / small.weighted
    level = LIMITS["loss_ratio"].level(ratio)
    message = (
        f"the loss of {large.task.name!r} counts {ratio:.3g} times that of {small.task.name!r} "
        f"({large.weighted:.3g} and {small.weighted:.3g})"
    )
    if large is small:
        message = f"no loss counts more than that of {small.task.name!r} ({small.weighted:.3g})"
    numbers = {"ratio": ratio, large.task.name: large.weighted, small.task.name: small.weighted}
    if level == "ok":
        return Finding("ok", "losses", "loss_ratio", "", message, numbers)
    if weighting in SCALE_AWARE:
        message += f"; loss_weighting {weighting!r} evens that out"
        return Finding("ok", "losses", "loss_ratio", large.task.name, message, numbers)
    weights = ", ".join(f"{row['task']}: {row['proposed_weight']:g}" for row in scaled_losses(losses))
    mend = f"weights of {weights} bring all to one scale; or loss_weighting: normalized; or standardize the labels"
    return Finding(level, "losses", "loss_ratio", large.task.name, message, numbers, mend)
