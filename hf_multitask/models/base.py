"""The common part of every sharing scheme: configuration, loading, the forward contract and the loss.

A scheme says how parameters are shared. It implements `encode` and names its shared and its per-task parameters;
everything else (which rows go through the encoder together, heads, losses, saving and loading) is here.

The loss of a batch (or, when the trainer passes `num_items`, of the window the batch belongs to) is

    L_t = (sum of the item losses of task t) / N_t        L = sum over t of share_t * weight_t * L_t

with `N_t` the task's items (rows, or labelled tokens) and `share_t` its fraction of the rows.
"""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import ModelOutput

from .heads import TaskHead, make_head
from .passes import PASS_COST_IN_TOKENS, EncoderPass, Segment, plan_passes
from .task import Task, check_tasks

__all__ = ["MultiTaskConfig", "MultiTaskModel", "MultiTaskOutput"]


class MultiTaskConfig(PreTrainedConfig):
    """Configuration of a multi-task model.

    Args:
        backbone_config: Configuration of the backbone, any that `AutoModel` knows.
        tasks: The tasks as a **list** of dictionaries: a configuration is written with sorted keys, so the order of
            a dictionary, and with it the rows of per-task tables, would be lost.
        pooling: `mean`, `first` or `last`; None takes `last` for a causal decoder and `mean` otherwise.
        head_dropout: Dropout in front of every head that sets none of its own.
        initializer_range: Standard deviation of the heads' initial weights.
    """

    sub_configs_defaults = {"backbone_config": SubConfigSpec(AutoConfig, model_type="bert")}

    backbone_config: PreTrainedConfig | dict | None = None
    tasks: list | None = None
    pooling: str | None = None
    head_dropout: float = 0.1
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the tasks and store them as plain dictionaries."""
        super().__post_init__(**kwargs)
        if not 0.0 <= self.head_dropout < 1.0:
            raise ValueError(f"head_dropout must lie in [0, 1), got {self.head_dropout!r}")
        if self.tasks is not None and not isinstance(self.tasks, (list, tuple)):
            raise ValueError(f"tasks must be a list of tasks, got {type(self.tasks).__name__}")
        self.tasks = [task.to_dict() for task in check_tasks(self.tasks)] if self.tasks else []

    def get_tasks(self) -> list[Task]:
        """Return the tasks as [`Task`] objects, in order."""
        return [Task.from_dict(task) for task in self.tasks or []]

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Return the backbone's configuration: the one with the vocabulary, the width and the special tokens."""
        return self.backbone_config.get_text_config(decoder=decoder, encoder=encoder)


