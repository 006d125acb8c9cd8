"""A comparison trains what it says, once; finds it again by content; and refuses what cannot be compared."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import _SMALL, BACKBONES, make_datasets, make_tokenizer
from language import decoder_tokenizer
from questions import question_datasets
from transformers import BertConfig, BertForMaskedLM, LlamaForCausalLM
from typer.testing import CliRunner

import hf_multitask
from hf_multitask import MultiTaskTrainer, MultiTaskTrainingArguments, compare
from hf_multitask.analysis import comparison_runs
from hf_multitask.analysis.baselines import Budget, Planner, rows_hash
from hf_multitask.analysis.comparison_result import Comparison, Difference, TaskComparison
from hf_multitask.analysis.comparison_runs import build_run, finish_run
from hf_multitask.analysis.comparison_statistics import RunStatistics
from hf_multitask.cli.app import app
from hf_multitask.models.auto import SCHEMES
from hf_multitask.recipe import build, load_recipe
from hf_multitask.running import run_recipe

TASKS = ("tone", "strength", "names")


def write_recipe(folder: Path, **training) -> Path:
    """Write a backbone, data files and a recipe; return the recipe's path."""
    if not (folder / "backbone").exists():
        torch.manual_seed(0)
        BACKBONES["bert"]().save_pretrained(folder / "backbone")
        make_tokenizer().save_pretrained(folder / "backbone")
        for split, seed in (("train", 0), ("validation", 1)):
            for name, rows in make_datasets(seed, 80).items():
                rows.to_parquet(folder / f"{name}-{split}.parquet")
    reviews = str(folder / "reviews-{split}.parquet")
    recipe = {
        "model": {"backbone": str(folder / "backbone"), "sharing": "hard", "head_dropout": 0.1},
        "tasks": [
            {"name": "tone", "type": "single_label_classification", "dataset": reviews},
            {"name": "strength", "type": "regression", "dataset": reviews, "label_column": "strength", "weight": 0.5},
            {
                "name": "names",
                "type": "token_classification",
                "dataset": str(folder / "names-{split}.parquet"),
                "metric": "accuracy",
            },
        ],
        "training": {
            "output_dir": str(folder / "out"),
            "max_steps": 10,
            "per_device_train_batch_size": 8,
            "learning_rate": 2e-3,
            "warmup_steps": 2,
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            **training,
        },
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder / "job.yaml"


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A recipe and its comparison over two seeds, with another mixing."""
    folder = tmp_path_factory.mktemp("comparison")
    path = write_recipe(folder)
    lines: list[str] = []
    result = compare(path, seeds=(0, 1), output=folder / "compared", against=["uniform"], say=lines.append)
    return folder, result, lines


@pytest.fixture
def copy(first, tmp_path):
    """The same in folders of one's own: (recipe, output)."""
    shutil.copytree(first[0] / "compared", tmp_path / "compared")
    return first[0] / "job.yaml", tmp_path / "compared"


@pytest.fixture
def count_trainings(monkeypatch):
    """Names of the runs that are trained from now on."""
    names: list[str] = []
    train = comparison_runs._train

    def note(run, *arguments):
        names.append(run.name)
        return train(run, *arguments)

    monkeypatch.setattr(comparison_runs, "_train", note)
    return names


def test_the_rows_that_are_judged_are_those_of_the_trained_run(tmp_path):
    """Of both the same hash is written down, so that a report may set one beside the other."""
    path = write_recipe(tmp_path, max_eval_samples=10)
    run_recipe(path)
    found = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]
    whole = make_planner(path, ["training.max_eval_samples=null"])
    planner = make_planner(path)
    for task in TASKS:
        assert planner.rows[task]["validation"] == found[task]["rows_sha256"]["validation"]
        assert planner.rows[task]["validation"] != whole.rows[task]["validation"]
        assert planner.rows[task]["train"] == whole.rows[task]["train"]


# What is trained


def test_every_run_is_made_and_told_of(first):
    folder, result, lines = first
    expected = {f"{kind}-seed-{seed}" for seed in (0, 1) for kind in ("multi", "uniform")}
    expected |= {f"single-{task}-seed-{seed}" for seed in (0, 1) for task in TASKS}
    runs = [path.name.rpartition("-")[0] for path in (folder / "compared" / "runs").iterdir()]
    assert sorted(runs) == sorted(expected)
    assert {line.split()[1] for line in lines if line.startswith("training")} == expected
    assert [task.task for task in result.tasks] == list(TASKS) and result.seeds == (0, 1)
    assert [task.metric for task in result.tasks] == ["accuracy", "pearson", "accuracy"]
    assert not list((folder / "compared" / "runs").glob("*.part")) and not (folder / "out").exists()
    assert not list((folder / "compared").rglob("model.safetensors"))


def test_the_multi_task_run_is_the_recipes_own(first, tmp_path):
    folder, result, _ = first
    run_recipe(folder / "job.yaml", ["training.seed=1", f"training.output_dir={tmp_path / 'run'}"])
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    for task in result.tasks:
        assert task.multi_by_seed["1"] == found["tasks"][task.task]["validation"][task.metric]


