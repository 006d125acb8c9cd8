"""Default metrics per task type, computed without the Hub, and their direction.

| type | metrics (the primary one first) |
|---|---|
| `single_label_classification` | `accuracy`, `macro_f1`, `matthews_correlation`; `f1` (of label 1) for two labels |
| `multi_label_classification` | `micro_f1`, `macro_f1`, `accuracy` (all labels of a row right) |
| `regression` | `pearson`, `spearman`, `mse` (means over the values, where there are several) |
| `token_classification` | `f1`, `precision`, `recall` of whole entities (seqeval), `accuracy` of words; \
`accuracy` and `macro_f1` of words where the labels mark no entities (see [`hf_multitask.models.tags`]) |
| `question_answering` | `f1` of words and `exact_match`, per question (see [`hf_multitask.answer_metrics`]) |
| `multiple_choice` | `accuracy` |
| `masked_lm` | `accuracy` of hidden tokens, `perplexity` |
| `causal_lm`, `seq2seq_lm` | `accuracy` of tokens, `perplexity`; `label_accuracy` (first) where the targets are a \
closed set; `exact_match` and `rouge_l` with `predict_with_generate` (see [`hf_multitask.generation`]) |

`Task(metric=...)` makes another of them the primary one.

Whether a larger value is better follows from the metric that is used: `Task(greater_is_better=...)`, else the metric's
name, where it says so ([`greater_is_better`]). Everything that picks, stops or compares asks [`primary_direction`].
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .answer_metrics import answer_metrics
from .models.heads import IGNORE_INDEX
from .models.tags import marks_entities, standard_tags
from .models.task import Task, TaskType, closest

__all__ = [
    "compute_default_metrics",
    "default_metric_names",
    "greater_is_better",
    "metric_function",
    "primary_direction",
    "primary_metric",
]

_NAMES: dict[TaskType, tuple[str, ...]] = {
    TaskType.SINGLE_LABEL_CLASSIFICATION: ("accuracy", "macro_f1", "matthews_correlation"),
    TaskType.MULTI_LABEL_CLASSIFICATION: ("micro_f1", "macro_f1", "accuracy"),
    TaskType.REGRESSION: ("pearson", "spearman", "mse"),
    TaskType.TOKEN_CLASSIFICATION: ("f1", "precision", "recall", "accuracy"),
    TaskType.QUESTION_ANSWERING: ("f1", "exact_match"),
    TaskType.MULTIPLE_CHOICE: ("accuracy",),
    TaskType.MASKED_LM: ("accuracy", "perplexity"),
    TaskType.CAUSAL_LM: ("accuracy", "perplexity", "exact_match", "rouge_l"),
    TaskType.SEQ2SEQ_LM: ("accuracy", "perplexity", "exact_match", "rouge_l"),
}
_WORD_LABELS = ("accuracy", "macro_f1")  # of `token_classification` without entities
# Words that name a quantity of which more, or less, is better.
_GREATER = frozenset(
    "accuracy acc f1 fscore precision recall sensitivity specificity pearson pearsonr spearman spearmanr kendalltau "
    "kappa correlation mcc r2 auc auroc auprc ap map mrr ndcg match exact em bleu sacrebleu gleu chrf rouge rougel "
    "rougelsum meteor bertscore bleurt comet likelihood jaccard iou dice".split()
)
_SMALLER = frozenset(
    "loss error errors mse mae rmse msle rmsle mape smape mase perplexity ppl wer cer ter eer ece mce brier nll bpc "
    "bpb regret".split()
)
# Words behind the quantity that leave its direction as it is.
_QUALIFIERS = frozenset(
    "macro micro weighted binary samples mean avg average median score rate value at k l top all overall".split()
)
# Words by which a name may mean the opposite of the quantity in it, or a difference of two.
_TURNED = frozenset(
    "neg negative negated inverse inv minus non not no without reduction improvement improved gain drop decrease "
    "increase gap delta diff difference relative change std stdev variance var".split()
)


def default_metric_names(task: Task) -> tuple[str, ...]:
    """Return the names of the metrics computed for a task by default."""
    if task.type.generates and task.labels:
        return ("label_accuracy", *_NAMES[task.type])
    if task.type is TaskType.TOKEN_CLASSIFICATION and not marks_entities(task.labels or ()):
        return _WORD_LABELS
    binary = task.type is TaskType.SINGLE_LABEL_CLASSIFICATION and task.num_outputs == 2
    return (*_NAMES[task.type], "f1") if binary else _NAMES[task.type]


def primary_metric(task: Task, custom: bool = False) -> str:
    """Return the name of a task's primary metric.

    Args:
        task: The task.
        custom: Whether its metrics are the user's own, whose names are not known beforehand.

    Raises:
        ValueError: `task.metric` is not one of the metrics computed by default.
    """
    names = default_metric_names(task)
    if task.metric is None:
        return names[0]
    if task.metric != "loss" and task.metric not in names and not custom:
        without = " whose labels are not BIO tags" if names is _WORD_LABELS else ""
        raise ValueError(
            f"task {task.name!r}: metric {task.metric!r} is not computed for {task.type}{without}"
            f"{closest(task.metric, names)}; choose from {', '.join(names)}, or pass compute_metrics"
        )
    return task.metric


def greater_is_better(metric: str) -> bool | None:
    """Return whether a larger value of a metric is better, as far as its name says, or None.

    The last word that is not a qualifier names the quantity: `macro_f1`, `f1_macro`, `recall@10` and `brier_score` are
    known. None for every other name, and for names that may mean the opposite (`negative_mse`, `error_reduction`);
    `neg_mean_squared_error` and its like are those of scikit-learn, which are better when larger.

    Args:
        metric: The name, with or without `eval_`, in any case.

    Example:
        >>> greater_is_better("rouge1"), greater_is_better("star_mae"), greater_is_better("stars")
        (True, False, None)
    """
    words = [word for word in re.split(r"[^a-z0-9]+", metric.lower().removeprefix("eval_")) if word]
    heads = [word for word in words if not (word in _QUALIFIERS or word.rstrip("0123456789") in ("", "top"))]
    if not heads:
        return None
    head = next((word for word in (heads[-1], heads[-1].rstrip("0123456789")) if word in _GREATER | _SMALLER), None)
    turned = [word for word in words if word in _TURNED]
    if head is None or turned:
        error = head is not None and head in _SMALLER
        return True if error and turned == ["neg"] == words[:1] else None
    return head in _GREATER


def primary_direction(task: Task, metric: str | None) -> bool:
    """Return whether a larger value of a task's primary metric is better.

    Args:
        task: The task.
        metric: Its primary metric, or None where the user's own function names it only when it is called.

    Raises:
        ValueError: The metric's name says nothing, and the task neither.
    """
    direction = task.greater_is_better
    if direction is None and metric is not None:
        direction = greater_is_better(metric)
    if direction is None and metric is None:
        raise ValueError(
            f"task {task.name!r} has its own compute_metrics, whose metrics are not known beforehand: name the "
            "one that counts, Task(metric=...), with greater_is_better=... where its name does not say"
        )
    if direction is None:
        raise ValueError(
            f"task {task.name!r}: whether a larger {metric!r} is better is not known; give Task(metric={metric!r}, "
            "greater_is_better=True), or False"
        )
    return direction


def decode(task: Task, predictions: np.ndarray) -> np.ndarray:
    """Turn logits into predictions: label ids, 0/1 per label, or the numbers themselves.

    Args:
        task: The task.
        predictions: `[N, C]`, or `[N, L, C]` for token-level tasks; ids of tokens `[N, L]` pass through, and so do the
            texts of answers.
    """
    if task.type is TaskType.QUESTION_ANSWERING:
        return predictions
    if task.type is TaskType.MULTIPLE_CHOICE:
        # Where other batches have more choices than a row, it was padded.
        return np.where(predictions == IGNORE_INDEX, -np.inf, predictions).argmax(-1)
    if task.type is TaskType.MULTI_LABEL_CLASSIFICATION:
        return (predictions > 0).astype(np.int64)
    if task.type is TaskType.REGRESSION:
        return predictions
    if (task.type is TaskType.TOKEN_CLASSIFICATION or task.type.is_language) and predictions.ndim == 2:
        return predictions
    return predictions.argmax(-1)


def compute_default_metrics(task: Task, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return a task's default metrics.

    Args:
        task: The task.
        predictions: Logits (see [`decode`]); for `question_answering` the text of each question's answer.
        labels: `[N]` ids, `[N, C]` numbers, or `[N, L]` ids with -100 where there is no label; for
            `question_answering` the texts of each question's right answers.

    Returns:
        Values by name; a metric that is not defined (the correlation of a constant) is 0.
    """
    return _FUNCTIONS[task.type](task, decode(task, predictions), labels)


