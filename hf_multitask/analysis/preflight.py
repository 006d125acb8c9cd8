"""Should this training be run? Minutes of looking, before hours of training.

What is looked at, in this order: the data ([`hf_multitask.analysis.preflight_data`]), losses before the first step
(`preflight_losses`), the sampling plan (`preflight_plan`), memory (`preflight_memory`), conflict between tasks
(`preflight_conflict`), and the first steps of the training itself, with its time (`preflight_trial`). What is too much
or too little stands in `preflight_limits`. Advice (`advisor`) follows from what was measured.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel

from ..data.dataset import MultiTaskDataset
from ..data.preprocessing import longest_input
from ..data.sources import make_sources
from ..data.streaming import is_stream
from ..models.auto import SCHEMES
from ..models.backbone import backbone_options
from ..models.task import Task
from ..recipe import RecipeParts, build, load_recipe
from ..trainer import MultiTaskTrainer
from ..training_args import settle_args
from .advisor import advise
from .evidence import Evidence
from .isolation import undisturbed
from .preflight_data import data_findings, data_table
from .preflight_result import Finding, Preflight
from .preflight_rows import SplitFacts, first_rows, read_lengths, read_split
from .preflight_run import PreflightRun, measure, name_of

__all__ = ["preflight"]

_LENGTH_ROWS = 5000  # of a split: the error of a share is 0.7 % at most

Datasets = dict[str, dict[str, Any]]


def preflight(
    recipe: str | Path | RecipeParts,
    settings: Sequence[str] = (),
    *,
    budget_seconds: float = 140.0,
    stream_rows: int = 1000,
    probe_rows: int = 64,
    seed: int = 0,
    output: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
    trust_remote_code: bool = False,
) -> Preflight:
    """Look at a recipe before its training: data, losses, sampling, memory, conflict, first steps, time.

    Nothing is written but `output`; parts that are given, and the random state, stay as they are. Mistakes in the
    recipe itself raise. What the trainer would refuse is a finding, so that the others are there too.

    Args:
        recipe: A recipe file, or its parts (see [`hf_multitask.recipe.build`]).
        settings: `key=value` changes of a recipe file.
        budget_seconds: Time for everything, in seconds. Data take what they take; conflict is measured on more or
            fewer batches, and as many first steps are made (at most 100, at least 3) as there is time for.
        stream_rows: Rows of a stream that are looked at, its first.
        probe_rows: Training rows of each dataset on which losses are measured.
        seed: Seed of the rows that are drawn.
        output: Folder that gets `preflight.json` and `preflight.md`.
        progress: Called with the name of each section when it begins.
        trust_remote_code: Allow a recipe's file code from elsewhere, such as that of a backbone on the Hub.

    Returns:
        [`Preflight`], which prints as a page.

    Raises:
        FileNotFoundError: There is no such recipe.
        TypeError: `recipe` is neither a file nor parts.
        ValueError: The recipe or an argument does not fit.

    Example:
        >>> report = preflight("recipes/quickstart.yaml")  # doctest: +SKIP
        >>> report.ok  # doctest: +SKIP
        True
    """
    _check(recipe, settings, budget_seconds, {"stream_rows": stream_rows, "probe_rows": probe_rows}, output)
    run = PreflightRun(budget_seconds, progress or (lambda name: None))
    with run.section("loading"):
        if isinstance(recipe, RecipeParts):
            name, parts = "the parts given", replace(recipe, model=copy.deepcopy(recipe.model))
        else:
            loaded = load_recipe(recipe, settings, trust_remote_code)
            name, parts = loaded.name, build(loaded)
    if parts.args.world_size > 1:
        raise ValueError("preflight measures in one process: start it without accelerate launch or torchrun")
    looked, whole = _first_rows(run, parts, stream_rows)
    with run.section("data"):
        facts = _read(parts, looked, whole, seed)
        run.findings += data_findings(facts)
        run.sections["data"] = data_table(facts)
    run.sections["tasks"] = [_describe(task, facts) for task in parts.model.tasks]
    run.sections["setting"] = _setting(parts)
    with tempfile.TemporaryDirectory() as folder, undisturbed(parts.model):
        with run.section("setup"):
            made = _make_trainer(run, parts, looked, folder)
        if made is not None:
            trainer, evaluated = made
            rows: Any = trainer.train_dataset
            if is_stream(parts.datasets["train"]):
                rows = trainer.prepare_datasets(looked["train"], "train_dataset", "train")
            measure(run, parts, trainer, rows, _variances(facts), evaluated, probe_rows, seed)
    known = {"budget_seconds": budget_seconds, "stream_rows": stream_rows, "probe_rows": probe_rows, "seed": seed}
    advice = advise(Evidence.from_preflight(run.sections))
    result = Preflight(name, tuple(run.findings), _plain(run.sections), advice, run.seconds, known)
    if output is not None:
        result.write(output)
    return result


def _check(
    recipe: Any, settings: Sequence[str], budget_seconds: float, counts: Mapping[str, int], output: str | Path | None
) -> None:
    if not isinstance(recipe, (str, Path, RecipeParts)):
        raise TypeError(f"recipe must be a file or RecipeParts, got {type(recipe).__name__}")
    if isinstance(recipe, RecipeParts) and settings:
        raise ValueError("settings change a recipe file, and parts were given; change these themselves")
    if not isinstance(budget_seconds, (int, float)) or not 0 < budget_seconds < math.inf:
        raise ValueError(f"budget_seconds must be a positive number, got {budget_seconds!r}")
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 2:
            raise ValueError(f"{name} must be a whole number of at least 2, got {value!r}")
    if output is not None and Path(output).exists() and not Path(output).is_dir():
        raise ValueError(f"output {str(output)!r} is a file; give a folder")


def _first_rows(run: PreflightRun, parts: RecipeParts, count: int) -> tuple[Datasets, dict[tuple[str, str], bool]]:
    """Return the datasets that are looked at, by split, and which of them are whole."""
    looked: Datasets = {}
    whole = {}
    for split, datasets in parts.datasets.items():
        looked[split] = {}
        for name, dataset in datasets.items():
            looked[split][name], whole[split, name] = first_rows(dataset, count)
            if not whole[split, name]:
                rows = len(looked[split][name])
                message = f"{split} is a stream; its first {rows:,} rows are looked at"
                run.findings.append(Finding("ok", "data", "stream", name, message, {"rows": rows}))
    return looked, whole


def _read(parts: RecipeParts, looked: Datasets, whole: Mapping[tuple[str, str], bool], seed: int) -> list[SplitFacts]:
    """Return what the rows hold, of every split and of every way in which a dataset is read."""
    facts = []
    longest = parts.args.max_length or longest_input(parts.tokenizer, parts.model)
    for split, datasets in looked.items():
        for source in make_sources(parts.model.tasks):
            if source.dataset in datasets:
                rows = datasets[source.dataset]
                one = read_split(rows, source, split, whole[split, source.dataset])
                if one is not None:
                    facts.append(read_lengths(one, rows, source, parts.tokenizer, longest, _LENGTH_ROWS, seed))
    return facts


def _make_trainer(
    run: PreflightRun, parts: RecipeParts, looked: Datasets, folder: str
) -> tuple[MultiTaskTrainer, dict[str, dict[str, int]]] | None:
    """Return the trainer of the training, which writes elsewhere, and the rows that it evaluates, by split and source.

    None, and a finding, if it refuses.
    """
    evaluated: dict[str, dict[str, int]] = {}
    try:
        settle_args(parts.args, None, None)
        args = copy.copy(parts.args)
        args.output_dir, args.report_to, args.push_to_hub, args.disable_tqdm = folder, [], False, True
        trainer = MultiTaskTrainer(
            model=parts.model,
            args=args,
            train_dataset=parts.datasets["train"],
            eval_dataset=looked.get("validation") or None,
            processing_class=parts.tokenizer,
        )
        if isinstance(trainer.eval_dataset, MultiTaskDataset):
            evaluated["validation"] = trainer.eval_dataset.sizes
        if looked.get("test"):
            evaluated["test"] = trainer.prepare_datasets(looked["test"], "test", "test", complete=False).sizes
    except (ValueError, TypeError) as error:
        mend = "mend this first: the training would stop before its first step"
        run.findings.append(Finding("fail", "setup", "setup", "", str(error), {}, mend))
        return None
    message = "the trainer takes the model, the rows and the arguments"
    run.findings.append(Finding("ok", "setup", "setup", "", message))
    return trainer, evaluated


def _describe(task: Task, facts: Sequence[SplitFacts]) -> dict[str, Any]:
    """Return what advice needs to know of a task."""
    train = next((one for one in facts if one.split == "train" and task in one.tasks), None)
    per_token = task.type.value.startswith(("token", "masked", "causal", "seq2seq", "question"))
    return {
        "name": task.name,
        "type": task.type.value,
        "granularity": "token" if per_token else "text",
        "auxiliary": task.auxiliary,
        "rows": train.rows if train is not None and train.complete else None,
    }


def _setting(parts: RecipeParts) -> dict[str, Any]:
    """Return what is chosen so far, under the names that [`Evidence`] has."""
    sharing = next((name for name, scheme in SCHEMES.items() if type(parts.model) is scheme), None)
    config = parts.model.config.backbone_config
    with torch.device("meta"):  # some schemes hold several encoders, some change theirs
        backbone = AutoModel.from_config(config, **backbone_options(type(config)))
    return {
        "backbone_parameters": backbone.num_parameters(),
        "primary": parts.args.primary_task,
        "sharing": sharing,
        "sampling": parts.args.task_sampling,
        "weighting": name_of(parts.args.loss_weighting),
        "combination": name_of(parts.args.gradient_combination),
    }


def _variances(facts: Sequence[SplitFacts]) -> dict[str, float]:
    """Return, by regression, the variance of its training labels, a mean over its values."""
    return {
        task: float(np.nanvar(labels.numbers, axis=0).mean())
        for one in facts
        if one.split == "train"
        for task, labels in one.labels.items()
        if labels.numbers is not None
    }


def _plain(value: Any) -> Any:
    """Return a copy in plain JSON types; numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.integer) else value
