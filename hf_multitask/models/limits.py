"""How large a description may be that comes from a file: what lies beyond is refused before anything is built of it.

A model's configuration may come from anybody. Built as it stands, a million labels or layers would fill the memory or
take hours, so there are limits, far above what models have. They hold for tasks made in Python, too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

__all__ = [
    "MOST_LABELS",
    "MOST_LAYERS",
    "MOST_TASKS",
    "check_pattern",
    "check_plain",
    "check_sizes",
    "is_text",
    "shown",
]

MOST_TASKS = 1_000
"""Tasks of a model."""
MOST_LABELS = 100_000
"""Labels of all tasks of a model together."""
LONGEST_NAME = 10_000
"""Characters of a label, or of the name of a column or dataset."""
MOST_LAYERS = 1_000
"""Layers of a backbone."""
MOST_EXPERTS = 10_000
"""Experts of a layer."""
MOST_POSITIONS = 2**24
"""Positions of a backbone."""
_MOST_REPETITIONS = 4
DEEPEST = 40
"""Dictionaries and lists within each other."""

# Numbers that say how many parts are made one by one.
_SIZES = (
    (re.compile(r"layer|depth|attention_types|blocks"), MOST_LAYERS),
    (re.compile(r"experts"), MOST_EXPERTS),
    (re.compile(r"positions?(_embeddings)?$"), MOST_POSITIONS),
    (re.compile(r"num_labels"), MOST_LABELS),
)


def shown(value: object, longest: int = 200) -> str:
    """Return a value as an error message shows it: cut where it is long.

    Example:
        >>> shown("ab" * 1000, longest=12)
        "'ababa... (2002 characters)"
    """
    if isinstance(value, (list, tuple, set, frozenset, dict)) and len(value) > longest:
        return f"{type(value).__name__} of {len(value):,}"
    text = repr(value)
    return text if len(text) <= longest else f"{text[: longest // 2]}... ({len(text)} characters)"


def is_text(value: object) -> bool:
    r"""Return whether a value is a string that names and files can hold: neither empty nor endless, no NUL.

    Half of a character, which JSON can write and no file can hold, is no text either.

    Example:
        >>> is_text("größe"), is_text(""), is_text("a\0b"), is_text("\ud800")
        (True, False, False, False)
    """
    if not isinstance(value, str) or not 0 < len(value) <= LONGEST_NAME or "\0" in value:
        return False
    return not any("\ud800" <= character <= "\udfff" for character in value)


def check_pattern(pattern: str, where: str) -> None:
    """Check a regular expression for names of modules, which must not take for ever to try.

    Raises:
        ValueError: It is none, is long, repeats a group, or has many repetitions, which are tried one by another.

    Example:
        >>> check_pattern(r".*layer.(0|1).*query", "target_modules")
        >>> check_pattern("(a+)+", "target_modules")
        Traceback (most recent call last):
        ...
        ValueError: target_modules '(a+)+' repeats a group, which can take for ever; name the modules in a list
    """
    plain = re.sub(r"\\.|\[[^\]]*\]", "x", pattern)
    if len(pattern) > 1000 or len(re.findall(r"[*+{]", plain)) > _MOST_REPETITIONS:
        wrong = f"is longer than 1,000 characters or has more than {_MOST_REPETITIONS} repetitions"
    elif re.search(r"\)[*+{]", plain):
        wrong = "repeats a group"
    else:
        try:
            re.compile(pattern)
            return
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{where} {shown(pattern)} is no regular expression: {error}") from None
    raise ValueError(f"{where} {shown(pattern)} {wrong}, which can take for ever; name the modules in a list")


def check_plain(values: Any, where: str, with_nan: bool = False) -> None:
    """Check that values are what JSON can hold, in a sane depth, without NaN.

    Args:
        values: Any nesting of dictionaries and lists.
        where: What it is, in front of a message.
        with_nan: Numbers may be NaN.

    Raises:
        ValueError: They are not.
    """
    for path, value, depth in _walk(values):
        if depth > DEEPEST:
            raise ValueError(f"{where}: {'.'.join(path[:3])}... is nested deeper than {DEEPEST} levels")
        if isinstance(value, float) and math.isnan(value) and not with_nan:
            raise ValueError(f"{where}: {'.'.join(path) or 'a value'} is NaN, which is no number")
        if not isinstance(value, (dict, list, tuple, str, int, float, type(None))):
            raise ValueError(f"{where}: {'.'.join(path) or 'a value'} is of type {type(value).__name__}, not of JSON's")


def check_sizes(values: Any, where: str) -> None:
    """Check the numbers in a configuration that say how many parts of a kind a model has.

    Args:
        values: A configuration as a dictionary.
        where: What it is, in front of a message.

    Raises:
        ValueError: A number is negative or above its limit.
    """
    for path, value, _ in _walk(values):
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        named = [part for part in path if not part.isdecimal()]
        for pattern, most in _SIZES if named else ():
            if not pattern.search(named[-1]):
                continue
            # -1 is how some say that there is no limit, or the last.
            if not -1 <= value <= most:
                raise ValueError(f"{where}: {'.'.join(path)} must lie in 0 ... {most:,}, got {shown(value)}")


def _walk(values: Any) -> Iterator[tuple[tuple[str, ...], Any, int]]:
    """Yield all values of a nesting with their paths and depths; a walk over a stack, so that none is too deep."""
    stack: list[tuple[tuple[str, ...], Any, int]] = [((), values, 0)]
    while stack:
        path, value, depth = stack.pop()
        yield path, value, depth
        if depth > DEEPEST:
            continue
        if isinstance(value, dict):
            stack += [((*path, str(key)), item, depth + 1) for key, item in value.items()]
        elif isinstance(value, (list, tuple)):
            stack += [((*path, str(i)), item, depth + 1) for i, item in enumerate(value)]
