"""Findings about data: rows, labels, lengths, repeated texts, texts that are trained on and evaluated, contradictions.

All functions are pure: facts of splits ([`hf_multitask.analysis.preflight_rows`]) → findings. Thresholds stand in
[`hf_multitask.analysis.preflight_limits`].
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..models.task import Task, TaskType
from .preflight_limits import LIMITS
from .preflight_result import Finding
from .preflight_rows import LabelFacts, SplitFacts

__all__ = ["data_findings", "data_table"]

_SPLITS_EVALUATED = ("validation", "test")
_SHOWN = 5  # names in a message


def data_findings(facts: Sequence[SplitFacts]) -> list[Finding]:
    """Return what is to be said of some splits; checks without any complaint are one finding each.

    Args:
        facts: All splits of all datasets.
    """
    checks = {
        "rows": (_rows, "every dataset has enough rows for training, and for evaluation"),
        "labels": (_labels, "every label occurs in training, and none is nearly all of them"),
        "truncated": (_truncated, "nearly all texts fit into max_length"),
        "empty": (_empty, "no text is empty"),
        "repeated": (_repeated, "nearly all texts of a split are different"),
        "leaked": (_leaked, "no text that is evaluated is in the training rows of its dataset"),
        "leaked_between": (_leaked_between, "no text that is evaluated is in the training rows of another dataset"),
        "contradicted": (_contradicted, "no text has two labels of one task"),
    }
    findings = []
    for check, (function, all_is_well) in checks.items():
        found = list(function(facts))
        if found and all(finding.level == "ok" for finding in found):
            numbers = {f"{f.about} {name}": value for f in found for name, value in f.numbers.items()}
            found = [Finding("ok", "data", check, "", all_is_well, numbers)]
        for finding in found:  # what several tasks read in several ways is said once
            if (finding.level != "ok" or not finding.about) and finding not in findings:
                findings.append(finding)
    return findings


def data_table(facts: Sequence[SplitFacts]) -> list[dict[str, Any]]:
    """Return a row for each split: its rows, and of its lengths the median, the 95th percentile and what is cut."""
    table = []
    for split in facts:
        row: dict[str, Any] = {"dataset": split.dataset, "split": split.split, "rows": split.rows}
        row |= {"complete": split.complete, "tasks": [task.name for task in split.tasks]}
        row["labels"] = {name: dict(found.counts.most_common()) for name, found in split.labels.items()}
        for name, found in split.labels.items():
            if found.numbers is not None:
                row["labels"][name] = _spread(found.numbers)
        row |= dict.fromkeys(("median_length", "long_length", "max_length", "truncated"))
        if split.lengths is not None and split.max_length is not None:
            median, long = np.percentile(split.lengths, [50, 95])
            cut = float((split.lengths > split.max_length).mean())
            row |= {"median_length": float(median), "long_length": float(long)}
            row |= {"max_length": split.max_length, "truncated": cut}
        table.append(row)
    return table


def _spread(numbers: np.ndarray) -> dict[str, float]:
    with np.errstate(all="ignore"):
        mean, std = float(np.nanmean(numbers)), float(np.nanstd(numbers, axis=0).mean())
        return {"mean": mean, "std": std, "min": float(np.nanmin(numbers)), "max": float(np.nanmax(numbers))}


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


def _finding(
    check: str, value: float, about: str, message: str, advice: str, numbers: dict[str, float], limit: str = ""
) -> Finding:
    level = LIMITS[limit or check].level(value)
    return Finding(level, "data", check, about, message, numbers, advice if level != "ok" else "")


# ---- rows ----


def _rows(facts: Sequence[SplitFacts]) -> Iterator[Finding]:
    for one in facts:
        limit = "training_rows" if one.split == "train" else "evaluation_rows"
        mend = "get more rows, or make the task auxiliary" if one.split == "train" else "take more rows for evaluation"
        yield _finding("rows", one.rows, one.name, f"{one.rows:,} rows", mend, {"rows": one.rows}, limit)
    evaluated = {one.dataset for one in facts if one.split in _SPLITS_EVALUATED}
    for one in facts:
        if one.split == "train" and one.dataset not in evaluated and not all(task.auxiliary for task in one.tasks):
            message = "no validation and no test rows: nothing will show whether it works"
            yield Finding("warn", "data", "rows", one.dataset, message, {"rows": 0}, "validation: 0.1 takes a tenth")


# ---- labels ----


def _labels(facts: Sequence[SplitFacts]) -> Iterator[Finding]:
    for one in facts:
        if one.split == "train":
            for task in one.tasks:
                if task.name in one.labels:
                    others = [o for o in facts if o.dataset == one.dataset and o.split != "train" and task in o.tasks]
                    if one.labels[task.name].numbers is None:
                        yield from _classes(task, one, others)
                    else:
                        yield from _numbers(task, one)


def _classes(task: Task, train: SplitFacts, others: Sequence[SplitFacts]) -> Iterator[Finding]:
    counts, own = train.labels[task.name].counts, task.labels or ()
    evaluated: Counter[str] = Counter()
    for other in others:
        evaluated.update(other.labels[task.name].counts if task.name in other.labels else ())
    if unknown := [label for label in {**counts, **evaluated} if label not in own]:
        message = f"{len(unknown)} labels are none of the task's own: {_listed(unknown)}"
        numbers = {"labels": float(len(unknown)), "items": float(sum(counts[u] + evaluated[u] for u in unknown))}
        yield Finding(
            "fail", "data", "labels", task.name, message, numbers, "add them to labels, or filter the rows out"
        )
    absent = [label for label in own if not counts[label]]
    if wanted := [label for label in absent if evaluated[label]]:
        message = f"{len(wanted)} labels never occur in training and do occur in evaluation: {_listed(wanted)}"
        numbers = {"labels": float(len(wanted)), "evaluated": float(sum(evaluated[label] for label in wanted))}
        level = "fail" if train.complete else "warn"
        mend = "split anew, stratified by label, or leave these labels out"
        yield Finding(level, "data", "labels", task.name, message, numbers, mend)
    if unused := [label for label in absent if not evaluated[label]]:
        message = f"{len(unused)} of {len(own)} labels never occur: {_listed(unused)}"
        mend = "leave them out of labels, or see whether the column is the right one"
        yield Finding("warn", "data", "labels", task.name, message, {"labels": len(unused)}, mend)
    seen = {label: counts[label] for label in own if counts[label]}
    if not seen:
        return
    rare = [label for label, count in seen.items() if LIMITS["rarest_label"].level(count) != "ok"]
    message = f"the rarest label, {min(seen, key=seen.__getitem__)!r}, occurs {min(seen.values())} times in training"
    if rare:
        message = f"{len(rare)} labels occur fewer than {LIMITS['rarest_label'].warn:g} times: {_listed(rare)}"
    mend = "merge rare labels, or get more rows"
    least = min(seen.values())
    yield _finding("labels", least, task.name, message, mend, {"rarest": least}, "rarest_label")
    if task.type is not TaskType.MULTI_LABEL_CLASSIFICATION:
        most = max(seen, key=seen.__getitem__)
        share = seen[most] / train.labels[task.name].items
        limit = "majority_word_label" if task.type is TaskType.TOKEN_CLASSIFICATION else "majority_label"
        message = f"{share:.1%} of the labels are {most!r}"
        mend = "judge by a metric that looks at rare labels (Task(metric=...)), and get more of them"
        yield _finding("labels", share, task.name, message, mend, {"majority_share": share}, limit)


def _numbers(task: Task, train: SplitFacts) -> Iterator[Finding]:
    numbers = train.labels[task.name].numbers
    assert numbers is not None
    spread = _spread(numbers)
    if not spread["std"] > 0:
        message = f"all labels are {spread['mean']:g}: there is nothing to learn"
        yield Finding("fail", "data", "labels", task.name, message, spread, "see whether the column is the right one")
    else:
        yield Finding(
            "ok", "data", "labels", task.name, f"labels are {spread['mean']:.3g} ± {spread['std']:.3g}", spread
        )


# ---- texts ----


def _truncated(facts: Sequence[SplitFacts]) -> Iterator[Finding]:
    said: list[tuple[Task, ...]] = []
    for one in sorted(facts, key=lambda one: one.split != "train"):
        if one.lengths is None or one.max_length is None or one.tasks in said:
            continue
        share = float((one.lengths > one.max_length).mean())
        kept = float(np.minimum(one.lengths, one.max_length).sum() / one.lengths.sum())
        long = int(np.ceil(np.percentile(one.lengths, 95) / 8) * 8)
        message = (
            f"{share:.1%} of the rows are longer than max_length={one.max_length}; {kept:.0%} of all tokens are read"
        )
        mend = f"max_length={long} would hold 95 % of the rows; keep it where the beginning says all"
        if LIMITS["truncated"].level(share) != "ok":
            said.append(one.tasks)  # one split is enough to say it
        numbers = {"share": share, "max_length": one.max_length, "percentile_95": long, "tokens_read": kept}
        yield _finding("truncated", share, one.name, message, mend, numbers)


def _empty(facts: Sequence[SplitFacts]) -> Iterator[Finding]:
    for one in facts:
        count = int(one.empty.sum())
        message = f"{count} of {one.rows:,} texts are empty" + (
            f", the first in row {one.empty.argmax()}" if count else ""
        )
        yield _finding("empty", count / one.rows, one.name, message, "filter these rows out", {"rows": count})


def _repeated(facts: Sequence[SplitFacts]) -> Iterator[Finding]:
    for one in facts:
        share = 1 - len(np.unique(one.hashes)) / one.rows
        message = f"{share:.1%} of the rows repeat the text of an earlier one"
        yield _finding("repeated", share, one.name, message, "leave out repeated texts", {"share": share})


def _overlap(one: SplitFacts, train: SplitFacts) -> tuple[int, int, int]:
    """Return how many rows of a split have a text of the training rows, the first of them, and its like in training."""
    shared = np.isin(one.hashes, train.hashes[~train.empty]) & ~one.empty
    if not shared.any():
        return 0, -1, -1
    first = int(shared.argmax())
    return int(shared.sum()), first, int((train.hashes == one.hashes[first]).argmax())


def _leaked(facts: Sequence[SplitFacts]) -> Iterator[Finding]:
    for train, one in _pairs(facts):
        if train.dataset == one.dataset and train.tasks == one.tasks:
            count, row, like = _overlap(one, train)
            message = f"{count} of {one.rows:,} rows ({count / one.rows:.1%}) have a text that is in the training rows"
            message += f"; row {row} is row {like} there" if count else ""
            mend = f"leave these rows out of {one.split} or of the training rows"
            yield _finding(
                "leaked", count / one.rows, one.name, message, mend, {"rows": count, "share": count / one.rows}
            )


def _leaked_between(facts: Sequence[SplitFacts]) -> Iterator[Finding]:
    for train, one in _pairs(facts):
        if train.dataset != one.dataset:
            count, row, like = _overlap(one, train)
            message = f"{count} of {one.rows:,} rows have a text that {train.dataset!r} trains on"
            message += f"; row {row} is row {like} there" if count else ""
            mend = f"leave these rows out of {one.split} of {one.dataset!r} or out of {train.dataset!r}"
            about = f"{one.name}, {train.dataset}"
            yield _finding("leaked_between", count / one.rows, about, message, mend, {"rows": count})


def _pairs(facts: Sequence[SplitFacts]) -> Iterator[tuple[SplitFacts, SplitFacts]]:
    """Yield training splits, each with every split that is evaluated."""
    for one, other in itertools.product(facts, facts):
        if one.split == "train" and other.split in _SPLITS_EVALUATED:
            yield one, other


def _contradicted(facts: Sequence[SplitFacts]) -> Iterator[Finding]:
    groups: dict[tuple[str, str], list[SplitFacts]] = {}
    for one in facts:
        for task in one.labels:
            groups.setdefault((one.dataset, task), []).append(one)
    for (_, task), splits in groups.items():
        if len({one.labels[task].width for one in splits}) > 1:
            continue  # lists of other lengths, which the trainer refuses
        texts = np.concatenate([one.hashes for one in splits])
        places = [(one.split, row) for one in splits for row in range(one.rows)]
        bad = _with_two_labels(texts, [one.labels[task] for one in splits])
        bad &= ~np.concatenate([one.empty for one in splits])
        share = float(bad.mean())
        message = f"{int(bad.sum())} rows ({share:.1%}) have a text that has another label elsewhere"
        if bad.any():
            first = int(bad.argmax())
            twins = np.flatnonzero(texts == texts[first])[:3]
            message += ": " + ", ".join(f"row {places[i][1]} of {places[i][0]}" for i in twins)
        mend = "settle which label is right, or leave these rows out"
        yield _finding("contradicted", share, task, message, mend, {"rows": int(bad.sum()), "share": share})


def _with_two_labels(texts: np.ndarray, labels: Sequence[LabelFacts]) -> np.ndarray:
    """Return `[N]`, bool: whether a row's text has two labels; of numbers, two more than a standard deviation apart."""
    order = np.argsort(texts, kind="stable")
    starts = np.flatnonzero(np.r_[True, texts[order][1:] != texts[order][:-1]])
    sizes = np.diff(np.r_[starts, len(texts)])
    if labels[0].numbers is not None:
        numbers = np.concatenate([one.numbers for one in labels if one.numbers is not None])[order]
        apart = np.fmax.reduceat(numbers, starts) - np.fmin.reduceat(numbers, starts)
        two = (apart > np.nanstd(numbers, axis=0)).any(1)
    else:
        hashes = np.concatenate([one.hashes for one in labels])[order]
        two = np.maximum.reduceat(hashes, starts) != np.minimum.reduceat(hashes, starts)
    result = np.empty(len(texts), dtype=bool)
    result[order] = np.repeat(two, sizes)
    return result
