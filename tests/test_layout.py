"""The package is built in floors, and importing it costs little."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import hf_multitask

ROOT = Path(hf_multitask.__file__).parent

# A module imports from lower floors, and from its own folder where that is on its own floor.
FLOORS = {
    "models": 0,
    "answer_metrics": 1,
    "data": 1,
    "folder_lock": 1,
    "balancing": 1,
    "guard": 1,
    "metrics": 1,
    "quickstart": 1,
    "archives": 1,
    "recipe_file": 1,
    "window": 1,
    "balanced_step": 2,
    "balancer": 2,
    "best_metric": 2,
    "checkpoint_state": 2,
    "checkpointing": 2,
    "evaluation": 2,
    "generation": 2,
    "target_evaluation": 2,
    "text_prediction": 2,
    "gap_sampling": 2,
    "guarded_step": 2,
    "loading": 2,
    "prediction": 2,
    "prediction_answers": 2,
    "prediction_inputs": 2,
    "prediction_windows": 2,
    "training_args": 2,
    "row_prediction": 2,
    "hub": 3,
    "recipe": 4,
    "run_description": 2,
    "running": 4,
    "shipped_recipes": 3,
    "trainer": 4,
    "analysis": 5,
    "cli": 6,
}

# Dotted names below the package root; the root itself is "".
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
    for path in sorted(ROOT.rglob("*.py"))
}
every_module = pytest.mark.parametrize("module", [name for name in MODULES if name])


def parse(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports_in(tree: ast.AST, package: list[str]) -> set[str]:
    """Return what code in a (sub)package imports of the whole, wherever in it stands: names as in `MODULES`."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["hf_multitask", *package[: len(package) - node.level + 1]] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            # `from . import x` may name a module, `from .x import y` one or what is in it.
            names = [f"{source}.{alias.name}" for alias in node.names]
            names = [name if name.partition(".")[2] in MODULES else source for name in names]
        else:
            continue
        found |= {name.partition(".")[2] for name in names if name.split(".")[0] == "hf_multitask"}
    return found


def imports_of(module: str) -> set[str]:
    package = [part for part in module.split(".") if part]
    return imports_in(parse(module), package if MODULES[module].name == "__init__.py" else package[:-1])


def place(module: str) -> str:
    """Return the name in `FLOORS` of a module: its folder, or itself if it lies at the top."""
    return module.split(".")[0]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("from ..models.task import Task", {"models.task"}),
        ("from ..models import task, heads", {"models.task", "models.heads"}),
        ("from .. import trainer", {"trainer"}),
        ("from . import sources", {"data.sources"}),
        ("from .sources import Source", {"data.sources"}),
        ("def f():\n    from .labels import infer_labels", {"data.labels"}),
        ("if TYPE_CHECKING:\n    import hf_multitask.trainer", {"trainer"}),
        ("from hf_multitask.models.task import Task", {"models.task"}),
        ("from hf_multitask import cli", {"cli"}),
        ("import hf_multitask", {""}),
        ("from hf_multitask import Task", {""}),
        ("from .. import Task", {""}),
        ("import datasets\nfrom transformers import Trainer", set()),
    ],
)
def test_every_form_of_import_is_seen(code, expected):
    assert imports_in(ast.parse(code), ["data"]) == expected


def test_imports_of_real_modules_are_seen():
    assert imports_of("") >= {"models.auto", "trainer", "data.collator"}
    assert imports_of("data.sources") >= {"models.task"}
    assert imports_of("trainer") >= {"training_args", "models.base", "data.dataset"}


def test_every_module_has_its_floor():
    assert {place(module) for module in MODULES if module} == set(FLOORS)


@every_module
def test_a_module_imports_from_lower_floors_or_its_own_folder(module):
    floor = FLOORS[place(module)]
    folder = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for imported in imports_of(module):
        same_folder = imported.rpartition(".")[0] == folder and FLOORS[place(imported)] == floor
        assert same_folder or FLOORS[place(imported)] < floor, f"{module} imports {imported}"


@every_module
def test_no_module_imports_the_package_root(module):
    assert "" not in imports_of(module)


def test_imports_go_round_in_no_circle():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for imported in imports_of(module):
                visit(imported, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_models_need_nothing_else_of_the_package():
    for module in MODULES:
        if place(module) == "models":
            assert {place(imported) for imported in imports_of(module)} <= {"models"}


@pytest.mark.parametrize("module", MODULES)
def test_what_is_public_has_a_docstring(module):
    tree = parse(module)
    assert ast.get_docstring(tree)

    def check(parent: ast.Module | ast.ClassDef, path: str) -> None:
        for node in parent.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}.{node.name}"
                if isinstance(node, ast.ClassDef):
                    check(node, f"{path}.{node.name}")

    check(tree, module)


@pytest.mark.parametrize("module", MODULES)
def test_the_names_that_a_module_offers_are_there(module):
    loaded = importlib.import_module(f"hf_multitask.{module}".rstrip("."))
    for name in getattr(loaded, "__all__", ()):
        assert getattr(loaded, name) is not None


def test_the_package_offers_its_public_names_and_no_others():
    assert sorted(hf_multitask.__all__) == hf_multitask.__all__
    assert set(hf_multitask.__all__) <= set(dir(hf_multitask))
    with pytest.raises(AttributeError, match="module 'hf_multitask' has no attribute 'MultitaskTrainer'"):
        _ = hf_multitask.MultitaskTrainer
    assert importlib.import_module("hf_multitask.models.task").Task is hf_multitask.Task
    assert importlib.import_module("hf_multitask.trainer").MultiTaskTrainer is hf_multitask.MultiTaskTrainer


def test_importing_the_package_loads_no_trainer_and_no_data_library():
    program = """
import sys, hf_multitask
heavy = ("hf_multitask.trainer", "hf_multitask.data", "hf_multitask.hub", "datasets", "sklearn")
loaded = [name for name in heavy if name in sys.modules]
from transformers import AutoConfig
from transformers.pipelines import check_task
print(loaded, type(AutoConfig.for_model("hf_multitask_hard_sharing")).__name__, check_task("multi-task")[0])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "HardSharingConfig", "multi-task"]


def test_the_lowest_versions_that_were_tested_are_those_that_are_allowed():
    tomllib = pytest.importorskip("tomllib")
    top = ROOT.parent
    dependencies = tomllib.loads((top / "pyproject.toml").read_text())["project"]["dependencies"]
    allowed = {
        Requirement(text).name: next(s.version for s in Requirement(text).specifier if s.operator == ">=")
        for text in dependencies
    }
    lines = (top / ".ci" / "lowest.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {name: Version(text) for name, text in allowed.items()} == {n: Version(text) for n, text in tested.items()}
