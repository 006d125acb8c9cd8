"""What a checkpoint says about a multi-task run, whether it is complete, and whether a run may go on from it.

A run that goes on from a checkpoint must be the run that was stopped. Beside `Trainer`'s files a checkpoint holds
`multitask_state.json`: the tasks, what decides the order of the rows, and the rows seen. A difference that would make
another run of it is an error that names the difference. `Trainer` writes `trainer_state.json` last, when all processes
have written their part; after it comes the manifest with the SHA-256 of every file (see [`models.manifest`]), which
says until then that the checkpoint is being written. A checkpoint is good where all files are there and none has
changed since. Only then older ones are deleted, by step.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import logging

from .balanced_step import MultiTaskBalancing
from .checkpoint_state import STATE_NAME, check_balancing, read_state
from .data.dataset import MultiTaskDataset
from .data.streaming import StreamingMixture
from .folder_lock import locked_together
from .gap_sampling import MultiTaskGapSampling
from .guard import LossGuard, ends_together, nonfinite_saved_weights
from .loading import make_sampler, total_steps
from .models.limits import shown
from .models.manifest import Recording, fault_in, saving
from .models.saved_config import load_json
from .run_description import (
    changes_optimizer,
    check_changes,
    compare_runs,
    describe_given,
    describe_run,
    hash_rows,
    keep_settings,
)
from .training_args import MultiTaskTrainingArguments

__all__ = [
    "STATE_NAME",
    "MultiTaskCheckpoints",
    "SaveAfterEvaluation",
    "delete_old_checkpoints",
    "incompleteness",
    "last_complete_checkpoint",
    "read_state",
]

logger = logging.get_logger(__name__)

STREAMS_NAME = "streams_{}.json"  # one of each process
# Of an older checkpoint in the same folder, what a new one may not replace. The first one closes a checkpoint.
_STATES = (
    *("trainer_state.json", STATE_NAME, "streams_*", "rng_state*", "optimizer*", "scheduler.pt", "scaler.pt"),
    *("pytorch_model*", "global_step*"),
)
# What would be loaded if it were there, so it has to be recorded.
_LOADED = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", *_STATES)
# Files that are saved with a model by `Trainer`, and the tokenizer's, whose vocabularies it names itself.
_SAVED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "processor_config.json", "training_args.bin"),
)
_IN_BACKGROUND = 2**30  # bytes of a checkpoint from which on it is hashed while training goes on: about a second


def incompleteness(checkpoint: str | Path, num_processes: int = 1) -> str | None:
    """Return why training cannot go on from a checkpoint.

    A process was killed while it wrote or deleted it, or a file has changed since: every file is read, and compared
    with the manifest where there is one.

    Args:
        checkpoint: The folder.
        num_processes: Number of processes; each has a random state of its own.

    Returns:
        A few words, or None for a complete checkpoint.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return "there is no such folder"
    for name in ("trainer_state.json", STATE_NAME):
        if not (folder / name).is_file():
            return f"{name} is missing"
        try:
            load_json(folder / name, name, 2**32, with_nan=True)
        except ValueError:
            return f"{name} is cut off"
    try:
        streaming = (read_state(folder) or {}).get("streaming", False)
    except ValueError as error:
        return str(error)
    states = ["rng_state.pth"] if num_processes == 1 else [f"rng_state_{rank}.pth" for rank in range(num_processes)]
    # Sharded runs may write a folder of shards for the optimizer and one for the weights; its `.metadata` comes last.
    parts = [path for path in folder.iterdir() if path.is_dir() and any(path.glob("*.distcp"))]
    sharded = bool(parts)
    for part in parts:
        if not (part / ".metadata").is_file():
            return f"{part.name}/.metadata is missing"
    states += [STREAMS_NAME.format(rank) for rank in range(num_processes)] if streaming else []
    for name in ["scheduler.pt", *states]:
        if not (folder / name).is_file():
            return f"{name} is missing"
    if not sharded and not any((folder / name).is_file() for name in ("optimizer.pt", "optimizer.bin")):
        return "optimizer.pt is missing"
    if not sharded and not any(folder.glob("*.safetensors")):
        return "the weights are missing: there is no model.safetensors"
    fault = fault_in(folder, _LOADED)
    if fault is None and streaming:
        try:
            for rank in range(num_processes):
                _read_streams(folder / STREAMS_NAME.format(rank))
        except ValueError as error:
            return str(error)
    if fault is not None:
        return fault
    bad = nonfinite_saved_weights(folder)
    return None if bad is None else f"{bad} holds weights that are NaN or infinite"


