"""From the logits of a question's windows to its answer: the best span of tokens of the context, or none.

A span scores the sum of its first token's logit and its last one's; it lies inside the context, ends where it begins or
after, and has at most `Task(max_answer_length=...)` tokens. That the context has no answer scores what a row's first
token does, in the window where that is lowest: one window that holds the answer is enough (Devlin et al. 2019, for
SQuAD 2). The best score over all windows wins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from ..models.task import Task
from .span_rows import CONTEXT, OFFSETS, QUESTION, REFERENCES

__all__ = ["Answer", "QuestionWindows", "answer_probability", "find_answer", "group_windows", "predict_answers"]


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

        Only the N tokens of the context count; what goes beyond the last of them scores minus infinity.
        """
        for offsets, logits in zip(self.offsets, self.logits, strict=True):
            inside = np.flatnonzero(offsets[:, 0] >= 0)
            if not len(inside):
                continue
            starts, ends = np.asarray(logits, dtype=np.float64)[inside].T
            last = np.arange(len(inside))[:, None] + np.arange(min(longest, len(inside)))
            beyond = last >= len(inside)
            yield starts[:, None] + np.where(beyond, -np.inf, ends[np.where(beyond, 0, last)]), offsets[inside]

    @property
    def no_answer(self) -> float:
        """The score of there being no answer."""
        return float(min(np.asarray(logits[0], dtype=np.float64).sum() for logits in self.logits))


def find_answer(question: QuestionWindows, longest: int) -> Answer:
    """Return the answer to a question.

    Args:
        question: Its windows.
        longest: The most tokens of an answer.
    """
    best = Answer("", 0, 0, question.no_answer)
    for scores, offsets in question.spans(longest):
        first, more = np.unravel_index(scores.argmax(), scores.shape)
        if scores[first, more] > best.score:
            start, end = int(offsets[first, 0]), int(offsets[first + more, 1])
            text = question.context[start:end]
            start += len(text) - len(text.lstrip())  # some tokenizers count the space in front to a word
            best = Answer(text.strip(), start, start + len(text.strip()), float(scores[first, more]))
    return best


def answer_probability(question: QuestionWindows, answer: Answer, longest: int) -> float:
    """Return the probability of an answer among all spans of the context and there being none, in [0, 1].

    A span that several windows hold counts once, with its best score.
    """
    scores: dict[tuple[int, int], float] = {}
    for table, offsets in question.spans(longest):
        for first, more in np.argwhere(np.isfinite(table)):
            key = int(offsets[first, 0]), int(offsets[first + more, 1])
            scores[key] = max(scores.get(key, -np.inf), float(table[first, more]))
    values = np.array([question.no_answer, *scores.values()])
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
    answers = [find_answer(question, task.max_answer_length).text for question in group_windows(rows, logits)]
    if REFERENCES not in rows.column_names:
        return answers, None
    columns = rows.with_format(None).select(range(len(logits))).select_columns([QUESTION, REFERENCES])
    references: dict[int, list[str]] = {}
    for row in columns:
        references.setdefault(row[QUESTION], row[REFERENCES])
    return answers, list(references.values())
