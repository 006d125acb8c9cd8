"""What a model card may say: facts on a model, its tasks and its training. What is not known is None, or not there."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..quickstart import BACKBONES
from ..training_args import MultiTaskTrainingArguments

__all__ = ["CardFacts", "DatasetFacts", "TaskFacts", "finite", "hub_backbone", "training_values"]

_QUICKSTART = "quickstart:"
_BUILDERS = ("csv", "json", "parquet", "text", "arrow", "imagefolder", "audiofolder")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE_ENDINGS = (".parquet", ".jsonl", ".json", ".csv", ".txt", ".tsv", ".arrow", ".gz", ".zst")

# Arguments that say how a model was trained; others, like folders and tokens, say nothing of it.
_TELLING = (
    *("learning_rate", "backbone_learning_rate", "head_learning_rate", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "max_steps", "num_train_epochs", "lr_scheduler_type", "warmup_steps", "optim"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16", "seed", "data_seed"),
    *("max_length", "packing", "packing_length", "train_sampling_strategy", "batch_composition", "loss_reduction"),
    *("primary_task", "auxiliary_gating", "combination_every", "gradient_memory", "neftune_noise_alpha"),
    *("max_eval_samples", "predict_with_generate"),
)
_METHODS = ("task_sampling", "loss_weighting", "gradient_combination")
_DEFAULTS = {one.name: one.default for one in fields(MultiTaskTrainingArguments)}


def finite(value: Any) -> float | None:
    """Return a finite number as a float; None for anything else, NaN and truth values among them."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


@dataclass(frozen=True)
class DatasetFacts:
    """A dataset that tasks were trained and judged on.

    Args:
        name: A name for readers.
        hub_id: Its id on the Hub, if it is there.
        config: Name of the configuration there.
        revision: Its revision there.
        registry: Whether it comes from the package registry (see [`hf_multitask.quickstart`]).
    """

    name: str
    hub_id: str | None = None
    config: str | None = None
    revision: str | None = None
    registry: bool = False

    @property
    def type(self) -> str:
        """The identifier for the Hub; with a colon, which no id on the Hub has, where it is not there."""
        if self.hub_id is not None:
            return self.hub_id
        return f"{'quickstart' if self.registry else 'local'}:{self.name}"

    @classmethod
    def from_recipe(cls, dataset: Any, task: str) -> DatasetFacts:
        """Read a recipe's `dataset`; files of a machine are named by the task that reads them."""
        if isinstance(dataset, Mapping):
            path = str(dataset.get("path"))
            if path in _BUILDERS or dataset.get("data_files") or dataset.get("data_dir") or not _is_hub_id(path):
                return cls(task)
            config, revision = dataset.get("name"), dataset.get("revision")
            return cls(path, path, str(config) if config else None, str(revision) if revision else None)
        name = str(dataset)
        if name.startswith(_QUICKSTART):
            return cls(name.removeprefix(_QUICKSTART), registry=True)
        return cls(name, name) if _is_hub_id(name) else cls(task)

    @classmethod
    def from_rows(cls, name: str, rows: Any) -> DatasetFacts:
        """Read where the rows of `datasets.Dataset` came from, if it was the Hub."""
        info = getattr(rows, "info", None)
        for address in getattr(info, "download_checksums", None) or {}:
            match = re.match(r"hf://datasets/([^/@]+/[^/@]+)@([0-9a-f]+)/", str(address))
            if match:
                config = getattr(info, "config_name", None)
                return cls(name, match[1], None if config == "default" else config, match[2])
        return cls(name)


