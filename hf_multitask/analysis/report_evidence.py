"""What other commands found out, in a report: comparison with single-task models, preflight, sweep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .comparison_result import Comparison, Difference
from .report_blocks import NONE, Figure, Section, Table, change, number, signed
from .report_charts import Interval, draw_intervals
from .report_facts import RunFacts
from .report_tables import differing_settings
from .sweep_result import AuxiliarySweep

__all__ = ["comparison_section", "preflight_section", "sweep_section", "verdict_lines"]

# What the seeds of a comparison change, and what its own runs leave out.
_OWN_OF_COMPARISON = ("training.seed", "training.eval_", "training.use_cpu")


def verdict_lines(runs: Sequence[RunFacts], sources: Sequence[RunFacts]) -> list[tuple[bool, str]]:
    """Return, for each comparison, whether to deploy its multi-task model; and whose verdict it is, and why."""
    found = []
    for source in sources:
        if source.comparison is not None:
            deploy, reason = source.comparison.deploy, source.comparison.reason
            reason = reason.removeprefix("deploy: " if deploy else "do not deploy; ")
            others = [run.name for run in runs if _other_settings(source.comparison, run)]
            by = f"by the comparison in {source.name}" if len(sources) > 1 else "by its comparison"
            but = f", whose models have other settings than {' and '.join(others)}" if others else ""
            found.append((deploy, f"({by}{but}): {reason}"))
    return found


def comparison_section(runs: Sequence[RunFacts], sources: Sequence[RunFacts]) -> Section:
    """Return metrics against those of single-task models, with their intervals; and which tasks have no baseline."""
    section = Section("Against single-task models")
    compared = [source for source in sources if source.comparison is not None]
    if not compared:
        section.blocks.append(
            "No task has a baseline: there is no comparison.json in these folders. The command hf-multitask compare "
            "trains a single-task model for each task; give its folder beside that of the run."
        )
    for source in compared:
        comparison = source.comparison
        assert comparison is not None
        section.blocks += [_differences(source.name, comparison), *_picture(source.name, comparison)]
        section.blocks += list(_sentences(comparison))
        for run in runs:
            if differing := _other_settings(comparison, run):
                head = ["setting", f"comparison in {source.name}", run.name]
                caption = f"Where the compared multi-task models are not as {run.name} is"
                rows = [[key, *values] for key, values in differing.items()]
                section.blocks.append(Table(head, rows, frozenset(range(3)), caption))
        for strategy, part in comparison.against.items():
            section.blocks.append(_against(strategy, part["tasks"], change(part["delta_m"])))
    if compared:
        section.blocks += list(_without_baseline(runs, compared))
    return section


def _differences(name: str, comparison: Comparison) -> Table:
    several = len(comparison.seeds) > 1
    level = f"{comparison.settings.get('confidence', 0.95):.0%} interval"
    seeds = ["spread over seeds"] if several else []
    head = ["task", "metric", "single-task", "multi-task", "difference", level, *seeds, "verdict"]
    rows = []
    for task in comparison.tasks:
        turned = "" if task.greater_is_better else " (less is better)"
        spread = [NONE if task.seed_spread is None else f"±{number(task.seed_spread)}"] if several else []
        star = "" if task.task in comparison.critical_tasks else ", not critical"
        values = [number(task.single), number(task.multi), signed(task.difference), _interval(task)]
        rows.append([task.task, task.metric + turned, *values, *spread, task.verdict + star])
    many = f"mean of {len(comparison.seeds)} seeds" if several else "one seed"
    return Table(head, rows, frozenset([0, 1, len(head) - 1]), f"{name}: validation metrics, {many}")


def _interval(found: Difference) -> str:
    return f"{signed(found.interval[0])} to {signed(found.interval[1])}"


def _picture(name: str, comparison: Comparison) -> Iterator[list[Figure] | str]:
    """Yield the differences as a picture, and which tasks are not in it."""
    shown = [task for task in comparison.tasks if task.single]
    intervals = []
    for task in shown:
        value, low, high, margin = (one / abs(task.single) for one in (task.difference, *task.interval, task.margin))
        intervals.append(Interval(task.task, value, low, high, margin, task.verdict))
    if intervals:
        words = "; ".join(f"{one.name} {one.value:+.1%} ({one.low:+.1%} to {one.high:+.1%})" for one in intervals)
        alt = f"Difference between multi-task and single-task models of {name}, relative, with intervals: {words}"
        yield [Figure(draw_intervals(intervals, alt), wide=True)]
    left_out = [task.task for task in comparison.tasks if not task.single]
    if left_out:
        yield f"Not in the picture, because the single-task metric is 0: {', '.join(left_out)}."


def _sentences(comparison: Comparison) -> Iterator[str]:
    yield f"Mean relative change over the tasks, Δm: {change(comparison.delta_m)}."
    if any(not task.greater_is_better for task in comparison.tasks):
        yield "A difference above 0 is better for every metric: it is turned round where less is better."
    yield from (f"{note[0].upper()}{note[1:]}." for note in comparison.notes)


def _other_settings(comparison: Comparison, run: RunFacts) -> dict[str, list[str]]:
    """Return the settings of a comparison's multi-task models that are not those of a run: there, and here."""
    if not (run.recipe and comparison.recipe):
        return {}
    differing = differing_settings([comparison.recipe, run.recipe])
    return {key: values for key, values in differing.items() if not key.startswith(_OWN_OF_COMPARISON)}


