"""The engine: gradients of tasks → Gramian and combination, exactly in a buffer and nearly in sketches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_multitask.balancing.elementwise import graddrop, uniform_blocks
from hf_multitask.balancing.gramian import TaskGradients
from hf_multitask.balancing.sketch import TaskSketches

SHAPES = ((7, 5), (300, 1000), (3,), (1, 1))


@pytest.fixture
def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]


def rows(count: int, seed: int = 0) -> torch.Tensor:
    """Gradients `[T, P]` with a common part, so that cosines are far from 0."""
    draw = torch.Generator().manual_seed(seed)
    size = sum(torch.Size(shape).numel() for shape in SHAPES)
    return torch.randn(count, size, generator=draw) + torch.randn(1, size, generator=draw)


def put(parameters, row: torch.Tensor) -> None:
    for parameter, part in zip(parameters, row.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter).clone()


def flat(parameters) -> torch.Tensor:
    return torch.cat([parameter.grad.reshape(-1) for parameter in parameters])


@pytest.mark.parametrize("tasks", [[0, 1, 2], [0, 2], [1]])
def test_gramian_and_combination_are_those_of_the_gradients(parameters, tasks):
    gradients, jacobian = TaskGradients(parameters, 3), rows(3)
    for _ in range(2):  # the second step remembers nothing of the first
        for part in (0.25, 0.75):  # two micro-batches
            for task in tasks:
                put(parameters, part * jacobian[task])
                gradients.move(task)
                assert all(parameter.grad is None for parameter in parameters)
        gradients.reduce(tasks)
        exact = jacobian[tasks].double() @ jacobian[tasks].double().T
        assert torch.allclose(gradients.gramian(tasks), exact, rtol=1e-6)
        coefficients = torch.linspace(-1.0, 2.0, len(tasks), dtype=torch.float64)
        gradients.write(tasks, coefficients)
        assert torch.allclose(flat(parameters), coefficients.float() @ jacobian[tasks], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_rows_of_a_table_are_the_whole_table(kind):
    """Sparse gradients of an embedding table give what dense ones do: Gramian, combination, draws; step after step."""
    draw = torch.Generator().manual_seed(0)
    tables = [nn.Embedding(50, 4, sparse=kind == "sparse"), nn.Embedding(50, 4)]
    for table in tables:
        table.weight.data.zero_()
    linears = [nn.Parameter(torch.zeros(3, 4)) for _ in tables]
    engines = [
        TaskGradients([linears[0], tables[0].weight], 2, tables=[tables[0].weight]),
        TaskGradients([linears[1], tables[1].weight], 2),
    ]
    for step in range(3):
        for task in (0, 1, 0):
            ids, factor = torch.randint(0, 50, (6,), generator=draw), torch.randn(6, 4, generator=draw)
            for table, linear, engine in zip(tables, linears, engines, strict=True):
                ((table(ids) * factor).sum() + (linear * factor[:3]).sum()).backward()
                engine.move(task)
        for engine in engines:
            engine.reduce([0, 1])
        assert torch.allclose(engines[0].gramian([0, 1]), engines[1].gramian([0, 1]), rtol=1e-6)
        coefficients = torch.tensor([0.5, -2.0], dtype=torch.float64)
        for engine in engines:
            if step == 1:
                engine.write_elementwise([0, 1], coefficients, graddrop, seed=step)
            else:
                engine.write([0, 1], coefficients)
        for one, other in ((linears[0], linears[1]), (tables[0].weight, tables[1].weight)):
            assert torch.allclose(one.grad, other.grad, atol=1e-6) and one.grad.any()
            one.grad = other.grad = None


def test_parameters_without_gradient_count_as_zero(parameters):
    gradients, jacobian = TaskGradients(parameters, 2), rows(2)
    for task in (0, 1):
        put(parameters, jacobian[task])
        parameters[1].grad = None
        gradients.move(task)
    gradients.write([0, 1], torch.ones(2))
    assert not parameters[1].grad.any() and parameters[0].grad.any()


def test_gradients_of_half_precision_are_multiplied_in_float32():
    parameters = [nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))]
    gradients = TaskGradients(parameters, 2)
    for task in (0, 1):
        parameters[0].grad = torch.full((1000,), 3.0, dtype=torch.bfloat16)
        gradients.move(task)
    assert gradients.gramian([0, 1]).tolist() == [[9000.0, 9000.0], [9000.0, 9000.0]]
    gradients.write([0, 1], torch.ones(2))
    assert parameters[0].grad.dtype is torch.bfloat16 and (parameters[0].grad == 6).all()


def test_ten_orders_of_magnitude_apart(parameters):
    gradients, jacobian = TaskGradients(parameters, 2), rows(2)
    jacobian[1] *= 1e-10
    for task in (0, 1):
        put(parameters, jacobian[task])
        gradients.move(task)
    exact = jacobian.double() @ jacobian.double().T
    assert torch.allclose(gradients.gramian([0, 1]) / exact, torch.ones(2, 2, dtype=torch.float64), rtol=1e-5)


def test_sketches_come_near_the_gramian(parameters):
    """The error is the one that the module states: standard deviation √(2 / K) of the norms' product at most."""
    jacobian = rows(3)
    exact = jacobian.double() @ jacobian.double().T
    norms = exact.diagonal().sqrt()
    size, errors = 4096, []
    for seed in range(20):
        sketches = TaskSketches(parameters, 3, size=size, seed=seed)
        for part in (0.25, 0.75):
            for task in range(3):
                put(parameters, part * jacobian[task])
                sketches.move(task)
        errors.append((sketches.gramian([0, 1, 2]) - exact) / norms[:, None] / norms)
    errors = torch.stack(errors)
    assert errors.std(0).max() < 1.3 * (2 / size) ** 0.5
    assert errors.mean(0).abs().max() < 3 * (2 / size / 20) ** 0.5
    assert errors.std(0).min() > 0.2 * (1 / size) ** 0.5  # they are sketches, not the gradients


