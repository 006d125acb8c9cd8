"""Gradient combination: laws that hold for every method, and the definition of each one on explicit gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy.optimize import nnls
from torch import Tensor

from hf_multitask.balancing import combination_methods, solvers
from hf_multitask.balancing.combination import (
    _TORCHJD,
    COMBINATIONS,
    Combination,
    check_combination,
    make_combination,
)
from hf_multitask.balancing.elementwise import graddrop

# Every method with its defaults, and with arguments that reach the rest of its code.
CASES: dict[str, tuple[str, dict]] = {
    **{name: (name, {}) for name in COMBINATIONS},
    "gradvac, beta 1": ("gradvac", {"beta": 1.0}),
    "cagrad, c 0": ("cagrad", {"c": 0}),
    "cagrad, c 1": ("cagrad", {"c": 1.0}),
    "cagrad, c 3": ("cagrad", {"c": 3}),
    "aligned_mtl, median": ("aligned_mtl", {"mode": "median"}),
    "aligned_mtl, rmse": ("aligned_mtl", {"mode": "rmse"}),
    "fairgrad, alpha 0": ("fairgrad", {"alpha": 0}),
    "fairgrad, alpha 0.1": ("fairgrad", {"alpha": 0.1}),
    "fairgrad, alpha 1": ("fairgrad", {"alpha": 1}),
    "fairgrad, alpha 50": ("fairgrad", {"alpha": 50.0}),
}
every_case = pytest.mark.parametrize("case", CASES)
HARMLESS = ("mgda", "upgrad", "dual_proj")
WITH_PREFERENCE = ("aligned_mtl", "upgrad", "config", "dual_proj")


def made(case: str) -> Combination:
    return make_combination(*CASES[case])


def jacobian(tasks: int, size: int, seed: int = 0, condition: float = 0.0) -> Tensor:
    """Return random gradients; singular values fall to 10^-condition if that is given."""
    J = torch.randn(tasks, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if not condition:
        return J
    left, values, right = torch.linalg.svd(J, full_matrices=False)
    return left @ torch.diag(torch.logspace(0, -condition, len(values), dtype=torch.float64)) @ right


# Every T up to 5, some larger; well- and ill-conditioned; more tasks than parameters last.
JACOBIANS = {
    **{f"{t} tasks, {d} parameters": jacobian(t, d, seed=t) for t, d in [(2, 3), (3, 10), (4, 4), (5, 20), (9, 12)]},
    **{f"{t} tasks, condition 1e{c}": jacobian(t, 8, t + c, c) for t, c in [(2, 1), (3, 1), (4, 2), (3, 3), (6, 3)]},
}
every_jacobian = pytest.mark.parametrize("J", JACOBIANS.values(), ids=JACOBIANS)
few_jacobians = pytest.mark.parametrize("J", [J for J in JACOBIANS.values() if len(J) <= 4])


def close(result: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    assert (result - expected).norm() <= tolerance * max(float(expected.norm()), 1e-3), (result, expected)


# Laws of all methods


@every_case
@pytest.mark.parametrize("squared_norm", [1.0, 1e-12, 3e12])
def test_one_task_alone_has_the_coefficient_one(case, squared_norm):
    result = made(case).coefficients(torch.tensor([[squared_norm]], dtype=torch.float64))
    assert result.dtype == torch.float64 and result.device.type == "cpu"
    close(result, torch.ones(1, dtype=torch.float64))


@every_case
@pytest.mark.parametrize("tasks", [2, 5, 16])
def test_orthogonal_gradients_of_equal_norm_are_summed(case, tasks):
    close(made(case).coefficients(7 * torch.eye(tasks)), torch.ones(tasks, dtype=torch.float64))


@every_case
@every_jacobian
def test_the_order_of_the_tasks_does_not_matter(case, J, monkeypatch):
    order = torch.randperm(len(J), generator=torch.Generator().manual_seed(1))
    method, G = made(case), J @ J.T
    drawn = combination_methods._orders(len(J), torch.Generator().manual_seed(3))
    monkeypatch.setattr(combination_methods, "_orders", lambda size, generator: drawn)
    expected = method.coefficients(G)[order]
    # The same draws, by the numbers that the tasks have now.
    monkeypatch.setattr(combination_methods, "_orders", lambda size, generator: order.argsort()[drawn[order]])
    close(method.coefficients(G[order][:, order]), expected, 1e-6)


@every_case
@every_jacobian
@pytest.mark.parametrize("factor", [1e-12, 1e12, 1e-200])
def test_a_common_factor_of_the_losses_does_not_matter(case, J, factor):
    G = J @ J.T
    close(made(case).coefficients(factor * G), made(case).coefficients(G), 1e-7)


E4 = torch.eye(4, dtype=torch.float64)
DEGENERATE = {
    "no gradient at all": torch.zeros(3, 4),
    "one task without gradient": torch.cat([jacobian(2, 4), torch.zeros(1, 4)]),
    "a gradient that is almost none": torch.cat([jacobian(2, 4), 1e-7 * jacobian(1, 4, seed=1)]),
    "the same gradient twice": E4[[0, 0]],
    "the same gradient twice, and another": E4[[0, 0, 1]],
    "the same direction": torch.stack([E4[0], 3 * E4[0], 1e-4 * E4[0]]),
    "opposite gradients": torch.stack([E4[0], -E4[0]]),
    "opposite gradients, and another": torch.stack([E4[0], -E4[0], E4[1]]),
    "opposite gradients of unequal norm": torch.stack([E4[0], -3 * E4[0]]),
    "almost opposite gradients": torch.stack([E4[0], -E4[0] + 1e-9 * E4[1]]),
    "gradients that cancel": torch.stack([E4[0], E4[1], -E4[0] - E4[1]]),
    "one against all": torch.cat([jacobian(5, 6).abs(), -jacobian(1, 6).abs()]),
    "more tasks than parameters": jacobian(7, 3),
    "one parameter": jacobian(5, 1),
    "norms far apart": jacobian(4, 6) * torch.tensor([[1e3], [1.0], [1e-3], [1e-4]]),
}


@every_case
@pytest.mark.parametrize("J", DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_gradients_give_finite_coefficients(case, J):
    for G in (J @ J.T, 1e-12 * (J @ J.T), 1e12 * (J @ J.T), J.float() @ J.float().T):
        memory = torch.zeros_like(G, dtype=torch.float64)
        for _ in range(3):  # With targets of the steps before.
            assert made(case).coefficients(G, memory=memory).isfinite().all()
        assert memory.isfinite().all()


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case] not in [("aligned_mtl", {"mode": "rmse"})]])
@pytest.mark.parametrize("J", DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_gradients_give_an_update_of_reasonable_length(case, J):
    if case != "imtl_g":  # Its published form has no bound.
        update = J.T.double() @ made(case).coefficients(J @ J.T)
        assert update.norm() <= 1.001 * len(J) * J.norm()


@every_case
def test_a_task_without_gradient_changes_nothing_for_the_others(case):
    J = jacobian(4, 6)
    with_zero = torch.cat([J[:2], torch.zeros(1, 6), J[2:]])
    result = made(case).coefficients(with_zero @ with_zero.T)
    assert result[2] == 1
    close(result[[0, 1, 3, 4]], made(case).coefficients(J @ J.T))


@every_case
def test_the_gramian_may_come_in_any_dtype_and_is_left_alone(case):
    J = jacobian(4, 6).float()
    G = J @ J.T
    assert torch.equal(made(case).coefficients(G.requires_grad_()), made(case).coefficients(G.detach().double()))
    G = G.detach().double()
    before = G.clone()
    made(case).coefficients(G)
    assert torch.equal(G, before)
    one_sided = G + torch.triu(torch.ones(4, 4), 1) - torch.tril(torch.ones(4, 4), -1)
    close(made(case).coefficients(one_sided), made(case).coefficients(G))


@every_case
def test_orders_come_from_the_generator_alone(case):
    J = jacobian(6, 4, seed=2)
    state = torch.get_rng_state()
    results = [
        made(case).coefficients(J @ J.T, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1, 2, 3)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(results[0], results[1])
    draws = CASES[case][0] in ("pcgrad", "gradvac")
    assert any(not torch.equal(results[0], other) for other in results[2:]) == draws
    assert torch.equal(made(case).coefficients(J @ J.T), made(case).coefficients(J @ J.T))


# Laws of some


@pytest.mark.parametrize("name", HARMLESS)
@pytest.mark.parametrize("seed", range(8))
def test_no_task_loses(name, seed):
    for tasks, size, condition in [(2, 2, 0), (3, 5, 3), (5, 3, 0), (8, 8, 2), (12, 40, 4)]:
        J = jacobian(tasks, size, seed, condition)
        G = J @ J.T
        c = make_combination(name).coefficients(G)
        assert (c >= 0).all()
        assert (G @ c >= -1e-9 * G.diagonal().max() * c.max()).all()


@pytest.mark.parametrize("name", WITH_PREFERENCE)
def test_only_ratios_of_a_preference_count(name):
    J = jacobian(4, 6)
    G, preference = J @ J.T, [1.0, 2.0, 0.5, 4.0]
    plain = make_combination(name).coefficients(G)
    close(make_combination(name, {"preference": [3.0] * 4}).coefficients(G), plain)
    one = make_combination(name, {"preference": preference}).coefficients(G)
    close(make_combination(name, {"preference": 10 * torch.tensor(preference)}).coefficients(G), one)
    assert (one - plain).norm() > 0.1
    if name == "config":
        cosines = (G @ one) / G.diagonal().sqrt()
        close(cosines / cosines[0], torch.tensor(preference, dtype=torch.float64))
    orthonormal = make_combination(name, {"preference": preference}).coefficients(torch.eye(4))
    close(orthonormal / orthonormal.mean(), torch.tensor(preference, dtype=torch.float64) / 1.875)


# Definitions


def project_one_by_one(J: Tensor, orders: list[list[int]], targets: Tensor, beta: float) -> Tensor:
    """Gradient Vaccine on the gradients themselves; PCGrad for targets and beta of zero."""
    update = torch.zeros(J.shape[1], dtype=torch.float64)
    for i, order in enumerate(orders):
        g = J[i].clone()
        for j in order:
            phi, target = float(g @ J[j] / g.norm() / J[j].norm()), float(targets[i, j])
            if phi < target:
                sine, target_sine = math.sqrt(1 - phi**2), math.sqrt(1 - target**2)
                g += g.norm() * (target * sine - phi * target_sine) / (J[j].norm() * target_sine) * J[j]
                assert float(g @ J[j] / g.norm() / J[j].norm()) == pytest.approx(target, abs=1e-9)
            targets[i, j] += beta * (phi - target)
        update += g
    return update


@every_jacobian
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_pcgrad_and_gradvac_are_what_happens_to_the_gradients(J, seed):
    def generator() -> torch.Generator | None:
        return None if seed is None else torch.Generator().manual_seed(seed)

    orders = combination_methods._orders(len(J), generator()).tolist()
    assert [sorted([i, *order]) for i, order in enumerate(orders)] == [list(range(len(J)))] * len(J)
    none = torch.zeros(len(J), len(J), dtype=torch.float64)
    c = make_combination("pcgrad").coefficients(J @ J.T, generator=generator())
    close(J.T @ c, project_one_by_one(J, orders, none, 0.0))
    assert torch.equal(make_combination("gradvac").coefficients(J @ J.T, generator=generator()), c)

    memory, targets = none.clone(), none.clone()
    method = make_combination("gradvac", {"beta": 0.3})
    for step in range(3):
        moved = J + step * J.roll(1, 0)
        c = method.coefficients(moved @ moved.T, generator=generator(), memory=memory)
        close(moved.T @ c, project_one_by_one(moved, orders, targets, 0.3), 1e-8)
        close(memory, targets, 1e-8)
    assert memory.any()


def test_pcgrad_by_hand():
    J = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])  # Each loses its part along the other: (1, 0) becomes (1/2, 1/2).
    close(make_combination("pcgrad").coefficients(J @ J.T), torch.tensor([2.0, 1.5], dtype=torch.float64))


def test_gradvac_keeps_the_targets_of_tasks_without_gradient():
    J = torch.cat([jacobian(2, 4), torch.zeros(1, 4)])
    memory = torch.full((3, 3), 0.5, dtype=torch.float64)
    make_combination("gradvac", {"beta": 1.0}).coefficients(J @ J.T, memory=memory)
    cosine = torch.nn.functional.cosine_similarity(J[0], J[1], dim=0)
    assert memory[0, 1] == memory[1, 0] == pytest.approx(float(cosine))
    memory[0, 1] = memory[1, 0] = 0.5
    assert (memory == 0.5).all()


def test_gradvac_has_finite_coefficients_for_targets_of_one():
    method, memory = make_combination("gradvac", {"beta": 1.0}), torch.zeros(2, 2, dtype=torch.float64)
    method.coefficients(torch.ones(2, 2), memory=memory)
    assert memory[0, 1] == 1
    assert method.coefficients(torch.eye(2), memory=memory).isfinite().all()
    assert memory[0, 1] == 0


def constrained_minimum(G: Tensor, q: Tensor, sums_to_one: bool) -> Tensor:
    """Return argmin ½ xᵀGx + qᵀx over x ≥ 0 (and Σ x = 1) by trying every set of positive entries."""
    best, least = torch.zeros(len(G), dtype=torch.float64), math.inf if sums_to_one else 0.0
    for count in range(1, len(G) + 1):
        for chosen in map(list, itertools.combinations(range(len(G)), count)):
            M, b = G[chosen][:, chosen], -q[chosen]
            if sums_to_one:
                ones = torch.ones(count, 1, dtype=torch.float64)
                M = torch.cat([torch.cat([M, ones], 1), torch.cat([ones.T, torch.zeros(1, 1)], 1)])
                b = torch.cat([b, torch.ones(1)])
            x = torch.zeros(len(G), dtype=torch.float64)
            x[chosen] = torch.linalg.solve(M, b)[:count]
            value = float(x @ G @ x / 2 + q @ x)
            if (x >= 0).all() and value < least:
                best, least = x, value
    return best


@few_jacobians
def test_mgda_is_the_shortest_convex_combination(J):
    G, T = J @ J.T, len(J)
    c = make_combination("mgda").coefficients(G)
    assert float(c.sum()) == pytest.approx(T)
    close(c, T * constrained_minimum(G, torch.zeros(T, dtype=torch.float64), sums_to_one=True), 1e-8)


def test_mgda_closes_its_duality_gap_where_updates_vanish():
    for J in (jacobian(9, 4), jacobian(30, 20), DEGENERATE["gradients that cancel"]):
        w = make_combination("mgda").coefficients(J @ J.T) / len(J)
        products = J @ (J.T @ w)
        assert abs(float(w @ products - products.min())) < 1e-10


@few_jacobians
def test_upgrad_and_dual_proj_project_on_the_cone_without_conflict(J):
    G, T = J @ J.T, len(J)
    each = [G.new_tensor(row) + constrained_minimum(G, G[i], False) for i, row in enumerate(torch.eye(T).tolist())]
    close(make_combination("upgrad").coefficients(G), torch.stack(each).sum(0), 1e-8)
    u = torch.arange(1.0, T + 1, dtype=torch.float64) * 2 / (T + 1)
    both = {"preference": u.tolist()}
    close(make_combination("upgrad", both).coefficients(G), torch.stack(each).T @ u, 1e-8)
    close(make_combination("dual_proj", both).coefficients(G), u + constrained_minimum(G, G @ u, False), 1e-8)
    ones = torch.ones(T, dtype=torch.float64)
    close(make_combination("dual_proj").coefficients(G), ones + constrained_minimum(G, G @ ones, False), 1e-8)


@every_jacobian
@pytest.mark.parametrize("c", [0.05, 0.4, 1.0, 2.0])
def test_cagrad_meets_the_conditions_of_its_optimum(J, c):
    mean = J.mean(0)
    weights = make_combination("cagrad", {"c": c}).coefficients(J @ J.T) * (1 + c) / len(J)
    update, pull = J.T @ weights, weights - 1 / len(J)
    assert float((update - mean).norm()) == pytest.approx(c * float(mean.norm()), rel=1e-7)
    assert (pull >= -1e-12).all()
    products = J @ update
    scale = J.norm() * mean.norm()
    # Tasks that pull are those that gain least.
    assert ((products - products.min())[pull > 1e-9 * pull.max()] < 1e-7 * scale).all()


def test_cagrad_stays_in_its_ball_where_no_direction_improves_all():
    J = DEGENERATE["opposite gradients, and another"]
    update = J.T @ make_combination("cagrad", {"c": 0.4}).coefficients(J @ J.T)
    assert (J @ update >= -1e-4).all() and update[1] > 0.5


@every_jacobian
@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0, 2.0, 8.0])
def test_fairgrad_and_nash_mtl_solve_their_equations(J, alpha):
    G = J @ J.T
    c = make_combination("fairgrad", {"alpha": alpha}).coefficients(G)
    assert (c > 0).all()
    ratio = (G @ c) * c ** (1 / alpha)
    close(ratio / ratio.mean(), torch.ones(len(J), dtype=torch.float64), 1e-7)
    assert float((J.T @ c).norm()) == pytest.approx(float(J.norm()), rel=1e-7)
    if alpha == 1.0:
        close(make_combination("nash_mtl").coefficients(G), c)
        a = c / (G.trace() / len(J)).sqrt()
        close(G @ a, 1 / a, 1e-7)


@every_jacobian
def test_imtl_g_has_equal_projections(J):
    c = make_combination("imtl_g").coefficients(J @ J.T)
    projections = (J @ (J.T @ c)) / J.norm(dim=1)
    close(projections / projections[0], torch.ones(len(J), dtype=torch.float64), 1e-7)
    bounded = c.sum() < len(J) * (1 - 1e-9)
    assert projections[0] > 0 and (bounded or float(c.sum()) == pytest.approx(len(J)))


def test_imtl_g_never_turns_round():
    found = 0
    for seed in range(200):
        J = jacobian(3, 3, seed) * torch.tensor([[1.0], [10.0], [0.1]])
        G = J @ J.T
        v = torch.linalg.solve(G, J.norm(dim=1))
        c = make_combination("imtl_g").coefficients(G)
        assert (J @ (J.T @ c) > 0).all()
        found += bool(v.sum() < 0)
        assert c.abs().sum() <= 100 * 3 * (1 + 1e-9)
    assert found


@every_jacobian
@pytest.mark.parametrize("mode", ["min", "median", "rmse"])
def test_aligned_mtl_sums_gradients_of_equal_singular_values(J, mode):
    left, values, right = torch.linalg.svd(J, full_matrices=False)
    squared = values**2
    sigma = {"min": squared.min(), "median": squared.median(), "rmse": squared.mean()}[mode].sqrt()
    update = J.T @ make_combination("aligned_mtl", {"mode": mode}).coefficients(J @ J.T)
    close(update, sigma * (left @ right).sum(0), 1e-7)


@every_jacobian
def test_config_has_equal_cosines_and_the_summed_length(J):
    update = J.T @ make_combination("config").coefficients(J @ J.T)
    units = J / J.norm(dim=1, keepdim=True)
    direction = torch.linalg.pinv(units) @ torch.ones(len(J), dtype=torch.float64)
    direction /= direction.norm()
    close(update, (J @ direction).sum() * direction, 1e-7)


# Solvers


@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_quadratic_programmes_agree_with_nonnegative_least_squares(seed, fallback, monkeypatch):
    if fallback:
        monkeypatch.setattr(solvers, "range", lambda count: (), raising=False)
    J = jacobian(7, 9, seed, condition=seed % 4)
    target = jacobian(1, 9, seed + 100)[0]
    x = solvers.nonnegative_quadratic(J @ J.T, -J @ target)
    close(x, torch.from_numpy(nnls(J.T.numpy(), target.numpy())[0]), 1e-7)


@pytest.mark.parametrize("name", [*HARMLESS, "cagrad"])
def test_degenerate_quadratic_programmes_are_solved_without_the_fallback(name, monkeypatch):
    monkeypatch.setattr(solvers, "nnls", None)
    for J in [*DEGENERATE.values(), *(jacobian(20, size, seed) for size in (5, 15) for seed in range(15))]:
        for G in (J @ J.T, J.float() @ J.float().T):
            assert make_combination(name).coefficients(G).isfinite().all()


@pytest.mark.slow
def test_large_numbers_of_tasks_are_no_matter():
    J = jacobian(150, 100, condition=3)
    for case in CASES:
        assert made(case).coefficients(J @ J.T).isfinite().all()


# Names, arguments and objects


def test_only_gradvac_needs_memory():
    assert [name for name in COMBINATIONS if make_combination(name).needs_memory] == ["gradvac"]


def test_methods_get_only_what_they_ask_for():
    seen = {}

    def asks(gramian, *, generator, scale):
        seen.update(generator=generator, scale=scale)
        return gramian.new_ones(len(gramian))

    generator = torch.Generator()
    method = Combination("asks", asks, {"scale": 2})
    method.coefficients(torch.eye(2), generator=generator, memory=torch.zeros(2, 2))
    assert seen == {"generator": generator, "scale": 2} and not method.needs_memory


BAD = {
    "misspelt name": ("pc_grad", None, r"gradient_combination 'pc_grad' is not known, did you mean 'pcgrad'\?"),
    "a method of torchjd": ("krum", None, r"choose from sum, pcgrad, .*weighting object of torchjd \(pip install"),
    "misspelt argument": ("fairgrad", {"alhpa": 1}, r"takes no 'alhpa', did you mean 'alpha'\?; it takes alpha"),
    "argument of another": ("sum", {"c": 1}, "'sum' takes no 'c'; it takes no arguments"),
    "what only the engine gives": ("gradvac", {"memory": torch.zeros(2, 2)}, "takes no 'memory'.*; it takes beta"),
    "c below 0": ("cagrad", {"c": -0.1}, r"gradient_combination_kwargs: c must be a number of at least 0, got -0\.1"),
    "c infinite": ("cagrad", {"c": math.inf}, "c must be a number"),
    "c true": ("cagrad", {"c": True}, "c must be a number"),
    "beta 0": ("gradvac", {"beta": 0}, r"beta must be a number in \(0, 1\], got 0"),
    "beta above 1": ("gradvac", {"beta": 1.5}, "beta must be a number"),
    "alpha below 0": ("fairgrad", {"alpha": -1}, "alpha must be a number of at least 0, got -1"),
    "alpha a string": ("fairgrad", {"alpha": "1"}, "alpha must be a number of at least 0, got '1'"),
    "alpha nan": ("fairgrad", {"alpha": math.nan}, "alpha must be a number"),
    "mode": ("aligned_mtl", {"mode": "max"}, "mode must be one of min, median, rmse, got 'max'"),
    "preference zero": ("upgrad", {"preference": [1.0, 0.0]}, "preference must be one positive number per task"),
    "preference empty": ("upgrad", {"preference": []}, "preference must be one positive number per task"),
    "preference a number": ("upgrad", {"preference": 1.0}, "preference must be one positive number per task"),
    "preference a matrix": ("upgrad", {"preference": torch.ones(2, 2)}, "preference must be one positive number"),
    "not callable": (3, None, "must be a name or an object that is callable with a Gramian, got 3"),
    "a class": (torch.nn.Identity, None, "must be a name or an object"),
    "object with arguments": (torch.nn.Identity(), {"c": 1}, "gradient_combination_kwargs go with a name; .*Identity"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_names_and_arguments_are_refused(case):
    method, kwargs, message = BAD[case]
    for function in (check_combination, make_combination):
        with pytest.raises(ValueError, match=message):
            function(method, kwargs)
    if isinstance(method, str) and "must be" in message:  # A value; the function itself refuses it too.
        with pytest.raises(ValueError, match=message):
            COMBINATIONS[method](torch.eye(2), **kwargs)


@every_case
def test_bad_gramians_are_refused(case):
    for bad, message in [
        (torch.ones(2, 3), r"gramian must be of shape \[T, T\] with T of at least 1, got \[2, 3\]"),
        (torch.ones(0, 0), r"got \[0, 0\]"),
        (torch.tensor(1.0), r"got \[\]"),
        (torch.ones(2, 2, 2), r"got \[2, 2, 2\]"),
        (torch.tensor([[1.0, math.nan], [0.0, 1.0]]), "gramian of 2 tasks has entries that are not finite"),
        (torch.tensor([[math.inf]]), "not finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            made(case).coefficients(bad)


def test_tensors_that_do_not_fit_the_gramian_are_refused():
    with pytest.raises(ValueError, match=r"preference must be of shape \[2\], a number per task, got \[3\]"):
        make_combination("upgrad", {"preference": [1, 2, 3]}).coefficients(torch.eye(2))
    for memory in (torch.zeros(3, 3, dtype=torch.float64), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match=r"memory must be float64 of shape \[2, 2\], got torch\.float"):
            make_combination("gradvac").coefficients(torch.eye(2), memory=memory)


def test_anything_callable_with_a_gramian_is_a_method():
    method = make_combination(lambda gramian: 1 / gramian.diagonal())
    assert not method.needs_memory
    result = method.coefficients(torch.diag(torch.tensor([1.0, 4.0])), generator=torch.Generator())
    assert torch.equal(result, torch.tensor([1.0, 0.25], dtype=torch.float64))
    for returned, message in [
        (lambda gramian: gramian, r"function must return 2 finite numbers, got \[2, 2\]"),
        (lambda gramian: gramian[0, :1], r"got \[1\]"),
        (lambda gramian: [1.0, 1.0], r"got \[1\.0, 1\.0\]"),
        (lambda gramian: gramian[0] / 0, r"must return 2 finite numbers, got \[inf, nan\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_combination(returned).coefficients(torch.eye(2))


# An independent implementation


def reference(name: str, J: Tensor, monkeypatch: pytest.MonkeyPatch, **options) -> Tensor:
    """Return what torchjd gives: weights, or for ConFIG the update."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    G = J @ J.T
    if name in ("UPGrad", "DualProj"):
        pytest.importorskip("quadprog")
        exact = pytest.importorskip("torchjd.linalg").QuadprogProjector(norm_eps=0.0, reg_eps=1e-14)
        return getattr(aggregation, f"{name}Weighting")(projector=exact, **options)(G)
    if name == "CAGrad":
        cvxpy = pytest.importorskip("cvxpy")
        pytest.importorskip("clarabel")
        solve, tight = cvxpy.Problem.solve, dict.fromkeys(["tol_gap_abs", "tol_gap_rel", "tol_feas"], 1e-13)
        monkeypatch.setattr(cvxpy.Problem, "solve", lambda self, solver: solve(self, solver, **tight))
        return aggregation.CAGradWeighting(norm_eps=0.0, **options)(G)
    if name == "NashMTL":
        pytest.importorskip("cvxpy")
        pytest.importorskip("ecos")
        return aggregation.NashMTL(len(J), max_norm=0.0, optim_niter=1000).weighting(J)
    return getattr(aggregation, name)(**options)(J if name == "ConFIG" else G)


