"""Metrics as functions of how often each example counts: on thousands of draws of the examples, in one pass.

Nearly every metric is a function of sums over the examples: accuracy of the number of right ones, F1 of true, predicted
and correct positives, Pearson's correlation of x, y, x², y² and xy. With these numbers of each example in a matrix
`[N, F]`, and how often each comes in each draw in one `[r, N]`, a product of the two gives the sums of every draw.
Spearman's correlation is Pearson's of ranks, which each draw has its own of: they follow from cumulated counts. What is
no such function (metrics of your own) is computed on the rows of each draw, one after the other.

The values are those of [`hf_multitask.metrics`] on the drawn rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import EvalPrediction

from ..metrics import decode, label_sequences, metric_function
from ..models.heads import IGNORE_INDEX
from ..models.tags import entity_spans
from ..models.task import Task, TaskType

__all__ = ["CountedMetric", "RowOutputs", "counted_metric"]

CountedMetric = Callable[[np.ndarray], np.ndarray]
_LARGEST = 200  # numbers per example; with more the rows of each draw are taken one draw after the other


@dataclass(frozen=True, eq=False)
class RowOutputs:
    """What a model gave for the validation rows of a task.

    Args:
        predictions: Logits `[N, C]`, or ids `[N, L]` for tasks that label tokens.
        labels: `[N]`, `[N, C]` or `[N, L]`.
        losses: `[N]`, summed over the items of each row.
        items: `[N]`, labelled items of each row.
        scores: By metric that is a mean over examples which these numbers do not tell, its value for each: answers to
            questions, whose examples are not the rows but the questions, and the likeliest of some targets.
    """

    predictions: np.ndarray
    labels: np.ndarray
    losses: np.ndarray
    items: np.ndarray
    scores: Mapping[str, np.ndarray] = field(default_factory=dict)

    def examples(self, metric: str) -> int:
        """Return over how many examples a metric goes."""
        return len(self.scores.get(metric, self.losses))

    def as_evaluated(self, rows: Any = slice(None)) -> EvalPrediction:
        """Return what a metric function is given for some rows."""
        return EvalPrediction(self.predictions[rows], self.labels[rows], losses=self.losses[rows])


def counted_metric(task: Task, metric: str, outputs: RowOutputs, custom: Any = None) -> CountedMetric:
    """Return a metric as a function of how often each row counts, `[r, N]`, to values `[r]`.

    Args:
        task: The task.
        metric: Name of one of its metrics, or `loss`.
        outputs: What a model gave for its rows.
        custom: The user's own metric function, or None; see [`hf_multitask.metrics.metric_function`].
    """
    if metric in outputs.scores:
        return _of_sums(outputs.scores[metric][:, None], lambda s: s[..., 0] / outputs.examples(metric))
    if metric == "loss" or (metric == "perplexity" and task.type.is_language and custom is None):
        mean = _of_sums(np.stack([outputs.losses, outputs.items], 1), lambda s: _divide(s[..., 0], s[..., 1]))
        return mean if metric == "loss" else lambda counts: np.exp(np.minimum(mean(counts), 700.0))
    found = None
    if custom is None:
        build = _BUILDERS.get(task.type)
        found = build(task, metric, decode(task, outputs.predictions), outputs.labels) if build else None
    return found or _row_by_row(task, metric, outputs, custom)


def _row_by_row(task: Task, metric: str, outputs: RowOutputs, custom: Any) -> CountedMetric:
    compute = metric_function(task, custom)

    def values(counts: np.ndarray) -> np.ndarray:
        result = []
        for count in counts.astype(np.int64):
            rows = np.repeat(np.arange(len(count)), count)
            result.append(float(compute(outputs.as_evaluated(rows))[metric]))
        return np.array(result)

    return values


def _of_sums(numbers: np.ndarray, finish: Callable[[np.ndarray], np.ndarray]) -> CountedMetric:
    numbers = np.ascontiguousarray(numbers, dtype=np.float64)
    return lambda counts: finish(counts @ numbers)


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape)), where=b != 0)


def _f1(correct: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    return _divide(2 * correct, predicted + true)


def _macro_f1(correct: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Return the mean over labels, the last axis; only those that occur, true or predicted, count."""
    return _divide(_f1(correct, predicted, true).sum(-1), (predicted + true > 0).sum(-1))


