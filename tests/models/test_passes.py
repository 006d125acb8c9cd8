"""The planner covers each row once, at the least cost of all contiguous cuts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hf_multitask.models.passes import EncoderPass, Segment, plan_passes


def segments_of(seed: int) -> dict[str, Segment]:
    """Return up to six slices in random order; some are read by two tasks, which may know different lengths."""
    draw = np.random.default_rng(seed)
    result, start = {}, 0
    for i in range(draw.integers(1, 7)):
        stop, length = start + int(draw.integers(1, 12)), int(draw.integers(1, 60))
        result[f"t{i}"] = Segment(start, stop, length)
        if draw.random() < 0.3:
            result[f"twin{i}"] = Segment(start, stop, length)
        start = stop
    names = draw.permutation(list(result)).tolist()
    return {name: result[name] for name in names}


def slices_of(segments: dict[str, Segment]) -> list[tuple[int, int, int]]:
    return sorted({(segment.start, segment.stop, segment.length) for segment in segments.values()})


def cost(passes: list[EncoderPass], cost_in_tokens: int) -> int:
    return sum((one.stop - one.start) * one.length + cost_in_tokens for one in passes)


def cheapest(segments: dict[str, Segment], cost_in_tokens: int) -> int:
    """Return the least cost over all ways to cut the slices into runs of neighbours."""
    slices = slices_of(segments)
    costs = []
    for chosen in itertools.product([False, True], repeat=len(slices) - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(chosen) if cut), len(slices)]
        runs = [slices[a:b] for a, b in itertools.pairwise(edges)]
        costs.append(sum((run[-1][1] - run[0][0]) * max(length for *_, length in run) + cost_in_tokens for run in runs))
    return min(costs)


COSTS = [0, 1, 32, 200, 4096]


@pytest.mark.parametrize("cost_in_tokens", COSTS)
@pytest.mark.parametrize("seed", range(20))
def test_a_plan_covers_each_row_and_task_once_at_full_length(seed, cost_in_tokens):
    segments = segments_of(seed)
    passes = plan_passes(segments, cost_in_tokens)
    rows = [row for one in passes for row in range(one.start, one.stop)]
    assert rows == list(range(max(segment.stop for segment in segments.values())))
    assert sorted(name for one in passes for name in one.tasks) == sorted(segments)
    for one in passes:
        own = [segments[name] for name in one.tasks]
        assert all(one.start <= segment.start and segment.stop <= one.stop for segment in own)
        assert one.length == max(segment.length for segment in own)


@pytest.mark.parametrize("cost_in_tokens", COSTS)
def test_no_contiguous_cut_is_cheaper(cost_in_tokens):
    for seed in range(60):
        segments = segments_of(seed)
        assert cost(plan_passes(segments, cost_in_tokens), cost_in_tokens) == cheapest(segments, cost_in_tokens)


@pytest.mark.parametrize("cost_in_tokens", [0, 32])
def test_tasks_on_the_same_rows_share_a_pass_even_if_passes_are_free(cost_in_tokens):
    twins = 0
    for seed in range(20):
        segments = segments_of(seed)
        passes = plan_passes(segments, cost_in_tokens)
        where = {name: number for number, one in enumerate(passes) for name in one.tasks}
        for name in segments:
            if name.startswith("twin"):
                assert where[name] == where[name.replace("twin", "t")]
                twins += 1
    assert twins > 10


@pytest.mark.parametrize("lengths", [(7, 9), (9, 7)])
def test_lengths_that_two_tasks_know_of_the_same_rows_give_the_longer(lengths):
    (one,) = plan_passes({"a": Segment(0, 4, lengths[0]), "b": Segment(0, 4, lengths[1])}, 0)
    assert one == EncoderPass(0, 4, 9, ("a", "b"))


@pytest.mark.parametrize("seed", range(10))
def test_a_dear_pass_comes_once(seed):
    (one,) = plan_passes(segments_of(seed), 10**9)
    assert one.start == 0 and len(one.tasks) == len(segments_of(seed))


def test_slices_of_unequal_length_part_where_padding_costs_more_than_a_pass():
    news, tweets = Segment(0, 2, 50), Segment(2, 12, 45)  # padding ten tweets by five tokens each: 50 tokens
    assert len(plan_passes({"news": news, "tweets": tweets}, 51)) == 1
    assert len(plan_passes({"news": news, "tweets": tweets}, 49)) == 2


def test_rows_that_no_task_reads_need_no_pass():
    passes = plan_passes({"a": Segment(0, 2, 9), "b": Segment(5, 6, 3)}, 0)
    assert [(one.start, one.stop, one.length) for one in passes] == [(0, 2, 9), (5, 6, 3)]
    assert plan_passes({}, 32) == []


def test_a_segment_knows_its_rows():
    assert Segment(3, 10, 5).rows == 7
