"""Which gradient combinations reach the Pareto front of the two-task landscape of the CAGrad paper.

    python recipes/benchmarks/toy_landscape.py [--write]

The landscape is that of Liu et al. 2021 (CAGrad; `toy.py` of the authors' code), the five starts are those of Navon et
al. 2022 (Nash-MTL; `experiments/toy/trainer.py`, which scales the first loss by 0.1; here it is not scaled). Both make
steps of Adam with learning rate 1e-3, 100,000 and 35,000 of them. Here there are fewer and larger ones, and β₂ is
lowered with them. Each method has the defaults of the library. With `--write` the trajectories are drawn as well.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_multitask.balancing.combination import COMBINATIONS, make_combination

STARTS = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))
SIDES = torch.tensor([1.0, -1.0], dtype=torch.float64)  # The second task is the mirror image of the first.
STEPS, LEARNING_RATE, BETAS = 12_000, 5e-3, (0.9, 0.99)
OTHER_RATES = (2.5e-3, 1e-2, 2e-2)  # of the plain sum; as many steps as make the same learning rate times steps
TOLERANCE = 0.05  # Distance in θ to the front, which is 14 long, at which it counts as reached.


def loss(theta: Tensor, side: Tensor) -> Tensor:
    """Return L1 (side 1) or L2 (side -1) of the landscape.

    Where θ₂ > 0, both follow logarithms, f1 and f2, each with a valley as narrow as a line, in which its gradient is
    large and points across; where θ₂ < 0, quadratic bowls, g1 and g2:

        L1 = c1 f1 + c2 g1                                       L2 = c1 f2 + c2 g2
        c1 = max(tanh(θ₂ / 2), 0)                                c2 = max(tanh(-θ₂ / 2), 0)
        f1 = log max(|(-θ₁ - 7) / 2 - tanh(-θ₂)|, 5e-6) + 6      f2 = log max(|(-θ₁ + 3) / 2 + tanh(-θ₂) + 2|, 5e-6) + 6
        g1 = ((-θ₁ + 7)² + 0.1 (-θ₂ - 8)²) / 10 - 20             g2 = ((-θ₁ - 7)² + 0.1 (-θ₂ - 8)²) / 10 - 20

    Args:
        theta: θ, [..., 2].
        side: 1 or -1; of a shape that broadcasts with [...].
    """
    x, y = theta.unbind(-1)
    log = (0.5 * (-x - 7 * side) + side * torch.tanh(y)).abs().clamp(min=5e-6).log() + 6
    square = ((x - 7 * side) ** 2 + 0.1 * (y + 8) ** 2) / 10 - 20
    return torch.tanh(0.5 * y).clamp(min=0) * log + torch.tanh(-0.5 * y).clamp(min=0) * square


def losses(theta: Tensor) -> Tensor:
    """Return both losses at points, [..., 2] → [..., 2]."""
    return loss(theta[..., None, :], SIDES)


def gradients(theta: Tensor) -> Tensor:
    """Return the gradient of each task at n points, [n, 2] → [n, tasks, 2]."""
    copies = theta[:, None].repeat(1, 2, 1).requires_grad_()  # one for each task
    return torch.autograd.grad(loss(copies, SIDES).sum(), copies)[0]


def pareto_front(points: int = 141) -> Tensor:
    """Return the Pareto front, [points, 2], from the minimum of L2 to that of L1, with a minimum of w L1 + (1 - w) L2.

    In both losses the bowls lie below all that the logarithms reach, and the sums are convex around them, so that
    Newton's method finds the minimum for each w.
    """
    weight = torch.linspace(0, 1, points, dtype=torch.float64)
    weights = torch.stack([weight, 1 - weight], -1)
    theta = torch.tensor([0.0, -8.0], dtype=torch.float64).repeat(points, 1)
    for _ in range(30):
        theta.requires_grad_()
        (slope,) = torch.autograd.grad((weights * losses(theta)).sum(), theta, create_graph=True)
        rows = [torch.autograd.grad(slope[:, i].sum(), theta, retain_graph=True)[0] for i in (0, 1)]
        theta = (theta - torch.linalg.solve(torch.stack(rows, 1), slope)).detach()
    return theta


def distance(theta: Tensor, front: Tensor) -> Tensor:
    """Return the distance of points to the front, [..., 2] → [...]."""
    begin, piece = front[:-1], front[1:] - front[:-1]
    offset = theta[..., None, :] - begin
    share = ((offset * piece).sum(-1) / (piece**2).sum(-1)).clamp(0, 1)
    return (offset - share[..., None] * piece).norm(dim=-1).amin(-1)


def descend(
    method: str,
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
    betas: tuple[float, float] = BETAS,
    stop_at: Tensor | None = None,
) -> Tensor:
    """Descend from all starts with Adam and return the trajectories, [steps + 1, starts, 2].

    Args:
        method: A key of `COMBINATIONS`.
        steps: Number of steps.
        learning_rate: Learning rate.
        betas: β₁ and β₂ of Adam.
        stop_at: A front that ends a descent where it is reached (looked at every 25 steps), to save time.
    """
    combination = make_combination(method)
    memories = torch.zeros(len(STARTS), 2, 2, dtype=torch.float64)
    generators = [torch.Generator().manual_seed(index) for index in range(len(STARTS))]
    theta = torch.nn.Parameter(torch.tensor(STARTS, dtype=torch.float64))
    optimizer = torch.optim.Adam([theta], lr=learning_rate, betas=betas)
    trajectory, moving = [theta.detach().clone()], torch.ones(len(STARTS), dtype=torch.bool)
    for step in range(steps):
        if stop_at is not None and step % 25 == 0:
            moving = distance(trajectory[-1], stop_at) > TOLERANCE
            if not moving.any():
                break
        jacobians = gradients(theta.detach())
        gramians = jacobians @ jacobians.mT
        theta.grad = torch.zeros_like(theta)
        for i in moving.nonzero().flatten().tolist():
            c = combination.coefficients(gramians[i], generator=generators[i], memory=memories[i])
            theta.grad[i] = c @ jacobians[i]
        optimizer.step()
        theta.data = theta.data.where(moving[:, None], trajectory[-1])
        trajectory.append(theta.detach().clone())
    return torch.stack(trajectory)


def report(trajectory: Tensor, front: Tensor) -> dict[str, Any]:
    """Return how each descent ended; `step` is the first one within the tolerance of the front."""
    away = distance(trajectory, front)
    starts = {}
    for i, start in enumerate(STARTS):
        reached = bool(away[-1, i] <= TOLERANCE)
        starts[str(start)] = {
            "reached": reached,
            "step": int((away[:, i] <= TOLERANCE).nonzero()[0]) if reached else None,
            "distance": round(away[-1, i].item(), 4),
            "theta": [round(value, 4) for value in trajectory[-1, i].tolist()],
            "losses": [round(value, 4) for value in losses(trajectory[-1, i]).tolist()],
        }
    return {"reached": sum(start["reached"] for start in starts.values()), "starts": starts}


def draw(trajectories: dict[str, Tensor], front: Tensor, picture: Path) -> None:
    """Draw the trajectories in θ, one panel per method, on the landscape of L1 + L2."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    colours = ("#4269d0", "#9c6b4e", "#d1602b", "#2a9d4a", "#a463f2")
    plt.rcParams.update({"font.size": 9, "axes.linewidth": 0.6, "svg.hashsalt": "toy", "path.simplify_threshold": 0.5})
    size, columns = 11.0, 4
    grid = torch.linspace(-size, size, 161, dtype=torch.float64)
    height = losses(torch.stack(torch.meshgrid(grid, grid, indexing="xy"), -1)).sum(-1)
    bands = torch.bucketize(height, torch.arange(-32.0, 24.0, 4.0, dtype=torch.float64))
    rows = -(-len(trajectories) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.3 * columns, 2.45 * rows + 0.3), sharex=True, sharey=True, layout="constrained"
    )
    for axis, (method, trajectory) in zip(axes.flat, trajectories.items(), strict=True):
        axis.imshow(bands, cmap="Greys", vmin=-2, vmax=32, origin="lower", extent=(-size, size, -size, size))
        axis.plot(*front[::10].T, color="black", linewidth=5, solid_capstyle="round", alpha=0.85)
        arrived = distance(trajectory[-1], front) <= TOLERANCE
        for i, colour in enumerate(colours):
            path = thin(trajectory[:, i])
            axis.plot(*path.T, color=colour, linewidth=1.6)
            axis.plot(*path[0], "o", color=colour, markersize=4)
            if arrived[i]:
                axis.plot(*path[-1], "o", color=colour, markersize=5.5, markeredgecolor="white", zorder=4)
            else:
                axis.plot(*path[-1], "X", color=colour, markersize=10, markeredgecolor="black", zorder=4)
        axis.set_title(f"{method}: {int(arrived.sum())} of {len(STARTS)}", fontsize=10)
        axis.set(xticks=(-10, 0, 10), yticks=(-10, 0, 10))
    for axis in axes[-1]:
        axis.set_xlabel("θ₁", labelpad=0)
    for axis in axes[:, 0]:
        axis.set_ylabel("θ₂", labelpad=-4)
    marks = {
        "start": Line2D([], [], marker="o", color="0.35", linestyle="none", markersize=4),
        "Pareto front": Line2D([], [], color="black", linewidth=5, solid_capstyle="round", alpha=0.85),
        "end on the front": Line2D([], [], marker="o", color="0.35", linestyle="none", markersize=6),
        "end elsewhere": Line2D([], [], marker="X", color="0.35", markeredgecolor="k", linestyle="none", markersize=9),
    }
    figure.legend(marks.values(), marks, loc="outside lower center", ncols=len(marks), frameon=False)
    figure.savefig(picture, metadata={"Date": None})


