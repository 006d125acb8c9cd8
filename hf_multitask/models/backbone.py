"""Pretrained backbones: loading one, and what a multi-task model has to know about it."""

from __future__ import annotations

import copy
import hashlib
import inspect
import os
import sys
import threading
import types
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import CONFIG_NAME, logging

from .encoder_decoder import as_backbone
from .saved_config import HUB_OPTIONS

__all__ = [
    "CONFIG_OPTIONS",
    "HUB_OPTIONS",
    "USE_ADAPTER_MODEL",
    "adopt_backbone",
    "align_memory",
    "backbone_options",
    "cast_parameters",
    "check_no_peft",
    "check_source",
    "check_supported",
    "default_pooling",
    "is_causal",
    "isolate_rotary_embeddings",
    "learned_positions",
    "load_backbone",
    "load_quietly",
    "sharding_units",
    "usable_positions",
    "weights_hash",
]

logger = logging.get_logger(__name__)

# What says which configuration a checkpoint has.
CONFIG_OPTIONS = (*HUB_OPTIONS, "gguf_file")

# Families without a masked language model that read in both directions all the same, unless told to be decoders.
_BIDIRECTIONAL = ("bert-generation", "cpmant", "xlnet")

# Families whose hidden states are not `hidden_size` wide: Reformer joins the two streams of its reversible layers.
_WIDE = ("reformer",)

# Families whose layers keep the state of the last input.
_RECURRENT = ("recurrent_gemma",)

_QUIET = threading.RLock()  # the verbosity is the whole process's: two threads would restore each other's

_ALIGNMENT = 64  # bytes; what torch gives to the tensors it allocates


USE_ADAPTER_MODEL = (
    "to train LoRA use AdapterModel, which trains the heads with it and saves both (rank=0, shared_rank=8 is one LoRA "
    "for all tasks); to keep what an adapter of PEFT has learned, merge it into its model first, with "
    "merge_and_unload() of the PeftModel"
)


def check_source(source: Any) -> None:
    """Check what is given as a backbone, before anything is loaded.

    Raises:
        ValueError: It is neither a name nor a model of Transformers; or it is an adapter of PEFT, or wrapped by PEFT.
    """
    if isinstance(source, PreTrainedModel):
        return
    if not isinstance(source, (str, os.PathLike)):
        advice = USE_ADAPTER_MODEL if type(source).__module__.partition(".")[0] == "peft" else "give one of these"
        raise ValueError(
            f"backbone must be a Hub id, a folder or a PreTrainedModel, got {type(source).__name__}; {advice}"
        )
    if Path(source, "adapter_config.json").is_file() and not Path(source, CONFIG_NAME).is_file():
        raise ValueError(
            f"backbone {str(source)!r} holds an adapter of PEFT and no model: give the model that it belongs to; "
            f"{USE_ADAPTER_MODEL}"
        )


def check_no_peft(model: nn.Module, what: str) -> None:
    """Check that PEFT has put no adapters into a model, in place of its layers.

    Their names are not those that the configuration describes, so that a saved folder would not load, and Transformers
    and PEFT save them without the heads.

    Args:
        model: The model.
        what: What is to be done with it, for the message: "a backbone", "training".

    Raises:
        ValueError: There are some; the first is named.
    """
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # where it was not imported there are none
    if tuners is None:
        return
    for name, module in model.named_modules():
        if isinstance(module, tuners.BaseTunerLayer):
            raise ValueError(f"{name!r} has an adapter of PEFT, which {what} cannot have; {USE_ADAPTER_MODEL}")


