"""Many streams (`datasets.IterableDataset`) behind the same schedule as datasets in memory.

The schedule says which source the next row comes from; a stream says which row that is: its next one. Each process
reads a part of its own of every stream (`split_dataset_by_node`), pass after pass, whatever the others do. What a
stream has yielded is saved with every checkpoint, by the dataset's own `state_dict`. Streams with a shuffle buffer
cannot save what is in the buffer; they are read again from the beginning of the pass, without preparing the rows, up
to where they were. Either way no row is read twice in a pass, and none is left out.
"""

from __future__ import annotations

import copy
import hashlib
import json
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset
from datasets.distributed import split_dataset_by_node
from transformers import PreTrainedTokenizerBase

from .all_rows import make_row_encoder
from .row_encoding import RowEncoder
from .schedule import MultiTaskBatchSampler
from .sources import Source

__all__ = ["Stream", "StreamSampler", "StreamingMixture", "is_stream", "prepare_streams", "stream_sizes"]

_FIRST_ROWS = 32  # looked at before training starts
_FEW_ROWS = 500  # of fewer rows than this no share can be told


def is_stream(datasets: Mapping[str, Any]) -> bool:
    """Return whether some of the datasets are streams."""
    return any(isinstance(dataset, IterableDataset) for dataset in datasets.values())


def stream_sizes(
    datasets: Mapping[str, Any], given: Mapping[str, int], argument: str, assumed: int | None = None
) -> dict[str, int]:
    """Return the rows of every dataset: as given, as it knows itself, or as its info says.

    Args:
        datasets: Datasets by name.
        given: Rows by name, for those that do not know.
        argument: Name of the argument that the datasets came by, for messages.
        assumed: Taken for streams nobody knows the length of; None if that matters.

    Raises:
        ValueError: A length is unknown and matters, or was given for no dataset.
    """
    sizes: dict[str, int] = {}
    for name in given:
        if name not in datasets:
            raise ValueError(f"dataset_sizes: {argument} has no dataset {name!r}; it has {', '.join(datasets)}")
    for name, dataset in datasets.items():
        size = given.get(name)
        if size is None and isinstance(dataset, Dataset):
            size = len(dataset)
        if size is None and dataset.info.splits and dataset.split in dataset.info.splits:
            size = dataset.info.splits[dataset.split].num_examples
        size = size or assumed
        if not size:
            raise ValueError(
                f"dataset {name!r} is a stream that does not know its length: give it in "
                f"dataset_sizes={{{name!r}: rows}}, or set max_steps with a task_sampling that needs no sizes "
                "(uniform, round_robin, weighted)"
            )
        sizes[name] = size
    return sizes


def _chain(examples: Any) -> Iterator[Any]:
    """Yield the steps that a stream's rows go through, from the last to the first."""
    yield examples
    inner = getattr(examples, "ex_iterable", None)
    for part in [inner] if inner is not None else getattr(examples, "ex_iterables", ()):
        yield from _chain(part)


