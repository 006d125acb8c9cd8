"""From the logits of a question's windows to its answer: the best span of tokens of the context, or none.

A span scores the sum of its first token's logit and its last one's; it lies inside the context, ends where it begins or
after, and has at most `Task(max_answer_length=...)` tokens. That the context has no answer scores what a row's first
token does, in the window where that is lowest: one window that holds the answer is enough (Devlin et al. 2019, for
SQuAD 2). The best score over all windows wins.

Where every question of the training data has an answer, as in SQuAD 1.1, the first token says only that a window does
not hold it: then no answer is never an answer (`Task(null_answers=False)`, which [`decide_null_answers`] finds out).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset
from transformers.utils import logging

from ..models.task import Task, TaskType
from .dataset import MultiTaskDataset
from .span_rows import CONTEXT, OFFSETS, QUESTION, REFERENCES

__all__ = [
    "Answer",
    "QuestionWindows",
    "answer_probability",
    "decide_null_answers",
    "find_answer",
    "group_windows",
    "predict_answers",
]

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Answer:
    """An answer: `context[start:end]`, or an empty text from 0 to 0 where there is none; and its score."""

    text: str
    start: int
    end: int
    score: float


@dataclass(frozen=True)
class QuestionWindows:
    """The windows of one question.

    Args:
        context: The text that may hold the answer.
        offsets: For each window `[L, 2]`, where each token begins and ends in the context; -1 outside of it.
        logits: For each window `[L', 2]`, of which the first L are real tokens.
    """

    context: str
    offsets: Sequence[np.ndarray]
    logits: Sequence[np.ndarray]

    def spans(self, longest: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield for each window the scores of spans `[N, W]`, by first token and length, and offsets `[N, 2]`.

        Only the N tokens of the context count; what goes beyond the last of them, or holds nothing but white space,
        scores minus infinity.
        """
        for offsets, logits in zip(self.offsets, self.logits, strict=True):
            inside = np.flatnonzero(offsets[:, 0] >= 0)
            if not len(inside):
                continue
            starts, ends = np.asarray(logits, dtype=np.float64)[inside].T
            last = np.arange(len(inside))[:, None] + np.arange(min(longest, len(inside)))
            beyond = last >= len(inside)
            texts = [self.context[start:end] for start, end in offsets[inside]]
            # By token, the next one with a text; a span that ends before that is blank.
            following = np.where([bool(text.strip()) for text in texts], np.arange(len(inside)), len(inside))
            blank = last < np.minimum.accumulate(following[::-1])[::-1][:, None]
            wrong = beyond | blank
            yield starts[:, None] + np.where(wrong, -np.inf, ends[np.where(beyond, 0, last)]), offsets[inside]

    @property
    def no_answer(self) -> float:
        """The score of there being no answer."""
        return float(min(np.asarray(logits[0], dtype=np.float64).sum() for logits in self.logits))


def find_answer(question: QuestionWindows, longest: int, null_answers: bool = True) -> Answer:
    """Return the answer to a question.

    Args:
        question: Its windows.
        longest: The most tokens of an answer.
        null_answers: Whether there may be none.
    """
    best = Answer("", 0, 0, question.no_answer if null_answers else -np.inf)
    for scores, offsets in question.spans(longest):
        first, more = np.unravel_index(scores.argmax(), scores.shape)
        if scores[first, more] > best.score:
            start, end = int(offsets[first, 0]), int(offsets[first + more, 1])
            text = question.context[start:end]
            start += len(text) - len(text.lstrip())  # some tokenizers count the space in front to a word
            best = Answer(text.strip(), start, start + len(text.strip()), float(scores[first, more]))
    return best


def answer_probability(question: QuestionWindows, answer: Answer, longest: int, null_answers: bool = True) -> float:
    """Return the probability of an answer among all spans of the context and (if allowed) there being none, in [0, 1].

    A span that several windows hold counts once, with its best score.
    """
    scores: dict[tuple[int, int], float] = {}
    for table, offsets in question.spans(longest):
        for first, more in np.argwhere(np.isfinite(table)):
            key = int(offsets[first, 0]), int(offsets[first + more, 1])
            scores[key] = max(scores.get(key, -np.inf), float(table[first, more]))
    values = np.array([*([question.no_answer] if null_answers else []), *scores.values()])
    if not len(values):
        return 0.0
    return float(1 / np.exp(values - answer.score).sum())