def _is_hub_id(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and not name.endswith(_FILE_ENDINGS) and not Path(name).exists()


@dataclass
class TaskFacts:
    """What is known of a task.

    Args:
        name: Its name.
        type: Its type.
        labels: Its labels, where it has some and they are known.
        dataset: Its dataset.
        text_columns: The columns of the texts it reads.
        choice_columns: The columns of the choices, for `multiple_choice`.
        auxiliary: Whether it was trained only to help others.
        held_out: Whether it was never trained.
        weight: Weight of its loss.
        primary: Its primary metric.
        metrics: By split, metrics by name; finite numbers.
        rows_seen: Rows of it that were trained on.
    """

    name: str
    type: str
    dataset: DatasetFacts
    labels: tuple[str, ...] | None = None
    text_columns: tuple[str, ...] = ("text",)
    choice_columns: tuple[str, ...] | None = None
    auxiliary: bool = False
    held_out: bool = False
    weight: float = 1.0
    primary: str | None = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    rows_seen: int | None = None

    @property
    def served(self) -> bool:
        """Whether the model answers it."""
        return not self.auxiliary and self.type != "masked_lm"


@dataclass
class CardFacts:
    """What is known of a model; a card is made of nothing else.

    Args:
        name: The model's name.
        location: What `from_pretrained` takes: a Hub id, or a folder.
        sharing: Its sharing scheme, a key of `SCHEMES`.
        options: The scheme's options that were given.
        tasks: Its tasks.
        backbone: Id of the backbone on the Hub.
        backbone_type: The backbone's `model_type`.
        backbone_trained: Tensors of a frozen backbone that were trained all the same.
        parameters: Number of parameters.
        longest: Longest input in tokens.
        averages: By split, mean of the primary metrics.
        methods: `task_sampling`, `loss_weighting`, `gradient_combination`: each the method and its arguments.
        arguments: Training arguments.
        steps: Optimizer steps.
        seconds: Seconds of training.
        device: Device of the training.
        versions: Of the libraries.
        conflicts: What `gradient_conflicts.json` holds.
        comparison: What `comparison.json` holds.
        emissions: Grams of CO2 equivalents.
        has_code: Whether the modelling code lies beside the model.
        license: The model's licence.
        languages: Languages of its texts.
        tags: Further tags.
    """

    name: str
    location: str
    tasks: list[TaskFacts] = field(default_factory=list)
    sharing: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    backbone: str | None = None
    backbone_type: str | None = None
    backbone_trained: int = 0
    parameters: int | None = None
    longest: int | None = None
    averages: dict[str, float] = field(default_factory=dict)
    methods: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None
    seconds: float | None = None
    device: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    conflicts: dict[str, Any] | None = None
    comparison: dict[str, Any] | None = None
    emissions: float | None = None
    has_code: bool = False
    license: str | None = None
    languages: Sequence[str] = ()
    tags: Sequence[str] = ()

    @property
    def splits(self) -> list[str]:
        """The splits that something was measured on."""
        return [split for split in ("validation", "test") if any(split in task.metrics for task in self.tasks)]


def hub_backbone(name: Any) -> str | None:
    """Return the Hub id of a backbone by its name in a recipe or configuration, if it has one."""
    name = str(name or "")
    if name.startswith(_QUICKSTART):
        source = BACKBONES.get(name.removeprefix(_QUICKSTART))
        return None if source is None else source.hub_id
    return name if _is_hub_id(name) else None


def training_values(
    given: Mapping[str, Any],
) -> tuple[dict[str, tuple[str, dict[str, Any]]], dict[str, Any]]:
    """Return the methods (with their arguments) and the arguments that say how a model was trained.

    Args:
        given: Training arguments by name. What is not there, or has its default, is left out of the arguments; the
            methods have their defaults.
    """
    methods = {}
    for name in _METHODS:
        method = given.get(name, _DEFAULTS[name])
        kwargs = given.get(f"{name}_kwargs") or {}
        methods[name] = (
            method if isinstance(method, str) else type(method).__name__,
            dict(kwargs) if isinstance(kwargs, Mapping) else {},
        )
    arguments = {}
    for name in _TELLING:
        value = given.get(name)
        if value is not None and value != _DEFAULTS.get(name) and not isinstance(value, (dict, list)):
            plain = getattr(value, "value", value)
            arguments[name] = plain if isinstance(plain, (str, int, float, bool)) else str(plain)
    for name in ("learning_rate", "per_device_train_batch_size"):
        arguments.setdefault(name, given.get(name, _DEFAULTS[name]))
    return methods, arguments
