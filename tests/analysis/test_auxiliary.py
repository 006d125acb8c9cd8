"""Sweeps over the weight of an auxiliary task: what they find, what they train again, and what they refuse."""

from __future__ import annotations

import gc
import json
import math
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace

import datasets
import numpy as np
import pytest
import yaml
from conftest import BACKBONES, make_datasets, make_tokenizer
from test_distributed import free_port
from typer.testing import CliRunner

from hf_multitask.analysis import auxiliary as module
from hf_multitask.analysis import sweep_result
from hf_multitask.analysis.auxiliary import sweep_auxiliary
from hf_multitask.analysis.sweep_result import AuxiliarySweep, SweepRun, check_picture
from hf_multitask.cli.app import app
from hf_multitask.running import run_recipe
from hf_multitask.trainer import MultiTaskTrainer

WEIGHTS = (0.0, 0.1, 0.3)


# ---- the summary, on planted numbers ----


def plant(primary, losses, higher_is_better=True, auxiliary=None, order=None) -> AuxiliarySweep:
    """Make a sweep of planted numbers: by weight, a value for each seed."""
    runs = [
        SweepRun(weight, seed, value, (auxiliary or losses)[weight][seed], losses[weight][seed])
        for weight, values in primary.items()
        for seed, value in enumerate(values)
    ]
    if order is not None:
        random.Random(order).shuffle(runs)
    return AuxiliarySweep("names", "tone", "accuracy", "f1", higher_is_better, tuple(runs))


SEEDS = np.array([0.10, -0.20, 0.05])  # seeds differ far more than weights
NOISE = np.array([0.01, -0.01, 0.0])  # standard deviation 0.01
LOSSES = {w: [value] * 3 for w, value in {0.0: 2.0, 0.1: 1.0, 0.2: 0.9, 0.3: 0.9, 0.5: 0.95}.items()}


def planted(*changes: float) -> dict[float, list[float]]:
    return {
        weight: list(0.7 + SEEDS + (change + NOISE if weight else 0.0))
        for weight, change in zip(LOSSES, (0.0, *changes), strict=True)
    }


@pytest.mark.parametrize(
    ("changes", "threshold", "worse"),
    [
        ((0.02, 0.0, -0.011, -0.05), 0.3, (0.3, 0.5)),
        ((-0.011, -0.02, -0.03, -0.04), 0.1, (0.1, 0.2, 0.3, 0.5)),
        ((-0.02, 0.0, -0.009, -0.011), 0.5, (0.1, 0.5)),  # once it was worse, but not from there on
        ((-0.02, -0.02, -0.02, -0.009), None, (0.1, 0.2, 0.3)),
        ((0.1, 0.1, 0.1, 0.1), None, ()),
    ],
)
def test_the_interference_threshold_is_the_planted_one_however_the_seeds_differ(changes, threshold, worse):
    for sign in (1, -1):  # of the direction of the metric
        primary = {w: [sign * value for value in values] for w, values in planted(*changes).items()}
        sweep = plant(primary, LOSSES, sign == 1)
        assert sweep.interference_threshold == threshold
        assert tuple(row["weight"] for row in sweep.table() if row["worse"]) == worse
        assert np.allclose(sweep.limits(), [0, 0.01, 0.01, 0.01, 0.01])
        shown = str(sweep)
        assert ("no interference threshold" in shown) == (threshold is None) and not sweep.one_seed
        assert threshold is None or f"interference threshold {threshold:g}: from there on tone accuracy" in shown


def test_unpaired_numbers_would_find_nothing():
    sweep = plant(planted(-0.02, -0.02, -0.02, -0.02), LOSSES)
    spread = sweep.values("primary").std(1, ddof=1)
    assert (np.abs(sweep.changes().mean(1)) < spread / 5).all() and sweep.interference_threshold == 0.1


@pytest.mark.parametrize("order", range(3))
def test_the_order_of_runs_makes_no_difference(order):
    sweep, mixed = (plant(planted(0.0, 0.0, -0.02, -0.02), LOSSES, order=one) for one in (None, order))
    assert mixed.to_dict() == sweep.to_dict() and mixed.weights == (0.0, 0.1, 0.2, 0.3, 0.5)
    assert mixed.interference_threshold == 0.3 and str(mixed) == str(sweep)


