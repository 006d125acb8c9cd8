"""`MultiTaskTrainer` with one plain dataset and a plain model against `Trainer`: the same numbers, at the same speed.

    python recipes/benchmarks/trainer_overhead.py [--write]

Both train MiniLM with a classification head on the quickstart's texts for 20 steps, step by step in turns (two
threads that hand over to each other), so that the load of the machine falls on both. Losses, gradient norms and final
weights are compared bit by bit, medians of the step times by their ratio. `--write` writes the result beside this file.
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
    """Lets two trainers, each in a thread of its own, run one whole step at a time."""

    def __init__(self, turns: list[threading.Semaphore], place: int) -> None:
        self.mine, self.other = turns[place], turns[1 - place]
        self.times: list[float] = []
        self.lines: list[dict[str, float]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.mine.acquire()
        self.start = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "grad_norm" in (logs or {}):
            # The end of a step with all that belongs to it; the next one begins with the loader.
            self.lines.append({key: logs[key] for key in ("loss", "grad_norm")})
            self.times.append(time.perf_counter() - self.start)
            self.other.release()
            if state.global_step < state.max_steps:
                self.mine.acquire()
            self.start = time.perf_counter()


def run(trainer_class: type, args_class: type, turns: list, place: int, results: dict[str, Any], settings) -> None:
    """Make one trainer, train, and leave lines, times and weights in `results`."""
    rows, tokenizer, steps = settings
    with _making:
        set_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(backbone_folder(), num_labels=4)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # one random state serves both threads
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
        watch = InTurns(turns, place)
        trainer = trainer_class(
            model=model,
            args=args,
            train_dataset=rows,
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
            callbacks=[watch],
        )
        trainer.pop_callback(next(c for c in trainer.callback_handler.callbacks if "Printer" in type(c).__name__))
        # Each thread draws its rows from the seed alone.
        sampler = torch.utils.data.RandomSampler(rows, generator=torch.Generator().manual_seed(0))
        trainer._get_train_sampler = lambda dataset=None: sampler
    trainer.train()
    results[trainer_class.__name__] = (
        watch.lines,
        watch.times,
        {name: parameter.detach() for name, parameter in model.named_parameters()},
    )


_making = threading.Lock()


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
    turns = [threading.Semaphore(1), threading.Semaphore(0)]
    results: dict[str, Any] = {}
    threads = [
        threading.Thread(target=run, args=(*classes, turns, place, results, (rows, tokenizer, arguments.steps)))
        for place, classes in enumerate([(Trainer, TrainingArguments), (MultiTaskTrainer, MultiTaskTrainingArguments)])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines, times, weights = results["Trainer"]
    own_lines, own_times, own_weights = results["MultiTaskTrainer"]
    first = 5  # steps that warm up caches
    medians = float(np.median(times[first:])), float(np.median(own_times[first:]))
    result = {
        "steps": arguments.steps,
        "losses and gradient norms bit-equal": lines == own_lines and len(lines) == arguments.steps,
        "final weights bit-equal": all(torch.equal(weights[name], own_weights[name]) for name in weights),
        "median seconds per step": {"Trainer": medians[0], "MultiTaskTrainer": medians[1]},
        "steps per second over Trainer's": medians[0] / medians[1],
        "bound": 0.97,
        "setting": {"rows per batch": 16, **describe()},
    }
    write_result(__file__, result, arguments.write)


if __name__ == "__main__":
    main()
