"""What one model for all tasks costs beside a model for each: parameters, bytes on the disk, seconds of inference.

Neither depends on what a model has learned, so models as they begin are measured: no run has to keep its weights.
Inference is timed on rows of every dataset, and every task is answered for every row: by one pass of the multi-task
model (or as many as its scheme takes), and by a pass of each single-task model. The models take turns, so that a
machine that is busy with something else for a while slows all of them down.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..data.dataset import prepare_sources
from ..data.preprocessing import longest_input
from ..data.sources import make_sources
from ..models.base import MultiTaskModel
from ..recipe import RecipeParts
from .baselines import Run
from .comparison_runs import build_run

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
        alone = [build_run(run, parts, folder).model for run in singles]
    device = parts.args.device
    batches = list(_batches(whole, parts))
    models: list[Any] = [whole, *alone]
    for model in models:
        model.to(device).eval()
    seconds: list[list[float]] = [[] for _ in models]
    for repeat in range(_REPEATS + 1):
        for model, own in zip(models, seconds, strict=True):
            spent = _seconds(model, batches, device)
            if repeat:  # the first time is to warm up
                own.append(spent)
    times = [statistics.median(own) for own in seconds]
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in models]
    trained = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in models]
    sizes = [_saved_bytes(model) / 2**20 for model in models]
    return {
        "parameters": _pair(counts),
        "trained_parameters": _pair(trained),
        "saved_mib": {key: round(value, 3) for key, value in _pair(sizes).items()},
        "inference_seconds": {key: round(value, 5) for key, value in _pair(times).items()},
        "inference_rows": sum(len(batch["input_ids"]) for batch in batches),
        "inference_batch_size": parts.args.per_device_eval_batch_size,
        "device": str(device),
    }


def _pair(values: Sequence[Any]) -> dict[str, Any]:
    return {"multi": values[0], "single": sum(values[1:])}


def _batches(model: MultiTaskModel, parts: RecipeParts) -> Iterator[Mapping[str, Any]]:
    """Yield padded batches of validation rows, of one source after the other."""
    tokenizer = parts.tokenizer
    tasks = [task for task in model.tasks if not (task.auxiliary or task.held_out)]
    present = {task.dataset: parts.datasets["validation"][task.dataset] for task in tasks}
    rows = prepare_sources(
        {name: part.select(range(min(len(part), _ROWS))) for name, part in present.items()},
        make_sources(tasks),
        "validation",
        tokenizer=tokenizer,
        max_length=longest_input(tokenizer, model, parts.args.max_length),
        complete=False,
        labels=None,
    )
    size = parts.args.per_device_eval_batch_size
    for source in rows.split():
        texts = [{"input_ids": [int(token) for token in source[i]["input_ids"]]} for i in range(len(source))]
        for start in range(0, len(texts), size):
            yield tokenizer.pad(texts[start : start + size], return_tensors="pt")


@torch.no_grad()
def _seconds(model: MultiTaskModel, batches: Sequence[Mapping[str, Any]], device: torch.device) -> float:
    begin = time.perf_counter()
    for batch in batches:
        model(input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device))
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - begin


def _saved_bytes(model: MultiTaskModel) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
