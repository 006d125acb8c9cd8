"""ONNX: one graph that reads tokens and gives the logits of all tasks, for runtimes without PyTorch.

    >>> path = export_onnx(model, "served", tokenizer=tokenizer)  # doctest: +SKIP
    >>> session = onnxruntime.InferenceSession(path)  # doctest: +SKIP
    >>> logits = session.run(["tone"], dict(tokenizer(["a fine film"], return_tensors="np")))  # doctest: +SKIP

Inputs are `input_ids` and `attention_mask`, `[batch, length]`, int64, with padding on the right, and
`token_type_ids` where the backbone takes them. Outputs have the tasks' names, in float32: `[batch, labels]` for whole
texts, `[batch, length, labels]` for tokens (2 in place of labels for answers to questions, the vocabulary for hidden
words), `[batch, 1]`, the score of one choice, for `multiple_choice`. Both batch and length are free, up to the
backbone's positions. The tasks with their labels stand in the graph's metadata, as JSON under `tasks`.

The graph is what the model computes when it serves: one pass of the encoder where tasks share rows (hard sharing, cross
stitching, mixture of experts), else one for each task. A mixture of experts is the one scheme that costs more than its
model: a graph has no list of tokens for each expert, so every expert computes every token, and the weights of those
that the router did not choose are 0.

Before the file gets its name it is run in onnxruntime, on batches of other sizes than it was traced with, and compared
with the model: a graph that has a size fixed inside is an error here, not in service.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import logging

from ..models.backbone import usable_positions
from ..models.base import MultiTaskModel
from ..models.experts import Experts
from ..models.passes import Segment
from ..models.task import Task, TaskType, closest

__all__ = ["TOLERANCE", "export_onnx"]

TOLERANCE = 1e-4
"""How far logits of the graph may lie from the model's, absolutely and in proportion."""

_TRACED = (3, 7)  # rows and tokens; of sizes that stand nowhere else by chance
_CHECKED = ((1, 2), (2, 11), (5, 24))
_EVERY_EXPERT = "hf_multitask_every_expert"


def export_onnx(
    model: MultiTaskModel, target: str | Path, *, tasks: Sequence[str] | None = None, tokenizer: Any = None
) -> Path:
    """Write a model as an ONNX graph and compare the two.

    Args:
        model: The model; it stays as it is, the graph is made of a copy in float32 on the CPU.
        target: A file name that ends in `.onnx`; or a folder, which gets `model.onnx`.
        tasks: Names of the tasks in the graph (default: all that are not auxiliary).
        tokenizer: The model's tokenizer, to be saved in the same folder.

    Returns:
        The path of the graph.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing.
        ValueError: A task is unknown or writes text; the model cannot be written as a graph, or the graph does not
            compute what the model does.
    """
    _check_packages()
    if not isinstance(model, MultiTaskModel):
        raise ValueError(f"{type(model).__name__} is no multi-task model; load it with AutoModelForMultiTask")
    chosen = _choose(model, tasks)
    target = Path(target)
    path = target if target.suffix == ".onnx" else target / "model.onnx"
    traced = _Logits(model, [task.name for task in chosen])
    program = _trace(traced)
    _describe(program.model, chosen)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as scratch:
        made = Path(scratch, path.name)
        program.save(made)
        _compare(traced, made)
        for file in Path(scratch).iterdir():  # weights of more than 2 GB have a file of their own
            os.replace(file, path.parent / file.name)
    if tokenizer is not None:
        tokenizer.save_pretrained(path.parent)
    return path


def _check_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f'ONNX export needs the package {error.name}: pip install "hf_multitask[onnx]"') from error


def _choose(model: MultiTaskModel, names: Sequence[str] | None) -> list[Task]:
    """Return the tasks of the graph."""
    known = {task.name: task for task in model.tasks if not task.auxiliary}
    for name in names or ():
        if name not in known:
            raise ValueError(f"no task {name!r}{closest(name, known)}; tasks are {', '.join(known)}")
    chosen = [task for name, task in known.items() if not names or name in names]
    if not chosen:
        raise ValueError("all tasks are auxiliary: there is nothing to serve")
    for task in chosen:
        if task.type.generates:
            able = ", ".join(name for name, other in known.items() if not other.type.generates)
            raise ValueError(
                f"task {task.name!r} writes text token by token, which is no graph of logits"
                + (f"; export the others: {able}" if able else "; serve it with the pipeline")
            )
        if task.name in _INPUTS:
            raise ValueError(f"task {task.name!r} has the name of an input of the graph; leave it out")
    return chosen


