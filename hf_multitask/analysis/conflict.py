"""Do tasks pull the shared parameters in the same direction? Cosines of their gradients, before any training.

Two tasks conflict where the gradients of their losses on the shared parameters have a negative cosine (Du et al. 2018,
"Adapting auxiliary losses using gradient similarity"; Yu et al. 2020, "Gradient surgery for multi-task learning"): to
first order, a step for one then raises the loss of the other. What comes out is a hint, not a proof: it holds at the
weights that were measured, and whether a task helps another over a training only the comparison with its single-task
baseline shows.

**Why heads are fitted first.** A task reaches the encoder through its head. Behind a fresh head, which is a random
projection, the gradient is a random direction: whether tasks are the same, opposite or unrelated, their cosine is near
0. So copies of the heads are first trained on frozen features ([`hf_multitask.analysis.head_warmup`]). With heads of
their own even tasks with opposite labels are compatible afterwards, and rightly so: one only turns the other's head
around. Conflict by sign alone needs a head that is shared, or frozen. The loss of each task, which stands beside its
norm, shows whether its head fits: a regression on a large scale, say from 0 to 100, takes more steps than the default,
or standardized labels. Heads that are fitted only half can agree for no better reason than that (source and topic of
the quickstart: +0.18 after 100 steps, +0.05 after 200): measure with other `head_warmup_steps` too, and trust no
verdict that changes with them.

**What noise does.** A batch's gradient is the task's true gradient plus noise, and the noise of two tasks on different
rows is independent: their cosine is nearer to 0 than that of the true gradients. By how much, `reproducibility` tells:
the mean cosine of one task's gradients of two batches. With r_a and r_b of two tasks on different rows, the true
cosine is about the measured one over √(r_a r_b) (the correction for attenuation, Spearman 1904). Larger batches bring
both nearer to 1. Tasks that read the same rows are measured on the same rows, as they are trained, and share noise.
Where `reproducibility` is about 0, as it can be once heads fit well, "neutral" says that nothing was seen with batches
of this size, not that nothing is there.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..balancing.gramian import TaskGradients
from ..data.collator import DataCollatorForMultiTask
from ..data.dataset import MultiTaskDataset, prepare_sources
from ..data.preprocessing import check_tokenizer, longest_input
from ..data.sources import make_sources
from ..models.base import MultiTaskModel
from ..models.heads import TaskHead
from .conflict_result import GradientConflicts
from .gradient_sketch import GradientSketch
from .head_warmup import cache_features, fit_head
from .isolation import replaced_heads, undisturbed
from .rows import draw_batches, move_to, without_first

__all__ = ["gradient_conflicts", "group_by_layer"]

logger = logging.get_logger(__name__)


def gradient_conflicts(
    model: MultiTaskModel,
    datasets: Any,
    processing_class: PreTrainedTokenizerBase,
    batches: int = 8,
    *,
    batch_size: int = 32,
    head_warmup_steps: int = 200,
    head_warmup_rows: int = 1024,
    thresholds: tuple[float, float] = (-0.1, 0.1),
    confidence: float = 0.95,
    max_length: int | None = None,
    seed: int = 0,
    num_proc: int | None = None,
) -> GradientConflicts:
    """Measure the cosines of the tasks' gradients on the shared parameters.

    Each batch holds `batch_size` rows of every dataset and gives, for each task, the gradient of its mean loss on all
    shared parameters, without dropout (which is noise here) and without label smoothing. Cosines are averaged over the
    batches; the interval is Student's t interval of that mean, for one pair at a time. Batches hold different rows, so
    they are independent draws from the dataset, unless it has too few rows (a warning says so). The verdict is that of
    the mean by a rule of thumb; it is certain where the whole interval lies on the same side of the thresholds.

    The model's weights, gradients, mode and the random state are as before afterwards, and the heads that are fitted
    first (see [`hf_multitask.analysis.conflict`] for why) are copies. Gradients are held in float32, which takes the
    number of tasks times the shared parameters times 4 bytes; they are computed in the model's precision.

    Args:
        model: The model, on the device where to measure, not wrapped for several processes.
        datasets: Training rows by dataset name, as `MultiTaskTrainer` takes them: text or tokenized, in memory or
            streamed (streams are read to their end).
        processing_class: The backbone's tokenizer.
        batches: Number of batches, at least 2.
        batch_size: Rows of a batch, of each dataset.
        head_warmup_steps: Steps for which copies of the heads are fitted to frozen features; 0 measures with the heads
            as they are, which makes sense for a model whose heads are trained. Frozen heads are never fitted.
        head_warmup_rows: Rows of each dataset on which they are fitted; not those of the batches, if there are enough.
        thresholds: Verdicts: a mean cosine below the first is negative transfer, above the second positive transfer.
        confidence: Coverage of the intervals.
        max_length: Longest input in tokens (default: what tokenizer and backbone allow).
        seed: Seed of the rows and of the fitting.
        num_proc: Processes that tokenize.

    Returns:
        [`GradientConflicts`], which prints as a table.

    Raises:
        TypeError: `model` is no `MultiTaskModel`.
        ValueError: There is nothing to compare (one task, or all shared parameters frozen), an argument or a row does
            not fit, or a gradient is not finite.

    Example:
        >>> conflicts = gradient_conflicts(model, datasets, tokenizer)  # doctest: +SKIP
        >>> conflicts.verdict("sentiment", "topic")  # doctest: +SKIP
        'neutral'
    """
    layers = _shared_layers(model)
    _check_arguments(batches, batch_size, head_warmup_steps, head_warmup_rows, thresholds, confidence)
    check_tokenizer(processing_class, model)
    names = tuple(task.name for task in model.tasks)
    with undisturbed(model):
        rows = datasets
        if not isinstance(rows, MultiTaskDataset):
            length = longest_input(processing_class, model, max_length)
            sources = make_sources(model.tasks, model.shares_rows)
            options: dict[str, Any] = {"tokenizer": processing_class, "max_length": length, "num_proc": num_proc}
            rows = prepare_sources(datasets, sources, "datasets", **options)
        present = {task.name for source in rows.sources for task in source.tasks}
        if present != set(names):
            raise ValueError(f"datasets are rows of {', '.join(sorted(present))}; the tasks are {', '.join(names)}")
        parts = [_Part(part, batches, batch_size, seed) for part in rows.split()]
        collate = DataCollatorForMultiTask(processing_class, model.tasks)
        heads = {}
        if head_warmup_steps:
            for part in parts:
                warmup = (collate(part.take(index)) for index in part.warmup(head_warmup_rows, batch_size))
                for name, features in cache_features(model, warmup).items():
                    head = cast(TaskHead, model.heads[name])
                    heads[name] = fit_head(head, features, head_warmup_steps, part.generator("fit", name))
        with replaced_heads(model, heads):
            shared = [parameter for group in layers.values() for parameter in group]
            sketch = GradientSketch(shared, seed=seed)
            found = []
            for b in range(batches):
                batch = (collate(part.take(part.batches[b])) for part in parts)
                found.append(_measure(model, batch, names, layers, sketch))
    settings = {
        "batch_size": batch_size,
        "head_warmup_steps": head_warmup_steps,
        "head_warmup_rows": head_warmup_rows,
        "confidence": confidence,
        "seed": seed,
    }
    return _summarize(names, list(layers), found, thresholds, settings)


class _Part:
    """One source's rows, and which of them each batch reads; the same ones for all sources of one dataset."""

    def __init__(self, dataset: MultiTaskDataset, batches: int, batch_size: int, seed: int) -> None:
        self.dataset = dataset
        self._name, self._seed = dataset.sources[0].dataset, seed
        if len(dataset) < batches * batch_size:
            logger.warning(
                f"dataset {self._name!r} has {len(dataset)} rows, fewer than {batches} batches of {batch_size}: rows "
                "come again, and the intervals of its tasks say nothing about other rows"
            )
        drawn = draw_batches(len(dataset), batch_size, self.generator("measure"))
        self.batches = [next(drawn) for _ in range(batches)]

    def generator(self, *purpose: str) -> np.random.Generator:
        return np.random.default_rng([self._seed, *(zlib.crc32(part.encode()) for part in (self._name, *purpose))])

    def take(self, index: np.ndarray) -> list[dict[str, Any]]:
        return [self.dataset[int(i)] for i in index]

    def warmup(self, rows: int, batch_size: int) -> Iterator[np.ndarray]:
        chosen = without_first(len(self.dataset), np.concatenate(self.batches), rows, self.generator("warmup"))
        return (chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size))


