"""What one model for all tasks costs beside a model for each: parameters, bytes on the disk, seconds of inference.

Neither depends on what a model has learned, so models as they begin are measured: no run has to keep its weights.
Inference is timed on rows of every dataset, and every task that reads texts is answered for every row: by one pass of
the multi-task model (or as many as its scheme takes), and by a pass of each single-task model. Tasks whose rows can
serve no other (questions, choices, language models) are answered for rows of their own, on both sides. The models take
turns, so that a machine that is busy with something else for a while slows all of them down.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..data.collator import DataCollatorForMultiTask
from ..data.dataset import prepare_sources
from ..data.preprocessing import longest_input
from ..data.sources import make_sources
from ..models.base import MultiTaskModel
from ..models.passes import Segment
from ..models.task import Task
from ..recipe import RecipeParts
from .baselines import Run
from .comparison_runs import build_run
from .rows import move_to

__all__ = ["measure_cost"]

_ROWS = 256  # of each dataset
_REPEATS = 3


def measure_cost(multi: Run, singles: Sequence[Run], parts: RecipeParts) -> dict[str, Any]:
    """Return parameters, MiB as saved, and seconds of inference of the multi-task model and of all single ones.

    Args:
        multi: A multi-task run.
        singles: A baseline of each task.
        parts: The recipe's parts.
    """
    with tempfile.TemporaryDirectory() as folder:
        whole = build_run(multi, parts, folder).model
        models: list[Any] = [whole, *(build_run(run, parts, folder).model for run in singles)]
    device = parts.args.device
    tasks = [task for task in whole.tasks if not (task.auxiliary or task.held_out)]
    texts, own_rows = _batches(whole, tasks, parts)
    work = [[*_answer_all(model, texts), *_answer_own(model, own_rows)] for model in models]
    seconds: list[list[float]] = [[] for _ in models]
    for model in models:
        model.to(device).eval()
    for repeat in range(_REPEATS + 1):
        for model, inputs, own in zip(models, work, seconds, strict=True):
            spent = _seconds(model, inputs, device)
            if repeat:  # the first time is to warm up
                own.append(spent)
    times = [statistics.median(own) for own in seconds]
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in models]
    trained = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in models]
    sizes = [_saved_bytes(model) / 2**20 for model in models]
    rows = sum(len(batch["input_ids"]) for batch in texts)
    return {
        "parameters": _pair(counts),
        "trained_parameters": _pair(trained),
        "saved_mib": {key: round(value, 3) for key, value in _pair(sizes).items()},
        "inference_seconds": {key: round(value, 5) for key, value in _pair(times).items()},
        "inference_rows": rows + sum(number for number, _ in own_rows.values()),
        "inference_batch_size": parts.args.per_device_eval_batch_size,
        "device": str(device),
    }


def _pair(values: Sequence[Any]) -> dict[str, Any]:
    return {"multi": values[0], "single": sum(values[1:])}


def _batches(
    model: MultiTaskModel, tasks: Sequence[Task], parts: RecipeParts
) -> tuple[list[Mapping[str, Any]], dict[str, tuple[int, list[Mapping[str, Any]]]]]:
    """Return padded batches of texts, and by task that needs rows of its own, their number and their batches."""
    tokenizer, size = parts.tokenizer, parts.args.per_device_eval_batch_size
    names = dict.fromkeys(task.dataset for task in tasks)
    validation = {name: parts.datasets["validation"][name] for name in names}
    rows = prepare_sources(
        {name: part.select(range(min(len(part), _ROWS))) for name, part in validation.items()},
        make_sources(tasks),
        "validation",
        tokenizer=tokenizer,
        max_length=longest_input(tokenizer, model, parts.args.max_length),
        complete=False,
    )
    collate = DataCollatorForMultiTask(tokenizer, model.tasks)
    texts: list[Mapping[str, Any]] = []
    own_rows: dict[str, tuple[int, list[Mapping[str, Any]]]] = {}
    for source in rows.split():
        found = [source[number] for number in range(len(source))]
        parts_of = [found[start : start + size] for start in range(0, len(found), size)]
        (first, *_), *_ = (one.tasks for one in source.sources)
        if first.type.needs_own_rows:
            own_rows[first.name] = len(found), [collate(part) for part in parts_of]
            continue
        for part in parts_of:
            ids = [{"input_ids": [int(token) for token in row["input_ids"]]} for row in part]
            texts.append(tokenizer.pad(ids, padding_side="right", return_tensors="pt"))
    return texts, own_rows


def _answer_all(model: MultiTaskModel, texts: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield what a model is called with to answer all its tasks that read texts, for every text."""
    names = [t.name for t in model.tasks if not (t.auxiliary or t.held_out or t.type.needs_own_rows)]
    for batch in texts if names else ():
        rows, length = batch["input_ids"].shape
        segments = {name: Segment(0, rows, length) for name in names}
        yield {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "segments": segments}


def _answer_own(
    model: MultiTaskModel, own_rows: Mapping[str, tuple[int, list[Mapping[str, Any]]]]
) -> Iterator[dict[str, Any]]:
    """Yield what a model is called with to answer its tasks that need rows of their own."""
    for task in model.tasks:
        for batch in own_rows.get(task.name, (0, []))[1]:
            task_ids = torch.full_like(batch["task_ids"], model.tasks.index(task))
            yield {**batch, "task_ids": task_ids}


@torch.no_grad()
def _seconds(model: MultiTaskModel, inputs: Sequence[dict[str, Any]], device: torch.device) -> float:
    begin = time.perf_counter()
    for batch in inputs:
        model(**move_to(device, batch))
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - begin


def _saved_bytes(model: MultiTaskModel) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
