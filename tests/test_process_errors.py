"""An error on one of two processes ends both, soon, with that error: no process waits for one that never comes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_multitask.balancing.combination import COMBINATIONS
from hf_multitask.balancing.elementwise import ELEMENTWISE
from hf_multitask.balancing.weighting import WEIGHTINGS

SCRIPT = Path(__file__).with_name("error_processes.py")
ERROR = "process {} raised Fault: injected fault"

COMBINED = [
    dict(options=dict(gradient_combination=name), place="balancer.combine")
    for name in (*COMBINATIONS, *ELEMENTWISE)
    if name != "sum"
]
WEIGHTED = [dict(options=dict(loss_weighting=name), place="balancer.weigh") for name in WEIGHTINGS if name != "static"]
EVENTS = ("on_step_begin", "on_pre_optimizer_step", "on_step_end", "on_log", "on_evaluate", "on_save")
METHODS = ("get_batch_samples", "progress.drain", "_gradient_problem", "prediction_step", "_save_checkpoint")
PLACES = [
    dict(options=options, place=place)
    for options in ({}, dict(gradient_combination="upgrad"))
    for place in (*EVENTS, *METHODS, "model.forward")
]
OTHERS = [
    dict(options=dict(gradient_combination="upgrad"), place="gradients.gramian"),
    dict(options=dict(gradient_combination="upgrad", gradient_memory="sketch"), place="gradients.gramian"),
    dict(options=dict(gradient_combination="upgrad", gradient_memory="sketch"), place="_second_pass"),
    dict(options=dict(loss_weighting="gradnorm", gradient_accumulation_steps=2), place="_add_up_losses"),
    dict(options=dict(conflict_logging_steps=1), place="_measure_conflicts"),
    dict(options=dict(conflict_logging_steps=1), place="balancer.record_cosines"),
]
KINDS = {"combinations": COMBINED, "weightings": WEIGHTED, "places": PLACES, "others": OTHERS}


def run(cases: list[dict]) -> list[dict]:
    """Run cases one after the other, each with a pair of processes, and return what happened."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=SCRIPT.parent, timeout=1800)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(lines) == len(cases), done.stderr[-5000:]
    return [json.loads(line.removeprefix("RESULT ")) for line in lines]


def check(result: dict) -> None:
    """Check that the failing process has its error, and that the other was woken or ended with it."""
    (failed,) = result["case"]["ranks"]
    assert result["results"][failed]["error"] == "Fault: injected fault", result
    other = result["results"][1 - failed]
    if other is None:
        assert result["status"][str(1 - failed)] == 1
        assert ERROR.format(failed) in result["texts"][1 - failed], result["texts"]
    else:
        assert other["error"] == f"OtherProcessError: {ERROR.format(failed)}", result
    # Patience is 2 x 1 second here in place of 2 x 20; the rest is for a machine that is busy.
    assert result["seconds"] < 60, result["case"]


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param([{**COMBINED[-1], "ranks": [1]}], id="graddrop"),
        *(
            pytest.param([{**case, "ranks": [number % 2]} for number, case in enumerate(cases)], id=name,
                         marks=pytest.mark.slow)
            for name, cases in KINDS.items()
        ),
    ],
)  # fmt: skip
def test_an_error_on_one_process_ends_both_with_it(cases):
    for result in run(cases):
        check(result)


@pytest.mark.slow
def test_a_process_that_ends_wakes_the_other_with_its_error():
    cases = [dict(options={}, place="on_step_begin", ranks=[rank], stays=False) for rank in (0, 1)]
    for result in run(cases):
        check(result)


@pytest.mark.slow
def test_an_error_on_all_processes_is_each_ones_own():
    (result,) = run([dict(options={}, place="on_step_end", ranks=[0, 1])])
    assert [one["error"] for one in result["results"]] == ["Fault: injected fault"] * 2
