from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from conftest import make_tokenizer
from test_recipe import folder  # noqa: F401
from typer.testing import CliRunner

from hf_multitask.cli.app import app

runner = CliRunner()


def invoke(*arguments):
    return runner.invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    make_tokenizer().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_help_tells_a_newcomer_what_there_is():
    whole = invoke("--help")
    assert whole.exit_code == 0
    for word in ("train", "predict", "recipe", "Example"):
        assert word in whole.output
    for command, words in (("train", ("--set", "--resume", "RECIPE")), ("predict", ("--task", "--text", "--file"))):
        page = invoke(command, "--help")
        assert page.exit_code == 0 and all(word in page.output for word in words)


def test_train_then_predict(folder):  # noqa: F811
    trained = invoke("train", folder / "job.yaml", "--set", "training.max_steps=2")
    assert trained.exit_code == 0, trained.output
    assert "rows seen" in trained.output and json.loads((folder / "out" / "results.json").read_text())["steps"] == 2
    predicted = invoke("predict", folder / "out", "--text", "good film", "--text", "bad film", "--task", "tone")
    assert predicted.exit_code == 0, predicted.output
    lines = [json.loads(line) for line in predicted.stdout.splitlines()]
    assert [line["text"] for line in lines] == ["good film", "bad film"]
    assert all(set(line) == {"text", "tone"} for line in lines)


def test_resume_goes_on_from_the_last_checkpoint(folder):  # noqa: F811
    saving = ["--set", "training.save_strategy=steps", "--set", "training.save_steps=2"]
    assert invoke("train", folder / "job.yaml", "--set", "training.max_steps=2", *saving).exit_code == 0
    longer = ("train", folder / "job.yaml", "--set", "training.max_steps=4", *saving, "--resume")
    refused = invoke(*longer)
    assert refused.exit_code == 1 and "max_steps" in refused.output
    again = invoke(*longer, "--allow-changes", "max_steps")
    assert again.exit_code == 0, again.output
    assert json.loads((folder / "out" / "results.json").read_text())["steps"] == 4


def test_predict_reads_lines_and_rows_and_answers_every_task(saved, tmp_path):
    (tmp_path / "texts.txt").write_text("good film\n\nbad film\n")
    (tmp_path / "rows.jsonl").write_text('{"text": "good film", "id": 7}\n')
    lines = [json.loads(x) for x in invoke("predict", saved, "--file", tmp_path / "texts.txt").stdout.splitlines()]
    assert len(lines) == 2 and set(lines[0]) == {"text", "tone", "strength", "traits", "names"}
    row = json.loads(invoke("predict", saved, "--file", tmp_path / "rows.jsonl", "--task", "tone").stdout)
    assert row["id"] == 7 and row["tone"] == lines[0]["tone"]


BAD = {
    "no recipe": (["train", "nowhere.yaml"], "does not exist"),
    "no folder and no Hub id": (["predict", "runs/typo", "--text", "x"], "Error: "),
    "no text": (["predict", "SAVED"], "give --text or --file"),
    "no model": (["predict", "./nowhere", "--text", "x"], "does not exist"),
    "no task": (["predict", "SAVED", "--text", "x", "--task", "tune"], "did you mean 'tone'"),
    "no file": (["predict", "SAVED", "--file", "nowhere.txt"], "does not exist"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_one_line_and_exit_with_one(saved, case):
    arguments, part = BAD[case]
    result = invoke(*[saved if argument == "SAVED" else argument for argument in arguments])
    assert result.exit_code == 1 and part in result.output
    assert result.output.count("\n") <= 4 and "Traceback" not in result.output


@pytest.mark.parametrize("setting", ["training.x=[1", "model.backbone=5", "model.backbone=./nowhere"])
def test_mistakes_in_settings_show_no_traceback(folder, setting):  # noqa: F811
    result = invoke("train", folder / "job.yaml", "--set", setting)
    assert result.exit_code == 1 and "Error: " in result.output and "Traceback" not in result.output


def test_a_bad_setting_is_one_line(folder):  # noqa: F811
    result = invoke("train", folder / "job.yaml", "--set", "training.max_stepz=3")
    assert result.exit_code == 1 and "did you mean 'max_steps'" in result.output
    assert not (folder / "out").exists()


def test_the_module_runs_as_a_program():
    result = subprocess.run([sys.executable, "-m", "hf_multitask.cli", "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "predict" in result.stdout


def test_predictions_are_valid_json_where_a_model_gives_no_number(model, saved):
    with torch.no_grad():
        for parameter in model.heads["strength"].parameters():
            parameter.fill_(float("nan"))
    model.save_pretrained(saved)

    def refuse(name):
        pytest.fail(f"{name} is not JSON")

    predicted = invoke("predict", saved, "--text", "good film", "--text", "bad film")
    assert predicted.exit_code == 0, predicted.output
    lines = [json.loads(line, parse_constant=refuse) for line in predicted.stdout.splitlines()]
    assert [line["strength"] for line in lines] == [None, None] and all(line["tone"] for line in lines)
    assert "2 numbers are NaN or infinite" in predicted.stderr
