"""Everything that decides the result of a training is compared when it is resumed, and nothing else is."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import concatenate_datasets

from hf_multitask import HardSharingModel, MultiTaskTrainingArguments
from hf_multitask.data.dataset import MultiTaskDataset
from hf_multitask.run_description import (
    _DESCRIBED,
    _NEWER,
    _NOT_OF_TRAINING,
    CHANGEABLE,
    WITHOUT_EFFECT,
    check_changes,
    compare_runs,
    describe_run,
    hash_rows,
)

_TRAINED: list[Path] = []  # where a copy of the run is; it is trained once


@pytest.fixture
def trained(make_trainer, bert, tasks, tmp_path, tmp_path_factory):
    """A run of 4 steps with checkpoints at 2 and 4, and a function that makes the same trainer, or another one."""

    def make(train=None, backbone=bert, **arguments):
        torch.manual_seed(0)
        defaults = dict(max_steps=4, save_strategy="steps", save_steps=2, output_dir=str(tmp_path / "run"))
        return make_trainer(HardSharingModel.from_backbone(backbone, tasks), train, **{**defaults, **arguments})

    if not _TRAINED:
        make().train()
        _TRAINED.append(tmp_path_factory.mktemp("trained") / "run")
        shutil.copytree(tmp_path / "run", _TRAINED[0])
    elif not (tmp_path / "run").exists():
        shutil.copytree(_TRAINED[0], tmp_path / "run")
    return tmp_path / "run", make


OTHER_ARGUMENTS = {
    "learning_rate": 0.25,
    "weight_decay": 0.125,
    "max_grad_norm": 0.5,
    "lr_scheduler_type": "constant",
    "warmup_steps": 1,
    "adam_beta2": 0.5,
    "optim": "adafactor",
    "head_learning_rate": 0.5,
    "bf16": True,
    "seed": 7,
    "full_determinism": True,
    "neftune_noise_alpha": 2.0,
    "load_best_model_at_end": True,
    "eval_delay": 1,
    "ddp_bucket_cap_mb": 3,
}


@pytest.mark.parametrize("name", OTHER_ARGUMENTS)
@pytest.mark.sample(3)
def test_an_argument_that_changes_results_is_named(trained, datasets, name):
    folder, make = trained
    value = OTHER_ARGUMENTS[name]
    judged = dict(evaluation=datasets, eval_strategy="steps", eval_steps=2)
    more = judged if name == "load_best_model_at_end" else {}
    with pytest.raises(ValueError, match="of another run") as error:
        make(**{name: value}, **more).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert f"{name}: " in str(error.value) and "now" in str(error.value)
    assert ("allow_changes" in str(error.value)) == (name in CHANGEABLE and name != "head_learning_rate")


def test_each_argument_is_compared_unless_it_is_known_to_have_no_effect(tasks, tmp_path):
    """An argument that a new version adds is compared from the start."""
    args = MultiTaskTrainingArguments(str(tmp_path), load_best_model_at_end=True, eval_strategy="steps", save_steps=500)
    compared = describe_run(args, tasks, {}, 8, 10, 64)["arguments"]
    fields = {field.name for field in dataclasses.fields(args) if not field.name.startswith("_")}
    assert not WITHOUT_EFFECT & _DESCRIBED
    assert fields - WITHOUT_EFFECT - _DESCRIBED == set(compared)
    assert WITHOUT_EFFECT <= fields and _DESCRIBED <= fields and {*CHANGEABLE} <= fields


OTHER_ROWS = {
    "in another order": lambda rows: rows.select(range(len(rows) - 1, -1, -1)),
    "with another label": lambda rows: rows.map(
        lambda row, i: {"label": "positive"} if i == 5 else {}, with_indices=True
    ),
    "with another text": lambda rows: rows.map(lambda row, i: {"text": "good"} if i == 5 else {}, with_indices=True),
    "with another number": lambda rows: rows.map(lambda row, i: {"strength": 9.0} if i == 5 else {}, with_indices=True),
}


@pytest.mark.parametrize("case", OTHER_ROWS)
def test_other_rows_of_equal_number_are_named(trained, datasets, case):
    folder, make = trained
    other = {**datasets, "reviews": OTHER_ROWS[case](datasets["reviews"])}
    with pytest.raises(ValueError, match="training rows of 'reviews'"):
        make(other).train(resume_from_checkpoint=str(folder / "checkpoint-2"))


def test_the_same_rows_have_the_same_hash_however_they_are_stored(make_trainer, model, datasets, tmp_path):
    halves = [datasets["reviews"].select(range(7)), datasets["reviews"].select(range(7, len(datasets["reviews"])))]
    other = {**datasets, "reviews": concatenate_datasets(halves)}
    datasets["names"].save_to_disk(str(tmp_path / "names"), num_shards=3)
    other["names"] = type(datasets["names"]).load_from_disk(str(tmp_path / "names"))
    hashes = [hash_rows(make_trainer(model, rows).train_dataset) for rows in (datasets, other)]
    assert hashes[0] == hashes[1] and len(set(hashes[0].values())) == len(hashes[0])


def test_where_a_list_ends_is_part_of_the_hash():
    from datasets import Dataset

    def hashed(values):
        class Source:
            name = "a"

        dataset = MultiTaskDataset.__new__(MultiTaskDataset)
        dataset.sources, dataset.rows = [Source], [Dataset.from_dict({"input_ids": values})]
        return hash_rows(dataset)["a"]

    cases = [[[1, 2], [3]], [[1], [2, 3]], [[1, 2], [3], []], [[1, 2], None, [3]], [[1, 2, 3]], [[1, None], [3]]]
    assert len({hashed(case) for case in cases}) == len(cases)


def test_another_dropout_is_named(trained):
    from conftest import BACKBONES

    folder, make = trained
    other = BACKBONES["bert"]()
    other.config.hidden_dropout_prob = 0.5
    with pytest.raises(ValueError, match="hidden_dropout_prob: 0.1 in the checkpoint, 0.5 now"):
        make(backbone=other).train(resume_from_checkpoint=str(folder / "checkpoint-2"))


def test_what_has_no_effect_may_change(trained, tmp_path):
    folder, make = trained
    trainer = make(logging_steps=3, save_steps=1, dataloader_num_workers=1, per_device_eval_batch_size=3)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert trainer.state.global_step == 4


def test_a_learning_rate_that_is_allowed_to_change_is_the_one_that_is_used(trained, caplog):
    folder, make = trained
    make(head_learning_rate=0.001).train()
    trainer = make(learning_rate=0.25, head_learning_rate=0.5, weight_decay=0.125, logging_steps=1)
    changes = ["learning_rate", "head_learning_rate", "weight_decay"]
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"), allow_changes=changes)
    rates = {line["step"]: line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line}
    assert rates[3] == pytest.approx(0.25 * 2 / 4) and rates[4] == pytest.approx(0.25 / 4)  # linear, 4 steps
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {0.25, 0.5}
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0, 0.125}
    assert all(state["step"] == 4 for state in trainer.optimizer.state.values())  # moments are the checkpoint's


def test_a_rate_of_its_own_for_the_heads_cannot_come_or_go(trained):
    folder, make = trained
    with pytest.raises(ValueError, match="head_learning_rate: None in the checkpoint, 0.5 now"):
        make(head_learning_rate=0.5).train(
            resume_from_checkpoint=str(folder / "checkpoint-2"), allow_changes=["head_learning_rate"]
        )


def test_without_a_change_the_resumed_rate_is_the_checkpoints(trained):
    folder, make = trained
    trainer = make()
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"), allow_changes=["learning_rate"])
    whole = make(output_dir=str(folder.parent / "whole"))
    whole.train()
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), whole.model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["learning_rat", "task_sampling", "seed", "output_dir"])
def test_only_some_arguments_may_be_changed_on_purpose(name):
    with pytest.raises(ValueError, match=f"allow_changes: '{name}'.*learning_rate"):
        check_changes([name])


def test_resuming_passes_over_checkpoints_of_another_run(trained, caplog):
    """A folder holds the last checkpoint of an old run, and an earlier one of the run that is resumed."""
    folder, make = trained
    old = folder.parent / "old"
    shutil.move(folder, old)
    make(learning_rate=0.25).train()
    shutil.rmtree(folder / "checkpoint-4")
    shutil.move(old / "checkpoint-4", folder / "checkpoint-4")
    trainer = make(learning_rate=0.25)
    trainer.train(resume_from_checkpoint=True)
    whole = make(learning_rate=0.25, output_dir=str(folder.parent / "whole"))
    whole.train()
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), whole.model.parameters(), strict=True))
    with pytest.raises(ValueError, match="weight_decay: 0.0 in the checkpoint, 0.5 now"):
        make(learning_rate=0.25, weight_decay=0.5).train(resume_from_checkpoint=True)


def test_a_changed_course_goes_on_from_its_own_checkpoints(trained):
    """The first course has a later checkpoint, from which the changed one must not go on."""
    folder, make = trained
    make(save_steps=1).train()
    changed = dict(learning_rate=0.25, save_steps=1)
    trainer = make(**changed)
    shutil.copytree(folder / "checkpoint-4", folder.parent / "old")
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"), allow_changes=["learning_rate"])
    expected = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    shutil.rmtree(folder / "checkpoint-4")  # as if it had been killed after step 3
    shutil.copytree(folder.parent / "old", folder / "checkpoint-4")
    again = make(**changed)
    again.train(resume_from_checkpoint=True, allow_changes=["learning_rate"])
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), expected, strict=True))


def test_a_resumed_run_keeps_its_id_and_a_new_one_has_its_own(trained):
    folder, make = trained

    def run_id(step):
        return json.loads(Path(folder, f"checkpoint-{step}", "multitask_state.json").read_text())["run_id"]

    first = run_id(4)
    assert first == run_id(2) and len(first) == 32
    make().train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert run_id(4) == first
    make().train()
    assert run_id(4) == run_id(2) != first


def test_a_checkpoint_without_the_newer_facts_is_resumed(trained):
    """As version 0.1.0 wrote it: what it does not say is not compared, what it says is."""
    folder, make = trained
    path = folder / "checkpoint-2" / "multitask_state.json"
    state = json.loads(path.read_text())
    del state["run_id"]
    for key in (*_NEWER, "steps of the whole training"):
        del state["run"][key]
    path.write_text(json.dumps(state))
    (folder / "checkpoint-2" / "multitask_manifest.json").unlink(missing_ok=True)
    make().train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    with pytest.raises(ValueError, match="task_sampling"):
        make(task_sampling="uniform").train(resume_from_checkpoint=str(folder / "checkpoint-2"))


OTHER_TASKS = {"head_dropout": 0.5, "pooling": "last", "text_columns": ("text",), "head": "linear"}


@pytest.mark.parametrize("name", OTHER_TASKS)
def test_every_field_of_a_task_that_training_reads_is_compared(tasks, tmp_path, name):
    """Those of a coming version, too: what is left out is named, not what is compared."""
    args = MultiTaskTrainingArguments(str(tmp_path))
    task = dataclasses.replace(tasks[0], text_columns=("title",))
    saved = describe_run(args, [task], {}, 8, 10, 64)
    assert set(saved["tasks"][0]) == {field.name for field in dataclasses.fields(task)} - _NOT_OF_TRAINING
    now = describe_run(args, [dataclasses.replace(task, **{name: OTHER_TASKS[name]})], {}, 8, 10, 64)
    with pytest.raises(ValueError, match=f"task 'tone', {name}: "):
        compare_runs("checkpoint-2", saved, now)


@pytest.mark.parametrize("name", ["max_eval_samples", "save_steps", "predict_with_generate"])
def test_what_decides_the_best_checkpoint_is_compared_where_it_is_chosen(tasks, tmp_path, name):
    def describe(best, **changes):
        chosen = dict(load_best_model_at_end=best, eval_strategy="steps", eval_steps=2, save_steps=2)
        return describe_run(MultiTaskTrainingArguments(str(tmp_path), **{**chosen, **changes}), tasks, {}, 8, 10, 64)

    other = {name: 4}
    with pytest.raises(ValueError, match=f"{name}: "):
        compare_runs("checkpoint-2", describe(True), describe(True, **other))
    assert compare_runs("checkpoint-2", describe(False), describe(False, **other)) == {}


def test_a_collator_and_an_optimizer_of_ones_own_are_compared(make_trainer, model):
    def describe(rate=None, multiple=None):
        given = {}
        if rate is not None:
            given["optimizers"] = (torch.optim.SGD(model.parameters(), lr=0.1, momentum=rate), None)
        if multiple is not None:
            trainer = make_trainer(model)
            given["data_collator"] = trainer.data_collator
            given["data_collator"].pad_to_multiple_of = multiple
        return make_trainer(model, trainer_kwargs=given)._describe_run()

    assert compare_runs("checkpoint-2", describe(0.5), describe(0.5)) == {}
    for saved, now in ((describe(0.5), describe(0.25)), (describe(), describe(0.5)), (describe(), describe(None, 8))):
        with pytest.raises(ValueError, match="given to the trainer"):
            compare_runs("checkpoint-2", saved, now)


def test_the_first_rows_of_a_stream_are_compared(make_trainer, model, datasets):
    def describe(rows):
        streams = {name: part.to_iterable_dataset() for name, part in {**datasets, "reviews": rows}.items()}
        sizes = {name: len(part) for name, part in datasets.items()}
        return make_trainer(model, streams, dataset_sizes=sizes)._describe_run()

    saved, reviews = describe(datasets["reviews"]), datasets["reviews"]
    assert compare_runs("checkpoint-2", saved, describe(reviews)) == {}
    with pytest.raises(ValueError, match="training rows of 'reviews"):
        compare_runs("checkpoint-2", saved, describe(OTHER_ROWS["with another label"](reviews)))


def test_the_best_checkpoint_is_never_one_that_an_earlier_run_left(trained, datasets):
    """At the best step this run saves nothing, but an earlier run has left a checkpoint of that step."""
    folder, make = trained
    judged = dict(evaluation=datasets, eval_strategy="steps", eval_steps=2, max_steps=4, save_steps=4)
    trainer = make(**judged, learning_rate=0.0, load_best_model_at_end=True)  # the first evaluation stays the best
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert trainer.state.best_global_step == 2
    assert Path(str(trainer.state.best_model_checkpoint)).name != "checkpoint-2"
    assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())
