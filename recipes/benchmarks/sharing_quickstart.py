"""What each sharing scheme makes of the quickstart: its metrics, what it trains, and what it leaves on the disk.

    python recipes/benchmarks/sharing_quickstart.py [--schemes hard soft ...] [--write]

Every scheme runs `recipes/quickstart.yaml` with nothing changed but `model.sharing` and, for some, learning rates and
the mixture: where the backbone is frozen, what stands beside it bears a larger rate; and few rows of the smallest task
reach the encoder or the adapter that is its own, so that soft sharing and adapters read all datasets alike. The
settings of each stand beside its result. The baseline answers with the most frequent label, or the mean, of the
training rows; for entities that is no entity at all. Schemes that are left out keep what is recorded of them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from common import describe, write_result

RECIPE = Path(__file__).parents[1] / "quickstart.yaml"
UNIFORM = ("training.task_sampling=uniform", "training.task_sampling_kwargs={}")
SETTINGS: dict[str, list[str]] = {
    "hard": [],
    "soft": ["training.learning_rate=0.0005", "training.head_learning_rate=0.002", *UNIFORM],
    "conditioned": [],
    "prefix": ["training.learning_rate=0.01"],
    "adapter": [
        *("training.learning_rate=0.001", "training.head_learning_rate=0.02", *UNIFORM),
        *("model.rank=8", "model.shared_rank=8", "model.target_modules=[query, key, value, dense]"),
    ],
    "mixture_of_experts": ["model.num_experts=4", "model.experts_per_token=1"],
}


def run(scheme: str) -> dict[str, Any]:
    """Train one scheme and return what came out; the recipe's own result, of hard sharing, is recorded already."""
    from hf_multitask import AutoModelForMultiTask
    from hf_multitask.recipe import build, load_recipe
    from hf_multitask.running import run_recipe

    with tempfile.TemporaryDirectory() as folder:
        if scheme == "hard":
            results = json.loads(RECIPE.with_suffix(".json").read_text())
            build(load_recipe(RECIPE)).model.save_pretrained(folder)
        else:
            settings = [f"model.sharing={scheme}", f"training.output_dir={folder}", *SETTINGS[scheme]]
            run_recipe(RECIPE, settings)
            results = json.loads(Path(folder, "results.json").read_text())
        parts = [file for file in Path(folder).rglob("*.safetensors")]
        model = AutoModelForMultiTask.from_pretrained(folder)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        return {
            "settings": SETTINGS[scheme],
            "tasks": {
                name: {"metric": task["primary_metric"], "validation": task["validation"][task["primary_metric"]]}
                for name, task in results["tasks"].items()
            },
            "average": results["average"]["validation"],
            "trained parameters": trained,
            "saved MiB": round(sum(file.stat().st_size for file in parts) / 2**20, 2),
            "train seconds": results["train_seconds"],
            "steps": results["steps"],
        }


def baseline() -> dict[str, float]:
    """Return the metrics of the most frequent label, or of the mean, on the validation rows."""
    from collections import Counter

    from datasets import load_dataset

    from hf_multitask.quickstart import dataset_files

    found = {"valence": 0.0, "entities": 0.0}  # a constant correlates with nothing; no entity is found
    for task, name in (("source", "vader"), ("topic", "bbc")):
        rows = load_dataset("parquet", data_files=dataset_files(name))
        (label, _), *_ = Counter(rows["train"][task]).most_common(1)
        found[task] = sum(value == label for value in rows["validation"][task]) / len(rows["validation"])
    return found


def main() -> None:
    """Run the schemes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schemes", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--write", action="store_true", help="write sharing_quickstart.json")
    arguments = parser.parse_args()
    file = Path(__file__).with_suffix(".json")
    known = json.loads(file.read_text()) if file.is_file() else {"schemes": {}}
    constant = baseline()
    for scheme in arguments.schemes:
        result = run(scheme)
        result["beats the baseline on every task"] = all(
            task["validation"] > constant[name] for name, task in result["tasks"].items()
        )
        known["schemes"][scheme] = result
        known = {"baseline": constant, "schemes": known["schemes"], "setting": describe()}
        write_result(__file__, known, arguments.write)


if __name__ == "__main__":
    main()
