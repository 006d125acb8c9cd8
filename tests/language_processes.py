"""Tasks over the vocabulary on several processes; `test_language_run.py` starts it. Rank 0 saves what came out."""

import json
import os
import sys
import tempfile

import torch
from conftest import make_datasets, make_tokenizer
from language import decoder_tokenizer, sayings
from test_language_run import build

from hf_multitask import MultiTaskTrainer, MultiTaskTrainingArguments


def main(out: str, family: str, kind: str, extra: str) -> None:
    model = build((family, kind))
    reviews = make_datasets()["reviews"]
    train, evaluation = {"reviews": reviews}, {"reviews": reviews.select(range(11))}
    if family != "encoder":
        train["sayings"], evaluation["sayings"] = sayings(), sayings(7)
    args = MultiTaskTrainingArguments(
        tempfile.mkdtemp(),
        max_steps=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4 // int(os.environ.get("WORLD_SIZE", "1")),
        per_device_eval_batch_size=3,
        learning_rate=0.05,
        optim="sgd",
        logging_steps=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        predict_with_generate=family != "encoder",
        **{"task_sampling": "uniform", **json.loads(extra)},
    )
    trainer = MultiTaskTrainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=make_tokenizer() if family == "encoder" else decoder_tokenizer(),
    )
    trainer.train()
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        torch.save({"weights": weights, "metrics": metrics}, out)
    trainer.accelerator.wait_for_everyone()
    trainer.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
