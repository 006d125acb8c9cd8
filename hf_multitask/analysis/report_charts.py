"""Charts of a report: `svg` elements that stand in the page itself, drawn by matplotlib.

Text stays text. Axes and words take the colour of the page around them (`currentColor`), so that one picture serves a
light and a dark page; the colours of lines have a contrast of at least 3 to both (WCAG 2.2, 1.4.11), and dashes tell
lines apart where colours cannot. Each picture carries a sentence that says what it shows.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np

from .plots import new_figure

__all__ = ["COLOURS", "Interval", "Line", "draw_heat", "draw_intervals", "draw_lines"]

COLOURS = ("#3f7fd0", "#d0691a", "#2c9650", "#9569d3", "#d6455a", "#1f93a3", "#a3744a", "#cc5ba5", "#7c858f", "#8b9020")
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)))
_MARKERS = "osD^vP"
_INK = "#0b0c0d"  # stands for the colour of the text around the picture
_MOST_POINTS = 400  # of a line
_WIDE = 50.0  # from the smallest to the largest value: then the axis is logarithmic
_PIXELS = 1.3  # of a point of matplotlib, where there is room
_SVG = "http://www.w3.org/2000/svg"
_LINK = "{http://www.w3.org/1999/xlink}href"
_VERDICTS = {"better": ("^", COLOURS[2]), "equal": ("s", COLOURS[0]), "undecided": ("o", COLOURS[8])}
_VERDICTS |= {"worse": ("v", COLOURS[4])}


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Args:
        name: What it is of.
        x: Its steps, ascending.
        y: Its values.
        colour: Number of its colour.
        dash: Number of its dashes; 0 is a solid line.
        marked: Whether every point has a dot.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dash: int = 0
    marked: bool = False


@dataclass(frozen=True)
class Interval:
    """A difference and how sure it is, in parts of a baseline.

    Args:
        name: What it is of.
        value: The difference.
        low: Lower end of its interval.
        high: Upper end.
        margin: Differences up to here do not matter.
        verdict: `better`, `equal`, `worse` or `undecided`.
    """

    name: str
    value: float
    low: float
    high: float
    margin: float
    verdict: str


def draw_lines(lines: Sequence[Line], y_label: str, alt: str, *, shares: bool = False) -> str:
    """Return a chart of lines over the steps of a training.

    Lines of very many points are drawn through the means of neighbouring ones. The axis is logarithmic where values
    above 0 differ by more than a factor of 50.

    Args:
        lines: The lines; several get a legend.
        y_label: What is on the vertical axis, with its unit.
        alt: The picture in words.
        shares: Whether values are parts of 1, written in percent from 0 on.

    Raises:
        ImportError: matplotlib is not installed.
    """
    rows = -(-len(lines) // 2) if len(lines) > 1 else 0
    with _own_style():
        from matplotlib.ticker import FuncFormatter, LogFormatter, MaxNLocator, PercentFormatter

        figure = new_figure(3.7, 2.3 + 0.17 * rows)
        axis = figure.add_subplot()
        drawn = [_draw_line(axis, line) for line in lines]
        values = np.concatenate([np.asarray(line.y, dtype=float) for line in lines])
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        if shares:
            axis.set_ylim(0, min(float(values.max()) * 1.15 + 0.01, 1.02))
            axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        elif values.min() > 0 and values.max() > _WIDE * values.min():
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(LogFormatter(labelOnlyBase=False))
        else:
            axis.yaxis.set_major_locator(MaxNLocator(5))
        axis.set_xlabel("optimizer step")
        axis.set_ylabel(y_label)
        axis.grid(True, axis="y", alpha=0.15, linewidth=0.8)
        if len(lines) > 1:
            names = [line.name for line in lines]
            figure.legend(drawn, names, loc="outside lower center", ncols=2, handlelength=2.6, columnspacing=1.2)
        return _as_svg(figure, alt)


def draw_heat(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    texts: Sequence[Sequence[str]],
    alt: str,
    *,
    x_label: str = "",
    diverging: bool = False,
    largest: float = 1.0,
) -> str:
    """Return a map of numbers: a cell for each, the darker the larger.

    Args:
        values: `[R, C]`; cells that are NaN stay empty.
        rows: R names.
        columns: C names.
        texts: What is written into each cell; where nothing is, a scale of the colours stands beside the map.
        alt: The picture in words.
        x_label: What the columns are.
        diverging: Whether values lie between -`largest` and `largest`: red below 0, blue above. Else from 0 on.
        largest: The value of the darkest cell.

    Raises:
        ImportError: matplotlib is not installed.
    """
    shown = np.ma.masked_invalid(values)
    with _own_style():
        from matplotlib import colormaps
        from matplotlib.colors import Normalize

        width = 0.9 + 0.055 * max(map(len, rows)) + max(0.5 * len(columns), 1.2)
        figure = new_figure(width, 0.7 + 0.34 * len(rows) + 0.03 * max(map(len, columns)))
        axis = figure.add_subplot()
        colours = colormaps["RdBu" if diverging else "Blues"].resampled(41)
        scale = Normalize(-largest if diverging else 0.0, largest)
        cells = axis.pcolormesh(shown, cmap=colours, norm=scale, edgecolors="#ffffff", linewidth=1.0)
        axis.invert_yaxis()
        turned = len(columns) > 1 and max(map(len, columns)) > 4
        turn = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if turned else {}
        axis.set_xticks(np.arange(len(columns)) + 0.5, list(columns), **turn)
        axis.set_yticks(np.arange(len(rows)) + 0.5, list(rows))
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
        axis.set_xlabel(x_label)
        if not any(any(row) for row in texts):  # then the colours alone must say it
            figure.colorbar(cells, ax=axis, shrink=0.8)
        for i, j in np.argwhere(~np.ma.getmaskarray(shown)):
            red, green, blue, _ = colours(scale(values[i, j]))
            light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
            ink = "#000000" if light else "#ffffff"
            axis.text(j + 0.5, i + 0.5, texts[i][j], ha="center", va="center", fontsize=7, color=ink)
        return _as_svg(figure, alt)


def draw_intervals(intervals: Sequence[Interval], alt: str) -> str:
    """Return a chart of differences with their intervals, one below the other; bands are differences without weight.

    Args:
        intervals: The differences.
        alt: The picture in words.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with _own_style():
        from matplotlib.lines import Line2D
        from matplotlib.ticker import MaxNLocator, PercentFormatter

        figure = new_figure(4.4, 1.3 + 0.3 * len(intervals))
        axis = figure.add_subplot()
        axis.axvline(0, color=_INK, linewidth=0.8)
        for y, one in enumerate(intervals):
            marker, colour = _VERDICTS[one.verdict]
            axis.barh(y, 2 * one.margin, left=-one.margin, height=1.0, color=_INK, alpha=0.1, linewidth=0)
            axis.plot([one.low, one.high], [y, y], color=colour, linewidth=1.8, solid_capstyle="butt")
            axis.plot([one.value], [y], marker, color=colour, markersize=6)
        axis.set_yticks(range(len(intervals)), [one.name for one in intervals])
        axis.set_ylim(len(intervals) - 0.4, -0.6)
        axis.xaxis.set_major_locator(MaxNLocator(6))
        axis.xaxis.set_major_formatter(PercentFormatter(1.0))
        axis.set_xlabel("multi-task less single-task, % of the single-task metric")
        axis.grid(True, axis="x", alpha=0.15, linewidth=0.8)
        present = [name for name in _VERDICTS if any(one.verdict == name for one in intervals)]
        handles: list[Any] = [
            Line2D([], [], marker=_VERDICTS[name][0], color=_VERDICTS[name][1], linewidth=1.8) for name in present
        ]
        band = axis.barh([-5], [0], color=_INK, alpha=0.1)
        figure.legend(
            [*handles, band], [*present, "does not matter"], loc="outside lower center", ncols=3, columnspacing=1.2
        )
        return _as_svg(figure, alt)


