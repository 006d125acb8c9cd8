"""Several short rows in one long one, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["plan_packing"]

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
        if longest is not None and top > longest and count < len(lengths):
            continue
        cost = count * top * (1 + top / _ATTENTION_LENGTH)
        if best is None or cost < best[0]:
            best = (cost, sequences)
    assert best is not None
    return [sorted(sequence) for sequence in best[1]]