def test_a_baseline_is_a_model_of_its_task_alone(first, tmp_path):
    """The same numbers as from a trainer that knows nothing of any other task."""
    folder, result, _ = first
    task = next(task for task in result.tasks if task.task == "strength")
    settings = ["training.seed=0", f"training.max_steps={task.budget['steps']}", "tasks.strength.weight=1"]
    settings += [f"training.per_device_train_batch_size={task.budget['batch_size']}"]
    recipe = load_recipe(folder / "job.yaml", [*settings, f"training.output_dir={tmp_path / 'alone'}"])
    parts = build(replace(recipe, tasks=[recipe.tasks[1]]))
    trainer = MultiTaskTrainer(
        parts.model, parts.args, train_dataset=parts.datasets["train"], processing_class=parts.tokenizer
    )
    trainer.train()
    metrics = trainer.evaluate(parts.datasets["validation"])
    assert task.single_by_seed["0"] == metrics["eval_strength_pearson"]


def test_a_baseline_reads_as_many_rows_in_as_many_steps(first):
    folder, result, _ = first
    for path in (folder / "compared" / "runs").glob("single-*"):
        single = json.loads((path / "run.json").read_text())
        seed = single["name"][-1]
        (multi,) = (folder / "compared" / "runs").glob(f"multi-seed-{seed}-*")
        multi = json.loads((multi / "run.json").read_text())
        (task,) = single["rows_seen"]
        budget = next(t for t in result.tasks if t.task == task).budget
        assert budget["rows"] == multi["rows_seen"][task]
        assert abs(single["rows_seen"][task] - multi["rows_seen"][task]) <= budget["batch_size"] / 2
        assert single["steps"] == budget["steps"] and abs(single["steps"] - multi["steps"]) <= 2
        training = single["content"]["training"]
        assert training["warmup_steps"] == 2 and training["learning_rate"] == 2e-3


@pytest.mark.parametrize(
    ("rows", "steps", "batch", "expected"),
    [
        (280 * 24, 280, 24, (24, 1, 280)),  # a single task: the run itself
        (2016, 280, 24, (7, 1, 288)),
        (100, 280, 24, (1, 1, 100)),  # less than a row per step: as many updates as rows
        (10 * 50, 10, 24, (17, 3, 10)),  # accumulated: 50 rows per step in micro-batches of at most 24
        (1, 300, 8, (1, 1, 1)),
    ],
)
def test_budgets(rows, steps, batch, expected):
    budget = Budget.of_run(rows, steps, batch)
    assert (budget.batch_size, budget.accumulation, budget.steps) == expected
    assert abs(budget.batch_size * budget.accumulation * budget.steps - rows) <= budget.batch_size * budget.accumulation


def test_steps_that_are_counted_are_scaled_for_a_baseline_with_fewer(first):
    settings = ["training.warmup_steps=100", "training.max_steps=300", "training.load_best_model_at_end=true"]
    settings += ["training.eval_strategy=steps", "training.eval_steps=60", "training.save_strategy=steps"]
    settings += ["training.save_steps=60", "training.metric_for_best_model=tone_accuracy"]
    planner = make_planner(first[0] / "job.yaml", settings)
    training = planner.single(planner.tasks[0], 0, rows=30, steps=300).recipe.training
    assert training["max_steps"] == 30 and training["warmup_steps"] == 10
    assert training["eval_steps"] == training["save_steps"] == 6 and training["metric_for_best_model"] is None
    same = planner.single(planner.tasks[0], 0, rows=3000, steps=300).recipe.training
    assert same["warmup_steps"] == 100 and same["eval_steps"] == 60
    part = make_planner(first[0] / "job.yaml", ["training.warmup_steps=0.06"])
    assert part.single(part.tasks[0], 0, rows=30, steps=300).recipe.training["warmup_steps"] == 0.06


# Found again by content


def make_planner(path: Path, settings=()) -> Planner:
    recipe = load_recipe(path, settings)
    return Planner(recipe, build(recipe))


def keys(path: Path, settings=()) -> dict[str, str]:
    planner = make_planner(path, settings)
    found = {"multi": planner.multi(0).key, "uniform": planner.multi(0, "uniform").key}
    return found | {
        task.name: planner.single(task, 0, 100, 10).key
        for task in planner.tasks
        if not (task.auxiliary or task.held_out)
    }


