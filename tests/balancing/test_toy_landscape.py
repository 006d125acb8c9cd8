"""The two-task landscape of the CAGrad paper: the plain sum is caught in a valley, other methods reach the front."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "recipes" / "benchmarks" / "toy_landscape.py"
# Fewer and larger steps than in the benchmark. Much larger ones would carry the plain sum over the valley.
QUICK = {"steps": 1900, "learning_rate": 0.02, "betas": (0.0, 0.7)}


@pytest.fixture(scope="module")
def toy():
    spec = importlib.util.spec_from_file_location("toy_landscape", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def front(toy):
    return toy.pareto_front()


def published(x: float, y: float) -> tuple[float, float]:
    """Return both losses in the words of the paper's code."""
    f1 = math.log(max(abs(0.5 * (-x - 7) - math.tanh(-y)), 0.000005)) + 6
    f2 = math.log(max(abs(0.5 * (-x + 3) + math.tanh(-y) + 2), 0.000005)) + 6
    g1 = ((-x + 7) ** 2 + 0.1 * (-y - 8) ** 2) / 10 - 20
    g2 = ((-x - 7) ** 2 + 0.1 * (-y - 8) ** 2) / 10 - 20
    c1, c2 = max(math.tanh(0.5 * y), 0.0), max(math.tanh(-0.5 * y), 0.0)
    return c1 * f1 + c2 * g1, c1 * f2 + c2 * g2


def test_the_losses_and_their_gradients_are_the_published_ones(toy):
    valley = (-7 + 2 * math.tanh(3.0), 3.0)  # where f1 is cut off
    points = [*toy.STARTS, valley, (-3.1, 4.2), (2.3, 0.7), (5.5, -0.4), (-6.0, -9.0)]
    theta = torch.tensor(points, dtype=torch.float64)
    expected = torch.tensor([published(*point) for point in points], dtype=torch.float64)
    torch.testing.assert_close(toy.losses(theta), expected, rtol=1e-12, atol=1e-12)
    assert expected[len(toy.STARTS), 0] < -5
    smooth, h = theta[-4:], 1e-6
    for i, shift in enumerate(torch.eye(2, dtype=torch.float64) * h):
        difference = (toy.losses(smooth + shift) - toy.losses(smooth - shift)) / (2 * h)
        torch.testing.assert_close(toy.gradients(smooth)[..., i], difference, rtol=1e-6, atol=1e-6)


def test_nothing_dominates_the_front_and_it_dominates_all_else(toy, front):
    axis = torch.linspace(-12, 12, 193, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    at_grid, at_front = toy.losses(grid), toy.losses(front)
    assert front[0, 0] == pytest.approx(-7) and front[-1, 0] == pytest.approx(7)
    assert not (at_grid[:, None] <= at_front - 1e-9).all(-1).any()
    between = at_front.diff(dim=0).abs().amax() / 2  # what a point between two of the front's can be better than both
    assert (at_front <= at_grid[:, None] + between).all(-1).any(-1).all()


@pytest.mark.parametrize("method", ["cagrad", "mgda", "nash_mtl", "upgrad"])
@pytest.mark.sample(4)
def test_the_front_is_reached_from_every_start(toy, front, method):
    end = toy.descend(method, **QUICK, stop_at=front)[-1]
    assert (toy.distance(end, front) <= toy.TOLERANCE).all(), end


def test_the_plain_sum_is_caught_in_a_valley(toy, front):
    trajectory = toy.descend("sum", **QUICK, stop_at=front)
    stuck = toy.distance(trajectory[-1], front) > 5
    assert stuck.tolist() == [True, False, True, False, False], trajectory[-1]
    # In the valley of either task: near the line where its logarithm is cut off, and there for long.
    for start, side in ((0, 1), (2, -1)):
        x, y = trajectory[len(trajectory) // 4 :, start].T
        assert (0.5 * (-x - 7 * side) + side * torch.tanh(y)).abs().max() < 0.1
        assert y.min() > 0.3
