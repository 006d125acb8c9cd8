"""Which number picks the best checkpoint: the primary task's metric, or the mean over the tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .metrics import default_metric_names, greater_is_better, primary_metric
from .models.task import Task, closest
from .training_args import MultiTaskTrainingArguments

__all__ = ["average_metric", "settle_best_metric"]


def settle_best_metric(
    args: MultiTaskTrainingArguments,
    tasks: Sequence[Task],
    compute_metrics: Mapping[str, Any],
    eval_dataset: Any,
) -> None:
    """Set which metric picks the best checkpoint, and its direction; `args` is the trainer's own copy.

    It is the primary task's, else the one that was given, else `eval_average`. A learning rate that waits for a plateau
    waits for one of this metric.

    Raises:
        ValueError: The primary task does not exist, is auxiliary, is not evaluated, or its metric has no known name;
            `metric_for_best_model` is none that an evaluation has, or contradicts the primary task; or the average
            should decide and mixes metrics of which more is better with others of which less is.
    """
    given = args.metric_for_best_model if args._metric_was_given else None
    if args.primary_task is not None:
        metric = _primary_key(args, tasks, compute_metrics, eval_dataset)
        if given is not None and given not in (metric, metric.removeprefix("eval_")):
            raise ValueError(
                f"metric_for_best_model={given!r} contradicts primary_task={args.primary_task!r}, "
                f"which means {metric!r}; give one of them"
            )
    else:
        metric = "eval_average" if given is None else f"eval_{given.removeprefix('eval_')}"
        known = [f"eval_{t.name}_{m}" for t in tasks for m in (*default_metric_names(t), "loss")] + ["eval_average"]
        custom = tuple(f"eval_{task}_" for task in compute_metrics)
        if metric not in known and not (custom and metric.startswith(custom)):
            raise ValueError(f"metric_for_best_model {given!r} is in no evaluation{closest(metric, known)}")
    scheduled = args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
    up = greater_is_better(metric)
    if metric == "eval_average":
        counted = [task for task in tasks if not (task.auxiliary or task.held_out)]
        primaries = {task.name: primary_metric(task, task.name in compute_metrics) for task in counted}
        directions = {greater_is_better(name) for name in primaries.values()}
        if len(directions) > 1:
            if given is None and not (args.load_best_model_at_end or args.save_strategy == "best" or scheduled):
                return  # nobody asks
            raise ValueError(
                f"eval_average cannot pick the best checkpoint: of {primaries} some are better when larger, others "
                "when smaller; set primary_task"
            )
        (up,) = directions
    args.metric_for_best_model = metric
    if not (args._metric_was_given and args._direction_was_given):
        args.greater_is_better = up
    if scheduled:
        mode = "max" if args.greater_is_better else "min"
        given_kwargs = args.lr_scheduler_kwargs if isinstance(args.lr_scheduler_kwargs, dict) else {}
        args.lr_scheduler_kwargs = {"mode": mode, **given_kwargs}


def _primary_key(
    args: MultiTaskTrainingArguments, tasks: Sequence[Task], compute_metrics: Mapping[str, Any], eval_dataset: Any
) -> str:
    """Return the evaluation key of the primary task's primary metric."""
    by_name = {task.name: task for task in tasks}
    if args.primary_task not in by_name:
        raise ValueError(
            f"primary_task {args.primary_task!r} is no task{closest(args.primary_task, by_name)}; "
            f"tasks are {', '.join(by_name)}"
        )
    task = by_name[args.primary_task]
    if task.auxiliary:
        raise ValueError(f"primary_task {task.name!r} is auxiliary: it is trained only to help others; choose another")
    if args.eval_strategy != "no" and isinstance(eval_dataset, Mapping) and task.dataset not in eval_dataset:
        raise ValueError(f"eval_dataset lacks the dataset {task.dataset!r} of the primary task {task.name!r}")
    custom = task.name in compute_metrics
    if custom and task.metric is None:
        raise ValueError(
            f"primary_task {task.name!r} has its own compute_metrics: name the one that decides, Task(metric=...)"
        )
    return f"eval_{task.name}_{primary_metric(task, custom)}"


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
