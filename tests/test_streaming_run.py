"""Training on streams: length of an epoch, layouts, going on from a checkpoint, errors before the start."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset

SIZES = {"reviews": 40, "traits": 20, "names": 11}


@pytest.fixture
def streams(datasets):
    parts = {name: part.to_iterable_dataset(num_shards=2) for name, part in datasets.items()}
    return parts | {"traits": parts["traits"].shuffle(seed=4, buffer_size=6)}


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def test_an_epoch_is_as_long_as_with_datasets_in_memory(model, make_trainer, streams, datasets):
    runs = []
    for train in (datasets, streams):
        trainer = make_trainer(
            model, train, max_steps=-1, num_train_epochs=2, dataset_sizes=SIZES if train is streams else None
        )
        trainer.train()
        runs.append((trainer.state.global_step, trainer.progress.rows_seen))
    assert runs[0] == runs[1] and runs[0][0] == 18


@pytest.mark.parametrize("composition", ["mixed", "single_task"])
@pytest.mark.sample(2)
def test_accumulation_makes_no_difference(model, make_trainer, streams, composition):
    without_dropout(model)
    before, ends = weights(model), []
    for rows, accumulation in ((8, 1), (2, 4)) if composition == "mixed" else ((2, 4), (2, 4)):
        model.load_state_dict(before)
        trainer = make_trainer(
            model,
            streams,
            dataset_sizes=SIZES,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulation,
            batch_composition=composition,
            max_steps=11,
            optim="sgd",
        )
        trainer.train()
        ends.append(weights(model))
    for name, value in ends[0].items():
        assert torch.allclose(value, ends[1][name], rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("stopped", [2, 9, 10])
@pytest.mark.sample(3)
def test_resumed_equals_uninterrupted(model, make_trainer, streams, stopped, tmp_path):
    """Steps 9 and 10 lie on both sides of the end of an epoch, and of a pass."""
    before = weights(model)
    options = dict(
        dataset_sizes=SIZES, max_steps=14, save_strategy="steps", save_steps=1, gradient_accumulation_steps=2
    )
    options |= dict(per_device_train_batch_size=4)
    trainer = make_trainer(model, streams, **options)
    trainer.train()
    end, rows = weights(model), trainer.progress.rows_seen
    model.load_state_dict(before)
    trainer = make_trainer(model, streams, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{stopped}"))
    assert all(torch.equal(value, end[name]) for name, value in weights(model).items())
    assert trainer.progress.rows_seen == rows
    places = [json.loads((tmp_path / "out" / f"checkpoint-{n}" / "streams_0.json").read_text()) for n in (13, 14)]
    assert places[1]["batches"] == 28 and places[0]["streams"] != places[1]["streams"]


def test_a_second_run_begins_at_the_first_row(model, make_trainer, streams):
    before = weights(without_dropout(model))
    trainer = make_trainer(model, streams, dataset_sizes=SIZES, max_steps=3)
    ends = []
    for _ in range(2):
        model.load_state_dict(before)
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.train()
        ends.append(weights(model))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_checkpoint_without_its_streams_is_incomplete(model, make_trainer, streams, tmp_path):
    options = dict(dataset_sizes=SIZES, max_steps=4, save_strategy="steps", save_steps=2)
    make_trainer(model, streams, **options).train()
    (tmp_path / "out" / "checkpoint-2" / "streams_0.json").unlink()
    with pytest.raises(ValueError, match="streams_0.json is missing"):
        make_trainer(model, streams, **options).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


def test_streams_and_datasets_in_memory_do_not_continue_each_other(model, make_trainer, streams, datasets, tmp_path):
    options = dict(max_steps=4, save_strategy="steps", save_steps=2)
    make_trainer(model, streams, dataset_sizes=SIZES, **options).train()
    with pytest.raises(ValueError, match="streamed: True in the checkpoint, False now"):
        make_trainer(model, datasets, **options).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


def test_streams_beside_datasets_in_memory(model, make_trainer, streams, datasets):
    trainer = make_trainer(
        model, {**datasets, "reviews": streams["reviews"]}, datasets, dataset_sizes={"reviews": 40}, max_steps=9
    )
    trainer.train()
    assert sum(trainer.progress.rows_seen.values()) >= 72
    assert "eval_average" in trainer.evaluate()


def test_without_lengths_by_max_steps(model, make_trainer, streams):
    trainer = make_trainer(model, streams, task_sampling="uniform", max_steps=5)
    trainer.train()
    assert trainer.state.global_step == 5
    assert trainer.progress.rows_seen["names"] in (13, 14)


def test_streams_are_evaluated_and_predicted_whole(model, make_trainer, streams, datasets):
    in_memory = make_trainer(model, datasets, datasets).evaluate()
    unshuffled = {name: part.to_iterable_dataset() for name, part in datasets.items()}
    streamed = make_trainer(model, datasets, unshuffled).evaluate()
    for key, value in in_memory.items():
        if not key.endswith(("time", "per_second")):
            assert streamed[key] == value, key
    assert len(make_trainer(model, datasets).predict(unshuffled)["names"].predictions) == 11


def test_refusals_before_training(model, make_trainer, streams):
    with pytest.raises(ValueError, match="dataset_sizes"):
        make_trainer(model, streams)
    with pytest.raises(ValueError, match="dataloader_num_workers does not go with streamed"):
        make_trainer(model, streams, dataset_sizes=SIZES, dataloader_num_workers=1)
    with pytest.raises(ValueError, match="group_by_length.*streamed"):
        make_trainer(model, streams, dataset_sizes=SIZES, train_sampling_strategy="group_by_length")
    with pytest.raises(ValueError, match=r"dataset_sizes\['reviews'\] must be a positive whole number"):
        make_trainer(model, streams, dataset_sizes={"reviews": 0})


def test_a_loss_that_is_not_finite_names_the_row(model, make_trainer, streams):
    rows = [{"text": "good film", "label": "positive", "strength": 1e30 if i == 13 else 1.0} for i in range(40)]
    broken = streams | {"reviews": Dataset.from_list(rows).to_iterable_dataset()}
    with pytest.raises(RuntimeError, match=r"task 'strength': row\(s\) 13 \(pass 0\) of dataset 'reviews'"):
        make_trainer(model, broken, dataset_sizes=SIZES).train()
