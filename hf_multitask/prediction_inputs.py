"""What raw input is for each task: which tasks read it, from which columns, and how long it may be for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .models.task import Task
from .row_prediction import reads_own_rows

__all__ = ["Reading", "Text", "check_options", "read_input"]

Text = str | Sequence[str] | tuple[str, str] | dict[str, Any]
"""A text; a list of words; texts as a tuple, where behind them may stand a list of choices; or a row of columns."""

_PAIR = ("text", "text_pair")  # what Transformers' pipelines call the texts of a pair


class Reading(NamedTuple):
    """One way in which tasks read an input.

    Args:
        tasks: The tasks that read it so.
        length: The longest input in tokens that they read.
        texts: The texts (strings or lists of words); for choices their list comes last.
    """

    tasks: tuple[Task, ...]
    length: int
    texts: tuple[Any, ...]


def check_options(**options: Any) -> None:
    """Raise ValueError where an option is no whole number from its least value, given as `name=(value, least)`."""
    for name, (value, least) in options.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"{name} must be a whole number from {least}, got {value!r}")


def read_input(text: Text, tasks: Sequence[Task], number: int, fitting: bool, max_length: int) -> list[Reading]:
    """Return the ways in which tasks read one input.

    Args:
        text: The input.
        tasks: The tasks.
        number: The input's number, for messages.
        fitting: Leave out tasks that read something else; one must be left.
        max_length: The longest input in tokens; tasks may have a shorter one.

    Raises:
        ValueError: A task (with `fitting`, every task) reads something else, or the input is no text.
    """
    groups: dict[tuple, list[Task]] = {}
    misfits = []
    if isinstance(text, dict):
        text = _by_position(text, tasks)
    for task in tasks:
        length = min(task.max_length or max_length, max_length)
        own = task.name if reads_own_rows(task) else None
        if isinstance(text, dict):
            fits = _columns(task) <= set(text)
            key: tuple = (length, task.text_columns, own)
        else:
            several = len(text) if isinstance(text, tuple) else 1
            # Words all along are a text; behind a text they are choices.
            chooses = several > 1 and isinstance(text[0], str) and isinstance(text[-1], list)
            fits = len(task.text_columns) == several - chooses and chooses == (task.choice_columns is not None)
            key = (length, None, own)
        if fits:
            groups.setdefault(key, []).append(task)
        else:
            misfits.append(task)
    if misfits and (not fitting or not groups):
        raise ValueError(f"input {number}{_misfit(text, misfits)}")
    readings = []
    for (length, columns, _), members in groups.items():
        row = tuple(text[c] for c in columns) if columns else text if isinstance(text, tuple) else (text,)
        choices = members[0].choice_columns
        if isinstance(text, dict) and choices:
            row = (*row, text[choices[0]] if len(choices) == 1 else [text[c] for c in choices])
        for part in row:
            if not _is_text(part, members[0]):
                raise ValueError(f"input {number} is {part!r}; a text must be a non-empty string or list of words")
        readings.append(Reading(tuple(members), length, row))
    return readings


def _columns(task: Task) -> set[str]:
    return {*task.text_columns, *(task.choice_columns or ())}


def _by_position(row: dict[str, Any], tasks: Sequence[Task]) -> Any:
    """Return a row of `text` and `text_pair` as the texts themselves, unless these are tasks' own columns."""
    own = set().union(*map(_columns, tasks))
    if set(row) == set(_PAIR) and "text_pair" not in own:
        return tuple(row[key] for key in _PAIR)
    return row["text"] if set(row) == {"text"} and "text" not in own else row


def _misfit(text: Any, misfits: Sequence[Task]) -> str:
    """Return what is wrong with an input that tasks do not read."""
    if isinstance(text, dict):
        wanted = sorted(set().union(*map(_columns, misfits)))
        return f" has the keys {sorted(map(str, text))}; the tasks read {', '.join(wanted)}; choose the tasks that fit"
    task = misfits[0]
    form = "a pair of texts" if len(task.text_columns) == 2 else "one text"
    form += " and a list of choices" if task.choice_columns else ""
    given = len(text) if isinstance(text, tuple) else 1
    return f": task {task.name!r} reads {form}, got {given} text(s); choose other tasks"


def _is_text(part: Any, task: Task) -> bool:
    if isinstance(part, str):
        return bool(part.strip())
    if not isinstance(part, list) or not part:
        return False
    chat = task.type.generates and all(isinstance(one, dict) for one in part)
    return chat or all(isinstance(word, str) for word in part)
