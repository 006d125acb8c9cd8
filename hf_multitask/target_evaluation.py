"""The part of the trainer that lets tasks that generate write, and compares it with their targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from .data.dataset import MultiTaskDataset
from .data.sources import Source
from .generation import GenerationEvaluator
from .models.task import Task
from .training_args import MultiTaskTrainingArguments

__all__ = ["TargetEvaluation", "part_of"]


class TargetEvaluation(Trainer):
    """Evaluation and prediction of tasks that generate; see [`hf_multitask.generation`]."""

    args: MultiTaskTrainingArguments
    tasks: list[Task]
    processing_class: Any
    data_collator: Any

    def _check_options(self, gen_kwargs: Mapping[str, Any]) -> None:
        if gen_kwargs and not any(task.type.generates for task in self.tasks):
            raise TypeError(f"{', '.join(gen_kwargs)}: none of the tasks generates text")

    def _evaluator(self, task: Task) -> GenerationEvaluator:
        return GenerationEvaluator(
            self.accelerator.unwrap_model(self.model),
            task,
            self.processing_class,
            self.data_collator,
            self.args.eval_batch_size,
            self.args.process_index,
            self.args.world_size,
            self.accelerator.autocast,
        )

    def _evaluate_targets(self, source: Source, dataset: Any, options: Mapping[str, Any]) -> dict[str, float]:
        """Return the metrics of a generating task that no single pass over its rows gives."""
        (task,) = source.tasks
        rows, found = part_of(dataset, source), {}
        evaluator = self._evaluator(task)
        if task.labels:
            found["label_accuracy"] = evaluator.label_accuracy(rows)
        if self.args.predict_with_generate and evaluator.has_targets(rows):
            found |= evaluator.text_metrics(rows, evaluator.write(rows, **options))
        return found

    def _write_targets(self, rows: MultiTaskDataset, options: Mapping[str, Any]) -> np.ndarray:
        """Return what a generating task writes for the rows of its source, `[N, K]`, padded."""
        (source,) = rows.sources
        written = self._evaluator(source.tasks[0]).write(rows, **options)
        result = np.full((len(written), max(map(len, written), default=0)), self.processing_class.pad_token_id)
        for i, tokens in enumerate(written):
            result[i, : len(tokens)] = tokens
        return result

    def _nothing_but_prompts(self, source: Source, rows: MultiTaskDataset) -> EvalLoopOutput:
        """Return the outcome of rows that have no target: all there is to do is to write one."""
        (task,) = source.tasks
        if not self.args.predict_with_generate:
            raise ValueError(
                f"task {task.name!r}: the rows have no targets, so that text must be written for them; set "
                "predict_with_generate=True"
            )
        nothing: Any = {task.name: (None,)}
        return EvalLoopOutput(predictions=nothing, label_ids=None, metrics={}, num_samples=len(rows))


def part_of(dataset: MultiTaskDataset, source: Source) -> MultiTaskDataset:
    """Return the rows of one source."""
    (rows,) = [part for part in dataset.split() if part.sources[0].name == source.name]
    return rows
