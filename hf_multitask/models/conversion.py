"""From one sharing scheme to another, from many tasks to some, and from a task to a plain model of Transformers.

A run can start with hard sharing and split where tasks turn out to conflict; a task that is done can be taken out and
served by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from .auto import SCHEMES
from .backbone import cast_parameters
from .base import MultiTaskModel
from .language_head import LanguageLayers
from .native_head import NativeLayers, native_model
from .task import Task, closest

__all__ = ["convert", "export_task", "plain_model", "select_tasks"]

_COMMON = ("pooling", "head_dropout", "initializer_range", "max_input_length")


def convert(model: MultiTaskModel, scheme: str, **options: Any) -> MultiTaskModel:
    """Return a model of another sharing scheme that goes on where this one is; this one stays as it is.

    From hard sharing to every scheme: the new parts start as `from_backbone` makes them, so that most schemes compute
    at first what the old model did. From soft to hard sharing: the encoders are averaged, which changes what each task
    computes the more, the farther they have moved apart. The heads are copied in any case.

    Args:
        model: The model.
        scheme: A key of `SCHEMES`.
        **options: Options of the new scheme's `from_backbone`.

    Raises:
        ValueError: The scheme is not known, or this one cannot be turned into others.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme {scheme!r} is not known{closest(scheme, SCHEMES)}; schemes are {', '.join(SCHEMES)}")
    common = {name: getattr(model.config, name) for name in _COMMON}
    # Heads that the backbone comes without are copied below.
    result, _ = SCHEMES[scheme].over_backbone(model.merged_backbone(), model.tasks, {}, {**common, **options})
    result.heads.load_state_dict(model.heads.state_dict())
    result.config.generation = model.config.generation
    if model.lm_head is not None:
        result.untie_vocabulary()
        cast_parameters(result.lm_head, model.dtype)
        result.lm_head.load_state_dict(model.lm_head.state_dict())
    return result.to(model.device).train(model.training)  # type: ignore[arg-type]


def select_tasks(model: MultiTaskModel, names: Sequence[str]) -> MultiTaskModel:
    """Return a copy of a model with some of its tasks: what the others trained for themselves is left out.

    Args:
        model: The model.
        names: The tasks, in the order that they are to have.

    Raises:
        ValueError: A task is unknown, no task is left that is trained for its own sake, or the tasks cannot be parted.
    """
    tasks = [_find(model, name) for name in names]
    model.check_selection(names)
    config = copy.deepcopy(model.config)
    config.tasks = [task.to_dict() for task in tasks]
    scheme: Any = type(model)
    result = scheme(config)
    cast_parameters(result, model.dtype)
    result.to(model.device)  # type: ignore[arg-type]
    tensors = model.state_dict()
    # Whose a tensor is stands in its name: those of tasks that are left out find no place.
    result.load_state_dict({name: tensors[name] for name in result.state_dict()})
    result.freeze_backbone()
    return result.eval()


def plain_model(model: MultiTaskModel, name: str) -> PreTrainedModel:
    """Return Transformers' own model for one task, with the task's weights.

    Args:
        model: The model; the task has `head="native"`.
        name: The task.

    Raises:
        ValueError: The task is unknown or has another head, or the scheme computes what no plain model does.
    """
    task = _find(model, name)
    layers = getattr(model._head(name), "layers", None)
    if not isinstance(layers, NativeLayers):
        raise ValueError(
            f"task {name!r}: its head {task.head!r} is none that Transformers has; train with Task(head='native'), or "
            "export it with native=False"
        )
    backbone = model.task_backbone(name)
    plain = native_model(task, backbone.config)
    # The language model of some encoder-decoders holds the parts of the backbone as its own.
    prefix = f"{plain.base_model_prefix}." if plain.base_model_prefix in plain._modules else ""
    state = {f"{prefix}{key}": value for key, value in backbone.state_dict().items()}
    cast_parameters(plain, model.dtype)
    if isinstance(layers, LanguageLayers):
        state[f"{layers.vocabulary_path}.weight"] = model.vocabulary(name)
        if model.lm_head is not None:  # whatever the configuration says of it
            output: Any = plain.get_output_embeddings()
            output.weight = nn.Parameter(output.weight.detach().clone())
        missing, unexpected = plain.load_state_dict(state | layers.native.state_dict(), strict=False)
        tied: Any = plain._tied_weights_keys or {}
        if unexpected or set(missing) - set(tied) - set(tied.values()):
            raise ValueError(f"task {name!r}: {type(plain).__name__} has other weights: {missing}, {unexpected}")
        if model.config.generation is not None and plain.can_generate():
            plain.generation_config = GenerationConfig(**model.config.generation)
        if model.lm_head is None:
            plain.tie_weights()
    else:
        plain.load_state_dict(state | layers.native.state_dict())
    return plain.to(model.device).eval()  # type: ignore[arg-type]


def export_task(model: MultiTaskModel, name: str, folder: str | Path, native: bool | None = None) -> None:
    """Write a folder with one task only: what it shares with others, and what is its own.

    Args:
        model: The model.
        name: The task.
        folder: Where to write; the tokenizer is not written, save it beside.
        native: Whether to write Transformers' own model (default: if the task has `head="native"`, or is one over
            the vocabulary), which loads without this library; otherwise it is a multi-task model of one task.

    Raises:
        ValueError: The task is unknown, or cannot be written as asked.
    """
    if native is None:
        task = _find(model, name)
        native = task.head == "native" or task.type.is_language
    exported = plain_model(model, name) if native else select_tasks(model, [name])
    exported.save_pretrained(folder)


def _find(model: MultiTaskModel, name: str) -> Task:
    tasks = {task.name: task for task in model.tasks}
    if name not in tasks:
        raise ValueError(f"no task {name!r}{closest(name, tasks)}; tasks are {', '.join(tasks)}")
    return tasks[name]