approximate = pytest.mark.filterwarnings("ignore:Solution may be inaccurate", "ignore:You are solving a parameterized")


# What ours is, as a multiple of theirs, for T tasks.
TORCHJD = {
    "sum": ("SumWeighting", {}, {}, lambda T: 1),
    "upgrad": ("UPGrad", {}, {}, lambda T: T),
    "dual_proj": ("DualProj", {}, {}, lambda T: T),
    "imtl_g": ("IMTLGWeighting", {}, {}, lambda T: T),
    "cagrad, c 0.1": ("CAGrad", {"c": 0.1}, {"c": 0.1}, lambda T: T / 1.1),
    "cagrad, c 0.4": ("CAGrad", {"c": 0.4}, {"c": 0.4}, lambda T: T / 1.4),
    "cagrad, c 0.9": ("CAGrad", {"c": 0.9}, {"c": 0.9}, lambda T: T / 1.9),
    **{
        f"aligned_mtl, {mode}": ("AlignedMTLWeighting", {"mode": mode}, {"scale_mode": mode}, lambda T: T)
        for mode in ("min", "median", "rmse")
    },
}


@approximate
@every_jacobian
@pytest.mark.parametrize("case", TORCHJD)
def test_coefficients_agree_with_torchjd(case, J, monkeypatch):
    name, ours, theirs, factor = TORCHJD[case]
    expected = factor(len(J)) * reference(name, J, monkeypatch, **theirs)
    if name == "IMTLGWeighting" and expected.abs().sum() > 100 * len(J):
        pytest.skip("ours is bounded there")
    close(make_combination(case.split(",")[0], ours).coefficients(J @ J.T), expected, 1e-5)


