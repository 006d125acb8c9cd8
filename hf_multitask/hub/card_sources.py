"""Where the facts of a model card come from: a recorded result, a saved folder, a trainer."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..metrics import primary_metric
from ..models.auto import SCHEMES
from ..models.configuration import MultiTaskConfig
from ..models.task import Task
from .card_facts import CardFacts, DatasetFacts, TaskFacts, finite, hub_backbone, training_values
from .code import CODE_FOLDER
from .push_files import check_saved_model, is_local_folder

__all__ = ["facts_of_folder", "facts_of_result", "facts_of_trainer", "last_evaluation"]

_VERSIONS = ("hf_multitask", "torch", "transformers", "datasets", "accelerate")
_CONFLICTS = ("gradient_conflicts.json", "conflicts.json")


def facts_of_result(results: Mapping[str, Any], name: str) -> CardFacts:
    """Return what `results.json`, which `hf-multitask train` writes, says of a model.

    Args:
        results: What the file holds.
        name: The model's name.
    """
    recipe = _mapping(results.get("recipe"))
    model, training = _mapping(recipe.get("model")), _mapping(recipe.get("training"))
    facts = CardFacts(name=name, location=str(training.get("output_dir") or f"runs/{name}"))
    facts.sharing = str(model.get("sharing", "hard")) if model else None
    facts.options = {k: v for k, v in model.items() if k not in ("backbone", "sharing") and not k.endswith("_kwargs")}
    facts.backbone = hub_backbone(model.get("backbone"))
    facts.tasks = [_task_of_recipe(task) for task in recipe.get("tasks") or [] if isinstance(task, dict)]
    if facts.tasks and all(task.dataset.registry for task in facts.tasks):
        facts.languages = ("en",)  # as the registry's datasets are
    if training:
        facts.methods, facts.arguments = training_values(training)
    found = _mapping(results.get("tasks"))
    for task in facts.tasks:
        own = _mapping(found.get(task.name))
        task.primary = own.get("primary_metric")
        task.rows_seen = own.get("rows_seen") if isinstance(own.get("rows_seen"), int) else None
        task.metrics = {
            split: {key: value for key, raw in own[split].items() if (value := finite(raw)) is not None}
            for split in ("validation", "test")
            if _mapping(own.get(split))
        }
    averages = _mapping(results.get("average"))
    facts.averages = {split: value for split, raw in averages.items() if (value := finite(raw)) is not None}
    facts.steps = results.get("steps") if isinstance(results.get("steps"), int) else None
    facts.seconds = finite(results.get("train_seconds"))
    facts.device = results.get("device")
    facts.versions = {str(key): str(value) for key, value in _mapping(results.get("versions")).items()}
    compared = _mapping(results.get("comparison"))  # results that are published may hold one
    if compared and set(_mapping(compared.get("tasks"))) <= {task.name for task in facts.tasks}:
        facts.comparison = dict(compared)
    return facts


def _task_of_recipe(task: Mapping[str, Any]) -> TaskFacts:
    name, kind = str(task.get("name")), str(task.get("type"))
    given = {key: value for key, value in task.items() if key not in ("dataset", "labels")}
    labels = task.get("labels")
    # Labels are not needed to know the other fields, and may be left out of a recipe.
    names = tuple(map(str, labels)) if isinstance(labels, (list, tuple)) else None
    made = Task.from_dict({**given, "labels": names or ("0", "1")} if _wants_labels(kind) else given)
    return _task_facts(made, DatasetFacts.from_recipe(task.get("dataset"), name), names)


def _wants_labels(kind: str) -> bool:
    return kind in ("single_label_classification", "multi_label_classification", "token_classification")


def _task_facts(task: Task, dataset: DatasetFacts, labels: tuple[str, ...] | None) -> TaskFacts:
    return TaskFacts(
        name=task.name,
        type=str(task.type),
        dataset=dataset,
        labels=labels,
        text_columns=task.text_columns,
        choice_columns=task.choice_columns,
        auxiliary=task.auxiliary,
        held_out=task.held_out,
        weight=float(task.weight),
    )


def facts_of_folder(folder: str | Path, name: str | None = None) -> CardFacts:
    """Return what a folder says of the model in it: its configuration, and results of its training if they are there.

    Read are `config.json`, `results.json`, `trainer_state.json`, `gradient_conflicts.json`, `comparison.json` and
    codecarbon's `emissions.csv`.

    Args:
        folder: The folder.
        name: The model's name (default: the folder's).

    Raises:
        FileNotFoundError: The folder holds no complete model.
        ValueError: It holds another kind of model, or one of the files is no JSON.
    """
    folder = Path(folder)
    config = check_saved_model(folder)
    name = name or folder.resolve().name
    facts = facts_of_result(_read(folder / "results.json") or {}, name)
    facts.name, facts.location = name, str(folder)
    _add_config(facts, config)
    state = _read(folder / "trainer_state.json")
    if state is not None:
        _add_state(facts, config.get_tasks(), state)
    _add_findings(facts, folder)
    facts.has_code = (folder / CODE_FOLDER).is_dir()
    return facts


def facts_of_trainer(trainer: Any, name: str | None = None) -> CardFacts:
    """Return what a trainer knows of its model, and what other commands wrote into its output folder.

    Args:
        trainer: A [`MultiTaskTrainer`] with a multi-task model.
        name: The model's name (default: that of its repository, or of the output folder).
    """
    folder = Path(trainer.args.output_dir)
    location = trainer.hub_model_id or trainer.args.hub_model_id or str(folder)
    facts = CardFacts(name=name or Path(location).name, location=location)
    model = trainer.accelerator.unwrap_model(trainer.model)
    _add_config(facts, model.config)
    rows = _rows_by_dataset(trainer)
    for task in facts.tasks:
        task.dataset = DatasetFacts.from_rows(task.dataset.name, rows.get(task.dataset.name))
        task.rows_seen = trainer.progress.rows_seen.get(task.name)
    facts.methods, facts.arguments = training_values(
        {key: getattr(trainer.args, key) for key in trainer.args.__dataclass_fields__}
    )
    _add_state(facts, model.tasks, {"log_history": trainer.state.log_history, "global_step": trainer.state.global_step})
    facts.device = str(trainer.args.device)
    facts.versions = {name: version(name) for name in _VERSIONS}
    _add_findings(facts, folder)
    facts.has_code = (folder / CODE_FOLDER).is_dir()
    return facts


def _rows_by_dataset(trainer: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for prepared in (trainer.train_dataset, trainer.eval_dataset):
        for source, rows in zip(getattr(prepared, "sources", ()), getattr(prepared, "rows", ()), strict=False):
            found.setdefault(source.dataset, rows)
    return found


def _add_config(facts: CardFacts, config: MultiTaskConfig) -> None:
    """Add what a model's configuration says; datasets and results that are known of a task stay."""
    known = {task.name: task for task in facts.tasks}
    facts.tasks = []
    for task in config.get_tasks():
        own = _task_facts(task, DatasetFacts(task.dataset), task.labels)
        if task.name in known:
            old = known[task.name]
            own.dataset, own.metrics, own.rows_seen = old.dataset, old.metrics, old.rows_seen
        own.primary = _primary(task)
        facts.tasks.append(own)
    scheme = next((name for name, one in SCHEMES.items() if one.config_class is type(config)), None)
    facts.sharing = scheme
    if scheme is not None:
        model_class = SCHEMES[scheme]
        default = model_class.config_class(backbone_config=config.backbone_config, tasks=config.tasks)
        common = (*MultiTaskConfig.__annotations__, "max_input_length")
        options = [name for name in model_class.options() if name not in common]
        facts.options = {name: v for name in options if (v := getattr(config, name)) != getattr(default, name)}
        with torch.device("meta"):
            facts.parameters = sum(parameter.numel() for parameter in model_class(config).parameters())
    facts.backbone_type = config.backbone_config.model_type
    facts.backbone_trained = len(getattr(config, "backbone_trained", None) or ())
    if facts.backbone is None:
        named = getattr(config, "backbone_name", None) or getattr(config.backbone_config, "_name_or_path", None)
        facts.backbone = None if is_local_folder(named) else hub_backbone(named)
    facts.longest = config.max_input_length


