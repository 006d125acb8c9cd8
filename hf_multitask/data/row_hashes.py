"""Which rows are these? Hashes of what a task reads, so that results of different rows are never set side by side."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from ..models.task import Task
from .dataset import first_rows

__all__ = ["columns_of_task", "hash_evaluated_rows", "rows_hash"]


def rows_hash(dataset: Any, columns: list[str]) -> str:
    """Return the SHA-256, in hexadecimal, of some columns of a dataset: the values, row by row."""
    digest = hashlib.sha256(json.dumps(columns).encode())
    for rows in dataset.with_format(None).select_columns(columns).iter(batch_size=1000):
        digest.update(json.dumps([rows[column] for column in columns], default=str).encode())
    return digest.hexdigest()


def columns_of_task(task: Task, dataset: Any) -> list[str]:
    """Return the columns of a dataset that a task reads."""
    read = (*task.text_columns, *(task.choice_columns or ()), task.label_column)
    return [column for column in read if column in dataset.column_names]


def hash_evaluated_rows(
    task: Task, datasets: Mapping[str, Mapping[str, Any]], most_rows: int | None = None
) -> dict[str, str]:
    """Return, for the validation and the test split, the hash of the rows that a task is judged on.

    Args:
        task: The task.
        datasets: By split, datasets by name; splits without the task's dataset, and streams, have no hash.
        most_rows: Only so many rows, the first ones, are judged.
    """
    hashes = {}
    for split in ("validation", "test"):
        dataset = datasets.get(split, {}).get(task.dataset)
        if isinstance(dataset, Dataset):
            judged = first_rows(dataset, most_rows)
            hashes[split] = rows_hash(judged, columns_of_task(task, judged))
    return hashes
