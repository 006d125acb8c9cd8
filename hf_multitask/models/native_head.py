"""The heads that Transformers itself puts on a backbone, so that an exported task loads without this library.

Tasks over the vocabulary always have them, see [`hf_multitask.models.language_head`] and its sister for `seq2seq_lm`.

`AutoModelForSequenceClassification` and its sisters for tokens, spans and choices give each family a head of its own
(BERT has a tanh pooler in front, RoBERTa two layers on the first token, ModernBERT a norm, decoders the last token). A
[`NativeLayers`] holds such a model without its backbone: in the backbone's place stands a module that returns the
hidden states which the multi-task model has computed already.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from .pass_local import PassLocal
from .task import Task, TaskType

__all__ = ["GivenHidden", "NativeLayers", "native_config", "native_model", "shallow_copy"]

_PROBLEMS = (
    TaskType.SINGLE_LABEL_CLASSIFICATION,
    TaskType.MULTI_LABEL_CLASSIFICATION,
    TaskType.REGRESSION,
)


def native_config(task: Task, backbone_config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the backbone's configuration with the labels of a task, as a plain model for the task has it."""
    config = copy.deepcopy(backbone_config)
    if task.type.is_language:
        return config
    names = task.labels or [f"LABEL_{number}" for number in range(task.num_outputs)]
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    if task.type in _PROBLEMS:
        config.problem_type = task.type.value  # type: ignore[assignment]
    return config


def native_model(task: Task, backbone_config: PreTrainedConfig) -> PreTrainedModel:
    """Return a new model of Transformers' own class for a task over a backbone.

    Raises:
        ValueError: Transformers has no such model for the task's type or for the backbone.
    """
    auto: Any = {
        TaskType.TOKEN_CLASSIFICATION: AutoModelForTokenClassification,
        TaskType.QUESTION_ANSWERING: AutoModelForQuestionAnswering,
        TaskType.MULTIPLE_CHOICE: AutoModelForMultipleChoice,
        TaskType.MASKED_LM: AutoModelForMaskedLM,
        TaskType.CAUSAL_LM: AutoModelForCausalLM,
        TaskType.SEQ2SEQ_LM: AutoModelForSeq2SeqLM,
    }.get(task.type)
    if task.type in _PROBLEMS:
        auto = AutoModelForSequenceClassification
    elif auto is None:
        raise ValueError(f"task {task.name!r}: head 'native' is not there for {task.type}; take 'mlp' or 'linear'")
    if backbone_config.is_encoder_decoder and not task.type.is_language:
        raise ValueError(
            f"task {task.name!r}: what Transformers itself puts on the encoder-decoder {backbone_config.model_type!r} "
            "reads its decoder, so there is no head 'native'; take 'mlp' or 'linear'"
        )
    if type(backbone_config) not in auto._model_mapping:
        raise ValueError(
            f"task {task.name!r}: {auto.__name__} knows no {backbone_config.model_type!r}, so there is no head "
            "'native'; take 'mlp' or 'linear'"
        )
    return auto.from_config(native_config(task, backbone_config))


class _HiddenOutput(BaseModelOutputWithPoolingAndCrossAttentions):
    """What a backbone returns; of all that single families ask for beside it (`router_logits`, ...) there is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class GivenHidden(nn.Module):
    """Stands where the backbone was, and returns hidden states that were computed elsewhere."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        pooler = getattr(backbone, "pooler", None)
        if isinstance(pooler, nn.Module):
            self.pooler = pooler
        self.hidden = PassLocal()

    @property
    def decoder(self) -> GivenHidden:
        """The part of the backbone that some families call in its place."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Return the hidden states that were given."""
        hidden = cast(Tensor, self.hidden.value)
        pooler = getattr(self, "pooler", None)
        return _HiddenOutput(
            last_hidden_state=hidden,  # type: ignore[arg-type]
            pooler_output=pooler(hidden) if pooler is not None else None,
        )


class NativeLayers(nn.Module):
    """A model of Transformers' own for a task, without the backbone.

    Args:
        task: The task.
        backbone_config: The backbone's configuration.
    """

    def __init__(self, task: Task, backbone_config: PreTrainedConfig) -> None:
        super().__init__()
        outer = torch.empty(0).device  # `meta` where a checkpoint is going to fill all parameters in
        with torch.device("meta"):  # the backbone in it is not needed, and may be large
            model = native_model(task, backbone_config)
        self._prepare(model)
        self._replace_backbone(model)
        if outer.type != "meta":
            model.to_empty(device=outer)
            self._fill(model)
        self.native = model
        self._pad = backbone_config.get_text_config().pad_token_id or 0
        self._is_choice = task.type is TaskType.MULTIPLE_CHOICE

    def _prepare(self, model: PreTrainedModel) -> None:
        """Change the whole model, before its backbone is taken out and memory is taken for its parameters."""

    def _replace_backbone(self, model: PreTrainedModel) -> None:
        """Put what is told the hidden states in the place of the backbone."""
        setattr(model, model.base_model_prefix, GivenHidden(getattr(model, model.base_model_prefix)))

    def _fill(self, model: PreTrainedModel) -> None:
        """Give the parameters their first values, in memory that holds anything."""
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()

    def forward(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return the logits, `[B, C]` or `[B, L, C]`, of hidden states `[B, L, H]`; of choices `[B, 1]`."""
        if attention_mask is None:
            attention_mask = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        # Decoders look for the last token that is not padding; which other token it is makes no difference.
        tokens = torch.where(attention_mask.bool(), self._pad + 1, self._pad)
        model = cast(Any, self.native)
        if self._is_choice:  # each row is the only choice of its set
            tokens, attention_mask = tokens.unsqueeze(1), attention_mask.unsqueeze(1)
        with getattr(model, model.base_model_prefix).hidden.use(hidden):
            output = model(input_ids=tokens, attention_mask=attention_mask, return_dict=True)
        if "start_logits" in output:
            return torch.stack([output.start_logits, output.end_logits], dim=-1)
        return output.logits


def shallow_copy(module: Any) -> Any:
    """Return a copy of a module that shares parameters and submodules, and may be given others."""
    result = copy.copy(module)
    for table in ("_parameters", "_buffers", "_modules"):
        result.__dict__[table] = dict(module.__dict__[table])
    return result
