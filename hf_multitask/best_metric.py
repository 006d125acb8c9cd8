"""Which number picks the best checkpoint: the primary task's metric, or the mean over the tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import EarlyStoppingCallback
from transformers.utils import logging

from .data.dataset import MultiTaskDataset
from .generation import WRITTEN_METRICS
from .metrics import default_metric_names, greater_is_better, primary_direction, primary_metric
from .models.task import Task, closest
from .training_args import MultiTaskTrainingArguments

__all__ = ["average_metric", "set_best_metric"]

logger = logging.get_logger(__name__)

_AVERAGES = {"eval_average": False, "eval_held_out_average": True}  # whether it is over the tasks that are held out


def set_best_metric(
    args: MultiTaskTrainingArguments,
    tasks: Sequence[Task],
    compute_metrics: Mapping[str, Any],
    eval_dataset: Any,
    callbacks: Iterable[Any] | None = None,
    asked: str | None = None,
) -> None:
    """Set which metric picks the best checkpoint, and its direction; `args` is the trainer's own copy.

    It is the primary task's, else the one that was given, else `eval_average`. The direction is `greater_is_better`
    where that was given, else that of the metric (see [`hf_multitask.metrics.primary_direction`]). Where nothing asks
    for it (no best checkpoint, early stopping or learning rate that waits for a plateau) and evaluations lack the
    metric or its direction is not known, there is none, and training goes on without.

    Args:
        args: The trainer's own copy of its arguments, which is changed.
        tasks: The model's tasks.
        compute_metrics: The user's metric functions by task.
        eval_dataset: Datasets by name, prepared or not, or None.
        callbacks: The trainer's callbacks.
        asked: What asks for the metric, for messages; None to find out.

    Raises:
        ValueError: The primary task does not exist, is auxiliary or is not evaluated; `metric_for_best_model` is none
            that an evaluation has, or contradicts the primary task; or something asks for the metric, and evaluations
            lack it, or whether a larger value is better is not known.
    """
    given = args.metric_for_best_model if args._metric_was_given else None
    scheduled = args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
    if asked is None:
        asked = _who_asks(args, given, scheduled, callbacks)
    choice = _Choice(args, tasks, compute_metrics, eval_dataset)
    metric = choice.primary_key() if args.primary_task is not None else choice.given_key(given)
    if args.primary_task is not None and given is not None and given not in (metric, metric.removeprefix("eval_")):
        raise ValueError(
            f"metric_for_best_model={given!r} contradicts primary_task={args.primary_task!r}, "
            f"which means {metric!r}; give one of them"
        )
    up = args.greater_is_better if args._direction_was_given else None
    try:
        if (lacking := choice.why_missing(metric)) is not None:
            raise ValueError(f"evaluations have no {metric}: {lacking}")
        known = choice.direction(metric, up)
    except ValueError as error:
        if asked is None:
            args.metric_for_best_model = None
            return
        raise ValueError(f"{asked} needs {metric}: {error}") from None
    if up is not None and up != known:
        logger.warning(f"{metric} counts as better when {'larger' if up else 'smaller'}: greater_is_better={up}")
    args.metric_for_best_model = metric
    args.greater_is_better = known if up is None else up
    if scheduled:
        mode = "max" if args.greater_is_better else "min"
        given_kwargs = args.lr_scheduler_kwargs if isinstance(args.lr_scheduler_kwargs, dict) else {}
        args.lr_scheduler_kwargs = {"mode": mode, **given_kwargs}


def _who_asks(
    args: MultiTaskTrainingArguments, given: str | None, scheduled: bool, callbacks: Iterable[Any] | None
) -> str | None:
    """Return the setting that needs a metric to pick by, or None."""
    if args.load_best_model_at_end:
        return "load_best_model_at_end"
    if args.save_strategy == "best":
        return "save_strategy='best'"
    if scheduled:
        return f"lr_scheduler_type={str(getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type))!r}"
    for callback in callbacks or ():
        kind = callback if isinstance(callback, type) else type(callback)
        if issubclass(kind, EarlyStoppingCallback):
            return kind.__name__
    return None if given is None else f"metric_for_best_model={given!r}"


class _Choice:
    """What the evaluations of a training hold, and in which direction it is better."""

    def __init__(
        self,
        args: MultiTaskTrainingArguments,
        tasks: Sequence[Task],
        compute_metrics: Mapping[str, Any],
        eval_dataset: Any,
    ) -> None:
        self._args = args
        self._tasks = {task.name: task for task in tasks}
        self._custom = compute_metrics
        self._evaluated: set[str] | None = None  # names of datasets; None where there are no evaluations to look at
        if args.eval_strategy != "no":
            if isinstance(eval_dataset, MultiTaskDataset):
                self._evaluated = {task.dataset for source in eval_dataset.sources for task in source.tasks}
            elif isinstance(eval_dataset, Mapping):
                self._evaluated = set(eval_dataset)

    def primary_key(self) -> str:
        """Return the evaluation key of the primary task's primary metric."""
        name = self._args.primary_task
        if name not in self._tasks:
            raise ValueError(
                f"primary_task {name!r} is no task{closest(name, self._tasks)}; tasks are {', '.join(self._tasks)}"
            )
        task = self._tasks[name]
        if task.auxiliary:
            raise ValueError(f"primary_task {name!r} is auxiliary: it is trained only to help others; choose another")
        if self._evaluated is not None and task.dataset not in self._evaluated:
            raise ValueError(f"eval_dataset lacks the dataset {task.dataset!r} of the primary task {name!r}")
        custom = name in self._custom
        if custom and task.metric is None:
            raise ValueError(
                f"primary_task {name!r} has its own compute_metrics: name the one that decides, Task(metric=...)"
            )
        return f"eval_{name}_{primary_metric(task, custom)}"

    def given_key(self, given: str | None) -> str:
        """Return the evaluation key of the metric that was given, or of the mean over the tasks."""
        metric = "eval_average" if given is None else f"eval_{given.removeprefix('eval_')}"
        if metric not in _AVERAGES and self._split(metric) is None:
            known = [f"eval_{t.name}_{m}" for t in self._tasks.values() for m in (*default_metric_names(t), "loss")]
            raise ValueError(
                f"metric_for_best_model {given!r} is in no evaluation{closest(metric, [*known, *_AVERAGES])}"
            )
        return metric

    def _split(self, key: str) -> tuple[Task, str] | None:
        """Return the task and the metric that a key is of; None where no task has it."""
        for task in self._tasks.values():
            for metric in (*default_metric_names(task), "loss"):
                if key == f"eval_{task.name}_{metric}":
                    return task, metric
        own = [name for name in self._custom if key.startswith(f"eval_{name}_")]
        name = max(own, key=len, default=None)
        return None if name is None else (self._tasks[name], key.removeprefix(f"eval_{name}_"))

    def _counted(self, held_out: bool) -> list[Task]:
        tasks = [task for task in self._tasks.values() if not task.auxiliary and task.held_out == held_out]
        return [task for task in tasks if self._evaluated is None or task.dataset in self._evaluated]

    def why_missing(self, key: str) -> str | None:
        """Return why evaluations lack a key, or None if they have it."""
        if key in _AVERAGES:
            if self._args.prediction_loss_only:
                return (
                    "prediction_loss_only=True leaves metrics out; set primary_task or metric_for_best_model to a loss"
                )
            kind = "held out" if _AVERAGES[key] else "trained for its own sake"
            return None if self._counted(_AVERAGES[key]) else f"no task that is {kind} has rows in eval_dataset"
        task, metric = self._split(key) or (None, "")
        if task is None:
            return "no task has this metric"
        if self._evaluated is not None and task.dataset not in self._evaluated:
            return f"eval_dataset lacks the dataset {task.dataset!r} of task {task.name!r}"
        if metric != "loss" and self._args.prediction_loss_only:
            return f"prediction_loss_only=True leaves metrics out; eval_{task.name}_loss is there"
        written = task.type.generates and metric in WRITTEN_METRICS and task.name not in self._custom
        if written and not self._args.predict_with_generate:
            return f"{metric} needs predict_with_generate=True"
        return None

    def direction(self, key: str, given: bool | None) -> bool:
        """Return whether a larger value of a key is better, by what is known of it, else as it was `given`."""
        if key in _AVERAGES:
            return self._average_direction(key, given)
        task, metric = self._split(key) or (None, "")
        if task is not None and metric == task.metric and task.greater_is_better is not None:
            if given is not None and given != task.greater_is_better:
                raise ValueError(
                    f"greater_is_better={given} contradicts task {task.name!r}, which has "
                    f"greater_is_better={task.greater_is_better}; give one of them"
                )
            return task.greater_is_better
        known = greater_is_better(metric)
        if known is not None:
            return known
        if given is None:
            raise ValueError(
                f"whether a larger {metric!r} is better is not known; set greater_is_better in the training arguments"
            )
        return given

    def _average_direction(self, key: str, given: bool | None) -> bool:
        found: dict[str, bool] = {}
        for task in self._counted(_AVERAGES[key]):
            custom = task.name in self._custom
            metric = None if custom and task.metric is None else primary_metric(task, custom)
            try:
                found[f"{task.name}_{metric}" if metric else task.name] = primary_direction(task, metric)
            except ValueError:
                if given is None:
                    raise
        if len(set(found.values())) > 1:
            larger = [name for name, up in found.items() if up]
            smaller = [name for name, up in found.items() if not up]
            raise ValueError(
                f"{key} cannot pick the best checkpoint: {', '.join(larger)} are better when larger, "
                f"{', '.join(smaller)} when smaller; set primary_task"
            )
        return next(iter(found.values()), True if given is None else given)


def average_metric(
    results: Mapping[str, Mapping[str, float]],
    tasks: Sequence[Task],
    compute_metrics: Mapping[str, Any],
    held_out: bool = False,
) -> float | None:
    """Return the mean of the primary metrics of the evaluated tasks that are not auxiliary, or None without any.

    Args:
        results: By task, its metrics.
        tasks: The model's tasks.
        compute_metrics: The user's metric functions by task. Where such a task names no primary metric, it is the
            first that the function returns.
        held_out: Take the tasks that are held out, in place of those that are trained.

    Raises:
        ValueError: A task's own `compute_metrics` does not return its primary metric.
    """
    values = []
    for task in tasks:
        if task.auxiliary or task.held_out != held_out or task.name not in results:
            continue
        found, custom = results[task.name], task.name in compute_metrics
        metric = next(iter(found)) if custom and task.metric is None else primary_metric(task, custom)
        if metric not in found:
            raise ValueError(f"task {task.name!r}: compute_metrics returned no {metric!r}, only {', '.join(found)}")
        values.append(found[metric])
    return float(np.mean(values)) if values else None
