"""What a gradient combination costs over the plain multi-task step on the same rows.

    python recipes/benchmarks/gradient_combination.py [--tasks 2 4 8 16] [--rounds 5] [--write]

MiniLM, 32 rows of 64 tokens in all, in equal parts of T tasks; a step is forward, backward, combination and AdamW. All
methods take turns on one model, and medians are compared; torchjd's `backward` and `jac_to_grad` (UPGrad) do the same
work from the same losses. Peak memory is that of a process of its own, after some steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import describe, write_result

ROWS, TOKENS = 32, 64
EXACT = ("sum by task", "pcgrad", "gradvac", "imtl_g", "aligned_mtl", "config", "graddrop")
SOLVERS = ("mgda", "cagrad", "nash_mtl", "upgrad", "fairgrad", "dual_proj")


def make(num_tasks: int, threads: int):
    """Return a trainer of T tasks, a batch and its window."""
    import numpy as np
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoTokenizer, set_seed
    from transformers.utils import logging

    from hf_multitask import HardSharingModel, MultiTaskTrainer, MultiTaskTrainingArguments, Task
    from hf_multitask.quickstart import backbone_folder
    from hf_multitask.window import count_window

    disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    draw = np.random.default_rng(0)
    names = [f"task{i}" for i in range(num_tasks)]
    datasets = {
        name: Dataset.from_dict(
            {
                "input_ids": draw.integers(1000, 20_000, (ROWS // num_tasks, TOKENS)).tolist(),
                "labels": draw.integers(0, 3, ROWS // num_tasks).tolist(),
            }
        )
        for name in names
    }
    set_seed(0)
    tasks = [Task(name, "single_label_classification", labels=("a", "b", "c")) for name in names]
    model = HardSharingModel.from_backbone(backbone_folder(), tasks)
    args = MultiTaskTrainingArguments(
        tempfile.mkdtemp(),
        max_steps=1,
        per_device_train_batch_size=ROWS,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(backbone_folder())
    trainer = MultiTaskTrainer(model, args, train_dataset=datasets, processing_class=tokenizer)
    trainer.model_wrapped = model
    trainer.create_optimizer()
    batch = next(iter(trainer.get_train_dataloader()))
    window = count_window([batch], names, trainer.args.device)
    assert len(window.rows) == num_tasks and trainer.accelerator.sync_gradients
    return trainer, batch, window


def stepper(trainer, batch, window, method: str) -> Callable[[], None]:
    """Return a function that makes one step by a method; `plain` is the plain step."""
    import copy

    from hf_multitask.balancer import TaskBalancer

    args = copy.copy(trainer.args)
    args.gradient_combination = "sum" if method in ("plain", "sum by task") else method
    args.conflict_logging_steps = int(method == "sum by task")
    balancer = TaskBalancer(args, trainer.tasks)
    model, optimizer = trainer.model, trainer.optimizer

    def step() -> None:
        trainer.balancer = balancer
        trainer.training_step(model, dict(batch), window)
        optimizer.step()
        model.zero_grad()

    return step


def torchjd_stepper(trainer, batch, window) -> Callable[[], None]:
    """Return a function that makes the same step with torchjd's UPGrad."""
    from torchjd.aggregation import UPGrad
    from torchjd.autojac import backward, jac_to_grad

    model, optimizer, aggregator = trainer.model, trainer.optimizer, UPGrad()
    shared = list(model.shared_parameters())
    own = [parameter for task in trainer.tasks for parameter in model.task_parameters(task.name)]

    def step() -> None:
        model.train()
        inputs = {key: value for key, value in batch.items() if key != "num_items"}
        losses = list(model(**inputs, num_items=window.items)["task_losses"].values())
        grads = torch.autograd.grad(sum(losses), own, retain_graph=True)
        for parameter, grad in zip(own, grads, strict=True):
            parameter.grad = grad
        backward(losses, inputs=shared)
        jac_to_grad(shared, aggregator)
        optimizer.step()
        model.zero_grad()

    return step


def measure(num_tasks: int, rounds: int) -> dict[str, float]:
    """Return the median seconds of a step of each method."""
    trainer, batch, window = make(num_tasks, threads=2)
    steps = {name: stepper(trainer, batch, window, name) for name in ("plain", *EXACT, *SOLVERS)}
    steps["torchjd upgrad"] = torchjd_stepper(trainer, batch, window)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if number:  # the first warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak(num_tasks: int, method: str) -> None:
    """Print the peak memory of a process that makes some steps, in MiB, and the shared parameters."""
    trainer, batch, window = make(num_tasks, threads=2)
    step = stepper(trainer, batch, window, method)
    for _ in range(3):
        step()
    shared = sum(parameter.numel() for parameter in trainer.model.shared_parameters())
    # Not `ru_maxrss`: that begins with what the process that started this one had.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(json.dumps([int(status["VmHWM"].split()[0]) / 1024, shared]))


def main() -> None:
    """Measure and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write gradient_combination.json")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        return peak(int(arguments.peak[0]), arguments.peak[1])

    result: dict = {
        "step time over the plain step": {},
        "torchjd's over ours (upgrad)": {},
        "seconds of the plain step": {},
    }
    result["peak MiB"] = {}
    for num_tasks in arguments.tasks:
        medians = measure(num_tasks, arguments.rounds)
        key = f"{num_tasks} tasks"
        result["seconds of the plain step"][key] = medians["plain"]
        result["torchjd's over ours (upgrad)"][key] = medians["torchjd upgrad"] / medians["upgrad"]
        names = (*EXACT, *SOLVERS)
        result["step time over the plain step"][key] = {name: medians[name] / medians["plain"] for name in names}
        found = {}
        for method in ("plain", "upgrad"):
            command = [sys.executable, __file__, "--peak", str(num_tasks), method]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[method], shared = json.loads(done.stdout.splitlines()[-1])
        bound = found["plain"] + (num_tasks + 1) * shared * 4 / 2**20
        result["peak MiB"][key] = {**found, "bound": bound}
    result["bounds"] = {"4 tasks": 1.10, "16 tasks": 1.5, "torchjd": 2.0}
    result["setting"] = {"rows": ROWS, "tokens per row": TOKENS, "rounds": arguments.rounds, **describe()}
    write_result(__file__, result, arguments.write)


if __name__ == "__main__":
    main()
