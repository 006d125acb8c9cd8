"""Two runs never write to one folder: the second one says who has it, and stops."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
from test_recipe import folder  # noqa: F401

from hf_multitask.analysis.auxiliary import sweep_auxiliary
from hf_multitask.analysis.comparison import compare
from hf_multitask.folder_lock import LOCK_NAME, FolderInUseError, locked
from hf_multitask.running import run_recipe

HOLD = """
import sys, time
from hf_multitask.folder_lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def other_process(tmp_path):
    """A function that lets another process take the lock of a folder, and returns the process."""
    started = []

    def hold(folder):
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.wait()


def test_a_second_training_names_the_process_that_has_the_folder_and_a_killed_one_locks_nobody_out(
    other_process, make_trainer, model, tmp_path
):
    options = dict(max_steps=1, output_dir=str(tmp_path / "run"))
    holder = other_process(tmp_path / "run")
    with pytest.raises(FolderInUseError, match=rf"run'.* process {holder.pid} on ") as error:
        make_trainer(model, save_strategy="steps", **options).train()
    assert os.uname().nodename in str(error.value)
    make_trainer(model, save_strategy="no", **options).train()  # it writes nothing there
    holder.kill()
    holder.wait()
    trainer = make_trainer(model, save_strategy="steps", **options)
    trainer.train()
    trainer.train()  # one after the other is no matter
    assert trainer.state.global_step == 1
    assert LOCK_NAME not in os.listdir(tmp_path / "run")


def test_the_lock_ends_with_an_error_too(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    with locked(tmp_path):
        pass


def test_another_thread_is_refused_and_the_same_one_is_not(tmp_path):
    found = []

    def take():
        try:
            with locked(tmp_path):
                found.append("taken")
        except FolderInUseError:
            found.append("refused")

    with locked(tmp_path):
        with locked(tmp_path):
            pass
        thread = threading.Thread(target=take)
        thread.start()
        thread.join()
    take()
    assert found == ["refused", "taken"]


def test_a_second_recipe_comparison_or_sweep_is_refused(other_process, folder):
    job = folder / "job.yaml"
    other_process(folder / "out")
    with pytest.raises(FolderInUseError, match="out"):
        run_recipe(job)
    with pytest.raises(FolderInUseError, match="out"):
        compare(job, output=folder / "out")
    settings = ["tasks.strength.auxiliary=true"]
    with pytest.raises(FolderInUseError, match="swept"):
        other_process(folder / "swept")
        (folder / "swept" / "sweep.json").write_text("{}")
        sweep_auxiliary(job, "strength", [0, 0.5], settings=settings, output=folder / "swept")
