"""Kill runs at random moments, resume each from the folder it left, and compare its end with the run never stopped.

    python recipes/benchmarks/kill_resume.py [--runs 200] [--pairs 30] [--seed 0] [--write]

Each run is a sharing scheme with features drawn at random (sampling, weighting, combination, accumulation, streams,
evaluation, rotation of checkpoints, a folder with an older run's checkpoints, ...), a tiny model with dropout, and a
checkpoint every second step. It is killed (SIGKILL; both processes of a pair) between its first step and its end, so
that some die while they write a checkpoint, and resumed until it is through; a third of them is killed a second time.
Weights, logged losses, rows seen and the best checkpoint must equal those of the uninterrupted run, bit by bit.

Runs are forked from one process that has imported everything, so that a kill costs seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from common import describe, write_result
from datasets import Dataset, disable_progress_bars
from tqdm import tqdm
from transformers import BertConfig, BertModel, BertTokenizerFast, TrainerCallback, set_seed

from hf_multitask import MultiTaskTrainer, MultiTaskTrainingArguments, Task
from hf_multitask.checkpointing import incompleteness, last_complete_checkpoint
from hf_multitask.models.auto import SCHEMES

STEPS = 14
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] good bad film goal match plot great awful the a was".split()
REFUSED = 3  # exit status of a run whose features are not supported together

SCHEME_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "hard": ("hard", {}),
    "soft": ("soft", {}),
    "cross-stitch": ("soft", {"cross_stitch": True}),
    "conditioned": ("conditioned", {}),
    "prefix": ("prefix", {"num_virtual_tokens": 3}),
    "adapter": ("adapter", {"rank": 4}),
    "shared adapter": ("adapter", {"rank": 4, "shared_rank": 2}),
    "mixture": ("mixture_of_experts", {"num_experts": 2}),
}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
FEATURES: dict[str, dict[str, Any]] = {
    "annealed": {"task_sampling": "annealed"},
    "round robin": {"task_sampling": "round_robin"},
    "unimax": {"task_sampling": "unimax"},
    "performance gap": {
        "task_sampling": "performance_gap",
        "task_sampling_kwargs": {"scores": {"mood": 0.9, "score": 0.9, "tags": 0.9}},
        **EVALUATED,
    },
    "single task batches": {"batch_composition": "single_task"},
    "equal shares": {"loss_reduction": "tasks"},
    "by length": {"train_sampling_strategy": "group_by_length"},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "uncertainty": {"loss_weighting": "uncertainty"},
    "famo": {"loss_weighting": "famo"},
    "dwa": {"loss_weighting": "dwa"},
    "gradnorm": {"loss_weighting": "gradnorm"},
    "pcgrad": {"gradient_combination": "pcgrad"},
    "upgrad": {"gradient_combination": "upgrad"},
    "nash": {"gradient_combination": "nash_mtl", "combination_every": 3},
    "graddrop": {"gradient_combination": "graddrop"},
    "sketches": {"gradient_combination": "upgrad", "gradient_memory": "sketch"},
    "conflict log": {"conflict_logging_steps": 3},
    "gate": {"auxiliary_gating": "cosine"},
    "best": {"load_best_model_at_end": True, "save_total_limit": 1, **EVALUATED},
    "two checkpoints": {"save_total_limit": 2},
    "evaluations of epochs": {"eval_strategy": "epoch"},
    "skip": {"on_nonfinite_loss": "skip"},
    "rates": {"backbone_learning_rate": 1e-3, "head_learning_rate": 1e-2},
    "adafactor": {"optim": "adafactor"},
    "cosine schedule": {"lr_scheduler_type": "cosine", "warmup_steps": 3},
    "streams": {"dataset_sizes": {"both": 40, "tags": 24}},
    "older run": {},
    "workers": {"dataloader_num_workers": 1},
}


def draw_case(draw: random.Random, only: str | None) -> tuple[str, tuple[str, ...]]:
    """Return a scheme and its features, no two of which set the same argument; `only` is one that must be there."""
    scheme, chosen, taken = draw.choice([*SCHEME_OPTIONS]), [], set()
    features = draw.sample([*FEATURES], len(FEATURES))
    if only in SCHEME_OPTIONS:
        scheme = only
    elif only is not None:
        features = [only, *features]
    for feature in features:
        if not taken & FEATURES[feature].keys() and not (feature == "workers" and "streams" in chosen):
            chosen.append(feature)
            taken |= FEATURES[feature].keys()
        if len(chosen) == 3:
            break
    return scheme, tuple(chosen)


def make_rows(rng: random.Random) -> dict[str, Dataset]:
    """Return rows with labels that the words tell."""
    texts = [[rng.choice(WORDS[5:]) for _ in range(rng.randint(2, 9))] for _ in range(64)]
    score = [float(sum(w in ("good", "great") for w in t) - sum(w in ("bad", "awful") for w in t)) for t in texts]
    both = {"text": [" ".join(t) for t in texts[:40]], "score": score[:40], "label": [int(s > 0) for s in score[:40]]}
    tags = [["B-film" if w == "film" else "O" for w in t] for t in texts[40:]]
    return {"both": Dataset.from_dict(both), "tags": Dataset.from_dict({"tokens": texts[40:], "tags": tags})}


def train(scheme: str, features: tuple[str, ...], folder: Path, older: bool = False) -> None:
    """Train in a folder, resuming where there is something to resume from, and leave `end.json`."""
    set_seed(0)
    options: dict[str, Any] = {}
    for feature in features:
        options |= FEATURES[feature]
    rows = make_rows(random.Random(1))
    data: dict[str, Any] = rows
    if "streams" in features:
        data = {name: part.to_iterable_dataset(num_shards=2) for name, part in rows.items()}
    tasks = [
        Task("mood", "single_label_classification", ("bad", "good"), "both"),
        Task("score", "regression", dataset="both", label_column="score"),
        Task("tags", "token_classification", ("O", "B-film"), label_column="tags", auxiliary="gate" in features),
    ]
    sharing, own = SCHEME_OPTIONS[scheme]
    model = SCHEMES[sharing].from_backbone(str(folder.parent / "backbone"), tasks, **own)

    class FirstStep(TrainerCallback):
        """Tells the other process that training has begun."""

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            (folder / "begun").touch()

    args = MultiTaskTrainingArguments(
        str(folder),
        **{
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "learning_rate": 3e-2 if older else 1e-2,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 2,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            **options,
        },
    )
    trainer = MultiTaskTrainer(
        model,
        args,
        train_dataset=data,
        eval_dataset=rows,
        processing_class=BertTokenizerFast(vocab={word: i for i, word in enumerate(WORDS)}),
        callbacks=[FirstStep()],
    )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    resume = False
    if not older and last_complete_checkpoint(folder, processes)[0] is not None:
        try:
            trainer.train(resume_from_checkpoint=True)
            resume = True
        except ValueError as error:
            if "no complete checkpoint of this run" not in str(error):
                raise  # only the older run has left checkpoints: this one starts
    if not resume:
        trainer.train()
    if trainer.is_world_process_zero() and not older:
        digest = hashlib.sha256()
        for name, value in sorted(trainer.model.state_dict().items()):
            digest.update(name.encode() + value.numpy().tobytes())
        lines = [{key: value for key, value in line.items() if "loss" in key} for line in trainer.state.log_history]
        best = Path(trainer.state.best_model_checkpoint or "none").name
        losses = [{key: line[key] for key in line if key != "train_loss"} for line in lines]
        end = {"weights": digest.hexdigest(), "losses": losses, "rows": trainer.progress.rows_seen, "best": best}
        (folder / "end.json").write_text(json.dumps(end, sort_keys=True))


def start(case: tuple[str, tuple[str, ...]], folder: Path, processes: int, older: bool = False) -> list[int]:
    """Fork the processes of a run, and return their numbers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(processes):
        child = os.fork()
        if child:
            children.append(child)
            continue
        status = 1
        try:
            log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if processes > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            train(*case, folder, older)
            status = 0
        except ValueError as error:
            traceback.print_exc()
            unsupported = any(words in str(error) for words in ("does not go with", "not supported", "share nothing"))
            status = REFUSED if unsupported or "begun" not in os.listdir(folder) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return children


