from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from conftest import BACKBONES, make_datasets, make_tokenizer
from datasets import Dataset
from questions import question_datasets

from hf_multitask import AutoModelForMultiTask
from hf_multitask.analysis.auxiliary import sweep_auxiliary
from hf_multitask.analysis.comparison import compare
from hf_multitask.folder_lock import FolderInUseError
from hf_multitask.prediction import Predictor
from hf_multitask.recipe import build, load_recipe, load_splits
from hf_multitask.running import run_recipe

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture
def folder(tmp_path):
    """A backbone, data files and a recipe, as a user would have them."""
    BACKBONES["bert"]().save_pretrained(tmp_path / "backbone")
    make_tokenizer().save_pretrained(tmp_path / "backbone")
    for split, seed in (("train", 0), ("validation", 1), ("test", 2)):
        for name, rows in make_datasets(seed).items():
            rows.to_parquet(tmp_path / f"{name}-{split}.parquet")
    reviews = str(tmp_path / "reviews-{split}.parquet")
    recipe = {
        "model": {"backbone": str(tmp_path / "backbone"), "sharing": "hard", "head_dropout": 0.0},
        "tasks": [
            {"name": "tone", "type": "single_label_classification", "dataset": reviews},
            {"name": "strength", "type": "regression", "dataset": reviews, "label_column": "strength"},
            {"name": "names", "type": "token_classification", "dataset": str(tmp_path / "names-{split}.parquet")},
        ],
        "training": {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
        },
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return tmp_path


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_project_is_valid(path):
    recipe = load_recipe(path)
    assert recipe.tasks and recipe.training["output_dir"] == f"runs/{path.stem}"


def test_a_recipe_runs_and_leaves_a_model_and_results(folder):
    table = run_recipe(folder / "job.yaml")
    results = json.loads((folder / "out" / "results.json").read_text())
    for name, metric in (("tone", "accuracy"), ("strength", "pearson"), ("names", "f1")):
        task = results["tasks"][name]
        assert task["primary_metric"] == metric and metric in task["validation"] and metric in task["test"]
        line = next(line for line in table.splitlines() if line.startswith(f"{name} "))
        assert f"{task['validation'][metric]:.3f}" in line and f"{task['rows_seen']:,}" in line
    assert results["tasks"]["tone"]["rows_seen"] == results["tasks"]["strength"]["rows_seen"] > 0
    assert results["steps"] == 3 and results["recipe"]["training"]["max_steps"] == 3
    model = AutoModelForMultiTask.from_pretrained(folder / "out")
    assert [task.name for task in model.tasks] == ["tone", "strength", "names"]
    assert model.tasks[0].labels == ("negative", "positive") and model.tasks[2].labels[0] == "O"


def test_tasks_with_the_same_dataset_share_rows(folder):
    parts = build(load_recipe(folder / "job.yaml"))
    assert set(parts.datasets["train"]) == {"reviews", "names"} == set(parts.datasets["test"])
    assert parts.model.tasks[0].dataset == parts.model.tasks[1].dataset == "reviews"


def test_settings_change_values_of_tasks_by_name_and_number(folder):
    settings = ["training.max_steps=7", "tasks.tone.weight=0.5", "tasks.1.head=linear", "training.learning_rate=1e-4"]
    recipe = load_recipe(folder / "job.yaml", [*settings, "training.task_sampling_kwargs={alpha: 0.5}"])
    assert recipe.training["max_steps"] == 7 and recipe.training["learning_rate"] == 1e-4
    assert recipe.tasks[0]["weight"] == 0.5 and recipe.tasks[1]["head"] == "linear"
    assert recipe.training["task_sampling_kwargs"] == {"alpha": 0.5}


@pytest.mark.parametrize(
    "text, value",
    [("no", "no"), ("yes", "yes"), ("off", "off"), ("true", True), ("False", False), ("1e-4", 1e-4), ("2.5E+3", 2500.0)]
    + [("10", 10), ("1.5", 1.5), ("-.5", -0.5), ("null", None), ("[no, 3]", ["no", 3]), ("e5", "e5"), ("1e", "1e")]
    + [("1.2.3", "1.2.3"), ("'3'", "3"), (".inf", float("inf")), ("tweets", "tweets")],
)
def test_values_are_what_people_expect_of_them(folder, text, value):
    recipe = load_recipe(folder / "job.yaml", [f"tasks.tone.metric={text}"])
    found = recipe.tasks[0]["metric"]
    assert found == value and type(found) is type(value)


BAD = {
    "tranining.max_steps=3": "'tranining', did you mean 'training'",
    "training.max_stepz=3": "'max_stepz', did you mean 'max_steps'",
    "tasks.tone.lables=[a]": "'lables', did you mean 'labels'",
    "tasks.tune.weight=1": "'tune', did you mean 'tone'",
    "model.backbonne=x": "'backbonne', did you mean 'backbone'",
    "model.sharing=herd": "'herd' is not known, did you mean 'hard'",
    "model.poling=mean": "'poling', did you mean 'pooling'",
    "tasks=[]": "tasks must be a list",
    "tasks.tone.dataset=3": "dataset must be a name or a mapping",
    "training.max_steps": "write it as key=value",
    "tasks.names.dataset=nowhere-{split}.parquet": "'nowhere-train.parquet' does not exist",
    "tasks.tone.type=clasification": "'clasification' is not known",
    "tasks.tone.label_column=strength": "give labels",
    "tasks.tone.dataset={path: parquet, trian: x}": "'trian', did you mean 'train'",
}


@pytest.mark.parametrize("setting", BAD)
def test_a_mistake_in_a_recipe_is_named_with_the_closest_key(folder, setting):
    with pytest.raises(ValueError) as error:
        build(load_recipe(folder / "job.yaml", [setting]))
    assert BAD[setting] in str(error.value)
    assert not (folder / "out").exists()


def test_a_recipe_that_is_no_recipe_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_recipe(tmp_path / "no.yaml")
    for text, part in (
        ("- a", "must be a mapping"),
        ("model: [", "not valid YAML"),
        ("model: {}", "'tasks' is missing"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=part):
            load_recipe(tmp_path / "bad.yaml")


def test_splits_can_be_named_left_out_and_taken_from_training_rows(folder):
    files = {split: str(folder / f"reviews-{split}.parquet") for split in ("train", "test")}
    spec = {"path": "parquet", "data_files": files}
    assert {name: len(rows) for name, rows in load_splits(spec).items()} == {"train": 40, "test": 40}
    assert set(load_splits({**spec, "validation": "test", "test": None})) == {"train", "validation"}
    parts = load_splits({**spec, "validation": 0.25})
    assert (len(parts["train"]), len(parts["validation"]), len(parts["test"])) == (30, 10, 40)
    again = load_splits({**spec, "validation": 0.25})
    assert parts["validation"]["text"] == again["validation"]["text"]
    with pytest.raises(ValueError, match="no split 'dev'; its splits are train, test"):
        load_splits({**spec, "validation": "dev"})


def test_other_files_than_parquet_work(folder):
    rows = make_datasets()["reviews"]
    rows.to_json(folder / "a-train.jsonl")
    rows.to_csv(folder / "a-train.csv")
    for ending in ("jsonl", "csv"):
        assert len(load_splits(str(folder / f"a-{{split}}.{ending}"))["train"]) == 40


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_ratings_in_a_file_are_names_of_labels(folder, ending):
    """Stars from 1 to 5, as they stand in a file: none is trained, evaluated or answered one off."""
    for split in ("train", "validation"):
        rows = Dataset.from_dict({"text": ["bad film", "good film"] * 8, "label": [1, 4] * 8})
        getattr(rows, "to_csv" if ending == "csv" else "to_json")(folder / f"stars-{split}.{ending}")
    recipe = yaml.safe_load((folder / "job.yaml").read_text())
    recipe["tasks"] = [
        {
            "name": "stars",
            "type": "single_label_classification",
            "labels": [1, 2, 3, 4, 5],
            "dataset": str(folder / f"stars-{{split}}.{ending}"),
        }
    ]
    recipe["training"] |= {"max_steps": 60, "learning_rate": 0.01}
    (folder / "stars.yaml").write_text(yaml.safe_dump(recipe))
    run_recipe(folder / "stars.yaml")
    results = json.loads((folder / "out" / "results.json").read_text())["tasks"]
    assert results["stars"]["validation"]["accuracy"] == 1.0
    predictor = Predictor.from_pretrained(folder / "out", "cpu")
    assert predictor.model.tasks[0].labels == ("1", "2", "3", "4", "5")
    assert [answer["stars"]["label"] for answer in predictor(["bad film", "good film"])] == ["1", "4"]


def test_questions_and_choices_from_files(folder):
    for split, seed in (("train", 0), ("validation", 1)):
        for name, rows in question_datasets(seed).items():
            rows.to_json(folder / f"{name}-{split}.jsonl")
    tasks = [
        {"name": "who", "type": "question_answering", "dataset": str(folder / "who-{split}.jsonl"), "stride": 8},
        {"name": "next", "type": "multiple_choice", "dataset": str(folder / "next-{split}.jsonl"), "head": "native"},
    ]
    recipe = {**yaml.safe_load((folder / "job.yaml").read_text()), "tasks": tasks}
    (folder / "questions.yaml").write_text(yaml.safe_dump(recipe))
    run_recipe(folder / "questions.yaml")
    results = json.loads((folder / "out" / "results.json").read_text())["tasks"]
    assert (
        set(results["who"]["validation"]) == {"f1", "exact_match", "loss"} and results["who"]["primary_metric"] == "f1"
    )
    assert set(results["next"]["validation"]) == {"accuracy", "loss"}
    model = AutoModelForMultiTask.from_pretrained(folder / "out")
    assert model.tasks[0].stride == 8 and model.tasks[1].choice_columns == ("choices",)


def test_a_second_recipe_comparison_or_sweep_is_refused(other_process, folder):
    job = folder / "job.yaml"
    other_process(folder / "out")
    with pytest.raises(FolderInUseError, match="out"):
        run_recipe(job)
    with pytest.raises(FolderInUseError, match="out"):
        compare(job, output=folder / "out")
    settings = ["tasks.strength.auxiliary=true"]
    with pytest.raises(FolderInUseError, match="out"):
        sweep_auxiliary(job, "strength", [0, 0.5], settings=settings, output=folder / "out")


def test_a_recipe_with_another_backbone_is_not_resumed_from_the_first_ones_checkpoint(folder):
    settings = ["training.save_strategy=steps", "training.save_steps=2"]
    run_recipe(folder / "job.yaml", settings)
    BACKBONES["bert"]().save_pretrained(folder / "other")
    make_tokenizer().save_pretrained(folder / "other")
    with pytest.raises(ValueError, match="model.backbone of the recipe: .*backbone' in the checkpoint, .*other' now"):
        run_recipe(folder / "job.yaml", [*settings, f"model.backbone={folder / 'other'}"], resume=True)
    assert "average" in run_recipe(folder / "job.yaml", settings, resume=True)
