"""`MultiTaskTrainer` with one plain dataset and a plain model against `Trainer`: the same numbers, at the same speed.

    python recipes/benchmarks/trainer_overhead.py [--write]

Both fine-tune MiniLM with a classification head on the quickstart's texts. First for 20 steps one after the other,
dropout on: losses, gradient norms and final weights are compared bit by bit. Then step by step in turns (two threads
that hand over to each other), so that the load of the machine falls on both: medians of the step times are compared.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from typing import Any

import numpy as np
import torch
from common import describe, write_result
from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from hf_multitask import MultiTaskTrainer, MultiTaskTrainingArguments
from hf_multitask.quickstart import backbone_folder, dataset_files


class InTurns(TrainerCallback):
    """Notes each step; with `turns`, two trainers, each in a thread of its own, run one whole step at a time."""

    def __init__(self, turns: list[threading.Semaphore] | None, place: int) -> None:
        self.mine, self.other = (turns[place], turns[1 - place]) if turns else (None, None)
        self.times: list[float] = []
        self.lines: list[dict[str, float]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        if self.mine:
            self.mine.acquire()
        self.start = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "grad_norm" in (logs or {}):
            # The end of a step with all that belongs to it; the next one begins with the loader.
            self.lines.append({key: logs[key] for key in ("loss", "grad_norm")})
            self.times.append(time.perf_counter() - self.start)
            if self.mine:
                self.other.release()
                if state.global_step < state.max_steps:
                    self.mine.acquire()
            self.start = time.perf_counter()


def make(kind: str, rows: Any, tokenizer: Any, steps: int, turns: list | None = None) -> tuple[Trainer, InTurns]:
    """Return a trainer of a kind (`Trainer` or `MultiTaskTrainer`) and what watches it."""
    trainer_class, args_class = KINDS[kind]
    set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(backbone_folder(), num_labels=4)
    args = args_class(
        tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    watch = InTurns(turns, list(KINDS).index(kind))
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        callbacks=[watch],
    )
    trainer.pop_callback(next(c for c in trainer.callback_handler.callbacks if "Printer" in type(c).__name__))
    return trainer, watch


KINDS: dict[str, tuple[type, type]] = {
    "Trainer": (Trainer, TrainingArguments),
    "MultiTaskTrainer": (MultiTaskTrainer, MultiTaskTrainingArguments),
}


def main() -> None:
    """Run both and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write trainer_overhead.json")
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(backbone_folder())
    rows = load_dataset("parquet", data_files=dataset_files("vader"), split="train").select(range(2000))
    sources = sorted(set(rows["source"]))
    rows = rows.map(
        lambda row: {**tokenizer(row["text"], truncation=True, max_length=64), "labels": sources.index(row["source"])},
        remove_columns=rows.column_names,
    )
    ends = {}
    for kind in KINDS:
        trainer, watch = make(kind, rows, tokenizer, 20)
        trainer.train()
        ends[kind] = watch.lines, [parameter.detach().clone() for parameter in trainer.model.parameters()]
    (lines, weights), (own_lines, own_weights) = ends.values()

    turns = [threading.Semaphore(1), threading.Semaphore(0)]
    pairs = {kind: make(kind, rows, tokenizer, arguments.steps, turns) for kind in KINDS}
    threads = [threading.Thread(target=trainer.train) for trainer, _ in pairs.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first = 5  # steps that warm up caches
    medians = [float(np.median(watch.times[first:])) for _, watch in pairs.values()]
    result = {
        "over 20 steps": {
            "losses and gradient norms bit-equal": lines == own_lines and len(lines) == 20,
            "final weights bit-equal": all(map(torch.equal, weights, own_weights)),
        },
        "steps timed": arguments.steps - first,
        "median seconds per step": dict(zip(KINDS, medians, strict=True)),
        "steps per second over Trainer's": medians[0] / medians[1],
        "bound": 0.97,
        "setting": {"rows per batch": 16, **describe()},
    }
    write_result(__file__, result, arguments.write)


if __name__ == "__main__":
    main()
