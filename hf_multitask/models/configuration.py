"""The configuration that every sharing scheme has: the backbone's, the tasks, and what their heads need."""

from __future__ import annotations

import math
import os
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import CONFIG_NAME

from .limits import shown
from .manifest import check_named, saving
from .saved_config import CONFIG_VERSION, check_config, check_config_file, migrate
from .task import Task, check_tasks
from .task_options import check_generation_options

__all__ = ["MultiTaskConfig"]

# The types of fields, as they stand in the source.
_TYPES: dict[str, Any] = {"bool": bool, "int": int, "float": (float, int), "str": str, "None": type(None)}
_TYPES |= {"dict": dict, "list": (list, tuple)}
_POOLINGS = (None, "mean", "first", "last")
# What Transformers raises where a value is of another kind than it takes for granted.
_MISFITS = (
    *(StrictDataclassError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError, AssertionError),
    *(RecursionError, ImportError, NotImplementedError),
)


def _flat(kinds: list[Any]) -> tuple[type, ...]:
    return tuple(kind for one in kinds for kind in (one if isinstance(one, tuple) else (one,)))


class MultiTaskConfig(PreTrainedConfig):
    """Configuration of a multi-task model.

    Args:
        backbone_config: Configuration of the backbone, any that `AutoModel` knows.
        tasks: The tasks as a **list** of dictionaries: a configuration is written with sorted keys, so the order of
            a dictionary, and with it the rows of per-task tables, would be lost.
        pooling: `mean`, `first` or `last`; None takes `last` for a causal decoder and `mean` otherwise.
        head_dropout: Dropout in front of every head that sets none of its own.
        initializer_range: Standard deviation of the heads' initial weights.
        max_input_length: Longest input in tokens that the model was trained on.
        generation: Settings of `generate` that came with the backbone's checkpoint.
        untied_vocabulary: Tokens are predicted with another table than that of the input embeddings, although the
            backbone's configuration ties the two (as it does for T5 version 1.1 and FLAN-T5).
        config_version: Version of the format; what is read is always of the present one.

    Raises:
        ValueError: A value does not fit, or a configuration that is read could not have been written by this library.
    """

    sub_configs_defaults = {"backbone_config": SubConfigSpec(AutoConfig, model_type="bert")}

    backbone_config: Any = None
    tasks: list | None = None
    pooling: str | None = None
    head_dropout: float = 0.1
    initializer_range: float = 0.02
    max_input_length: int | None = None
    generation: dict | None = None
    untied_vocabulary: bool = False
    config_version: int = CONFIG_VERSION

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the tasks and store them as plain dictionaries."""
        super().__post_init__(**kwargs)
        if not 0.0 <= self.head_dropout < 1.0:
            raise ValueError(f"head_dropout must lie in [0, 1), got {self.head_dropout!r}")
        if not (self.initializer_range >= 0 and math.isfinite(self.initializer_range)):
            raise ValueError(f"initializer_range must be a finite number from 0, got {self.initializer_range!r}")
        if self.max_input_length is not None and self.max_input_length < 1:
            raise ValueError(f"max_input_length must be a positive whole number, got {self.max_input_length!r}")
        if self.pooling not in _POOLINGS:
            raise ValueError(f"pooling must be mean, first, last or None, got {shown(self.pooling)}")
        if (wrong := check_generation_options(self.generation)) is not None:
            raise ValueError(wrong)
        if self.config_version != CONFIG_VERSION:
            raise ValueError(f"config_version must be {CONFIG_VERSION}, got {self.config_version!r}")
        if self.tasks is not None and not isinstance(self.tasks, (list, tuple)):
            raise ValueError(f"tasks must be a list of tasks, got {type(self.tasks).__name__}")
        self.tasks = [task.to_dict() for task in check_tasks(self.tasks)] if self.tasks else []

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
        """Read a saved configuration, after checking its file."""
        check_named(pretrained_model_name_or_path, [CONFIG_NAME], kwargs, needed=True)
        check_config_file(pretrained_model_name_or_path, kwargs)
        return super().get_config_dict(pretrained_model_name_or_path, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the configuration as `PreTrainedConfig` does; in the folder of a saved model, record the change."""
        if Path(save_directory).is_file():
            return super().save_pretrained(save_directory, *args, **kwargs)
        with saving(save_directory, only_changes=True) as recording:
            super().save_pretrained(save_directory, *args, **kwargs)
            recording.add(CONFIG_NAME)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a configuration of a saved one, of this version or an older one.

        Raises:
            ValueError: It is of a newer version or another scheme, or a value does not fit.
        """
        if os.path.isdir(folder := kwargs.get("name_or_path") or ""):  # `AutoConfig` has read it by itself
            check_named(folder, [CONFIG_NAME])
        if not isinstance(config_dict, dict):
            raise ValueError(f"a configuration must be a dictionary, got {type(config_dict).__name__}")
        check_config(config_dict, cls.model_type)
        cls._check_types(config_dict)
        try:
            return super().from_dict(migrate(config_dict), **kwargs)
        except _MISFITS as error:
            raise ValueError(f"config.json has a value that does not fit: {shown(error)}") from error

    @classmethod
    def _check_types(cls, values: dict[str, Any]) -> None:
        """Raise ValueError where a value of a field of ours is of another type than the field."""
        for field in fields(cls):
            if field.name not in values or not isinstance(field.type, str):  # Transformers' own are no text
                continue
            value = values[field.name]
            names = [part.split("[")[0].strip() for part in field.type.split("|")]
            known = [_TYPES[name] for name in names if name in _TYPES]
            fits = isinstance(value, _flat(known)) and (not isinstance(value, bool) or bool in known)
            if len(known) == len(names) and not fits:
                raise ValueError(f"config.json: {field.name} must be {field.type}, got {shown(value)}")

    def get_tasks(self) -> list[Task]:
        """Return the tasks as [`Task`] objects, in order."""
        return [Task.from_dict(task) for task in self.tasks or []]

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Return the backbone's configuration: the one with the vocabulary, the width and the special tokens."""
        return cast(PreTrainedConfig, self.backbone_config.get_text_config(decoder=decoder, encoder=encoder))
