"""Time of the data path (sampler, reading rows, collator) with 4 and with 256 tasks, beside a MiniLM training step.

    python recipes/benchmarks/data_overhead.py [--write]

Both data paths and the training step are timed in one run, in turns, so that the load of the machine falls on all;
medians are compared. `--write` writes the result beside this file.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from common import describe, write_result
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from transformers import AutoTokenizer

from hf_multitask import DataCollatorForMultiTask, HardSharingModel, Task
from hf_multitask.data.dataset import prepare_sources
from hf_multitask.data.sampling import mixing_probabilities
from hf_multitask.data.schedule import MultiTaskBatchSampler
from hf_multitask.data.sources import make_sources
from hf_multitask.quickstart import backbone_folder

ROWS, BATCH, TOKENS = 65_536, 32, 50


class DataPath:
    """Sampler, rows and collator of T tasks that hold the same number of rows together."""

    def __init__(self, tasks: int, tokenizer) -> None:
        generator = np.random.default_rng(0)
        self.tasks = [Task(f"task{i}", "single_label_classification", labels=("a", "b", "c")) for i in range(tasks)]
        datasets = {}
        for task in self.tasks:
            lengths = generator.integers(TOKENS - 20, TOKENS + 1, ROWS // tasks)
            datasets[task.name] = Dataset.from_dict(
                {
                    "input_ids": [generator.integers(1000, 20_000, n).tolist() for n in lengths],
                    "labels": generator.integers(0, 3, len(lengths)).tolist(),
                }
            )
        self.dataset = prepare_sources(
            datasets, make_sources(self.tasks), "train_dataset", tokenizer=tokenizer, max_length=TOKENS
        )
        sizes = self.dataset.sizes
        self.sampler = MultiTaskBatchSampler(
            sizes, lambda epoch: mixing_probabilities("temperature", sizes), rows_per_batch=BATCH
        )
        self.collator = DataCollatorForMultiTask(tokenizer, self.tasks)
        self.batches = iter(self.sampler)

    def next_batch(self) -> dict:
        return self.collator([self.dataset[i] for i in next(self.batches)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write data_overhead.json")
    parser.add_argument("--steps", type=int, default=15, help="MiniLM steps; each stands beside 40 batches per path")
    arguments = parser.parse_args()
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(backbone_folder())
    paths = {4: DataPath(4, tokenizer), 256: DataPath(256, tokenizer)}
    model = HardSharingModel.from_backbone(str(backbone_folder()), paths[4].tasks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    times: dict = {4: [], 256: [], "step": []}

    def timed(key, function):
        start = time.perf_counter()
        result = function()
        times[key].append(time.perf_counter() - start)
        return result

    def step(batch):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(arguments.steps):
        for _ in range(40):
            for tasks, path in paths.items():
                batch = timed(tasks, path.next_batch)
                if tasks == 4:
                    last = batch
        timed("step", lambda batch=last: step(batch))
    medians = {key: float(np.median(values)) for key, values in times.items()}
    result = {
        "milliseconds": {
            "data path, 4 tasks": medians[4] * 1e3,
            "data path, 256 tasks": medians[256] * 1e3,
            "MiniLM training step": medians["step"] * 1e3,
        },
        "256 tasks over 4 tasks": medians[256] / medians[4],
        "256 tasks over the training step": medians[256] / medians["step"],
        "bounds": {"256 tasks over 4 tasks": 1.2, "256 tasks over the training step": 0.02},
        "setting": {"rows per batch": BATCH, "longest row in tokens": TOKENS, **describe()},
    }
    write_result(__file__, result, arguments.write)


if __name__ == "__main__":
    main()
