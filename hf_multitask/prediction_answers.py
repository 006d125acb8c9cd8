"""Logits → readable answers: labels with their scores, numbers, and entities with the places that they cover."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .models.tags import entity_spans, marks_entities
from .models.task import Task, TaskType

__all__ = ["Word", "find_entities", "finite", "text_answer", "top_labels"]

Word = tuple[int, int]
"""Where a word begins in its text, and where it ends: in characters, or in words where those were given."""

_LIKELY = 0.5


def top_labels(labels: Sequence[str], probabilities: Tensor, top_k: int) -> list[dict[str, Any]]:
    """Return the likeliest labels, `{"label", "score"}`, best first.

    Args:
        labels: The labels.
        probabilities: `[C]`, theirs.
        top_k: How many; more than there are gives all.
    """
    scores, numbers = probabilities.topk(min(top_k, len(labels)))
    return [
        {"label": labels[number], "score": round(score, 4)}
        for score, number in zip(scores.tolist(), numbers.tolist(), strict=True)
    ]


def text_answer(task: Task, logits: Tensor, top_k: int | None) -> Any:
    """Return the answer of a task that is about a whole text.

    Args:
        task: The task.
        logits: `[C]`, in float32.
        top_k: The number of labels wanted, or None for those that hold.
    """
    labels = task.labels or ()
    if task.type is TaskType.REGRESSION:
        values = [round(value, 4) for value in logits.tolist()]
        return dict(zip(labels, values, strict=True)) if labels else values[0]
    if task.type is TaskType.MULTI_LABEL_CLASSIFICATION:
        probabilities = logits.sigmoid()
        if top_k is not None:
            return top_labels(labels, probabilities, top_k)
        pairs = zip(labels, probabilities.tolist(), strict=True)
        return [{"label": label, "score": round(p, 4)} for label, p in pairs if p > _LIKELY]
    found = top_labels(labels, logits.softmax(-1), top_k or 1)
    return found[0] if top_k is None else found


def find_entities(task: Task, text: Any, words: Sequence[Word], probabilities: Tensor) -> list[dict[str, Any]]:
    """Return the entities of a text, or its words where labels mark none.

    Args:
        task: A task that labels words.
        text: The text, a string or a list of words.
        words: The words that were read, in the order of the text.
        probabilities: `[words, C]`, of the labels of each.
    """
    labels = task.labels or ()
    best, numbers = probabilities.max(-1)
    scores, tags = best.tolist(), [labels[number] for number in numbers.tolist()]
    if marks_entities(labels):
        spans = entity_spans(tags)
    else:
        spans = [(tag, number, number + 1) for number, tag in enumerate(tags)]
    found = []
    for kind, first, stop in spans:
        start, end = words[first][0], words[stop - 1][1]
        part = text[start:end]
        found.append(
            {
                "label": task.name if kind == "_" else kind,  # tags without types
                "text": part if isinstance(part, str) else " ".join(part),
                "start": start,
                "end": end,
                "score": round(min(scores[first:stop]), 4),
            }
        )
    return found


def finite(value: Any) -> tuple[Any, int]:
    """Return a JSON value with None for numbers that are not finite, which JSON lacks, and how many there were."""
    if isinstance(value, float) and not math.isfinite(value):
        return None, 1
    if isinstance(value, Mapping):
        parts = {key: finite(part) for key, part in value.items()}
        return {key: part for key, (part, _) in parts.items()}, sum(count for _, count in parts.values())
    if isinstance(value, (list, tuple)):
        found = [finite(part) for part in value]
        return [part for part, _ in found], sum(count for _, count in found)
    return value, 0