class Stream:
    """The rows of one source that one process reads, in order, pass after pass.

    Args:
        source: The source.
        dataset: The whole stream; it is not changed. Sets in memory are shuffled as a whole in every pass.
        encoder: What prepares the rows.
        where: Dataset and split, for messages.
        num_processes: Number of processes.
        process_index: Rank of this process.
        first_rows: The hash of its first rows, prepared.
    """

    def __init__(
        self,
        source: Source,
        dataset: IterableDataset,
        encoder: RowEncoder,
        where: str,
        num_processes: int = 1,
        process_index: int = 0,
        first_rows: str = "",
    ) -> None:
        self.source = source
        self.encoder = encoder
        self.where = where
        self._whole = dataset.with_format(None)
        self._rank = process_index, num_processes
        steps = list(_chain(dataset._ex_iterable))
        # The content of a buffer is in no state.
        self._has_buffer = any("BufferShuffled" in type(step).__name__ for step in steps)
        generators = [step.generator for step in steps if hasattr(step, "generator")]
        self._seen = self._cut = 0
        self.first_rows = first_rows
        self.shuffle_key = zlib.crc32(repr([generator.bit_generator.state for generator in generators]).encode())
        self.restart()

    def restart(self, state: Mapping[str, Any] | None = None) -> None:
        """Go to the first row, or to where a state was saved.

        Raises:
            ValueError: The stream was shuffled with another seed when the state was saved.
        """
        state = state or {"pass": 0, "row": 0, "dataset": None, "shuffle": self.shuffle_key}
        if state["shuffle"] != self.shuffle_key:
            raise ValueError(
                f"{self.where} was shuffled in another order when the checkpoint was written: "
                "give shuffle(seed=...) the same seed in every run"
            )
        self._begin(state["pass"])
        if state["dataset"] is not None:
            self._part.load_state_dict(copy.deepcopy(state["dataset"]))
            self.row = state["row"]
        else:
            for _ in range(state["row"]):
                next(self._rows, None)
                self.row += 1

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream is, as plain JSON types."""
        in_dataset = None if self._has_buffer or self.row == 0 else _plain(self._part.state_dict())
        return {"pass": self.number, "row": self.row, "dataset": in_dataset, "shuffle": self.shuffle_key}

    def _begin(self, number: int) -> None:
        """Begin a pass over this process's part."""
        rank, processes = self._rank
        self._part = split_dataset_by_node(self._whole, rank=rank, world_size=processes)
        self._part.set_epoch(number)
        self._rows = iter(self._part)
        self.number, self.row = number, 0

    def take(self, count: int) -> list[dict[str, Any]]:
        """Return the next rows, prepared, each with its `source`, and its `place`: pass and row of this process.

        Raises:
            ValueError: A row cannot be prepared, or a whole pass has no row for this process.
        """
        result: list[dict[str, Any]] = []
        while len(result) < count:
            first, raw = self.row, []
            for row in self._rows:
                raw.append(row)
                if len(result) + len(raw) == count:
                    break
            self.row += len(raw)
            result += self._encode(raw, first)
            if len(result) < count:
                if self.row == 0:
                    rank, processes = self._rank
                    raise ValueError(f"{self.where} has no row for process {rank} of {processes}")
                self._begin(self.number + 1)
        return result

    def _encode(self, raw: list[dict[str, Any]], first: int) -> list[dict[str, Any]]:
        if not raw:
            return []
        columns = {name: [row.get(name) for row in raw] for name in raw[0]}
        try:
            encoded = self.encoder(columns, list(range(first, first + len(raw))))
            self._seen, self._cut = self._seen + len(raw), self._cut + self.encoder.cut_targets(encoded)
            self.encoder.check_cut(self._cut, self._seen, _FEW_ROWS)
        except ValueError as error:
            raise ValueError(f"{self.where}, pass {self.number}: {error}") from None
        names = list(encoded)
        return [
            {"source": self.source, "place": (self.number, first + i), **{name: encoded[name][i] for name in names}}
            for i in range(len(raw))
        ]


