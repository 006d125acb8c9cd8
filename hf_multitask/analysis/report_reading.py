"""Read the folder of a run, for a report: results, the log of the training, and what other commands left there.

Nothing of it is taken on trust: a file that is cut off, a metric that is missing or no number becomes a warning, and
the place where it would stand stays empty. Only a folder from which nothing can be read is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models.saved_config import load_json
from .comparison_result import Comparison
from .conflict_result import GradientConflicts
from .grouping_result import TaskGroups
from .preflight_result import Preflight
from .report_facts import SPLITS, RunFacts, as_mapping, finite
from .routing_result import RoutingResult
from .sweep_result import AuxiliarySweep

__all__ = ["read_facts"]

_STATE = "trainer_state.json"
_LARGEST = 2**32  # bytes of the log of a long training


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
    "grouping": _Kind(("grouping.json",), frozenset(["tasks", "helpers", "values"]), TaskGroups.from_dict),
    "routing": _Kind(("routing.json",), frozenset(["tasks", "counts"]), RoutingResult.from_dict),
    "conflicts": _Kind(
        ("gradient_conflicts.json", "conflicts.json"), frozenset(["cosines", "norms"]), GradientConflicts.from_dict
    ),
}


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
        return load_json(path, path.name, _LARGEST, with_nan=True)
    except (OSError, ValueError) as error:
        return f"{path.name} cannot be read ({error})"


def _take(facts: RunFacts, kind: str, path: Path, content: dict[str, Any]) -> bool:
    """Put what a file holds into the facts; False, and a warning, if it is not what it should be."""
    if kind == "sweep" and not content.get("finished"):
        facts.warnings.append(f"{path.name}: the sweep is not finished; start it again, and it goes on")
        return False
    try:
        found = _KINDS[kind].read(content)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
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
            rows |= {task: value for task, value in as_mapping(content.get("rows")).items() if isinstance(value, str)}
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
            values = as_mapping(task.get(split))
            primary = task.get("primary_metric")
            if not isinstance(primary, str) or primary not in values:
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
