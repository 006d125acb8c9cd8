"""What is known of a run, for a report: its results, the log of its training, and what other commands found out.

What is missing or no number is None, or not there; nothing stands in for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from .comparison_result import Comparison
from .conflict_result import GradientConflicts
from .grouping_result import TaskGroups
from .preflight_result import Preflight
from .routing_result import RoutingResult
from .sweep_result import AuxiliarySweep

__all__ = ["SPLITS", "LogSeries", "RunFacts", "as_mapping", "finite"]

SPLITS = ("validation", "test")


@dataclass(frozen=True)
class LogSeries:
    """A quantity over the steps of a training.

    Args:
        name: What it is of: a task, a layer, a pair of tasks.
        steps: Optimizer steps at which it was logged.
        values: The numbers, all of them finite.
    """

    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(eq=False)
class RunFacts:
    """What a folder, or a file, says of a run.

    Args:
        name: The folder's name.
        path: Where it lies.
        results: What `results.json` holds; empty without it.
        state: What `trainer_state.json` holds; empty without it.
        comparison: The comparison with single-task models, if there is one.
        preflight: The preflight.
        sweep: The sweep over the weight of an auxiliary task.
        grouping: Which tasks to train together.
        routing: The experts that the tasks' tokens go to.
        conflicts: The measured conflicts of gradients.
        compared_rows: Hashes of the validation rows that the comparison was made on, by task, where its runs lie there.
        warnings: What is missing or no number.
    """

    name: str
    path: Path
    results: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    comparison: Comparison | None = None
    preflight: Preflight | None = None
    sweep: AuxiliarySweep | None = None
    grouping: TaskGroups | None = None
    routing: RoutingResult | None = None
    conflicts: GradientConflicts | None = None
    compared_rows: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def is_run(self) -> bool:
        """Whether there is a training to tell of."""
        return bool(self.results or self.state)

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe as it was run; empty if it is not known."""
        return as_mapping(self.results.get("recipe"))

    def recipe_part(self, part: str) -> dict[str, Any]:
        """Return `model` or `training` of the recipe, or an empty dictionary."""
        return as_mapping(self.recipe.get(part))

    @property
    def described_tasks(self) -> dict[str, dict[str, Any]]:
        """What the recipe says of each task, by name."""
        tasks = self.recipe.get("tasks")
        return {
            str(task["name"]): task
            for task in (tasks if isinstance(tasks, list) else [])
            if isinstance(task, dict) and "name" in task
        }

    @property
    def task_results(self) -> dict[str, dict[str, Any]]:
        """What `results.json` holds of each task, by name; without it, the metrics of the log's last evaluation."""
        if not self.results:
            return _last_evaluation(self.history)
        return {name: as_mapping(task) for name, task in as_mapping(self.results.get("tasks")).items()}

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return list(self.task_results)

    @property
    def history(self) -> list[dict[str, Any]]:
        """The lines of the training's log that belong to a step."""
        lines = self.state.get("log_history")
        return [
            line
            for line in (lines if isinstance(lines, list) else [])
            if isinstance(line, dict) and finite(line.get("step")) is not None
        ]

    @cached_property
    def _logged(self) -> dict[str, LogSeries]:
        """Everything that was logged, by its key."""
        found: dict[str, tuple[list[int], list[float]]] = {}
        for line in self.history:
            for key, raw in line.items():
                if (value := finite(raw)) is not None:
                    steps, values = found.setdefault(key, ([], []))
                    steps.append(int(line["step"]))
                    values.append(value)
        return {key: LogSeries(key, tuple(steps), tuple(values)) for key, (steps, values) in found.items()}

    def logged(self, key: str) -> LogSeries | None:
        """Return what was logged under a key, without what is no number; None if nothing was."""
        return self._logged.get(key)

    def series(self, prefix: str, order: Sequence[str] = ()) -> list[LogSeries]:
        """Return what was logged under keys with a prefix, without what is no number.

        Args:
            prefix: `loss/`, `share/`, ...
            order: Names that come first, in this order; the others follow as they were logged.
        """
        found = {key.removeprefix(prefix): one for key, one in self._logged.items() if key.startswith(prefix)}
        names = [*(name for name in order if name in found), *(name for name in found if name not in order)]
        return [replace(found[name], name=name) for name in names]

    def metrics(self, task: str, split: str) -> dict[str, Any]:
        """Return the metrics of a task, as they were written down; empty where there are none."""
        return as_mapping(self.task_results.get(task, {}).get(split))

    def rows_hash(self, task: str, split: str) -> str | None:
        """Return the hash of the rows that a task was judged on, if it was written down."""
        found = as_mapping(self.task_results.get(task, {}).get("rows_sha256")).get(split)
        return found if isinstance(found, str) and found else None


def finite(value: Any) -> float | None:
    """Return a finite number as a float; None for anything else, NaN and truth values among them."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _last_evaluation(history: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return, for each task whose loss was logged, its metrics in the last evaluation."""
    names = list(dict.fromkeys(k.removeprefix("loss/") for line in history for k in line if k.startswith("loss/")))
    last: Mapping[str, Any] = next(
        (line for line in reversed(history) if any(key.startswith("eval_") for key in line)), {}
    )
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in last.items():
        # The name of a task may begin with that of another.
        own = max((name for name in names if key.startswith(f"eval_{name}_")), key=len, default=None)
        if own is not None:
            found[own].setdefault("validation", {})[key.removeprefix(f"eval_{own}_")] = value
    return found


def as_mapping(value: Any) -> dict[str, Any]:
    """Return a dictionary as it is; an empty one for anything else."""
    return dict(value) if isinstance(value, Mapping) else {}
