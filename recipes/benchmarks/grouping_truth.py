"""Does `group_tasks` find groups that were planted? Two clusters of three tasks, ten seeds, both methods.

    python recipes/benchmarks/grouping_truth.py [--first 0] [--seeds 10] [--methods affinity conflict] [--write]

Every word of a small language has hidden numbers, two for each cluster, and a task's five labels are the fifths of the
plane, turned by an angle of the task's own, in which the sum over a text's words lies. So the tasks of a cluster read
the same numbers, and no two have the same labels; the other cluster's numbers are of no use to them, and the backbone,
eight numbers wide, has little room for both. Every task has texts of its own. The tasks come in a random order, their
names say nothing.

A seed is right if the best split into at most two groups is the two clusters. Beside that are counted: the pairs of
tasks of which the interval says that one helps or harms the other, within clusters (truth: helps) and across (truth:
does not help); the advice for each task; and the splits into at most three and four groups, where room is left.

The width of the backbone, the rows and the steps were chosen on seeds 0 to 9; what is recorded is of seeds 100 to 109
(`--first 100`), which had no part in that. With half the rows and steps and a width of 4, conflict found the clusters
in 5 of 10 of the first seeds only.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import describe, write_result
from comparison_truth import LENGTH, WORDS, write_backbone
from datasets import Dataset, disable_progress_bars
from transformers.utils import logging

from hf_multitask import group_tasks
from hf_multitask.recipe import Recipe

CLUSTERS, SIZE, LABELS, ROWS, WIDTH, EVERY = 2, 3, 5, 2000, 8, 2
TRAINING: dict[str, Any] = {
    "max_steps": 200,
    "per_device_train_batch_size": 192,
    "learning_rate": 1e-2,
    "warmup_steps": 0.1,
    "use_cpu": True,
}


def write_rows(file: Path, draw: np.random.Generator, meaning: np.ndarray) -> None:
    """Write texts with the fifth of the plane in which each one's sum lies, after a turn."""
    texts = draw.integers(0, WORDS, (ROWS, LENGTH))
    sums = meaning[texts].sum(1)
    angles = np.arctan2(sums[:, 1], sums[:, 0]) + draw.uniform(0, 2 * np.pi)
    labels = (angles % (2 * np.pi) * LABELS / (2 * np.pi)).astype(int) % LABELS
    lines = [" ".join(f"w{word}" for word in text) for text in texts]
    Dataset.from_dict({"text": lines, "label": [f"l{label}" for label in labels]}).to_parquet(str(file))


def make_recipe(folder: Path, seed: int) -> tuple[Recipe, list[int]]:
    """Write a language with its tasks; return the recipe, and the cluster of each task."""
    draw = np.random.default_rng(seed)
    meaning = draw.normal(size=(CLUSTERS, WORDS, 2))
    write_backbone(folder / "backbone", WIDTH, seed)
    clusters = (draw.permutation(CLUSTERS * SIZE) // SIZE).tolist()
    tasks = []
    for number, cluster in enumerate(clusters):
        write_rows(folder / f"task{number}-train.parquet", draw, meaning[cluster])
        dataset = str(folder / f"task{number}-{{split}}.parquet")
        kind = "single_label_classification"
        tasks.append({"name": f"task{number}", "type": kind, "dataset": dataset, "head": "linear"})
    model = {"backbone": str(folder / "backbone"), "sharing": "hard", "head_dropout": 0.0}
    return Recipe("planted", model, tasks, {**TRAINING, "seed": seed, "output_dir": str(folder / "out")}), clusters


def repeat(method: str, seed: int, folder: Path) -> dict[str, Any]:
    """Plant two clusters, group the tasks, and return what was found beside the truth."""
    recipe, clusters = make_recipe(folder, seed)
    found = group_tasks(recipe, CLUSTERS, method=method, every=EVERY, output=folder / "found")
    truth = {frozenset(t for t, own in zip(found.tasks, clusters, strict=True) if own == c) for c in range(CLUSTERS)}
    same = np.equal.outer(clusters, clusters)
    pairs = ~np.eye(len(clusters), dtype=bool)
    helps, harms = found.intervals[..., 0] > 0, found.intervals[..., 1] < 0
    affinity = found.affinity
    return {
        "seed": seed,
        "right": {frozenset(group) for group in found.groups} == truth,
        "right of at most 3 and 4 groups": [
            {frozenset(group) for group in found.regroup(most).groups} == truth for most in (3, 4)
        ],
        "score": round(found.split.score, 5),
        "score together": round(found.splits[1].score, 5),
        "mean own": round(float(affinity.diagonal().mean()), 5),
        "mean within": round(float(affinity[same & pairs].mean()), 5),
        "mean across": round(float(affinity[~same].mean()), 5),
        "within": {"helps": int(helps[same & pairs].sum()), "harms": int(harms[same & pairs].sum())},
        "across": {"helps": int(helps[~same].sum()), "harms": int(harms[~same].sum())},
        "advice": dict(Counter(one.verdict for one in found.advice())),
    }


def summarize(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the counts over seeds."""
    pairs = {"within": CLUSTERS * SIZE * (SIZE - 1), "across": (CLUSTERS * SIZE) ** 2 - CLUSTERS * SIZE**2}
    return {
        "right": sum(one["right"] for one in seeds),
        "of": len(seeds),
        "right of at most 3 and 4 groups": [
            sum(one["right of at most 3 and 4 groups"][place] for one in seeds) for place in (0, 1)
        ],
        **{
            f"pairs {where}": {
                "helps": sum(one[where]["helps"] for one in seeds),
                "harms": sum(one[where]["harms"] for one in seeds),
                "of": number * len(seeds),
            }
            for where, number in pairs.items()
        },
        "advice": dict(sum((Counter(one["advice"]) for one in seeds), Counter())),
        "seeds": seeds,
    }


def main() -> None:
    """Run the seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=10, help="how many")
    parser.add_argument("--methods", nargs="+", default=["affinity", "conflict"], choices=["affinity", "conflict"])
    parser.add_argument("--write", action="store_true", help="write grouping_truth.json")
    arguments = parser.parse_args()
    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    begin = time.process_time()
    for method in arguments.methods:
        seeds = []
        for seed in range(arguments.first, arguments.first + arguments.seeds):
            with tempfile.TemporaryDirectory() as folder:
                seeds.append(repeat(method, seed, Path(folder)))
            print(method, seeds[-1], flush=True)
        result[method] = summarize(seeds)
    result["processor_seconds"] = round(time.process_time() - begin)
    setting = {"rows_per_task": ROWS, "width": WIDTH, "measured_every": EVERY, "training": TRAINING}
    write_result(__file__, result | {"setting": setting | describe()}, arguments.write)


if __name__ == "__main__":
    main()
