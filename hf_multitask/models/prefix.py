"""Prefixes (Li and Liang 2021; Liu et al. 2022): a frozen backbone, and keys and values of its own for each task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers import initialization as init

from .backbone import learned_positions, usable_positions
from .frozen import FrozenBackboneConfig, FrozenBackboneModel
from .prefix_attention import CACHE_FAMILIES, PrefixCache, check_family, prepare_backbone

__all__ = ["PrefixConfig", "PrefixModel"]

if TYPE_CHECKING:
    from peft import PrefixEncoder, PrefixTuningConfig


class PrefixConfig(FrozenBackboneConfig):
    """Configuration of a [`PrefixModel`]; see [`MultiTaskConfig`] for the other fields.

    Args:
        num_virtual_tokens: Length n of each task's prefix, in tokens; at least 1.
        prefix_init_std: Standard deviation of the prefixes' initial values; None takes the backbone's
            `initializer_range`.

    Raises:
        ValueError: A value is out of range.
    """

    model_type = "hf_multitask_prefix"

    num_virtual_tokens: int = 20
    prefix_init_std: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the fields."""
        super().__post_init__(**kwargs)
        if type(self.num_virtual_tokens) is not int or self.num_virtual_tokens < 1:
            raise ValueError(f"num_virtual_tokens must be a whole number from 1, got {self.num_virtual_tokens!r}")
        if self.prefix_init_std is not None and not self.prefix_init_std > 0:
            raise ValueError(
                f"prefix_init_std must be above 0 (virtual tokens that begin equal stay equal), "
                f"got {self.prefix_init_std!r}"
            )


