"""Markdown that nothing can break out of: names and labels come from people's data, and stay text."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from typing import Any

__all__ = ["code_span", "escape", "plain", "show", "table"]

_MARKS = re.compile(r"([\\`*_\[\]|~#$!])")
_MOST_CHARACTERS = 120


def plain(value: Any) -> str:
    """Return text on one line, without control characters, cut where it is very long."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…"


def escape(value: Any) -> str:
    r"""Return text that Markdown, tables and HTML show as it is.

    Example:
        >>> print(escape("a|b <i>"))
        a\|b &lt;i&gt;
    """
    return _MARKS.sub(r"\\\1", html.escape(plain(value), quote=False))


def code_span(value: Any) -> str:
    """Return text in fixed width; with marks of its own in it, as [`escape`] does."""
    text = plain(value)
    return escape(text) if re.search(r"[`|<>&\\]", text) or not text else f"`{text}`"


def show(value: Any) -> str:
    """Return a value as people write it: numbers short, dictionaries as JSON."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    return plain(json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else value)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Return a table in Markdown; cells are Markdown already.

    Args:
        head: Titles of the columns.
        rows: The cells.
        right: Columns of numbers.
    """
    marks = ["---:" if i in right else "---" for i in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, marks, *rows))