def _read_streams(path: Path) -> dict[str, Any]:
    """Return where the streams of a process were.

    Raises:
        ValueError: The file is empty, cut off, or holds something else.
    """
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} in {str(path.parent)!r} cannot be read: {error}") from None
    if not isinstance(state, dict) or not isinstance(state.get("streams"), dict) or "batches" not in state:
        raise ValueError(f"{path.name} in {str(path.parent)!r} holds {shown(state)}, which is no state of streams")
    return state


def _clear(folder: Path) -> None:
    """Delete the states that an older checkpoint left in a folder; the file that closes it goes first."""
    for pattern in _STATES:
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _close_checkpoint(recording: Recording, run_folder: str, limit: int | None, step: int, best: str | None) -> None:
    """Write the manifest of a checkpoint, and then delete older checkpoints."""
    recording.finish()
    delete_old_checkpoints(run_folder, limit, step, best)


def last_complete_checkpoint(
    output_dir: str | Path, num_processes: int = 1, check: Callable[[str], str | None] | None = None
) -> tuple[str | None, dict[str, str]]:
    """Return the newest good checkpoint in a folder, and why newer ones are passed over.

    Args:
        output_dir: The folder of the run.
        num_processes: Number of processes.
        check: What says why a checkpoint cannot be used (default: [`incompleteness`]).

    Returns:
        The checkpoint's folder or None, and reasons by folder.
    """
    skipped: dict[str, str] = {}
    for _, folder in sorted(_checkpoints(output_dir).items(), reverse=True):
        reason = incompleteness(folder, num_processes) if check is None else check(str(folder))
        if reason is None:
            return str(folder), skipped
        skipped[str(folder)] = reason
    return None, skipped


def _checkpoints(output_dir: str | Path) -> dict[int, Path]:
    """Return the checkpoints in the folder of a run, by step."""
    found = {path.name.removeprefix("checkpoint-"): path for path in Path(output_dir).glob("checkpoint-*")}
    return {int(step): path for step, path in found.items() if step.isdigit() and path.is_dir()}


def delete_old_checkpoints(output_dir: str | Path, limit: int | None, step: int, best: str | None = None) -> list[int]:
    """Delete checkpoints beyond a number, the earliest steps first.

    `Trainer` goes by the folders' times of modification, which a copy or an edit changes. Checkpoints of later steps
    than the present one are of an older run, or were left behind on purpose, and go first. The present one and the
    best one stay.

    Args:
        output_dir: The folder of the run.
        limit: The most checkpoints that stay (`save_total_limit`); None or 0 for all.
        step: The step of the checkpoint that was just written.
        best: The folder of the best checkpoint.

    Returns:
        The steps whose checkpoints were deleted.
    """
    found = _checkpoints(output_dir)
    if not limit or limit < 0:
        return []
    kept = {
        number for number, path in found.items() if number == step or (best and path.resolve() == Path(best).resolve())
    }
    others = sorted(set(found) - kept, key=lambda number: (number < step, number))
    deleted = others[: max(len(found) - max(limit, len(kept)), 0)]
    for number in deleted:
        (found[number] / _STATES[0]).unlink(missing_ok=True)  # what is left, should this be interrupted, is incomplete
        shutil.rmtree(found[number], ignore_errors=True)
    return deleted


