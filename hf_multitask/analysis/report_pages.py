"""A report as an HTML page and as a Markdown page. Every name, label and message in it is text, never markup."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .report_blocks import Code, Section, Table
from .report_template import TEMPLATE

__all__ = ["Page", "html_page", "markdown_page"]


@dataclass(frozen=True)
class Page:
    """What both pages are made of.

    Args:
        title: The heading.
        verdicts: For each comparison, whether to deploy the multi-task model, and why.
        warnings: What is missing or no number.
        sections: The parts.
        made_by: What made the page, with its version.
    """

    title: str
    verdicts: Sequence[tuple[bool, str]]
    warnings: Sequence[str]
    sections: Sequence[Section]
    made_by: str


def html_page(page: Page) -> str:
    """Return the page in HTML: one file that needs nothing else."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.globals["kind_of"] = lambda block: type(block).__name__
    return environment.from_string(TEMPLATE).render(page=page)


def markdown_page(page: Page) -> str:
    """Return the page in Markdown: the same tables, without the pictures."""
    lines = [f"# {_escape(page.title)}", ""]
    for deploy, reason in page.verdicts:
        lines += [f"**{'Deploy' if deploy else 'Do not deploy'}** {_escape(reason)}", ""]
    if page.warnings:
        lines += [f"**Warnings: {len(page.warnings)}**", "", *(f"- {_escape(one)}" for one in page.warnings), ""]
    for section in page.sections:
        lines += [f"## {_escape(section.title)}", ""]
        for block in section.blocks:
            if isinstance(block, Table):
                lines += _table(block)
            elif isinstance(block, Code):
                lines += _code(block)
            elif isinstance(block, str):
                lines += [_escape(block), ""]
    lines.append(f"{_escape(page.made_by)}; the pictures are in the HTML page.")
    return "\n".join(lines) + "\n"


def _table(table: Table) -> Iterator[str]:
    if table.caption:
        yield from (f"**{_escape(table.caption)}**", "")
    marks = ["---" if i in table.left else "---:" for i in range(len(table.head))]
    for row in (map(_escape, table.head), marks, *(map(_escape, row) for row in table.rows)):
        yield f"| {' | '.join(row)} |"
    yield ""


def _code(code: Code) -> Iterator[str]:
    longest = max((len(run) for run in re.findall(r"`+", code.text)), default=0)
    fence = "`" * max(longest + 1, 3)
    yield from (f"**{_escape(code.title)}**", "", f"{fence}yaml", code.text.rstrip("\n"), fence, "")


def _escape(text: str) -> str:
    """Return text in one line, of which Markdown makes nothing else."""
    text = re.sub(r"([\\`*\[\]|~#]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
