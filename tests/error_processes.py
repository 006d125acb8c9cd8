"""Pairs of processes of which one fails; `test_process_errors.py` starts it with cases as JSON.

All pairs are forked from this one process, so that the libraries are imported once. A process that fails stays alive
until the other has ended: a script may catch the error, and nobody else would end the other.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from conftest import BACKBONES, make_datasets, make_tasks, make_tokenizer
from test_distributed import free_port
from transformers import TrainerCallback

from hf_multitask import HardSharingModel, MultiTaskTrainer, MultiTaskTrainingArguments, guard

guard._GRACE, guard._PATIENCE = 2.5, 1.0  # the thread asks once a second
LIMIT = 60.0


class Fault(Exception):
    pass


class Fails(TrainerCallback):
    """Raises at an event of the second step."""

    def __init__(self, event: str) -> None:
        setattr(self, event, self.fail)

    def fail(self, args, state, control, **kwargs):
        if state.global_step >= 1:
            raise Fault("injected fault")


def failing(call, after: int = 1):
    """Return a function that raises in place of a later call of another."""
    calls = 0

    def function(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls > after:
            raise Fault("injected fault")
        return call(*args, **kwargs)

    return function


def inject(trainer: MultiTaskTrainer, place: str) -> None:
    """Let a trainer fail at a place: an event of a callback, or a method by its path from the trainer."""
    if place.startswith("on_"):
        trainer.add_callback(Fails(place))
    elif place == "gradients.gramian":  # between two collective operations
        combine = trainer._combine

        def fail_within(*args):
            trainer._gradients.gramian = failing(trainer._gradients.gramian, 0)
            return combine(*args)

        trainer._combine = fail_within
    elif place.startswith("balancer."):  # made anew when training begins
        begin, name = trainer._begin_balancing, place.removeprefix("balancer.")

        def begin_and_fail(args):
            begin(args)
            setattr(trainer.balancer, name, failing(getattr(trainer.balancer, name)))

        trainer._begin_balancing = begin_and_fail
    else:
        *path, name = place.split(".")
        owner = trainer
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, name, failing(getattr(owner, name), 0 if name == "_save_checkpoint" else 1))


def run(rank: int, port: str, folder: Path, case: dict) -> None:
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    sys.stdout = sys.stderr = open(folder / f"{rank}.txt", "w")
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    result = {"rank": rank, "error": None}
    torch.manual_seed(0)
    model = HardSharingModel.from_backbone(BACKBONES["bert"](), make_tasks())
    args = MultiTaskTrainingArguments(
        str(folder / "out"), max_steps=3, per_device_train_batch_size=4, logging_steps=1, save_strategy="steps",
        save_steps=2, eval_strategy="steps", eval_steps=2, report_to="none", disable_tqdm=True, use_cpu=True,
        **case["options"],
    )  # fmt: skip
    datasets = make_datasets(rows=24)
    trainer = MultiTaskTrainer(
        model, args, train_dataset=datasets, eval_dataset=datasets, processing_class=make_tokenizer()
    )
    if rank in case["ranks"]:
        inject(trainer, case["place"])
    start = time.monotonic()
    try:
        trainer.train()
    except BaseException as error:
        result["error"] = f"{type(error).__name__}: {error}"
        if not case.get("stays", True):
            (folder / f"{rank}.json").write_text(json.dumps(result))
            raise
    result["seconds"] = time.monotonic() - start
    (folder / f"{rank}.part").write_text(json.dumps(result))
    (folder / f"{rank}.part").rename(folder / f"{rank}.json")
    while case.get("stays", True) and time.monotonic() - start < LIMIT and not (folder / f"{1 - rank}.ended").exists():
        time.sleep(0.05)


def main(cases: list[dict]) -> None:
    for case in cases:
        folder, port = Path(tempfile.mkdtemp()), free_port()
        children, start = [], time.monotonic()
        for rank in range(2):
            child = os.fork()
            if child == 0:
                try:
                    run(rank, port, folder, case)
                except BaseException:
                    os._exit(3)
                os._exit(0)
            children.append(child)
        status = {}
        for _ in children:
            child, code = os.waitpid(-1, 0)
            rank = children.index(child)
            status[rank] = os.waitstatus_to_exitcode(code)
            (folder / f"{rank}.ended").touch()
        files = [folder / f"{rank}.json" for rank in range(2)]
        results = [json.loads(file.read_text()) if file.exists() else None for file in files]
        texts = [(folder / f"{rank}.txt").read_text()[-3000:] for rank in range(2)]
        seconds = time.monotonic() - start
        print(
            "RESULT",
            json.dumps({"seconds": seconds, "case": case, "results": results, "status": status, "texts": texts}),
            flush=True,
        )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
