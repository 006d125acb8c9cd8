"""From a recipe to groups of tasks: one training of all of them, measured on the way, and the best split."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..folder_lock import locked
from ..recipe import Recipe, RecipeParts, build, load_recipe
from ..training_args import MultiTaskTrainingArguments
from .affinity import AffinityTrainer, check_method, measured_tasks
from .grouping_result import TaskGroups, check_most

__all__ = ["group_tasks"]

_RESULT = "grouping.json"
_VERSIONS = ("hf_multitask", "torch", "transformers")
_PRECISIONS = ("bf16", "fp16", "torch_compile")


def group_tasks(
    recipe: str | Path | Recipe | RecipeParts,
    groups: int = 2,
    *,
    method: str = "affinity",
    steps: int | None = None,
    every: int | None = None,
    confidence: float = 0.95,
    settings: Sequence[str] = (),
    output: str | Path | None = None,
    say: Callable[[str], Any] | None = None,
    trust_remote_code: bool = False,
) -> TaskGroups:
    """Train all tasks together once, measure what they do to each other, and find the best split into groups.

    Each group is one model; a task is served by one of them. Auxiliary tasks are helpers: they are put into whichever
    groups they help, several or none, and no group has to serve them. Tasks that are held out, or weigh 0, are not
    trained and so not grouped.

    The training is the recipe's, in float32, without evaluation and checkpoints; its model is not kept.

    Args:
        recipe: A recipe or its file; or its parts (see [`hf_multitask.recipe.build`]), whose model stays as it is.
        groups: The largest number of groups.
        method: `affinity`, what a step for one task does to another's loss (see
            [`hf_multitask.analysis.lookahead`]), or `conflict`, the cosine of their gradients in the same steps, which
            is cheaper, and symmetric: it cannot tell that a task helps another that harms it.
        steps: Optimizer steps to train (default: the recipe's).
        every: Measure every so many steps (default: 10, or less, so that 50 steps are measured).
        confidence: Coverage of the intervals.
        settings: `key=value` changes of a recipe file.
        output: Folder that gets `grouping.json` (default: `runs/<recipe>-grouping`; none for parts).
        say: Called with a line about what is being done.
        trust_remote_code: Allow a recipe's file code from elsewhere, such as that of a backbone on the Hub.

    Returns:
        [`TaskGroups`], which prints as a table.

    Raises:
        FileNotFoundError: There is no such recipe.
        TypeError: `recipe` is none of these.
        ValueError: An argument, the recipe or its data does not fit, there are not two tasks to group, or they share
            nothing (nothing has been trained then); or two tasks never came together in a measured step.

    Example:
        >>> found = group_tasks("job.yaml", groups=2)  # doctest: +SKIP
        >>> found.groups  # doctest: +SKIP
        (('sentiment', 'emotion'), ('topic',))
    """
    check_method(method)
    _check_numbers({"steps": steps, "every": every}, confidence)
    name, parts, described = _load(recipe, settings, trust_remote_code)
    folder = Path("runs", f"{name}-grouping") if output is None and described else output
    if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
        raise ValueError(f"output {str(folder)!r} is a file; choose a folder")
    tasks = measured_tasks(parts.model)
    helpers = tuple(task.name for task in parts.model.tasks if task.auxiliary and task.name in tasks)
    if len(tasks) - len(helpers) < 2:
        alone = next(name for name in tasks if name not in helpers)
        raise ValueError(f"there is nothing to split: {alone!r} is the only trained task that is not auxiliary")
    check_most(groups, len(tasks) - len(helpers))
    if not parts.datasets.get("train"):
        raise ValueError("there is no training data: the parts' datasets['train'] is empty")
    in_use = contextlib.nullcontext() if folder is None else locked(folder)
    with in_use, tempfile.TemporaryDirectory() as scratch:
        trainer = AffinityTrainer(
            model=parts.model,
            args=_quiet(parts.args, steps, scratch),
            train_dataset=parts.datasets["train"],
            eval_dataset=parts.datasets.get("validation") or None,
            processing_class=parts.tokenizer,
            method=method,
            every=every,
        )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        if say is not None:
            say(f"training {', '.join(tasks)} together, to measure {method}")
        outcome = trainer.train()
    found = {
        "recipe": described,
        "steps": trainer.state.global_step,
        "every": trainer.every,
        "seed": parts.args.seed,
        "train_seconds": round(outcome.metrics["train_runtime"], 1),
        "versions": {package: version(package) for package in _VERSIONS},
    }
    result = TaskGroups.from_series(trainer.series(), helpers, method, groups, confidence=confidence, settings=found)
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        result.save(Path(folder, _RESULT))
    return result


def _load(recipe: Any, settings: Sequence[str], trust_remote_code: bool) -> tuple[str, RecipeParts, dict[str, Any]]:
    """Return the name, the parts, and what is known of a recipe."""
    if isinstance(recipe, (Recipe, RecipeParts)) and settings:
        raise ValueError("settings change a recipe's file; this recipe was read already")
    if isinstance(recipe, RecipeParts):
        return "the parts given", replace(recipe, model=copy.deepcopy(recipe.model)), {}
    if not isinstance(recipe, (str, Path, Recipe)):
        raise TypeError(f"recipe must be a file, a Recipe or RecipeParts, got {type(recipe).__name__}")
    read = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, settings, trust_remote_code)
    precise = {key: value for key, value in read.training.items() if key not in _PRECISIONS}
    return read.name, build(replace(read, training=precise)), read.to_dict()


def _quiet(args: MultiTaskTrainingArguments, steps: int | None, folder: str) -> MultiTaskTrainingArguments:
    """Return the arguments of a run that leaves nothing behind; evaluated only where its course follows from that."""
    args = copy.copy(args)
    args.output_dir, args.save_strategy, args.load_best_model_at_end = folder, SaveStrategy.NO, False
    args.report_to, args.push_to_hub, args.eval_on_start = [], False, False
    follows = args.task_sampling == "performance_gap" or args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
    if not follows:
        args.eval_strategy = IntervalStrategy.NO
    if steps is not None:
        args.max_steps = steps
    return args


def _check_numbers(numbers: dict[str, Any], confidence: Any) -> None:
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    if isinstance(confidence, bool) or not isinstance(confidence, (int, float)) or not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence!r}")
