"""A report says what the files of runs say, shows what is missing as missing, and refuses what cannot be compared."""

from __future__ import annotations

import copy
import html.parser
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from browser import visit, why_there_is_none
from conftest import BACKBONES, make_datasets, make_tokenizer
from datasets import Dataset
from typer.testing import CliRunner

from hf_multitask import Task
from hf_multitask.analysis import report_charts
from hf_multitask.analysis.affinity import AffinitySeries
from hf_multitask.analysis.comparison_result import Comparison, Difference, TaskComparison
from hf_multitask.analysis.conflict_result import GradientConflicts
from hf_multitask.analysis.grouping_result import TaskGroups
from hf_multitask.analysis.report import report
from hf_multitask.analysis.report_blocks import Section, Table, number, signed
from hf_multitask.analysis.report_charts import COLOURS, Interval, Line, draw_heat, draw_intervals, draw_lines
from hf_multitask.analysis.report_pages import Page, html_page, markdown_page
from hf_multitask.analysis.routing_result import RoutingResult
from hf_multitask.analysis.sweep_result import AuxiliarySweep, SweepRun
from hf_multitask.cli.app import app
from hf_multitask.data.row_hashes import hash_evaluated_rows, rows_hash
from hf_multitask.running import run_recipe

pytest.importorskip("matplotlib")
TASKS = {"tone": ("single_label_classification", "accuracy"), "strength": ("regression", "pearson")}
TASKS |= {"names": ("token_classification", "f1")}
EVIL = "<script>alert(1)</script>"


# What the files hold


def results_of(tasks=TASKS, **changes):
    described = [
        {"name": name, "type": kind, "dataset": f"data/{name}-{{split}}.parquet"} for name, (kind, _) in tasks.items()
    ]
    found = {
        name: {
            "rows_seen": 1000 * (i + 1),
            "share": (i + 1) / 6,
            "primary_metric": metric,
            "validation": {metric: 0.5 + 0.1 * i, "loss": 1.5 - 0.25 * i},
            "test": {metric: 0.45 + 0.1 * i, "loss": 1.75 - 0.25 * i},
            "rows_sha256": {"validation": f"{i}" * 64, "test": f"{i + 5}" * 64},
        }
        for i, (name, (_, metric)) in enumerate(tasks.items())
    }
    training = {"max_steps": 60, "learning_rate": 3e-4, "seed": 7, "loss_weighting": "uncertainty"}
    training |= {"gradient_combination": "upgrad", "task_sampling_kwargs": {"alpha": 0.5}}
    recipe = {"model": {"backbone": "some/encoder", "sharing": "hard"}, "tasks": described, "training": training}
    return {
        "recipe": recipe,
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "tasks": found,
        "average": {"validation": 0.6, "test": 0.55},
        "steps": 60,
        "train_seconds": 318.0,
        "train_loss": 1.0,
        "peak_memory_mib": 1234,
        "device": "cpu",
    } | changes


def state_of(tasks=TASKS, steps=60, every=5, **more):
    names = list(tasks)
    history = []
    for step in range(every, steps + 1, every):
        line = {"step": step, "epoch": step / steps, "loss": 2.0 - step / steps, "grad_norm": 1.0}
        for i, name in enumerate(names):
            line[f"loss/{name}"] = 2.0 + i - step / steps
            line[f"share/{name}"] = (i + 1) / 6
            line[f"weight/{name}"] = 1.0 + 0.01 * step * (i - 1)
            line[f"coefficient/{name}"] = 1.0 + 0.1 * i
            for j, other in enumerate(names[:i]):
                line[f"conflict/{other}|{name}"] = math.sin(step + i + j)
        history.append(line)
        if step % 20 == 0:
            judged = {"step": step, "eval_runtime": 1.0}
            for name, (_, metric) in tasks.items():
                judged |= {f"eval_{name}_{metric}": step / 100, f"eval_{name}_loss": 2.5 - step / 100}
            history.append(judged)
    history.append({"step": steps, "train_runtime": 318.0, "train_loss": 1.0})
    return {"log_history": history, "global_step": steps, "max_steps": steps} | more


def task_comparison(name, metric, difference, half, single=0.5, **changes):
    values = {
        "difference": difference,
        "interval": (difference - half, difference + half),
        "interval_over_examples": (difference - half / 2, difference + half / 2),
        "by_seed": {"0": difference - 0.01, "1": difference + 0.01},
        "seed_spread": 0.014,
        "margin": 0.02 * single,
        "task": name,
        "metric": metric,
        "greater_is_better": True,
        "multi": single + difference,
        "single": single,
        "multi_by_seed": {"0": single, "1": single + 2 * difference},
        "single_by_seed": {"0": single, "1": single},
        "examples": 200,
        "budget": {"rows": 100, "batch_size": 4, "accumulation": 1, "steps": 25},
    }
    return TaskComparison(**{**values, **changes})


def comparison_of(*tasks, **changes):
    tasks = tasks or (
        task_comparison("tone", "accuracy", 0.08, 0.03),
        task_comparison("strength", "pearson", -0.12, 0.04, 0.6),
    )
    cost = {
        "parameters": {"multi": 21_000_000, "single": 42_000_000},
        "saved_mib": {"multi": 87.0, "single": 174.0},
        "train_seconds": {"multi": 100.0, "single": 150.0},
        "inference_seconds": {"multi": 0.75, "single": 1.5},
        "inference_rows": 512,
        "device": "cpu",
    }
    values = {
        "tasks": tasks,
        "seeds": (0, 1),
        "delta_m": {"value": -0.02, "interval": [-0.05, 0.01]},
        "critical_tasks": tuple(task.task for task in tasks),
        "cost": cost,
        "settings": {"margin": 0.02, "confidence": 0.95, "resamples": 1000},
        "recipe": results_of()["recipe"],
        "versions": {"torch": "2.13.0"},
    }
    return Comparison(**{**values, **changes})


