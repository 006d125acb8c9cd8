"""Whatever became of a saved file, reading it gives what it says, or a named error: no crash, no hang, nothing else.

What is changed at random: configurations, weights, adapters and their folders for every sharing scheme; descriptions
of tasks; recipes; results and comparisons that a report reads; the state in checkpoints. The default run tries a few
changes of each, the slow one (`pytest -m slow tests/test_fuzz.py`) thousands.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_tasks
from hostile import KINDS, NAMED, answers, damages, mutations, put_together, save_model, write_json
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers.utils import logging

from hf_multitask import AutoModelForMultiTask, Task
from hf_multitask.analysis.comparison_result import Comparison, TaskComparison
from hf_multitask.analysis.report_reading import read_facts
from hf_multitask.checkpointing import incompleteness, last_complete_checkpoint, read_state
from hf_multitask.models.auto import SCHEMES
from hf_multitask.models.manifest import MANIFEST_NAME
from hf_multitask.recipe import load_recipe
from hf_multitask.run_description import compare_runs

EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
_COMMON = dict(
    deadline=None,  # processor time counts, see `attempt`
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate),
)


def tries(few: int, many: int):
    """A test that tries a few changes, and one marked slow that tries many."""

    def parametrise(test):
        return pytest.mark.parametrize("tried", [few, pytest.param(many, marks=pytest.mark.slow)], ids=["few", "many"])(
            test
        )

    return parametrise


def attempt(number: int, strategy, check) -> None:
    """Check a number of drawn examples, none of which may take long."""

    def checked(value):
        begin = time.process_time()
        check(value)
        assert time.process_time() - begin < 20

    settings(max_examples=number, **_COMMON)(given(strategy)(checked))()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every kind of model, saved once: by kind, the folder and the answers."""
    found = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp("saved")
        found[kind] = folder / "model", answers(save_model(kind, folder))
        (folder / "model" / MANIFEST_NAME).unlink()  # it would notice every change
    return found


@pytest.fixture(autouse=True)
def quiet():
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()


def load(folder: Path, kind: str, auto: bool) -> Any:
    """Return a loaded model, or None after a named error that says something."""
    loader = AutoModelForMultiTask if auto else SCHEMES[KINDS[kind][0]]
    try:
        return loader.from_pretrained(folder)
    except NAMED as error:
        assert len(str(error)) > 10
        return None


def check_right(model: Any, folder: Path, original: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """Check that a model that was loaded is what its folder says."""
    written = json.loads((folder / "config.json").read_text())
    assert [task.name for task in model.tasks] == [task["name"] for task in written["tasks"]]
    assert [task.labels for task in model.tasks] == [
        None if task.get("labels") is None else tuple(task["labels"]) for task in written["tasks"]
    ]
    try:
        found = answers(model)
    except NAMED as error:  # such as a chunk size that does not divide the length
        assert len(str(error)) > 10
        return
    expected = answers(put_together(model, folder).to(model.dtype))
    assert list(found) == [task.name for task in model.tasks if not task.auxiliary]
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, equal_nan=True)
    if written == config and set(found) == set(original):
        assert all(torch.equal(found[name], original[name]) for name in found)


@tries(8, 400)
@EVERY_KIND
def test_a_configuration_with_wrong_values_is_right_or_refused(folders, tmp_path, kind, tried):
    saved, original = folders[kind]
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    config = json.loads((saved / "config.json").read_text())

    def check(changed):
        value, auto = changed
        write_json(folder / "config.json", value)
        model = load(folder, kind, auto)
        if model is not None:
            check_right(model, folder, original, config)

    strategy = st.one_of(mutations(config), mutations(config), st.sampled_from([[], [config], 1, "x", None, {}]))
    attempt(tried, st.tuples(strategy, st.booleans()), check)


@tries(4, 150)
@EVERY_KIND
def test_a_configuration_with_wrong_bytes_is_right_or_refused(folders, tmp_path, kind, tried):
    saved, original = folders[kind]
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    content = (saved / "config.json").read_bytes()

    def check(changed):
        value, auto = changed
        (folder / "config.json").write_bytes(value)
        model = load(folder, kind, auto)
        if model is not None:
            check_right(model, folder, original, json.loads(content))

    attempt(tried, st.tuples(damages(content), st.booleans()), check)


@tries(6, 300)
@EVERY_KIND
def test_damaged_weights_are_right_or_refused(folders, tmp_path, kind, tried):
    saved, _ = folders[kind]
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    config = json.loads((saved / "config.json").read_text())
    files = sorted(path.relative_to(saved) for path in saved.rglob("*.safetensors"))
    contents = {file: (saved / file).read_bytes() for file in files}

    def check(changed):
        file, value, auto = changed
        (folder / file).write_bytes(value)
        try:
            model = load(folder, kind, auto)
            if model is not None:
                check_right(model, folder, {}, config)
            del model
        finally:
            (folder / file).unlink()  # a mapped file must not change
            (folder / file).write_bytes(contents[file])

    strategy = st.sampled_from(files).flatmap(
        lambda file: st.tuples(st.just(file), damages(contents[file]), st.booleans())
    )
    attempt(tried, strategy, check)


