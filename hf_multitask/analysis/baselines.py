"""Which runs a comparison is made of, and what the result of each depends on.

**The baseline of a task** is a model of this task alone on the same backbone, trained on the same rows with the same
budget *for that task*. If the multi-task run read R rows of the task in n optimizer steps, the baseline reads R rows
too, in about n steps of R / n rows (rounded to whole rows, at least one), with the recipe's learning rate and the same
course of it. So it differs from the multi-task run in one thing: the rows of the other tasks are not there. With the
recipe's batch size instead, a task with a tenth of the rows would get a tenth of the updates, and multi-task training
would win by training longer. Steps that the recipe counts in whole numbers (warm-up, evaluations that pick the best
checkpoint) are scaled where the baseline has fewer. What weighs tasks against each other (sampling, loss weights,
gradient combination) has no meaning for one task, and is left out.

A baseline is the plain backbone with one head, as one would deploy it otherwise; under schemes that keep the backbone
frozen (prefix, adapter), the same scheme with one task, since one would not train the backbone there either.

**A run is known by its content**: the backbone's weights, the tokenizer, the tasks, the rows of training and
validation, all arguments that reach the result, the seed, and the versions of the libraries that compute it. Where all
of it is the same, the result is the same; a changed recipe trains again only what the change reaches.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from ..data.dataset import first_rows
from ..data.row_hashes import columns_of_task, rows_hash
from ..gap_sampling import single_task_scores
from ..models.auto import SCHEMES
from ..models.backbone import load_backbone, weights_hash
from ..models.task import Task
from ..models.task_type import TaskType
from ..recipe import Recipe, RecipeParts
from ..training_args import MultiTaskTrainingArguments

__all__ = ["Budget", "Planner", "Run", "rows_hash"]

_VERSIONS = ("hf_multitask", "torch", "transformers")
# Arguments that do not reach the weights: where things are written, how it is reported, who loads.
_IGNORED = frozenset(
    ["output_dir", "run_name", "project", "report_to", "disable_tqdm", "debug", "local_rank", "skip_memory_metrics"]
    + ["do_train", "do_eval", "do_predict", "resume_from_checkpoint", "per_device_eval_batch_size"]
    + ["eval_accumulation_steps", "dataset_num_proc", "use_cpu", "ignore_data_skip", "torch_empty_cache_steps"]
)
_IGNORED_BEGINNINGS = ("logging_", "log_", "hub_", "push_to_", "trackio_", "dataloader_", "save_", "include_")
# These counts are in optimizer steps where they are 1 or more, else parts of the training.
_IN_STEPS = ("warmup_steps", "eval_steps", "save_steps", "eval_delay")
_QUIET: dict[str, Any] = {
    "disable_tqdm": True,
    "logging_strategy": "no",
    "report_to": "none",
    "push_to_hub": False,
    "resume_from_checkpoint": None,
    "eval_on_start": False,
    "prediction_loss_only": False,
}
# What weighs tasks against each other.
_ALONE: dict[str, Any] = {
    "task_sampling": "proportional",
    "task_sampling_kwargs": None,
    "batch_composition": "mixed",
    "loss_reduction": "rows",
    "primary_task": None,
    "metric_for_best_model": None,
    "greater_is_better": None,
    "loss_weighting": "static",
    "loss_weighting_kwargs": None,
    "gradient_combination": "sum",
    "gradient_combination_kwargs": None,
    "auxiliary_gating": None,
    "combination_every": 1,
    "gradient_memory": "buffer",
    "conflict_logging_steps": 0,
    "auto_find_batch_size": False,
}


@dataclass(frozen=True)
class Budget:
    """How a baseline reads as many rows as the multi-task run read of its task.

    Args:
        rows: Rows of the task that the multi-task run read.
        batch_size: Rows of a micro-batch.
        accumulation: Micro-batches of an optimizer step.
        steps: Optimizer steps.
    """

    rows: int
    batch_size: int
    accumulation: int
    steps: int

    @classmethod
    def of_run(cls, rows: int, steps: int, batch_size: int) -> Budget:
        """Return the budget of a task.

        Args:
            rows: Rows of the task that the multi-task run read.
            steps: Its optimizer steps.
            batch_size: Its rows per micro-batch, the most that a baseline has too.

        Example:
            >>> Budget.of_run(rows=2016, steps=280, batch_size=24)
            Budget(rows=2016, batch_size=7, accumulation=1, steps=288)
        """
        per_step = max(round(rows / steps), 1)
        accumulation = -(-per_step // batch_size)
        own = -(-per_step // accumulation)
        return cls(rows, own, accumulation, max(round(rows / (own * accumulation)), 1))


@dataclass(frozen=True)
class Run:
    """One training of a comparison.

    Args:
        kind: `multi`, `single`, or the mixing strategy that takes the place of the recipe's.
        seed: Seed of heads, rows and dropout.
        recipe: What is run.
        content: All that the result depends on, as plain JSON types.
        metrics: By task, the metric that the recipe names, or None; it only says what is compared, unless it picks the
            best checkpoint.
        task: Of a baseline, its task.
        budget: Of a baseline, how much it reads.
    """

    kind: str
    seed: int
    recipe: Recipe
    content: dict[str, Any] = field(repr=False)
    metrics: dict[str, str | None]
    task: str | None = None
    budget: Budget | None = None

    @property
    def key(self) -> str:
        """SHA-256 of the content, in hexadecimal."""
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()

    @property
    def name(self) -> str:
        """The run in words, which is the beginning of its folder's name."""
        return "-".join([self.kind, *([self.task] if self.task else []), "seed", str(self.seed)])


