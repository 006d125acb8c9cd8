"""How likely several answers to each prompt are, with the prompt read only once.

To rank K labels, K rows of prompt and label could go through the model; nearly all of that work would be the same
prompt again. Here a prompt is read once, padded on the left as for writing, and its keys and values are repeated for
the answers, which go through the model as one batch of short rows behind it.

Not every model can do that: recurrent ones keep a state in place of keys and values, and cross-stitch units keep
nothing. For these there is no result, and the caller takes the long way.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .backbone import learned_positions
from .generation import language_model
from .heads import IGNORE_INDEX
from .language_head import CausalLanguageHead

if TYPE_CHECKING:
    from .scheme import SharingScheme

__all__ = ["target_scores"]


@torch.no_grad()
def target_scores(
    model: SharingScheme, task: str, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[Sequence[int]]]
) -> Tensor | None:
    """Return the log-likelihood of every target behind its prompt.

    Args:
        model: The model.
        task: A task of type `causal_lm`.
        prompts: B prompts, the ids of one token or more.
        targets: For each prompt K targets, the ids of one token or more.

    Returns:
        `[B, K]`, float32: sums over the tokens of a target; or None where the model keeps no keys and values.
    """
    if not model.keeps_cache or not isinstance(model._head(task), CausalLanguageHead):
        return None
    native: Any = language_model(model, task)
    cache = DynamicCache(config=native.config)
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return None
    device, count = model.device, len(targets[0])
    ids, mask = _pad(prompts, device, left=True)
    answers, asked = _pad([one for row in targets for one in row], device, left=False)
    first, _ = learned_positions(model)
    takes = inspect.signature(native.forward).parameters
    numbered = "position_ids" in takes
    places = {"position_ids": first + (mask.cumsum(1) - 1).clamp(min=0)} if numbered else {}
    last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    read = native(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **places, **last)
    if cache.get_seq_length() != ids.shape[1] + model.reserved_positions:
        return None
    logits = read.logits[:, -1:].repeat_interleave(count, 0)
    mask = mask.repeat_interleave(count, 0)
    shown = answers[:, :-1]  # the last token of a target is predicted, and need not be read
    if shown.shape[1]:
        cache.batch_repeat_interleave(count)
        if numbered:
            places["position_ids"] = first + mask.sum(1, keepdim=True) + torch.arange(shown.shape[1], device=device)
        mask = torch.cat([mask, asked[:, :-1]], dim=1)
        read = native(input_ids=shown, attention_mask=mask, past_key_values=cache, use_cache=True, **places)
        logits = torch.cat([logits, read.logits], dim=1)
    labels = answers.masked_fill(asked == 0, IGNORE_INDEX)
    losses = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORE_INDEX, reduction="none")
    return -losses.sum(1).view(len(prompts), count)


def _pad(rows: Sequence[Sequence[int]], device: torch.device, left: bool) -> tuple[Tensor, Tensor]:
    """Return ids `[B, L]` and their mask; padding is the token 0, which nobody looks at."""
    length = max(map(len, rows))
    ids = torch.zeros((len(rows), length), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(0, len(row))
        ids[number, place] = torch.tensor(row, dtype=torch.long)
        mask[number, place] = 1
    return ids.to(device), mask.to(device)
