"""The types of tasks, by Hugging Face's names, and what they have in common."""

from __future__ import annotations

from enum import Enum

__all__ = ["TaskType"]


class TaskType(str, Enum):
    """Types of tasks, by Hugging Face's names."""

    SINGLE_LABEL_CLASSIFICATION = "single_label_classification"
    MULTI_LABEL_CLASSIFICATION = "multi_label_classification"
    REGRESSION = "regression"
    TOKEN_CLASSIFICATION = "token_classification"
    QUESTION_ANSWERING = "question_answering"
    MULTIPLE_CHOICE = "multiple_choice"
    MASKED_LM = "masked_lm"
    CAUSAL_LM = "causal_lm"
    SEQ2SEQ_LM = "seq2seq_lm"

    def __str__(self) -> str:
        """Return the plain name, so that messages and JSON show `regression`."""
        return self.value

    @property
    def is_language(self) -> bool:
        """Whether tokens of the vocabulary are predicted, so that the text itself is the label."""
        return self is TaskType.MASKED_LM or self.generates

    @property
    def generates(self) -> bool:
        """Whether a model of the task can write text."""
        return self in (TaskType.CAUSAL_LM, TaskType.SEQ2SEQ_LM)

    @property
    def has_labels(self) -> bool:
        """Whether every task of the type names its labels."""
        return self in (
            TaskType.SINGLE_LABEL_CLASSIFICATION,
            TaskType.MULTI_LABEL_CLASSIFICATION,
            TaskType.TOKEN_CLASSIFICATION,
        )

    @property
    def needs_own_rows(self) -> bool:
        """Whether its rows can serve no other task: they are changed, cut in a way of their own, or hold the answer."""
        return self.is_language or self in (TaskType.QUESTION_ANSWERING, TaskType.MULTIPLE_CHOICE)