def group_windows(rows: Dataset, logits: Sequence[np.ndarray]) -> Iterator[QuestionWindows]:
    """Yield the questions of some prepared rows, in order.

    Args:
        rows: Rows that [`hf_multitask.data.span_rows.SpanRows`] prepared.
        logits: Of each row, `[L, 2]`; where there are fewer of them than rows, of the first rows.
    """
    context, offsets, own, before = "", [], [], None
    rows = rows.with_format(None).select(range(len(logits))).select_columns([QUESTION, OFFSETS, CONTEXT])
    for row, values in zip(rows, logits, strict=True):
        if row[QUESTION] != before and before is not None:
            yield QuestionWindows(context, offsets, own)
            offsets, own = [], []
        if row[QUESTION] != before:
            context, before = row[CONTEXT], row[QUESTION]
        offsets.append(np.array(row[OFFSETS]).reshape(-1, 2))
        own.append(values)
    if before is not None:
        yield QuestionWindows(context, offsets, own)


def predict_answers(
    task: Task, rows: Dataset, logits: Sequence[np.ndarray]
) -> tuple[list[str], list[list[str]] | None]:
    """Return the answers to the questions of some prepared rows, and all right ones where these are known.

    Args:
        task: The task.
        rows: Its prepared rows.
        logits: Of each row, `[L, 2]`; where there are fewer of them than rows, of the first rows.
    """
    references: list[list[str]] | None = None
    if REFERENCES in rows.column_names:
        columns = rows.with_format(None).select(range(len(logits))).select_columns([QUESTION, REFERENCES])
        by_question: dict[int, list[str]] = {}
        for row in columns:
            by_question.setdefault(row[QUESTION], row[REFERENCES])
        references = list(by_question.values())
    may_be_none = _may_be_none(task, references)
    questions = group_windows(rows, logits)
    return [find_answer(question, task.max_answer_length, may_be_none).text for question in questions], references


def _may_be_none(task: Task, references: Sequence[Sequence[str]] | None) -> bool:
    """Return whether a question may have no answer; where nobody has decided, the right answers do."""
    without = 0 if references is None else sum(not right for right in references)
    if task.null_answers is False and without:
        logger.warning_once(
            f"task {task.name!r}: {without} of {len(references or ())} questions have no answer, but the task always "
            "gives one (null_answers=False), as all questions that it was trained on have: these count 0"
        )
    if task.null_answers is not None or references is None:
        return task.null_answers is not False
    if not without:
        logger.warning_once(
            f"task {task.name!r}: null_answers is not set, and no training data decide: all questions here have an "
            "answer, so that none is answered with nothing; Task(null_answers=False) makes predictions do the same"
        )
    return without > 0


def decide_null_answers(tasks: Sequence[Task], datasets: Any) -> list[Task]:
    """Return tasks that know whether a question may have no answer: whether one of their training data has none.

    Args:
        tasks: The tasks; those that say so themselves (`null_answers`), and those without data, stay as they are.
        datasets: Training data, by name or one for all, or prepared ones.
    """
    return [
        replace(task, null_answers=without)
        if task.type is TaskType.QUESTION_ANSWERING
        and task.null_answers is None
        and (without := _lacks_answers(task, datasets)) is not None
        else task
        for task in tasks
    ]


def _lacks_answers(task: Task, datasets: Any) -> bool | None:
    """Return whether a question in a task's training data has no answer, or None where that is not known."""
    if isinstance(datasets, MultiTaskDataset):
        for source, rows in zip(datasets.sources, datasets.rows, strict=True):
            if source.tasks[0].name == task.name and REFERENCES in rows.column_names:
                columns = rows.with_format(None).select_columns([CONTEXT, REFERENCES])
                # The first window of a question has its context and its answers.
                return any(row[CONTEXT] and not row[REFERENCES] for row in columns)
        return None
    rows = datasets.get(task.dataset) if isinstance(datasets, Mapping) else datasets
    if not isinstance(rows, Dataset) or task.label_column not in rows.column_names or not len(rows):
        return None
    for batch in rows.with_format(None).select_columns([task.label_column]).iter(batch_size=1000):
        for cell in batch[task.label_column]:
            if not isinstance(cell, Mapping) or "text" not in cell:
                return None  # preparing the rows says what is wrong
            if not cell["text"]:
                return True
    return False
