"""Sampling by the gap to single-task scores: datasets whose tasks lag behind are read more often.

Gottumukkala et al. (2020, "Dynamic sampling strategies for multi-task reading comprehension") draw rows of a dataset in
proportion to how far the multi-task model's validation score is below the score that a model of the task alone
reached. The gap of a task with single-task score s and current score m is

    max(0, s - m) / |s|        (m - s for metrics that are better when smaller; not divided with `relative: false`)

that of a dataset the mean over its tasks. A dataset no task of which has a score (auxiliary tasks have no baseline)
gets the least share, `floor`. Here gaps are parts of the single-task score, because metrics of different tasks have
different scales, and no dataset falls below its least share, so that none is forgotten.

Shares change `delay` optimizer steps after each evaluation that the training loop makes, at any place of an epoch. The
step is counted, not the batch that happens to be loaded next, so the rows are the same for any number of workers,
processes and accumulation steps; and the changes are saved with every checkpoint, so that a run that goes on reads what
it would have read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import Trainer

from .data.dataset import MultiTaskDataset
from .data.sampling import mixing_probabilities
from .data.schedule import ShareChanges
from .data.sources import Source
from .metrics import primary_direction, primary_metric
from .models.task import Task, closest
from .training_args import MultiTaskTrainingArguments

__all__ = ["GapSampling", "MultiTaskGapSampling", "single_task_scores"]

_NAME = "performance_gap"


def single_task_scores(
    kwargs: Mapping[str, Any], tasks: Sequence[Task], custom: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """Return the single-task scores by task that `task_sampling_kwargs` give, or point to.

    Args:
        kwargs: `scores`, by task or dataset, or `comparison`, the path of a `comparison.json`.
        tasks: The model's tasks.
        custom: The user's metric functions by task.

    Raises:
        FileNotFoundError: There is no such comparison.
        ValueError: A name is unknown, a score is missing or no number, or the comparison is of another metric.
    """
    where, given = "scores", kwargs.get("scores")
    if kwargs.get("comparison") is not None:
        where, given = "comparison", _read_comparison(kwargs["comparison"], tasks, custom or {})
    if not isinstance(given, Mapping):
        raise ValueError(f"task_sampling_kwargs: scores must map tasks to numbers, got {given!r}")
    tasks = [task for task in tasks if not task.held_out]  # what is never trained is never drawn
    by_task = {task.name: task for task in tasks}
    scores: dict[str, float] = {}
    for name, score in given.items():
        readers = [name] if name in by_task else [t.name for t in tasks if t.dataset == name and not t.auxiliary]
        if not readers:
            known = list(dict.fromkeys([*by_task, *(task.dataset for task in tasks)]))
            raise ValueError(
                f"task_sampling_kwargs: {where} names no task {name!r}{closest(name, known)}; "
                f"tasks are {', '.join(by_task)}"
            )
        if len(readers) > 1:
            raise ValueError(
                f"task_sampling_kwargs: dataset {name!r} in {where} is read by {', '.join(readers)}; give a score for "
                "each of these tasks"
            )
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
            raise ValueError(f"task_sampling_kwargs: score of {name!r} must be a number, got {score!r}")
        if score == 0 and kwargs.get("relative", True):
            raise ValueError(
                f"task_sampling_kwargs: the score of {name!r} is 0, of which no gap is a part; set relative: false"
            )
        scores[readers[0]] = float(score)
    missing = [task.name for task in tasks if not task.auxiliary and task.name not in scores]
    if missing:
        raise ValueError(f"task_sampling_kwargs: {where} lacks the single-task score of {', '.join(missing)}")
    return scores


def _read_comparison(path: Any, tasks: Sequence[Task], custom: Mapping[str, Any]) -> dict[str, float]:
    file = Path(str(path))
    if not file.is_file():
        raise FileNotFoundError(f"task_sampling_kwargs: comparison {str(path)!r} does not exist")
    try:
        tasks_there = json.loads(file.read_text(encoding="utf-8"))["tasks"].items()
        found = {name: (row["metric"], row["single"]) for name, row in tasks_there}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"task_sampling_kwargs: {str(path)!r} is no comparison.json; hf-multitask compare writes one"
        ) from None
    for task in tasks:
        metric = primary_metric(task, task.name in custom)
        if task.name in found and found[task.name][0] != metric:
            raise ValueError(
                f"task_sampling_kwargs: comparison {str(path)!r} has {found[task.name][0]!r} of task {task.name!r}, "
                f"whose metric now is {metric!r}"
            )
    names = {task.name for task in tasks}
    return {name: score for name, (_, score) in found.items() if name in names}


class GapSampling:
    """The shares that follow from evaluations.

    Args:
        args: The training arguments.
        tasks: The model's tasks.
        sources: What they read.
        sizes: Rows by source.
        custom: The user's metric functions by task.
        evaluated: Names of the tasks that have validation rows.

    Raises:
        FileNotFoundError: The comparison does not exist.
        ValueError: There are no evaluations, or none of a task with a score, or a score does not fit.
    """

    def __init__(
        self,
        args: MultiTaskTrainingArguments,
        tasks: Sequence[Task],
        sources: Sequence[Source],
        sizes: Mapping[str, int],
        custom: Mapping[str, Any],
        evaluated: Sequence[str],
    ) -> None:
        self._kwargs = args.mixing_kwargs
        self._sizes = dict(sizes)
        mixing_probabilities(_NAME, self._sizes, self._kwargs)
        if args.eval_strategy == "no" or args.prediction_loss_only:
            setting = "eval_strategy='no'" if args.eval_strategy == "no" else "prediction_loss_only"
            raise ValueError(
                f"task_sampling {_NAME!r} follows the metrics of evaluations, which {setting} leaves out; set "
                "eval_strategy='steps' and eval_steps"
            )
        self.scores = single_task_scores(self._kwargs, tasks, custom)
        self._metrics: dict[str, str] = {}
        self._larger: dict[str, bool] = {}
        for task in tasks:
            if task.name not in self.scores:
                continue
            if task.name not in evaluated:
                raise ValueError(f"task_sampling {_NAME!r}: eval_dataset has no rows of task {task.name!r}")
            if task.name in custom and task.metric is None:
                raise ValueError(
                    f"task_sampling {_NAME!r}: task {task.name!r} has its own compute_metrics; name the one that its "
                    "score is of, Task(metric=...)"
                )
            self._metrics[task.name] = primary_metric(task, task.name in custom)
            self._larger[task.name] = primary_direction(task, self._metrics[task.name])
        self._readers = {s.name: [t.name for t in s.tasks if t.name in self.scores] for s in sources}
        # What the loader draws ahead: one batch, and what workers are given to do.
        batches = 1 + args.dataloader_num_workers * (args.dataloader_prefetch_factor or 2)
        least = -(-batches // args.gradient_accumulation_steps)
        self.delay: int = self._kwargs.get("delay", 10)
        if self.delay < least:
            raise ValueError(
                f"task_sampling_kwargs: delay={self.delay} is too short for {args.dataloader_num_workers} workers, "
                f"which draw rows up to {least} optimizer steps ahead; set it to at least {least}"
            )

    def gaps(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return by task how far it is behind its single-task score.

        Args:
            metrics: What `evaluate` returned.

        Raises:
            ValueError: A metric is missing or NaN.
        """
        gaps = {}
        for task, score in self.scores.items():
            key = f"eval_{task}_{self._metrics[task]}"
            value = metrics.get(key, math.nan)
            if not math.isfinite(value):
                raise ValueError(f"task_sampling {_NAME!r}: {key} is {metrics.get(key, 'missing')} in an evaluation")
            behind = score - value if self._larger[task] else value - score
            gaps[task] = max(behind, 0.0) / (abs(score) if self._kwargs.get("relative", True) else 1.0)
        return gaps

    def probabilities(self, metrics: Mapping[str, float]) -> list[float]:
        """Return the probabilities of the sources that follow from an evaluation."""
        gaps = self.gaps(metrics)
        by_source = [
            math.fsum(gaps[task] for task in self._readers[name]) / len(self._readers[name])
            if self._readers[name]
            else 0.0
            for name in self._sizes
        ]
        return mixing_probabilities(_NAME, self._sizes, self._kwargs, gaps=by_source)


