"""Are two runs judged on the same rows? Metrics of different rows are never set side by side.

Training writes a SHA-256 of the rows that each task was judged on, and a comparison keeps those of its runs. Where both
sides have one, it decides. Where one is missing, all that can be compared is what the recipes say of the data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .report_facts import SPLITS, RunFacts

__all__ = ["check_same_data"]

# What a recipe says of the rows that a task is judged on, and how they are read.
_DESCRIPTION = ("type", "dataset", "text_columns", "label_column", "labels")


def check_same_data(sources: Sequence[RunFacts]) -> list[str]:
    """Check that runs were judged on the same rows, and say by what that is known.

    Args:
        sources: Runs and comparisons.

    Returns:
        Sentences on the tasks that two or more of them have.

    Raises:
        ValueError: The rows of a task differ, or the runs have no task in common.
    """
    runs = [facts for facts in sources if facts.tasks]
    _check_common(runs)
    told: dict[str, list[str]] = {}
    for task in dict.fromkeys(name for facts in runs for name in facts.tasks):
        sides = [facts for facts in runs if task in facts.tasks]
        compared = [facts for facts in sources if facts.comparison and task in facts.comparison.verdicts]
        for how, about in _check_task(task, sides, compared):
            told.setdefault(how, []).append(about)
    return [f"{how}: {', '.join(tasks)}." for how, tasks in told.items()]


def _check_common(runs: Sequence[RunFacts]) -> None:
    for other in runs[1:]:
        if not set(runs[0].tasks) & set(other.tasks):
            names = "; ".join(f"{facts.name}: {', '.join(facts.tasks)}" for facts in (runs[0], other))
            raise ValueError(
                f"{runs[0].name} and {other.name} have no task in common ({names}); report them one by one"
            )


def _check_task(task: str, runs: Sequence[RunFacts], compared: Sequence[RunFacts]) -> Iterator[tuple[str, str]]:
    """Yield what is known of the rows of a task, and the task."""
    hashes = {split: {facts.name: facts.rows_hash(task, split) for facts in runs} for split in SPLITS}
    hashes["validation"] |= {f"{facts.name} (comparison)": facts.compared_rows.get(task) for facts in compared}
    if len(hashes["validation"]) < 2:
        return
    by_hash = True
    for split, found in hashes.items():
        known = {name: value for name, value in found.items() if value}
        if len(set(known.values())) > 1:
            values = ", ".join(f"{name} {value[:12]}" for name, value in known.items())
            raise ValueError(
                f"task {task!r}: the {split} rows are not the same (SHA-256 {values}), so metrics cannot be compared; "
                "report these runs one by one"
            )
        if split == "validation":
            by_hash = len(known) == len(found)
    if by_hash:
        value = next(iter(hashes["validation"].values()))
        yield "Judged on the same validation rows, by the SHA-256 of their content", f"{task} ({str(value)[:12]}...)"
        return
    descriptions = [(facts.name, _describe(facts.recipe, task)) for facts in runs]
    descriptions += [(f"{one.name} (comparison)", _describe(one.comparison.recipe, task)) for one in compared]  # type: ignore[union-attr]
    told = [(name, found) for name, found in descriptions if found]
    for name, found in told[1:]:
        differing = [key for key in found if found[key] != told[0][1][key] and not _is_open(key, found, told[0][1])]
        if differing:
            values = "; ".join(
                f"{key} {json.dumps(told[0][1].get(key))} and {json.dumps(found[key])}" for key in differing
            )
            raise ValueError(
                f"task {task!r}: {told[0][0]} and {name} are of different data ({values}), so metrics cannot be "
                "compared; report them one by one"
            )
    if len(told) == len(descriptions):
        yield "The same data by what the recipes say of it, as not every run has a hash of its rows", task
    else:
        yield "It is not known whether these are of the same data, as a run has no recipe", task


def _is_open(key: str, *descriptions: Mapping[str, Any]) -> bool:
    """Return whether a recipe leaves something open: labels that it does not name are those of its rows."""
    return key == "labels" and any(found[key] is None for found in descriptions)


def _describe(recipe: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Return what a recipe says of the rows that a task is judged on; empty if it says nothing."""
    tasks = recipe.get("tasks") or []
    own = next((one for one in tasks if isinstance(one, dict) and one.get("name") == task), None)
    if own is None:
        return {}
    found = {key: own.get(key) for key in _DESCRIPTION}
    training = recipe.get("training") or {}
    found["max_eval_samples"] = training.get("max_eval_samples")
    dataset = own.get("dataset")
    drawn = isinstance(dataset, dict) and isinstance(dataset.get("validation"), float)
    found["seed of the validation rows"] = training.get("seed", 42) if drawn else None
    return found
