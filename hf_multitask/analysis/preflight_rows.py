"""What the rows of a recipe hold: texts as hashes, labels as counts, lengths in tokens; before anything is prepared.

Rows are read as they are, so that a bad label is counted here, not only refused. Texts are compared after white space
and case are evened out, by 64-bit hashes: of a million texts two would be confused once in a hundred million times.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, IterableDataset, LargeList, List, Value

from ..data.all_rows import make_row_encoder
from ..data.labels import LabelEncoder
from ..data.sources import Source, label_key
from ..models.heads import IGNORE_INDEX
from ..models.task import Task, TaskType

__all__ = ["LabelFacts", "SplitFacts", "first_rows", "read_lengths", "read_split"]

_NO_LIMIT = 1_000_000  # tokens: longer than any text, short enough for tokenizers


@dataclass(frozen=True, eq=False)
class LabelFacts:
    """Labels of one task in one split.

    Args:
        counts: By label, how often it occurs: rows, or words for token-level tasks; labels that are none of the
            task's own too.
        items: Rows, or labelled words.
        hashes: `[N]`, uint64, of each row's label; rows of one label have one hash.
        numbers: `[N, C]`, the values of a regression, else None.
    """

    counts: Counter[str]
    items: int
    hashes: np.ndarray
    numbers: np.ndarray | None = None

    @property
    def width(self) -> int:
        """Values of a regression's label; 0 for other tasks."""
        return 0 if self.numbers is None else self.numbers.shape[1]


@dataclass(frozen=True, eq=False)
class SplitFacts:
    """One split of what some tasks read.

    Args:
        dataset: The dataset's name.
        split: `train`, `validation` or `test`.
        tasks: The tasks that read it.
        hashes: `[N]`, uint64, of each row's text.
        empty: `[N]`, bool, whether a text is empty.
        complete: Whether these are all rows; of a stream only the first are looked at.
        labels: By task, where it has labels that are counted.
        lengths: Tokens of some rows, without truncation; None where they could not be computed.
        max_length: Tokens that are read of each row.
    """

    dataset: str
    split: str
    tasks: tuple[Task, ...]
    hashes: np.ndarray
    empty: np.ndarray
    complete: bool = True
    labels: Mapping[str, LabelFacts] = field(default_factory=dict)
    lengths: np.ndarray | None = None
    max_length: int | None = None

    @property
    def rows(self) -> int:
        """Rows that were looked at."""
        return len(self.hashes)

    @property
    def name(self) -> str:
        """The dataset and the split, for messages."""
        return f"{self.dataset} ({self.split}{'' if self.complete else f', first {self.rows} rows'})"


def first_rows(dataset: Any, count: int) -> tuple[Any, bool]:
    """Return a dataset, and whether it is whole: of a stream, the first rows as a dataset in memory."""
    if not isinstance(dataset, IterableDataset):
        return dataset, True
    rows = list(dataset.with_format(None).take(count))
    return (Dataset.from_list(rows, features=dataset.features) if rows else Dataset.from_dict({})), False


def read_split(
    rows: Dataset, source: Source, split: str, complete: bool = True, most: int = 1_000_000
) -> SplitFacts | None:
    """Return what a split holds, or None where its texts are not there: the trainer then says what is missing.

    Args:
        rows: Its rows.
        source: The tasks that read them.
        split: Its name.
        complete: Whether these are all rows that there are.
        most: Rows that are looked at, at most.
    """
    rows = rows.with_format(None)
    if len(rows) > most:
        rows, complete = rows.select(range(most)), False
    columns = rows.features
    texts = [name for name in source.text_columns if name in columns] or [c for c in ("input_ids",) if c in columns]
    texts += [name for name in source.tasks[0].choice_columns or () if name in columns]
    if not texts or not len(rows):
        return None
    readers = {task: reader for task in source.tasks if (reader := _label_reader(task, columns))}
    hashes: list[int] = []
    empty: list[bool] = []
    found: dict[str, list[Any]] = {task.name: [] for task in readers}
    wanted = rows.select_columns(list(dict.fromkeys([*texts, *(column for column, _ in readers.values())])))
    for batch in wanted.iter(batch_size=1000):
        for parts in zip(*(batch[name] for name in texts), strict=True):
            plain = [_plain_text(part) for part in parts]
            hashes.append(_hash("\x1f".join(plain)))
            empty.append(not all(plain))
        for task, (column, read) in readers.items():
            found[task.name] += [read(value) for value in batch[column]]
    labels = {task.name: _count(task, found[task.name]) for task in readers}
    keys = np.array(hashes, dtype=np.uint64)
    return SplitFacts(source.dataset, split, source.tasks, keys, np.array(empty, dtype=bool), complete, labels)


