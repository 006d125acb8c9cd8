"""Which tasks are in conflict, which belong together, which experts serve whom: maps and numbers of a report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from .conflict_result import GradientConflicts
from .grouping_result import TaskGroups
from .report_blocks import NONE, Figure, Section, Table, number, percent, signed
from .report_charts import draw_heat
from .report_facts import LogSeries, RunFacts, finite
from .routing_result import RoutingResult

__all__ = ["conflict_section", "grouping_section", "routing_section"]

_MOST_TASKS = 24  # of a map
_MOST_TEXTS = 12
_MOST_LAYERS = 24


def conflict_section(sources: Sequence[RunFacts]) -> Section | None:
    """Return the cosines between the tasks' gradients, as logged in training and as measured; None without any.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figures: list[Figure] = []
    blocks: list[Table | str] = []
    for source in sources:
        logged = [one for one in source.series("conflict/") if one.name.count("|") == 1]
        found = [*([_logged(source, logged)] if logged else [])]
        found += [_measurement(source, result, when) for result, when in _measured(source)]
        for tasks, values, table in found:
            figures += _cosine_map(values, tasks, table.caption)
            blocks.append(table)
            if len(tasks) > _MOST_TASKS:
                blocks.append(f"The first {_MOST_TASKS} of {len(tasks)} tasks are drawn; the table has all.")
    if not blocks:
        return None
    words = (
        "Cosines between the tasks' gradients on shared parameters: below 0 (red) a step for one task harms the other, "
        "near 0 they hardly touch each other, above 0 (blue) they help each other."
    )
    return Section("Conflicts between tasks", [words, figures, *blocks])


def _logged(source: RunFacts, pairs: Sequence[LogSeries]) -> tuple[Sequence[str], np.ndarray, Table]:
    """Return tasks, mean cosines in the course of the training `[T, T]`, and the numbers."""
    present = {name for one in pairs for name in one.name.split("|")}
    tasks = [*(name for name in source.tasks if name in present), *sorted(present - set(source.tasks))]
    values = np.full((len(tasks), len(tasks)), np.nan)
    rows = []
    for one in pairs:
        i, j = (tasks.index(name) for name in one.name.split("|"))
        values[i, j] = values[j, i] = np.mean(one.values)
        numbers = (float(values[i, j]), min(one.values), max(one.values), one.values[-1])
        below = float(np.mean(np.array(one.values) < 0))
        rows.append([one.name.replace("|", " and "), *(signed(value) for value in numbers), percent(below)])
    lines = max(len(one.values) for one in pairs)
    head = ["pair", "mean", "lowest", "highest", "last", "steps below 0"]
    return tasks, values, Table(head, rows, caption=f"{source.name}: mean over {lines} logged steps", folded=True)


def _measured(source: RunFacts) -> Iterator[tuple[GradientConflicts, str]]:
    if source.conflicts is not None:
        yield source.conflicts, "measured"
    section = source.preflight.sections.get("conflict") if source.preflight is not None else None
    result = section.get("result") if isinstance(section, dict) else None
    if isinstance(result, dict):
        try:
            yield GradientConflicts.from_dict(result), "measured before the training"
        except (KeyError, TypeError, ValueError):
            source.warnings.append("preflight.json: its conflicts cannot be read")


def _measurement(source: RunFacts, result: GradientConflicts, when: str) -> tuple[Sequence[str], np.ndarray, Table]:
    """Return tasks, cosines `[T, T]`, and the numbers."""
    values = result.cosines.astype(float)
    np.fill_diagonal(values, np.nan)
    level = f"{result.settings.get('confidence', 0.95):.0%} interval"
    rows = [
        [
            f"{pair.a} and {pair.b}",
            signed(pair.cosine),
            f"{signed(pair.low)} to {signed(pair.high)}",
            pair.verdict + ("" if pair.certain else ", not certain"),
        ]
        for pair in result.pairs()
    ]
    caption = f"{source.name}: {when}, mean of {result.batches} batches"
    return result.tasks, values, Table(["pair", "cosine", level, "transfer"], rows, frozenset([0, 3]), caption, True)


def _cosine_map(values: np.ndarray, tasks: Sequence[str], title: str) -> Iterator[Figure]:
    shown = min(len(tasks), _MOST_TASKS)
    part = np.round(values[:shown, :shown], 2) + 0.0  # no minus before a zero
    if np.isnan(part).all():
        return
    texts = [["" if math.isnan(v) or shown > _MOST_TEXTS else f"{v:+.2f}" for v in row] for row in part]
    pairs = [
        f"{tasks[i]} and {tasks[j]} {part[i, j]:+.2f}"
        for i in range(shown)
        for j in range(i + 1, shown)
        if not math.isnan(part[i, j])
    ]
    alt = f"Cosines between gradients, {title}: {'; '.join(pairs)}"
    svg = draw_heat(part, tasks[:shown], tasks[:shown], texts, alt, x_label="cosine of gradients", diverging=True)
    yield Figure(svg, title, wide=shown > 6)


def grouping_section(sources: Sequence[RunFacts]) -> Section | None:
    """Return which tasks should be trained together; None where that was not measured.

    Raises:
        ImportError: matplotlib is not installed.
    """
    section = Section("Groups of tasks")
    for source in sources:
        if source.grouping is not None:
            section.blocks += _grouping(source, source.grouping)
    return section if section.blocks else None


