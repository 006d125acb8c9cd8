"""What does a step for one task do to the loss of another? Collected while all are trained together.

In some steps of a training it is measured what a step along the gradient of each task alone would do to the loss of
each, the inter-task affinity of Fifty et al. (2021, "Efficiently identifying task groupings for multi-task learning",
TAG; see [`hf_multitask.analysis.lookahead`] for what exactly). The mean over the steps of one training says what it
would take a training of every pair to find out.

Tasks on different datasets are measured on rows that have nothing to do with each other; tasks that read the same rows
on the same ones, as they are trained, and what they share there may be noise. The losses are of training rows: whether
a task generalizes better beside another, only training both ways shows ([`hf_multitask.compare`]).

The other measure that can be collected, `conflict`, is the cosine of the gradients of two tasks on the shared
parameters in the same steps, which is symmetric and does not depend on the learning rate;
[`hf_multitask.gradient_conflicts`] measures it before training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..models.base import MultiTaskModel
from ..models.task import Task, closest
from ..trainer import MultiTaskTrainer
from ..window import Window
from .isolation import undisturbed
from .lookahead import lookahead_affinity, window_cosines
from .rows import move_to

__all__ = ["METHODS", "AffinitySeries", "AffinityTrainer", "check_method", "choose_every", "measured_tasks"]

METHODS = ("affinity", "conflict")
FEWEST_MEASURED = 10  # steps: a mean of fewer has no interval worth the name
_EVERY = 10  # as the paper's code does
_WANTED = 50  # measured steps


class AffinitySeries(NamedTuple):
    """What was measured in the steps of a training.

    Args:
        tasks: Names of the T tasks that are trained.
        steps: Numbers of the K steps, the first being 0.
        values: `[K, T, T]`, in row i and column j what i does to j; NaN where a step had no rows of one of them.
    """

    tasks: tuple[str, ...]
    steps: tuple[int, ...]
    values: np.ndarray


class AffinityTrainer(MultiTaskTrainer):
    """A [`MultiTaskTrainer`] that measures affinity, or conflict, in some of its steps.

    The training itself is not touched: it ends with the same weights, bit for bit, as without measuring. A measured
    step costs about one step more for the T gradients (for tasks that read the same rows, a pass of these for each)
    and, for `affinity`, T + 1 passes forward and a copy of the shared parameters and of their optimizer state; for
    `conflict` T gradients in memory.

    Args:
        *args: As for [`MultiTaskTrainer`].
        method: `affinity`, or `conflict`, the cosine of the gradients.
        every: Measure every so many optimizer steps (default: 10, or less, so that 50 steps are measured).
        **kwargs: As for [`MultiTaskTrainer`].

    Raises:
        TypeError: The model is no `MultiTaskModel`.
        ValueError: The method is unknown, or there is nothing to measure: fewer than two tasks are trained, no
            parameter is shared, there is no training data, or the run is in a precision or on a backend in which
            the small differences cannot be seen.

    Example:
        >>> trainer = AffinityTrainer(model, args, train_dataset=rows, processing_class=tokenizer)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> trainer.series().values.mean(0)  # doctest: +SKIP
    """

    def __init__(self, *args: Any, method: str = "affinity", every: int | None = None, **kwargs: Any) -> None:
        check_method(method)
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f"every must be a whole number of at least 1, got {every!r}")
        super().__init__(*args, **kwargs)
        self.method, self._wanted_every = method, every
        self.every: int | None = None  # chosen when the number of steps is known
        self.measured = measured_tasks(self.model)
        self._found: dict[int, np.ndarray] = {}
        self._check_measuring()

    def _check_measuring(self) -> None:
        if self.train_dataset is None:
            raise ValueError("there is no training data: affinity is measured while the tasks are trained")
        if self.args.world_size > 1 or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "affinity is measured on one process, without DeepSpeed or FSDP; start it without a launcher"
            )
        if self.args.bf16 or self.args.fp16:
            raise ValueError(
                "what one step changes is less than bf16 and fp16 can tell apart; measure with bf16=False, fp16=False"
            )
        if self.args.batch_composition == "single_task" and self.args.gradient_accumulation_steps == 1:
            raise ValueError(
                "with batch_composition='single_task' tasks never come together in a step; set 'mixed', or "
                "gradient_accumulation_steps to a few batches"
            )
        model: Any = self.model
        coarse = {p.dtype for p in model.shared_parameters() if torch.finfo(p.dtype).bits < 32}
        if coarse:
            raise ValueError(
                f"shared parameters are {', '.join(map(str, coarse))}, in which one step changes next to nothing; load "
                "the model with dtype=torch.float32"
            )

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Choose the steps that are measured, now that their number is known, and go on as the trainer does."""
        self._found = {}
        self.every = choose_every(self.state.max_steps, self._wanted_every)
        return super()._prepare_for_training(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Collect the micro-batches of an optimizer step, and measure it where it is its turn, before it is made."""
        batches, window = super().get_batch_samples(epoch_iterator, num_batches, device)
        step = self.state.global_step
        if batches and self.every is not None and (step + 1) % self.every == 0:
            values = self._measure(batches, window)
            if values is not None:
                self._found[step] = values
        return batches, window

    def _measure(self, batches: Sequence[Mapping[str, Any]], window: Window) -> np.ndarray | None:
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # without accelerate's wrapper
        if not any(group["lr"] for group in optimizer.param_groups):
            return None  # the first step of a warm-up goes nowhere
        switch = getattr(optimizer, "train", None)
        if callable(switch):
            switch()  # schedule-free optimizers keep other weights for training; the step asks for them anyway
        model: Any = self.accelerator.unwrap_model(self.model)
        with undisturbed(model):
            on_device = [move_to(model.device, batch) for batch in batches]
            if self.method == "conflict":
                return window_cosines(model, on_device, window, self.measured)
            return lookahead_affinity(model, optimizer, on_device, window, self.measured, self.args.max_grad_norm)

    def series(self) -> AffinitySeries:
        """Return what was measured so far.

        Raises:
            ValueError: Two tasks never came together in a measured step.
        """
        size = len(self.measured)
        values = np.array(list(self._found.values())).reshape(-1, size, size)
        never = np.argwhere(~np.isfinite(values).any(0))
        if len(never):
            i, j = never[0]
            raise ValueError(
                f"{self.measured[i]!r} and {self.measured[j]!r} came together in none of the {len(values)} measured "
                "steps; train with more rows per step (per_device_train_batch_size, gradient_accumulation_steps), "
                "batch_composition='mixed', or task_sampling='uniform'"
            )
        return AffinitySeries(self.measured, tuple(self._found), values)


def check_method(method: Any) -> None:
    """Raise ValueError for a method that there is not."""
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not known{closest(method, METHODS)}; choose from {', '.join(METHODS)}")


def choose_every(steps: int, every: int | None = None) -> int:
    """Return every how many steps a run is measured.

    Args:
        steps: Optimizer steps of the run.
        every: What was asked for; None for 10, or less, so that about 50 steps are measured.

    Raises:
        ValueError: That leaves too few measured steps.

    Example:
        >>> choose_every(2000), choose_every(200)
        (10, 4)
    """
    chosen = max(1, min(_EVERY, steps // _WANTED)) if every is None else every
    if steps // chosen < FEWEST_MEASURED:
        raise ValueError(
            f"{steps} steps of which every {chosen} is measured are {steps // chosen} measured steps, and at least "
            f"{FEWEST_MEASURED} are needed: train for more steps"
            + ("" if every is None else ", or with a smaller every")
        )
    return chosen


def measured_tasks(model: Any) -> tuple[str, ...]:
    """Return the names of the tasks that a training trains: not held out, and of a weight above 0.

    Raises:
        TypeError: The model is no `MultiTaskModel`.
        ValueError: Fewer than two are trained, or they share no parameter.
    """
    if not isinstance(model, MultiTaskModel):
        raise TypeError(f"affinity is between the tasks of a MultiTaskModel, got {type(model).__name__}")
    trained: list[Task] = [task for task in model.tasks if not task.held_out and task.weight > 0]
    if len(trained) < 2:
        raise ValueError(f"affinity is between tasks, and only {trained[0].name!r} is trained")
    if next(model.shared_parameters(), None) is None:
        raise ValueError(
            f"the tasks of this {type(model).__name__} train no parameter together, so that a step for one does "
            "nothing to another: unfreeze the backbone (or add adapters that tasks share), or choose hard sharing"
        )
    return tuple(task.name for task in trained)
