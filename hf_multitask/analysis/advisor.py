"""Advice from evidence: what the rules of [`hf_multitask.analysis.advice_rules`] make of what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .advice_rules import RULES, TOPICS, Rule
from .evidence import Evidence

__all__ = ["Advice", "Statement", "advise"]


@dataclass(frozen=True)
class Statement:
    """What one rule says.

    Args:
        topic: `sharing`, `sampling`, `weighting`, `combination` or `comparison`.
        rule: Name of the rule.
        recommendation: What to do.
        reason: Why.
        source: Who showed it.
        numbers: The numbers it rests on: a number, or a mean and the ends of its interval.
        enough: False where it says that there is not enough evidence.
    """

    topic: str
    rule: str
    recommendation: str
    reason: str
    source: str
    numbers: dict[str, Any]
    enough: bool = True

    def evidence(self) -> str:
        """Return the numbers in words."""
        return "; ".join(f"{name} {_in_words(value)}" for name, value in self.numbers.items())

    def __str__(self) -> str:
        return f"{self.topic}: {self.recommendation}. Why: {self.reason} ({self.evidence()}). Source: {self.source}."


@dataclass(frozen=True)
class Advice:
    """What follows from some evidence. It recommends; nothing is changed.

    Args:
        statements: What each rule that holds says, by topic.
    """

    statements: tuple[Statement, ...]

    def of_topic(self, topic: str) -> tuple[Statement, ...]:
        """Return the statements on a topic.

        Raises:
            ValueError: There is no such topic.
        """
        if topic not in TOPICS:
            raise ValueError(f"topic {topic!r} is not known; topics are {', '.join(TOPICS)}")
        return tuple(statement for statement in self.statements if statement.topic == topic)

    def rules(self) -> tuple[str, ...]:
        """Return the names of the rules that hold."""
        return tuple(statement.rule for statement in self.statements)

    def __str__(self) -> str:
        return "\n".join(str(statement) for statement in self.statements)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        return {"statements": [asdict(statement) for statement in self.statements]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Advice:
        """Make the object from the dictionary that [`to_dict`] gave."""
        return cls(tuple(Statement(**statement) for statement in values["statements"]))


def advise(evidence: Evidence, rules: Sequence[Rule] = RULES) -> Advice:
    """Recommend a sharing scheme, sampling, weighting and combination, as far as the evidence goes.

    Args:
        evidence: What is known; [`Evidence.from_preflight`] and [`Evidence.from_comparison`] make it of what was
            measured.
        rules: The rules; they are asked in their order.

    Returns:
        [`Advice`]: a statement for each rule that holds, with the numbers it rests on and its source. Where the
        evidence decides nothing, a statement says so.

    Raises:
        TypeError: `evidence` is no [`Evidence`].

    Example:
        >>> evidence = Evidence(("tone", "topic"), losses={"tone": 0.7, "topic": 250.0})
        >>> [statement.rule for statement in advise(evidence).of_topic("weighting")]
        ['scales_apart', 'tune_weights_first']
    """
    if not isinstance(evidence, Evidence):
        raise TypeError(
            f"evidence must be an Evidence, got {type(evidence).__name__}; make one with Evidence.from_preflight(...) "
            "or Evidence.from_comparison(...)"
        )
    statements = []
    for rule in rules:
        numbers = rule.condition(evidence)
        if numbers is not None:
            words = rule.recommendation, rule.reason, rule.source
            statements.append(Statement(rule.topic, rule.name, *words, dict(numbers), rule.enough))
    return Advice(tuple(statements))


def _in_words(value: Any) -> str:
    if isinstance(value, list):
        mean, low, high = value
        return f"{mean:+.3g} ({low:+.3g} to {high:+.3g})"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
