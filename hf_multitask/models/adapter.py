"""Adapters: a low-rank addition per task, and one that all tasks share, on a frozen backbone."""

from __future__ import annotations

import copy
import math
import re
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.pytorch_utils import Conv1D

from .frozen import FrozenBackboneConfig, FrozenBackboneModel
from .limits import check_pattern
from .low_rank import LowRank, LowRankHook, default_targets, features, find_targets

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["AdapterConfig", "AdapterModel"]

_SHARED = "shared_adapter"


class AdapterConfig(FrozenBackboneConfig):
    """Configuration of an [`AdapterModel`]; see [`FrozenBackboneConfig`] for the other fields.

    Args:
        rank: Rank of each task's own addition; 0 for none, which needs a shared one.
        shared_rank: Rank of the addition that all tasks share; 0 for none.
        lora_alpha: A task's product is multiplied with `lora_alpha / rank`. Default: `2 * rank`, so that the factor is
            2 whatever the rank, and a learning rate found for one rank serves for others.
        shared_alpha: The same for the shared addition. Default: `2 * shared_rank`.
        lora_dropout: Probability with which an element of the products' input is 0 in training.
        target_modules: The linear layers that get additions, by the ends of their names, or a regular expression for
            whole names; both as in PEFT. Default: what PEFT takes for the backbone's family; the model writes down
            what that was.
    """

    model_type = "hf_multitask_adapter"

    rank: int = 8
    shared_rank: int = 0
    lora_alpha: int | float | None = None
    shared_alpha: int | float | None = None
    lora_dropout: float = 0.0
    target_modules: list[str] | str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the options."""
        super().__post_init__(**kwargs)
        if not isinstance(self.rank, int) or self.rank < 0:
            raise ValueError(
                f"rank must be a whole number, 0 for a shared adapter alone or the rank of each task's own, "
                f"got {self.rank!r}"
            )
        if not isinstance(self.shared_rank, int) or self.shared_rank < 0:
            raise ValueError(
                f"shared_rank must be a whole number, 0 for no shared adapter or the rank of one, "
                f"got {self.shared_rank!r}"
            )
        if self.rank == 0 == self.shared_rank:
            raise ValueError("rank=0 and shared_rank=0 leave no adapter; give one of them a rank of at least 1")
        if self.rank == 0 and self.lora_alpha is not None:
            raise ValueError(
                f"lora_alpha={self.lora_alpha!r} is for the tasks' own adapters, which rank=0 leaves out; give "
                "shared_alpha for the shared one"
            )
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout must lie in [0, 1), got {self.lora_dropout!r}")
        for option, alpha in (("lora_alpha", self.lora_alpha), ("shared_alpha", self.shared_alpha)):
            if alpha is not None and not alpha > 0:
                raise ValueError(f"{option} must be above 0, got {alpha!r}")
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("target_modules is empty; name at least one linear layer, or leave it out")
        if isinstance(self.target_modules, str):
            check_pattern(self.target_modules, "target_modules")

    def rank_and_alpha(self, shared: bool) -> tuple[int, int | float]:
        """Return rank and alpha of the shared addition or of a task's own."""
        rank, alpha = (self.shared_rank, self.shared_alpha) if shared else (self.rank, self.lora_alpha)
        return rank, 2 * rank if alpha is None else alpha


