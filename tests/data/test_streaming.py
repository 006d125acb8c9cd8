"""Streams: the schedule's shares, every row once per pass, parts of processes, and exact places to go on from."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from conftest import make_datasets, make_tasks, make_tokenizer
from datasets import Dataset, Features, IterableDataset, SplitDict, SplitInfo, Value, interleave_datasets

from hf_multitask import Task
from hf_multitask.data.dataset import prepare_sources
from hf_multitask.data.preprocessing import read_stream
from hf_multitask.data.schedule import MultiTaskBatchSampler
from hf_multitask.data.sources import make_sources
from hf_multitask.data.streaming import StreamSampler, prepare_streams, stream_sizes

TASK = Task("score", "regression", dataset="numbers")
SOURCES = make_sources([TASK])


def numbers(count: int, shards: int = 1) -> IterableDataset:
    """A stream whose labels number its rows."""
    rows = {"text": ["good film"] * count, "label": [float(i) for i in range(count)]}
    return Dataset.from_dict(rows).to_iterable_dataset(num_shards=shards)


def generated(count: int) -> IterableDataset:
    def rows():
        for i in range(count):
            yield {"text": "good film", "label": float(i)}

    return IterableDataset.from_generator(rows, features=Features({"text": Value("string"), "label": Value("float64")}))


KINDS = {
    "plain": lambda count: numbers(count),
    "shards": lambda count: numbers(count, 4),
    "generator": generated,
    "mapped": lambda count: numbers(count).map(lambda row: {"text": row["text"] + " a"}),
    "batched map": lambda count: numbers(count).map(lambda rows: {"text": rows["text"]}, batched=True, batch_size=7),
    "filtered": lambda count: numbers(2 * count).filter(lambda row: row["label"] < count),
    "shuffled": lambda count: numbers(count, 2).shuffle(seed=3, buffer_size=5),
    "interleaved": lambda count: interleave_datasets(
        [numbers(count // 2), numbers(count).skip(count // 2)],
        seed=1,
        stopping_strategy="all_exhausted_without_replacement",
    ),
    "in memory": lambda count: Dataset.from_dict(
        {"text": ["good film"] * count, "label": [float(i) for i in range(count)]}
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def mixture(dataset, **options):
    return prepare_streams({"numbers": dataset}, SOURCES, {"numbers": 20}, make_tokenizer(), 16, **options)


def read(streams, batches: int, rows: int = 3) -> list[float]:
    return [row["labels_score"][0] for _ in range(batches) for row in streams.__getitems__([0] * rows)]


@every_kind
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_pass_holds_every_row_once_over_all_processes(kind, processes):
    count = 24
    seen: Counter = Counter()
    for rank in range(processes):
        streams = mixture(KINDS[kind](count), num_processes=processes, process_index=rank)
        stream = streams.streams[0]
        while stream.number == 0:
            row = stream.take(1)[0]
            if row["place"][0] == 0:
                seen[row["labels_score"][0]] += 1
    assert seen == Counter(float(i) for i in range(count))


@every_kind
@pytest.mark.parametrize("stopped", [0, 1, 5, 8, 9, 20])
def test_goes_on_where_it_was_stopped(kind, stopped):
    whole = mixture(KINDS[kind](24))
    expected = read(whole, 30)
    first = mixture(KINDS[kind](24))
    begun = read(first, stopped)
    state = json.loads(json.dumps(first.state_dict(stopped)))
    read(first, 2)  # what was read ahead does not count
    again = mixture(KINDS[kind](24))
    again.restart(state)
    assert begun + read(again, 30 - stopped) == expected


@every_kind
def test_begins_anew(kind):
    streams = mixture(KINDS[kind](24))
    first = read(streams, 7)
    streams.restart()
    assert read(streams, 7) == first


def test_the_state_is_kept_of_batches_that_were_read_ahead():
    streams = mixture(numbers(24))
    streams.remember(3)
    read(streams, 9)
    assert streams.state_dict(7)["streams"]["numbers"]["row"] == 21
    with pytest.raises(RuntimeError, match="after batch 5"):
        streams.state_dict(5)


def test_passes_of_a_shuffled_stream_differ_in_order():
    rows = read(mixture(KINDS["shuffled"](24)), 16)
    assert sorted(rows[:24]) == sorted(rows[24:]) and rows[:24] != rows[24:]


def test_rows_are_prepared_as_datasets_in_memory_are():
    tasks = make_tasks()
    sources, datasets = make_sources(tasks), make_datasets()
    tables = prepare_sources(
        datasets, sources, "train_dataset", split="train", tokenizer=make_tokenizer(), max_length=64
    )
    streams = prepare_streams(
        {name: part.to_iterable_dataset() for name, part in datasets.items()},
        sources,
        {name: len(part) for name, part in datasets.items()},
        make_tokenizer(),
        64,
    )
    for number, part in enumerate(tables.split()):
        for i, row in enumerate(streams.__getitems__([number] * len(part))):
            expected = part[i]
            assert row.pop("source") == expected.pop("source")
            assert row.pop("place") == expected.pop("place") == (0, i)
            assert set(row) == set(expected)
            for key, value in expected.items():
                assert row[key] == pytest.approx(value.tolist() if hasattr(value, "tolist") else value), key


def test_the_order_of_sources_is_that_of_datasets_in_memory():
    sizes = {"a": 50, "b": 20, "c": 7}
    options = dict(rows_per_batch=8, accumulation=2)
    ends = [50, 70, 77]
    tables = MultiTaskBatchSampler(sizes, lambda epoch: [0.6, 0.3, 0.1], **options)
    streams = StreamSampler(sizes, lambda epoch: [0.6, 0.3, 0.1], **options)
    for sampler in (tables, streams):
        sampler.set_epoch(1)
    as_numbers = [[next(i for i, end in enumerate(ends) if row < end) for row in batch] for batch in tables]
    assert list(streams) == as_numbers


def test_lengths():
    info = numbers(5)
    info._split, info._info.splits = "train", SplitDict({"train": SplitInfo("train", num_examples=123)})
    datasets = {"memory": KINDS["in memory"](9), "info": info, "given": numbers(7)}
    assert stream_sizes(datasets, {"given": 70}, "train_dataset") == {"memory": 9, "info": 123, "given": 70}
    assert stream_sizes(datasets, {}, "train_dataset", assumed=40)["given"] == 40
    with pytest.raises(ValueError, match=r"'given' is a stream that does not know its length.*dataset_sizes"):
        stream_sizes(datasets, {}, "train_dataset")
    with pytest.raises(ValueError, match="has no dataset 'gven'"):
        stream_sizes(datasets, {"gven": 3}, "train_dataset")


def test_another_shuffle_is_no_way_to_go_on():
    streams = mixture(numbers(24, 2).shuffle(seed=3, buffer_size=5))
    read(streams, 2)
    with pytest.raises(ValueError, match=r"shuffled in another order.*same seed"):
        mixture(numbers(24, 2).shuffle(seed=4, buffer_size=5)).restart(streams.state_dict(2))


def test_other_streams_are_no_way_to_go_on():
    state = mixture(numbers(24)).state_dict(0)
    state["streams"]["others"] = state["streams"].pop("numbers")
    with pytest.raises(ValueError, match="streams"):
        mixture(numbers(24)).restart(state)


def test_bad_rows_and_streams():
    with pytest.raises(ValueError, match="has no rows"):
        mixture(generated(0))
    with pytest.raises(ValueError, match="no column 'label'"):
        mixture(numbers(5).remove_columns("label"))
    with pytest.raises(TypeError, match="must be a Dataset or an IterableDataset, got list"):
        mixture([1, 2])
    with pytest.raises(ValueError, match="row 3"):
        mixture(numbers(5).map(lambda row: {"label": float("nan") if row["label"] == 3 else row["label"]}))
    late = mixture(numbers(50).map(lambda row: {"label": float("nan") if row["label"] == 40 else row["label"]}))
    read(late, 13)
    with pytest.raises(ValueError, match=r"dataset 'numbers' \(train\), pass 0.*row 40"):
        read(late, 1)
    with pytest.raises(ValueError, match="no row for process 2 of 3"):
        read(mixture(numbers(2), num_processes=3, process_index=2), 1)


def test_a_stream_is_read_whole_for_evaluation():
    assert read_stream(numbers(2345)).to_dict() == Dataset.from_list(list(numbers(2345))).to_dict()
    assert len(read_stream(generated(0))) == 0
