"""Recipes of the package are found from anywhere, behind files of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_multitask.recipe import load_recipe
from hf_multitask.shipped_recipes import find_recipe, shipped_recipes

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_of_the_package_is_found_by_name(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (file.stem, file.name, f"recipes/{file.name}"):
        assert load_recipe(name) == load_recipe(file)
    assert shipped_recipes()[file.stem] == file


def test_a_file_of_one_s_own_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("quickstart.yaml").write_text("model: {}")
    with pytest.raises(ValueError, match="key 'tasks' is missing"):
        load_recipe("quickstart.yaml")
    assert find_recipe("quickstart.yaml") == Path("quickstart.yaml")


@pytest.mark.parametrize("path", ["nothing", "other/quickstart.yaml", "/recipes/quickstart.yaml", "quickstart.json"])
def test_other_paths_are_paths(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe(path) == Path(path)
    with pytest.raises(FileNotFoundError, match="does not exist, and none of this name comes with the package"):
        load_recipe(path)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_wheel_takes_the_recipe_along(file):
    tomllib = pytest.importorskip("tomllib")
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"][f"recipes/{file.name}"] == f"hf_multitask/recipes/{file.name}"
