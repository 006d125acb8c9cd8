"""From one sharing scheme to another, from many tasks to some, and from a task to a plain model of Transformers.

A run can start with hard sharing and split where tasks turn out to conflict; a task that is done can be taken out and
served by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .auto import SCHEMES
from .backbone import cast_parameters
from .base import MultiTaskModel
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
    result = SCHEMES[scheme].from_backbone(model.merged_backbone(), model.tasks, **{**common, **options})
    result.heads.load_state_dict(model.heads.state_dict())
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
    layers = model._head(name).layers
    if not isinstance(layers, NativeLayers):
        raise ValueError(
            f"task {name!r}: its head {task.head!r} is none that Transformers has; train with Task(head='native'), or "
            "export it with native=False"
        )
    backbone = model.task_backbone(name)
    plain = native_model(task, backbone.config)
    state = {f"{plain.base_model_prefix}.{key}": value for key, value in backbone.state_dict().items()}
    cast_parameters(plain, model.dtype)
    plain.load_state_dict(state | layers.native.state_dict())
    return plain.to(model.device).eval()  # type: ignore[arg-type]


def export_task(model: MultiTaskModel, name: str, folder: str | Path, native: bool | None = None) -> None:
    """Write a folder with one task only: what it shares with others, and what is its own.

    Args:
        model: The model.
        name: The task.
        folder: Where to write; the tokenizer is not written, save it beside.
        native: Whether to write Transformers' own model (default: if the task has `head="native"`), which loads
            without this library; otherwise it is a multi-task model of one task.

    Raises:
        ValueError: The task is unknown, or cannot be written as asked.
    """
    if native is None:
        native = _find(model, name).head == "native"
    exported = plain_model(model, name) if native else select_tasks(model, [name])
    exported.save_pretrained(folder)


def _find(model: MultiTaskModel, name: str) -> Task:
    tasks = {task.name: task for task in model.tasks}
    if name not in tasks:
        raise ValueError(f"no task {name!r}{closest(name, tasks)}; tasks are {', '.join(tasks)}")
    return tasks[name]
