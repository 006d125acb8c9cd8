"""Several short rows in one long one, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..models.passes import Segment
from ..models.task import TaskType

__all__ = ["keeps_rows_apart", "plan_packing"]

# In a sequence of this many tokens attention costs about as much as everything else in a layer (the width of small
# decoders is some 500 to 2,000, and the cost of attention per token grows with length / width).
_ATTENTION_LENGTH = 2048


def plan_packing(lengths: Sequence[int], longest: int | None = None) -> list[list[int]]:
    """Put rows into sequences of similar length, so that tokens are few and sequences not too long.

    For every number of sequences that rows can be dealt out to, the longest row goes into the emptiest sequence first
    (LPT scheduling: Graham 1969), and the number of the least cost, `sequences * L * (1 + L / 2048)` with L the longest
    sequence, is taken.

    Args:
        lengths: Tokens of each row.
        longest: Most tokens in a sequence of more than one row; None for no limit.

    Returns:
        For each sequence the numbers of its rows, in rising order; every row is in one of them.

    Example:
        >>> plan_packing([10, 7, 3, 2])
        [[0, 1, 2, 3]]
        >>> plan_packing([10, 7, 3, 2], longest=12)
        [[0, 3], [1, 2]]
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    best: tuple[float, list[list[int]]] | None = None
    for count in range(1, len(lengths) + 1):
        sequences: list[list[int]] = [[] for _ in range(count)]
        filled = [0] * count
        for row in order:
            place = filled.index(min(filled))
            sequences[place].append(row)
            filled[place] += lengths[row]
        top = max(filled)
        together = [tokens for tokens, rows in zip(filled, sequences, strict=True) if len(rows) > 1]
        if longest is not None and max(together, default=0) > longest:
            continue
        cost = count * top * (1 + top / _ATTENTION_LENGTH)
        if best is None or cost < best[0]:
            best = (cost, sequences)
    assert best is not None
    return [sorted(sequence) for sequence in best[1]]


@torch.no_grad()
def keeps_rows_apart(model: Any) -> bool:
    """Return whether a model reads two texts in one row, told apart by their positions, as it reads each by itself.

    Not every family looks for them (those that add distances to their attention do not know positions at all), so it
    is tried, on a few tokens.

    Args:
        model: A multi-task model with a `causal_lm` task.
    """
    task = next(task.name for task in model.tasks if task.type is TaskType.CAUSAL_LM)
    size = model.vocabulary(task).shape[0]
    texts = [torch.arange(start, start + length) % size for start, length in ((size // 2, 5), (size // 3, 4))]
    first, second = (text.unsqueeze(0).to(model.device) for text in texts)
    positions = torch.cat([torch.arange(len(text)) for text in texts]).unsqueeze(0).to(model.device)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        alone = model(input_ids=second, segments={task: Segment(0, 1, 4)}).logits[task].float()
        both = {"input_ids": torch.cat([first, second], 1), "position_ids": positions, "packed": True}
        behind = model(**both, segments={task: Segment(0, 1, 9)}).logits[task][:, 5:].float()
    finally:
        for module, mode in modes:
            module.training = mode
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    return bool((behind - alone).abs().max() <= tolerance * alone.std())
