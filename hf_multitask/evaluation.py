"""From the outputs of one task's evaluation loop to its metrics, and from the tasks' metrics to one number."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import EvalPrediction
from transformers.trainer_utils import PredictionOutput, speed_metrics

from .best_metric import average_metric
from .data.dataset import MultiTaskDataset
from .data.sources import Source, label_key
from .data.span_answers import predict_answers
from .guard import ends_together
from .metrics import default_metric_names, greater_is_better, metric_function, primary_direction, primary_metric
from .models.choice_head import ChoiceHead
from .models.heads import IGNORE_INDEX
from .models.span_head import SpanHead
from .models.task import Task, TaskType, closest
from .target_evaluation import TargetEvaluation, part_of
from .training_args import MultiTaskTrainingArguments

__all__ = ["MultiTaskEvaluation", "SourceMetrics", "check_compute_metrics"]


class SourceMetrics:
    """A `compute_metrics` for the tasks that read the same rows, which share one evaluation loop.

    What the loop gathers is a dictionary by task of `(logits, losses of rows, items of rows)`: logits alone where
    there are no labels, losses alone where nothing else was asked for.

    Args:
        tasks: The tasks.
        custom: By task, the user's callables or `evaluate` modules; the others get the default metrics.
        preprocess: By task, the user's `preprocess_logits_for_metrics`.
        prefix: Prefix of all keys.
        rows: The prepared rows, in which answers to questions are looked up.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        custom: Mapping[str, Any],
        preprocess: Mapping[str, Callable],
        prefix: str,
        rows: Any = None,
    ) -> None:
        self._spans = {task.name: task for task in tasks if task.type is TaskType.QUESTION_ANSWERING}
        self._rows = rows
        self._compute = {task.name: metric_function(task, custom.get(task.name)) for task in tasks}
        self._preprocess = preprocess
        self._prefix = prefix
        self.results: dict[str, dict[str, float]] = {}  # by task; full keys alone cannot be told apart by name
        # Nothing but the best label of each token is needed for these; logits of every token would fill the memory.
        self._language = {t.name for t in tasks if t.type.is_language}
        tokens = self._language | {t.name for t in tasks if t.type is TaskType.TOKEN_CLASSIFICATION}
        self._argmax = {name for name in tokens if name not in custom}

    def reduce(self, outputs: dict[str, tuple], labels: Any) -> dict[str, tuple]:
        """Shrink a batch's logits before they are kept."""
        return {task: self._reduce(task, values, labels) for task, values in outputs.items()}

    def reduce_language(self, outputs: dict[str, tuple], labels: Any) -> dict[str, tuple]:
        """Do what the user asks with logits, and shrink those over the vocabulary, which would fill the memory."""
        result = {}
        for task, values in outputs.items():
            if task in self._preprocess:
                values = self._reduce(task, values, labels)
            elif task in self._language and len(values) != 2:
                values = (values[0].argmax(-1), *values[1:])
            result[task] = values
        return result

    def _reduce(self, task: str, values: tuple, labels: Any) -> tuple:
        if len(values) == 2:  # losses only
            return values
        logits, *rest = values
        if task in self._preprocess:
            logits = self._preprocess[task](logits, labels.get(task) if labels else None)
        elif task in self._argmax:
            # Padding added on the way (other processes have longer rows) is -100 in every logit; it is ignored later.
            logits = torch.argmax(logits, dim=-1)
        return (logits, *rest)

    def __call__(self, prediction: Any) -> dict[str, float]:
        """Return `<prefix>_<task>_<metric>` and `<prefix>_<task>_loss`, the mean over all of the task's items."""
        metrics: dict[str, float] = {}
        for task, labels in prediction.label_ids.items():
            *logits, losses, items = prediction.predictions[task]
            if not np.any(items):
                raise ValueError(
                    f"task {task!r}: no row that was evaluated has a label: all of them are {IGNORE_INDEX}"
                )
            values = {}
            if logits and task in self._spans:
                logits[0], labels = predict_answers(self._spans[task], self._rows, logits[0])
            if logits:
                values = self._compute[task](
                    EvalPrediction(predictions=logits[0], label_ids=labels, losses=losses, inputs=prediction.inputs)
                )
            loss = float(np.sum(losses, dtype=np.float64) / np.sum(items))
            if logits and task in self._language:
                values["perplexity"] = float(np.exp(min(loss, 700.0)))
            self.results[task] = {**values, "loss": loss}
            metrics |= {f"{self._prefix}_{task}_{key}": value for key, value in self.results[task].items()}
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
        metric = primary_metric(task, custom=task.name in compute_metrics)
        if task.name not in compute_metrics and primary_direction(task, metric) != greater_is_better(metric):
            raise ValueError(
                f"task {task.name!r}: greater_is_better={task.greater_is_better} contradicts the metric {metric!r}, "
                f"which is better when {'smaller' if task.greater_is_better else 'larger'}; leave it out"
            )
        for metric in (*default_metric_names(task), "loss"):
            other = keys.setdefault(f"{task.name}_{metric}", task.name)
            if other != task.name:
                raise ValueError(
                    f"tasks {other!r} and {task.name!r} would both report eval_{task.name}_{metric}; rename one"
                )
    return dict(compute_metrics)


