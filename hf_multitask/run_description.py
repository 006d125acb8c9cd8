"""What makes two runs the same: everything that decides the result of a training, compared when one is resumed.

A run goes on from a checkpoint bit for bit only if rows, model and arguments are those of the run that wrote it. The
description of a run holds all of them: the tasks, the content of the training rows, the configuration of the model, and
every training argument other than those of [`WITHOUT_EFFECT`], so that an argument that a new version adds is compared
from the start. A difference is an error that names it. Some arguments may be changed on purpose ([`CHANGEABLE`]).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedConfig

from .data.dataset import MultiTaskDataset
from .data.sampling import follows_progress
from .models.limits import shown
from .models.task import Task, closest
from .models.weight_schedule import depends_on_length
from .training_args import MultiTaskTrainingArguments

__all__ = [
    "CHANGEABLE",
    "WITHOUT_EFFECT",
    "check_changes",
    "compare_runs",
    "describe_given",
    "describe_run",
    "hash_rows",
    "keep_settings",
]

_LENGTH = "steps of the whole training"
_OF_OPTIMIZER = ("learning_rate", "backbone_learning_rate", "head_learning_rate", "weight_decay")
_GROUPING = ("backbone_learning_rate", "head_learning_rate")
_OF_SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", _LENGTH)

# Arguments that decide where, how often and how fast, but not what comes out.
WITHOUT_EFFECT = frozenset(
    """
    output_dir logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter
    include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id
    trackio_bucket_id trackio_static_space_id per_device_eval_batch_size prediction_loss_only eval_do_concat_batches
    eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics save_only_model
    save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub hub_token hub_private_repo
    hub_model_id hub_strategy hub_always_push hub_revision hub_include_code restore_callback_states_from_checkpoint
    use_cpu dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context remove_unused_columns label_names length_column_name
    ddp_find_unused_parameters ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
    deepspeed debug skip_memory_metrics do_train do_eval do_predict resume_from_checkpoint local_rank
    auto_find_batch_size torch_empty_cache_steps activation_checkpointing activation_checkpointing_kwargs
    gradient_checkpointing gradient_checkpointing_kwargs use_cache
    dataset_num_proc conflict_logging_steps dataset_sizes
    """.split()
)

# An evaluation draws from the random state, like all that is loaded: when there is one decides the dropout after it.
_OF_EVALUATION = ("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "load_best_model_at_end")
# They decide which checkpoint is kept, or feed `performance_gap` sampling; otherwise nothing depends on them.
_OF_JUDGING = (
    "max_eval_samples",
    "predict_with_generate",
    "metric_for_best_model",
    "greater_is_better",
    "primary_task",
)
# They decide which checkpoints there are to choose the best of.
_OF_SAVING = ("save_strategy", "save_steps")
# In the description by other names, or as they are resolved.
_DESCRIBED = frozenset(
    """
    max_length task_sampling task_sampling_kwargs batch_composition loss_reduction data_seed per_device_train_batch_size
    gradient_accumulation_steps dataloader_drop_last train_sampling_strategy loss_weighting loss_weighting_kwargs
    gradient_combination gradient_combination_kwargs auxiliary_gating combination_every gradient_memory max_steps
    num_train_epochs
    """.split()
)

CHANGEABLE = (
    *_OF_OPTIMIZER,
    "max_grad_norm",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_steps",
    "num_train_epochs",
    "on_nonfinite_loss",
    "bf16",
    "fp16",
    "tf32",
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
    *_OF_EVALUATION,
    *_OF_JUDGING,
    *_OF_SAVING,
)
"""Arguments that a resumed run may change when it is told to; all of them apply from the checkpoint on."""

# Of a task, what nothing but its evaluation depends on, or what is resolved from the rows.
_NOT_OF_TRAINING = frozenset({"metric", "greater_is_better", "generation", "max_answer_length", "null_answers"})
# Strategies whose probabilities depend on how long the whole training is.
_NEED_LENGTH = ("annealed", "unimax")
_WITHOUT_LENGTH = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau")
# In descriptions of versions after 0.1.0.
_NEWER = ("arguments", "model", "content of the training rows", "given to the trainer")
# Of a model's configuration: compared elsewhere, written while it is saved, or taken over from the tokenizer.
_NOT_OF_MODEL = frozenset(
    """
    tasks architectures dtype transformers_version auto_map use_cache max_input_length bos_token_id eos_token_id
    pad_token_id config_version
    """.split()
)


def describe_run(
    args: MultiTaskTrainingArguments,
    tasks: Sequence[Task],
    sizes: Mapping[str, int],
    rows_per_batch: int,
    steps: int,
    max_length: int,
    config: PreTrainedConfig | None = None,
    rows: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return what must stay the same when a run goes on from a checkpoint, as plain JSON types.

    Args:
        args: The training arguments.
        tasks: The model's tasks.
        sizes: Training rows by source.
        rows_per_batch: Rows of a micro-batch on one process.
        steps: Optimizer steps of the whole training.
        max_length: Longest input in tokens, where a task sets none.
        config: The model's configuration.
        rows: Hashes of the training rows by source, from [`hash_rows`].
    """
    run: dict[str, Any] = {
        "tasks": [
            {key: value for key, value in task.to_dict().items() if key not in _NOT_OF_TRAINING} for task in tasks
        ],
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
        "arguments": _arguments(args),
        "model": dict(_settings(config)) if config is not None else {},
        "content of the training rows": dict(rows or {}),
    }
    if args.auxiliary_gating is not None:
        run["primary_task"] = args.primary_task
    if follows_progress(args.task_sampling):
        run["shares"] = "change with each step"  # in version 0.1.0 they changed with each epoch
    if _depends_on_length(args) or any(depends_on_length(task.weight_schedule) for task in tasks):
        run[_LENGTH] = steps
    return json.loads(json.dumps(run, default=str))