class PrefixModel(FrozenBackboneModel):
    """A frozen backbone, each layer of which reads trained keys and values of the task in front of its tokens.

    Each task trains a prefix of n keys and values per layer, `2 * n * layers * key-value width` numbers (370 thousand
    for a base-size encoder at n = 20), and its head. Nothing is shared but the frozen backbone: no task can harm
    another, none can help another, and tasks are added or dropped without touching the rest. The rows of a mixed batch
    go through the backbone together, each behind the prefix of its own task.

    The prefixes are those of P-tuning v2 (Liu et al. 2022): free parameters in every layer. Li and Liang (2021)
    compute them with a small network while training; PEFT calls this `prefix_projection`, cannot resume it from what
    it saves, and it is not offered. Instead they begin small, at the backbone's own `initializer_range`, where the
    attention to the tokens is at first only weakened; PEFT and P-tuning v2 begin at a standard deviation of 1. Prefixes
    want a larger learning rate than fine-tuning does, 1e-3 to 1e-2. The prefixes have the backbone's dtype; to train
    those of a bfloat16 backbone in float32, call `model.adapters.float()`, or load it in float32 and train under
    autocast.

    Where the backbone takes a cache (most encoders, the causal decoders), all numbers are those of PEFT's prefix
    tuning: the tokens' positions begin at n, so that n fewer tokens fit, keys in the prefix carry no rotary position,
    and where a layer has a sliding window the prefix is out of sight of the tokens beyond it. DistilBERT and ModernBERT
    take none, and PEFT has no prefixes for them. There the tokens keep their positions, no length is lost, and every
    token sees the prefix in every layer, local attention included; ModernBERT's prefix keys carry no rotary position
    either.

    Example:
        >>> from transformers import BertConfig
        >>> config = PrefixConfig(
        ...     backbone_config=BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2),
        ...     tasks=[{"name": "score", "type": "regression"}],
        ...     num_virtual_tokens=5,
        ... )
        >>> model = PrefixModel(config)
        >>> [tuple(parameter.shape) for parameter in model.adapters.parameters()]
        [(5, 64)]
    """

    config_class = PrefixConfig
    supports_packing = False
    untrained_tasks_are_plain = False
    config: PrefixConfig

    def __init__(self, config: PrefixConfig, backbone: PreTrainedModel | None = None) -> None:
        """Build the backbone, the heads and the prefixes.

        Raises:
            ValueError: The backbone takes no prefix, or has no more positions than the prefix needs.
        """
        from peft import PrefixEncoder

        check_family(config.backbone_config)
        super().__init__(config, backbone)
        prepare_backbone(self.backbone)
        positions = usable_positions(self.backbone)
        if positions is not None and self.reserved_positions >= positions:
            raise ValueError(
                f"num_virtual_tokens={config.num_virtual_tokens} leaves no room for input: the backbone has "
                f"{positions} positions"
            )
        self._first_position, self._table_size = learned_positions(self.backbone)
        layout = self.adapter_config()
        self.adapters = nn.ModuleDict({task.name: PrefixEncoder(layout) for task in self.tasks})
        self.post_init()

    def encode(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the backbone on some rows, each behind the prefix of its task.

        Raises:
            ValueError: The rows are longer than the positions that the prefix leaves.
        """
        if inputs_embeds is not None:
            kwargs["inputs_embeds"] = inputs_embeds
        if not self.reserved_positions:
            if position_ids is not None:
                kwargs["position_ids"] = position_ids
            return self.run_backbone(
                self.backbone, input_ids, attention_mask=attention_mask, prefix=self.prefix_states(), **kwargs
            )
        main = cast(Tensor, inputs_embeds if input_ids is None else input_ids)
        rows, length = main.shape[:2]
        n, first, size = self.config.num_virtual_tokens, self._first_position, self._table_size
        if size is not None and first + n + length > size:
            raise ValueError(
                f"rows of {length} tokens are too long: of the backbone's {size - first} positions the prefix takes "
                f"{n}; cut them to {size - first - n}"
            )
        if input_ids is None and position_ids is None and first:
            # RoBERTa and its kin forget the cache where they get embeddings in place of ids.
            position_ids = torch.arange(first, first + length, device=main.device).unsqueeze(0)
        if position_ids is not None:
            kwargs["position_ids"] = position_ids + n
        mask = main.new_ones((rows, length), dtype=torch.long) if attention_mask is None else attention_mask
        mask = torch.cat([mask.new_ones((rows, n)), mask], dim=1)
        cache = PrefixCache(self.prefix_states())
        return self.run_backbone(
            self.backbone, input_ids, attention_mask=mask, past_key_values=cache, use_cache=False, **kwargs
        )

    def decode(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Run the backbone with a cache: the first call puts the prefix into it, in front of the tokens.

        Raises:
            ValueError: The cache cannot grow, or the mask is not `[rows, L]`.
        """
        if past_key_values is None:
            kwargs.pop("use_cache", None)
            output = self.encode(input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)
            output.past_key_values = None  # of the prefix alone; the next call begins anew
            return output
        if not isinstance(past_key_values, DynamicCache) or (attention_mask is not None and attention_mask.dim() != 2):
            raise ValueError(
                "with prefixes generate needs a cache that grows, and a mask [rows, L]; leave out cache_implementation"
            )
        main = cast(Tensor, kwargs.get("inputs_embeds") if input_ids is None else input_ids)
        n = self.config.num_virtual_tokens
        if past_key_values.get_seq_length() == 0:
            for layer, (keys, values) in enumerate(self.prefix_states()):
                past_key_values.update(keys, values, layer)
        mask = main.new_ones((len(main), past_key_values.get_seq_length() + main.shape[1]), dtype=torch.long)
        if attention_mask is not None:
            mask = torch.cat([mask[:, :n], attention_mask], dim=1)
        if position_ids is not None:
            kwargs["position_ids"] = position_ids + n
        return self.run_backbone(
            self.backbone, input_ids, attention_mask=mask, past_key_values=past_key_values, **kwargs
        )

    def prefix_states(self) -> list[tuple[Tensor, Tensor]]:
        """Return the prefixes of the rows of the current pass.

        Returns:
            By layer the keys and the values, both `[rows, key-value heads, n, width of a head]`, laid out as PEFT does.
        """
        current = self.rows.value
        if current is None:
            raise ValueError("a prefix needs rows of tasks; call the model, not its encode")
        parts = []
        for name, start, stop in current.slices:
            weight = cast("PrefixEncoder", self.adapters[name]).embedding.weight
            parts.append(weight.expand(stop - start, -1, -1))
        own = torch.cat(parts) if len(parts) > 1 else parts[0]
        layers, heads, width = _layout(self.config.get_text_config())
        states = own.view(*own.shape[:2], 2 * layers, heads, width).permute(2, 0, 3, 1, 4).unbind()
        return list(zip(states[::2], states[1::2], strict=True))

    # ---- what the base asks ----

    @property
    def shares_rows(self) -> bool:
        """False: rows that feed two tasks go through the backbone twice, behind the prefix of each."""
        return False

    @property
    def reserved_positions(self) -> int:
        """The positions of the backbone that the prefix takes, and the input does not get."""
        return self.config.num_virtual_tokens if self.backbone.config.model_type in CACHE_FAMILIES else 0

    def task_modules(self, name: str) -> list[nn.Module]:
        """Return a task's head and its prefix."""
        return [*super().task_modules(name), self.adapters[name]]

    def adapter_tensors(self) -> dict[str, dict[str, str]]:
        """Return, by folder in a saved model, our name of the prefix and PEFT's."""
        return {
            f"adapters/{task.name}": {f"adapters.{task.name}.embedding.weight": "prompt_embeddings"}
            for task in self.tasks
        }

    def adapter_config(self, folder: str | None = None) -> PrefixTuningConfig:
        """Return PEFT's configuration of the prefixes, the same for all, with the fields that PEFT itself fills in."""
        from peft import PrefixTuningConfig

        layers, heads, width = _layout(self.config.get_text_config())
        return PrefixTuningConfig(
            task_type=self.peft_layout()[0],
            num_virtual_tokens=self.config.num_virtual_tokens,
            num_layers=layers,
            num_attention_heads=heads,
            token_dim=heads * width,
            encoder_hidden_size=heads * width,
            num_transformer_submodules=1,
        )

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        """Set how layers are computed again in the backward pass; they keep the cache."""
        super()._set_gradient_checkpointing(*args, **kwargs)
        if self.backbone.config.model_type == "gpt2":
            # Where its own flag is set GPT-2 itself drops the cache; each of its layers has a flag too.
            self.backbone.gradient_checkpointing = False  # type: ignore[assignment]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise heads and prefixes."""
        super()._init_weights(module)
        # The encoder around it is not asked for: Transformers passes over modules without parameters of their own.
        if any(module is encoder.embedding for encoder in cast("Any", self.adapters.values())):
            std = self.config.prefix_init_std
            if std is None:
                std = getattr(self.config.get_text_config(), "initializer_range", self.config.initializer_range)
            init.normal_(cast(nn.Embedding, module).weight, mean=0.0, std=std)


def _layout(config: Any) -> tuple[int, int, int]:
    """Return a backbone's number of layers, of heads that keys and values have, and the width of a head."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, heads, width