@every_jacobian
def test_preferences_agree_with_torchjd(J, monkeypatch):
    preference = torch.arange(1.0, len(J) + 1, dtype=torch.float64)
    theirs = {"pref_vector": preference / preference.sum()}
    for name, other in [("upgrad", "UPGrad"), ("dual_proj", "DualProj"), ("aligned_mtl", "AlignedMTLWeighting")]:
        c = make_combination(name, {"preference": preference}).coefficients(J @ J.T)
        close(c, len(J) * reference(other, J, monkeypatch, **theirs), 1e-5)
    c = make_combination("config", {"preference": preference}).coefficients(J @ J.T)
    close(J.T @ c, reference("ConFIG", J, monkeypatch, **theirs), 1e-5)


@every_jacobian
def test_config_agrees_with_torchjd(J, monkeypatch):
    update = J.T @ make_combination("config").coefficients(J @ J.T)
    close(update, reference("ConFIG", J, monkeypatch), 1e-5)


@every_jacobian
def test_mgda_agrees_with_torchjd_as_far_as_that_has_come(J, monkeypatch):
    w = reference("MGDAWeighting", J, monkeypatch, epsilon=1e-12, max_iters=3000)
    products = J @ (J.T @ w)
    gap = float(w @ products - products.min())  # ‖update - best update‖² is at most this.
    c = make_combination("mgda").coefficients(J @ J.T) / len(J)
    assert float((J.T @ (c - w)).norm()) <= 1e-5 + math.sqrt(max(gap, 0.0))
    if len(J) == 2:
        close(c, w, 1e-5)


