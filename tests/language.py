"""A decoder's tokenizer, and tasks over the vocabulary, for the tests."""

from __future__ import annotations

from conftest import VOCABULARY
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_multitask import Task

CHAT_TEMPLATE = (
    "{% for message in messages %}[CLS] {{ message['role'] }} {{ message['content'] }} [SEP] {% endfor %}"
    "{% if add_generation_prompt %}[CLS] assistant {% endif %}"
)


def decoder_tokenizer() -> PreTrainedTokenizerFast:
    """The words of the other tokenizer, with nothing put around a text."""
    words = {word: i for i, word in enumerate(dict.fromkeys(VOCABULARY))}
    backend = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        pad_token="[PAD]",
        model_max_length=64,
        chat_template=CHAT_TEMPLATE,
    )


def encoder_tasks() -> list[Task]:
    """A task, and hidden words of its texts beside it."""
    return [
        Task("tone", "single_label_classification", labels=("negative", "positive"), dataset="reviews"),
        Task("words", "masked_lm", dataset="reviews", auxiliary=True, weight=0.5),
    ]


def decoder_tasks() -> list[Task]:
    """A classifier, plain language modelling, and two tasks that answer, one of them from a closed set."""
    return [
        Task("tone", "single_label_classification", labels=("negative", "positive"), dataset="reviews"),
        Task("words", "causal_lm", dataset="reviews", weight=0.5, auxiliary=True),
        Task(
            "mood",
            "causal_lm",
            dataset="reviews",
            prompt=["{text} . it was", "a film , {text} . we saw it , and it was"],
            label_column="label",
            labels=("negative", "positive"),
        ),
        Task("repeat", "causal_lm", dataset="sayings", prompt="{said} and"),
    ]


def sayings(rows: int = 12) -> Dataset:
    """Targets of several words."""
    words = ("paris", "berlin", "london", "maria", "john")
    texts = [[words[(i * k) % 5] for k in range(1, 3 + i % 4)] for i in range(rows)]
    return Dataset.from_list([{"said": " ".join(text), "target": " ".join(text[::-1])} for text in texts])
