"""From the outputs of one task's evaluation loop to its metrics, and from the tasks' metrics to one number."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import EvalPrediction, Trainer
from transformers.trainer_utils import PredictionOutput, speed_metrics

from .data.dataset import MultiTaskDataset
from .data.sources import Source
from .metrics import default_metric_names, greater_is_better, metric_function, primary_metric
from .models.task import Task, TaskType, closest
from .training_args import MultiTaskTrainingArguments

__all__ = ["MultiTaskEvaluation", "TaskMetrics", "average_metric", "check_compute_metrics", "check_primary_task"]


def task_outputs(predictions: Any) -> tuple[Any, Any, Any]:
    """Split what an evaluation loop gathered into logits, losses of rows and items of rows (None without labels)."""
    return predictions if isinstance(predictions, tuple) else (predictions, None, None)


class TaskMetrics:
    """A `compute_metrics` for one task.

    Args:
        task: The task.
        custom: The user's callable or `evaluate` module, or None for the default metrics.
        preprocess: The user's `preprocess_logits_for_metrics`.
    """

    def __init__(self, task: Task, custom: Any = None, preprocess: Callable | None = None) -> None:
        self._compute = metric_function(task, custom)
        self._preprocess = preprocess
        # Nothing but the best label of each token is needed then; logits of every token would fill the memory.
        self._argmax = custom is None and task.type is TaskType.TOKEN_CLASSIFICATION

    def reduce(self, outputs: Any, labels: Any) -> Any:
        """Shrink a batch's logits before they are kept."""
        logits, losses, items = task_outputs(outputs)
        if self._preprocess is not None:
            logits = self._preprocess(logits, labels)
        elif self._argmax:
            # Padding added on the way (other processes have longer rows) is -100 in every logit; it is ignored later.
            logits = torch.argmax(logits, dim=-1)
        return logits if losses is None else (logits, losses, items)

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return the task's metrics and `loss`, the mean over all of its items."""
        logits, losses, items = task_outputs(prediction.predictions)
        given = {"losses": losses, "inputs": prediction.inputs}
        metrics = dict(self._compute(EvalPrediction(predictions=logits, label_ids=prediction.label_ids, **given)))
        metrics["loss"] = float(np.sum(losses, dtype=np.float64) / max(np.sum(items), 1))
        return metrics


def check_compute_metrics(compute_metrics: Any, tasks: Sequence[Task]) -> dict[str, Any]:
    """Return the user's metric functions by task.

    Raises:
        ValueError: A key is no task.
        TypeError: It is no dictionary, or a value neither a callable nor an `evaluate` module.
    """
    if compute_metrics is None:
        compute_metrics = {}
    if not isinstance(compute_metrics, Mapping):
        raise TypeError("compute_metrics must map task names to functions for a multi-task model: {'task': function}")
    by_name = {task.name: task for task in tasks}
    for name, custom in compute_metrics.items():
        if name not in by_name:
            raise ValueError(
                f"compute_metrics: {name!r} is no task{closest(name, by_name)}; tasks are {', '.join(by_name)}"
            )
        metric_function(by_name[name], custom)
    keys: dict[str, str] = {}
    for task in tasks:
        primary_metric(task, custom=task.name in compute_metrics)
        for metric in (*default_metric_names(task), "loss"):
            other = keys.setdefault(f"{task.name}_{metric}", task.name)
            if other != task.name:
                raise ValueError(
                    f"tasks {other!r} and {task.name!r} would both report eval_{task.name}_{metric}; rename one"
                )
    return dict(compute_metrics)


def check_primary_task(
    args: MultiTaskTrainingArguments,
    tasks: Sequence[Task],
    sources: Sequence[Source],
    compute_metrics: Mapping[str, Any],
    eval_dataset: Any,
) -> None:
    """Set the metric that picks the best checkpoint: the primary task's, or the average; `args` is the trainer's copy.

    Raises:
        ValueError: The primary task does not exist, is auxiliary, is not evaluated, or its metric has no known name;
            or `metric_for_best_model` is given and says something else.
    """
    if args.primary_task is None:
        if not args._metric_was_given and args.metric_for_best_model is not None:
            args.metric_for_best_model, args.greater_is_better = "eval_average", True
        return
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
    metric = f"eval_{task.name}_{primary_metric(task, custom)}"
    if args._metric_was_given and args.metric_for_best_model not in (metric, metric.removeprefix("eval_")):
        raise ValueError(
            f"metric_for_best_model={args.metric_for_best_model!r} contradicts primary_task={task.name!r}, "
            f"which means {metric!r}; give one of them"
        )
    args.metric_for_best_model = metric
    if not args._direction_was_given:
        args.greater_is_better = greater_is_better(metric)