def wait(children: list[int]) -> int:
    """Wait for the processes of a run, and return the worst exit status."""
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def kill(children: list[int], folder: Path, seconds: float) -> None:
    """Kill the processes of a run some time after its first step, or let it end before."""
    ends: set[int] = set()
    deadline = None
    while len(ends) < len(children):
        for child in set(children) - ends:
            if os.waitpid(child, os.WNOHANG)[0]:
                ends.add(child)
        if deadline is None and (folder / "begun").exists():
            deadline = time.monotonic() + seconds
        if deadline is not None and time.monotonic() >= deadline:
            for child in set(children) - ends:
                os.kill(child, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.005)


def prepare(case: tuple[str, tuple[str, ...]], folder: Path, processes: int) -> None:
    """Make the folder of a run; an older run may have left its checkpoints there."""
    folder.mkdir()
    if "older run" in case[1]:
        wait(start(case, folder, processes, older=True))
        (folder / "begun").unlink(missing_ok=True)


def run(number: int, processes: int, draw: random.Random, home: Path, only: str | None) -> dict[str, Any]:
    """Kill and resume one run, and return what came out."""
    while True:
        case = draw_case(draw, only)
        whole = home / f"whole-{number}"
        prepare(case, whole, processes)
        begin = time.monotonic()
        status = wait(start(case, whole, processes))
        if status == 0:
            break
        if status != REFUSED:
            raise SystemExit(f"{case}: the uninterrupted run failed\n" + whole.with_suffix(".log").read_text()[-3000:])
        shutil.rmtree(whole)
    lasts = time.monotonic() - begin
    folder = home / f"run-{number}"
    prepare(case, folder, processes)
    broken, kills = [], 1 + (draw.random() < 1 / 3)
    for _ in range(kills):
        kill(start(case, folder, processes), folder, draw.uniform(0, 0.8 * lasts))
        (folder / "begun").unlink(missing_ok=True)
        left = sorted(folder.glob("checkpoint-*"))
        broken += [path.name for path in left if incompleteness(path, processes)]
        if (folder / "end.json").exists():
            (folder / "end.json").unlink()
    status = wait(start(case, folder, processes))
    same = status == 0 and (folder / "end.json").read_text() == (whole / "end.json").read_text()
    record = {
        "scheme": case[0],
        "features": list(case[1]),
        "processes": processes,
        "kills": kills,
        "incomplete checkpoints left": len(broken),
        "bit-identical": same,
    }
    if not same:
        print(folder.with_suffix(".log").read_text()[-3000:], file=sys.stderr)
    for place in (folder, whole):
        if same:
            shutil.rmtree(place)
            place.with_suffix(".log").unlink()
    return record


