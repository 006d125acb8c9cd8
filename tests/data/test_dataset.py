"""Many datasets behind one index: which tasks share rows, which row a number means, and whose dataset is whose."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
from conftest import make_tokenizer
from datasets import Dataset, DatasetDict, concatenate_datasets

from hf_multitask import Task
from hf_multitask.data.dataset import MultiTaskDataset, as_mapping, prepare_sources
from hf_multitask.data.sources import Source, label_key, make_sources

A = Task("a", "regression", dataset="shared", label_column="score")
B = Task("b", "single_label_classification", labels=("no", "yes"), dataset="shared")
OTHER_COLUMN = replace(B, name="c", text_columns=("title",))
OTHER_LENGTH = replace(B, name="d", max_length=9)
ALONE = Task("alone", "regression")


def grouping(sources: list[Source]) -> list[tuple[str, str, list[str]]]:
    return [(source.name, source.dataset, [task.name for task in source.tasks]) for source in sources]


def test_tasks_on_the_same_columns_of_a_dataset_are_one_source():
    assert grouping(make_sources([A, ALONE, B])) == [("shared", "shared", ["a", "b"]), ("alone", "alone", ["alone"])]
    assert make_sources([A, B])[0].text_columns == ("text",)


@pytest.mark.parametrize("other", [OTHER_COLUMN, OTHER_LENGTH])
def test_a_dataset_read_in_two_ways_is_two_sources_with_names_of_their_own(other):
    assert grouping(make_sources([A, other, B])) == [
        ("shared:a", "shared", ["a", "b"]),
        (f"shared:{other.name}", "shared", [other.name]),
    ]


def test_the_order_of_a_pair_matters():
    one, other = (replace(B, name=name, text_columns=columns) for name, columns in (("x", "ab"), ("y", "ba")))
    assert len(make_sources([replace(one, text_columns=("a", "b")), replace(other, text_columns=("b", "a"))])) == 2


def test_a_scheme_that_conditions_on_the_task_gets_a_source_per_task():
    assert grouping(make_sources([A, B, ALONE], shares_rows=False)) == [
        ("shared:a", "shared", ["a"]),
        ("shared:b", "shared", ["b"]),
        ("alone", "alone", ["alone"]),
    ]


@pytest.fixture(scope="module")
def texts():
    shared = [{"text": "good " * (i + 1), "title": "bad film", "label": i % 2, "score": i} for i in range(5)]
    return {
        "shared": Dataset.from_list(shared),
        "alone": Dataset.from_list([{"text": "sad " * (i + 1), "label": -i} for i in range(3)]),
    }


def prepare(texts, *tasks, **options) -> MultiTaskDataset:
    return prepare_sources(texts, make_sources(tasks), "train_dataset", tokenizer=make_tokenizer(), max_length=32)


def plain(row: dict) -> dict:
    return {key: value if key == "source" else np.asarray(value).tolist() for key, value in row.items()}


def test_rows_are_numbered_through_the_sources(texts):
    rows = prepare(texts, A, ALONE, OTHER_COLUMN)
    assert rows.sizes == {"shared:a": 5, "alone": 3, "shared:c": 5} and len(rows) == 13
    found = [plain(rows[i]) for i in range(13)]
    assert [row["source"].name for row in found] == ["shared:a"] * 5 + ["alone"] * 3 + ["shared:c"] * 5
    assert [row["labels_a"] for row in found[:5]] == [[float(i)] for i in range(5)]
    assert [row["labels_alone"] for row in found[5:8]] == [[0.0], [-1.0], [-2.0]]
    assert [row["labels_c"] for row in found[8:]] == [0, 1, 0, 1, 0]
    assert [len(row["input_ids"]) - 2 for row in found] == [1, 2, 3, 4, 5, 1, 2, 3, 2, 2, 2, 2, 2]
    assert found[0].keys() == {"source", "place", "input_ids", "labels_a"}
    assert [tuple(row["place"]) for row in found] == [(0, i) for n in (5, 3, 5) for i in range(n)]
    places = [rows.locate(i) for i in range(13)]
    assert places == [
        *(("shared:a", i) for i in range(5)),
        *(("alone", i) for i in range(3)),
        *(("shared:c", i) for i in range(5)),
    ]


def test_shared_rows_are_held_once_with_the_labels_of_both_tasks(texts):
    rows = prepare(texts, A, B, ALONE)
    assert rows.sizes == {"shared": 5, "alone": 3}
    row = plain(rows[3])
    assert row["labels_a"] == [3.0] and row["labels_b"] == 1
    assert row["source"].tasks == (A, B)


def test_rows_are_the_prepared_ones_however_they_lie_in_memory():
    whole = Dataset.from_list([{"text": "good " * (i + 1), "label": i} for i in range(9)])
    pieces = concatenate_datasets([whole.select(range(4)), whole.select(range(4, 5)), whole.select(range(5, 9))])
    tokenizer = make_tokenizer()
    source = Source("alone", "alone", (ALONE,))
    for given, order in (
        (pieces, range(9)),
        (whole.select(range(3, 7)), range(3, 7)),
        (pieces.select([5, 0, 8]), [5, 0, 8]),
    ):
        rows = prepare_sources(given, [source], "train_dataset", tokenizer=tokenizer, max_length=32)
        selected = MultiTaskDataset([source], {"alone": rows.rows[0].select(list(range(len(rows)))[::-1])})
        assert [plain(rows[i])["labels_alone"] for i in range(len(rows))] == [[float(i)] for i in order]
        assert [len(rows[i]["input_ids"]) - 3 for i in range(len(rows))] == list(order)
        there, back = ([plain(part[i]) for i in range(len(rows))] for part in (rows, selected))
        for row in there + back:
            del row["place"]
        assert back == there[::-1]


def test_rows_are_found_in_every_piece_of_a_source(texts):
    (shared, alone) = prepare(texts, A, ALONE).rows
    pieces = concatenate_datasets([alone, alone.select(range(1)), alone])
    rows = MultiTaskDataset(make_sources([A, ALONE]), {"shared": shared, "alone": pieces})
    assert rows.sizes == {"shared": 5, "alone": 7}
    assert [plain(rows[5 + i])["labels_alone"] for i in range(7)] == [
        [0.0],
        [-1.0],
        [-2.0],
        [0.0],
        [0.0],
        [-1.0],
        [-2.0],
    ]
    assert [len(rows[5 + i]["input_ids"]) for i in range(7)] == [3, 4, 5, 3, 3, 4, 5]


def test_rows_in_another_process_are_the_same(texts):
    rows = prepare(texts, A, B, ALONE)
    there = pickle.loads(pickle.dumps(rows))
    assert there.sizes == rows.sizes
    assert [plain(there[i]) for i in range(8)] == [plain(rows[i]) for i in range(8)]


def test_each_source_can_stand_alone(texts):
    rows = prepare(texts, A, B, ALONE)
    shared, alone = rows.split()
    assert (shared.sizes, alone.sizes) == ({"shared": 5}, {"alone": 3})
    assert [plain(alone[i]) for i in range(3)] == [plain(rows[i]) for i in range(5, 8)]


@pytest.mark.parametrize("index", [8, 100, -1])
def test_a_row_that_is_not_there_is_an_error(texts, index):
    rows = prepare(texts, A, ALONE)
    for read in (rows.__getitem__, rows.locate):
        with pytest.raises(IndexError):
            read(index)


def test_label_columns_are_named_by_the_task():
    assert label_key("a") == "labels_a"


# ---- whose dataset is whose ----


def test_datasets_come_as_any_mapping_in_any_order(texts):
    backwards = dict(reversed(texts.items()))
    for given in (texts, backwards, DatasetDict(texts)):
        assert as_mapping(given, make_sources([A, ALONE]), "train_dataset", complete=True) == dict(texts)
    assert prepare(backwards, A, ALONE).sizes == {"shared": 5, "alone": 3}


def test_the_only_dataset_needs_no_name(texts):
    for tasks in ([A, B], [A, OTHER_COLUMN]):
        found = as_mapping(texts["shared"], make_sources(tasks), "train_dataset", complete=True)
        assert found == {"shared": texts["shared"]}


def test_a_dataset_without_a_name_is_refused_where_tasks_read_several(texts):
    with pytest.raises(ValueError, match="train_dataset must be a dictionary .* the tasks read shared, alone"):
        as_mapping(texts["shared"], make_sources([A, ALONE]), "train_dataset", complete=True)


@pytest.mark.parametrize("complete", [True, False])
def test_a_dataset_that_feeds_no_task_is_named(texts, complete):
    given = {**texts, "allone": texts["alone"]}
    message = (
        r"eval_dataset has a dataset 'allone' that feeds no task, did you mean 'alone'\?; the tasks read shared, alone"
    )
    with pytest.raises(ValueError, match=message):
        as_mapping(given, make_sources([A, ALONE]), "eval_dataset", complete=complete)


def test_a_task_without_its_dataset_is_named(texts):
    given = {"alone": texts["alone"]}
    message = r"train_dataset lacks the dataset\(s\) shared of the task\(s\) a, b; it has alone"
    with pytest.raises(ValueError, match=message):
        as_mapping(given, make_sources([A, ALONE, B]), "train_dataset", complete=True)
    assert as_mapping(given, make_sources([A, ALONE, B]), "eval_dataset", complete=False) == given


@pytest.mark.parametrize("complete", [True, False])
def test_no_dataset_at_all_is_refused(complete):
    with pytest.raises(ValueError, match=r"eval_dataset lacks the dataset\(s\) shared, alone .* it has none"):
        as_mapping({}, make_sources([A, ALONE]), "eval_dataset", complete=complete)


def test_only_the_datasets_that_are_there_are_prepared(texts):
    rows = prepare_sources(
        {"alone": texts["alone"]},
        make_sources([A, ALONE]),
        "eval_dataset",
        complete=False,
        tokenizer=make_tokenizer(),
        max_length=32,
    )
    assert rows.sizes == {"alone": 3} and rows[0]["source"].tasks == (ALONE,)


def test_preparing_names_the_dataset_that_is_bad(texts):
    bad = {**texts, "alone": texts["alone"].rename_column("label", "gold")}
    with pytest.raises(ValueError, match=r"dataset 'alone' \(train\): task 'alone': no column 'label'"):
        prepare(bad, A, ALONE)
