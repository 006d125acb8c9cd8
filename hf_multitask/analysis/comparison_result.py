"""What a comparison with single-task baselines gave: differences with their intervals, verdicts, the rule, tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .bootstrap import judge
from .conflict_result import align_columns

__all__ = ["Comparison", "Difference", "TaskComparison"]

# What is told of two models side by side: key of the cost, what it is called, how it is written.
_COSTS = (
    ("parameters", "parameters", "{:,.0f}"),
    ("saved_mib", "saved, MiB", "{:,.1f}"),
    ("train_seconds", "training, s", "{:,.1f}"),
    ("inference_seconds", "inference, s", "{:,.3f}"),
)


@dataclass(frozen=True)
class Difference:
    """A difference between two models on one task, above 0 where the first is better, and how sure it is.

    Args:
        difference: Mean over seeds, in units of the metric; turned round for metrics that are better when smaller.
        interval: Its interval over examples and seeds (over examples only with one seed).
        interval_over_examples: The paired bootstrap interval over examples, with the seeds as they are.
        by_seed: The difference of each seed.
        seed_spread: Standard deviation of these; None with one.
        margin: Differences up to here do not matter, in units of the metric.
    """

    difference: float
    interval: tuple[float, float]
    interval_over_examples: tuple[float, float]
    by_seed: dict[str, float]
    seed_spread: float | None
    margin: float

    @property
    def verdict(self) -> str:
        """`better`, `equal`, `worse` or `undecided`; see [`hf_multitask.analysis.bootstrap.judge`]."""
        return judge(*self.interval, self.margin)

    @property
    def is_not_worse(self) -> bool:
        """Whether it is sure that the first is not worse by more than the margin."""
        return self.interval[0] >= -self.margin


@dataclass(frozen=True)
class TaskComparison(Difference):
    """The multi-task model against the baseline of one task.

    Args:
        task: The task's name.
        metric: Its primary metric.
        greater_is_better: Whether more of it is better.
        multi: The multi-task model's, mean over seeds.
        single: The baseline's.
        multi_by_seed: The multi-task model's of each seed.
        single_by_seed: The baseline's.
        examples: Validation rows.
        budget: What the baseline read: rows, rows per micro-batch, micro-batches per step, steps.
    """

    task: str
    metric: str
    greater_is_better: bool
    multi: float
    single: float
    multi_by_seed: dict[str, float]
    single_by_seed: dict[str, float]
    examples: int
    budget: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types; the verdict, which follows from the rest, is for readers."""
        return {"verdict": self.verdict, **json.loads(json.dumps(asdict(self)))}


