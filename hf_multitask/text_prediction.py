"""Answers of tasks that generate: what they write, or the likeliest of a closed set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset, Features, List, Value

from .data.all_rows import make_row_encoder
from .data.collator import DataCollatorForMultiTask
from .data.dataset import MultiTaskDataset
from .data.sources import Source
from .generation import GenerationEvaluator
from .models.base import MultiTaskModel
from .models.task import Task
from .prediction_answers import top_labels

__all__ = ["predict_texts", "writes"]

_MESSAGES = List({"role": Value("string"), "content": Value("string")})


def writes(task: Task) -> bool:
    """Return whether a task writes its answers, instead of choosing among a closed set."""
    return task.type.generates and not (task.labels and task.label_column is not None)


def predict_texts(
    model: MultiTaskModel,
    tokenizer: Any,
    task: Task,
    inputs: Sequence[tuple[Any, ...]],
    numbers: Sequence[int],
    max_length: int,
    batch_size: int,
    top_k: int | None = None,
) -> list[Any]:
    """Return one answer for each input; prompts are made as in training: templates are drawn by the input's number.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        task: One that generates.
        inputs: The texts of the task's columns: strings, lists of words, or a list of chat messages.
        numbers: What number each input has, for messages.
        max_length: Longest prompt in tokens.
        batch_size: Rows that go through the model together.
        top_k: Of a closed set, return so many labels.

    Returns:
        `{"text"}`, or for a closed set `{"label", "score"}`, the score over the probabilities of all labels; with
        `top_k` a list of these, best first.
    """
    forms = {_form(value) for given in inputs for value in given}
    if len(forms) > 1:
        # Columns have one type each: one row after the other then.
        return [
            predict_texts(model, tokenizer, task, [given], [number], max_length, batch_size, top_k)[0]
            for given, number in zip(inputs, numbers, strict=True)
        ]
    feature = {"text": Value("string"), "words": List(Value("string")), "messages": _MESSAGES}[forms.pop()]
    own = replace(task, max_length=max_length)
    columns: dict[str, Any] = dict.fromkeys(own.text_columns, feature)
    source = Source(own.name, own.dataset, (own,))
    encoder = make_row_encoder(Features(columns), source, tokenizer, max_length, False)
    batch = {name: list(values) for name, values in zip(columns, zip(*inputs, strict=True), strict=True)}
    rows = Dataset.from_dict(encoder(batch, list(numbers)), features=encoder.features)
    dataset = MultiTaskDataset([source], {source.name: rows})
    collate = DataCollatorForMultiTask(tokenizer, model.tasks)
    evaluator = GenerationEvaluator(model, own, tokenizer, collate, batch_size)
    if own.labels and not writes(own):
        scores = evaluator.label_scores(dataset)
        ranked = [top_labels(own.labels, torch.tensor(row).softmax(-1), top_k or 1) for row in scores]
        return [found[0] if top_k is None else found for found in ranked]
    return [{"text": evaluator.text(tokens)} for tokens in evaluator.write(dataset)]


def _form(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    return "messages" if value and isinstance(value[0], dict) else "words"