EVERYTHING = {"multi", "uniform", *TASKS}
CHANGES = {
    "nothing": ([], set()),
    "where it is written": (["training.output_dir=elsewhere", "training.run_name=x"], set()),
    "how it is logged": (["training.logging_steps=3", "training.report_to=none", "training.save_steps=7"], set()),
    "evaluations that decide nothing": (["training.eval_strategy=steps", "training.eval_steps=5"], set()),
    "loaders": (["training.dataloader_num_workers=1", "training.per_device_eval_batch_size=3"], set()),
    "sampling": (["training.task_sampling=proportional"], {"multi"}),
    "weighting": (["training.loss_weighting=uncertainty"], {"multi", "uniform"}),
    "combination": (["training.gradient_combination=pcgrad"], {"multi", "uniform"}),
    "a weight": (["tasks.tone.weight=3"], {"multi", "uniform"}),
    "a head": (["tasks.names.head=linear"], {"multi", "uniform", "names"}),
    "what is compared": (["tasks.strength.metric=mse", "tasks.tone.metric=loss"], set()),
    "a length": (["tasks.tone.max_length=7"], {"multi", "uniform", "tone"}),
    "the learning rate": (["training.learning_rate=1e-3"], EVERYTHING),
    "accumulation": (["training.gradient_accumulation_steps=2"], {"multi", "uniform"}),
    "the scheme": (["model.sharing=conditioned"], {"multi", "uniform"}),
    "an option of all": (["model.head_dropout=0.2"], EVERYTHING),
    "the seed of the rows": (["training.data_seed=5"], EVERYTHING),
}


@pytest.mark.parametrize("case", CHANGES)
@pytest.mark.sample(3)
def test_a_change_reaches_the_runs_that_depend_on_it_and_no_others(first, case):
    settings, expected = CHANGES[case]
    before, now = keys(first[0] / "job.yaml"), keys(first[0] / "job.yaml", settings)
    assert {name for name in before if before[name] != now[name]} == expected


def test_other_rows_backbones_and_budgets_are_other_runs(tmp_path):
    path = write_recipe(tmp_path)
    before = keys(path)
    names = make_datasets(1, 80)["names"]
    names = names.map(lambda row, i: {"tags": ["O"] * len(row["tags"])} if i == 0 else {}, with_indices=True)
    names.to_parquet(tmp_path / "names-validation.parquet")
    now = keys(path)
    assert {name for name in before if before[name] != now[name]} == {"multi", "uniform", "names"}
    torch.manual_seed(12345)
    BACKBONES["bert"]().save_pretrained(tmp_path / "backbone")
    assert all(now[name] != key for name, key in keys(path).items())
    planner = make_planner(path)
    runs = [planner.single(planner.tasks[0], 0, rows, 10) for rows in (100, 101)]
    assert runs[0].key != runs[1].key and planner.multi(0).key != planner.multi(1).key


def test_the_hash_of_rows_is_that_of_their_values_in_their_order(tmp_path):
    rows = make_datasets(0, 40)["reviews"]
    columns = ["text", "label"]
    whole = rows_hash(rows, columns)
    rows.to_parquet(tmp_path / "x.parquet")
    assert whole == rows_hash(type(rows).from_parquet(str(tmp_path / "x.parquet"), cache_dir=str(tmp_path)), columns)
    assert whole == rows_hash(rows.select([*range(40)][::-1]).select([*range(40)][::-1]), columns)
    assert whole != rows_hash(rows.select(range(39, -1, -1)), columns)
    assert whole != rows_hash(rows, ["text", "strength"])


def test_a_second_time_nothing_is_trained_and_the_numbers_are_the_same(copy, first, count_trainings):
    recipe, output = copy
    again = compare(recipe, seeds=(0, 1), output=output, against="uniform")
    assert count_trainings == [] and again.to_dict() == first[1].to_dict()
    assert json.loads((output / "comparison.json").read_text()) == json.loads(json.dumps(first[1].to_dict()))


def test_a_change_trains_again_what_it_reaches(copy, count_trainings):
    recipe, output = copy
    compare(recipe, seeds=(0, 1), output=output, settings=["tasks.names.head=linear"])
    assert set(count_trainings) == {f"{run}-seed-{seed}" for run in ("multi", "single-names") for seed in (0, 1)}
    count_trainings.clear()
    compare(recipe, seeds=[2], output=output)
    assert set(count_trainings) == {"multi-seed-2", *(f"single-{task}-seed-2" for task in TASKS)}


def test_an_interrupted_comparison_goes_on_with_what_it_lacks(first, tmp_path, monkeypatch, count_trainings):
    saved, stopped = comparison_runs.save_file, []

    def stop(*arguments, **options):
        if len(count_trainings) == 3:
            stopped.append(True)
            raise KeyboardInterrupt
        return saved(*arguments, **options)

    monkeypatch.setattr(comparison_runs, "save_file", stop)
    options = dict(seeds=(0, 1), output=tmp_path / "compared")
    with pytest.raises(KeyboardInterrupt):
        compare(first[0] / "job.yaml", **options)
    assert stopped and count_trainings == ["multi-seed-0", "single-tone-seed-0", "single-strength-seed-0"]
    assert list((tmp_path / "compared" / "runs").glob("*.part"))
    monkeypatch.setattr(comparison_runs, "save_file", saved)
    result = compare(first[0] / "job.yaml", **options)
    assert count_trainings[3:5] == ["single-strength-seed-0", "single-names-seed-0"] and len(count_trainings) == 9
    assert not list((tmp_path / "compared" / "runs").glob("*.part"))
    assert [t.multi_by_seed for t in result.tasks] == [t.multi_by_seed for t in first[1].tasks]
    assert [t.interval for t in result.tasks] == [t.interval for t in first[1].tasks]


# The numbers


