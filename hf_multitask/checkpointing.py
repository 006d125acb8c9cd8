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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from .balanced_step import MultiTaskBalancing
from .checkpoint_state import STATE_NAME, check_balancing, read_state
from .data.sampling import follows_progress
from .data.streaming import StreamingMixture
from .gap_sampling import MultiTaskGapSampling
from .guard import LossGuard, nonfinite_saved_weights
from .loading import make_sampler, total_steps
from .models.limits import shown
from .models.manifest import Recording, fault_in, saving
from .models.saved_config import load_json
from .models.task import Task
from .models.weight_schedule import depends_on_length
from .training_args import MultiTaskTrainingArguments

__all__ = [
    "STATE_NAME",
    "MultiTaskCheckpoints",
    "SaveAfterEvaluation",
    "compare_runs",
    "delete_old_checkpoints",
    "describe_run",
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
_TASK_FIELDS = ("name", "type", "labels", "weight", "weight_schedule", "auxiliary", "label_smoothing", "max_length")
# Strategies whose probabilities depend on how long the whole training is.
_NEED_LENGTH = ("annealed", "unimax")


def describe_run(
    args: MultiTaskTrainingArguments,
    tasks: Sequence[Task],
    sizes: Mapping[str, int],
    rows_per_batch: int,
    steps: int,
    max_length: int,
) -> dict[str, Any]:
    """Return what must stay the same when a run goes on from a checkpoint, as plain JSON types.

    Args:
        args: The training arguments.
        tasks: The model's tasks.
        sizes: Training rows by source.
        rows_per_batch: Rows of a micro-batch on one process.
        steps: Optimizer steps of the whole training.
        max_length: Longest input in tokens, where a task sets none.
    """
    run = {
        "tasks": [{key: task.to_dict()[key] for key in _TASK_FIELDS} for task in tasks],
        "max_length": max_length,
        "training rows": dict(sizes),
        "task_sampling": args.task_sampling,
        "task_sampling_kwargs": args.mixing_kwargs,
        "batch_composition": args.batch_composition,
        "loss_reduction": args.loss_reduction,
        "seed of the rows": args.data_seed if args.data_seed is not None else args.seed,
        "per_device_train_batch_size": rows_per_batch,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "number of processes": args.world_size,
        "dataloader_drop_last": args.dataloader_drop_last,
        "train_sampling_strategy": args.train_sampling_strategy,
        "loss_weighting": _name(args.loss_weighting),
        "loss_weighting_kwargs": args.weighting_kwargs,
        "gradient_combination": _name(args.gradient_combination),
        "gradient_combination_kwargs": args.combination_kwargs,
        "auxiliary_gating": args.auxiliary_gating,
        "combination_every": args.combination_every,
        "gradient_memory": args.gradient_memory,
    }
    if args.auxiliary_gating is not None:
        run["primary_task"] = args.primary_task
    if follows_progress(args.task_sampling):
        run["shares"] = "change with each step"  # in version 0.1.0 they changed with each epoch
    if args.task_sampling in _NEED_LENGTH or any(depends_on_length(task.weight_schedule) for task in tasks):
        run["steps of the whole training"] = steps
    return json.loads(json.dumps(run))


def _name(method: Any) -> str:
    return method if isinstance(method, str) else type(method).__name__


def compare_runs(checkpoint: str | Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Check that a run is the one a checkpoint was written by.

    Raises:
        ValueError: They differ; every difference is named.
    """
    differences = []
    for key in dict.fromkeys([*saved, *now]):
        before, after = saved.get(key), now.get(key)
        if key == "tasks" and before != after:
            differences += _compare_tasks(before or [], after or [])
        elif before != after:
            differences.append(f"{key}: {shown(before)} in the checkpoint, {shown(after)} now")
    if differences:
        raise ValueError(
            f"cannot go on from {str(checkpoint)!r}, it is of another run:\n  "
            + "\n  ".join(differences)
            + "\nRun with what the checkpoint has, or start a new run from its weights: from_pretrained(checkpoint)."
        )


def _compare_tasks(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[str]:
    old, new = [str(task["name"]) for task in before], [str(task["name"]) for task in after]
    if old != new:
        return [f"tasks: {', '.join(old)} in the checkpoint, {', '.join(new)} now"]
    return [
        f"task {a['name']!r}, {key}: {shown(a.get(key))} in the checkpoint, {shown(b.get(key))} now"
        for a, b in zip(before, after, strict=True)
        for key in dict.fromkeys([*_TASK_FIELDS, *a])
        if a.get(key) != b.get(key)
    ]


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
        return "the weights are missing"
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
        """Save what was put off."""
        control.should_save, self._waits = control.should_save or self._waits, False


class MultiTaskCheckpoints(MultiTaskGapSampling, MultiTaskBalancing):
    """The part of [`MultiTaskTrainer`] that writes checkpoints and goes on from them."""

    args: MultiTaskTrainingArguments
    train_dataset: Any
    _preparing: dict[str, Any]
    _closing: Future | None = None  # of the last checkpoint, while it is hashed
    _deletes_checkpoints = False  # rather than `Trainer`

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train; `resume_from_checkpoint=True` goes on from the last *good* checkpoint.

        A checkpoint is good where it is complete and none of its files has changed since it was written. With `True`
        others are passed over with a warning; one that is named is refused.
        """
        if self.tasks and resume_from_checkpoint is True:
            found, skipped = last_complete_checkpoint(
                str(self.args.output_dir), self.args.world_size, self._fault_of_checkpoint
            )
            for folder, why in skipped.items():
                logger.warning(f"checkpoint {folder} is not complete or has changed, and is passed over: {why}")
            if found is None:
                reasons = "".join(f"\n  {folder}: {why}" for folder, why in skipped.items())
                raise ValueError(f"there is no complete checkpoint in {self.args.output_dir!r} to go on from{reasons}")
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

    def _fault_of_checkpoint(self, folder: str) -> str | None:
        """Return why a checkpoint cannot be used; a collective call, in which one process of each machine reads it."""
        folder = broadcast_object_list([folder])[0]
        reads = self.args.local_process_index == 0
        reasons = gather_object([incompleteness(folder, self.args.world_size) if reads else None])
        return next((reason for reason in reasons if reason is not None), None)

    def _describe_run(self) -> dict[str, Any]:
        sampler = make_sampler(self.args, self.train_dataset, self._train_batch_size)
        steps = total_steps(self.args, len(sampler) // self.args.gradient_accumulation_steps)
        sizes, length = self.train_dataset.sizes, self._preparing["max_length"]
        run = describe_run(self.args, self.tasks, sizes, self._train_batch_size, steps, length)
        model: Any = self.accelerator.unwrap_model(self.model)
        scheme = {key: getattr(model.config, key) for key in model.options() if key != "max_input_length"}
        run |= {"sharing": model.config.model_type, "options of the model": json.loads(json.dumps(scheme))}
        if self.gap_sampling is not None:
            run["single-task scores"] = self.gap_sampling.scores
        return run | {"streamed": isinstance(self.train_dataset, StreamingMixture)}

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
            fault: str | None = "its weights are missing"
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
            if checkpoint and state is not None:
                compare_runs(checkpoint, state["run"], self._describe_run())
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
        tasks = self.accelerator.unwrap_model(self.model).tasks
        if [task.name for task in tasks] != [task.name for task in self.tasks]:
            raise ValueError(
                f"model_init made a model of the tasks {', '.join(task.name for task in tasks)}; "
                f"the trainer was made for {', '.join(task.name for task in self.tasks)}"
            )
        self.tasks = tasks

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the random state and ours, before `Trainer` closes the checkpoint with its own state."""
        super()._save_rng_state(output_dir)
        streaming = isinstance(self.train_dataset, StreamingMixture)
        if self.tasks and streaming:
            batches = self.state.global_step * self.args.gradient_accumulation_steps
            state = self.train_dataset.state_dict(batches)
            Path(output_dir, STREAMS_NAME.format(self.args.process_index)).write_text(json.dumps(state) + "\n")
        if self.tasks and self.args.should_save:
            state = {
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
