"""How trained keys and values come in front of those of the tokens, in every layer of a backbone.

Backbones that take a cache of earlier keys and values get the prefix as such a cache, [`PrefixCache`]: this is PEFT's
way, and the numbers are PEFT's to the last bit. Encoders that take none (DistilBERT, ModernBERT) get an attention
function of their own, [`prefix_attention`], which puts the prefix in front and then calls the one that the backbone is
configured for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.distilbert import modeling_distilbert
from transformers.models.modernbert import modeling_modernbert

__all__ = [
    "ATTENTION_FAMILIES",
    "CACHE_FAMILIES",
    "PrefixCache",
    "check_family",
    "prefix_attention",
    "prepare_backbone",
]

CACHE_FAMILIES: tuple[str, ...] = (
    # encoders
    "bert",
    "bert-generation",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "eurobert",
    "megatron-bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    # causal decoders
    "cohere",
    "gemma",
    "gpt2",
    "granite",
    "llama",
    "mistral",
    "olmo",
    "olmo2",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
    "stablelm",
    "starcoder2",
)
"""Model types that take the prefix as a cache; each gives PEFT's hidden states exactly."""

_EAGER: dict[str, Callable[..., Any]] = {
    "distilbert": modeling_distilbert.eager_attention_forward,
    "modernbert": modeling_modernbert.eager_attention_forward,
}
_ATTENTIONS = (modeling_distilbert.DistilBertSelfAttention, modeling_modernbert.ModernBertAttention)

ATTENTION_FAMILIES: tuple[str, ...] = tuple(_EAGER)
"""Model types that take the prefix in their attention function; PEFT has no prefix for them."""

# Their masks are 4-dimensional, or None, and can be widened by columns for the prefix.
_IMPLEMENTATIONS = ("sdpa", "eager")
_NAME = "hf_multitask_prefix"


def _join(prefix: Tensor, states: Tensor) -> Tensor:
    # Parameters may be kept in float32 beside a backbone in half precision, which computes in its own.
    return torch.cat([prefix.to(states.dtype), states], dim=-2)


class _PrefixLayer(DynamicLayer):
    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # Nothing is kept of the tokens: a layer that is computed again meets the cache as it was.
        keys, values = cast(Tensor, self.keys), cast(Tensor, self.values)
        return _join(keys, key_states), _join(values, value_states)


class PrefixCache(Cache):
    """A cache that holds a prefix and never grows: a layer that is computed again meets the same prefix.

    Args:
        layers: By layer the keys and the values, both `[rows, key-value heads, n, width of a head]`.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Make a layer of the cache for each layer of the backbone."""
        super().__init__(layers=[_PrefixLayer(keys, values) for keys, values in layers])


def _check_implementation(name: str | None) -> None:
    if name not in _IMPLEMENTATIONS:
        raise ValueError(
            f"prefixes on {' and '.join(ATTENTION_FAMILIES)} need attn_implementation {' or '.join(_IMPLEMENTATIONS)}, "
            f"got {name!r}; load with it, or call set_attn_implementation"
        )


def prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    prefix: Sequence[tuple[Tensor, Tensor]] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend to a prefix and to the tokens; arguments and result are those of transformers' attention functions.

    Every token sees the whole prefix, in layers of local attention too: the window is in the mask, and the columns
    that are put before it are open.

    Args:
        module: The attention layer; [`prepare_backbone`] has numbered it.
        query: `[rows, heads, L, width]`.
        key: `[rows, heads, L, width]`.
        value: `[rows, heads, L, width]`.
        attention_mask: `[rows, 1, L, L]`: True, or 0 where it is added to the scores, for what may be seen.
        prefix: The prefix of these rows, as for [`PrefixCache`]; None for none. It is handed through the layers as an
            argument, and so comes with a layer that activation checkpointing computes again, whatever has passed since.
        **kwargs: What the attention function takes further.

    Raises:
        ValueError: The backbone is configured for an attention that this does not work with.
    """
    config: Any = module.backbone_config
    _check_implementation(config._attn_implementation)
    if prefix is not None:
        keys, values = prefix[cast(int, module.prefix_layer)]
        key, value = _join(keys, key), _join(values, value)
        if attention_mask is not None:
            shape = (*attention_mask.shape[:-1], keys.shape[-2])
            seen = attention_mask.new_full(shape, attention_mask.dtype == torch.bool)
            attention_mask = torch.cat([seen, attention_mask], dim=-1)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, _EAGER[config.model_type])
    return attend(module, query, key, value, attention_mask, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(_NAME, prefix_attention)


def check_family(config: PreTrainedConfig) -> None:
    """Raise `ValueError` for the configuration of a backbone that takes no prefix."""
    families = CACHE_FAMILIES + ATTENTION_FAMILIES
    if config.model_type not in families:
        raise ValueError(
            f"prefixes are not known to work on backbone {config.model_type!r}; they work on "
            f"{', '.join(sorted(families))}"
        )


def prepare_backbone(backbone: PreTrainedModel) -> None:
    """Make a backbone ready for prefixes; its weights and its configuration stay as they are.

    Raises:
        ValueError: The backbone is configured for an attention that prefixes do not work with.
    """
    if backbone.config.model_type in CACHE_FAMILIES:
        for module in backbone.modules():
            if isinstance(module, GradientCheckpointingLayer):
                # A checkpointed layer may keep the cache: a PrefixCache is only read.
                module._can_checkpoint_with_cache = True
        return
    _check_implementation(backbone.config._attn_implementation)
    attentions: list[Any] = [module for module in backbone.modules() if isinstance(module, _ATTENTIONS)]
    for number, attention in enumerate(attentions):
        # A configuration of its own names our function; the backbone's goes on to say which one is called, and which
        # mask is made for it.
        config = copy.copy(backbone.config)
        config._attn_implementation = _NAME
        attention.config = config
        attention.backbone_config = backbone.config
        attention.prefix_layer = number
