"""Gates of auxiliary tasks: laws for both ways of gating, and what a run keeps of them."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from hf_multitask import Task
from hf_multitask.balancing.gating import GATINGS, AuxiliaryGates, cosine, weighted_cosine

every_gating = pytest.mark.parametrize("name", GATINGS)


def gates(name: str, gradients: Tensor, auxiliary, primary=None) -> list[float]:
    return GATINGS[name](gradients @ gradients.T, auxiliary, primary).tolist()


def random_gradients(tasks: int, seed: int = 0) -> Tensor:
    return torch.randn(tasks, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


MAIN = torch.tensor([3.0, -4.0, 0.0], dtype=torch.float64)
ACROSS = torch.tensor([4.0, 3.0, 2.0], dtype=torch.float64)
# By case: the auxiliary gradient, whether it is let through, and its cosine where that counts.
DIRECTIONS = {
    "opposed": (-MAIN, 0.0, 0.0),
    "opposed and small": (-1e-6 * MAIN, 0.0, 0.0),
    "against it": (ACROSS - 0.1 * MAIN, 0.0, 0.0),
    "orthogonal": (ACROSS, 1.0, 0.0),
    "with it": (torch.tensor([3.0, 4.0 - 8.0, 5.0], dtype=torch.float64), 1.0, 0.5**0.5),
    "aligned": (0.2 * MAIN, 1.0, 1.0),
    "no gradient": (0 * MAIN, 1.0, 1.0),
}


@pytest.mark.parametrize("primary", [0, None])
@pytest.mark.parametrize("case", DIRECTIONS)
def test_a_gate_looks_at_the_angle(case, primary):
    gradient, hard, soft = DIRECTIONS[case]
    gradients = torch.stack([MAIN, gradient])
    assert gates("cosine", gradients, [False, True], primary) == [1.0, hard]
    assert gates("weighted_cosine", gradients, [False, True], primary) == pytest.approx([1.0, soft], abs=1e-12)


@every_gating
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("primary", [None, 0, 2])
def test_gates_are_those_of_the_gradients_themselves(name, seed, primary):
    gradients, auxiliary = random_gradients(5, seed), [False, True, False, True, True]
    helped = gradients[primary] if primary is not None else gradients[0] + gradients[2]
    found = gates(name, gradients, auxiliary, primary)
    for gradient, is_auxiliary, gate in zip(gradients, auxiliary, found, strict=True):
        value = torch.nn.functional.cosine_similarity(gradient, helped, dim=0).item()
        expected = 1.0 if not is_auxiliary else float(value >= 0) if name == "cosine" else max(0.0, value)
        assert gate == pytest.approx(expected, abs=1e-12)


@every_gating
@pytest.mark.parametrize("primary", [None, 2])
def test_gated_auxiliary_tasks_never_turn_the_update_uphill_for_who_is_helped(name, primary):
    shut = 0
    for seed in range(50):
        gradients, auxiliary = random_gradients(5, seed), [False, True, False, True, True]
        found = torch.tensor(gates(name, gradients, auxiliary, primary), dtype=torch.float64)
        helped = gradients[primary] if primary is not None else gradients[0] + gradients[2]
        help_of_auxiliary = (found[[1, 3, 4]] @ gradients[[1, 3, 4]]) @ helped
        assert help_of_auxiliary >= -1e-12
        shut += (found == 0).sum().item()
    assert shut > 20


@every_gating
@pytest.mark.parametrize("primary", [None, 1])
def test_the_order_of_the_tasks_makes_no_difference(name, primary):
    gradients, auxiliary = random_gradients(5, 3), [True, False, True, False, True]
    order = [4, 1, 0, 3, 2]
    moved = gates(
        name, gradients[order], [auxiliary[i] for i in order], None if primary is None else order.index(primary)
    )
    assert moved == pytest.approx([gates(name, gradients, auxiliary, primary)[i] for i in order])


@every_gating
@pytest.mark.parametrize("scale", [1e-12, 3.0, 1e12])
def test_scales_make_no_difference(name, scale):
    gradients, auxiliary = random_gradients(4, 1), [False, True, True, False]
    expected = gates(name, gradients, auxiliary)
    assert 0.0 < sum(expected) < 4.0
    assert gates(name, scale * gradients, auxiliary) == pytest.approx(expected)
    own = gradients.clone()
    own[1] *= scale
    assert gates(name, own, auxiliary) == pytest.approx(expected)


@every_gating
def test_the_weights_of_those_that_are_helped_do_count(name):
    gradients = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 2.0]], dtype=torch.float64)
    auxiliary = [False, False, True]
    assert gates(name, gradients, auxiliary)[2] > 0.0
    heavy = gradients * torch.tensor([[9.0], [1.0], [1.0]])
    assert gates(name, heavy, auxiliary)[2] == 0.0
    assert gates(name, heavy, auxiliary, primary=1)[2] > 0.0


@every_gating
@pytest.mark.parametrize(
    ("gradients", "auxiliary"),
    [
        (torch.zeros(3, 2), [False, True, True]),
        (torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, 0.0]]), [True, True, True]),
        (torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, 0.0]]), [False, False, True]),
        (torch.tensor([[0.0, 0.0], [-1.0, -1.0], [1.0, 0.0]]), [False, True, True]),
    ],
    ids=["all zero", "nobody to help", "helped gradients that cancel", "a primary gradient of zero"],
)
def test_with_nothing_to_compare_gates_are_open(name, gradients, auxiliary):
    assert gates(name, gradients, auxiliary) == [1.0] * 3


@every_gating
def test_the_result_is_of_one_kind(name):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        found = GATINGS[name](torch.eye(3, dtype=dtype), [False, True, True])
        assert found.dtype == torch.float64 and found.shape == (3,) and found.device.type == "cpu"


@every_gating
@pytest.mark.parametrize(
    ("gramian", "message"),
    [(torch.eye(2), r"shape \[3, 3\], a row per task, got \[2, 2\]"), (torch.full((3, 3), float("nan")), "not finite")],
)
def test_a_bad_gramian_is_named(name, gramian, message):
    with pytest.raises(ValueError, match=message):
        GATINGS[name](gramian, [False, True, True])


# ---- what a run keeps ----


def make_tasks(*auxiliary: bool) -> list[Task]:
    return [Task(f"t{i}", "regression", auxiliary=value) for i, value in enumerate(auxiliary)]


OPPOSED = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)


def test_gates_that_are_off_stay_open_and_say_nothing():
    made = AuxiliaryGates(None, make_tasks(False, False))
    assert not made.is_on and made.decide(OPPOSED, [0, 1]).tolist() == made.values == [1.0, 1.0]
    made.end_step(["t0", "t1"])
    assert made.logs() == {}


def test_only_tasks_of_the_window_are_gated():
    made = AuxiliaryGates("cosine", make_tasks(True, False, True))
    assert made.decide(OPPOSED, [1, 2]).tolist() == [1.0, 0.0] and made.values == [1.0, 1.0, 0.0]
    assert made.decide(OPPOSED, [0, 2]).tolist() == [1.0, 1.0] and made.values == [1.0, 1.0, 1.0]


def test_without_rows_of_the_primary_task_gates_are_open():
    made = AuxiliaryGates("weighted_cosine", make_tasks(False, False, True), "t0")
    assert made.decide(OPPOSED, [1, 2]).tolist() == [1.0, 1.0]
    assert made.decide(OPPOSED, [0, 2]).tolist() == [1.0, 0.0]


def test_a_gramian_that_is_not_finite_opens_the_gates():
    made = AuxiliaryGates("cosine", make_tasks(False, True))
    made.decide(OPPOSED, [0, 1])
    assert made.decide(OPPOSED * float("inf"), [0, 1]).tolist() == made.values == [1.0, 1.0]


def test_the_log_holds_means_over_steps_with_rows_and_survives_a_checkpoint():
    tasks = make_tasks(False, True, True)
    made = AuxiliaryGates("cosine", tasks)
    made.decide(OPPOSED, [0, 1])
    for present in (["t0", "t1"], ["t0"], ["t0", "t1"]):
        made.end_step(present)
    resumed = AuxiliaryGates("cosine", tasks)
    resumed.load_state_dict(json.loads(json.dumps(made.state_dict())))
    for gates_of_run in (made, resumed):
        assert gates_of_run.values == [1.0, 0.0, 1.0]
        gates_of_run.decide(-OPPOSED, [0, 1])
        gates_of_run.end_step(["t0", "t1"])
        assert gates_of_run.logs() == {"gate/t1": pytest.approx(1 / 3)}
        assert gates_of_run.logs() == {}


def test_gates_without_an_auxiliary_task_are_refused():
    with pytest.raises(
        ValueError, match="auxiliary_gating='cosine' has nothing to do: none of the tasks t0, t1 is aux"
    ):
        AuxiliaryGates("cosine", make_tasks(False, False))


def test_the_registry_holds_both():
    assert GATINGS == {"cosine": cosine, "weighted_cosine": weighted_cosine}