def check_supported(config: PreTrainedConfig) -> None:
    """Check that a backbone computes the same for an input whatever it has read before, in states that heads can read.

    Raises:
        ValueError: A forward pass of the family changes the model, so that answers would depend on earlier inputs and
            on other threads; or its hidden states are not `hidden_size` wide.
    """
    family = config.model_type
    if getattr(config, "attention_type", None) == "block_sparse":
        raise ValueError(
            f"backbone {family!r} has attention_type='block_sparse', with which the first short input switches the "
            "model to full attention for all later ones; load it with AutoModel.from_pretrained(..., "
            "attention_type='original_full') and give the model as backbone"
        )
    if family == "rwkv" and config.rescale_every > 0:
        raise ValueError(
            f"backbone {family!r} has rescale_every={config.rescale_every}, with which it divides its own weights in "
            "evaluation, and a model saved then is another; load it with AutoModel.from_pretrained(..., "
            "rescale_every=0) and give the model as backbone"
        )
    if family in _RECURRENT:
        raise ValueError(
            f"backbone {family!r} keeps the state of the last input in its layers, where other threads read it; take "
            "another backbone"
        )
    if family in _WIDE:
        raise ValueError(
            f"backbone {family!r} gives hidden states of another width than its hidden_size={config.hidden_size}, "
            "which heads and sharing schemes are built for; take another backbone"
        )


def isolate_rotary_embeddings(model: nn.Module) -> None:
    """Let rotary embeddings that adapt to the length of an input adapt in that pass only.

    Those of rope types `dynamic` and `longrope` write their frequencies on the module: the longest input so far would
    change later answers, and two threads would get each other's frequencies.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        named = kinds.values() if isinstance(kinds, Mapping) else [kinds]
        if any("dynamic" in str(kind) or kind == "longrope" for kind in named):
            module.forward = types.MethodType(_forward_on_a_copy, module)


def _forward_on_a_copy(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a module's forward on a shallow copy with buffers of its own."""
    own: Any = copy.copy(self)
    own.__dict__.pop("forward")
    own._buffers = {name: None if buffer is None else buffer.clone() for name, buffer in self._buffers.items()}
    return own.forward(*args, **kwargs)


def _check_implementations(config: Any, options: Mapping[str, Any], source: str) -> None:
    """Raise ValueError where a backbone's configuration asks for a kernel from the Hub; its caller may ask for one."""
    for name in ("attn_implementation", "experts_implementation"):
        found = getattr(config, f"_{name}", None)
        named = found.values() if isinstance(found, Mapping) else [found]
        if name not in options and any("/" in str(one) or ":" in str(one) for one in named):
            raise ValueError(
                f"backbone {source!r}: its configuration asks for {name}={found!r}, which is code on the Hub; give it "
                "yourself if you trust it"
            )


def load_backbone(source: str | PreTrainedModel, *, encoder_decoder: bool = False, **kwargs: Any) -> PreTrainedModel:
    """Load a backbone, or copy one that is in memory, without its pooling layer or head.

    Args:
        source: A Hub id or folder, or a model; a model with a head gives its `base_model`.
        encoder_decoder: Whether it may be an encoder-decoder.
        **kwargs: Arguments of `AutoModel.from_pretrained`; not used for a model in memory.

    Raises:
        ValueError: The backbone is an encoder-decoder and should be none; it is no model, or has adapters of PEFT.
    """
    check_source(source)
    if isinstance(source, PreTrainedModel):
        # Training must not change the caller's model.
        backbone: Any = copy.deepcopy(source.base_model)
        if "add_pooling_layer" in inspect.signature(type(backbone)).parameters:
            backbone.pooler = None
        config = backbone.config
    else:
        where = {key: kwargs[key] for key in CONFIG_OPTIONS if key in kwargs}
        config = kwargs.pop("config", None) or AutoConfig.from_pretrained(source, **where)
    if config.is_encoder_decoder and not encoder_decoder:
        raise ValueError(
            f"backbone {config.model_type!r} is an encoder-decoder; give an encoder or a decoder, or share it with "
            "HardSharingModel"
        )
    if not isinstance(source, PreTrainedModel):
        options = {**backbone_options(type(config)), **kwargs}
        backbone, fresh = load_quietly(AutoModel, source, config, options)
        adopt_backbone(backbone, str(source), fresh)
    else:
        backbone = as_backbone(backbone) if config.is_encoder_decoder else backbone
        adopt_backbone(backbone)
    return backbone