def test_the_numbers_belong_together(first):
    _, result, _ = first
    for task in result.tasks:
        assert task.multi == pytest.approx(np.mean([*task.multi_by_seed.values()]))
        assert task.difference == pytest.approx(task.multi - task.single)
        for seed, value in task.by_seed.items():
            assert value == pytest.approx(task.multi_by_seed[seed] - task.single_by_seed[seed])
        assert task.interval[0] <= task.difference <= task.interval[1]
        assert task.seed_spread == pytest.approx(np.std([*task.by_seed.values()], ddof=1))
        assert task.margin == pytest.approx(0.02 * abs(task.single))
    assert [task.examples for task in result.tasks] == [80, 80, 21]
    changes = [task.difference / abs(task.single) for task in result.tasks]
    assert result.delta_m["value"] == pytest.approx(np.mean(changes))
    low, high = result.delta_m["interval"]
    assert low < result.delta_m["value"] < high
    uniform = result.against["uniform"]
    for task in result.tasks:
        assert uniform["tasks"][task.task].difference == pytest.approx(task.multi - uniform["metrics"][task.task])


def test_both_models_are_judged_on_the_same_draws(first):
    """A model against itself: no draw shows a difference, though its metric varies from draw to draw."""
    planner = make_planner(first[0] / "job.yaml")
    parts, folder = build(planner.recipe), first[0] / "compared" / "runs"
    runs = {task: [finish_run(planner.multi(seed), parts, folder) for seed in (0, 1)] for task in TASKS}
    statistics = RunStatistics(planner.tasks, {"multi": runs, "single": runs}, (0, 1), 0.02, 200, 0.95, {})
    budgets = dict.fromkeys(TASKS, Budget(1, 1, 1, 1))
    for task in statistics.tasks_against_baselines(budgets):
        assert task.difference == 0 and task.interval == (0, 0) and task.verdict == "equal"
    assert statistics.delta_m() == {"value": 0.0, "interval": [0.0, 0.0]}
    drawn = statistics._draws["multi"]
    assert (drawn.std(-1) > 0.005).all()
    # Tasks on the same rows are drawn together, so that what both find hard does not count twice in Δm.
    mean = (drawn[0, 0] + drawn[1, 0]).std() - np.hypot(drawn[0, 0].std(), drawn[1, 0].std())
    assert abs(mean) > 1e-6


def test_less_is_better_where_it_is(copy, count_trainings):
    recipe, output = copy
    settings = ["tasks.strength.metric=mse", "tasks.tone.metric=loss"]
    result = compare(recipe, seeds=(0, 1), settings=settings, output=output)
    assert count_trainings == [] and [task.metric for task in result.tasks] == ["loss", "mse", "accuracy"]
    for task in result.tasks[:2]:
        assert not task.greater_is_better and task.difference == pytest.approx(task.single - task.multi)
    assert "less is better for tone, strength" in str(result)


def test_the_cost_is_that_of_the_models(first):
    _, result, _ = first
    backbone = BACKBONES["bert"]()
    encoder = sum(p.numel() for name, p in backbone.named_parameters() if not name.startswith("pooler"))
    cost = result.cost
    heads = cost["parameters"]["multi"] - encoder
    assert heads > 0 and cost["parameters"]["single"] == 3 * encoder + heads
    assert cost["trained_parameters"] == cost["parameters"]
    assert 0.3 < cost["saved_mib"]["multi"] / cost["saved_mib"]["single"] < 0.5
    assert cost["saved_mib"]["multi"] >= 4 * cost["parameters"]["multi"] / 2**20
    assert cost["inference_rows"] == 80 + 21 and cost["inference_seconds"]["multi"] > 0
    assert cost["inference_seconds"]["multi"] < cost["inference_seconds"]["single"]
    assert cost["train_seconds"]["multi"] > 0


def test_one_seed_says_that_intervals_are_over_examples_only(copy):
    recipe, output = copy
    result = compare(recipe, seeds=[1], output=output)
    assert all(task.interval == task.interval_over_examples and task.seed_spread is None for task in result.tasks)
    assert any("one seed: intervals are over examples only" in note for note in result.to_dict()["notes"])
    assert "one seed: intervals are over examples only" in str(result) and "±" not in str(result)


def test_metrics_of_ones_own_are_compared(first, tmp_path, count_trainings):
    def mine(prediction):
        return {"mine": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean()) * 100}

    options = dict(seeds=[0], resamples=100, output=tmp_path / "compared")
    with pytest.raises(ValueError, match="task 'tone'.*Task.metric=.*greater_is_better"):
        compare(first[0] / "job.yaml", compute_metrics={"tone": mine}, **options)
    options["settings"] = ["tasks.tone.greater_is_better=true"]
    task = compare(first[0] / "job.yaml", compute_metrics={"tone": mine}, **options).tasks[0]
    assert task.metric == "mine" and task.multi > 1 and task.interval[0] <= task.difference <= task.interval[1]
    trained = len(count_trainings)
    other = {"tone": lambda prediction: {"half": mine(prediction)["mine"] / 2}}
    again = compare(first[0] / "job.yaml", compute_metrics=other, **options).tasks[0]
    down = {**options, "settings": ["tasks.tone.greater_is_better=false"]}
    turned = compare(first[0] / "job.yaml", compute_metrics=other, **down).tasks[0]
    assert turned.difference == -again.difference and not turned.greater_is_better
    assert again.metric == "half" and again.multi == task.multi / 2 and len(count_trainings) == trained > 0
    nan = {"tone": lambda prediction: {"half": float("nan")}}
    with pytest.raises(ValueError, match="compute_metrics gives half nan for multi-seed-0"):
        compare(first[0] / "job.yaml", compute_metrics=nan, **options)


