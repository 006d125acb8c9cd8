"""Low-rank additions to the linear layers of a backbone that itself stays as it is.

LoRA (Hu et al. 2022) adds to a linear layer `W x` the product of two thin matrices, `alpha / r * B A x`. PEFT puts a
module of its own in the place of the layer. Here the product is added by a hook, so that the backbone keeps its modules
and the names of its tensors, and the rows of one pass may belong to several tasks, in training too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .rows import CurrentRows

__all__ = ["LowRank", "LowRankHook", "default_targets", "features", "find_targets"]


class LowRank(nn.Module):
    """The pair of thin matrices that one adapter has for one linear layer.

    Args:
        in_features: Width of the layer's input.
        out_features: Width of the layer's output.
        rank: The inner width `r`.
        alpha: The product is multiplied with `alpha / r`.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float) -> None:
        """Make room for `lora_A`, `[r, in]`, and `lora_B`, `[out, r]`; the model gives them their values."""
        super().__init__()
        self.scaling = alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, in_features))
        self.lora_B = nn.Parameter(torch.empty(out_features, rank))

    def extra_repr(self) -> str:
        """Return what the printed model says of the pair."""
        (rank, width), out = self.lora_A.shape, len(self.lora_B)
        return f"in_features={width}, out_features={out}, rank={rank}, scaling={self.scaling:g}"

    def difference(self) -> Tensor:
        """Return what the pair adds to the layer's weight, `[out, in]`, in float32 or wider."""
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        return self.scaling * (self.lora_B.to(wide) @ self.lora_A.to(wide))


class LowRankHook:
    """A forward hook of one linear layer: adds to each task's rows the product of that task, and the shared one.

    A copy of the model copies its hooks with all they refer to, so the copy's hooks know the copy's adapters. Without
    rows (the backbone is called by itself) nothing is added.

    Args:
        path: The layer's name in the backbone, for errors.
        rows: Where the model says whose rows pass.
        own: Each task's pair for this layer; empty where all tasks have the shared pair alone.
        shared: The pair that all tasks share, or None.
        dropout: Probability with which an element of the products' input is 0 in training. All products of a layer
            see the same elements.
    """

    def __init__(
        self, path: str, rows: CurrentRows, own: Mapping[str, LowRank], shared: LowRank | None, dropout: float
    ) -> None:
        """Remember the pairs."""
        self.path = path
        self.rows = rows
        self.own = dict(own)
        self.shared = shared
        self.dropout = dropout

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """Return the layer's output, `[rows, ..., out]`, with the products added; None where there are no rows."""
        if self.rows.value is None:
            return None
        hidden, slices = args[0], self.rows.value.slices
        if not self.own:
            slices = slices[:1]  # all rows are treated alike, whose ever they are
        if len(slices) > 1 and len(hidden) != slices[-1][2]:
            # Some attentions pack the tokens of all rows into one: then nobody knows any more whose they are.
            raise ValueError(
                f"the layer {self.path!r} sees {len(hidden)} rows where the batch has {slices[-1][2]}, so it cannot "
                "tell the tasks apart; use an attn_implementation that keeps the rows ('sdpa', 'eager'), or batches "
                "of one task"
            )
        weights = [self._weights(task) for task, _, _ in slices]
        if hidden.dtype != weights[0][0].dtype and not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(weights[0][0].dtype)
        hidden = F.dropout(hidden, self.dropout, layer.training)
        return output + _products(hidden, [(start, stop) for _, start, stop in slices], weights).to(output.dtype)

    def pairs(self, task: str) -> list[LowRank]:
        """Return the pairs whose products a task's rows get."""
        return [pair for pair in (self.own.get(task), self.shared) if pair is not None]

    def _weights(self, task: str) -> tuple[Tensor, Tensor]:
        """Return `[r, in]` and, scaled, `[out, r]` for a task; with a shared pair r is the sum of both ranks.

        The sum of two products is one product of a larger rank, so the shared pair costs no pass over the rows.
        """
        downs, ups = zip(*((pair.lora_A, pair.scaling * pair.lora_B) for pair in self.pairs(task)), strict=True)
        return (torch.cat(downs), torch.cat(ups, 1)) if len(downs) > 1 else (downs[0], ups[0])


def _products(hidden: Tensor, slices: Sequence[tuple[int, int]], weights: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return `up @ down @ row` for each row, with the matrices of its slice, `[rows, ..., out]`.

    Slices of equal size are one batched product, which saves launches; others follow one after the other. Joining
    the matrices of all tasks into one product and masking what is not a row's own was no faster on a CPU, and its
    cost grows with their number.
    """
    if len(slices) == 1:
        down, up = weights[0]
        return F.linear(F.linear(hidden, down), up)
    if len({stop - start for start, stop in slices}) == 1:
        down, up = (torch.stack(part).mT for part in zip(*weights, strict=True))  # [T, in, r], [T, r, out]
        parts = hidden.reshape(len(slices), -1, hidden.shape[-1])
        return torch.bmm(torch.bmm(parts, down), up).view(*hidden.shape[:-1], up.shape[-1])
    pairs = zip(slices, weights, strict=True)
    return torch.cat([F.linear(F.linear(hidden[start:stop], down), up) for (start, stop), (down, up) in pairs])


def features(layer: nn.Module) -> tuple[int, int]:
    """Return the widths of input and output of a linear layer."""
    if isinstance(layer, Conv1D):  # GPT-2's linear layer, whose weight is `[in, out]`
        return layer.nx, layer.nf
    assert isinstance(layer, nn.Linear)
    return layer.in_features, layer.out_features


def default_targets(model_type: str) -> list[str] | str:
    """Return the layers that PEFT gives a LoRA in a family of models if nothing is said.

    Raises:
        ValueError: PEFT has no default for the family.
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    if model_type not in DEFAULTS:
        raise ValueError(
            f"PEFT names no layers by default for a backbone of type {model_type!r}; give target_modules, the names "
            "of its linear layers that get a low-rank addition, such as those of queries and values"
        )
    targets = DEFAULTS[model_type]
    return targets if isinstance(targets, str) else list(targets)


def find_targets(backbone: PreTrainedModel, targets: Sequence[str] | str) -> dict[str, nn.Module]:
    """Return the linear layers that are meant, by their names in the backbone, in its order.

    Args:
        backbone: The model.
        targets: Names or ends of names (`query` for `encoder.layer.0.attention.self.query`), or one regular
            expression for whole names, as in PEFT's `target_modules`.

    Raises:
        ValueError: There is no such layer, or it is not linear.
    """
    modules = dict(backbone.named_modules())
    wanted = [targets] if isinstance(targets, str) else targets
    found: set[str] = set()
    for target in wanted:
        end = re.compile(target if isinstance(targets, str) else rf"(.*\.)?{re.escape(target)}")
        matches = {path for path in modules if end.fullmatch(path)}
        if not matches:
            names = {path.rpartition(".")[2] for path, layer in modules.items() if _is_linear(layer)}
            raise ValueError(
                f"target_modules: no layer of {type(backbone).__name__} is named {target!r}; its linear layers are "
                f"named {', '.join(sorted(names))}"
            )
        found |= matches
    for path in found:
        if not _is_linear(modules[path]):
            raise ValueError(
                f"target_modules: {path!r} is a {type(modules[path]).__name__}; only linear layers can be targets"
            )
    return {path: layer for path, layer in modules.items() if path in found}


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.Linear, Conv1D))
