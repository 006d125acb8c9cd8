"""The advisor: every rule holds for some evidence and not for other, shows its numbers and its source, and says when
it does not know."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from hf_multitask import advise
from hf_multitask.analysis.advice_rules import RULES, TOPICS
from hf_multitask.analysis.advisor import Advice
from hf_multitask.analysis.evidence import Evidence, PairEvidence

TWO = Evidence(("a", "b"))
FIVE = Evidence(tuple("abcde"))


def pairs(*cosines: tuple[float, float], tasks: str = "abc") -> tuple[PairEvidence, ...]:
    """Pairs of some tasks in order, each with a cosine and half the width of its interval."""
    names = [(a, b) for i, a in enumerate(tasks) for b in tasks[i + 1 :]]
    return tuple(
        PairEvidence(a, b, cosine, max(cosine - half, -1), min(cosine + half, 1))
        for (a, b), (cosine, half) in zip(names, cosines, strict=False)
    )


def compared(a: tuple, b: tuple) -> Evidence:
    keys = ("verdict", "difference", "interval")
    return Evidence.from_comparison({"a": dict(zip(keys, a, strict=True)), "b": dict(zip(keys, b, strict=True))})


ALIKE = replace(TWO, sizes={"a": 1000, "b": 1500}, losses={"a": 0.7, "b": 1.4}, pairs=pairs((0.4, 0.1)))
THREE = Evidence(("a", "b", "c"), sizes={"a": 900, "b": 900, "c": 900})

# By rule: evidence for which it holds, and evidence, nearly the same, for which it does not.
HOLDS = {
    "one_task": (Evidence(("a",)), TWO),
    "separate": (replace(TWO, pairs=pairs((-0.3, 0.1))), replace(TWO, pairs=pairs((-0.3, 0.4)))),
    "hard": (ALIKE, replace(ALIKE, sizes={"a": 1000, "b": 15_000})),
    "soft": (
        replace(THREE, pairs=pairs((0.2, 0.1), (0.03, 0.1), (0.02, 0.1))),
        replace(THREE, pairs=pairs((0.2, 0.1), (0.03, 0.1), (0.02, 0.1)), parameter_budget=2.0),
    ),
    "conditioned": (
        replace(FIVE, backbone_parameters=110_000_000),
        replace(FIVE, backbone_parameters=22_000_000),
    ),
    "experts": (
        Evidence(tuple("abcdefghijkl"), sizes=dict.fromkeys("abcdefghijkl", 10_000)),
        Evidence(tuple("abcdefghijkl"), sizes=dict.fromkeys("abcdefghijkl", 1000)),
    ),
    "auxiliary": (
        replace(TWO, sizes={"a": 300, "b": 20_000}, primary="a"),
        replace(TWO, sizes={"a": 300, "b": 20_000}, primary="b"),
    ),
    "granularity": (
        replace(TWO, granularity={"a": "text", "b": "token"}),
        replace(TWO, granularity={"a": "text", "b": "text"}),
    ),
    "unknown_relation": (replace(TWO, pairs=pairs((0.02, 0.1))), replace(TWO, pairs=pairs((0.2, 0.1)))),
    "balanced": (ALIKE, replace(ALIKE, sizes={"a": 1000, "b": 9000})),
    "temperature": (replace(TWO, sizes={"a": 100, "b": 1000}), replace(TWO, sizes={"a": 100, "b": 200})),
    "unimax": (replace(TWO, sizes={"a": 100, "b": 100_000}), replace(TWO, sizes={"a": 100, "b": 1000})),
    "repeats": (replace(TWO, passes={"a": 40.0}), replace(TWO, passes={"a": 4.0})),
    "no_sizes": (replace(TWO, sizes={"a": 100}), replace(TWO, sizes={"a": 100, "b": 100})),
    "fixed_weights": (ALIKE, replace(ALIKE, losses={"a": 0.7, "b": 14.0})),
    "scales_apart": (replace(TWO, losses={"a": 0.7, "b": 70.0}), replace(TWO, losses={"a": 0.7, "b": 7.0})),
    "scale_aware": (
        replace(TWO, losses={"a": 0.7, "b": 70.0}, weighting="uncertainty"),
        replace(TWO, losses={"a": 0.7, "b": 70.0}, weighting="dwa"),
    ),
    "no_losses": (replace(TWO, losses={"a": 0.7}), ALIKE),
    "tune_weights_first": (TWO, Evidence(("a",))),
    "combine": (replace(TWO, pairs=pairs((-0.3, 0.1))), replace(TWO, pairs=pairs((-0.05, 0.01)))),
    "plain_sum": (replace(TWO, pairs=pairs((-0.05, 0.01))), replace(TWO, pairs=pairs((-0.05, 0.2)))),
    "undecided_conflict": (replace(TWO, pairs=pairs((-0.05, 0.2))), replace(TWO, pairs=pairs((-0.05, 0.01)))),
    "noisy": (
        replace(TWO, pairs=pairs((0.0, 0.01)), reproducibility={"a": 0.02, "b": 0.5}),
        replace(TWO, pairs=pairs((0.0, 0.01)), reproducibility={"a": 0.6, "b": 0.5}),
    ),
    "not_measured": (TWO, replace(TWO, pairs=pairs((0.1, 0.01)))),
    "worse": (
        compared(("worse", -0.04, [-0.06, -0.02]), ("equal", 0.0, [-0.004, 0.004])),
        compared(("better", 0.04, [0.02, 0.06]), ("equal", 0.0, [-0.004, 0.004])),
    ),
    "deploy": (
        compared(("better", 0.04, [0.02, 0.06]), ("equal", 0.0, [-0.004, 0.004])),
        compared(("better", 0.04, [0.02, 0.06]), ("undecided", 0.0, [-0.04, 0.04])),
    ),
    "undecided": (
        compared(("better", 0.04, [0.02, 0.06]), ("undecided", 0.0, [-0.04, 0.04])),
        compared(("better", 0.04, [0.02, 0.06]), ("better", 0.04, [0.02, 0.06])),
    ),
    "not_compared": (TWO, compared(("equal", 0.0, [-0.01, 0.01]), ("equal", 0.0, [-0.01, 0.01]))),
}


def test_every_rule_is_tried():
    assert set(HOLDS) == {rule.name for rule in RULES} and len(RULES) == len(HOLDS)


@pytest.mark.parametrize("rule", HOLDS)
def test_a_rule_holds_where_it_should_and_nowhere_else(rule):
    yes, no = HOLDS[rule]
    assert rule in advise(yes).rules() and rule not in advise(no).rules()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_every_rule_has_a_topic_a_reason_and_a_source_with_its_year(rule):
    assert rule.topic in TOPICS and rule.recommendation and rule.reason
    assert rule.source == "the measurement itself" or re.search(r"(19|20)\d\d, [A-Z]", rule.source)
    assert rule.enough != rule.recommendation.startswith("not enough evidence")


@pytest.mark.parametrize("rule", HOLDS)
def test_every_statement_shows_the_numbers_it_rests_on(rule):
    (said,) = [one for one in advise(HOLDS[rule][0]).statements if one.rule == rule]
    assert said.numbers
    for name, value in said.numbers.items():
        assert name in str(said)
        assert (f"{value[0]:+.3g} ({value[1]:+.3g} to" if isinstance(value, list) else "") in str(said)
    assert said.source in str(said) and said.reason in str(said)


def test_conflict_is_advised_on_with_what_speaks_against_it():
    advice = advise(replace(TWO, pairs=pairs((-0.3, 0.1)), losses={"a": 1.0, "b": 1.0}))
    (combine,) = advice.of_topic("combination")
    assert combine.numbers == {"cosine of a and b": [-0.3, -0.4, pytest.approx(-0.2)]}
    assert "upgrad" in combine.recommendation and "Kurin et al. 2022" in combine.source and "against" in combine.source
    assert "tuned fixed weights" in combine.recommendation
    assert "hard" not in advice.rules()


def test_nothing_is_known_without_evidence_and_it_says_so():
    advice = advise(TWO)
    for topic in ("sharing", "sampling", "weighting", "combination", "comparison"):
        assert any(not statement.enough for statement in advice.of_topic(topic)), topic
    assert {s.rule for s in advice.statements if s.enough} == {"tune_weights_first"}


def test_the_proposed_weights_and_the_shares_are_shown():
    evidence = replace(TWO, losses={"a": 0.7, "b": 70.0}, weights={"a": 10.0, "b": 0.1}, sizes={"a": 100, "b": 1000})
    advice = advise(evidence)
    (apart,) = [s for s in advice.statements if s.rule == "scales_apart"]
    assert apart.numbers["weight of a"] == 10.0 and apart.numbers["largest over smallest loss"] == pytest.approx(100)
    (temperature,) = [s for s in advice.statements if s.rule == "temperature"]
    assert temperature.numbers["share of the smallest at alpha 1"] == pytest.approx(100 / 1100)
    assert temperature.numbers["share of the smallest at alpha 0.5"] == pytest.approx(10 / (10 + 1000**0.5))


def test_advice_is_written_and_read_back():
    advice = advise(ALIKE)
    assert Advice.from_dict(advice.to_dict()) == advice
    with pytest.raises(ValueError, match="topic 'shares' is not known; topics are sharing"):
        advice.of_topic("shares")


# Evidence


def test_evidence_of_a_comparison_and_a_preflight_can_be_put_together():
    sections = {
        "tasks": [
            {"name": "a", "granularity": "text", "auxiliary": False, "rows": 100},
            {"name": "b", "granularity": "token", "auxiliary": True, "rows": None},
        ],
        "setting": {"sharing": "hard", "backbone_parameters": 10, "primary": "a", "weighting": "static"},
        "losses": {
            "tasks": [
                {"task": "a", "weighted": 0.5, "proposed_weight": 2.0},
                {"task": "b", "weighted": None, "proposed_weight": None},
            ]
        },
        "plan": {"sources": [{"tasks": ["a", "b"], "passes": 3.0}]},
        "conflict": {
            "result": {
                "tasks": ["a", "b"],
                "reproducibility": [0.5, 0.1],
                "pairs": [{"a": "a", "b": "b", "cosine": 0.1, "low": 0.0, "high": 0.2, "verdict": "neutral"}],
            }
        },
    }
    found = Evidence.from_preflight({"sections": sections}, parameter_budget=1.5)
    assert found.sizes == {"a": 100} and found.auxiliary == ("b",) and found.passes == {"a": 3.0, "b": 3.0}
    assert found.losses == {"a": 0.5} and found.weights == {"a": 2.0} and found.parameter_budget == 1.5
    assert found.pairs == (PairEvidence("a", "b", 0.1, 0.0, 0.2),) and found.reproducibility["b"] == 0.1
    compared = Evidence.from_comparison({"a": {"verdict": "better", "difference": 1, "interval": [0.5, 1.5]}})
    both = replace(found, comparison=compared.comparison)
    assert both.comparison["a"].low == 0.5 and both.sharing == "hard" and both.tasks == ("a", "b")
    with pytest.raises(ValueError, match="no section 'tasks'"):
        Evidence.from_preflight({})


ROW = {"verdict": "better", "difference": 0.1, "interval": [0.0, 0.2]}


@pytest.mark.parametrize(
    "make, part",
    [
        (lambda: Evidence(()), "at least one"),
        (lambda: Evidence("ab"), "names of the tasks"),
        (lambda: replace(TWO, sizes={"tune": 3}), "sizes: 'tune' is no task; tasks are a, b"),
        (lambda: replace(Evidence(("tone", "b")), primary="tune"), "did you mean 'tone'"),
        (lambda: replace(TWO, losses={"a": float("nan")}), "must be a finite number of at least 0, got nan"),
        (lambda: replace(TWO, pairs=(PairEvidence("a", "b", 0.1, 0.2, 0.3),)), "low <= cosine <= high"),
        (lambda: replace(TWO, parameter_budget=0.5), "at least 1, got 0.5"),
        (lambda: Evidence.from_comparison({"a": {**ROW, "verdict": "beter"}}), "did you mean 'better'"),
        (lambda: Evidence.from_comparison({"a": {"verdict": "better"}}), "lacks difference, interval"),
        (lambda: Evidence.from_comparison({"a": {**ROW, "difference": float("nan")}}), "finite numbers, got nan"),
        (lambda: Evidence.from_comparison({"a": {**ROW, "interval": None}}), "finite numbers"),
    ],
)
def test_bad_evidence_is_refused(make, part):
    with pytest.raises(ValueError) as error:
        make()
    assert part in str(error.value)


def test_what_is_no_evidence_is_refused():
    with pytest.raises(TypeError, match="evidence must be an Evidence, got dict"):
        advise({"tasks": ["a"]})
