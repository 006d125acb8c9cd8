"""The head of `seq2seq_lm`: the decoder of an encoder-decoder, which writes what belongs to the text that was read.

Decoder and table of embeddings are the backbone's, so every such task trains them: they are shared parameters. The
head is what Transformers' own `AutoModelForSeq2SeqLM` has beside them, which is no parameter at all in the families of
T5 and BART. With every call it is put together with the backbone; nothing is copied.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .encoder_decoder import insert_backbone, places_of_backbone
from .heads import IGNORE_INDEX
from .language_head import LanguageHead, LanguageLayers
from .task import Task

__all__ = ["Seq2SeqHead", "Seq2SeqLayers"]


class Seq2SeqLayers(LanguageLayers):
    """Transformers' own model over an encoder-decoder, without all that the backbone has."""

    def _prepare(self, model: PreTrainedModel) -> None:
        family = f"seq2seq_lm on {model.config.model_type!r}"
        places = places_of_backbone(model)
        table, inputs = (cast(Any, one).weight for one in (model.get_output_embeddings(), model.get_input_embeddings()))
        within = [parameter for place in places for parameter in model.get_submodule(place).parameters()]
        if table is not inputs and any(parameter is table for parameter in within):
            raise ValueError(
                f"{family}: {type(model).__name__} predicts tokens with a table that its decoder alone has"
            )
        if hasattr(model.config, "router_aux_loss_coef"):
            raise ValueError(f"{family}: {type(model).__name__} has experts, and nothing here would balance their load")
        super()._prepare(model)
        for place in places:
            setattr(model, place, None)
        if own := [name for name, _ in model.named_parameters()]:
            raise ValueError(f"{family}: {type(model).__name__} has parameters beside its decoder: {', '.join(own)}")
        self._other = int(model.config.pad_token_id == 0)  # a token that is no padding
        if not any(True for _ in model.buffers()):
            model._is_hf_initialized = True  # type: ignore[assignment]  # families look for the table in here
        try:
            _shift(model, torch.tensor([[self._other, IGNORE_INDEX]]))
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{family}: the configuration does not say which token a text begins with; set "
                f"decoder_start_token_id and pad_token_id ({error})"
            ) from None

    def _replace_backbone(self, model: PreTrainedModel) -> None:
        """Leave the places empty: the whole backbone comes with each call."""

    def _fill(self, model: PreTrainedModel) -> None:
        super()._fill(model)
        for buffer in model.buffers():  # a bias of the logits, in BART's family
            buffer.zero_()

    def resize(self, size: int) -> None:
        """Make the bias of the logits fit a vocabulary of another size."""
        super().resize(size)
        fit = getattr(self.native, "_resize_final_logits_bias", None)
        if callable(fit):
            fit(size)

    def over(self, backbone: PreTrainedModel, table: Tensor) -> PreTrainedModel:
        """Return Transformers' own model with a backbone, and with the table `[V, E]` that it predicts with."""
        model = self.over_table(table)
        insert_backbone(model, backbone)
        return model

    def decode(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        table: Tensor,
        backbone: PreTrainedModel,
        labels: Tensor | None,
    ) -> Tensor:
        """Return the logits, `[rows, K, V]`, of labels `[rows, K]` (default: one token), each from those before it."""
        if labels is None:
            labels = torch.full((len(hidden), 1), self._other, device=hidden.device)
        model: Any = self.over(backbone, table)
        return model(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden),  # type: ignore[arg-type]
            attention_mask=attention_mask,
            decoder_input_ids=_shift(model, labels),
            use_cache=False,
            return_dict=True,
        ).logits


class Seq2SeqHead(LanguageHead):
    """The next token of a target, from those before it and from the text that the encoder read.

    Labels are `[rows, K]`, int64, the tokens of the targets, -100 behind their end; logits are `[rows, K, V]`.
    """

    layers: Seq2SeqLayers
    layers_type = Seq2SeqLayers

    @staticmethod
    def check(task: Task, backbone_config: PreTrainedConfig) -> None:
        """Raise ValueError for a backbone without a decoder of its own."""
        if not backbone_config.is_encoder_decoder:
            raise ValueError(
                f"task {task.name!r}: seq2seq_lm needs an encoder-decoder, such as T5 or BART; "
                f"{backbone_config.model_type!r} is none, use causal_lm with a decoder"
            )

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        table: Tensor,
        backbone: PreTrainedModel,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Return the logits over the vocabulary.

        Args:
            hidden: `[rows, L, H]`, of the encoder.
            attention_mask: `[rows, L]`, 1 for real tokens; None if all are.
            table: `[V, E]`, the embeddings of the vocabulary.
            backbone: The encoder-decoder.
            labels: `[rows, K]`, the tokens of the targets; None for one token, which is the same for all.

        Returns:
            `[rows, K, V]`.
        """
        return self.layers.decode(hidden, attention_mask, table, backbone, labels)


def _shift(model: Any, labels: Tensor) -> Tensor:
    """Return what a decoder is told: the labels one place to the right, behind the token that every text begins with.

    Raises:
        AttributeError, TypeError, ValueError: The configuration lacks that token, or the one for padding.
    """
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if callable(shift):
        return shift(labels=labels)
    shifted = labels.roll(1, -1)
    shifted[:, 0] = model.config.decoder_start_token_id
    return shifted.masked_fill(shifted == IGNORE_INDEX, model.config.pad_token_id)