@approximate
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, None])
def test_fair_methods_agree_with_torchjd_where_that_solves_its_equation(alpha, monkeypatch):
    solved = 0
    for J in JACOBIANS.values():
        G = J @ J.T
        if alpha is None:
            theirs, ours = reference("NashMTL", J, monkeypatch), make_combination("nash_mtl").coefficients(G)
            equation, factor = (G @ theirs) * theirs, (G.trace() / len(J)).sqrt()
        else:
            theirs = reference("FairGradWeighting", J, monkeypatch, alpha=alpha)
            ours = make_combination("fairgrad", {"alpha": alpha}).coefficients(G)
            equation, factor = (G @ theirs) * theirs ** (1 / alpha), J.norm() / (J.T @ theirs).norm()
        if ((equation - 1).abs() < 1e-5).all():
            solved += 1
            close(ours, factor * theirs, 1e-5)
    assert solved >= 7


@every_jacobian
@pytest.mark.parametrize("seed", [0, 1])
def test_pcgrad_and_gradvac_agree_with_torchjd(J, seed, monkeypatch):
    aggregation = pytest.importorskip("torchjd.aggregation")
    G = J @ J.T
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        expected = aggregation.PCGradWeighting()(G)
    close(make_combination("pcgrad").coefficients(G, generator=torch.Generator().manual_seed(seed)), expected, 1e-5)

    monkeypatch.setattr(torch, "randperm", lambda size, **options: torch.arange(size))  # Theirs draws otherwise.
    theirs, memory = aggregation.GradVacWeighting(beta=0.2, eps=0.0), torch.zeros_like(G)
    for step in range(3):
        moved = J + (seed + step) * J.roll(1, 0)
        c = make_combination("gradvac", {"beta": 0.2}).coefficients(moved @ moved.T, memory=memory)
        close(c, theirs(moved @ moved.T), 1e-5)


