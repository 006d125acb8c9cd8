"""A batch holds each row once, grouped, padded with the tokenizer's ids, and labels for their own rows only."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import PAD_ID, make_tasks, make_tokenizer
from datasets import Dataset

from hf_multitask import DataCollatorForMultiTask, Task
from hf_multitask.data.dataset import prepare_sources
from hf_multitask.data.sources import make_sources

PAIR = Task("pair", "single_label_classification", labels=("no", "yes"), text_columns=("text", "other"))


@pytest.fixture(scope="module")
def rows(datasets):
    """Rows of all types of tasks; row numbers go through `reviews` (40 rows), `traits` (20) and `names` (11)."""
    return prepare_sources(
        datasets, make_sources(make_tasks()), "train_dataset", tokenizer=make_tokenizer(), max_length=32
    )


@pytest.fixture
def collate(tokenizer, tasks):
    return DataCollatorForMultiTask(tokenizer, tasks)


def plain(row: dict) -> dict:
    return {key: value if key == "source" else np.asarray(value).tolist() for key, value in row.items()}


def chosen(rows, seed: int) -> list[dict]:
    """Return some rows in random order, some of them from every source."""
    draw = np.random.default_rng(seed)
    numbers = [*draw.integers(0, 40, 5), *draw.integers(40, 60, 4), *draw.integers(60, 71, 3)]
    return [plain(rows[i]) for i in draw.permutation(numbers).tolist()]


def true_rows(batch) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


@pytest.mark.parametrize("seed", range(5))
def test_every_row_comes_once_in_its_sources_slice_in_its_order(rows, collate, tasks, seed):
    given = chosen(rows, seed)
    batch = collate(given)
    found = true_rows(batch)
    assert len(found) == len(given)
    covered = []
    for task in tasks:
        own = [row["input_ids"] for row in given if task in row["source"].tasks]
        segment = batch["segments"][task.name]
        assert found[segment.start : segment.stop] == own
        assert segment.length == max(map(len, own))
        covered += list(range(segment.start, segment.stop)) * (task.name != "strength")
    assert sorted(covered) == list(range(len(given)))
    assert batch["segments"]["tone"] == batch["segments"]["strength"]


@pytest.mark.parametrize("seed", range(5))
def test_the_source_with_the_longest_row_comes_first(rows, collate, seed):
    batch = collate(chosen(rows, seed))
    lengths = [segment.length for segment in sorted(batch["segments"].values(), key=lambda segment: segment.start)]
    assert lengths == sorted(lengths, reverse=True)
    assert batch["input_ids"].shape[1] == lengths[0]


def test_sources_of_equal_length_keep_the_order_of_the_tasks(rows, collate):
    by_name = {source.name: part for source, part in zip(rows.sources, rows.rows, strict=True)}
    same = [
        {"source": source, **by_name[source.name][0], "input_ids": [1, 5, 2], **labels}
        for source, labels in zip(reversed(rows.sources), [{"labels_names": [-100, 0, -100]}, {}, {}], strict=True)
    ]
    batch = collate(same)
    assert [batch["segments"][name].start for name in ("tone", "strength", "traits", "names")] == [0, 0, 1, 2]
    assert batch["task_ids"].tolist() == [0, 2, 3]


def test_rows_may_hold_lists_or_arrays(rows, collate):
    given = [rows[i] for i in (3, 62, 45)]
    one, other = collate(given), collate([plain(row) for row in given])
    assert torch.equal(one["input_ids"], other["input_ids"])
    assert all(torch.equal(one["labels"][name], labels) for name, labels in other["labels"].items())


@pytest.mark.parametrize("seed", range(3))
def test_padding_is_on_the_right_with_the_tokenizers_id(rows, collate, seed):
    batch = collate(chosen(rows, seed))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ids.dtype == mask.dtype == torch.int64 and ids.shape == mask.shape
    assert (ids[mask == 0] == PAD_ID).all() and (mask == 0).any()
    assert (mask.diff(dim=1) <= 0).all()
    assert "token_type_ids" not in batch


@pytest.mark.parametrize("seed", range(3))
def test_labels_are_those_of_the_tasks_own_rows(rows, collate, tasks, seed):
    given = chosen(rows, seed)
    batch = collate(given)
    own = {task.name: [r[f"labels_{task.name}"] for r in given if task in r["source"].tasks] for task in tasks}
    assert batch["labels"].keys() == own.keys()
    for name, dtype in (("tone", torch.int64), ("strength", torch.float32), ("traits", torch.float32)):
        assert batch["labels"][name].dtype == dtype
        assert batch["labels"][name].tolist() == own[name]
        assert batch["num_items"][name] == len(own[name])
    assert batch["labels"]["strength"].shape == (5, 1) and batch["labels"]["traits"].shape == (4, 3)
    names = batch["labels"]["names"]
    assert names.dtype == torch.int64 and names.shape == (3, batch["segments"]["names"].length)
    assert names.tolist() == [row + [-100] * (names.shape[1] - len(row)) for row in own["names"]]
    assert batch["num_items"]["names"] == sum(label != -100 for row in own["names"] for label in row) > 3


def test_numbers_of_a_batch_are_plain(rows, collate):
    batch = collate(chosen(rows, 0))
    for segment in batch["segments"].values():
        assert [type(value) for value in (segment.start, segment.stop, segment.length)] == [int, int, int]
    assert {type(value) for value in batch["num_items"].values()} == {int}


def test_task_ids_name_the_first_task_of_each_rows_source(rows, collate, tasks):
    batch = collate(chosen(rows, 1))
    expected = torch.empty(12, dtype=torch.int64)
    for index, name in ((3, "names"), (2, "traits"), (0, "tone")):
        segment = batch["segments"][name]
        expected[segment.start : segment.stop] = index
    assert torch.equal(batch["task_ids"], expected)


def test_a_task_without_rows_is_absent(rows, collate):
    batch = collate([rows[0], rows[65]])
    for key in ("segments", "labels", "num_items"):
        assert batch[key].keys() == {"tone", "strength", "names"}


def test_rows_without_labels_give_a_batch_without_labels(rows, collate):
    batch = collate([{k: v for k, v in row.items() if not k.startswith("labels_")} for row in (rows[0], rows[65])])
    assert batch.keys() == {"input_ids", "attention_mask", "task_ids", "segments"}


@pytest.mark.parametrize(("multiple", "width"), [(None, 13), (1, 13), (8, 16), (13, 13), (64, 64)])
def test_the_width_is_rounded_up_but_not_the_true_lengths(rows, tokenizer, tasks, multiple, width):
    row = {**rows[0], "input_ids": list(range(4, 17))}
    shorter = {**rows[65], "input_ids": [1, 5, 2], "labels_names": [-100, 1, -100]}
    batch = DataCollatorForMultiTask(tokenizer, tasks, pad_to_multiple_of=multiple)([row, shorter])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, width)
    assert batch["attention_mask"].sum(1).tolist() == [13, 3]
    assert batch["segments"]["tone"].length == 13 and batch["segments"]["names"].length == 3
    assert batch["labels"]["names"].shape == (1, 3)


def test_token_types_of_single_texts_beside_pairs_are_0(rows, datasets, tokenizer, tasks):
    pairs = Dataset.from_list([{"text": "good film", "other": "bad", "label": "yes"}])
    both = prepare_sources(
        {"pair": pairs, "names": datasets["names"]},
        make_sources([tasks[3], PAIR]),
        "train_dataset",
        tokenizer=tokenizer,
        max_length=32,
    )
    short = {**both[0], "input_ids": [1, 5, 2], "labels_names": [-100, 1, -100]}
    tokenizer_pad = make_tokenizer()
    tokenizer_pad._pad_token_type_id = 1  # as for XLNet, where padding has a type of its own
    for given, padding in ((tokenizer, 0), (tokenizer_pad, 1)):
        batch = DataCollatorForMultiTask(given, [tasks[3], PAIR])([short, both[len(both) - 1]])
        assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, *[padding] * 3]]


def test_rows_are_not_changed(rows, collate):
    given = chosen(rows, 0)
    before = copy.deepcopy(given)
    collate(given)
    assert given == before


def test_a_tokenizer_without_pad_token_is_refused(tasks):
    padless = make_tokenizer()
    padless.pad_token = None
    with pytest.raises(ValueError, match="has no pad token; set tokenizer.pad_token"):
        DataCollatorForMultiTask(padless, tasks)
