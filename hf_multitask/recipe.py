"""Recipe files: a YAML description of a run → model, datasets, arguments.

```yaml
model:
  backbone: sentence-transformers/all-MiniLM-L6-v2   # Hub id or folder
  sharing: hard
tasks:
  - name: topic
    type: single_label_classification
    dataset: SetFit/bbc-news                         # Hub id, or files: data/topic-{split}.parquet
    label_column: label_text
training:                                            # MultiTaskTrainingArguments
  max_steps: 200
```

A task has the fields of [`Task`]; `labels` may be left out where the training rows name them (`labels: infer` for a
closed set of targets of a task that generates). `dataset` is one of

- a Hub id (`SetFit/bbc-news`);
- local files, `{split}` standing for `train`, `validation` and `test` (`data/topic-{split}.parquet`, also `.jsonl`,
  `.json` and `.csv`); those that exist are taken, relative to the current directory;
- `quickstart:NAME`, data that comes from the package registry (see [`hf_multitask.quickstart`]);
- a mapping of arguments of `datasets.load_dataset` (`path`, `name`, `revision`, `data_files`, `data_dir`) and, where
  splits have other names, `train`, `validation`, `test`; `validation: 0.1` takes a tenth of the training rows, and
  `test: null` leaves a split out.

Tasks with the same `dataset` read the same rows. A backbone may be `quickstart:NAME`, too. `model.tokenizer_kwargs`
are arguments of its tokenizer (`pad_token: "<|endoftext|>"` for a decoder without one, `add_prefix_space: true`),
`model.backbone_kwargs` those of `AutoModel.from_pretrained`.

A recipe is data, which may come from anyone: it cannot ask for code from elsewhere (`trust_remote_code`, kernels of the
Hub and the like). Whoever runs it can, by `--trust-remote-code` on the command line or `trust_remote_code=True` in
Python.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from .models.auto import SCHEMES
from .models.backbone import HUB_OPTIONS
from .models.base import MultiTaskModel
from .models.limits import is_text, shown
from .models.task import Task, TaskType, closest
from .recipe_file import parse_yaml, read_yaml
from .shipped_recipes import find_recipe
from .training_args import MultiTaskTrainingArguments

__all__ = ["Recipe", "RecipeParts", "build", "check_no_code", "load_recipe", "parse_overrides"]

_PREFIX = "quickstart:"
_SPLITS = ("train", "validation", "test")
_LOADING = ("path", "name", "revision", "data_files", "data_dir")
_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


@dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    Args:
        name: The file's name without its ending.
        model: `backbone`, `sharing`, and options of the sharing scheme.
        tasks: One mapping per task.
        training: Arguments of [`MultiTaskTrainingArguments`].
        trust_remote_code: Whether it may run code from elsewhere, such as that of a model on the Hub.
    """

    name: str
    model: dict[str, Any]
    tasks: list[dict[str, Any]]
    training: dict[str, Any]
    trust_remote_code: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain types, to be written beside its result; tokens of the Hub are left out."""
        model = {k: _without_tokens(v) if k.endswith("_kwargs") else v for k, v in self.model.items()}
        return {"model": model, "tasks": self.tasks, "training": _without_tokens(self.training)}


def _without_tokens(values: Any) -> Any:
    tokens = ("token", "use_auth_token", "hub_token")
    return {k: v for k, v in values.items() if k not in tokens} if isinstance(values, Mapping) else values


@dataclass(frozen=True)
class RecipeParts:
    """What a recipe describes, ready for [`MultiTaskTrainer`].

    Args:
        model: The multi-task model.
        tokenizer: The backbone's tokenizer.
        args: The training arguments.
        datasets: By split (`train`, `validation`, `test`), datasets by name.
    """

    model: MultiTaskModel
    tokenizer: Any
    args: MultiTaskTrainingArguments
    datasets: dict[str, dict[str, Any]]


def parse_overrides(settings: Sequence[str]) -> list[tuple[list[str], Any]]:
    """Split `key.path=value` settings; values are YAML (`10`, `1e-4`, `[a, b]`, `text`).

    Raises:
        ValueError: A setting has no `=`.
    """
    overrides = []
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise ValueError(f"--set {setting!r}: write it as key=value, for example training.max_steps=10")
        try:
            overrides.append((key.split("."), parse_yaml(value)))
        except ValueError:
            raise ValueError(f"--set {setting!r}: {value!r} is not a value in YAML; put text in quotes") from None
    return overrides


def load_recipe(path: str | Path, settings: Sequence[str] = (), trust_remote_code: bool = False) -> Recipe:
    """Read a recipe and apply settings.

    Args:
        path: The YAML file, or the name of a recipe that comes with the package (`quickstart`).
        settings: `key=value` each; a task is addressed by its name or number (`tasks.topic.weight=0.5`).
        trust_remote_code: Allow code from elsewhere, and load backbone and tokenizer with it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no valid recipe; an unknown key is named with the closest known one. Or it asks for code from
            elsewhere, which was not allowed.
    """
    path = find_recipe(path)
    content = read_yaml(path)
    for keys, value in parse_overrides(settings):
        _set(content, keys, value)
    recipe = _check(content, path)
    if not trust_remote_code:
        check_no_code(recipe)
        return recipe
    options = {"trust_remote_code": True, **recipe.model.get("backbone_kwargs", {})}
    return replace(recipe, model={**recipe.model, "backbone_kwargs": options}, trust_remote_code=True)


# Keys that bring in code from elsewhere, at any depth of a recipe, whatever their value (unless it is empty or false).
_CODE = (
    *("trust_remote_code", "code_revision", "auto_map", "custom_generate", "custom_pipelines"),
    *("use_kernels", "kernel_config", "allow_all_kernels"),
)
# Quantization whose own kernels come from the Hub is not told apart from other ones.
_QUANTIZED = "quantization_config"
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")


def check_no_code(recipe: Recipe) -> None:
    """Raise ValueError where a recipe asks for code from elsewhere; the key is named."""
    for place, key, value in _walk_keys(recipe.to_dict(), ""):
        if runs := _runs_code(key, value):
            raise ValueError(
                f"recipe {recipe.name!r}: {place}={shown(value)} {runs}; if you trust it, allow it yourself: "
                "--trust-remote-code on the command line, trust_remote_code=True in Python"
            )


def _walk_keys(value: Any, place: str) -> Iterator[tuple[str, str, Any]]:
    """Yield the place, the key and the value of everything that has a key."""
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, part in pairs:
        inner = f"{place}.{key}" if place else str(key)
        if isinstance(key, str):
            yield inner, key, part
        yield from _walk_keys(part, inner)


def _runs_code(key: str, value: Any) -> str | None:
    """Return what a key of a recipe would run, or None."""
    if key in _CODE and value not in (None, False, "", [], {}):
        return "would run code from elsewhere"
    if key.lstrip("_").startswith(_IMPLEMENTATIONS):
        for name in value.values() if isinstance(value, Mapping) else [value]:
            if "/" in str(name) or ":" in str(name):
                return "would run a kernel from the Hub"
            if str(name).removeprefix("paged|").startswith("flash_attention") and not _has_flash_attention(str(name)):
                return "would run a kernel from the Hub, because flash_attn is not installed"
    if key == _QUANTIZED and value and not (isinstance(value, Mapping) and _is_bitsandbytes(value)):
        return "may run kernels from the Hub (of bitsandbytes alone it is known that it does not)"
    return None


def _is_bitsandbytes(options: Mapping[str, Any]) -> bool:
    method = options.get(
        "quant_method", "bitsandbytes" if "load_in_4bit" in options or "load_in_8bit" in options else ""
    )
    return str(method).startswith("bitsandbytes")


def _has_flash_attention(name: str) -> bool:
    from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX as known

    found = [one for number, one in known.items() if name.endswith(f"flash_attention_{number}")]
    return bool(found) and bool(found[0]["general_availability_check"]())


def _set(content: dict[str, Any], keys: list[str], value: Any) -> None:
    place: Any = content
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(place, list):
            names = [item.get("name") if isinstance(item, dict) else None for item in place]
            if key in names:
                index = names.index(key)
            elif key.isdigit() and int(key) < len(place):
                index = int(key)
            else:
                raise ValueError(
                    f"--set {'.'.join(keys)}: no task {key!r}{closest(key, [n for n in names if n])}; "
                    f"tasks are {', '.join(map(str, names))}"
                )
            if last:
                place[index] = value
            place = place[index]
        elif last:
            place[key] = value
        else:
            if not isinstance(place.get(key), (dict, list)):
                place[key] = {}
            place = place[key]


def _check_keys(where: str, content: Any, known: Sequence[str], required: Sequence[str] = ()) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{where} must be a mapping, got {shown(content)}")
    for key in content:
        if key not in known:
            raise ValueError(f"{where}: unknown key {shown(key)}{closest(key, known)}; keys are {', '.join(known)}")
    for key in required:
        if key not in content:
            raise ValueError(f"{where}: key {key!r} is missing")


def _check(content: dict[str, Any], path: Path) -> Recipe:
    where = f"recipe {path.name!r}"
    _check_keys(where, content, ("model", "tasks", "training"), ("model", "tasks"))
    model = dict(content["model"]) if isinstance(content["model"], dict) else content["model"]
    sharing = model.get("sharing", "hard") if isinstance(model, dict) else "hard"
    if not isinstance(sharing, str) or sharing not in SCHEMES:
        raise ValueError(
            f"{where}, model.sharing: {shown(sharing)} is not known{closest(sharing, SCHEMES)}; "
            f"schemes are {', '.join(SCHEMES)}"
        )
    known = ("backbone", "sharing", "backbone_kwargs", "tokenizer_kwargs", *SCHEMES[sharing].options())
    _check_keys(f"{where}, model", model, known, ("backbone",))
    if not is_text(model["backbone"]):
        raise ValueError(f"{where}, model.backbone must be a Hub id or a folder, got {shown(model['backbone'])}")
    for key in ("backbone_kwargs", "tokenizer_kwargs"):
        if not isinstance(model.get(key, {}), dict) or not all(isinstance(name, str) for name in model.get(key, {})):
            raise ValueError(f"{where}, model.{key} must be a mapping of arguments, got {shown(model[key])}")
    if not model.get("backbone_kwargs", {}).get("weights_only", True):
        raise ValueError(
            f"{where}, model.backbone_kwargs: weights_only=false would run what a pickle says; leave it out"
        )
    if not isinstance(content["tasks"], list) or not content["tasks"]:
        raise ValueError(f"{where}: tasks must be a list of at least one task")
    task_fields = [field.name for field in fields(Task)]
    for task in content["tasks"]:
        name = task.get("name") if isinstance(task, dict) else task
        _check_keys(f"{where}, task {shown(name)}", task, task_fields, ("name", "type", "dataset"))
        if isinstance(task["dataset"], dict):
            _check_keys(f"{where}, task {shown(name)}, dataset", task["dataset"], (*_LOADING, *_SPLITS), ("path",))
            if not is_text(task["dataset"]["path"]):
                raise ValueError(
                    f"{where}, task {shown(name)}: dataset.path is {shown(task['dataset']['path'])}, no name"
                )
        elif not is_text(task["dataset"]):
            raise ValueError(
                f"{where}, task {shown(name)}: dataset must be a name or a mapping, got {shown(task['dataset'])}"
            )
    training = content.get("training") or {}
    arguments = [field.name for field in fields(MultiTaskTrainingArguments) if field.init]
    _check_keys(f"{where}, training", training, arguments)
    return Recipe(path.stem, model, content["tasks"], training)


def build(recipe: Recipe) -> RecipeParts:
    """Load the backbone and the datasets of a recipe and make the model.

    Raises:
        ValueError: A dataset has no training rows, labels cannot be found, or the recipe asks for code from elsewhere
            without being trusted.
    """
    from transformers import AutoTokenizer, set_seed

    if not recipe.trust_remote_code:
        check_no_code(recipe)
    training = {"output_dir": f"runs/{recipe.name}", "report_to": "none", **recipe.training}
    args = MultiTaskTrainingArguments(**training)
    names = _dataset_names(recipe)
    datasets: dict[str, dict[str, Any]] = {split: {} for split in _SPLITS}
    tasks = []
    for task in recipe.tasks:
        name = names[json.dumps(task["dataset"], sort_keys=True)]
        if name not in datasets["train"]:
            for split, rows in load_splits(task["dataset"], seed=args.seed).items():
                datasets[split][name] = rows
        tasks.append(_make_task({**task, "dataset": name}, datasets["train"][name]))
    options = {k: v for k, v in recipe.model.items() if k not in ("backbone", "sharing", "tokenizer_kwargs")}
    backbone = recipe.model["backbone"]
    if backbone.startswith(_PREFIX):
        from .quickstart import backbone_folder

        backbone = str(backbone_folder(backbone.removeprefix(_PREFIX)))
    # Said in so many words: otherwise Transformers asks on the terminal whether to run a backbone's own code.
    options["backbone_kwargs"] = {"trust_remote_code": False, **(options.get("backbone_kwargs") or {})}
    set_seed(args.seed)  # the heads start from it
    model = SCHEMES[recipe.model.get("sharing", "hard")].from_backbone(backbone, tasks, **options)
    where = {k: v for k, v in (options.get("backbone_kwargs") or {}).items() if k in HUB_OPTIONS}
    tokenizer = AutoTokenizer.from_pretrained(backbone, **{**where, **recipe.model.get("tokenizer_kwargs", {})})
    return RecipeParts(model, tokenizer, args, datasets)


def _make_task(values: dict[str, Any], rows: Any) -> Task:
    from .data.labels import infer_labels

    needed = "labels" not in values and values["type"] in [kind.value for kind in TaskType if kind.has_labels]
    if needed or values.get("labels") == "infer":
        # The name of the label column has a default, which the task knows best.
        column = values.get("label_column") or Task.from_dict({**values, "labels": ["a", "b"]}).label_column
        try:
            values = {**values, "labels": infer_labels(rows, column)}
        except ValueError as error:
            raise ValueError(f"task {values['name']!r}: {error}") from None
    return Task.from_dict(values)


def _dataset_names(recipe: Recipe) -> dict[str, str]:
    """Return a short, unique name for each distinct `dataset` of a recipe, by its JSON."""
    names: dict[str, str] = {}
    for task in recipe.tasks:
        spec = task["dataset"]
        key = json.dumps(spec, sort_keys=True)
        if key in names:
            continue
        if isinstance(spec, Mapping):
            name = "-".join(str(spec[part]).rsplit("/", 1)[-1] for part in ("path", "name") if spec.get(part))
            name = task["name"] if spec["path"] in _BUILDERS.values() else name
        else:
            name = Path(spec.removeprefix(_PREFIX)).name
            if Path(name).suffix in _BUILDERS:
                name = Path(name).stem.replace("{split}", "").strip("-_.") or task["name"]
        names[key] = name if name not in names.values() else f"{name}-{task['name']}"
    return names


def load_splits(spec: str | Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
    """Load the splits of a recipe's `dataset`.

    Args:
        spec: See the module's text.
        seed: Seed of a validation split that is taken from the training rows.

    Returns:
        Datasets by split, `train` among them.

    Raises:
        ValueError: There is no training split, or files or names do not exist.
    """
    from datasets import DatasetDict, load_dataset

    if isinstance(spec, str):
        spec = _spec_of(spec)
    chosen = {split: spec.get(split, split) for split in _SPLITS}
    loaded = load_dataset(**{key: value for key, value in spec.items() if key in _LOADING})
    if not isinstance(loaded, DatasetDict):
        raise ValueError(f"dataset {spec}: expected splits, got {type(loaded).__name__}")
    splits = {}
    for split, name in chosen.items():
        if name is None or isinstance(name, float):
            continue
        if name in loaded:
            splits[split] = loaded[name]
        elif split == "train" or split in spec:
            raise ValueError(f"dataset {spec['path']!r} has no split {name!r}; its splits are {', '.join(loaded)}")
    if isinstance(chosen["validation"], float):
        parts = splits["train"].train_test_split(test_size=chosen["validation"], seed=seed)
        splits["train"], splits["validation"] = parts["train"], parts["test"]
    return splits


def _spec_of(text: str) -> dict[str, Any]:
    """Return the arguments of `load_dataset` that a one-line `dataset` stands for."""
    if text.startswith(_PREFIX):
        from .quickstart import dataset_files

        return {"path": "parquet", "data_files": dict(dataset_files(text.removeprefix(_PREFIX)))}
    builder = _BUILDERS.get(Path(text).suffix)
    if builder is None:
        return {"path": text}
    files = {split: text.replace("{split}", split) for split in (_SPLITS if "{split}" in text else ("train",))}
    found = {split: file for split, file in files.items() if Path(file).is_file()}
    if "train" not in found:
        raise ValueError(f"dataset {text!r}: the file {files['train']!r} does not exist")
    return {"path": builder, "data_files": found}