class Planner:
    """Makes the runs of a recipe.

    Args:
        recipe: The recipe.
        parts: What [`hf_multitask.recipe.build`] made of it.
        custom: Names of the tasks with metric functions of the user's own.
    """

    def __init__(self, recipe: Recipe, parts: RecipeParts, custom: Collection[str] = ()) -> None:
        self.recipe = recipe
        self._custom = sorted(custom)
        self.tasks: list[Task] = parts.model.tasks
        self.args: MultiTaskTrainingArguments = parts.args
        self._values = {values["name"]: values for values in recipe.tasks}
        options = {"encoder_decoder": True, **(recipe.model.get("backbone_kwargs") or {})}
        backbone = load_backbone(parts.tokenizer.name_or_path, **options)
        self._common = {
            "backbone": weights_hash(backbone),
            "architecture": json.loads(json.dumps(backbone.config.to_diff_dict(), default=str)),
            "tokenizer": _tokenizer_hash(parts.tokenizer),
            "versions": {name: version(name) for name in _VERSIONS},
            "device": parts.args.device.type,
        }
        self._common["architecture"].pop("_name_or_path", None)
        self.rows = {task.name: dict(_rows_of(task, parts)) for task in self.tasks}

    # ---- runs ----

    def multi(self, seed: int, sampling: str | None = None) -> Run:
        """Return the multi-task run of a seed.

        Args:
            seed: The seed.
            sampling: A mixing strategy in place of the recipe's.
        """
        training = {**self.recipe.training, "seed": seed}
        if sampling is not None:
            training |= {"task_sampling": sampling, "task_sampling_kwargs": None}
        tasks = [self._with_labels(task) for task in self.tasks]
        return self._run(sampling or "multi", seed, self.recipe.model, tasks, self.tasks, training)

    def single(self, task: Task, seed: int, rows: int, steps: int) -> Run:
        """Return the baseline of a task.

        Args:
            task: The task.
            seed: The seed.
            rows: Rows of the task that the multi-task run of this seed read.
            steps: Optimizer steps of that run.
        """
        budget = Budget.of_run(rows, steps, self.args.per_device_train_batch_size)
        training = {**self.recipe.training, **_ALONE, "seed": seed}
        training |= {"max_steps": budget.steps, "gradient_accumulation_steps": budget.accumulation}
        training |= {"per_device_train_batch_size": budget.batch_size}
        if not task.type.generates:
            training["predict_with_generate"] = False
        if task.type is not TaskType.CAUSAL_LM:
            training["packing"] = False
        for name in _IN_STEPS:
            count = training.get(name)
            if count is not None and count >= 1 and budget.steps < steps:
                training[name] = max(round(count * budget.steps / steps), 1)
        alone = Task.from_dict(_without_weight(task.to_dict()))
        values = _without_weight(self._with_labels(task))
        model = self.recipe.model
        sharing = model.get("sharing", "hard")
        if not SCHEMES[sharing].freezes_backbone:
            kept = ("backbone", "backbone_kwargs", "tokenizer_kwargs", *SCHEMES["hard"].options())
            model = {key: value for key, value in model.items() if key in kept} | {"sharing": "hard"}
        return self._run("single", seed, model, [values], [alone], training, task.name, budget)

    def _with_labels(self, task: Task) -> dict[str, Any]:
        """Return what the recipe says of a task, with the labels that were found in its rows."""
        values = dict(self._values[task.name])
        return values if task.labels is None else {**values, "labels": list(task.labels)}

    def _run(
        self,
        kind: str,
        seed: int,
        model: Mapping[str, Any],
        values: list[dict[str, Any]],
        tasks: list[Task],
        training: Mapping[str, Any],
        task: str | None = None,
        budget: Budget | None = None,
    ) -> Run:
        settled = {**training, **_QUIET}
        if not _needs_evaluations(settled):
            settled |= {"eval_strategy": "no", "eval_steps": None, "eval_delay": 0}
        if not settled.get("load_best_model_at_end"):
            settled["save_strategy"] = "no"
        recipe = Recipe(self.recipe.name, dict(model), values, settled, self.recipe.trust_remote_code)
        described = [task.to_dict() for task in tasks]
        metrics = {values["name"]: values["metric"] for values in described}
        if not _needs_evaluations(settled):
            described = [{**values, "metric": None, "greater_is_better": None} for values in described]
        content = {
            **self._common,
            "model": {key: value for key, value in model.items() if key != "backbone"},
            "tasks": described,
            "custom metrics": [name for name in self._custom if name in metrics],
            "rows": {task.name: self.rows[task.name] for task in tasks},
            "training": dict(_that_matters({"output_dir": "runs", **settled})),
        }
        if settled.get("task_sampling") == "performance_gap":
            content["single-task scores"] = single_task_scores(self.args.mixing_kwargs, self.tasks)
        if budget is not None:
            content["budget"] = asdict(budget)
        return Run(kind, seed, recipe, json.loads(json.dumps(content)), metrics, task, budget)