def _primary(task: Task) -> str:
    try:
        return primary_metric(task)
    except ValueError:  # of the user's own metrics
        return str(task.metric)


def _add_state(facts: CardFacts, tasks: list[Task], state: Mapping[str, Any]) -> None:
    """Add what the log of the training says, where it is not known from a result."""
    history = [line for line in state.get("log_history") or [] if isinstance(line, dict)]
    if not facts.splits:
        found = last_evaluation(history, [task.name for task in tasks])
        for task in facts.tasks:
            if own := found.get(task.name):
                task.metrics = {"validation": own}
        lines = [line["eval_average"] for line in history if finite(line.get("eval_average")) is not None]
        if lines:
            facts.averages = {"validation": float(lines[-1])}
    if facts.steps is None and state.get("global_step"):
        facts.steps = int(state["global_step"])
    if facts.seconds is None:
        facts.seconds = next((v for line in history if (v := finite(line.get("train_runtime"))) is not None), None)


def last_evaluation(history: list[dict[str, Any]], tasks: list[str]) -> dict[str, dict[str, float]]:
    """Return the metrics of each task in the last evaluation that a training's log has, by task.

    Args:
        history: The log's lines.
        tasks: Names of the tasks; the name of one may begin with that of another.
    """
    found: dict[str, dict[str, float]] = {}
    for line in reversed(history):
        for key, raw in line.items():
            own = max((name for name in tasks if key.startswith(f"eval_{name}_")), key=len, default=None)
            value = finite(raw)
            if own is not None and value is not None:
                found.setdefault(own, {})[key.removeprefix(f"eval_{own}_")] = value
        if found:
            break
    return found


def _add_findings(facts: CardFacts, folder: Path) -> None:
    """Add what other commands found out, where they wrote it into the folder."""
    names = {task.name for task in facts.tasks}
    for name in _CONFLICTS:
        conflicts = _read(folder / name)
        if conflicts is not None and set(conflicts.get("tasks") or ()) <= names:
            facts.conflicts = conflicts
            break
    comparison = _read(folder / "comparison.json")
    if comparison is not None and set(_mapping(comparison.get("tasks"))) <= names:
        facts.comparison = comparison
    facts.emissions = _emissions(folder / "emissions.csv")


def _emissions(file: Path) -> float | None:
    """Return the grams that codecarbon wrote down, in kilograms, for the last run."""
    if not file.is_file():
        return None
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    try:
        kilograms = finite(float(rows[-1]["emissions"])) if rows else None
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{str(file)!r} has no number in the column 'emissions' of its last row") from None
    return None if kilograms is None else 1000 * kilograms


def _read(file: Path) -> dict[str, Any] | None:
    """Return what a JSON file holds, or None where there is none.

    Raises:
        ValueError: It is no JSON object.
    """
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is no JSON ({error}); the model card reads it: mend or remove it") from None
    if not isinstance(content, dict):
        raise ValueError(f"{str(file)!r} holds no JSON object; the model card reads it: mend or remove it")
    return content


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}
