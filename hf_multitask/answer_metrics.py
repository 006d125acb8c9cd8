"""How near given answers are to right ones: exact match and F1 over words, as SQuAD counts them.

Before they are compared, answers lose their case, punctuation, articles and superfluous spaces (Rajpurkar et al. 2016).
Of several right answers the nearest counts. Where there is none, an empty answer is right and every other wrong
(Rajpurkar et al. 2018).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

__all__ = ["answer_metrics", "exact_match", "normalize_answer", "word_f1"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Return an answer as it is compared.

    Example:
        >>> normalize_answer("The  Eiffel Tower, (Paris)!")
        'eiffel tower paris'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(answer: str, reference: str) -> float:
    """Return 1.0 where two answers are the same, else 0.0."""
    return float(normalize_answer(answer) == normalize_answer(reference))


def word_f1(answer: str, reference: str) -> float:
    """Return the F1 of the words of an answer against those of a right one, in [0, 1]; both empty is 1.

    Example:
        >>> word_f1("the tower in Paris", "Eiffel Tower")  # 1 of 3 words, 1 of 2
        0.4
    """
    given, wanted = normalize_answer(answer).split(), normalize_answer(reference).split()
    if not given or not wanted:
        return float(given == wanted)
    common = (Counter(given) & Counter(wanted)).total()
    return 2 * common / (len(given) + len(wanted))


def answer_metrics(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the means over questions of `f1` and `exact_match`, in [0, 1].

    Args:
        answers: For each question, the answer that was given; empty for none.
        references: For each question, all right answers; empty where there is none.
    """
    totals = {"f1": 0.0, "exact_match": 0.0}
    for answer, right in zip(answers, references, strict=True):
        # An answer of articles alone would be as good as none.
        wanted = [reference for reference in right if normalize_answer(reference)] or [""]
        totals["f1"] += max(word_f1(answer, reference) for reference in wanted)
        totals["exact_match"] += max(exact_match(answer, reference) for reference in wanted)
    return {name: total / max(len(answers), 1) for name, total in totals.items()}
