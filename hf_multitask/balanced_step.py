"""The part of the trainer that takes the tasks' gradients one by one, weighs and combines them."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import Trainer

from .balancer import TaskBalancer
from .balancing.gramian import TaskGradients
from .balancing.scaled_passes import passing_scales
from .balancing.sketch import TaskSketches
from .guard import LossGuard
from .models.limits import shown
from .models.passes import Segment, cut_rows, places_in_pass
from .models.scheme import SharingScheme
from .models.task import Task
from .training_args import MultiTaskTrainingArguments
from .window import TaskProgress, WatchedWindow, Window

__all__ = ["MultiTaskBalancing"]

# Where each process holds a part of the parameters, and gathers the rest for every pass.
_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)

_ROW_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "task_ids")


class MultiTaskBalancing(Trainer):
    """Steps with a gradient of their own for each task; see [`hf_multitask.balancer.TaskBalancer`]."""

    args: MultiTaskTrainingArguments
    tasks: list[Task]
    balancer: TaskBalancer
    progress: TaskProgress
    guard: LossGuard
    _scaled_is_declared: bool | None = None
    _watched: WatchedWindow | None = None
    _recorded = False

    def _begin_balancing(self, args: MultiTaskTrainingArguments) -> None:
        """Begin a run: no weights learned, no gradients kept."""
        self.balancer = TaskBalancer(args, self.tasks)
        self._gradients: TaskGradients | TaskSketches | None = None
        self._measured: TaskGradients | TaskSketches | None = None  # beside plain steps, for the log
        self._window_inputs: list[dict[str, Any]] = []
        self._to_repeat: tuple[list[dict[str, Any]], Window] | None = None  # the window, for a look after its step
        self._decided: dict[str, float] | None = None
        self._window_losses: dict[str, Tensor] = {}
        self._added: dict[nn.Parameter, Tensor] = {}
        self._scales: dict[str, float] = {}  # of the passes of this window that all tasks took together
        self._at_window_start = True
        self._window_loss: Tensor | None = None  # of the micro-batches so far
        self._balancing_before: dict[str, Any] | None = (
            None  # at the start of the window, to be restored if it is skipped
        )
        self._prepared: list[nn.Parameter] = []  # trained when the run began; what DDP adds up over processes
        self._trained: list[nn.Parameter] = []  # by the current window
        self._shared: list[nn.Parameter] = []  # of these, the shared ones

    def _check_balancing(self) -> None:
        """Raise where a backend cannot do what the arguments ask for; set what FSDP needs.

        Raises:
            ValueError: The gradients of tasks are wanted of DeepSpeed.
        """
        inner: Any = self.accelerator.unwrap_model(self.model)
        if (self.is_fsdp_enabled or self.is_deepspeed_enabled) and not inner.supports_sharding:
            raise ValueError(
                f"{type(inner).__name__} does not go with FSDP or DeepSpeed, which want every process to run the same "
                "modules; use DDP (recipes/accelerate/ddp.yaml), or hard sharing"
            )
        language = [task.name for task in self.tasks if task.type.is_language]
        if (self.is_fsdp_enabled or self.is_deepspeed_enabled) and language:
            raise ValueError(
                f"tasks over the vocabulary ({', '.join(language)}) do not go with FSDP or DeepSpeed, which shard the "
                "table of embeddings that they predict with; use DDP (recipes/accelerate/ddp.yaml)"
            )
        plain = self.balancer.is_static and not self.balancer.combines and not self.args.conflict_logging_steps
        if plain:
            return
        wants = self.balancer.combines or self.balancer.weighting.needs_gradient_norms
        if (wants or self.args.conflict_logging_steps) and next(inner.shared_parameters(), None) is None:
            raise ValueError(
                f"no shared parameter is trained in this {type(inner).__name__}, so there are no gradients to combine "
                "or compare: unfreeze the backbone (or add adapters to it that tasks share), "
                "or leave out gradient_combination, auxiliary_gating, conflict_logging_steps and loss weightings by "
                "gradients"
            )
        if self.is_deepspeed_enabled:
            raise ValueError(
                "loss_weighting, gradient_combination, auxiliary_gating and conflict_logging_steps do not go with "
                "DeepSpeed, whose optimizer steps inside the backward pass; use DDP or FSDP version 2 "
                "(recipes/accelerate), or Task(weight=...)"
            )
        if self.is_fsdp_enabled:
            # Gradients are there only after they were reduced: in every micro-batch.
            self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True

    # ---- what a step trains ----

    def _begin_window(self, model: Any) -> None:
        """Look up which parameters are trained: callbacks may freeze and unfreeze them between two windows.

        Raises:
            ValueError: A parameter was unfrozen that the optimizer does not hold, or the parameters are sharded: then
                what is trained cannot change.
        """
        if self.args.on_nonfinite_loss == "skip":
            self._balancing_before = copy.deepcopy(self.balancer.state_dict())
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if _same(trained, self._trained):
            return
        before = {id(parameter) for parameter in (self._trained or self._prepared)}
        changed = before ^ {id(parameter) for parameter in trained}
        names = [name for name, parameter in model.named_parameters() if id(parameter) in changed]
        if changed and self.accelerator.distributed_type in _SHARDED:
            raise ValueError(
                f"{shown(names)} were frozen or unfrozen in step {self.state.global_step}, but with FSDP and DeepSpeed "
                "the trained parameters are fixed when training begins; freeze them before the trainer is made, or "
                "use DDP"
            )
        optimizer: Any = self.optimizer
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        new = {id(parameter) for parameter in trained} - before - held
        names = [name for name, parameter in model.named_parameters() if id(parameter) in new]
        if names:
            raise ValueError(
                f"{shown(names)} were unfrozen in step {self.state.global_step}, but the optimizer does not hold them, "
                "because they were frozen when it was made; leave them trainable until then, and freeze them in the "
                "callback's on_train_begin"
            )
        self._trained, self._shared = trained, list(model.shared_parameters())
        self._gradients = self._measured = None
        if not self._shared:
            self.balancer.cosines = None  # there is nothing to compare from now on

    def _run_plain(self, model: nn.Module, inputs: dict[str, Any], window: Any, last: bool) -> Tensor:
        """Run forward and backward of all tasks together; an overridden `compute_loss` is called by it."""
        if not self._overrides_loss or self._decided is not None:
            return self._run_together(model, inputs, window, last)
        self._watched, self._recorded = WatchedWindow(window.rows, window.items, window.tokens), False
        inputs = {**inputs, "penalty_scale": 0.0}  # it is added once, at the end of the step
        if self.args.world_size > 1:
            inputs["run_every_head"] = True
        inner: Any = self.accelerator.unwrap_model(model)
        handle = inner.register_forward_hook(self._record_losses)
        try:
            return self._run_together(model, inputs, self._watched, last)
        finally:
            handle.remove()

    def _record_losses(self, _: nn.Module, __: Any, outputs: Any) -> None:
        """Record the losses of the heads in a pass of an overridden `compute_loss`; of several passes, the first."""
        rows = outputs.get("row_losses") if isinstance(outputs, Mapping) else None
        if rows is None or self._recorded or self._watched is None:
            return
        self._recorded = True
        items = vars(self._watched)["items"]
        self.progress.add_losses({task: rows[task].sum() / items[task] for task in rows if task in items})
        self.guard.add(rows)

    def _run_together(self, model: nn.Module, inputs: dict[str, Any], window: Any, last: bool) -> Tensor:
        """Run forward and backward as `Trainer` does.

        DDP adds up the gradients of the parameters that were trained when it was made. Where others are trained now,
        it is left out, and gradients are added up here, after the last micro-batch of a window.
        """
        kinds = (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        if self.accelerator.distributed_type not in kinds or _same(self._trained, self._prepared):
            return super().training_step(model, inputs, window)
        loss = super().training_step(self.accelerator.unwrap_model(model), inputs, window)
        if last:
            here = {parameter: parameter.grad for parameter in self._trained if parameter.grad is not None}
            for parameter, grad in self._add_up(here, self._trained).items():
                parameter.grad = grad / self.args.world_size  # as DDP takes the mean
        return loss

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Look at the window's rows again where the loss weighting asks for it, and go on as `Trainer` does."""
        if self.tasks:
            self._observe_after_step()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _observe_after_step(self) -> None:
        """Tell the loss weighting the losses of the last window's rows after its step; a collective call.

        The pass is one of training (dropout included), without gradients. What it draws depends on the seed and the
        step alone, and leaves the random state and what modules record of the passes of training as they were.
        """
        repeated, self._to_repeat = self._to_repeat, None
        if repeated is None or self.accelerator.optimizer_step_was_skipped:
            return
        batches, window = repeated
        sharded = self.accelerator.distributed_type in _SHARDED
        inner: Any = self.accelerator.unwrap_model(self.model_wrapped)
        model: Any = self.model_wrapped if sharded else inner
        model.train()
        device = self.args.device
        losses: dict[str, Tensor] = {}
        forked = {} if device.type == "cpu" else {"device_type": device.type}
        devices = [] if device.type == "cpu" else [device]
        with torch.no_grad(), torch.random.fork_rng(devices, **forked):
            place = f"{self.args.seed} {self.state.global_step} {self.args.process_index}"
            torch.manual_seed(zlib.crc32(place.encode()))
            for batch in batches:
                inputs = self._prepare_inputs(batch)
                own = {
                    "num_items": {task: window.items.get(task, 0) for task in inputs["labels"]},
                    "num_tokens": window.tokens,
                    "penalty_scale": 0.0,
                    "single_pass": sharded,
                    "run_every_head": sharded,
                }
                with self.compute_loss_context_manager():
                    outputs = model(**(inputs | own))
                for name, loss in outputs["task_losses"].items():
                    losses[name] = losses[name] + loss if name in losses else loss
        inner.forget_passes()
        self.balancer.after_step(self._add_up_losses(losses, window))

    # ---- the loss ----

    @property
    def _overrides_loss(self) -> bool:
        """Whether the loss is the user's: a subclass overrides `compute_loss`."""
        return getattr(self.compute_loss, "__func__", None) is not MultiTaskBalancing.compute_loss

    @property
    def loss_is_scaled_for_ga(self) -> bool | None:  # type: ignore[override]
        """Whether a loss is a part of its window's, rather than the mean of its micro-batch, as `Trainer` asks.

        A subclass may declare it. Otherwise a loss that was made without looking at the window is a mean.
        """
        if self._scaled_is_declared is not None or not self.tasks:
            return self._scaled_is_declared
        return not self._overrides_loss or (self._watched is not None and self._watched.was_read)

    @loss_is_scaled_for_ga.setter
    def loss_is_scaled_for_ga(self, value: bool | None) -> None:
        """Declare it."""
        self._scaled_is_declared = value

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return this micro-batch's part of the window's loss, `sum of share * weight * loss` over tasks.

        A subclass may override this where each step is trained with one loss: with `loss_weighting="static"`, without
        gradient combination, gating, logged conflicts or `weight_schedule`; anything else is refused when the trainer
        is made. `num_items_in_batch` is the [`Window`]. What this method returns adds up over the micro-batches of a
        step (and over processes: it is multiplied with their number, as data parallelism takes the mean). A loss that
        the override computes without this method or the window is the mean of its micro-batch, and is divided by their
        number, as by `Trainer`; set the class attribute `loss_is_scaled_for_ga` to say otherwise. The logged
        `loss/<task>`, and `eval_<task>_loss`, are those of the heads in any case.
        """
        if not self.tasks or not isinstance(num_items_in_batch, Window):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        window, balancer = num_items_in_batch, self.balancer
        if balancer.combines:
            self._scales = passing_scales(self.accelerator.unwrap_model(model), balancer.coefficients)
        factors = balancer.factors(window, self.state.global_step) if self._decided is None else self._decided
        own = {
            "num_items": {task: window.items.get(task, 0) for task in inputs["labels"]},
            "num_tokens": window.tokens,
            # Rows of a task without a labelled item in the window run along and count 0.
            "loss_weights": dict.fromkeys(inputs["labels"], 0.0) | factors,
            "gradient_scales": self._scales if balancer.combines else None,
            "penalty_scale": 0.0,  # it is added once, at the end of the step
            "single_pass": self.accelerator.distributed_type in _SHARDED,
            "run_every_head": self.args.world_size > 1,
        }
        outputs = model(**(inputs | own))
        loss, losses = outputs["loss"], outputs["task_losses"]
        if self._decided is None and not self._overrides_loss:
            self.progress.add_losses(losses)
            self.guard.add(outputs["row_losses"])
        if self._decided is None and self._measures_beside(self.state.global_step):
            self._measure_conflicts(losses, window)
        frozen = balancer.weighting.needs_gradient_norms and not self._shared  # no norms: the weights stay as they are
        if not balancer.is_static and self._decided is None and not frozen:
            # This is the whole window, or the gradients of tasks would be wanted: the weights are of these losses.
            total = self._add_up_losses({task: value.detach() for task, value in losses.items()}, window)
            factors = balancer.weigh(window, total, self.state.global_step, int(self.state.epoch or 0))
            loss = loss * 0.0 + sum(factors.get(task, 0.0) * value for task, value in losses.items())
            added = outputs.get("regularization")
            loss = loss if added is None else loss + added
        if self.args.world_size > 1:
            loss = loss * self.args.world_size  # data parallelism takes the mean over processes of what is a sum
        return (loss, outputs) if return_outputs else loss

    # ---- conflicts of a plain step ----

    @property
    def _can_measure_beside(self) -> bool:
        """Whether gradients of tasks can be taken of the graph of a plain step."""
        options: Any = self.args.activation_checkpointing_kwargs or {}
        reentrant = options.get("use_reentrant", False)
        sharded = self.accelerator.distributed_type in _SHARDED
        return not (sharded or self.args.torch_compile or (self.args.activation_checkpointing and reentrant))

    def _measures_beside(self, step: int) -> bool:
        """Return whether the conflicts of a step are measured without any part in what it does."""
        asked = self.balancer.logs_conflicts(step) and bool(self._shared) and self._can_measure_beside
        return asked and not self.balancer.needs_task_gradients(step, conflicts=False)

    def _measure_conflicts(self, losses: Mapping[str, Tensor], window: Window) -> None:
        """Add the gradients of tasks on shared parameters to those of this window; `.grad` stays as it is."""
        if self._measured is None:
            kind = TaskSketches if self.balancer.sketches else TaskGradients
            self._measured = kind(self._shared, len(self.tasks), self.args.world_size, self.args.process_index)
        scaler = self.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        kept = [parameter.grad for parameter in self._shared]
        for number, task in enumerate(self.tasks):
            loss = losses.get(task.name)
            if loss is None or task.name not in window.rows or not loss.requires_grad:
                continue
            with torch.autocast(self.args.device.type, enabled=False):
                # Nothing is accumulated, so hooks of data parallelism do not notice.
                grads = torch.autograd.grad(loss * scale, self._shared, retain_graph=True, allow_unused=True)
            for parameter, grad in zip(self._shared, grads, strict=True):
                parameter.grad = grad
            self._measured.move(number)
        for parameter, before in zip(self._shared, kept, strict=True):
            parameter.grad = before

    def _record_measured(self, window: Window) -> None:
        """Record the cosines of the gradients that were measured in a window; a collective call."""
        if self._measured is None:
            return
        tasks = self.balancer.indices(window)
        if tasks:
            self._measured.reduce(tasks)
            # Where all tasks take one pass with coefficients, their gradients come scaled.
            scales = torch.tensor([self._scales.get(self.tasks[task].name, 1.0) or 1.0 for task in tasks]).double()
            gramian = self._measured.gramian(tasks) / scales[:, None] / scales
            self.balancer.record_cosines(tasks, gramian)
        self._measured.clear()

    def _backward_by_task(self, model: nn.Module, inputs: dict[str, Any], window: Window) -> Tensor:
        """Run forward and backward for one task after the other, and move the shared gradients into their rows.

        Returns:
            A loss of 0: what a micro-batch counts is known only when the window is complete.
        """
        model.train()
        switch = getattr(self.optimizer, "train", None)
        if callable(switch):
            switch()  # schedule-free optimizers keep other weights for training
        inputs = self._prepare_inputs(inputs)
        sharded = self.accelerator.distributed_type == DistributedType.FSDP
        # Gradients are added up over processes here, once per window; DDP must not do it in every backward pass.
        inner: Any = self.accelerator.unwrap_model(model)
        if self._gradients is None:
            world, rank = self.args.world_size, self.args.process_index
            kind: type[TaskSketches] | type[TaskGradients] = TaskSketches
            options: dict[str, Any] = {}
            if not self.balancer.sketches or not self._shared:
                kind, options = TaskGradients, {"tables": self._tables(inner), "device": self.args.device}
            self._gradients = kind(self._shared, len(self.tasks), world, rank, sharded, **options)
        numbers = {task.name: number for number, task in enumerate(self.tasks)}
        embeddings = inner.get_input_embeddings() if self._tables(inner) and not self.balancer.sketches else None
        with _sparse(embeddings):
            self._run_tasks(inner, inputs, window, numbers, sharded)
        if self.balancer.sketches:
            self._window_inputs.append(inputs)
        return torch.zeros((), device=self.args.device)

    def _tables(self, model: Any) -> list[Any]:
        """Return the embedding table, where its gradient can come as sparse rows and nobody else adds to it."""
        embeddings = model.get_input_embeddings()
        if model.lm_head is None and any(task.type.is_language for task in self.tasks):
            return []  # what is predicted with the table adds a gradient of every row
        if self.args.world_size > 1 or self.args.torch_compile or type(embeddings) is not nn.Embedding:
            return []
        if embeddings.max_norm is not None or embeddings.scale_grad_by_freq:
            return []
        # Before the first window, as in preflight, nothing was looked up yet.
        shared = self._shared or [parameter for parameter in model.shared_parameters() if parameter.requires_grad]
        return [parameter for parameter in shared if parameter is embeddings.weight]

    def _run_tasks(
        self, inner: Any, inputs: dict[str, Any], window: Window, numbers: Mapping[str, int], sharded: bool
    ) -> None:
        assert self._gradients is not None
        for names, segment in self._groups(inputs["segments"], inputs["labels"], window, sharded):
            if segment is None:
                losses = {names[0]: self._idle_loss(inner, inputs, names[0])}
            else:
                losses, added = self._group_losses(inner, inputs, names, segment, window)
                if added is not None and not self.balancer.sketches:
                    self._keep_added(inner, added * (self.args.world_size if sharded else 1))
            for place, name in enumerate(names):
                # FSDP takes the mean over processes of what is a sum.
                loss = losses[name] * (self.args.world_size if sharded else 1)
                self.accelerator.backward(loss, retain_graph=place + 1 < len(names))
                self._gradients.move(numbers[name])
                if self.balancer.sketches:
                    for parameter in inner.task_parameters(name):
                        parameter.grad = None  # it comes with the second pass

    def _groups(
        self, segments: Mapping[str, Segment], labels: Mapping[str, Tensor], window: Window, sharded: bool
    ) -> Iterator[tuple[list[str], Segment | None]]:
        """Yield tasks that share a forward pass, and their rows, in the model's order.

        With sharded parameters every process must make the same passes: one for each task of the window, on no rows of
        its own (None) where it has none.
        """
        names = [task.name for task in self.tasks if task.name in (window.rows if sharded else labels)]
        groups: dict[tuple, list[str]] = {}
        for name in names:
            segment = segments.get(name) if name in labels else None
            alone = sharded or segment is None or self.args.torch_compile
            key = (name,) if alone else (segment.start, segment.stop)  # type: ignore[union-attr]
            groups.setdefault(key, []).append(name)
        for group in groups.values():
            yield group, segments[group[0]] if group[0] in labels else None

    def _group_losses(
        self, model: Any, inputs: Mapping[str, Any], names: list[str], segment: Segment, window: Window
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return the losses of some tasks on the same rows, and what the scheme adds; note the losses."""
        rows = cut_rows({key: inputs.get(key) for key in _ROW_INPUTS}, segment)
        own = Segment(0, segment.rows, segment.length)
        with self.compute_loss_context_manager():
            outputs = model(
                **rows,
                segments=dict.fromkeys(names, own),
                labels={name: inputs["labels"][name] for name in names},
                label_positions=self._positions_of(names, inputs, segment),
                packed=inputs.get("packed", False),
                num_items={name: window.items.get(name, 0) for name in names},
                num_tokens=window.tokens,
                penalty_scale=0.0,
            )
        losses: dict[str, Tensor] = outputs["task_losses"]
        self.progress.add_losses(losses)
        self.guard.add(outputs["row_losses"])
        self._note_losses(losses)
        return losses, outputs.get("regularization")

    @staticmethod
    def _positions_of(names: list[str], inputs: Mapping[str, Any], segment: Segment) -> dict[str, Tensor]:
        """Return where tasks over the vocabulary predict, in rows that are cut to the length of their segment."""
        known, length = inputs.get("label_positions", {}), inputs["input_ids"].shape[1]
        return {name: places_in_pass(known[name], length, segment.length) for name in names if name in known}

    def _note_losses(self, losses: Mapping[str, Tensor]) -> None:
        for name, loss in losses.items():
            known = self._window_losses.get(name)
            self._window_losses[name] = loss.detach() if known is None else known + loss.detach()

    def _idle_loss(self, model: Any, inputs: Mapping[str, Any], name: str) -> Tensor:
        """Return a loss of 0 for a task without rows here, from one token: processes must run the same modules."""
        token = Segment(0, 1, 1)
        rows = cut_rows({key: inputs.get(key) for key in _ROW_INPUTS}, token)
        with self.compute_loss_context_manager():
            return 0.0 * model(**rows, segments={name: token})["logits"][name].float().sum()

    def _add_up_losses(self, losses: Mapping[str, Tensor], window: Window) -> dict[str, float]:
        """Return the mean loss of each task of a window over all processes; a collective call."""
        if not window.rows:
            return {}
        zero = torch.zeros((), device=self.args.device)
        total = torch.stack([losses.get(name, zero).float() for name in window.rows]).double()
        if self.args.world_size > 1:
            torch.distributed.all_reduce(total)
        return dict(zip(window.rows, total.tolist(), strict=True))

    def _combine(self, model: nn.Module, window: Window) -> Tensor:
        """Write the gradients of a window: combined ones on what is shared, plain ones on what is not.

        Returns:
            The window's loss, in the scale that `Trainer` reports (the mean over processes is taken of it).
        """
        assert self._gradients is not None
        here, self._window_losses = self._window_losses, {}
        losses = self._add_up_losses(here, window)
        scaler = self.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        epoch = int(self.state.epoch or 0)
        factors = self.balancer.combine(self._gradients, window, losses, self.state.global_step, epoch, scale)
        if self.balancer.sketches:
            self._second_pass(model, factors, window)
        else:
            inner: Any = self.accelerator.unwrap_model(model)
            self._weigh_task_parameters(inner, factors)
            self._write_added(inner)
        total = sum(factors[name] * loss for name, loss in losses.items())
        return torch.tensor(total, device=self.args.device)

    def _keep_added(self, model: nn.Module, added: Tensor) -> None:
        """Keep the gradient of what the scheme adds to the loss: it belongs to no task, and is not combined."""
        scaler = self.accelerator.scaler
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        scaled = added if scaler is None else scaler.scale(added)
        for parameter, grad in zip(parameters, torch.autograd.grad(scaled, parameters, allow_unused=True), strict=True):
            if grad is not None:
                known = self._added.get(parameter)
                self._added[parameter] = grad if known is None else known + grad

    def _write_added(self, model: Any) -> None:
        """Add the gradient of what the scheme adds to the loss; a collective call."""
        adds = type(model).pass_losses is not SharingScheme.pass_losses
        if adds and self.args.world_size > 1 and self.accelerator.distributed_type != DistributedType.FSDP:
            self._added = self._add_up(self._added, self._trained)
        for parameter, grad in self._added.items():
            parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        self._added = {}

    def _add_up(
        self, gradients: Mapping[nn.Parameter, Tensor], parameters: list[nn.Parameter]
    ) -> dict[nn.Parameter, Tensor]:
        """Return gradients added up over processes, each of which may have some of them; a collective call."""
        here = torch.tensor([float(p in gradients) for p in parameters], device=self.args.device)
        torch.distributed.all_reduce(here)
        found = [p for p, count in zip(parameters, here.tolist(), strict=True) if count]
        if not found:
            return {}
        zeros = {p: torch.zeros_like(p) for p in found if p not in gradients}
        flat = torch.cat([(gradients[p] if p in gradients else zeros[p]).reshape(-1).float() for p in found])
        torch.distributed.all_reduce(flat)
        parts = flat.split([p.numel() for p in found])
        return {p: part.view_as(p).to(p.dtype) for p, part in zip(found, parts, strict=True)}

    def _second_pass(self, model: nn.Module, factors: dict[str, float], window: Any) -> None:
        """Run a window again as a whole, with the weights and coefficients that were decided from its sketches."""
        batches, self._window_inputs = self._window_inputs, []
        self._decided = factors
        try:
            for number, inputs in enumerate(batches):
                last = number + 1 == len(batches)
                with nullcontext() if last else self.accelerator.no_sync(model):
                    self._run_plain(model, inputs, window, last)
        finally:
            self._decided = None

    def _weigh_task_parameters(self, model: Any, factors: Mapping[str, float]) -> None:
        """Multiply the gradients of each task's own parameters with what its loss counts, and add up over processes."""
        gradients: list[Tensor] = []
        for name, factor in factors.items():
            for parameter in model.task_parameters(name):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad.mul_(factor)
                gradients.append(parameter.grad)
        if self.args.world_size == 1 or self.accelerator.distributed_type == DistributedType.FSDP or not gradients:
            return
        flat = torch.cat([gradient.reshape(-1).float() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def _same(some: list[nn.Parameter], others: list[nn.Parameter]) -> bool:
    return len(some) == len(others) and all(one is other for one, other in zip(some, others, strict=True))


@contextmanager
def _sparse(embeddings: nn.Embedding | None) -> Iterator[None]:
    """Let the gradient of an embedding table come as the rows that were looked up."""
    if embeddings is None:
        yield
        return
    kept, embeddings.sparse = embeddings.sparse, True
    try:
        yield
    finally:
        embeddings.sparse = kept
