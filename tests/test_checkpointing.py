"""A run goes on only from a complete checkpoint, and only from one of the same run."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import make_tasks
from transformers import TrainerCallback

from hf_multitask import HardSharingModel, Task
from hf_multitask.checkpointing import delete_old_checkpoints, incompleteness, last_complete_checkpoint
from hf_multitask.models.manifest import MANIFEST_NAME, Recording, changed_files, write_manifest

_TRAINED: list = []  # the run, which is trained once: a copy of its folder, and its weights


@pytest.fixture
def trained(make_trainer, bert, tasks, tmp_path, tmp_path_factory):
    """A run of 6 steps with checkpoints at 2, 4 and 6, and a function that makes the same trainer again."""

    def make(new_tasks=tasks, train=None, **arguments):
        torch.manual_seed(0)
        defaults = dict(max_steps=6, save_strategy="steps", save_steps=2, output_dir=str(tmp_path / "run"))
        return make_trainer(HardSharingModel.from_backbone(bert, new_tasks), train, **{**defaults, **arguments})

    if not _TRAINED:
        trainer = make()
        trainer.train()
        weights = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
        _TRAINED.extend((tmp_path_factory.mktemp("trained") / "run", weights))
        shutil.copytree(tmp_path / "run", _TRAINED[0])
    else:
        shutil.copytree(_TRAINED[0], tmp_path / "run")
    return tmp_path / "run", make, _TRAINED[1]


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
    write_manifest(folder / "checkpoint-4")
    with pytest.raises(ValueError, match="number of processes: 2 in the checkpoint, 1 now"):
        make().train(resume_from_checkpoint=str(folder / "checkpoint-4"))


def test_more_steps_are_a_continuation_unless_something_depends_on_the_length(
    trained, make_trainer, bert, tasks, tmp_path
):
    folder, make, _ = trained
    with pytest.raises(ValueError, match="steps of the whole training: 6 in the checkpoint, 8 now(.|\n)*max_steps"):
        make(max_steps=8).train(resume_from_checkpoint=str(folder / "checkpoint-6"))  # the rate falls to 0 in step 6
    trainer = make(max_steps=8)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-6"), allow_changes=["max_steps"])
    assert trainer.state.global_step == 8
    constant = dict(lr_scheduler_type="constant", output_dir=str(tmp_path / "constant"))
    make(**constant).train()
    trainer = make(max_steps=8, **constant)
    trainer.train(resume_from_checkpoint=True)
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


def test_a_run_that_was_through_is_not_evaluated_again(make_trainer, bert, tasks, datasets, tmp_path):
    def make():
        torch.manual_seed(0)
        model = HardSharingModel.from_backbone(bert, tasks)
        options = dict(max_steps=3, save_strategy="steps", save_steps=1, eval_strategy="epoch")
        return make_trainer(model, None, datasets, output_dir=str(tmp_path / "through"), **options)

    def evaluations(trainer):
        return [line["step"] for line in trainer.state.log_history if "eval_average" in line]

    whole, again = make(), make()
    whole.train()
    again.train(resume_from_checkpoint=True)
    assert evaluations(whole) == evaluations(again) == [3]


def test_save_only_model_leaves_no_state_to_resume_from(make_trainer, model, tmp_path):
    trainer = make_trainer(model, save_strategy="steps", save_steps=4, save_only_model=True)
    trainer.train()
    assert incompleteness(Path(trainer.args.output_dir, "checkpoint-4"))


# ---- bytes that have changed ----


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)


def files_of(checkpoint):
    return {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}


def test_every_file_of_a_checkpoint_is_recorded(trained):
    folder, *_ = trained
    runs = {json.dumps(json.loads((folder / f"checkpoint-{n}" / MANIFEST_NAME).read_text())["run"]) for n in (2, 4, 6)}
    assert len(runs) == 1 and set(json.loads(runs.pop())["rows_sha256"]) == {"reviews", "traits", "names"}
    for step in (2, 4, 6):
        checkpoint = folder / f"checkpoint-{step}"
        manifest = json.loads((checkpoint / MANIFEST_NAME).read_text())
        assert set(manifest["files"]) == files_of(checkpoint) - {MANIFEST_NAME} and not changed_files(checkpoint)
        assert {"model.safetensors", "optimizer.pt", "trainer_state.json", "tokenizer.json"} < set(manifest["files"])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_a_checkpoint_with_a_changed_file_is_passed_over_by_name(trained, name, caplog):
    folder, make, expected = trained
    flip(folder / "checkpoint-6" / name)
    with pytest.raises(ValueError, match=f"checkpoint-6.*{name}"):
        make().train(resume_from_checkpoint=folder / "checkpoint-6")
    trainer = make()
    logging.getLogger("transformers").propagate = True
    trainer.train(resume_from_checkpoint=True)
    assert any("checkpoint-6" in line and name in line for line in caplog.messages)
    assert all(torch.equal(expected[key], p) for key, p in trainer.model.named_parameters())


def test_a_file_of_another_checkpoint_is_noticed(trained):
    folder, make, _ = trained
    shutil.copy(folder / "checkpoint-4" / "model.safetensors", folder / "checkpoint-6" / "model.safetensors")
    assert last_complete_checkpoint(folder)[0] == str(folder / "checkpoint-4")
    shutil.copy(folder / "checkpoint-4" / "optimizer.pt", folder / "checkpoint-4" / "optimizer.bin")
    assert "optimizer.bin was not saved with the rest" in incompleteness(folder / "checkpoint-4")


def test_a_checkpoint_of_a_version_without_manifests_is_taken(trained):
    folder, make, expected = trained
    for step in (2, 4, 6):
        (folder / f"checkpoint-{step}" / MANIFEST_NAME).unlink()
    (folder / "checkpoint-6" / "optimizer.pt").unlink()
    trainer = make()
    trainer.train(resume_from_checkpoint=True)
    assert all(torch.equal(expected[name], p) for name, p in trainer.model.named_parameters())


def test_what_an_older_run_left_in_a_folder_does_not_stay(trained):
    folder, make, _ = trained
    for step in (2, 4, 6):
        for name in ("streams_0.json", "rng_state_1.pth", "optimizer.bin", "scaler.pt", "README.md"):
            (folder / f"checkpoint-{step}" / name).write_text("old")
    make().train()
    for step in (2, 4, 6):
        left = files_of(folder / f"checkpoint-{step}")
        assert "README.md" in left and not left & {"streams_0.json", "rng_state_1.pth", "optimizer.bin", "scaler.pt"}
        assert incompleteness(folder / f"checkpoint-{step}") is None


@pytest.mark.parametrize("name", ["model.safetensors", None])
def test_the_best_checkpoint_is_checked_before_it_is_loaded(trained, datasets, name):
    folder, make, _ = trained

    class Spoils(TrainerCallback):
        def on_train_end(self, *args, **kwargs):
            raise AssertionError("training went on with other weights")

        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 4:
                best = folder / f"checkpoint-{state.best_global_step}"
                flip(best / name) if name else shutil.rmtree(best)

    trainer = make(evaluation=datasets, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, max_steps=4)
    trainer.add_callback(Spoils())
    with pytest.raises(ValueError, match=name or "weights are missing"):
        trainer.train()


def test_a_saved_model_has_its_tokenizer_recorded(trained, tmp_path):
    _, make, _ = trained
    trainer = make()
    trainer.save_model(str(tmp_path / "model"))
    manifest = json.loads((tmp_path / "model" / MANIFEST_NAME).read_text())
    assert set(manifest["files"]) == files_of(tmp_path / "model") - {MANIFEST_NAME}


# ---- rotation ----


def test_checkpoints_are_deleted_by_step_not_by_the_time_of_their_folders(trained):
    folder, make, expected = trained
    trainer = make(max_steps=8, save_total_limit=2)
    os.utime(folder / "checkpoint-2", (2**31, 2**31))  # as after an edit
    trainer.train(resume_from_checkpoint=True, allow_changes=["max_steps"])
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-8"}
    assert trainer.args.save_total_limit == 2
    assert torch.load(folder / "checkpoint-8" / "training_args.bin", weights_only=False).save_total_limit == 2


ROTATIONS = {
    # checkpoints, limit, step, best: those that stay
    "the earliest go": ([2, 4, 6, 8], 2, 8, None, [6, 8]),
    "ten is after nine": ([9, 10], 1, 10, None, [10]),
    "the best stays": ([2, 4, 6, 8], 2, 8, 2, [2, 8]),
    "the best and the present one stay at a limit of 1": ([2, 4, 6], 1, 6, 2, [2, 6]),
    "those of an older, longer run go first": ([2, 400, 500], 2, 2, None, [2, 500]),
    "the present one stays, whatever there is": ([2, 400, 500], 1, 2, None, [2]),
    "no limit": ([2, 4], None, 4, None, [2, 4]),
    "a limit of 0 is none": ([2, 4], 0, 4, None, [2, 4]),
}


@pytest.mark.parametrize("case", ROTATIONS)
def test_which_checkpoints_stay(tmp_path, case):
    steps, limit, step, best, stay = ROTATIONS[case]
    for number, each in enumerate(steps):
        (tmp_path / f"checkpoint-{each}").mkdir()
        os.utime(tmp_path / f"checkpoint-{each}", (10**9 - number, 10**9 - number))
    (tmp_path / "checkpoint-x").mkdir()
    best_folder = None if best is None else os.path.relpath(tmp_path / f"checkpoint-{best}")
    deleted = delete_old_checkpoints(tmp_path, limit, step, best_folder)
    assert sorted(set(steps) - set(deleted)) == stay
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{each}" for each in stay} | {"checkpoint-x"}


def test_a_large_checkpoint_is_hashed_while_training_goes_on(trained, monkeypatch):
    folder, make, expected = trained
    monkeypatch.setattr("hf_multitask.checkpointing._IN_BACKGROUND", 0)
    threads = []
    finish = Recording.finish

    def noted(recording):
        threads.append(threading.current_thread() is threading.main_thread())
        time.sleep(0.2)
        finish(recording)

    monkeypatch.setattr(Recording, "finish", noted)
    trainer = make(save_total_limit=2)
    trainer.train()
    assert threads == [False] * 3 and {path.name for path in folder.glob("checkpoint-*")} == {
        "checkpoint-4",
        "checkpoint-6",
    }
    assert all(incompleteness(path) is None for path in folder.glob("checkpoint-*"))
    assert all(torch.equal(expected[name], p) for name, p in trainer.model.named_parameters())