def write_run(folder: Path, results=None, state=None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("results.json", results), ("trainer_state.json", state)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture
def run(tmp_path):
    """The folder of a run."""
    return write_run(tmp_path / "first", results_of(), state_of())


@pytest.fixture
def bare(tmp_path):
    """The folder of a run without a log, and so without curves."""
    return write_run(tmp_path / "first", results_of())


@pytest.fixture
def compared(tmp_path):
    """The folder of a comparison."""
    (tmp_path / "compared").mkdir()
    comparison_of().save(tmp_path / "compared" / "comparison.json")
    return tmp_path / "compared"


# Reading the pages again


class Reader(html.parser.HTMLParser):
    """Tags, attributes, ids and tables of a page, and whether its tags are closed."""

    EMPTY = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.ids, self.words = [], Counter(), [], [], []
        self.tables = []

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in self.EMPTY:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes <{self.open[-1:]}>"
        self.open.pop()

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.open[-1] in ("th", "td"):
            self.tables[-1][-1][-1] += data


def read_page(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert not reader.open
    return reader


def markdown_tables(page: str) -> list[list[list[str]]]:
    tables: list[list[list[str]]] = [[]]
    for line in page.splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            tables[-1].append([re.sub(r"\\(.)", r"\1", html.unescape(cell)) for cell in cells])
        elif tables[-1]:
            tables.append([])
    # The second row is that of the marks.
    return [[table[0], *table[2:]] for table in tables if table]


def rows_of(page: str, first: str) -> list[list[str]]:
    """Return the rows, in all tables of a page, whose first cell is this."""
    return [row for table in read_page(page).tables for row in table if row and row[0] == first]


# What a page says


def test_a_page_says_what_the_files_say(run):
    made = report(run)
    page = made.html()
    assert not made.warnings
    facts = {row[0]: row[1] for row in read_page(page).tables[0][1:]}
    assert facts["backbone"] == "some/encoder" and facts["sharing"] == "hard" and facts["device"] == "cpu"
    assert facts["loss weighting"] == "uncertainty" and facts["gradient combination"] == "upgrad"
    assert (
        facts["sampling"] == "temperature (alpha=0.5)" and facts["seed"] == "7" and facts["learning rate"] == "0.0003"
    )
    assert facts["optimizer steps"] == "60" and facts["training time"] == "5 min 18 s"
    assert facts["versions"] == "python 3.11.7, torch 2.13.0"
    assert facts["tasks"].startswith("tone (single label classification), strength (regression)")
    assert ["tone", "accuracy", "0.500", "0.450", "1,000", "16.7%"] in rows_of(page, "tone")
    assert ["names", "f1", "0.700", "0.650", "3,000", "50.0%"] in rows_of(page, "names")
    assert ["strength", "loss", "1.250", "1.500"] in rows_of(page, "strength")
    assert ["average of the tasks", "", "0.600", "0.550", "", ""] in rows_of(page, "average of the tasks")
    assert ["first", "60", "318.0", f"{318_000 / 60:,.1f}", f"{6000 / 318:.1f}", "1,234"] in rows_of(page, "first")
    # loss of `names` from 2 + 2 - 5/60 to 2 + 2 - 1, share of a half, weight from 1.05 to 1.6
    assert ["names", "3.917", "3.000", "60", "3.917", "3.000", "12"] in rows_of(page, "names")
    assert ["names", "50.0%", "50.0%", "5", "50.0%", "50.0%", "12"] in rows_of(page, "names")
    assert ["names", "1.050", "1.050", "5", "1.600", "1.600", "12"] in rows_of(page, "names")
    cosines = [math.sin(step + 1) for step in range(5, 61, 5)]
    (pair,) = rows_of(page, "tone and strength")
    assert pair[1:3] == [f"{np.mean(cosines):+.3f}", f"{min(cosines):+.3f}"]
    assert pair[5] == f"{np.mean(np.array(cosines) < 0):.1%}"
    assert "some/encoder" in page and "max_steps: 60" in page


def test_pictures_have_axes_with_units_a_legend_and_words(run, compared):
    reader = read_page(report([run, compared]).html())
    pictures = [value for tag, name, value in reader.attributes if tag == "svg" and name == "aria-label"]
    roles = [value for tag, name, value in reader.attributes if tag == "svg" and name == "role"]
    assert len(pictures) == reader.tags["svg"] == reader.tags["figure"] == 11 and set(roles) == {"img"}
    assert "Loss of tone (nats per row) over steps 5 to 60: training from 1.917 to 1.000" in pictures[1]
    assert any("Loss of strength (squared units of the label)" in words for words in pictures)
    assert any("tone and strength" in words and "Cosines" in words for words in pictures)
    assert any("tone +16.0% (+10.0% to +22.0%)" in words for words in pictures)
    text = " ".join(reader.words)
    for label in (
        "optimizer step",
        "loss (nats per token)",
        "share of the rows",
        "weight (factor)",
        "cosine of gradients",
    ):
        assert label in text
    assert "training" in text and "validation" in text


def test_a_comparison_stands_beside_the_run(run, compared):
    made = report([run, compared])
    page = made.html()
    assert ["tone", "accuracy", "0.500", "0.580", "+0.080", "+0.050 to +0.110", "±0.014", "better"] in rows_of(
        page, "tone"
    )
    assert ["strength", "pearson", "0.600", "0.480", "-0.120", "-0.160 to -0.080", "±0.014", "worse"] in rows_of(
        page, "strength"
    )
    assert "<strong>Do not deploy</strong>" in page and "worse than its baseline: strength" in page
    assert "-2.0% (-5.0% to +1.0%)" in page and "No baseline for names of first." in page
    assert ["parameters", "21,000,000", "42,000,000", "0.50"] in rows_of(page, "parameters")
    assert ["inference of all tasks, s", "0.750", "1.500", "0.50"] in rows_of(page, "inference of all tasks, s")
    markdown = made.markdown()
    assert markdown.count("**Do not deploy**") == 1 and "| strength | pearson | 0.600 | 0.480 | -0.120 |" in markdown


def test_a_good_verdict_is_a_good_verdict(bare, tmp_path):
    one = comparison_of(task_comparison("tone", "accuracy", 0.08, 0.03))
    (bare / "comparison.json").write_text(json.dumps(one.to_dict()))
    page = report(bare).html()
    assert "<strong>Deploy</strong>" in page and "Do not deploy" not in page and 'class="note good"' in page


def test_one_seed_less_is_better_and_other_mixings_are_told(bare):
    against = {"uniform": {"metrics": {"tone": 0.5}, "delta_m": {"value": 0.01, "interval": [0.0, 0.02]}}}
    fields = Difference.__dataclass_fields__
    task = task_comparison("tone", "loss", 0.08, 0.03, greater_is_better=False, seed_spread=None)
    against["uniform"]["tasks"] = {"tone": Difference(**{name: getattr(task, name) for name in fields})}
    comparison_of(task, seeds=(0,), against=against).save(bare / "comparison.json")
    page = report(bare).html()
    assert "One seed: intervals are over examples only" in page and "loss (less is better)" in page
    assert "spread over seeds" not in page and "against uniform mixing" in page and "+1.0% (+0.0% to +2.0%)" in page


def test_a_baseline_of_zero_is_left_out_of_the_picture_only(bare):
    tasks = [task_comparison("tone", "accuracy", 0.08, 0.03), task_comparison("names", "f1", 0.2, 0.1, single=0.0)]
    comparison_of(*tasks, delta_m={"value": None, "interval": None}).save(bare / "comparison.json")
    page = report(bare).html()
    assert "Not in the picture, because the single-task metric is 0: names." in page
    assert "not defined" in page and rows_of(page, "names")[-2:]


def test_that_a_comparison_is_of_other_settings_is_said(bare, compared):
    assert "other settings" not in report([bare, compared]).html()
    recipe = copy.deepcopy(results_of()["recipe"])
    recipe["training"] |= {"loss_weighting": "static", "seed": 3, "logging_steps": 1}
    comparison_of(recipe=recipe).save(compared / "comparison.json")
    page = report([bare, compared]).html()
    assert "whose models have other settings than first" in page
    assert rows_of(page, "training.loss_weighting") == [["training.loss_weighting", "static", "uncertainty"]]
    assert not rows_of(page, "training.seed") and not rows_of(page, "training.logging_steps")


def test_tasks_without_a_baseline_are_told_apart(tmp_path):
    results = results_of()
    results["recipe"]["tasks"][2]["auxiliary"] = True
    run = write_run(tmp_path / "run", results)
    assert "No task has a baseline" in report(run).html()
    comparison_of(task_comparison("tone", "accuracy", 0.08, 0.03)).save(run / "comparison.json")
    page = report(run).html()
    assert "No baseline for strength, names (auxiliary tasks have none) of run." in page
    assert "No task has a baseline" not in page


def test_several_runs_stand_side_by_side(run, tmp_path):
    results = results_of()
    results["tasks"]["tone"]["validation"]["accuracy"] = 0.625
    results["recipe"]["training"]["loss_weighting"] = "static"
    del results["tasks"]["names"]
    other = write_run(tmp_path / "second", results, state_of())
    page = report([run, other]).html()
    assert ["tone", "accuracy", "0.500", "0.450", "0.625", "0.450"] in rows_of(page, "tone")
    assert ["tone", "1,000", "16.7%", "1,000", "16.7%"] in rows_of(page, "tone")
    assert ["names", "f1", "0.700", "0.650", "no such task", "no such task"] in rows_of(page, "names")
    assert rows_of(page, "training.loss_weighting") == [["training.loss_weighting", "uncertainty", "static"]]
    assert not rows_of(page, "training.max_steps")
    assert "first, training" in page and "second, validation" in page
    assert "Judged on the same validation rows, by the SHA-256 of their content: tone (000000000000...)" in page


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    paths = [write_run(tmp_path / part / "out", results_of()) for part in ("a", "b")]
    made = report(paths)
    assert [source.name for source in made.sources] == ["a/out", "b/out"]
    (tmp_path / "a" / "out.json").write_text(json.dumps(results_of()))
    names = [source.name for source in report([paths[0], tmp_path / "a" / "out.json"]).sources]
    assert len(set(names)) == 2
    with pytest.raises(ValueError, match="given twice"):
        report([paths[0], paths[0] / ".." / "out"])


def test_everything_that_commands_leave_is_shown(bare):
    names = ("tone", "strength")
    eye = np.array([[1.0, -0.4], [-0.4, 1.0]])
    conflicts = GradientConflicts(names, eye, eye - 0.1, eye + 0.1, *[np.ones(2)] * 3, {"0": eye}, 8)
    conflicts.save(bare / "gradient_conflicts.json")
    counts = {"layer.1": np.array([[90, 10], [20, 80]])}
    RoutingResult(names, counts, {}).save(bare / "routing.json")
    weights = [(w, s) for w in (0.0, 0.5) for s in (0, 1)]
    runs = tuple(SweepRun(w, s, 0.8 - w / 2 + s / 50, 0.5, 1.0 - w) for w, s in weights)
    AuxiliarySweep("names", "tone", "accuracy", "f1", True, runs).save(bare / "sweep.json")
    values = np.tile(np.array([[0.02, -0.01], [-0.02, 0.03]]), (30, 1, 1))
    values += np.random.default_rng(0).normal(0, 1e-4, values.shape)
    series = AffinitySeries(names, tuple(range(30)), values)
    TaskGroups.from_series(series, (), "affinity", 2).save(bare / "grouping.json")
    page = report(bare).html()
    assert ["tone and strength", "-0.400", "-0.500 to -0.300", "negative"] in rows_of(page, "tone and strength")
    assert ["layer.1", "tone", "0", "90.0%", "90%, 10%"] in rows_of(page, "layer.1")
    assert ["layer.1, expert 1", "strength", "88.9%", "1.78", "45.0%"] in rows_of(page, "layer.1, expert 1")
    assert ["0.5", "0.560 ±0.014", "-0.250", "worse", "0.500"] in [
        [cell.split(" ±0.000")[0] for cell in row] for row in rows_of(page, "0.5")
    ]
    assert "From weight 0.5 on, tone accuracy is worse than without it." in page
    assert "Groups to train, 1: tone; 2: strength." in page
    assert any(row[3] == "alone" for row in rows_of(page, "tone") if len(row) == 5)


def test_findings_of_a_preflight_are_shown(bare):
    finding = {"level": "fail", "section": "data", "check": "leaked", "about": "tone", "message": f"3 rows {EVIL}"}
    finding |= {"numbers": {"rows": 3}, "advice": "drop them"}
    fine = {**finding, "level": "ok", "message": "fine", "advice": ""}
    advice = {"statements": [], "evidence": {}}
    content = {
        "name": "job",
        "findings": [finding, fine],
        "advice": advice,
        "sections": {},
        "seconds": {},
        "settings": {},
    }
    (bare / "preflight.json").write_text(json.dumps(content))
    made = report(bare)
    assert made.warnings == ("first: trainer_state.json is missing: there are no curves",)
    assert rows_of(made.html(), "fail") == [["fail", "data", "tone", f"3 rows {EVIL}", "drop them"]]
    assert not rows_of(made.html(), "ok") and "job: do not train it yet (1 fail, 0 warn, 1 ok)." in made.html()


# The pages themselves


NAMES = [EVIL, "a|b", "$x^2$", "_hidden", "`code`", "[x](javascript:alert(1))", "a&amp;b", "é 名"]


def everything(tmp_path, names=("tone", "strength", "names")):
    tasks = {name: list(TASKS.values())[i % 3] for i, name in enumerate(names)}
    results = results_of(tasks)
    results["recipe"]["tasks"][0]["labels"] = [EVIL, "```\n# not a heading"]
    run = write_run(tmp_path / "run", results, state_of(tasks, every=20))
    comparison_of(*(task_comparison(name, "accuracy", 0.08, 0.03) for name in names)).save(run / "comparison.json")
    return report(run)


def test_a_page_needs_nothing_else_and_runs_nothing(tmp_path):
    page = everything(tmp_path).html()
    reader = read_page(page)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(reader.tags)
    links = [value for _, name, value in reader.attributes if name in ("href", "src", "xlink:href", "srcset", "action")]
    assert links and all(link.startswith("#") for link in links)
    assert {link[1:] for link in links} <= set(reader.ids) and len(set(reader.ids)) == len(reader.ids)
    assert not [name for _, name, _ in reader.attributes if name.startswith("on")]
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in reader.attributes
    addresses = set(re.findall(r"https?://[^\"' )<]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg"}


def test_names_are_text_whatever_they_hold(tmp_path):
    made = everything(tmp_path, NAMES)
    reader = read_page(made.html())
    assert not reader.tags["script"]
    pictures = re.findall(r"<svg.*?</svg>", made.html(), flags=re.DOTALL)
    texts = ["".join(ElementTree.fromstring(picture).itertext()) for picture in pictures]
    markdown = made.markdown()
    outside = re.sub(r"^(`{3,})yaml\n.*?^\1$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    assert "<" not in outside and not re.search(r"(?<!\\)\]\(", outside)
    for name in NAMES:
        assert "".join(reader.words).count(name) >= 8  # tables, titles and legends
        assert [row for table in reader.tables for row in table if row[0] == name]
        assert [row for table in markdown_tables(markdown) for row in table if row[0] == name]
        # shares, weights, coefficients; differences; conflicts, whose keys are names with a bar between
        assert sum(name in text for text in texts) == (4 if "|" in name else 5), name


def test_a_label_cannot_leave_its_block_of_markdown(tmp_path):
    markdown = everything(tmp_path).markdown()
    fence = re.search(r"^(`{4,})yaml$", markdown, flags=re.MULTILINE)
    assert fence and markdown.count(f"\n{fence[1]}\n") == 1


def test_both_pages_have_the_same_tables(tmp_path):
    made = everything(tmp_path)
    html_tables, markdown = read_page(made.html()).tables, markdown_tables(made.markdown())
    assert len(html_tables) > 10 and html_tables == markdown
    assert all(len(row) == len(table[0]) for table in markdown for row in table)


def test_tables_are_checked_and_pages_need_no_pictures():
    with pytest.raises(ValueError, match="has 1 cells, and the table 2 columns"):
        Table(["a", "b"], [["1"]])
    page = Page("Title", [], [], [Section("Part", ["words", Table(["a", "b"], [["x", "1"]])])], "Made by hf_multitask")
    assert read_page(html_page(page)).tables == markdown_tables(markdown_page(page)) == [[["a", "b"], ["x", "1"]]]


@pytest.mark.parametrize(
    ("value", "plain", "with_sign"),
    [
        (0.75761, "0.758", "+0.758"),
        (-0.0, "0.000", "0.000"),
        (0.00031, "0.00031", "+0.00031"),
        (12345.6, "12,346", "+12345.600"),
        (234.56, "234.6", "+234.560"),
        (1e-7, "1.00e-07", "+1e-07"),
        (-2.5e9, "-2.50e+09", "-2500000000.000"),
        (None, "missing", "missing"),
    ],
)
def test_numbers_are_written_so_that_they_can_be_read(value, plain, with_sign):
    assert (number(value), signed(value)) == (plain, with_sign)


# Charts


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_lines_can_be_seen_on_light_and_dark_pages():
    style = html_page(Page("x", [], [], [], "y"))
    grounds = re.findall(r"--ground: (#\w+)", style)
    assert len(set(grounds)) == 2
    for colour in COLOURS:
        for ground in grounds:
            low, high = sorted((luminance(colour), luminance(ground)))
            assert (high + 0.05) / (low + 0.05) >= 3, (colour, ground)


def points_of(svg: str) -> int:
    return max(path.count("L") for path in re.findall(r' d="([^"]*)"', svg))


def test_long_lines_are_thinned_to_means():
    steps = range(10_000)
    svg = draw_lines([Line("a", steps, [math.sin(step / 50) for step in steps])], "y", "alt")
    assert points_of(svg) < 450 and len(svg) < 40_000
    short = draw_lines([Line("a", range(300), [math.sin(3 * step) for step in range(300)])], "y", "alt")
    assert 299 <= points_of(short) <= 300


def test_a_wide_range_gets_a_logarithmic_axis():
    def labels(values):
        svg = draw_lines([Line("a", [1, 2, 3], values)], "y", "alt")
        return [float(text) for text in re.findall(r">(\d[\d.]*)</text>", svg)]

    assert {10.0, 100.0, 1000.0} <= set(labels([2.0, 50.0, 5000.0]))
    assert 10.0 not in labels([0.0, 50.0, 5000.0])


def test_pictures_take_the_colour_of_the_page_and_have_ids_of_their_own():
    first = draw_lines([Line("a", [1, 2], [1.0, 2.0])], "y", 'words "quoted" <b>')
    second = draw_lines([Line("a", [1, 2], [1.0, 2.0])], "y", "other words")
    assert "currentColor" in first and "#0b0c0d" not in first
    ids = [set(re.findall(r' id="([^"]*)"', svg)) for svg in (first, second)]
    assert ids[0] and not ids[0] & ids[1]
    root = ElementTree.fromstring(first)
    assert root.get("aria-label") == 'words "quoted" <b>' and not list(root.iter("{http://www.w3.org/2000/svg}style"))
    assert draw_lines([Line("a", [1, 2], [1.0, 2.0])], "y", "other words") == second


def test_maps_without_numbers_have_a_scale_and_empty_cells_stay_empty():
    values = np.array([[np.nan, 0.5], [0.5, np.nan]])
    names = ["a", "b"]
    written = draw_heat(values, names, names, [["", "+0.50"], ["+0.50", ""]], "alt", diverging=True)
    bare = draw_heat(values, names, names, [["", ""], ["", ""]], "alt", diverging=True)
    assert written.count("+0.50") == 2 and "nan" not in written
    assert bare.count("<path") > written.count("<path") + 10


def test_intervals_are_drawn_where_they_lie():
    svg = draw_intervals(
        [Interval("a", 0.1, 0.0, 0.2, 0.02, "better"), Interval("b", -0.1, -0.3, 0.1, 0.02, "undecided")], "x"
    )
    lines = re.findall(r'd="M ([\d.]+) [\d.]+\s+L ([\d.]+) [\d.]+\s*"[^>]*stroke: (#\w+); stroke-width: 1.8', svg)
    ends = {colour: float(right) - float(left) for left, right, colour in lines if float(right) - float(left) > 25}
    better, undecided = report_charts._VERDICTS["better"][1], report_charts._VERDICTS["undecided"][1]
    assert ends[undecided] == pytest.approx(2 * ends[better], rel=1e-3)
    assert "better" in svg and "undecided" in svg and "worse" not in svg


def test_many_tasks_are_drawn_in_part_and_told_in_full(tmp_path):
    tasks = {f"task{i}": TASKS["tone"] for i in range(40)}
    state = state_of(tasks, steps=20, every=10)
    page = report(write_run(tmp_path / "run", results_of(tasks), state)).html()
    reader = read_page(page)
    assert reader.tags["svg"] == 28 and "The first 24 of 40 tasks are drawn; the table has all." in page
    assert "The first 16 of 40 are drawn" in page and len(rows_of(page, "task39")) >= 6


# What is missing


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "0.9", True, [0.5]])
def test_what_is_no_number_is_missing_and_warned_of(tmp_path, value):
    results = results_of()
    results["tasks"]["tone"]["validation"]["accuracy"] = value
    history = [{"step": step, "loss/tone": loss} for step, loss in ((5, 2.0), (10, value), (15, 1.0))]
    made = report(write_run(tmp_path / "run", results, {"log_history": history, "global_step": 15}))
    assert any("task 'tone': validation accuracy is" in warning for warning in made.warnings)
    assert "run: the log has no number for loss/tone at step 10" in made.warnings
    assert ["tone", "accuracy", "missing", "0.450", "1,000", "16.7%"] in rows_of(made.html(), "tone")
    tables = {made.html(): read_page(made.html()).tables, made.markdown(): markdown_tables(made.markdown())}
    for page, own in tables.items():
        cells = [cell.lower() for table in own for row in table for cell in row]
        assert not {"nan", "inf", "none"} & set(cells) and "0.900" not in cells
        assert "no number" in page
    assert ["tone", "2.000", "1.000", "15", "2.000", "1.000", "2"] in rows_of(made.html(), "tone")


def test_missing_metrics_are_warned_of(tmp_path):
    results = results_of()
    del results["tasks"]["tone"]["validation"]["accuracy"]
    del results["tasks"]["names"]["test"]
    made = report(write_run(tmp_path / "run", results, state_of()))
    assert "run: task 'tone' has no validation metric 'accuracy'" in made.warnings
    assert "run: task 'names' has no test metric 'f1'" in made.warnings
    assert ["tone", "accuracy", "missing", "0.450", "1,000", "16.7%"] in rows_of(made.html(), "tone")
    assert made.html().count("<li>") - made.html().count("<li><a") == 2


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("tasks", None, "results.json names no tasks"),
        ("tasks", {"tone": 3}, "no task has metrics"),
        ("recipe", [], "The recipe of run is missing"),
        ("versions", "x", "missing"),
        ("average", 0.5, "tone"),
        ("steps", "x", "missing"),
    ],
)
def test_results_of_another_shape_break_nothing(tmp_path, part, value, said):
    results = results_of() | {part: value}
    if part == "tasks" and value:
        results["recipe"]["tasks"] = [None, {"type": "x"}, 3]
    state = {"log_history": [None, {"step": "x"}, {"a": 1}], "global_step": None}
    page = report(write_run(tmp_path / "run", results, state)).html()
    assert said in page and "average of the tasks" not in page if part == "average" else said in page
    read_page(page)