def _name(method: Any) -> str:
    return method if isinstance(method, str) else type(method).__name__


def _depends_on_length(args: MultiTaskTrainingArguments) -> bool:
    by_length = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)) not in _WITHOUT_LENGTH
    warmup = 0 < (args.warmup_steps or 0) < 1  # a fraction of all steps
    return args.task_sampling in _NEED_LENGTH or by_length or warmup


def _arguments(args: MultiTaskTrainingArguments) -> dict[str, Any]:
    """Return the arguments that can change results and are not described elsewhere."""
    judged = args.load_best_model_at_end or args.task_sampling == "performance_gap"
    left_out = WITHOUT_EFFECT | _DESCRIBED | (set() if judged else {*_OF_JUDGING})
    left_out |= set() if args.load_best_model_at_end else {*_OF_SAVING}
    return {key: value for key, value in args.to_dict().items() if key not in left_out and not key.startswith("_")}


def _settings(config: PreTrainedConfig) -> Iterator[tuple[str, Any]]:
    """Yield the settings of a model's configuration by dotted name; those of the backbone are in it."""

    def walk(values: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
        for key, value in sorted(values.items()):
            if str(key).startswith("_") or key in _NOT_OF_MODEL:
                continue
            if isinstance(value, Mapping) and value:
                yield from walk(value, f"{path}{key}.")
            else:
                yield f"{path}{key}", value

    yield from walk(config.to_dict(), "")


# ---- the rows ----


def hash_rows(dataset: MultiTaskDataset) -> dict[str, str]:
    """Return the SHA-256, in hexadecimal, of the prepared rows of each source: all columns, values and their order.

    How the rows are cut into pieces on the disk makes no difference.
    """
    hashes = {}
    for source, rows in zip(dataset.sources, dataset.rows, strict=True):
        digest = hashlib.sha256()
        for name in sorted(rows.column_names):
            digest.update(f"{name} {rows.features[name]}\n".encode())
            for part in _hash_column(rows.data.column(name)):
                digest.update(part)
        hashes[source.name] = digest.hexdigest()
    return hashes


def _hash_column(column: pa.ChunkedArray) -> Iterator[bytes]:
    """Yield the hashes of a column's lengths, missing values and values, each over all of its pieces."""
    streams: dict[str, Any] = {}

    def add(array: pa.Array, level: int) -> None:
        def update(kind: str, values: pa.Array) -> None:
            known = streams.setdefault(f"{level} {kind}", hashlib.sha256())
            known.update(memoryview(values.to_numpy(zero_copy_only=False)).cast("B"))

        if array.null_count:
            update("missing", array.is_null().cast(pa.uint8()))
        if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
            update("length", pc.fill_null(pc.list_value_length(array), 0).cast(pa.int64()))
            add(array.flatten(), level + 1)
        elif pa.types.is_boolean(array.type):
            update("value", pc.fill_null(array, False).cast(pa.uint8()))
        elif pa.types.is_integer(array.type) or pa.types.is_floating(array.type):
            update("value", pc.fill_null(array, 0))
        else:  # texts, and whatever else only evaluation reads
            known = streams.setdefault(f"{level} value", hashlib.sha256())
            for value in array.to_pylist():
                known.update(json.dumps(value, default=str).encode() + b"\n")

    for chunk in column.chunks:
        if len(chunk):
            add(chunk, 0)
    for kind in sorted(streams):
        yield kind.encode() + streams[kind].digest()


# ---- comparing ----


def check_changes(names: Iterable[str]) -> tuple[str, ...]:
    """Return the arguments that a resumed run is allowed to change.

    Raises:
        ValueError: One is not in [`CHANGEABLE`].
    """
    chosen = (names,) if isinstance(names, str) else tuple(names)
    for name in chosen:
        if name not in CHANGEABLE:
            raise ValueError(
                f"allow_changes: {name!r} cannot be changed when a run is resumed{closest(name, CHANGEABLE)}; what can "
                f"be is {', '.join(CHANGEABLE)}. With other rows, tasks or models start a new run from the weights of "
                "the checkpoint: from_pretrained(checkpoint)"
            )
    return chosen


def compare_runs(
    checkpoint: str | Path, saved: Mapping[str, Any], now: Mapping[str, Any], allowed: Iterable[str] = ()
) -> dict[str, str]:
    """Check that a run is the one a checkpoint was written by.

    Args:
        checkpoint: The checkpoint.
        saved: The description that it holds. What one of version 0.1.0 does not hold is not compared.
        now: The description of the run that is going to be resumed.
        allowed: Names of [`CHANGEABLE`] that may differ.

    Returns:
        What differs and may, in words by name.

    Raises:
        ValueError: They differ; every difference is named.
    """
    permitted = {*allowed}
    if permitted & {"max_steps", "num_train_epochs"}:
        permitted.add(_LENGTH)
    both = (saved.get("arguments", {}), now.get("arguments", {}))
    # With or without a rate of their own, the optimizer's parameters are in other groups than in the checkpoint.
    fixed = {name for name in _GROUPING if len({arguments.get(name) is None for arguments in both}) == 2}
    permitted -= fixed
    differences: list[tuple[str, str]] = []
    older = saved.keys().isdisjoint(_NEWER)
    for key in dict.fromkeys([*saved, *now]):
        before, after = saved.get(key), now.get(key)
        if before == after or (older and key not in saved and key not in ("primary_task", "shares")):
            continue
        if key in _NEWER and before is None:
            differences.append((key, f"{key}: not in the checkpoint"))
        elif key == "tasks":
            differences += [(key, line) for line in _compare_tasks(before or [], after or [], older)]
        elif key in ("arguments", "model", "content of the training rows"):
            differences += _compare_settings(key, before or {}, after or {})
        else:
            differences.append((key, f"{key}: {shown(before)} in the checkpoint, {shown(after)} now"))
    refused = [line for name, line in differences if name not in permitted]
    if refused:
        names = [name for name, _ in differences if name in CHANGEABLE and name not in permitted | fixed]
        names += ["max_steps"] if any(name == _LENGTH and name not in permitted for name, _ in differences) else []
        only = len(names) == len(refused)
        change = f", or allow the change: allow_changes={names}" if names and only else ""
        raise ValueError(
            f"cannot go on from {str(checkpoint)!r}, it is of another run:\n  "
            + "\n  ".join(refused)
            + f"\nRun with what the checkpoint has{change}, or start a new run from its weights: "
            "from_pretrained(checkpoint)."
        )
    return dict(differences)


def _compare_settings(key: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, str]]:
    if key == "content of the training rows":
        changed = [name for name in dict.fromkeys([*before, *after]) if before.get(name) != after.get(name)]
        return [
            (key, f"training rows of {name!r}: other rows, or in another order, than in the checkpoint")
            for name in changed
        ]
    where = "the model's " if key == "model" else ""
    return [
        (
            name if key == "arguments" else key,
            f"{where}{name}: {_shown(before, name)} in the checkpoint, {_shown(after, name)} now",
        )
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]


