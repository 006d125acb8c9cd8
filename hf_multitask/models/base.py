"""The common part of every sharing scheme: the forward contract and the loss.

A scheme says how parameters are shared. It implements `encode` and names its shared and its per-task parameters;
everything else (which rows go through the encoder together, heads, losses) is here.

The loss of a batch (or, when the trainer passes `num_items`, of the window the batch belongs to) is

    L_t = (sum of the item losses of task t) / N_t        L = sum over t of share_t * weight_t * L_t

with `N_t` the task's items (rows, or labelled tokens) and `share_t` its fraction of the rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from .construction import ConstructedModel
from .heads import TaskHead
from .language_head import LanguageHead
from .output import MultiTaskOutput, task_losses
from .passes import PASS_COST_IN_TOKENS, EncoderPass, Segment, cut_rows, places_in_pass, plan_passes
from .rows import RowTasks
from .seq2seq_head import Seq2SeqHead

__all__ = ["MultiTaskModel", "MultiTaskOutput"]


class MultiTaskModel(ConstructedModel):
    """Abstract base of the sharing schemes: the forward contract.

    What a scheme implements is in [`hf_multitask.models.scheme.SharingScheme`], how models are made and loaded in
    [`hf_multitask.models.construction.ConstructedModel`].
    """

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
        label_positions: Mapping[str, Tensor] | None = None,
        packed: bool = False,
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
                is not auxiliary is computed for all rows, from one pass: the way to serve. `seq2seq_lm` has logits
                where it has labels only: without a target there is nothing to predict, see [`generate`].
            labels: Per task, the labels of its rows only (see its head). For tasks over the vocabulary `[rows, L]`, the
                ids that `masked_lm` is to find, or the ids of the text itself for `causal_lm`; -100 where nothing is
                predicted. For `seq2seq_lm` `[rows, K]`, the ids of the targets.
            label_positions: Per task over the vocabulary, `[rows', K]`: its labels are `[rows', K]` too, and each is
                predicted at the token `row * L + token` of the task's rows. So rows' may be more rows than the batch
                has, where several stand in one. Per `multiple_choice` task `[examples, C]`, the first token of the row
                of each choice, below 0 where an example has fewer; without it, each row is scored by itself.
            packed: A row of the batch may hold several texts, one behind the other, and `position_ids` begin anew with
                each. The backbone gets no mask then: decoders tell the texts apart by the positions.
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
        segments = {
            name: segment
            for name, segment in segments.items()
            if not isinstance(self._head(name), Seq2SeqHead) or (labels and name in labels)
        }
        if not segments:
            raise ValueError("segments is empty: no task has rows (and labels, which seq2seq_lm needs)")
        positions = label_positions or {}
        if labels:
            labels = {
                name: head.align(value)
                if isinstance(head := self._head(name), LanguageHead) and name not in positions
                else value
                for name, value in labels.items()
            }
        cost = PASS_COST_IN_TOKENS["cpu" if main.device.type == "cpu" else "accelerator"]
        encoded: Any = None
        own_rows: dict[str, tuple[Any, ...]] = {}
        for part in self._plan(segments, whole, cost, single_pass or wants_internals):
            inputs = cut_rows(tensors, part)
            mask = inputs.get("attention_mask")
            if packed:
                inputs.pop("attention_mask", None)
                inputs["use_cache"] = False  # with a cache decoders do not look for texts in the positions
            with self.rows.use(self._rows_of(part, segments, mask, main.device)):
                encoded = self.encode(**inputs, **extras)
            for name in part.tasks:
                own = slice(segments[name].start - part.start, segments[name].stop - part.start)
                hidden = encoded.last_hidden_state[own]
                own_rows[name] = hidden, None if mask is None else mask[own]
                if isinstance(self.heads[name], Seq2SeqHead):
                    own_rows[name] += (*self._shared_in_head(name), cast(Mapping[str, Tensor], labels)[name])
                    continue
                if gradient_scales is not None and hidden.requires_grad:
                    hidden.register_hook(partial(torch.mul, gradient_scales[name]))
                if isinstance(self.heads[name], LanguageHead):
                    table = self.vocabulary(name)
                    if gradient_scales is not None and table.requires_grad:
                        table = table.view_as(table)
                        table.register_hook(partial(torch.mul, gradient_scales[name]))
                    own_rows[name] += (table,)
                if name in positions:
                    own_rows[name] += (places_in_pass(positions[name], length, part.length),)
        logits, idle = self._run_heads(own_rows, bool(labels) and run_every_head)
        logits = {name: logits[name] for name in segments}
        for name in logits:  # all that such a head computes with is shared
            if gradient_scales is not None and isinstance(self.heads[name], Seq2SeqHead) and logits[name].requires_grad:
                logits[name].register_hook(partial(torch.mul, gradient_scales[name]))
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

    def _shared_in_head(self, name: str) -> tuple[Any, ...]:
        """Return what a task's head is handed beside hidden states: what is no part of it, and is shared."""
        if not isinstance(self.heads[name], LanguageHead):
            return ()
        table = self.vocabulary(name)
        return (table, self.backbone) if isinstance(self.heads[name], Seq2SeqHead) else (table,)

    def _run_heads(
        self, own_rows: Mapping[str, tuple[Any, ...]], every: bool
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
        seen = cast(Tensor, next(iter(own_rows.values()))[0])
        token = torch.zeros_like(seen[:1, :1], requires_grad=torch.is_grad_enabled())
        for name, head in self.heads.items():
            if name in own_rows:
                logits[name] = head(*own_rows[name])
            else:
                idle.append(0.0 * head(token, None, *self._shared_in_head(name)).float().sum())
                other = self.idle_term(name)
                idle += [] if other is None else [other]
        return logits, torch.stack(idle).sum() if idle else None
