"""How much of an auxiliary task helps, and from which weight on does it harm? A recipe trained weight by weight.

The auxiliary task stays in the model at every weight, 0 among them, and its rows are drawn all the same. So, with the
same seed, the other tasks see the same rows in the same order in every run, and nothing but the weight differs. At
weight 0 the labels of the auxiliary task change nothing: that run is the one to compare with, at an equal number of
rows of the primary tasks. (To leave the task out would give the others more rows of each step, another comparison.)

Some things reach the other tasks at weight 0 as well: a `loss_weighting` other than `static` looks at all losses to
weigh each one, and the routers of a mixture of experts are balanced over all rows. And where `task_sampling` follows
the metrics (`performance_gap`), runs of different weights draw different rows.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import clear_device_cache
from transformers.utils import logging

from ..folder_lock import locked_together
from ..metrics import primary_direction, primary_metric
from ..models.task import Task, closest
from ..recipe import Recipe, RecipeParts, build, load_recipe, parse_overrides
from ..running import train_recipe
from .sweep_folder import SWEEP_NAME, begin_run, claim_folder, describe_run, plan_run, write_json
from .sweep_result import AuxiliarySweep, SweepRun

__all__ = ["sweep_auxiliary"]

logger = logging.get_logger(__name__)

T = TypeVar("T")


def sweep_auxiliary(
    recipe: str | Path,
    auxiliary: str,
    weights: Sequence[float],
    *,
    seeds: Sequence[int] | None = None,
    settings: Sequence[str] = (),
    output: str | Path | None = None,
    primary: str | None = None,
    say: Callable[[str], Any] | None = None,
    trust_remote_code: bool = False,
) -> AuxiliarySweep:
    """Train a recipe for each weight of an auxiliary task and each seed, and find where it saturates and interferes.

    Each run has a folder of its own, `weight-<w>-seed-<s>` below `output`, with the model and `results.json`; the
    whole goes to `sweep.json` in `output`. A sweep that was interrupted goes on when it is started again: runs that
    are finished are not repeated, and one that was stopped in the middle goes on from its last checkpoint, if the
    recipe saves any. Weights and seeds may be added later. A run whose recipe, settings or number of processes have
    changed since is made anew in place of the old one, with a warning that names what changed; the others stay.

    Args:
        recipe: The recipe file. Its `output_dir` and the task's `weight` are not used.
        auxiliary: Name of the auxiliary task.
        weights: Its weights: 0 and at least one other.
        seeds: Seeds of the heads, of the order of the rows (unless the recipe sets `data_seed`), of dropout, and of
            validation rows taken from the training rows (default: the recipe's seed alone). Without several of them
            nothing is known about chance.
        settings: `key=value` changes of the recipe, as in [`hf_multitask.recipe.load_recipe`].
        output: The folder (default: `runs/<recipe>-sweep`).
        primary: The task whose primary metric counts (default: the recipe's `primary_task`; without one, the mean over
            all tasks that are not auxiliary). It only says what is reported, and may be changed afterwards.
        say: Called, on the main process, with a line about each run.
        trust_remote_code: Allow a recipe's file code from elsewhere, such as that of a backbone on the Hub.

    Returns:
        [`AuxiliarySweep`], which prints as a table; the same on every process.

    Raises:
        FileNotFoundError: There is no such recipe.
        ValueError: An argument, the recipe or its data does not fit, or the folder is of something else; nothing has
            been trained then.
        FolderInUseError: Another sweep is writing to the folder.

    Example:
        >>> sweep = sweep_auxiliary("job.yaml", "lm", [0, 0.1, 0.2, 0.3], seeds=[0, 1, 2])  # doctest: +SKIP
        >>> sweep.interference_threshold  # doctest: +SKIP
        0.3
    """
    weights, chosen = _check_weights(weights), _check_seeds(seeds)
    base = load_recipe(recipe, settings, trust_remote_code)
    primary = _check_tasks(base, auxiliary, primary)
    _check_training(base, settings)
    folder = Path(output or Path("runs", f"{base.name}-sweep"))
    # Made once beforehand, to see what only its data and its arguments tell.
    parts = build(_variant(base, auxiliary, weights[-1], None if chosen is None else chosen[0], folder))
    by_name = {task.name: task for task in parts.model.tasks}
    primary, higher_is_better = _check_validation(parts, by_name, auxiliary, primary)
    seeds, processes = chosen or [parts.args.seed], parts.args.world_size
    if PartialState().is_main_process:
        _warn_of_other_ways(parts, auxiliary)
    del parts
    names = [task["name"] for task in base.tasks]
    sweep = {"recipe": base.name, "backbone": base.model["backbone"], "tasks": names, "auxiliary": auxiliary}
    _on_main(lambda: claim_folder(folder, sweep))
    with locked_together(folder, PartialState().is_main_process):
        results: dict[tuple[float, int], dict[str, Any]] = {}
        for seed in seeds:  # a whole curve first, its spread later
            for weight in weights:
                run = _variant(base, auxiliary, weight, seed, folder)
                about = f"run {len(results) + 1} of {len(weights) * len(seeds)}: weight {weight:g}, seed {seed}"
                results[weight, seed] = _finish_run(run, processes, about, say)
        runs = []
        for (weight, seed), found in results.items():
            details = {key: value for key, value in found.items() if key != "recipe"}
            runs.append(SweepRun(weight, seed, *_measure(found, auxiliary, primary), details))
        versions = [run.details["versions"] for run in runs]
        if any(one != versions[0] for one in versions) and PartialState().is_main_process:
            logger.warning(
                f"the runs were made with different versions of libraries; {SWEEP_NAME} tells them run by run"
            )
        result = AuxiliarySweep(
            auxiliary=auxiliary,
            primary=primary,
            metric="average" if primary is None else primary_metric(by_name[primary]),
            auxiliary_metric=primary_metric(by_name[auxiliary]),
            higher_is_better=higher_is_better,
            runs=tuple(runs),
            recipe=base.to_dict(),
            versions=versions[-1],
            sweep=sweep,
        )
        _on_main(lambda: write_json(folder / SWEEP_NAME, result.to_dict()))
        return result


def _check_weights(weights: Any) -> list[float]:
    weights = [weights] if isinstance(weights, (str, numbers.Real)) else list(weights)
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real) or not 0 <= float(weight) < math.inf:
            raise ValueError(f"weights must be finite numbers of at least 0, got {weight!r}")
    found = [float(weight) + 0.0 for weight in weights]  # 0.0 for -0.0
    twice = sorted({weight for weight in found if found.count(weight) > 1})
    if twice:
        raise ValueError(f"weights: {', '.join(f'{weight:g}' for weight in twice)} is there more than once")
    if 0.0 not in found or len(found) < 2:
        given = ", ".join(f"{weight:g}" for weight in found) or "none"
        raise ValueError(
            f"weights must be 0, which the others are compared with, and at least one more; got {given}; "
            "for example 0 0.1 0.2 0.3"
        )
    return sorted(found)


def _check_seeds(seeds: Any) -> list[int] | None:
    if seeds is None:
        return None
    seeds = [seeds] if isinstance(seeds, (str, numbers.Real)) else list(seeds)
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not 0 <= int(seed) < 2**32:
            raise ValueError(f"seeds must be whole numbers from 0 to 2^32 - 1, got {seed!r}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different numbers, at least one; got {', '.join(map(str, seeds)) or 'none'}")
    return sorted(int(seed) for seed in seeds)


def _check_tasks(recipe: Recipe, auxiliary: str, primary: str | None) -> str | None:
    """Check the names of both tasks, and return that of the primary one, which the recipe may give."""
    tasks = {task["name"]: task for task in recipe.tasks}
    given = "primary" if primary is not None else "training.primary_task"
    primary = recipe.training.get("primary_task") if primary is None else primary
    for argument, name in (("auxiliary", auxiliary), (given, primary)):
        if name is not None and name not in tasks:
            raise ValueError(
                f"{argument} {name!r} is no task of recipe {recipe.name!r}{closest(name, tasks)}; "
                f"tasks are {', '.join(map(str, tasks))}"
            )
    if tasks[auxiliary].get("auxiliary") is not True:
        raise ValueError(
            f"task {auxiliary!r} is not auxiliary: say that it only helps the others, with 'auxiliary: true' in the "
            f"recipe or --set tasks.{auxiliary}.auxiliary=true"
        )
    if primary is not None and tasks[primary].get("auxiliary"):
        own = [str(name) for name, task in tasks.items() if not task.get("auxiliary")]
        raise ValueError(f"{given} {primary!r} is auxiliary; choose a task that counts, of {', '.join(own)}")
    return primary


def _check_training(recipe: Recipe, settings: Sequence[str]) -> None:
    if any(keys == ["training", "output_dir"] for keys, _ in parse_overrides(settings)):
        raise ValueError("--set training.output_dir does not go with a sweep, whose runs have folders below output")
    for name, why in (
        ("resume_from_checkpoint", "it goes on by itself; leave it out"),
        ("prediction_loss_only", "it compares metrics; leave it out"),
    ):
        if recipe.training.get(name):
            raise ValueError(f"recipe {recipe.name!r}, training.{name} does not go with a sweep: {why}")


def _check_validation(
    parts: RecipeParts, tasks: dict[str, Task], auxiliary: str, primary: str | None
) -> tuple[str | None, bool]:
    """Check that there is something to measure.

    Returns:
        The primary task, the only one that counts if there are no others, and whether larger values of the primary
        metric are better.
    """
    measured = [task for task in tasks.values() if task.dataset in parts.datasets["validation"]]
    own = [task for task in measured if not task.auxiliary]
    mend = "give it a validation split, or a part of its training rows: dataset: {path: ..., validation: 0.1}"
    for name in (auxiliary, primary):
        if name is not None and tasks[name] not in measured:
            raise ValueError(f"task {name!r} has no validation rows, which a sweep measures on; {mend}")
    primary_metric(tasks[auxiliary])
    if not own:
        raise ValueError(f"no task that counts has validation rows, which a sweep measures on; {mend}")
    if primary is None and len(own) == 1:
        primary = own[0].name
    if primary is not None:
        return primary, primary_direction(tasks[primary], primary_metric(tasks[primary]))
    metrics = {task.name: primary_metric(task) for task in own}
    directions = {primary_direction(task, metrics[task.name]) for task in own}
    if len(directions) > 1:
        raise ValueError(
            f"the average of {metrics} says nothing, some are better when larger and others when smaller; choose a "
            "task with primary (--primary)"
        )
    return None, directions.pop()


def _warn_of_other_ways(parts: RecipeParts, auxiliary: str) -> None:
    """Warn of settings by which the runs differ in more than the weight."""
    if parts.args.loss_weighting != "static":
        logger.warning(
            f"loss_weighting {parts.args.loss_weighting!r} looks at the loss of {auxiliary!r} at weight 0 as well: "
            "what the other tasks count there may depend on it"
        )
    if parts.args.task_sampling == "performance_gap":
        logger.warning("task_sampling 'performance_gap' follows the metrics: runs of different weights see other rows")


def _variant(base: Recipe, auxiliary: str, weight: float, seed: int | None, output: Path) -> Recipe:
    """Return the recipe of one run."""
    tasks = deepcopy(base.tasks)
    for task in tasks:
        if task["name"] == auxiliary:
            task["weight"] = weight
    training = {**base.training, "output_dir": str(output / f"weight-{weight}-seed-{seed}")}
    return replace(base, tasks=tasks, training=training if seed is None else {**training, "seed": seed})


def _finish_run(run: Recipe, processes: int, about: str, say: Callable[[str], Any] | None) -> dict[str, Any]:
    """Return the results of a run, after training whatever of it is missing."""
    folder = Path(run.training["output_dir"])
    description = describe_run(run, processes)
    plan = _on_main(lambda: plan_run(folder, description, processes))
    main = PartialState().is_main_process
    if main and plan.changed:
        logger.warning(f"{folder} is made anew: {'; '.join(plan.changed)}")
    if main and say is not None:
        doing = {"finished": "is there", "resume": f"goes on from {plan.checkpoint}", "start": f"begins in {folder}"}
        say(f"{about} {doing[plan.action]}")
    if plan.results is not None:
        return plan.results
    if plan.action == "start":
        _on_main(lambda: begin_run(folder, description))
    results, trainer = train_recipe(run, plan.checkpoint or False)
    del trainer
    clear_device_cache(garbage_collection=True)  # for the next model
    return results


def _measure(results: dict[str, Any], auxiliary: str, primary: str | None) -> tuple[float, float, float]:
    """Return a run's primary metric, auxiliary metric and auxiliary loss."""

    def value(name: str) -> float:
        task = results["tasks"][name]
        return task["validation"][task["primary_metric"]]

    first = results["average"]["validation"] if primary is None else value(primary)
    return first, value(auxiliary), results["tasks"][auxiliary]["validation"]["loss"]


def _on_main(function: Callable[[], T]) -> T:
    """Call a function on the main process alone; all return what it gave, or raise what it raised."""
    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