def test_a_run_without_results_shows_the_last_evaluation(tmp_path):
    history = [
        {"step": 1, "loss/a": 1.0, "loss/a_b": 2.0},
        {"step": 1, "eval_a_accuracy": 0.25, "eval_a_b_accuracy": 0.75},
    ]
    history.append({"step": 2, "loss/a": 0.5, "loss/a_b": 1.0, "grad_norm": 1.0})
    made = report(write_run(tmp_path / "run", None, {"log_history": history, "global_step": 2, "max_steps": 9}))
    assert made.warnings == ("run: results.json is missing: metrics are those of the last evaluation in the log",)
    assert ["a", "accuracy", "0.250"] in rows_of(made.html(), "a")
    assert ["a_b", "accuracy", "0.750"] in rows_of(made.html(), "a_b")
    assert ["optimizer steps", "2 of 9"] in rows_of(made.html(), "optimizer steps")


def test_a_plain_training_has_a_curve(tmp_path):
    history = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
    made = report(write_run(tmp_path / "run", None, {"log_history": history, "global_step": 3}))
    assert read_page(made.html()).tags["svg"] == 1 and "Loss over steps 1 to 3" in made.html()


def test_a_training_that_goes_on_is_read_from_its_last_checkpoint(tmp_path):
    for step in (9, 10, 40):
        write_run(tmp_path / "run" / f"checkpoint-{step}", None, state_of(steps=max(step, 20), global_step=step))
    write_run(tmp_path / "run" / "checkpoint-best", None, state_of())
    made = report(tmp_path / "run")
    assert "run: the training is not finished: its log is that of checkpoint-40" in made.warnings
    assert ["optimizer steps", "40"] in rows_of(made.html(), "optimizer steps")