def test_without_parameters_there_is_nothing_to_combine():
    with pytest.raises(ValueError, match="no shared parameter is trained"):
        TaskSketches([], 2)
    # Tasks that share nothing may still be weighted; the trainer refuses to combine them.
    nothing = TaskGradients([], 2, device=torch.device("cpu"))
    nothing.move(0)
    nothing.reduce([0, 1])
    assert torch.equal(nothing.gramian([0, 1]), torch.zeros(2, 2, dtype=torch.float64))
    nothing.write([0, 1], torch.ones(2))


def test_graddrop_keeps_one_sign_and_all_where_they_agree():
    gradients = torch.tensor([[1.0, -1.0, 2.0, 3.0], [2.0, -3.0, -1.0, -3.0]])
    for uniform, expected in ((0.0, [3.0, -4.0, 2.0, 3.0]), (0.999, [3.0, -4.0, -1.0, -3.0])):
        assert graddrop(gradients, torch.full((4,), uniform)).tolist() == expected
    assert torch.allclose(graddrop(gradients, torch.rand(4), leak=1.0), gradients.sum(0))
    zero = graddrop(torch.zeros(2, 3), torch.rand(3))
    assert not zero.any()


def test_graddrop_keeps_the_positive_ones_with_the_probability_of_the_paper():
    gradients = torch.tensor([[3.0], [-1.0]]).expand(2, 20_000)
    found = graddrop(gradients, torch.rand(20_000, generator=torch.Generator().manual_seed(0)))
    assert (found == 3).float().mean().item() == pytest.approx(0.75, abs=0.01)


def test_draws_depend_on_the_place_alone():
    whole = torch.cat([draws for *_, draws in uniform_blocks(0, 300_000, 7, torch.device("cpu"))])
    parts = [
        draws
        for start in (0, 150_001)
        for *_, draws in uniform_blocks(start, min(start + 150_001, 300_000), 7, torch.device("cpu"))
    ]
    assert torch.equal(whole, torch.cat(parts)) and len(whole) == 300_000
    assert not torch.equal(whole[:1000], next(uniform_blocks(0, 1000, 8, torch.device("cpu")))[2])
