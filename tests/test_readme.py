"""What the README shows is what happens."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import typer.main

from hf_multitask.analysis.comparison_result import Comparison
from hf_multitask.cli.app import app
from hf_multitask.recipe import load_recipe
from hf_multitask.running import format_table

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ("README.md", "recipes/README.md", "recipes/coming_from.md")


def blocks(language: str, page: str = "README.md") -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


@pytest.mark.registry
@pytest.mark.parametrize("page", PAGES)
def test_the_python_examples_run_as_they_stand(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for code in blocks("python", page):
        exec(compile(code, page, "exec"), {})
    if page == "README.md":
        assert (tmp_path / "runs" / "demo" / "model.safetensors").is_file()


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_commands(page):
    """With options that there are, on recipes that there are."""
    commands = typer.main.get_command(app).commands
    for block in blocks("bash", page):
        for line in re.findall(r"^hf-multitask .*", block.replace("\\\n", " "), flags=re.M):
            name, *rest = shlex.split(line)[1:]
            options = {option for parameter in commands[name].params for option in parameter.opts}
            assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= options, line
            assert all((ROOT / word).is_file() for word in rest if word.startswith("recipes/")), line


def test_the_table_is_the_recorded_result_of_the_recipe():
    results = json.loads((ROOT / "recipes" / "quickstart.json").read_text())
    assert format_table(results) in TEXT
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml")
    assert results["recipe"] == json.loads(json.dumps(recipe.to_dict()))
    task = {name: values["validation"][values["primary_metric"]] for name, values in results["tasks"].items()}
    assert task["valence"] >= 0.70 and task["topic"] >= 0.93 and task["source"] >= 0.75
    assert results["train_seconds"] <= 360 and results["peak_memory_mib"] <= 3072


def test_the_comparison_is_the_recorded_one():
    results = json.loads((ROOT / "recipes" / "quickstart.json").read_text())
    found = Comparison.from_dict(results["comparison"])
    assert f"```\n{found}\n```" in TEXT
    recorded = load_recipe(ROOT / "recipes" / "quickstart.yaml")
    assert [task.task for task in found.tasks] == [task["name"] for task in recorded.tasks]
    assert found.recipe["training"]["max_steps"] == recorded.training["max_steps"] and len(found.seeds) >= 2


def test_the_predictions_shown_are_of_the_texts_asked_for():
    (answers,) = blocks("json")
    asked = re.findall(r'--text "(.*?)"', TEXT)
    assert [json.loads(line)["text"] for line in answers.splitlines()] == asked


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "recipes" / "benchmarks").glob("*.json")))
def test_every_recorded_benchmark_has_its_script_and_stands_in_the_readme(name):
    assert (ROOT / "recipes" / "benchmarks" / f"{name}.py").is_file()
    assert f"recipes/benchmarks/{name}.json" in TEXT


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target
    for heading in re.findall(r"\]\(#([^)]+)\)", text):
        titles = re.findall(r"^#+ (.*)$", text, flags=re.M)
        assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, heading