@tries(6, 200)
@EVERY_KIND
def test_a_folder_with_files_gone_moved_or_of_another_model_is_right_or_refused(folders, tmp_path, kind, tried):
    saved, original = folders[kind]
    config = json.loads((saved / "config.json").read_text())
    parts = sorted(str(path.relative_to(saved)) for path in saved.rglob("*"))
    others = {f"{other}: {part.name}": part for other, (at, _) in folders.items() for part in sorted(at.iterdir())}
    adapters = [part for part in parts if part.endswith("adapter_config.json")]

    def check(changed):
        changes, auto = changed
        folder = tmp_path / "model"
        shutil.copytree(saved, folder)
        touched = False
        try:
            for change, part, other, value in changes:
                place = folder / part
                if change == "put another's":
                    target = folder / others[other].name
                    shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
                    (shutil.copytree if others[other].is_dir() else shutil.copy)(others[other], target)
                    touched = True
                elif change == "change adapter" and adapters:
                    write_json(folder / adapters[0], value) if (folder / adapters[0]).exists() else None
                elif not place.exists():
                    continue
                elif change == "remove":
                    shutil.rmtree(place) if place.is_dir() else place.unlink()
                    touched = touched or "adapter_config" not in part
                elif change == "rename":
                    place.rename(folder / f"x{place.name}")
                    touched = touched or "adapter_config" not in part
                elif change == "empty":
                    shutil.rmtree(place) if place.is_dir() else place.unlink()
                    place.mkdir() if value else place.touch()
                    touched = touched or "adapter_config" not in part
            model = load(folder, kind, auto)
            if model is None:
                assert touched
            else:
                check_right(model, folder, {} if touched else original, config)
            del model
        finally:
            shutil.rmtree(folder)

    change = st.tuples(
        st.sampled_from(("remove", "rename", "empty", "put another's", "change adapter")),
        st.sampled_from(parts),
        st.sampled_from(sorted(others)),
        st.sampled_from([{}, [], {"r": 10**9, "peft_type": "x"}, {"base_model_name_or_path": "../../x"}]),
    )
    attempt(tried, st.tuples(st.lists(change, min_size=1, max_size=3), st.booleans()), check)


# ---- descriptions of tasks ----

TASKS = [
    *(task.to_dict() for task in make_tasks()),
    Task("say", "causal_lm", prompt="{text}?", generation={"max_new_tokens": 3}, weight_schedule="linear").to_dict(),
    Task("which", "multiple_choice", choice_columns=["a", "b"], auxiliary=True).to_dict(),
    {"name": "hidden", "type": "masked_lm", "mlm_probability": 0.3},
]


@tries(150, 5_000)
def test_a_task_is_what_its_description_says_or_refused(tried):
    def check(values):
        before = copy.deepcopy(values)
        try:
            task = Task.from_dict(values)
        except ValueError as error:
            assert len(str(error)) > 10
            return
        finally:
            assert repr(values) == repr(before)
        assert Task.from_dict(json.loads(json.dumps(task.to_dict()))) == task
        assert task.name == values["name"] and "/" not in task.name and "." not in task.name

    attempt(tried, st.sampled_from(TASKS).flatmap(mutations), check)


# ---- recipes ----

RECIPE = """
model: {backbone: some/encoder, sharing: adapter, rank: 4, target_modules: [query]}
tasks:
  - &first {name: tone, type: single_label_classification, dataset: "data/tone-{split}.parquet", labels: [a, b]}
  - {<<: *first, name: other, dataset: {path: csv, data_files: {train: a.csv}, validation: 0.1, test: null}}
training: {max_steps: 10, learning_rate: 1e-4, bf16: false}
"""


@tries(60, 3_000)
def test_a_recipe_is_what_it_says_or_refused(tmp_path, tried):
    path = tmp_path / "r.yaml"
    content = yaml.safe_load(RECIPE)

    def check(text):
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        try:
            recipe = load_recipe(path, ["training.max_steps=3"])
        except NAMED as error:
            assert len(str(error)) > 10
            return
        assert recipe.training["max_steps"] == 3 and recipe.model["backbone"] and recipe.tasks
        json.dumps(recipe.to_dict(), default=str)

    as_yaml = mutations(content).map(lambda value: yaml.dump(value, allow_unicode=True))
    attempt(tried, st.one_of(as_yaml, damages(RECIPE.encode()), st.text(), mutations(content).map(json.dumps)), check)


# ---- what a report reads ----