@dataclass
class MultiTaskOutput(ModelOutput):
    """Output of a multi-task model.

    Args:
        loss: Scalar, the weighted sum over tasks, when labels were given.
        task_losses: Scalar per task with labels: its summed item losses over its number of items.
        logits: Per task `[rows, C]`, or `[rows, L, C]` for token-level tasks.
        row_losses: Per task with labels `[rows]`: the summed item losses of each row.
        hidden_states: The backbone's, when asked for.
        attentions: The backbone's, when asked for.
    """

    loss: Tensor | None = None
    task_losses: dict[str, Tensor] | None = None
    logits: dict[str, Tensor] | None = None
    row_losses: dict[str, Tensor] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class MultiTaskModel(PreTrainedModel, ABC):
    """Abstract base of the sharing schemes.

    A scheme implements [`encode`], [`shared_parameters`] and [`task_parameters`]. The last two are disjoint and
    together cover every trainable parameter.
    """

    config_class: type[MultiTaskConfig] = MultiTaskConfig
    # Empty on purpose: a prefix would make `from_pretrained` read the backbone's configuration as ours.
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # The backbone has the last word; PreTrainedModel only asks whether the wrapper stands in the way.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # The loss is normalised by `num_items`, not by Trainer's keyword arguments.
    accepts_loss_kwargs: ClassVar[bool] = False
    # Whether rows that feed several tasks need only one pass of the encoder.
    shares_rows: ClassVar[bool] = True

    def __init__(self, config: MultiTaskConfig, backbone: PreTrainedModel | None = None) -> None:
        """Build the model; `backbone` is used as it is, without it one is made from the configuration."""
        super().__init__(config)
        self.tasks: list[Task] = check_tasks(config.get_tasks())
        if backbone is None:
            options = backbone_options(type(config.backbone_config))
            backbone = AutoModel.from_config(config.backbone_config, **options)
        self.backbone = backbone
        pooling = config.pooling or default_pooling(config.backbone_config)
        width = config.get_text_config().hidden_size
        self.heads = nn.ModuleDict(
            {task.name: make_head(task, width, pooling, config.head_dropout) for task in self.tasks}
        )

    @classmethod
    def from_backbone(
        cls,
        backbone: str | PreTrainedModel,
        tasks: Iterable[Task | dict[str, Any]],
        *,
        backbone_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> MultiTaskModel:
        """Make a multi-task model over a pretrained backbone, with freshly initialised heads.

        Args:
            backbone: A Hub id or folder for `AutoModel.from_pretrained`, or a model in memory, which is copied.
            tasks: The tasks, in order.
            backbone_kwargs: Arguments for `AutoModel.from_pretrained` (`dtype`, `attn_implementation`, ...).
            **options: Fields of the scheme's configuration (`pooling`, `head_dropout`, ...).

        Raises:
            ValueError: A task, an option or the backbone does not fit.

        Example:
            >>> from transformers import BertConfig, BertModel
            >>> bert = BertModel(BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
            >>> from hf_multitask import HardSharingModel
            >>> HardSharingModel.from_backbone(bert, [Task("score", "regression")]).tasks[0].name
            'score'
        """
        tasks = check_tasks(tasks)
        known = inspect.signature(cls.config_class).parameters
        for option in options:
            if option not in known:
                raise ValueError(f"{cls.__name__} has no option {option!r}; options are {', '.join(sorted(known))}")
        if isinstance(backbone, PreTrainedModel):
            # Training must not change the caller's model. `base_model` drops a head, if there is one.
            backbone = copy.deepcopy(backbone.base_model)
            if "add_pooling_layer" in inspect.signature(type(backbone)).parameters:
                backbone.pooler = None
        else:
            kwargs = dict(backbone_kwargs or {})
            backbone_config = kwargs.pop("config", None) or AutoConfig.from_pretrained(backbone)
            kwargs = {**backbone_options(type(backbone_config)), **kwargs, "config": backbone_config}
            backbone = AutoModel.from_pretrained(backbone, **kwargs)
        if backbone.config.is_encoder_decoder:
            raise ValueError(
                f"backbone {type(backbone).__name__} is an encoder-decoder; a {cls.__name__} takes an encoder or a decoder"
            )
        config = cls.config_class(
            backbone_config=backbone.config,
            tasks=[task.to_dict() for task in tasks],
            # Said here because a configuration hands its own setting, None by default, to those inside it.
            attn_implementation=backbone.config._attn_implementation,
            **options,
        )
        for module in backbone.modules():
            module._is_hf_initialized = True  # pretrained: post_init must leave these weights alone
        model = cls(config, backbone)
        model.config.dtype = backbone.dtype
        return model.to(backbone.dtype)

    # ---- what a scheme implements ----

    @abstractmethod
    def encode(self, input_ids: Tensor | None, attention_mask: Tensor | None, **kwargs: Any) -> ModelOutput:
        """Return the backbone's output for some rows; its `last_hidden_state` is `[rows, L, H]`."""

    @abstractmethod
    def shared_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the trainable parameters that more than one task trains."""

    @abstractmethod
    def task_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield the trainable parameters that only the named task trains."""

    # ---- the common forward ----

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        task_ids: Tensor | None = None,
        segments: Mapping[str, Segment] | None = None,
        labels: Mapping[str, Tensor] | None = None,
        num_items: Mapping[str, int | Tensor] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> MultiTaskOutput | tuple:
        """Compute the tasks' logits and, with labels, their losses.

        Args:
            input_ids: `[B, L]` token ids (or `inputs_embeds`, `[B, L, H]`).
            attention_mask: `[B, L]`, 1 for real tokens.
            token_type_ids: `[B, L]`, for backbones that take them.
            position_ids: `[B, L]`, for backbones that take them.
            inputs_embeds: `[B, L, H]` in place of `input_ids`.
            task_ids: `[B]`, index of the task that conditions each row; only conditioned schemes read it.
            segments: Which rows belong to which task. Padding must then be on the right. Without it every task that
                is not auxiliary is computed for all rows, from one pass: the way to serve.
            labels: Per task, the labels of its rows only.
            num_items: Per task, the number of items its summed loss is divided by (default: those in this batch).
            output_hidden_states: Return the backbone's hidden states; forces a single pass.
            output_attentions: Return the backbone's attentions; forces a single pass.
            return_dict: False for a tuple.

        Returns:
            [`MultiTaskOutput`], or a tuple of its fields that are set.
        """
        main = input_ids if input_ids is not None else inputs_embeds
        if main is None:
            raise ValueError("forward needs input_ids or inputs_embeds")
        rows, length = main.shape[:2]
        whole = Segment(0, rows, length)
        tensors = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "task_ids": task_ids,
        }
        # None stays unsaid, so that the configuration's own setting holds.
        extras = {
            key: value
            for key, value in (("output_hidden_states", output_hidden_states), ("output_attentions", output_attentions))
            if value is not None
        }
        wants_internals = any(
            value if value is not None else getattr(self.config, key, False)
            for key, value in (("output_hidden_states", output_hidden_states), ("output_attentions", output_attentions))
        )
        if segments is None:
            segments = {task.name: whole for task in self.tasks if not task.auxiliary or (labels and task.name in labels)}
        cost = PASS_COST_IN_TOKENS["cpu" if main.device.type == "cpu" else "accelerator"]
        passes = (
            [EncoderPass(0, rows, length, tuple(segments))] if wants_internals else plan_passes(segments, cost)
        )
        logits: dict[str, Tensor] = {}
        encoded: ModelOutput | None = None
        for part in passes:
            encoded = self.encode(**_cut(tensors, part), **extras)
            mask = None if attention_mask is None else attention_mask[part.start : part.stop, : part.length]
            for name in part.tasks:
                segment = segments[name]
                own = slice(segment.start - part.start, segment.stop - part.start)
                head = self._head(name)
                logits[name] = head(encoded.last_hidden_state[own], None if mask is None else mask[own])
        logits = {name: logits[name] for name in segments}
        loss, task_losses, row_losses = self._losses(logits, labels, num_items)
        output = MultiTaskOutput(
            loss=loss,
            task_losses=task_losses,
            logits=logits,
            row_losses=row_losses,
            hidden_states=encoded.get("hidden_states") if encoded is not None else None,
            attentions=encoded.get("attentions") if encoded is not None else None,
        )
        return_dict = return_dict if return_dict is not None else self.config.return_dict
        return output if return_dict else output.to_tuple()

    def _head(self, name: str) -> TaskHead:
        if name not in self.heads:
            raise ValueError(f"task {name!r} is not one of this model's: {', '.join(self.heads)}")
        return self.heads[name]

    def _losses(
        self,
        logits: dict[str, Tensor],
        labels: Mapping[str, Tensor] | None,
        num_items: Mapping[str, int | Tensor] | None,
    ) -> tuple[Tensor | None, dict[str, Tensor] | None, dict[str, Tensor] | None]:
        if labels is None:
            return None, None, None
        unknown = [name for name in labels if name not in logits]
        if unknown:
            raise ValueError(f"labels of {unknown} came without their rows; rows came for {list(logits)}")
        row_losses = {name: self._head(name).row_losses(logits[name], labels[name]) for name in labels}
        task_losses = {}
        for name, losses in row_losses.items():
            if num_items is not None and name in num_items:
                items: int | Tensor = num_items[name]
            else:
                items = self._head(name).row_items(labels[name]).sum()
            # A task whose rows hold no labelled item has a loss of 0, not of 0 / 0.
            items = items.clamp(min=1) if isinstance(items, Tensor) else max(items, 1)
            task_losses[name] = losses.sum() / items
        weights = {task.name: task.weight for task in self.tasks}
        total = sum(len(losses) for losses in row_losses.values())
        loss = sum(
            (len(row_losses[name]) / total * weights[name] * task_loss for name, task_loss in task_losses.items()),
            start=torch.zeros((), device=next(iter(logits.values())).device) if not task_losses else 0.0,
        )
        return loss, task_losses, row_losses

    # ---- PreTrainedModel's contracts ----

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise the layers of the heads; the backbone initialises its own."""
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        """Return the backbone's input embeddings."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the backbone's input embeddings."""
        self.backbone.set_input_embeddings(value)


def _cut(tensors: dict[str, Tensor | None], part: EncoderPass) -> dict[str, Any]:
    """Return views of the tensors' rows and first tokens that belong to one pass."""
    views: dict[str, Any] = {}
    for key, value in tensors.items():
        if value is None:
            continue
        views[key] = value[part.start : part.stop]
        if value.dim() > 1 and value.shape[1] != part.length:
            views[key] = views[key][:, : part.length]
    return views


def backbone_options(config_class: type[PreTrainedConfig]) -> dict[str, bool]:
    """Return `add_pooling_layer=False` for backbones that have such a layer: nothing here would train it."""
    model_class = MODEL_MAPPING.get(config_class, None)
    if isinstance(model_class, (list, tuple)):
        model_class = model_class[0]
    if model_class is not None and "add_pooling_layer" in inspect.signature(model_class).parameters:
        return {"add_pooling_layer": False}
    return {}


def default_pooling(config: PreTrainedConfig) -> str:
    """Return `last` for a causal decoder, whose last token alone has read the whole text, else `mean`."""
    model_type = config.get_text_config().model_type
    causal_only = (
        model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )
    return "last" if causal_only or getattr(config, "is_decoder", False) else "mean"