class SaveAfterEvaluation(TrainerCallback):
    """Writes the checkpoint of an epoch's last step after the evaluation that ends the epoch.

    `Trainer` saves by steps before it evaluates by epochs, so such a checkpoint would lack what follows from the
    evaluation: shares of datasets, the best metric, random numbers. A run that goes on from it would be another one.
    """

    def __init__(self) -> None:
        self._waits = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put off saving to the end of the epoch, if this is its last step."""
        ends = control.should_training_stop or control.should_epoch_stop or float(state.epoch or 0.5).is_integer()
        if args.eval_strategy == IntervalStrategy.EPOCH and control.should_save and ends:
            control.should_save, self._waits = False, True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save what was put off, and do not repeat an evaluation that the checkpoint resumed from ended with."""
        if args.eval_strategy == IntervalStrategy.EPOCH and any(
            line.get("step") == state.global_step and any(key.startswith("eval_") for key in line)
            for line in state.log_history
        ):
            control.should_evaluate = False
        control.should_save, self._waits = control.should_save or self._waits, False


class MultiTaskCheckpoints(MultiTaskGapSampling, MultiTaskBalancing):
    """The part of [`MultiTaskTrainer`] that writes checkpoints and goes on from them."""

    args: MultiTaskTrainingArguments
    train_dataset: Any
    run_id: str = ""
    facts_of_run: Mapping[str, Any] = {}
    """What else must be the same when this run is resumed, as plain JSON types by a name for messages."""
    _preparing: dict[str, Any]
    _given_optimizers: tuple[Any, Any] = (None, None)  # and schedule
    _best_before: str | None = None  # the best checkpoint before the one that is being written
    _closing: Future | None = None  # of the last checkpoint, while it is hashed
    _deletes_checkpoints = False  # rather than `Trainer`
    _allowed_changes: tuple[str, ...] = ()
    _changes: Mapping[str, str] = {}  # of the arguments, since the checkpoint that training was resumed from
    _row_hashes: tuple[Any, dict[str, str]] = (None, {})  # of which dataset

    @ends_together
    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
        allow_changes: Sequence[str] = (),
    ) -> Any:
        """Train; `resume_from_checkpoint=True` resumes from the last *good* checkpoint of this run.

        A checkpoint is good where it is complete and none of its files has changed since it was written. With `True`
        others, and those of other runs, are passed over with a warning; one that is named is refused.

        While checkpoints are written the output folder is locked against other runs.

        Args:
            resume_from_checkpoint: As in `Trainer`.
            trial: As in `Trainer`.
            ignore_keys_for_eval: As in `Trainer`.
            allow_changes: Arguments that may differ from those of the run that wrote the checkpoint, such as
                `learning_rate`; they apply from the checkpoint on (see
                [`hf_multitask.run_description.CHANGEABLE`]).

        Raises:
            ValueError: There is no checkpoint to resume from, or it is damaged or of another run.
            FolderInUseError: Another run writes checkpoints to the output folder.
        """
        if not self.tasks:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        self._allowed_changes = check_changes(allow_changes)
        if self.args.save_strategy == SaveStrategy.NO:
            return self._train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        with locked_together(self._get_output_dir(trial), self.args.should_save):
            return self._train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _train(self, resume_from_checkpoint: Any, trial: Any, ignore_keys_for_eval: list[str] | None) -> Any:
        if self.tasks and resume_from_checkpoint is True:
            found = None
            # A course that was changed before goes on from its own checkpoints, not from later ones of the old course.
            for allowed in dict.fromkeys([(), self._allowed_changes]):
                if found is None:
                    check = partial(self._fault_of_checkpoint, same_run=True, allowed=allowed)
                    where = str(self.args.output_dir), self.args.world_size
                    found, skipped = last_complete_checkpoint(*where, check)
            for folder, why in skipped.items():
                logger.warning(f"checkpoint {folder} cannot be resumed from and is passed over: {why}")
            if found is None:
                reasons = "".join(f"\n  {folder}: {why}" for folder, why in skipped.items())
                raise ValueError(
                    f"there is no complete checkpoint of this run in {self.args.output_dir!r} to resume from{reasons}"
                )
            resume_from_checkpoint = found
        elif self.tasks and isinstance(resume_from_checkpoint, (str, os.PathLike)):
            resume_from_checkpoint = os.fspath(resume_from_checkpoint)
            reason = self._fault_of_checkpoint(resume_from_checkpoint)
            if reason is not None:
                raise ValueError(
                    f"cannot go on from {resume_from_checkpoint!r}, it is not complete: {reason}; "
                    "resume_from_checkpoint=True takes the last good checkpoint"
                )
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            self._finish_checkpoint()

    def _fault_of_checkpoint(self, folder: str, same_run: bool = False, allowed: Sequence[str] = ()) -> str | None:
        """Return why a checkpoint cannot be used; a collective call, in which one process of each machine reads it.

        Args:
            folder: The checkpoint.
            same_run: Whether a checkpoint of another run has a fault, too.
            allowed: Arguments in which its run may differ.
        """
        folder = broadcast_object_list([folder])[0]
        reason = None
        if self.args.local_process_index == 0:
            reason = incompleteness(folder, self.args.world_size)
            state = read_state(folder) if same_run and reason is None else None
            if state is not None:
                try:
                    compare_runs(folder, state["run"], self._describe_run(), allowed)
                except ValueError as error:
                    reason = str(error)
        return next(filter(None, gather_object([reason])), None)

    def _describe_run(self) -> dict[str, Any]:
        sampler = make_sampler(self.args, self.train_dataset, self._train_batch_size)
        steps = total_steps(self.args, len(sampler) // self.args.gradient_accumulation_steps)
        sizes, length = self.train_dataset.sizes, self._preparing["max_length"]
        model: Any = self.accelerator.unwrap_model(self.model)
        rows = self._hash_training_rows() or self.train_dataset.first_row_hashes()
        run = describe_run(self.args, self.tasks, sizes, self._train_batch_size, steps, length, model.config, rows)
        scheme = {key: getattr(model.config, key) for key in model.options() if key != "max_input_length"}
        run |= {"sharing": model.config.model_type, "options of the model": json.loads(json.dumps(scheme))}
        run["given to the trainer"] = describe_given(self.data_collator, *self._given_optimizers)
        if self.gap_sampling is not None:
            run["single-task scores"] = self.gap_sampling.scores
        return run | {"streamed": isinstance(self.train_dataset, StreamingMixture), **self.facts_of_run}

    def _hash_training_rows(self) -> dict[str, str]:
        """Return the hashes of the training rows by source; of streams, which cannot be read again, there are none."""
        dataset, hashes = self._row_hashes
        if dataset is not self.train_dataset:
            hashes = hash_rows(self.train_dataset) if isinstance(self.train_dataset, MultiTaskDataset) else {}
            self._row_hashes = self.train_dataset, hashes
        return hashes

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the states of optimizer and scheduler; settings that were changed on purpose stay the new ones."""
        changes = bool(self.tasks and checkpoint) and changes_optimizer(self._changes)
        if changes and self.is_deepspeed_enabled:
            raise ValueError("allow_changes is not supported with DeepSpeed, which loads its optimizer by itself")
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        fresh, rates = [dict(group) for group in groups], list(getattr(self.lr_scheduler, "base_lrs", ()))
        super()._load_optimizer_and_scheduler(checkpoint)
        if changes:
            keep_settings(self.optimizer, self.lr_scheduler, fresh, rates)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the weights of a checkpoint, and what the sharing scheme saves beside them."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.tasks:
            self.accelerator.unwrap_model(self.model).load_adapters(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """Load the weights of the best checkpoint, and what the sharing scheme saves beside them.

        Raises:
            ValueError: A file of the checkpoint is missing, or has changed since it was written.
        """
        if self.tasks:
            self._finish_checkpoint()
            self._check_best(str(self.state.best_model_checkpoint))
        super()._load_best_model()
        if self.tasks:
            self.accelerator.unwrap_model(self.model).load_adapters(str(self.state.best_model_checkpoint))

    def _check_best(self, folder: str) -> None:
        """Raise ValueError where the weights of the best checkpoint are missing or have changed."""
        place = Path(folder)
        if not place.is_dir() or not any(place.rglob(kind) for kind in ("*.safetensors", "*.distcp", "*.pt", "*.bin")):
            fault: str | None = "its weights are missing: there is no model.safetensors"
        else:
            fault = fault_in(folder, ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin"))
        if fault is not None:
            raise ValueError(
                f"load_best_model_at_end: the best checkpoint {folder!r} cannot be loaded: {fault}. The model is as it "
                "was after the last step; the last checkpoint has it"
            )

    # ---- saving ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as `Trainer` does, with a manifest of all files."""
        if not self.tasks:
            super().save_model(output_dir, _internal_call)
            return
        folder = str(self.args.output_dir if output_dir is None else output_dir)
        with saving(folder, self.args.should_save) as recording:
            super().save_model(folder, _internal_call=True)
            if self._deletes_checkpoints:  # from here on; the arguments that were saved have the user's number
                self.args.save_total_limit = None
            if self.args.should_save:
                vocabularies = getattr(self.processing_class, "vocab_files_names", {})
                recording.add_known([*_SAVED, *vocabularies.values()])
                if self.run_id:
                    recording.run = {"id": self.run_id, "rows_sha256": self._hash_training_rows()}
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Finish training as `Trainer` does, which may delete checkpoints."""
        self._finish_checkpoint()
        return super()._finalize_training(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint and its manifest; then delete older ones, by step."""
        if not self.tasks:
            super()._save_checkpoint(model, trial)
            return
        self._finish_checkpoint()
        self._best_before = self.state.best_model_checkpoint
        step, run_folder = self.state.global_step, str(self._get_output_dir(trial))
        limit = self.args.save_total_limit

        def close(recording: Recording) -> None:
            best = self.state.best_model_checkpoint
            recording.add_all()
            size = sum(path.stat().st_size for path in recording.folder.rglob("*") if path.is_file())
            if size < _IN_BACKGROUND or self._somebody_takes_checkpoints():
                _close_checkpoint(recording, run_folder, limit, step, best)
                return
            worker = ThreadPoolExecutor(1)
            self._closing = worker.submit(_close_checkpoint, recording, run_folder, limit, step, best)
            worker.shutdown(wait=False)

        folder = Path(run_folder, f"checkpoint-{step}")
        with saving(folder, self.args.should_save, close=close) as recording:
            if self.args.should_save:
                _clear(folder)
                recording.kept.clear()
            if self.args.world_size > 1:
                torch.distributed.barrier()  # before other processes write their part
            try:
                self._deletes_checkpoints = True
                super()._save_checkpoint(model, trial)
            finally:
                self._deletes_checkpoints = False
                self.args.save_total_limit = limit

    def _keep_own_best(self) -> None:
        """Take back a best checkpoint that an earlier run left in the folder.

        `Trainer` takes the folder of the best step where there is one, even if this run saved nothing at that step.
        """
        best = self.state.best_model_checkpoint
        if best is None or best == self._best_before or Path(best).name == f"checkpoint-{self.state.global_step}":
            return
        try:
            run_id = (read_state(best) or {}).get("run_id")
        except ValueError:
            run_id = None
        if run_id != self.run_id:
            self.state.best_model_checkpoint = self._best_before

    def _somebody_takes_checkpoints(self) -> bool:
        """Return whether a callback of the user's is told of a checkpoint, and may copy it at once."""
        return any(type(one).on_save is not TrainerCallback.on_save for one in self.callback_handler.callbacks)

    def _finish_checkpoint(self) -> None:
        """Wait until the last checkpoint is closed."""
        closing, self._closing = self._closing, None
        if closing is not None:
            closing.result()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Warn of tensors that a checkpoint lacks, save those that are not in the file that was loaded."""
        if self.tasks:
            elsewhere = self.accelerator.unwrap_model(self.model).tensors_elsewhere()
            load_result.missing_keys[:] = [key for key in load_result.missing_keys if key not in elsewhere]
        super()._issue_warnings_after_load(load_result)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Begin the counts anew, or take them from a checkpoint of the same run."""
        if self.tasks:
            bound = inspect.signature(super()._init_training_state).bind(*args, **kwargs)
            checkpoint = bound.arguments.get("resume_from_checkpoint")
            state = read_state(checkpoint) if checkpoint else None
            self._changes = {}
            self.run_id = (state or {}).get("run_id") or broadcast_object_list([uuid.uuid4().hex])[0]
            if checkpoint and state is not None:
                self._changes = compare_runs(checkpoint, state["run"], self._describe_run(), self._allowed_changes)
                if self._changes:
                    logger.warning(f"resuming from {checkpoint} with changes: " + "; ".join(self._changes.values()))
            # What the texts were cut to in training is what a saved model cuts them to; it answers as it was trained.
            model: Any = self.accelerator.unwrap_model(self.model)
            model.config.max_input_length = self._preparing["max_length"]
            decided = {task.name: task.null_answers for task in self.tasks if task.null_answers is not None}
            model.tasks = [
                replace(task, null_answers=decided[task.name]) if task.name in decided else task for task in model.tasks
            ]
            model.config.tasks = [task.to_dict() for task in model.tasks]
            if isinstance(self.train_dataset, StreamingMixture):
                name = STREAMS_NAME.format(self.args.process_index)
                stored = _read_streams(Path(checkpoint, name)) if checkpoint and state is not None else None
                self.train_dataset.restart(stored)
            self._take_tasks_of_trial()
            self.progress.restart((state or {}).get("rows_seen", {}))
            self.guard = LossGuard(*((state or {}).get(key, 0) for key in ("skipped_steps", "skipped_in_a_row")))
            self._begin_sampling(self.args, self.train_dataset, self.eval_dataset, (state or {}).get("sampling"))
            self._begin_balancing(self.args)
            if state is not None:
                check_balancing(state["balancing"], self.balancer.state_dict())
                self.balancer.load_state_dict(state["balancing"])
        return super()._init_training_state(*args, **kwargs)

    def _take_tasks_of_trial(self) -> None:
        """Take over the tasks of a model that `model_init` made for a trial: their weights may be other ones."""
        model = self.accelerator.unwrap_model(self.model)
        tasks = model.tasks
        changed = self.model_init is None and model.task_changes != self._task_changes
        if changed or [task.name for task in tasks] != [task.name for task in self.tasks]:
            cause = "add_task or remove_task changed the model, which has" if changed else "model_init made a model of"
            raise ValueError(
                f"{cause} the tasks {', '.join(task.name for task in tasks)}; the trainer was made for "
                f"{', '.join(task.name for task in self.tasks)}: make a new trainer"
            )
        self.tasks = tasks

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the random state and ours, before `Trainer` closes the checkpoint with its own state."""
        super()._save_rng_state(output_dir)
        if self.tasks:
            self._keep_own_best()
        streaming = isinstance(self.train_dataset, StreamingMixture)
        if self.tasks and streaming:
            batches = self.state.global_step * self.args.gradient_accumulation_steps
            state = self.train_dataset.state_dict(batches)
            Path(output_dir, STREAMS_NAME.format(self.args.process_index)).write_text(json.dumps(state) + "\n")
        if self.tasks and self.args.should_save:
            state = {
                "run_id": self.run_id,
                "run": self._describe_run(),
                "rows_seen": self.progress.rows_seen,
                "skipped_steps": self.guard.skipped,
                "skipped_in_a_row": self.guard.skipped_in_a_row,
                "streaming": streaming,
                "sampling": self._sampling_state(),
                "balancing": self.balancer.state_dict(),
            }
            Path(output_dir, STATE_NAME).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        if self.tasks and self.args.world_size > 1:
            torch.distributed.barrier()  # the state that closes a checkpoint comes after every process's part
