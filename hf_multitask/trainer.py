"""`MultiTaskTrainer`: `transformers.Trainer` for one model and many tasks.

With a plain model it is `Trainer`, bit for bit. With a multi-task model it prepares a dictionary of datasets, mixes
them, weighs losses over whole optimizer steps, and logs and evaluates each task.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import wraps
from operator import itemgetter
from typing import Any, ClassVar, cast

import torch
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Seq2SeqTrainer, Trainer, TrainingArguments
from transformers.trainer_utils import number_of_arguments
from transformers.utils import logging

from .balancing.scaled_passes import undo_scales
from .best_metric import set_best_metric
from .checkpointing import MultiTaskCheckpoints, SaveAfterEvaluation
from .data.collator import DataCollatorForMultiTask, check_collator
from .data.dataset import MultiTaskDataset, as_mapping, first_rows, prepare_sources
from .data.preprocessing import check_added_tokens, check_held_out, check_packing, check_tokenizer, longest_input
from .data.sampling import mixing_probabilities
from .data.schedule import ShareChanges
from .data.sources import make_sources, trained_sources, without_held_out
from .data.span_answers import decide_null_answers
from .data.streaming import StreamingMixture, is_stream
from .evaluation import MultiTaskEvaluation, check_compute_metrics, check_preprocess
from .generation import check_generation
from .guard import LossGuard
from .guarded_step import MultiTaskGuarding
from .hub.trainer_push import MultiTaskPushing
from .loading import make_loader, make_streams
from .models.backbone import USE_ADAPTER_MODEL, check_no_peft, sharding_units
from .models.base import MultiTaskModel
from .models.task import Task, closest
from .training_args import MultiTaskSeq2SeqTrainingArguments, MultiTaskTrainingArguments, settle_args
from .window import TaskProgress, Window, count_window

__all__ = ["MultiTaskSeq2SeqTrainer", "MultiTaskTrainer", "MultiTaskTrainerMixin"]

logger = logging.get_logger(__name__)

# Arguments of which something else may stand there than what was asked for.
_FILLED_IN = ("metric_for_best_model", "greater_is_better", "lr_scheduler_kwargs")
# Fields of a task that do not reach prepared rows.
_NOT_IN_ROWS = ("weight", "weight_schedule", "metric", "greater_is_better")
_OF_TRAINER = frozenset(field.name for field in fields(TrainingArguments))
_ONCE = "it is used when the trainer is made"
_NOT_SEARCHED = {
    **dict.fromkeys(("report_to", "push_to_hub", "hub_model_id", "enable_jit_checkpoint", "label_names"), _ONCE),
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed", "use_cpu", "disable_tqdm", "log_level"), _ONCE),
}


# Methods of `Trainer` that a multi-task trainer replaces: those of a class behind the mixin are not called.
_REPLACED = ("compute_loss", "prediction_step", "evaluate", "predict", "get_train_dataloader", "get_batch_samples")
# Methods of `Trainer` that nothing calls for a multi-task model, and what to use.
_NEVER_CALLED = {
    "_get_train_sampler": "task_sampling says how rows are drawn; override get_train_dataloader for other batches",
    "_get_num_items_in_batch": "items are counted per task; override get_batch_samples",
    "get_eval_dataloader": "each task is evaluated from a loader of its own; give another data_collator",
    "get_test_dataloader": "each task is predicted from a loader of its own; give another data_collator",
}


def _task_by_task(args: MultiTaskTrainingArguments, tasks: Sequence[Task]) -> str | None:
    """Return the argument for which the losses or gradients of tasks are looked at one by one, or None."""
    found = {
        "loss_weighting": args.loss_weighting != "static",
        "gradient_combination": args.gradient_combination != "sum",
        "auxiliary_gating": args.auxiliary_gating is not None,
        "conflict_logging_steps": args.conflict_logging_steps > 0,
    }
    named = [f"{name}={getattr(args, name)!r}" for name, asked in found.items() if asked]
    named += [f"Task({task.name!r}, weight_schedule=...)" for task in tasks if task.weight_schedule is not None]
    return named[0] if named else None


class MultiTaskTrainerMixin(MultiTaskEvaluation, MultiTaskGuarding, MultiTaskCheckpoints, MultiTaskPushing):
    """What makes a `Trainer`, or a class derived from it, one for multi-task models.

    All arguments, callbacks and features of the trainer keep their meaning. Put it first:
    `class MyTrainer(MultiTaskTrainerMixin, SomeTrainer)`.

    What is different with a multi-task model:

    - `train_dataset` and `eval_dataset` are dictionaries (or a `DatasetDict`) of datasets by name, as text and
      labels or already tokenized. They are checked and prepared before anything else happens.
    - `processing_class` is the backbone's tokenizer.
    - `compute_metrics` maps task names to callables or modules of the `evaluate` library; tasks that are not in it
      get the default metrics of their type.
    - `preprocess_logits_for_metrics` maps names of such tasks to callables; a single callable is for all tasks in
      `compute_metrics`, and for no others.
    - `compute_loss` may be overridden where each step is trained with one loss (see there).
    - Log lines hold `loss/<task>` and `share/<task>`; evaluations `eval_<task>_<metric>`, `eval_<task>_loss` and
      `eval_average`, the mean of the primary metrics of the tasks that are not auxiliary.
    - `predict` returns one `PredictionOutput` per task.

    Arguments are those of the trainer it stands in front of, in that trainer's order. With a multi-task model these
    differ:

    Args:
        model: A [`MultiTaskModel`], or any model `Trainer` takes.
        args: [`MultiTaskTrainingArguments`] (with a plain model, `TrainingArguments` do).
        data_collator: Default [`DataCollatorForMultiTask`].
        train_dataset: See above.
        eval_dataset: See above; may leave out tasks, save the primary one.
        processing_class: See above.
        compute_loss_func: For plain models only.
        compute_metrics: See above.
        preprocess_logits_for_metrics: See above.

    Raises:
        ValueError: Something does not fit; everything is checked before training begins.
        TypeError: An argument is not of its type.
    """

    default_args_class: ClassVar[type[MultiTaskTrainingArguments]] = MultiTaskTrainingArguments
    _drawn_at: int | None = None  # the step that the last window was drawn for, until it is trained
    _has_own_rates = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = _bind(super().__init__, args, kwargs)
        model: Any = given.get("model")
        model_init = given.get("model_init")
        if model is None and model_init is not None:
            model = model_init(*[None] * number_of_arguments(model_init))
        self._before_trial: dict[str, Any] = {}  # what the last trial of a search changed
        self.tasks: list[Task] = []
        _check_peft(model)
        if isinstance(model, MultiTaskModel):
            self.tasks = decide_null_answers(model.tasks, given.get("train_dataset"))
            self._task_changes = model.task_changes
        if self.tasks:
            self._init_arguments = {name: value for name, value in given.items() if name not in ("model", "args")}
            self._prepared_data: dict[str, Any] = {}  # how datasets were prepared, and the result
            given |= self._prepare_arguments(model, given)
        elif isinstance(given.get("train_dataset"), Mapping):
            raise ValueError(
                f"train_dataset is a dictionary of datasets, but {type(model).__name__} is no multi-task model; "
                "make one, for example with HardSharingModel.from_backbone(...)"
            )
        own_collator = None if _accepts(super().__init__, "data_collator") else given.pop("data_collator", None)
        super().__init__(**given)
        if own_collator is not None:
            self.data_collator = own_collator
        if self.tasks:
            self._check_balancing()
            self.add_callback(SaveAfterEvaluation())
        if self.tasks and self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            if plugin.transformer_cls_names_to_wrap is None:
                plugin.transformer_cls_names_to_wrap = sharding_units(cast(PreTrainedModel, self.model))

    def _prepare_arguments(self, model: MultiTaskModel, given: Mapping[str, Any]) -> dict[str, Any]:
        """Check what the trainer was given for a multi-task model, and return what takes the place of it.

        Args:
            model: The model, or one that `model_init` made.
            given: The arguments by name.
        """
        tokenizer: Any = given.get("processing_class")
        train, evaluation = given.get("train_dataset"), given.get("eval_dataset")
        asked = given.get("args") or self.default_args_class(output_dir="tmp_trainer")
        if not isinstance(asked, self.default_args_class):
            wanted = self.default_args_class.__name__
            raise TypeError(f"args must be {wanted} for a multi-task model, got {type(asked).__name__}")
        if self._overrides_loss and asked.ddp_find_unused_parameters is None:
            asked = copy.copy(asked)
            asked.ddp_find_unused_parameters = True  # the user's loss need not depend on every head
        args = settle_args(asked, given.get("compute_loss_func"), (given.get("optimizers") or (None, None))[0])
        check_tokenizer(tokenizer, model)
        check_added_tokens(tokenizer, model)
        self._sources = make_sources(self.tasks, model.shares_rows)
        self._preparing = {
            "tokenizer": tokenizer,
            "max_length": longest_input(tokenizer, model, args.max_length),
            "num_proc": args.dataset_num_proc,
            "seed": args.data_seed if args.data_seed is not None else args.seed,
        }
        self._most_rows = args.max_eval_samples
        self._given_optimizers = given.get("optimizers") or (None, None)
        for task in self.tasks:
            longest_input(tokenizer, model, task.max_length, f"task {task.name!r}: ")
        self._metrics: dict[str, Any] = check_compute_metrics(given.get("compute_metrics"), self.tasks)
        check_generation(self.tasks, args.predict_with_generate)
        check_packing(model, args.packing)
        check_held_out(model)
        set_best_metric(args, self.tasks, self._metrics, evaluation, given.get("callbacks"))
        with args.main_process_first(desc="preparing datasets"):
            train, evaluation = self._prepare_given(model, args, train, evaluation)
        if given.get("data_collator") is not None:
            some = train if train is not None else evaluation
            rows = [] if some is None else some.one_of_each()
            for batch in [rows] if args.batch_composition == "mixed" else [[row] for row in rows]:
                check_collator(given["data_collator"], batch)
        collator = given.get("data_collator") or DataCollatorForMultiTask(
            tokenizer,
            self.tasks,
            seed=self._preparing["seed"],
            packing=args.packing,
            packing_length=args.packing_length,
        )
        # What stands there in place of what was asked for; a later training settles it anew.
        self._filled_in = {name: (getattr(asked, name), getattr(args, name)) for name in _FILLED_IN}
        self._arguments = _field_values(args)
        self.progress = TaskProgress([task.name for task in self.tasks])
        self.guard = LossGuard()
        self.share_changes = ShareChanges()
        self._begin_sampling(args, train, evaluation)
        self._begin_balancing(args)
        self._check_overrides(args)
        check_preprocess(given.get("preprocess_logits_for_metrics"), self.tasks, self._metrics)
        # An argument that was not given is not passed on, save those that are made here.
        replaced = {"train_dataset": train, "eval_dataset": evaluation, "compute_metrics": None}
        return {"args": args, "data_collator": collator, **{k: v for k, v in replaced.items() if k in given}}

    def _check_overrides(self, args: MultiTaskTrainingArguments) -> None:
        """Refuse methods of a subclass that would not be called, and losses that would not count.

        Raises:
            ValueError: One is defined where nothing calls it, or overrides `compute_loss` where the gradients of
                tasks, or their losses, are looked at one by one.
        """
        classes = type(self).__mro__
        behind = classes.index(MultiTaskTrainerMixin)
        by_task = _task_by_task(args, self.tasks)
        for place, one in enumerate(classes):
            if one.__module__.startswith(("hf_multitask.", "transformers.")) or one is object:
                continue
            for name in vars(one):
                if name in _NEVER_CALLED:
                    raise ValueError(
                        f"{one.__name__}.{name} is never called for a multi-task model: {_NEVER_CALLED[name]}"
                    )
                if place > behind and (name in _REPLACED or (name == "training_step" and by_task)):
                    raise ValueError(
                        f"{one.__name__}.{name} would not be called: for a multi-task model MultiTaskTrainerMixin "
                        f"replaces it; override {name} in a class that comes before the mixin"
                    )
        if self._overrides_loss and by_task:
            raise ValueError(
                f"{type(self).__name__} overrides compute_loss, which makes one loss of all tasks, but {by_task} looks "
                "at the tasks one by one and would not call it; leave out one of the two, or set weights and smoothing "
                "per task: Task(weight=..., label_smoothing=...)"
            )

    def _prepare_given(
        self, model: MultiTaskModel, args: MultiTaskTrainingArguments, train: Any, evaluation: Any
    ) -> tuple[Any, Any]:
        """Return the prepared datasets: those of before, where they would be made in the same way."""
        tasks = [{k: v for k, v in task.to_dict().items() if k not in _NOT_IN_ROWS} for task in self.tasks]
        how = {k: v for k, v in self._preparing.items() if k != "tokenizer"} | {
            "max_eval_samples": args.max_eval_samples
        }
        key = {**how, "tasks": tasks, "shares_rows": model.shares_rows}
        before = self._prepared_data.get("key", key)
        for name, given in (("train_dataset", train), ("eval_dataset", evaluation)):
            changed = [k for k in ("max_length", "max_eval_samples", "tasks") if key[k] != before[k]]
            if changed and isinstance(given, (MultiTaskDataset, StreamingMixture)):
                raise ValueError(
                    f"{', '.join(changed)} cannot change after construction: {name} was prepared beforehand; give "
                    "datasets by name"
                )
        if self._prepared_data and key == before and not isinstance(self._prepared_data["train"], StreamingMixture):
            train, evaluation = self._prepared_data["train"], self._prepared_data["evaluation"]
        else:
            if train is not None:
                train = self._prepare_training_data(train, args)
            if evaluation is not None:
                evaluation = self.prepare_datasets(evaluation, "eval_dataset", "eval", complete=False)
            self._prepared_data = {"key": key, "train": train, "evaluation": evaluation}
        if train is not None:
            self._check_sampling(train, args)
        return train, evaluation

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
        allow_changes: Sequence[str] = (),
    ) -> Any:
        """Train as `Trainer` does, with the arguments as they are now.

        `resume_from_checkpoint` and `allow_changes` are those of
        [`hf_multitask.checkpointing.MultiTaskCheckpoints.train`].

        Arguments that are used at construction, such as `max_length`, `packing` or `primary_task`, have their effect
        too where a hyperparameter search, or an assignment to `trainer.args`, changed them.
        """
        if self.tasks:
            if trial is not None and self.hp_search_backend is not None:
                self._set_arguments_of(trial)  # before the model is made, which depends on the seed
            self.neftune_noise_alpha = self.args.neftune_noise_alpha
            if self.model_init is None:
                self._settle_again(self.accelerator.unwrap_model(self.model))
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval, allow_changes)

    def call_model_init(self, trial: Any = None) -> Any:
        """Make a model, and settle what follows from it and from arguments that have changed since the last one."""
        model = super().call_model_init(trial)
        if self.tasks and hasattr(self, "callback_handler"):  # not while `Trainer` is being constructed
            self._settle_again(model)
        return model

    def _settle_again(self, model: Any) -> None:
        """Repeat what construction does with arguments and tasks, where one of them has changed since."""
        names = [task.name for task in self.tasks]
        if [task.name for task in model.tasks] != names:
            return  # which is refused when training begins
        tasks = decide_null_answers(model.tasks, self._init_arguments.get("train_dataset"))
        if self._arguments == _field_values(self.args) and tasks == self.tasks:
            return
        self.tasks = tasks
        for name, (asked, settled) in self._filled_in.items():
            if getattr(self.args, name) == settled:
                setattr(self.args, name, asked)
        self.args.check_choices()
        now = {"args": self.args, "callbacks": self.callback_handler.callbacks}
        settled_again = self._prepare_arguments(model, {**self._init_arguments, **now})
        vars(self.args).update(vars(settled_again["args"]))
        for name in ("data_collator", "train_dataset", "eval_dataset"):
            if name in settled_again:
                setattr(self, name, settled_again[name])
        self.model = model  # a search has taken the model of the trial before
        self._check_balancing()

    def _set_arguments_of(self, trial: Any) -> None:
        """Set the arguments of a trial; those of the trial before it are what they were again.

        Raises:
            ValueError: A name is none of the arguments, and `model_init` takes no trial that it could be for.
        """
        params = dict(trial) if isinstance(trial, dict) else self.hp_space(trial)
        self._check_searched(params)
        for key, value in self._before_trial.items():
            setattr(self.args, key, value)
        self._before_trial = {key: getattr(self.args, key) for key in params if hasattr(self.args, key)}
        for key, before in self._before_trial.items():
            value = _from_json(key, params[key], self.args)
            # `Trainer` does the same; an argument of ours may be a name or an object.
            setattr(self.args, key, type(before)(value) if before is not None and key in _OF_TRAINER else value)
        for name, flag in (
            ("metric_for_best_model", "_metric_was_given"),
            ("greater_is_better", "_direction_was_given"),
        ):
            if name in params:
                self._before_trial[flag] = getattr(self.args, flag)
                setattr(self.args, flag, params[name] not in (None, "loss"))

    def _hp_search_setup(self, trial: Any) -> None:
        """Make the accelerator of a trial; its arguments are set already."""
        if not self.tasks or self.hp_search_backend is None or trial is None:
            super()._hp_search_setup(trial)
            return
        space = self.hp_space
        try:
            self.hp_space = lambda _: {}
            super()._hp_search_setup({} if isinstance(trial, dict) else trial)
        finally:
            self.hp_space = space
        self._trial = trial

    def _check_searched(self, params: Mapping[str, Any]) -> None:
        known = {field.name for field in fields(self.args)}
        for key in params:
            if key in _NOT_SEARCHED:
                raise ValueError(f"hyperparameter_search cannot search {key!r}: {_NOT_SEARCHED[key]}")
            # What starts with an underscore, or is called wandb, is a backend's own.
            if key in known or key.startswith("_") or key == "wandb" or number_of_arguments(self.model_init):
                continue
            raise ValueError(
                f"hyperparameter_search: {key!r} is no training argument{closest(key, known)}, and would have no "
                "effect; a model_init that takes the trial may use it"
            )

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator; compiling is done here, for the backbone alone.

        What happens around the backbone follows the rows of each batch, and would be compiled anew for most of them.
        """
        super().create_accelerator_and_postprocess()
        plugin = self.accelerator.state.dynamo_plugin
        self._compile_options: dict[str, Any] | None = None
        if self.tasks and plugin.backend != DynamoBackend.NO:
            self._compile_options = {**plugin.to_kwargs(), "dynamic": True}
            plugin.backend = DynamoBackend.NO

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Compile the backbone, if it was asked for, and go on as `Trainer` does."""
        if self.tasks and self.args.metric_for_best_model is None:
            # Callbacks that were added after construction may ask for a metric that nothing asked for before.
            set_best_metric(self.args, self.tasks, self._metrics, self.eval_dataset, self.callback_handler.callbacks)
        if self.tasks:
            self.balancer.begin(self.state.max_steps)
        if self.tasks and self._compile_options is not None:
            self.accelerator.unwrap_model(self.model).compile_backbone(**self._compile_options)
        self._has_own_rates = self._has_own_rates and self.optimizer is not None
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.tasks:
            rates = ("backbone_learning_rate", "head_learning_rate")
            wanted = [name for name in rates if getattr(self.args, name) is not None]
            if wanted and not self._has_own_rates:
                raise ValueError(
                    f"{wanted[0]} is not used: {type(self).__name__}.create_optimizer does not call "
                    "super().create_optimizer(...); call it, or give the optimizer its groups yourself"
                )
            self._drawn_at = None
            parameters = self.accelerator.unwrap_model(self.model).parameters()
            self._prepared = [parameter for parameter in parameters if parameter.requires_grad]
        return prepared

    def hyperparameter_search(
        self,
        hp_space: Any = None,
        compute_objective: Any = None,
        n_trials: int = 20,
        direction: str | list[str] = "minimize",
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Search as `Trainer` does; without `compute_objective`, for the best of the metric that picks checkpoints.

        The sum of all metrics, `Trainer`'s own default, says nothing for several tasks. The direction then is the
        metric's.

        Raises:
            ValueError: Evaluations lack that metric, or whether a larger value is better is not known.
        """
        if self.tasks and compute_objective is None:
            asked = "hyperparameter_search without compute_objective"
            set_best_metric(self.args, self.tasks, self._metrics, self.eval_dataset, asked=asked)
            compute_objective = itemgetter(str(self.args.metric_for_best_model))
            direction = "maximize" if self.args.greater_is_better else "minimize"
        return super().hyperparameter_search(hp_space, compute_objective, n_trials, direction, *args, **kwargs)

    # ---- arguments and datasets ----

    def _prepare_training_data(self, datasets: Any, args: MultiTaskTrainingArguments) -> Any:
        """Check and tokenize the training data; streams are looked at and left to be read as training goes on."""
        if isinstance(datasets, StreamingMixture):
            return datasets
        if isinstance(datasets, MultiTaskDataset):
            return datasets
        sources = trained_sources(self._sources)
        by_name = as_mapping(without_held_out(datasets, self._sources), sources, "train_dataset", complete=True)
        if is_stream(by_name):
            options = {key: self._preparing[key] for key in ("tokenizer", "max_length")}
            return make_streams(args, by_name, sources, "train_dataset", split="train", **options)
        return prepare_sources(by_name, sources, "train_dataset", split="train", **self._preparing)

    def prepare_datasets(self, datasets: Any, argument: str, split: str, **options: Any) -> MultiTaskDataset:
        """Check and tokenize datasets, by name; `evaluate` and `predict` take the result as well.

        Args:
            datasets: Datasets by name, or ones that were prepared before.
            argument: Name of the argument they came by, for messages.
            split: Name of the split, for messages.
            **options: `complete` (every task must have rows), `labels` (None if label columns may be missing).
        """
        if isinstance(datasets, MultiTaskDataset):
            return datasets
        if argument != "train_dataset" and options.get("labels", True):
            datasets = first_rows(datasets, self._most_rows)
        return prepare_sources(datasets, self._sources, argument, split=split, **options, **self._preparing)

    def _check_sampling(self, dataset: Any, args: MultiTaskTrainingArguments) -> None:
        mixing_probabilities(args.task_sampling, dataset.sizes, args.mixing_kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of mixed batches: rank-aware, a pure function of seed and epoch."""
        if not self.tasks or self.train_dataset is None:
            return super().get_train_dataloader()
        options = self.data_collator, self._train_batch_size, self.accelerator, self.share_changes
        return make_loader(self.args, self.train_dataset, *options)

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        """Keep all columns: prepared rows hold nothing that is not needed."""
        if self.tasks:
            return data_collator
        return super()._get_collator_with_removed_columns(data_collator, description)

    # ---- the loss ----

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Collect the micro-batches of an optimizer step, and count its rows and items per task."""
        if not self.tasks:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        if 0 < self.state.max_steps <= self.state.global_step:
            return [], Window({}, {})  # resumed from its last checkpoint, a run would be trained one step too far
        self._check_trained()
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        window = count_window(batches, self.progress.tasks, device, self.args.world_size)
        self.progress.add_window(window)
        self._drawn_at = self.state.global_step if batches else None
        self._to_repeat = (batches, window) if self.balancer.weighting.needs_losses_after_step and batches else None
        return batches, window

    def _check_trained(self) -> None:
        """Raise where the last window went past `training_step`: an override that does not call it."""
        if self._drawn_at is not None and self.state.global_step > self._drawn_at:
            raise RuntimeError(
                f"{type(self).__name__}.training_step does not call super().training_step(...), which weights and "
                "checks the losses of the tasks; call it, or override compute_loss for a loss of your own"
            )

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run forward and backward; heads whose task the window lacks, or weighs 0, end up without a gradient."""
        if not self.tasks:
            return super().training_step(model, inputs, num_items_in_batch)
        unwrapped: Any = self.accelerator.unwrap_model(model)
        if self._at_window_start:
            self._begin_window(unwrapped)
        self._at_window_start = self.accelerator.sync_gradients
        beside = self._measures_beside(self.state.global_step)
        by_task = self.balancer.needs_task_gradients(self.state.global_step, bool(self._shared), not beside)
        if by_task:
            loss = self._backward_by_task(model, inputs, num_items_in_batch)
        else:
            loss = self._run_plain(model, inputs, num_items_in_batch, self.accelerator.sync_gradients)
        loss = loss if self._window_loss is None else self._window_loss + loss
        if not self.accelerator.sync_gradients:
            # What the window turns out to be decides whether its loss counts.
            self._window_loss = loss
            return torch.zeros_like(loss)
        self._window_loss = None
        problem = self._loss_problem(loss)
        if problem is None and by_task:
            loss = self._combine(model, num_items_in_batch)
        if beside:
            self._record_measured(num_items_in_batch)
        unwrapped.finish_window()
        undo_scales(unwrapped, self._scales)
        self._scales = {}
        if problem is None:
            # Of parameters, which are the same on every process: each adds all of it.
            scaler = self.accelerator.scaler
            penalty = unwrapped.add_penalty_gradient(1.0 if scaler is None else scaler.get_scale())
            loss = loss if penalty is None else loss + penalty
            self._leave_idle_alone(unwrapped, num_items_in_batch)
            problem = self._gradient_problem(unwrapped)
        self._drawn_at = None
        self.guard.end_step(skipped=problem is not None)
        self.progress.end_window(trained=problem is None)
        if problem is not None:
            self._to_repeat = None
            self._stop_or_skip(model, problem)
            loss = torch.zeros_like(loss)
        return loss

    def _leave_idle_alone(self, model: Any, window: Window) -> None:
        """Take the gradients away from what a step does not train: zeros would let momentum and decay move it."""
        idle = self.balancer.end_step(window, self.state.global_step)
        if len(idle) < len(self.tasks):
            for parameter in model.untrained_parameters(idle):
                parameter.grad = None
        elif self.accelerator.scaler is None:  # a loss scaler wants gradients
            model.zero_grad()  # all that came weighs nothing: nothing moves

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each task's loss and share, and what balancing and the scheme tell, to the log lines of training."""
        if self.tasks and "loss" in logs and "learning_rate" in logs:
            logs = self._without_skipped(logs) | self.progress.drain(self.args.device, self.args.world_size)
            if self.guard.skipped:
                logs["skipped_steps"] = self.guard.skipped
            logs |= self.balancer.logs() | self.accelerator.unwrap_model(self.model).training_logs()
        super().log(logs, start_time)

    # ---- optimizer ----

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create `Trainer`'s optimizer; with learning rates for backbone or heads, its groups are split in two."""
        given = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        rates = (self.args.backbone_learning_rate, self.args.head_learning_rate) if self.tasks else (None, None)
        if given or rates == (None, None):
            return optimizer
        unwrapped = self.accelerator.unwrap_model(self.model if model is None else model)
        heads = {id(parameter) for parameter in unwrapped.heads.parameters()}
        groups = []
        for group in optimizer.param_groups:
            for in_head, rate in enumerate(rates):
                parameters = [p for p in group["params"] if (id(p) in heads) == bool(in_head)]
                if parameters:
                    groups.append({**group, "params": parameters, "lr": group["lr"] if rate is None else rate})
        optimizer.param_groups[:] = groups
        self._has_own_rates = True
        return optimizer


class MultiTaskTrainer(MultiTaskTrainerMixin, Trainer):
    """`transformers.Trainer` for one model and many tasks; see [`MultiTaskTrainerMixin`] for what it adds.

    With a plain model and a plain dataset it is `Trainer`, bit for bit. Its arguments are those of `Trainer`, in that
    order.
    """

    @wraps(Trainer.__init__, assigned=())  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


class MultiTaskSeq2SeqTrainer(MultiTaskTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` for one model and many tasks, with [`MultiTaskSeq2SeqTrainingArguments`].

    Its arguments are those of `Seq2SeqTrainer`, in that order.
    """

    default_args_class = MultiTaskSeq2SeqTrainingArguments

    @wraps(Seq2SeqTrainer.__init__, assigned=())  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


def _bind(init: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of a trainer's `__init__` by name, only those that were given.

    Where it takes `*args`, these have the names of `Trainer`'s own arguments at their places.

    Raises:
        TypeError: They do not fit its signature.
    """
    signature = inspect.signature(init)
    given: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            names = list(inspect.signature(Trainer.__init__).parameters)[1 + len(given) :]
            if len(value) > len(names):
                raise TypeError(f"{len(args)} positional arguments were given, Trainer takes {len(names) + len(given)}")
            value = dict(zip(names, value, strict=False))
        elif kind is not inspect.Parameter.VAR_KEYWORD:
            value = {name: value}
        if twice := set(given) & set(value):
            raise TypeError(f"got multiple values for argument {sorted(twice)[0]!r}")
        given |= value
    return given


def _accepts(init: Callable[..., Any], name: str) -> bool:
    """Return whether a trainer's `__init__` takes an argument by name."""
    parameters = inspect.signature(init).parameters
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _check_peft(model: Any) -> None:
    """Raise ValueError for a multi-task model that PEFT has wrapped or put adapters into; it may wrap other models."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, MultiTaskModel):
        return
    if inner is not model:
        raise ValueError(
            f"model is a {type(model).__name__} over {type(inner).__name__}, which is not trained or saved as one "
            f"model with its heads; {USE_ADAPTER_MODEL}"
        )
    check_no_peft(model, "a multi-task model in training")


def _field_values(args: MultiTaskTrainingArguments) -> dict[str, Any]:
    return {field.name: getattr(args, field.name) for field in fields(args)}


def _from_json(key: str, value: Any, args: MultiTaskTrainingArguments) -> Any:
    """Return the value of a trial's argument; a search names dictionaries as JSON."""
    if key not in args._VALID_DICT_FIELDS or not isinstance(value, str) or not value.lstrip().startswith("{"):
        return value
    return json.loads(value)