def test_a_broken_file_is_a_warning_beside_others_and_an_error_alone(run, tmp_path):
    whole = (run / "results.json").read_text()
    (run / "comparison.json").write_text('{"tasks": {}, "delta_m": 1, "cost": {}}')
    (run / "preflight.json").write_text("[]")
    (run / "sweep.json").write_text('{"sweep": {}, "finished": false}')
    (run / "results.json").write_text(whole[:200])
    made = report(run)
    assert any("results.json cannot be read" in warning for warning in made.warnings)
    assert any(re.search("comparison.json is not complete: '.*' is missing", warning) for warning in made.warnings)
    assert any("preflight.json cannot be read (" in warning for warning in made.warnings)
    assert any("the sweep is not finished" in warning for warning in made.warnings)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "results.json").write_text(whole[:200])
    with pytest.raises(ValueError, match="nothing can be read; results.json cannot be read"):
        report(alone)
    with pytest.raises(ValueError, match="results.json cannot be read"):
        report(alone / "results.json")
    with pytest.raises(ValueError, match="comparison.json is not complete"):
        report(run / "comparison.json")


def test_folders_and_files_that_hold_no_run_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="run folder '.*nowhere' does not exist"):
        report(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds nothing to report on; it must hold one of results.json"):
        report(tmp_path)
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="is none of the files that a report reads"):
        report(tmp_path / "other.json")
    with pytest.raises(ValueError, match="runs is empty"):
        report([])


