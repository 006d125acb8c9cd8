"""What a sweep over the weight of an auxiliary task gave: where it saturates, where it interferes, table, file, plot.

With m(w, s) the primary metric with weight w and seed s, everything about interference is paired over seeds: the change
m(w, s) - m(0, s) compares two runs that differ in the weight alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .conflict_result import align_columns
from .plots import new_figure, save_figure

__all__ = ["AuxiliarySweep", "SweepRun", "check_picture"]

_RELATIVE = 0.01  # tolerance where there is one seed, and so no spread to compare with
_ROUNDING = 1e-12  # a difference of exactly the tolerance is within it


@dataclass(frozen=True)
class SweepRun:
    """One training of a sweep, measured on the validation rows.

    Args:
        weight: Weight of the auxiliary task.
        seed: Seed of the run.
        primary: The primary metric.
        auxiliary: The auxiliary task's own primary metric.
        auxiliary_loss: Its loss per item, not multiplied with the weight.
        details: What the run's `results.json` holds, without the recipe.
    """

    weight: float
    seed: int
    primary: float
    auxiliary: float
    auxiliary_loss: float
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class AuxiliarySweep:
    """Primary and auxiliary metrics over weights and seeds; see [`hf_multitask.analysis.auxiliary.sweep_auxiliary`].

    Args:
        auxiliary: Name of the auxiliary task.
        primary: Name of the primary task; None for the mean over all tasks that are not auxiliary.
        metric: Name of the primary metric (`average` without a primary task).
        auxiliary_metric: Name of the auxiliary task's metric.
        higher_is_better: Whether larger values of the primary metric are better.
        runs: One for each weight and seed, in any order; weight 0 is among them.
        recipe: The recipe, as plain types.
        versions: Versions of Python and of the libraries in the last run; each run's `details` hold its own.
        sweep: What tells this sweep from others in the same folder.

    Raises:
        ValueError: A run is missing or there twice, or there is none with weight 0.
    """

    auxiliary: str
    primary: str | None
    metric: str
    auxiliary_metric: str
    higher_is_better: bool
    runs: tuple[SweepRun, ...]
    recipe: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    sweep: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Put the runs in order and see that all are there."""
        object.__setattr__(self, "runs", tuple(sorted(self.runs, key=lambda run: (run.weight, run.seed))))
        pairs = [(run.weight, run.seed) for run in self.runs]
        if pairs != [(weight, seed) for weight in self.weights for seed in self.seeds] or 0.0 not in self.weights:
            raise ValueError(f"runs must be one for each weight, 0 among them, and each seed; got those of {pairs}")

    @property
    def weights(self) -> tuple[float, ...]:
        """The W weights, ascending."""
        return tuple(sorted({run.weight for run in self.runs}))

    @property
    def seeds(self) -> tuple[int, ...]:
        """The S seeds, ascending."""
        return tuple(sorted({run.seed for run in self.runs}))

    @property
    def one_seed(self) -> bool:
        """Whether there is one seed only: then nothing is known of the spread, and a tolerance stands in for it."""
        return len(self.seeds) == 1

    @property
    def primary_name(self) -> str:
        """The primary metric as it is called in tables and plots."""
        return "average" if self.primary is None else f"{self.primary} {self.metric}"

    def values(self, name: str) -> np.ndarray:
        """Return `[W, S]`: `primary`, `auxiliary` or `auxiliary_loss` of every run."""
        return np.array([getattr(run, name) for run in self.runs]).reshape(len(self.weights), len(self.seeds))

    def changes(self) -> np.ndarray:
        """Return `[W, S]`: the primary metric less that of weight 0 with the same seed."""
        values = self.values("primary")
        return values - values[0]

    def limits(self) -> np.ndarray:
        """Return `[W]`: by how much the primary metric may be worse than at weight 0, on average, to pass for noise.

        It is the standard deviation over seeds of the change: where a weight makes no difference, the mean is beyond it
        by chance in one case of five for two seeds, of nine for three, and of 22 for five, if changes are normally
        distributed. With one seed it is 1 % of the value at weight 0.
        """
        if self.one_seed:
            return np.full(len(self.weights), abs(self.values("primary")[0, 0]) * _RELATIVE)
        return self.changes().std(1, ddof=1)

    def worse(self) -> np.ndarray:
        """Return `[W]`, bool: whether the primary metric is worse than at weight 0 by more than its limit."""
        gains = self.changes().mean(1) * (1 if self.higher_is_better else -1)
        return ~(gains >= -self.limits() - _ROUNDING)  # what is not a number is worse

    @property
    def interference_threshold(self) -> float | None:
        """The smallest weight from which on, at it and all larger ones, the primary metric is worse than at weight 0.

        None where it is not worse at the largest weight. What counts as worse: [`limits`].
        """
        worse = self.worse()
        first = len(worse)
        while first and worse[first - 1]:
            first -= 1
        return self.weights[first] if first < len(worse) else None

    @property
    def saturation_tolerance(self) -> float:
        """How far from the lowest a mean loss of the auxiliary task may be to pass for saturated.

        It is the standard error of the lowest mean over seeds (the one-standard-error rule of Breiman et al. 1984);
        with one seed, 1 % of the loss.
        """
        losses = self.values("auxiliary_loss")
        lowest = losses[int(np.where(np.isnan(losses), np.inf, losses).mean(1).argmin())]
        if self.one_seed:
            return abs(float(lowest[0])) * _RELATIVE
        return float(lowest.std(ddof=1)) / math.sqrt(len(lowest))

    @property
    def saturation(self) -> float | None:
        """The smallest weight at which the auxiliary task is learned as well as at any, by its loss.

        Its mean loss there is within [`saturation_tolerance`] of the lowest mean loss over all weights. By the loss,
        and not by the metric, because every type of task has one and it shows what coarse metrics hide. None if the
        loss is finite nowhere.
        """
        means = self.values("auxiliary_loss").mean(1)
        if not np.isfinite(means).any():
            return None
        within = means <= means[np.isfinite(means)].min() + self.saturation_tolerance + _ROUNDING
        return self.weights[int(within.argmax())]

    def table(self) -> list[dict[str, Any]]:
        """Return a row for each weight: mean, standard deviation (None with one seed), least and greatest values.

        `change` is the mean change of the primary metric against weight 0, `limit` what passes for noise, `worse`
        whether the metric is worse by more than that.
        """
        rows = []
        changes, limits, worse = self.changes(), self.limits(), self.worse()
        for i, weight in enumerate(self.weights):
            row: dict[str, Any] = {"weight": weight}
            for name in ("primary", "auxiliary", "auxiliary_loss"):
                values = self.values(name)[i]
                row |= {name: float(values.mean()), f"{name}_std": _deviation(values)}
                row |= {f"{name}_min": float(values.min()), f"{name}_max": float(values.max())}
            row |= {"change": float(changes[i].mean()), "change_std": _deviation(changes[i])}
            rows.append(row | {"limit": float(limits[i]), "worse": bool(worse[i])})
        return rows

    def __str__(self) -> str:
        """Return the table, and what it says."""
        others = {"auxiliary": f"{self.auxiliary} {self.auxiliary_metric}", "auxiliary_loss": f"{self.auxiliary} loss"}
        if self.auxiliary_metric == "loss":
            del others["auxiliary"]
        ends = [] if self.one_seed else ["min", "max"]
        shown = [["weight", self.primary_name, *ends, "change", "", *others.values()]]
        for row in self.table():
            change = _with_spread(row["change"], row["change_std"], "+") if row["weight"] else ""
            shown.append(
                [
                    f"{row['weight']:g}",
                    _with_spread(row["primary"], row["primary_std"]),
                    *(f"{row[f'primary_{end}']:.4f}" for end in ends),
                    change,
                    "worse" if row["worse"] else "",
                    *(_with_spread(row[name], row[f"{name}_std"]) for name in others),
                ]
            )
        return "\n".join([align_columns(shown, set(range(len(shown[0])))), "", *self._findings()])

    def _findings(self) -> list[str]:
        lines = []
        if self.saturation is not None:
            by = f"{'1 %' if self.one_seed else 'one standard error'} ({self.saturation_tolerance:.4f})"
            at = f"{self.auxiliary} saturates at weight {self.saturation:g}"
            if self.saturation == self.weights[-1]:
                at = f"{self.auxiliary} saturates at no weight below {self.saturation:g}, the largest"
            lines.append(f"{at}: loss within {by} of the lowest")
        if self.one_seed:
            beyond = f"1 % of the value at weight 0 ({self.limits()[0]:.4f}), one seed"
        else:
            beyond = f"the standard deviation of the change over {len(self.seeds)} seeds"
        if self.interference_threshold is None:
            largest = f"at weight {self.weights[-1]:g}, the largest, {self.primary_name}"
            lines.append(f"no interference threshold: {largest} is not worse by more than {beyond}")
        else:
            at = f"interference threshold {self.interference_threshold:g}"
            lines.append(f"{at}: from there on {self.primary_name} is worse by more than {beyond}")
        if self.one_seed:
            lines.append("One seed: runs with other seeds may differ by more than this; repeat with several")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types; `summary`, which follows from the runs, is for readers."""
        return {
            "sweep": self.sweep,
            "finished": True,
            "auxiliary": self.auxiliary,
            "primary": self.primary,
            "metric": self.metric,
            "auxiliary_metric": self.auxiliary_metric,
            "higher_is_better": self.higher_is_better,
            "summary": {
                "seeds": list(self.seeds),
                "one_seed": self.one_seed,
                "saturation": self.saturation,
                "saturation_tolerance": self.saturation_tolerance,
                "interference_threshold": self.interference_threshold,
                "weights": self.table(),
            },
            "runs": [vars(run) for run in self.runs],
            "recipe": self.recipe,
            "versions": self.versions,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AuxiliarySweep:
        """Make the object from the dictionary that [`to_dict`] gave.

        Raises:
            ValueError: It is of a sweep that is not finished.
        """
        if not values.get("finished"):
            raise ValueError("this sweep is not finished: start it again, and it goes on")
        plain = (
            "auxiliary",
            "primary",
            "metric",
            "auxiliary_metric",
            "higher_is_better",
            "recipe",
            "versions",
            "sweep",
        )
        return cls(runs=tuple(SweepRun(**run) for run in values["runs"]), **{name: values[name] for name in plain})

    def save(self, path: str | Path) -> None:
        """Write a JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> AuxiliarySweep:
        """Read a file that [`save`] wrote."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))

    def plot(self, path: str | Path) -> None:
        """Draw primary metric, auxiliary metric and auxiliary loss over the weights, with a dot for every run.

        Bars are standard deviations over seeds. The interference threshold and the weight where the auxiliary task
        saturates are marked. The suffix of the path (`.svg`, `.png`, `.pdf`) says of which kind the picture is.

        Raises:
            ImportError: matplotlib is not installed.
        """
        panels = [("primary", self.primary_name), ("auxiliary_loss", f"{self.auxiliary} loss")]
        if self.auxiliary_metric != "loss":
            panels.insert(1, ("auxiliary", f"{self.auxiliary} {self.auxiliary_metric}"))
        figure = new_figure(5.5, 0.8 + 1.7 * len(panels))
        axes: Sequence[Any] = figure.subplots(len(panels), 1, sharex=True)
        for axis, (name, label) in zip(axes, panels, strict=True):
            values = self.values(name)
            spread = None if self.one_seed else values.std(1, ddof=1)
            axis.errorbar(self.weights, values.mean(1), spread, color="C0", capsize=3, linewidth=1.5)
            weights = np.repeat(self.weights, len(self.seeds))
            axis.plot(weights, values.ravel(), "o", color="C0", markersize=3, alpha=0.5)
            axis.set_ylabel(label, fontsize=9)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].axhline(self.values("primary")[0].mean(), color="grey", linewidth=0.8, linestyle=":")
        for axis, weight, what, colour in (
            (axes[0], self.interference_threshold, "interference threshold", "C3"),
            (axes[-1], self.saturation, "saturation", "C2"),
        ):
            if weight is None:
                axis.set_title(f"no {what}", fontsize=9)
            else:
                axis.axvline(weight, color=colour, linestyle="--", linewidth=1, label=f"{what}: {weight:g}")
                axis.legend(fontsize=8, frameon=False)
        figure.align_ylabels(axes)
        axes[-1].set_xlabel(f"weight of {self.auxiliary}", fontsize=9)
        save_figure(figure, path)


def _deviation(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1)) if len(values) > 1 else None


def _with_spread(mean: float, deviation: float | None, sign: str = "") -> str:
    return f"{mean:{sign}.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")


def check_picture(path: str | Path) -> None:
    """Check, before long work, that a picture can be drawn into a file.

    Raises:
        ValueError: matplotlib is not installed, or draws no files with this suffix.
    """
    try:
        known = new_figure(1, 1).canvas.get_supported_filetypes()
    except ImportError as error:
        raise ValueError(str(error)) from None
    suffix = Path(path).suffix.removeprefix(".").lower()
    if suffix not in known:
        raise ValueError(f"plot {str(path)!r}: the suffix must say of which kind it is, one of .{', .'.join(known)}")
