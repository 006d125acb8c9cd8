"""The tables of a report: what was run, what came out, what it cost, and what differs between runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from .report_blocks import MISSING, NONE, Code, Section, Table, big, duration, number, percent, seconds
from .report_facts import SPLITS, RunFacts, finite

__all__ = ["cost_section", "differing_settings", "metrics_section", "recipe_section", "runs_section"]

# What is written down of a run without reaching its result.
_UNIMPORTANT = ("output_dir", "logging_", "conflict_logging_", "save_", "report_to", "disable_tqdm", "run_name")
_COSTS = (
    ("parameters", "parameters", big),
    ("trained_parameters", "trained parameters", big),
    ("saved_mib", "saved model, MiB", number),
    ("train_seconds", "training, s", seconds),
    ("inference_seconds", "inference of all tasks, s", seconds),
)


def runs_section(runs: Sequence[RunFacts]) -> Section:
    """Return what was run: recipe, versions, steps, device, time; a column for each run."""
    facts = [dict(_facts_of(run)) for run in runs]
    names = list(dict.fromkeys(name for one in facts for name in one))
    rows = [[name, *(one.get(name, NONE) for one in facts)] for name in names]
    head = ["", *(run.name for run in runs)]
    table = Table(head, rows, left=frozenset(range(len(head))), facts=len(runs) == 1)
    section = Section("Runs" if len(runs) > 1 else "Run", [table])
    if len(runs) > 1:
        recipes = [run.recipe for run in runs if run.recipe]
        differing = differing_settings(recipes)
        if differing and len(recipes) == len(runs):
            table = Table(
                ["setting", *(run.name for run in runs)],
                [[key, *values] for key, values in differing.items()],
                left=frozenset(range(len(head))),
                caption="Settings that differ",
            )
            section.blocks.append(table)
        elif len(recipes) == len(runs):
            section.blocks.append("No setting that reaches the result differs between these runs.")
    return section


def _facts_of(run: RunFacts) -> Iterator[tuple[str, str]]:
    """Yield name and value of what is known of a run."""
    model, training = run.recipe_part("model"), run.recipe_part("training")
    if run.recipe:
        yield "backbone", str(model.get("backbone", MISSING))
        yield "sharing", str(model.get("sharing", "hard"))
    kinds = run.described_tasks
    yield "tasks", ", ".join(_task_words(name, kinds.get(name, {})) for name in run.tasks) or MISSING
    if run.recipe:
        yield "sampling", _with_kwargs(training, "task_sampling", "temperature")
        yield "loss weighting", _with_kwargs(training, "loss_weighting", "static")
        yield "gradient combination", _with_kwargs(training, "gradient_combination", "sum")
        rate = finite(training.get("learning_rate"))
        yield "learning rate", f"{rate:g}" if rate is not None else "default"
        yield "seed", str(training.get("seed", "42, the default"))
    yield "optimizer steps", _steps(run)
    yield "training time", duration(_train_seconds(run))
    yield "device", str(run.results.get("device", MISSING))
    versions = run.results.get("versions")
    shown = [f"{name} {value}" for name, value in versions.items()] if isinstance(versions, dict) else []
    yield "versions", ", ".join(shown) or MISSING


def _task_words(name: str, described: Mapping[str, Any]) -> str:
    words = [str(described["type"])] if described.get("type") else []
    words += [role for role in ("auxiliary", "held_out") if described.get(role)]
    return f"{name} ({', '.join(words).replace('_', ' ')})" if words else name


def _with_kwargs(training: Mapping[str, Any], name: str, default: str) -> str:
    kwargs = training.get(f"{name}_kwargs")
    more = ", ".join(f"{key}={value}" for key, value in kwargs.items()) if isinstance(kwargs, dict) else ""
    return f"{training.get(name) or default}" + (f" ({more})" if more else "")


def _steps(run: RunFacts) -> str:
    done = finite(run.results.get("steps", run.state.get("global_step")))
    planned = finite(run.state.get("max_steps"))
    more = f" of {planned:,.0f}" if done is not None and planned and planned > done else ""
    return big(done) + more


def _train_seconds(run: RunFacts) -> float | None:
    logged = [line.get("train_runtime") for line in run.history if "train_runtime" in line]
    return finite(run.results.get("train_seconds", logged[-1] if logged else None))


# ---- metrics ----


def metrics_section(runs: Sequence[RunFacts], checks: Sequence[str]) -> Section:
    """Return the metrics of the runs, side by side.

    Args:
        runs: The runs.
        checks: Sentences on what is known of the rows that they were judged on.
    """
    splits = [split for split in SPLITS if any(split in task for run in runs for task in run.task_results.values())]
    tasks = list(dict.fromkeys(name for run in runs for name in run.tasks))
    section = Section("Metrics")
    if not splits:
        section.blocks.append("No run has metrics.")
        return section
    columns = [(run, split) for run in runs for split in splits]
    values = [split if len(runs) == 1 else f"{run.name}, {split}" for run, split in columns]
    head = ["task", "metric", *values]
    main: list[list[str]] = []
    for task in tasks:
        for metric in _primary_metrics(runs, task):
            main.append([task, metric, *(_metric_cell(run, task, split, metric) for run, split in columns)])
    averages = [_average(run, split) for run, split in columns]
    if any(value is not None for value in averages):
        main.append(["average of the tasks", "", *(number(value, NONE) for value in averages)])
    seen = _rows_seen(runs, tasks)
    if seen is not None and len(runs) == 1:  # it fits beside the metrics
        read = {row[0]: row[1:] for row in seen.rows}
        head = [*head, *seen.head[1:]]
        main = [[*row, *read.get(row[0], ["", ""])] for row in main]
    caption = "The primary metric of each task"
    if any(len(_primary_metrics(runs, task)) > 1 for task in tasks):
        caption = "Metrics of each task; which is its primary one is not known for every run"
    section.blocks.append(Table(head, main, frozenset([0, 1]), caption))
    if seen is not None and len(runs) > 1:
        section.blocks.append(seen)
    rows = []
    for task in tasks:
        for metric in dict.fromkeys(name for run, split in columns for name in run.metrics(task, split)):
            rows.append([task, metric, *(_metric_cell(run, task, split, metric) for run, split in columns)])
    section.blocks.append(
        Table(["task", "metric", *values], rows, frozenset([0, 1]), "All metrics and losses", folded=True)
    )
    section.blocks += checks
    return section


def _primary_metrics(runs: Sequence[RunFacts], task: str) -> list[str]:
    """Return the primary metrics that runs have for a task; where no run says, all but the loss."""
    results = [run.task_results.get(task, {}) for run in runs]
    primary = [str(own["primary_metric"]) for own in results if own.get("primary_metric")]
    every = [name for run in runs for split in SPLITS for name in run.metrics(task, split) if name != "loss"]
    return list(dict.fromkeys(primary or every))


def _metric_cell(run: RunFacts, task: str, split: str, metric: str) -> str:
    if task not in run.tasks:
        return "no such task"
    return number(finite(run.metrics(task, split).get(metric)))


def _average(run: RunFacts, split: str) -> float | None:
    averages = run.results.get("average")
    return finite(averages.get(split)) if isinstance(averages, dict) else None


def _rows_seen(runs: Sequence[RunFacts], tasks: Sequence[str]) -> Table | None:
    """Return the rows that each run read of each task; None where it is not known of any."""
    known = [run for run in runs if any("rows_seen" in own for own in run.task_results.values())]
    if not known:
        return None
    names = [""] if len(known) == 1 else [f"{run.name}, " for run in known]
    head = ["task", *(f"{name}{what}" for name in names for what in ("rows read", "share of all rows"))]
    rows = []
    for task in tasks:
        cells: list[str] = []
        for run in known:
            own = run.task_results.get(task, {})
            cells += [big(finite(own.get("rows_seen")), NONE), percent(finite(own.get("share")), NONE)]
        rows.append([task, *cells])
    return Table(head, rows, caption="Training rows")


# ---- cost ----


def cost_section(runs: Sequence[RunFacts], sources: Sequence[RunFacts]) -> Section:
    """Return what runs cost, and what a multi-task model costs beside single-task models."""
    section = Section("Cost")
    rows = []
    for run in runs:
        took, steps = _train_seconds(run), finite(run.results.get("steps", run.state.get("global_step")))
        each = 1000 * took / steps if took and steps else None
        read = [finite(own.get("rows_seen")) for own in run.task_results.values()]
        total = sum(value for value in read if value is not None) if read else 0.0
        speed = total / took if took and total else None
        memory = finite(run.results.get("peak_memory_mib"))
        cells = [seconds(took), seconds(each, NONE), seconds(speed, NONE), big(memory, NONE)]
        rows.append([run.name, big(steps), *cells])
    if rows:
        head = ["run", "steps", "training, s", "per step, ms", "rows per s", "peak memory of the process, MiB"]
        caption = "Of the runs. Training includes evaluations in its course; a row counts once for each of its tasks"
        section.blocks.append(Table(head, rows, caption=caption))
    for source in sources:
        if source.comparison is not None:
            section.blocks.append(_compared_cost(source))
    return section


def _compared_cost(source: RunFacts) -> Table:
    comparison = source.comparison
    assert comparison is not None
    rows = []
    for key, title, form in _COSTS:
        own = comparison.cost.get(key)
        if isinstance(own, dict):
            multi, single = finite(own.get("multi")), finite(own.get("single"))
            ratio = f"{multi / single:.2f}" if multi is not None and single else NONE
            rows.append([title, form(multi), form(single), ratio])
    inference = comparison.cost.get("inference_rows")
    caption = f"Of {source.name}, by its comparison"
    if inference is not None:
        caption += f"; inference of {inference} rows on {comparison.cost.get('device', 'a device')}"
    return Table(
        ["", "one multi-task model", f"{len(comparison.tasks)} single-task models", "ratio"], rows, caption=caption
    )


# ---- recipes ----


def differing_settings(recipes: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the settings, with dotted keys, that differ between recipes and reach the result.

    Args:
        recipes: Recipes as plain types.

    Returns:
        For each key a value per recipe, `-` where it is not set.
    """
    flat = [dict(_flatten(recipe)) for recipe in recipes]
    differing = {}
    for key in dict.fromkeys(key for one in flat for key in one):
        values = [str(one.get(key, NONE)) for one in flat]
        if len(set(values)) > 1 and not key.removeprefix("training.").startswith(_UNIMPORTANT):
            differing[key] = values
    return differing


def _flatten(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield values with dotted keys; tasks have their names for keys, as in `--set`."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            if inner is not None:
                yield from _flatten(inner, (*path, str(key)))
    elif isinstance(value, list) and value and all(isinstance(one, dict) and "name" in one for one in value):
        for one in value:
            yield from _flatten(one, (*path, str(one["name"])))
    else:
        yield ".".join(path), value


def recipe_section(runs: Sequence[RunFacts]) -> Section:
    """Return the recipes as they were run."""
    section = Section("Recipes" if len(runs) > 1 else "Recipe")
    for run in runs:
        if run.recipe:
            text = yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True, width=100)
            section.blocks.append(Code(f"Recipe of {run.name}, as it was run", text))
        else:
            section.blocks.append(f"The recipe of {run.name} is {MISSING}: there is no results.json that holds it.")
    return section
