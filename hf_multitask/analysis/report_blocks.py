"""What a report page is made of: sections of sentences, tables and figures, and how numbers are written in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["MISSING", "NONE", "Code", "Figure", "Section", "Table"]
__all__ += ["big", "change", "duration", "number", "percent", "seconds", "signed"]

MISSING = "missing"
NONE = "-"


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        head: Heads of the columns, with the unit where there is one.
        rows: Cells, as many in each row as there are heads.
        left: Numbers of the columns that hold words; the others hold numbers, and are aligned to the right.
        caption: What the table holds.
        folded: Whether a page that can fold shows it on demand only.
        facts: Whether it has names of facts in one column and the facts in the other, so that it need not be a table.

    Raises:
        ValueError: A row has another number of cells.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: frozenset[int] = frozenset([0])
    caption: str = ""
    folded: bool = False
    facts: bool = False

    def __post_init__(self) -> None:
        """Check the rows."""
        for row in self.rows:
            if len(row) != len(self.head):
                raise ValueError(f"row {list(row)} has {len(row)} cells, and the table {len(self.head)} columns")


@dataclass(frozen=True)
class Figure:
    """One picture.

    Args:
        svg: The picture, an `svg` element.
        title: What it is of: a task, a layer, a run or a quantity.
        note: A sentence on what is drawn.
        wide: Whether it needs the whole width of a page.
    """

    svg: str
    title: str = ""
    note: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Code:
    """Text to be shown as it is, on demand.

    Args:
        title: What it is.
        text: The text.
    """

    title: str
    text: str


@dataclass
class Section:
    """A part of a page.

    Args:
        title: Its heading.
        blocks: Sentences, tables, lists of figures (one beside the other), text as it is, in order.
    """

    title: str
    blocks: list[str | Table | list[Figure] | Code] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        """What a link within the page goes to."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


def number(value: float | None, missing: str = MISSING) -> str:
    """Return a metric or a loss: three decimals, or four significant digits where these say too little or too much.

    Example:
        >>> number(0.75761), number(-0.0), number(1234.5), number(0.00031), number(None)
        ('0.758', '0.000', '1,234', '0.00031', 'missing')
    """
    if value is None:
        return missing
    if value == 0:
        return "0.000"
    if abs(value) >= 1e6 or abs(value) < 1e-4:
        return f"{value:.2e}"
    if abs(value) >= 100:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}"
    return f"{value:.2g}" if abs(value) < 1e-3 else f"{value:.3f}"


def signed(value: float | None, missing: str = MISSING) -> str:
    """Return a difference of metrics, with its sign."""
    if value is None:
        return missing
    if value == 0:
        return "0.000"
    return f"{value:+.2g}" if 0 < abs(value) < 5e-4 else f"{value:+.3f}"


def change(delta: dict[str, Any]) -> str:
    """Return Δm with its interval."""
    if delta.get("value") is None:
        return "not defined, as the metric of a baseline is 0"
    low, high = delta["interval"]
    return f"{delta['value']:+.1%} ({low:+.1%} to {high:+.1%})"


def percent(value: float | None, missing: str = MISSING) -> str:
    """Return a share."""
    return missing if value is None else f"{value:.1%}"


def big(value: float | None, missing: str = MISSING) -> str:
    """Return a count, in groups of three digits."""
    return missing if value is None else f"{value:,.0f}"


def seconds(value: float | None, missing: str = MISSING) -> str:
    """Return a time, or anything else per second, with a decimal; three below 10."""
    if value is None:
        return missing
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def duration(took: float | None, missing: str = MISSING) -> str:
    """Return a time as people say it.

    Example:
        >>> duration(4.25), duration(318), duration(9000)
        ('4.2 s', '5 min 18 s', '2 h 30 min')
    """
    if took is None:
        return missing
    if took < 60:
        return f"{took:.1f} s"
    minutes, rest = divmod(round(took), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