class AdapterModel(FrozenBackboneModel):
    """A frozen backbone, whose linear layers `W` add to the rows of task t the products of thin matrices.

        W x + lora_alpha / rank * B_t A_t x + shared_alpha / shared_rank * B A x

    The first product is a LoRA (Hu et al. 2022) of the task's own. The second, there if `shared_rank` is above 0, is
    trained by all tasks, so that what they have in common is learned once: the split of MTL-LoRA (Yang et al. 2024).
    MTL-LoRA also mixes several shared `B` by task and puts a matrix between a task's `A` and `B`; this is the plain
    sum, which PEFT can read. `A` starts at random as in PEFT, `B` at 0: the model starts equal to its backbone.

    With `rank=0` there is the shared addition alone: one LoRA that all tasks train, and a head for each, the usual way
    to train a mixture of tasks with PEFT. Rows that feed several tasks then need one pass, and the model can go on as
    hard sharing (`to_scheme("hard")`), with the addition merged into the backbone.

    The rows of all tasks go through the backbone in one pass, in training too. Rows that feed several tasks take a pass
    for each if tasks have additions of their own, as does serving without segments. The additions have the backbone's
    dtype; to train the additions of a bfloat16 backbone in float32, set `model.adapters.float()` and
    `model.shared_adapter.float()`, or load it in float32 and train under autocast.

    A saved folder has each task's addition in `adapters/<task>`, the shared one in `shared_adapter`, and PEFT reads
    both. Under PEFT a task's rows need both active: `base_model.set_adapter([task, "shared"])`.

    Example:
        >>> from transformers import BertConfig
        >>> config = AdapterConfig(
        ...     backbone_config=BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2),
        ...     tasks=[{"name": "score", "type": "regression"}],
        ...     rank=4,
        ... )
        >>> model = AdapterModel(config)
        >>> sum(parameter.numel() for parameter in model.adapters.parameters())  # query and value: 2 * (4 + 4) * 32
        512
    """

    config_class = AdapterConfig
    config: AdapterConfig
    shared_adapter: nn.ModuleDict | None

    def __init__(self, config: AdapterConfig, backbone: PreTrainedModel | None = None) -> None:
        """Build backbone, heads and adapters.

        Raises:
            ValueError: `target_modules` does not fit the backbone, or is left out where PEFT has no default.
        """
        super().__init__(config, backbone)
        if config.target_modules is None:
            # Written down, since another version of PEFT may have other defaults.
            config.target_modules = default_targets(self.backbone.config.model_type)
        targets = find_targets(self.backbone, config.target_modules)
        # Names of modules hold no dots.
        self._paths = {path.replace(".", "/"): path for path in targets}
        owners = self.tasks if config.rank else []
        self.adapters = nn.ModuleDict({task.name: self._adapter(targets, shared=False) for task in owners})
        self.shared_adapter = self._adapter(targets, shared=True) if config.shared_rank else None
        for key, path in self._paths.items():
            own = {task: cast(LowRank, adapter[key]) for task, adapter in self._task_adapters()}
            shared = None if self.shared_adapter is None else cast(LowRank, self.shared_adapter[key])
            targets[path].register_forward_hook(LowRankHook(path, self.rows, own, shared, config.lora_dropout))
        self.post_init()

    def _adapter(self, targets: dict[str, nn.Module], shared: bool) -> nn.ModuleDict:
        rank, alpha = self.config.rank_and_alpha(shared)
        pairs = {key: LowRank(*features(targets[path]), rank, alpha) for key, path in self._paths.items()}
        return nn.ModuleDict(pairs)

    def _task_adapters(self) -> list[tuple[str, nn.ModuleDict]]:
        return [(task, cast(nn.ModuleDict, adapter)) for task, adapter in self.adapters.items()]

    @property
    def shares_rows(self) -> bool:
        """Whether rows that feed several tasks need only one pass: not where each task has an adapter of its own."""
        return not self.config.rank

    def task_modules(self, name: str) -> list[nn.Module]:
        """Return a task's head and its own adapter, if it has one."""
        return [self._head(name), *([self.adapters[name]] if self.config.rank else [])]

    def encode(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Run the backbone on some rows; the hooks of its layers add what is their tasks'."""
        return self.run_backbone(self.backbone, input_ids, attention_mask=attention_mask, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise heads and adapters."""
        super()._init_weights(module)
        if isinstance(module, LowRank):
            init.kaiming_uniform_(module.lora_A, a=math.sqrt(5))
            init.zeros_(module.lora_B)

    # ---- saving and exporting ----

    def adapter_tensors(self) -> dict[str, dict[str, str]]:
        """Return, by folder in a saved model, the names of our tensors and of the same tensors in PEFT's file."""
        parts = {f"adapters/{task}": f"adapters.{task}" for task, _ in self._task_adapters()}
        if self.shared_adapter is not None:
            parts[_SHARED] = _SHARED
        _, holder = self.peft_layout()
        return {
            folder: {
                f"{prefix}.{key}.{matrix}": f"base_model.model.{holder}{path}.{matrix}.weight"
                for key, path in self._paths.items()
                for matrix in ("lora_A", "lora_B")
            }
            for folder, prefix in parts.items()
        }

    def adapter_config(self, folder: str) -> PeftConfig:
        """Return PEFT's configuration for one of the folders."""
        from peft import LoraConfig

        rank, alpha = self.config.rank_and_alpha(folder == _SHARED)
        task_type, holder = self.peft_layout()
        targets = self.config.target_modules
        return LoraConfig(
            task_type=task_type,
            r=rank,
            lora_alpha=cast(int, alpha),
            lora_dropout=self.config.lora_dropout,
            # A regular expression is for the whole name.
            target_modules=f"{re.escape(holder)}(?:{targets})" if isinstance(targets, str) and holder else targets,
            fan_in_fan_out=any(isinstance(self.backbone.get_submodule(path), Conv1D) for path in self._paths.values()),
        )

    @torch.no_grad()
    def merge_task(self, name: str) -> PreTrainedModel:
        """Return a copy of the backbone whose weights hold what a task (and what all tasks) add to them.

        Its hidden states are those that the task's head gets here, without the cost of the additions.

        Args:
            name: The task.

        Raises:
            ValueError: There is no such task, or a target's weight is not a plain matrix (it is quantised).
        """
        self._head(name)
        merged = copy.deepcopy(self.backbone)
        if merged.is_activation_checkpointing:
            merged.activation_checkpointing_disable()
        for path in self._paths.values():
            layer = merged.get_submodule(path)
            for key, hook in list(layer._forward_hooks.items()):
                if isinstance(hook, LowRankHook):
                    self._merge(path, layer, hook.pairs(name))
                    del layer._forward_hooks[key]
        return merged.requires_grad_(True).eval()

    def merged_backbone(self) -> PreTrainedModel:
        """Return the backbone with the shared addition in its weights, as a copy.

        Raises:
            ValueError: Tasks have additions of their own.
        """
        return super().merged_backbone() if self.config.rank else self.merge_task(self.tasks[0].name)

    def task_backbone(self, name: str) -> PreTrainedModel:
        """Return [`merge_task`]: the plain backbone that encodes texts as this model does for one task."""
        return self.merge_task(name)

    @staticmethod
    def _merge(path: str, layer: nn.Module, pairs: list[LowRank]) -> None:
        weight = cast(Tensor, layer.weight)
        difference = torch.stack([pair.difference() for pair in pairs]).sum(0)
        if isinstance(layer, Conv1D):
            difference = difference.T
        if weight.shape != difference.shape or not weight.is_floating_point():
            raise ValueError(
                f"{path!r} cannot take a low-rank product into its weight, {list(weight.shape)} in {weight.dtype}; "
                "load the backbone without quantisation"
            )
        weight.copy_(weight.to(difference.dtype) + difference)