def _shown(values: Mapping[str, Any], name: str) -> str:
    return shown(values[name]) if name in values else "not set"


def _compare_tasks(before: list[dict[str, Any]], after: list[dict[str, Any]], older: bool) -> list[str]:
    old, new = [str(task["name"]) for task in before], [str(task["name"]) for task in after]
    if old != new:
        return [f"tasks: {', '.join(old)} in the checkpoint, {', '.join(new)} now"]
    return [
        f"task {a['name']!r}, {key}: {shown(a.get(key))} in the checkpoint, {shown(b.get(key))} now"
        for a, b in zip(before, after, strict=True)
        for key in dict.fromkeys([*a, *b])
        if a.get(key) != b.get(key) and not (older and key not in a)  # version 0.1.0 wrote fewer fields
    ]


# ---- what the user gave to the trainer ----


def describe_given(collator: Any, optimizer: Any, scheduler: Any) -> dict[str, Any]:
    """Return what can be told of a collator, and of an optimizer and a schedule of the user's own: class and settings.

    Args:
        collator: The collator; its public attributes that are plain values are its settings.
        optimizer: The optimizer that the trainer was given, or None.
        scheduler: Its schedule, or None.
    """
    given: dict[str, Any] = {"collator": {"class": type(collator).__qualname__, **_plain(vars(collator))}}
    if optimizer is not None:
        given["optimizer"] = {"class": type(optimizer).__qualname__, **_plain(getattr(optimizer, "defaults", {}))}
    if scheduler is not None:
        given["scheduler"] = {"class": type(scheduler).__qualname__}
    return given


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    kinds = (str, int, float, bool, type(None))
    found = {}
    for key, value in values.items():
        parts = value if isinstance(value, (list, tuple)) else [value]
        if not key.startswith("_") and all(isinstance(part, kinds) for part in parts):
            found[key] = list(parts) if isinstance(value, (list, tuple)) else value
    return found