def test_weightings_of_torchjd_are_taken_and_aggregators_refused():
    aggregation = pytest.importorskip("torchjd.aggregation")
    J = jacobian(4, 6)
    method = make_combination(aggregation.IMTLGWeighting())
    assert method.name == "IMTLGWeighting"
    close(method.coefficients((J @ J.T).float()), make_combination("imtl_g").coefficients((J @ J.T).float()), 1e-5)
    with pytest.raises(ValueError, match="give a weighting, such as UPGradWeighting.., not a class and not an aggr"):
        make_combination(aggregation.IMTLG())


def torchjd_object(name: str, **options):
    """Return a weighting of torchjd, as a user would give it, solved as exactly as it can be."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    if name in ("UPGradWeighting", "DualProjWeighting"):
        pytest.importorskip("quadprog")
        exact = pytest.importorskip("torchjd.linalg").QuadprogProjector(norm_eps=0.0, reg_eps=1e-14)
        options["projector"] = exact
    if name == "CAGradWeighting":
        pytest.importorskip("cvxpy")
        pytest.importorskip("clarabel")
        options = {"c": 0.4, "norm_eps": 0.0}
    if name == "MGDAWeighting":
        options = {"epsilon": 1e-12, "max_iters": 3000}
    if name == "GradVacWeighting":
        options = {"beta": 0.01, "eps": 0.0}
    if name == "FairGradWeighting":
        options = {"alpha": 2.0}
    return getattr(aggregation, name)(**options)


@approximate
@pytest.mark.parametrize("name", _TORCHJD)
@pytest.mark.parametrize("tasks", [1, 2, 3, 6])
def test_an_object_of_torchjd_has_the_scale_of_the_method_of_that_name(name, tasks, monkeypatch):
    """For orthogonal gradients of equal norm as well as where they conflict, for equal weights and for others."""
    J = jacobian(tasks, 8, seed=5)
    tolerance = 0.05 if name == "MGDAWeighting" else 1e-3  # theirs takes steps towards the solution
    monkeypatch.setattr(torch, "randperm", lambda size, **options: torch.arange(size))
    for G in (3 * torch.eye(tasks, dtype=torch.float64), J @ J.T):
        ours, theirs = make_combination(_TORCHJD[name][0]), make_combination(torchjd_object(name))
        expected = ours.coefficients(G)
        close(theirs.coefficients(G), expected, tolerance)
        shares, weights = torch.linspace(0.1, 0.4, tasks).double(), torch.linspace(1.0, 0.1, tasks).double()
        ours, theirs = make_combination(_TORCHJD[name][0]), make_combination(torchjd_object(name))
        close(theirs.weighted(G, shares, weights), ours.weighted(G, shares, weights), tolerance)


@approximate
@pytest.mark.parametrize("name", ["UPGradWeighting", "DualProjWeighting", "AlignedMTLWeighting"])
def test_a_preference_of_an_object_of_torchjd_is_one_by_name(name):
    J = jacobian(4, 6, seed=3)
    G, preference = J @ J.T, [1.0, 2.0, 0.5, 4.0]
    vector = torch.tensor(preference, dtype=torch.float64)
    theirs = make_combination(torchjd_object(name, pref_vector=vector))
    ours = make_combination(_TORCHJD[name][0], {"preference": preference})
    close(theirs.coefficients(G), ours.coefficients(G), 1e-5)
    some = [0, 1, 3]
    part = G[some][:, some]
    close(theirs.for_tasks(some, 4).coefficients(part), ours.for_tasks(some, 4).coefficients(part), 1e-5)
    for method in (ours, theirs):
        with pytest.raises(ValueError, match=r"preference must be of shape \[3\], a number per task, got \[4\]"):
            method.for_tasks(some, 3)
    assert torch.equal(vector, torch.tensor(preference, dtype=torch.float64))


@pytest.mark.parametrize("name", ["SDMGradWeighting", "ExcessMTLWeighting", "MoDoWeighting", "NashMTL"])
def test_objects_that_want_the_gradients_themselves_are_refused(name):
    """They would take the Gramian for a matrix of gradients, and give coefficients of something else."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    if name == "NashMTL":
        for module in ("cvxpy", "ecos"):
            pytest.importorskip(module)
        weighting = aggregation.NashMTL(2).weighting
    else:
        kind = getattr(aggregation, name, None)
        if kind is None:
            pytest.skip("this version of torchjd does not export it")
        weighting = object.__new__(kind)
    with pytest.raises(ValueError, match="takes the gradients themselves"):
        make_combination(weighting)


