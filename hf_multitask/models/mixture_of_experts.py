"""Mixture of experts: in some layers each token goes through the few experts that a router chooses for it.

**Losses of the router.** Two terms keep the router from sending everything to one expert and from ever larger logits.
Over the real tokens of a window (N of them), averaged over the expert layers,

    L = load_balancing_weight * E * sum_e f_e P_e  +  router_z_weight * mean of logsumexp(logits)^2

with P_e the mean probability of expert e and f_e the fraction of token-slots that it gets (Fedus et al. 2022, "Switch
Transformers"; Zoph et al. 2022, "ST-MoE"). Usually f_e is that of the same micro-batch. This makes the loss depend on
how a window is cut, and asks every micro-batch for balance; texts of one kind must then be spread over all experts, and
experts cannot specialise (Qiu et al. 2025, "Demons in the Detail", who balance over the global batch instead). For
several tasks the same holds of balance per task. Here f_e is a running mean over earlier windows, all processes' and
all tasks' rows together: it moves by `usage_momentum` towards what the last window did, stands in the buffer `usage`,
and is saved with the model. So both terms are sums over tokens, and equal however the window is cut.

Both terms see the router's input detached: their gradient ends at the router, and the tasks' gradients on everything
else are those of their losses alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import logging

from .base import MultiTaskModel
from .configuration import MultiTaskConfig
from .experts import ExpertLayer, Experts, Router, TaskLogits, replace_block
from .layers import find_layers

__all__ = ["MixtureOfExpertsConfig", "MixtureOfExpertsModel"]

logger = logging.get_logger(__name__)


class MixtureOfExpertsConfig(MultiTaskConfig):
    """Configuration of a [`MixtureOfExpertsModel`].

    Args (beside those of [`MultiTaskConfig`]):
        num_experts: Experts of a layer, E, at least 2.
        experts_per_token: Experts that each token goes through, k, at most E. Compute grows with k, not with E.
        expert_layers: Numbers of the layers that get experts, from 0; None takes every second: 1, 3, 5, ...
        router_noise: Standard deviation of the Gaussian noise that router logits get in training.
        router_task_embedding: Whether the task of a row is an input of the router: each task then has logits of its
            own, a parameter `[E]` per expert layer, which starts at 0. A row that feeds several tasks then takes a
            pass for each.
        load_balancing_weight: Weight of the load balancing loss.
        router_z_weight: Weight of the router z-loss.
        router_init_std: Standard deviation of the router's initial weights.
        usage_momentum: How far the mean usage of experts, which load balancing weighs them with, moves towards that of
            each window, in (0, 1].
    """

    model_type = "hf_multitask_mixture_of_experts"

    num_experts: int = 8
    experts_per_token: int = 2
    expert_layers: list[int] | None = None
    router_noise: float = 0.1
    router_task_embedding: bool = False
    load_balancing_weight: float = 0.01
    router_z_weight: float = 0.001
    router_init_std: float = 0.02
    usage_momentum: float = 0.1

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the fields that do not depend on the backbone."""
        super().__post_init__(**kwargs)
        if self.num_experts < 2:
            raise ValueError(f"num_experts must be at least 2, got {self.num_experts!r}")
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token must lie in 1 ... num_experts = {self.num_experts}, got {self.experts_per_token!r}"
            )
        for name in ("router_noise", "load_balancing_weight", "router_z_weight", "router_init_std"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a number of at least 0, got {getattr(self, name)!r}")
        if not 0 < self.usage_momentum <= 1:
            raise ValueError(f"usage_momentum must lie in (0, 1], got {self.usage_momentum!r}")
        if self.expert_layers is not None:
            self.expert_layers = list(self.expert_layers)
            if not self.expert_layers or len(set(self.expert_layers)) < len(self.expert_layers):
                raise ValueError(f"expert_layers must be numbers of layers, each once, got {self.expert_layers!r}")

    def chosen_layers(self, depth: int) -> list[int]:
        """Return the numbers of the layers that get experts, of a backbone of some depth."""
        numbers = list(range(1, depth, 2)) if self.expert_layers is None else sorted(self.expert_layers)
        missing = [number for number in numbers if number not in range(depth)]
        if missing:
            raise ValueError(f"expert_layers: no layers {missing}; the backbone has the layers 0 ... {depth - 1}")
        if not numbers:
            raise ValueError("expert_layers: every second layer of a backbone of one layer is none; give [0]")
        return numbers


class MixtureOfExpertsModel(MultiTaskModel):
    """One backbone for all tasks, whose feed-forward blocks are experts in some layers, and a head for each task.

    Experts are copies of the pretrained block (sparse upcycling, Komatsuzaki et al. 2023, "Sparse upcycling: training
    mixture-of-experts from dense checkpoints"), so the model starts where the backbone is. It has the parameters of a
    larger model at nearly the cost of the dense one, and tasks or kinds of text may part inside it without being told
    where; whether they did, [`hf_multitask.routing`] shows. All experts are shared; only heads, and the router's task
    embeddings, belong to a task.

    Experts are computed as `set_experts_implementation` says: `grouped_mm` (default), `batched_mm` or `eager`.

    Example:
        >>> from transformers import BertConfig
        >>> config = MixtureOfExpertsConfig(
        ...     backbone_config=BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2),
        ...     tasks=[{"name": "score", "type": "regression"}],
        ...     num_experts=4,
        ... )
        >>> model = MixtureOfExpertsModel(config)
        >>> [name for name, _ in model.expert_layers()]
        ['layer_1']
    """

    config_class = MixtureOfExpertsConfig
    supports_packing = False
    config: MixtureOfExpertsConfig
    _keep_in_fp32_modules_strict = {"usage"}

    def __init__(self, config: MixtureOfExpertsConfig, backbone: PreTrainedModel | None = None) -> None:
        """Build backbone and heads, and replace the blocks of the chosen layers by experts that are copies of them.

        Raises:
            ValueError: The family of the backbone is not known, or a layer does not exist.
        """
        # A dense backbone refuses an implementation of experts, which a configuration hands to those inside it.
        config.backbone_config._experts_implementation = None
        super().__init__(config, backbone)
        layers = find_layers(self.backbone)
        for number in config.chosen_layers(len(layers)):
            replace_block(self.backbone, layers[number], self._make_layer)
        self._numbers = config.chosen_layers(len(layers))
        self.register_forward_pre_hook(_forget_passes)
        self.post_init()

    def _make_layer(self, first: list[nn.Linear], second: nn.Linear, *options: Any, **more: Any) -> ExpertLayer:
        config = self.config
        tasks = [task.name for task in self.tasks] if config.router_task_embedding else []
        weight = first[0].weight
        router = Router(config.num_experts, config.experts_per_token, config.router_noise, tasks, weight)
        experts = Experts(config, config.num_experts, first, second, *options, **more)
        if weight.device.type != "meta":
            experts._is_hf_initialized = True  # type: ignore[assignment]  # copies: post_init must leave them alone
        return ExpertLayer(router, experts, self.rows, bool(config.load_balancing_weight or config.router_z_weight))

    def expert_layers(self) -> list[tuple[str, ExpertLayer]]:
        """Return the layers with experts, in order, with names: `layer_1`, `layer_3`, ..."""
        found = [module for module in self.backbone.modules() if isinstance(module, ExpertLayer)]
        return [(f"layer_{number}", module) for number, module in zip(self._numbers, found, strict=True)]

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # Transformers looks for its decorator in the source of this module.
        return True

    # ---- the scheme ----

    def encode(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Run the backbone on some rows."""
        return self.run_backbone(self.backbone, input_ids, attention_mask=attention_mask, **kwargs)

    @property
    def shares_rows(self) -> bool:
        """Whether rows that feed several tasks need only one pass: not if the router asks whose rows they are."""
        return not self.config.router_task_embedding

    def task_modules(self, name: str) -> list[nn.Module]:
        """Return a task's head and its embeddings in the routers."""
        modules = super().task_modules(name)
        if self.config.router_task_embedding:
            modules += [layer.router.tasks[name] for _, layer in self.expert_layers()]
        return modules

    def pass_losses(self, num_tokens: int | Tensor | None) -> Tensor | None:
        """Return the routers' losses over the passes since the last call; see the module's text."""
        layers = [layer for _, layer in self.expert_layers()]
        passes = [layer.passes for layer in layers]
        _forget_passes(self)
        if not self.training or not passes[0]:
            return None
        config = self.config
        if num_tokens is None:
            num_tokens = sum(part.tokens for part in passes[0])
        terms = []
        for layer, parts in zip(layers, passes, strict=True):
            probabilities = torch.stack([part.probabilities for part in parts]).sum(0)
            squares = torch.stack([part.squares for part in parts]).sum()
            # A copy: the next window writes into the buffer, maybe before this one's backward pass is through.
            balance = config.num_experts * torch.dot(layer.usage.to(probabilities.dtype, copy=True), probabilities)
            terms.append(config.load_balancing_weight * balance + config.router_z_weight * squares)
        return torch.stack(terms).sum() / (num_tokens * len(layers))

    def forget_passes(self) -> None:
        """Forget which experts the tokens of the passes since the last window went to."""
        for _, layer in self.expert_layers():
            layer.counts, layer.passes = None, []

    @torch.no_grad()
    def finish_window(self) -> None:
        """Let the mean usage of the experts move towards that of this window, over all processes."""
        layers = [layer for _, layer in self.expert_layers()]
        none = torch.zeros_like(layers[0].usage, dtype=torch.long)
        counts = torch.stack([none if layer.counts is None else layer.counts for layer in layers])
        for layer in layers:
            layer.counts = None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(counts)
        total = counts.sum(1, keepdim=True)
        fractions = counts / total.clamp(min=1)
        for layer, fraction, tokens in zip(layers, fractions, total, strict=True):
            moved = layer.usage.lerp(fraction.to(layer.usage.dtype), self.config.usage_momentum)
            layer.usage.copy_(torch.where(tokens > 0, moved, layer.usage))

    def training_logs(self) -> dict[str, float]:
        """Return the mean usage of each layer's busiest expert: 1 / E if all are used alike, 1 if one does it all."""
        layers = self.expert_layers()
        values = torch.stack([layer.usage.max() for _, layer in layers]).tolist()
        return {f"expert_usage_max/{name}": value for (name, _), value in zip(layers, values, strict=True)}

    # ---- PreTrainedModel's contracts ----

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, every_n_layers: int = 1
    ) -> None:
        """Set how layers are computed again: never the reentrant way, whose first run knows no gradients."""
        given = gradient_checkpointing_func.keywords if isinstance(gradient_checkpointing_func, partial) else {}
        if given.get("use_reentrant"):
            logger.warning("use_reentrant=True would cut the routers' losses from their gradients: False is used")
            gradient_checkpointing_func = partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, every_n_layers)

    def initialize_weights(self) -> None:
        """Initialise what is fresh, the routers inside the backbone too, which it would not know how to."""
        for _, layer in self.expert_layers():
            for module in layer.modules():
                self._initialize_weights(module)
        super().initialize_weights()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise routers, experts that a checkpoint lacks, and heads."""
        if isinstance(module, Router):
            init.normal_(module.weight, mean=0.0, std=self.config.router_init_std)
        elif isinstance(module, TaskLogits):
            init.zeros_(module.weight)
        elif isinstance(module, ExpertLayer):
            init.constant_(module.usage, 1 / self.config.num_experts)
        elif isinstance(module, Experts):
            for name, parameter in module.named_parameters():
                init.copy_(parameter, self._fresh(parameter, module.products if name == "gate_up_proj" else 1))
        else:
            super()._init_weights(module)

    def _fresh(self, stacked: Tensor, products: int) -> Tensor:
        """Return copies of what the backbone gives a fresh block, as when the whole model is fresh."""
        if stacked.dim() == 2:
            return torch.zeros_like(stacked)  # biases
        linears = []
        for rows in stacked[0].chunk(products):
            linears.append(nn.Linear(rows.shape[1], rows.shape[0], bias=False, device=rows.device, dtype=rows.dtype))
            self.backbone._initialize_weights(linears[-1])
        return torch.cat([linear.weight for linear in linears]).expand_as(stacked)


def _forget_passes(model: nn.Module, *args: Any) -> None:
    """Forget the passes of layers in training, also of a forward pass that an error ended; others have none."""
    for module in model.modules():
        if isinstance(module, ExpertLayer) and module.passes:
            module.passes = []
