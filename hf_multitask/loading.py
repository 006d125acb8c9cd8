"""The loader of mixed batches that some training arguments ask for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import seed_worker

from .data.dataset import MultiTaskDataset
from .data.sampling import SIZELESS, follows_progress, mixing_probabilities
from .data.schedule import MOST_PERIODS, MultiTaskBatchSampler, ShareChanges, windows_per_epoch
from .data.sources import Source
from .data.streaming import StreamingMixture, StreamSampler, prepare_streams, stream_sizes
from .training_args import MultiTaskTrainingArguments

__all__ = ["make_loader", "make_sampler", "make_streams", "shares_over_training", "total_steps"]


def make_sampler(
    args: MultiTaskTrainingArguments,
    dataset: MultiTaskDataset | StreamingMixture,
    rows_per_batch: int,
    changes: ShareChanges | None = None,
) -> MultiTaskBatchSampler:
    """Return the batch sampler that some arguments ask for.

    Args:
        args: The arguments; their rank, processes and accumulation are the sampler's.
        dataset: The rows.
        rows_per_batch: Rows of a micro-batch on one process.
        changes: Probabilities that are found out in the course of training.
    """
    sizes = dataset.sizes
    window = rows_per_batch * args.gradient_accumulation_steps * args.world_size
    windows = windows_per_epoch(sum(sizes.values()), window, args.dataloader_drop_last)
    steps = total_steps(args, windows)
    lengths = None
    if args.train_sampling_strategy == "group_by_length" and isinstance(dataset, MultiTaskDataset):
        lengths = dataset.lengths

    probabilities, windows_per_period = shares_over_training(
        args.task_sampling, sizes, args.mixing_kwargs, steps, window
    )
    return (StreamSampler if isinstance(dataset, StreamingMixture) else MultiTaskBatchSampler)(
        sizes,
        probabilities,
        rows_per_batch=rows_per_batch,
        accumulation=args.gradient_accumulation_steps,
        num_processes=args.world_size,
        process_index=args.process_index,
        seed=args.data_seed if args.data_seed is not None else args.seed,
        composition=args.batch_composition,
        drop_last=args.dataloader_drop_last,
        lengths=lengths,
        changes=changes,
        windows_per_period=windows_per_period,
    )


def shares_over_training(
    strategy: str, sizes: Mapping[str, int], kwargs: Mapping[str, Any], steps: int, window: int
) -> tuple[Callable[[int], list[float]], int | None]:
    """Return the shares of a training by period, and the optimizer steps of a period (None: an epoch).

    Where shares follow the progress of the training, a period is one step, or as many as make at most
    [`MOST_PERIODS`][hf_multitask.data.schedule.MOST_PERIODS] periods.

    Args:
        strategy: A key of `MIXING`.
        sizes: Rows by source.
        kwargs: The strategy's own arguments.
        steps: Optimizer steps of the whole training.
        window: Rows of an optimizer step.
    """
    moves = follows_progress(strategy)
    length = -(-steps // MOST_PERIODS)
    last = -(-steps // length) - 1 if moves else 0

    def probabilities(period: int) -> list[float]:
        progress = min(period / last, 1.0) if last else 0.0
        return mixing_probabilities(strategy, sizes, kwargs, progress=progress, total_rows=steps * window)

    return probabilities, length if moves else None


def total_steps(args: TrainingArguments, windows: int) -> int:
    """Return the optimizer steps of the whole training, with `windows` steps per epoch."""
    return args.max_steps if args.max_steps > 0 else math.ceil(windows * args.num_train_epochs)


def make_loader(
    args: MultiTaskTrainingArguments,
    dataset: MultiTaskDataset | StreamingMixture,
    collate: Callable[[list], dict],
    rows_per_batch: int,
    accelerator: Any,
    changes: ShareChanges | None = None,
) -> DataLoader:
    """Return the prepared training loader: rank-aware, its order a pure function of seed, epoch and changes of shares.

    Args:
        args: The training arguments.
        dataset: The rows.
        collate: The collator.
        rows_per_batch: Rows of a micro-batch on one process.
        accelerator: The trainer's accelerator, which moves batches to the device.
        changes: Probabilities that are found out in the course of training; looked up as rows are drawn.
    """
    if isinstance(dataset, StreamingMixture):
        dataset.remember(args.gradient_accumulation_steps + 3)
    sampler = make_sampler(args, dataset, rows_per_batch, changes)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        prefetch_factor=args.dataloader_prefetch_factor,
        in_order=args.dataloader_in_order,
        worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
    )
    loader = accelerator.prepare(loader)
    if args.world_size > 1:
        # The sampler knows its rank: Accelerate's wrapper must pass its batches on, and its epochs in.
        loader.batch_sampler.num_processes = 1
        loader.batch_sampler.process_index = 0
        loader.batch_sampler.sampler = sampler
    return loader


def make_streams(
    args: MultiTaskTrainingArguments,
    datasets: Mapping[str, Any],
    sources: Sequence[Source],
    argument: str,
    **options: Any,
) -> StreamingMixture:
    """Return the mixture of streams that some arguments ask for.

    Args:
        args: The training arguments.
        datasets: By name; at least one is a stream.
        sources: The sources of the model's tasks.
        argument: Name of the argument that the datasets came by, for messages.
        **options: `tokenizer`, `max_length` and `split`, as for [`hf_multitask.data.streaming.prepare_streams`].

    Raises:
        ValueError: A length is not known, or an argument does not go with streams.
    """
    if args.dataloader_num_workers:
        raise ValueError(
            "dataloader_num_workers does not go with streamed datasets: every worker would read the whole stream; "
            "set it to 0"
        )
    if args.train_sampling_strategy == "group_by_length":
        raise ValueError(
            "train_sampling_strategy='group_by_length' does not go with streamed datasets: the lengths of rows to come "
            "are not known"
        )
    assumed = None
    if args.max_steps > 0 and args.task_sampling in SIZELESS:
        window = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        assumed = -(-args.max_steps * window // len(datasets))
    return prepare_streams(
        datasets,
        sources,
        stream_sizes(datasets, args.stream_sizes, argument, assumed),
        seed=args.data_seed if args.data_seed is not None else args.seed,
        num_processes=args.world_size,
        process_index=args.process_index,
        **options,
    )
