"""The sections of a model card: each is Markdown made of facts, or nothing where there is no fact for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .card_facts import CardFacts, DatasetFacts, TaskFacts, finite
from .card_text import code_span, escape, show, table

__all__ = ["SECTIONS", "summary"]

_SCHEMES = {
    "hard": "hard sharing: all tasks train one backbone, and each has a head of its own",
    "soft": "soft sharing: an encoder and a head for each task, the encoders pulled together or mixed",
    "conditioned": "conditioning: one backbone, steered by a few vectors of each task's own",
    "prefix": "prefixes: a frozen backbone, and trained keys and values of each task's own in every layer",
    "adapter": "adapters: a frozen backbone, and low-rank additions to its layers for each task",
    "mixture_of_experts": "a mixture of experts: one backbone with several feed-forward blocks in some layers",
}
_METHOD_TITLES = {
    "task_sampling": "sampling of the tasks",
    "loss_weighting": "loss weighting",
    "gradient_combination": "gradient combination",
}
_MOST_LABELS = 40


def summary(facts: CardFacts) -> str:
    """Return the sentences below the title."""
    served = [task for task in facts.tasks if task.served]
    count = "one task" if len(served) == 1 else f"{len(served)} tasks"
    backbone = _link(facts.backbone, "") if facts.backbone else ""
    kind = f"a {code_span(facts.backbone_type)} backbone" if facts.backbone_type else ""
    over = f", made from {backbone}" if backbone else f", over {kind}" if kind else ""
    size = f" It has {facts.parameters:,} parameters." if facts.parameters else ""
    return f"One model for {count}{over}.{size}"


def _link(hub_id: str | None, kind: str) -> str:
    return f"[{escape(hub_id)}](https://huggingface.co/{kind}{hub_id})"


def _dataset(dataset: DatasetFacts) -> str:
    if dataset.hub_id is not None:
        found = _link(dataset.hub_id, "datasets/")
        return found if dataset.config is None else f"{found} ({code_span(dataset.config)})"
    return code_span(dataset.name) + (" of the package registry" if dataset.registry else "")


def tasks_section(facts: CardFacts) -> str:
    """Return what the tasks are."""
    rows = []
    for task in facts.tasks:
        labels = [escape(label) for label in (task.labels or ())[:_MOST_LABELS]]
        more = len(task.labels or ()) - len(labels)
        shown = ", ".join(labels) + (f" and {more} more" if more else "")
        kind = code_span(task.type) + (" (auxiliary)" if task.auxiliary else "")
        kind += " (never trained)" if task.held_out else ""
        rows.append([code_span(task.name), kind, shown or "-", _dataset(task.dataset)])
    if not rows:
        return ""
    head = ["task", "type", "labels", "dataset"]
    if all(row[2] == "-" for row in rows):
        head, rows = [head[0], head[1], head[3]], [[row[0], row[1], row[3]] for row in rows]
    text = "## Tasks\n\n" + table(head, rows)
    helpers = [code_span(task.name) for task in facts.tasks if task.auxiliary]
    if helpers:
        text += f"\n\nTrained along to help the others, and not answered: {', '.join(helpers)}."
    if any(task.dataset.registry for task in facts.tasks):
        text += (
            "\n\nOrigin and terms of the datasets of the package registry: `python -m pydoc hf_multitask.quickstart`."
        )
    return text


def results_section(facts: CardFacts) -> str:
    """Return the metrics of each task."""
    splits = facts.splits
    rows = []
    for task in facts.tasks:
        names = list(dict.fromkeys(name for split in splits for name in task.metrics.get(split, ())))
        names.sort(key=lambda name, task=task: (name != task.primary, name == "loss"))  # type: ignore[misc]
        for name in names:
            values = [task.metrics.get(split, {}).get(name) for split in splits]
            shown = ["-" if value is None else f"{value:.4f}" for value in values]
            if name == task.primary:
                shown = [value if value == "-" else f"**{value}**" for value in shown]
            rows.append([code_span(task.name), code_span(name), *shown])
    if not rows:
        return ""
    if facts.averages:
        averages = [facts.averages.get(split) for split in splits]
        rows.append(
            ["mean of the primary metrics", "", *["-" if value is None else f"{value:.4f}" for value in averages]]
        )
    text = "## Results\n\n" + table(["task", "metric", *splits], rows, range(2, 2 + len(splits)))
    return text + "\n\nBold: the primary metric of each task."


def comparison_section(facts: CardFacts) -> str:
    """Return how the model stands against single-task models, if that was measured."""
    found = facts.comparison or {}
    rows = []
    for name, task in (found.get("tasks") or {}).items():
        numbers = [finite(task.get(key)) for key in ("single", "multi", "difference")]
        low, high = task.get("interval") or (None, None)
        if None in numbers or finite(low) is None or finite(high) is None:
            continue
        single, multi, difference = numbers
        rows.append(
            [
                code_span(name),
                code_span(task.get("metric", "")),
                f"{single:.4f}",
                f"{multi:.4f}",
                f"{difference:+.4f}",
                f"{low:+.4f} to {high:+.4f}",
                escape(task.get("verdict", "")),
            ]
        )
    if not rows:
        return ""
    level = finite((found.get("settings") or {}).get("confidence"))
    interval = "interval" if level is None else f"{level:.0%} interval"
    head = ["task", "metric", "single-task model", "this recipe", "difference", interval, "verdict"]
    text = "## Against single-task models\n\n" + table(head, rows, (2, 3, 4, 5))
    delta = found.get("delta_m") or {}
    value, seeds = finite(delta.get("value")), len(found.get("seeds") or ())
    if value is not None:
        low, high = delta.get("interval") or (None, None)
        ends = "" if finite(low) is None or finite(high) is None else f" ({low:+.1%} to {high:+.1%})"
        over = f", over {seeds} seed{'s' if seeds > 1 else ''}" if seeds else ""
        text += f"\n\nΔm, the mean relative change: {value:+.1%}{ends}{over}."
    return text


def conflict_section(facts: CardFacts) -> str:
    """Return the conflicts between the tasks' gradients, if they were measured."""
    rows = []
    for pair in (facts.conflicts or {}).get("pairs") or ():
        cosine, low, high = (finite(pair.get(key)) for key in ("cosine", "low", "high"))
        if cosine is None:
            continue
        ends = "-" if low is None or high is None else f"{low:+.2f} to {high:+.2f}"
        verdict = escape(pair.get("verdict", "")) + ("" if pair.get("certain", True) else " (not certain)")
        rows.append([code_span(pair.get("a")), code_span(pair.get("b")), f"{cosine:+.3f}", ends, verdict])
    if not rows:
        return ""
    head = ["task", "task", "cosine", "interval", "transfer"]
    return (
        "## Gradient conflicts\n\nCosines of the tasks' gradients on the shared parameters; below 0 they pull in "
        "different directions.\n\n" + table(head, rows, (2, 3))
    )


