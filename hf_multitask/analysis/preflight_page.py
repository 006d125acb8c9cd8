"""The page of a preflight: findings first, the worst on top, then the tables they rest on, then advice.

One list of blocks, written as plain text for a terminal or as Markdown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .conflict_result import align_columns

__all__ = ["markdown_page", "text_page"]

_MIB = 2**20


@dataclass(frozen=True)
class _Block:
    """A heading, with rows of a table (the first is its head), or lines of text below it."""

    heading: str
    rows: Sequence[Sequence[str]] = ()
    right: frozenset[int] = frozenset()
    lines: Sequence[str] = ()


def text_page(values: Mapping[str, Any]) -> str:
    """Return the page for a terminal, of the dictionary of a [`Preflight`]."""
    parts = [_title(values)]
    for block in _blocks(values):
        parts += ["", block.heading.upper()]
        if block.rows:
            parts.append(align_columns(block.rows, set(block.right)))
        parts += block.lines
    return "\n".join(parts)


def markdown_page(values: Mapping[str, Any]) -> str:
    """Return the page in Markdown, of the dictionary of a [`Preflight`]."""
    parts = [f"# {_title(values)}"]
    for block in _blocks(values):
        parts += ["", f"## {block.heading[0].upper()}{block.heading[1:]}", ""]
        if block.rows:
            head, *rows = [[cell.replace("|", "\\|") for cell in row] for row in block.rows]
            marks = ["---:" if i in block.right else "---" for i in range(len(head))]
            parts += [f"| {' | '.join(row)} |" for row in (head, marks, *rows)]
        parts += [*[""] * bool(block.rows), *[f"- {' '.join(line.split())}" for line in block.lines]]
    return "\n".join(parts)


def _title(values: Mapping[str, Any]) -> str:
    counts = {level: sum(f["level"] == level for f in values["findings"]) for level in ("fail", "warn", "ok")}
    took = sum(values["seconds"].values())
    verdict = "nothing stands against it" if values["ok"] else "do not train it yet"
    return (
        f"Preflight of {values['name']}: {verdict} ({counts['fail']} fail, {counts['warn']} warn, {counts['ok']} ok; "
        f"{took:.0f} s)"
    )


def _blocks(values: Mapping[str, Any]) -> Iterator[_Block]:
    sections = values["sections"]
    yield _findings(values["findings"])
    if data := sections.get("data"):
        yield _data(data)
        yield from _labels(data)
    if losses := sections.get("losses"):
        yield _losses(losses["tasks"])
    if result := (sections.get("conflict") or {}).get("result"):
        yield _conflict(result)
    if plan := sections.get("plan"):
        yield _plan(plan)
        yield _strategies(plan)
    if memory := sections.get("memory"):
        yield _memory(memory)
    if trial := sections.get("trial"):
        yield _trial(trial)
    if statements := values["advice"]["statements"]:
        yield _Block("advice, which changes nothing by itself", lines=[_advice(one) for one in statements])
    if seconds := values["seconds"]:
        line = ", ".join(f"{name} {took:.1f} s" for name, took in seconds.items())
        yield _Block("how long it took", lines=[line])


def _findings(findings: Sequence[Mapping[str, Any]]) -> _Block:
    lines = []
    for level in ("fail", "warn", "ok"):
        for one in findings:
            if one["level"] == level:
                about = f"{one['about']}: " if one["about"] else ""
                lines.append(f"{level.upper():4}  {one['section']}: {about}{one['message']}")
                if one["advice"]:
                    lines[-1] += f"\n      -> {one['advice']}"
    return _Block("findings", lines=lines)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _data(data: Sequence[Mapping[str, Any]]) -> _Block:
    rows = [["dataset", "split", "rows", "tasks", "median tokens", "95 %", "max_length", "longer"]]
    for one in data:
        lengths = [_short(one["median_length"]), _short(one["long_length"]), str(one["max_length"] or "-")]
        count = f"{one['rows']:,}" + ("" if one["complete"] else " first")
        rows.append(
            [one["dataset"], one["split"], count, ", ".join(one["tasks"]), *lengths, _percent(one["truncated"])]
        )
    return _Block("data", rows, frozenset({2, 4, 5, 6, 7}))


def _labels(data: Sequence[Mapping[str, Any]]) -> Iterator[_Block]:
    rows = [["task", "labels in training"]]
    for one in data:
        if one["split"] == "train":
            for task, counts in one["labels"].items():
                shown = [
                    f"{label} {count:.3g}" if isinstance(count, float) else f"{label} {count:,}"
                    for label, count in counts.items()
                ]
                more = f", and {len(shown) - 8} more" if len(shown) > 8 else ""
                rows.append([task, ", ".join(shown[:8]) + more])
    if len(rows) > 1:
        yield _Block("labels", rows)


def _losses(tasks: Sequence[Mapping[str, Any]]) -> _Block:
    rows = [["task", "loss", "standard error", "of guessing", "weight", "counts as", "weight for one scale"]]
    for one in tasks:
        keys = ("loss", "error", "chance", "weight", "weighted", "proposed_weight")
        rows.append([one["task"], *(_short(one[key]) for key in keys)])
    return _Block("losses before the first step", rows, frozenset(range(1, 7)))


def _conflict(result: Mapping[str, Any]) -> _Block:
    rows = [["task", "task", "cosine", "interval", "verdict"]]
    for pair in result["pairs"]:
        verdict = pair["verdict"] + ("" if pair["certain"] else " ?")
        interval = f"{pair['low']:+.2f} to {pair['high']:+.2f}"
        rows.append([pair["a"], pair["b"], f"{pair['cosine']:+.3f}", interval, verdict])
    settings = result["settings"]
    agreement = zip(result["tasks"], result["reproducibility"], strict=True)
    lines = [
        f"{result['batches']} batches of {settings['batch_size']} rows of each dataset, heads fitted for "
        f"{settings['head_warmup_steps']} steps; intervals hold for all pairs together; ? crosses a threshold",
        "agreement of batches: " + ", ".join(f"{task} {value:.2f}" for task, value in agreement),
    ]
    return _Block("conflict of gradients", rows, frozenset({2}), lines)


def _plan(plan: Mapping[str, Any]) -> _Block:
    first = f"in the first {plan['windows_counted']} steps"
    rows = [["dataset", "tasks", "rows", "share", first, "passes per epoch", "passes", "never read"]]
    for one in plan["sources"]:
        passes = [_short(one["passes_per_epoch"]), _short(one["passes"]), _percent(one["unseen"])]
        shares = [_percent(one["share"]), _percent(one["first_share"])]
        rows.append([one["source"], ", ".join(one["tasks"]), f"{one['size']:,}", *shares, *passes])
    line = f"{plan['steps']:,} steps of {plan['window_rows']} rows; an epoch has {plan['steps_per_epoch']:,}"
    return _Block(f"sampling plan: {plan['strategy']}", rows, frozenset({2, 3, 4, 5, 6, 7}), [line])


def _strategies(plan: Mapping[str, Any]) -> _Block:
    names = [one["source"] for one in plan["sources"]]
    rows = [["strategy", *(f"{name}: share, passes" for name in names)]]
    for one in plan["strategies"]:
        mark = " (in use)" if one["in_use"] else ""
        cells = [f"{one['shares'][name]:.1%}, {one['passes'][name]:.2g}" for name in names]
        rows.append([one["strategy"] + mark, *cells])
    return _Block("what other strategies would do", rows, frozenset(range(1, len(names) + 1)))


def _memory(memory: Mapping[str, Any]) -> _Block:
    parts = ("parameters", "gradients", "optimizer", "task_buffers", "activations", "total")
    rows = [["part", "MiB"], *([name.replace("_", " "), f"{memory[name] / _MIB:,.1f}"] for name in parts)]
    if "measured_peak" in memory:
        rows.append(["measured peak", f"{memory['measured_peak'] / _MIB:,.1f}"])
    if memory["available"] is not None:
        rows.append([f"available on {memory['device']}", f"{memory['available'] / _MIB:,.1f}"])
    return _Block("memory of a step", rows, frozenset({1}))


def _trial(trial: Mapping[str, Any]) -> _Block:
    rows = [["task", "loss before", "after", "change", "share", "in the first steps", "in the last"]]
    for task, losses in trial["losses"].items():
        change = trial["changes"].get(task)
        cells = ["-", "-", "-"]
        if change is not None:
            interval = f"{_short(change['low'])} to {_short(change['high'])}"
            cells = [_short(change["before"]), _short(change["after"]), interval]
        third = max(len(losses) // 3, 1)
        ends = [sum(part) / len(part) if part else None for part in (losses[:third], losses[-third:])]
        rows.append([task, *cells, _percent(trial["shares"].get(task)), *(_short(end) for end in ends)])
    lines = [f"{trial['steps']} steps; loss before and after: on the same training rows, without dropout"]
    return _Block("the first steps of the training", rows, frozenset({1, 2, 3, 4, 5, 6}), lines)


def _advice(one: Mapping[str, Any]) -> str:
    numbers = "; ".join(f"{name} {_number(value)}" for name, value in one["numbers"].items())
    return f"{one['topic']}: {one['recommendation']}\n  because {one['reason']} ({numbers})\n  source: {one['source']}"


def _number(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        mean, low, high = value
        return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
