"""A page on one run or several: metrics against baselines, curves, conflicts, routing, cost; as HTML and as Markdown.

It is made of the plain files that training and the other commands leave in a folder: `results.json` and
`trainer_state.json`; and where they are there `comparison.json`, `preflight.json`, `sweep.json`, `grouping.json`,
`routing.json` ([`RoutingResult.save`]) and `gradient_conflicts.json` ([`GradientConflicts.save`]). The HTML page is one
file: it loads nothing, holds no program, and forbids the browser both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .plots import new_figure
from .report_blocks import Section
from .report_curves import curve_sections
from .report_data import check_same_data
from .report_evidence import comparison_section, preflight_section, sweep_section, verdict_lines
from .report_facts import RunFacts
from .report_matrices import conflict_section, grouping_section, routing_section
from .report_pages import Page, html_page, markdown_page
from .report_reading import read_facts
from .report_tables import cost_section, metrics_section, recipe_section, runs_section

__all__ = ["Report", "report", "write_report"]

_MADE_BY = "Made by hf_multitask"


@dataclass(frozen=True, eq=False)
class Report:
    """What is told of some runs; see [`report`].

    Args:
        sources: What was read.
        page: What the pages are made of.
    """

    sources: tuple[RunFacts, ...]
    page: Page

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is missing or no number in the folders."""
        return tuple(self.page.warnings)

    def html(self) -> str:
        """Return the page in HTML."""
        return html_page(self.page)

    def markdown(self) -> str:
        """Return the page in Markdown: the same tables, without the pictures."""
        return markdown_page(self.page)

    def write(self, output: str | Path) -> tuple[Path, Path]:
        """Write both pages, and return their paths.

        Args:
            output: The HTML file; the Markdown file stands beside it, with the ending `.md`.

        Raises:
            ValueError: The name does not end in `.html`, is that of a folder, or of a file that is no report.
        """
        html = check_output(output)
        markdown = html.with_suffix(".md")
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(self.html(), encoding="utf-8")
        markdown.write_text(self.markdown(), encoding="utf-8")
        return html, markdown


def write_report(runs: Sequence[str | Path], output: str | Path, say: Callable[[str], Any]) -> str:
    """Make a report and write its pages; return where they are.

    Args:
        runs: See [`report`].
        output: The HTML file.
        say: Called with a line for each warning.

    Raises:
        FileNotFoundError: A folder does not exist.
        ValueError: A folder or the output does not fit, or matplotlib is not installed.
    """
    check_output(output)
    made = report(runs)
    for warning in made.warnings:
        say(f"Warning: {warning}")
    return f"The report is in {' and '.join(str(path) for path in made.write(output))}"


def check_output(output: str | Path) -> Path:
    """Return the path of the HTML page, after checking, before long work, that it can be made.

    Raises:
        ValueError: The name does not end in `.html`, is that of a folder, or one of both pages would take the place of
            a file that is no report; or matplotlib is not installed.
    """
    try:
        new_figure(1, 1)
    except ImportError as error:
        raise ValueError(str(error)) from None
    path = Path(output)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"output {str(path)!r} must end in .html; the Markdown page is written beside it")
    if path.is_dir():
        raise ValueError(f"output {str(path)!r} is a folder; give a file, for example {str(path / 'report.html')!r}")
    for page in (path, path.with_suffix(".md")):
        if page.exists() and _MADE_BY not in page.read_text(encoding="utf-8", errors="replace"):
            raise ValueError(f"output: {str(page)!r} exists and is no report; choose another name")
    return path


def report(runs: str | Path | Sequence[str | Path]) -> Report:
    """Read the folders of runs and make a report of them.

    Args:
        runs: Folders of runs; folders of comparisons, preflights or sweeps; or single files of these. Several runs are
            set side by side, which they must allow: the same rows for the tasks that they have in common.

    Returns:
        [`Report`], with `html()`, `markdown()` and `write(path)`. What is missing in a folder, or no number, is shown
        as missing, and named in `warnings`.

    Raises:
        FileNotFoundError: A folder does not exist.
        ValueError: Nothing can be read in a folder, or runs are of different data.
        ImportError: matplotlib, which draws the charts, is not installed.

    Example:
        >>> report(["runs/quickstart", "runs/quickstart-comparison"]).write("report.html")  # doctest: +SKIP
    """
    paths = [Path(path) for path in ([runs] if isinstance(runs, (str, Path)) else runs)]
    if not paths:
        raise ValueError("runs is empty: give the folder of at least one run")
    places = [path.resolve() for path in paths]
    for place, path in zip(places, paths, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"run folder {str(path)!r} is given twice")
    new_figure(1, 1)  # before long work: says what to install where matplotlib is not
    sources = _with_own_names([read_facts(path) for path in paths])
    checks = check_same_data(sources)
    trained = [source for source in sources if source.is_run]
    title = f"Report on {', '.join(source.name for source in trained or sources)}"
    warnings = [f"{source.name}: {warning}" for source in sources for warning in source.warnings]
    made_by = f"{_MADE_BY} {version('hf_multitask')}"
    page = Page(title, verdict_lines(trained, sources), warnings, _sections(trained, sources, checks), made_by)
    return Report(tuple(sources), page)


def _sections(runs: Sequence[RunFacts], sources: Sequence[RunFacts], checks: Sequence[str]) -> list[Section]:
    compared = any(source.comparison is not None for source in sources)
    sections: list[Section | None] = []
    if runs:
        sections += [runs_section(runs), metrics_section(runs, checks)]
    if runs or compared:
        sections.append(comparison_section(runs, sources))
    sections += [*curve_sections(runs), conflict_section(sources), grouping_section(sources), routing_section(sources)]
    if runs or compared:
        sections.append(cost_section(runs, sources))
    sections += [sweep_section(sources), preflight_section(sources)]
    if runs:
        sections.append(recipe_section(runs))
    return [section for section in sections if section is not None]


def _with_own_names(sources: list[RunFacts]) -> list[RunFacts]:
    """Give sources that have the same name the last parts of their paths for names, as many as tell them apart."""
    names = [source.name for source in sources]
    depth = 1
    while len(set(names)) < len(names):
        depth += 1
        parts = [source.path.resolve().with_suffix("").parts for source in sources]
        names = [
            name if names.count(name) == 1 else "/".join(own[-depth:]) for name, own in zip(names, parts, strict=True)
        ]
        if depth > max(map(len, parts)):  # a folder and a file of the same name
            names = [source.path.name for source in sources]
            break
    for source, name in zip(sources, names, strict=True):
        source.name = name
    return sources