# Verdicts and the rule


def make(task: str, low: float, high: float, margin: float = 0.01) -> TaskComparison:
    middle = (low + high) / 2
    return TaskComparison(
        difference=middle,
        interval=(low, high),
        interval_over_examples=(low, high),
        by_seed={"0": middle, "1": middle},
        seed_spread=0.0,
        margin=margin,
        task=task,
        metric="accuracy",
        greater_is_better=True,
        multi=0.8 + middle,
        single=0.8,
        multi_by_seed={"0": 0.8 + middle, "1": 0.8 + middle},
        single_by_seed={"0": 0.8, "1": 0.8},
        examples=100,
        budget={"rows": 10, "batch_size": 1, "accumulation": 1, "steps": 10},
    )


BETTER, EQUAL, WORSE = make("a", 0.02, 0.05), make("b", -0.005, 0.008), make("c", -0.05, -0.02)
OPEN_ABOVE, OPEN_BELOW = make("d", -0.005, 0.05), make("e", -0.05, 0.005)


def make_comparison(*tasks: TaskComparison, critical=None) -> Comparison:
    return Comparison(
        tasks=tasks,
        seeds=(0, 1),
        delta_m={"value": 0.01, "interval": [-0.01, 0.03]},
        critical_tasks=tuple(critical or (task.task for task in tasks)),
        cost={"parameters": {"multi": 10, "single": 20}},
        settings={"margin": 0.0125, "confidence": 0.95, "resamples": 1000},
    )


RULE = {
    "all match or beat": ((BETTER, EQUAL), None, True, "deploy: it matches or beats every baseline"),
    "one is worse": ((BETTER, WORSE), None, False, "do not deploy; worse than its baseline: c"),
    "the worse is not critical": ((BETTER, WORSE), ["a"], True, "worse, but not critical: c"),
    "the worse is critical": ((BETTER, WORSE), ["c"], False, "worse than its baseline: c"),
    "equal or better": ((EQUAL, OPEN_ABOVE), None, True, "(d: equal or better, which of them is open)"),
    "may be worse": ((EQUAL, OPEN_BELOW), None, False, "may be worse by more than 1.2% of its metric: e"),
    "worse and open": ((WORSE, OPEN_BELOW), None, False, "worse than its baseline: c; may be worse"),
}


@pytest.mark.parametrize("case", RULE)
def test_the_rule_names_the_critical_task(case):
    tasks, critical, deploy, words = RULE[case]
    found = make_comparison(*tasks, critical=critical)
    assert found.deploy is deploy and words in found.reason and found.reason in str(found)
    assert found.to_dict()["deploy"] is deploy


def test_verdicts_files_and_tables(tmp_path, first):
    found = make_comparison(BETTER, EQUAL, WORSE, OPEN_ABOVE)
    assert found.verdicts == {"a": "better", "b": "equal", "c": "worse", "d": "undecided"}
    for one in (found, first[1]):
        one.save(tmp_path / "comparison.json")
        again = Comparison.load(tmp_path / "comparison.json")
        assert again == one and again.table() == one.table() == str(one)
    text = str(first[1])
    for word in ("tone", "accuracy", "Δm", "against uniform mixing", "parameters", "inference, s for 101 rows"):
        assert word in text
    assert isinstance(first[1].against["uniform"]["tasks"]["tone"], Difference)


# Other recipes


@pytest.mark.slow
def test_a_validation_split_off_the_training_rows_is_the_same_for_every_seed(tmp_path, first):
    data = {"path": "parquet", "data_files": {"train": str(first[0] / "reviews-train.parquet")}, "validation": 0.25}
    recipe = yaml.safe_load((first[0] / "job.yaml").read_text())
    for task in recipe["tasks"][:2]:
        task["dataset"] = data
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    found = compare(tmp_path / "job.yaml", seeds=(0, 1), output=tmp_path / "compared")
    assert found.tasks[0].examples == 20
    parts = build(load_recipe(tmp_path / "job.yaml"))
    planner = Planner(load_recipe(tmp_path / "job.yaml"), parts)
    texts = [build_run(planner.multi(seed), parts, tmp_path).datasets["validation"] for seed in (0, 1)]
    assert list(texts[0].values())[0]["text"] == list(texts[1].values())[0]["text"]