def _plain_text(value: Any) -> str:
    """Return a text without differences that no reader sees: strings, words, token ids, or messages of a chat."""
    if isinstance(value, str):
        return " ".join(value.split()).casefold()
    if isinstance(value, (list, tuple)) and all(isinstance(word, str) for word in value):
        return " ".join(" ".join(value).split()).casefold()
    return "" if not value else json.dumps(value, sort_keys=True, default=str)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _label_reader(task: Task, columns: Features) -> tuple[str, Callable[[Any], Any]] | None:
    """Return the column of a task's labels, and what reads a cell of it; None for tasks without labels to count.

    What is read is a list of names, or of numbers for a regression; None for a cell that holds no label.
    """
    candidates = [task.label_column]
    if "input_ids" in columns:
        candidates = [label_key(task.name), task.label_column, "labels", "label"]
    column = next((name for name in candidates if name and name in columns), None)
    if column is None:
        return None
    feature = columns[column]
    inner = feature.feature if isinstance(feature, (List, LargeList)) else feature
    if task.type is TaskType.REGRESSION:
        return column, _numbers
    if not task.labels or not isinstance(inner, (Value, ClassLabel)):
        return None
    labels = task.labels
    several = task.type is TaskType.MULTI_LABEL_CLASSIFICATION
    try:
        encoder = LabelEncoder(task, column, columns, encoded=column == label_key(task.name))
    except ValueError:
        return None  # the trainer refuses this column too, and says why

    def name(value: Any) -> str:
        place = encoder.ids.get(value)
        return value if isinstance(value, str) else repr(value) if place is None else labels[place]

    def read(value: Any) -> list[str] | None:
        if value is None or value == IGNORE_INDEX:
            return None
        if several:
            try:
                return [labels[i] for i, present in enumerate(encoder.encode([value], 0)[0]) if present]
            except ValueError:
                pass  # as it stands, then
        values = value if isinstance(value, (list, tuple)) else [value]
        return [name(one) for one in values if one is not None and one != IGNORE_INDEX]

    return column, read


def _numbers(value: Any) -> list[float] | None:
    values = value if isinstance(value, (list, tuple)) else [value]
    if not values or not all(isinstance(one, (int, float)) for one in values):
        return None
    return [float(one) for one in values]


def _count(task: Task, found: Sequence[list[Any] | None]) -> LabelFacts:
    # The order of words' labels matters, that of several labels of a text does not.
    several = task.type is TaskType.MULTI_LABEL_CLASSIFICATION
    hashes = np.array([_hash(json.dumps(sorted(one) if several and one else one)) for one in found], dtype=np.uint64)
    if task.type is TaskType.REGRESSION:
        width = max((len(one) for one in found if one), default=1)
        numbers = np.array([one if one and len(one) == width else [np.nan] * width for one in found], dtype=np.float64)
        return LabelFacts(Counter(), len(found), hashes, numbers.reshape(len(found), width))
    counts: Counter[str] = Counter()
    for one in found:
        counts.update(one or ())
    per_row = several or task.type is TaskType.SINGLE_LABEL_CLASSIFICATION
    items = sum(one is not None for one in found) if per_row else counts.total()
    return LabelFacts(counts, items, hashes)


def read_lengths(
    facts: SplitFacts, rows: Dataset, source: Source, tokenizer: Any, max_length: int, count: int, seed: int = 0
) -> SplitFacts:
    """Return the facts of a split with the lengths of some of its rows, as they are prepared but without truncation.

    Args:
        facts: The facts so far.
        rows: The rows.
        source: The tasks that read them.
        tokenizer: The backbone's tokenizer.
        max_length: Tokens that are read of each row, where the tasks do not say.
        count: How many rows are looked at, drawn by the seed.
        seed: Seed of the draw.
    """
    limit = source.tasks[0].max_length or max_length
    chosen = np.random.default_rng(seed).permutation(len(rows))[:count]
    some = rows.with_format(None).select(np.sort(chosen))
    whole = replace(source, tasks=tuple(replace(task, max_length=None) for task in source.tasks))
    lengths: list[int] = []
    try:
        encoder = make_row_encoder(some.features, whole, tokenizer, _NO_LIMIT, None)
        if not encoder.keeps_rows:
            return facts  # long texts are read in several windows: nothing is cut
        for start in range(0, len(some), 500):
            batch = some[start : start + 500]
            encoded = encoder(batch, list(range(start, start + len(next(iter(batch.values()))))))
            lengths += encoder.lengths(encoded)
    except ValueError:
        return facts  # the trainer refuses this row too, and says which
    return replace(facts, lengths=np.array(lengths), max_length=limit)
