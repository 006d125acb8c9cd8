"""Questions and choices on one or several processes; `test_question_run.py` starts it. Rank 0 saves what came out."""

import os
import sys
import tempfile

import torch
from conftest import BACKBONES, make_datasets, make_tokenizer
from questions import question_datasets, question_tasks

from hf_multitask import HardSharingModel, MultiTaskTrainer, MultiTaskTrainingArguments


def main(out: str, combination: str) -> None:
    torch.manual_seed(0)
    model = HardSharingModel.from_backbone(BACKBONES["bert"](), question_tasks())
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    args = MultiTaskTrainingArguments(
        tempfile.mkdtemp(),
        max_steps=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4 // int(os.environ.get("WORLD_SIZE", "1")),
        per_device_eval_batch_size=3,
        learning_rate=0.05,
        optim="sgd",
        task_sampling="uniform",
        gradient_combination=combination,
        logging_steps=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    reviews = {"reviews": make_datasets()["reviews"]}
    trainer = MultiTaskTrainer(
        model,
        args,
        train_dataset={**question_datasets(), **reviews},
        eval_dataset={**question_datasets(1, who=11, next=10), **reviews},
        processing_class=make_tokenizer(),
    )
    trainer.train()
    metrics = trainer.evaluate()
    predictions = {name: torch.tensor(output.predictions) for name, output in trainer.predict(unlabelled()).items()}
    if trainer.is_world_process_zero():
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        torch.save({"weights": weights, "metrics": metrics, "predictions": predictions}, out)
    trainer.accelerator.wait_for_everyone()
    trainer.end()


def unlabelled() -> dict:
    data = question_datasets(2, who=7, next=7)
    return {"who": data["who"].remove_columns("answers"), "next": data["next"].remove_columns("label")}


if __name__ == "__main__":
    main(*sys.argv[1:])