def _single_label(task: Task, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    known = labels != IGNORE_INDEX
    predicted, labels = predicted[known], labels[known]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of splits with rows of one label only
        result = {
            "accuracy": float(accuracy_score(labels, predicted)),
            "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0)),
            "matthews_correlation": float(matthews_corrcoef(labels, predicted)),
        }
    if task.num_outputs == 2:
        result["f1"] = float(f1_score(labels, predicted, zero_division=0))
    return result


def _multi_label(task: Task, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import accuracy_score, f1_score

    labels = labels.astype(np.int64)
    # A single column is a binary problem to scikit-learn, whose averages would count the absent label as well.
    average = (
        dict.fromkeys(("micro", "macro"), "binary") if task.num_outputs == 1 else {"micro": "micro", "macro": "macro"}
    )
    return {
        "micro_f1": float(f1_score(labels, predicted, average=average["micro"], zero_division=0)),
        "macro_f1": float(f1_score(labels, predicted, average=average["macro"], zero_division=0)),
        "accuracy": float(accuracy_score(labels, predicted)),
    }


def _regression(task: Task, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    from scipy.stats import pearsonr, spearmanr

    predicted, labels = predicted.reshape(len(labels), -1), labels.reshape(len(labels), -1)

    def mean_correlation(correlate: Callable[..., Any]) -> float:
        values = []
        for x, y in zip(predicted.T.astype(np.float64), labels.T.astype(np.float64), strict=True):
            constant = len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0
            values.append(0.0 if constant else float(correlate(x, y).statistic))
        return float(np.mean(values))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nearly constant predictions, as before the first step
        return {
            "pearson": mean_correlation(pearsonr),
            "spearman": mean_correlation(spearmanr),
            "mse": float(np.mean((predicted - labels) ** 2)),
        }


def label_sequences(task: Task, ids: np.ndarray, labels: np.ndarray) -> list[list[str]]:
    """Return the label names at the labelled tokens (label other than -100) of each row."""
    names = task.labels or ()
    length = min(ids.shape[1], labels.shape[1])
    return [
        [names[i] for i, label in zip(row[:length], gold[:length], strict=True) if label != IGNORE_INDEX]
        for row, gold in zip(ids.tolist(), labels.tolist(), strict=True)
    ]


def _token_labels(task: Task, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    length = min(predicted.shape[1], labels.shape[1])
    known = labels[:, :length] != IGNORE_INDEX
    guessed, true = predicted[:, :length][known], labels[:, :length][known]
    accuracy = float((guessed == true).mean()) if len(true) else 0.0
    if not marks_entities(task.labels or ()):
        from sklearn.metrics import f1_score as f1_of_words

        macro_f1 = float(f1_of_words(true, guessed, average="macro", zero_division=0)) if len(true) else 0.0
        return {"accuracy": accuracy, "macro_f1": macro_f1}
    from seqeval.metrics import f1_score, precision_score, recall_score

    guesses = [standard_tags(tags) for tags in label_sequences(task, predicted, labels)]
    gold = [standard_tags(tags) for tags in label_sequences(task, labels, labels)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of splits without any entity
        return {
            "f1": float(f1_score(gold, guesses, zero_division=0)),
            "precision": float(precision_score(gold, guesses, zero_division=0)),
            "recall": float(recall_score(gold, guesses, zero_division=0)),
            "accuracy": accuracy,
        }


def _answers(task: Task, predicted: Any, labels: Any) -> dict[str, float]:
    return answer_metrics(predicted, labels)


def _choices(task: Task, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {"accuracy": float((predicted == labels).mean())}


def _language(task: Task, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    known = labels != IGNORE_INDEX
    return {"accuracy": float((predicted == labels)[known].mean()) if known.any() else 0.0}


_FUNCTIONS: dict[TaskType, Callable[[Task, np.ndarray, np.ndarray], dict[str, float]]] = {
    TaskType.SINGLE_LABEL_CLASSIFICATION: _single_label,
    TaskType.MULTI_LABEL_CLASSIFICATION: _multi_label,
    TaskType.REGRESSION: _regression,
    TaskType.TOKEN_CLASSIFICATION: _token_labels,
    TaskType.QUESTION_ANSWERING: _answers,
    TaskType.MULTIPLE_CHOICE: _choices,
    TaskType.MASKED_LM: _language,
    TaskType.CAUSAL_LM: _language,
    TaskType.SEQ2SEQ_LM: _language,
}


def metric_function(task: Task, custom: Any = None) -> Callable[[Any], dict[str, float]]:
    """Return the function that computes a task's metrics from an `EvalPrediction`.

    Args:
        task: The task.
        custom: None for the default metrics, a callable that takes the `EvalPrediction` (predictions are logits; for
            `question_answering` answers and right answers, as texts), or a module of the `evaluate` library, which is
            given decoded predictions: label ids, numbers, sequences of label names for token-level tasks, or answers
            as `squad` takes them.

    Raises:
        TypeError: `custom` is neither.
    """
    if custom is None:
        return lambda prediction: compute_default_metrics(task, prediction.predictions, prediction.label_ids)
    if hasattr(custom, "compute") and hasattr(custom, "add_batch"):
        return lambda prediction: _by_name(custom, _compute_module(task, custom, prediction))
    if not callable(custom):
        raise TypeError(
            f"compute_metrics[{task.name!r}] must be a callable or an evaluate module, got {type(custom).__name__}"
        )
    return custom


def _by_name(module: Any, result: Any) -> dict[str, float]:
    """Return the result of an `evaluate` module by name; some, such as `wer`, return a number alone."""
    return dict(result) if isinstance(result, Mapping) else {str(module.name): float(result)}


def _compute_module(task: Task, module: Any, prediction: Any) -> Any:
    predictions, labels = decode(task, prediction.predictions), prediction.label_ids
    if task.type is TaskType.TOKEN_CLASSIFICATION:
        return module.compute(
            predictions=label_sequences(task, predictions, labels), references=label_sequences(task, labels, labels)
        )
    if task.type is TaskType.QUESTION_ANSWERING:
        ids = [str(number) for number in range(len(predictions))]
        given = [{"id": i, "prediction_text": text} for i, text in zip(ids, predictions, strict=True)]
        # The metric compares texts; the places are there for its form alone.
        right = [{"text": list(texts), "answer_start": [0] * len(texts)} for texts in labels]
        references = [{"id": i, "answers": answers} for i, answers in zip(ids, right, strict=True)]
        return module.compute(predictions=given, references=references)
    if task.type is TaskType.REGRESSION and task.num_outputs == 1:
        predictions, labels = predictions.reshape(-1), labels.reshape(-1)
    return module.compute(predictions=predictions, references=labels)
