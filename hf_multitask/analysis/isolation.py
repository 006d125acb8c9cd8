"""Measuring a model without leaving a trace in it, or in the random state of the program."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from ..models.base import MultiTaskModel

__all__ = ["replaced_heads", "undisturbed"]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside, a model is in evaluation mode and without gradients; afterwards all is as it was, errors or not.

    What comes back: the `.grad` of every parameter (the same tensors, which are out of the way meanwhile), the mode of
    every module, whether gradients are recorded, and the random state of Python, NumPy, torch and the model's
    accelerator. Weights are not saved: inside, none may be changed.

    Args:
        model: The model.
    """
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    cuda = sorted({parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"})
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=cuda), torch.enable_grad():
            for parameter, _ in gradients:
                parameter.grad = None
            model.eval()
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, training in modes:
            module.training = training
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def replaced_heads(model: MultiTaskModel, heads: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, a model has other heads; afterwards it has its own again.

    Args:
        model: The model.
        heads: The other heads, by task; tasks that are not named keep theirs.
    """
    own = {name: model.heads[name] for name in heads}
    try:
        for name, head in heads.items():
            model.heads[name] = head
        yield
    finally:
        for name, head in own.items():
            model.heads[name] = head
