"""From finished runs to differences: metrics of all runs on the same draws of the validation rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ..metrics import metric_function, primary_direction
from ..models.task import Task
from .baselines import Budget
from .bootstrap import Estimate, estimate, relative_changes, resample
from .comparison_result import Difference, TaskComparison
from .comparison_runs import FinishedRun, check_same_data
from .resampled_metrics import counted_metric

__all__ = ["RunStatistics"]

_DRAWS = 0  # seed of the draws; they are the same in every comparison of the same rows


class RunStatistics:
    """The metrics of the runs of a comparison, by task, on all validation rows and on draws of them.

    Args:
        tasks: The tasks to compare.
        runs: By kind (`multi`, `single`, mixing strategies) and task, the runs of all seeds.
        seeds: The seeds, in the order of the runs.
        margin: Part of the baseline's metric that does not matter.
        resamples: Number of draws.
        confidence: Coverage of the intervals.
        custom: The user's metric functions by task.

    Raises:
        ValueError: A run is missing, or runs are of different data.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        runs: Mapping[str, Mapping[str, Sequence[FinishedRun]]],
        seeds: Sequence[int],
        margin: float,
        resamples: int,
        confidence: float,
        custom: Mapping[str, Any],
    ) -> None:
        self.tasks = list(tasks)
        self.seeds = tuple(seeds)
        self._runs = runs
        self._margin = margin
        self._confidence = confidence
        self._metrics: dict[str, str] = {}
        self._examples: dict[str, int] = {}
        # By kind, [T, S] and [T, S, R].
        values: dict[str, list[np.ndarray]] = {kind: [] for kind in runs}
        draws: dict[str, list[np.ndarray]] = {kind: [] for kind in runs}
        for task in tasks:
            found = {kind: list(by_task.get(task.name, ())) for kind, by_task in runs.items()}
            for kind, own in found.items():
                if len(own) != len(seeds):
                    what = "baseline" if kind == "single" else f"{kind} run"
                    raise ValueError(f"task {task.name!r}: {len(own)} of {len(seeds)} seeds have a {what}")
            ordered = [run for own in found.values() for run in own]
            recorded, drawn = self._draw(task, ordered, resamples, custom.get(task.name))
            for i, kind in enumerate(runs):
                part = slice(i * len(seeds), (i + 1) * len(seeds))
                values[kind].append(recorded[part])
                draws[kind].append(drawn[part])
        self._values = {kind: np.stack(parts) for kind, parts in values.items()}
        self._draws = {kind: np.stack(parts) for kind, parts in draws.items()}

    def _draw(
        self, task: Task, runs: Sequence[FinishedRun], resamples: int, custom: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return a task's metric of each run on all rows, `[K]`, and on the draws, `[K, R]`."""
        check_same_data(runs, task.name)
        outputs = [run.outputs(task.name) for run in runs]
        for number, (run, own) in enumerate(zip(runs, outputs, strict=True)):
            first = number % len(self.seeds)  # of the same seed; what is hidden from a language model is its seed's
            if not np.array_equal(own.labels, outputs[first].labels):
                raise ValueError(
                    f"task {task.name!r}: {runs[first].name} and {run.name} have different labels, row by row, and "
                    f"cannot be compared; delete {str(run.folder)!r}, and the run is made again"
                )
        metric = runs[0].primary[task.name] or next(iter(metric_function(task, custom)(outputs[0].as_evaluated())))
        counted = [counted_metric(task, metric, own, custom) for own in outputs]
        self._metrics[task.name] = metric
        self._examples[task.name] = outputs[0].examples(metric)
        everything = np.ones((1, self._examples[task.name]))
        values = np.array([float(function(everything)[0]) for function in counted])
        for number, run in enumerate(runs):
            if custom is None:
                values[number] = _recorded(run, task.name, metric, values[number])
            elif not np.isfinite(values[number]):
                raise ValueError(f"task {task.name!r}: compute_metrics gives {metric} {values[number]} for {run.name}")
        # Tasks on the same dataset are on the same draws.
        return values, resample(counted, self._examples[task.name], resamples, _DRAWS, task.dataset)

    # ---- what is compared ----

    def tasks_against_baselines(self, budgets: Mapping[str, Budget]) -> tuple[TaskComparison, ...]:
        """Return, for each task, the multi-task model against its baseline.

        Args:
            budgets: By task, what its baseline of the first seed read.
        """
        result = []
        for number, task in enumerate(self.tasks):
            multi, single = (self._values[kind][number] for kind in ("multi", "single"))
            result.append(
                TaskComparison(
                    **vars(self._difference(number, "multi", "single")),
                    task=task.name,
                    metric=self._metrics[task.name],
                    greater_is_better=self._direction(task),
                    multi=float(multi.mean()),
                    single=float(single.mean()),
                    multi_by_seed=self._by_seed(multi),
                    single_by_seed=self._by_seed(single),
                    examples=self._examples[task.name],
                    budget=asdict(budgets[task.name]),
                )
            )
        return tuple(result)

    def against(self, kind: str) -> dict[str, Any]:
        """Return the recipe's own runs against those with another mixing strategy."""
        tasks = {task.name: self._difference(number, "multi", kind) for number, task in enumerate(self.tasks)}
        scores = {task.name: float(self._values[kind][number].mean()) for number, task in enumerate(self.tasks)}
        return {"metrics": scores, "tasks": tasks, "delta_m": self.delta_m(kind)}

    def delta_m(self, kind: str = "multi") -> dict[str, Any]:
        """Return Δm of some runs against the baselines, with its interval."""
        directions = [self._direction(task) for task in self.tasks]
        base = self._values["single"]
        changes = relative_changes(self._values[kind], base, directions).mean(0)
        if not np.isfinite(changes).all():
            return {"value": None, "interval": None}
        # Draws are in parts of the same numbers.
        scale = np.abs(base.mean(1))[:, None, None]
        sign = np.where(directions, 1.0, -1.0)[:, None, None]
        drawn = (sign * (self._draws[kind] - self._draws["single"]) / scale).mean(0)
        found = estimate(changes, drawn, self._confidence)
        return {"value": found.value, "interval": [found.low, found.high]}

    def _difference(self, task: int, first: str, second: str) -> Difference:
        sign = 1.0 if self._direction(self.tasks[task]) else -1.0
        values = sign * (self._values[first][task] - self._values[second][task])
        draws = sign * (self._draws[first][task] - self._draws[second][task])
        found: Estimate = estimate(values, draws, self._confidence)
        return Difference(
            difference=found.value,
            interval=(found.low, found.high),
            interval_over_examples=(found.low_over_examples, found.high_over_examples),
            by_seed=self._by_seed(values),
            seed_spread=found.seed_spread,
            margin=self._margin * abs(float(self._values["single"][task].mean())),
        )

    def _direction(self, task: Task) -> bool:
        return primary_direction(task, self._metrics[task.name])

    def _by_seed(self, values: np.ndarray) -> dict[str, float]:
        return {str(seed): float(value) for seed, value in zip(self.seeds, values, strict=True)}


def _recorded(run: FinishedRun, task: str, metric: str, value: float) -> float:
    """Return the metric that a run recorded, after checking that its predictions give it, to rounding."""
    recorded = run.metrics[task][metric]
    if not abs(value - recorded) <= 1e-5 * max(abs(recorded), 1.0):
        raise ValueError(
            f"run folder {str(run.folder)!r}: its predictions give {metric} {value:.6f} of task {task!r}, and "
            f"{recorded:.6f} is recorded; delete the folder, and the run is made again"
        )
    return recorded
