"""What does a step for one task do to the loss of another? Collected while all are trained together.

The inter-task affinity of task i onto task j (Fifty et al. 2021, "Efficiently identifying task groupings for multi-task
learning", TAG) compares the loss of j before and after a step that follows the gradient of i alone, on the batch of
training step t:

    Z_{i→j} = 1 - L_j(θ_s^{t+1|i}, θ_j) / L_j(θ_s^t, θ_j)

Above 0 the step for i also helps j, below 0 it harms j. The shared parameters θ_s take the step, j's own parameters θ_j
stay. The mean over the steps of one training says what it would take a training of every pair to find out.

**Which step.** The paper's experiments take a step of the run's own optimizer, gradient descent with momentum, at its
present learning rate; here it is the optimizer's own `step`, with its state and after clipping, for the same reason: a
step of another rule or length says little about the run. But what momentum carries on from earlier steps of all tasks,
and weight decay, would move the parameters without any gradient too. They are the same for every i, and with AdamW nine
tenths of the step: every task would seem to help every other. So "before" here is after a step of the same rule with a
gradient of zeros; for plain gradient descent that is where the parameters are. The authors' code also divides by
the learning rate; here a step counts as what it does, so that the mean is that of the run.

**What is compared.** All losses are of one window (all micro-batches of an optimizer step), without dropout, label
smoothing as trained, in float32. The gradient is of L_i as it is, without share and weight. Tasks on different datasets
are measured on rows that have nothing to do with each other; tasks that read the same rows on the same ones, as they
are trained, and what they share there may be noise. The loss of j that i's step raises or lowers is one of training
rows: whether j generalizes better beside i, only training both ways shows ([`hf_multitask.compare`]).

The other measure that can be collected, `conflict`, is the cosine of the gradients of i and j on the shared parameters
in the same steps, which is symmetric and does not depend on the learning rate; [`hf_multitask.gradient_conflicts`]
measures it before training.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from ..balancing.gramian import TaskGradients
from ..models.base import MultiTaskModel
from ..models.task import Task, closest
from ..trainer import MultiTaskTrainer
from ..window import Window
from .isolation import undisturbed
from .rows import move_to

__all__ = ["METHODS", "AffinitySeries", "AffinityTrainer", "choose_every", "lookahead_affinity", "window_cosines"]

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
    step costs about two more for the T gradients and, for `affinity`, T + 1 passes forward and as many copies of the
    shared parameters and their optimizer state, one at a time.

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
        if method not in METHODS:
            raise ValueError(f"method {method!r} is not known{closest(method, METHODS)}; methods are affinity, conflict")
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f"every must be a whole number of at least 1, got {every!r}")
        super().__init__(*args, **kwargs)
        self.method, self.every = method, every
        self.measured = measured_tasks(self.model)
        self._found: dict[int, np.ndarray] = {}
        self._check_measuring()

    def _check_measuring(self) -> None:
        if self.train_dataset is None:
            raise ValueError("there is no training data: affinity is measured while the tasks are trained")
        if self.args.world_size > 1 or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError("affinity is measured on one process, without DeepSpeed or FSDP; start it without a launcher")
        if self.args.bf16 or self.args.fp16:
            raise ValueError(
                "what one step changes is less than bf16 and fp16 can tell apart; measure with bf16=False, fp16=False"
            )
        coarse = {p.dtype for p in self.model.shared_parameters() if torch.finfo(p.dtype).bits < 32}
        if coarse:
            raise ValueError(
                f"shared parameters are {', '.join(map(str, coarse))}, in which one step changes next to nothing; load "
                "the model with dtype=torch.float32"
            )

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Choose the steps that are measured, now that their number is known, and go on as the trainer does."""
        self._found = {}
        self.every = choose_every(self.state.max_steps, self.every)
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
            switch()  # schedule-free optimizers keep other weights for training; the step itself is going to ask for them
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
            f"{FEWEST_MEASURED} are needed: train for more steps" + ("" if every is None else ", or with a smaller every")
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
            f"the tasks of this {type(model).__name__} train no parameter together, so that a step for one does nothing "
            "to another: unfreeze the backbone (or add adapters that tasks share), or choose hard sharing"
        )
    return tuple(task.name for task in trained)


