"""The part of the trainer that deals with losses that are NaN or infinite."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .balanced_step import MultiTaskBalancing
from .data.schedule import ShareChanges
from .data.sources import Source
from .data.streaming import StreamingMixture
from .guard import BadLoss, NonFiniteLossError
from .loading import make_sampler

__all__ = ["MultiTaskGuarding"]

logger = logging.get_logger(__name__)


class MultiTaskGuarding(MultiTaskBalancing):
    """Raises before a step with a loss that is not finite, or leaves the step out."""

    train_dataset: Any
    share_changes: ShareChanges
    _sources: list[Source]

    def _stop_or_skip(self, model: nn.Module, bad: list[BadLoss]) -> None:
        """Deal with a window in which some loss is not finite: raise, or take its gradients away."""
        step = self.state.global_step
        lines = [f"task {b.task!r}: {self._describe_rows(b)}" for b in bad] or ["on another process"]
        message = f"a loss of step {step} is NaN or infinite:\n  " + "\n  ".join(lines)
        if self.args.on_nonfinite_loss == "raise":
            raise NonFiniteLossError(
                f"{message}\nNothing was changed by this step; checkpoints written before it are good. "
                "Mend the rows or the learning rate, or set on_nonfinite_loss='skip'."
            )
        self.guard.skipped += 1
        logger.warning(f"{message}\nThe step is skipped ({self.guard.skipped} so far).")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if self.accelerator.scaler is None:
            for parameter in trained:
                parameter.grad = None
        else:
            # The scaler wants gradients, and skips a step with such ones; an infinite loss may have finite ones.
            for parameter in [p for p in trained if p.grad is not None] or trained[:1]:
                parameter.grad = torch.full_like(parameter, float("inf"))
        if self._gradients is not None:
            self._gradients.clear()
        self._window_losses, self._window_inputs, self._added = {}, [], {}

    def _describe_rows(self, bad: BadLoss) -> str:
        """Return which rows of its dataset a bad loss came from; the order of the rows can be looked up again."""
        source = next(s for s in self._sources if any(task.name == bad.task for task in s.tasks))
        if isinstance(self.train_dataset, StreamingMixture):
            number = self.state.global_step * self.args.gradient_accumulation_steps + bad.micro_batch + 1
            own = self.train_dataset.places(number, source.name)
            return f"row(s) {', '.join(own[place] for place in bad.places)} of dataset {source.dataset!r}"
        sampler = make_sampler(self.args, self.train_dataset, self._train_batch_size, self.share_changes)
        accumulation = self.args.gradient_accumulation_steps
        epoch, window = divmod(self.state.global_step, len(sampler) // accumulation)
        sampler.set_epoch(epoch)
        batch = next(itertools.islice(sampler, window * accumulation + bad.micro_batch, None))
        own = [str(row) for name, row in map(self.train_dataset.locate, batch) if name == source.name]
        return f"row(s) {', '.join(own[place] for place in bad.places)} of dataset {source.dataset!r}"
