"""The configuration that every sharing scheme has: the backbone's, the tasks, and what their heads need."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .task import Task, check_tasks

__all__ = ["MultiTaskConfig"]


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