def thin(path: Tensor, gap: float = 0.25) -> Tensor:
    """Return the first and the last point of a path, and others at least `gap` apart."""
    kept = [path[0]]
    for point in path[1:-1:5]:
        if (point - kept[-1]).norm() >= gap:
            kept.append(point)
    return torch.stack([*kept, path[-1]])


def main() -> None:
    """Descend with every method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write toy_landscape.json and toy_landscape.svg")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    from common import describe, write_result

    front, trajectories, result = pareto_front(), {}, {"starts": len(STARTS), "methods": {}}
    for method in COMBINATIONS:
        begin = time.process_time()
        trajectories[method] = descend(method)
        seconds = time.process_time() - begin
        result["methods"][method] = report(trajectories[method], front) | {"cpu seconds": round(seconds, 1)}
    result["the plain sum at other learning rates"] = {
        str(rate): report(descend("sum", round(STEPS * LEARNING_RATE / rate), rate), front) for rate in OTHER_RATES
    }
    result["front"] = {
        "from": [round(value, 4) for value in front[0].tolist()],
        "middle": [round(value, 4) for value in front[len(front) // 2].tolist()],
        "to": [round(value, 4) for value in front[-1].tolist()],
        "tolerance": TOLERANCE,
    }
    optimizer = {"optimizer": "Adam", "learning rate": LEARNING_RATE, "betas": BETAS, "steps": STEPS}
    result["setting"] = {**optimizer, "methods' arguments": "defaults", "dtype": "float64", **describe()}
    write_result(__file__, result, arguments.write)
    if arguments.write:
        draw(trajectories, front, Path(__file__).with_suffix(".svg"))


if __name__ == "__main__":
    main()