def _shared_layers(model: MultiTaskModel) -> dict[str, list[nn.Parameter]]:
    """Return the trainable shared parameters by layer."""
    if not isinstance(model, MultiTaskModel):
        raise TypeError(
            f"gradient_conflicts needs a MultiTaskModel, got {type(model).__name__}; a model that is wrapped for "
            "several processes must be unwrapped"
        )
    if len(model.tasks) < 2:
        raise ValueError(f"gradient_conflicts compares tasks, and the model has only {model.tasks[0].name!r}")
    shared = {id(parameter) for parameter in model.shared_parameters() if parameter.requires_grad}
    if not shared:
        raise ValueError(
            "no shared parameter is trained, so tasks cannot conflict: unfreeze those that you are going to train, for "
            "example with model.backbone.requires_grad_(True), or add adapters"
        )
    found = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in shared}
    layers: dict[str, list[nn.Parameter]] = {}
    for name, layer in group_by_layer(list(found)).items():
        layers.setdefault(layer, []).append(found[name])
    return layers


def group_by_layer(names: Sequence[str]) -> dict[str, str]:
    """Return the layer of each parameter, by the first number in its name; without one, by its module.

    Args:
        names: Names of parameters.

    Example:
        >>> group_by_layer(["backbone.embeddings.words.weight", "backbone.encoder.layer.0.norm.weight"])
        {'backbone.embeddings.words.weight': 'embeddings', 'backbone.encoder.layer.0.norm.weight': 'layer.0'}
    """
    paths = [name.split(".") for name in names]
    common = 0
    while paths and all(len(path) > common + 1 and path[common] == paths[0][common] for path in paths):
        common += 1
    short, full = {}, {}
    for name, path in zip(names, paths, strict=True):
        number = next((i for i, part in enumerate(path) if part.isdigit()), None)
        if number is None:
            short[name] = full[name] = path[min(common, max(len(path) - 2, 0))]
        else:
            short[name] = ".".join(path[max(number - 1, 0) : number + 1])
            full[name] = ".".join(path[: number + 1])
    # Two stacks of layers, of which each has a layer.0, keep their whole names.
    return short if len(set(short.values())) == len(set(full.values())) else full