def limits_section(facts: CardFacts) -> str:
    """Return what the model is for, and where its facts end."""
    served = [task for task in facts.tasks if task.served]
    lines = [f"- It answers {', '.join(code_span(task.name) for task in served)}, and nothing else."] if served else []
    if any(task.labels for task in served):
        lines.append("- An answer is always one of a task's labels, for texts that fit none of them, too.")
    if facts.longest:
        lines.append(f"- Texts are cut to {facts.longest} tokens.")
    if facts.splits:
        lines.append("- The metrics hold for the datasets above; on texts of other kinds they may differ.")
    missing = [code_span(task.name) for task in served if not task.metrics]
    if missing:
        lines.append(f"- There is no measurement of {', '.join(missing)}.")
    untrained = [code_span(task.name) for task in served if task.held_out]
    if untrained:
        lines.append(f"- Never trained, only judged: {', '.join(untrained)}.")
    most = facts.arguments.get("max_eval_samples")
    if most:
        lines.append(f"- Metrics were measured on the first {most} rows of each split.")
    if facts.sharing in ("prefix", "adapter") and facts.backbone:
        lines.append(
            f"- Loading it loads the frozen backbone, too, and checks its weights: {code_span(facts.backbone)}."
        )
    if facts.backbone_trained:
        lines.append(
            f"- {facts.backbone_trained} tensors of the backbone were trained with the rest and are saved with the "
            "model, so its adapters alone, over the published backbone, compute something else."
        )
    return "## Intended use and limits\n\n" + "\n".join(lines) if lines else ""


def training_section(facts: CardFacts) -> str:
    """Return how the model was trained."""
    rows = []
    if facts.sharing is not None:
        rows.append(["sharing scheme", _SCHEMES[facts.sharing]])
    rows += [[f"its {code_span(name)}", escape(show(value))] for name, value in facts.options.items()]
    for name, (method, kwargs) in facts.methods.items():
        rows.append([_METHOD_TITLES[name], code_span(method) + (f" {escape(show(kwargs))}" if kwargs else "")])
    if facts.steps is not None:
        rows.append(["optimizer steps", f"{facts.steps:,}"])
    if facts.seconds is not None:
        rows.append(
            ["training time", f"{facts.seconds:,.1f} s" + (f" on {code_span(facts.device)}" if facts.device else "")]
        )
    if facts.emissions is not None:
        rows.append(["emissions", f"{facts.emissions:.4g} g of CO₂ equivalents, measured by codecarbon"])
    rows += [[code_span(name), escape(show(value))] for name, value in facts.arguments.items()]
    text = "## Training\n\n" + table(["", ""], rows) if rows else ""
    shares = _shares(facts.tasks)
    if shares:
        text += "\n\n" + table(["task", "weight", "rows seen"], shares, (1, 2))
    return text


def _shares(tasks: list[TaskFacts]) -> list[list[str]]:
    return [
        [code_span(task.name), show(task.weight), f"{task.rows_seen:,}"] for task in tasks if task.rows_seen is not None
    ]


def versions_section(facts: CardFacts) -> str:
    """Return the versions of the libraries."""
    found: Mapping[str, Any] = facts.versions
    lines = [f"- {code_span(name)} {escape(number)}" for name, number in found.items()]
    return "## Versions\n\n" + "\n".join(lines) if lines else ""


SECTIONS = {
    "tasks": tasks_section,
    "results": results_section,
    "comparison": comparison_section,
    "conflicts": conflict_section,
    "limits": limits_section,
    "training": training_section,
    "versions": versions_section,
}
"""Sections by name, in the order of the card; how to use the model comes behind the results of its tasks."""
