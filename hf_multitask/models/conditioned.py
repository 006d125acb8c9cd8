"""Task-conditioned sharing: one encoder that knows whose rows it reads, by an embedding and by FiLM layers."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .base import MultiTaskModel
from .configuration import MultiTaskConfig
from .layers import find_layers
from .rows import CurrentRows, RowTasks

__all__ = ["ConditionedConfig", "ConditionedModel", "TaskConditioning"]

_HOOKING = threading.Lock()


class ConditionedConfig(MultiTaskConfig):
    """Configuration of a [`ConditionedModel`]; see [`MultiTaskConfig`] for the other fields.

    Args:
        task_embedding: Whether a vector of the row's task is added to the input embedding of each of its tokens.
        film: Whether the hidden states behind the layers are scaled and shifted by vectors of the row's task.
        film_layers: The numbers of those layers, from 0; None takes all.
        task_embedding_std: Standard deviation of the initial task embeddings. With 0 the model starts as the plain
            backbone; with the deviation of the backbone's own embeddings (0.02 for BERT) tasks differ from the start.

    Raises:
        ValueError: Both ways of conditioning are off, or an option is set of one that is off; `film_layers` is empty
            or not a list of different numbers from 0; `task_embedding_std` is negative or not finite.
    """

    model_type = "hf_multitask_conditioned"

    task_embedding: bool = True
    film: bool = True
    film_layers: list | None = None
    task_embedding_std: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        """Check what does not depend on the backbone."""
        super().__post_init__(**kwargs)
        if not (self.task_embedding or self.film):
            raise ValueError("task_embedding and film are both off, which is hard sharing; set one of them to True")
        if not (math.isfinite(self.task_embedding_std) and self.task_embedding_std >= 0):
            raise ValueError(f"task_embedding_std must be a number from 0, got {self.task_embedding_std!r}")
        if self.task_embedding_std and not self.task_embedding:
            raise ValueError(f"task_embedding_std={self.task_embedding_std!r} needs task_embedding=True")
        if self.film_layers is None:
            return
        if not self.film:
            raise ValueError(f"film_layers={self.film_layers!r} needs film=True")
        numbers = self.film_layers
        whole = isinstance(numbers, (list, tuple)) and all(type(number) is int for number in numbers)
        if not (whole and numbers) or len(set(numbers)) < len(numbers):
            raise ValueError(f"film_layers must be a list of different numbers of layers, or None, got {numbers!r}")
        self.film_layers = list(numbers)


@dataclass(frozen=True)
class _ConditionedRows(RowTasks):
    """The rows of one pass with their tasks' vectors; R is 1, where all rows are of one task, or the number of rows.

    Args:
        embedding: `[R, 1, E]`, still to be added to the input embeddings, or None.
        factors: For each conditioned layer `[R, 1, H]`, what its hidden states are multiplied with.
        shifts: For each conditioned layer `[R, 1, H]`, what is then added to them.
    """

    embedding: Tensor | None = None
    factors: tuple[Tensor, ...] = ()
    shifts: tuple[Tensor, ...] = ()


class _AddTaskEmbedding:
    """Forward hook of the input embeddings: adds the vector of the row's task.

    The hooks are objects that hold the [`CurrentRows`] of their model, so that a deep copy of the model, hooks
    included, looks at its own.
    """

    def __init__(self, rows: CurrentRows) -> None:
        self.rows = rows

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        rows = self.rows.value
        if not isinstance(rows, _ConditionedRows) or rows.embedding is None:
            return None
        return output + rows.embedding.to(output.dtype)


class _ScaleAndShift:
    """Forward hook of a layer: scales and shifts its hidden states by the vectors of the row's task."""

    def __init__(self, rows: CurrentRows, position: int) -> None:
        self.rows = rows
        self.position = position

    def __call__(self, layer: nn.Module, args: Any, output: Any) -> Any:
        rows = self.rows.value
        if not isinstance(rows, _ConditionedRows):
            return None
        if isinstance(output, Tensor):
            return self._apply(rows, output, layer)
        if type(output) in (tuple, list) and isinstance(output[0], Tensor):
            return type(output)([self._apply(rows, output[0], layer), *output[1:]])
        raise ValueError(
            f"film cannot condition {type(layer).__name__}: it returns a {type(output).__name__}, neither a tensor "
            "nor a tuple that begins with one; set film=False"
        )

    def _apply(self, rows: _ConditionedRows, hidden: Tensor, layer: nn.Module) -> Tensor:
        factor, shift = rows.factors[self.position], rows.shifts[self.position]
        if hidden.dim() != 3 or factor.shape[0] not in (1, hidden.shape[0]) or factor.shape[-1] != hidden.shape[-1]:
            raise ValueError(
                f"film cannot condition {type(layer).__name__}: its hidden states are {list(hidden.shape)}, not "
                f"[rows, L, {factor.shape[-1]}]; set film=False"
            )
        # The vectors are cast, not the hidden states, which would change the dtype of all that follows.
        return torch.addcmul(shift.to(hidden.dtype), hidden, factor.to(hidden.dtype))