def _grouping(source: RunFacts, result: TaskGroups) -> Iterator[list[Figure] | str | Table]:
    """Yield the groups, what they rest on as a map, and what follows for each task."""
    relative = result.method == "affinity"
    unit = "%" if relative else "cosine"
    scale = 100.0 if relative else 1.0
    groups = "; ".join(f"{number_}: {', '.join(names)}" for number_, names in enumerate(result.groups, 1))
    how = "what a step for one task does to the loss of another" if relative else "cosines between gradients"
    yield f"{source.name}, by {how}, mean of {len(result.steps)} steps. Groups to train, {groups}."
    tasks = list(dict.fromkeys(name for names in result.groups for name in names))
    tasks += [name for name in result.tasks if name not in tasks]
    order = [result.tasks.index(name) for name in tasks[:_MOST_TASKS]]
    values = np.round(scale * result.affinity[np.ix_(order, order)].astype(float), 2) + 0.0
    np.fill_diagonal(values, np.nan)
    known = values[~np.isnan(values)]
    if len(known):
        few = len(order) <= _MOST_TEXTS
        texts = [[f"{value:+.2f}" if few else "" for value in row] for row in values]
        names = tasks[: len(order)]
        onto = [(i, j) for i, j in np.argwhere(~np.isnan(values))]
        words = "; ".join(f"{names[i]} to {names[j]} {values[i, j]:+.2f}" for i, j in onto)
        alt = f"What tasks do to each other, in {unit}: {words}"
        largest = float(np.abs(known).max()) or 1.0
        label = f"onto this task, {unit}"
        svg = draw_heat(values, names, names, texts, alt, x_label=label, diverging=True, largest=largest)
        note = "Row: the task whose step it is. Above 0 (blue) it helps the task of the column, below 0 (red) it harms."
        yield [Figure(svg, f"{source.name}: tasks in the order of their groups", note, wide=len(order) > 6)]
    rows = []
    for one in result.advice():
        value, low, high = (scale * number_ for number_ in one.joining or (one.affinity, one.low, one.high))
        alone = " (by joining another group)" if one.joining else ""
        rows.append([one.task, signed(finite(value)) + alone, _ends(low, high), one.verdict, one.statement])
    head = ["task", f"gets, {unit}", f"{result.confidence:.0%} interval, {unit}", "verdict", ""]
    yield Table(head, rows, frozenset([0, 3, 4]), f"{source.name}: what follows for each task")


def _ends(low: float, high: float) -> str:
    return NONE if finite(low) is None or finite(high) is None else f"{signed(low)} to {signed(high)}"


def routing_section(sources: Sequence[RunFacts]) -> Section | None:
    """Return which experts the tokens of each task go to; None where that was not measured.

    Raises:
        ImportError: matplotlib is not installed.
    """
    section = Section("Routing to experts")
    for source in sources:
        if source.routing is not None:
            section.blocks += _routing(source, source.routing)
    return section if section.blocks else None


def _routing(source: RunFacts, result: RoutingResult) -> Iterator[list[Figure] | str | Table]:
    """Yield a map for each layer, what the expert says about the task, and the experts that serve one task most."""
    layers = list(result.counts)
    yield f"{source.name}: the share of each task's token-slots that an expert of a layer gets, in percent."
    largest = max(float(result.shares(layer).max()) for layer in layers)
    tasks = result.tasks[:_MOST_TASKS]
    figures = []
    for layer in layers[:_MOST_LAYERS]:
        shares = result.shares(layer)[: len(tasks)]
        experts = [str(number_) for number_ in range(shares.shape[1])]
        few = len(experts) <= _MOST_TEXTS
        texts = [[f"{100 * value:.0f}" if few else "" for value in row] for row in shares]
        first = [(name, int(row.argmax()), row.max()) for name, row in zip(tasks, shares, strict=True)]
        most = "; ".join(f"{name} most to {expert} ({share:.0%})" for name, expert, share in first)
        alt = f"Shares of experts in {layer} of {source.name}: {most}"
        svg = draw_heat(shares, tasks, experts, texts, alt, x_label="expert", largest=largest)
        figures.append(Figure(svg, layer, wide=len(experts) > 6))
    yield figures
    if len(layers) > _MOST_LAYERS or len(tasks) < len(result.tasks):
        yield f"At most {_MOST_LAYERS} layers and {_MOST_TASKS} tasks are drawn; the tables have all."
    rows = []
    for layer in layers:
        for name, row in zip(result.tasks, result.shares(layer), strict=True):
            rows.append([layer, name, f"{row.argmax()}", percent(float(row.max())), ", ".join(f"{v:.0%}" for v in row)])
    head = ["layer", "task", "most used expert", "its share", "shares of all experts"]
    yield Table(head, rows, frozenset([0, 1]), f"{source.name}: shares", folded=True)
    information = []
    for layer in layers:
        found = result.mutual_information(layer)
        part = max(found.corrected, 0.0) / math.log(len(result.tasks)) if len(result.tasks) > 1 else 0.0
        information.append([layer, number(max(found.corrected, 0.0)), percent(part)])
    head = ["layer", "mutual information, nats", "of the most possible"]
    yield Table(head, information, caption="How much the expert of a token says about its task")
    experts_ = [
        [f"{one.layer}, expert {one.expert}", one.task, percent(one.share), f"{one.lift:.2f}", percent(one.usage)]
        for one in result.specialists()
    ]
    if experts_:
        head = ["specialist", "task", "share of its tokens", "lift", "part of its layer"]
        yield Table(head, experts_, frozenset([0, 1]), "Experts that work most for one task")