def _single_label(task: Task, metric: str, predicted: np.ndarray, labels: np.ndarray) -> CountedMetric | None:
    known = (labels != IGNORE_INDEX).astype(np.float64)
    right = known * (predicted == labels)
    if metric == "accuracy":
        return _of_sums(np.stack([right, known], 1), lambda s: _divide(s[..., 0], s[..., 1]))
    classes = task.num_outputs
    if 3 * classes > _LARGEST:
        return None
    ids = np.arange(classes)
    true = (labels[:, None] == ids) * known[:, None]
    guessed = (predicted[:, None] == ids) * known[:, None]
    numbers = np.concatenate([true * guessed, guessed, true], 1)

    def split(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return sums[..., :classes], sums[..., classes : 2 * classes], sums[..., 2 * classes :]

    def macro(sums: np.ndarray) -> np.ndarray:
        return _macro_f1(*split(sums))

    def matthews(sums: np.ndarray) -> np.ndarray:
        correct, guessed, true = split(sums)
        rows = true.sum(-1)
        shared = correct.sum(-1) * rows - (guessed * true).sum(-1)
        own = (rows**2 - (guessed**2).sum(-1)) * (rows**2 - (true**2).sum(-1))
        return _divide(shared, np.sqrt(np.maximum(own, 0)))

    def positive(sums: np.ndarray) -> np.ndarray:
        return _f1(*(part[..., 1] for part in split(sums)))

    finish = {"macro_f1": macro, "matthews_correlation": matthews, "f1": positive}.get(metric)
    return None if finish is None else _of_sums(numbers, finish)


def _multi_label(task: Task, metric: str, predicted: np.ndarray, labels: np.ndarray) -> CountedMetric | None:
    rows, columns = labels.shape
    if metric == "accuracy":
        return _of_sums((predicted == labels).all(1)[:, None], lambda s: s[..., 0] / rows)
    if 3 * columns > _LARGEST or metric not in ("micro_f1", "macro_f1"):
        return None
    numbers = np.concatenate([predicted * labels, predicted, labels], 1)

    def finish(sums: np.ndarray) -> np.ndarray:
        parts = np.stack([sums[..., i * columns : (i + 1) * columns] for i in range(3)])
        return _f1(*parts.sum(-1)) if metric == "micro_f1" else _f1(*parts).mean(-1)

    return _of_sums(numbers, finish)


def _regression(task: Task, metric: str, predicted: np.ndarray, labels: np.ndarray) -> CountedMetric | None:
    x = predicted.reshape(len(labels), -1).astype(np.float64)
    y = labels.reshape(len(labels), -1).astype(np.float64)
    if metric == "mse":
        return _of_sums(((x - y) ** 2).mean(1)[:, None], lambda s: s[..., 0] / len(x))
    columns = list(zip(x.T, y.T, strict=True))
    if metric == "pearson":
        return _mean_of([_pearson(*column) for column in columns])
    return _mean_of([_spearman(*column) for column in columns]) if metric == "spearman" else None


def _mean_of(metrics: list[CountedMetric]) -> CountedMetric:
    return lambda counts: np.mean([metric(counts) for metric in metrics], axis=0)


def _correlation(n: Any, x: Any, y: Any, xx: Any, yy: Any, xy: Any) -> np.ndarray:
    """Return the correlation from sums, and 0 where one side is constant."""
    over_x, over_y = n * xx - x**2, n * yy - y**2
    constant = (over_x <= 1e-12 * n * xx) | (over_y <= 1e-12 * n * yy)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = (n * xy - x * y) / np.sqrt(np.maximum(over_x, 0) * np.maximum(over_y, 0))
    return np.where(constant, 0.0, value).clip(-1, 1)


def _pearson(x: np.ndarray, y: np.ndarray) -> CountedMetric:
    x, y = x - x.mean(), y - y.mean()  # sums of large numbers would lose the small differences between them
    numbers = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], 1)
    return _of_sums(numbers, lambda sums: _correlation(*np.moveaxis(sums, -1, 0)))


