"""The statistics of a comparison on plain numbers: intervals hold what they promise, metrics are those of the rows."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import make_tasks
from transformers import EvalPrediction

from hf_multitask import Task
from hf_multitask.analysis.bootstrap import draw_counts, estimate, judge, relative_changes, resample
from hf_multitask.analysis.resampled_metrics import RowOutputs, counted_metric
from hf_multitask.metrics import compute_default_metrics, default_metric_names

# Draws


def test_a_draw_has_as_many_examples_and_the_same_seed_the_same_draws():
    blocks = np.concatenate(list(draw_counts(50, 400, 0, "reviews")))
    assert blocks.shape == (400, 50) and (blocks.sum(1) == 50).all()
    assert (blocks == np.concatenate(list(draw_counts(50, 400, 0, "reviews")))).all()
    for other in (draw_counts(50, 400, 1, "reviews"), draw_counts(50, 400, 0, "traits")):
        assert (blocks != np.concatenate(list(other))).any()
    # Each example comes once on the mean, with the variance of a multinomial draw.
    assert blocks.mean(0) == pytest.approx(1, abs=0.25) and blocks.var() == pytest.approx(0.98, abs=0.05)


def test_draws_come_in_blocks_that_fit_into_memory(monkeypatch):
    whole = resample([lambda counts: counts[:, 0]], 30, 100, 0)
    monkeypatch.setattr("hf_multitask.analysis.bootstrap._BLOCK", 30 * 7)
    sizes = [len(block) for block in draw_counts(30, 100, 0)]
    assert sizes == [7] * 14 + [2]
    assert (resample([lambda counts: counts[:, 0]], 30, 100, 0) == whole).all()


# Metrics of draws


def make_outputs(task: Task, rows: int, seed: int) -> RowOutputs:
    """Random logits that are often right, and labels; some rows without a label where that can be."""
    draw = np.random.default_rng(seed)
    kind, width = str(task.type), task.num_outputs
    losses = draw.random(rows).astype(np.float32)
    items = np.ones(rows, dtype=np.int64)
    if kind == "single_label_classification":
        labels = draw.integers(0, width, rows)
        logits = draw.normal(0, 1, (rows, width)) + 1.5 * np.eye(width)[labels]
        labels = np.where(draw.random(rows) < 0.1, -100, labels)
        items = (labels != -100).astype(np.int64)
        losses = losses * items
    elif kind == "multi_label_classification":
        labels = (draw.random((rows, width)) < 0.4).astype(np.float32)
        logits = draw.normal(0, 1, (rows, width)) + 2 * labels - 1
    elif kind == "regression":
        labels = draw.integers(-3, 4, (rows, width)).astype(np.float32)  # with ties
        logits = labels + draw.normal(0, 2, (rows, width)).round(1)
    else:
        labels = draw.integers(0, width, (rows, 9))
        labels[:, 0] = -100
        labels[draw.random((rows, 9)) < 0.2] = -100
        logits = np.where(draw.random((rows, 9)) < 0.7, np.maximum(labels, 0), draw.integers(0, width, (rows, 9)))
        items = (labels != -100).sum(1)
    logits = logits if kind == "token_classification" else logits.astype(np.float32)
    return RowOutputs(logits, labels, losses, items)


EVERY_KIND = [
    *make_tasks(),
    Task("topic", "single_label_classification", labels=tuple("abcdef")),
    Task("numbers", "regression", labels=("x", "y", "z")),
    Task("speech", "token_classification", labels=("NOUN", "VERB", ".", "OTHER")),
    Task("ends", "token_classification", labels=("O", "B-x", "L-x", "U-x")),
    Task("flag", "multi_label_classification", labels=("only",)),
]


@pytest.mark.parametrize("rows", [3, 60])
@pytest.mark.parametrize("task", EVERY_KIND, ids=lambda task: task.name)
def test_metrics_of_draws_are_those_of_the_drawn_rows(task, rows):
    outputs = make_outputs(task, rows, seed=rows)
    counts = np.concatenate([np.ones((1, rows)), *draw_counts(rows, 40, 3)])
    for metric in (*default_metric_names(task), "loss"):
        found = counted_metric(task, metric, outputs)(counts)
        for value, count in zip(found, counts.astype(int), strict=True):
            drawn = np.repeat(np.arange(rows), count)
            if metric == "loss":
                expected = outputs.losses[drawn].sum(dtype=np.float64) / max(outputs.items[drawn].sum(), 1)
            else:
                expected = compute_default_metrics(task, outputs.predictions[drawn], outputs.labels[drawn])[metric]
            assert value == pytest.approx(expected, abs=2e-6), metric


def test_constant_predictions_correlate_with_nothing():
    task = Task("score", "regression")
    labels = np.linspace(0, 1, 20, dtype=np.float32)[:, None]
    outputs = RowOutputs(np.full((20, 1), 1e3, np.float32), labels, labels[:, 0], np.ones(20))
    counts = np.concatenate(list(draw_counts(20, 50, 0)))
    for metric in ("pearson", "spearman"):
        assert (counted_metric(task, metric, outputs)(counts) == 0).all()


def test_metrics_of_ones_own_are_computed_on_the_drawn_rows():
    outputs = make_outputs(EVERY_KIND[0], 30, 0)

    def mine(prediction: EvalPrediction) -> dict[str, float]:
        return {"mine": float(np.median(prediction.predictions[:, 0])), "rows": len(prediction.label_ids)}

    counts = np.concatenate(list(draw_counts(30, 10, 0)))
    found = counted_metric(EVERY_KIND[0], "mine", outputs, mine)(counts)
    assert found[4] == np.median(np.repeat(outputs.predictions[:, 0], counts[4].astype(int)))
    assert (counted_metric(EVERY_KIND[0], "rows", outputs, mine)(counts) == 30).all()


def test_so_many_labels_that_sums_would_not_fit_are_computed_too():
    task = Task("wide", "single_label_classification", labels=tuple(map(str, range(90))))
    outputs = make_outputs(task, 40, 1)
    counts = np.concatenate(list(draw_counts(40, 3, 0)))
    for metric in ("accuracy", "macro_f1"):
        found = counted_metric(task, metric, outputs)(counts)
        drawn = np.repeat(np.arange(40), counts[1].astype(int))
        expected = compute_default_metrics(task, outputs.predictions[drawn], outputs.labels[drawn])[metric]
        assert found[1] == pytest.approx(expected, abs=1e-9)


# Intervals


def simulate(seeds: int, examples: int, over_seeds: float, draw: np.random.Generator, truth: float = 0.0):
    """Return the estimate of a difference whose truth is known: of seeds, of examples, and of both together."""
    own, shared = draw.normal(0, over_seeds, (seeds, 1)), draw.normal(0, 0.3, examples)
    values = truth + own + shared + draw.normal(0, 0.6, (seeds, examples))
    metrics = [lambda counts, row=row: counts @ row / examples for row in values]
    return estimate(values.mean(1), resample(metrics, examples, 200, int(draw.integers(2**31))))


# The variance of a mean over three seeds is (0.09 + 0.36 / 3) / 100 from examples; seeds add 0, as much, or ten times.
@pytest.mark.parametrize("over_seeds", [0.0, 0.08, 0.25])
def test_intervals_cover_the_truth_as_often_as_they_say(over_seeds):
    draw = np.random.default_rng(7)
    found = [simulate(3, 100, over_seeds, draw) for _ in range(400)]
    covered = np.mean([one.low <= 0 <= one.high for one in found])
    assert 0.91 <= covered <= 0.99, covered
    over_examples = np.mean([one.low_over_examples <= 0 <= one.high_over_examples for one in found])
    # What another seed would have given is not in an interval over examples.
    assert over_examples > 0.9 if over_seeds == 0 else over_examples < covered - 0.1


def test_one_seed_gives_the_interval_over_examples_and_five_narrow_it():
    draw = np.random.default_rng(0)
    one = simulate(1, 200, 0.0, draw)
    assert (one.low, one.high) == (one.low_over_examples, one.high_over_examples) and one.seed_spread is None
    covered = np.mean([(e := simulate(1, 200, 0.0, draw)).low <= 0 <= e.high for _ in range(300)])
    assert 0.91 <= covered <= 0.98
    widths = [np.mean([(e := simulate(s, 200, 0.2, draw)).high - e.low for _ in range(60)]) for s in (2, 3, 5)]
    assert widths[0] > 1.5 * widths[1] > 1.5 * widths[2]


def test_seeds_that_disagree_leave_it_undecided_and_seeds_that_agree_decide():
    same = np.full((3, 500), 0.05)
    agree, disagree = (
        estimate(np.array(values), same + np.random.default_rng(0).normal(0, 0.004, 500))
        for values in ([0.05, 0.051, 0.049], [0.11, 0.05, -0.01])
    )
    assert judge(agree.low, agree.high, 0.02) == "better" and agree.degrees_of_freedom > 100
    assert judge(disagree.low, disagree.high, 0.02) == "undecided" and disagree.degrees_of_freedom < 2.1


def test_two_equal_models_are_equal_for_sure():
    found = estimate(np.zeros(3), np.zeros((3, 200)))
    assert (found.low, found.value, found.high) == (0, 0, 0) and judge(found.low, found.high, 0.0) == "equal"


def test_pairing_takes_out_what_makes_an_example_hard():
    """Both models fail on the same hard examples: a difference of 3 % is sure, though each accuracy is not."""
    draw = np.random.default_rng(1)
    hard = draw.random(1000) < 0.3
    one, other = ~hard, ~hard & (draw.random(1000) > 0.03)
    drawn = resample([lambda c, m=m: c @ m.astype(float) / 1000 for m in (one, other)], 1000, 500, 0)
    alone = estimate(one.mean(keepdims=True), drawn[:1])
    paired = estimate((one.mean() - other.mean())[None], drawn[:1] - drawn[1:])
    assert paired.high - paired.low < 0.5 * (alone.high - alone.low) and paired.low > 0


VERDICTS = {
    (-0.004, 0.005): "equal",
    (0.001, 0.009): "equal",  # sure, and too small to matter
    (-0.009, -0.001): "equal",
    (0.001, 0.011): "better",
    (0.02, 0.05): "better",
    (-0.05, -0.02): "worse",
    (-0.011, -0.001): "worse",
    (-0.02, 0.005): "undecided",
    (-0.005, 0.02): "undecided",
    (-0.02, 0.02): "undecided",
    (0.0, 0.02): "undecided",
}


@pytest.mark.parametrize("ends", VERDICTS)
def test_verdicts(ends):
    assert judge(*ends, margin=0.01) == VERDICTS[ends]
    mirrored = {"better": "worse", "worse": "better"}
    assert judge(-ends[1], -ends[0], margin=0.01) == mirrored.get(VERDICTS[ends], VERDICTS[ends])


def test_no_difference_is_called_one_more_often_than_promised():
    """Of models that are equally good, at most a small part is called better or worse: 5 % and what chance allows."""
    draw = np.random.default_rng(3)
    found = [simulate(3, 100, 0.08, draw) for _ in range(400)]
    verdicts = [judge(one.low, one.high, margin=0.01) for one in found]
    assert np.mean([verdict in ("better", "worse") for verdict in verdicts]) <= 0.09
    sure = [simulate(3, 100, 0.02, draw, truth=0.5) for _ in range(100)]
    assert np.mean([judge(one.low, one.high, 0.01) == "better" for one in sure]) >= 0.95


def test_delta_m_is_that_of_the_paper():
    # Two tasks, two seeds; the second metric is an error. (1/2) [(0.9 - 0.8) / 0.8 - (2.2 - 2.0) / 2.0] = 1.25 %
    multi, single = np.array([[0.88, 0.92], [2.0, 2.4]]), np.array([[0.8, 0.8], [1.9, 2.1]])
    changes = relative_changes(multi, single, [True, False])
    assert changes.mean() == pytest.approx((0.1 / 0.8 - 0.2 / 2.0) / 2)
    assert changes.mean(0) == pytest.approx([(0.08 / 0.8 - 0.1 / 2) / 2, (0.12 / 0.8 - 0.3 / 2) / 2])
    below = relative_changes(np.array([[-0.1]]), np.array([[-0.2]]), [True])
    assert below[0, 0] == pytest.approx(0.5)  # a correlation that rose from -0.2
    assert np.isnan(relative_changes(multi, np.zeros((2, 2)), [True, False])).all()