def test_a_record_beside_a_recipe_is_a_run(tmp_path):
    (tmp_path / "quickstart.json").write_text(json.dumps(results_of()))
    made = report(tmp_path / "quickstart.json")
    assert made.sources[0].name == "quickstart" and ["tone", "accuracy", "0.500", "0.450"] in rows_of(
        made.html(), "tone"
    )


# Of the same data?


def test_runs_of_different_rows_are_refused_by_their_hash(bare, tmp_path):
    for split, cut in (("validation", "f" * 64), ("test", "e" * 64)):
        results = results_of()
        results["tasks"]["tone"]["rows_sha256"][split] = cut
        other = write_run(tmp_path / "second", results)
        message = rf"task 'tone': the {split} rows are not the same \(SHA-256 first .*, second {cut[:12]}\)"
        with pytest.raises(ValueError, match=message):
            report([bare, other])


def test_the_hash_decides_whatever_the_recipe_says(bare, tmp_path):
    results = results_of()
    for task in results["recipe"]["tasks"]:
        task["dataset"] = f"/elsewhere/{task['name']}.parquet"
    other = write_run(tmp_path / "second", results)
    assert "by the SHA-256 of their content" in report([bare, other]).html()
    del results["tasks"]["strength"]["rows_sha256"]
    write_run(other, results)
    with pytest.raises(ValueError, match=r"task 'strength': first and second are of different data \(dataset "):
        report([bare, other])


