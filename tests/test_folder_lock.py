"""Two runs never write to one folder: the second one says who has it, and stops."""

from __future__ import annotations

import os
import threading

import pytest

from hf_multitask.folder_lock import LOCK_NAME, FolderInUseError, locked


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
