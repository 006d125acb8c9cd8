"""How far encoders of the same shape lie apart: the penalty of soft sharing with its gradient, and a measure of it.

Everything is computed from the deviations of the encoders from their mean. For T encoders

    sum over pairs i < j of ||theta_i - theta_j||^2  =  T * sum over i of ||theta_i - mean||^2

so that T passes over the parameters take the place of T (T - 1) / 2. The parameters are worked off in pieces that stay
in the cache of a processor, and nothing of their size is kept between the forward and the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from .layers import find_layers

__all__ = ["add_deviations", "parameters_by_layer", "relative_deviations", "same_parameters", "weighted_deviation"]

# Elements of one parameter that are worked off together. A processor should find what it just computed in its caches,
# and a call must have enough to do; an accelerator gains nothing from small pieces, and its launches cost time.
_PIECE = {"cpu": 1 << 17, "accelerator": 1 << 24}


def same_parameters(encoders: Mapping[str, torch.nn.Module]) -> dict[str, list[torch.nn.Parameter]]:
    """Return, by name, the parameters that all encoders have, in the order of the encoders.

    Raises:
        ValueError: Two encoders have a parameter of the same name in different shapes.
    """
    owned = {task: dict(encoder.named_parameters()) for task, encoder in encoders.items()}
    first = next(iter(owned.values()))
    found = {}
    for name in first:
        if not all(name in parameters for parameters in owned.values()):
            continue
        shapes = {task: tuple(parameters[name].shape) for task, parameters in owned.items()}
        if len(set(shapes.values())) > 1:
            listed = ", ".join(f"{shape} for task {task!r}" for task, shape in shapes.items())
            raise ValueError(
                f"parameter {name!r} differs in shape between the encoders: {listed}; encoders that are compared "
                "must have the same shapes, so change all of them, as the model's resize_token_embeddings does"
            )
        found[name] = [parameters[name] for parameters in owned.values()]
    return found


def parameters_by_layer(encoder: PreTrainedModel) -> dict[str, list[str]]:
    """Return the names of an encoder's parameters by where they are: `embeddings`, `0`, `1`, ... and `other`.

    `embeddings` is the outermost module with the input embeddings in it and no layer; in an encoder whose layers
    cannot be told apart, all outside it is `other`.
    """
    try:
        layers = list(find_layers(encoder))
    except ValueError:
        layers = []
    of_layer = {id(one): str(number) for number, layer in enumerate(layers) for one in layer.parameters()}
    embeddings = encoder.get_input_embeddings()
    holders = (
        module
        for module in encoder.modules()
        if module is not encoder
        and any(part is embeddings for part in module.modules())
        and not any(id(one) in of_layer for one in module.parameters())
    )
    of_layer.update({id(one): "embeddings" for one in next(holders).parameters()})
    found: dict[str, list[str]] = {key: [] for key in ("embeddings", *map(str, range(len(layers))), "other")}
    for name, parameter in encoder.named_parameters():
        found[of_layer.get(id(parameter), "other")].append(name)
    return {key: names for key, names in found.items() if names}


def weighted_deviation(parameters: Sequence[Sequence[Tensor]], weights: Sequence[float]) -> Tensor:
    """Return the weighted squared distance of some encoders from their mean, with an exact gradient.

        sum over parameters p of weights[p] * sum over encoders i of ||theta_ip - mean_p||^2

    Its gradient is `2 * weights[p] * (theta_ip - mean_p)`: what the mean itself contributes adds up to 0. Deviations
    are sums of differences between encoders, so they are exactly 0 where encoders are equal, and they lose no digits
    where encoders have hardly moved apart.

    Args:
        parameters: For each parameter its version in each encoder, all of one shape; those that need no gradient
            count and get none.
        weights: For each parameter what its deviations are multiplied with.

    Returns:
        A scalar in float32, or float64 where the parameters are. Half precision is computed in float32.
    """
    return _WeightedDeviation.apply(tuple(weights), len(parameters[0]), *(one for group in parameters for one in group))


class _WeightedDeviation(torch.autograd.Function):
    """The function of [`weighted_deviation`]; the backward pass computes the deviations a second time."""

    @staticmethod
    def forward(ctx: Any, weights: tuple[float, ...], count: int, *flat: Tensor) -> Tensor:
        ctx.weights, ctx.count = weights, count
        ctx.save_for_backward(*flat)
        groups = [flat[start : start + count] for start in range(0, len(flat), count)]
        total = _Total(flat[0])
        for weight, versions in _pieces(groups, weights):
            for factor, differences in _differences(versions):
                total.add(differences, factor * weight)
        return total.value().to(_wide(flat[0].dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        flat, count = ctx.saved_tensors, ctx.count
        wanted = ctx.needs_input_grad[2:]
        # A gradient of a contiguous parameter becomes its `grad` as it is, without another copy.
        results = [torch.empty_like(one, memory_format=torch.contiguous_format) for one in flat]
        groups = [flat[start : start + count] for start in range(0, len(flat), count)]
        targets = [results[start : start + count] for start in range(0, len(flat), count)]
        # Where it costs no wait for a device, the factor is a number, which needs no pass of its own.
        factor = gradient.item() if gradient.device.type == "cpu" else gradient
        pairs = zip(_pieces(groups, ctx.weights), _pieces(targets, ctx.weights), strict=True)
        for (weight, versions), (_, outputs) in pairs:
            _write_deviations(versions, 2.0 * weight * factor, outputs)
        return None, None, *(one if want else None for one, want in zip(results, wanted, strict=True))


@torch.no_grad()
def add_deviations(
    parameters: Sequence[Sequence[torch.nn.Parameter]], weights: Sequence[float], scale: float
) -> Tensor:
    """Return what [`weighted_deviation`] does, and add its gradient, times a factor, to the parameters' `.grad`.

    Value and gradient come from one pass over the parameters, and no tensor of their size is made, where autograd
    makes a gradient and adds it to the one that is there.

    Args:
        parameters: As in [`weighted_deviation`].
        weights: As in [`weighted_deviation`].
        scale: What the gradient is multiplied with (a loss scaler's number).
    """
    flat = [one for group in parameters for one in group]
    count, targets = len(parameters[0]), []
    for one in flat:
        grad = torch.zeros_like(one) if one.grad is None else one.grad
        if one.requires_grad:
            one.grad = grad = grad.contiguous()
        targets.append(grad)  # what is added for a frozen one goes nowhere
    grads = [targets[start : start + count] for start in range(0, len(flat), count)]
    total = _Total(flat[0])
    pairs = zip(_pieces(parameters, weights), _pieces(grads, weights), strict=True)  # type: ignore[arg-type]
    for (weight, versions), (_, outputs) in pairs:
        first = _widened(versions[0])
        deviations = [[torch.zeros_like(piece) for piece in first]]
        deviations += [list(torch._foreach_sub(_widened(pieces), first)) for pieces in versions[1:]]
        for others in deviations[1:]:
            torch._foreach_add_(deviations[0], others, alpha=-1.0 / count)
        for own in deviations[1:]:
            torch._foreach_add_(own, deviations[0])
        for own, output in zip(deviations, outputs, strict=True):
            total.add(own, weight)
            torch._foreach_add_(output, own, alpha=2.0 * weight * scale)
    return total.value().to(_wide(flat[0].dtype))


def relative_deviations(groups: Mapping[Hashable, Sequence[Sequence[Tensor]]]) -> dict[Any, float]:
    """Return for each group of parameters how far the encoders deviate from their mean, relative to the mean.

        sqrt( mean over encoders i of ||theta_i - mean||^2 ) / ||mean||

    with norms over all parameters of the group: the root mean square of the deviations over that of the mean. It is 0
    for equal encoders, and infinite where they differ around a mean of exactly 0.

    Args:
        groups: Parameters by group, as in [`weighted_deviation`].
    """
    ratios = {}
    with torch.no_grad():
        for key, parameters in groups.items():
            apart, middle = _Total(parameters[0][0]), _Total(parameters[0][0])
            for _, versions in _pieces(parameters, [1.0] * len(parameters)):
                mean = _widened(versions[0])
                for number, (factor, differences) in enumerate(_differences(versions), start=2):
                    apart.add(differences, factor)
                    mean = list(torch._foreach_add(mean, differences, alpha=1.0 / number))
                middle.add(mean, 1.0)
            ratios[key] = torch.stack([apart.value() / len(parameters[0]), middle.value()])
    found = {}
    for key, sums in ratios.items():
        spread, size = sums.tolist()
        found[key] = math.sqrt(spread / size) if size else (math.inf if spread else 0.0)
    return found


class _Total:
    """A sum of squares: of pieces in their own precision, between pieces in double."""

    def __init__(self, like: Tensor) -> None:
        self._norms: list[Tensor] = []
        self._weights: list[float] = []
        self._device = like.device
        self._dtype = torch.float32 if like.device.type == "mps" else torch.float64  # MPS has no float64

    def add(self, pieces: Sequence[Tensor], weight: float) -> None:
        """Add the squares of some pieces."""
        if self._device.type == "cpu":
            self._norms += [torch.dot(piece, piece) for piece in pieces]  # in one pass, with BLAS
        else:
            self._norms += torch._foreach_pow(torch._foreach_norm(list(pieces)), 2)
        self._weights += [weight] * len(pieces)

    def value(self) -> Tensor:
        """Return the sum, a scalar."""
        if not self._norms:
            return torch.zeros((), dtype=self._dtype, device=self._device)
        weights = torch.tensor(self._weights, dtype=self._dtype, device=self._device)
        return torch.stack(self._norms).to(self._dtype).mul_(weights).sum()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _widened(pieces: Sequence[Tensor]) -> list[Tensor]:
    return [piece.to(_wide(piece.dtype)) for piece in pieces]


def _pieces(groups: Sequence[Sequence[Tensor]], weights: Sequence[float]) -> Iterator[tuple[float, list[list[Tensor]]]]:
    """Yield bundles of flat pieces of equal weight: for each encoder a list of views.

    Large parameters are cut; small ones are bundled, for every call has its price.
    """
    limit = _PIECE["cpu" if groups[0][0].device.type == "cpu" else "accelerator"]
    bundle: list[list[Tensor]] = [[] for _ in groups[0]]
    size, bundled = 0, weights[0]
    for group, weight in zip(groups, weights, strict=True):
        cuts = [one.detach().reshape(-1).split(limit) for one in group]
        for versions in zip(*cuts, strict=True):
            elements = versions[0].numel()
            if size and (size + elements > limit or weight != bundled):
                yield bundled, bundle
                bundle, size = [[] for _ in groups[0]], 0
            for own, piece in zip(bundle, versions, strict=True):
                own.append(piece)
            size, bundled = size + elements, weight
    if size:
        yield bundled, bundle


def _differences(versions: list[list[Tensor]]) -> Iterator[tuple[float, list[Tensor]]]:
    """Yield differences whose weighted squares add up to the squared deviations from the mean, and their weights.

    They are those of each encoder, from the second on, to the mean of the encoders before it (Welford 1962):

        sum over i of ||theta_i - mean||^2  =  sum over k > 1 of (k - 1) / k * ||theta_k - mean of the first k - 1||^2

    All terms are positive. The mean is kept as its difference to the first encoder, which is exact where encoders lie
    close together.
    """
    first = _widened(versions[0])
    mean: list[Tensor] = []
    for number, pieces in enumerate(versions[1:], start=2):
        differences = list(torch._foreach_sub(_widened(pieces), first))
        if mean:
            torch._foreach_sub_(differences, mean)
        yield (number - 1) / number, differences
        if not mean:
            mean = list(torch._foreach_mul(differences, 1.0 / number))
        elif number < len(versions):
            torch._foreach_add_(mean, differences, alpha=1.0 / number)


def _write_deviations(versions: list[list[Tensor]], scale: float | Tensor, outputs: list[list[Tensor]]) -> None:
    """Write the deviation of each encoder's pieces from their mean, times a factor, to pieces of the same shapes."""
    first = _widened(versions[0])
    others = [list(torch._foreach_sub(_widened(pieces), first)) for pieces in versions[1:]]
    if isinstance(scale, Tensor):
        for differences in others:
            torch._foreach_mul_(differences, scale)
        scale = 1.0
    share = -scale / len(versions)
    own = list(torch._foreach_mul(others[0], share)) if others else [torch.zeros_like(piece) for piece in first]
    for differences in others[1:]:
        torch._foreach_add_(own, differences, alpha=share)
    torch._foreach_copy_(outputs[0], own)
    for differences, output in zip(others, outputs[1:], strict=True):
        for piece, base, target in zip(differences, own, output, strict=True):
            torch.add(base, piece, alpha=scale, out=target)
