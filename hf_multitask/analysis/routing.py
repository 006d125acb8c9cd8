"""Which experts of a mixture do the tokens of each task go to? Counted where the routers decide.

Routing says whether tasks have parted ways inside a model, not whether that is good for them. Tasks differ in their
texts, too: a router that knows words, not tasks, sends the words of different datasets to different experts, and so
mutual information between task and expert is above 0 before any training. Compare with the model at its start.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..data.collator import DataCollatorForMultiTask
from ..data.dataset import MultiTaskDataset, prepare_sources
from ..data.preprocessing import check_tokenizer, longest_input
from ..data.sources import make_sources
from ..models.base import MultiTaskModel
from .conflict import group_by_layer
from .isolation import undisturbed
from .routing_result import RoutingResult
from .rows import draw_batches, move_to

__all__ = ["find_routers", "routing"]

logger = logging.get_logger(__name__)

# Transformers' routers, and ours, are modules named so that return (logits, weights, numbers of the chosen experts).
_ROUTER = re.compile(r"Router$|MoE\w*Gate$")


def routing(
    model: MultiTaskModel,
    datasets: Any,
    processing_class: PreTrainedTokenizerBase,
    batches: int = 8,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    seed: int = 0,
    num_proc: int | None = None,
) -> RoutingResult:
    """Count where the routers of a mixture of experts send the tokens of each task.

    It works for a [`MixtureOfExpertsModel`], and for other multi-task models over a backbone that is a mixture of
    experts of its own (Mixtral, Qwen2-MoE, OLMoE, ...: the families of Transformers whose routers return logits,
    weights and the numbers of the chosen experts). Tokens are those of rows as the model is served: without dropout
    and without noise; padding does not count. A row that feeds two tasks counts for both.

    The model's mode and gradients and the random state are as before afterwards.

    Args:
        model: The model, on the device where to measure, not wrapped for several processes.
        datasets: Rows by dataset name, as `MultiTaskTrainer` takes them.
        processing_class: The backbone's tokenizer.
        batches: Number of batches of each dataset.
        batch_size: Rows of a batch.
        max_length: Longest input in tokens (default: what tokenizer and backbone allow).
        seed: Seed of the rows that are drawn.
        num_proc: Processes that tokenize.

    Returns:
        [`RoutingResult`], which prints as tables.

    Raises:
        TypeError: `model` is no `MultiTaskModel`.
        ValueError: The model has no routers, they are of an unknown kind, or an argument or a row does not fit.

    Example:
        >>> result = routing(model, datasets, tokenizer)  # doctest: +SKIP
        >>> result.mutual_information("layer.3").corrected  # doctest: +SKIP
        0.113
    """
    if not isinstance(model, MultiTaskModel):
        raise TypeError(
            f"routing needs a MultiTaskModel, got {type(model).__name__}; a model that is wrapped for several "
            "processes must be unwrapped"
        )
    for name, value in {"batches": batches, "batch_size": batch_size}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    routers = find_routers(model)
    check_tokenizer(processing_class, model)
    names = tuple(task.name for task in model.tasks)
    with undisturbed(model), torch.no_grad():
        rows = datasets
        if not isinstance(rows, MultiTaskDataset):
            length = longest_input(processing_class, model, max_length)
            options: dict[str, Any] = {"tokenizer": processing_class, "max_length": length, "num_proc": num_proc}
            rows = prepare_sources(datasets, make_sources(model.tasks, model.shares_rows), "datasets", **options)
        present = {task.name for source in rows.sources for task in source.tasks}
        if present != set(names):
            raise ValueError(f"datasets are rows of {', '.join(sorted(present))}; the tasks are {', '.join(names)}")
        collate = DataCollatorForMultiTask(processing_class, model.tasks)
        with _counting(model, routers, names) as counts:
            for part in rows.split():
                for index in _draw(part, batches, batch_size, seed):
                    batch = collate([part[int(i)] for i in index])
                    model(**move_to(model.device, {key: value for key, value in batch.items() if key != "labels"}))
    settings = {"batches": batches, "batch_size": batch_size, "max_length": max_length, "seed": seed}
    return RoutingResult(names, {layer: table.cpu().numpy() for layer, table in counts.items()}, settings)


def find_routers(model: MultiTaskModel) -> dict[str, nn.Module]:
    """Return the routers inside a model, by layer.

    Raises:
        ValueError: There are none.
    """
    found = {name: module for name, module in model.named_modules() if _ROUTER.search(type(module).__name__)}
    if not found:
        raise ValueError(
            f"{type(model).__name__} over a backbone {model.backbone.config.model_type!r} has no routers; routing is "
            "for MixtureOfExpertsModel, and for backbones that are mixtures of experts themselves"
        )
    layers = group_by_layer(list(found))
    if len(set(layers.values())) < len(layers):  # several in a layer keep their whole names
        layers = {name: name for name in found}
    return {layers[name]: module for name, module in found.items()}


def _draw(part: MultiTaskDataset, batches: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """Yield the rows of each batch; none comes twice, and so there are fewer batches of a small dataset."""
    name = part.sources[0].dataset
    drawn = draw_batches(len(part), batch_size, np.random.default_rng([seed, zlib.crc32(name.encode())]))
    enough = min(batches, max(len(part) // batch_size, 1))
    if enough < batches:
        logger.warning(f"dataset {name!r} has {len(part)} rows: {enough} of {batches} batches of {batch_size} are made")
    return (next(drawn) for _ in range(enough))


@contextmanager
def _counting(
    model: MultiTaskModel, routers: dict[str, nn.Module], names: tuple[str, ...]
) -> Iterator[dict[str, Tensor]]:
    """Inside, tables of token-slots `[T, E]` by layer grow with everything that the routers decide."""
    tables: dict[str, Tensor] = {}

    def watch(layer: str) -> Callable[[nn.Module, Any, Any], None]:
        def count(module: nn.Module, args: Any, output: Any) -> None:
            if not _is_choice(output):
                raise ValueError(
                    f"the router of {layer}, a {type(module).__name__}, returns no logits, weights and numbers "
                    "of the chosen experts, as those that routing can read do"
                )
            size, rows = output[0].shape[-1], model.rows.value
            assert rows is not None
            table = tables.setdefault(layer, torch.zeros(len(names), size, dtype=torch.long, device=output[2].device))
            chosen = output[2].reshape(max(stop for _, _, stop in rows.slices), -1, output[2].shape[-1])
            for name, start, stop in rows.slices:
                own = chosen[start:stop]
                if rows.attention_mask is not None:
                    own = own[rows.attention_mask[start:stop].bool()]
                table[names.index(name)] += torch.bincount(own.flatten(), minlength=size)

        return count

    handles = [module.register_forward_hook(watch(layer)) for layer, module in routers.items()]
    try:
        yield tables
    finally:
        for handle in handles:
            handle.remove()


def _is_choice(output: Any) -> bool:
    """Return whether a router's output is `(logits [..., E], weights [..., k], numbers [..., k])`."""
    return (
        isinstance(output, tuple)
        and len(output) >= 3
        and all(isinstance(value, Tensor) for value in output[:3])
        and output[0].is_floating_point()
        and not output[2].is_floating_point()
        and output[1].shape == output[2].shape
    )
