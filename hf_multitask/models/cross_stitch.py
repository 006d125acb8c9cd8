"""Cross-stitch units (Misra et al. 2016): after each layer every task's encoder reads a mixture of all of them.

    x_A  <-  sum over tasks B of alpha_AB x_B

The encoders are run in one pass. A stand-in for a backbone of their class is put together, whose rows are those of all
encoders below one another, `[T * rows, L, H]`: where the backbone calls a module with parameters, each encoder's own
module works on its own rows. So the backbone's code for masks, positions and the order of things is used as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .layers import find_layers

__all__ = ["STITCHED_BACKBONES", "CrossStitchUnits", "check_stitched", "run_stitched"]

# Backbones whose parameters all lie in modules that their forward calls with rows. Others read tables in between.
STITCHED_BACKBONES = (
    "bert",
    "camembert",
    "distilbert",
    "electra",
    "llama",
    "mistral",
    "modernbert",
    "qwen2",
    "qwen3",
    "roberta",
    "xlm-roberta",
)


class CrossStitchUnits(nn.Module):
    """The mixing matrices: `weight[l, A, B]` is what encoder B's output of layer l counts in encoder A's next input.

    Args:
        layers: Number of layers.
        tasks: Number of encoders, T.
        own: Initial weight of an encoder's own output; the others have equal shares of the rest, so that rows of a
            matrix sum to 1. With one encoder it is 1.
    """

    def __init__(self, layers: int, tasks: int, own: float) -> None:
        """Make the matrices, with their initial values."""
        super().__init__()
        self.own = own
        self.weight = nn.Parameter(torch.empty(layers, tasks, tasks))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the initial values, unless the weights were loaded."""
        tasks = self.weight.shape[-1]
        own = self.own if tasks > 1 else 1.0
        values = torch.full((tasks, tasks), (1.0 - own) / max(tasks - 1, 1)).fill_diagonal_(own)
        init.copy_(self.weight, values.expand_as(self.weight))

    def forward(self, streams: Tensor, layer: int) -> Tensor:
        """Return the mixtures, `[T * rows, L, H]`, of the encoders' outputs of a layer in the same shape."""
        weight = self.weight[layer].to(streams.dtype)
        return (weight @ streams.reshape(len(weight), -1)).view_as(streams)


class _Rows:
    """Cuts what is given for the rows of all encoders into what each encoder's own module gets."""

    def __init__(self, encoders: int, rows: int) -> None:
        self.encoders, self.rows = encoders, rows

    def call(self, modules: Sequence[nn.Module], args: tuple, kwargs: dict[str, Any]) -> Tensor:
        shares = [self._cut(value) for value in args]
        named = {key: self._cut(value) for key, value in kwargs.items()}
        outputs = []
        for number, module in enumerate(modules):
            own = {key: value[number] for key, value in named.items()}
            outputs.append(module(*(value[number] for value in shares), **own))
        return torch.cat(outputs)

    def _cut(self, value: Any) -> Sequence[Any]:
        # What has no row for each row of the pass (positions of all rows, for example) goes to every encoder.
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == self.encoders * self.rows:
            return value.unflatten(0, (self.encoders, self.rows)).unbind()
        if isinstance(value, tuple):
            return list(zip(*(self._cut(one) for one in value), strict=True)) or [value] * self.encoders
        return [value] * self.encoders


class _Stacked(nn.Module):
    """Stands for a module of the backbone: each encoder's own works on its rows."""

    def __init__(self, modules: Sequence[nn.Module], rows: _Rows) -> None:
        super().__init__()
        # In a tuple: they belong to the encoders, and hooks that look for layers must not find them here again.
        self.versions, self.rows = tuple(modules), rows

    def __getattr__(self, name: str) -> Any:
        """Return a plain attribute that the backbone reads of its layers, such as `attention_type`."""
        if name != "versions" and "versions" in self.__dict__:
            value = getattr(self.versions[0], name)
            if not isinstance(value, (Tensor, nn.Module)):
                return value
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.rows.call(self.versions, args, kwargs)


class _MixedLayer(_Stacked):
    """Stands for a layer of the backbone: its outputs are mixed."""

    def __init__(
        self, modules: Sequence[nn.Module], rows: _Rows, units: CrossStitchUnits, layer: int, seen: list[Tensor] | None
    ) -> None:
        super().__init__(modules, rows)
        self.mix, self.seen = (units, layer), seen  # in a tuple: the units belong to the model

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        units, layer = self.mix
        output = units(self.rows.call(self.versions, args, kwargs), layer)
        if self.seen is not None:
            self.seen += [output] if layer else [args[0], output]
        return output


def check_stitched(backbone: PreTrainedModel) -> int:
    """Return the number of layers of a backbone that can have cross-stitch units.

    Raises:
        ValueError: The backbone is not one of those.
    """
    if backbone.config.model_type not in STITCHED_BACKBONES:
        raise ValueError(
            f"cross_stitch=True does not work with backbone {backbone.config.model_type!r}; it does with "
            f"{', '.join(STITCHED_BACKBONES)}"
        )
    return len(find_layers(backbone))


def run_stitched(
    encoders: Sequence[PreTrainedModel], units: CrossStitchUnits, rows: int, hidden_states: bool
) -> tuple[PreTrainedModel, list[Tensor] | None]:
    """Put the stand-in together that runs all encoders at once, for one call with `T * rows` rows.

    Args:
        encoders: The encoders.
        units: The matrices that mix their outputs.
        rows: The rows of each encoder.
        hidden_states: Whether to note what goes into the first layer and comes out of each.

    Returns:
        The stand-in, and the list that its call fills with hidden states, None unless asked for.
    """
    seen: list[Tensor] | None = [] if hidden_states else None
    lists = [find_layers(encoder) for encoder in encoders]
    shared = _Rows(len(encoders), rows)
    layers = (
        _MixedLayer(versions, shared, units, number, seen) for number, versions in enumerate(zip(*lists, strict=True))
    )
    return cast(PreTrainedModel, _stand_in(encoders, lists[0], layers, shared)), seen


def _stand_in(
    modules: Sequence[nn.Module], layers_of_first: nn.ModuleList, layers: Iterator[nn.Module], rows: _Rows
) -> nn.Module:
    """Return what takes the place of the same module of all encoders."""
    first = modules[0]
    if first is layers_of_first:
        return nn.ModuleList(layers)
    if all(module is not layers_of_first for module in first.modules()):
        has_parameters = next(first.parameters(), None) is not None
        return _Stacked(modules, rows) if has_parameters else first
    # A module around the layers: its own code with other parts. The copy is shallow and lives for one call.
    outer = copy.copy(first)
    outer.__dict__["_modules"] = {
        name: None if child is None else _stand_in([m._modules[name] for m in modules], layers_of_first, layers, rows)  # type: ignore[misc]
        for name, child in first._modules.items()
    }
    return outer