class TaskConditioning(nn.Module):
    """What the encoder learns of one task.

    Tasks have tensors of their own and not rows of one table: an optimizer's momentum and weight decay move all rows
    of a table, those of tasks without a gradient too.

    Args:
        embedding_size: Width E of the input embeddings; None makes no `embedding`, `[E]`.
        num_layers: Number of conditioned layers; 0 makes neither `scale` nor `shift`, both `[num_layers, H]`.
        hidden_size: Width H of the hidden states.
    """

    embedding: nn.Parameter | None
    scale: nn.Parameter | None
    shift: nn.Parameter | None

    def __init__(self, embedding_size: int | None, num_layers: int, hidden_size: int) -> None:
        """Make the vectors, all zeros, which change nothing."""
        super().__init__()
        shape = (num_layers, hidden_size)
        self.embedding = None if embedding_size is None else nn.Parameter(torch.zeros(embedding_size))
        self.scale = nn.Parameter(torch.zeros(shape)) if num_layers else None
        self.shift = nn.Parameter(torch.zeros(shape)) if num_layers else None


class ConditionedModel(MultiTaskModel):
    """One backbone that all tasks train, conditioned on the task by a few vectors of each task's own.

    Two ways, together or alone. A *task embedding* is added to the input embeddings of all tokens of a row (like the
    language embeddings of XLM, Conneau and Lample 2019). *FiLM* (Perez et al. 2018) scales and shifts the hidden
    states `h` behind each layer, per channel:

        h -> (1 + scale) * h + shift

    All start at zero, so that the model starts as hard sharing over the same backbone, bit for bit. A task costs
    `E + 2 * layers * H` parameters (for BERT-base 19,200), a mixed batch one pass of the encoder. It fits tasks that
    want much in common and yet different things of the same text. Rows that several tasks read need a pass for each.

    The segments say which task conditions a row; without them each task that is not auxiliary reads all rows in a
    pass of its own. `hidden_states` in the output are those behind the conditioning, of the last pass; the first are
    the backbone's embeddings with the task embedding in them. Whoever calls `model.backbone` directly gets the plain
    backbone. In half precision `1 + scale` is rounded like everything else.

    Raises:
        ValueError: `film_layers` has a number that is none of the backbone's; the backbone's layers cannot be found
            (then `film=False` still works), or hand on no hidden states `[rows, L, H]`.

    Example:
        >>> from transformers import BertConfig
        >>> config = ConditionedConfig(
        ...     backbone_config=BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2),
        ...     tasks=[{"name": "score", "type": "regression"}],
        ... )
        >>> model = ConditionedModel(config)
        >>> {name: list(parameter.shape) for name, parameter in model.conditioning["score"].named_parameters()}
        {'embedding': [32], 'scale': [2, 32], 'shift': [2, 32]}
    """

    config_class = ConditionedConfig
    config: ConditionedConfig

    def __init__(self, config: ConditionedConfig, backbone: PreTrainedModel | None = None) -> None:
        """Build the backbone, the heads and the tasks' vectors, and hook the vectors into the backbone."""
        super().__init__(config, backbone)
        width = config.get_text_config().hidden_size
        layers = self._film_layers() if config.film else []
        embedding_size = cast(Tensor, self.get_input_embeddings().weight).shape[-1] if config.task_embedding else None
        self.conditioning = nn.ModuleDict(
            {task.name: TaskConditioning(embedding_size, len(layers), width) for task in self.tasks}
        )
        for position, layer in enumerate(layers):
            # In front of hooks that record hidden states, which may be there already.
            layer.register_forward_hook(_ScaleAndShift(self.rows, position), prepend=True)
        if config.task_embedding:
            self._hook_embeddings()
        self.post_init()

    def _film_layers(self) -> list[nn.Module]:
        layers = find_layers(self.backbone)
        numbers = range(len(layers)) if self.config.film_layers is None else self.config.film_layers
        for number in numbers:
            if not 0 <= number < len(layers):
                raise ValueError(
                    f"film_layers: the backbone {self.backbone.config.model_type!r} has no layer {number}; its "
                    f"layers are 0 to {len(layers) - 1}"
                )
        return [layers[number] for number in numbers]

    @property
    def shares_rows(self) -> bool:
        """Never: what a row's pass gives depends on the task."""
        return False

    def task_modules(self, name: str) -> list[nn.Module]:
        """Return the task's head and its vectors."""
        return [*super().task_modules(name), self.conditioning[name]]

    def encode(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Run the backbone on some rows, each conditioned on its task."""
        if self.rows.value is None:
            return self.run_backbone(self.backbone, input_ids, attention_mask=attention_mask, **kwargs)
        embeds = kwargs.get("inputs_embeds")
        number = (cast(Tensor, input_ids) if embeds is None else embeds).shape[0]
        embedding, factors, shifts = self._vectors(self.rows.value, number)
        if embedding is not None and embeds is not None:
            # The backbone does not call its embeddings then, so that the hook there would not see the rows.
            kwargs["inputs_embeds"] = embeds + embedding.to(embeds.dtype)
            embedding = None
        if embedding is not None:
            self._hook_embeddings()
        plain = {field.name: getattr(self.rows.value, field.name) for field in fields(RowTasks)}
        # The vectors travel with the rows: layers that are computed again in the backward pass get both back.
        with self.rows.use(_ConditionedRows(**plain, embedding=embedding, factors=factors, shifts=shifts)):
            return self.run_backbone(self.backbone, input_ids, attention_mask=attention_mask, **kwargs)

    def _vectors(self, rows: RowTasks, number: int) -> tuple[Tensor | None, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return the task embedding of some number of rows, and each layer's factors and shifts, gathered once."""
        factors: tuple[Tensor, ...] = ()
        shifts: tuple[Tensor, ...] = ()
        embedding = self._gather("embedding", rows, number).unsqueeze(1) if self.config.task_embedding else None
        if self.config.film:
            factors = (1 + self._gather("scale", rows, number)).unsqueeze(-2).unbind(1)
            shifts = self._gather("shift", rows, number).unsqueeze(-2).unbind(1)
        return embedding, factors, shifts

    def _gather(self, key: str, rows: RowTasks, number: int) -> Tensor:
        """Return one vector, or one per layer, of each row's task, `[R, ...]`; zeros for rows of no task.

        The slices say whose rows they are, not the ids: no index has to go to the device, and the sum over a task's
        rows in the backward pass has a fixed order.
        """
        vectors = [getattr(self.conditioning[name], key) for name, _, _ in rows.slices]
        if len(vectors) == 1:
            return vectors[0].unsqueeze(0)
        parts: list[Tensor] = []
        position = 0
        for vector, (_, start, stop) in zip(vectors, rows.slices, strict=True):
            if start > position:
                parts.append(vector.new_zeros(start - position, *vector.shape))
            parts.append(vector.expand(stop - start, *vector.shape))
            position = stop
        if number > position:
            parts.append(vectors[0].new_zeros(number - position, *vectors[0].shape))
        return torch.cat(parts)

    def _hook_embeddings(self) -> None:
        """Put the hook on the backbone's input embeddings, where it is missing: resizing them may make new ones.

        Threads that find it missing in the same moment take turns, so that one of them adds it.
        """
        if self._embeddings_hooked():
            return
        with _HOOKING:
            if not self._embeddings_hooked():
                self.get_input_embeddings().register_forward_hook(_AddTaskEmbedding(self.rows), prepend=True)

    def _embeddings_hooked(self) -> bool:
        # Also below: a wrapper (FSDP's) may have been put around the module with the hook.
        modules = self.get_input_embeddings().modules()
        hooks = [hook for module in modules for hook in list(module._forward_hooks.values())]
        return any(isinstance(hook, _AddTaskEmbedding) and hook.rows is self.rows for hook in hooks)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise the tasks' vectors beside the heads."""
        super()._init_weights(module)
        if isinstance(module, TaskConditioning):
            for vector in module.parameters():
                init.zeros_(vector)
            if module.embedding is not None and self.config.task_embedding_std:
                init.normal_(module.embedding, mean=0.0, std=self.config.task_embedding_std)
