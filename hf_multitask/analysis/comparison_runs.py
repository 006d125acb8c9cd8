"""The runs of a comparison on the disk: trained once, found again by their content, read back with care.

A finished run is a folder, `<name>-<beginning of its key>`, with `run.json` (what it is, its metrics, rows, steps and
seconds) and `predictions.safetensors` (what it gave for every validation row). It appears at once when the run is
through: one that was interrupted leaves nothing that could be taken for a result.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils.memory import clear_device_cache
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import PrinterCallback

from ..answer_metrics import answer_metrics
from ..data.dataset import MultiTaskDataset
from ..data.prompt_rows import ANSWER
from ..data.span_answers import predict_answers
from ..metrics import primary_metric
from ..models.task import Task, TaskType
from ..recipe import RecipeParts, build
from ..target_evaluation import part_of
from ..trainer import MultiTaskTrainer
from .baselines import Run
from .resampled_metrics import RowOutputs

__all__ = ["FinishedRun", "build_run", "check_same_data", "finish_run", "read_run"]

_RUN = "run.json"
_PREDICTIONS = "predictions.safetensors"
_PARTS = ("predictions", "labels", "losses", "items")


@dataclass(frozen=True)
class FinishedRun:
    """What a run left.

    Args:
        folder: Its folder.
        name: The run in words.
        key: The hash of what it depends on.
        metrics: By task, its metrics on the validation rows.
        primary: By task, the name of its primary metric; empty where the user's own function names it.
        rows_seen: By task, the training rows it read.
        rows: By task, the hash of its validation rows.
        steps: Optimizer steps.
        train_seconds: How long the training took.
    """

    folder: Path
    name: str
    key: str
    metrics: dict[str, dict[str, float]]
    primary: dict[str, str]
    rows_seen: dict[str, int]
    rows: dict[str, str]
    steps: int
    train_seconds: float

    def outputs(self, task: str) -> RowOutputs:
        """Return what it gave for the validation rows of a task."""
        stored = load_file(self.folder / _PREDICTIONS)
        begin = f"{task}/scores/"
        scores = {name.removeprefix(begin): value for name, value in stored.items() if name.startswith(begin)}
        return RowOutputs(**{part: stored[f"{task}/{part}"] for part in _PARTS}, scores=scores)


def finish_run(
    run: Run,
    parts: RecipeParts,
    folder: Path,
    compute_metrics: Mapping[str, Any] | None = None,
    say: Callable[[str], Any] | None = None,
) -> FinishedRun:
    """Return a run, after training it where it has not been.

    Args:
        run: The run.
        parts: The recipe's parts, whose datasets all runs read.
        folder: Where runs are kept.
        compute_metrics: The user's metric functions by task.
        say: Called with a line when a training begins and ends.
    """
    place = folder / f"{run.name}-{run.key[:12]}"
    found = read_run(place, run)
    if found is not None:
        return found
    if say is not None:
        say(f"training {run.name}")
    working = place.with_name(f"{place.name}.part")
    if working.exists():
        shutil.rmtree(working)
    working.mkdir(parents=True)
    trainer = _train(run, parts, working, compute_metrics or {})
    # Checkpoints for the best of them, and what else the trainer wrote, have had their use.
    shutil.rmtree(working / "trainer", ignore_errors=True)
    os.replace(working, place)
    found = read_run(place, run)
    assert found is not None
    if say is not None:
        shown = {task: metrics.get(found.primary[task]) for task, metrics in found.metrics.items()}
        values = ", ".join(f"{task} {value:.4f}" for task, value in shown.items() if value is not None)
        say(f"finished {run.name} in {found.train_seconds:.0f} s: {values}")
    on_accelerator = trainer.args.device.type != "cpu"
    del trainer
    if on_accelerator:  # the next model is moved there before its trainer tidies up
        clear_device_cache(garbage_collection=True)
    return found


def build_run(run: Run, parts: RecipeParts, output_dir: Path | str) -> RecipeParts:
    """Return what a run is trained from; its rows are those of the whole recipe.

    Args:
        run: The run.
        parts: The recipe's parts.
        output_dir: Where the trainer writes.
    """
    own = build(replace(run.recipe, training={**run.recipe.training, "output_dir": str(output_dir)}))
    by_name = {task.name: task for task in parts.model.tasks}
    # A validation split that is cut off the training rows would be another one for every seed.
    datasets: dict[str, dict[str, Any]] = {
        split: {
            task.dataset: rows[by_name[task.name].dataset]
            for task in own.model.tasks
            if by_name[task.name].dataset in rows
        }
        for split, rows in parts.datasets.items()
    }
    return replace(own, datasets=datasets)


def _train(run: Run, parts: RecipeParts, folder: Path, custom: Mapping[str, Any]) -> MultiTaskTrainer:
    own = build_run(run, parts, folder / "trainer")
    names = [task.name for task in own.model.tasks]
    trainer = MultiTaskTrainer(
        model=own.model,
        args=own.args,
        train_dataset=own.datasets["train"],
        eval_dataset=own.datasets["validation"],
        processing_class=own.tokenizer,
        compute_metrics={name: function for name, function in custom.items() if name in names},
    )
    trainer.remove_callback(PrinterCallback)
    outcome = trainer.train()
    # Rows are paired by their place: they must come in the order of the dataset.
    trainer.args.train_sampling_strategy = "random"
    content = {
        "name": run.name,
        "key": run.key,
        "content": run.content,
        "metrics": {},
        "primary": {},
        "rows_seen": {name: trainer.progress.rows_seen.get(name, 0) for name in names},
        "rows": {name: run.content["rows"][name].get("validation", "") for name in names},
        "steps": trainer.state.global_step,
        "train_seconds": round(outcome.metrics["train_runtime"], 3),
    }
    tensors: dict[str, np.ndarray] = {}
    for task, metrics, outputs in _judge(trainer, trainer.eval_dataset):
        # The recipe may name another metric later.
        usual = "" if task.name in custom else primary_metric(replace(task, metric=None))
        content["metrics"][task.name], content["primary"][task.name] = metrics, usual
        parts_of = {part: getattr(outputs, part) for part in _PARTS}
        parts_of |= {f"scores/{name}": value for name, value in outputs.scores.items()}
        tensors |= {f"{task.name}/{part}": np.ascontiguousarray(value) for part, value in parts_of.items()}
    save_file(tensors, folder / _PREDICTIONS)
    (folder / _RUN).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return trainer


def _judge(trainer: MultiTaskTrainer, dataset: MultiTaskDataset) -> Iterator[tuple[Task, dict[str, float], RowOutputs]]:
    """Yield, for each task that is trained for its own sake, its metrics and what the model gave for each row."""
    for source, outputs, metrics in trainer._run_sources(dataset, "eval", None):
        for task in source.tasks:
            if not (task.auxiliary or task.held_out):
                logits, losses, items = outputs.predictions[task.name]
                scores = _score(trainer, task, part_of(dataset, source), logits)
                if task.type is TaskType.QUESTION_ANSWERING:
                    logits = logits[:, :0]  # large, and answers were found in them by now
                own = {**metrics[task.name], **{name: float(np.mean(values)) for name, values in scores.items()}}
                yield task, own, RowOutputs(logits, outputs.label_ids[task.name], losses, items, scores)


def _score(trainer: MultiTaskTrainer, task: Task, rows: MultiTaskDataset, logits: np.ndarray) -> dict[str, np.ndarray]:
    """Return metrics that no number of a single row tells, for each example."""
    if task.type is TaskType.QUESTION_ANSWERING:
        answers, references = predict_answers(task, rows.rows[0], list(logits))
        found = [answer_metrics([one], [right]) for one, right in zip(answers, references or [], strict=True)]
        return {name: np.array([values[name] for values in found]) for name in ("f1", "exact_match")}
    if task.type.generates and task.labels:
        ranked = trainer._evaluator(task).label_scores(rows)
        wanted = [int(rows[number][ANSWER]) for number in range(len(rows))]
        return {"label_accuracy": np.equal(np.argmax(ranked, axis=1), wanted).astype(np.float64)}
    return {}


def read_run(folder: Path, run: Run) -> FinishedRun | None:
    """Return a finished run, or None where there is none.

    Raises:
        ValueError: The folder is of another run, a file is cut off, or a metric is missing or no number.
    """
    if not folder.is_dir():
        return None

    def fail(what: str) -> ValueError:
        return ValueError(f"run folder {str(folder)!r}: {what}; delete the folder, and the run is made again")

    for name in (_RUN, _PREDICTIONS):
        if not (folder / name).is_file():
            raise fail(f"{name} is missing")
    try:
        content = json.loads((folder / _RUN).read_text(encoding="utf-8"))
        with safe_open(folder / _PREDICTIONS, "np") as tensors:
            stored = set(tensors.keys())
        found = FinishedRun(folder, *(content[name] for name in list(FinishedRun.__dataclass_fields__)[1:]))
    except KeyError as error:
        raise fail(f"{_RUN} lacks {error}") from None
    except Exception as error:  # of the reader of safetensors, which has a kind of its own
        raise fail(f"it cannot be read ({error})") from None
    if found.key != run.key:
        raise fail("it is of another run")
    for task in _judged(run):
        metric = found.primary[task] = run.metrics[task] or found.primary.get(task, "")
        if task not in run.content["custom metrics"]:
            value = found.metrics.get(task, {}).get(metric)
            if value is None:
                raise fail(f"task {task!r} has no metric {metric!r}")
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise fail(f"metric {metric!r} of task {task!r} is {value}")
        for part in _PARTS:
            if f"{task}/{part}" not in stored:
                raise fail(f"{_PREDICTIONS} lacks {part} of task {task!r}")
    return found


def _judged(run: Run) -> list[str]:
    return [task["name"] for task in run.content["tasks"] if not (task["auxiliary"] or task.get("held_out"))]


def check_same_data(runs: Sequence[FinishedRun], task: str) -> None:
    """Check that runs were judged on the same validation rows of a task.

    Raises:
        ValueError: They were not.
    """
    first = runs[0]
    for other in runs[1:]:
        if other.rows.get(task) != first.rows.get(task):
            raise ValueError(
                f"task {task!r}: {first.name} and {other.name} were judged on different validation rows (hashes "
                f"{first.rows.get(task, 'none')[:12]} and {other.rows.get(task, 'none')[:12]}), which cannot be "
                "compared; delete the older of the folders " + f"{str(first.folder)!r} and {str(other.folder)!r}"
            )
