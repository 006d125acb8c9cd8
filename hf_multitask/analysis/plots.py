"""Pictures; they need matplotlib, which is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["draw_matrix", "new_figure", "save_figure"]


def draw_matrix(
    path: str | Path, names: Sequence[str], values: np.ndarray, texts: Sequence[Sequence[str]], title: str = ""
) -> None:
    """Draw a square matrix of numbers in [-1, 1]: red below 0, blue above, white at 0.

    Args:
        path: The file; its suffix says of which kind it is.
        names: Names of rows and columns, T of them.
        values: `[T, T]`.
        texts: What is written into each cell, T lists of T.
        title: The title.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> draw_matrix("pairs.svg", ["a", "b"], np.eye(2), [["", "0"], ["0", ""]])  # doctest: +SKIP
    """
    figure = new_figure(1.6 + 0.9 * len(names), 1.2 + 0.75 * len(names))
    axis = figure.add_subplot()
    axis.imshow(values, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    ticks = range(len(names))
    axis.set_xticks(ticks, names, rotation=30, ha="right", rotation_mode="anchor")
    axis.set_yticks(ticks, names)
    axis.set_title(title, fontsize=9)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    for i in ticks:
        for j in ticks:
            colour = "white" if abs(values[i, j]) > 0.6 else "black"
            axis.text(j, i, texts[i][j], ha="center", va="center", fontsize=8, color=colour)
    save_figure(figure, path)


def new_figure(width: float, height: float) -> Any:
    """Return a figure (inches) that is no part of pyplot's global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing needs matplotlib, which is not installed: pip install hf_multitask[plots]"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a picture; the same figure gives the same bytes, as far as the format allows."""
    import matplotlib

    suffix = Path(path).suffix
    with matplotlib.rc_context({"svg.hashsalt": "hf_multitask"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if suffix == ".svg" else None)
