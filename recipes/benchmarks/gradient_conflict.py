"""Finds conflicts that are there by construction, and shows what would be found without fitting the heads first.

    python recipes/benchmarks/gradient_conflict.py [--write]

MiniLM and real text of the quickstart, with fresh heads. Constructed tasks on the same texts: the valence and its
opposite, through one and the same frozen head or through heads of their own, and labels tossed by a coin. Then the
quickstart's tasks on whole texts, of which nobody knows the answer. Everything is measured twice, with heads as they
are at first, and fitted to frozen features. With --write, gradient_conflict.json and gradient_conflict.svg.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from common import describe, write_result
from datasets import disable_progress_bars, load_dataset
from transformers import AutoTokenizer, set_seed
from transformers.utils import logging

from hf_multitask import HardSharingModel, Task, gradient_conflicts
from hf_multitask.data.labels import infer_labels
from hf_multitask.quickstart import backbone_folder, dataset_files

ROWS = 1536
HEADS = {"fresh heads": {"head_warmup_steps": 0}, "fitted heads": {}}  # {}: the defaults
# What is compared, and the bound that its cosine must keep with fitted heads.
CONSTRUCTED = {
    "one head, opposite labels": ("frozen", "frozen_opposite", "below -0.9"),
    "one head, equal labels": ("frozen", "frozen_copy", "above 0.9"),
    "own heads, equal labels": ("valence", "valence_copy", "above 0.1"),
    "own heads, opposite labels": ("valence", "valence_opposite", "above 0.1"),
    "labels of two coins": ("coin_a", "coin_b", "within 0.1"),
    "valence and a coin": ("valence", "coin_a", "within 0.1"),
}


def constructed(vader: Any) -> tuple[HardSharingModel, dict[str, Any]]:
    """Return tasks whose relation is known, and their rows."""
    generator = np.random.default_rng(0)
    vader = vader.add_column("opposite", [-valence for valence in vader["valence"]])
    for name in ("coin_a", "coin_b"):
        vader = vader.add_column(name, generator.integers(0, 2, len(vader)).tolist())
    columns = {"valence": "valence", "valence_copy": "valence", "valence_opposite": "opposite"}
    columns |= {"frozen": "valence", "frozen_copy": "valence", "frozen_opposite": "opposite"}
    tasks = [Task(name, "regression", dataset="vader", label_column=column) for name, column in columns.items()]
    for name in ("coin_a", "coin_b"):
        options = {"dataset": "vader", "label_column": name}
        tasks.append(Task(name, "single_label_classification", labels=("heads", "tails"), **options))
    set_seed(0)
    model = HardSharingModel.from_backbone(backbone_folder(), tasks)
    for name in ("frozen", "frozen_copy", "frozen_opposite"):
        model.heads[name].load_state_dict(model.heads["frozen"].state_dict())
        model.heads[name].requires_grad_(False)
    return model, {"vader": vader}


def quickstart(vader: Any, bbc: Any) -> tuple[HardSharingModel, dict[str, Any]]:
    """Return the quickstart's tasks on whole texts, and their rows."""
    kind = "single_label_classification"
    tasks = [
        Task("valence", "regression", dataset="vader", label_column="valence"),
        Task("source", kind, labels=infer_labels(vader, "source"), dataset="vader", label_column="source"),
        Task("topic", kind, labels=infer_labels(bbc, "topic"), dataset="bbc", label_column="topic"),
    ]
    set_seed(0)
    return HardSharingModel.from_backbone(backbone_folder(), tasks), {"vader": vader, "bbc": bbc}


def keeps(bound: str, cosine: float) -> bool:
    """Return whether a cosine keeps a bound."""
    how, number = bound.split()
    limit = float(number)
    return {"below": cosine < limit, "above": cosine > limit, "within": abs(cosine) < limit}[how]


def draw(table: list[dict[str, Any]], path: Path) -> None:
    """Draw each pair's cosine and interval, with fresh heads and with fitted ones."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams["svg.hashsalt"] = "gradient_conflict"
    figure, axis = plt.subplots(figsize=(7, 0.6 + 0.36 * len(table)), layout="constrained")
    axis.axvspan(-0.1, 0.1, color="0.92", zorder=0)
    axis.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    for heads, colour, marker, shift in (("fresh heads", "0.55", "o", -0.14), ("fitted heads", "#4269d0", "s", 0.14)):
        means = [row[heads]["cosine"] for row in table]
        ends = [[row[heads][end] for row in table] for end in ("low", "high")]
        errors = [[m - low for m, low in zip(means, ends[0], strict=True)]]
        errors.append([high - m for m, high in zip(means, ends[1], strict=True)])
        places = [i + shift for i in range(len(table))]
        style = {"color": colour, "marker": marker, "markersize": 5, "linestyle": "none", "elinewidth": 1.5}
        axis.errorbar(means, places, xerr=errors, label=heads, **style)
    axis.set_yticks(range(len(table)), [row["pair"] for row in table])
    axis.set(xlim=(-1.05, 1.05), xlabel="cosine of gradients, mean and 95 % interval; grey: neutral")
    axis.invert_yaxis()
    axis.legend(loc="lower left", frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure all pairs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write gradient_conflict.json and .svg")
    parser.add_argument("--batches", type=int, default=8)
    arguments = parser.parse_args()
    disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    parts = {
        name: load_dataset("parquet", data_files=dataset_files(name), split=f"train[:{ROWS}]")
        for name in ("vader", "bbc")
    }
    tokenizer = AutoTokenizer.from_pretrained(backbone_folder())
    table: list[dict[str, Any]] = []
    tasks: dict[str, Any] = {}
    for kind, (model, datasets) in {
        "constructed": constructed(parts["vader"]),
        "quickstart": quickstart(parts["vader"], parts["bbc"]),
    }.items():
        found = {}
        for heads, options in HEADS.items():
            options = {"batches": arguments.batches, "max_length": 64, **options}
            found[heads] = gradient_conflicts(model, datasets, tokenizer, **options)
            print(f"{kind}, {heads}\n{found[heads]}\n", flush=True)
        pairs = CONSTRUCTED if kind == "constructed" else {}
        pairs = pairs or {f"{p.a} and {p.b}": (p.a, p.b, None) for p in found["fitted heads"].pairs()}
        for name, (a, b, bound) in pairs.items():
            row: dict[str, Any] = {"pair": name}
            for heads, conflicts in found.items():
                values = {key: value for key, value in vars(conflicts.pair(a, b)).items() if key not in ("a", "b")}
                row[heads] = {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
            if bound is not None:
                row |= {"bound": bound, "kept": keeps(bound, row["fitted heads"]["cosine"])}
            table.append(row)
        for i, name in enumerate(model.heads):
            tasks[name if kind == "constructed" else f"{name} ({kind})"] = {
                heads: {
                    "loss": round(float(conflicts.losses[i]), 4),
                    "gradient norm": round(float(conflicts.norms[i]), 4),
                    "agreement of batches": round(float(conflicts.reproducibility[i]), 4),
                }
                for heads, conflicts in found.items()
            }
    settings = found["fitted heads"].settings
    result = {
        "pairs": table,
        "bounds kept": all(row.get("kept", True) for row in table),
        "tasks": tasks,
        "setting": {"batches": arguments.batches, "rows per dataset": ROWS, "longest text in tokens": 64}
        | settings
        | describe(),
    }
    write_result(__file__, result, arguments.write)
    if arguments.write:
        draw(table, Path(__file__).with_suffix(".svg"))


if __name__ == "__main__":
    main()
