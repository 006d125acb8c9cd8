"""Preflight on whole recipes: a clean one is left in peace, each planted fault is found, and nothing is changed."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from conftest import BACKBONES, NEGATIVE, NEUTRAL, POSITIVE, make_tokenizer
from datasets import Dataset
from language import decoder_tasks, decoder_tokenizer, encoder_decoder, seq2seq_tasks
from questions import question_datasets, question_tasks
from typer.testing import CliRunner

from hf_multitask import HardSharingModel, MultiTaskTrainingArguments, Task, advise, preflight
from hf_multitask.analysis.evidence import Evidence
from hf_multitask.analysis.preflight_result import Finding, Preflight
from hf_multitask.cli.app import app
from hf_multitask.recipe import RecipeParts, build, load_recipe

QUICK = dict(budget_seconds=3.0, probe_rows=24)
TOPICS = {"film": "paris", "travel": "berlin", "sport": "london"}
KINDS = {"maria": "B-person", "john": "B-person", "paris": "B-place", "berlin": "B-place", "london": "B-place"}


def words(draw: random.Random, length: int, mood: tuple[str, ...] = ()) -> list[str]:
    return [draw.choice(NEUTRAL + mood * 3) for _ in range(length)]


def make_rows(seed: int, count: int) -> dict[str, list[dict]]:
    """Three datasets of like size whose labels can be learned, without a text that comes twice."""
    draw = random.Random(seed)
    reviews, topics, names = [], [], []
    for i in range(count):
        mood = (POSITIVE, NEGATIVE)[i % 2]
        text = words(draw, draw.randint(9, 14), mood)
        score = sum(w in POSITIVE for w in text) - sum(w in NEGATIVE for w in text)
        reviews.append({"text": " ".join(text), "label": ("good", "bad")[i % 2], "strength": score / 4})
        topic = list(TOPICS)[i % 3]
        text = [*words(draw, draw.randint(9, 14)), *[TOPICS[topic]] * 3]
        draw.shuffle(text)
        topics.append({"text": " ".join(text), "label": topic})
        tokens = words(draw, draw.randint(9, 14))
        names.append({"tokens": tokens, "tags": [KINDS.get(word, "O") for word in tokens]})
    return {"reviews": reviews, "topics": topics, "names": names}


class Doctor:
    """A recipe on disk, before and after its data or its settings are changed."""

    def __init__(self, folder) -> None:
        self.folder = folder
        self.rows = {"train": make_rows(0, 200), "validation": make_rows(1, 150), "test": make_rows(2, 100)}
        reviews, topics, names = (str(folder / f"{name}-{{split}}.jsonl") for name in ("reviews", "topics", "names"))
        self.recipe = {
            "model": {"backbone": str(folder / "backbone"), "sharing": "hard", "head_dropout": 0.0},
            "tasks": [
                {"name": "tone", "type": "single_label_classification", "dataset": reviews, "labels": ["good", "bad"]},
                {"name": "strength", "type": "regression", "dataset": reviews, "label_column": "strength"},
                {"name": "topic", "type": "single_label_classification", "dataset": topics, "labels": list(TOPICS)},
                {"name": "names", "type": "token_classification", "dataset": names},
            ],
            "training": {
                "output_dir": str(folder / "out"),
                "num_train_epochs": 3,
                "per_device_train_batch_size": 16,
                "learning_rate": 1e-3,
                "use_cpu": True,
                "disable_tqdm": True,
                "save_strategy": "no",
            },
        }

    def write(self):
        for split, datasets in self.rows.items():
            for name, rows in datasets.items():
                lines = "".join(json.dumps(row) + "\n" for row in rows)
                (self.folder / f"{name}-{split}.jsonl").write_text(lines)
        path = self.folder / "job.yaml"
        path.write_text(yaml.safe_dump(self.recipe, sort_keys=False))
        return path

    def look(self, **options) -> Preflight:
        return preflight(self.write(), **{**QUICK, **options})


@pytest.fixture
def doctor(tmp_path) -> Doctor:
    torch.manual_seed(0)
    BACKBONES["bert"]().save_pretrained(tmp_path / "backbone")
    make_tokenizer().save_pretrained(tmp_path / "backbone")
    return Doctor(tmp_path)


def complaints(report: Preflight) -> set[tuple[str, str]]:
    """What is not well: check, and whom it is about."""
    return {(finding.check, finding.about) for finding in report.findings if finding.level != "ok"}


def the(report: Preflight, check: str) -> Finding:
    (found,) = [finding for finding in report.find(check) if finding.level != "ok"]
    return found


# A clean recipe


def test_a_clean_recipe_is_left_in_peace_and_every_section_is_there(doctor):
    report = doctor.look(budget_seconds=60.0, probe_rows=64, output=doctor.folder / "report")
    assert complaints(report) == set(), report.text()
    assert report.ok and {finding.section for finding in report.findings} == {
        *("data", "setup", "losses", "plan", "memory", "conflict", "trial", "time")
    }
    sections = report.sections
    assert [row["rows"] for row in sections["data"] if row["dataset"] == "topics"] == [200, 150, 100]
    assert {row["task"]: round(row["chance"], 2) for row in sections["losses"]["tasks"]}["topic"] == 1.10
    assert sections["plan"]["steps"] == 114 and sections["trial"]["steps"] == 100
    assert sections["plan"]["windows_counted"] == 100
    assert all(len(losses) == 100 for losses in sections["trial"]["losses"].values())
    for task in ("tone", "topic"):  # enough steps to learn something, and it is seen
        change = sections["trial"]["changes"][task]
        assert change["after"] < change["before"] and change["high"] < 0
    numbers = sections["time"]
    assert numbers["seconds_per_epoch"] == pytest.approx(38 * numbers["seconds_per_step"])
    assert numbers["training_seconds"] > 114 * numbers["seconds_per_step"]
    assert len(sections["conflict"]["result"]["pairs"]) == 6
    # The page, as text and as files.
    page = report.text()
    for part in ("FINDINGS", "SAMPLING PLAN: TEMPERATURE", "MEMORY OF A STEP", "not enough evidence", "source:"):
        assert part in page
    markdown = (doctor.folder / "report" / "preflight.md").read_text()
    assert markdown.startswith("# Preflight of job: nothing stands against it") and "| dataset | split |" in markdown
    again = Preflight.load(doctor.folder / "report" / "preflight.json")
    assert again.to_dict() == report.to_dict() and again.text() == page
    assert advise(Evidence.from_preflight(again)).to_dict() == report.advice.to_dict()


def test_nothing_is_left_behind(doctor):
    parts = build(load_recipe(doctor.write()))
    before = copy.deepcopy(parts.model.state_dict())
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    report = preflight(parts, **QUICK)
    assert report.name == "the parts given" and report.find("loss_rise", "tone")
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    assert all(torch.equal(value, before[name]) for name, value in parts.model.state_dict().items())
    assert not parts.model.training and all(p.grad is None for p in parts.model.parameters())
    assert parts.args.logging_steps == 500 and parts.args.output_dir == str(doctor.folder / "out")
    assert not (doctor.folder / "out").exists()


# Planted faults


def test_a_leaked_row_is_found_whatever_its_case_and_white_space(doctor):
    row = doctor.rows["train"]["reviews"][5]
    doctor.rows["validation"]["reviews"][7] = {**row, "text": f"  {row['text'].upper()}\n"}
    report = doctor.look()
    assert complaints(report) == {("leaked", "reviews (validation)")}
    found = the(report, "leaked")
    assert found.level == "warn" and found.numbers["rows"] == 1 and "row 7 is row 5 there" in found.message
    doctor.rows["validation"]["reviews"][:20] = doctor.rows["train"]["reviews"][:20]
    report = doctor.look()
    assert the(report, "leaked").level == "fail" and the(report, "leaked").numbers["rows"] == 20 and not report.ok


def test_a_row_that_another_task_trains_on_is_found(doctor):
    doctor.rows["test"]["topics"][3]["text"] = doctor.rows["train"]["reviews"][9]["text"]
    report = doctor.look()
    assert complaints(report) == {("leaked_between", "topics (test), reviews")}
    assert "row 3 is row 9 there" in the(report, "leaked_between").message


def test_a_loss_that_is_1000_times_larger_is_found_and_the_proposed_weights_mend_it(doctor):
    of_one_scale = np.var([row["strength"] for row in doctor.rows["train"]["reviews"]])
    for split in doctor.rows.values():
        for row in split["reviews"]:
            row["strength"] *= (1000 * np.log(2) / of_one_scale) ** 0.5
    report = doctor.look()
    found = the(report, "loss_ratio")
    assert complaints(report) == {("loss_ratio", "strength")} and found.level == "fail"
    assert found.numbers["ratio"] == pytest.approx(1000, rel=0.4)  # on the few rows that were measured
    assert "'strength' counts" in found.message and "that of 'tone'" in found.message
    assert "scales_apart" in report.advice.rules()
    weights = {row["task"]: row["proposed_weight"] for row in report.sections["losses"]["tasks"]}
    for task in doctor.recipe["tasks"]:
        task["weight"] = weights[task["name"]]
    mended = doctor.look()
    assert complaints(mended) == set()
    assert mended.find("loss_ratio")[0].numbers["ratio"] == pytest.approx(1, rel=0.3)


def test_a_loss_weighting_that_evens_out_scales_is_enough(doctor):
    for split in doctor.rows.values():
        for row in split["reviews"]:
            row["strength"] *= 1000**0.5
    doctor.recipe["training"]["loss_weighting"] = "normalized"
    report = doctor.look()
    assert complaints(report) == set() and "scale_aware" in report.advice.rules()


def test_texts_with_two_labels_are_found(doctor):
    train = doctor.rows["train"]["reviews"]
    for i in range(0, 8):
        train[100 + i] = {**train[i], "label": {"good": "bad", "bad": "good"}[train[i]["label"]]}
    report = doctor.look()
    found = the(report, "contradicted")
    # 8 pairs of rows out of 450; the strength of a pair is the same, so it has nothing to say.
    assert complaints(report) == {("contradicted", "tone")}
    assert found.level == "warn" and found.numbers == {"rows": 16, "share": pytest.approx(16 / 450)}
    assert "row 0 of train, row 100 of train" in found.message


def test_a_task_that_is_seen_40_times_per_epoch_is_found(doctor):
    more = make_rows(3, 3900)
    doctor.rows["train"] = {"reviews": more["reviews"], "topics": more["topics"][:50], "names": more["names"][:50]}
    doctor.recipe["training"] |= {"num_train_epochs": 1, "per_device_train_batch_size": 20}
    doctor.recipe["training"] |= {"task_sampling": "weighted"}
    doctor.recipe["training"]["task_sampling_kwargs"] = {"weights": {"reviews": 0.975, "topics": 0.025, "names": 1.0}}
    report = doctor.look()
    found = the(report, "passes_per_epoch")
    assert complaints(report) == {("passes_per_epoch", "names")} and found.level == "fail"
    assert found.numbers["passes_per_epoch"] == pytest.approx(40, rel=0.01) and "40 times in an epoch" in found.message
    assert report.advice.of_topic("sampling")[-1].numbers["passes over names"] == pytest.approx(40, rel=0.01)


def test_truncated_rows_are_found(doctor):
    for split, rows in doctor.rows.items():
        draw = random.Random(split)
        for i, row in enumerate(rows["topics"]):
            if i % 10 < 3:
                row["text"] += " " + " ".join(words(draw, 20))
    doctor.recipe["tasks"][2]["max_length"] = 24
    report = doctor.look()
    found = the(report, "truncated")
    assert complaints(report) == {("truncated", "topics (train)")}
    assert found.level == "warn" and found.numbers["share"] == pytest.approx(0.3) and "30.0%" in found.message


def test_a_label_that_never_occurs_in_training_is_found(doctor):
    rest = [row for row in doctor.rows["train"]["topics"] if row["label"] != "sport"]
    doctor.rows["train"]["topics"] = rest
    report = doctor.look()
    found = the(report, "labels")
    assert complaints(report) == {("labels", "topic")} and found.level == "fail" and "'sport'" in found.message
    assert found.numbers == {"labels": 1, "evaluated": 150 // 3 + 33}
    # Where the labels are taken from the training rows, the trainer refuses too; other findings are there all the same.
    del doctor.recipe["tasks"][2]["labels"]
    report = doctor.look()
    assert (
        complaints(report) == {("labels", "topic"), ("setup", "")}
        and "none of the task's own" in the(report, "labels").message
    )
    assert "label 'sport'" in the(report, "setup").message and "trial" not in report.sections


def test_a_training_that_diverges_is_found(doctor):
    doctor.recipe["training"] |= {"learning_rate": 3.0, "lr_scheduler_type": "constant", "max_steps": 15}
    report = doctor.look(budget_seconds=30.0)
    assert not report.ok and {check for check, _ in complaints(report)} == {"loss_rise", "unseen"}
    assert any(finding.level == "fail" for finding in report.find("loss_rise"))


# Other kinds of data, models and tasks


def test_streams_are_looked_at_by_their_first_rows(doctor):
    parts = build(load_recipe(doctor.write(), ["training.max_steps=12", "training.task_sampling=uniform"]))
    streams = {name: rows.to_iterable_dataset() for name, rows in parts.datasets["train"].items()}
    report = preflight(
        replace(parts, datasets={**parts.datasets, "train": streams}), stream_rows=120, budget_seconds=20.0
    )
    assert not {check for check, _ in complaints(report)} - {"unseen"}, report.text()
    assert len(report.find("stream")) == 3 and report.find("stream", "topics")[0].numbers == {"rows": 120}
    assert [row["rows"] for row in report.sections["data"] if row["split"] == "train"] == [120, 120, 120]
    assert report.sections["trial"]["steps"] >= 3 and report.find("conflict", "tone, strength")


@pytest.mark.parametrize("sharing", ["conditioned", "prefix", "soft", "adapter", "mixture_of_experts"])
@pytest.mark.sample(5)
def test_every_sharing_scheme_is_looked_at(doctor, sharing):
    options = {"prefix": {"num_virtual_tokens": 4}, "mixture_of_experts": {"num_experts": 2}}.get(sharing, {})
    doctor.recipe["model"] = {"backbone": doctor.recipe["model"]["backbone"], "sharing": sharing, **options}
    report = doctor.look()
    assert {check for check, _ in complaints(report)} <= {"loss_rise"} and report.ok, report.text()
    assert report.sections["trial"]["steps"] >= 3 and report.sections["memory"]["total"] > 0
    assert report.sections["setting"]["sharing"] == sharing


def test_one_task_has_no_conflict(doctor):
    doctor.recipe["tasks"] = doctor.recipe["tasks"][2:3]
    report = doctor.look()
    assert report.ok and "there is one task" in report.find("conflict")[0].message
    assert report.advice.of_topic("sharing")[0].rule == "one_task"


def test_tasks_over_the_vocabulary_have_no_labels_to_check(doctor):
    doctor.recipe["tasks"].append(
        {"name": "words", "type": "masked_lm", "dataset": doctor.recipe["tasks"][2]["dataset"], "auxiliary": True}
    )
    report = doctor.look()
    assert report.ok, report.text()
    assert not report.find("labels", "words") and report.find("start_over_chance", "words")[0].level == "ok"


def clean_texts(tasks: list[Task], seed: int) -> dict[str, Dataset]:
    """Rows for the datasets of some tasks that read or write texts."""
    draw, rows = random.Random(seed), {}
    for task in tasks:
        if task.dataset == "sayings":
            said = [words(draw, 9) for _ in range(60)]
            rows[task.dataset] = Dataset.from_list([{"said": " ".join(w), "target": " ".join(w[2:])} for w in said])
        elif task.dataset == "reviews":
            found = make_rows(seed, 60)["reviews"]
            rows[task.dataset] = Dataset.from_list(
                [{**row, "label": {"good": "positive", "bad": "negative"}[row["label"]]} for row in found]
            )
    return rows


@pytest.mark.parametrize("kind", ["questions", "causal_lm", "seq2seq_lm"])
def test_every_type_of_task_is_looked_at(tmp_path, kind):
    torch.manual_seed(0)
    if kind == "questions":
        tasks, backbone, own = question_tasks(), BACKBONES["bert"](), make_tokenizer()
        datasets = {
            split: question_datasets(seed, who=60, next=60) for split, seed in (("train", 0), ("validation", 1))
        }
    else:
        tasks = decoder_tasks() if kind == "causal_lm" else seq2seq_tasks()
        backbone = BACKBONES["llama"]() if kind == "causal_lm" else encoder_decoder("t5")
        own, datasets = decoder_tokenizer(), {"train": {}, "validation": {}}
    for seed, split in enumerate(datasets):
        datasets[split] |= clean_texts(tasks, seed)
    args = MultiTaskTrainingArguments(
        str(tmp_path / "out"), num_train_epochs=2, per_device_train_batch_size=16, use_cpu=True, report_to="none"
    )
    parts = RecipeParts(HardSharingModel.from_backbone(backbone, tasks), own, args, datasets)
    report = preflight(parts, **QUICK)
    assert report.ok and {check for check, _ in complaints(report)} <= {"loss_ratio", "repeated"}, report.text()
    named = {row["name"]: row for row in report.sections["tasks"]}
    assert named["tone"]["granularity"] == "text" and report.sections["trial"]["steps"] >= 3
    assert (
        set(report.sections["trial"]["changes"])
        == set(named)
        == {row["task"] for row in report.sections["losses"]["tasks"]}
    )
    labelled = {task for row in report.sections["data"] for task in row["labels"]}
    assert labelled == ({"tone"} if kind == "questions" else {"tone", "mood"})


def test_little_time_means_few_steps_and_is_said(doctor):
    report = doctor.look(budget_seconds=0.01)
    assert report.sections["trial"]["steps"] == 3
    assert "--budget-seconds" in report.find("conflict")[0].message and report.ok


# Command line and mistakes


def run(*arguments):
    return CliRunner().invoke(app, ["preflight", *map(str, arguments)])


def test_the_command_prints_the_page_writes_files_and_exits_with_1_on_a_failure(doctor):
    path, folder = doctor.write(), doctor.folder / "report"
    good = run(path, "--budget-seconds", 3, "--output", folder)
    assert good.exit_code == 0, good.output
    assert "nothing stands against it" in good.output and (folder / "preflight.json").is_file()
    bad = run(path, "--budget-seconds", 3, "--json", "--set", "tasks.topic.labels=[film, travel]")
    assert bad.exit_code == 1
    values = json.loads(bad.stdout)
    assert not values["ok"] and [f["check"] for f in values["findings"] if f["level"] == "fail"] == ["labels", "setup"]


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["nowhere.yaml"], "does not exist"),
        (["RECIPE", "--budget-seconds", "0"], "budget_seconds must be a positive number, got 0.0"),
        (["RECIPE", "--set", "training.max_stepz=1"], "did you mean 'max_steps'"),
        (["RECIPE", "--output", "RECIPE"], "is a file; give a folder"),
    ],
)
def test_mistakes_are_one_line(doctor, arguments, part):
    path = doctor.write()
    result = run(*[path if argument == "RECIPE" else argument for argument in arguments])
    assert result.exit_code == 1 and part in result.output and "Traceback" not in result.output


def test_mistakes_in_arguments_are_named(doctor):
    parts = build(load_recipe(doctor.write()))
    with pytest.raises(ValueError, match="probe_rows must be a whole number of at least 2, got 1"):
        preflight(parts, probe_rows=1)
    with pytest.raises(ValueError, match="settings change a recipe file"):
        preflight(parts, ["training.max_steps=3"])
    with pytest.raises(TypeError, match="recipe must be a file or RecipeParts, got dict"):
        preflight({"model": {}})
    with pytest.raises(ValueError, match="level 'bad' is not one of ok, warn, fail"):
        Finding("bad", "data", "rows", "", "")


def test_what_the_trainer_refuses_is_a_finding(doctor):
    parts = build(load_recipe(doctor.write()))
    parts.datasets["train"]["topics"] = Dataset.from_dict({"text": ["a b"] * 60, "other": ["film"] * 60})
    report = preflight(parts, **QUICK)
    assert not report.ok and "no column 'label'" in the(report, "setup").message
    assert ("repeated", "topics (train)") in complaints(report)
