"""What reading a prompt once saves: labels ranked by likelihood, with prompts read once and read for each label.

    python recipes/benchmarks/ranking.py [--rows 6] [--rounds 3] [--write]

The model is SmolLM2-135M-Instruct of `recipes/instructions.yaml`, the rows are articles of the BBC task with five
labels. Both ways score the same rows in turns; the scores are compared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from common import describe, write_result

RECIPE = Path(__file__).parents[1] / "instructions.yaml"


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write ranking.json")
    arguments = parser.parse_args()

    from hf_multitask import MultiTaskTrainer
    from hf_multitask.models.target_scores import target_scores
    from hf_multitask.recipe import build, load_recipe

    parts = build(load_recipe(RECIPE, []))
    trainer = MultiTaskTrainer(
        model=parts.model, args=parts.args, train_dataset=parts.datasets["train"], processing_class=parts.tokenizer
    )
    model = trainer.model.eval()
    (task,) = [task for task in model.tasks if task.name == "topic"]
    evaluator = trainer._evaluator(task)
    (dataset,) = [part for part in trainer.train_dataset.split() if part.sources[0].tasks[0].name == "topic"]
    rows = [dataset[number] for number in range(arguments.rows)]
    answers = [evaluator._candidates()[0]] * len(rows)
    prompts = [evaluator._split(row)[0] for row in rows]
    seconds: dict[str, list[float]] = {"once": [], "for each label": []}
    apart = 0.0
    for number in range(arguments.rounds + 1):
        start = time.perf_counter()
        once = target_scores(model, task.name, prompts, answers)
        middle = time.perf_counter()
        again = evaluator._read_again(rows, prompts, answers)
        end = time.perf_counter()
        if number:  # the first round warms up
            seconds["once"].append(middle - start)
            seconds["for each label"].append(end - middle)
        apart = max(apart, float((once - again).abs().max()))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "seconds for all rows": medians,
        "times as fast": medians["for each label"] / medians["once"],
        "largest difference of a log-likelihood": apart,
        "labels": len(answers[0]),
        "tokens of the prompts": [len(prompt) for prompt in prompts],
        "setting": {"rows": arguments.rows, "rounds": arguments.rounds, **describe()},
    }
    write_result(__file__, result, arguments.write)


if __name__ == "__main__":
    with torch.no_grad():
        main()
