"""A run goes on only from a complete checkpoint, and only from one of the same run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_tasks

from hf_multitask import HardSharingModel, Task
from hf_multitask.checkpointing import incompleteness, last_complete_checkpoint


@pytest.fixture
def trained(make_trainer, bert, tasks, tmp_path):
    """A run of 6 steps with checkpoints at 2, 4 and 6, and a function that makes the same trainer again."""

    def make(new_tasks=tasks, train=None, **arguments):
        torch.manual_seed(0)
        defaults = dict(max_steps=6, save_strategy="steps", save_steps=2, output_dir=str(tmp_path / "run"))
        return make_trainer(HardSharingModel.from_backbone(bert, new_tasks), train, **{**defaults, **arguments})

    trainer = make()
    trainer.train()
    return tmp_path / "run", make, {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


SPOILT = {
    "killed before the last file": lambda f: (f / "trainer_state.json").unlink(),
    "killed in the last file": lambda f: (f / "trainer_state.json").write_text('{"epoch": 0.5, "log_hi'),
    "killed in our file": lambda f: (f / "multitask_state.json").write_text("{"),
    "killed while it was deleted": lambda f: (f / "model.safetensors").unlink(),
    "without the optimizer": lambda f: (f / "optimizer.pt").unlink(),
    "without the random state": lambda f: (f / "rng_state.pth").unlink(),
    "empty": lambda f: (shutil.rmtree(f), f.mkdir()),
}


@pytest.mark.parametrize("case", SPOILT)
def test_an_incomplete_checkpoint_is_passed_over_and_the_run_ends_the_same(trained, case, caplog):
    folder, make, expected = trained
    SPOILT[case](folder / "checkpoint-6")
    assert incompleteness(folder / "checkpoint-6") and incompleteness(folder / "checkpoint-4") is None
    found, skipped = last_complete_checkpoint(folder)
    assert found == str(folder / "checkpoint-4") and list(skipped) == [str(folder / "checkpoint-6")]
    trainer = make()
    trainer.train(resume_from_checkpoint=True)
    assert all(torch.equal(expected[name], p) for name, p in trainer.model.named_parameters())
    assert incompleteness(folder / "checkpoint-6") is None


def test_the_process_that_has_no_random_state_makes_it_incomplete(trained):
    folder, *_ = trained
    assert "rng_state_0.pth" in (incompleteness(folder / "checkpoint-6", num_processes=2) or "")


def test_an_incomplete_checkpoint_that_is_named_is_refused(trained):
    folder, make, _ = trained
    (folder / "checkpoint-2" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="checkpoint-2.*not complete: trainer_state.json is missing"):
        make().train(resume_from_checkpoint=str(folder / "checkpoint-2"))


def test_without_a_complete_checkpoint_resuming_is_an_error(trained):
    folder, make, _ = trained
    for number in (2, 4, 6):
        (folder / f"checkpoint-{number}" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="no complete checkpoint"):
        make().train(resume_from_checkpoint=True)


def renamed():
    tasks = make_tasks()
    return [Task(**{**tasks[0].to_dict(), "name": "mood"}), *tasks[1:]]


def relabelled():
    tasks = make_tasks()
    return [Task(**{**tasks[0].to_dict(), "labels": ("positive", "negative")}), *tasks[1:]]


def reweighted():
    tasks = make_tasks()
    return [Task(**{**tasks[0].to_dict(), "weight": 5.0}), *tasks[1:]]


OTHER_RUNS = {
    "renamed": (dict(new_tasks=renamed()), ["tone, strength, traits, names", "mood, strength"]),
    "reordered": (dict(new_tasks=make_tasks()[::-1]), ["tone, strength, traits, names", "names, traits"]),
    "other labels": (dict(new_tasks=relabelled()), ["task 'tone', labels", "['negative', 'positive']"]),
    "another weight": (dict(new_tasks=reweighted()), ["task 'tone', weight", "5.0"]),
    "another length": (dict(max_length=20), ["max_length", "20 now"]),
    "another strategy": (dict(task_sampling="uniform"), ["task_sampling", "'temperature'", "'uniform'"]),
    "another exponent": (dict(task_sampling_kwargs={"alpha": 0.5}), ["task_sampling_kwargs", "0.5"]),
    "another composition": (dict(batch_composition="single_task"), ["batch_composition"]),
    "another reduction": (dict(loss_reduction="tasks"), ["loss_reduction"]),
    "another seed": (dict(data_seed=7), ["seed of the rows", "7 now"]),
    "another batch": (dict(per_device_train_batch_size=4), ["per_device_train_batch_size", "8", "4"]),
    "another accumulation": (dict(gradient_accumulation_steps=2), ["gradient_accumulation_steps"]),
}


@pytest.mark.parametrize("case", OTHER_RUNS)
@pytest.mark.sample(4)
def test_a_checkpoint_of_another_run_is_refused_with_what_differs(trained, case):
    folder, make, _ = trained
    changes, parts = OTHER_RUNS[case]
    trainer = make(**changes)
    # Weights are loaded before the run is compared; tasks of other names could not even be loaded.
    with pytest.raises(ValueError) as error:
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    for part in parts:
        assert part in str(error.value), str(error.value)


def test_other_rows_are_refused(trained, datasets):
    folder, make, _ = trained
    fewer = {**datasets, "traits": datasets["traits"].select(range(10))}
    with pytest.raises(ValueError, match="training rows"):
        make(train=fewer).train(resume_from_checkpoint=str(folder / "checkpoint-4"))


def test_another_number_of_processes_is_refused(trained):
    folder, make, _ = trained
    path = folder / "checkpoint-4" / "multitask_state.json"
    state = json.loads(path.read_text())
    state["run"]["number of processes"] = 2
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="number of processes: 2 in the checkpoint, 1 now"):
        make().train(resume_from_checkpoint=str(folder / "checkpoint-4"))


def test_more_steps_are_a_continuation_unless_the_strategy_needs_the_length(
    trained, make_trainer, bert, tasks, tmp_path
):
    folder, make, _ = trained
    trainer = make(max_steps=8)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    assert trainer.state.global_step == 8

    def annealed(steps):
        model = HardSharingModel.from_backbone(bert, tasks)
        return make_trainer(
            model,
            max_steps=steps,
            save_strategy="steps",
            save_steps=2,
            task_sampling="annealed",
            output_dir=str(tmp_path / "annealed"),
        )

    annealed(4).train()
    with pytest.raises(ValueError, match="steps of the whole training: 4 in the checkpoint, 8 now"):
        annealed(8).train(resume_from_checkpoint=str(tmp_path / "annealed" / "checkpoint-2"))


@pytest.mark.parametrize("batch", [8, 6])  # 9 and 12 windows make an epoch: the last step is inside one
def test_a_run_that_was_through_is_not_trained_further(make_trainer, bert, tasks, tmp_path, batch):
    def make():
        torch.manual_seed(0)
        return make_trainer(
            HardSharingModel.from_backbone(bert, tasks),
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            per_device_train_batch_size=batch,
            output_dir=str(tmp_path / "through"),
        )

    whole = make()
    whole.train()
    again = make()
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4 and again.progress.rows_seen == whole.progress.rows_seen
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True))


def test_save_only_model_leaves_no_state_to_resume_from(make_trainer, model, tmp_path):
    trainer = make_trainer(model, save_strategy="steps", save_steps=4, save_only_model=True)
    trainer.train()
    assert incompleteness(Path(trainer.args.output_dir, "checkpoint-4"))
