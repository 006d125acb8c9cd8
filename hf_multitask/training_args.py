"""Arguments of the multi-task trainer, beside those of `transformers.TrainingArguments`."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Seq2SeqTrainingArguments, TrainingArguments

from .balancing.combination import check_combination
from .balancing.elementwise import ELEMENTWISE
from .balancing.gating import GATINGS
from .balancing.weighting import check_weighting
from .data.sampling import check_mixing
from .models.task import closest

__all__ = ["MultiTaskSeq2SeqTrainingArguments", "MultiTaskTrainingArguments", "settle_args"]

_COMPOSITIONS = ("mixed", "single_task")
_REDUCTIONS = ("rows", "tasks")
_NONFINITE = ("raise", "skip")
_MEMORIES = ("buffer", "sketch")
_DICTIONARIES = ["task_sampling_kwargs", "dataset_sizes", "loss_weighting_kwargs", "gradient_combination_kwargs"]


@dataclass
class MultiTaskTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the choices that several tasks bring along.

    What rows come:

    - `task_sampling`: how often each dataset is read; a name in [`hf_multitask.data.sampling.MIXING`]. The default,
      `temperature`, takes size^0.75: large datasets come less often than in proportion, small ones more often.
    - `task_sampling_kwargs`: the strategy's own arguments, such as `{"alpha": 0.5}` or `{"weights": {...}}`.
    - `batch_composition`: `mixed` fills every batch from all datasets; `single_task` takes all rows of a batch from
      one, which pads less where lengths differ much but makes consecutive steps (without accumulation) pull in
      different directions.
    - `train_sampling_strategy`: `random`, or `group_by_length`, which lets rows of similar length of each dataset
      come together; it pads less, and leaves shares as they are.
    - `max_length`: longest input in tokens, special tokens included; longer ones are truncated. None takes what
      tokenizer and backbone allow.
    - `dataset_num_proc`: processes that tokenize.
    - `packing`: put short rows of a `causal_lm` task into long sequences, so that little is padding. Positions begin
      anew with each row, and no row attends to another: losses are the same. It needs a causal decoder and a sharing
      scheme without prefixes. `packing_length` is the most tokens of a sequence; None for no limit.
    - `dataset_sizes`: rows of streamed datasets (`IterableDataset`) by name, as a dictionary; for those that do not
      know it themselves. They set shares and the length of an epoch, and need not be exact.

    What generating tasks (`causal_lm`, `seq2seq_lm`) are evaluated by:

    - `max_eval_samples`: evaluate on the first rows of each dataset only; None takes all. For tasks of all types.
    - `predict_with_generate`: write text for every row, and compare it with the target (`exact_match`, `rouge_l`);
      without it, and beside it, the likelihood of the targets counts (see [`hf_multitask.generation`]).

    What counts:

    - `loss_reduction`: `rows` weighs each task's mean loss with its share of the rows of an optimizer step, so that
      each row counts alike and sampling decides the shares; `tasks` gives each task that is present the same share.
    - `primary_task`: the task whose primary metric picks the best checkpoint and stops training. It sets
      `metric_for_best_model`. Without it the mean over the tasks, `eval_average`, does; its metrics must then all be
      better when larger, or all when smaller. `greater_is_better`, where it is given, decides in any case; else the
      direction is the metric's own (`Task(greater_is_better=...)`, or what its name says).

    How tasks are balanced (what the methods are: [`hf_multitask.balancing.weighting`] and
    [`hf_multitask.balancing.combination`]):

    - `loss_weighting`, `loss_weighting_kwargs`: what each task's loss is multiplied with, anew in every step, on top of
      its share and its `weight`; a name in `WEIGHTINGS`, or an object with a method `weights(observation)`. Weights are
      those of the step's own losses, so with gradient accumulation all but `static` need `gradient_memory` too.
    - `gradient_combination`, `gradient_combination_kwargs`: how the tasks' gradients on the shared parameters become
      one; a name in `COMBINATIONS`, `graddrop`, or a weighting of `torchjd` (or anything else that makes coefficients
      of a Gramian; with unequal weights it is asked for the more heavily weighted tasks alone, too). Methods see the
      gradients of the losses themselves; weights say in how much of the update a task takes part, so that a smaller one
      always means less influence. All but `sum` hold a copy of the shared gradient per task.
    - `auxiliary_gating`: how the gradient of an auxiliary task on the shared parameters counts; a name in
      [`hf_multitask.balancing.gating.GATINGS`]. `cosine` lets it count in full while it does not conflict with the
      primary task's (without `primary_task`, with the weighted sum of all tasks that are not auxiliary) and not at all
      while it does; `weighted_cosine` as far as they agree. None, the default, does not look. A gate multiplies the
      task's weight, at the steps and the price of a gradient combination. In a step that lacks rows of either,
      everything counts.
    - `combination_every`: optimizer steps between two decisions; in between coefficients and gates are used again, at
      the price of a plain step.
    - `gradient_memory`: `buffer` keeps the gradients of all tasks, T + 1 times the shared parameters in float32;
      `sketch` keeps small sketches of them and runs every step a second time, with the coefficients that the sketches
      gave: twice the time, and the memory of a plain step (see [`hf_multitask.balancing.sketch`] for the error).
    - `conflict_logging_steps`: log the cosines between the tasks' gradients, `conflict/<a>|<b>`, every so many steps;
      0 for never. With a gradient combination they cost nothing.

    How it is optimized:

    - `backbone_learning_rate`, `head_learning_rate`: in place of `learning_rate` for the parameters of the backbone or
      of the heads, which start from nothing and often bear a larger one. The schedule scales them alike.
    - `on_nonfinite_loss`: `raise` stops before the step when the loss of a task or the gradient is NaN or infinite, and
      names task, step and rows; `skip` leaves the step out, counts it and logs `skipped_steps`. Weights that are NaN or
      infinite always stop training, before a checkpoint of them is written.
    - `max_skipped_steps`: with `skip`, the most steps that are left out in a row (10); the next one raises. Single bad
      rows do not come that often; after a step that spoiled the weights, every further one would be left out.

    What goes to the Hub:

    - `hub_include_code`: save the modelling code with the model, so that it loads with `trust_remote_code=True` where
      this library is not installed (see [`hf_multitask.hub.code`]).

    Raises:
        ValueError: An argument is not one of its values; the nearest is named.

    Example:
        >>> args = MultiTaskTrainingArguments("runs/out", task_sampling_kwargs={"alpha": 0.5}, report_to="none")
        >>> args.task_sampling
        'temperature'
    """

    task_sampling: str = field(
        default="temperature", metadata={"help": "Mixing strategy: how often each dataset is read."}
    )
    task_sampling_kwargs: dict[str, Any] | str | None = field(  # a string: JSON, from a command line
        default=None, metadata={"help": "Arguments of the mixing strategy, as JSON."}
    )
    batch_composition: str = field(
        default="mixed", metadata={"help": "'mixed', or 'single_task' for batches of one dataset each."}
    )
    loss_reduction: str = field(
        default="rows", metadata={"help": "Share of a task in the loss: its 'rows', or the same for all 'tasks'."}
    )
    primary_task: str | None = field(
        default=None, metadata={"help": "Task whose metric picks the best checkpoint and stops training."}
    )
    loss_weighting: str = field(default="static", metadata={"help": "How the losses of the tasks are weighed."})
    loss_weighting_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of the loss weighting, as JSON."}
    )
    gradient_combination: str = field(
        default="sum", metadata={"help": "How the gradients of the tasks become one on shared parameters."}
    )
    gradient_combination_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of the gradient combination, as JSON."}
    )
    auxiliary_gating: str | None = field(
        default=None, metadata={"help": "Gate of auxiliary gradients: 'cosine', 'weighted_cosine', or none."}
    )
    combination_every: int = field(default=1, metadata={"help": "Steps between two decisions of the combination."})
    gradient_memory: str = field(
        default="buffer", metadata={"help": "Keep the tasks' gradients in a 'buffer', or a 'sketch' of them."}
    )
    conflict_logging_steps: int = field(
        default=0, metadata={"help": "Log the cosines between the tasks' gradients every so many steps; 0: never."}
    )
    on_nonfinite_loss: str = field(
        default="raise", metadata={"help": "A loss that is NaN or infinite: 'raise', or 'skip' the step."}
    )
    max_skipped_steps: int = field(
        default=10, metadata={"help": "With on_nonfinite_loss='skip': most steps left out in a row."}
    )
    backbone_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the backbone, in place of learning_rate."}
    )
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the heads, in place of learning_rate."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Longest input in tokens; longer ones are cut."})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    predict_with_generate: bool = field(
        default=False, metadata={"help": "Let tasks that generate write text at evaluation and prediction."}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "Most rows of each dataset at evaluation."})
    packing: bool = field(default=False, metadata={"help": "Put short rows of causal_lm tasks into long sequences."})
    packing_length: int | None = field(default=None, metadata={"help": "Most tokens of a packed sequence."})
    dataset_sizes: dict[str, int] | str | None = field(
        default=None, metadata={"help": "Rows of streamed datasets by name, as JSON."}
    )
    hub_include_code: bool = field(
        default=False, metadata={"help": "Save the modelling code with the model, for trust_remote_code=True."}
    )

    # Values of these may be given as JSON on a command line.
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, *_DICTIONARIES]

    def __post_init__(self) -> None:
        """Check the choices."""
        # Whether the metric was chosen; TrainingArguments fills in "loss", which several tasks do not have.
        self._metric_was_given = self.metric_for_best_model not in (None, "loss")
        # "loss" and its direction are what TrainingArguments fills in; they come back in a copy of arguments.
        filled_in = self.metric_for_best_model == "loss" and self.greater_is_better is False
        self._direction_was_given = self.greater_is_better is not None and not filled_in
        super().__post_init__()
        self.check_choices()

    def check_choices(self) -> None:
        """Raise ValueError where an argument is not one of its values; for arguments that were assigned, too."""
        for name, allowed in (
            ("batch_composition", _COMPOSITIONS),
            ("loss_reduction", _REDUCTIONS),
            ("on_nonfinite_loss", _NONFINITE),
            ("gradient_memory", _MEMORIES),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} {value!r} is not known{closest(value, allowed)}; choose from {allowed}")
        if self.auxiliary_gating is not None and self.auxiliary_gating not in GATINGS:
            raise ValueError(
                f"auxiliary_gating {self.auxiliary_gating!r} is not known{closest(self.auxiliary_gating, GATINGS)}; "
                f"choose from {', '.join(GATINGS)}, or None"
            )
        check_mixing(self.task_sampling, self.mixing_kwargs)
        if isinstance(self.loss_weighting, str):
            check_weighting(self.loss_weighting, self.weighting_kwargs)
        kwargs = {key: value for key, value in self.combination_kwargs.items() if not isinstance(value, dict)}
        check_combination(self.gradient_combination, kwargs)
        if (
            self.gradient_memory == "sketch"
            and isinstance(self.gradient_combination, str)
            and (self.gradient_combination in ELEMENTWISE)
        ):
            raise ValueError(
                f"gradient_memory='sketch' does not go with {self.gradient_combination!r}, which needs the gradients "
                "themselves; use 'buffer'"
            )
        for name, least in (("combination_every", 1), ("conflict_logging_steps", 0), ("max_skipped_steps", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        for name in ("backbone_learning_rate", "head_learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
        for name in ("max_length", "dataset_num_proc", "packing_length", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a positive whole number, got {value!r}")
        for name, size in self.stream_sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"dataset_sizes[{name!r}] must be a positive whole number, got {size!r}")

    @property
    def stream_sizes(self) -> dict[str, int]:
        """The rows of streamed datasets that were given, as a dictionary."""
        return self._dictionary("dataset_sizes")

    @property
    def mixing_kwargs(self) -> dict[str, Any]:
        """The mixing strategy's own arguments, as a dictionary."""
        return self._dictionary("task_sampling_kwargs")

    @property
    def weighting_kwargs(self) -> dict[str, Any]:
        """The loss weighting's own arguments, as a dictionary."""
        return self._dictionary("loss_weighting_kwargs")

    @property
    def combination_kwargs(self) -> dict[str, Any]:
        """The gradient combination's own arguments, as a dictionary."""
        return self._dictionary("gradient_combination_kwargs")

    def _dictionary(self, name: str) -> dict[str, Any]:
        value = getattr(self, name)
        if isinstance(value, str):
            raise ValueError(f"{name} must be a dictionary or JSON, got {value!r}")
        return value or {}

    def to_dict(self) -> dict[str, Any]:
        """Return all arguments; objects stand there by the name of their class, so that it can be written as JSON."""
        result = super().to_dict()
        for name in ("loss_weighting", "gradient_combination"):
            if not isinstance(result[name], str):
                result[name] = type(result[name]).__name__
        return result


@dataclass
class MultiTaskSeq2SeqTrainingArguments(MultiTaskTrainingArguments, Seq2SeqTrainingArguments):
    """[`MultiTaskTrainingArguments`] and `Seq2SeqTrainingArguments` in one, for [`MultiTaskSeq2SeqTrainer`]."""


def settle_args(args: Any, compute_loss_func: Any, optimizer: Any) -> MultiTaskTrainingArguments:
    """Return a copy of a trainer's arguments for several tasks, after refusing what several tasks cannot honour.

    Args:
        args: The arguments.
        compute_loss_func: The loss function that the trainer was given, or None.
        optimizer: The optimizer that the trainer was given, or None.

    Raises:
        ValueError: One does not go with a multi-task model, or the output folder cannot be written.
    """
    refused = {
        "compute_loss_func": (compute_loss_func, "the heads compute the losses; Task(weight=...) weighs them"),
        "label_smoothing_factor": (args.label_smoothing_factor, "set Task(label_smoothing=...) per task"),
        "batch_eval_metrics": (args.batch_eval_metrics, "metrics are computed over whole datasets"),
        "train_sampling_strategy": (
            args.train_sampling_strategy not in ("random", "group_by_length"),
            "task_sampling and batch_composition say how rows are drawn; 'group_by_length' does",
        ),
        "eval_do_concat_batches=False": (not args.eval_do_concat_batches, "metrics need whole datasets"),
        "an optimizer of your own with backbone_learning_rate or head_learning_rate": (
            optimizer is not None and (args.backbone_learning_rate, args.head_learning_rate) != (None, None),
            "give the optimizer its groups yourself",
        ),
        "n_gpu > 1": (args.n_gpu > 1, "use one process per device: accelerate launch, or CUDA_VISIBLE_DEVICES=0"),
    }
    for name, mend in (
        ("split_batches", "per_device_train_batch_size is the batch of one process"),
        ("dispatch_batches", "every process draws rows of its own, which would have to be of one shape"),
    ):
        refused[f"accelerator_config={{'{name}': True}}"] = getattr(args.accelerator_config, name, False), mend
    for name, (value, mend) in refused.items():
        if value:
            raise ValueError(f"{name} does not go with a multi-task model: {mend}")
    _check_output_dir(args.output_dir)
    args = copy.copy(args)
    if args.label_names is None:
        args.label_names = ["labels"]  # `Trainer` would take every argument of forward with "label" in its name
    if args.ddp_find_unused_parameters is None:
        # Heads without rows take part with a term of zero instead: no search through the graph.
        args.ddp_find_unused_parameters = False
    if not torch.accelerator.is_available():
        args.dataloader_pin_memory = False  # there is nothing to pin for, and torch would warn of it
    args.logging_nan_inf_filter = False  # the guard looks at every window, and does not paper over what it finds
    return args


def _check_output_dir(output_dir: str | None) -> None:
    """Raise unless the output folder exists and can be written, or can be made."""
    path = Path(output_dir or "tmp_trainer").absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir():
        raise ValueError(f"output_dir {output_dir!r} cannot be made: {str(existing)!r} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"output_dir {output_dir!r} cannot be written: no permission for {str(existing)!r}")
