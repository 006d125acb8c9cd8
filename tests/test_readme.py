"""What the README shows is what happens."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hf_multitask.recipe import load_recipe
from hf_multitask.running import format_table

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.M | re.S)


@pytest.mark.registry
def test_the_python_examples_run_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "runs" / "demo" / "model.safetensors").is_file()


def test_the_table_is_the_recorded_result_of_the_recipe():
    results = json.loads((ROOT / "recipes" / "quickstart.json").read_text())
    assert format_table(results) in TEXT
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml")
    assert results["recipe"] == json.loads(json.dumps(recipe.to_dict()))
    task = {name: values["validation"][values["primary_metric"]] for name, values in results["tasks"].items()}
    assert task["valence"] >= 0.70 and task["topic"] >= 0.93 and task["source"] >= 0.75
    assert results["train_seconds"] <= 360 and results["peak_memory_mib"] <= 3072


def test_the_predictions_shown_are_of_the_texts_asked_for():
    (answers,) = blocks("json")
    asked = re.findall(r'--text "(.*?)"', TEXT)
    assert [json.loads(line)["text"] for line in answers.splitlines()] == asked


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "recipes" / "benchmarks").glob("*.json")))
def test_every_recorded_benchmark_has_its_script_and_stands_in_the_readme(name):
    assert (ROOT / "recipes" / "benchmarks" / f"{name}.py").is_file()
    assert f"recipes/benchmarks/{name}.json" in TEXT


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
