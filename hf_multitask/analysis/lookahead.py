"""What one task's step does to the others' losses, in one window; the model and its optimizer stay as they are.

The inter-task affinity of task i onto task j (Fifty et al. 2021, "Efficiently identifying task groupings for multi-task
learning", TAG) compares the loss of j before and after a step that follows the gradient of i alone, on the batch of
training step t:

    Z_{i→j} = 1 - L_j(θ_s^{t+1|i}, θ_j) / L_j(θ_s^t, θ_j)

Above 0 the step for i also helps j, below 0 it harms j. The shared parameters θ_s take the step, j's own parameters θ_j
stay.

**Which step.** The paper's experiments take a step of the run's own rule, gradient descent with momentum, at its
present learning rate. Here it is the optimizer's own `step`, with its state and after clipping, for the same reason: a
step of another rule or length says little about the run. But what momentum carries on from earlier steps of all tasks,
and weight decay, would move the parameters without any gradient too. They are the same for every i, and with AdamW nine
tenths of the step: every task would seem to help every other. So "before" here is after a step of the same rule with a
gradient of zeros; for plain gradient descent that is where the parameters are. The authors' code also divides by the
learning rate; here a step counts as what it does.

**What is compared.** Losses of all rows of the window (all micro-batches of an optimizer step), without dropout. The
gradient is of L_i as it is, without share and weight, clipped to the run's largest norm by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from ..balancing.gramian import TaskGradients
from ..models.base import MultiTaskModel
from ..window import Window

__all__ = ["lookahead_affinity", "window_cosines"]


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
        NaN for tasks without labelled rows, and where a loss is 0 or not finite.
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
        NaN for tasks without labelled rows, or without any gradient.
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


def _row_losses(
    model: MultiTaskModel, batch: Mapping[str, Any], window: Window, names: Sequence[str]
) -> dict[str, Tensor]:
    """Return, for those of some tasks that have rows in a micro-batch, the losses of these rows."""
    here = [name for name in names if name in batch["labels"]]
    if not here:
        return {}
    chosen = {key: {name: batch[key][name] for name in here} for key in ("segments", "labels")}
    items = {name: window.items[name] for name in here}
    return model(**{**batch, **chosen, "num_items": items, "num_tokens": window.tokens}, return_dict=True).row_losses


def _backward(
    model: MultiTaskModel, batches: Sequence[Mapping[str, Any]], window: Window, name: str, shared: list[nn.Parameter]
) -> None:
    """Put the gradient of a task's loss of the window into the shared parameters' `.grad`."""
    for batch in batches:
        for losses in _row_losses(model, batch, window, [name]).values():
            (losses.sum() / window.items[name]).backward(inputs=shared)


@torch.no_grad()
def _losses(
    model: MultiTaskModel, batches: Sequence[Mapping[str, Any]], window: Window, names: Sequence[str]
) -> dict[str, float]:
    """Return the losses of some tasks in the window; what differs is small, so rows are added up in float64."""
    total = dict.fromkeys(names, 0.0)
    for batch in batches:
        for name, losses in _row_losses(model, batch, window, names).items():
            total[name] += losses.double().sum().item() / window.items[name]
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
        for parameter, state in states.items():
            optimizer.state[parameter] = state
        for group, known in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(known)