def test_with_one_seed_a_hundredth_counts_and_the_result_says_so():
    losses = {0.0: [3.0], 0.1: [1.0099], 0.2: [1.0], 0.3: [1.01]}
    sweep = plant({0.0: [0.8], 0.1: [0.8], 0.2: [0.792], 0.3: [0.7919]}, losses)
    assert sweep.one_seed and sweep.interference_threshold == 0.3 and sweep.saturation == 0.1
    assert sweep.to_dict()["summary"]["one_seed"] and sweep.table()[0]["primary_std"] is None
    assert "1 % of the value at weight 0 (0.0080), one seed" in str(sweep) and "repeat with several" in str(sweep)
    losses[0.1] = [1.0101]
    assert plant({w: [0.5] for w in losses}, losses).saturation == 0.2


def test_saturation_is_within_one_standard_error_of_the_lowest_loss():
    losses = {0.0: [2.0, 2.0], 0.1: [1.09, 1.12], 0.2: [1.09, 1.11], 0.3: [0.9, 1.1], 0.4: [1.0, 1.02]}
    sweep = plant({w: [0.5, 0.6] for w in losses}, losses)
    # The lowest mean is 1.0; its standard deviation is 0.2 / sqrt(2), and the standard error 0.1.
    assert sweep.saturation_tolerance == pytest.approx(0.1) and sweep.saturation == 0.2
    assert "names saturates at weight 0.2: loss within one standard error (0.1000) of the lowest" in str(sweep)
    rising = plant({w: [0.5, 0.6] for w in LOSSES}, {w: [1 - w, 1 - w] for w in LOSSES})
    assert rising.saturation == 0.5 and "saturates at no weight below 0.5, the largest" in str(rising)


def test_the_table_holds_mean_spread_and_ends():
    sweep = plant(planted(0.0, 0.0, 0.0, -0.02), LOSSES, auxiliary={w: [w, w + 0.1, w + 0.2] for w in LOSSES})
    row = sweep.table()[-1]
    assert row["primary"] == pytest.approx(0.68 - 0.05 / 3)
    assert row["primary_std"] == pytest.approx(np.std(SEEDS + NOISE, ddof=1))
    assert (row["primary_min"], row["primary_max"]) == pytest.approx((0.47, 0.79))
    assert (row["change"], row["change_std"], row["limit"]) == pytest.approx((-0.02, 0.01, 0.01))
    assert (row["auxiliary"], row["auxiliary_std"], row["auxiliary_loss"]) == pytest.approx((0.6, 0.1, 0.95))
    line = next(line for line in str(sweep).splitlines() if line.strip().startswith("0.5 "))
    for part in ("0.6633 ±", "0.4700", "0.7900", "-0.0200 ± 0.0100  worse", "0.6000 ± 0.1000", "0.9500 ± 0.0000"):
        assert part in line
    by_loss = replace(sweep, auxiliary_metric="loss")
    assert str(by_loss).splitlines()[0].count("names") == 1


def test_what_is_not_a_number_is_worse_and_saturates_nothing():
    losses = {0.0: [1.0], 0.1: [0.5], 0.2: [math.nan]}
    sweep = plant({0.0: [0.5], 0.1: [0.5], 0.2: [math.nan]}, losses)
    assert sweep.interference_threshold == 0.2 and sweep.saturation == 0.1
    lost = plant({0.0: [0.5], 0.1: [0.5]}, {0.0: [math.nan], 0.1: [math.inf]})
    assert lost.saturation is None and "saturates" not in str(lost)


def test_a_sweep_is_saved_and_loaded(tmp_path):
    sweep = plant(planted(0.0, 0.0, -0.02, -0.02), LOSSES)
    sweep.save(tmp_path / "x.json")
    loaded = AuxiliarySweep.load(tmp_path / "x.json")
    assert loaded.to_dict() == sweep.to_dict() and loaded.runs == sweep.runs
    (tmp_path / "x.json").write_text('{"finished": false}')
    with pytest.raises(ValueError, match="not finished"):
        AuxiliarySweep.load(tmp_path / "x.json")