def _spearman(x: np.ndarray, y: np.ndarray) -> CountedMetric:
    ranks = [_ranks(x), _ranks(y)]

    def values(counts: np.ndarray) -> np.ndarray:
        n = counts.sum(1)
        a, b = (rank(counts) - (n[:, None] + 1) / 2 for rank in ranks)
        sums = [(counts * part).sum(1) for part in (a, b, a * a, b * b, a * b)]
        return _correlation(n, *sums)

    return values


def _ranks(values: np.ndarray) -> CountedMetric:
    """Return a function from counts to the mean rank, among the counted, of each value; equal values share theirs."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    group = np.cumsum(np.r_[True, ordered[1:] != ordered[:-1]]) - 1
    place = np.empty(len(values), dtype=np.int64)
    place[order] = group  # of each value, the number of its group of equal ones

    def ranks(counts: np.ndarray) -> np.ndarray:
        sizes = np.add.reduceat(counts[:, order], first, axis=1)
        last = np.cumsum(sizes, axis=1)
        return (last - (sizes - 1) / 2)[:, place]

    return ranks


def _token_labels(task: Task, metric: str, predicted: np.ndarray, labels: np.ndarray) -> CountedMetric | None:
    gold, guesses = label_sequences(task, labels, labels), label_sequences(task, predicted, labels)
    if metric == "accuracy":
        right = [sum(map(str.__eq__, *pair)) for pair in zip(gold, guesses, strict=True)]
        return _of_sums(
            np.array([[hits, len(row)] for hits, row in zip(right, gold, strict=True)]).reshape(-1, 2),
            lambda s: _divide(s[..., 0], s[..., 1]),
        )
    if metric == "macro_f1":
        return _macro_f1_of_words(task.labels or (), gold, guesses)
    numbers = []
    for true_row, row in zip(gold, guesses, strict=True):
        true, found = set(entity_spans(true_row)), set(entity_spans(row))
        numbers.append((len(true & found), len(found), len(true)))
    finish = {
        "f1": lambda s: _f1(s[..., 0], s[..., 1], s[..., 2]),
        "precision": lambda s: _divide(s[..., 0], s[..., 1]),
        "recall": lambda s: _divide(s[..., 0], s[..., 2]),
    }.get(metric)
    return None if finish is None else _of_sums(np.array(numbers).reshape(-1, 3), finish)


def _macro_f1_of_words(
    names: Sequence[str], gold: Sequence[list[str]], guesses: Sequence[list[str]]
) -> CountedMetric | None:
    if 3 * len(names) > _LARGEST:
        return None
    ids = {name: i for i, name in enumerate(names)}
    numbers = np.zeros((len(gold), 3, len(names)))  # of each row and label: right, predicted and true words
    for row, (true, found) in enumerate(zip(gold, guesses, strict=True)):
        for one, other in zip(true, found, strict=True):
            numbers[row, 0, ids[one]] += one == other
            numbers[row, 1, ids[other]] += 1
            numbers[row, 2, ids[one]] += 1
    return _of_sums(numbers.reshape(len(gold), -1), lambda s: _macro_f1(*np.split(s, 3, axis=-1)))


def _language(task: Task, metric: str, predicted: np.ndarray, labels: np.ndarray) -> CountedMetric | None:
    known = labels != IGNORE_INDEX
    numbers = np.stack([((predicted == labels) & known).sum(1), known.sum(1)], 1)
    return _of_sums(numbers, lambda s: _divide(s[..., 0], s[..., 1])) if metric == "accuracy" else None


_BUILDERS: dict[TaskType, Callable[[Task, str, np.ndarray, np.ndarray], CountedMetric | None]] = {
    TaskType.SINGLE_LABEL_CLASSIFICATION: _single_label,
    TaskType.MULTI_LABEL_CLASSIFICATION: _multi_label,
    TaskType.REGRESSION: _regression,
    TaskType.TOKEN_CLASSIFICATION: _token_labels,
    TaskType.MULTIPLE_CHOICE: _single_label,
    TaskType.MASKED_LM: _language,
    TaskType.CAUSAL_LM: _language,
    TaskType.SEQ2SEQ_LM: _language,
}
