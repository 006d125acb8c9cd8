"""One run on one or several processes; `test_distributed.py` starts it. Rank 0 saves weights, metrics and logs."""

import os
import sys
import tempfile

import torch
from conftest import BACKBONES, make_datasets, make_tasks, make_tokenizer

from hf_multitask import HardSharingModel, MultiTaskTrainer, MultiTaskTrainingArguments


def main(out: str, composition: str, reduction: str, sampling: str = "weighted", resume: str = "") -> None:
    torch.manual_seed(0)
    model = HardSharingModel.from_backbone(BACKBONES["bert"](), make_tasks())
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            # Which random numbers a row gets depends on the layout; a run that goes on has that of its first part.
            module.p = 0.1 if resume else 0.0
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    args = MultiTaskTrainingArguments(
        os.path.dirname(resume) or tempfile.mkdtemp(),
        max_steps=6,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4 // processes,
        per_device_eval_batch_size=3,
        learning_rate=0.05,
        optim="sgd",
        weight_decay=0.1,  # moves whatever has a gradient, if only of zeros
        logging_steps=2,
        save_strategy="steps" if resume else "no",
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        batch_composition=composition,
        loss_reduction=reduction,
        task_sampling=sampling,
        # `traits` has no rows at all, `names` none in some micro-batches of some processes
        task_sampling_kwargs={"weights": {"reviews": 6, "traits": 0, "names": 1}} if sampling == "weighted" else None,
    )
    datasets = make_datasets(rows=44)
    idle = [parameter.detach().clone() for parameter in model.heads["traits"].parameters()]
    trainer = MultiTaskTrainer(
        model, args, train_dataset=datasets, eval_dataset=datasets, processing_class=make_tokenizer()
    )
    trainer.train(resume_from_checkpoint=resume if os.path.isdir(resume) else None)
    metrics = trainer.evaluate()
    now = list(model.heads["traits"].parameters())
    if trainer.is_world_process_zero():
        logs = [line for line in trainer.state.log_history if "loss" in line]
        torch.save(
            {
                "weights": {name: parameter.detach() for name, parameter in model.named_parameters()},
                "metrics": metrics,
                "logs": logs,
                "rows_seen": trainer.progress.rows_seen,
                "idle_is_untouched": all(torch.equal(a, b) for a, b in zip(idle, now, strict=True)),
            },
            out,
        )
    trainer.accelerator.wait_for_everyone()
    trainer.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