def main() -> None:
    """Run, kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200, help="on one process")
    parser.add_argument("--pairs", type=int, default=30, help="on two processes")
    parser.add_argument("--seed", type=int, default=0, help="of the cases and of the moments at which runs are killed")
    parser.add_argument("--only", choices=[*SCHEME_OPTIONS, *FEATURES], help="a scheme or feature that all runs have")
    parser.add_argument("--known", type=Path, help="lines that an earlier invocation printed, which count, too")
    parser.add_argument("--write", action="store_true", help="write kill_resume.json")
    arguments = parser.parse_args()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    disable_progress_bars()
    tqdm.set_lock(threading.RLock())  # the usual one is shared with forked processes, and stays locked if one is killed
    draw, home = random.Random(arguments.seed), Path(tempfile.mkdtemp())
    size = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **size)
    BertModel(config).save_pretrained(home / "backbone")
    known = arguments.known.read_text().splitlines() if arguments.known else []
    records: list[dict[str, Any]] = [json.loads(line) for line in known]
    for number in range(arguments.runs + arguments.pairs):
        records.append(run(number, 1 if number < arguments.runs else 2, draw, home, arguments.only))
        print(json.dumps(records[-1]), flush=True)
    equal = {n: [record["bit-identical"] for record in records if record["processes"] == n] for n in (1, 2)}
    result = {
        "bit-identical, one process": f"{sum(equal[1])} of {len(equal[1])}",
        "bit-identical, two processes": f"{sum(equal[2])} of {len(equal[2])}",
        "killed while a checkpoint was written": sum(bool(r["incomplete checkpoints left"]) for r in records),
        "runs": records,
        "setting": {
            "steps": STEPS,
            "a checkpoint every": 2,
            "seed": arguments.seed,
            **describe(),
            "runs of earlier invocations": len(known),
        },
    }
    write_result(__file__, result, arguments.write)
    missing = {*SCHEME_OPTIONS, *FEATURES} - {name for r in records for name in (r["scheme"], *r["features"])}
    if missing and len(records) >= 100:
        raise SystemExit(f"never run, perhaps always refused: {', '.join(sorted(missing))}")
    if not all(equal[1] + equal[2]):
        raise SystemExit(f"logs and folders are in {home}")
    shutil.rmtree(home)


if __name__ == "__main__":
    main()
