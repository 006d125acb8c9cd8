"""Hard sharing (Caruana 1997): one encoder for all tasks, one head per task."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from .base import MultiTaskModel
from .configuration import MultiTaskConfig

__all__ = ["HardSharingConfig", "HardSharingModel"]


class HardSharingConfig(MultiTaskConfig):
    """Configuration of a [`HardSharingModel`]; see [`MultiTaskConfig`] for its fields."""

    model_type = "hf_multitask_hard_sharing"


class HardSharingModel(MultiTaskModel):
    """One backbone whose parameters all tasks train, and a head of its own for each task.

    The scheme to begin with: it costs one encoder pass however many tasks read the same rows, and the parameters of
    one model plus small heads. It fits related tasks of similar size; where gradients conflict, other schemes part
    the ways.

    The backbone may be an encoder-decoder: tasks that write (`seq2seq_lm`) then train its decoder together, all others
    read the hidden states of its encoder. Without a task that writes, the decoder is left out.

    Example:
        >>> from transformers import BertConfig
        >>> config = HardSharingConfig(
        ...     backbone_config=BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2),
        ...     tasks=[{"name": "score", "type": "regression"}],
        ... )
        >>> import torch
        >>> HardSharingModel(config)(input_ids=torch.tensor([[1, 2, 3]])).logits["score"].shape
        torch.Size([1, 1])
    """

    config_class = HardSharingConfig
    supports_sharding = True
    supports_encoder_decoder = True

    def __init__(self, config: HardSharingConfig, backbone: PreTrainedModel | None = None) -> None:
        """Build the backbone and the heads."""
        super().__init__(config, backbone)
        self.post_init()

    def merged_backbone(self) -> PreTrainedModel:
        """Return a copy of the backbone, which all tasks have."""
        return copy.deepcopy(self.backbone)

    def reusable_backbone(self) -> PreTrainedModel:
        """Return a copy of the backbone."""
        return self.merged_backbone()

    def task_backbone(self, name: str) -> PreTrainedModel:
        """Return a copy of the backbone, which each task has."""
        return self.merged_backbone()

    def encode(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Run the backbone on some rows; of an encoder-decoder the encoder."""
        encoder: Any = self.backbone.get_encoder() if self.backbone.config.is_encoder_decoder else self.backbone
        return self.run_backbone(encoder, input_ids, attention_mask=attention_mask, **kwargs)
