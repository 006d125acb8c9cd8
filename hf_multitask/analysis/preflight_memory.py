"""How much memory a step needs, in parts, against what the device has.

| part | bytes |
|---|---|
| parameters | all parameters and buffers, in their dtype |
| gradients | one number for each trained parameter |
| optimizer | its state: for AdamW two numbers for each trained parameter |
| task buffers | where tasks' gradients are taken one by one: T + 1 times the shared parameters in float32 |
| activations | what the forward pass of the largest micro-batch keeps for the backward pass |

Activations are measured, not computed: the tensors that autograd saves are counted (`saved_tensors_hooks`) for two and
for four rows of each source, its longest ones, and extended to the rows of a micro-batch. The sum is slightly too high,
because activations go while gradients come, and leaves out what only lives within one operation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from ..data.dataset import MultiTaskDataset
from ..models.base import MultiTaskModel
from ..models.passes import PASS_COST_IN_TOKENS, Segment, plan_passes
from .preflight_limits import LIMITS
from .preflight_result import Finding
from .rows import move_to

__all__ = [
    "MemoryEstimate",
    "activation_bytes",
    "available_memory",
    "estimate_memory",
    "memory_findings",
    "optimizer_bytes",
    "saved_bytes",
]

# Numbers that an optimizer keeps for each parameter, in the parameter's dtype.
_STATES = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused"), 2),
    **dict.fromkeys(("adamw_anyprecision", "paged_adamw_32bit", "stable_adamw", "schedule_free_adamw"), 2),
    **dict.fromkeys(("schedule_free_radam", "grokadamw"), 2),
    **dict.fromkeys(("ademamix", "paged_ademamix_32bit"), 3),
    **dict.fromkeys(("adagrad", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_32bit", "lion_32bit", "paged_lion_32bit"), 1),
    **dict.fromkeys(("schedule_free_sgd",), 1),
    **dict.fromkeys(("sgd", "lomo"), 0),
}
# Bytes that it keeps for each parameter, whatever the dtype.
_BYTES = {
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "adamw_torch_8bit"), 2.0),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit", "adamw_torch_4bit"), 1.0),
    **dict.fromkeys(("ademamix_8bit", "paged_ademamix_8bit"), 3.0),
}
_FEW_ROWS, _MORE_ROWS = 2, 4


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a step needs.

    Args:
        parameters: See the module's text, as for the next four.
        gradients: Of all trained parameters.
        optimizer: State of the optimizer.
        task_buffers: Gradients of the tasks, where they are kept one by one.
        activations: Of the largest micro-batch.
        available: What the device has for all of it; None if that is not known.
        device: Name of the device.
        assumption: What had to be assumed, if anything.
    """

    parameters: int
    gradients: int
    optimizer: int
    task_buffers: int
    activations: int
    available: int | None = None
    device: str = "cpu"
    assumption: str = ""

    @property
    def total(self) -> int:
        """All parts together."""
        return self.parameters + self.gradients + self.optimizer + self.task_buffers + self.activations

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        return asdict(self) | {"total": self.total}


