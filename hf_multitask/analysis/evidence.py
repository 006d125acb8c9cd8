"""What is known of some tasks, as far as it was measured: what advice rests on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from ..models.task import closest

__all__ = ["Evidence", "PairEvidence", "Verdict"]

_VERDICTS = ("better", "equal", "worse", "undecided")
_BY_TASK = ("sizes", "granularity", "reproducibility", "losses", "weights", "passes", "comparison")


class PairEvidence(NamedTuple):
    """How the gradients of two tasks lie to each other.

    Args:
        a: A task.
        b: The other.
        cosine: Mean cosine of their gradients on the shared parameters.
        low: Lower end of its confidence interval.
        high: Upper end.
    """

    a: str
    b: str
    cosine: float
    low: float
    high: float


class Verdict(NamedTuple):
    """How a task fares against its single-task baseline.

    Args:
        verdict: `better`, `equal`, `worse` or `undecided`.
        difference: Of its metric, positive where multi-task training is better.
        low: Lower end of the difference's interval.
        high: Upper end.
    """

    verdict: str
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Evidence:
    """What advice rests on. All but the names of the tasks may be unknown: None, or a task missing in a dictionary.

    Args:
        tasks: Names of the tasks.
        sizes: By task, its training rows.
        granularity: By task, `text` (one answer per text) or `token` (one per word or token).
        auxiliary: Tasks that are trained only to help others.
        primary: The task that matters most.
        pairs: Conflict of every pair of tasks (see [`hf_multitask.gradient_conflicts`]); None if it was not measured.
        reproducibility: By task, mean cosine of its own gradients of two batches: with 0 all that was seen is noise.
        losses: By task, its loss at the start, times its weight.
        weights: By task, weights that would bring these losses to one scale.
        passes: By task, how often the training reads each of its rows.
        backbone_parameters: Parameters of the backbone.
        parameter_budget: Most parameters that may be held, as a multiple of the backbone's.
        comparison: By task, the verdict of a comparison with its single-task baseline; None if there was none.
        sharing: The sharing scheme in use.
        sampling: The mixing strategy in use.
        weighting: The loss weighting in use.
        combination: The gradient combination in use.

    Raises:
        ValueError: There is no task, a name is no task, or a number is out of its range.
    """

    tasks: tuple[str, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)
    granularity: Mapping[str, str] = field(default_factory=dict)
    auxiliary: tuple[str, ...] = ()
    primary: str | None = None
    pairs: tuple[PairEvidence, ...] | None = None
    reproducibility: Mapping[str, float] = field(default_factory=dict)
    losses: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    passes: Mapping[str, float] = field(default_factory=dict)
    backbone_parameters: int | None = None
    parameter_budget: float | None = None
    comparison: Mapping[str, Verdict] | None = None
    sharing: str | None = None
    sampling: str | None = None
    weighting: str | None = None
    combination: str | None = None

    def __post_init__(self) -> None:
        """Check names and numbers."""
        if isinstance(self.tasks, str) or not self.tasks:
            raise ValueError(f"tasks must be the names of the tasks, at least one, got {self.tasks!r}")
        object.__setattr__(self, "tasks", tuple(self.tasks))
        for name in _BY_TASK:
            for task in getattr(self, name) or ():
                self._check_task(name, task)
        for task in self.auxiliary:
            self._check_task("auxiliary", task)
        if self.primary is not None:
            self._check_task("primary", self.primary)
        for pair in self.pairs or ():
            for task in (pair.a, pair.b):
                self._check_task("pairs", task)
            if not -1 <= pair.low <= pair.cosine <= pair.high <= 1:
                raise ValueError(
                    f"pairs: {pair.a} and {pair.b}: expected -1 <= low <= cosine <= high <= 1, got low={pair.low!r}, "
                    f"cosine={pair.cosine!r}, high={pair.high!r}"
                )
        for name in ("sizes", "losses", "passes", "weights"):
            for task, value in getattr(self, name).items():
                if not value >= 0 or math.isinf(value):
                    raise ValueError(f"{name}: {task!r} must be a finite number of at least 0, got {value!r}")
        budget = self.parameter_budget
        if budget is not None and not 1 <= budget < math.inf:
            raise ValueError(f"parameter_budget is a multiple of the backbone, at least 1, got {budget!r}")

    def _check_task(self, where: str, task: str) -> None:
        if task not in self.tasks:
            raise ValueError(
                f"{where}: {task!r} is no task{closest(task, self.tasks)}; tasks are {', '.join(self.tasks)}"
            )

    @property
    def size_ratio(self) -> float | None:
        """Rows of the largest task over those of the smallest; None if not all are known."""
        return _ratio(self.sizes, self.tasks, self.tasks)

    @property
    def loss_ratio(self) -> float | None:
        """The largest loss over the smallest of a task that is not auxiliary; None if not all are known."""
        return _ratio(self.losses, self.tasks, [task for task in self.tasks if task not in self.auxiliary])

    @classmethod
    def from_preflight(cls, preflight: Any, **known: Any) -> Evidence:
        """Return the evidence of a preflight.

        Args:
            preflight: A [`Preflight`], its dictionary, or the dictionary of its sections.
            **known: More of it, such as `parameter_budget`; what is given here holds.

        Raises:
            ValueError: There is no description of the tasks in it.
        """
        sections = getattr(preflight, "sections", preflight)
        sections = sections.get("sections", sections)
        if not sections.get("tasks"):
            raise ValueError("this preflight has no section 'tasks'; its recipe could not be read")
        tasks: dict[str, dict[str, Any]] = {task["name"]: task for task in sections["tasks"]}
        found: dict[str, Any] = {
            "tasks": tuple(tasks),
            "sizes": {name: task["rows"] for name, task in tasks.items() if task.get("rows")},
            "granularity": {name: task["granularity"] for name, task in tasks.items()},
            "auxiliary": tuple(name for name, task in tasks.items() if task["auxiliary"]),
            **{key: value for key, value in (sections.get("setting") or {}).items() if key in _names()},
        }
        for row in (sections.get("losses") or {}).get("tasks", ()):
            if row["weighted"] is not None:
                found.setdefault("losses", {})[row["task"]] = row["weighted"]
            if row["proposed_weight"] is not None:
                found.setdefault("weights", {})[row["task"]] = row["proposed_weight"]
        for row in (sections.get("plan") or {}).get("sources", ()):
            found.setdefault("passes", {}).update(dict.fromkeys(row["tasks"], row["passes"]))
        if conflict := (sections.get("conflict") or {}).get("result"):
            keys = ("a", "b", "cosine", "low", "high")
            found["pairs"] = tuple(PairEvidence(*(pair[key] for key in keys)) for pair in conflict["pairs"])
            found["reproducibility"] = dict(zip(conflict["tasks"], conflict["reproducibility"], strict=True))
        return cls(**{**found, **known})

    @classmethod
    def from_comparison(cls, comparison: Mapping[str, Mapping[str, Any]], **known: Any) -> Evidence:
        """Return the evidence of a comparison with single-task baselines.

        Args:
            comparison: By task `{"verdict": ..., "difference": ..., "interval": [low, high]}`, or the dictionary of a
                whole [`Comparison`].
            **known: More of it; `tasks` are those of the comparison, unless they are given here.

        Raises:
            ValueError: A verdict is unknown, or a number is missing or not finite.

        Example:
            >>> found = {"tone": {"verdict": "better", "difference": 0.02, "interval": [0.01, 0.03]}}
            >>> Evidence.from_comparison(found).comparison["tone"].low
            0.01
        """
        rows = comparison["tasks"] if "deploy" in comparison else comparison  # all of it, or its tasks
        verdicts = {task: _verdict(task, row) for task, row in rows.items()}
        return cls(**{"tasks": tuple(verdicts), **known, "comparison": verdicts})


def _names() -> set[str]:
    return {item.name for item in fields(Evidence)}


def _ratio(values: Mapping[str, float], tasks: Sequence[str], small: Sequence[str]) -> float | None:
    if any(task not in values for task in tasks) or not small or min(values[task] for task in small) <= 0:
        return None
    return max(values.values()) / min(values[task] for task in small)


def _verdict(task: str, row: Mapping[str, Any]) -> Verdict:
    """Return a task's verdict, after checking it."""
    missing = [key for key in ("verdict", "difference", "interval") if key not in row]
    if missing:
        raise ValueError(f"comparison: task {task!r} lacks {', '.join(missing)}; run the comparison for it")
    if row["verdict"] not in _VERDICTS:
        raise ValueError(
            f"comparison: task {task!r}: verdict {row['verdict']!r} is not known"
            f"{closest(row['verdict'], _VERDICTS)}; verdicts are {', '.join(_VERDICTS)}"
        )
    numbers = [row["difference"], *(row["interval"] or ())]
    if len(numbers) != 3 or not all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers):
        raise ValueError(
            f"comparison: task {task!r}: difference and interval must be finite numbers, got {row['difference']!r} "
            f"and {row['interval']!r}"
        )
    return Verdict(row["verdict"], *(float(number) for number in numbers))