class MultiTaskGapSampling(Trainer):
    """The part of [`MultiTaskTrainer`] that changes shares after evaluations."""

    args: MultiTaskTrainingArguments
    train_dataset: Any
    tasks: list[Task]
    share_changes: ShareChanges
    gap_sampling: GapSampling | None
    _sources: list[Source]
    _metrics: dict[str, Any]

    def _begin_sampling(
        self, args: MultiTaskTrainingArguments, train_dataset: Any, eval_dataset: Any, state: Any = None
    ) -> None:
        """Check what the sampling needs, and begin without changes or with those of a checkpoint."""
        self.gap_sampling = None
        if args.task_sampling == _NAME and train_dataset is not None:
            sources = eval_dataset.sources if isinstance(eval_dataset, MultiTaskDataset) else []
            evaluated = [task.name for source in sources for task in source.tasks]
            self.gap_sampling = GapSampling(
                args, self.tasks, self._sources, train_dataset.sizes, self._metrics, evaluated
            )
        self.share_changes.restart(dict(state or []))

    def _sampling_state(self) -> list[tuple[int, list[float]]]:
        """Return the changes so far, as plain JSON types."""
        return list(self.share_changes.by_step.items())

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as part of training; shares then follow the metrics."""
        metrics: dict[str, float] = super()._evaluate(*args, **kwargs)
        # A run that goes on from a checkpoint may evaluate at its start once more; the run never stopped did not.
        repeated = kwargs.get("skip_scheduler", False) and self.state.global_step > 0
        if self.tasks and self.gap_sampling is not None and not repeated:
            shares = [self.gap_sampling.probabilities(metrics)]
            if self.args.world_size > 1:
                broadcast_object_list(shares)  # machines may round differently
            self.share_changes.add(self.state.global_step + self.gap_sampling.delay, shares[0])
            names = self.train_dataset.sizes
            self.log({f"probability/{name}": p for name, p in zip(names, shares[0], strict=True)})
        return metrics
