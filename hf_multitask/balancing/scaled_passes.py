"""Coefficients in a pass that all tasks take together: gradients are scaled where they leave the heads.

That is right for what tasks share, and wrong for what a task trains for itself below its head (adapters, conditioning
vectors): such parameters are to get their plain gradient. So what they got is divided by the scale again; and a scale
of 0, after which nothing would be left to divide, is replaced by a very small one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

__all__ = ["passing_scales", "undo_scales"]

_LEAST = 1e-6


def _below_head(model: Any, name: str) -> Iterator[nn.Parameter]:
    head = {id(parameter) for parameter in model.heads[name].parameters()}
    return (parameter for parameter in model.task_parameters(name) if id(parameter) not in head)


def passing_scales(model: Any, coefficients: Sequence[float]) -> dict[str, float]:
    """Return, by task, what gradients are multiplied with on their way from the task's head into the backbone.

    Args:
        model: The multi-task model.
        coefficients: Of each task, in the model's order.

    Returns:
        The coefficients; where tasks train something below their heads, none is smaller than 1e-6.
    """
    scales = {task.name: value for task, value in zip(model.tasks, coefficients, strict=True)}
    if not any(True for name in scales for _ in _below_head(model, name)):
        return scales
    return {name: value if abs(value) >= _LEAST else _LEAST for name, value in scales.items()}


def undo_scales(model: Any, scales: Mapping[str, float]) -> None:
    """Give what tasks train for themselves below their heads its plain gradient back, at the end of a window."""
    for name, scale in scales.items():
        for parameter in _below_head(model, name):
            if parameter.grad is not None and scale != 1.0:
                parameter.grad.div_(scale)
