"""All four quickstart tasks from one pipeline call, against four single-task pipelines over the same backbone.

    python recipes/benchmarks/inference.py [--texts 256] [--rounds 7] [--write]

`pipeline("multi-task")` answers every task of one model for texts of the three quickstart datasets, a third each;
against it stand four of Transformers' own pipelines (`text-classification` for the score, the source and the topic,
`token-classification` for the entities), each with a MiniLM and a head of its own, on the same texts with the same
batch size and longest input. Heads are not trained: speed does not depend on it. Both run in turns in one process;
medians are compared, in three settings:

- "as they come": texts in mixed order, all tasks read up to 128 tokens. The multi-task pipeline sorts by length.
- "sorted": the same, with texts sorted by length beforehand, so that both pad as little.
- "recipe's lengths": the topic reads 64 tokens, as in `recipes/quickstart.yaml`; longer texts then take two passes.

Memory is that of the parameters, and the peak of a process of its own for each.
"""

from __future__ import annotations

import argparse
import json
import logging as standard_logging
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # Transformers' pipelines set it, for all that comes after

BATCH_SIZE, MAX_LENGTH, BOUND = 32, 128, 3.3
RECIPE = Path(__file__).parents[1] / "quickstart.yaml"


def read_texts(number: int) -> list[str]:
    """Return texts of the quickstart's test splits, a third of each dataset, in mixed order."""
    from datasets import load_dataset

    from hf_multitask.quickstart import DATASETS, dataset_files

    columns = []
    for position, name in enumerate(DATASETS):
        rows = load_dataset("parquet", data_files={"test": dataset_files(name)["test"]})["test"]
        count = number // len(DATASETS) + (position < number % len(DATASETS))
        columns.append([row.get("text") or " ".join(row["tokens"]) for row in rows.select(range(count))])
    return [column[i] for i in range(len(columns[0])) for column in columns if i < len(column)]


def make_tasks(lengths: bool) -> list[Any]:
    """Return the recipe's tasks; all read the same length unless `lengths` are to be the recipe's."""
    from hf_multitask.recipe import build, load_recipe

    tasks = build(load_recipe(RECIPE)).model.tasks
    return tasks if lengths else [replace(task, max_length=None) for task in tasks]


def multi_task(tasks: list[Any]) -> Callable[[list[str]], Any]:
    """Return what answers texts for all tasks, with one model."""
    from transformers import AutoTokenizer, pipeline

    from hf_multitask import HardSharingModel
    from hf_multitask.quickstart import backbone_folder

    tokenizer = AutoTokenizer.from_pretrained(backbone_folder())
    model = HardSharingModel.from_backbone(str(backbone_folder()), tasks)
    return pipeline(
        "multi-task", model=model, tokenizer=tokenizer, device="cpu", batch_size=BATCH_SIZE, max_length=MAX_LENGTH
    )


def single_tasks(tasks: list[Any]) -> dict[str, Callable[[list[str]], Any]]:
    """Return, by task, a pipeline of Transformers' own with a model of its own."""
    from transformers import (
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoTokenizer,
        pipeline,
    )

    from hf_multitask import TaskType
    from hf_multitask.quickstart import backbone_folder

    made: dict[str, Callable[[list[str]], Any]] = {}
    for task in tasks:
        # The length is said to the tokenizer, because the pipeline for tokens has no argument for it.
        length = min(task.max_length or MAX_LENGTH, MAX_LENGTH)
        common: dict[str, Any] = {
            "tokenizer": AutoTokenizer.from_pretrained(backbone_folder(), model_max_length=length),
            "device": "cpu",
            "batch_size": BATCH_SIZE,
        }
        if task.type is TaskType.TOKEN_CLASSIFICATION:
            model = AutoModelForTokenClassification.from_pretrained(
                backbone_folder(), id2label=dict(enumerate(task.labels))
            )
            made[task.name] = pipeline("token-classification", model=model, aggregation_strategy="simple", **common)
            continue
        names = task.labels or ("score",)
        model = AutoModelForSequenceClassification.from_pretrained(backbone_folder(), id2label=dict(enumerate(names)))
        regression = {"function_to_apply": "none"} if task.type is TaskType.REGRESSION else {}
        made[task.name] = pipeline("text-classification", model=model, truncation=True, **regression, **common)
    return made


def megabytes(models: list[Any]) -> float:
    """Return the size of the parameters of some models in MiB."""
    return sum(p.numel() * p.element_size() for model in models for p in model.parameters()) / 2**20


def seconds(run: Callable[[], Any], number: int) -> float:
    start = time.perf_counter()
    answers = run()
    taken = time.perf_counter() - start
    assert all(len(part) == number for part in answers)
    return taken


def compare(texts: list[str], tasks: list[Any], rounds: int) -> dict[str, Any]:
    """Return the medians of both, run in turns, and their quotient."""
    one, four = multi_task(tasks), single_tasks(tasks)
    times: dict[str, list[float]] = {"one call": [], "four calls": []}
    for turn in range(rounds + 1):
        taken = {
            "one call": seconds(lambda: [one(texts)], len(texts)),
            "four calls": seconds(lambda: [ask(texts) for ask in four.values()], len(texts)),
        }
        if turn:  # the first warms up
            for name, value in taken.items():
                times[name].append(value)
    answers = one(texts[:2])
    assert all(set(answer) == set(four) for answer in answers)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {"median seconds": medians, "times as fast": medians["four calls"] / medians["one call"]}


def worker(kind: str) -> None:
    """Load one kind of pipelines, answer a batch, print the peak of memory and the size of the parameters."""
    tasks = make_tasks(False)
    pipelines = [multi_task(tasks)] if kind == "one model" else list(single_tasks(tasks).values())
    texts = read_texts(BATCH_SIZE)
    for ask in pipelines:
        ask(texts)
    # Not `ru_maxrss`: that begins with what the process that started this one had.
    status = Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]
    print(json.dumps({"peak MiB": peak, "parameters MiB": megabytes([ask.model for ask in pipelines])}))


def main() -> None:
    """Measure and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="threads of the CPU (default: all)")
    parser.add_argument("--write", action="store_true", help="write inference.json")
    parser.add_argument("--worker", choices=("one model", "four models"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    standard_logging.getLogger("hf_multitask").setLevel("ERROR")  # both cut the same texts
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.worker:
        return worker(arguments.worker)

    from common import describe, write_result

    texts = read_texts(arguments.texts)
    settings = {
        "as they come": (texts, make_tasks(False)),
        "sorted": (sorted(texts, key=len), make_tasks(False)),
        "recipe's lengths": (texts, make_tasks(True)),
    }
    speed = {name: compare(*setting, arguments.rounds) for name, setting in settings.items()}
    memory = {}
    for kind in ("one model", "four models"):
        command = [sys.executable, __file__, "--worker", kind]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        memory[kind] = json.loads(done.stdout.splitlines()[-1])
    result = {
        "speed": speed,
        "times as fast": speed["as they come"]["times as fast"],
        "bound": BOUND,
        "memory": memory,
        "setting": {
            "texts": len(texts),
            "batch size": BATCH_SIZE,
            "longest input": MAX_LENGTH,
            "rounds": arguments.rounds,
            **describe(),
        },
    }
    write_result(__file__, result, arguments.write)


if __name__ == "__main__":
    main()
