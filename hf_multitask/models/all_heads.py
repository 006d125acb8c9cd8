"""The head of every task type."""

from __future__ import annotations

from transformers import PreTrainedConfig

from .choice_head import ChoiceHead
from .heads import MultiLabelHead, RegressionHead, SingleLabelHead, TaskHead, TokenHead
from .language_head import CausalLanguageHead, MaskedLanguageHead
from .seq2seq_head import Seq2SeqHead
from .span_head import SpanHead
from .task import Task
from .task_type import TaskType

__all__ = ["HEADS", "make_head"]

HEADS: dict[TaskType, type[TaskHead]] = {
    TaskType.SINGLE_LABEL_CLASSIFICATION: SingleLabelHead,
    TaskType.MULTI_LABEL_CLASSIFICATION: MultiLabelHead,
    TaskType.REGRESSION: RegressionHead,
    TaskType.TOKEN_CLASSIFICATION: TokenHead,
    TaskType.QUESTION_ANSWERING: SpanHead,
    TaskType.MULTIPLE_CHOICE: ChoiceHead,
    TaskType.MASKED_LM: MaskedLanguageHead,
    TaskType.CAUSAL_LM: CausalLanguageHead,
    TaskType.SEQ2SEQ_LM: Seq2SeqHead,
}


def make_head(
    task: Task, hidden_size: int, pooling: str, dropout: float, backbone_config: PreTrainedConfig | None = None
) -> TaskHead:
    """Return the head of a task over hidden states of width `hidden_size`."""
    return HEADS[task.type](task, hidden_size, pooling, dropout, backbone_config)
