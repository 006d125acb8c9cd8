"""Draw each task's loss over a run, from the files that training leaves in its output folder.

python recipes/benchmarks/plot_run.py runs/quickstart recipes/quickstart.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

COLOURS = ("#4269d0", "#e8833a", "#3ca951", "#a463f2", "#ff725c", "#6cc5b0", "#9c6b4e", "#97bbf5")


def main() -> None:
    """Draw one panel per task: its training loss, and its primary metric where it was evaluated."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    history = json.loads((arguments.run / "trainer_state.json").read_text())["log_history"]
    tasks = json.loads((arguments.run / "results.json").read_text())["tasks"]
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "run"})
    figure, axes = plt.subplots(1, len(tasks), figsize=(2.6 * len(tasks), 2.3), layout="constrained")
    for (name, task), axis, colour in zip(tasks.items(), axes, COLOURS, strict=False):
        points = [(line["step"], line[f"loss/{name}"]) for line in history if f"loss/{name}" in line]
        axis.plot(*zip(*points, strict=True), color=colour, linewidth=1.8)
        for line in history:
            metric = line.get(f"eval_{name}_{task['primary_metric']}")
            if metric is not None:
                axis.axvline(line["step"], color="0.8", linewidth=0.8, zorder=0)
                axis.annotate(
                    f"{metric:.2f}",
                    (line["step"], 1),
                    xycoords=("data", "axes fraction"),
                    ha="right",
                    va="top",
                    color="0.35",
                )
        axis.set(title=f"{name}  ({task['primary_metric']})", xlabel="step", ylim=(0, None), xlim=(0, None))
    axes[0].set_ylabel("training loss")
    figure.savefig(arguments.picture, metadata={"Date": None})


if __name__ == "__main__":
    main()
