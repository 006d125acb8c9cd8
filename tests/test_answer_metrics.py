"""Exact match and F1 as SQuAD counts them, by hand."""

from __future__ import annotations

import pytest

from hf_multitask.answer_metrics import answer_metrics, exact_match, normalize_answer, word_f1

PAIRS = [
    # given, right, exact match, F1
    ("Paris", "paris", 1, 1),
    ("the Paris.", "Paris", 1, 1),
    ("  a  big  apple ", "big apple", 1, 1),
    ("in Paris", "Paris", 0, 2 / 3),  # 1 of 2 words, 1 of 1
    ("Paris, France", "Paris in France", 0, 4 / 5),
    ("London", "Paris", 0, 0),
    ("big big apple", "big apple", 0, 4 / 5),  # a word counts as often as both have it
    ("big big", "big big apple", 0, 4 / 5),
    ("1,000", "1000", 1, 1),
    ("another", "other", 0, 0),  # an article within a word is none
    ("", "", 1, 1),
    ("", "Paris", 0, 0),
    ("Paris", "", 0, 0),
    ("the", "", 1, 1),
]


@pytest.mark.parametrize(("given", "right", "exact", "f1"), PAIRS)
def test_pairs(given, right, exact, f1):
    assert exact_match(given, right) == exact
    assert word_f1(given, right) == pytest.approx(f1)


def test_what_is_compared():
    assert normalize_answer("The Eiffel-Tower's (an) \t view") == "eiffeltowers view"


def test_means_over_questions_with_the_nearest_right_answer():
    answers = ["Paris", "in london town", "", "tower", "berlin"]
    references = [["Rome", "Paris"], ["London", "London Town"], [], [], ["the", "munich"]]
    metrics = answer_metrics(answers, references)
    assert list(metrics) == ["f1", "exact_match"]
    # 1 + 4/5 (2 of 3 words, 2 of 2) + 1 + 0 + 0
    assert metrics["f1"] == pytest.approx(2.8 / 5)
    assert metrics["exact_match"] == pytest.approx(2 / 5)
    assert answer_metrics([], []) == {"f1": 0.0, "exact_match": 0.0}
    with pytest.raises(ValueError, match="zip"):
        answer_metrics(["a"], [])


def test_right_answers_of_articles_alone_count_as_none():
    assert answer_metrics([""], [["The"]])["exact_match"] == 1.0
