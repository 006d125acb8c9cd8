"""How the weight of a task changes over training: a factor of its loss that depends on the optimizer step alone.

`Task(weight_schedule=...)` is a name or a dictionary with `type` and that type's arguments:

- `constant`: 1 (the default, None, is the same).
- `linear`: from 1 in a straight line to `end`, which it reaches at `until` and keeps.
- `cosine`: from 1 along half a cosine to `end`, reached at `until` and kept.
- `off`: 1 before `after`, and 0 from there on.

`end` is a number of at least 0 (default 0): the task's weight is `end * Task.weight` in the end, so above 1 it grows.
`until` (default 1.0) and `after` (no default) say when. A number with a decimal point is a fraction of the training's
optimizer steps, a whole number is the number of a step, counted from 0: `1.0` is the end of training and `1` the second
step. A factor that falls until the end of training is a little above `end` in the last step, as a learning rate is.

The factor is a pure function of the step, so a run that goes on from a checkpoint has the factors it would have had.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

__all__ = ["depends_on_length", "schedule_factor", "settle_schedule"]

# By type, its arguments and their defaults; `...` for one that must be given.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "constant": {},
    "linear": {"end": 0.0, "until": 1.0},
    "cosine": {"end": 0.0, "until": 1.0},
    "off": {"after": ...},
}
_LARGEST = 1e30  # losses are computed in float32
_EXAMPLE_OF_OFF = '{"type": "off", "after": 0.5}'


def settle_schedule(schedule: str | Mapping[str, Any] | None, owner: str = "") -> dict[str, Any] | None:
    """Return a schedule with all its arguments, as a new dictionary of plain JSON types; None for a constant one.

    Args:
        schedule: A name, a dictionary with `type`, or None.
        owner: Whose it is, in front of a message.

    Raises:
        ValueError: The type or an argument is unknown (the nearest is named), missing, or out of its range.

    Example:
        >>> settle_schedule("linear")
        {'type': 'linear', 'end': 0.0, 'until': 1.0}
        >>> settle_schedule({"type": "off", "after": 500})
        {'type': 'off', 'after': 500}
    """
    where = f"{owner}weight_schedule"
    if schedule is None:
        return None
    given = {"type": schedule} if isinstance(schedule, str) else schedule
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} must be a name or a dictionary with 'type', got {schedule!r}")
    if "type" not in given:
        raise ValueError(f"{where} {dict(given)!r} lacks 'type'; types are {', '.join(_ARGUMENTS)}")
    kind = given["type"]
    if not isinstance(kind, str) or kind not in _ARGUMENTS:
        raise ValueError(
            f"{where} {kind!r} is not known{_nearest(kind, _ARGUMENTS)}; types are {', '.join(_ARGUMENTS)}"
        )
    own = _ARGUMENTS[kind]
    for key in given:
        if key != "type" and key not in own:
            takes = f"it takes {', '.join(own) or 'no arguments'}"
            raise ValueError(f"{where} {kind!r} takes no {key!r}{_nearest(key, own)}; {takes}")
    settled = {"type": kind, **own, **{key: given[key] for key in own if key in given}}
    if settled.get("after", 0) is ...:
        raise ValueError(f"{where} 'off' needs 'after': a step, or a fraction of all steps, such as {_EXAMPLE_OF_OFF}")
    if "end" in settled and not _is_number(settled["end"]):
        raise ValueError(f"{where}: end must be a finite number of at least 0, got {settled['end']!r}")
    for key, first, last in (("until", 1, "1]"), ("after", 0, "1)")):
        if key in settled and not _is_time(settled[key], first, to_the_end=last == "1]"):
            raise ValueError(
                f"{where}: {key} must be a whole number of steps of at least {first}, or a fraction of all steps in "
                f"(0, {last} written with a decimal point, got {settled[key]!r}"
            )
    return None if kind == "constant" else settled


def _nearest(name: object, known: Mapping[str, Any]) -> str:
    matches = get_close_matches(str(name), list(known), n=1)
    return f", did you mean {matches[0]!r}?" if matches else ""


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < _LARGEST


def _is_time(value: object, first: int, to_the_end: bool) -> bool:
    if isinstance(value, float):
        return 0 < value < 1 or (to_the_end and value == 1)
    return isinstance(value, int) and not isinstance(value, bool) and value >= first


def depends_on_length(schedule: str | Mapping[str, Any] | None) -> bool:
    """Return whether a schedule needs to know how many optimizer steps the whole training has."""
    settled = settle_schedule(schedule) or {}
    return any(isinstance(settled.get(key), float) for key in ("until", "after"))


def schedule_factor(schedule: str | Mapping[str, Any] | None, step: int, total_steps: int) -> float:
    """Return what the weight of a task is multiplied with in an optimizer step.

    Args:
        schedule: In any of its forms, as [`settle_schedule`] takes it.
        step: Number of the optimizer step, from 0.
        total_steps: Optimizer steps of the whole training; looked at only if [`depends_on_length`].

    Example:
        >>> [schedule_factor({"type": "linear", "end": 0.0, "until": 0.5}, step, 8) for step in range(6)]
        [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
        >>> [schedule_factor({"type": "off", "after": 2}, step, 8) for step in range(4)]
        [1.0, 1.0, 0.0, 0.0]
    """
    settled = settle_schedule(schedule)
    if settled is None:
        return 1.0
    kind, off = settled["type"], settled["type"] == "off"
    when = settled["after" if off else "until"]
    # Rounded, so that 0.55 of 100 steps are 55 and not a little more.
    steps = round(when * total_steps, 6) if isinstance(when, float) else when
    end = 0.0 if off else float(settled["end"])
    if step >= steps:
        return end
    passed = step / steps
    if kind == "linear":
        return 1.0 + (end - 1.0) * passed
    return 1.0 if off else end + (1.0 - end) * (1.0 + math.cos(math.pi * passed)) / 2
