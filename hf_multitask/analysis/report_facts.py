"""What lies in the folder of a run, for a report: results, the log of the training, and what other commands left there.

Nothing of it is taken on trust: a file that is cut off, a metric that is missing or no number becomes a warning, and the
place where it would stand stays empty. Only a folder from which nothing can be read is an error.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .comparison_result import Comparison
from .conflict_result import GradientConflicts
from .preflight_result import Preflight
from .routing_result import RoutingResult
from .sweep_result import AuxiliarySweep

__all__ = ["LogSeries", "RunFacts", "finite", "read_facts"]

SPLITS = ("validation", "test")
_STATE = "trainer_state.json"


@dataclass(frozen=True)
class _Kind:
    """A kind of file: what it is called in a run folder, the keys that tell it from others, and how it is read."""

    files: tuple[str, ...]
    keys: frozenset[str]
    read: Callable[[dict[str, Any]], Any]


_KINDS: dict[str, _Kind] = {
    "results": _Kind(("results.json",), frozenset(["recipe", "tasks", "steps"]), dict),
    "state": _Kind((_STATE,), frozenset(["log_history", "global_step"]), dict),
    "comparison": _Kind(("comparison.json",), frozenset(["tasks", "delta_m", "cost"]), Comparison.from_dict),
    "preflight": _Kind(("preflight.json",), frozenset(["findings", "sections"]), Preflight.from_dict),
    "sweep": _Kind(("sweep.json",), frozenset(["sweep", "finished"]), AuxiliarySweep.from_dict),
    "routing": _Kind(("routing.json",), frozenset(["tasks", "counts"]), RoutingResult.from_dict),
    "conflicts": _Kind(
        ("gradient_conflicts.json", "conflicts.json"), frozenset(["cosines", "norms"]), GradientConflicts.from_dict
    ),
}


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
        return _mapping(self.results.get("recipe"))

    def recipe_part(self, part: str) -> dict[str, Any]:
        """Return `model` or `training` of the recipe, or an empty dictionary."""
        return _mapping(self.recipe.get(part))

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
        """What `results.json` holds of each task, by name."""
        return {name: _mapping(task) for name, task in _mapping(self.results.get("tasks")).items()}

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks: those of the results, or those whose loss was logged."""
        return list(self.task_results) or [one.name for one in self.series("loss/")]

    @property
    def history(self) -> list[dict[str, Any]]:
        """The lines of the training's log that belong to a step."""
        lines = self.state.get("log_history")
        return [
            line
            for line in (lines if isinstance(lines, list) else [])
            if isinstance(line, dict) and finite(line.get("step")) is not None
        ]

    def series(self, prefix: str, order: Sequence[str] = ()) -> list[LogSeries]:
        """Return what was logged under keys with a prefix, without what is no number.

        Args:
            prefix: `loss/`, `share/`, ...
            order: Names that come first, in this order; the others follow as they were logged.
        """
        found: dict[str, tuple[list[int], list[float]]] = {}
        for line in self.history:
            for key, raw in line.items():
                if key.startswith(prefix) and (value := finite(raw)) is not None:
                    steps, values = found.setdefault(key.removeprefix(prefix), ([], []))
                    steps.append(int(line["step"]))
                    values.append(value)
        names = [*(name for name in order if name in found), *(name for name in found if name not in order)]
        return [LogSeries(name, tuple(found[name][0]), tuple(found[name][1])) for name in names]

    def metric(self, task: str, split: str, metric: str | None = None) -> float | None:
        """Return a metric of a task, its primary one by default; None where it is missing or no number."""
        own = self.task_results.get(task, {})
        return finite(_mapping(own.get(split)).get(metric or str(own.get("primary_metric"))))

    def rows_hash(self, task: str, split: str) -> str | None:
        """Return the hash of the rows that a task was judged on, if it was written down."""
        found = _mapping(self.task_results.get(task, {}).get("rows_sha256")).get(split)
        return found if isinstance(found, str) and found else None


def finite(value: Any) -> float | None:
    """Return a finite number as a float; None for anything else, NaN and truth values among them."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def read_facts(path: str | Path) -> RunFacts:
    """Read the folder of a run, of a comparison, a preflight or a sweep; or a single JSON file of one of these.

    Args:
        path: The folder or file.

    Raises:
        FileNotFoundError: It does not exist.
        ValueError: Nothing in it can be read.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"run folder {str(path)!r} does not exist")
    # A path such as `.` has no name of its own.
    facts = RunFacts(path.stem if path.is_file() else path.resolve().name, path)
    if path.is_file():
        content = _load(path)
        if isinstance(content, str):
            raise ValueError(content)
        kind = next((name for name, kind in _KINDS.items() if kind.keys <= set(content)), None)
        if kind is None:
            raise ValueError(f"{str(path)!r} is none of the files that a report reads: {_known_files()}")
        _take(facts, kind, path, content)
        if facts.warnings and not facts.is_run and getattr(facts, kind) is None:
            raise ValueError(facts.warnings[0])
    else:
        _read_folder(facts)
    if facts.results:
        facts.warnings += _missing_metrics(facts)
    facts.warnings += _broken_log(facts)
    return facts


