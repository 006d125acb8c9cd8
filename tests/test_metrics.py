"""Default metrics are what their formulas say; a metric that is not defined is 0; users bring their own."""

from __future__ import annotations

from dataclasses import replace

import datasets
import evaluate
import numpy as np
import pytest
from scipy.stats import rankdata
from seqeval.metrics.sequence_labeling import get_entities
from sklearn.metrics import f1_score, matthews_corrcoef
from transformers import EvalPrediction

from hf_multitask import Task, TaskType
from hf_multitask.metrics import (
    compute_default_metrics,
    decode,
    default_metric_names,
    greater_is_better,
    label_sequences,
    metric_function,
    primary_metric,
)

BINARY = Task("binary", "single_label_classification", labels=("no", "yes"))
SINGLE = Task("single", "single_label_classification", labels=("a", "b", "c", "d"))
MULTI = Task("multi", "multi_label_classification", labels=("a", "b", "c"))
SCORE = Task("score", "regression")
SCORES = Task("scores", "regression", labels=("valence", "arousal"))
TOKENS = Task("tokens", "token_classification", labels=("O", "B-x", "I-x", "B-y", "I-y"))
TASKS = {task.name: task for task in (BINARY, SINGLE, MULTI, SCORE, SCORES, TOKENS)}
PRIMARY = {
    "binary": "accuracy",
    "single": "accuracy",
    "multi": "micro_f1",
    "score": "pearson",
    "scores": "pearson",
    "tokens": "f1",
}
every_task = pytest.mark.parametrize("name", TASKS)


