"""Predictions need no labels: what cannot be used of them is left out and named, and everything else refuses it."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
from conftest import make_datasets, make_tasks, make_tokenizer
from datasets import Dataset, Features, List, Value
from language import decoder_tokenizer

from hf_multitask import HardSharingModel, Task
from hf_multitask.data.labels import LabelError
from hf_multitask.data.preprocessing import prepare
from hf_multitask.data.sources import make_sources

TEXTS = {"text": ["good film", "bad film", "a film"]}
WORDS = {"tokens": [["good", "film"], ["bad"], ["a", "film"]]}
QUESTIONS = {"question": ["who", "who", "who"], "context": ["maria", "john", "paris"]}
CHOICES = {"question": ["the film", "it", "we"], "choices": [["good", "bad"]] * 3}
ANSWERS = {"text": List(Value("string")), "answer_start": List(Value("int32"))}
KINDS = {
    "single": (Task("x", "single_label_classification", labels=("a", "b")), TEXTS),
    "numbers": (Task("x", "single_label_classification", labels=(1, 2)), TEXTS),
    "multi": (Task("x", "multi_label_classification", labels=("a", "b")), TEXTS),
    "regression": (Task("x", "regression"), TEXTS),
    "regressions": (Task("x", "regression", labels=("u", "v")), TEXTS),
    "tokens": (Task("x", "token_classification", labels=("O", "B-a")), WORDS),
    "question": (Task("x", "question_answering", stride=0), QUESTIONS),
    "answered question": (Task("x", "question_answering", stride=0, null_answers=False), QUESTIONS),
    "choice": (Task("x", "multiple_choice"), CHOICES),
    "text": (Task("x", "causal_lm", prompt="{text}"), TEXTS),
    "closed set": (Task("x", "causal_lm", prompt="{text}", labels=("good", "bad")), TEXTS),
    "two texts": (Task("x", "seq2seq_lm", prompt="{text}"), TEXTS),
}
NOTHING = {
    "only None": (Value("null"), [None] * 3, [*KINDS]),
    "some None": (Value("string"), ["a", None, None], ["single", "text", "two texts"]),
    "-1": (Value("int64"), [-1] * 3, ["single", "numbers", "choice", "closed set"]),
    "some -1": (Value("int64"), [1, -1, -1], ["single", "numbers", "choice", "closed set"]),
    "NaN": (Value("float64"), [math.nan] * 3, ["single", "regression", "choice", "text", "closed set", "two texts"]),
    "some NaN": (Value("float64"), [1.0, math.nan, math.nan], ["single", "regression", "text", "two texts"]),
    "empty texts": (Value("string"), [""] * 3, ["single", "choice", "text", "closed set", "two texts"]),
    "None for lists": (List(Value("string")), [None] * 3, ["multi", "tokens"]),
    "None for numbers": (List(Value("float64")), [None] * 3, ["regressions", "multi"]),
    "lists of -1": (List(Value("int64")), [[-1, -1], [-1], [-1, -1]], ["multi", "tokens"]),
    "None for answers": (ANSWERS, [None] * 3, ["question"]),
    "empty answers": (ANSWERS, [{"text": [], "answer_start": []}] * 3, ["answered question"]),
}
CASES = [(kind, nothing) for nothing, (_, _, kinds) in NOTHING.items() for kind in kinds]


def prepared(task: Task, rows: Dataset, labels: bool | None) -> Dataset:
    (source,) = make_sources([task])
    tokenizer = decoder_tokenizer() if task.type.generates else make_tokenizer()
    return prepare(rows, source, tokenizer, max_length=32, labels=labels, split="test")


@pytest.fixture
def messages(monkeypatch) -> list[str]:
    """What preparing rows writes to the log."""
    found: list[str] = []
    logger = logging.getLogger("hf_multitask.data.preprocessing")
    monkeypatch.setattr(logger, "warning", found.append)
    return found


@pytest.mark.parametrize(("kind", "nothing"), CASES)
def test_rows_without_labels_are_prepared_for_predictions_and_named(kind, nothing, messages):
    task, columns = KINDS[kind]
    feature, values, _ = NOTHING[nothing]
    bare = Dataset.from_dict(columns)
    features = Features({**bare.features, str(task.label_column): feature})
    rows = Dataset.from_dict({**columns, str(task.label_column): values}, features=features)
    expected = prepared(task, bare, None)
    assert not messages
    found = prepared(task, rows, None)
    assert found.column_names == expected.column_names and found[:] == expected[:]
    (message,) = messages
    assert "dataset 'x' (test)" in message and "'x' is predicted without labels, and so without metrics" in message
    with pytest.raises(LabelError, match=r"dataset 'x' \(test\): task 'x': .*; to evaluate, rows need labels; to pred"):
        prepared(task, rows, True)


def test_tokenized_rows_whose_labels_are_all_minus_100_too(messages):
    rows = Dataset.from_dict({"input_ids": [[1, 5, 2], [1, 6, 7, 2]], "labels": [[-100] * 3, [-100] * 4]})
    task = Task("x", "token_classification", labels=("O", "B-a"))
    assert prepared(task, rows, None).column_names == ["input_ids"] and "all labels are -100" in messages[0]
    with pytest.raises(ValueError, match="no row has a labelled word left .*all labels are -100"):
        prepared(task, rows, True)


def test_a_bad_text_is_refused_whatever_the_labels(messages):
    rows = Dataset.from_dict({"text": ["a", None], "label": [-1, -1]})
    with pytest.raises(ValueError, match="text None in row 1"):
        prepared(KINDS["single"][0], rows, None)


def test_of_tasks_that_share_rows_only_those_without_labels_lose_their_metrics(bert, make_trainer, messages):
    model = HardSharingModel.from_backbone(bert, make_tasks())
    trainer = make_trainer(model)
    data = make_datasets(1)
    whole = trainer.predict(data)
    half = {**data, "reviews": data["reviews"].map(lambda row: {"strength": math.nan})}
    found = trainer.predict(half)
    assert len(messages) == 1 and "'strength' is predicted without labels" in messages[0]
    for name, output in whole.items():
        np.testing.assert_array_equal(found[name].predictions, output.predictions)
        if name == "strength":
            assert found[name].label_ids is None and not found[name].metrics
        else:
            assert found[name].metrics == output.metrics
    with pytest.raises(ValueError, match=r"dataset 'reviews' \(eval\): task 'strength': label nan in row 0"):
        trainer.evaluate(half)


def test_an_evaluation_without_any_label_is_named(bert, make_trainer):
    """Prepared rows are checked before; a collator of one's own may still take all labels away."""
    trainer = make_trainer(HardSharingModel.from_backbone(bert, make_tasks()[3:]), {"names": make_datasets()["names"]})
    own = trainer.data_collator

    def without(rows):
        batch = own(rows)
        batch["labels"]["names"].fill_(-100)
        return batch

    trainer.data_collator = without
    with pytest.raises(ValueError, match="task 'names': no row that was evaluated has a label: all of them are -100"):
        trainer.evaluate({"names": make_datasets()["names"]})
