"""From one sharing scheme to another, from many tasks to some, and from a task to a plain model of Transformers.

A run can start with hard sharing and split where tasks turn out to conflict; a task that is done can be taken out and
served by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.utils import logging

from .auto import SCHEMES, AutoModelForMultiTask
from .backbone import CONFIG_OPTIONS, cast_parameters, check_source
from .base import MultiTaskModel
from .configuration import MultiTaskConfig
from .language_head import LanguageLayers, is_tied
from .native_head import NativeLayers, native_model
from .task import Task, check_tasks, closest
from .task_type import TaskType

__all__ = ["convert", "export_task", "plain_model", "select_tasks"]

logger = logging.get_logger(__name__)

_TABLES = ("parameters", "buffers")
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


def as_multi_task(source: Any, options: dict[str, Any]) -> MultiTaskModel | None:
    """Return the multi-task model that a source of a backbone is, or is the folder of; None where it is a plain one.

    Args:
        source: What `from_backbone` was given.
        options: Arguments of `from_pretrained`.

    Raises:
        ValueError: It is neither a name nor a model.
    """
    check_source(source)
    if isinstance(source, MultiTaskModel):
        return source
    if isinstance(source, nn.Module) or options.get("config") is not None:
        return None
    where = {key: options[key] for key in CONFIG_OPTIONS if key in options}
    if isinstance(AutoConfig.from_pretrained(source, **where), MultiTaskConfig):
        return AutoModelForMultiTask.from_pretrained(source, **options)
    return None


def over_multi_task(
    scheme: type[MultiTaskModel],
    source: MultiTaskModel,
    tasks: Iterable[Task | dict[str, Any]],
    options: dict[str, Any],
) -> MultiTaskModel:
    """Return a model of a scheme over the encoder of another multi-task model, with the heads of equal tasks.

    Args:
        scheme: The class of the new model.
        source: The other model, which stays as it is.
        tasks: The tasks of the new model.
        options: Options of the new scheme; those of the heads are the source's where they are not given.

    Raises:
        ValueError: The source has not one encoder for all tasks, or lacks what a task needs.
    """
    tasks = check_tasks(tasks)
    before = {task.name: task for task in source.tasks}
    kept = [task.name for task in tasks if task.name in before and _same_head(task, before[task.name])]
    fresh = [task.name for task in tasks if task.name not in kept]
    _check_decoder(source, [task for task in tasks if task.name in fresh])
    backbone = source.reusable_backbone()
    common = {name: getattr(source.config, name) for name in _COMMON}
    made, lacking = scheme.over_backbone(backbone, tasks, {}, {**common, **options})
    made.config.generation = source.config.generation
    if source.lm_head is not None and any(task.type.is_language for task in tasks):
        made.untie_vocabulary()
        cast_parameters(made.lm_head, made.dtype)
        made.lm_head.load_state_dict(source.lm_head.state_dict())
    elif scheme.freezes_backbone and "lm_head.weight" in lacking:
        raise ValueError(
            f"{type(source).__name__} has no lm_head.weight, which {scheme.__name__} would leave at random"
        )
    for name in kept:
        made.heads[name].load_state_dict(source.heads[name].state_dict())
    parts = [f"keeps the heads of {', '.join(kept)}"] if kept else []
    parts += [f"starts those of {', '.join(fresh)} at random"] if fresh else []
    left = [name for name in before if name not in kept]
    parts += [f"leaves out those of {', '.join(left)}"] if left else []
    logger.warning(f"the model over the encoder of a {type(source).__name__} {'; '.join(parts)}")
    return made


def _same_head(one: Task, other: Task) -> bool:
    return all(getattr(one, field) == getattr(other, field) for field in ("type", "labels", "head", "pooling"))


def _check_decoder(model: MultiTaskModel, new: Sequence[Task]) -> None:
    """Raise ValueError where a task needs the decoder of an encoder-decoder that was left out."""
    names = [task.name for task in new if task.type is TaskType.SEQ2SEQ_LM]
    has_decoder = any(task.type is TaskType.SEQ2SEQ_LM for task in model.tasks)
    if names and not has_decoder and model.config.backbone_config.is_encoder_decoder:
        raise ValueError(
            f"task {names[0]!r}: the model has no decoder, as none of its tasks is of type seq2seq_lm; begin with "
            "from_backbone over the pretrained encoder-decoder"
        )


def add_task(model: MultiTaskModel, task: Task | dict[str, Any]) -> None:
    """Add a task to a model in place; see [`MultiTaskModel.add_task`].

    The parameters that there are stay the same objects. What the task needs for itself starts as `from_backbone`
    starts it; under soft sharing its encoder is the mean of the others. While the parts are put together there is
    memory for two models.
    """
    (task,) = (task,) if isinstance(task, Task) else (Task.from_dict(task),)
    if any(task.name == known.name for known in model.tasks):
        raise ValueError(f"the model has a task {task.name!r} already; remove_task({task.name!r}) comes first")
    _check_decoder(model, [task])
    model.check_selection([])
    _change_tasks(model, [*model.tasks, task], task)


def remove_task(model: MultiTaskModel, name: str) -> None:
    """Remove a task from a model in place; see [`MultiTaskModel.remove_task`]."""
    _find(model, name)
    left = [task for task in model.tasks if task.name != name]
    if not left:
        raise ValueError(f"task {name!r} is the only one: a multi-task model needs at least one task")
    model.check_selection([task.name for task in left])
    _change_tasks(model, left)


def _change_tasks(model: MultiTaskModel, tasks: Sequence[Task], added: Task | None = None) -> None:
    """Rebuild a model around other tasks, with the parameters and buffers that it has."""
    if any(getattr(part, "quantization_config", None) for part in (model.config, model.config.backbone_config)):
        raise ValueError("the tasks of a quantised model cannot be changed; load its backbone without quantisation")
    config = copy.deepcopy(model.config)
    config.tasks = [task.to_dict() for task in check_tasks(tasks)]
    config.untied_vocabulary = config.untied_vocabulary or (
        model.lm_head is not None and is_tied(config.backbone_config)
    )
    scheme: Any = type(model)
    with torch.random.fork_rng(enabled=added is None):
        result = scheme(config)
    cast_parameters(result, model.dtype)
    result.to(model.device)  # type: ignore[arg-type]
    result.freeze_backbone()
    tables = [(table, dict(getattr(model, f"named_{table}")(remove_duplicate=False))) for table in _TABLES]
    if result.lm_head is not None and model.lm_head is None and result.freezes_backbone:
        raise ValueError(
            f"task {tasks[-1].name!r} predicts tokens with a table that is not that of the input embeddings, which the "
            f"model lacks and {scheme.__name__} would leave as it starts, at random; begin with from_backbone"
        )
    if added is not None:
        result.start_task(added.name, model)
    for table, known in tables:
        for name, value in known.items():
            holder, _, last = name.rpartition(".")
            try:
                found = result.get_submodule(holder)
            except AttributeError:  # of a task that was removed
                continue
            entries = getattr(found, f"_{table}")
            if last in entries:
                entries[last] = value
    result.train(model.training)
    if model.is_activation_checkpointing:
        result.activation_checkpointing_enable()
    result.name_or_path = model.name_or_path
    changes = model.task_changes + 1
    vars(model).clear()
    vars(model).update(vars(result), task_changes=changes)


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