_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class _Logits(nn.Module):
    """A copy of a model that takes tensors and returns the tasks' logits in order, as tracing wants it."""

    def __init__(self, model: MultiTaskModel, names: Sequence[str]) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).cpu().float().eval()
        self.names = names
        # Not all attention implementations can be traced; this one is what they all compute.
        if self.model.config._attn_implementation not in ("sdpa", "eager"):
            cast(Any, self.model).set_attn_implementation("sdpa")
        for module in self.model.modules():
            if isinstance(module, Experts):
                cast(Any, module.config)._experts_implementation = _EVERY_EXPERT
        takes = signature(cast(Any, self._encoder()).forward).parameters
        self.inputs = [name for name in _INPUTS if name != "token_type_ids" or name in takes]

    def _encoder(self) -> nn.Module:
        encoders = getattr(self.model, "encoders", None)
        return self.model.backbone if encoders is None else next(iter(encoders.values()))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
        whole = Segment(0, input_ids.shape[0], input_ids.shape[1])
        given = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        logits = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            segments=dict.fromkeys(self.names, whole),
            single_pass=True,
            **given,
        ).logits
        return tuple(logits[name] for name in self.names)

    def room(self) -> int:
        """Return the longest input in tokens."""
        positions = usable_positions(self.model)
        return 10**6 if positions is None else positions - self.model.reserved_positions

    def batch(self, rows: int, length: int) -> dict[str, Tensor]:
        """Return rows of random tokens, some of them padded."""
        config = self.model.config.get_text_config()
        draw = torch.Generator().manual_seed(rows)
        ids = torch.randint(0, config.vocab_size, (rows, length), generator=draw)
        pad = config.pad_token_id or 0
        ids = torch.where(ids == pad, (pad + 1) % config.vocab_size, ids)
        lengths = torch.randint(1, length + 1, (rows, 1), generator=draw)
        lengths[0] = length
        mask = (torch.arange(length) < lengths).long()
        kinds = torch.zeros_like(ids)
        kinds[:, length // 2 :] = int(getattr(config, "type_vocab_size", 1) > 1)
        values = {"input_ids": torch.where(mask.bool(), ids, pad), "attention_mask": mask, "token_type_ids": kinds}
        return {name: values[name] for name in self.inputs}


def _trace(module: _Logits) -> Any:
    """Return the graph of a model, as PyTorch's exporter gives it."""
    room = module.room()
    rows, length = _TRACED[0], min(_TRACED[1], room)
    example = module.batch(rows, length)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=room)}
    try:
        with torch.no_grad(), _quiet():
            return torch.onnx.export(
                module,
                (),
                kwargs=dict(example),
                input_names=list(example),
                output_names=list(module.names),
                dynamic_shapes=dict.fromkeys(example, sizes),
                dynamo=True,
                verbose=False,
            )
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        config = module.model.config
        raise ValueError(
            f"{type(module.model).__name__} over {config.backbone_config.model_type!r} cannot be written as an ONNX "
            f"graph: {next((line for line in reason if 'Error' in line), reason[0])}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what the exporter says of operators and versions that play no part here."""
    import logging as standard

    level = logging.get_verbosity()
    exporter = standard.getLogger("torch.onnx")
    before = exporter.level
    logging.set_verbosity_error()
    exporter.setLevel(standard.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        exporter.setLevel(before)


def _describe(graph: Any, tasks: Sequence[Task]) -> None:
    """Write the tasks into the graph's metadata."""
    facts: list[dict[str, Any]] = [
        {"name": task.name, "type": task.type.value, "labels": list(task.labels or ())} for task in tasks
    ]
    for fact, task in zip(facts, tasks, strict=True):
        if task.type is TaskType.QUESTION_ANSWERING:
            fact |= {"null_answers": task.null_answers is not False, "max_answer_length": task.max_answer_length}
    graph.metadata_props["tasks"] = json.dumps(facts)


def _compare(module: _Logits, path: Path) -> None:
    """Raise ValueError where a graph computes something else than the model, on batches of several sizes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    room = module.room()
    for rows, length in (*_CHECKED, _TRACED):
        batch = module.batch(rows, min(length, room))
        with torch.inference_mode():
            expected = module(**batch)
        try:
            found = session.run(list(module.names), {name: value.numpy() for name, value in batch.items()})
        except Exception as error:
            raise ValueError(
                f"the graph was traced with {_TRACED[0]} rows and does not take {rows} of {length} tokens: {error}"
            ) from error
        real = batch["attention_mask"].bool()
        for name, ours, theirs in zip(module.names, expected, map(torch.from_numpy, found), strict=True):
            if ours.dim() == 3:
                ours, theirs = ours[real], theirs[real]
            if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE):
                away = float((ours - theirs).abs().max()) if ours.shape == theirs.shape else float("inf")
                raise ValueError(
                    f"the graph does not compute what {type(module.model).__name__} does: for {rows} rows of {length} "
                    f"tokens the logits of {name!r} are up to {away:.2g} away, more than {TOLERANCE}"
                )


def _every_expert(experts: Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Return `[N, H]` of tokens `[N, H]`: all experts' outputs, those not chosen with the weight 0."""
    numbers = torch.arange(experts.num_experts, device=hidden_states.device)
    chosen = (top_k_index.unsqueeze(-1) == numbers).to(top_k_weights.dtype)
    weights = (chosen * top_k_weights.unsqueeze(-1)).sum(1)  # [N, E]

    def product(name: str, values: Tensor) -> Tensor:
        result = values @ getattr(experts, name).transpose(1, 2)
        return result + getattr(experts, f"{name}_bias").unsqueeze(1) if experts.has_bias else result

    inner = product("gate_up_proj" if experts.has_gate else "up_proj", hidden_states)
    inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    outputs = product("down_proj", inner)  # [E, N, H]
    return (outputs * weights.t().unsqueeze(-1)).sum(0)


ALL_EXPERTS_FUNCTIONS.register(_EVERY_EXPERT, _every_expert)