def without_hashes(**changes):
    results = results_of()
    for task in results["tasks"].values():
        del task["rows_sha256"]
    for task in results["recipe"]["tasks"]:
        task |= changes
    return results


@pytest.mark.parametrize(
    "changes", [{"label_column": "other"}, {"text_columns": ["a", "b"]}, {"labels": ["x"]}, {"dataset": "other/data"}]
)
def test_without_a_hash_the_recipes_are_compared(tmp_path, changes):
    paths = [write_run(tmp_path / name, without_hashes(labels=["y"])) for name in ("first", "second")]
    assert "The same data by what the recipes say of it" in report(paths).html()
    write_run(paths[1], without_hashes())  # labels that are not named are those of the rows
    report(paths)
    write_run(paths[1], without_hashes(**{"labels": ["y"], **changes}))
    with pytest.raises(ValueError, match=f"are of different data \\({next(iter(changes))} "):
        report(paths)


def test_validation_rows_that_the_seed_draws_are_others_with_another_seed(tmp_path):
    drawn = without_hashes(dataset={"path": "some/data", "validation": 0.1})
    paths = [write_run(tmp_path / name, drawn) for name in ("first", "second")]
    report(paths)
    drawn["recipe"]["training"]["seed"] = 8
    write_run(paths[1], drawn)
    with pytest.raises(ValueError, match="seed of the validation rows 7 and 8"):
        report(paths)


