"""Load the head that a checkpoint of Transformers has for a task: its pooler, its classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from .backbone import CONFIG_OPTIONS, load_quietly
from .native_head import AUTO_CLASSES, native_config
from .task import Task
from .task_type import TaskType

__all__ = ["PretrainedHead", "load_heads"]


@dataclass(frozen=True)
class PretrainedHead:
    """What a checkpoint has for tasks of a type, in addition to its backbone.

    Args:
        tensors: By their names in Transformers' own model.
        model: Name of the class whose classifier the checkpoint has, or "" where it has none.
        labels: The names of its labels.
        problem: The type of task that it was trained for, or None where the checkpoint does not say.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    model: str = ""
    labels: tuple[str, ...] = ()
    problem: str | None = None

    def fits(self, task: Task) -> bool:
        """Return whether the classifier predicts what a task does: the same labels, in the same order."""
        if task.type in (TaskType.QUESTION_ANSWERING, TaskType.MULTIPLE_CHOICE):
            return True
        if self.problem not in (None, task.type.value) and task.type is not TaskType.TOKEN_CLASSIFICATION:
            return False
        if task.labels is None:
            return len(self.labels) == task.num_outputs
        return self.labels == task.labels

    def for_task(self, task: Task, config: PreTrainedConfig) -> tuple[dict[str, Tensor], bool]:
        """Return the tensors that a task with `head="native"` starts with.

        Args:
            task: The task.
            config: The backbone's configuration.

        Returns:
            The tensors, and whether a classifier was left out because its labels are not the task's.
        """
        if self.fits(task):
            return self.tensors, False
        by_label = _sized_by_labels(task, config)
        kept = {name: value for name, value in self.tensors.items() if name not in by_label}
        return kept, len(kept) < len(self.tensors)


def load_heads(
    source: str | PreTrainedModel, tasks: Sequence[Task], **kwargs: Any
) -> tuple[dict[TaskType, PretrainedHead], str]:
    """Return what a checkpoint has for the tasks with `head="native"`, by type, and the class of its classifier.

    Args:
        source: A Hub id or folder, or a model in memory, with or without a head.
        tasks: The tasks.
        **kwargs: Arguments of `from_pretrained`; not used for a model in memory.

    Returns:
        The heads, which are empty where the checkpoint has nothing for a type; and the name of the class of
        Transformers that the checkpoint has a classifier of, or "".
    """
    if isinstance(source, PreTrainedModel):
        config, owner = source.config, type(source).__name__
    else:
        where = {key: kwargs[key] for key in CONFIG_OPTIONS if key in kwargs}
        config = kwargs.pop("config", None) or AutoConfig.from_pretrained(source, **where)
        owner = next(iter(getattr(config, "architectures", None) or ()), "")
    if not any(owner == one.__name__ for auto in _classifiers() for one in _classes(auto, config)):
        owner = ""
    heads: dict[TaskType, PretrainedHead] = {}
    loaded: dict[Any, PretrainedHead] = {}
    for task in tasks:
        auto = AUTO_CLASSES[task.type]
        if task.head != "native" or task.type.is_language or not _classes(auto, config) or config.is_encoder_decoder:
            continue
        if auto not in loaded:
            loaded[auto] = _load_head(source, auto, config, owner, kwargs)
        heads[task.type] = loaded[auto]
    return heads, owner


def _load_head(
    source: str | PreTrainedModel, auto: Any, config: PreTrainedConfig, owner: str, options: dict[str, Any]
) -> PretrainedHead:
    own = next((one for one in _classes(auto, config) if one.__name__ == owner), None)
    prefix = _classes(auto, config)[0].base_model_prefix
    if not isinstance(source, PreTrainedModel):
        model, fresh = load_quietly(auto, source, config, {**options, "ignore_mismatched_sizes": True})
        tensors = {name: value for name, value in model.state_dict().items() if name not in fresh}
    elif own is not None:
        tensors = dict(source.state_dict())
    else:
        tensors = {f"{prefix}.{name}": value for name, value in source.base_model.state_dict().items()}
    poolers = (f"{prefix}.pooler.",)
    # A classifier of another kind (of tokens, say) may have the same names, and shapes.
    others = bool(owner) and own is None
    kept = {
        name: value.detach().clone()
        for name, value in tensors.items()
        if name.startswith(poolers) or not (others or name.startswith(f"{prefix}."))
    }
    labels: dict[Any, str] = dict(config.id2label or {})
    names = tuple(str(labels.get(number, labels.get(str(number)))) for number in range(len(labels)))
    return PretrainedHead(kept, "" if own is None else owner, names, getattr(config, "problem_type", None))


@cache
def _classifiers() -> tuple[Any, ...]:
    """Return the auto classes of the types of tasks that have a head of their own."""
    return tuple(dict.fromkeys(auto for kind, auto in AUTO_CLASSES.items() if not kind.is_language))


def _classes(auto: Any, config: PreTrainedConfig) -> tuple[Any, ...]:
    """Return the classes that an auto class has for a configuration."""
    if type(config) not in auto._model_mapping:
        return ()
    found = auto._model_mapping[type(config)]
    return tuple(found) if isinstance(found, (list, tuple)) else (found,)


def _sized_by_labels(task: Task, config: PreTrainedConfig) -> set[str]:
    """Return the names of the tensors whose shape follows the number of labels."""
    shapes = []
    for number in (3, 4):
        own = native_config(task, config)
        own.num_labels = number
        with torch.device("meta"):
            model = AUTO_CLASSES[task.type].from_config(own)
        shapes.append({name: value.shape for name, value in model.state_dict().items()})
    return {name for name, shape in shapes[0].items() if shape != shapes[1].get(name)}
