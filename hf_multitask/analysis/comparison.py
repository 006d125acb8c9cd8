"""Should you? A multi-task model against one single-task model for each task: differences, verdicts, a rule, the cost.

What the baselines are, and why their budget is fair, is told in [`hf_multitask.analysis.baselines`]; how sure a
difference is, in [`hf_multitask.analysis.bootstrap`]; the rule, in [`Comparison.deploy`].

**What counts as equal.** The margin is 2 % of the baseline's metric: about as much as another seed changes a small
encoder's score on a few thousand rows, and less than most would pay a second model for. An interval within ±margin is
`equal`. With a smaller margin more comparisons stay undecided unless there are more seeds and validation rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.sampling import MIXING, mixing_probabilities
from ..evaluation import check_compute_metrics
from ..folder_lock import locked
from ..generation import WRITTEN_METRICS
from ..metrics import primary_direction, primary_metric
from ..models.task import Task, TaskType, closest
from ..recipe import Recipe, RecipeParts, build, load_recipe
from .baselines import Planner, Run
from .comparison_cost import measure_cost
from .comparison_result import Comparison
from .comparison_runs import FinishedRun, finish_run
from .comparison_statistics import RunStatistics

__all__ = ["compare"]

_RESULT = "comparison.json"
_COST = "cost.json"


def compare(
    recipe: str | Path | Recipe,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    settings: Sequence[str] = (),
    output: str | Path | None = None,
    against: Sequence[str] = (),
    critical_tasks: Sequence[str] | None = None,
    margin: float = 0.02,
    resamples: int = 1000,
    confidence: float = 0.95,
    compute_metrics: Mapping[str, Any] | None = None,
    say: Callable[[str], Any] | None = None,
    trust_remote_code: bool = False,
) -> Comparison:
    """Train a recipe and one baseline for each task, over several seeds, and compare them on the validation rows.

    Finished runs are kept in `output/runs` by their content: a comparison that was interrupted goes on with the runs
    it lacks, and after a change of the recipe only the runs that it reaches are trained again. Models are not kept.

    Args:
        recipe: The recipe, or its file. Every task that is trained for its own sake needs validation rows, on which
            runs are judged; where the recipe lets them pick the best checkpoint too, both sides profit alike.
        seeds: Seeds of heads, rows and dropout; a run of each kind for each. With one nothing is known about chance in
            training, and the result says so.
        settings: `key=value` changes of the recipe, as in [`hf_multitask.recipe.load_recipe`].
        output: The folder; gets `comparison.json` (default: `runs/<recipe>-comparison`).
        against: Mixing strategies, such as `uniform` and `proportional`, that the recipe is run with too.
        critical_tasks: The tasks that must not lose (default: all that have a baseline).
        margin: Differences up to this part of the baseline's metric do not matter.
        resamples: Draws of the validation rows.
        confidence: Coverage of the intervals.
        compute_metrics: Metric functions of your own by task, as `MultiTaskTrainer` takes them.
        say: Called with a line about each run.
        trust_remote_code: Allow a recipe's file code from elsewhere, such as that of a backbone on the Hub.

    Returns:
        [`Comparison`], which prints as a table.

    Raises:
        FileNotFoundError: There is no such recipe.
        ValueError: An argument, the recipe or its data does not fit (nothing has been trained then), or a run folder
            is damaged or of other data.
        FolderInUseError: Another comparison is writing to the folder.

    Example:
        >>> found = compare("job.yaml", seeds=[0, 1, 2], critical_tasks=["topic"])  # doctest: +SKIP
        >>> found.deploy, found.verdicts["topic"]  # doctest: +SKIP
        (True, 'better')
    """
    seeds = _check_numbers(seeds, margin, resamples, confidence)
    against = _check_strategies(against)
    if isinstance(recipe, Recipe) and settings:
        raise ValueError("settings change a recipe's file; this recipe was read already")
    base = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, settings, trust_remote_code)
    parts = build(base)
    custom = check_compute_metrics(compute_metrics, parts.model.tasks)
    tasks = _check_recipe(parts, custom)
    critical = _check_critical(critical_tasks, tasks)
    folder = Path(output or Path("runs", f"{base.name}-comparison"))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output {str(folder)!r} is a file; choose a folder")
    planner = Planner(base, parts, custom)
    runs: dict[str, dict[str, list[FinishedRun]]] = {
        kind: {task.name: [] for task in tasks} for kind in ("multi", "single", *against)
    }
    first: list[Run] = []  # of the first seed: the multi-task run and the baselines
    options: dict[str, Any] = {"folder": folder / "runs", "compute_metrics": custom, "say": say}
    with locked(folder):
        for seed in seeds:
            whole = planner.multi(seed)
            multi = finish_run(whole, parts, **options)
            alone = [planner.single(task, seed, multi.rows_seen[task.name], multi.steps) for task in tasks]
            mixed = {name: finish_run(planner.multi(seed, name), parts, **options) for name in against}
            first = first or [whole, *alone]
            for task, run in zip(tasks, alone, strict=True):
                runs["multi"][task.name].append(multi)
                runs["single"][task.name].append(finish_run(run, parts, **options))
                for name, found in mixed.items():
                    runs[name][task.name].append(found)
        statistics = RunStatistics(tasks, runs, seeds, margin, resamples, confidence, custom)
        result = Comparison(
            tasks=statistics.tasks_against_baselines(
                {run.task: run.budget for run in first if run.task and run.budget}
            ),
            seeds=seeds,
            delta_m=statistics.delta_m(),
            critical_tasks=critical,
            cost={**_find_cost(first, parts, folder), "train_seconds": _train_seconds(runs)},
            against={name: statistics.against(name) for name in against},
            settings={"margin": margin, "confidence": confidence, "resamples": resamples},
            recipe=base.to_dict(),
            versions=first[0].content["versions"],
        )
        result.save(folder / _RESULT)
        return result


def _check_numbers(seeds: Any, margin: float, resamples: int, confidence: float) -> tuple[int, ...]:
    """Return the seeds, after checking the numbers."""
    found = [seeds] if isinstance(seeds, int) else list(seeds)
    for seed in found:
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seeds must be whole numbers of at least 0, got {seed!r}")
    if not found or len(set(found)) < len(found):
        raise ValueError(f"seeds must be at least one, and each only once, got {found}")
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not 0 <= margin < 1:
        raise ValueError(f"margin is a part of the baseline's metric, in [0, 1), got {margin!r}")
    if isinstance(resamples, bool) or not isinstance(resamples, int) or resamples < 100:
        raise ValueError(f"resamples must be a whole number of at least 100, got {resamples!r}")
    if isinstance(confidence, bool) or not isinstance(confidence, (int, float)) or not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence!r}")
    return tuple(found)


def _check_strategies(against: Sequence[str]) -> tuple[str, ...]:
    names = [against] if isinstance(against, str) else list(against)
    for name in names:
        if name not in MIXING:
            raise ValueError(f"against: {name!r} is no mixing strategy{closest(name, MIXING)}; {', '.join(MIXING)} are")
        try:
            mixing_probabilities(name, {"a": 1, "b": 2})
        except ValueError:
            raise ValueError(
                f"against: {name!r} needs arguments of its own, which cannot be given here; run a recipe with them"
            ) from None
    return tuple(dict.fromkeys(names))


def _check_recipe(parts: RecipeParts, custom: Mapping[str, Any]) -> list[Task]:
    """Return the tasks that have baselines, after checking that they can be compared."""
    if parts.args.world_size > 1:
        raise ValueError("compare trains one run after the other on one process; start it without a launcher")
    trained = [task for task in parts.model.tasks if not task.held_out]
    tasks = [task for task in trained if not task.auxiliary]
    if len(trained) == 1:
        raise ValueError(f"the recipe has only the task {tasks[0].name!r}: the multi-task model is its own baseline")
    missing = [task.name for task in tasks if task.dataset not in parts.datasets["validation"]]
    if missing:
        raise ValueError(
            f"no validation rows for the task(s) {', '.join(missing)}, which cannot be judged without them; give "
            "the dataset a validation split, or take one off its training rows: dataset: {path: ..., validation: 0.1}"
        )
    for task in tasks:
        metric = primary_metric(task, custom=True)
        # Which metric a function of one's own returns first is known once there are runs, too late to ask.
        primary_direction(task, None if task.name in custom and task.metric is None else metric)
        if task.type.generates and metric in WRITTEN_METRICS:
            raise ValueError(
                f"task {task.name!r}: {metric} comes from texts that a model writes, which runs of a comparison do not "
                "keep; set metric: accuracy, perplexity or loss"
            )
        if task.type is TaskType.QUESTION_ANSWERING and task.name in custom:
            raise ValueError(
                f"task {task.name!r}: answers to questions are not kept, so compute_metrics cannot judge them anew; "
                "leave it out"
            )
    return tasks


def _check_critical(critical: Sequence[str] | None, tasks: Sequence[Task]) -> tuple[str, ...]:
    names = [task.name for task in tasks]
    if critical is None:
        return tuple(names)
    chosen = [critical] if isinstance(critical, str) else list(critical)
    for name in chosen:
        if name not in names:
            raise ValueError(
                f"critical_tasks: {name!r} is no task that has a baseline{closest(name, names)}; "
                f"tasks are {', '.join(names)}"
            )
    if not chosen:
        raise ValueError("critical_tasks is empty: nothing would stand in the way of any model; leave it out for all")
    return tuple(name for name in names if name in chosen)


def _find_cost(runs: Sequence[Run], parts: RecipeParts, folder: Path) -> dict[str, Any]:
    """Return what was measured of the models of these runs, or measure it."""
    keys = [run.key for run in runs] + [str(parts.args.per_device_eval_batch_size)]
    key = hashlib.sha256(" ".join(keys).encode()).hexdigest()
    file = folder / _COST
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        known = {}
    if known.get("key") != key:
        known = {"key": key, "cost": measure_cost(runs[0], runs[1:], parts)}
        file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return known["cost"]


def _train_seconds(runs: Mapping[str, Mapping[str, Sequence[FinishedRun]]]) -> dict[str, float]:
    """Return the mean over seeds of how long training took, one multi-task model or all single ones."""
    means = {
        kind: [float(np.mean([run.train_seconds for run in own])) for own in runs[kind].values()]
        for kind in ("multi", "single")
    }
    return {"multi": round(means["multi"][0], 3), "single": round(sum(means["single"]), 3)}