def test_runs_without_a_common_task_and_runs_of_which_nothing_is_known(bare, tmp_path):
    other = write_run(tmp_path / "second", results_of({"mood": TASKS["tone"]}))
    with pytest.raises(ValueError, match="first and second have no task in common"):
        report([bare, other])
    logs = [write_run(tmp_path / name, None, state_of()) for name in ("third", "fourth")]
    assert "It is not known whether these are of the same data" in report(logs).html()


def test_a_comparison_on_other_rows_than_the_run_is_refused(bare, compared):
    folder = compared / "runs" / "multi-seed-0-abc"
    folder.mkdir(parents=True)
    rows = {"tone": "0" * 64, "strength": "1" * 64}
    (folder / "run.json").write_text(json.dumps({"rows": rows}))
    assert "by the SHA-256 of their content: tone (000000000000...), strength" in report([bare, compared]).html()
    (folder / "run.json").write_text(json.dumps({"rows": {**rows, "tone": "a" * 64}}))
    with pytest.raises(
        ValueError, match=r"task 'tone': the validation rows are not the same .*compared \(comparison\)"
    ):
        report([bare, compared])


# A real run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that was really trained, with weights, coefficients and conflicts in its log."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    BACKBONES["bert"]().save_pretrained(folder / "backbone")
    make_tokenizer().save_pretrained(folder / "backbone")
    for split, seed in (("train", 0), ("validation", 1)):
        for name, rows in make_datasets(seed, 40).items():
            rows.to_parquet(folder / f"{name}-{split}.parquet")
    reviews = str(folder / "reviews-{split}.parquet")
    training = {"output_dir": str(folder / "out"), "max_steps": 6, "per_device_train_batch_size": 8}
    training |= {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "eval_steps": 3}
    training |= {"eval_strategy": "steps", "loss_weighting": "uncertainty", "gradient_combination": "upgrad"}
    recipe = {
        "model": {"backbone": str(folder / "backbone"), "sharing": "hard"},
        "tasks": [
            {"name": "tone", "type": "single_label_classification", "dataset": reviews},
            {"name": "strength", "type": "regression", "dataset": reviews, "label_column": "strength"},
            {"name": "names", "type": "token_classification", "dataset": str(folder / "names-{split}.parquet")},
        ],
        "training": training | {"conflict_logging_steps": 1, "max_eval_samples": 30},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    run_recipe(folder / "job.yaml")
    return folder / "out"


def test_a_trained_run_has_every_part(trained):
    results = json.loads((trained / "results.json").read_text())
    made = report(trained)
    assert not made.warnings
    page = made.html()
    for name, task in results["tasks"].items():
        metric = task["primary_metric"]
        assert [name, metric, number(task["validation"][metric])] in [row[:3] for row in rows_of(page, name)]
    titles = {section.title for section in made.page.sections}
    assert {"Run", "Metrics", "Loss of each task", "Validation metrics over training"} <= titles
    assert {"Shares, weights, coefficients", "Conflicts between tasks", "Cost", "Recipe"} <= titles
    # three losses, three metrics; shares, weights, coefficients; the map of conflicts
    assert read_page(page).tags["svg"] == 10


def test_training_writes_the_hash_of_the_rows_that_were_judged(trained):
    results = json.loads((trained / "results.json").read_text())
    rows = Dataset.from_parquet(str(trained.parent / "reviews-validation.parquet"), cache_dir=str(trained.parent))
    first = rows.select(range(30))  # max_eval_samples
    assert results["tasks"]["tone"]["rows_sha256"] == {"validation": rows_hash(first, ["text", "label"])}
    assert results["tasks"]["strength"]["rows_sha256"] == {"validation": rows_hash(first, ["text", "strength"])}
    assert rows_hash(first, ["text", "label"]) != rows_hash(rows, ["text", "label"])


def test_hashes_are_of_all_columns_that_a_task_reads():
    task = Task("pick", "multiple_choice", text_columns="question", choice_columns="options", label_column="answer")
    rows = [
        {"question": "q", "options": ["a", "b"], "answer": 0, "other": 1},
        {"question": "r", "options": ["c", "d"], "answer": 1, "other": 2},
    ]
    datasets = {split: {"pick": Dataset.from_list(rows)} for split in ("train", "validation", "test")}
    whole = hash_evaluated_rows(task, datasets)
    assert set(whole) == {"validation", "test"} and whole["validation"] == whole["test"]
    for column, changed in (("options", [["a", "b"], ["c", "e"]]), ("other", [5, 6]), ("answer", [1, 1])):
        mine = Dataset.from_list([{**row, column: new} for row, new in zip(rows, changed, strict=True)])
        assert (hash_evaluated_rows(task, {"test": {"pick": mine}})["test"] == whole["test"]) == (column == "other")
    assert (
        hash_evaluated_rows(task, datasets, 1)["test"]
        != whole["test"]
        == hash_evaluated_rows(task, datasets, 9)["test"]
    )
    assert hash_evaluated_rows(task, {"validation": {"pick": Dataset.from_list(rows).to_iterable_dataset()}}) == {}


# The command


def invoke(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_the_command_writes_both_pages(run, compared, tmp_path):
    results = results_of()
    results["tasks"]["tone"]["test"]["accuracy"] = float("nan")
    write_run(run, results)
    output = tmp_path / "pages" / "x.html"
    done = invoke(run, compared, "--output", output)
    assert done.exit_code == 0, done.output
    assert str(output) in done.output and "Warning: first: task 'tone': test accuracy is NaN, no number" in done.output
    made = report([run, compared])
    assert output.read_text() == made.html() and output.with_suffix(".md").read_text() == made.markdown()
    assert invoke(run, "--output", output).exit_code == 0  # a report takes the place of a report


def test_the_command_refuses_before_it_works(run, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("mine")
    for output, message in (
        ("report.pdf", "must end in .html"),
        ("README.html", "README.md' exists and is no report"),
        ("folder.html", "is a folder"),
    ):
        (tmp_path / "folder.html").mkdir(exist_ok=True)
        done = invoke(run, "--output", tmp_path / output)
        assert done.exit_code == 1 and message in " ".join(done.output.split()), done.output
    assert (tmp_path / "README.md").read_text() == "mine" and not (tmp_path / "README.html").exists()
    assert "does not exist" in invoke(tmp_path / "nowhere").output
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = invoke(run, "--output", tmp_path / "x.html")
    assert done.exit_code == 1 and "pip install hf_multitask[plots]" in done.output
    with pytest.raises(ImportError, match=r"pip install hf_multitask\[plots\]"):
        report(run)


# A real browser


@pytest.fixture(scope="module")
def browser():
    if why := why_there_is_none():
        pytest.skip(why)
    return visit


def colours_of(picture: Path) -> tuple[tuple[int, int], Counter]:
    image = pytest.importorskip("PIL.Image").open(picture).convert("RGB")
    width, height = image.size
    pixels = np.asarray(image).reshape(-1, 3)
    found, counts = np.unique(pixels, axis=0, return_counts=True)
    return (width, height), Counter(dict(zip(map(tuple, found.tolist()), counts.tolist(), strict=True)))


@pytest.mark.parametrize(("scheme", "width"), [("light", 1100), ("dark", 390)])
def test_a_browser_shows_the_page(browser, trained, compared, tmp_path, scheme, width):
    comparison_of(recipe={}).save(compared / "comparison.json")
    page, _ = report([trained, compared]).write(tmp_path / "x.html")
    seen = browser(page, tmp_path / "x.png", width, scheme)
    assert seen.loaded and seen.dark == (scheme == "dark")
    assert [Path(request).name for request in seen.requests] == ["x.html"] and seen.messages == []
    assert width - 30 <= seen.width <= width  # nothing is wider than the page
    assert 3000 < seen.height < 16000
    size, colours = colours_of(tmp_path / "x.png")
    assert size[0] == width and size[1] == seen.height
    (ground, most), *_ = colours.most_common(1)
    assert ground == ((255, 255, 255) if scheme == "light" else (0x15, 0x18, 0x1D))
    assert 0.6 < most / (size[0] * size[1]) < 0.99 and len(colours) > 200
    lines = [tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour in COLOURS[:3]]
    assert all(colours[line] > 20 for line in lines)


def test_the_browser_of_the_test_sees_requests_messages_and_a_blank_page(browser, tmp_path):
    asks = tmp_path / "asks.html"
    asks.write_text("<!doctype html><img src='http://127.0.0.1:9/x.png'><script>nosuch()</script>")
    seen = browser(asks, tmp_path / "asks.png", 500)
    assert "http://127.0.0.1:9/x.png" in seen.requests and "nosuch is not defined" in seen.messages[0]
    blank = tmp_path / "blank.html"
    blank.write_text("<!doctype html><div style='width: 2000px; height: 9px'>")
    seen = browser(blank, tmp_path / "blank.png", 500)
    assert seen.width > 1900 and len(colours_of(tmp_path / "blank.png")[1]) < 50


def test_names_run_nothing_in_a_browser(browser, tmp_path):
    name = "x<img src=x onerror='console.log(1)'><script>console.log(2)</script>"
    page, _ = everything(tmp_path, [name, *NAMES]).write(tmp_path / "x.html")
    seen = browser(page, tmp_path / "x.png")
    assert seen.messages == [] and len(seen.requests) == 1