def _check_arguments(
    batches: int, batch_size: int, steps: int, rows: int, thresholds: tuple[float, float], confidence: float
) -> None:
    numbers = {"batches": (batches, 2), "batch_size": (batch_size, 1), "head_warmup_steps": (steps, 0)}
    for name, (value, least) in {**numbers, "head_warmup_rows": (rows, 1)}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            why = "; one batch has no spread" if name == "batches" else ""
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}{why}")
    if len(thresholds) != 2 or not -1 <= thresholds[0] <= thresholds[1] <= 1:
        raise ValueError(f"thresholds must be two numbers in [-1, 1], the smaller first, got {thresholds!r}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence!r}")


class _Findings(NamedTuple):
    """Of one batch: Gramians `[layers, T, T]`, sketches of the gradients `[T, W]`, losses `[T]`."""

    gramians: Tensor
    sketches: Tensor
    losses: Tensor


def _measure(
    model: MultiTaskModel,
    batch: Iterable[dict[str, Any]],
    names: Sequence[str],
    layers: Mapping[str, Sequence[nn.Parameter]],
    sketch: GradientSketch,
) -> _Findings:
    """Measure one batch, which comes in a part for every source; its gradients are gone when this returns."""
    gradients = [TaskGradients(group, len(names)) for group in layers.values()]
    sketches = torch.zeros(len(names), sketch.width)
    losses = torch.zeros(len(names), dtype=torch.float64)
    for part in batch:
        for name, loss in _backward_of_each(model, move_to(model.device, part), sketch.parameters):
            task = names.index(name)
            losses[task] = loss
            sketches[task] = sketch()
            for group in gradients:
                group.move(task)
    gramians = torch.stack([group.gramian(range(len(names))) for group in gradients])
    _check_finite(gramians, names)
    return _Findings(gramians, sketches, losses)