def test_rows_stay_in_their_order_where_training_groups_them_by_length(tmp_path, first):
    planner = make_planner(first[0] / "job.yaml", ["training.train_sampling_strategy=group_by_length"])
    parts = build(planner.recipe)
    run = finish_run(planner.multi(0), parts, tmp_path)
    strength = run.outputs("strength").labels[:, 0]
    assert strength.tolist() == parts.datasets["validation"]["reviews"]["strength"]


@pytest.mark.slow
def test_the_best_checkpoint_is_judged_where_the_recipe_asks_for_it(tmp_path):
    picking = dict(eval_strategy="steps", eval_steps=5, save_strategy="steps", save_steps=5, primary_task="tone")
    path = write_recipe(tmp_path, **picking, load_best_model_at_end=True, learning_rate=0.05)
    found = compare(path, seeds=[0], output=tmp_path / "compared")
    run_recipe(path, ["training.seed=0"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found.tasks[0].multi == results["tasks"]["tone"]["validation"]["accuracy"]
    assert not list((tmp_path / "compared").rglob("checkpoint-*"))


def test_an_auxiliary_task_has_no_baseline(tmp_path, first):
    settings = ["tasks.names.auxiliary=true"]
    found = compare(first[0] / "job.yaml", seeds=[0], settings=settings, output=tmp_path / "compared")
    assert list(found.verdicts) == ["tone", "strength"]
    assert not list((tmp_path / "compared" / "runs").glob("single-names*"))
    with pytest.raises(ValueError, match="critical_tasks: 'names' is no task that has a baseline; tasks are tone, str"):
        compare(first[0] / "job.yaml", seeds=[0], settings=settings, critical_tasks=["names"], output=tmp_path / "x")


@pytest.mark.parametrize("sharing", [s if s == "adapter" else pytest.param(s, marks=pytest.mark.slow) for s in SCHEMES])
def test_every_scheme_has_its_baselines(tmp_path, first, sharing):
    settings = [f"model.sharing={sharing}", "training.max_steps=2"]
    planner = make_planner(first[0] / "job.yaml", settings)
    alone = planner.single(planner.tasks[0], 0, 10, 2).recipe
    assert alone.model["sharing"] == (sharing if sharing in ("adapter", "prefix") else "hard")
    found = compare(first[0] / "job.yaml", seeds=[0], settings=settings, output=tmp_path / "compared")
    assert found.cost["parameters"]["multi"] > 0 and len(found.verdicts) == 3


def write_tasks(folder: Path, backbone, tasks: list[dict], datasets: dict, **training) -> Path:
    """Write a recipe of other tasks over another backbone."""
    path = write_recipe(folder, max_steps=3, **training)
    torch.manual_seed(0)
    backbone.save_pretrained(folder / "backbone")
    for name, parts in datasets.items():
        for split, rows in zip(("train", "validation"), parts, strict=True):
            rows.to_json(folder / f"{name}-{split}.jsonl")
    recipe = yaml.safe_load(path.read_text())
    recipe["tasks"] = [recipe["tasks"][0], *({**t, "dataset": f"{folder}/{t['dataset']}"} for t in tasks)]
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def check_numbers(path: Path, output: Path, metrics: dict[str, str], examples: dict[str, int]) -> Comparison:
    """Check that a comparison of one seed has the metrics that a plain run has, of as many examples."""
    found = compare(path, seeds=[0], output=output)
    run_recipe(path, ["training.seed=0"])
    results = json.loads((path.parent / "out" / "results.json").read_text())["tasks"]
    for task in found.tasks:
        assert task.metric == metrics[task.task] and task.examples == examples[task.task]
        assert task.multi == pytest.approx(results[task.task]["validation"][task.metric], abs=1e-12)
        assert task.interval[0] <= task.difference <= task.interval[1]
    assert found.cost["inference_seconds"]["single"] > 0
    return found


def test_questions_choices_and_hidden_words_are_compared(tmp_path):
    tasks = [
        {"name": "who", "type": "question_answering", "dataset": "who-{split}.jsonl", "max_length": 24, "stride": 6},
        {"name": "next", "type": "multiple_choice", "dataset": "next-{split}.jsonl"},
        {"name": "hidden", "type": "masked_lm", "dataset": "reviews-{split}.parquet", "metric": "perplexity"},
    ]
    parts = [question_datasets(seed, who=30, next=20) for seed in (0, 1)]
    datasets = {name: [part[name] for part in parts] for name in ("who", "next")}
    config = BertConfig(**_SMALL, type_vocab_size=2)
    path = write_tasks(tmp_path, BertForMaskedLM(config), tasks, datasets)
    metrics = {"tone": "accuracy", "who": "f1", "next": "accuracy", "hidden": "perplexity"}
    found = check_numbers(path, tmp_path / "compared", metrics, {"tone": 80, "who": 30, "next": 20, "hidden": 80})
    assert not found.tasks[3].greater_is_better
    with pytest.raises(ValueError, match="task 'who': answers to questions are not kept"):
        compare(path, settings=["tasks.who.metric=f1"], compute_metrics={"who": len}, output=tmp_path / "x")


def test_targets_of_a_closed_set_are_compared(tmp_path):
    tasks = [
        {
            "name": "mood",
            "type": "causal_lm",
            "dataset": "reviews-{split}.parquet",
            "label_column": "label",
            "labels": ["negative", "positive"],
            "prompt": "{text} it was",
        }
    ]
    path = write_tasks(
        tmp_path, LlamaForCausalLM(BACKBONES["llama"]().config), tasks, {}, predict_with_generate=True, packing=True
    )
    decoder_tokenizer().save_pretrained(tmp_path / "backbone")
    metrics = {"tone": "accuracy", "mood": "label_accuracy"}
    check_numbers(path, tmp_path / "compared", metrics, {"tone": 80, "mood": 80})


def test_sampling_takes_its_scores_from_the_comparison(first, tmp_path):
    folder, result, _ = first
    kwargs = {"comparison": str(folder / "compared" / "comparison.json"), "relative": False}
    parts = build(
        load_recipe(
            folder / "job.yaml",
            ["training.task_sampling=performance_gap", f"training.task_sampling_kwargs={json.dumps(kwargs)}"]
            + ["training.eval_strategy=steps", "training.eval_steps=5", f"training.output_dir={tmp_path}"],
        )
    )
    trainer = MultiTaskTrainer(
        parts.model,
        parts.args,
        train_dataset=parts.datasets["train"],
        eval_dataset=parts.datasets["validation"],
        processing_class=parts.tokenizer,
    )
    assert trainer.gap_sampling.scores == {task.task: task.single for task in result.tasks}
    trainer.train()
    assert list(trainer.share_changes.by_step) == [15, 20]


# What is refused


ARGUMENTS = {
    "seed twice": (dict(seeds=[0, 0]), "seeds must be at least one, and each only once"),
    "no seed": (dict(seeds=[]), "seeds must be at least one"),
    "a word": (dict(seeds=["0"]), "seeds must be whole numbers of at least 0, got '0'"),
    "negative": (dict(seeds=[-1]), "seeds must be whole numbers of at least 0, got -1"),
    "margin": (dict(margin=2), r"margin is a part of the baseline's metric, in \[0, 1\), got 2"),
    "resamples": (dict(resamples=10), "resamples must be a whole number of at least 100, got 10"),
    "confidence": (dict(confidence=95), "confidence must lie between 0 and 1, got 95"),
    "no such task": (dict(critical_tasks=["tome"]), "critical_tasks: 'tome' is no task .*, did you mean 'tone'"),
    "no critical task": (dict(critical_tasks=[]), "critical_tasks is empty"),
    "no such mixing": (dict(against=["unifrom"]), "against: 'unifrom' is no mixing strategy, did you mean 'uniform'"),
    "a mixing with arguments": (dict(against=["capped"]), "against: 'capped' needs arguments of its own"),
    "a mixing with scores": (dict(against=["performance_gap"]), "'performance_gap' needs arguments of its own"),
    "a single task": (dict(settings=["tasks=[{name: tone, type: regression, dataset: DATA}]"]), "is its own baseline"),
    "a setting": (dict(settings=["training.max_stepz=3"]), "did you mean 'max_steps'"),
    "a metric": (dict(compute_metrics={"tine": len}), "compute_metrics: 'tine' is no task, did you mean 'tone'"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_bad_arguments_are_named_before_anything_is_trained(first, tmp_path, count_trainings, case):
    options, message = ARGUMENTS[case]
    options = dict(options)
    if "settings" in options:
        data = f'"{first[0]}/reviews-{{split}}.parquet", label_column: strength'
        options["settings"] = [setting.replace("DATA", data) for setting in options["settings"]]
    with pytest.raises(ValueError, match=message):
        compare(first[0] / "job.yaml", output=tmp_path / "compared", **options)
    assert count_trainings == [] and not (tmp_path / "compared").exists()


def test_a_task_without_validation_rows_is_named(tmp_path, count_trainings):
    path = write_recipe(tmp_path)
    (tmp_path / "names-validation.parquet").unlink()
    with pytest.raises(ValueError, match=r"no validation rows for the task\(s\) names.* validation: 0.1"):
        compare(path, output=tmp_path / "compared")
    assert count_trainings == []


def test_a_task_without_a_baseline_is_named(first):
    planner = make_planner(first[0] / "job.yaml")
    parts, folder = build(planner.recipe), first[0] / "compared" / "runs"
    multi = [finish_run(planner.multi(seed), parts, folder) for seed in (0, 1)]
    runs = {"multi": {task: multi for task in TASKS}, "single": {"tone": multi}}
    with pytest.raises(ValueError, match="task 'strength': 0 of 2 seeds have a baseline"):
        RunStatistics(planner.tasks, runs, (0, 1), 0.02, 100, 0.95, {})


def test_several_processes_are_refused(first, tmp_path, monkeypatch):
    monkeypatch.setattr(MultiTaskTrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="on one process; start it without a launcher"):
        compare(first[0] / "job.yaml", output=tmp_path / "compared")


def test_a_metric_that_is_not_of_single_rows_is_refused(first, tmp_path):
    settings = ["tasks.tone={name: tone, type: causal_lm, dataset: DATA, metric: rouge_l}"]
    settings = [settings[0].replace("DATA", f"'{first[0]}/reviews-{{split}}.parquet'")]
    config = LlamaForCausalLM(BACKBONES["llama"]().config)
    config.save_pretrained(tmp_path / "decoder")
    make_tokenizer().save_pretrained(tmp_path / "decoder")
    with pytest.raises(ValueError, match="task 'tone': rouge_l comes from texts that a model writes"):
        compare(
            first[0] / "job.yaml",
            settings=[*settings, f"model.backbone={tmp_path / 'decoder'}"],
            output=tmp_path / "compared",
        )


def test_output_that_is_a_file_and_settings_of_a_read_recipe_are_refused(first, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; choose a folder"):
        compare(first[0] / "job.yaml", output=tmp_path / "file")
    with pytest.raises(ValueError, match="this recipe was read already"):
        compare(load_recipe(first[0] / "job.yaml"), settings=["training.seed=3"], output=tmp_path / "x")


def spoil(path: Path, change) -> None:
    content = json.loads((path / "run.json").read_text())
    change(content)
    (path / "run.json").write_text(json.dumps(content))


SPOILT = {
    "NaN": (lambda p: spoil(p, lambda c: c["metrics"]["tone"].update(accuracy=float("nan"))), "'accuracy' of task 'to"),
    "missing": (lambda p: spoil(p, lambda c: c["metrics"]["tone"].pop("accuracy")), "task 'tone' has no metric 'accu"),
    "a whole task": (lambda p: spoil(p, lambda c: c["metrics"].clear()), "task 'tone' has no metric"),
    "a key": (lambda p: spoil(p, lambda c: c.pop("steps")), "run.json lacks 'steps'"),
    "another run": (lambda p: spoil(p, lambda c: c.update(key="0" * 64)), "it is of another run"),
    "other data": (
        lambda p: spoil(p, lambda c: c["rows"].update(tone="1" * 64)),
        "task 'tone': .* were judged on different validation rows .*, which cannot be compared",
    ),
    "other numbers": (
        lambda p: spoil(p, lambda c: c["metrics"]["tone"].update(accuracy=0.123456)),
        "its predictions give accuracy .* and 0.123456 is recorded",
    ),
    "cut off": (lambda p: (p / "run.json").write_text('{"name": "sin'), "it cannot be read"),
    "no description": (lambda p: (p / "run.json").unlink(), "run.json is missing"),
    "no predictions": (lambda p: (p / "predictions.safetensors").unlink(), "predictions.safetensors is missing"),
    "broken predictions": (lambda p: (p / "predictions.safetensors").write_bytes(b"x" * 40), "it cannot be read"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_damaged_run_folder_is_named_and_not_trusted(copy, count_trainings, case):
    recipe, output = copy
    change, message = SPOILT[case]
    (folder,) = (output / "runs").glob("single-tone-seed-0-*")
    change(folder)
    with pytest.raises(ValueError, match=message) as error:
        compare(recipe, seeds=(0, 1), output=output)
    assert "delete" in str(error.value) and folder.name in str(error.value) and count_trainings == []
    shutil.rmtree(folder)
    compare(recipe, seeds=(0, 1), output=output)
    assert count_trainings == ["single-tone-seed-0"]


def test_labels_that_differ_are_other_data(copy):
    from safetensors.numpy import load_file, save_file

    recipe, output = copy
    (folder,) = (output / "runs").glob("single-strength-seed-0-*")
    tensors = load_file(folder / "predictions.safetensors")
    order = np.arange(80)[::-1]
    save_file(
        {name: np.ascontiguousarray(part[order]) for name, part in tensors.items()}, folder / "predictions.safetensors"
    )
    with pytest.raises(ValueError, match="task 'strength': .* have different labels, row by row"):
        compare(recipe, seeds=(0, 1), output=output)


# The command


def test_the_command(copy, count_trainings):
    recipe, output = copy
    arguments = ["compare", str(recipe), "--seeds", "0", "1", "--critical", "tone", "names", "--output", str(output)]
    found = CliRunner().invoke(app, [*arguments, "--against", "uniform", "--margin", "0.5"])
    assert found.exit_code == 0, found.output
    assert count_trainings == [] and "against uniform mixing" in found.stdout and "(not critical)" in found.stdout
    content = json.loads((output / "comparison.json").read_text())
    assert content["critical_tasks"] == ["tone", "names"] and content["settings"]["margin"] == 0.5
    assert content["seeds"] == [0, 1]


def test_the_command_names_mistakes_in_one_line(first, tmp_path):
    arguments = ["compare", str(first[0] / "job.yaml"), "--output", str(tmp_path / "x"), "--critical", "tone", "nmes"]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 1 and "'nmes' is no task" in found.output and "did you mean 'names'" in found.output
    assert "Traceback" not in found.output and not (tmp_path / "x").exists()
    page = CliRunner().invoke(app, ["compare", "--help"])
    assert page.exit_code == 0 and all(word in page.output for word in ("--seeds", "--against", "--critical"))


def test_it_is_offered_by_the_package():
    assert hf_multitask.compare is compare and "compare" in hf_multitask.__all__
