"""The part of the trainer that deals with losses, gradients and weights that are NaN or infinite."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .balanced_step import MultiTaskBalancing
from .data.schedule import ShareChanges
from .data.sources import Source
from .data.streaming import StreamingMixture
from .guard import BadLoss, NonFiniteLossError, nonfinite_gradients, nonfinite_weights
from .loading import make_sampler
from .models.limits import shown

__all__ = ["MultiTaskGuarding"]

logger = logging.get_logger(__name__)


class MultiTaskGuarding(MultiTaskBalancing):
    """Raises before a step with a loss or gradient that is not finite, or leaves the step out."""

    train_dataset: Any
    share_changes: ShareChanges
    _sources: list[Source]

    # ---- what is wrong ----

    def _loss_problem(self, total: Tensor) -> str | None:
        """Return which losses of the window are not finite, or None; a collective call."""
        bad = self.guard.check(self.args.device, self.args.world_size, total)
        if bad is None:
            return None
        elsewhere = "what is added to the losses of the rows"
        if self._overrides_loss:
            elsewhere = f"what {type(self).__name__}.compute_loss returned"
        elsewhere += ", or on another process" if self.args.world_size > 1 else ""
        lines = [f"task {b.task!r}: {self._describe_rows(b)}" for b in bad] or [elsewhere]
        return f"a loss of step {self.state.global_step} is NaN or infinite:\n  " + "\n  ".join(lines)

    def _gradient_problem(self, model: Any) -> str | None:
        """Return which gradients are not finite though all losses are, or None; a collective call.

        Gradients that overflow because a loss scaler multiplied them are the scaler's: it lowers its scale. At a scale
        of 1 or less there is nothing to lower, and they are looked at.
        """
        scaler = self.accelerator.scaler
        if self.is_deepspeed_enabled or (scaler is not None and scaler.get_scale() > 1):
            return None
        bad = nonfinite_gradients(model.named_parameters(), self.args.device, self.args.world_size)
        if bad is None:
            return None
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        lines = []
        for task in self.tasks:
            own = [names[id(p)] for p in model.task_parameters(task.name) if names[id(p)] in bad]
            lines += [f"task {task.name!r}: {shown(own)}"] if own else []
            bad = [name for name in bad if name not in own]
        lines += [f"shared parameters: {shown(bad)}"] if bad else []
        lines = lines or ["the norm of all gradients together overflows"]
        return (
            f"the gradient of step {self.state.global_step} is NaN or infinite, with finite losses:\n  "
            + "\n  ".join(lines)
        )

    def _check_weights(self, consequence: str) -> None:
        """Raise where a trained weight is not finite; a collective call.

        Raises:
            NonFiniteLossError: One is NaN or infinite.
        """
        trained = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)  # type: ignore[union-attr]
        bad = nonfinite_weights(trained, self.args.device, self.args.world_size)
        if bad is not None:
            names = shown(bad) if bad else "on another process"
            raise NonFiniteLossError(
                f"after {self.state.global_step} steps weights are NaN or infinite: {names}; {consequence}. A "
                "step was too large for them, with a finite loss and gradient. "
                f"{self._last_good_checkpoint()}Resume with a smaller learning rate: "
                "allow_changes=['learning_rate']."
            )

    # ---- what is done ----

    def _stop_or_skip(self, model: nn.Module, problem: str) -> None:
        """Deal with a window that must not be trained on: raise, or take its gradients away."""
        in_a_row, most = self.guard.skipped_in_a_row, self.args.max_skipped_steps
        if self.args.on_nonfinite_loss == "raise":
            raise NonFiniteLossError(
                f"{problem}\nNothing was changed by this step. {self._last_good_checkpoint()}Resume with a lower "
                "learning rate or with on_nonfinite_loss='skip' (allow_changes permits both), or fix the rows and "
                "start a new run."
            )
        if in_a_row > most:
            raise NonFiniteLossError(
                f"{problem}\n{in_a_row} steps in a row could not be trained (max_skipped_steps={most}): either the "
                f"weights are spoiled, or most rows. {self._last_good_checkpoint()}Lower the learning rate "
                "(allow_changes=['learning_rate']), or fix the rows and start a new run."
            )
        logger.warning(f"{problem}\nThe step is skipped ({self.guard.skipped} so far, {in_a_row} in a row).")
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
        if self._balancing_before is not None:
            self.balancer.load_state_dict(self._balancing_before)

    def _last_good_checkpoint(self) -> str:
        """Return a sentence about the last checkpoint whose weights are known to be good.

        These are the ones from which a further step was trained, with finite losses and gradients. The one that was
        written just before the step that failed may be the cause of the failure.
        """
        step = self.state.global_step
        names = (
            path.name.removeprefix("checkpoint-") for path in Path(self.args.output_dir or ".").glob("checkpoint-*")
        )
        steps = sorted(int(name) for name in names if name.isdigit())
        good = [number for number in steps if number < step]
        text = f"checkpoint-{step} holds the weights that led to this. " if step in steps else ""
        if good:
            text += f"The last checkpoint from which a step with finite losses was trained is checkpoint-{good[-1]}. "
        return text

    def _without_skipped(self, logs: dict[str, float]) -> dict[str, float]:
        """Return a log line whose loss is the mean over the steps that were trained, without one where none was."""
        steps, trained = self.progress.steps, self.progress.trained_steps
        if not trained:
            return {key: value for key, value in logs.items() if key not in ("loss", "grad_norm")} if steps else logs
        return logs | {"loss": logs["loss"] * (steps / trained)}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint, unless its weights are NaN or infinite."""
        if self.tasks:
            self._check_weights("no checkpoint of them was written")
        super()._save_checkpoint(model, trial)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """End training; the mean loss is that of the steps that were trained."""
        if self.tasks:
            steps = self.state.global_step - self._initial_global_step
            trained = steps - (self.guard.skipped - self.guard.skipped_before)
            if trained:
                self._check_weights("the trained model is of no use")
            if trained < steps:
                logger.warning(f"{steps - trained} of {steps} steps were skipped (on_nonfinite_loss='skip')")
                factor = steps / trained if trained else float("nan")
                self._tr_loss = self._tr_loss * factor
                self._total_loss_scalar *= factor
        return super()._finalize_training(*args, **kwargs)

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
