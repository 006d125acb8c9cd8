"""Many prepared sources behind one index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..models.task import Task, closest
from .preprocessing import prepare
from .sources import Source, label_key

__all__ = ["MultiTaskDataset", "as_mapping", "prepare_sources"]


class MultiTaskDataset(torch.utils.data.Dataset):
    """The rows of all sources, numbered through: a row's number is its number in its source plus the rows before.

    Args:
        sources: The sources, in order.
        rows: Each source's prepared rows (see [`hf_multitask.data.preprocessing.prepare`]), by its name.
    """

    def __init__(self, sources: Sequence[Source], rows: Mapping[str, Dataset]) -> None:
        self.sources = list(sources)
        self.rows = [rows[source.name] for source in self.sources]
        self._ends = np.cumsum([len(part) for part in self.rows])

    @property
    def sizes(self) -> dict[str, int]:
        """Rows by source."""
        return {source.name: len(part) for source, part in zip(self.sources, self.rows, strict=True)}

    def __len__(self) -> int:
        """Return the number of rows of all sources."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one row: its columns, and its `source`."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return several rows, in order; one read per source, however many rows."""
        places = np.asarray(indices)
        which = np.searchsorted(self._ends, places, side="right")
        result: list[dict[str, Any]] = [{}] * len(places)
        for number in np.unique(which).tolist():
            positions = np.flatnonzero(which == number)
            part = self.rows[number]
            columns = part[(places[positions] - (self._ends[number] - len(part))).tolist()]
            source = self.sources[number]
            for i, position in enumerate(positions.tolist()):
                result[position] = {"source": source, **{key: values[i] for key, values in columns.items()}}
        return result

    def select_task(self, task: Task) -> MultiTaskDataset | None:
        """Return the rows that one task reads, with its labels only; None where its source has no rows here."""
        for source, part in zip(self.sources, self.rows, strict=True):
            if task in source.tasks:
                others = [label_key(other.name) for other in source.tasks if other is not task]
                alone = Source(source.name, source.dataset, (task,))
                return MultiTaskDataset(
                    [alone], {source.name: part.remove_columns([c for c in others if c in part.column_names])}
                )
        return None


def as_mapping(datasets: Any, sources: Sequence[Source], argument: str, *, complete: bool) -> dict[str, Any]:
    """Return datasets by name, after checking the names against those that the tasks ask for.

    Args:
        datasets: A dictionary or `DatasetDict`; or one dataset, where all tasks read the same.
        sources: The sources of the model's tasks.
        argument: Name of the argument, for messages.
        complete: Whether every task must have its dataset.

    Raises:
        ValueError: A dataset feeds no task, or a task has no dataset.
    """
    names = list(dict.fromkeys(source.dataset for source in sources))
    if not isinstance(datasets, Mapping):
        if len(names) > 1:
            raise ValueError(f"{argument} must be a dictionary of datasets by name; the tasks read {', '.join(names)}")
        return {names[0]: datasets}
    for name in datasets:
        if name not in names:
            raise ValueError(
                f"{argument} has a dataset {name!r} that feeds no task{closest(name, names)}; "
                f"the tasks read {', '.join(names)}"
            )
    missing = [name for name in names if name not in datasets]
    if missing and (complete or not datasets):
        tasks = [task.name for source in sources if source.dataset in missing for task in source.tasks]
        raise ValueError(
            f"{argument} lacks the dataset(s) {', '.join(missing)} of the task(s) {', '.join(tasks)}; "
            f"it has {', '.join(datasets) or 'none'}"
        )
    return dict(datasets)


def prepare_sources(
    datasets: Any, sources: Sequence[Source], argument: str, *, complete: bool = True, **options: Any
) -> MultiTaskDataset:
    """Prepare the datasets of all sources.

    Args:
        datasets: By name, as for [`as_mapping`].
        sources: The sources of the model's tasks.
        argument: Name of the argument, for messages.
        complete: Whether every task must have its dataset.
        **options: Arguments of [`hf_multitask.data.preprocessing.prepare`].
    """
    by_name = as_mapping(datasets, sources, argument, complete=complete)
    present = [source for source in sources if source.dataset in by_name]
    rows = {source.name: prepare(by_name[source.dataset], source, **options) for source in present}
    return MultiTaskDataset(present, rows)
