"""What packing saves: steps on the quickstart's instructions with padded rows and with packed ones.

    python recipes/benchmarks/packing.py [--rounds 5] [--rows 16] [--write]

The model, the tasks and the mixture are those of `recipes/instructions.yaml`, with texts of up to 512 tokens. The same
batches, as the sampler makes them, go through forward and backward three times, in turns: padded to the longest row of
the batch, as most collators do; padded and cut to passes of rows of similar length, as this library does without
packing; and packed. Real tokens per second count no padding. The losses of all rows are compared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import describe, write_result

RECIPE = Path(__file__).parents[1] / "instructions.yaml"


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--set", action="append", default=[], help="change a value of the recipe")
    parser.add_argument("--write", action="store_true", help="write packing.json")
    arguments = parser.parse_args()

    from hf_multitask import DataCollatorForMultiTask, MultiTaskTrainer
    from hf_multitask.loading import make_sampler
    from hf_multitask.recipe import build, load_recipe

    settings = [f"training.per_device_train_batch_size={arguments.rows}", "training.packing=false", *arguments.set]
    settings += [f"tasks.{number}.max_length=512" for number in range(3)]
    parts = build(load_recipe(RECIPE, settings))
    trainer = MultiTaskTrainer(
        model=parts.model, args=parts.args, train_dataset=parts.datasets["train"], processing_class=parts.tokenizer
    )
    device = trainer.args.device
    model: Any = trainer.model.train()
    collators = {
        name: DataCollatorForMultiTask(parts.tokenizer, model.tasks, packing=name == "packed")
        for name in ("padded", "padded and cut", "packed")
    }
    sampler = iter(make_sampler(trainer.args, trainer.train_dataset, arguments.rows))
    seconds: dict[str, list[float]] = {name: [] for name in collators}
    tokens, batches, apart = 0, {}, 0.0
    for number in range(arguments.rounds + 1):
        rows = [trainer.train_dataset[index] for index in next(sampler)]
        losses = {}
        for name, collate in collators.items():
            batches[name] = trainer._prepare_inputs(collate(rows))
            model.zero_grad()
            _wait(device)
            start = time.perf_counter()
            output = model(**batches[name], single_pass=name == "padded")
            output.loss.backward()
            _wait(device)
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
            losses[name] = {task: values.detach() for task, values in output.row_losses.items()}
        tokens += batches["padded"]["num_tokens"] if number else 0
        for task, values in losses["padded"].items():
            apart = max(apart, float(((values - losses["packed"][task]).abs() / values.abs().clamp(min=1)).max()))
    speed = {name: tokens / sum(values) for name, values in seconds.items()}
    ratios = [a / b for a, b in zip(seconds["padded"], seconds["packed"], strict=True)]
    result = {
        "real tokens per second": speed,
        "packed over padded": speed["packed"] / speed["padded"],
        "packed over padded and cut": speed["packed"] / speed["padded and cut"],
        "median over batches": statistics.median(ratios),
        "largest relative difference of a row's loss": apart,
        "sequences in the last batch": {name: batch["input_ids"].shape[0] for name, batch in batches.items()},
        "bounds": {"packed over padded": 1.5, "largest relative difference of a row's loss": 1e-4},
        "setting": {"rows": arguments.rows, "rounds": arguments.rounds, "settings": arguments.set, **describe()},
    }
    write_result(__file__, result, arguments.write)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
