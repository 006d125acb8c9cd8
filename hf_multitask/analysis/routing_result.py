"""What a look at the routers of a mixture of experts gave: shares, mutual information, specialists, tables, files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .conflict_result import align_columns
from .plots import new_figure, save_figure

__all__ = ["MutualInformation", "RoutingResult", "Specialist"]

_FEWEST = 0.01  # of a layer's token-slots: experts below are used too little to be called specialists


class MutualInformation(NamedTuple):
    """How much the expert that a token goes to says about its task, in nats.

    Args:
        estimate: Plug-in estimate, from the shares as they are.
        bias: What it would be too high by if tokens were independent draws.
    """

    estimate: float
    bias: float

    @property
    def corrected(self) -> float:
        """The estimate less its bias; where tasks route alike it lies about 0, on either side."""
        return self.estimate - self.bias


@dataclass(frozen=True)
class Specialist:
    """An expert, and the task that it works for most.

    Args:
        layer: The expert's layer.
        expert: Its number.
        task: The task.
        share: The task's share of what the expert gets, each task counted as having as many tokens as the others.
        lift: That share over the share of an expert without preference, 1 / T; T if it works for one task alone.
        usage: The expert's share of its layer's token-slots.
    """

    layer: str
    expert: int
    task: str
    share: float
    lift: float
    usage: float


@dataclass(frozen=True, eq=False)
class RoutingResult:
    """Which experts the tokens of each task go to; see [`hf_multitask.routing`].

    A token that goes to k experts fills k token-slots, one with each.

    Args:
        tasks: Names of the T tasks.
        counts: By layer `[T, E]`, int64: token-slots of each task that each expert got.
        settings: The arguments of the measurement.
    """

    tasks: tuple[str, ...]
    counts: dict[str, np.ndarray]
    settings: dict[str, Any] = field(default_factory=dict)

    def shares(self, layer: str) -> np.ndarray:
        """Return `[T, E]`: of each task's token-slots, the share that each expert got.

        Raises:
            ValueError: There is no such layer.
        """
        if layer not in self.counts:
            raise ValueError(f"no layer {layer!r}; layers with routers are {', '.join(self.counts)}")
        counts = self.counts[layer]
        return counts / counts.sum(1, keepdims=True)

    def mutual_information(self, layer: str) -> MutualInformation:
        """Return the mutual information between task and expert in a layer, between 0 and log T, in nats.

        Each task counts alike, however long its texts are: with p(e|t) the shares and p(e) their mean over tasks, it
        is the mean over tasks of sum_e p(e|t) log(p(e|t) / p(e)). For N independent slots of each task and experts
        that are chosen alike for all tasks, such an estimate is too high by (E-1)(T-1) / (2NT) (Miller 1955); the
        bias is the general form of that to first order, for N_t slots of task t. Tokens of one text are alike, which
        makes the true bias larger, so do not read much into values of its size.
        """
        shares = self.shares(layer)
        slots = self.counts[layer].sum(1, keepdims=True)
        mean = shares.mean(0)
        ratio = np.divide(shares, mean, out=np.ones_like(shares), where=shares > 0)
        estimate = float((shares * np.log(ratio)).sum(1).mean())
        # An entropy is underestimated by half the sum of var(p) / p: those of tasks, less that of their mean.
        variances = shares * (1 - shares) / slots
        of_tasks = np.divide(variances, shares, out=np.zeros_like(shares), where=shares > 0).sum(1).mean()
        of_mean = np.divide(variances.sum(0) / len(shares) ** 2, mean, out=np.zeros_like(mean), where=mean > 0).sum()
        return MutualInformation(estimate, float(of_tasks - of_mean) / 2)

    def specialists(self, count: int = 5) -> list[Specialist]:
        """Return the experts that work most for one task, those with the highest lift first.

        Experts that get less than 1 % of a layer's token-slots are left out.

        Args:
            count: How many at most.
        """
        found = []
        for layer in self.counts:
            shares = self.shares(layer)
            usage = shares.mean(0)
            for expert in np.flatnonzero(usage >= _FEWEST):
                own = shares[:, expert] / shares[:, expert].sum()
                task = int(own.argmax())
                values = float(own[task]), float(own[task] * len(own)), float(usage[expert])
                found.append(Specialist(layer, int(expert), self.tasks[task], *values))
        return sorted(found, key=lambda one: -one.lift)[:count]

    def table(self) -> list[dict[str, Any]]:
        """Return a row for each layer and task: its slots and the share of each expert, `expert_0`, `expert_1`, ..."""
        return [
            {"layer": layer, "task": task, "slots": int(self.counts[layer][i].sum())}
            | {f"expert_{e}": float(share) for e, share in enumerate(self.shares(layer)[i])}
            for layer in self.counts
            for i, task in enumerate(self.tasks)
        ]

    def __str__(self) -> str:
        """Return three tables: shares in percent, mutual information by layer, and specialists."""
        number = max(matrix.shape[1] for matrix in self.counts.values())
        shares = [["layer", "task", *(f"e{e}" for e in range(number))]]
        for layer in self.counts:
            for task, row in zip(self.tasks, self.shares(layer), strict=True):
                shares.append([layer, task, *(f"{100 * value:.0f}" for value in row), *[""] * (number - len(row))])
        information = [["layer", "mutual information", "bias", "of log T"]]
        for layer in self.counts:
            found = self.mutual_information(layer)
            part = found.corrected / np.log(len(self.tasks)) if len(self.tasks) > 1 else 0.0
            information.append([layer, f"{found.corrected:.4f} nats", f"{found.bias:.4f}", f"{max(part, 0.0):.1%}"])
        experts = [["specialist", "task", "share of its tokens", "lift", "usage"]]
        for one in self.specialists():
            name = f"{one.layer}, e{one.expert}"
            experts.append([name, one.task, f"{one.share:.0%}", f"{one.lift:.2f}", f"{one.usage:.1%}"])
        parts = [align_columns(shares, set(range(2, number + 2))), "", align_columns(information, {1, 2, 3}), ""]
        return "\n".join([*parts, align_columns(experts, {2, 3, 4})])

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types; what follows from the counts is there for readers."""
        return {
            "tasks": list(self.tasks),
            "counts": {layer: matrix.tolist() for layer, matrix in self.counts.items()},
            "settings": self.settings,
            "mutual_information": {layer: self.mutual_information(layer)._asdict() for layer in self.counts},
            "specialists": [vars(one) for one in self.specialists()],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RoutingResult:
        """Make the object from the dictionary that [`to_dict`] gave."""
        counts = {layer: np.array(matrix, dtype=np.int64) for layer, matrix in values["counts"].items()}
        return cls(tuple(values["tasks"]), counts, dict(values["settings"]))

    def save(self, path: str | Path) -> None:
        """Write a JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> RoutingResult:
        """Read a file that [`save`] wrote."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))

    def plot(self, path: str | Path) -> None:
        """Draw the shares, a map of tasks and experts for each layer; the suffix of the path says of which kind it is.

        Raises:
            ImportError: matplotlib is not installed.
        """
        number = max(matrix.shape[1] for matrix in self.counts.values())
        height = 0.6 + 0.36 * len(self.tasks)
        figure = new_figure(2.0 + 0.55 * number, 0.5 + height * len(self.counts))
        axes = figure.subplots(len(self.counts), 1, squeeze=False)[:, 0]
        highest = max(float(self.shares(layer).max()) for layer in self.counts)
        for axis, layer in zip(axes, self.counts, strict=True):
            shares, found = self.shares(layer), self.mutual_information(layer)
            axis.imshow(shares, cmap="Blues", vmin=0, vmax=highest, aspect="auto")
            axis.set_yticks(range(len(self.tasks)), self.tasks)
            axis.set_xticks(range(shares.shape[1]))
            axis.set_title(f"{layer}: {found.corrected:.3f} nats", fontsize=9)
            axis.spines[:].set_visible(False)
            axis.tick_params(length=0)
            for (i, e), share in np.ndenumerate(shares if number <= 16 else np.empty((0, 0))):
                colour = "white" if share > 0.6 * highest else "black"
                axis.text(e, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=colour)
        axes[-1].set_xlabel("expert; share of the task's token-slots in percent", fontsize=9)
        save_figure(figure, path)