def _against(strategy: str, tasks: dict[str, Difference], delta: str) -> Table:
    rows = [[name, signed(one.difference), _interval(one), one.verdict] for name, one in tasks.items()]
    caption = f"This recipe against {strategy} mixing (Δm of that against the baselines: {delta})"
    return Table(["task", "difference", "interval", "verdict"], rows, frozenset([0, 3]), caption)


def _without_baseline(runs: Sequence[RunFacts], compared: Sequence[RunFacts]) -> Iterator[str]:
    """Yield which tasks of the runs no comparison has a baseline of."""
    known = {task for source in compared if source.comparison for task in source.comparison.verdicts}
    for run in runs:
        lacking = []
        for name in run.tasks:
            if name not in known:
                described = run.described_tasks.get(name, {})
                role = next((role for role in ("auxiliary", "held_out") if described.get(role)), "")
                lacking.append(f"{name} ({role.replace('_', ' ')} tasks have none)" if role else name)
        if lacking:
            yield f"No baseline for {', '.join(lacking)} of {run.name}."


# ---- preflight ----


def preflight_section(sources: Sequence[RunFacts]) -> Section | None:
    """Return what preflights found; None where there was none."""
    section = Section("Preflight")
    for source in sources:
        if source.preflight is not None:
            found = source.preflight
            counts = ", ".join(f"{len(found.of_level(level))} {level}" for level in ("fail", "warn", "ok"))
            verdict = "nothing stands against it" if found.ok else "do not train it yet"
            section.blocks.append(f"{found.name}: {verdict} ({counts}).")
            rows = [
                [row["level"], row["section"], row["about"] or "all", row["message"], row["advice"] or NONE]
                for row in found.table(("warn", "fail"))
            ]
            if rows:
                head = ["", "part", "about", "found", "what to do"]
                section.blocks.append(Table(head, rows, frozenset(range(5)), f"{source.name}: findings"))
    return section if section.blocks else None


# ---- sweep ----


def sweep_section(sources: Sequence[RunFacts]) -> Section | None:
    """Return what sweeps over the weight of an auxiliary task gave; None where there was none."""
    section = Section("Weight of an auxiliary task")
    for source in sources:
        if source.sweep is not None:
            section.blocks += [_weights(source.name, source.sweep), *_sweep_words(source.sweep)]
    return section if section.blocks else None


def _weights(name: str, sweep: AuxiliarySweep) -> Table:
    head = [f"weight of {sweep.auxiliary}", sweep.primary_name, "change", "", f"{sweep.auxiliary} loss"]
    rows = []
    for row in sweep.table():
        deviations = [row[f"{key}_std"] for key in ("primary", "change")]
        spread = ["" if value is None else f" ±{number(value)}" for value in deviations]
        moved = signed(row["change"]) + spread[1] if row["weight"] else NONE
        rows.append(
            [
                f"{row['weight']:g}",
                number(row["primary"]) + spread[0],
                moved,
                "worse" if row["worse"] else "",
                number(row["auxiliary_loss"]),
            ]
        )
    many = "one seed" if sweep.one_seed else f"means and standard deviations of {len(sweep.seeds)} seeds"
    return Table(head, rows, frozenset([3]), f"{name}: {many}")


def _sweep_words(sweep: AuxiliarySweep) -> Iterator[str]:
    if sweep.saturation is not None:
        yield f"{sweep.auxiliary} is learned as well as at any weight from weight {sweep.saturation:g} on."
    if sweep.interference_threshold is None:
        yield f"At the largest weight {sweep.primary_name} is not worse than without {sweep.auxiliary}."
    else:
        yield f"From weight {sweep.interference_threshold:g} on, {sweep.primary_name} is worse than without it."
    if sweep.one_seed:
        yield "One seed: another may differ by more."
