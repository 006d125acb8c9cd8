"""Many prepared sources behind one index."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, List, Value

from ..models.task import closest
from .preprocessing import prepare
from .sources import Source

__all__ = ["MultiTaskDataset", "as_mapping", "first_rows", "prepare_sources"]


class _Column:
    """One column of a prepared source, read row by row straight out of Arrow's memory, without a copy.

    `datasets.Dataset` builds a table for every access; with a row from each of many sources in a batch that alone
    would cost more than padding them.
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._ends = np.cumsum([len(chunk) for chunk in chunks]).tolist()
        self._parts: list[tuple[np.ndarray, list[int] | np.ndarray | None]] = []
        for chunk in chunks:
            if pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type):
                self._parts.append((chunk.values.to_numpy(), chunk.offsets.to_numpy()))
            else:
                self._parts.append((chunk.to_numpy(), None))

    def __getitem__(self, row: int) -> np.ndarray | int:
        part = bisect_right(self._ends, row) if len(self._ends) > 1 else 0
        if part:
            row -= self._ends[part - 1]
        values, offsets = self._parts[part]
        return values[row].item() if offsets is None else values[offsets[row] : offsets[row + 1]]


def _is_text(feature: Any) -> bool:
    value = feature.feature if isinstance(feature, List) else feature
    return isinstance(value, Value) and value.dtype in ("string", "large_string")


class MultiTaskDataset(torch.utils.data.Dataset):
    """The rows of all sources, numbered through: a row's number is its number in its source plus the rows before.

    Args:
        sources: The sources, in order.
        rows: Each source's prepared rows (see [`hf_multitask.data.preprocessing.prepare`]), by its name.
    """

    def __init__(self, sources: Sequence[Source], rows: Mapping[str, Dataset]) -> None:
        self.sources = list(sources)
        self.rows = [rows[source.name] for source in self.sources]
        self._open()

    def _open(self) -> None:
        self.rows = [part if part._indices is None else part.flatten_indices() for part in self.rows]
        self._ends = np.cumsum([len(part) for part in self.rows]).tolist()
        # Texts are for evaluation, and go into no batch.
        self._columns = [
            [(name, _Column(part.data.column(name))) for name in part.column_names if not _is_text(part.features[name])]
            for part in self.rows
        ]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the views of memory behind: another process opens the files itself."""
        return {"sources": self.sources, "rows": self.rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    @property
    def sizes(self) -> dict[str, int]:
        """Rows by source."""
        return {source.name: len(part) for source, part in zip(self.sources, self.rows, strict=True)}

    @cached_property
    def lengths(self) -> dict[str, np.ndarray]:
        """Tokens of every row, by source."""
        columns = {
            source.name: part.data.column("input_ids") for source, part in zip(self.sources, self.rows, strict=True)
        }
        return {name: pc.list_value_length(column).to_numpy() for name, column in columns.items()}

    def __len__(self) -> int:
        """Return the number of rows of all sources."""
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one row: its `source`, its columns as numbers and arrays, and its `place`: the pass and its number."""
        number, row = self._place(index)
        result: dict[str, Any] = {"source": self.sources[number], "place": (getattr(index, "repeat", 0), row)}
        for name, column in self._columns[number]:
            result[name] = column[row]
        return result

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        return number, index - self._ends[number - 1] if number else index

    def locate(self, index: int) -> tuple[str, int]:
        """Return the source of a row, and the row's number in it."""
        number, row = self._place(index)
        return self.sources[number].name, row

    def one_of_each(self) -> list[dict[str, Any]]:
        """Return the first row of each source."""
        return [self[end - len(part)] for end, part in zip(self._ends, self.rows, strict=True)]

    def split(self) -> list[MultiTaskDataset]:
        """Return one dataset per source."""
        return [
            MultiTaskDataset([source], {source.name: part})
            for source, part in zip(self.sources, self.rows, strict=True)
        ]


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


def first_rows(datasets: Any, most: int | None) -> Any:
    """Return datasets, one or by name, with no more than their first rows; streams are cut as well."""
    if most is None:
        return datasets
    if isinstance(datasets, Mapping):
        return {name: first_rows(rows, most) for name, rows in datasets.items()}
    if isinstance(datasets, Dataset):
        return datasets.select(range(min(most, len(datasets))))
    return datasets.take(most) if hasattr(datasets, "take") else datasets