def lookahead_affinity(
    model: MultiTaskModel,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Mapping[str, Any]],
    window: Window,
    tasks: Sequence[str],
    max_grad_norm: float | None = None,
) -> np.ndarray:
    """Return `[T, T]` the affinity of each task (row) onto each (column) in one window; see the module's text.

    Parameters, their optimizer state and the optimizer's groups are as before afterwards; `.grad` is None.

    Args:
        model: The model, in evaluation mode, without gradients.
        optimizer: The optimizer of its parameters.
        batches: The micro-batches of the window, on the model's device.
        window: Their rows and items.
        tasks: Names of the T tasks.
        max_grad_norm: The gradient is clipped to this norm, as in training; None or 0 for not at all.

    Returns:
        NaN for tasks without rows, and where a loss is 0 or not finite.
    """
    shared = list(model.shared_parameters())
    present = [name for name in tasks if name in window.rows]
    losses = {}
    for name in (None, *present):
        try:
            if name is not None:
                _backward(model, batches, window, name, shared)
                if max_grad_norm:
                    clip_grad_norm_(shared, max_grad_norm)
            with _as_before(optimizer, shared):
                for parameter in shared:
                    # Zeros rather than None: momentum and decay must move it as they do without the task.
                    parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                optimizer.step()
                losses[name] = _losses(model, batches, window, present)
        finally:
            for parameter in shared:
                parameter.grad = None
    result = np.full((len(tasks), len(tasks)), np.nan)
    before = losses[None]
    for i, one in enumerate(tasks):
        for j, other in enumerate(tasks):
            if one in losses and other in before and before[other] > 0:
                change = 1 - losses[one][other] / before[other]
                result[i, j] = change if np.isfinite(change) else np.nan
    return result


def window_cosines(
    model: MultiTaskModel, batches: Sequence[Mapping[str, Any]], window: Window, tasks: Sequence[str]
) -> np.ndarray:
    """Return `[T, T]` the cosines of the tasks' gradients on the shared parameters in one window.

    Args:
        model: The model, in evaluation mode, without gradients.
        batches: The micro-batches of the window, on the model's device.
        window: Their rows and items.
        tasks: Names of the T tasks.

    Returns:
        NaN for tasks without rows, or without any gradient.
    """
    shared = list(model.shared_parameters())
    gradients = TaskGradients(shared, len(tasks))
    present = [index for index, name in enumerate(tasks) if name in window.rows]
    for index in present:
        _backward(model, batches, window, tasks[index], shared)
        gradients.move(index)
    result = np.full((len(tasks), len(tasks)), np.nan)
    if present:
        gramian = gradients.gramian(present).numpy()
        norms = np.sqrt(np.diagonal(gramian))
        with np.errstate(divide="ignore", invalid="ignore"):
            result[np.ix_(present, present)] = np.clip(gramian / norms[:, None] / norms, -1, 1)
    return np.where(np.isfinite(result), result, np.nan)


def _forward(
    model: MultiTaskModel, batch: Mapping[str, Any], window: Window, names: Sequence[str]
) -> dict[str, Tensor]:
    """Return a micro-batch's part of the losses of those of some tasks that have rows in it."""
    here = [name for name in names if name in batch["labels"]]
    if not here:
        return {}
    chosen = {key: {name: batch[key][name] for name in here} for key in ("segments", "labels")}
    items = {name: window.items[name] for name in here}
    return model(**{**batch, **chosen, "num_items": items, "num_tokens": window.tokens}, return_dict=True).task_losses


def _backward(
    model: MultiTaskModel, batches: Sequence[Mapping[str, Any]], window: Window, name: str, shared: list[nn.Parameter]
) -> None:
    """Put the gradient of a task's loss of the window into the shared parameters' `.grad`."""
    for batch in batches:
        for loss in _forward(model, batch, window, [name]).values():
            loss.backward(inputs=shared)


@torch.no_grad()
def _losses(
    model: MultiTaskModel, batches: Sequence[Mapping[str, Any]], window: Window, names: Sequence[str]
) -> dict[str, float]:
    """Return the losses of some tasks in the window."""
    total = dict.fromkeys(names, 0.0)
    for batch in batches:
        for name, loss in _forward(model, batch, window, names).items():
            total[name] += loss.item()
    return total


@contextmanager
def _as_before(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Afterwards some parameters and all that the optimizer knows of them are what they were, bit for bit."""
    weights = [parameter.detach().clone() for parameter in parameters]
    states = {parameter: optimizer.state[parameter] for parameter in parameters if parameter in optimizer.state}
    groups = [dict(group) for group in optimizer.param_groups]
    try:
        for parameter, state in states.items():
            optimizer.state[parameter] = copy.deepcopy(state)
        for group, known in zip(optimizer.param_groups, groups, strict=True):
            group.update({key: copy.deepcopy(value) for key, value in known.items() if key != "params"})
        yield
    finally:
        with torch.no_grad():
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.copy_(weight)
        for parameter in parameters:
            optimizer.state.pop(parameter, None)
        optimizer.state.update(states)
        for group, known in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(known)