def average_metric(
    results: Mapping[str, Mapping[str, float]], tasks: Sequence[Task], compute_metrics: Mapping[str, Any], prefix: str
) -> float | None:
    """Return the mean of the primary metrics of the evaluated tasks that are not auxiliary, or None without any.

    Args:
        results: By task, its metrics with their full keys.
        tasks: The model's tasks.
        compute_metrics: The user's metric functions by task. Where such a task names no primary metric, it is the
            first that the function returns.
        prefix: Prefix of the keys.

    Raises:
        ValueError: A task's own `compute_metrics` does not return its primary metric.
    """
    values = []
    for task in tasks:
        if task.auxiliary or task.name not in results:
            continue
        result, custom = results[task.name], task.name in compute_metrics
        if custom and task.metric is None:
            values.append(next(iter(result.values())))
            continue
        key = f"{prefix}_{task.name}_{primary_metric(task, custom)}"
        if key not in result:
            raise ValueError(f"task {task.name!r}: compute_metrics returned no {task.metric!r}, only {list(result)}")
        values.append(result[key])
    return float(np.mean(values)) if values else None


class MultiTaskEvaluation(Trainer):
    """The part of [`MultiTaskTrainer`] that evaluates and predicts, one task after the other."""

    tasks: list[Task]
    _metrics: dict[str, Any]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate every task that has rows; callbacks and logs see the result once.

        Args:
            eval_dataset: Datasets by name (default: the trainer's), prepared like those of training.
            ignore_keys: As in `Trainer`.
            metric_key_prefix: Prefix of all keys.

        Returns:
            `<prefix>_<task>_<metric>`, `<prefix>_<task>_loss`, `<prefix>_average` and the usual speeds.
        """
        if not self.tasks:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self._memory_tracker.start()
        if eval_dataset is not None:
            eval_dataset = self._prepare_datasets(eval_dataset, "eval_dataset", metric_key_prefix, complete=False)
        elif self.eval_dataset is None:
            raise ValueError("evaluate needs an eval_dataset")
        start, samples = time.time(), 0
        results: dict[str, dict[str, float]] = {}
        for task, output in self._run_tasks(eval_dataset or self.eval_dataset, metric_key_prefix, ignore_keys):
            results[task.name] = output.metrics
            samples += output.num_samples
        metrics = {key: value for result in results.values() for key, value in result.items()}
        average = average_metric(results, self.tasks, self._metrics, metric_key_prefix)
        if average is not None:
            metrics[f"{metric_key_prefix}_average"] = average
        steps = -(-samples // (self.args.eval_batch_size * self.args.world_size))
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=samples, num_steps=steps)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return metrics

    def predict(self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test") -> Any:
        """Predict every task that has rows.

        Args:
            test_dataset: Datasets by name; label columns may be missing.
            ignore_keys: As in `Trainer`.
            metric_key_prefix: Prefix of the metrics' keys.

        Returns:
            By task, a `PredictionOutput`: logits `[N, C]` (`[N, L, C]` for token-level tasks, padded with -100),
            labels or None, and metrics where there were labels.
        """
        if not self.tasks:
            return super().predict(test_dataset, ignore_keys, metric_key_prefix)
        self._memory_tracker.start()
        dataset = self._prepare_datasets(test_dataset, "test_dataset", metric_key_prefix, complete=False, labels=None)
        outputs, metrics = {}, {}
        for task, output in self._run_tasks(dataset, metric_key_prefix, ignore_keys, keep_logits=True):
            logits = task_outputs(output.predictions)[0]
            outputs[task.name] = PredictionOutput(logits, output.label_ids, output.metrics)
            metrics |= output.metrics
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return outputs

    def _run_tasks(
        self, dataset: MultiTaskDataset, prefix: str, ignore_keys: list[str] | None, keep_logits: bool = False
    ) -> Iterator[tuple[Task, Any]]:
        """Yield each task that has rows in a dataset, with the output of its evaluation loop."""
        for task in self.tasks:
            rows = dataset.select_task(task)
            if rows is None:
                continue
            loader = self._get_dataloader(
                rows, f"Evaluation of {task.name}", self.args.eval_batch_size, self._get_eval_sampler
            )
            with self._metrics_of(task, keep_logits):
                yield (
                    task,
                    self.evaluation_loop(
                        loader, f"Evaluation of {task.name}", None, ignore_keys, f"{prefix}_{task.name}"
                    ),
                )

    @contextmanager
    def _metrics_of(self, task: Task, keep_logits: bool) -> Iterator[None]:
        """Make `evaluation_loop` compute one task's metrics, whose function `Trainer` keeps in attributes."""
        kept = self.compute_metrics, self.preprocess_logits_for_metrics
        metrics = TaskMetrics(task, self._metrics.get(task.name), kept[1])
        self.compute_metrics = metrics
        self.preprocess_logits_for_metrics = None if keep_logits else metrics.reduce
        try:
            yield
        finally:
            self.compute_metrics, self.preprocess_logits_for_metrics = kept

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """Return (None, (logits, loss of each row, items of each row), labels) of a batch of one task.

        Losses travel per row, so that a gathered evaluation on many processes counts each row once, and
        `eval_<task>_loss` is the mean over items however they fell into batches.
        """
        if not self.tasks:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        inputs.pop("num_items", None)
        (task,) = inputs["segments"]
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        logits = outputs["logits"][task].float()
        if "labels" not in inputs:
            return None, logits, None
        labels = inputs["labels"][task]
        items = self.accelerator.unwrap_model(model).heads[task].row_items(labels)
        return None, (logits, outputs["row_losses"][task], items), labels