def _backward_of_each(
    model: MultiTaskModel, batch: dict[str, Any], shared: Sequence[nn.Parameter]
) -> Iterator[tuple[str, float]]:
    """Yield a batch's tasks and their losses, each when its gradient lies in the shared parameters' `.grad`."""
    losses: dict[str, Tensor] = model(**batch, return_dict=True).task_losses
    for i, (name, loss) in enumerate(losses.items()):
        loss.backward(inputs=list(shared), retain_graph=i < len(losses) - 1)
        yield name, loss.item()


def _check_finite(gramians: Tensor, names: Sequence[str]) -> None:
    norms = gramians.sum(0).diagonal()
    if not torch.isfinite(gramians).all():
        bad = [name for name, norm in zip(names, norms.tolist(), strict=True) if not math.isfinite(norm)]
        raise ValueError(
            f"the gradient of {', '.join(bad)} is not finite: load the model in float32, and look at its labels"
        )


def _cosines(gramians: Tensor) -> np.ndarray:
    """Return `[..., T, T]`; a task without any gradient is at right angles to all others."""
    norms = gramians.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    products = norms.unsqueeze(-1) * norms.unsqueeze(-2)
    cosines = torch.where(products > 0, gramians / products, 0.0).clamp(-1, 1)
    cosines.diagonal(dim1=-2, dim2=-1).copy_((norms > 0).double())
    return cosines.numpy()


def _summarize(
    names: tuple[str, ...],
    layers: Sequence[str],
    found: Sequence[_Findings],
    thresholds: tuple[float, float],
    settings: dict[str, Any],
) -> GradientConflicts:
    """Return means over batches and their intervals."""
    from scipy.stats import t

    batches = len(found)
    gramians, sketches, losses = (torch.stack(values) for values in zip(*found, strict=True))
    cosines = _cosines(gramians.sum(1))
    mean = cosines.mean(0)
    half = t.ppf((1 + settings["confidence"]) / 2, batches - 1) * cosines.std(0, ddof=1) / math.sqrt(batches)
    norms = gramians.sum(1).diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    between = torch.einsum("atw,btw->tab", sketches, sketches).double() / (norms.T[:, :, None] * norms.T[:, None, :])
    pairs = torch.ones(batches, batches, dtype=torch.bool).triu(1)
    return GradientConflicts(
        tasks=names,
        cosines=mean,
        low=np.clip(mean - half, -1, 1),
        high=np.clip(mean + half, -1, 1),
        norms=norms.mean(0).numpy(),
        losses=losses.mean(0).numpy(),
        reproducibility=between[:, pairs].mean(1).nan_to_num(0.0).clamp(-1, 1).numpy(),
        layers=dict(zip(layers, _cosines(gramians).mean(0), strict=True)),
        batches=batches,
        thresholds=(float(thresholds[0]), float(thresholds[1])),
        settings=settings,
    )