def check_preprocess(preprocess: Any, tasks: Sequence[Task], compute_metrics: Mapping[str, Any]) -> dict[str, Callable]:
    """Return the user's `preprocess_logits_for_metrics` by task; a single function is for tasks with own metrics.

    Raises:
        ValueError: A key is no task, a task has default metrics, which need the logits as they are, or its logits are
            put together before metrics see them.
        TypeError: It is neither a function nor a dictionary of functions.
    """
    if preprocess is None:
        return {}
    where = "preprocess_logits_for_metrics"
    single = not isinstance(preprocess, Mapping)
    if single and not compute_metrics:
        raise ValueError(
            f"{where} is one function, which is called for the tasks in compute_metrics, and there are none: default "
            "metrics need the logits as they are (and keep only what they need of them); give compute_metrics too"
        )
    by_task = dict.fromkeys(compute_metrics, preprocess) if single else dict(preprocess)
    by_name = {task.name: task for task in tasks}
    for name, function in by_task.items():
        if name not in by_name:
            raise ValueError(f"{where}: {name!r} is no task{closest(name, by_name)}; tasks are {', '.join(by_name)}")
        if not callable(function):
            raise TypeError(f"{where} must be a function, or map task names to functions, got {function!r}")
        if name not in compute_metrics:
            raise ValueError(
                f"{where}: task {name!r} has default metrics, which need its logits as they are; give it "
                "compute_metrics of its own too"
            )
        if by_name[name].type is TaskType.QUESTION_ANSWERING:
            raise ValueError(
                f"{where}: task {name!r} answers questions, and its metrics get answers that were found with all "
                "logits; leave it out: name the other tasks in a dictionary"
            )
    return by_task