def comparison() -> dict[str, Any]:
    values = {
        "difference": 0.1,
        "interval": (0.0, 0.2),
        "interval_over_examples": (0.05, 0.15),
        "by_seed": {"0": 0.1},
        "seed_spread": 0.01,
        "margin": 0.02,
        "metric": "accuracy",
        "greater_is_better": True,
        "multi": 0.6,
        "single": 0.5,
        "multi_by_seed": {"0": 0.6},
        "single_by_seed": {"0": 0.5},
        "examples": 20,
        "budget": {"rows": 10, "steps": 2},
    }
    found = Comparison(
        tasks=tuple(TaskComparison(task=name, **values) for name in ("tone", "names")),
        seeds=(0,),
        critical_tasks=("tone",),
        against={},
        delta_m={"value": 0.1, "interval": (0.0, 0.2)},
        cost={"parameters": {"multi": 10, "single": 20}},
        settings={"confidence": 0.95},
        recipe={},
        versions={},
    )
    return json.loads(json.dumps(found.to_dict()))


def results() -> dict[str, Any]:
    task = {"rows_seen": 10, "primary_metric": "accuracy", "validation": {"accuracy": 0.5, "loss": 1.0}}
    return {
        "recipe": {"model": {"backbone": "x"}, "tasks": [{"name": "tone", "type": "regression"}], "training": {}},
        "versions": {"torch": "2"},
        "tasks": {"tone": task, "names": task},
        "average": {"validation": 0.5},
        "steps": 6,
    }


def log() -> dict[str, Any]:
    lines = [{"step": step, "epoch": 0.1, "loss": 1.0, "loss/tone": 0.5, "eval_tone_accuracy": 0.4} for step in (1, 2)]
    return {"log_history": lines, "global_step": 2, "max_steps": 2}


FILES = {"results.json": results, "comparison.json": comparison, "trainer_state.json": log}


@tries(60, 3_000)
def test_the_files_of_a_run_are_read_or_refused(tmp_path, tried):
    contents = {name: make() for name, make in FILES.items()}

    def check(changed):
        name, value, alone = changed
        for other, content in contents.items():
            write_json(tmp_path / other, content)
        (tmp_path / name).write_bytes(value) if isinstance(value, bytes) else write_json(tmp_path / name, value)
        try:
            facts = read_facts(tmp_path / name if alone else tmp_path)
        except NAMED as error:
            assert len(str(error)) > 10
            return
        assert all(isinstance(warning, str) for warning in facts.warnings)
        if not alone and name != "results.json":
            assert facts.results == contents["results.json"]

    def changes(name):
        content = contents[name]
        changed = mutations(content) | damages(json.dumps(content).encode()) | st.just([content])
        return st.tuples(st.just(name), changed, st.booleans())

    attempt(tried, st.sampled_from(sorted(contents)).flatmap(changes), check)


# ---- checkpoints ----


def said(run: dict[str, Any]) -> dict[str, Any]:
    """Return a description of a run without what is not said."""
    tasks = [{key: value for key, value in task.items() if value is not None} for task in run["tasks"]]
    return {key: value for key, value in (run | {"tasks": tasks}).items() if value is not None}


@pytest.fixture
def checkpoint(make_trainer, model, tmp_path):
    trainer = make_trainer(model, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    return Path(trainer.args.output_dir, "checkpoint-1"), trainer


@tries(60, 1_500)
def test_the_state_in_a_checkpoint_is_read_or_refused(checkpoint, tried):
    folder, trainer = checkpoint
    path = folder / "multitask_state.json"
    content = json.loads(path.read_text())
    now = trainer._describe_run()

    def check(value):
        path.write_bytes(value) if isinstance(value, bytes) else write_json(path, value)
        found = incompleteness(folder)
        assert found is None or isinstance(found, str)
        newest, skipped = last_complete_checkpoint(folder.parent)
        assert newest is not None and newest.endswith("checkpoint-2") and not skipped
        try:
            state = read_state(folder)
            compare_runs(folder, state["run"], now)
        except NAMED as error:
            assert len(str(error)) > 10
            return
        assert said(state["run"]) == said(now)

    attempt(tried, mutations(content) | damages(json.dumps(content).encode()) | st.just([content]), check)


@pytest.mark.slow
def test_training_goes_on_from_a_changed_checkpoint_or_refuses(checkpoint, make_trainer, model):
    folder, _ = checkpoint
    path = folder / "multitask_state.json"
    content = json.loads(path.read_text())

    def check(value):
        write_json(path, value)
        trainer = make_trainer(copy.deepcopy(model), max_steps=2)
        try:
            trainer.train(resume_from_checkpoint=str(folder))
        except NAMED as error:
            assert len(str(error)) > 10
            return
        assert trainer.state.global_step == 2

    attempt(150, mutations(content), check)