def saved_bytes(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """Return the bytes that a forward pass in training mode keeps for the backward pass, beside parameters and inputs.

    Args:
        model: The model; gradients must be recorded.
        batch: Its arguments, on its device.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    known |= {value.untyped_storage().data_ptr() for value in batch.values() if isinstance(value, Tensor)}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    training = model.training
    model.train()
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(**batch)
        del output  # until here everything that was saved lives, so that no address comes twice
    finally:
        model.train(training)
    return sum(found.values())


def activation_bytes(
    model: MultiTaskModel,
    rows: MultiTaskDataset,
    collate: Any,
    counts: Mapping[str, int],
    context: Any,
    one_by_one: bool,
) -> int:
    """Return the bytes of activations of a micro-batch.

    Args:
        model: The model.
        rows: Prepared training rows; the longest of each source are taken.
        collate: The collator.
        counts: By source, its rows in the micro-batch.
        context: Returns the context in which the trainer computes losses (autocast).
        one_by_one: Whether sources go through the model one after the other, each with its own backward pass.
    """
    per_token: dict[str, float] = {}
    fixed, segments, start = 0.0, {}, 0
    for part in rows.split():
        source = part.sources[0].name
        lengths = part.lengths[source]
        order = np.argsort(-lengths, kind="stable")
        # The longest rows, and the shortest beside them: a batch without padding may take another way.
        chosen = [*order[: _MORE_ROWS - 1], order[-1]]
        measured = []
        for count in (_FEW_ROWS, _MORE_ROWS):
            batch = move_to(model.device, collate([part[int(i)] for i in [*chosen[: count - 1], chosen[-1]]]))
            with context():
                # The scheme's penalty is computed by itself, when activations are gone.
                measured.append((batch["input_ids"].numel(), saved_bytes(model, {**batch, "penalty_scale": 0.0})))
        (few, small), (more, large) = measured
        per_token[source] = (large - small) / (more - few) if more > few else large / more
        fixed = max(fixed, small - per_token[source] * few, 0.0)
        longest = int(lengths.max())
        if counts.get(source):
            segments[source] = Segment(start, start + counts[source], longest)
            start += counts[source]
    if not segments:
        return 0
    cost = PASS_COST_IN_TOKENS["cpu" if model.device.type == "cpu" else "accelerator"]
    totals = []
    if one_by_one or model.one_task_per_pass:
        totals = [per_token[name] * part.rows * part.length for name, part in segments.items()]
    else:
        ordered = _longest_first(segments)
        for one in plan_passes(ordered, cost):
            totals.append(sum(per_token[name] * ordered[name].rows * one.length for name in one.tasks))
    return math.ceil((max(totals) if one_by_one else sum(totals)) + fixed)


def _longest_first(segments: Mapping[str, Segment]) -> dict[str, Segment]:
    """Return segments side by side as the collator puts them."""
    ordered, start = {}, 0
    for name, part in sorted(segments.items(), key=lambda item: -item[1].length):
        ordered[name] = Segment(start, start + part.rows, part.length)
        start += part.rows
    return ordered


def optimizer_bytes(name: str, parameters: list[nn.Parameter]) -> int | None:
    """Return the bytes of an optimizer's state, or None for one that is not known.

    Args:
        name: Its name, as in `TrainingArguments(optim=...)`.
        parameters: What it trains.

    Example:
        >>> optimizer_bytes("adamw_torch", [nn.Parameter(torch.zeros(10, 10))])
        800
    """
    if name in _STATES:
        return sum(_STATES[name] * p.numel() * p.element_size() for p in parameters)
    if name in _BYTES:
        return math.ceil(sum(_BYTES[name] * p.numel() for p in parameters))
    if name == "adafactor":  # a number for each row and each column
        return sum(4 * (p.shape[0] + p.numel() // p.shape[0] if p.dim() > 1 else p.numel()) for p in parameters)
    return None


def estimate_memory(
    model: MultiTaskModel, optimizer: str, activations: int, task_gradients: bool, tables_apart: bool
) -> MemoryEstimate:
    """Return what a step needs, without what the device has.

    Args:
        model: The model.
        optimizer: Name of the optimizer.
        activations: Bytes of activations.
        task_gradients: Whether the gradients of the tasks are kept one by one.
        tables_apart: Whether the embedding table's gradients then come as the rows that were looked up.
    """
    every = {id(p): p for p in [*model.parameters(), *model.buffers()]}.values()
    trained = [p for p in model.parameters() if p.requires_grad]
    state = optimizer_bytes(optimizer, trained)
    buffers = 0
    if task_gradients:
        shared = list(model.shared_parameters())
        table: Any = model.get_input_embeddings()
        apart = sum(p.numel() for p in shared if tables_apart and p is table.weight)
        dense = sum(p.numel() for p in shared) - apart
        buffers = 4 * (dense * (len(model.tasks) + 1) + apart)
    known = optimizer_bytes("adamw_torch", trained) or 0
    return MemoryEstimate(
        parameters=sum(p.numel() * p.element_size() for p in every),
        gradients=sum(p.numel() * p.element_size() for p in trained),
        optimizer=known if state is None else state,
        task_buffers=buffers,
        activations=activations,
        assumption=f"the state of optim {optimizer!r} is not known; that of AdamW was taken" if state is None else "",
    )


def available_memory(device: torch.device, held: int = 0) -> int | None:
    """Return the bytes that a device has for a training, or None if it does not say.

    Args:
        device: The device.
        held: Bytes of the model, which is there already.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)  # of what is reserved this process may use all
    if device.type == "cpu":
        free = psutil.virtual_memory().available
        limit = _container_limit()
        return held + (free if limit is None else min(free, limit))
    return None


def _container_limit(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return what a container has left, where there is a limit; what only caches files can be taken."""
    try:
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
        lines = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(limit - used + int(lines.get("inactive_file", 0)), 0)
    except (OSError, ValueError):  # no container, or no limit ("max")
        return None


def memory_findings(estimate: MemoryEstimate) -> list[Finding]:
    """Return what is to be said of the memory that is needed."""
    parts = ("parameters", "gradients", "optimizer", "task_buffers", "activations")
    numbers: dict[str, float] = {name: getattr(estimate, name) for name in parts} | {"total": estimate.total}
    largest = max(parts, key=lambda name: getattr(estimate, name))
    message = f"a step needs about {_gib(estimate.total)}"
    if estimate.available is None:
        return [
            Finding("ok", "memory", "memory", "", f"{message}; {estimate.device} does not say what it has", numbers)
        ]
    share = estimate.total / estimate.available
    numbers |= {"available": estimate.available, "share": share}
    level = LIMITS["memory"].level(share)
    message += f", {share:.0%} of the {_gib(estimate.available)} that {estimate.device} has"
    message += f"; {estimate.assumption}" if estimate.assumption else ""
    mends = {
        "activations": "smaller micro-batches (per_device_train_batch_size) and more gradient_accumulation_steps, a "
        "smaller max_length, activation_checkpointing, or bf16",
        "task_buffers": "gradient_memory: sketch",
        "optimizer": "optim: adafactor or adamw_8bit, or adapters in place of the whole backbone",
    }
    mend = mends.get(largest, "a smaller backbone, adapters or prefixes in place of the whole backbone, or bf16")
    mend = f"{largest.replace('_', ' ')} are the largest part, {_gib(getattr(estimate, largest))}: {mend}"
    return [Finding(level, "memory", "memory", "", message, numbers, mend if level != "ok" else "")]


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