class MultiTaskEvaluation(TargetEvaluation):
    """The part of [`MultiTaskTrainer`] that evaluates and predicts, one source of rows after the other."""

    # Some of what `Trainer` declares holds more than it says.
    args: MultiTaskTrainingArguments
    train_dataset: Any
    eval_dataset: Any
    compute_metrics: Any
    preprocess_logits_for_metrics: Any
    tasks: list[Task]
    _metrics: dict[str, Any]

    @abstractmethod
    def prepare_datasets(self, datasets: Any, argument: str, split: str, **options: Any) -> MultiTaskDataset:
        """Check and tokenize datasets, by name."""

    @ends_together
    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **gen_kwargs: Any,
    ) -> dict[str, float]:
        """Evaluate every task that has rows; callbacks and logs see the result once.

        Args:
            eval_dataset: Datasets by name (default: the trainer's), prepared like those of training.
            ignore_keys: As in `Trainer`.
            metric_key_prefix: Prefix of all keys.
            **gen_kwargs: Arguments of `generate`, for tasks that generate (with `predict_with_generate`).

        Returns:
            `<prefix>_<task>_<metric>`, `<prefix>_<task>_loss`, `<prefix>_average` (`<prefix>_held_out_average` over
            tasks that are held out) and the usual speeds.
        """
        if not self.tasks:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **gen_kwargs)
        self._check_options(gen_kwargs)
        self._memory_tracker.start()
        if eval_dataset is not None:
            eval_dataset = self.prepare_datasets(eval_dataset, "eval_dataset", metric_key_prefix, complete=False)
        elif self.eval_dataset is None:
            raise ValueError("evaluate needs an eval_dataset")
        start, samples = time.time(), 0
        metrics: dict[str, float] = {}
        results: dict[str, dict[str, float]] = {}
        dataset = eval_dataset or self.eval_dataset
        for source, output, by_task in self._run_sources(dataset, metric_key_prefix, ignore_keys):
            metrics |= output.metrics
            results |= by_task
            if source.tasks[0].type.generates and not self.args.prediction_loss_only:
                own = self._evaluate_targets(source, dataset, gen_kwargs)
                results[source.tasks[0].name] |= own
                metrics |= {f"{metric_key_prefix}_{source.tasks[0].name}_{key}": value for key, value in own.items()}
            samples += output.num_samples
        averages = () if self.args.prediction_loss_only else ((False, "average"), (True, "held_out_average"))
        for held_out, key in averages:
            average = average_metric(results, self.tasks, self._metrics, held_out)
            if average is not None:
                metrics[f"{metric_key_prefix}_{key}"] = average
        steps = -(-samples // (self.args.eval_batch_size * self.args.world_size))
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=samples, num_steps=steps)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return metrics

    @ends_together
    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
        **gen_kwargs: Any,
    ) -> Any:
        """Predict every task that has rows and is not auxiliary.

        Args:
            test_dataset: Datasets by name; label columns may be missing.
            ignore_keys: As in `Trainer`.
            metric_key_prefix: Prefix of the metrics' keys.
            **gen_kwargs: As in `evaluate`.

        Returns:
            By task, a `PredictionOutput`: logits `[N, C]` (`[N, L, C]` for token-level tasks, padded with -100),
            labels or None, and metrics where there were labels. For `question_answering` logits are those of windows,
            `[N, L, 2]`, and for `multiple_choice` `[N, C]`, padded with -100 too. For tasks over the vocabulary
            `[N, K]`, the likeliest tokens; with `predict_with_generate` `[N, K]`, the tokens that were written, padded.
        """
        if not self.tasks:
            return super().predict(test_dataset, ignore_keys, metric_key_prefix, **gen_kwargs)
        self._check_options(gen_kwargs)
        self._memory_tracker.start()
        dataset = self.prepare_datasets(test_dataset, "test_dataset", metric_key_prefix, complete=False, labels=None)
        outputs: dict[str, PredictionOutput] = {}
        metrics: dict[str, float] = {}
        for source, output, by_task in self._run_sources(dataset, metric_key_prefix, ignore_keys, keep_logits=True):
            for task in source.tasks:
                if not task.auxiliary:
                    own = by_task.get(task.name, {})
                    predictions = output.predictions[task.name][0]
                    if task.type.generates and self.args.predict_with_generate:
                        predictions = self._write_targets(part_of(dataset, source), gen_kwargs)
                    outputs[task.name] = PredictionOutput(
                        predictions=predictions,
                        label_ids=(output.label_ids or {}).get(task.name),
                        metrics={f"{metric_key_prefix}_{task.name}_{key}": value for key, value in own.items()},
                    )
            metrics |= output.metrics
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return outputs

    def _run_sources(
        self, dataset: MultiTaskDataset, prefix: str, ignore_keys: list[str] | None, keep_logits: bool = False
    ) -> Iterator[tuple[Source, Any, dict[str, dict[str, float]]]]:
        """Run one evaluation loop for each source: tasks that read the same rows share the encoder's pass."""
        for rows in dataset.split():
            (source,) = rows.sources
            if source.tasks[0].type.generates and label_key(source.tasks[0].name) not in rows[0]:
                yield source, self._nothing_but_prompts(source, rows), {}
                continue
            description = f"Evaluation of {', '.join(task.name for task in source.tasks)}"
            sampler: Any = self._get_eval_sampler
            if source.tasks[0].type is TaskType.QUESTION_ANSWERING:
                sampler = None  # the windows of a question are put together again, so they keep their order
            loader = self._get_dataloader(rows, description, self.args.eval_batch_size, sampler)
            # For predictions, logits are the point, whatever `prediction_loss_only` says of evaluations.
            loss_only = False if keep_logits else None
            with self._metrics_of(source, prefix, keep_logits, rows.rows[0]) as metrics:
                output = self.evaluation_loop(loader, description, loss_only, ignore_keys, prefix)
                yield source, output, metrics.results

    @contextmanager
    def _metrics_of(self, source: Source, prefix: str, keep_logits: bool, rows: Any = None) -> Iterator[SourceMetrics]:
        """Make `evaluation_loop` compute the metrics of some tasks; `Trainer` keeps the functions in attributes."""
        kept = self.compute_metrics, self.preprocess_logits_for_metrics
        own = {task.name for task in source.tasks}
        # Rows may have been prepared before the trainer's tasks were decided.
        preprocess = check_preprocess(kept[1], self.tasks, self._metrics)
        metrics = SourceMetrics(
            [task for task in self.tasks if task.name in own], self._metrics, preprocess, prefix, rows
        )
        self.compute_metrics = metrics
        self.preprocess_logits_for_metrics = metrics.reduce_language if keep_logits else metrics.reduce
        try:
            yield metrics
        finally:
            self.compute_metrics, self.preprocess_logits_for_metrics = kept

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[Any, Any, Any]:
        """Return (None, {task: (logits, loss of each row, items of each row)}, {task: labels}) of a batch.

        Losses travel per row, so that an evaluation gathered from many processes counts each row once, and
        `eval_<task>_loss` is the mean over items however they fell into batches.
        """
        if not self.tasks:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **gen_kwargs)
        inputs = self._prepare_inputs(inputs)
        for counted in ("num_items", "num_tokens"):
            inputs.pop(counted, None)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        labels = inputs.get("labels", {})
        heads = self.accelerator.unwrap_model(model).heads
        results: dict[str, tuple] = {}
        for task, logits in outputs["logits"].items():
            if isinstance(heads[task], (SpanHead, ChoiceHead)):
                # Padding reads the same, whether it was there before batches were put together or came with that.
                logits = logits.masked_fill(logits == torch.finfo(logits.dtype).min, IGNORE_INDEX)
            results[task] = () if prediction_loss_only and task in labels else (logits.float(),)
            if task in labels:
                results[task] += (outputs["row_losses"][task], heads[task].row_items(labels[task]))
        return None, results, labels or None
