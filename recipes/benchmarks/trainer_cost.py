"""Throughput and memory of a multi-task run against plain `Trainer` on the same rows.

    python recipes/benchmarks/trainer_cost.py [--processes 2] [--write]

Both train MiniLM on the same texts with the same batches of 16 rows padded to 64 tokens: `Trainer` with one head,
`MultiTaskTrainer` with two tasks that share the rows half and half. On `--processes` CPU processes with DDP (two by
default) the two trainings run in turns of a few steps, in the same processes; medians of the step times are compared.
Peak memory is that of a process of its own for each.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS, TOKENS = 16, 64


def make(kind: str, steps: int):
    """Return a trainer of a kind (`plain` or `multi`) and the list its step times go to."""
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainerCallback, set_seed
    from transformers.utils import logging

    from hf_multitask import HardSharingModel, MultiTaskTrainer, MultiTaskTrainingArguments, Task
    from hf_multitask.quickstart import backbone_folder

    disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            times.append(time.perf_counter())

    import numpy as np
    from transformers import AutoModelForSequenceClassification

    generator = np.random.default_rng(0)
    rows = {
        "input_ids": generator.integers(1000, 20_000, (2000, TOKENS)).tolist(),
        "labels": generator.integers(0, 3, 2000).tolist(),
    }
    tokenizer = AutoTokenizer.from_pretrained(backbone_folder())
    args = MultiTaskTrainingArguments(
        tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=ROWS,
        save_strategy="no",
        logging_steps=5,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False if kind == "multi" else None,
    )
    set_seed(0)
    if kind == "plain":
        model = AutoModelForSequenceClassification.from_pretrained(backbone_folder(), num_labels=3)
        trainer = Trainer(
            model,
            args,
            train_dataset=Dataset.from_dict(rows | {"attention_mask": [[1] * TOKENS] * 2000}),
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[Clock()],
        )
    else:
        labels = ("a", "b", "c")
        halves = {
            name: Dataset.from_dict({key: values[start::2] for key, values in rows.items()})
            for start, name in enumerate(("one", "two"))
        }
        tasks = [Task(name, "single_label_classification", labels=labels) for name in halves]
        model = HardSharingModel.from_backbone(backbone_folder(), tasks)
        trainer = MultiTaskTrainer(model, args, train_dataset=halves, processing_class=tokenizer, callbacks=[Clock()])
    return trainer, times


def worker(out: str, kinds: list[str], steps: int, rounds: int) -> None:
    """Run trainings in turns and save step times; the first steps of each turn warm up and are left out."""
    result: dict[str, list[float]] = {kind: [] for kind in kinds}
    trainers = {kind: make(kind, steps) for kind in kinds}
    for _ in range(rounds):
        for kind, (trainer, times) in trainers.items():
            times.clear()
            trainer.train()
            result[kind] += [b - a for a, b in zip(times[2:], times[3:], strict=False)]
    if int(os.environ.get("RANK", "0")) == 0:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        Path(out).write_text(json.dumps({"times": result, "peak MiB": memory}))
    trainer.end()


def run(kinds: list[str], processes: int, steps: int, rounds: int) -> dict:
    """Start the processes and return what rank 0 measured."""
    out = Path(tempfile.mkdtemp(), "out.json")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, __file__, "--worker", str(out), ",".join(kinds), str(steps), str(rounds)]
    extra = dict(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=port) if processes > 1 else {}
    environment = os.environ | {"OMP_NUM_THREADS": "1" if processes > 1 else "2", "CUDA_VISIBLE_DEVICES": ""} | extra
    runs = [
        subprocess.Popen(command, env=environment | (dict(RANK=str(r), LOCAL_RANK=str(r)) if extra else {}))
        for r in range(processes)
    ]
    if any([process.wait() for process in runs]):
        raise SystemExit("a process failed")
    return json.loads(out.read_text())


def main() -> None:
    """Measure and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write trainer_cost.json")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        out, kinds, steps, rounds = arguments.worker
        return worker(out, kinds.split(","), int(steps), int(rounds))

    import statistics

    from common import describe, write_result

    times = run(["plain", "multi"], arguments.processes, arguments.steps, arguments.rounds)["times"]
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    memory = {kind: run([kind], 1, 6, 1)["peak MiB"] for kind in ("plain", "multi")}
    result = {
        "processes": arguments.processes,
        "median seconds per step": medians,
        "throughput over Trainer's": medians["plain"] / medians["multi"],
        "throughput bound": 0.95,
        "peak MiB": memory,
        "memory over Trainer's": memory["multi"] / memory["plain"],
        "memory bound": 1.05,
        "setting": {"rows per process": ROWS, "tokens per row": TOKENS, **describe()},
    }
    write_result(__file__, result, arguments.write)


if __name__ == "__main__":
    main()
