"""Loading a backbone together with what its checkpoint has for predicting tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from .backbone import CONFIG_OPTIONS, adopt_backbone, check_source, load_backbone, load_quietly
from .encoder_decoder import as_backbone, places_of_backbone
from .task_type import TaskType

__all__ = ["LanguageParts", "load_language_model"]

_AUTO: dict[TaskType, Any] = {
    TaskType.MASKED_LM: AutoModelForMaskedLM,
    TaskType.CAUSAL_LM: AutoModelForCausalLM,
    TaskType.SEQ2SEQ_LM: AutoModelForSeq2SeqLM,
}


@dataclass(frozen=True)
class LanguageParts:
    """What a pretrained language model has beside its backbone.

    Args:
        layers: The tensors of its head, by their names in Transformers' own model.
        table: `[V, E]`, the table that it predicts with; None where it is not known.
        untied: Whether that is another table than the one of the input embeddings, whatever the configuration says.
        generation: The settings of `generate` that came with the checkpoint.
    """

    layers: dict[str, Tensor] = field(default_factory=dict)
    table: Tensor | None = None
    untied: bool = False
    generation: dict[str, Any] | None = None


def load_language_model(
    source: str | PreTrainedModel, task_type: TaskType, **kwargs: Any
) -> tuple[PreTrainedModel, LanguageParts]:
    """Load a backbone, or copy one that is in memory, and the language model's head where there is one.

    Args:
        source: A Hub id or folder, or a model, with or without a head.
        task_type: `masked_lm`, `causal_lm` or `seq2seq_lm`.
        **kwargs: Arguments of `from_pretrained`; not used for a model in memory.

    Raises:
        ValueError: Transformers has no such language model for the backbone.
    """
    check_source(source)
    auto, writes = _AUTO[task_type], task_type is TaskType.SEQ2SEQ_LM
    if isinstance(source, PreTrainedModel):
        backbone = load_backbone(source, encoder_decoder=writes)
        if not isinstance(source, auto._model_mapping.get(type(source.config), ())):
            return backbone, LanguageParts()
        return backbone, _parts(source, set())
    where = {key: kwargs[key] for key in CONFIG_OPTIONS if key in kwargs}
    config = kwargs.pop("config", None) or AutoConfig.from_pretrained(source, **where)
    if type(config) not in auto._model_mapping or config.is_encoder_decoder != writes:
        # The head says what is wrong; without a head the backbone alone is loaded.
        return load_backbone(source, encoder_decoder=writes, config=config, **kwargs), LanguageParts()
    model, fresh = load_quietly(auto, source, config, kwargs)
    parts = _parts(model, fresh)
    backbone = cast(PreTrainedModel, model.base_model)
    prefix = "" if backbone is model else f"{model.base_model_prefix}."
    backbone = as_backbone(backbone) if writes else backbone
    adopt_backbone(backbone, str(source), {name.removeprefix(prefix) for name in fresh if name.startswith(prefix)})
    return backbone, parts


def _parts(model: PreTrainedModel, fresh: set[str]) -> LanguageParts:
    """Return what a language model has beside its backbone, but for tensors that its checkpoint lacked."""
    output: Any = model.get_output_embeddings()
    path = next(name for name, module in model.named_modules() if module is output)
    prefix = tuple(f"{place}." for place in places_of_backbone(model))
    layers = {
        name: value.detach().clone()
        for name, value in model.state_dict().items()
        if not name.startswith(prefix) and name != f"{path}.weight" and name not in fresh
    }
    # Of a head that the checkpoint lacks, a bias that is tied to another may count as present: it is no head.
    if any(name.endswith(".weight") for name in fresh if not name.startswith(prefix) and name != f"{path}.weight"):
        layers = {}
    table = None if f"{path}.weight" in fresh else output.weight.detach().clone()
    inputs: Any = model.get_input_embeddings()
    untied = table is not None and output.weight is not inputs.weight
    settings: Any = model.generation_config if model.can_generate() else None
    generation = None if settings is None else settings.to_diff_dict()
    if generation is not None:
        generation = {k: v for k, v in generation.items() if not k.startswith("_") and k != "transformers_version"}
    return LanguageParts(layers, table, untied, generation)
