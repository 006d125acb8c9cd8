"""Collators that a user gives: one that makes right batches works, any other is refused before training."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from conftest import make_datasets, make_tasks
from test_schemes import weights
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    DefaultDataCollator,
    default_data_collator,
)

from hf_multitask import DataCollatorForMultiTask, HardSharingModel
from hf_multitask.data.collator import check_collator

STANDARD = {
    "DataCollatorWithPadding": DataCollatorWithPadding,
    "DataCollatorForTokenClassification": DataCollatorForTokenClassification,
    "DataCollatorForLanguageModeling": DataCollatorForLanguageModeling,
    "DataCollatorForSeq2Seq": DataCollatorForSeq2Seq,
    "DataCollatorWithFlattening": lambda tokenizer: DataCollatorWithFlattening(),
    "DefaultDataCollator": lambda tokenizer: DefaultDataCollator(),
    "default_data_collator": lambda tokenizer: default_data_collator,
}


@pytest.fixture
def model(bert):
    return HardSharingModel.from_backbone(bert, make_tasks(), head_dropout=0.0)


@pytest.mark.parametrize("name", STANDARD)
def test_collators_of_transformers_are_refused(model, make_trainer, tokenizer, name):
    message = f"data_collator {name} makes batches of one task, not of several: leave it out"
    with pytest.raises(ValueError, match=message):
        make_trainer(model, trainer_kwargs={"data_collator": STANDARD[name](tokenizer)})


class Rounded(DataCollatorForMultiTask):
    """One that is derived."""

    def __call__(self, rows):
        return super().__call__(rows)


def kinds_of(tokenizer, tasks):
    own = DataCollatorForMultiTask(tokenizer, tasks)

    def function(rows):
        random.random(), np.random.rand(), torch.rand(1)
        return own(rows)

    return {"derived": Rounded(tokenizer, tasks), "function": function, "lambda": lambda rows: dict(own(rows))}


@pytest.mark.parametrize(("kind", "streamed"), [("derived", False), ("function", False), ("lambda", True)])
def test_collators_of_ones_own_work(model, make_trainer, tokenizer, kind, streamed):
    datasets = make_datasets()
    if streamed:
        datasets = {name: rows.to_iterable_dataset() for name, rows in datasets.items()}
    options = {"max_steps": 1, "task_sampling": "uniform"}
    collator = kinds_of(tokenizer, model.tasks)[kind]
    trainer = make_trainer(model, datasets, trainer_kwargs={"data_collator": collator}, **options)
    assert trainer.data_collator is collator
    before = {name: value.clone() for name, value in weights(model).items()}
    trainer.train()
    found = {name: value.clone() for name, value in weights(model).items()}
    if kind == "function":
        return  # in training its random numbers are its own
    model.load_state_dict(before, strict=False)
    plain = make_trainer(model, datasets, trainer_kwargs={"data_collator": None}, **options)
    assert type(plain.data_collator) is DataCollatorForMultiTask
    plain.train()
    assert all(torch.equal(value, weights(model)[name]) for name, value in found.items())


def test_trying_a_collator_changes_no_random_state_and_no_row(model, make_trainer, tokenizer):
    trainer = make_trainer(model)
    rows = trainer.train_dataset.one_of_each()
    assert [row["source"].name for row in rows] == list(trainer.train_dataset.sizes)
    own = kinds_of(tokenizer, model.tasks)["function"]

    def greedy(given):
        batch = own(given)
        for row in given:
            row.clear()
        return batch

    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    check_collator(greedy, rows)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert all("input_ids" in row for row in rows)


WRONG = {
    "fails": (lambda own, rows: rows[0]["text"], "fails on rows of these tasks, KeyError: 'text'"),
    "a list": (lambda own, rows: [own(rows)], "returns a list, not a dictionary"),
    "no tokens": (lambda own, rows: {"tokens": 1}, "returns a batch without input_ids; its keys are tokens"),
    "one tensor of labels": (
        lambda own, rows: {**own(rows), "labels": torch.zeros(4)},
        "returns a batch whose 'labels' is not a dictionary by task",
    ),
    "no segments": (
        lambda own, rows: {key: value for key, value in own(rows).items() if key != "segments"},
        "returns a batch whose 'segments' is not a dictionary by task",
    ),
    "uncounted": (
        lambda own, rows: {**own(rows), "num_items": {}},
        r"returns a batch with labels of .* num_items of \[\]",
    ),
}


@pytest.mark.parametrize("composition", ["mixed", "single_task"])
@pytest.mark.parametrize("case", WRONG)
def test_collators_that_make_something_else_are_refused(model, make_trainer, tokenizer, case, composition):
    make, message = WRONG[case]
    own = DataCollatorForMultiTask(tokenizer, model.tasks)

    def mine(rows):
        return make(own, rows)

    with pytest.raises(ValueError, match=f"data_collator mine {message}.*; leave data_collator out, or derive yours"):
        make_trainer(model, trainer_kwargs={"data_collator": mine}, batch_composition=composition)


@pytest.mark.parametrize("option", ["split_batches", "dispatch_batches"])
def test_batches_of_the_main_process_are_refused(model, make_trainer, option):
    with pytest.raises(ValueError, match=rf"accelerator_config=\{{'{option}': True\}} does not go with a multi-task"):
        make_trainer(model, accelerator_config={option: True})
    make_trainer(model, accelerator_config={option: False})
