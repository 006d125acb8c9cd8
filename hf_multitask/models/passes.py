"""Which rows of a batch go through the encoder together.

A batch groups its rows by task: a task's rows are one slice, described by a [`Segment`]. The slices know the length
of their longest true row, so tweets need not be padded to the length of the news article beside them. On the other
hand every pass of the encoder costs launches and small matrix products. [`plan_passes`] finds the cheapest cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["EncoderPass", "Segment", "cut_rows", "places_in_pass", "plan_passes"]

# What one more pass costs, in tokens that could have been computed instead. On a CPU the encoder is busy from the
# first token; on an accelerator a pass below some thousand tokens waits for its kernel launches.
PASS_COST_IN_TOKENS = {"cpu": 32, "accelerator": 4096}


@dataclass(slots=True)  # made for every task of every batch; not frozen, which would triple its cost
class Segment:
    """The rows of one task in a batch: plain numbers, so that reading them never waits for a device.

    Args:
        start: Index of the first row.
        stop: Index after the last row.
        length: Number of tokens of the longest row, padding not counted.
    """

    start: int
    stop: int
    length: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.stop - self.start


@dataclass(frozen=True)
class EncoderPass:
    """Rows `start:stop`, cut to their first `length` tokens, and the tasks that read the result."""

    start: int
    stop: int
    length: int
    tasks: tuple[str, ...]


def plan_passes(segments: Mapping[str, Segment], cost_in_tokens: int = PASS_COST_IN_TOKENS["cpu"]) -> list[EncoderPass]:
    """Cut a batch into passes of least total cost, `sum(rows * length + cost_in_tokens)`.

    Segments with the same rows (several tasks on one dataset) always share a pass. Neighbouring slices share one
    where padding the shorter to the longer costs less than a pass. The collator puts slices of similar length side
    by side, so only contiguous cuts are tried; dynamic programming finds the best of them.

    Args:
        segments: The slices by task; two slices are equal in their rows or disjoint.
        cost_in_tokens: Cost of one more pass, in tokens.

    Returns:
        The passes in the order of their rows.

    Example:
        >>> news, tweets = Segment(0, 4, 200), Segment(4, 32, 20)
        >>> [(p.start, p.stop, p.length) for p in plan_passes({"news": news, "tweets": tweets})]
        [(0, 4, 200), (4, 32, 20)]
        >>> [(p.start, p.stop, p.length) for p in plan_passes({"news": news, "tweets": tweets}, 10_000)]
        [(0, 32, 200)]
    """
    slices: dict[tuple[int, int], tuple[int, list[str]]] = {}
    for task, segment in segments.items():
        length, names = slices.get((segment.start, segment.stop), (0, []))
        slices[segment.start, segment.stop] = (max(length, segment.length), [*names, task])
    ordered = sorted(slices.items())
    # best[j]: (cost of the cheapest plan of the first j slices, where its last pass begins)
    best: list[tuple[int, int]] = [(0, 0)]
    for stop in range(1, len(ordered) + 1):
        candidates = []
        rows = longest = 0
        for begin in range(stop - 1, -1, -1):
            (start_row, stop_row), (length, _) = ordered[begin]
            rows += stop_row - start_row
            longest = max(longest, length)
            candidates.append((best[begin][0] + rows * longest + cost_in_tokens, begin))
        best.append(min(candidates))
    passes: list[EncoderPass] = []
    stop = len(ordered)
    while stop > 0:
        begin = best[stop][1]
        group = ordered[begin:stop]
        tasks = tuple(task for _, (_, names) in group for task in names)
        passes.append(EncoderPass(group[0][0][0], group[-1][0][1], max(length for _, (length, _) in group), tasks))
        stop = begin
    return passes[::-1]


def cut_rows(tensors: Mapping[str, Any], part: EncoderPass | Segment) -> dict[str, Any]:
    """Return views of some rows of tensors, cut to their first tokens; what is None is left out.

    Args:
        tensors: By name, `[B, L, ...]`, or `[B]` for a number of each row.
        part: Which rows, and how many tokens.
    """
    views: dict[str, Any] = {}
    for key, value in tensors.items():
        if value is None:
            continue
        views[key] = value[part.start : part.stop]
        if value.dim() > 1 and value.shape[1] != part.length:
            views[key] = views[key][:, : part.length]
    return views


def places_in_pass(places: Tensor, length: int, cut_to: int) -> Tensor:
    """Return places `row * length + token` as they are counted in rows that are cut to fewer tokens."""
    if length == cut_to:
        return places
    rows = torch.div(places, length, rounding_mode="floor")
    return places - rows * (length - cut_to)
