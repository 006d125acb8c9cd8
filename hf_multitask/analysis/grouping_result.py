"""What a search for task groups gave: who trains with whom, how sure that is, tables, files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from .affinity import AffinitySeries
from .conflict_result import align_columns
from .grouping import MOST_EXACT, Split, find_splits
from .grouping_advice import TaskAdvice, advise_tasks, weighted_interval
from .plots import draw_matrix

__all__ = ["TaskGroups", "check_most"]


@dataclass(frozen=True, eq=False)
class TaskGroups:
    """Tasks in groups that should be trained together; see [`hf_multitask.group_tasks`].

    Args:
        tasks: Names of the T tasks that were measured.
        helpers: Those of them that are auxiliary: no group has to serve them, several may have them.
        steps: Numbers of the K steps that were measured, the first being 0.
        values: `[K, T, T]`, in row i and column j what i did to j; NaN where a step had no rows of one of them.
        method: `affinity`, or `conflict`.
        most: The largest number of groups.
        confidence: Coverage of the intervals.
        settings: The other arguments of the run.

    Attributes:
        affinity: `[T, T]`, mean over steps: in row i and column j what i does to j.
        splits: By number of groups, the best split; see [`hf_multitask.analysis.grouping.find_splits`].
    """

    tasks: tuple[str, ...]
    helpers: tuple[str, ...]
    steps: tuple[int, ...]
    values: np.ndarray
    method: str
    most: int
    confidence: float = 0.95
    settings: dict[str, Any] = field(default_factory=dict)
    affinity: np.ndarray = field(init=False, repr=False)
    splits: dict[int, Split] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Take the means over steps, and find the best split into each number of groups."""
        object.__setattr__(self, "affinity", np.nanmean(self.values, axis=0))
        object.__setattr__(self, "splits", find_splits(self.affinity, self._helpers))

    @property
    def _helpers(self) -> list[int]:
        return [self.tasks.index(name) for name in self.helpers]

    @classmethod
    def from_series(
        cls, series: AffinitySeries, helpers: Sequence[str], method: str, most: int, **options: Any
    ) -> TaskGroups:
        """Make the object from what a trainer measured.

        Args:
            series: See [`AffinitySeries`].
            helpers: Names of auxiliary tasks.
            method: What was measured.
            most: The largest number of groups.
            **options: `confidence` and `settings`.
        """
        return cls(series.tasks, tuple(helpers), series.steps, series.values, method, most, **options)

    def regroup(self, most: int) -> TaskGroups:
        """Return the best split into another number of groups, from the same measurement.

        Raises:
            ValueError: There are fewer tasks to serve.
        """
        check_most(most, len(self.served))
        return replace(self, most=most)

    # ---- what was measured ----

    @property
    def intervals(self) -> np.ndarray:
        """`[T, T, 2]`, the lower and upper ends of the intervals of [`affinity`]; NaN where there are too few steps."""
        size = len(self.tasks)
        ends = [
            [weighted_interval(self.values, {(i, j): 1.0}, self.confidence)[1:] for j in range(size)]
            for i in range(size)
        ]
        return np.array(ends)

    # ---- what follows ----

    @property
    def served(self) -> tuple[str, ...]:
        """The tasks that a group has to serve."""
        return tuple(name for name in self.tasks if name not in self.helpers)

    @property
    def split(self) -> Split:
        """The best split into at most so many groups, of equal ones that with the fewest."""
        within = [self.splits[number] for number in range(1, self.most + 1)]
        highest = max(split.score for split in within)
        return next(split for split in within if split.score >= highest - 1e-12 * max(abs(highest), 1e-9))

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The groups, each the names of its tasks, helpers included."""
        return tuple(tuple(self.tasks[number] for number in group) for group in self.split.groups)

    @property
    def is_exact(self) -> bool:
        """Whether there is no better split (for more than 12 tasks it is a good one)."""
        return len(self.tasks) <= MOST_EXACT

    def advice(self) -> list[TaskAdvice]:
        """Return what follows for each served task, group by group."""
        return advise_tasks(self.values, self.tasks, self._helpers, self.split.groups, self.confidence)

    # ---- what it looks like ----

    def _show(self, value: float) -> str:
        if not np.isfinite(value):
            return "-"
        if self.method == "conflict":
            return f"{value:+.3f}"
        # As many digits as it takes: what a step of a small learning rate does is little.
        largest = 100 * float(np.abs(self.affinity[~np.eye(len(self.tasks), dtype=bool)]).max())
        digits = 1 - math.floor(math.log10(largest)) if largest > 0 else 2
        return f"{100 * value:+.{min(max(digits, 2), 9)}f} %"

    def table(self) -> str:
        """Return a table of the served tasks, group by group, and one of the affinities."""
        what = "affinity" if self.method == "affinity" else "cosine"
        rows = [["group", "task", "gets", f"{self.confidence:.0%} interval", ""]]
        for one in self.advice():
            number = next(n for n, group in enumerate(self.groups, 1) if one.task in group)
            gets, low, high = one.joining or (one.affinity, one.low, one.high)
            interval = f"{self._show(low)} to {self._show(high)}"
            shown = f"({self._show(gets)})" if one.joining else self._show(gets)
            rows.append([str(number), one.task, shown, interval, one.statement])
        split = self.split
        together = self.splits[1].score
        kind = "" if self.is_exact else " (of the splits that were tried)"
        lines = [
            f"{len(split.groups)} group(s), of at most {self.most}, by {what} in {len(self.steps)} steps{kind}",
            f"mean over tasks {self._show(split.score)}, all in one group {self._show(together)}, each alone 0",
            "",
            align_columns(rows, {2}),
            "",
        ]
        if any(one.joining for one in self.advice()):
            lines[-1:] = ["(in brackets: what the sum over tasks would change by in the best other group)", ""]
        affinity, ends = self.affinity, self.intervals
        matrix = [["row does to column", *self.tasks]]
        for i, name in enumerate(self.tasks):
            cells = [
                self._show(affinity[i, j]) + ("" if ends[i, j, 0] > 0 or ends[i, j, 1] < 0 else " ?")
                for j in range(len(self.tasks))
            ]
            matrix.append([name + (" (helper)" if name in self.helpers else ""), *cells])
        lines.append(align_columns(matrix, set(range(1, len(self.tasks) + 1))))
        lines.append("? the interval includes 0: not enough evidence")
        lines += ["", "best mean over tasks by number of groups:"]
        numbers = sorted(self.splits)
        scores = [["groups", *map(str, numbers)], ["mean", *[self._show(self.splits[n].score) for n in numbers]]]
        return "\n".join([*lines, align_columns(scores, set(range(1, len(numbers) + 1)))])

    def __str__(self) -> str:
        """Return the table."""
        return self.table()

    def plot(self, path: str | Path) -> None:
        """Draw the matrix, group by group; the suffix (`.svg`, `.png`, `.pdf`) says of which kind the picture is.

        Raises:
            ImportError: matplotlib is not installed.
        """
        order = list(dict.fromkeys(number for group in self.split.groups for number in group))
        order += [number for number in range(len(self.tasks)) if number not in order]
        matrix = self.affinity[np.ix_(order, order)]
        between = matrix[~np.eye(len(order), dtype=bool)]
        ends = self.intervals[np.ix_(order, order)]
        texts = [
            [
                f"{self._show(matrix[i, j])}\n±{self._show((ends[i, j, 1] - ends[i, j, 0]) / 2).lstrip('+')}"
                for j in range(len(order))
            ]
            for i in range(len(order))
        ]
        what = "step of row, loss of column" if self.method == "affinity" else "cosine of gradients"
        colours = np.clip(matrix / max(float(np.abs(between).max()), 1e-30), -1, 1)
        groups = " | ".join(", ".join(group) for group in self.groups)
        draw_matrix(path, [self.tasks[number] for number in order], colours, texts, f"{what}: {groups}")

    # ---- files ----

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types; what follows from the measurement is for readers."""
        plain = {
            "groups": [list(group) for group in self.groups],
            "advice": [asdict(one) for one in self.advice()],
            "score": self.split.score,
            "is_exact": self.is_exact,
            "scores": {str(number): split.score for number, split in self.splits.items()},
            "affinity": self.affinity.tolist(),
            "intervals": self.intervals.tolist(),
        }
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        return _plain(plain | given | {"values": self.values.tolist()})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TaskGroups:
        """Make the object from the dictionary that [`to_dict`] gave."""
        known = {f.name: values[f.name] for f in fields(cls) if f.init}
        known |= {name: tuple(values[name]) for name in ("tasks", "helpers", "steps")}
        return cls(**{**known, "values": np.array(values["values"], dtype=np.float64)})

    def save(self, path: str | Path) -> None:
        """Write a JSON file."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> TaskGroups:
        """Read a file that [`save`] wrote."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


def check_most(most: Any, served: int) -> None:
    """Raise ValueError unless a number of groups is possible."""
    if isinstance(most, bool) or not isinstance(most, int) or not 1 <= most <= served:
        raise ValueError(f"groups must be a whole number from 1 to {served}, the tasks to serve, got {most!r}")


def _plain(value: Any) -> Any:
    """Return a value as JSON types; NaN becomes None."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value