def _read_folder(facts: RunFacts) -> None:
    """Read what lies in a folder.

    Raises:
        ValueError: Nothing does.
    """
    files = {kind: _find(facts.path, kind) for kind in _KINDS}
    present = {kind: file for kind, file in files.items() if file is not None}
    if not present:
        raise ValueError(f"folder {str(facts.path)!r} holds nothing to report on; it must hold one of {_known_files()}")
    read = 0
    for kind, file in present.items():
        content = _load(file)
        if isinstance(content, str):
            facts.warnings.append(content)
        else:
            read += _take(facts, kind, file, content)
    if not read:
        raise ValueError(f"folder {str(facts.path)!r}: nothing can be read; {'; '.join(facts.warnings)}")
    if "state" in present and "results" not in present:
        facts.warnings.append("results.json is missing: metrics are those of the last evaluation in the log")
    if "results" in present and "state" not in present:
        facts.warnings.append(f"{_STATE} is missing: there are no curves")
    if state := present.get("state"):
        if state.parent != facts.path:
            facts.warnings.append(f"the training is not finished: its log is that of {state.parent.name}")
    if facts.comparison is not None:
        facts.compared_rows = _rows_of_comparison(facts.path / "runs")


def _find(folder: Path, kind: str) -> Path | None:
    """Return the file of a kind in a folder; the log of a training that goes on lies in its last checkpoint."""
    for name in _KINDS[kind].files:
        if (folder / name).is_file():
            return folder / name
    if kind == "state":
        saved = [path for path in folder.glob(f"checkpoint-*/{_STATE}") if re.fullmatch(r"\d+", _number_of(path))]
        return max(saved, key=lambda path: int(_number_of(path)), default=None)
    return None


def _number_of(state: Path) -> str:
    return state.parent.name.removeprefix("checkpoint-")


def _known_files() -> str:
    return ", ".join(name for kind in _KINDS.values() for name in kind.files)


def _load(path: Path) -> dict[str, Any] | str:
    """Return what a JSON file holds, or why it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{path.name} cannot be read ({error})"
    return content if isinstance(content, dict) else f"{path.name} holds no dictionary"


def _take(facts: RunFacts, kind: str, path: Path, content: dict[str, Any]) -> bool:
    """Put what a file holds into the facts; False, and a warning, if it is not what it should be."""
    if kind == "sweep" and not content.get("finished"):
        facts.warnings.append(f"{path.name}: the sweep is not finished; start it again, and it goes on")
        return False
    try:
        found = _KINDS[kind].read(content)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        facts.warnings.append(f"{path.name} is not complete: {what}")
        return False
    setattr(facts, kind, found)
    return True


def _rows_of_comparison(folder: Path) -> dict[str, str]:
    """Return the hashes of validation rows that the multi-task runs of a comparison wrote down, by task."""
    rows: dict[str, str] = {}
    for path in sorted(folder.glob("multi-*/run.json")):
        content = _load(path)
        if isinstance(content, dict):
            rows |= {task: value for task, value in _mapping(content.get("rows")).items() if isinstance(value, str)}
    return rows


def _missing_metrics(facts: RunFacts) -> Iterator[str]:
    """Yield what is missing among the metrics of a run, or no number."""
    tasks = facts.task_results
    if not tasks:
        yield "results.json names no tasks"
    splits = [split for split in SPLITS if any(split in task for task in tasks.values())]
    if tasks and not splits:
        yield "no task has metrics: the run had no validation rows"
    for name, task in tasks.items():
        for split in splits:
            values = _mapping(task.get(split))
            primary = task.get("primary_metric")
            if primary not in values:
                yield f"task {name!r} has no {split} metric {primary!r}"
            for metric, value in values.items():
                if finite(value) is None:
                    yield f"task {name!r}: {split} {metric} is {_shown(value)}, no number"


def _broken_log(facts: RunFacts) -> Iterator[str]:
    """Yield the quantities of which some log lines are no number."""
    counts: dict[str, list[int]] = {}
    for line in facts.history:
        for key, value in line.items():
            if ("/" in key or key.startswith("eval_") or key in ("loss", "grad_norm")) and finite(value) is None:
                counts.setdefault(key, []).append(int(line["step"]))
    for key, steps in counts.items():
        more = f" and {len(steps) - 1} more" if len(steps) > 1 else ""
        yield f"the log has no number for {key} at step {steps[0]:,}{more}"


def _shown(value: Any) -> str:
    return "NaN" if isinstance(value, float) and math.isnan(value) else repr(value)


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}