def random_predictions(task: Task, seed: int, rows: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Return logits that know a little about the labels, and the labels."""
    draw = np.random.default_rng(seed)
    classes = task.num_outputs
    if task.type is TaskType.TOKEN_CLASSIFICATION:
        labels = draw.integers(0, classes, (rows, 9))
        logits = draw.normal(size=(rows, 9, classes)) + 2 * np.eye(classes)[labels]
        labels[draw.random((rows, 9)) < 0.3] = -100
        labels[0] = -100
        return logits.astype(np.float32), labels
    if task.type is TaskType.SINGLE_LABEL_CLASSIFICATION:
        labels = draw.integers(0, classes, rows)
        return (draw.normal(size=(rows, classes)) + np.eye(classes)[labels]).astype(np.float32), labels
    if task.type is TaskType.MULTI_LABEL_CLASSIFICATION:
        labels = (draw.random((rows, classes)) < 0.4).astype(np.float32)
        return (draw.normal(size=(rows, classes)) + labels - 0.5).astype(np.float32), labels
    labels = draw.normal(size=(rows, classes)).astype(np.float32)
    return (labels + draw.normal(size=(rows, classes))).astype(np.float32), labels


def f1(true: np.ndarray, found: np.ndarray) -> float:
    return 2 * (true & found).sum() / (true.sum() + found.sum())


def by_hand(task: Task, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    if task.type is TaskType.SINGLE_LABEL_CLASSIFICATION:
        found = logits.argmax(1)
        table = np.zeros((task.num_outputs, task.num_outputs))
        np.add.at(table, (labels, found), 1)
        n, right, true, guessed = table.sum(), np.trace(table), table.sum(1), table.sum(0)
        result = {
            "accuracy": right / n,
            "macro_f1": np.mean([f1(labels == c, found == c) for c in range(task.num_outputs)]),
            "matthews_correlation": (right * n - true @ guessed)
            / np.sqrt((n**2 - guessed @ guessed) * (n**2 - true @ true)),
        }
        return result | ({"f1": f1(labels == 1, found == 1)} if task.num_outputs == 2 else {})
    if task.type is TaskType.MULTI_LABEL_CLASSIFICATION:
        found, true = 1 / (1 + np.exp(-logits)) > 0.5, labels == 1
        return {
            "micro_f1": f1(true, found),
            "macro_f1": np.mean([f1(true[:, c], found[:, c]) for c in range(task.num_outputs)]),
            "accuracy": (true == found).all(1).mean(),
        }
    if task.type is TaskType.REGRESSION:
        pairs = list(zip(logits.T.astype(np.float64), labels.T.astype(np.float64), strict=True))
        return {
            "pearson": np.mean([np.corrcoef(x, y)[0, 1] for x, y in pairs]),
            "spearman": np.mean([np.corrcoef(rankdata(x), rankdata(y))[0, 1] for x, y in pairs]),
            "mse": ((logits - labels) ** 2).mean(),
        }
    true, guessed, right, tokens = set(), set(), 0, 0
    for row, (guess, gold) in enumerate(zip(logits.argmax(-1), labels, strict=True)):
        known = gold != -100
        right, tokens = right + int((guess == gold)[known].sum()), tokens + int(known.sum())
        for entities, ids in ((true, gold[known]), (guessed, guess[known])):
            entities |= {(row, *entity) for entity in get_entities([task.labels[i] for i in ids])}
    precision, recall = len(true & guessed) / len(guessed), len(true & guessed) / len(true)
    return {
        "f1": 2 * precision * recall / (precision + recall),
        "precision": precision,
        "recall": recall,
        "accuracy": right / tokens,
    }


@pytest.mark.parametrize("seed", range(3))
@every_task
def test_default_metrics_are_their_formulas(name, seed):
    task = TASKS[name]
    logits, labels = random_predictions(task, seed)
    found = compute_default_metrics(task, logits, labels)
    assert tuple(found) == default_metric_names(task)
    assert all(type(value) is float for value in found.values())
    assert found == pytest.approx(by_hand(task, logits, labels), rel=1e-5)
    assert all(0 < value < 2.5 for value in found.values())


@every_task
def test_perfect_predictions_have_perfect_metrics(name):
    task = TASKS[name]
    _, labels = random_predictions(task, 1)
    if task.type is TaskType.REGRESSION:
        logits = labels
    elif task.type is TaskType.MULTI_LABEL_CLASSIFICATION:
        logits = labels - 0.5
    else:
        logits = np.eye(task.num_outputs)[labels.clip(0)]
    found = compute_default_metrics(task, logits, labels)
    assert found == pytest.approx({key: 0.0 if key == "mse" else 1.0 for key in found})


UNDEFINED = {
    "always the same label": (
        BINARY,
        np.tile([2.0, 1.0], (6, 1)),
        [0, 1, 0, 1, 1, 1],
        {"matthews_correlation": 0, "f1": 0},
    ),
    "only one label there": (BINARY, np.tile([2.0, 1.0], (6, 1)), [0] * 6, {"matthews_correlation": 0, "f1": 0}),
    "no label found": (MULTI, -np.ones((4, 3)), np.eye(4, 3), {"micro_f1": 0, "macro_f1": 0}),
    "no label at all": (MULTI, -np.ones((4, 3)), np.zeros((4, 3)), {"micro_f1": 0, "macro_f1": 0, "accuracy": 1}),
    "constant prediction": (SCORE, np.full((4, 1), 0.3), np.arange(4.0)[:, None], {"pearson": 0, "spearman": 0}),
    "constant labels": (SCORE, np.arange(4.0)[:, None], np.full((4, 1), 0.3), {"pearson": 0, "spearman": 0}),
    "a single row": (SCORE, np.ones((1, 1)), np.zeros((1, 1)), {"pearson": 0, "spearman": 0, "mse": 1}),
    "one of two values constant": (
        SCORES,
        np.stack([np.arange(4.0), np.ones(4)], 1),
        np.stack([np.arange(4.0), np.arange(4.0)], 1),
        {"pearson": 0.5, "spearman": 0.5},
    ),
    "no entity found": (
        TOKENS,
        np.eye(5)[[[0, 0, 0]]],
        [[1, 2, 0]],
        {"f1": 0, "precision": 0, "recall": 0, "accuracy": 1 / 3},
    ),
    "no entity there": (
        TOKENS,
        np.eye(5)[[[0, 1, 0]]],
        [[0, 0, 0]],
        {"f1": 0, "precision": 0, "recall": 0, "accuracy": 2 / 3},
    ),
    "no token labelled": (
        TOKENS,
        np.eye(5)[[[0, 1, 0]]],
        [[-100] * 3],
        {"f1": 0, "precision": 0, "recall": 0, "accuracy": 0},
    ),
}


@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize("case", UNDEFINED)
def test_a_metric_that_is_not_defined_is_0(case):
    task, logits, labels, expected = UNDEFINED[case]
    found = compute_default_metrics(task, logits, np.asarray(labels))
    assert np.isfinite(list(found.values())).all()
    assert {key: found[key] for key in expected} == pytest.approx(expected)


def test_rows_without_a_label_do_not_count():
    logits, labels = random_predictions(SINGLE, 0)
    gaps = np.where(np.arange(60) % 3 == 0, -100, labels)
    kept = gaps != -100
    assert compute_default_metrics(SINGLE, logits, gaps) == compute_default_metrics(SINGLE, logits[kept], labels[kept])


def test_regression_may_come_without_its_last_dimension():
    logits, labels = random_predictions(SCORE, 0)
    assert compute_default_metrics(SCORE, logits[:, 0], labels) == compute_default_metrics(SCORE, logits, labels)


def test_ids_of_tokens_count_like_their_logits_and_padding_of_either_does_not():
    logits, labels = random_predictions(TOKENS, 0)
    expected = compute_default_metrics(TOKENS, logits, labels)
    assert compute_default_metrics(TOKENS, logits.argmax(-1), labels) == expected
    padded = np.pad(logits.argmax(-1), ((0, 0), (0, 4)), constant_values=-100)
    assert compute_default_metrics(TOKENS, padded, labels) == expected
    assert compute_default_metrics(TOKENS, padded, np.pad(labels, ((0, 0), (0, 2)), constant_values=-100)) == expected


PARTS_OF_SPEECH = {
    "words": ("NOUN", "VERB", "ADJ"),
    "full stops": (".", "NOUN", "VERB"),
    "an O in front": ("OBJ", "SUBJ", "O"),
    "entities without B and I": ("O", "PER", "LOC"),
    "one letter": ("N", "V", "."),
}


@pytest.mark.parametrize("case", PARTS_OF_SPEECH)
def test_labels_that_mark_no_entities_are_counted_by_word(case):
    task = Task("pos", "token_classification", labels=PARTS_OF_SPEECH[case])
    assert default_metric_names(task) == ("accuracy", "macro_f1") and primary_metric(task) == "accuracy"
    gold = np.array([[0, 0, 1, 1, 2, 2, -100], [2, 1, 0, -100, -100, -100, -100]])
    exact = compute_default_metrics(task, gold, gold)
    assert exact == {"accuracy": 1.0, "macro_f1": 1.0}
    for place in zip(*np.nonzero(gold != -100), strict=True):
        for wrong in set(range(3)) - {int(gold[place])}:
            guess = gold.copy()
            guess[place] = wrong
            found = compute_default_metrics(task, guess, gold)
            known = gold != -100
            of_words = [f1(gold[known] == c, guess[known] == c) for c in range(3)]
            assert found["accuracy"] == pytest.approx(8 / 9) and found["macro_f1"] == pytest.approx(np.mean(of_words))
    with pytest.raises(ValueError, match=r"metric 'f1' .*labels are not BIO tags.* accuracy, macro_f1"):
        primary_metric(replace(task, metric="f1"))


@pytest.mark.parametrize("tags", [("U-x", "B-x", "L-x"), ("S-x", "B-x", "E-x"), ("W_x", "B_x", "E_x")])
def test_entities_of_every_scheme_are_whole(tags):
    """Three of them, of which two that are one word each stand together: not one entity of two words."""
    task = Task("names", "token_classification", labels=("O", *tags))
    gold = np.array([[1, 1, 2, 3, 0]])
    assert compute_default_metrics(task, gold, gold)["f1"] == 1
    found = compute_default_metrics(task, np.array([[1, 0, 2, 3, 0]]), gold)
    assert found["precision"] == 1 and found["recall"] == pytest.approx(2 / 3)


def test_logits_are_decoded_by_type():
    assert decode(SINGLE, np.array([[1.0, 3, 2, 0], [-1, -2, -3, -4]])).tolist() == [1, 0]
    assert decode(MULTI, np.array([[1.0, -3, 0], [-1, 2, 3]])).tolist() == [[1, 0, 0], [0, 1, 1]]
    assert decode(SCORES, np.array([[0.5, 2.0]])).tolist() == [[0.5, 2.0]]
    assert decode(TOKENS, np.eye(5)[[[3, 1]]]).tolist() == decode(TOKENS, np.array([[3, 1]])).tolist() == [[3, 1]]


def test_label_sequences_leave_out_what_has_no_label():
    labels = np.array([[-100, 1, 2, -100], [0, -100, -100, -100], [-100] * 4])
    assert label_sequences(TOKENS, np.array([[4, 3, 0, 1]] * 3), labels) == [["B-y", "O"], ["I-y"], []]
    assert label_sequences(TOKENS, labels, labels) == [["B-x", "I-x"], ["O"], []]


# ---- names and directions ----


@every_task
def test_the_primary_metric_is_the_first_unless_named(name):
    task = TASKS[name]
    assert primary_metric(task) == PRIMARY[name] == default_metric_names(task)[0]
    for metric in (*default_metric_names(task), "loss"):
        assert primary_metric(Task.from_dict(task.to_dict() | {"metric": metric})) == metric


def test_f1_is_for_two_labels():
    assert "f1" in default_metric_names(BINARY) and "f1" not in default_metric_names(SINGLE)


def test_an_unknown_primary_metric_is_named_unless_metrics_are_the_users_own():
    task = Task("score", "regression", metric="pearsn")
    with pytest.raises(
        ValueError, match=r"task 'score': metric 'pearsn' .* did you mean 'pearson'\?; choose from pearson"
    ):
        primary_metric(task)
    assert primary_metric(task, custom=True) == "pearsn"


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        *((name, name != "mse") for task in TASKS.values() for name in default_metric_names(task)),
        ("loss", False),
        ("eval_tone_loss", False),
        ("rmse", False),
        ("MAE", False),
        ("mean_squared_error", False),
        ("perplexity", False),
        ("rouge1", True),
        ("loss_ratio", None),
    ],
)
def test_a_metrics_name_tells_its_direction(metric, expected):
    assert greater_is_better(metric) is expected


# ---- the user's own ----


@every_task
def test_without_a_function_the_defaults_are_computed(name):
    logits, labels = random_predictions(TASKS[name], 0)
    found = metric_function(TASKS[name])(EvalPrediction(logits, labels))
    assert found == compute_default_metrics(TASKS[name], logits, labels)


@every_task
def test_a_callable_is_given_the_logits(name):
    prediction = EvalPrediction(*random_predictions(TASKS[name], 0))
    seen = []
    found = metric_function(TASKS[name], lambda p: seen.append(p) or {"mine": 7.0})(prediction)
    assert found == {"mine": 7.0} and seen[0] is prediction


class Agreement(evaluate.Metric):
    """The part of the predictions that equal their reference, or lie within 0.5 of it."""

    item = None

    def _info(self):
        features = datasets.Features({"predictions": self.item, "references": self.item})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        flat, gold = (np.concatenate([np.atleast_1d(row) for row in part]) for part in (predictions, references))
        close = flat == gold if flat.dtype.kind in "UO" else np.abs(flat - gold) < 0.5
        return {"agreement": float(close.mean()), "count": len(close)}


ITEMS = {
    "binary": datasets.Value("int32"),
    "single": datasets.Value("int32"),
    "multi": datasets.List(datasets.Value("int32")),
    "score": datasets.Value("float32"),
    "scores": datasets.List(datasets.Value("float32")),
    "tokens": datasets.List(datasets.Value("string")),
}


@every_task
def test_a_module_of_evaluate_is_given_decoded_predictions(tmp_path, name):
    task = TASKS[name]
    module = type("Mine", (Agreement,), {"item": ITEMS[name]})(cache_dir=str(tmp_path))
    logits, labels = random_predictions(task, 0)
    found = metric_function(task, module)(EvalPrediction(logits, labels))
    if task.type is TaskType.REGRESSION:
        close = np.abs(logits - labels) < 0.5
    elif task.type is TaskType.MULTI_LABEL_CLASSIFICATION:
        close = (logits > 0) == labels
    else:
        close = (logits.argmax(-1) == labels)[labels != -100]
    assert found == {"agreement": pytest.approx(close.mean()), "count": close.size}


def test_what_is_neither_is_refused():
    with pytest.raises(
        TypeError, match=r"compute_metrics\['score'\] must be a callable or an evaluate module, got str"
    ):
        metric_function(SCORE, "accuracy")


def test_the_formulas_here_are_the_fields_own():
    logits, labels = random_predictions(SINGLE, 5)
    expected = by_hand(SINGLE, logits, labels)
    assert expected["macro_f1"] == pytest.approx(f1_score(labels, logits.argmax(1), average="macro"))
    assert expected["matthews_correlation"] == pytest.approx(matthews_corrcoef(labels, logits.argmax(1)))


def test_one_label_alone_is_scored_as_itself_not_against_its_absence():
    from hf_multitask.metrics import compute_default_metrics

    task = Task("x", "multi_label_classification", labels=("a",))
    labels = np.array([[1.0], [0.0], [0.0], [1.0]])
    nothing = compute_default_metrics(task, np.full((4, 1), -1.0), labels)
    assert nothing["micro_f1"] == nothing["macro_f1"] == 0.0 and nothing["accuracy"] == 0.5
    half = compute_default_metrics(task, np.array([[1.0], [1.0], [-1.0], [-1.0]]), labels)
    assert half["micro_f1"] == half["macro_f1"] == 0.5


# ---- answers and choices ----

ANSWERS, CHOICE = Task("who", "question_answering"), Task("next", "multiple_choice")


def test_choices_are_the_best_scores_and_padding_is_none():
    # -100 stands where other rows have more choices; the scores themselves may be lower.
    scores = np.array([[1.0, 2.0, -100.0], [-300.0, -200.0, -100.0], [0.0, -1.0, 5.0], [3.0, 1.0, 2.0]], np.float32)
    assert decode(CHOICE, scores).tolist() == [1, 1, 2, 0]
    assert compute_default_metrics(CHOICE, scores, np.array([1, 1, 2, 1])) == {"accuracy": 0.75}


def test_answers_are_compared_as_texts():
    found = compute_default_metrics(ANSWERS, ["the Paris", "", "in london"], [["Paris"], ["rome"], ["London", "x"]])
    assert found == {"f1": pytest.approx((1 + 0 + 2 / 3) / 3), "exact_match": pytest.approx(1 / 3)}


def test_names_of_their_metrics():
    assert default_metric_names(ANSWERS) == ("f1", "exact_match") and primary_metric(ANSWERS) == "f1"
    assert primary_metric(Task("who", "question_answering", metric="exact_match")) == "exact_match"
    assert default_metric_names(CHOICE) == ("accuracy",) == (primary_metric(CHOICE),)
    assert greater_is_better("f1") and greater_is_better("exact_match")
