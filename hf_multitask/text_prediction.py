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

__all__ = ["predict_texts"]

_MESSAGES = List({"role": Value("string"), "content": Value("string")})


def predict_texts(
    model: MultiTaskModel,
    tokenizer: Any,
    task: Task,
    inputs: Sequence[tuple[Any, ...]],
    numbers: Sequence[int],
    max_length: int,
    batch_size: int,
) -> list[dict[str, Any]]:
    """Return one answer for each input; prompts are made as in training: templates are drawn by the input's number.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        task: One that generates.
        inputs: The texts of the task's columns: strings, lists of words, or a list of chat messages.
        numbers: What number each input has, for messages.
        max_length: Longest prompt in tokens.
        batch_size: Rows that go through the model together.

    Returns:
        `{"text"}`, or for a closed set `{"label", "score"}`, the score over the probabilities of all labels.
    """
    forms = {_form(value) for given in inputs for value in given}
    if len(forms) > 1:
        # Columns have one type each: one row after the other then.
        return [
            predict_texts(model, tokenizer, task, [given], [number], max_length, batch_size)[0]
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
    if own.labels and own.label_column is not None:
        answers = []
        for scores in evaluator.label_scores(dataset):
            probability, best = torch.tensor(scores).softmax(-1).max(-1)
            answers.append({"label": own.labels[int(best)], "score": round(float(probability), 4)})
        return answers
    return [{"text": evaluator.text(tokens)} for tokens in evaluator.write(dataset)]


def _form(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    return "messages" if value and isinstance(value[0], dict) else "words"
