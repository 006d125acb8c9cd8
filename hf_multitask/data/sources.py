"""Which tasks read the same rows: those that name the same dataset, the same text columns and the same length.

Tasks over the vocabulary have rows of their own, which are changed, or hold the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..models.task import Task

__all__ = ["Source", "label_key", "make_sources", "trained_sources", "without_held_out"]


def label_key(task: str) -> str:
    """Return the column of a prepared source that holds a task's encoded labels."""
    return f"labels_{task}"


@dataclass(frozen=True)
class Source:
    """Rows that one or several tasks read.

    Args:
        name: The dataset's name; with the task's name behind it where a dataset is read in several ways.
        dataset: The dataset's name.
        tasks: The tasks that read the rows, in the model's order.
    """

    name: str
    dataset: str
    tasks: tuple[Task, ...]

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The text columns, which are the same for all of its tasks."""
        return self.tasks[0].text_columns


def make_sources(tasks: Sequence[Task], shares_rows: bool = True) -> list[Source]:
    """Group tasks into sources.

    Args:
        tasks: The model's tasks.
        shares_rows: Whether one encoder pass may serve several tasks; conditioned schemes give each its own rows.
    """
    groups: dict[tuple, list[Task]] = {}
    for task in tasks:
        alone = not shares_rows or task.type.needs_own_rows
        key = (task.dataset, task.text_columns, task.max_length, task.name if alone else None)
        groups.setdefault(key, []).append(task)
    uses = [key[0] for key in groups]
    return [
        Source(key[0] if uses.count(key[0]) == 1 else f"{key[0]}:{group[0].name}", key[0], tuple(group))
        for key, group in groups.items()
    ]


def trained_sources(sources: Sequence[Source]) -> list[Source]:
    """Return the sources whose tasks are not held out."""
    return [source for source in sources if not source.tasks[0].held_out]


def without_held_out(datasets: Any, sources: Sequence[Source]) -> Any:
    """Return datasets by name without those that only tasks that are held out would read."""
    if not isinstance(datasets, Mapping):
        return datasets
    trained = {source.dataset for source in trained_sources(sources)}
    left_out = {source.dataset for source in sources} - trained
    return {name: rows for name, rows in datasets.items() if name not in left_out} if left_out else datasets
