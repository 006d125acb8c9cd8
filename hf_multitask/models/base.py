"""The common part of every sharing scheme: configuration, loading, the forward contract and the loss.

A scheme says how parameters are shared. It implements `encode` and names its shared and its per-task parameters;
everything else (which rows go through the encoder together, heads, losses, saving and loading) is here.

The loss of a batch (or, when the trainer passes `num_items`, of the window the batch belongs to) is

    L_t = (sum of the item losses of task t) / N_t        L = sum over t of share_t * weight_t * L_t

with `N_t` the task's items (rows, or labelled tokens) and `share_t` its fraction of the rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from .backbone import align_memory, backbone_options, cast_parameters, default_pooling, load_backbone
from .configuration import MultiTaskConfig
from .heads import TaskHead, make_head
from .output import MultiTaskOutput, task_losses
from .passes import PASS_COST_IN_TOKENS, EncoderPass, Segment, cut_rows, plan_passes
from .rows import CurrentRows, RowTasks
from .scheme import SharingScheme
from .task import Task, check_tasks, closest

__all__ = ["MultiTaskModel", "MultiTaskOutput"]


class MultiTaskModel(SharingScheme):
    """Abstract base of the sharing schemes: construction, loading, and the forward contract.

    What a scheme implements is in [`SharingScheme`].
    """

    config_class: type[MultiTaskConfig] = MultiTaskConfig
    # Empty on purpose: a prefix would make `from_pretrained` read the backbone's configuration as ours.
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # The backbone has the last word; PreTrainedModel only asks whether the wrapper stands in the way.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # The loss is normalised by `num_items`, not by Trainer's keyword arguments.
    accepts_loss_kwargs: ClassVar[bool] = False

    def __init__(self, config: MultiTaskConfig, backbone: PreTrainedModel | None = None) -> None:
        """Build the model; `backbone` is used as it is, without it one is made from the configuration."""
        super().__init__(config)
        self.tasks: list[Task] = check_tasks(config.get_tasks())
        if backbone is None:
            options = backbone_options(type(config.backbone_config))
            backbone = AutoModel.from_config(config.backbone_config, **options)
        self.backbone = backbone
        self.rows = CurrentRows()
        pooling = config.pooling or default_pooling(config.backbone_config)
        width = config.get_text_config().hidden_size
        self.heads = nn.ModuleDict(
            {
                task.name: make_head(task, width, pooling, config.head_dropout, config.backbone_config)
                for task in self.tasks
            }
        )

    @classmethod
    def from_backbone(
        cls,
        backbone: str | PreTrainedModel,
        tasks: Iterable[Task | dict[str, Any]],
        *,
        backbone_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> MultiTaskModel:
        """Make a multi-task model over a pretrained backbone, with freshly initialised heads.

        Args:
            backbone: A Hub id or folder for `AutoModel.from_pretrained`, or a model in memory, which is copied.
            tasks: The tasks, in order.
            backbone_kwargs: Arguments for `AutoModel.from_pretrained` (`dtype`, `attn_implementation`, ...).
            **options: Fields of the scheme's configuration (`pooling`, `head_dropout`, ...).

        Raises:
            ValueError: A task, an option or the backbone does not fit.

        Example:
            >>> from transformers import BertConfig, BertModel
            >>> bert = BertModel(BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
            >>> from hf_multitask import HardSharingModel
            >>> HardSharingModel.from_backbone(bert, [Task("score", "regression")]).tasks[0].name
            'score'
        """
        tasks = check_tasks(tasks)
        for option in options:
            if option not in cls.options():
                raise ValueError(
                    f"{cls.__name__} has no option {option!r}{closest(option, cls.options())}; "
                    f"options are {', '.join(cls.options())}"
                )
        model = load_backbone(backbone, **(backbone_kwargs or {}))
        config = cls.config_class(
            backbone_config=model.config,
            tasks=[task.to_dict() for task in tasks],
            # Said here because a configuration hands its own setting, None by default, to those inside it.
            **{"attn_implementation": model.config._attn_implementation, **options},
            **cls.describe_backbone(backbone, model),
        )
        wrapped = cls(config, model)
        wrapped.config.dtype = model.dtype
        cast_parameters(wrapped, model.dtype)
        return wrapped.eval()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a saved model; arguments and result are those of `PreTrainedModel.from_pretrained`."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        align_memory(model)
        model.freeze_backbone()
        return loaded

    @classmethod
    def options(cls) -> list[str]:
        """Return the options of `from_backbone`: the fields that the scheme's configuration adds to the common ones."""
        common = {field.name for field in fields(PreTrainedConfig)} | {"backbone_config", "tasks"}
        return [field.name for field in fields(cls.config_class) if field.name not in common]

    # ---- the common forward ----

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        task_ids: Tensor | None = None,
        segments: Mapping[str, Segment] | None = None,
        labels: Mapping[str, Tensor] | None = None,
        num_items: Mapping[str, int | Tensor] | None = None,
        num_tokens: int | Tensor | None = None,
        loss_weights: Mapping[str, float] | None = None,
        gradient_scales: Mapping[str, float] | None = None,
        penalty_scale: float = 1.0,
        single_pass: bool = False,
        run_every_head: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> MultiTaskOutput | tuple:
        """Compute the tasks' logits and, with labels, their losses.

        Args:
            input_ids: `[B, L]` token ids (or `inputs_embeds`, `[B, L, H]`).
            attention_mask: `[B, L]`, 1 for real tokens.
            token_type_ids: `[B, L]`, for backbones that take them.
            position_ids: `[B, L]`, for backbones that take them.
            inputs_embeds: `[B, L, H]` in place of `input_ids`.
            task_ids: `[B]`, index of the task of each row, as the collator gives it. Not read here: the segments say
                the same in plain numbers.
            segments: Which rows belong to which task. Padding must then be on the right. Without it every task that
                is not auxiliary is computed for all rows, from one pass: the way to serve.
            labels: Per task, the labels of its rows only.
            num_items: Per task, the number of items its summed loss is divided by (default: those in this batch).
            num_tokens: What sums over tokens in `regularization` are divided by (default: the tokens in this batch).
            loss_weights: Per task, what its loss is multiplied with in `loss` (default: its share of the rows times
                its weight).
            gradient_scales: Per task, what its gradient is multiplied with where it goes from its head into the shared
                parameters; the head's own stays as it is.
            penalty_scale: What the scheme's penalty on its parameters is multiplied with: of the micro-batches and
                processes of an optimizer step one should have it.
            single_pass: Take one pass of the encoder, however the segments lie. Processes that hold a shard each of
                the parameters gather them in every pass, so all must make the same number.
            run_every_head: With labels, let the heads of tasks without rows take part in the loss, with a term of 0.
                Processes that add up gradients wait for all of them.
            output_hidden_states: Return the backbone's hidden states; forces a single pass.
            output_attentions: Return the backbone's attentions; forces a single pass.
            return_dict: False for a tuple.

        Returns:
            [`MultiTaskOutput`], or a tuple of its fields that are set.
        """
        main = input_ids if input_ids is not None else inputs_embeds
        if main is None:
            raise ValueError("forward needs input_ids or inputs_embeds")
        rows, length = main.shape[:2]
        whole = Segment(0, rows, length)
        tensors = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        internals = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        # None stays unsaid, so that the configuration's own setting holds.
        extras: dict[str, Any] = {key: value for key, value in internals.items() if value is not None}
        wants_internals = any(extras.get(key, getattr(self.config, key, False)) for key in internals)
        if segments is None:
            segments = {
                task.name: whole for task in self.tasks if not task.auxiliary or (labels and task.name in labels)
            }
        if not segments:
            raise ValueError("segments is empty")
        for name in segments:
            self._head(name)
        cost = PASS_COST_IN_TOKENS["cpu" if main.device.type == "cpu" else "accelerator"]
        encoded: Any = None
        own_rows: dict[str, tuple[Tensor, Tensor | None]] = {}
        for part in self._plan(segments, whole, cost, single_pass or wants_internals):
            inputs = cut_rows(tensors, part)
            mask = inputs.get("attention_mask")
            with self.rows.use(self._rows_of(part, segments, mask, main.device)):
                encoded = self.encode(**inputs, **extras)
            for name in part.tasks:
                own = slice(segments[name].start - part.start, segments[name].stop - part.start)
                hidden = encoded.last_hidden_state[own]
                if gradient_scales is not None and hidden.requires_grad:
                    hidden.register_hook(partial(torch.mul, gradient_scales[name]))
                own_rows[name] = hidden, None if mask is None else mask[own]
        logits, idle = self._run_heads(own_rows, bool(labels) and run_every_head)
        logits = {name: logits[name] for name in segments}
        added = self.pass_losses(num_tokens)  # asked for in any case: it forgets the passes
        penalty = self.penalty() if labels and self.training and penalty_scale else None
        terms = ([] if added is None else [added]) + ([] if penalty is None else [penalty_scale * penalty])
        loss = losses = row_losses = regularization = None
        if labels:
            unknown = [name for name in labels if name not in logits]
            if unknown:
                raise ValueError(f"labels of {unknown} came without their rows; rows came for {list(logits)}")
            heads = cast(Mapping[str, TaskHead], self.heads)
            losses, row_losses = task_losses(heads, logits, labels, num_items)
            loss = self._weigh(losses, row_losses, loss_weights)
            regularization = sum(terms[1:], terms[0]) if terms else None
            for term in (regularization, idle):
                loss = loss if term is None else loss + term
        output = MultiTaskOutput(
            loss=loss,
            task_losses=losses,
            logits=logits,
            row_losses=row_losses,
            regularization=regularization,
            hidden_states=encoded.get("hidden_states"),
            attentions=encoded.get("attentions"),
        )
        return_dict = return_dict if return_dict is not None else self.config.return_dict
        return output if return_dict else output.to_tuple()

    def _plan(
        self, segments: Mapping[str, Segment], whole: Segment, cost_in_tokens: int, single_pass: bool
    ) -> list[EncoderPass]:
        """Return the passes that some segments take."""
        slices = sorted((segment.start, segment.stop) for segment in segments.values())
        side_by_side = all(one[1] == other[0] for one, other in itertools.pairwise(slices))
        if self.one_task_per_pass or not (self.shares_rows or side_by_side):
            return [EncoderPass(s.start, s.stop, s.length, (name,)) for name, s in segments.items()]
        if single_pass:
            return [EncoderPass(whole.start, whole.stop, whole.length, tuple(segments))]
        return plan_passes(segments, cost_in_tokens)

    def _rows_of(
        self, part: EncoderPass, segments: Mapping[str, Segment], mask: Tensor | None, device: torch.device
    ) -> RowTasks:
        """Return whose rows a pass has."""
        slices = [(segments[name].start - part.start, segments[name].stop - part.start, name) for name in part.tasks]
        rows = tuple((name, start, stop) for start, stop, name in sorted(slices))
        if self.shares_rows:
            return RowTasks(rows, None, mask)
        numbers = {task.name: number for number, task in enumerate(self.tasks)}
        ids = torch.zeros(part.stop - part.start, dtype=torch.long, device=device)
        for name, start, stop in rows:
            ids[start:stop] = numbers[name]
        return RowTasks(rows, ids, mask)

    def _weigh(
        self, losses: Mapping[str, Tensor], row_losses: Mapping[str, Tensor], weights: Mapping[str, float] | None
    ) -> Tensor:
        """Return the weighted sum of the tasks' losses."""
        if weights is None:
            total = sum(len(values) for values in row_losses.values())
            weights = {task.name: len(row_losses.get(task.name, ())) / total * task.weight for task in self.tasks}
        return torch.stack([weights[name] * value for name, value in losses.items()]).sum()

    def _run_heads(
        self, own_rows: Mapping[str, tuple[Tensor, Tensor | None]], every: bool
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return the logits of the tasks that have rows, and a 0 that depends on the parameters of all other heads.

        The other heads really run, on one token of zeros, so that it makes no difference how parameters are sharded;
        and all run in the model's order, because some backends add up gradients in the order in which they come.
        """
        if not every:
            return {name: self._head(name)(*rows) for name, rows in own_rows.items()}, None
        logits: dict[str, Tensor] = {}
        idle: list[Tensor] = []
        # Like real rows it wants a gradient: ZeRO-3 fetches parameters where gradients pass by.
        token = torch.zeros_like(next(iter(own_rows.values()))[0][:1, :1], requires_grad=torch.is_grad_enabled())
        for name, head in self.heads.items():
            if name in own_rows:
                logits[name] = head(*own_rows[name])
            else:
                idle.append(0.0 * head(token, None).float().sum())
                other = self.idle_term(name)
                idle += [] if other is None else [other]
        return logits, torch.stack(idle).sum() if idle else None

    # ---- PreTrainedModel's contracts ----

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, every_n_layers: int = 1
    ) -> None:
        """Set how layers are computed again in the backward pass: with the rows of the pass they belong to."""
        super()._set_gradient_checkpointing(enable, self.rows.carry(gradient_checkpointing_func), every_n_layers)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise the layers of the heads; the backbone initialises its own."""
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        """Return the backbone's input embeddings."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the backbone's input embeddings."""
        self.backbone.set_input_embeddings(value)
