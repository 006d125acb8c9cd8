"""What a checkpoint says of a multi-task run in `multitask_state.json`, checked before a run takes it over.

A checkpoint may have been copied in part, edited, or made by somebody else. A state that does not have the form of the
one that the run itself would write is refused, and nothing of it is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .models.limits import shown
from .models.saved_config import load_json

__all__ = ["STATE_NAME", "check_balancing", "check_form", "read_state"]

STATE_NAME = "multitask_state.json"

_KINDS: dict[str, tuple[type, ...]] = {
    "run": (dict,),
    "run_id": (str,),
    "rows_seen": (dict,),
    "skipped_steps": (int,),
    "skipped_in_a_row": (int,),
    "streaming": (bool,),
    "sampling": (list, type(None)),
    "balancing": (dict,),
}
_NEEDED = ("run", "balancing")


def read_state(checkpoint: str | Path) -> dict[str, Any] | None:
    """Return what `multitask_state.json` holds, or None where there is none (a checkpoint of another trainer).

    Raises:
        ValueError: It is cut off, or not what a trainer writes.
    """
    path = Path(checkpoint, STATE_NAME)
    if not path.is_file():
        return None
    where = f"{STATE_NAME} in {str(checkpoint)!r}"
    state = load_json(path, where, with_nan=True)
    for key, kinds in _KINDS.items():
        if key not in state and key not in _NEEDED:
            continue
        if key not in state or not _is_one(state[key], kinds):
            raise ValueError(
                f"{where}: {key} is {shown(state.get(key))}, which no trainer writes; take another checkpoint"
            )
    for name, rows in state.get("rows_seen", {}).items():
        if not _is_one(rows, (int,)) or rows < 0:
            raise ValueError(f"{where}: rows_seen of {shown(name)} is {shown(rows)}, no number of rows")
    for key in ("skipped_steps", "skipped_in_a_row"):
        if state.get(key, 0) < 0:
            raise ValueError(f"{where}: {key} is {state[key]}, no number of steps")
    for change in state.get("sampling") or []:
        if not _is_change(change):
            raise ValueError(f"{where}: sampling has {shown(change)}, which is no step with its probabilities")
    tasks = state["run"].get("tasks")
    if not isinstance(tasks, list) or not all(isinstance(task, dict) and "name" in task for task in tasks):
        raise ValueError(f"{where}: the run's tasks are {shown(tasks)}, no list of tasks")
    return state


def _is_one(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)


def _is_change(change: Any) -> bool:
    if not isinstance(change, list) or len(change) != 2 or not _is_one(change[0], (int,)):
        return False
    shares = change[1]
    numbers = isinstance(shares, list) and all(_is_one(share, (int, float)) and 0 <= share <= 1 for share in shares)
    return numbers and bool(shares) and math.isclose(sum(shares), 1.0, abs_tol=1e-6)


def check_balancing(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Check the saved state of the balancing by [`check_form`]; a loss weighting checks its own state itself.

    Raises:
        ValueError: It has another form.
    """
    if not isinstance(saved.get("weighting"), dict):
        raise ValueError(f"balancing.weighting in the checkpoint is {shown(saved.get('weighting'))}, no state")
    given, expected = ({key: part for key, part in one.items() if key != "weighting"} for one in (saved, own))
    check_form(given, expected, "balancing")


def check_form(saved: Any, own: Any, where: str) -> None:
    """Check that a saved state has the form of a run's own: the same keys, lists of the same lengths, numbers.

    Args:
        saved: The state in the checkpoint.
        own: What the run itself would write at its beginning.
        where: What it is, in front of a message.

    Raises:
        ValueError: It has another form.

    Example:
        >>> check_form({"weights": [0.5, 1.5]}, {"weights": [1.0, 1.0]}, "balancing")
        >>> check_form({"weights": [0.5]}, {"weights": [1.0, 1.0]}, "balancing")
        Traceback (most recent call last):
        ...
        ValueError: balancing.weights in the checkpoint is [0.5], which is not of the form that this run writes
    """
    wrong = False
    if isinstance(own, Mapping):
        wrong = not isinstance(saved, Mapping) or saved.keys() != own.keys()
        parts = [] if wrong else [(saved[key], own[key], f"{where}.{key}") for key in own]
    elif isinstance(own, (list, tuple)):
        wrong = not isinstance(saved, (list, tuple)) or len(saved) != len(own)
        parts = [] if wrong else [(a, b, where) for a, b in zip(saved, own, strict=True)]
    else:
        parts = []
        if _is_one(own, (int, float)):
            wrong = not _is_one(saved, (int, float))
        elif isinstance(own, (str, bool)):
            wrong = type(saved) is not type(own)
    if wrong:
        raise ValueError(f"{where} in the checkpoint is {shown(saved)}, which is not of the form that this run writes")
    for part in parts:
        check_form(*part)
