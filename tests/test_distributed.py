"""Several processes do what one does, however they are started: the same update and metrics, idle heads left alone."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from hf_multitask import AutoModelForMultiTask

SCRIPT = Path(__file__).with_name("distributed_run.py")
CONFIGS = SCRIPT.parents[1] / "recipes" / "accelerate"


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def run_together(commands: list[list[str]], environments: list[dict] | None = None) -> list[str]:
    """Run commands side by side and return what they wrote."""
    base = {**os.environ, "OMP_NUM_THREADS": "1"} | (
        {} if torch.accelerator.is_available() else {"DS_ACCELERATOR": "cpu"}
    )
    runs = [
        subprocess.Popen(
            command, env=base | extra, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=SCRIPT.parent
        )
        for command, extra in zip(commands, environments or [{}] * len(commands), strict=True)
    ]
    outputs = []
    for run in runs:
        output, _ = run.communicate(timeout=240)
        assert run.returncode == 0, output[-20000:]
        outputs.append(output)
    return outputs


def launch(folder: Path, processes: int, *options: str) -> dict:
    """Run the script on some processes, started one by one, and return what rank 0 saved."""
    out = folder / f"{processes}.pt"
    command = [sys.executable, str(SCRIPT), str(out), *options]
    address = dict(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    environments = [address | dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(processes)]
    run_together([command] * processes, environments if processes > 1 else [{}])
    return torch.load(out, weights_only=True)


def accelerate(folder: Path, config: str, *options: str, machines: int = 1, flags: Sequence[str] = ()) -> dict:
    """Run the script by `accelerate launch` with one of the recipes' configurations; a launcher for each machine."""
    out = folder / f"{config}.pt"
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    launcher += ["--config_file", str(CONFIGS / f"{config}.yaml"), "--main_process_port", free_port(), *flags]
    ranks = [["--main_process_ip", "127.0.0.1", "--machine_rank", str(rank)] for rank in range(machines)]
    run_together([[*launcher, *(own if machines > 1 else []), str(SCRIPT), str(out), *options] for own in ranks])
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A function that returns what one process gives; each kind of run is made once."""
    return functools.cache(lambda *options: launch(tmp_path_factory.mktemp("alone"), 1, *options))


def check_equal(one: dict, two: dict, except_for: str = " ") -> None:
    """Check that two runs are the same to rounding, and that neither touched the head of the task without rows."""
    assert set(one["weights"]) == set(two["weights"])
    for name, value in one["weights"].items():
        if except_for in name:
            continue
        difference = (value - two["weights"][name]).abs().max() / value.abs().max().clamp(min=1e-3)
        assert difference < 1e-5, name
    for key, value in one["metrics"].items():
        if not key.endswith(("runtime", "per_second", "time")) and except_for not in key:
            assert two["metrics"][key] == pytest.approx(value, abs=1e-4), key
    for line, other in zip(one["logs"], two["logs"], strict=True):
        assert set(line) == set(other)
        for key in line:
            assert other[key] == pytest.approx(line[key], rel=1e-4, abs=1e-6), key
    assert one["rows_seen"] == two["rows_seen"]
    assert one["idle_is_untouched"] and two["idle_is_untouched"] in (True, None)


def check_same_run(whole: dict, resumed: dict) -> None:
    """Check that a run that went on from a checkpoint ended as the one that was never stopped, to the last bit."""
    assert all(torch.equal(value, resumed["weights"][name]) for name, value in whole["weights"].items())
    assert whole["rows_seen"] == resumed["rows_seen"] and len(whole["logs"]) == len(resumed["logs"]) == 3
    for line, other in zip(whole["logs"], resumed["logs"], strict=True):
        assert {k: v for k, v in line.items() if k != "epoch"} == {k: v for k, v in other.items() if k != "epoch"}


@pytest.mark.parametrize("options", [("single_task", "tasks"), pytest.param(("mixed", "rows"), marks=pytest.mark.slow)])
def test_two_processes_equal_one(tmp_path, alone, options):
    check_equal(alone(*options), launch(tmp_path, 2, *options))


@pytest.mark.parametrize(
    ("config", "machines", "distributed_type"), [("cpu", 1, "MULTI_CPU"), ("two_machines", 2, "MULTI_CPU")]
)
@pytest.mark.sample(2)
def test_accelerate_launch_equals_one_process(tmp_path, alone, config, machines, distributed_type):
    launched = accelerate(tmp_path, config, "mixed", "rows", machines=machines)
    assert launched["distributed_type"] == distributed_type
    check_equal(alone("mixed", "rows"), launched)


@pytest.mark.parametrize("options", [("mixed", "rows"), pytest.param(("single_task", "tasks"), marks=pytest.mark.slow)])
def test_fully_sharded_equals_one_process(tmp_path, alone, options):
    sharded = accelerate(tmp_path, "fsdp2", *options)
    assert sharded["distributed_type"] == "FSDP" and sharded["shards"] == len(sharded["weights"])
    check_equal(alone(*options), sharded)


BALANCED = [
    dict(gradient_combination="upgrad", loss_weighting="uncertainty"),
    dict(gradient_combination="graddrop", combination_every=2, conflict_logging_steps=2),
    dict(gradient_combination="cagrad", combination_every=2, conflict_logging_steps=1),
    dict(loss_weighting="db_mtl"),
    dict(gradient_combination="upgrad", gradient_memory="sketch"),
    dict(gradient_combination="mgda", loss_weighting="famo"),
]


@pytest.mark.parametrize(
    ("options", "sharded"),
    [(BALANCED[0], False), (BALANCED[0], True)]
    + [
        pytest.param(options, sharded, marks=pytest.mark.slow)
        for options, sharded in [
            (BALANCED[1], False),
            (BALANCED[2], True),
            (BALANCED[3], False),
            (BALANCED[3], True),
            (BALANCED[4], False),
            (BALANCED[5], False),
            (BALANCED[5], True),
        ]
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
@pytest.mark.slow
def test_balanced_on_two_processes_equals_one(tmp_path, alone, options, sharded):
    arguments = ("mixed", "rows", "weighted", "", json.dumps(options))
    two = accelerate(tmp_path, "fsdp2", *arguments) if sharded else launch(tmp_path, 2, *arguments)
    one = alone(*arguments)
    check_equal(one, two)
    for line, other in zip(one["logs"], two["logs"], strict=True):
        decided = [key for key in line if key.startswith(("coefficient/", "weight/", "conflict/"))]
        assert decided
        for key in decided:
            assert other[key] == pytest.approx(line[key], rel=1e-5, abs=1e-5), key


@pytest.mark.slow
def test_logging_conflicts_changes_no_weight_on_two_processes(tmp_path, alone):
    arguments = ("mixed", "rows", "weighted", "")
    plain = launch(tmp_path, 2, *arguments)
    options = (*arguments, json.dumps({"conflict_logging_steps": 1}))
    logged, one = launch(tmp_path, 2, *options), alone(*options)
    assert all(torch.equal(value, logged["weights"][name]) for name, value in plain["weights"].items())
    found = [{k: v for k, v in line.items() if k.startswith("conflict/")} for line in logged["logs"]]
    expected = [{k: v for k, v in line.items() if k.startswith("conflict/")} for line in one["logs"]]
    assert all(found) and found == [pytest.approx(line, abs=1e-4) for line in expected]


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "unfrozen"])
@pytest.mark.parametrize("way", [{}, {"gradient_combination": "pcgrad"}], ids=["plain", "pcgrad"])
def test_freezing_in_mid_training_on_two_processes_equals_one(tmp_path, alone, way, trained):
    arguments = ("mixed", "rows", "weighted", "")
    options = (*arguments, json.dumps({**way, "switch": trained}))
    one, two = alone(*options), launch(tmp_path, 2, *options)
    check_equal(one, two)
    unchanged = alone(*arguments, json.dumps(way))
    name = "backbone.embeddings.word_embeddings.weight"
    assert not torch.allclose(one["weights"][name], unchanged["weights"][name])


@pytest.mark.slow
def test_an_overridden_loss_on_two_processes_equals_one(tmp_path, alone):
    arguments = ("mixed", "rows", "weighted", "")
    options = (*arguments, json.dumps({"own_loss": True, "learning_rate": 0.025, "max_grad_norm": 1e9}))
    one, two = alone(*options), launch(tmp_path, 2, *options)
    check_equal(one, two)
    plain = alone(*arguments, json.dumps({"learning_rate": 0.05, "max_grad_norm": 1e9}))
    head = next(name for name in one["weights"] if name.startswith("heads.tone"))
    assert not torch.equal(one["weights"][head], plain["weights"][head])


SCHEME_RUNS = {
    "soft": dict(scheme="soft"),
    "soft, cross-stitched": dict(scheme="soft", options={"cross_stitch": True}),
    "conditioned": dict(scheme="conditioned"),
    "prefix": dict(scheme="prefix", options={"num_virtual_tokens": 3}),
    "adapter": dict(scheme="adapter", options={"shared_rank": 2}),
    "mixture": dict(scheme="mixture_of_experts", options={"num_experts": 4, "router_noise": 0.0}),
    "mixture, combined": dict(
        scheme="mixture_of_experts",
        options={"num_experts": 4, "router_noise": 0.0, "router_task_embedding": True},
        gradient_combination="upgrad",
    ),
    "conditioned, combined": dict(scheme="conditioned", gradient_combination="upgrad"),
    "soft, weighted": dict(scheme="soft", loss_weighting="uncertainty"),
}


@pytest.mark.parametrize(
    "kind",
    [kind if kind == "mixture, combined" else pytest.param(kind, marks=pytest.mark.slow) for kind in SCHEME_RUNS],
)
@pytest.mark.sample(9)
def test_every_scheme_on_two_processes_equals_one(tmp_path, alone, kind):
    arguments = ("mixed", "rows", "weighted", "", json.dumps(SCHEME_RUNS[kind]))
    check_equal(alone(*arguments), launch(tmp_path, 2, *arguments))


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_equals_one_process(tmp_path, alone, stage):
    pytest.importorskip("deepspeed")
    engine = accelerate(tmp_path, f"zero{stage}", "mixed", "rows")
    assert engine["distributed_type"] == "DEEPSPEED"
    # Its step is part of its backward: nobody can take the gradient of an idle head away, and weight decay moves it.
    check_equal(alone("mixed", "rows"), engine, except_for="traits")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_resumed_deepspeed_equals_uninterrupted(tmp_path, stage):
    pytest.importorskip("deepspeed")
    (tmp_path / "run").mkdir()
    options = ("mixed", "rows", "temperature", str(tmp_path / "run" / "checkpoint-4"))
    check_same_run(accelerate(tmp_path, f"zero{stage}", *options), accelerate(tmp_path, f"zero{stage}", *options))


@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", pytest.param("SHARDED_STATE_DICT", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_resumed_fully_sharded_equals_uninterrupted(tmp_path, kind):
    (tmp_path / "run").mkdir()
    options = ("mixed", "rows", "temperature", str(tmp_path / "run" / "checkpoint-4"))
    whole = accelerate(tmp_path, "fsdp2", *options, flags=["--fsdp_state_dict_type", kind])
    resumed = accelerate(tmp_path, "fsdp2", *options, flags=["--fsdp_state_dict_type", kind])
    check_same_run(whole, resumed)
    if kind == "FULL_STATE_DICT":
        reloaded = AutoModelForMultiTask.from_pretrained(tmp_path / "run" / "checkpoint-6")
        assert all(torch.equal(value, reloaded.get_parameter(name)) for name, value in whole["weights"].items())


@pytest.mark.parametrize(
    "sampling", ["streams", *(pytest.param(name, marks=pytest.mark.slow) for name in ("annealed", "temperature"))]
)
def test_resumed_on_two_processes_equals_uninterrupted(tmp_path, sampling):
    (tmp_path / "run").mkdir()
    options = ("mixed", "rows", sampling, str(tmp_path / "run" / "checkpoint-4"))
    whole = launch(tmp_path, 2, *options)
    resumed = launch(tmp_path, 2, *options)
    check_same_run(whole, resumed)
