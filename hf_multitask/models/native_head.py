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
    AutoModel,
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

__all__ = ["AUTO_CLASSES", "GivenHidden", "NativeLayers", "native_config", "native_model", "shallow_copy"]

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
    # Two is the number of labels that Transformers' own models for choices and spans are built with.
    unnamed = 2 if task.type is TaskType.MULTIPLE_CHOICE else task.num_outputs
    names = task.labels or [f"LABEL_{number}" for number in range(unnamed)]
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    if task.type in _PROBLEMS:
        config.problem_type = task.type.value  # type: ignore[assignment]
    return config


def native_model(task: Task, backbone_config: PreTrainedConfig) -> PreTrainedModel:
    """Return a new model of Transformers' own class for a task over a backbone.

    Raises:
        ValueError: Transformers has no such model for the backbone.
    """
    auto = AUTO_CLASSES[task.type]
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


# Where a backbone keeps the activation behind a pooler that is a linear layer.
_ACTIVATIONS = ("pooler_activation", "activation")
# Families whose pooler does not read the hidden states that the backbone returns.
_OTHER_POOLERS = {"canine": "hidden states of groups of characters, not those of the characters"}

AUTO_CLASSES: dict[TaskType, Any] = {
    **dict.fromkeys(_PROBLEMS, AutoModelForSequenceClassification),
    TaskType.TOKEN_CLASSIFICATION: AutoModelForTokenClassification,
    TaskType.QUESTION_ANSWERING: AutoModelForQuestionAnswering,
    TaskType.MULTIPLE_CHOICE: AutoModelForMultipleChoice,
    TaskType.MASKED_LM: AutoModelForMaskedLM,
    TaskType.CAUSAL_LM: AutoModelForCausalLM,
    TaskType.SEQ2SEQ_LM: AutoModelForSeq2SeqLM,
}
"""Transformers' auto class by task type."""


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
        # A pooler that is a plain linear layer (ALBERT, BigBird) has its activation next to it.
        names = _ACTIVATIONS if isinstance(pooler, nn.Linear) else ()
        self.activation = next((getattr(backbone, name) for name in names if hasattr(backbone, name)), None)
        self.hidden = PassLocal()
        self.replaced = type(backbone)

    @property
    def decoder(self) -> GivenHidden:
        """The part of the backbone that some families call in its place."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Return the hidden states that were given."""
        hidden = cast(Tensor, self.hidden.value)
        return _HiddenOutput(last_hidden_state=hidden, pooler_output=self._pool(hidden))  # type: ignore[arg-type]

    def _pool(self, hidden: Tensor) -> Tensor | None:
        pooler: Any = getattr(self, "pooler", None)
        if pooler is None:
            return None
        if self.activation is None:
            return pooler(hidden)
        return self.activation(pooler(hidden[:, 0]))


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
        self._pad = getattr(backbone_config.get_text_config(), "pad_token_id", None) or 0
        self._is_choice = task.type is TaskType.MULTIPLE_CHOICE
        if outer.type != "meta" and not task.type.is_language:
            self._check_inputs(task, backbone_config.get_text_config())

    @torch.no_grad()
    def _check_inputs(self, task: Task, config: PreTrainedConfig) -> None:
        """Run the head on a few tokens, and check that it depends on hidden states and the mask alone.

        The hidden states are computed once for all tasks, as `AutoModel` does. A family whose model for the task runs
        its backbone in another way (Longformer's has global attention where the task wants it) or looks at the token
        ids (BigBird's for questions) would give other logits than the model that is exported.

        Raises:
            ValueError: It depends on more, or does not run at all.
        """
        model = cast(Any, self.native)
        name = f"task {task.name!r}: {type(model).__name__} of {config.model_type!r} cannot be a head 'native'"
        backbone = getattr(model, model.base_model_prefix, None)
        whole = AutoModel._model_mapping.get(type(model.config), None)
        if not isinstance(backbone, GivenHidden) or (whole is not None and backbone.replaced is not _classes(whole)[0]):
            raise ValueError(f"{name}: it is not built on the backbone that AutoModel loads; use 'mlp' or 'linear'")
        pooler, reads = getattr(backbone, "pooler", None), _OTHER_POOLERS.get(config.model_type)
        if pooler is not None and reads is not None:
            raise ValueError(f"{name}: its pooler reads {reads}; use 'mlp' or 'linear'")
        if isinstance(pooler, nn.Linear) and backbone.activation is None:
            raise ValueError(f"{name}: nothing says which activation follows its pooler; use 'mlp' or 'linear'")
        device = next(self.parameters()).device
        mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3], device=device)
        hidden = torch.linspace(-50, 50, 16 * config.hidden_size, device=device).sin().view(2, 8, config.hidden_size)
        special = [getattr(config, f"{kind}_token_id", None) for kind in ("cls", "bos", "sep", "eos", "mask")]
        others = [number for number in dict.fromkeys([*special, 0, 1, 2, 3, 4, 5, 6, 7, 8]) if type(number) is int]
        others = [number for number in others if number != self._pad][:8]
        fills = torch.full((8,), self._pad + 1, device=device), torch.tensor(others, device=device)
        calls: list[tuple[Any, Any]] = []
        hook = backbone.register_forward_pre_hook(lambda _, args, named: calls.append((args, named)), with_kwargs=True)
        training = self.training
        self.eval()
        try:
            tokens = [torch.where(mask.bool(), fill, self._pad) for fill in fills]
            plain, other = (self._run(hidden, mask, ids) for ids in tokens)
        except Exception as error:  # each family's code fails in its own way
            raise ValueError(f"{name}: {type(error).__name__}: {error}; use 'mlp' or 'linear'") from error
        finally:
            hook.remove()
            self.train(training)
        of_tokens = task.type in (TaskType.TOKEN_CLASSIFICATION, TaskType.QUESTION_ANSWERING)
        outputs = 1 if self._is_choice else task.num_outputs
        if plain.shape != ((2, 8, outputs) if of_tokens else (2, outputs)):
            raise ValueError(f"{name}: its logits have the shape {list(plain.shape)}; use 'mlp' or 'linear'")
        if not torch.equal(plain, other):
            raise ValueError(f"{name}: it reads the token ids in addition to hidden states; use 'mlp' or 'linear'")
        for (args, named), ids in zip(calls, tokens, strict=False):
            given = {**{f"argument {place}": value for place, value in enumerate(args)}, **named}
            for key, value in given.items():
                if isinstance(value, Tensor):
                    known = value.numel() == mask.numel() and any(
                        torch.equal(value.reshape(-1), own.reshape(-1)) for own in (ids, mask)
                    )
                else:
                    known = value is None or isinstance(value, bool)
                if not known:
                    raise ValueError(
                        f"{name}: it hands its backbone {key}, which other tasks do not want; use 'mlp' or 'linear'"
                    )
        if len(calls) != len(tokens):
            raise ValueError(f"{name}: it runs its backbone {len(calls) // 2} times; use 'mlp' or 'linear'")

    def _prepare(self, model: PreTrainedModel) -> None:
        """Change the whole model, before its backbone is taken out and memory is taken for its parameters."""

    def _replace_backbone(self, model: PreTrainedModel) -> None:
        """Put what is told the hidden states in the place of the backbone."""
        backbone = getattr(model, model.base_model_prefix, None)
        if backbone is not None:
            setattr(model, model.base_model_prefix, GivenHidden(backbone))

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
        return self._run(hidden, attention_mask, tokens)

    def _run(self, hidden: Tensor, attention_mask: Tensor, tokens: Tensor) -> Tensor:
        model = cast(Any, self.native)
        if self._is_choice:  # each row is the only choice of its set
            tokens, attention_mask = tokens.unsqueeze(1), attention_mask.unsqueeze(1)
        with getattr(model, model.base_model_prefix).hidden.use(hidden):
            output = model(input_ids=tokens, attention_mask=attention_mask, return_dict=True)
        if "start_logits" in output:
            return torch.stack([output.start_logits, output.end_logits], dim=-1)
        return output.logits


def _classes(mapped: Any) -> tuple[type, ...]:
    """Return the classes that an auto class has for a configuration, the one that it takes by itself first."""
    return tuple(mapped) if isinstance(mapped, (list, tuple)) else (mapped,)


def shallow_copy(module: Any) -> Any:
    """Return a copy of a module that shares parameters and submodules, and may be given others."""
    result = copy.copy(module)
    for table in ("_parameters", "_buffers", "_modules"):
        result.__dict__[table] = dict(module.__dict__[table])
    return result
