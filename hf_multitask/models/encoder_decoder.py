"""Encoder-decoders as backbones: which module is what, and an encoder-decoder without its decoder.

Families differ in where their language model keeps the backbone. BART's holds it whole, under a name; T5's holds the
backbone's parts, the table of embeddings, the encoder and the decoder, as its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel

__all__ = ["as_backbone", "decoder_parameters", "drop_decoder", "insert_backbone", "places_of_backbone"]


def places_of_backbone(model: PreTrainedModel) -> tuple[str, ...]:
    """Return under which names a language model has its backbone: one, or one for each of the backbone's parts."""
    if model.base_model_prefix in model._modules:
        return (model.base_model_prefix,)
    with torch.device("meta"):
        whole = AutoModel.from_config(model.config)
    return tuple(name for name, _ in whole.named_children())


def insert_backbone(model: PreTrainedModel, backbone: nn.Module) -> None:
    """Put a backbone where a language model has its own."""
    if model.base_model_prefix in model._modules:
        model._modules[model.base_model_prefix] = backbone
    else:
        model._modules.update(backbone._modules)


def as_backbone(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model that `AutoModel` has for an encoder-decoder, made of the parts of this one, with a head or not.

    Raises:
        ValueError: `AutoModel` has none, or a part is missing.
    """
    name = type(model).__name__
    if type(model.config) not in AutoModel._model_mapping:
        raise ValueError(f"backbone {model.config.model_type!r} is an encoder-decoder that AutoModel does not know")
    with torch.device("meta"):
        backbone: Any = AutoModel.from_config(model.config)
    if isinstance(model, type(backbone)):
        return model
    for part in backbone._modules:
        if part not in model._modules:
            raise ValueError(
                f"backbone {model.config.model_type!r} is an encoder-decoder, and {name} has no {part!r}; give the "
                f"whole model, a {type(backbone).__name__}"
            )
        backbone._modules[part] = model._modules[part]
    backbone.config = model.config
    return backbone.train(model.training)


class _NoDecoder(nn.Module):
    """Stands where a decoder was, and takes no embeddings."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not isinstance(value, nn.Module):
            super().__setattr__(name, value)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Let the embeddings go."""


def drop_decoder(backbone: PreTrainedModel) -> None:
    """Take the decoder out of an encoder-decoder, where no task writes."""
    decoder = backbone.get_decoder()
    name = next(name for name, module in backbone._modules.items() if module is decoder)
    setattr(backbone, name, _NoDecoder())
    tied: Any = backbone._tied_weights_keys
    if isinstance(tied, dict):
        tied = {a: b for a, b in tied.items() if not any(key.startswith(f"{name}.") for key in (a, b))}
        backbone._tied_weights_keys = tied
        backbone.all_tied_weights_keys = backbone.get_expanded_tied_weights_keys(all_submodels=True)


def decoder_parameters(backbone: PreTrainedModel) -> list[nn.Parameter]:
    """Return the parameters of an encoder-decoder that texts go through only when they are written."""
    encoder, decoder, embeddings = backbone.get_encoder(), backbone.get_decoder(), backbone.get_input_embeddings()
    read = {id(parameter) for module in (encoder, embeddings) for parameter in module.parameters()}
    return [parameter for parameter in decoder.parameters() if id(parameter) not in read]