def changes_optimizer(changes: Iterable[str]) -> bool:
    """Return whether the optimizer or the schedule of its learning rate is among some changes of [`compare_runs`]."""
    return not {*changes}.isdisjoint({*_OF_OPTIMIZER, *_OF_SCHEDULE})


def keep_settings(optimizer: Any, scheduler: Any, groups: Sequence[Mapping[str, Any]], rates: Sequence[float]) -> None:
    """Give an optimizer and its scheduler the settings back that a checkpoint's state has overwritten.

    Moments and step counts are the checkpoint's; learning rates, their schedule and weight decay are the run's own.

    Args:
        optimizer: The optimizer, after its state was loaded.
        scheduler: Its scheduler, a `LambdaLR`, after its state was loaded.
        groups: The settings of the parameter groups before.
        rates: The scheduler's base learning rates before.

    Raises:
        ValueError: The scheduler's rate is not a function of the step, so that the new one cannot be found.
    """
    inner = getattr(scheduler, "scheduler", scheduler)
    if not isinstance(inner, LambdaLR):
        raise ValueError(
            f"allow_changes is not supported with {type(inner).__name__}: its learning rate depends on the steps that "
            "came before"
        )
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        group.update({key: value for key, value in before.items() if key != "params"})
    inner.base_lrs = [*rates]
    now = [rate * factor(inner.last_epoch) for rate, factor in zip(rates, inner.lr_lambdas, strict=True)]
    for group, rate in zip(optimizer.param_groups, now, strict=True):
        group["lr"] = rate
    inner._last_lr = [*now]
