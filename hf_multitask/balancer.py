"""The weights and coefficients of each optimizer step: what loss weighting and gradient combination decide together.

Every task's loss L_t counts with `u_t = share_t · Task.weight_t · s_t · w_t`, s_t from the task's `weight_schedule` and
w_t from the loss weighting, which does not see tasks of weight 0. With a gradient combination the shared parameters
then get `Σ_t c_t u_t g_t`; heads, and whatever else one task alone trains, get their plain gradient `u_t g_t`. The c_t
are decided from the Gramian of the gradients g_t of the losses themselves: share, weight, schedule and the gate m_t of
an auxiliary task (1 without `auxiliary_gating`) are applied to what the method makes of them, as
[`hf_multitask.balancing.combination`] tells. So a smaller weight always means less influence.

A loss weighting that is scale-aware finds the unit of each loss, and its w_t is part of the loss that a method sees,
`w_t g_t`; the weights of others (`dwa`, `random`, objects without an attribute `scale_aware`) are applied like
`Task.weight`. Where a method finds no solution the step takes the plain sum, which is counted and logged
(`combination_fallbacks`).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from .balancing.combination import make_combination
from .balancing.combination_methods import check_values
from .balancing.gating import AuxiliaryGates
from .balancing.gramian import TaskGradients
from .balancing.sketch import TaskSketches
from .balancing.weighting import Observation, make_weighting
from .models.task import Task
from .models.weight_schedule import schedule_factor
from .training_args import MultiTaskTrainingArguments
from .window import Window

__all__ = ["TaskBalancer"]

logger = logging.get_logger(__name__)


class TaskBalancer:
    """Loss weights and gradient coefficients, step by step; the same on every process.

    Args:
        args: The training arguments.
        tasks: The model's tasks.

    Raises:
        ValueError: A name or an argument of a method does not fit, or no task is auxiliary and one should be gated.
    """

    def __init__(self, args: MultiTaskTrainingArguments, tasks: Sequence[Task]) -> None:
        self.tasks = list(tasks)
        self.seed = args.seed
        self._reduction = args.loss_reduction
        self._every = args.combination_every
        self._log_every = args.conflict_logging_steps
        self.is_static = args.loss_weighting == "static"
        self.weighting = make_weighting(args.loss_weighting, tasks, args.weighting_kwargs, args.seed)
        try:
            json.dumps(self.weighting.state_dict())
        except TypeError as error:
            name = type(args.loss_weighting).__name__
            raise ValueError(f"loss_weighting {name}: its state_dict goes into checkpoints as JSON ({error})") from None
        kwargs = dict(args.combination_kwargs)
        if kwargs.get("preference") is not None:
            kwargs["preference"] = _by_task(kwargs["preference"], tasks)
        self.combination = make_combination(args.gradient_combination, kwargs)
        self.combination.for_tasks(range(len(tasks)), len(tasks))  # refuses a preference that does not fit
        self.gates = AuxiliaryGates(args.auxiliary_gating, tasks, args.primary_task)
        self._sums = args.gradient_combination == "sum"
        self.combines = not self._sums or self.gates.is_on
        self._accumulates = args.gradient_accumulation_steps > 1
        self.sketches = args.gradient_memory == "sketch"
        self.memory = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)
        self.coefficients = [1.0] * len(tasks)
        self.weights = [1.0] * len(tasks)
        self._total_steps: int | None = None
        self._step = 0  # the last one that ended
        self.cosines: Tensor | None = None  # of the last Gramian
        self.fallbacks = 0

    def begin(self, total_steps: int) -> None:
        """Take note of how many optimizer steps the whole training has; schedules of weights may ask.

        Raises:
            ValueError: From some step on no task has a weight.
        """
        self._total_steps = total_steps
        if total_steps > 0 and not any(self._scheduled(total_steps - 1)):
            raise ValueError(
                f"by their weight_schedule all tasks weigh 0 in the last of {total_steps} optimizer steps, and nothing "
                "would be trained; give one of them a constant weight, or an end above 0"
            )

    # ---- which way a step goes ----

    def logs_conflicts(self, step: int) -> bool:
        """Return whether the cosines of a step are wanted for the log."""
        return bool(self._log_every) and (step + 1) % self._log_every == 0

    def needs_task_gradients(self, step: int, shared: bool = True, conflicts: bool = True) -> bool:
        """Return whether a step needs the gradient of each task by itself.

        Args:
            step: Number of the optimizer step.
            shared: Whether any shared parameter is trained in it; otherwise there is nothing to combine or compare.
            conflicts: Whether cosines that are wanted for the log count; they can be measured beside a plain step.
        """
        if not self.is_static and self._accumulates and not self.weighting.needs_gradient_norms:
            return True
        wants = self.decides(step) or self.weighting.needs_gradient_norms
        return (wants or (conflicts and self.logs_conflicts(step))) and shared

    def decides(self, step: int) -> bool:
        """Return whether a step takes coefficients of its own, rather than those of an earlier step."""
        return self.combines and (step % self._every == 0 or self.combination.is_elementwise)

    # ---- what it decides ----

    def indices(self, window: Window) -> list[int]:
        """Return the numbers of the tasks that a window holds."""
        return [index for index, task in enumerate(self.tasks) if task.name in window.rows]

    def weigh(
        self, window: Window, losses: Mapping[str, float], step: int, epoch: int, norms: Tensor | None = None
    ) -> dict[str, float]:
        """Return what each task's loss counts, `u_t`, after asking the loss weighting.

        Args:
            window: The window.
            losses: By task of the window, its mean loss over the window and all processes.
            step: Number of the optimizer step.
            epoch: Number of the epoch.
            norms: `[T]`, norms of the gradients of the unweighted losses, for weightings that need them.
        """
        names = [task.name for task in self.tasks]
        # A task that weighs nothing, as after it was switched off, is as absent: it must not take part of the others'.
        counts = [name in window.rows and base > 0 for name, base in zip(names, self._scheduled(step), strict=True)]
        if any(counts):
            present, absent = torch.tensor(counts), torch.tensor(float("nan"), dtype=torch.float64)
            values = torch.tensor([losses.get(name, float("nan")) for name in names], dtype=torch.float64)
            values = values.where(present, absent)
            norms = None if norms is None else norms.where(present, absent)
            self.weights = self.weighting.weights(Observation(values, present, step, epoch, norms)).tolist()
        return self.factors(window, step)

    def after_step(self, losses: Mapping[str, float]) -> None:
        """Tell the loss weighting the losses of the last window's rows after its optimizer step.

        Args:
            losses: By task, the mean loss over the window and all processes.
        """
        values = [losses.get(task.name, float("nan")) for task in self.tasks]
        self.weighting.after_step(torch.tensor(values, dtype=torch.float64))

    def factors(self, window: Window, step: int) -> dict[str, float]:
        """Return what each task's loss counts in a step, with the weights as they are."""
        shares = window.shares(self._reduction)
        weights = {t.name: b * w for t, b, w in zip(self.tasks, self._scheduled(step), self.weights, strict=True)}
        return {task: share * weights[task] for task, share in shares.items()}

    def _scheduled(self, step: int) -> list[float]:
        """Return the weight of each task in a step, before the loss weighting."""
        return [task.weight * self._schedule(task, step) for task in self.tasks]

    def _schedule(self, task: Task, step: int) -> float:
        if task.weight_schedule is None:
            return 1.0
        if self._total_steps is None:
            raise RuntimeError("begin() comes before the first step: a task's weight_schedule asks for all steps")
        return schedule_factor(task.weight_schedule, step, self._total_steps)

    def end_step(self, window: Window, step: int) -> list[str]:
        """Take note of a step for the log, and return the tasks that it does not train.

        These are the ones without rows, and the ones whose loss counts 0. What such a task trains alone is to be left
        alone: a gradient of zeros would still let momentum and weight decay move it.
        """
        self._step = step
        self.gates.end_step(window.rows)
        factors = self.factors(window, step)
        return [task.name for task in self.tasks if not factors.get(task.name)]

    def combine(
        self,
        gradients: TaskGradients | TaskSketches,
        window: Window,
        losses: Mapping[str, float],
        step: int,
        epoch: int,
        scale: float,
    ) -> dict[str, float]:
        """Write the shared gradient of a step, and return what each task's loss counts; a collective call.

        From sketches nothing can be written; `coefficients` then are there for a second pass.

        Args:
            gradients: The tasks' gradients, of their unweighted losses.
            window: The window.
            losses: As in [`weigh`].
            step: Number of the optimizer step.
            epoch: Number of the epoch.
            scale: What the losses were multiplied with before the backward pass (a loss scaler's number).
        """
        tasks = self.indices(window)
        if not tasks:
            gradients.clear()
            return {}
        gradients.reduce(tasks)
        wants_gramian = self.weighting.needs_gradient_norms or self.combines or self.logs_conflicts(step)
        gramian = gradients.gramian(tasks) / scale**2 if wants_gramian else torch.eye(len(tasks), dtype=torch.float64)
        finite = bool(gramian.isfinite().all())
        if wants_gramian:
            self.record_cosines(tasks, gramian)
        norms = torch.full((len(self.tasks),), float("nan"), dtype=torch.float64)
        norms[tasks] = gramian.diagonal().clamp(min=0).sqrt()
        factors = self.weigh(window, losses, step, epoch, norms if self.weighting.needs_gradient_norms else None)
        weights = torch.tensor([factors[self.tasks[task].name] for task in tasks], dtype=torch.float64)
        if self.decides(step):
            gates = self.gates.decide(gramian * weights[:, None] * weights, tasks)
            if isinstance(gradients, TaskGradients) and self.combination.is_elementwise:
                function = partial(self.combination.function, **self.combination.kwargs)
                gradients.write_elementwise(tasks, gates * weights, function, self._step_seed(step))
                return factors
            self.coefficients = list(self.gates.values)
            if finite:  # otherwise a scaler found its limit: the step is going to be left out, whatever is written
                self._decide(gramian, gates, window, tasks, step)
        coefficients = torch.tensor([self.coefficients[task] for task in tasks], dtype=torch.float64)
        if isinstance(gradients, TaskSketches):
            gradients.clear()
        else:
            gradients.write(tasks, coefficients * weights)
        return factors

    def record_cosines(self, tasks: Sequence[int], gramian: Tensor) -> None:
        """Record the cosines between gradients for the log.

        Args:
            tasks: Numbers of T' tasks.
            gramian: `[T', T']`, inner products of their gradients; where it is not finite nothing is recorded.
        """
        if tasks and gramian.isfinite().all():
            lengths = gramian.diagonal().clamp(min=0).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
            self.cosines = torch.full((len(self.tasks), len(self.tasks)), float("nan"), dtype=torch.float64)
            index = torch.tensor(tasks)
            self.cosines[index[:, None], index] = gramian / lengths[:, None] / lengths

    def _step_seed(self, step: int) -> int:
        return zlib.crc32(f"{self.seed} {step}".encode())

    def _decide(self, gramian: Tensor, gates: Tensor, window: Window, tasks: list[int], step: int) -> None:
        """Ask the method; tasks that are absent have the coefficient 1, and all have their gate if it finds nothing.

        Args:
            gramian: `[T', T']`, of the gradients of the losses of T' tasks.
            gates: `[T']`, their gates.
            window: The window.
            tasks: Their indices.
            step: Number of the optimizer step.
        """
        index = torch.tensor(tasks)
        shares = window.shares(self._reduction)
        share = torch.tensor([shares[self.tasks[task].name] for task in tasks], dtype=torch.float64)
        weights = torch.tensor(self._scheduled(step), dtype=torch.float64)[index]
        learned = torch.tensor(self.weights, dtype=torch.float64)[index]
        if self.weighting.scale_aware:
            gramian = gramian * learned[:, None] * learned
        else:
            weights = weights * learned
        memory = self.memory[index[:, None], index]
        try:
            found = self.combination.for_tasks(tasks, len(self.tasks)).weighted(
                gramian, share, gates * weights, seed=self._step_seed(step), memory=memory
            )
        except (RuntimeError, np.linalg.LinAlgError) as error:
            self.fallbacks += 1
            logger.warning(
                f"gradient_combination {self.combination.name!r} found no solution in step {step} ({error}); "
                f"this step takes the plain sum ({self.fallbacks} so far)"
            )
            return
        self.memory[index[:, None], index] = memory
        for task, value, weight in zip(tasks, found.tolist(), weights.tolist(), strict=True):
            if weight:
                self.coefficients[task] = value / weight

    # ---- what it tells ----

    def logs(self) -> dict[str, float]:
        """Return what says something of these, and begin the gates' means anew.

        - `weight/<task>`: s_t w_t of the last step, what a loss counts beside its share and `Task.weight`.
        - `coefficient/<task>`: c_t m_t of the last decision.
        - `gate/<task>`: mean of m_t over the steps with rows of the task since the last log line; of gates that are
          open or shut, the fraction of these steps in which it was open.
        - `conflict/<a>|<b>`: cosines of the last Gramian.
        """
        logs: dict[str, float] = {}
        if not self.is_static or any(task.weight_schedule is not None for task in self.tasks):
            logs |= {
                f"weight/{task.name}": self._schedule(task, self._step) * w
                for task, w in zip(self.tasks, self.weights, strict=True)
            }
        logs |= self.gates.logs()
        if not self._sums and not self.combination.is_elementwise:
            logs |= {f"coefficient/{task.name}": c for task, c in zip(self.tasks, self.coefficients, strict=True)}
        if self.fallbacks:
            logs["combination_fallbacks"] = self.fallbacks
        if self._log_every and self.cosines is not None:
            for i, one in enumerate(self.tasks):
                for j in range(i):
                    value = self.cosines[j, i].item()
                    if value == value:
                        logs[f"conflict/{self.tasks[j].name}|{one.name}"] = value
        return logs

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain JSON types."""
        return {
            "weighting": self.weighting.state_dict(),
            "weights": self.weights,
            "memory": self.memory.tolist(),
            "coefficients": self.coefficients,
            "gates": self.gates.state_dict(),
            "fallbacks": self.fallbacks,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of the same tasks and methods."""
        self.weighting.load_state_dict(state["weighting"])
        self.weights = list(state["weights"])
        self.memory = torch.tensor(state["memory"], dtype=torch.float64)
        self.coefficients = list(state["coefficients"])
        self.gates.load_state_dict(state["gates"])
        self.fallbacks = int(state["fallbacks"])


def _by_task(preference: Any, tasks: Sequence[Task]) -> list[float] | None:
    """Return preferences in the tasks' order; they come by name, or in that order."""
    if preference is None:
        return None
    names = [task.name for task in tasks]
    if isinstance(preference, Mapping):
        if set(preference) != set(names):
            raise ValueError(
                f"gradient_combination_kwargs: preference must name every task, {', '.join(names)}; "
                f"it names {', '.join(preference)}"
            )
        preference = [preference[name] for name in names]
    if len(preference) != len(names):
        raise ValueError(f"gradient_combination_kwargs: preference must have {len(names)} numbers, one per task")
    check_values({"preference": list(preference)})
    return list(preference)