# Weights


class Inverse:
    """A method of the user's own, by the inverse of the squared norms."""

    def __call__(self, gramian):
        return 1 / gramian.diagonal().clamp(min=1e-12)


def weighted_cases() -> dict[str, Combination]:
    cases = {case: made(case) for case in CASES} | {"an object": make_combination(Inverse())}
    for name in ("upgrad", "config"):
        cases[f"{name}, preference"] = make_combination(name, {"preference": [1.0, 3.0, 0.5]})
    return cases


WEIGHTED = weighted_cases()
every_weighted = pytest.mark.parametrize("method", WEIGHTED.values(), ids=WEIGHTED)
# An auxiliary task, the last one, whose gradient is short, long, in conflict with one or with both of the others.
AUXILIARY = {
    "orthogonal": torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]),
    "short": torch.tensor([[1.0, 0.2, 0], [0.3, 1.0, 0], [0, 0.02, 0.1]]),
    "long": torch.tensor([[1.0, 0.2, 0], [0.3, 1.0, 0], [2, 8.0, 20.0]]),
    "in conflict": torch.tensor([[1.0, 0.2, 0], [0.3, 1.0, 0], [-0.9, 0.1, 0.5]]),
    "long and in conflict with both": torch.tensor([[1.0, 0.2, 0], [0.3, 1.0, 0], [-9.0, -5.0, 5.0]]),
    "all in conflict": torch.tensor([[1.0, 0.2, 0], [-0.8, 1.0, 0], [-0.6, -0.5, 0.7]]),
}
every_auxiliary = pytest.mark.parametrize("J", [J.double() for J in AUXILIARY.values()], ids=AUXILIARY)
SHARES = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)