def _plain(state: Any) -> Any:
    """Return a copy of a state in plain JSON types."""
    if isinstance(state, Mapping):
        return {key: _plain(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [_plain(value) for value in state]
    if isinstance(state, (np.integer, np.bool_)):
        return state.item()
    return state


def _to_list(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else repr(value)


class StreamSampler(MultiTaskBatchSampler):
    """The schedule for streams: batches of the numbers of sources. Which row comes is the stream's to say."""

    def _row(self, name: str, number: int) -> int:
        return self._places[name]

    def __init__(self, sizes: Mapping[str, int], *args: Any, **kwargs: Any) -> None:
        super().__init__(sizes, *args, **kwargs)
        self._places = {name: index for index, name in enumerate(self.sizes)}


class StreamingMixture(torch.utils.data.Dataset):
    """The streams of all sources, for one process; [`StreamSampler`] says which comes next.

    Batches must be taken in order and by one reader: the loader has no workers.

    Args:
        streams: The streams, in order.
        sizes: Rows by source, of the whole streams.
        remembered: Of how many batches back the state is kept: the loader reads ahead of the training.
    """

    def __init__(self, streams: Sequence[Stream], sizes: Mapping[str, int], remembered: int = 4) -> None:
        self.streams = list(streams)
        self.sources = [stream.source for stream in self.streams]
        self.sizes = dict(sizes)
        self._remembered = remembered
        self.restart()

    def first_row_hashes(self) -> dict[str, str]:
        """Return, by source, the SHA-256 of its first rows; of the others nothing is known before they are read."""
        return {stream.source.name: stream.first_rows for stream in self.streams}

    def __len__(self) -> int:
        """Return the rows of all sources, as far as they are known."""
        return sum(self.sizes.values())

    def restart(self, state: Mapping[str, Any] | None = None) -> None:
        """Go to the beginning, or to where a state was saved.

        Raises:
            ValueError: The state is of other streams.
        """
        if state is not None and list(state["streams"]) != list(self.sizes):
            raise ValueError(f"the checkpoint has the streams {list(state['streams'])}, not {list(self.sizes)}")
        for stream in self.streams:
            stream.restart(None if state is None else state["streams"][stream.source.name])
        self._batches = 0 if state is None else state["batches"]
        self._states = {stream.source.name: stream.state_dict() for stream in self.streams}
        self._history: deque[tuple[int, dict[str, Any], list[Any]]] = deque(maxlen=self._remembered)
        self._history.append((self._batches, dict(self._states), []))

    def one_of_each(self) -> list[dict[str, Any]]:
        """Return the first row of each source, and go to the beginning again."""
        rows = [stream.take(1)[0] for stream in self.streams]
        self.restart()
        return rows

    def remember(self, batches: int) -> None:
        """Keep the states of this many batches from now on, if it is more than so far."""
        self._remembered = max(batches, self._remembered)
        self._history = deque(self._history, maxlen=self._remembered)

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Return the rows of the next batch: for each source number, the next row of that source."""
        counts: dict[int, int] = {}
        for number in numbers:
            counts[number] = counts.get(number, 0) + 1
        rows = {number: iter(self.streams[number].take(count)) for number, count in counts.items()}
        batch = [next(rows[number]) for number in numbers]
        for number in counts:
            stream = self.streams[number]
            self._states[stream.source.name] = stream.state_dict()
        self._batches += 1
        places = [(row["source"].name, row["place"]) for row in batch]
        self._history.append((self._batches, dict(self._states), places))
        return batch

    def _recall(self, batches: int) -> tuple[dict[str, Any], list[Any]]:
        for number, states, places in self._history:
            if number == batches:
                return states, places
        raise RuntimeError(f"the state after batch {batches} is not among those kept: {[n for n, *_ in self._history]}")

    def state_dict(self, batches: int) -> dict[str, Any]:
        """Return the state after a number of batches, as plain JSON types."""
        return {"batches": batches, "streams": self._recall(batches)[0]}

    def places(self, batches: int, source: str) -> list[str]:
        """Return where the rows of a source in the `batches`-th batch came from, in the order of the batch."""
        return [f"{row} (pass {number})" for name, (number, row) in self._recall(batches)[1] if name == source]


def prepare_streams(
    datasets: Mapping[str, Any],
    sources: Sequence[Source],
    sizes: Mapping[str, int],
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    *,
    split: str = "train",
    seed: int = 0,
    num_processes: int = 1,
    process_index: int = 0,
) -> StreamingMixture:
    """Make streams of all sources, and look at the first rows of each.

    Args:
        datasets: By name; those in memory become streams that are shuffled as a whole.
        sources: The sources of the model's tasks.
        sizes: Rows by dataset.
        tokenizer: The backbone's tokenizer.
        max_length: Longest input in tokens, where the tasks set none.
        split: Name of the split, for messages.
        seed: Seed of the shuffling of datasets in memory.
        num_processes: Number of processes.
        process_index: Rank of this process.

    Raises:
        TypeError: It is no dataset.
        ValueError: A stream is empty, a column is missing, or one of its first rows is bad.
    """
    streams = []
    for source in sources:
        dataset, where = datasets[source.dataset], f"dataset {source.dataset!r} ({split})"
        if isinstance(dataset, Dataset):
            dataset = dataset.with_format(None).to_iterable_dataset().shuffle(seed=seed, buffer_size=len(dataset))
        if not isinstance(dataset, IterableDataset):
            raise TypeError(f"{where} must be a Dataset or an IterableDataset, got {type(dataset).__name__}")
        first = list(dataset.with_format(None).take(_FIRST_ROWS))
        if not first:
            raise ValueError(f"{where} has no rows")
        features: Features = dataset.features or Dataset.from_list(first).features
        try:
            encoder = make_row_encoder(features, source, tokenizer, max_length, True, seed)
            if not encoder.keeps_rows:
                raise ValueError(
                    f"task {source.tasks[0].name!r}: {source.tasks[0].type} does not go with streamed datasets: a long "
                    "text gives several rows; load all training data as datasets that are no streams (streaming=False)"
                )
            found = encoder({name: [row.get(name) for row in first] for name in first[0]}, list(range(len(first))))
            encoder.check_cut(encoder.cut_targets(found), len(first), 100)  # one by itself says nothing
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        hashed = hashlib.sha256(json.dumps(_plain(found), sort_keys=True, default=_to_list).encode()).hexdigest()
        streams.append(Stream(source, dataset, encoder, where, num_processes, process_index, hashed))
    return StreamingMixture(streams, {source.name: sizes[source.dataset] for source in sources})