def load_quietly(
    auto: Any, source: str, config: PreTrainedConfig, options: dict[str, Any]
) -> tuple[PreTrainedModel, set[str]]:
    """Load a model by one of Transformers' auto classes; return it, and the names of what its checkpoint lacked.

    What a checkpoint has too much (a pooler, a head) is no news.

    Raises:
        ValueError: Its configuration asks for code on the Hub.
    """
    _check_implementations(config, options, str(source))
    with _QUIET:
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            model, info = auto.from_pretrained(source, config=config, output_loading_info=True, **options)
        finally:
            logging.set_verbosity(verbosity)
    return model, {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}


def adopt_backbone(backbone: PreTrainedModel, source: str = "", fresh: Collection[str] = ()) -> None:
    """Make a loaded backbone ready to be a part of a multi-task model, and report what its checkpoint lacked."""
    if fresh:
        logger.warning(
            f"{source} has no weights for {sorted(fresh)} of {type(backbone).__name__}: they start at random"
        )
    check_no_peft(backbone, "a backbone")
    modules: Any = backbone.modules()
    for module in modules:
        module._is_hf_initialized = True  # pretrained: the wrapper's post_init must leave these weights alone
    align_memory(backbone)


def align_memory(model: PreTrainedModel) -> None:
    """Move parameters on the CPU that lie across a 64-byte line to memory of their own.

    Safetensors files are mapped into memory as they are, and matrix products on a CPU can differ in the last bit
    with the alignment of their operands. Aligned, a model that was just trained and the same model loaded from disk
    agree bit for bit.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % _ALIGNMENT:
            with torch.no_grad():
                parameter.data = parameter.data.clone()


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Change the dtype of a model's parameters, as loading does.

    Buffers stay: frequencies of rotary positions are in float32 whatever the model's dtype.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def weights_hash(model: nn.Module) -> str:
    """Return the SHA-256, in hexadecimal, of a model's tensors: names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def learned_positions(model: nn.Module) -> tuple[int, int | None]:
    """Return the position of the first token, and the size of the table of positions; 0 and None without a table."""
    for name, module in model.named_modules():
        if name.endswith(("position_embeddings", "wpe")) and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1, module.num_embeddings
    return 0, None


def usable_positions(model: nn.Module) -> int | None:
    """Return the longest input in tokens that a model has positions for, or None without such a limit.

    Families after RoBERTa count positions from behind their padding id, so that many of the table's rows are never
    reached.
    """
    first, size = learned_positions(model)
    if size is not None:
        return size - first
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[operator,union-attr]
    return positions if positions is not None and positions > 0 else None  # XLNet, which has no limit, says -1


def backbone_options(config_class: type[PreTrainedConfig]) -> dict[str, bool]:
    """Return `add_pooling_layer=False` for backbones that have such a layer: nothing here would train it."""
    model_class: Any = MODEL_MAPPING.get(config_class, None)
    if isinstance(model_class, (list, tuple)):
        model_class = model_class[0]
    if model_class is not None and "add_pooling_layer" in inspect.signature(model_class).parameters:
        return {"add_pooling_layer": False}
    return {}


def is_causal(config: PreTrainedConfig) -> bool:
    """Return whether each token of a backbone sees only those before it; what an encoder reads never does."""
    if config.is_encoder_decoder:
        return False
    model_type = config.get_text_config().model_type
    known = *MODEL_FOR_MASKED_LM_MAPPING_NAMES, *_BIDIRECTIONAL
    causal_only = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in known
    return causal_only or bool(getattr(config, "is_decoder", False))


def default_pooling(config: PreTrainedConfig) -> str:
    """Return `last` for a causal decoder, whose last token alone has read the whole text, else `mean`."""
    return "last" if is_causal(config) else "mean"


def sharding_units(model: PreTrainedModel) -> list[str]:
    """Return the class names of the modules that FSDP takes as units of their own: the layers, as the backbone says.

    What holds the input embeddings is left out although backbones like BERT name it (it must not be split over
    devices): Accelerate makes a unit of the embeddings themselves, and units cannot lie in units that share parameters.
    """
    embeddings = model.get_input_embeddings()
    found = {type(module).__name__ for module in model.modules()}
    holders = {type(module).__name__ for module in model.modules() if embeddings in module.modules()}
    return sorted((set(model._no_split_modules or ()) & found) - holders)
