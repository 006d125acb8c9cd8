"""Each choice is read behind what it is about, whole; labels are numbers of choices."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import PAD_ID, make_tokenizer
from datasets import ClassLabel, Dataset, Features, List, Value
from questions import choices

from hf_multitask import DataCollatorForMultiTask, Task
from hf_multitask.data.dataset import MultiTaskDataset
from hf_multitask.data.preprocessing import prepare
from hf_multitask.data.sources import make_sources
from hf_multitask.data.streaming import prepare_streams

TASK = Task("next", "multiple_choice")
GOOD = {"question": "the film was", "choices": ["good", "very bad", "sad"], "label": 1}


def prepared(rows: Dataset | list, task: Task = TASK, tokenizer=None, max_length: int = 32, **options) -> Dataset:
    (source,) = make_sources([task])
    rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
    return prepare(rows, source, tokenizer or make_tokenizer(), max_length=max_length, **options)


def pairs_of(row: dict) -> list[list[int]]:
    ids, found = list(row["input_ids"]), []
    for length in row["choice_lengths"]:
        found.append(ids[:length])
        ids = ids[length:]
    assert not ids
    return found


def test_pairs_are_the_tokenizers():
    data, tokenizer = choices(), make_tokenizer()
    for raw, row in zip(data, prepared(data), strict=True):
        encoded = tokenizer([raw["question"]] * len(raw["choices"]), raw["choices"])
        assert pairs_of(row) == encoded["input_ids"] and row["token_type_ids"] == sum(encoded["token_type_ids"], [])
        assert row["labels_next"] == raw["label"]
    assert sorted(set(map(len, data["choices"]))) == [2, 3, 4]


def test_choices_may_stand_in_columns_of_their_own_and_begin_with_a_second_text():
    task = Task("next", "multiple_choice", text_columns=("sent1", "sent2"), choice_columns=("ending0", "ending1"))
    row = {"sent1": "we saw a film .", "sent2": "it was", "ending0": "good .", "ending1": "bad .", "label": 0}
    (found,) = prepared([row], task)
    tokenizer = make_tokenizer()
    assert pairs_of(found) == [tokenizer(row["sent1"], f"it was {end}")["input_ids"] for end in ("good .", "bad .")]


@pytest.mark.parametrize("side", ["right", "left"])
def test_only_what_the_choices_are_about_is_cut(side):
    tokenizer = make_tokenizer()
    tokenizer.truncation_side = side
    row_text = "the film was " * 9
    (row,) = prepared([{**GOOD, "question": row_text}], tokenizer=tokenizer, max_length=12)
    for choice, ids in zip(GOOD["choices"], pairs_of(row), strict=True):
        own = tokenizer(choice, add_special_tokens=False)["input_ids"]
        assert len(ids) == 12 and ids[-len(own) - 1 : -1] == own
        about = tokenizer(row_text, add_special_tokens=False)["input_ids"]
        kept = 12 - 3 - len(own)
        assert ids[1 : 1 + kept] == (about[:kept] if side == "right" else about[-kept:])


def test_a_choice_that_is_longer_than_what_it_is_about_stays_whole():
    long, tokenizer = "a very very sad and very bad film", make_tokenizer()
    (row,) = prepared([{**GOOD, "choices": ["good", long], "label": 0}], max_length=13)
    assert pairs_of(row)[1] == tokenizer("the film", long)["input_ids"]


@pytest.mark.parametrize(
    ("labels", "feature"),
    [
        ([1, 0], Value("int64")),
        (["1", "0"], Value("string")),
        ([1, 0], ClassLabel(names=["ending0", "ending1", "ending2"])),
        ([1, 0], Value("uint8")),
    ],
)
def test_labels_are_numbers_however_they_are_written(labels, feature):
    features = Features({"question": Value("string"), "choices": List(Value("string")), "label": feature})
    rows = Dataset.from_list([{**GOOD, "label": label} for label in labels], features=features)
    assert prepared(rows)["labels_next"][:] == [1, 0]


def batch_of(tasks, tables, numbers=None):
    sources = make_sources(tasks)
    dataset = MultiTaskDataset(sources, {source.name: tables[source.dataset] for source in sources})
    rows = [dataset[i] for i in (range(len(dataset)) if numbers is None else numbers)]
    return DataCollatorForMultiTask(make_tokenizer(), tasks)(rows)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_batch_has_a_row_for_each_choice_and_says_which_belong_together(labelled):
    data = choices(rows=7)
    table = prepared(data if labelled else data.remove_columns("label"), labels=None)
    batch = batch_of([TASK], {"next": table})
    counts = [len(texts) for texts in data["choices"]]
    segment, places = batch["segments"]["next"], batch["label_positions"]["next"]
    length = batch["input_ids"].shape[1]
    assert (segment.start, segment.stop) == (0, sum(counts)) and batch["input_ids"].shape[0] == sum(counts)
    assert places.shape == (7, 4) and places.dtype == torch.int64
    rows, first = [pair for row in table for pair in pairs_of(row)], 0
    for number, count in enumerate(counts):
        assert places[number].tolist() == [length * (first + k) if k < count else -length for k in range(4)]
        first += count
    for ids, padded, mask in zip(rows, batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True):
        assert padded == ids + [PAD_ID] * (length - len(ids)) and sum(mask) == len(ids)
    if labelled:
        assert batch["labels"]["next"].tolist() == data["label"][:] and batch["num_items"] == {"next": 7}
        assert batch["num_tokens"] == sum(map(len, rows))
    else:
        assert not {"labels", "num_items", "num_tokens"} & set(batch)


def test_beside_other_tasks_it_has_its_own_slice():
    tasks = [Task("tone", "single_label_classification", labels=("a", "b")), TASK]
    tone = Dataset.from_dict({"text": ["we saw a very good film"] * 3, "label": ["a", "b", "a"]})
    (source, _) = make_sources(tasks)
    tables = {"tone": prepare(tone, source, make_tokenizer(), max_length=32), "next": prepared(choices(rows=3))}
    batch = batch_of(tasks, tables)
    tone, own = batch["segments"]["tone"], batch["segments"]["next"]
    assert {tone.stop - tone.start, own.stop - own.start} == {3, 9}
    assert tone.stop == own.start or own.stop == tone.start
    assert batch["task_ids"][own.start : own.stop].tolist() == [1] * 9
    assert set(batch["label_positions"]) == {"next"} and batch["num_items"] == {"tone": 3, "next": 3}


def test_streams_have_the_same_rows():
    data = choices()
    (source,) = make_sources([TASK])
    table = prepared(data)
    streams = prepare_streams({"next": data.to_iterable_dataset()}, [source], {"next": 16}, make_tokenizer(), 32)
    for row, expected in zip(streams.__getitems__([0] * 16), table, strict=True):
        assert {key: row[key] for key in expected} == expected
    json.dumps(streams.state_dict(1))


BAD_ROWS = {
    "no question": ({"question": None}, "text None in row 1 of column 'question'"),
    "no choices": ({"choices": None}, "row 1 of column 'choices' holds None; there must be at least two choices"),
    "one choice": ({"choices": ["good"], "label": 0}, "holds ['good']; there must be at least two choices"),
    "None among them": ({"choices": ["a", None]}, "choice 1 in row 1 of column 'choices' is None"),
    "an empty one": ({"choices": ["a", " "]}, "choice 1 in row 1 of column 'choices' is ' '"),
    "no label": ({"label": None}, "label None in row 1 of column 'label' is not the number of one of its 3 choices"),
    "too large": (
        {"label": 3},
        "label 3 in row 1 of column 'label' is not the number of one of its 3 choices (0 to 2)",
    ),
    "negative": ({"label": -1}, "label -1 in row 1"),
    "a long choice": (
        {"choices": ["good", "bad " * 29]},
        "choice 1 in row 1 has 29 tokens, which leaves no room for what it is about in max_length=32",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_named(case):
    change, message = BAD_ROWS[case]
    with pytest.raises(ValueError, match="^dataset 'next' .train.: ") as error:
        prepared([GOOD, {**GOOD, **change}])
    assert message in str(error.value)


def test_ids_of_names_that_do_not_count_the_choices_are_refused():
    features = {"question": Value("string"), "choices": List(Value("string")), "label": ClassLabel(names=["1", "0"])}
    rows = Dataset.from_list([GOOD], features=Features(features))
    with pytest.raises(ValueError, match=r"names \['1', '0'\], whose ids do not count the choices; cast it"):
        prepared(rows)
    counted = rows.cast_column("label", ClassLabel(names=["1", "2", "3"]))
    assert prepared(counted)["labels_next"][:] == [1]


def test_a_name_is_no_number():
    with pytest.raises(ValueError, match="label 'B' in row 0 of column 'label' is not the number"):
        prepared([{**GOOD, "label": "B"}])


BAD_COLUMNS = {
    "no choices": (
        {"question": ["a"], "label": [0]},
        "no column 'choices' for the choices; columns are question, label",
    ),
    "one string": (
        {"question": ["a"], "choices": ["a"], "label": [0]},
        "column 'choices' has the type Value('string'); it must hold lists of strings, the choices",
    ),
    "words": ({"question": [["a"]], "choices": [["a", "b"]], "label": [0]}, "column 'question' has the type List"),
    "numbers": (
        {"question": ["a"], "choices": [["a", "b"]], "label": [0.5]},
        "must hold the number of the right choice",
    ),
    "no label": ({"question": ["a"], "choices": [["a", "b"]]}, "no column 'label' for the labels"),
}


@pytest.mark.parametrize("case", BAD_COLUMNS)
def test_bad_columns_are_named(case):
    columns, message = BAD_COLUMNS[case]
    with pytest.raises(ValueError) as error:
        prepared(Dataset.from_dict(columns))
    assert message in str(error.value)
