"""Tiny random models of every family that Transformers has heads for."""

from __future__ import annotations

import inspect
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

# By name of a field; a configuration takes those that it has.
_COMMON: dict[str, Any] = {
    **dict(vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2),
    **dict(intermediate_size=48, max_position_embeddings=66, pad_token_id=3, bos_token_id=1, eos_token_id=2),
    **dict(cls_token_id=1, sep_token_id=2, type_vocab_size=2, embedding_size=16, head_dim=8, ffn_dim=48),
    **dict(n_layer=2, n_head=4, n_embd=32, n_inner=48, n_positions=66, n_ctx=66, n_layers=2, n_heads=4),
    **dict(d_model=32, dim=32, hidden_dim=48, d_ff=48, d_kv=8, d_inner=48, d_head=8, num_layers=2),
    **dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4),
    **dict(encoder_ffn_dim=48, decoder_ffn_dim=48, num_experts=4, num_local_experts=4, num_experts_per_tok=2),
    **dict(moe_intermediate_size=16, n_routed_experts=4, q_lora_rank=8, kv_lora_rank=8, v_head_dim=8),
    **dict(qk_rope_head_dim=4, qk_nope_head_dim=4, word_embed_proj_dim=32, rotary_dim=4),
}
_OWN: dict[str, dict[str, Any]] = {
    "big_bird": dict(attention_type="original_full"),
    "longformer": dict(attention_window=4),
    "mobilebert": dict(intra_bottleneck_size=32, true_hidden_size=32, num_feedforward_networks=1),
    "funnel": dict(block_sizes=[1, 1], num_decoder_layers=1),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "canine": dict(max_position_embeddings=128),
    "squeezebert": dict(embedding_size=32),
    "esm": dict(mask_token_id=4),
    "esmc": dict(num_key_value_heads=4),
    "xlm": dict(emb_dim=32, n_words=90),
    "flaubert": dict(emb_dim=32, n_words=90),
    "fnet": dict(tpu_short_seq_length=7),
    "reformer": dict(
        attn_layers=["local", "local"],
        axial_pos_embds_dim=[8, 24],
        axial_pos_shape=[8, 8],
        attention_head_size=8,
        feed_forward_size=48,
        local_attn_chunk_length=4,
    ),
    "roc_bert": dict(pronunciation_vocab_size=90, shape_vocab_size=90),
    "ctrl": dict(dff=48),
    "perceiver": dict(num_latents=4, d_latents=32, num_blocks=1, num_self_attends_per_block=1),
    "rembert": dict(input_embedding_size=16, output_embedding_size=24),
    "luke": dict(entity_vocab_size=20, entity_emb_size=16),
    "xmod": dict(languages=["en_XX"], default_language="en_XX"),
    "lilt": dict(hidden_size=48, channel_shrink_ratio=2),
    "layoutlmv3": dict(visual_embed=False, coordinate_size=4, shape_size=8),
    "qwen3_next": dict(layer_types=["linear_attention", "full_attention"]),
    "qwen3_5_text": dict(layer_types=["linear_attention", "full_attention"]),
}


def tiny_config(model_type: str, **options: Any) -> PreTrainedConfig:
    """Return a tiny configuration of a family."""
    found = CONFIG_MAPPING[model_type]
    known = {f.name for f in fields(found)} if is_dataclass(found) else set(inspect.signature(found).parameters)
    chosen = {**_COMMON, **_OWN.get(model_type, {}), **options}
    return found(**{name: value for name, value in chosen.items() if name in known})


def tiny_model(auto: Any, config: PreTrainedConfig, most: int = 3_000_000) -> PreTrainedModel:
    """Return a random model of an auto class.

    Raises:
        RuntimeError: It has more than `most` parameters.
    """
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if size > most:
        raise RuntimeError(f"{size:,} parameters")
    torch.manual_seed(0)
    return auto.from_config(config).eval()
