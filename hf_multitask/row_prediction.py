"""Answers of tasks that make rows of their own: questions on contexts of any length, and choices.

Rows are made, batched and read as in evaluation, so that the same text has the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor

from .data.all_rows import make_row_encoder
from .data.choice_rows import LENGTHS
from .data.collator import DataCollatorForMultiTask
from .data.dataset import MultiTaskDataset
from .data.sources import Source
from .data.span_answers import answer_probability, find_answer, group_windows
from .models.base import MultiTaskModel
from .models.task import Task, TaskType

__all__ = ["predict_rows", "reads_own_rows"]


def reads_own_rows(task: Task) -> bool:
    """Return whether a task makes rows of its own of a text."""
    return task.type in (TaskType.QUESTION_ANSWERING, TaskType.MULTIPLE_CHOICE) or task.type.generates


def predict_rows(
    model: MultiTaskModel,
    tokenizer: Any,
    task: Task,
    inputs: Sequence[tuple[Any, ...]],
    numbers: Sequence[int],
    max_length: int,
    batch_size: int,
    top_k: int | None = None,
) -> list[Any]:
    """Return one answer for each input.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        task: One that [`reads_own_rows`].
        inputs: Question and context; or the texts that choices are about, and the list of choices.
        numbers: What number each input has, for messages.
        max_length: Longest row in tokens.
        batch_size: Rows of the encoder per pass (of a question's choices, all that there are).
        top_k: Return so many choices of each input.

    Returns:
        For a question `{"answer", "start", "end", "score"}`, for choices `{"label", "choice", "score"}`; with `top_k`
        a list of these, best first.

    Raises:
        ValueError: An input holds what is no text, too few choices, or leaves no room for the rest.
    """
    for number, given in zip(numbers, inputs, strict=True):
        for text in given[: len(task.text_columns)]:
            if not isinstance(text, str):
                raise ValueError(f"input {number} is {text!r}; task {task.name!r} reads plain strings, not words")
    is_choice = task.type is TaskType.MULTIPLE_CHOICE
    choices = "/".join(task.choice_columns or ())  # here they come as lists in any case
    own = replace(task, max_length=max_length, choice_columns=(choices,) if is_choice else None)
    columns: dict[str, Any] = dict.fromkeys(own.text_columns, Value("string"))
    columns |= {choices: List(Value("string"))} if is_choice else {}
    source = Source(own.name, own.dataset, (own,))
    encoder = make_row_encoder(Features(columns), source, tokenizer, max_length, False)
    batch = {name: list(values) for name, values in zip(columns, zip(*inputs, strict=True), strict=True)}
    rows = Dataset.from_dict(encoder(batch, list(numbers)), features=encoder.features)
    size = max(batch_size // max(map(len, rows[LENGTHS])), 1) if is_choice else batch_size
    logits = _logits(model, tokenizer, MultiTaskDataset([source], {source.name: rows}), size)
    if is_choice:
        return [_choose(given[-1], scores, top_k) for given, scores in zip(inputs, logits, strict=True)]
    answers = []
    for question in group_windows(rows, [values.numpy() for values in logits]):
        may_be_none = task.null_answers is not False
        found = find_answer(question, task.max_answer_length, may_be_none)
        score = answer_probability(question, found, task.max_answer_length, may_be_none)
        answers.append({"answer": found.text, "start": found.start, "end": found.end, "score": round(score, 4)})
    return answers


@torch.inference_mode()
def _logits(model: MultiTaskModel, tokenizer: Any, rows: MultiTaskDataset, size: int) -> list[Tensor]:
    """Return the logits of each row of one source, on the CPU."""
    collate = DataCollatorForMultiTask(tokenizer, model.tasks)
    (task,) = rows.sources[0].tasks
    logits: list[Tensor] = []
    for start in range(0, len(rows), size):
        batch = collate([rows[number] for number in range(start, min(start + size, len(rows)))])
        inputs = {key: _moved(value, model.device) for key, value in batch.items()}
        logits += model(**inputs).logits[task.name].float().cpu()
    return logits


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


def _choose(choices: Sequence[str], scores: Tensor, top_k: int | None) -> Any:
    """Return the likeliest of some choices; of scores there may be more, the lowest there are, for other rows."""
    probabilities, numbers = scores.softmax(-1).topk(min(top_k or 1, len(choices)))
    found = [
        {"label": number, "choice": choices[number], "score": round(probability, 4)}
        for probability, number in zip(probabilities.tolist(), numbers.tolist(), strict=True)
    ]
    return found[0] if top_k is None else found
