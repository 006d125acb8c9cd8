"""A decoder's tokenizer, and tasks over the vocabulary, for the tests."""

from __future__ import annotations

import torch
from conftest import VOCABULARY
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_multitask import Task

ENCODER_DECODERS = ("t5", "t5, untied", "bart")
_LAYERS = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}

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


def seq2seq_tasks() -> list[Task]:
    """A classifier on what the encoder reads, and three tasks that write, one of them from a closed set."""
    return [
        Task("tone", "single_label_classification", labels=("negative", "positive"), dataset="reviews"),
        Task("words", "seq2seq_lm", dataset="reviews", label_column="label", weight=0.5, auxiliary=True),
        Task(
            "mood",
            "seq2seq_lm",
            dataset="reviews",
            prompt=["{text} . it was", "a film , {text} . we saw it , and it was"],
            label_column="label",
            labels=("negative", "positive"),
        ),
        Task("repeat", "seq2seq_lm", dataset="sayings", text_columns="said"),
    ]


def encoder_decoder(name: str) -> PreTrainedModel:
    """A model that writes: `t5`, `t5, untied` (a table of its own to predict with, as in version 1.1), or `bart`."""
    special = dict(vocab_size=90, pad_token_id=3, bos_token_id=1, eos_token_id=2)
    if name == "bart":
        sizes = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in _LAYERS.items()}
        config = BartConfig(
            **special, **sizes, d_model=32, max_position_embeddings=66, dropout=0.0, decoder_start_token_id=2
        )
        bart = BartForConditionalGeneration(config)
        bart.final_logits_bias.normal_()
        return bart
    untied = {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"} if "untied" in name else {}
    sizes = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0)
    t5 = T5ForConditionalGeneration(T5Config(**special, **sizes, decoder_start_token_id=3, **untied))
    if untied:
        # The configuration ties the tables in any case; what ends it is a checkpoint that holds two.
        t5.lm_head.weight = torch.nn.Parameter(0.1 * torch.randn(90, 32))
    return t5


def sayings(rows: int = 12) -> Dataset:
    """Targets of several words."""
    words = ("paris", "berlin", "london", "maria", "john")
    texts = [[words[(i * k) % 5] for k in range(1, 3 + i % 4)] for i in range(rows)]
    return Dataset.from_list([{"said": " ".join(text), "target": " ".join(text[::-1])} for text in texts])
