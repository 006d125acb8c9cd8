"""Experts in place of a feed-forward block: the stacked experts, their router, and the layer that joins the two.

A layer's feed-forward block becomes E copies of itself, of which a router chooses k for every token x:

    p = softmax(W x)        y = sum of w_e * expert_e(x) over the k experts e of greatest p

The copies start equal, so whatever the router says, the layer computes what the block did, as long as the weights w
of the chosen experts sum to 1 (sparse upcycling, Komatsuzaki et al. 2023). No expert has a limit to the tokens it
takes, and no token is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import use_experts_implementation

from .rows import CurrentRows, RowTasks

__all__ = ["FAMILIES", "ExpertLayer", "Experts", "PassSums", "Router", "TaskLogits", "replace_block"]

Activation = Callable[[Tensor], Tensor]


@use_experts_implementation
class _DispatchedExperts(nn.Module):
    """Runs what `config._experts_implementation` names: `grouped_mm` and others of Transformers, or `eager`, below."""

    num_experts: int
    products: int
    act_fn: Activation
    # The decorator sets these for a class; `Experts` sets them by the block that it copies.
    has_gate: bool
    has_bias: bool

    def __init__(self, config: Any) -> None:
        super().__init__()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return `[N, H]` of tokens `[N, H]`, the experts `[N, k]` chosen for them, and their weights `[N, k]`."""
        return self._one_by_one(hidden_states, top_k_index, top_k_weights)

    def _one_by_one(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        slots = top_k_index.flatten()
        order = slots.argsort(stable=True)
        counts = torch.bincount(slots, minlength=self.num_experts).tolist()
        parts = hidden_states[order // top_k_index.shape[1]].split(counts)
        first = self._of_each_expert("gate_up_proj" if self.has_gate else "up_proj")
        second = self._of_each_expert("down_proj")
        results = []
        for part, one, other in zip(parts, first, second, strict=True):
            inner = F.linear(part, *one)
            results.append(F.linear(self._apply_gate(inner) if self.has_gate else self.act_fn(inner), *other))
        result = torch.cat(results)[order.argsort()].view(*top_k_index.shape, -1)
        return (result * top_k_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)

    def _of_each_expert(self, name: str) -> Iterable[tuple[Tensor, Tensor | None]]:
        # Taken apart at once: a view per expert would fill a gradient of the full size with zeros for each of them.
        biases = getattr(self, f"{name}_bias").unbind() if self.has_bias else [None] * self.num_experts
        return zip(getattr(self, name).unbind(), biases, strict=True)

    def _apply_gate(self, inner: Tensor) -> Tensor:
        raise NotImplementedError


class Experts(_DispatchedExperts):
    """E copies of a feed-forward block of two products, with an activation or a gate between them.

    Its parameters are `up_proj [E, I, H]` (with a gate `gate_up_proj [E, 2I, H]`, the gate's half first) and
    `down_proj [E, H, I]`; where the block has biases, `[E, I]`, `[E, 2I]` and `[E, H]` by these names with `_bias`.

    Args:
        config: A configuration whose `_experts_implementation` says how the experts are computed.
        num_experts: E.
        first: The block's first product; with a gate two of them, the gate's first, or one that holds both.
        second: Its second product.
        act_fn: The activation.
        dropout: Dropout behind the gate, where the block has one inside.
        gated: Whether the block has a gate.
    """

    def __init__(
        self,
        config: Any,
        num_experts: int,
        first: Sequence[nn.Linear],
        second: nn.Linear,
        act_fn: Activation,
        dropout: float = 0.0,
        gated: bool = False,
    ) -> None:
        super().__init__(config)
        for product in (*first, second):
            if not isinstance(product, nn.Linear):
                raise ValueError(
                    f"experts are copies of a block of plain nn.Linear, got {type(product).__name__}; load the "
                    "backbone without quantization and without adapters"
                )
        self.num_experts, self.act_fn, self.dropout = num_experts, act_fn, dropout
        self.products = len(first)
        self.has_gate, self.has_bias = gated, second.bias is not None
        self._stack("gate_up_proj" if gated else "up_proj", [product.weight for product in first])
        self._stack("down_proj", [second.weight])
        if self.has_bias:
            self._stack("gate_up_proj_bias" if gated else "up_proj_bias", [product.bias for product in first])
            self._stack("down_proj_bias", [second.bias])

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return `[N, H]` of tokens `[N, H]`, the experts `[N, k]` chosen for them, and their weights `[N, k]`."""
        if hidden_states.dtype == torch.float64 and cast(Any, self.config)._experts_implementation == "grouped_mm":
            # There is no grouped product in double precision.
            return self._one_by_one(hidden_states, top_k_index, top_k_weights)
        return super().forward(hidden_states, top_k_index, top_k_weights)

    @torch.no_grad()
    def _stack(self, name: str, parts: Sequence[Tensor]) -> None:
        whole = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
        copies = whole.expand(self.num_experts, *whole.shape).clone(memory_format=torch.contiguous_format)
        self.register_parameter(name, nn.Parameter(copies, requires_grad=parts[0].requires_grad))

    def _apply_gate(self, inner: Tensor) -> Tensor:
        gate, up = inner.chunk(2, dim=-1)
        return F.dropout(self.act_fn(gate) * up, self.dropout, self.training)


class TaskLogits(nn.Module):
    """What one task adds to the router's logits, `[E]`: its column, were the task an input of the router, one-hot."""

    def __init__(self, num_experts: int, like: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, dtype=like.dtype, device=like.device))


class Router(nn.Module):
    """Chooses k of E experts for every token.

    It computes in float32 or wider whatever the model's precision is, since small differences of logits decide (Fedus
    et al. 2022, "Switch Transformers", section 2.4).

    Args:
        num_experts: E.
        experts_per_token: k.
        noise: Standard deviation of the Gaussian noise that logits get in training.
        tasks: Tasks with logits of their own.
        like: A weight `[I, H]` of the block, for its width, dtype and device.
    """

    def __init__(
        self, num_experts: int, experts_per_token: int, noise: float, tasks: Iterable[str], like: Tensor
    ) -> None:
        super().__init__()
        self.top_k, self.noise = experts_per_token, noise
        self.weight = nn.Parameter(torch.zeros(num_experts, like.shape[1], dtype=like.dtype, device=like.device))
        self.tasks = nn.ModuleDict({name: TaskLogits(num_experts, like) for name in tasks})

    def logits(self, hidden: Tensor, rows: RowTasks | None) -> Tensor:
        """Return logits `[rows, L, E]`, without noise, of hidden states `[rows, L, H]`."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            logits = F.linear(hidden.to(dtype), self.weight.to(dtype))
        if not len(self.tasks):
            return logits
        if rows is None:
            raise ValueError("the router asks whose rows it gets: call the multi-task model, not its backbone")
        # Tasks without rows take no part: their parameters get no gradient, not one of zeros.
        own = [
            cast(Tensor, self.tasks[name].weight).to(dtype).expand(stop - start, 1, -1)
            for name, start, stop in rows.slices
        ]
        return logits + (torch.cat(own) if len(own) > 1 else own[0])

    def forward(self, hidden: Tensor, rows: RowTasks | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits `[rows, L, E]`, weights and numbers `[rows, L, k]` of the experts of each token.

        The weights are the probabilities of the chosen experts over their sum. For k = 1 that would be the constant 1,
        from which the router learns nothing. There the weight is p / p.detach(): of value 1, with the gradient of
        log p. Switch Transformers take p itself, which would scale a pretrained block's output by about 1 / E.
        """
        logits = self.logits(hidden, rows)
        if self.training and self.noise:
            logits = logits + self.noise * torch.randn_like(logits)
        weights, index = logits.softmax(-1).topk(self.top_k, dim=-1)
        total = weights.detach() if self.top_k == 1 else weights.sum(-1, keepdim=True)
        return logits, (weights / total).to(hidden.dtype), index


class PassSums(NamedTuple):
    """Sums over the real tokens of one pass.

    Args:
        probabilities: `[E]`, of the router's probabilities.
        squares: Scalar, of the squares of the logits' logsumexp.
        tokens: The number of these tokens.
    """

    probabilities: Tensor
    squares: Tensor
    tokens: int | Tensor


class ExpertLayer(nn.Module):
    """Router and experts, and what the losses of the router are made of; it maps `[rows, L, H]` to `[rows, L, H]`.

    In training it notes, for each pass, sums over real tokens (padding has no part in them): how many token-slots each
    expert got, and [`PassSums`]. The latter come from the router alone: its input is detached and without noise, so
    that their gradient ends at the router's own parameters.

    Args:
        router: The router.
        experts: The experts.
        rows: The model's [`CurrentRows`].
        sum_losses: Whether [`PassSums`] are wanted.
    """

    usage: Tensor

    def __init__(self, router: Router, experts: Experts, rows: CurrentRows, sum_losses: bool) -> None:
        super().__init__()
        self.router, self.experts, self.rows, self.sum_losses = router, experts, rows, sum_losses
        size = experts.num_experts
        self.register_buffer("usage", torch.full((size,), 1 / size, device=router.weight.device))
        self.counts: Tensor | None = None
        self.passes: list[PassSums] = []

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the chosen experts' weighted sum for each token."""
        rows = self.rows.value
        _, weights, index = self.router(hidden, rows)
        if self.training and rows is not None:
            self._note(hidden.detach(), index, rows)
        tokens = hidden.flatten(0, 1), index.flatten(0, 1), weights.flatten(0, 1)
        return self.experts(*tokens).view_as(hidden)

    def _note(self, hidden: Tensor, index: Tensor, rows: RowTasks) -> None:
        real = None if rows.attention_mask is None else rows.attention_mask.unsqueeze(-1)
        if self.sum_losses:
            # Computed in a repetition too: checkpointing wants the same tensors in the same order.
            logits = self.router.logits(hidden, rows)
            values = torch.cat([logits.softmax(-1), logits.logsumexp(-1, keepdim=True).square()], dim=-1)
            sums = (values if real is None else values * real.to(values.dtype)).sum((0, 1))
            tokens = index.shape[0] * index.shape[1] if real is None else real.sum()
            if not rows.repeated:
                self.passes.append(PassSums(sums[:-1], sums[-1], tokens))
        if not rows.repeated:
            chosen = index.unsqueeze(-1) == torch.arange(len(self.usage), device=index.device)
            chosen = chosen.sum(2) if real is None else chosen.sum(2) * (real != 0)
            counts = chosen.sum((0, 1))
            self.counts = counts if self.counts is None else self.counts + counts

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExpertLayer:
        super()._apply(fn, recurse)
        self.usage = self.usage.float()  # a mean that moves by small steps, whatever the model's precision
        return self


# ---- where the families keep their feed-forward blocks ----

Make = Callable[..., ExpertLayer]


def _bert(layer: Any, make: Make) -> None:
    # Both products and the activation move into `intermediate`; dropout, residual and norm stay in `output`.
    block = layer.intermediate
    layer.intermediate = make([block.dense], layer.output.dense, block.intermediate_act_fn)
    layer.output.dense = nn.Identity()
    layer.chunk_size_feed_forward = 0  # the router needs to see which token of which row it gets


def _distilbert(layer: Any, make: Make) -> None:
    block = layer.ffn
    block.lin1 = make([block.lin1], block.lin2, block.activation)
    block.activation, block.lin2 = nn.Identity(), nn.Identity()
    block.chunk_size_feed_forward = 0


def _modernbert(layer: Any, make: Make) -> None:
    block = layer.mlp
    layer.mlp = make([block.Wi], block.Wo, block.act, block.drop.p, gated=True)


def _llama(layer: Any, make: Make) -> None:
    block = layer.mlp
    layer.mlp = make([block.gate_proj, block.up_proj], block.down_proj, block.act_fn, gated=True)


FAMILIES: dict[str, Callable[[Any, Make], None]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _bert),
    "distilbert": _distilbert,
    "modernbert": _modernbert,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _llama),
}
"""By the model type of a backbone: puts an expert layer, which `make` builds, into the place of a layer's block."""


def replace_block(backbone: PreTrainedModel, layer: nn.Module, make: Make) -> ExpertLayer:
    """Replace the feed-forward block of one layer of a backbone, in place.

    Args:
        backbone: The backbone, for its family.
        layer: One of its layers.
        make: Builds the expert layer from `(first products, second product, activation, dropout, gated)`; see
            [`Experts`].

    Raises:
        ValueError: The family is not known.
    """
    kind = backbone.config.model_type
    if kind not in FAMILIES:
        raise ValueError(
            f"backbone {kind!r} cannot be given experts; families whose feed-forward blocks are known: "
            f"{', '.join(FAMILIES)}"
        )
    FAMILIES[kind](layer, make)
    (made,) = (module for module in layer.modules() if isinstance(module, ExpertLayer))
    return made
