"""What a sharing scheme says of itself: how it encodes rows, which parameters are whose, what it adds to the loss."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .encoder_decoder import decoder_parameters
from .heads import TaskHead
from .rows import CurrentRows
from .task import Task
from .task_type import TaskType

__all__ = ["SharingScheme"]


@cache
def _forward_parameters(model_class: Any) -> frozenset[str]:
    return frozenset(inspect.signature(model_class.forward).parameters)


def _conversion() -> Any:
    # It knows every scheme, and every scheme knows this module: so it is looked up when it is called for.
    return import_module(f"{__package__}.conversion")


class SharingScheme(PreTrainedModel, ABC):
    """The part of a multi-task model that differs between schemes.

    A scheme implements [`encode`] and says, in [`task_modules`], what belongs to one task alone; whatever else is
    trained is shared. So the two are disjoint and together cover every trainable parameter.
    """

    # Whether the backbone stays as it is, while other parts are trained.
    freezes_backbone: ClassVar[bool] = False
    # Whether FSDP and DeepSpeed may shard its parameters: every process must run the same modules.
    supports_sharding: ClassVar[bool] = False

    # Whether a task that is never trained computes what the backbone (and what is shared) does.
    untrained_tasks_are_plain: ClassVar[bool] = True
    # Whether several texts may stand in one row of a batch, told apart by their positions.
    supports_packing: ClassVar[bool] = True

    # Whether the backbone may be an encoder-decoder: whatever of it a task needs, all tasks share.
    supports_encoder_decoder: ClassVar[bool] = False

    # How often tasks were added or removed: a trainer made before has other parameters.
    task_changes: int = 0

    tasks: list[Task]
    heads: nn.ModuleDict
    backbone: PreTrainedModel
    rows: CurrentRows
    # The table that tokens are predicted with, where the backbone does not tie it to its input embeddings.
    lm_head: nn.Linear | None

    # ---- what a scheme implements ----

    @abstractmethod
    def encode(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Return the backbone's output for some rows; its `last_hidden_state` is `[rows, L, H]`.

        Whose rows they are is in `self.rows.value`.
        """

    @property
    def shares_rows(self) -> bool:
        """Whether rows that feed several tasks need only one pass of the encoder."""
        return True

    @property
    def one_task_per_pass(self) -> bool:
        """Whether a pass of the encoder is for the rows of one task only."""
        return False

    @property
    def reserved_positions(self) -> int:
        """The backbone's positions that the scheme itself takes, so that inputs cannot have them."""
        return 0

    @property
    def keeps_cache(self) -> bool:
        """Whether [`decode`] can keep what was read before."""
        return True

    def decode(self, input_ids: Tensor | None = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        """Return the backbone's output in the course of writing; `past_key_values` holds what was read before.

        Whose rows they are is in `self.rows.value`.

        Raises:
            ValueError: The scheme keeps nothing of what was read.
        """
        if not self.keeps_cache:
            raise ValueError("generate does not go with cross-stitch units, which keep no cache; train without them")
        return self.encode(input_ids, attention_mask=attention_mask, **kwargs)

    def input_embeddings_of(self, name: str) -> nn.Module:
        """Return the input embeddings that the rows of a task go through."""
        return self.get_input_embeddings()

    def task_modules(self, name: str) -> list[nn.Module]:
        """Return the modules that one task alone trains."""
        return [self._head(name)]

    def penalty(self) -> Tensor | None:
        """Return what the scheme adds to the loss for the values of its parameters, a scalar, or None."""
        return None

    def add_penalty_gradient(self, scale: float = 1.0) -> Tensor | None:
        """Add the gradient of [`penalty`] to the parameters' `.grad`, as its backward pass would.

        Args:
            scale: What the gradient is multiplied with (a loss scaler's number).

        Returns:
            The penalty, a scalar without a graph, or None.
        """
        penalty = self.penalty()
        if penalty is None:
            return None
        (scale * penalty).backward()
        return penalty.detach()

    def pass_losses(self, num_tokens: int | Tensor | None) -> Tensor | None:
        """Return what the scheme adds to the loss for the tokens of the last passes, a scalar, or None.

        Args:
            num_tokens: The tokens that sums over tokens are divided by (default: those of the passes).
        """
        return None

    def idle_term(self, name: str) -> Tensor | None:
        """Return a 0 that depends on all that a task without rows trains beside its head, or None: nothing."""
        head = {id(parameter) for parameter in self._head(name).parameters()}
        own = [parameter for parameter in self.task_parameters(name) if id(parameter) not in head]
        return 0.0 * torch.stack([parameter.float().sum() for parameter in own]).sum() if own else None

    def idle_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield the parameters that a step without rows of a task must leave alone."""
        return self.task_parameters(name)

    def untrained_parameters(self, names: Sequence[str]) -> Iterator[nn.Parameter]:
        """Yield the parameters that a step without rows of some tasks must leave alone.

        Beside what each has for itself these are shared ones that nobody else trains: the decoder of tasks that write,
        and the table that tokens are predicted with, where it is not that of the input embeddings.
        """
        for name in names:
            yield from self.idle_parameters(name)
        others = {task.type for task in self.tasks if task.name not in names}
        if self.lm_head is not None and not any(kind.is_language for kind in others):
            yield from self.lm_head.parameters()
        if self.config.backbone_config.is_encoder_decoder and TaskType.SEQ2SEQ_LM not in others:
            yield from decoder_parameters(self.backbone)

    def forget_passes(self) -> None:
        """Forget what modules have recorded of the passes since the last [`finish_window`]."""

    def finish_window(self) -> None:
        """Take note that the passes of an optimizer step are through; a collective call."""

    def training_logs(self) -> dict[str, float]:
        """Return what the scheme has to add to a log line of training."""
        return {}

    @classmethod
    def describe_backbone(cls, source: str | PreTrainedModel, backbone: PreTrainedModel) -> dict[str, Any]:
        """Return what the configuration must remember of a backbone and where it came from."""
        return {}

    def merged_backbone(self) -> PreTrainedModel:
        """Return one plain backbone that stands for what all tasks have learned, as a copy.

        Raises:
            ValueError: The scheme has no such thing.
        """
        raise ValueError(
            f"{type(self).__name__} cannot change its scheme: what it has learned for each task is not one backbone's "
            "weights; begin with HardSharingModel or SoftSharingModel"
        )

    def reusable_backbone(self) -> PreTrainedModel:
        """Return the encoder that a new model over this one starts with, as a copy.

        Raises:
            ValueError: There is not one encoder that computes what this model does for all its tasks.
        """
        raise ValueError(
            f"from_backbone cannot take the encoder out of a {type(self).__name__}: what it has learned is not in one "
            "backbone's weights; change its tasks with model.add_task(task) and model.remove_task(name), or give "
            "from_backbone the plain backbone it was made of"
        )

    def start_task(self, name: str, before: SharingScheme) -> None:
        """Give a task that was added the initial values it has not got yet; `before` is the model without the task."""

    def task_backbone(self, name: str) -> PreTrainedModel:
        """Return a plain backbone that encodes texts as this model does for one task, as a copy.

        Raises:
            ValueError: The scheme computes more than a backbone does.
        """
        raise ValueError(
            f"task {name!r}: {type(self).__name__} computes more than its backbone does, so the task is no plain "
            "model; export it with native=False"
        )

    def check_selection(self, names: Sequence[str]) -> None:
        """Raise ValueError where a model of some tasks alone would not compute what this one does."""

    def load_adapters(self, folder: str | Path) -> None:
        """Load what is saved beside `model.safetensors`; nothing for most schemes."""

    def tensors_elsewhere(self) -> set[str]:
        """Return the names of the tensors that are not saved in `model.safetensors`."""
        return set()

    # ---- what follows from it ----

    def to_scheme(self, scheme: str, **options: Any) -> Any:
        """Return a model of another sharing scheme that goes on where this one is; see [`conversion.convert`]."""
        return _conversion().convert(self, scheme, **options)

    def add_task(self, task: Any) -> None:
        """Add a task to this model in place, behind the others, which compute what they did; see [`conversion`].

        Args:
            task: A [`Task`], or a dictionary of its fields.

        Raises:
            ValueError: The task does not fit, has the name of another, or the scheme cannot take a task more.
        """
        _conversion().add_task(self, task)

    def remove_task(self, name: str) -> None:
        """Remove a task and all that it trained for itself, in place; the others compute what they did.

        Args:
            name: The task.

        Raises:
            ValueError: There is no such task, no other is trained for its own sake, or the tasks cannot be separated.
        """
        _conversion().remove_task(self, name)

    @torch.no_grad()
    def generate(self, input_ids: Tensor | None = None, *, task: str | None = None, **kwargs: Any) -> Any:
        """Write text for one task, with the parameters that its rows are trained with.

        Args:
            input_ids: `[B, L]`, prompts, padded on the left; for `seq2seq_lm` texts, padded on the right.
            task: The task; may be left out where only one generates.
            **kwargs: `attention_mask` `[B, L]` and all other arguments of Transformers' `generate`; they go before
                `Task(generation=...)`, and these before what came with the backbone.

        Returns:
            What Transformers' `generate` returns: `[B, L + new]` (for `seq2seq_lm` `[B, 1 + new]`), or an output
            object.

        Raises:
            ValueError: The task is unknown or does not generate.
        """
        return import_module(f"{__package__}.generation").generate(self, input_ids, task, **kwargs)

    def export_task(self, name: str, folder: str | Path, native: bool | None = None) -> None:
        """Write a folder with one task only; see [`conversion.export_task`]."""
        _conversion().export_task(self, name, folder, native)

    def task_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield the trainable parameters that only the named task trains."""
        for module in self.task_modules(name):
            yield from (parameter for parameter in module.parameters() if parameter.requires_grad)

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the trainable parameters that more than one task trains."""
        own = {id(parameter) for task in self.tasks for parameter in self.task_parameters(task.name)}
        return (p for p in self.parameters() if p.requires_grad and id(p) not in own)

    def run_backbone(self, backbone: PreTrainedModel, input_ids: Tensor | None, **kwargs: Any) -> Any:
        """Call a backbone with what it takes; `task_ids` is left out, and token types where it knows none.

        Some backbones (DistilBERT, most decoders) take no `token_type_ids`; passing them on would raise.
        """
        kwargs.pop("task_ids", None)
        backbone_class: Any = type(backbone)
        if "token_type_ids" in kwargs and "token_type_ids" not in _forward_parameters(backbone_class):
            del kwargs["token_type_ids"]
        if input_ids is not None:
            kwargs["input_ids"] = input_ids
        return backbone(return_dict=True, **kwargs)

    def compile_backbone(self, **options: Any) -> None:
        """Compile the backbone in place, with arguments of `torch.compile`."""
        parts = [self.backbone]
        if self.backbone.config.is_encoder_decoder:  # nothing calls it as a whole
            parts = [self.backbone.get_encoder(), self.backbone.get_decoder()]
        for part in parts:
            part.compile(**options)

    def freeze_backbone(self) -> None:
        """Freeze what the scheme does not train; also after loading, which makes new parameters."""
        if self.freezes_backbone:
            self.backbone.requires_grad_(False)
            if self.lm_head is not None:
                self.lm_head.requires_grad_(False)

    def vocabulary(self, name: str) -> Tensor:
        """Return the table that a task predicts tokens with, `[V, E]`."""
        table = self.input_embeddings_of(name) if self.lm_head is None else self.lm_head
        return cast(Tensor, table.weight)

    def _head(self, name: str) -> TaskHead:
        if name not in self.heads:
            raise ValueError(f"task {name!r} is not one of this model's: {', '.join(self.heads)}")
        return cast(TaskHead, self.heads[name])
