"""Does diversity beat size? N rows of one task against N / 5 rows over many tasks, scored on a task never seen.

    python recipes/benchmarks/diversity.py [--rows 320] [--seeds 0 1] [--set training.learning_rate=0.0001] [--write]

Both arms start from `recipes/diversity.yaml`. `one task` trains on N rows of `source` alone, `many tasks` on N / 5 rows
in all, dealt out evenly over the file's five trained tasks. Each arm makes one pass over its rows (so that the larger
one also takes five times as many steps), and `same steps` is the mixture again with as many steps as the first arm,
its rows read five times. The score is the accuracy on BBC topics, a task that no arm trains, of the answer that is
likeliest among the five; `untrained` is the model as it comes. The claim is judged twice: with five times the steps for
one task, and with as many steps for both; and training is worth its name only where it beats the untrained model.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import describe, write_result

RECIPE = Path(__file__).parents[1] / "diversity.yaml"
HELD_OUT = "topic"


def run(arm: str, rows: int, seed: int, evaluated: int, settings: Sequence[str]) -> dict[str, float]:
    """Train one arm and return the held-out task's metrics."""
    from dataclasses import replace

    from hf_multitask import MultiTaskTrainer
    from hf_multitask.recipe import build, load_recipe

    own = [f"training.seed={seed}", f"training.output_dir=runs/diversity-{seed}"]
    recipe = load_recipe(RECIPE, [*own, *settings])
    tasks = [task for task in recipe.tasks if arm != "one task" or task["name"] in ("source", HELD_OUT)]
    parts = build(replace(recipe, tasks=tasks))
    trained = [task for task in parts.model.tasks if not task.held_out]
    train = {}
    for task in trained:
        share = rows if arm == "one task" else rows // 5 // len(trained)
        readers = sum(other.dataset == task.dataset for other in trained)
        whole = parts.datasets["train"][task.dataset].shuffle(seed=seed)
        train[task.dataset] = whole.select(range(min(len(whole), share * (1 if arm == "one task" else readers))))
    batch = parts.args.per_device_train_batch_size
    parts.args.max_steps = max((rows if arm != "many tasks" else rows // 5) // batch, 1)
    trainer = MultiTaskTrainer(
        model=parts.model,
        args=parts.args,
        train_dataset=train,
        eval_dataset={HELD_OUT_DATASET: parts.datasets["validation"][HELD_OUT_DATASET].select(range(evaluated))},
        processing_class=parts.tokenizer,
    )
    if arm != "untrained":
        trainer.train()
    metrics: dict[str, Any] = trainer.evaluate()
    return {key: metrics[f"eval_{HELD_OUT}_{key}"] for key in ("label_accuracy", "loss")} | {
        "steps": 0 if arm == "untrained" else parts.args.max_steps
    }


HELD_OUT_DATASET = "bbc"


def main() -> None:
    """Run all arms and seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=320, help="N")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--evaluated", type=int, default=100, help="validation rows of the held-out task")
    parser.add_argument("--set", action="append", default=[], help="change a value of the recipe")
    parser.add_argument("--write", action="store_true", help="write recipes/diversity.json")
    arguments = parser.parse_args()
    arms: dict[str, dict[str, dict[str, float]]] = {}
    for arm in ("untrained", "one task", "many tasks", "same steps"):
        seeds = arguments.seeds[:1] if arm == "untrained" else arguments.seeds
        arms[arm] = {str(seed): run(arm, arguments.rows, seed, arguments.evaluated, arguments.set) for seed in seeds}
        print(arm, arms[arm], flush=True)
    setting = {"N": arguments.rows, "rows evaluated": arguments.evaluated, "settings": arguments.set, **describe()}
    write_result(str(RECIPE.with_suffix(".py")), judge(arms, setting), arguments.write)


def judge(arms: dict[str, dict[str, dict[str, float]]], setting: dict[str, Any]) -> dict[str, Any]:
    """Return what is written down: the claim, whether it holds and in which sense, means and single runs."""
    means = {arm: statistics.mean(run["label_accuracy"] for run in runs.values()) for arm, runs in arms.items()}
    losses = {arm: statistics.mean(run["loss"] for run in runs.values()) for arm, runs in arms.items()}
    return {
        "claim": f"{setting['N'] // 5} rows over five tasks beat {setting['N']} rows of one, on a task never seen",
        "holds": {
            "by accuracy": means["many tasks"] > means["one task"],
            "by accuracy, as many steps": means["same steps"] > means["one task"],
            "by loss": losses["many tasks"] < losses["one task"],
            "by loss, as many steps": losses["same steps"] < losses["one task"],
        },
        "beats the untrained model by accuracy": {
            arm: mean > means["untrained"] for arm, mean in means.items() if arm != "untrained"
        },
        "mean accuracy on the held-out task": means,
        "standard error of an accuracy": round((0.25 / setting["rows evaluated"]) ** 0.5, 3),
        "mean loss on the held-out task": losses,
        "runs": arms,
        "setting": setting,
    }


if __name__ == "__main__":
    main()
