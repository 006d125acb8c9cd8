"""What changed in the course of a training, in a report: losses, metrics, shares, weights, coefficients, gates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from .report_blocks import NONE, Figure, Section, Table, number, percent
from .report_charts import Line, draw_lines
from .report_facts import LogSeries, RunFacts

__all__ = ["curve_sections"]

_MOST_PANELS = 24
_MOST_LINES = 16
# What an item is, whose loss is averaged.
_LOSS_UNITS = {
    "single_label_classification": "nats per row",
    "multi_label_classification": "nats per row",
    "regression": "squared units of the label",
    "token_classification": "nats per token",
    "question_answering": "nats per question",
    "multiple_choice": "nats per row",
    "masked_lm": "nats per hidden token",
    "causal_lm": "nats per token",
    "seq2seq_lm": "nats per token",
}


class _Quantity(NamedTuple):
    """Something that is logged for each task or layer: keys, heading, axis, what it is."""

    prefix: str
    title: str
    label: str
    words: str
    shares: bool = False


_QUANTITIES = (
    _Quantity("share/", "Shares of rows", "share of the rows", "The part of the rows that each task had.", True),
    _Quantity(
        "weight/", "Loss weights", "weight (factor)", "What a loss counts beside its share and the task's own weight."
    ),
    _Quantity(
        "coefficient/",
        "Gradient coefficients",
        "coefficient (factor)",
        "What a task's gradient on the shared parameters counts in the combined one; each point is one decision.",
    ),
    _Quantity(
        "gate/",
        "Gates of auxiliary tasks",
        "gate (factor)",
        "How much of an auxiliary task's gradient was let through, 1 for all of it.",
    ),
    _Quantity(
        "divergence/",
        "Distance between the tasks' encoders",
        "relative deviation",
        "Root mean square deviation from the mean encoder, over that of the mean; 0 for equal encoders.",
    ),
)


def curve_sections(runs: Sequence[RunFacts]) -> Iterator[Section]:
    """Yield a section for each quantity that was logged.

    Raises:
        ImportError: matplotlib is not installed.
    """
    tasks = list(dict.fromkeys(name for run in runs for name in run.tasks))
    yield from _losses(runs, tasks)
    yield from _metrics(runs, tasks)
    yield from _balance(runs)


def _losses(runs: Sequence[RunFacts], tasks: Sequence[str]) -> Iterator[Section]:
    """Yield the section of training losses: a picture for each task, a line for each run."""
    found = {run.name: {one.name: one for one in run.series("loss/", tasks)} for run in runs}
    names = list(dict.fromkeys(name for own in found.values() for name in own))
    key = "loss/"
    if not names:  # a plain training
        found = {run.name: {"": replace(one, name="")} for run in runs if (one := run.logged("loss"))}
        names, key = ([""] if found else []), ""
    if not names:
        return
    section = Section("Loss of each task" if key else "Loss")
    section.blocks.append("Loss per item, without shares and weights: mean since the last line of the log.")
    figures = []
    for name in names[:_MOST_PANELS]:
        lines: list[Line] = []
        for number_, run in enumerate(runs):
            prefix = f"{run.name}, " if len(runs) > 1 else ""
            if one := found.get(run.name, {}).get(name):
                lines.append(_line(one, f"{prefix}training", number_, number_))
            if one := run.logged(f"eval_{name}_loss" if name else "eval_loss"):
                lines.append(replace(_line(one, f"{prefix}validation", number_), dash=2, marked=True))
        unit = _unit(runs, name)
        figures.append(_figure(lines, f"loss ({unit})" if unit else "loss", name, f"Loss{f' of {name}' * bool(name)}"))
    section.blocks.append(figures)
    section.blocks += _left_out(names, "tasks")
    entries = [(run, one) for run in runs for one in found.get(run.name, {}).values()]
    section.blocks.append(_summary(entries, len(runs) > 1, "In numbers"))
    yield section


def _unit(runs: Sequence[RunFacts], task: str) -> str:
    kinds = [str(run.described_tasks.get(task, {}).get("type")) for run in runs]
    return next((_LOSS_UNITS[kind] for kind in kinds if kind in _LOSS_UNITS), "")


def _metrics(runs: Sequence[RunFacts], tasks: Sequence[str]) -> Iterator[Section]:
    """Yield the section of primary metrics over the steps, where the runs were evaluated at least twice."""
    figures: list[Figure] = []
    entries: list[tuple[RunFacts, LogSeries]] = []
    judged: list[str] = []
    for task in tasks:
        metric = next((m for run in runs if (m := run.task_results.get(task, {}).get("primary_metric"))), None)
        if metric is None:
            continue
        lines = []
        for number_, run in enumerate(runs):
            if one := run.logged(f"eval_{task}_{metric}"):
                lines.append(replace(_line(one, run.name, number_, number_), marked=True))
                entries.append((run, replace(one, name=f"{task} {metric}")))
        if any(len(line.x) > 1 for line in lines):
            judged.append(task)
            if len(figures) < _MOST_PANELS:
                figures.append(_figure(lines, str(metric), task, f"Validation {metric} of {task}"))
    if figures:
        section = Section("Validation metrics over training", [figures, *_left_out(judged, "tasks")])
        section.blocks.append(_summary(entries, len(runs) > 1, "In numbers"))
        yield section


def _balance(runs: Sequence[RunFacts]) -> Iterator[Section]:
    """Yield the section of what tasks counted: a picture for each quantity and run, a line for each task or layer."""
    section = Section("Shares, weights, coefficients")
    figures: list[Figure] = []
    tables: list[Table] = []
    for quantity in _QUANTITIES:
        entries: list[tuple[RunFacts, LogSeries]] = []
        for run in runs:
            found = run.series(quantity.prefix, run.tasks)
            if quantity.prefix == "divergence/":
                found.sort(key=lambda one: int(one.name) if one.name.isdigit() else -(one.name == "embeddings"))
                found = [replace(one, name=f"layer {one.name}" if one.name.isdigit() else one.name) for one in found]
            if found:
                figures.append(_quantity_figure(quantity, run, found, len(runs) > 1))
                entries += [(run, one) for one in found]
        if entries:
            caption = f"{quantity.title} in numbers"
            tables.append(_summary(entries, len(runs) > 1, caption, quantity.shares))
        if len(runs) > 1 and figures:  # those of a quantity stand side by side
            section.blocks.append(figures)
            figures = []
    if figures:
        section.blocks.append(figures)
    section.blocks += tables
    if section.blocks:
        yield section


def _quantity_figure(quantity: _Quantity, run: RunFacts, found: Sequence[LogSeries], several: bool) -> Figure:
    lines = [_line(one, one.name, place, place) for place, one in enumerate(found[:_MOST_LINES])]
    title = f"{quantity.title}{f' of {run.name}' * several}"
    note = quantity.words
    if len(found) > _MOST_LINES:
        note += f" The first {_MOST_LINES} of {len(found)} are drawn; the table has all."
    return replace(_figure(lines, quantity.label, title, title, quantity.shares), note=note)


def _line(series: LogSeries, name: str, colour: int, dash: int = 0) -> Line:
    return Line(name, series.steps, series.values, colour, dash)


def _figure(lines: Sequence[Line], label: str, title: str, what: str, shares: bool = False) -> Figure:
    form = percent if shares else number
    first, last = (int(pick(line.x[end] for line in lines)) for pick, end in ((min, 0), (max, -1)))
    ends = "; ".join(f"{line.name} from {form(line.y[0])} to {form(line.y[-1])}" for line in lines)
    unit = f" ({label.partition('(')[2]}" if "(" in label else ""
    alt = f"{what}{unit} over steps {first:,} to {last:,}: {ends}"
    return Figure(draw_lines(lines, label, alt, shares=shares), title)


def _left_out(names: Sequence[str], what: str) -> list[str]:
    if len(names) <= _MOST_PANELS:
        return []
    return [f"The first {_MOST_PANELS} of {len(names)} {what} are drawn; the table has all."]


def _summary(entries: Sequence[tuple[RunFacts, LogSeries]], several: bool, caption: str, shares: bool = False) -> Table:
    """Return a table of how each quantity began, ended, and how far it went."""
    form = percent if shares else number
    rows = []
    for run, one in entries:
        lowest, highest = min(one.values), max(one.values)
        at = f"{one.steps[one.values.index(lowest)]:,}"
        ends = [form(one.values[0]), form(lowest), at, form(highest), form(one.values[-1])]
        rows.append([*([run.name] if several else []), one.name or NONE, *ends, f"{len(one.values):,}"])
    head = [*(["run"] if several else []), "", "first", "lowest", "at step", "highest", "last", "times logged"]
    return Table(head, rows, frozenset(range(1 + several)), caption, folded=True)
