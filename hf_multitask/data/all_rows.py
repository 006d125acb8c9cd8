"""What prepares the rows of every task type."""

from __future__ import annotations

from datasets import Features
from transformers import PreTrainedTokenizerBase

from ..models.task import TaskType
from .choice_rows import ChoiceRows
from .prompt_rows import PromptRows
from .row_encoding import Labels, RowEncoder, TextRows, TokenizedRows
from .seq2seq_rows import Seq2SeqRows
from .sources import Source
from .span_rows import SpanRows

__all__ = ["make_row_encoder"]


def make_row_encoder(
    features: Features,
    source: Source,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    labels: Labels,
    seed: int = 0,
) -> RowEncoder:
    """Return what prepares rows of these `features`; the other arguments and errors are those of `prepare`."""
    max_length = source.tasks[0].max_length or max_length
    # A task with rows of its own has them to itself: all labels or none.
    own = (None if source.tasks[0].name in labels else False) if isinstance(labels, frozenset) else labels
    if source.tasks[0].type is TaskType.CAUSAL_LM:
        return PromptRows(features, source, own, max_length, tokenizer, seed)
    if source.tasks[0].type is TaskType.SEQ2SEQ_LM:
        return Seq2SeqRows(features, source, own, max_length, tokenizer, seed)
    if source.tasks[0].type is TaskType.QUESTION_ANSWERING:
        return SpanRows(features, source, own, max_length, tokenizer)
    if source.tasks[0].type is TaskType.MULTIPLE_CHOICE:
        return ChoiceRows(features, source, own, max_length, tokenizer)
    if "input_ids" in features:
        return TokenizedRows(features, source, labels, max_length, tokenizer)
    return TextRows(features, source, labels, max_length, tokenizer)
