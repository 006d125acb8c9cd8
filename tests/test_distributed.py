"""Two processes do what one does: the same update, the same metrics, idle heads left alone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("distributed_run.py")


def launch(folder: Path, processes: int, *options: str) -> dict:
    """Run the script on some processes and return what rank 0 saved."""
    out = folder / f"{processes}.pt"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(SCRIPT), str(out), *options]
    base = {**os.environ, "OMP_NUM_THREADS": "1"}
    environments = [
        base
        | dict(
            RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        for r in range(processes)
    ]
    environments = environments if processes > 1 else [base]
    runs = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for env in environments
    ]
    for run in runs:
        output, _ = run.communicate(timeout=240)
        assert run.returncode == 0, output[-4000:]
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("options", [("mixed", "rows"), ("single_task", "tasks")])
def test_two_processes_equal_one(tmp_path, options):
    one, two = launch(tmp_path, 1, *options), launch(tmp_path, 2, *options)
    assert set(one["weights"]) == set(two["weights"])
    for name, value in one["weights"].items():
        difference = (value - two["weights"][name]).abs().max() / value.abs().max().clamp(min=1e-3)
        assert difference < 1e-5, name
    for key, value in one["metrics"].items():
        if not key.endswith(("runtime", "per_second", "time")):
            assert two["metrics"][key] == pytest.approx(value, abs=1e-4), key
    for line, other in zip(one["logs"], two["logs"], strict=True):
        assert set(line) == set(other)
        for key in line:
            assert other[key] == pytest.approx(line[key], rel=1e-4, abs=1e-6), key
    assert one["rows_seen"] == two["rows_seen"]
    for run in (one, two):
        assert run["idle_is_untouched"]


@pytest.mark.parametrize("sampling", ["temperature", "annealed"])
def test_resumed_on_two_processes_equals_uninterrupted(tmp_path, sampling):
    (tmp_path / "run").mkdir()
    options = ("mixed", "rows", sampling, str(tmp_path / "run" / "checkpoint-4"))
    whole = launch(tmp_path, 2, *options)
    resumed = launch(tmp_path, 2, *options)
    assert all(torch.equal(value, resumed["weights"][name]) for name, value in whole["weights"].items())
    assert whole["rows_seen"] == resumed["rows_seen"] and len(whole["logs"]) == len(resumed["logs"]) == 3
    for line, other in zip(whole["logs"], resumed["logs"], strict=True):
        assert {k: v for k, v in line.items() if k != "epoch"} == {k: v for k, v in other.items() if k != "epoch"}
