"""One run on one or several processes; `test_distributed.py` starts it. Rank 0 saves weights, metrics and logs."""

import json
import os
import sys
import tempfile
from dataclasses import replace

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from conftest import BACKBONES, make_datasets, make_tasks, make_tokenizer
from transformers import TrainerCallback

from hf_multitask import MultiTaskTrainer, MultiTaskTrainingArguments
from hf_multitask.data.sources import make_sources
from hf_multitask.models.auto import SCHEMES


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """Return a parameter, put together from its shards where it is sharded."""
    value = parameter.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value.clone()


def shard_on_the_cpu() -> None:
    """Let Accelerate shard: it does so on accelerators only, without saying so, though its code runs on a CPU too."""
    state = PartialState()._shared_state
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        state["distributed_type"] = DistributedType.MULTI_GPU
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        rank = int(os.environ["RANK"])
        state |= {"num_processes": int(os.environ["WORLD_SIZE"]), "process_index": rank, "local_process_index": rank}


class Switch(TrainerCallback):
    """Freezes the embeddings, or unfreezes what was frozen from the beginning, in mid-training."""

    def __init__(self, trained: bool) -> None:
        self.trained = trained

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.backbone.embeddings.requires_grad_(not self.trained)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            model.backbone.embeddings.requires_grad_(self.trained)


class OwnLoss(MultiTaskTrainer):
    """Trains twice the loss of the heads, by an overridden `compute_loss`."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return (2 * loss, outputs) if return_outputs else 2 * loss


def main(
    out: str, composition: str, reduction: str, sampling: str = "weighted", resume: str = "", extra: str = "{}"
) -> None:
    settings = json.loads(extra)
    scheme = SCHEMES[settings.pop("scheme", "hard")]
    torch.manual_seed(0)
    changes = settings.pop("tasks", {})
    switch = settings.pop("switch", None)
    kind = OwnLoss if settings.pop("own_loss", False) else MultiTaskTrainer
    tasks = [replace(task, **changes.get(task.name, {})) for task in make_tasks()]
    model = scheme.from_backbone(BACKBONES["bert"](), tasks, **settings.pop("options", {}))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            # Which random numbers a row gets depends on the layout; a run that goes on has that of its first part.
            module.p = 0.1 if resume else 0.0
    # `traits` has no rows at all, `names` none in some micro-batches of some processes
    parts = {"reviews": 6, "traits": 0, "names": 1}
    shares = {source.name: parts[source.dataset] for source in make_sources(model.tasks, model.shares_rows)}
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    args = MultiTaskTrainingArguments(
        os.path.dirname(resume) or tempfile.mkdtemp(),
        max_steps=6,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4 // processes,
        per_device_eval_batch_size=3,
        optim="adamw_torch" if resume else "sgd",  # with nothing to save in its optimizer a run is resumed too easily
        weight_decay=0.1,  # moves whatever has a gradient, if only of zeros
        logging_steps=2,
        save_strategy="steps" if resume else "no",
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu="ACCELERATE_USE_DEEPSPEED" not in os.environ,  # DeepSpeed finds its device by itself
        batch_composition=composition,
        loss_reduction=reduction,
        task_sampling="temperature" if sampling == "streams" else sampling,
        **{
            "learning_rate": 0.05,
            "task_sampling_kwargs": {"weights": shares} if sampling == "weighted" else None,
            **settings,
        },
    )
    shard_on_the_cpu()
    datasets = make_datasets(rows=44)
    train = datasets
    if sampling == "streams":
        args.dataset_sizes = {name: len(part) for name, part in datasets.items()}
        train = {name: part.to_iterable_dataset(num_shards=2) for name, part in datasets.items()}
        train["traits"] = train["traits"].shuffle(seed=1, buffer_size=6)
    idle = [whole(parameter) for parameter in model.idle_parameters("traits")]
    trainer = kind(
        model,
        args,
        train_dataset=train,
        eval_dataset=datasets,
        processing_class=make_tokenizer(),
        callbacks=[] if switch is None else [Switch(switch)],
    )
    trainer.train(resume_from_checkpoint=resume if os.path.isdir(resume) else None)
    shards = sum(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    metrics = trainer.evaluate()
    if trainer.is_deepspeed_enabled:
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    else:
        weights = {name: whole(parameter) for name, parameter in model.named_parameters()}
    now = [whole(parameter) for parameter in model.idle_parameters("traits")]
    if trainer.is_world_process_zero():
        logs = [line for line in trainer.state.log_history if "loss" in line]
        torch.save(
            {
                "weights": weights,
                "distributed_type": trainer.accelerator.distributed_type.value,
                "shards": shards,
                "metrics": metrics,
                "logs": logs,
                "rows_seen": trainer.progress.rows_seen,
                "idle_is_untouched": all(torch.equal(a, b) for a, b in zip(idle, now, strict=True))
                if not trainer.is_deepspeed_enabled
                else None,
            },
            out,
        )
    trainer.accelerator.wait_for_everyone()
    trainer.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # On a CPU, gloo's threads for the shards sometimes abort an interpreter that is already closing down.
        sys.stdout.flush()
        os._exit(0)
