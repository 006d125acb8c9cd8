"""Tiny language models of many families, as Transformers itself has them, for the tests."""

from __future__ import annotations

import copy

import torch
from conftest import BACKBONES, PAD_ID
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig, PreTrainedModel

_SIZE = dict(
    vocab_size=90,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=66,
    pad_token_id=PAD_ID,
    bos_token_id=1,
    eos_token_id=2,
)
_GPT2 = dict(vocab_size=90, n_embd=32, n_layer=2, n_head=4, n_positions=66, bos_token_id=1, eos_token_id=2)
CONFIGS = {
    **{name: BACKBONES[name]().config for name in ("bert", "roberta", "distilbert", "electra", "modernbert")},
    "bert, untied": BertConfig(**{**BACKBONES["bert"]().config.to_dict(), "tie_word_embeddings": False}),
    "llama": AutoConfig.for_model("llama", **_SIZE),
    "llama, tied": AutoConfig.for_model("llama", **_SIZE, tie_word_embeddings=True),
    "gpt2": AutoConfig.for_model("gpt2", **_GPT2, pad_token_id=PAD_ID),
    "gemma": AutoConfig.for_model("gemma", **_SIZE, head_dim=8),
    "gemma2, capped": AutoConfig.for_model("gemma2", **_SIZE, head_dim=8, final_logit_softcapping=0.5),
    "qwen2": AutoConfig.for_model("qwen2", **_SIZE),
    "opt": AutoConfig.for_model("opt", **_SIZE, ffn_dim=48, word_embed_proj_dim=32),  # reads a part of its backbone
    "mixtral": AutoConfig.for_model("mixtral", **_SIZE, num_local_experts=2),  # asks its backbone for more
    "mamba": AutoConfig.for_model("mamba", **_SIZE),  # looks at the table before it multiplies
    "bert as decoder": BertConfig(**{**BACKBONES["bert"]().config.to_dict(), "is_decoder": True}),
}
# Only their `forward` differs from the others'.
FURTHER = {
    "bloom": AutoConfig.for_model("bloom", **_SIZE, n_head=4),
    "falcon": AutoConfig.for_model("falcon", **_SIZE, num_kv_heads=2),
    "gptj": AutoConfig.for_model("gptj", **_GPT2, pad_token_id=PAD_ID, rotary_dim=4),
    "gpt_neo": AutoConfig.for_model(
        "gpt_neo", **{**_SIZE, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    ),
}
# Transformers has no masked head for these, but a causal one.
BIDIRECTIONAL = {
    "xlnet": AutoConfig.for_model("xlnet", vocab_size=90, d_model=32, n_layer=2, n_head=4, d_inner=48),
    "bert-generation": AutoConfig.for_model("bert-generation", **_SIZE),
}
ENCODERS = ("bert", "roberta", "distilbert", "electra", "modernbert", "bert, untied")
DECODERS = tuple(name for name in CONFIGS if name not in ENCODERS)


def auto_of(name: str):
    return AutoModelForMaskedLM if name in ENCODERS else AutoModelForCausalLM


def make_plain(name: str, seed: int = 0, noise: float = 0.1) -> PreTrainedModel:
    """Transformers' own language model, all of whose parameters say something."""
    torch.manual_seed(seed)
    model = auto_of(name).from_config(copy.deepcopy((CONFIGS | FURTHER)[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model