@dataclass(frozen=True)
class Comparison:
    """A multi-task model against one single-task model for each task; see [`hf_multitask.compare`].

    Args:
        tasks: The comparison of each task.
        seeds: The seeds.
        delta_m: Δm, mean relative change over tasks: `value` and `interval`, in parts (0.01 is one per cent); `value`
            is None where the metric of a baseline is 0.
        critical_tasks: The tasks that the rule looks at.
        cost: `parameters`, `trained_parameters`, `saved_mib`, `train_seconds` (mean over seeds) and
            `inference_seconds`, each `{"multi": ..., "single": ...}`, the second a sum over tasks.
        against: By mixing strategy, `tasks` (the recipe against it, [`Difference`] by task) and `delta_m` against the
            same baselines.
        settings: Margin, confidence and resamples.
        recipe: The recipe.
        versions: Of the libraries.
    """

    tasks: tuple[TaskComparison, ...]
    seeds: tuple[int, ...]
    delta_m: dict[str, Any]
    critical_tasks: tuple[str, ...]
    cost: dict[str, Any]
    against: dict[str, dict[str, Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    # ---- the rule ----

    @property
    def verdicts(self) -> dict[str, str]:
        """The verdict on each task: `better`, `equal`, `worse` or `undecided`."""
        return {task.task: task.verdict for task in self.tasks}

    @property
    def failing(self) -> tuple[str, ...]:
        """The critical tasks of which it is not sure that the multi-task model matches or beats their baseline."""
        return tuple(t.task for t in self.tasks if t.task in self.critical_tasks and not t.is_not_worse)

    @property
    def deploy(self) -> bool:
        """Whether the multi-task model matches or beats the baseline of every critical task.

        It does where the whole interval of the difference is above -margin: it may be open whether a task is equal or
        better (its verdict then is `undecided`), but not whether it is worse.
        """
        return not self.failing

    @property
    def reason(self) -> str:
        """Why it should be deployed, or which critical tasks stand in the way."""
        margin = f"{self.settings.get('margin', 0):.1%} of its metric"
        if self.deploy:
            open_ones = [name for name in self.critical_tasks if self.verdicts[name] == "undecided"]
            noted = f" ({', '.join(open_ones)}: equal or better, which of them is open)" if open_ones else ""
            others = [name for name, v in self.verdicts.items() if v == "worse" and name not in self.critical_tasks]
            noted += f"; worse, but not critical: {', '.join(others)}" if others else ""
            whose = "every baseline" if len(self.critical_tasks) == len(self.tasks) else "the critical baselines"
            return f"deploy: it matches or beats {whose}, none of these tasks is worse by more than {margin}{noted}"
        by_name = {task.task: task for task in self.tasks}
        worse = [name for name in self.failing if by_name[name].verdict == "worse"]
        unsure = [name for name in self.failing if name not in worse]
        parts = []
        if worse:
            parts.append(f"worse than its baseline: {', '.join(worse)}")
        if unsure:
            parts.append(
                f"may be worse by more than {margin}: {', '.join(unsure)} (more seeds or validation rows would decide)"
            )
        return f"do not deploy; {'; '.join(parts)}"

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know to read the numbers."""
        if len(self.seeds) > 1:
            return ()
        return ("one seed: intervals are over examples only; another seed may differ by more, run at least three",)

    # ---- files ----

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types; what follows from the rest is for readers."""
        return {
            "deploy": self.deploy,
            "reason": self.reason,
            "notes": list(self.notes),
            "tasks": {task.task: task.to_dict() for task in self.tasks},
            "seeds": list(self.seeds),
            "delta_m": self.delta_m,
            "critical_tasks": list(self.critical_tasks),
            "cost": self.cost,
            "against": {
                name: {
                    **part,
                    "tasks": {
                        task: {"verdict": found.verdict, **json.loads(json.dumps(asdict(found)))}
                        for task, found in part["tasks"].items()
                    },
                }
                for name, part in self.against.items()
            },
            "settings": self.settings,
            "recipe": self.recipe,
            "versions": self.versions,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Comparison:
        """Make the object from the dictionary that [`to_dict`] gave."""
        against = {
            name: {**part, "tasks": {task: _read(Difference, row) for task, row in part["tasks"].items()}}
            for name, part in values["against"].items()
        }
        return cls(
            tasks=tuple(_read(TaskComparison, row) for row in values["tasks"].values()),
            seeds=tuple(values["seeds"]),
            critical_tasks=tuple(values["critical_tasks"]),
            against=against,
            **{key: values[key] for key in ("delta_m", "cost", "settings", "recipe", "versions")},
        )

    def save(self, path: str | Path) -> None:
        """Write a JSON file; task_sampling 'performance_gap' and the report read it."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Comparison:
        """Read a file that [`save`] wrote."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))

    # ---- in words ----

    def table(self) -> str:
        """Return the tables: tasks, Δm, other mixings, cost; and the rule."""
        level = f"{self.settings.get('confidence', 0.95):.0%} interval"
        several = len(self.seeds) > 1
        rows = [["task", "metric", "single", "multi", "difference", level, *(["seeds"] if several else []), "verdict"]]
        for task in self.tasks:
            spread = [] if task.seed_spread is None else [f"±{task.seed_spread:.3f}"]
            numbers = [f"{task.single:.3f}", f"{task.multi:.3f}", f"{task.difference:+.3f}", _interval(task.interval)]
            star = "" if task.task in self.critical_tasks else " (not critical)"
            rows.append([task.task, task.metric, *numbers, *spread, task.verdict + star])
        right = {2, 3, 4}
        parts = [align_columns(rows, right), "", f"Δm {_change(self.delta_m)} ({_seeds(self.seeds)})"]
        turned = [task.task for task in self.tasks if not task.greater_is_better]
        if turned:
            parts.append(f"less is better for {', '.join(turned)}: above 0 the multi-task model is better there too")
        for name, part in self.against.items():
            found = ", ".join(f"{task} {row.difference:+.3f} {row.verdict}" for task, row in part["tasks"].items())
            parts.append(f"against {name} mixing (Δm {_change(part['delta_m'])}), this recipe: {found}")
        parts += ["", align_columns(self._cost_rows(), {1, 2, 3}), "", *self.notes, self.reason]
        return "\n".join(parts)

    def _cost_rows(self) -> list[list[str]]:
        rows = [["cost", "one multi-task model", f"{len(self.tasks)} single-task models", "ratio"]]
        for key, title, form in _COSTS:
            if key in self.cost:
                multi, single = (self.cost[key][kind] for kind in ("multi", "single"))
                if key == "inference_seconds":
                    title = f"{title} for {self.cost['inference_rows']} rows"
                rows.append(
                    [title, form.format(multi), form.format(single), f"{multi / single:.2f}" if single else "-"]
                )
        return rows

    def __str__(self) -> str:
        return self.table()


def _read(kind: Any, row: Mapping[str, Any]) -> Any:
    values = {f.name: row[f.name] for f in fields(kind)}
    return kind(**{k: tuple(v) if k.startswith("interval") else v for k, v in values.items()})


def _interval(ends: tuple[float, float]) -> str:
    return f"{ends[0]:+.3f} to {ends[1]:+.3f}"


def _change(delta: Mapping[str, Any]) -> str:
    if delta["value"] is None:
        return "not defined, a baseline is 0"
    low, high = delta["interval"]
    return f"{delta['value']:+.1%} ({low:+.1%} to {high:+.1%})"


def _seeds(seeds: tuple[int, ...]) -> str:
    return f"{len(seeds)} seeds" if len(seeds) > 1 else "one seed"
