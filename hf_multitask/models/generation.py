"""Writing text: a task's language model, put together for `generate` from the parts that a multi-task model has.

Transformers' own `generate` runs on Transformers' own model class. For one task that class is there already, as the
head (see [`hf_multitask.models.language_head`]); in the place of its backbone stands a [`TaskBackbone`], which calls
the multi-task model's, with the task's prefix, adapter or conditioning active (an encoder-decoder, which has nothing
of that kind, stands there itself). So every option of `generate` keeps its meaning, and nothing is copied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from .language_head import CausalLanguageHead
from .rows import RowTasks
from .seq2seq_head import Seq2SeqHead
from .task import closest

if TYPE_CHECKING:
    from .scheme import SharingScheme

__all__ = ["TaskBackbone", "generate", "language_model"]


class TaskBackbone(nn.Module):
    """Stands where a language model has its backbone, and calls a multi-task model's for the rows of one task."""

    def __init__(self, model: SharingScheme, task: str) -> None:
        super().__init__()
        # In a tuple, so that it is no submodule: its parameters belong to the multi-task model.
        self.held = (model,)
        self.task = task
        self.number = [one.name for one in model.tasks].index(task)

    @property
    def config(self) -> Any:
        """The backbone's configuration."""
        return self.held[0].config.backbone_config

    @property
    def decoder(self) -> TaskBackbone:
        """The part of the backbone that some families call in its place."""
        return self

    def forward(self, input_ids: Tensor | None = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        """Return the backbone's output for rows that are all the task's."""
        (model,) = self.held
        main = cast(Tensor, kwargs.get("inputs_embeds") if input_ids is None else input_ids)
        ids = torch.full((len(main),), self.number, dtype=torch.long, device=main.device)
        mask = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 else None
        kwargs.pop("return_dict", None)  # schemes ask for objects in any case
        with model.rows.use(RowTasks(((self.task, 0, len(main)),), ids, mask)):
            return model.decode(input_ids, attention_mask=attention_mask, **kwargs)


def language_model(model: SharingScheme, task: str) -> PreTrainedModel:
    """Return Transformers' own language model for one task, which shares all parameters with the multi-task model.

    Raises:
        ValueError: The task is unknown, or does not generate.
    """
    names = [one.name for one in model.tasks]
    able = [one.name for one in model.tasks if one.type.generates]
    if task not in names:
        raise ValueError(f"no task {task!r}{closest(task, able)}; tasks that generate are {', '.join(able) or 'none'}")
    head = model._head(task)
    if isinstance(head, Seq2SeqHead):
        native = head.layers.over(model.backbone, model.vocabulary(task))
        native.training = False
    elif isinstance(head, CausalLanguageHead):
        native = _over_task_backbone(model, task, head)
    else:
        kind = next(one.type for one in model.tasks if one.name == task)
        raise ValueError(
            f"task {task!r} is {kind} and does not generate text; tasks that do are {', '.join(able) or 'none'}"
        )
    if model.config.generation is not None:
        native.generation_config = GenerationConfig(**model.config.generation)
    return native


def _over_task_backbone(model: SharingScheme, task: str, head: CausalLanguageHead) -> PreTrainedModel:
    native = head.layers.over_table(model.vocabulary(task))
    native.config = model.config.backbone_config  # as it is now: attention or vocabulary may have been changed
    # `generate` asks for the device and the dtype of the first parameter, and there may be no other.
    native.register_parameter("table", cast(nn.Parameter, model.vocabulary(task)))
    native._modules[native.base_model_prefix] = TaskBackbone(model, task)
    native.training = False  # of the copy alone: all below it belongs to the multi-task model
    return native


def generate(model: SharingScheme, inputs: Any, task: str | None, **kwargs: Any) -> Any:
    """Return what Transformers' `generate` returns for a task; see `MultiTaskModel.generate`."""
    if task is None:
        able = [one.name for one in model.tasks if one.type.generates]
        if len(able) != 1:
            raise ValueError(f"generate needs task=...; tasks that generate are {', '.join(able) or 'none'}")
        (task,) = able
    native = language_model(model, task)
    chosen = next(one for one in model.tasks if one.name == task)
    options = {**(chosen.generation or {}), **kwargs}
    # Nothing is written on a model in inference, which other threads may be calling.
    in_training = [module for module in model.modules() if module.training]
    for module in in_training:
        module.training = False
    try:
        return cast(Any, native).generate(inputs, **options)
    finally:
        for module in in_training:
            module.training = True