def _draw_line(axis: Any, line: Line) -> Any:
    x, y = (np.asarray(part, dtype=float) for part in (line.x, line.y))
    if len(x) > _MOST_POINTS:
        x, y = (np.array([part.mean() for part in np.array_split(one, _MOST_POINTS)]) for one in (x, y))
    (drawn,) = axis.plot(
        x,
        y,
        color=COLOURS[line.colour % len(COLOURS)],
        linestyle=_DASHES[line.dash % len(_DASHES)],
        linewidth=1.4,
        marker=_MARKERS[line.colour % len(_MARKERS)] if line.marked or len(x) == 1 else None,
        markersize=3.5,
    )
    return drawn


@contextlib.contextmanager
def _own_style() -> Iterator[None]:
    """Draw in the report's manner, whatever the user has set; nothing in a name is read as mathematics."""
    new_figure(1, 1)  # says what to install where matplotlib is not
    import matplotlib

    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    style: Any = {name: _INK for name in ink}
    style |= {"text.parse_math": False, "text.usetex": False, "svg.fonttype": "none", "svg.hashsalt": "hf_multitask"}
    style |= {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    style |= {"axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none"}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style)
        yield


def _as_svg(figure: Any, alt: str) -> str:
    """Return a figure as an `svg` element: ids of its own, the page's colour for ink, and a text alternative."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(buffer.getvalue())
    prefix = f"c{hashlib.sha256(buffer.getvalue() + alt.encode()).hexdigest()[:10]}-"
    used = set(re.findall(r"""(?:url\(|href=")#([^)"]+)""", buffer.getvalue().decode()))
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id":
                del element.attrib[key]
                if value in used:
                    element.set(key, prefix + value)
            elif key == _LINK:
                del element.attrib[key]
                element.set("href", value.replace("#", f"#{prefix}", 1))
            elif key == "style":
                shown = re.sub(r"font(-family)?: [^;]*;?\s*", _without_family, value)
                element.set(key, shown.replace(_INK, "currentColor").replace("url(#", f"url(#{prefix}"))
            else:
                element.set(key, value.replace("url(#", f"url(#{prefix}"))
    for place, name in ((root, "metadata"), (root.find(f"{{{_SVG}}}defs"), "style")):
        for element in [] if place is None else place.findall(f"{{{_SVG}}}{name}"):
            place.remove(element)  # type: ignore[union-attr]
    width, height = (float(part) for part in root.attrib["viewBox"].split()[2:])
    root.attrib.pop("version", None)
    root.set("width", f"{width * _PIXELS:.0f}")
    root.set("height", f"{height * _PIXELS:.0f}")
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt")
    root.set("role", "img")
    root.set("aria-label", alt)
    ElementTree.register_namespace("", _SVG)
    return ElementTree.tostring(root, encoding="unicode")


def _without_family(found: re.Match[str]) -> str:
    """Return a font without its family: letters are those of the page."""
    size = re.search(r"[\d.]+px", found[0])
    return f"font-size: {size[0]};" if size else ""