@every_weighted
@every_auxiliary
def test_the_part_of_a_task_falls_with_its_weight_and_vanishes_with_it(method, J):
    """And at weight 0 it is absent: of the combination of the others, too."""
    G, fresh = J @ J.T, torch.zeros(3, 3, dtype=torch.float64)
    parts, fractions = [], []
    others = method.for_tasks([0, 1], 3).weighted(
        G[:2, :2], SHARES[:2], torch.ones(2, dtype=torch.float64), memory=fresh[:2, :2].clone()
    )
    for weight in (1.0, 0.5, 0.1, 1e-3, 1e-9, 0.0):
        weights = torch.tensor([1.0, 1.0, weight], dtype=torch.float64)
        found = method.weighted(G, SHARES, weights, memory=fresh.clone())
        lengths = found.abs() * SHARES * J.norm(dim=1)
        parts.append(float(lengths[2]))
        fractions.append(float(lengths[2] / lengths.sum()) if lengths.sum() else 0.0)
        if weight <= 1e-9:
            close(found[:2], others, 1e-6)
    assert parts == pytest.approx([parts[0] * weight for weight in (1.0, 0.5, 0.1, 1e-3, 1e-9, 0.0)])
    assert parts[-1] == 0 and all(a >= b for a, b in itertools.pairwise(fractions)) and fractions[-2] < 1e-6


@every_weighted
@every_auxiliary
def test_equal_weights_are_a_factor_of_the_method_s_own_coefficients(method, J):
    G = J @ J.T
    for shares in (torch.full((3,), 1 / 3, dtype=torch.float64), SHARES):
        seen = G * shares[:, None] * shares if method.takes_shares else G
        own = method.coefficients(seen, generator=torch.Generator().manual_seed(7))
        for weight in (1.0, 0.25, 3.0):
            found = method.weighted(G, shares, torch.full((3,), weight, dtype=torch.float64), seed=7)
            close(found, weight * own, 1e-9)


