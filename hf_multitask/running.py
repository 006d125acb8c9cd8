"""Run a recipe from beginning to end: train, evaluate, save, and write down what came out."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .data.row_hashes import hash_evaluated_rows
from .folder_lock import locked_together
from .metrics import default_metric_names, primary_metric
from .recipe import Recipe, RecipeParts, build, load_recipe
from .run_description import check_changes
from .trainer import MultiTaskTrainer

__all__ = ["format_table", "run_recipe", "train_recipe"]

_VERSIONS = ("hf_multitask", "torch", "transformers", "datasets", "accelerate")


def run_recipe(
    path: str | Path,
    settings: Sequence[str] = (),
    resume: bool = False,
    allow_changes: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> str:
    """Train a recipe and return the closing table (on the main process; elsewhere an empty text).

    The output folder gets the model, its tokenizer, the trainer's state, and `results.json`: the recipe as it was
    run, versions, and per task the rows seen, its share of all rows, its metrics on the validation rows (and on
    the test rows, where there are any), and a SHA-256 of these rows.

    Args:
        path: The recipe file.
        settings: `key=value` changes, see [`hf_multitask.recipe.load_recipe`].
        resume: Resume from the last checkpoint of this run in the output folder.
        allow_changes: Training arguments that may differ from those of the checkpoint, see
            [`hf_multitask.run_description.CHANGEABLE`].
        trust_remote_code: Allow a recipe's file code from elsewhere, such as that of a backbone on the Hub.

    Raises:
        ValueError: The recipe, its data or its arguments do not fit, or the checkpoints in the folder are of another
            run; nothing has been written then.
        FolderInUseError: Another run is writing to the output folder.
    """
    results, trainer = train_recipe(load_recipe(path, settings, trust_remote_code), resume, allow_changes)
    if not trainer.is_world_process_zero():
        return ""
    return f"{format_table(results)}\nModel and results.json are in {trainer.args.output_dir}"


def train_recipe(
    recipe: Recipe, resume: bool | str = False, allow_changes: Sequence[str] = ()
) -> tuple[dict[str, Any], MultiTaskTrainer]:
    """Train a recipe, write what [`run_recipe`] writes, and return it.

    Args:
        recipe: The recipe.
        resume: Resume from the last checkpoint of this run in the output folder, or from the checkpoint of that name.
        allow_changes: As in [`run_recipe`].

    Returns:
        What `results.json` holds (on every process), and the trainer after training.

    Raises:
        ValueError: The recipe's data or arguments do not fit; nothing has been written then.
        FolderInUseError: Another run is writing to the output folder.
    """
    allow_changes = check_changes(allow_changes)
    parts = build(recipe)
    with locked_together(str(parts.args.output_dir), parts.args.should_save):
        return _train_parts(recipe, parts, resume, allow_changes)


def _train_parts(
    recipe: Recipe, parts: RecipeParts, resume: bool | str, allow_changes: Sequence[str]
) -> tuple[dict[str, Any], MultiTaskTrainer]:
    trainer = MultiTaskTrainer(
        model=parts.model,
        args=parts.args,
        train_dataset=parts.datasets["train"],
        eval_dataset=parts.datasets["validation"] or None,
        processing_class=parts.tokenizer,
    )
    trainer.facts_of_run = {f"model.{key} of the recipe": value for key, value in recipe.model.items()}
    test = None
    if parts.datasets["test"]:
        test = trainer.prepare_datasets(parts.datasets["test"], "test", "test", complete=False)
    checkpoint = resume or parts.args.resume_from_checkpoint
    outcome = trainer.train(resume_from_checkpoint=checkpoint, allow_changes=allow_changes)
    trainer.save_model()
    trainer.save_state()
    metrics = final_metrics(trainer) if parts.datasets["validation"] else {}
    if test is not None:
        metrics |= trainer.evaluate(test, metric_key_prefix="test")
    results = collect_results(recipe, trainer, metrics, outcome.metrics)
    for task in trainer.tasks:
        hashes = hash_evaluated_rows(task, parts.datasets, parts.args.max_eval_samples)
        results["tasks"][task.name]["rows_sha256"] = hashes
    if trainer.is_world_process_zero():
        file = Path(str(trainer.args.output_dir), "results.json")
        file.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return results, trainer


def final_metrics(trainer: MultiTaskTrainer) -> dict[str, float]:
    """Return the metrics of the model as it is: those of the last step, where it was evaluated and kept."""
    last = next((line for line in reversed(trainer.state.log_history) if "eval_runtime" in line), {})
    if last.get("step") == trainer.state.global_step and not trainer.args.load_best_model_at_end:
        return {key: value for key, value in last.items() if key.startswith("eval_")}
    return trainer.evaluate()


def collect_results(
    recipe: Recipe, trainer: MultiTaskTrainer, metrics: dict[str, float], training: dict[str, float]
) -> dict[str, Any]:
    """Return what `results.json` holds.

    Args:
        recipe: The recipe.
        trainer: The trainer after training.
        metrics: What `evaluate` returned for the splits.
        training: What `train` returned.
    """
    seen = trainer.progress.rows_seen
    total = sum(seen.values()) or 1
    tasks = {}
    for task in trainer.tasks:
        primary = primary_metric(task)
        tasks[task.name] = {
            "rows_seen": seen.get(task.name, 0),
            "share": seen.get(task.name, 0) / total,
            "primary_metric": primary,
        } | {
            split: {
                name: metrics[f"{prefix}_{task.name}_{name}"]
                for name in (*default_metric_names(task), "loss")
                if f"{prefix}_{task.name}_{name}" in metrics
            }
            for split, prefix in (("validation", "eval"), ("test", "test"))
            if f"{prefix}_{task.name}_{primary}" in metrics
        }
    return {
        "recipe": recipe.to_dict(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _VERSIONS},
        "tasks": tasks,
        "average": {split: metrics[key] for split, key in _averages(metrics)},
        "steps": trainer.state.global_step,
        "train_seconds": round(training["train_runtime"], 1),
        "train_loss": training["train_loss"],
        "peak_memory_mib": peak_memory(),
        "device": str(trainer.args.device),
    }


def _averages(metrics: dict[str, float]) -> list[tuple[str, str]]:
    keys = {
        "validation": "eval_average",
        "test": "test_average",
        "validation, held out": "eval_held_out_average",
        "test, held out": "test_held_out_average",
    }
    return [(split, key) for split, key in keys.items() if key in metrics]


def format_table(results: dict[str, Any]) -> str:
    """Return a run's table: task, rows seen, share, primary metric on validation and test rows."""
    splits = [split for split in ("validation", "test") if split in results["average"]]
    rows = [["task", "rows seen", "share", "metric", *splits]]
    for name, task in results["tasks"].items():
        values = [task.get(split, {}).get(task["primary_metric"]) for split in splits]
        shown = ["-" if value is None else f"{value:.3f}" for value in values]
        rows.append([name, f"{task['rows_seen']:,}", f"{task['share']:.1%}", task["primary_metric"], *shown])
    rows.append(["average", "", "", "", *[f"{results['average'][split]:.3f}" for split in splits]])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    right = {1, 2, *range(4, 4 + len(splits))}
    lines = [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def peak_memory() -> int | None:
    """Return the most memory this process has held so far, in MiB, or None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    # Kilobytes on Linux, bytes on macOS.
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024))