def test_runs_that_are_missing_are_noticed():
    runs = plant(planted(0.0, 0.0, 0.0, 0.0), LOSSES).runs
    for some in (runs[1:], (*runs, runs[0]), tuple(run for run in runs if run.weight)):
        with pytest.raises(ValueError, match="one for each weight"):
            AuxiliarySweep("names", "tone", "accuracy", "f1", True, some)


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_plot_is_drawn_and_always_the_same(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    sweep = plant(planted(0.0, 0.0, -0.02, -0.02), LOSSES)
    for name in ("one", "two"):
        sweep.plot(tmp_path / f"{name}.{suffix}")
    assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"two.{suffix}").read_bytes()
    plant({w: [0.5] for w in LOSSES}, {w: [math.nan] for w in LOSSES}).plot(tmp_path / f"bare.{suffix}")


def test_the_plot_labels_its_axes_and_marks_the_threshold(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(sweep_result, "save_figure", lambda figure, path: figures.append(figure))
    plant(planted(0.0, 0.0, -0.02, -0.02), LOSSES).plot("x.svg")
    plant(planted(0.0, 0.0, 0.0, 0.0), LOSSES).plot("x.svg")
    axes = figures[0].axes
    assert [axis.get_ylabel() for axis in axes] == ["tone accuracy", "names f1", "names loss"]
    assert axes[-1].get_xlabel() == "weight of names"
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["interference threshold: 0.3"]
    assert [text.get_text() for text in axes[2].get_legend().get_texts()] == ["saturation: 0.2"]
    dots = axes[1].lines[-1].get_xydata()
    assert len(dots) == 15 and dots[0].tolist() == [0.0, 2.0]
    assert figures[1].axes[0].get_title() == "no interference threshold"


def test_a_picture_that_cannot_be_drawn_is_refused_beforehand(monkeypatch):
    pytest.importorskip("matplotlib")
    check_picture("x/y.SVG")
    with pytest.raises(ValueError, match=r"plot 'x.doc': the suffix .* \.svg"):
        check_picture("x.doc")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install hf_multitask\[plots\]"):
        check_picture("x.svg")


# ---- real sweeps ----


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A backbone, data files and a recipe, as a user would have them."""
    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("files")
    BACKBONES["bert"]().save_pretrained(folder / "backbone")
    make_tokenizer().save_pretrained(folder / "backbone")
    for split, seed in (("train", 0), ("validation", 1)):
        for name, rows in make_datasets(seed).items():
            rows.to_parquet(folder / f"{name}-{split}.parquet")
    # The same rows with other labels, under the same name, by which the order of the rows is drawn.
    (folder / "shifted").mkdir()
    rows = make_datasets(0)["names"]
    kinds = ["O", "B-person", "B-place"]
    shifted = [[kinds[(kinds.index(tag) + 1) % 3] for tag in tags] for tags in rows["tags"]]
    rows.remove_columns("tags").add_column("tags", shifted).to_parquet(folder / "shifted" / "names-train.parquet")
    shutil.copy(folder / "names-validation.parquet", folder / "shifted")
    reviews = str(folder / "reviews-{split}.parquet")
    recipe = {
        "model": {"backbone": str(folder / "backbone"), "sharing": "hard"},
        "tasks": [
            {"name": "tone", "type": "single_label_classification", "dataset": reviews},
            {"name": "strength", "type": "regression", "dataset": reviews, "label_column": "strength"},
            {
                "name": "names",
                "type": "token_classification",
                "dataset": str(folder / "names-{split}.parquet"),
                "labels": ["O", "B-person", "B-place"],
                "auxiliary": True,
            },
        ],
        "training": {
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "seed": 3,
        },
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def finished(files):
    """A sweep that ran from beginning to end, and the folder it is in."""
    folder = files / "finished"
    lines: list[str] = []
    result = sweep_auxiliary(
        files / "job.yaml", "names", WEIGHTS, seeds=[1, 0], output=folder, primary="tone", say=lines.append
    )
    assert len(lines) == 6 and lines[1].startswith("run 2 of 6: weight 0.1, seed 0 begins in")
    return result, folder


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of that folder, to be changed."""
    return shutil.copytree(finished[1], tmp_path / "copy")


@pytest.fixture
def trained(monkeypatch):
    """The runs that are trained: name of the folder, and where from."""
    found = []
    real = module.train_recipe

    def train(recipe, resume):
        folder = os.path.dirname(recipe.training["output_dir"])
        trainers = [one for one in gc.get_objects() if type(one) is MultiTaskTrainer]
        assert not [one for one in trainers if os.path.dirname(one.args.output_dir) == folder]  # they fill the memory
        found.append((os.path.basename(recipe.training["output_dir"]), os.path.basename(resume or "")))
        return real(recipe, resume)

    monkeypatch.setattr(module, "train_recipe", train)
    return found


def repeat(files, folder, weights=WEIGHTS, **kwargs) -> AuxiliarySweep:
    return sweep_auxiliary(
        files / "job.yaml", "names", weights, output=folder, **{"seeds": [0, 1], "primary": "tone", **kwargs}
    )


def numbers(sweep: AuxiliarySweep) -> list[tuple]:
    return [(run.weight, run.seed, run.primary, run.auxiliary, run.auxiliary_loss) for run in sweep.runs]


def test_every_run_is_the_recipe_with_its_weight_and_seed(files, finished, tmp_path):
    sweep, folder = finished
    assert sweep.weights == WEIGHTS and sweep.seeds == (0, 1) and sweep.primary_name == "tone accuracy"
    assert sweep.higher_is_better and sweep.auxiliary_metric == "f1"
    settings = [f"training.output_dir={tmp_path}", "training.seed=1", "tasks.names.weight=0.3"]
    run_recipe(files / "job.yaml", settings)
    alone = json.loads((tmp_path / "results.json").read_text())["tasks"]
    run = sweep.runs[-1]
    assert (run.weight, run.seed) == (0.3, 1)
    assert run.primary == alone["tone"]["validation"]["accuracy"]
    assert run.auxiliary == alone["names"]["validation"]["f1"]
    assert run.auxiliary_loss == alone["names"]["validation"]["loss"]
    assert run.details["tasks"] == alone and run.details["steps"] == 4
    assert (folder / "weight-0.3-seed-1" / "model.safetensors").is_file()


def test_the_file_holds_recipe_versions_runs_and_summary(files, finished):
    sweep, folder = finished
    assert AuxiliarySweep.load(folder / "sweep.json").to_dict() == sweep.to_dict()
    content = json.loads((folder / "sweep.json").read_text())
    assert content["recipe"]["training"]["max_steps"] == 4 and "torch" in content["versions"]
    assert len(content["runs"]) == 6 and content["summary"]["seeds"] == [0, 1] and content["primary"] == "tone"
    assert str(files / "backbone") == content["sweep"]["backbone"]


def test_every_weight_sees_the_same_rows(finished):
    seen = {tuple((name, task["rows_seen"]) for name, task in run.details["tasks"].items()) for run in finished[0].runs}
    assert len(seen) == 1 and all(count > 0 for _, count in seen.pop())


def test_at_weight_0_the_labels_of_the_auxiliary_task_make_no_difference_and_else_they_do(files, finished, tmp_path):
    setting = f"tasks.names.dataset={files}/shifted/names-{{split}}.parquet"
    other = repeat(files, tmp_path / "other", (0.0, 0.3), settings=[setting], seeds=[0])
    for weight, equal in ((0.0, True), (0.3, False)):
        one, two = (
            next(run.details for run in sweep.runs if (run.weight, run.seed) == (weight, 0))
            for sweep in (finished[0], other)
        )
        losses = [[found["tasks"][name]["validation"]["loss"] for name in ("tone", "strength")] for found in (one, two)]
        assert (losses[0] == losses[1]) == equal
        assert one["tasks"]["tone"]["rows_seen"] == two["tasks"]["tone"]["rows_seen"]


def test_without_a_primary_task_the_average_counts_and_the_seed_is_the_recipes(files, tmp_path):
    sweep = repeat(files, tmp_path / "x", (0.1, 0), seeds=None, primary=None)
    assert sweep.primary is None and sweep.seeds == (3,) and sweep.primary_name == "average"
    for run in sweep.runs:
        tasks = run.details["tasks"]
        mean = (tasks["tone"]["validation"]["accuracy"] + tasks["strength"]["validation"]["pearson"]) / 2
        assert run.primary == pytest.approx(mean)


def test_the_recipes_primary_task_counts_with_its_own_direction(files, finished, trained, copy):
    settings = ["training.primary_task=strength", "tasks.strength.metric=mse"]
    sweep = repeat(files, copy, (0, 0.1), settings=settings, seeds=[0], primary=None)
    assert sweep.primary == "strength" and sweep.metric == "mse" and not sweep.higher_is_better
    assert sweep.runs[0].primary == finished[0].runs[0].details["tasks"]["strength"]["validation"]["mse"]


# ---- going on ----


def test_a_finished_sweep_trains_nothing_again_even_for_another_primary_task(files, finished, copy, trained):
    assert numbers(repeat(files, copy)) == numbers(finished[0])
    assert repeat(files, copy, primary="strength").metric == "pearson"
    assert trained == []


def test_only_what_is_missing_is_trained(files, finished, copy, trained):
    (copy / "weight-0.1-seed-0" / "results.json").unlink()
    shutil.rmtree(copy / "weight-0.3-seed-1")
    cut = copy / "weight-0.0-seed-1" / "results.json"
    cut.write_text(cut.read_text()[:100])  # killed while it was written
    again = repeat(files, copy)
    assert trained == [("weight-0.1-seed-0", ""), ("weight-0.0-seed-1", ""), ("weight-0.3-seed-1", "")]
    assert numbers(again) == numbers(finished[0])


def test_weights_and_seeds_can_be_added(files, copy, trained):
    sweep = repeat(files, copy, (*WEIGHTS, 0.2), seeds=[0])
    assert trained == [("weight-0.2-seed-0", "")] and sweep.weights == (0.0, 0.1, 0.2, 0.3)


@pytest.mark.slow
def test_a_run_whose_settings_changed_is_made_anew_and_what_changed_is_said(files, copy, trained, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(module.logger, "warning", said.append)
    path = copy / "weight-0.1-seed-0" / "sweep_run.json"
    run = json.loads(path.read_text())
    run["training"]["max_steps"], run["sha256"] = 2, "of other settings"
    path.write_text(json.dumps(run))
    (path.parent / "checkpoint-2").mkdir()
    repeat(files, copy)
    assert trained == [("weight-0.1-seed-0", "")] and not (path.parent / "checkpoint-2").exists()
    assert said == [f"{path.parent} is made anew: training.max_steps was 2 and is 4"]
    said.clear(), trained.clear()
    repeat(files, copy, (0, 0.1), seeds=[0], settings=["tasks.tone.weight=2", "training.max_steps=2"])
    assert len(trained) == len(said) == 2
    assert said[0].endswith("is made anew: training.max_steps was 4 and is 2; tasks.tone.weight was not set and is 2")
    assert json.loads((path.parent / "results.json").read_text())["steps"] == 2


@pytest.mark.parametrize("saves", [True, False])
@pytest.mark.sample(2)
def test_a_sweep_that_was_stopped_goes_on_as_if_it_had_not_been(files, tmp_path, trained, monkeypatch, saves):
    settings = ["training.save_strategy=steps", "training.save_steps=1"] if saves else []
    whole = repeat(files, tmp_path / "whole", (0, 0.3), seeds=[0], settings=settings)
    trained.clear()
    real = MultiTaskTrainer.training_step

    def stop(self, *args, **kwargs):
        if "weight-0.3" in self.args.output_dir and self.state.global_step == 2:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MultiTaskTrainer, "training_step", stop)
        repeat(files, tmp_path / "stopped", (0, 0.3), seeds=[0], settings=settings)
    with pytest.raises(ValueError, match="not finished"):
        AuxiliarySweep.load(tmp_path / "stopped" / "sweep.json")
    stopped = tmp_path / "stopped" / "weight-0.3-seed-0"
    assert (stopped / "checkpoint-2").is_dir() == saves and not (stopped / "results.json").exists()
    lines: list[str] = []
    sweep = repeat(files, tmp_path / "stopped", (0, 0.3), seeds=[0], settings=settings, say=lines.append)
    assert trained[2:] == [("weight-0.3-seed-0", "checkpoint-2" if saves else "")]
    assert numbers(sweep) == numbers(whole)
    assert lines[0].endswith("is there") and ("goes on from" if saves else "begins in") in lines[1]


@pytest.mark.slow
def test_a_checkpoint_of_other_settings_is_not_gone_on_from(files, tmp_path, trained):
    saving = ["training.save_strategy=steps", "training.save_steps=2"]
    repeat(files, tmp_path / "x", (0, 0.3), seeds=[0], settings=saving)
    for run in (tmp_path / "x").glob("*/results.json"):
        run.unlink()
    trained.clear()
    # The trainer itself would go on: the learning rate is nothing that a checkpoint is compared by.
    repeat(files, tmp_path / "x", (0, 0.3), seeds=[0], settings=[*saving, "training.learning_rate=0.01"])
    assert trained == [("weight-0.0-seed-0", ""), ("weight-0.3-seed-0", "")]


# ---- what does not fit ----

BAD = {
    "unknown task": (dict(auxiliary="name"), "auxiliary 'name' is no task of recipe 'job', did you mean 'names'"),
    "not auxiliary": (dict(auxiliary="tone"), "task 'tone' is not auxiliary.*auxiliary: true.*tasks.tone.auxiliary"),
    "no weights": (dict(weights=[]), "weights must be 0, .* at least one more; got none"),
    "no weight 0": (dict(weights=[0.1, 0.2]), "weights must be 0, .*; got 0.1, 0.2"),
    "weight 0 alone": (dict(weights=0), "at least one more; got 0"),
    "negative weight": (dict(weights=[0, -0.1]), "at least 0, got -0.1"),
    "weight that is no number": (dict(weights=[0, math.nan]), "finite numbers of at least 0, got nan"),
    "infinite weight": (dict(weights=[0, math.inf]), "got inf"),
    "text": (dict(weights=["0", "x"]), "got '0'"),
    "truth value": (dict(weights=[0, True]), "got True"),
    "weight twice": (dict(weights=[0, 0.1, 0.0]), "weights: 0 is there more than once"),
    "unknown primary": (dict(primary="tune"), "primary 'tune' is no task of recipe 'job', did you mean 'tone'"),
    "auxiliary primary": (dict(primary="names"), "primary 'names' is auxiliary; .* of tone, strength"),
    "primary in recipe": (
        dict(primary=None, settings=["training.primary_task=names"]),
        "training.primary_task 'names' is aux",
    ),
    "seed of half": (dict(seeds=[0, 1.5]), "seeds must be whole numbers .*, got 1.5"),
    "negative seed": (dict(seeds=[-1]), "seeds must be whole numbers .*, got -1"),
    "seed twice": (dict(seeds=[1, 1]), "seeds must be different numbers, at least one; got 1, 1"),
    "no seeds": (dict(seeds=[]), "at least one; got none"),
    "directions": (
        dict(primary=None, settings=["tasks.strength.metric=mse"]),
        "'accuracy', 'strength': 'mse'.*choose a task",
    ),
    "output twice": (dict(settings=["training.output_dir=x"]), "training.output_dir does not go with a sweep"),
    "resuming": (dict(settings=["training.resume_from_checkpoint=x"]), "resume_from_checkpoint does not go"),
    "losses only": (dict(settings=["training.prediction_loss_only=true"]), "prediction_loss_only does not go"),
    "bad setting": (dict(settings=["training.max_stepz=1"]), "did you mean 'max_steps'"),
    "unknown metric": (dict(settings=["tasks.names.metric=f2"]), "metric 'f2' is not computed"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_anything_is_written(files, tmp_path, trained, case):
    arguments, message = BAD[case]
    arguments = dict(auxiliary="names", weights=WEIGHTS, primary="tone") | arguments
    with pytest.raises(ValueError, match=message):
        sweep_auxiliary(files / "job.yaml", output=tmp_path / "out", **arguments)
    assert not trained and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("left_out", "primary", "message"),
    [
        ("reviews", "tone", "task 'tone' has no validation rows.*validation: 0.1"),
        ("reviews", None, "no task that counts has validation rows"),
        ("names", "tone", "task 'names' has no validation rows"),
    ],
)
def test_without_validation_rows_there_is_nothing_to_compare(files, tmp_path, left_out, primary, message):
    for name in ("reviews", "names"):
        for split in ("train", "validation"):
            if (name, split) != (left_out, "validation"):
                shutil.copy(files / f"{name}-{split}.parquet", tmp_path)
    recipe = (files / "job.yaml").read_text()
    for name in ("reviews", "names"):
        recipe = recipe.replace(str(files / f"{name}-"), str(tmp_path / f"{name}-"))
    (tmp_path / "job.yaml").write_text(recipe)
    with pytest.raises(ValueError, match=message):
        sweep_auxiliary(tmp_path / "job.yaml", "names", WEIGHTS, output=tmp_path / "out", primary=primary)
    assert not (tmp_path / "out").exists()


def test_the_folder_of_something_else_is_left_alone(files, copy, tmp_path, trained):
    with pytest.raises(ValueError, match="of another sweep: auxiliary was 'names' and is 'strength'"):
        sweep_auxiliary(
            files / "job.yaml", "strength", WEIGHTS, output=copy, settings=["tasks.strength.auxiliary=true"]
        )
    (tmp_path / "work.yaml").write_text((files / "job.yaml").read_text())
    with pytest.raises(ValueError, match="recipe was 'job' and is 'work'; choose another output folder"):
        sweep_auxiliary(tmp_path / "work.yaml", "names", WEIGHTS, output=copy)
    with pytest.raises(ValueError, match="is not empty, and is no folder of a sweep"):
        repeat(files, tmp_path)
    with pytest.raises(ValueError, match="is a file; choose a folder"):
        repeat(files, tmp_path / "work.yaml")
    (copy / "weight-0.2-seed-0").mkdir()
    (copy / "weight-0.2-seed-0" / "thesis.txt").write_text("all I have")
    with pytest.raises(ValueError, match="weight-0.2-seed-0' is no run of a sweep, and is left as it is"):
        repeat(files, copy, (0, 0.2))
    assert (copy / "weight-0.2-seed-0" / "thesis.txt").is_file() and not trained


def test_runs_of_different_versions_are_warned_of(files, copy, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(module.logger, "warning", said.append)
    path = copy / "weight-0.1-seed-0" / "results.json"
    results = json.loads(path.read_text())
    results["versions"]["torch"] = "2.9.0"
    path.write_text(json.dumps(results))
    sweep = repeat(files, copy)
    assert len(said) == 1 and "different versions" in said[0]
    assert [run.details["versions"]["torch"] for run in sweep.runs].count("2.9.0") == 1


def test_a_weighting_that_looks_at_all_losses_is_warned_of(files, tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(module.logger, "warning", said.append)
    sweep = repeat(files, tmp_path / "x", (0, 0.3), seeds=[0], settings=["training.loss_weighting=dwa"])
    assert len(said) == 1 and "loss_weighting 'dwa' looks at the loss of 'names' at weight 0" in said[0]
    assert all(math.isfinite(run.primary) for run in sweep.runs)


def test_a_sampling_that_follows_the_metrics_is_warned_of(files, tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(module.logger, "warning", said.append)
    settings = ["training.task_sampling=performance_gap", "training.eval_strategy=steps", "training.eval_steps=2"]
    settings.append("training.task_sampling_kwargs={scores: {tone: 0.9, strength: 0.9, names: 0.9}}")
    repeat(files, tmp_path / "x", (0, 0.3), seeds=[0], settings=settings)
    assert len(said) == 1 and "runs of different weights see other rows" in said[0]


@pytest.mark.slow
def test_at_weight_0_a_combination_that_lets_no_task_lose_still_trains_the_others(files, tmp_path):
    """A gradient of zero must not count as a task that would lose."""
    settings = ["training.gradient_combination=mgda", "training.max_steps=30", "training.learning_rate=0.01"]
    run = repeat(files, tmp_path / "x", (0, 0.3), seeds=[0], settings=settings).runs[0]
    plain = repeat(files, tmp_path / "y", (0, 0.3), seeds=[0], settings=["training.max_steps=1"]).runs[0]
    assert run.details["train_loss"] < 0.8 * plain.details["train_loss"]


# ---- the command, and several processes ----


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_takes_several_numbers_after_one_option(files, copy, trained):
    plot = copy / "plots" / "x.svg"
    given = ["sweep", "--auxiliary", "names", "--weights", 0.0, 0.1, "3e-1", "--seeds=0", 1, files / "job.yaml"]
    result = invoke(*given, "--output", copy, "--primary", "tone", "--plot", plot)
    assert result.exit_code == 0, result.output
    assert not trained and plot.is_file()
    assert str(AuxiliarySweep.load(copy / "sweep.json")) in result.stdout
    assert "run 6 of 6: weight 0.3, seed 1 is there" in result.stderr


def test_the_command_trains_below_runs_with_the_settings(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = ["--set", "training.max_steps=2", "--set", "training.learning_rate=0.1"]
    result = invoke("sweep", files / "job.yaml", "--auxiliary", "names", "--weights", 0, "--weights", 0.5, *settings)
    assert result.exit_code == 0, result.output
    sweep = AuxiliarySweep.load(tmp_path / "runs" / "job-sweep" / "sweep.json")
    assert sweep.weights == (0.0, 0.5) and sweep.recipe["training"]["learning_rate"] == 0.1
    assert [run.details["steps"] for run in sweep.runs] == [2, 2] and "One seed" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--auxiliary", "names", "--weights", "0", "-0.1"], 1, "at least 0, got -0.1"),
        (["--auxiliary", "tone", "--weights", "0", "0.1"], 1, "is not auxiliary"),
        (["--auxiliary", "names", "--weights", "0", "x"], 2, "unexpected extra argument"),
        (["--auxiliary", "names", "--weights", "0", "0.1", "--seeds", "0", "1.5"], 2, "--seeds"),
        (["--auxiliary", "names"], 2, "--weights"),
        (["--auxiliary", "names", "--weights", "0", "0.1", "--plot", "x.doc"], 1, "suffix"),
    ],
)
def test_mistakes_on_the_command_line_are_one_message(files, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    result = invoke("sweep", files / "job.yaml", *arguments)
    assert result.exit_code == code and message in result.output and "Traceback" not in result.output
    assert not (tmp_path / "runs").exists()


def test_the_help_names_every_option():
    page = invoke("sweep", "--help")
    assert page.exit_code == 0
    for option in ("--auxiliary", "--weights", "--seeds", "--primary", "--set", "--output", "--plot", "RECIPE"):
        assert option in page.output


TWICE = """
import os, sys
from hf_multitask.analysis import sweep_folder
from hf_multitask.cli.app import app

real = os.replace

def replace(old, new):
    if "sweep" in os.path.basename(new):
        print("writes", os.path.basename(new), file=sys.stderr)
    real(old, new)

os.replace = replace
for _ in range(2):
    app(sys.argv[1:], standalone_mode=False)
"""


@pytest.mark.slow
def test_several_processes_write_once_and_run_again_what_one_process_ran(files, copy):
    """Two processes make other windows of the same batches, so runs of one process are not theirs."""
    given = ["sweep", str(files / "job.yaml"), "--auxiliary", "names", "--output", str(copy), "--primary", "tone"]
    given += ["--weights", "0", "0.1", "--seeds", "0"]
    base = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    base["MASTER_PORT"] = free_port()
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", TWICE, *given],
            env=base | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    (out, err), (other_out, other_err) = [run.communicate(timeout=240) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], err + other_err
    assert err.count("is made anew: processes was 1 and is 2") == err.count("begins in") == 2
    assert err.count("is there") == 2  # the second time
    assert err.count("writes sweep_run.json") == err.count("writes sweep.json") == 2 and "writes" not in other_err
    assert "made anew" not in other_err and "begins in" not in other_err and "saturates" not in other_out
    sweep = AuxiliarySweep.load(copy / "sweep.json")
    assert out.count(str(sweep)) == 2 and [run.weight for run in sweep.runs] == [0.0, 0.1]
    assert sweep.runs[0].details["tasks"]["tone"]["rows_seen"] > 0