@every_weighted
@every_auxiliary
def test_common_factors_of_weights_of_shares_and_of_losses_change_nothing_else(method, J):
    G, weights = J @ J.T, torch.tensor([1.0, 0.7, 0.2], dtype=torch.float64)
    plain = method.weighted(G, SHARES, weights)
    close(method.weighted(G, SHARES, 5 * weights), 5 * plain, 1e-7)
    close(method.weighted(G, SHARES / 5, weights), plain, 1e-7)
    if "weighting" not in method.kwargs:  # objects may do as they please
        close(method.weighted(1e6 * G, SHARES, weights), plain, 1e-7)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 0.1), (2.0, 0.5, 0.5), (0.3, 0.0, 1.0), (1.0, 2.0, 3.0)])
def test_the_weighted_sum_is_the_weighted_sum(weights):
    J, weights = jacobian(3, 5), torch.tensor(weights, dtype=torch.float64)
    close(make_combination("sum").weighted(J @ J.T, SHARES, weights), weights)


@every_weighted
def test_weighted_tasks_may_come_in_any_order(method):
    J, weights = AUXILIARY["all in conflict"].double(), torch.tensor([1.0, 0.7, 0.2], dtype=torch.float64)
    if method.name in ("pcgrad", "gradvac") or method.kwargs.get("preference"):
        return  # random orders, and preferences, go with places
    order = [2, 0, 1]
    G = J @ J.T
    moved = method.weighted(G[order][:, order], SHARES[order], weights[order])
    close(moved, method.weighted(G, SHARES, weights)[order], 1e-7)


def test_a_small_auxiliary_weight_does_not_shorten_the_step_of_mgda():
    """Weighted before the method sees it, it would be its shortest gradient: 87 % of a step of 8 % of the length."""
    J = AUXILIARY["orthogonal"].double()[1:]
    found = make_combination("mgda").weighted(
        J @ J.T, torch.full((2,), 0.5, dtype=torch.float64), torch.tensor([1.0, 0.1], dtype=torch.float64)
    )
    close(found, torch.tensor([1.0, 0.1], dtype=torch.float64))


def test_what_gradvac_remembers_comes_from_all_tasks_of_the_step():
    J, weights = AUXILIARY["all in conflict"].double(), torch.tensor([1.0, 0.7, 0.2], dtype=torch.float64)
    method, one, other = make_combination("gradvac", {"beta": 0.5}), *torch.zeros(2, 3, 3, dtype=torch.float64)
    method.weighted(J @ J.T, SHARES, weights, seed=3, memory=one)
    method.weighted(J @ J.T, SHARES, torch.ones(3, dtype=torch.float64), seed=3, memory=other)
    assert torch.equal(one, other) and one.any()


# What the docstrings say of the length of the update, given the gradients and the coefficients.
LENGTHS = {
    "sum": lambda J, c: (J.sum(0).norm(), J.sum(0).norm()),
    "pcgrad": lambda J, c: (0.0, J.norm(dim=1).sum()),
    "gradvac": lambda J, c: (0.0, J.norm(dim=1).sum()),  # with targets of 0
    "mgda": lambda J, c: (0.0, len(J) * J.norm(dim=1).min()),
    "cagrad": lambda J, c: ((1 - 0.4) / (1 + 0.4) * J.sum(0).norm(), J.sum(0).norm()),
    "nash_mtl": lambda J, c: (J.norm(), J.norm()),
    "fairgrad": lambda J, c: (J.norm(), J.norm()),
    "imtl_g": lambda J, c: (length_of_imtl_g(J),) * 2,
    "aligned_mtl": lambda J, c: (len(J) ** 0.5 * torch.linalg.svdvals(J).min(),) * 2,
    "upgrad": lambda J, c: (0.0, J.norm(dim=1).sum()),
    "dual_proj": lambda J, c: (0.0, J.sum(0).norm()),
    "config": lambda J, c: ((J @ (J.T @ c)).sum().abs() / (J.T @ c).norm(),) * 2,
}


def length_of_imtl_g(J: Tensor) -> Tensor:
    norms = J.norm(dim=1)
    v = torch.linalg.solve(J @ J.T, norms)
    return len(J) * (norms @ v).sqrt() / v.sum()


@pytest.mark.parametrize("name", LENGTHS)
@every_auxiliary
def test_the_update_is_as_long_as_documented(name, J):
    c = make_combination(name).coefficients(J @ J.T)
    shortest, longest = LENGTHS[name](J, c)
    assert shortest - 1e-6 <= (J.T @ c).norm() <= longest + 1e-6
    assert "‖d‖" in COMBINATIONS[name].__doc__ or "length" in COMBINATIONS[name].__doc__


def test_every_method_has_a_documented_length():
    assert LENGTHS.keys() == COMBINATIONS.keys()


@pytest.mark.parametrize("seed", range(5))
def test_graddrop_keeps_less_of_a_task_of_a_smaller_weight(seed):
    """At every number, for every draw: the auxiliary task's part falls with its weight and vanishes with it."""
    generator = torch.Generator().manual_seed(seed)
    gradients, draws = torch.randn(3, 500, generator=generator), torch.rand(500, generator=generator)
    before = torch.full((500,), math.inf)
    for weight in (1.0, 0.5, 0.1, 1e-3, 0.0):
        rows = gradients * torch.tensor([[1.0], [1.0], [weight]])
        without = graddrop(torch.cat([rows[:2], rows[2:] * 0]), draws)
        update = graddrop(rows, draws)
        positive = 0.5 * (1 + rows.sum(0) / rows.abs().sum(0)) > draws
        kept = torch.where(positive, gradients[2] > 0, gradients[2] < 0) * rows[2].abs()
        assert (kept <= before + 1e-7).all() and update.norm() <= rows.abs().sum(0).norm()
        before = kept
    assert torch.equal(update, without) and not kept.any()


def test_a_solution_that_is_not_found_is_an_error():
    """With an exponent of a millionth the equation of fairgrad is beyond float64 where tasks outnumber parameters."""
    jacobian = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with pytest.raises(RuntimeError, match="did not converge"):
        make_combination("fairgrad", {"alpha": 1e6}).coefficients(jacobian @ jacobian.T)