def _rows_of(task: Task, parts: RecipeParts) -> Iterator[tuple[str, str]]:
    """Yield the splits that a task is trained and judged on, and a hash of what it reads of each."""
    for split in ("train", "validation"):
        dataset = parts.datasets[split].get(task.dataset)
        if dataset is not None:
            if split == "validation":
                dataset = first_rows(dataset, parts.args.max_eval_samples)
            yield split, rows_hash(dataset, columns_of_task(task, dataset))


def _without_weight(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in ("weight", "weight_schedule")}


def _tokenizer_hash(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    rest = [str(tokenizer.special_tokens_map), tokenizer.model_max_length, tokenizer.padding_side]
    return hashlib.sha256(f"{content} {rest}".encode()).hexdigest()


def _needs_evaluations(training: Mapping[str, Any]) -> bool:
    """Return whether evaluations in the course of training have a part in what comes out of it."""
    return bool(
        training.get("load_best_model_at_end")
        or training.get("task_sampling") == "performance_gap"
        or training.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy")
    )


def _that_matters(training: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in MultiTaskTrainingArguments(**training).to_dict().items():
        reaches = name not in _IGNORED and not name.startswith(_IGNORED_BEGINNINGS)
        picks = name == "save_steps" and training.get("load_best_model_at_end")
        if reaches or picks or name == "dataloader_drop_last":
            yield name, json.loads(json.dumps(value, default=str))
