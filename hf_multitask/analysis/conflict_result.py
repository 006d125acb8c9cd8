"""What a measurement of gradient conflicts gave: cosines with their spread, verdicts, tables, files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from .plots import draw_matrix

__all__ = ["GradientConflicts", "TaskPair", "align_columns"]


@dataclass(frozen=True)
class TaskPair:
    """The verdict on two tasks.

    Args:
        a: Name of a task.
        b: Name of the other.
        cosine: Mean cosine of their gradients.
        low: Lower end of its confidence interval.
        high: Upper end.
        verdict: `positive` (each should help the other), `negative` (they should harm each other) or `neutral`.
        certain: Whether the whole interval has the same verdict.
    """

    a: str
    b: str
    cosine: float
    low: float
    high: float
    verdict: str
    certain: bool


@dataclass(frozen=True, eq=False)
class GradientConflicts:
    """Cosines of the tasks' gradients on the shared parameters; see [`hf_multitask.gradient_conflicts`].

    Args:
        tasks: Names of the T tasks.
        cosines: `[T, T]`, mean over batches, in [-1, 1].
        low: `[T, T]`, lower end of the confidence interval of the mean.
        high: `[T, T]`, its upper end.
        norms: `[T]`, mean Euclidean norm of each task's gradient, in units of its loss.
        losses: `[T]`, mean loss of each task on the measured rows: whether the heads fit at all.
        reproducibility: `[T]`, mean cosine of a task's gradients of two batches. With 1 the batches agree on where
            the task wants to go, with 0 all that was seen is noise. It bounds what tasks on different rows can show.
        layers: `[T, T]` mean cosines by layer.
        batches: Number of batches.
        thresholds: Mean cosines below the first are negative transfer, above the second positive transfer.
        settings: The other arguments of the measurement.
    """

    tasks: tuple[str, ...]
    cosines: np.ndarray
    low: np.ndarray
    high: np.ndarray
    norms: np.ndarray
    losses: np.ndarray
    reproducibility: np.ndarray
    layers: dict[str, np.ndarray]
    batches: int
    thresholds: tuple[float, float] = (-0.1, 0.1)
    settings: dict[str, Any] = field(default_factory=dict)

    def pair(self, a: str, b: str) -> TaskPair:
        """Return cosine, interval and verdict of two tasks.

        Raises:
            ValueError: A name is not that of a task.
        """
        for name in (a, b):
            if name not in self.tasks:
                raise ValueError(f"no task {name!r}; tasks are {', '.join(self.tasks)}")
        at = self.tasks.index(a), self.tasks.index(b)
        cosine, low, high = (float(matrix[at]) for matrix in (self.cosines, self.low, self.high))
        verdict = self._judge(cosine)
        return TaskPair(a, b, cosine, low, high, verdict, self._judge(low) == verdict == self._judge(high))

    def _judge(self, cosine: float) -> str:
        lower, upper = self.thresholds
        return "negative" if cosine < lower else "positive" if cosine > upper else "neutral"

    def verdict(self, a: str, b: str) -> str:
        """Return `positive`, `negative` or `neutral`, by the mean cosine; [`pair`] says whether that is certain."""
        return self.pair(a, b).verdict

    def pairs(self) -> list[TaskPair]:
        """Return all pairs of two tasks, in the tasks' order."""
        return [self.pair(a, b) for i, a in enumerate(self.tasks) for b in self.tasks[i + 1 :]]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types; the verdicts, which follow from the rest, are for readers."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["layers"] = {name: matrix.tolist() for name, matrix in self.layers.items()}
        plain = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in values.items()}
        plain |= {"tasks": list(self.tasks), "thresholds": list(self.thresholds)}
        return plain | {"pairs": [vars(pair) for pair in self.pairs()]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GradientConflicts:
        """Make the object from the dictionary that [`to_dict`] gave."""
        arrays = ("cosines", "low", "high", "norms", "losses", "reproducibility")
        return cls(
            tasks=tuple(values["tasks"]),
            layers={name: np.array(matrix) for name, matrix in values["layers"].items()},
            batches=values["batches"],
            thresholds=(values["thresholds"][0], values["thresholds"][1]),
            settings=dict(values["settings"]),
            **{name: np.array(values[name]) for name in arrays},
        )

    def save(self, path: str | Path) -> None:
        """Write a JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> GradientConflicts:
        """Read a file that [`save`] wrote."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))

    def __str__(self) -> str:
        """Return two tables: the pairs, and the tasks."""
        level = f"{self.settings.get('confidence', 0.95):.0%} interval"
        pairs = [["task", "task", "cosine", level, "verdict", "lowest in"]]
        for pair in self.pairs():
            at = self.tasks.index(pair.a), self.tasks.index(pair.b)
            layer = min(self.layers, key=lambda name, at=at: self.layers[name][at])  # type: ignore[misc]
            interval = f"{pair.low:+.2f} to {pair.high:+.2f}"
            verdict = pair.verdict + ("" if pair.certain else " ?")
            lowest = f"{layer} ({self.layers[layer][at]:+.2f})"
            pairs.append([pair.a, pair.b, f"{pair.cosine:+.3f}", interval, verdict, lowest])
        tasks = [["task", "loss", "gradient norm", "agreement of batches"]]
        for name, loss, norm, own in zip(self.tasks, self.losses, self.norms, self.reproducibility, strict=True):
            tasks.append([name, f"{loss:.3g}", f"{norm:.3g}", f"{own:.2f}"])
        parts = [align_columns(pairs, {2}), align_columns(tasks, {1, 2, 3})]
        if not all(pair.certain for pair in self.pairs()):
            parts.insert(1, f"? the interval crosses a threshold ({self.thresholds[0]:g} or {self.thresholds[1]:g})\n")
        else:
            parts.insert(1, "")
        noisy = [name for name, own in zip(self.tasks, self.reproducibility, strict=True) if own < self.thresholds[1]]
        if noisy:
            parts.append(f"batches disagree about {', '.join(noisy)}: on different rows, neutral may just be noise")
        return "\n".join(parts)

    def plot(self, path: str | Path) -> None:
        """Draw the matrix of cosines into a picture; the suffix (`.svg`, `.png`, `.pdf`) says of which kind.

        Raises:
            ImportError: matplotlib is not installed.
        """
        half = (self.high - self.low) / 2
        texts = [
            ["" if i == j else f"{self.cosines[i, j]:+.2f}\n±{half[i, j]:.2f}" for j in range(len(self.tasks))]
            for i in range(len(self.tasks))
        ]
        draw_matrix(path, self.tasks, self.cosines, texts, f"cosine of gradients, mean of {self.batches} batches")


def align_columns(rows: Sequence[Sequence[str]], right: set[int]) -> str:
    """Return rows of text as a table with a line below the first; columns in `right` are aligned to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
