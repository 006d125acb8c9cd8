"""The best split is the best of all, intervals are what they say, and a recipe is grouped by one training."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import BACKBONES, make_datasets, make_tasks, make_tokenizer
from typer.testing import CliRunner

import hf_multitask
from hf_multitask import HardSharingModel, MultiTaskTrainingArguments, Task, group_tasks
from hf_multitask.analysis.affinity import AffinitySeries
from hf_multitask.analysis.grouping import MOST_EXACT, _split_greedily, affinity_onto, find_splits
from hf_multitask.analysis.grouping_advice import advise_tasks, series_interval, weighted_interval
from hf_multitask.analysis.grouping_result import TaskGroups
from hf_multitask.cli.app import app
from hf_multitask.recipe import RecipeParts, load_recipe

# ---- the search ----


def partitions(tasks: list[int]):
    """All ways to put tasks into groups."""
    if not tasks:
        yield []
        return
    first, *rest = tasks
    for groups in partitions(rest):
        yield [[first], *groups]
        for place in range(len(groups)):
            yield [*groups[:place], [first, *groups[place]], *groups[place + 1 :]]


def gains(matrix: np.ndarray, group: list[int], served: list[int]) -> float:
    """What the served tasks of a group get, written out."""
    total = 0.0
    for task in group:
        others = [other for other in group if other != task]
        if task in served and others:
            total += sum(matrix[other, task] for other in others) / len(others)
    return total


def best_by_trying(matrix: np.ndarray, served: list[int], helpers: list[int]) -> dict[int, float]:
    companies = [list(c) for size in range(len(helpers) + 1) for c in itertools.combinations(helpers, size)]
    best: dict[int, float] = {}
    for groups in partitions(served):
        score = sum(max(gains(matrix, group + company, served) for company in companies) for group in groups)
        best[len(groups)] = max(best.get(len(groups), -math.inf), score / len(served))
    return best


@pytest.mark.parametrize("tasks", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("aside", [0, 1, 2])
def test_no_split_is_better(tasks, aside):
    draw = np.random.default_rng([tasks, aside])
    for _ in range(5):
        matrix = draw.normal(size=(tasks + aside, tasks + aside))
        order = draw.permutation(tasks + aside).tolist()
        served, helpers = sorted(order[:tasks]), sorted(order[tasks:])
        found, expected = find_splits(matrix, helpers), best_by_trying(matrix, served, helpers)
        assert sorted(found) == sorted(expected) == list(range(1, tasks + 1))
        for number, split in found.items():
            assert split.score == pytest.approx(expected[number], abs=1e-12)
            # It is the score of these groups, and every task is served once.
            assert split.score == pytest.approx(sum(gains(matrix, list(g), served) for g in split.groups) / tasks)
            assert sorted(task for group in split.groups for task in group if task in served) == served
            assert len(split.groups) == number and all(set(group) & set(served) for group in split.groups)
        assert find_splits(matrix, helpers, most=2) == {number: found[number] for number in (1, 2)}


def test_the_order_and_the_unit_of_the_tasks_make_no_difference():
    draw = np.random.default_rng(0)
    matrix, order = draw.normal(size=(6, 6)), draw.permutation(6)
    found, mixed = find_splits(matrix), find_splits(matrix[np.ix_(order, order)] * 1e-6)
    for number, split in found.items():
        back = {frozenset(int(order[task]) for task in group) for group in mixed[number].groups}
        assert back == {frozenset(group) for group in split.groups}


def planted(groups: int, size: int, seed: int = 0) -> tuple[np.ndarray, set[frozenset[int]]]:
    """Tasks that help within their groups and harm across, in any order; and the groups."""
    draw = np.random.default_rng(seed)
    names = draw.permutation(groups * size)
    same = names[:, None] // size == names // size
    matrix = np.where(same, 0.3, -0.1) + 0.1 * draw.normal(size=same.shape)
    return matrix, {frozenset(np.flatnonzero(names // size == group).tolist()) for group in range(groups)}


@pytest.mark.parametrize(("groups", "size"), [(2, 3), (3, 4), (4, 6), (6, 5)])
def test_planted_groups_are_found(groups, size):
    matrix, truth = planted(groups, size)
    split = find_splits(matrix, most=groups)[groups]
    assert {frozenset(group) for group in split.groups} == truth
    assert (groups * size > MOST_EXACT) == (groups > 3)


def test_the_search_for_many_tasks_is_nearly_the_best():
    draw = np.random.default_rng(1)
    misses = []
    for _ in range(10):
        matrix = np.where(np.eye(9, dtype=bool), 0.0, draw.normal(size=(9, 9)))
        exact = find_splits(matrix, [8])
        found = _split_greedily(matrix, list(range(8)), [8], 8)
        assert sorted(found) == sorted(exact)
        for number, groups in found.items():
            score = sum(gains(matrix, sorted(group), list(range(8))) for group in groups) / 8
            assert sorted(task for group in groups for task in group if task != 8) == list(range(8))
            assert score <= exact[number].score + 1e-12
            misses.append(exact[number].score - score)
    assert np.mean(misses) < 0.01 and np.mean(np.array(misses) < 1e-9) > 0.9


def test_many_tasks_with_helpers():
    matrix, truth = planted(3, 4)
    whole = np.zeros((14, 14))
    whole[:12, :12] = matrix
    first = sorted(min(truth, key=min))
    whole[12, :12] = -1.0
    whole[12, first] = 2.0  # helps one group and harms the others
    whole[13, :12] = -1.0  # harms all
    split = find_splits(whole, [12, 13])[3]
    assert {frozenset(group) for group in split.groups} == {
        group | {12} if set(group) == set(first) else group for group in truth
    }


def test_a_task_that_others_harm_stays_alone():
    matrix = np.array([[1.0, 0.4, -0.2], [0.3, 1.0, -0.2], [0.1, -0.3, 1.0]])
    found = find_splits(matrix)
    assert found[2].groups == ((0, 1), (2,)) and found[2].score == pytest.approx(0.7 / 3)
    assert affinity_onto(matrix, (2,), 2) == 0.0 and affinity_onto(matrix, (0, 1, 2), 1) == pytest.approx(0.05)
    everything_harms = TaskGroups(("a", "b", "c"), (), (9,), np.full((1, 3, 3), -0.1), "affinity", 3)
    assert everything_harms.groups == (("a",), ("b",), ("c",))
    # With room for two groups, one has to take two.
    assert sorted(map(len, everything_harms.regroup(2).groups)) == [1, 2]


def test_equal_splits_are_those_with_fewer_models():
    silent = TaskGroups(("a", "b", "c"), ("c",), (9,), np.zeros((1, 3, 3)), "affinity", 2)
    assert silent.groups == (("a", "b"),)


def test_what_cannot_be_split():
    for matrix, helpers, most in (
        (np.eye(3), [0, 1, 2], None),
        (np.eye(3), [], 4),
        (np.eye(3), [], 0),
        (np.eye(2), [5], 1),
    ):
        with pytest.raises(ValueError, match="cannot be split"):
            find_splits(matrix, helpers, most)
    with pytest.raises(ValueError, match="must be finite"):
        find_splits(np.array([[0, np.nan], [0, 0]]))


# ---- how sure ----


def test_intervals_are_students_of_ten_blocks():
    values = np.random.default_rng(0).normal(size=40) + 1
    mean, low, high = series_interval(values, 0.9)
    blocks = values.reshape(10, 4).mean(1)
    half = 1.833113 * blocks.std(ddof=1) / 10**0.5  # t with 9 degrees of freedom
    assert (mean, high - mean, mean - low) == pytest.approx((values.mean(), half, half), abs=1e-6)
    assert np.isnan(series_interval(np.array([1.0]))[1:]).all()


def test_steps_that_hang_together_do_not_make_intervals_too_short():
    draw = np.random.default_rng(0)
    hits = {"blocks": 0, "steps": 0}
    for _ in range(400):
        noise = draw.normal(size=220)
        series = np.convolve(noise, np.ones(5), "valid")[:200]  # neighbours share four fifths
        _, low, high = series_interval(series)
        hits["blocks"] += low <= 0 <= high
        hits["steps"] += abs(series.mean()) <= 1.97 * series.std(ddof=1) / 200**0.5
    assert hits["blocks"] / 400 > 0.9 and hits["steps"] / 400 < 0.7


def test_pairs_that_came_together_less_often():
    draw = np.random.default_rng(0)
    values = draw.normal(size=(40, 3, 3))
    values[::2, 0, 1] = np.nan
    values[4:, 2, 1] = np.nan
    mean, low, high = weighted_interval(values, {(0, 1): 1.0})
    assert mean == pytest.approx(np.nanmean(values[:, 0, 1]))
    assert (high - low) == pytest.approx(2 * (high - mean)) and high > low
    # Half the steps, so about the same width as the interval of these steps alone.
    alone = series_interval(values[1::2, 0, 1])
    assert 0.5 < (high - low) / (alone[2] - alone[1]) < 2
    both = weighted_interval(values, {(0, 1): 0.5, (1, 0): 0.5})
    assert both[0] == pytest.approx((mean + values[:, 1, 0].mean()) / 2)
    few = weighted_interval(values, {(0, 1): 0.5, (2, 1): 0.5})
    assert np.isfinite(few[0]) and np.isnan(few[1:]).all()


def make_values(means: list[list[float]], noise: float = 0.01) -> np.ndarray:
    return np.array(means) + noise * np.random.default_rng(0).normal(size=(40, len(means), len(means)))


def test_what_follows_for_each_task():
    names = ("a", "b", "c", "d", "e")
    values = make_values(
        [
            [1.0, 0.3, -0.3, 0.0, -0.3],
            [-0.1, 1.0, -0.3, 0.0, -0.3],
            [-0.3, -0.3, 1.0, 0.4, -0.3],
            [-0.3, -0.3, 0.0, 1.0, -0.3],
            [-0.3, -0.3, -0.3, -0.3, 1.0],
        ]
    )
    found = TaskGroups(names, (), tuple(range(40)), values, "affinity", 3)
    assert found.groups == (("a", "b"), ("c", "d"), ("e",))
    advice = {one.task: one for one in found.advice()}
    assert advice["b"].verdict == "together" and advice["b"].statement == "train with a"
    assert advice["b"].affinity == pytest.approx(0.3, abs=0.01) and 0.28 < advice["b"].low < advice["b"].high < 0.32
    assert advice["a"].verdict == "harmed" and "it harms a" in advice["a"].statement
    assert advice["c"].verdict == "undecided" and "not enough evidence" in advice["c"].statement
    assert advice["e"].verdict == "alone" and advice["e"].companions == () and advice["e"].joining[2] < 0
    # Beside c and d: e loses 0.3, c has another companion (-0.3 in place of 0), d too (0.05 in place of 0.4).
    change, *_ = next(one.joining for one in found.advice() if one.task == "e")
    joined = [
        gains(values.mean(0), [*group, 4], list(range(5))) - gains(values.mean(0), group, list(range(5)))
        for group in ([0, 1], [2, 3])
    ]
    assert change == pytest.approx(max(joined))
    noisy = TaskGroups(names, (), tuple(range(40)), values + 3 * make_values([[0.0] * 5] * 5, 1.0), "affinity", 3)
    assert {one.verdict for one in noisy.advice()} <= {"undecided", "together", "harmed"}
    assert sum(one.verdict == "undecided" for one in noisy.advice()) >= 3


def test_helpers_are_companions_and_get_no_advice():
    values = make_values([[1.0, -0.2, 0.0], [-0.2, 1.0, 0.0], [0.3, -0.3, 1.0]])
    found = TaskGroups(("a", "b", "aux"), ("aux",), tuple(range(40)), values, "affinity", 2)
    assert found.groups == (("a", "aux"), ("b",)) and found.served == ("a", "b")
    one, other = found.advice()
    assert (one.task, one.companions, one.verdict) == ("a", ("aux",), "together")
    assert (other.task, other.companions, other.verdict) == ("b", (), "alone")
    # Joining a and aux, b would get -0.25, and a -0.2 and 0.3 in place of 0.3.
    assert other.joining[0] == pytest.approx(-0.25 - 0.25, abs=0.01)
    sole = advise_tasks(values, ("a", "b", "aux"), (1, 2), ((0,),))
    assert sole[0].verdict == "alone" and sole[0].joining is None


# ---- the result ----


@pytest.fixture
def found() -> TaskGroups:
    means = [[1.0, 0.3, -0.2], [0.3, 1.0, -0.2], [-0.2, -0.2, 1.0]]
    values = make_values(means)
    values[3:, 0, 2] = np.nan
    return TaskGroups(
        ("tone", "strength", "topic"), (), tuple(range(40)), values, "affinity", 2, settings={"recipe": {"a": 1}}
    )


def test_it_comes_back_from_its_file(found, tmp_path):
    found.save(tmp_path / "grouping.json")
    plain = json.loads((tmp_path / "grouping.json").read_text())
    assert plain["groups"] == [["tone", "strength"], ["topic"]] and plain["intervals"][0][2] == [None, None]
    assert [one["verdict"] for one in plain["advice"]] == ["together", "together", plain["advice"][2]["verdict"]]
    back = TaskGroups.load(tmp_path / "grouping.json")
    assert back.to_dict() == found.to_dict() and back.groups == found.groups
    assert np.array_equal(back.values, found.values, equal_nan=True) and back.settings == {"recipe": {"a": 1}}
    assert back.affinity.shape == (3, 3) and back.intervals.shape == (3, 3, 2)


def test_the_table_shows_numbers_intervals_and_doubt(found):
    text = str(found)
    assert text == found.table() and "2 group(s), of at most 2, by affinity in 40 steps" in text
    assert "train with strength" in text and "not enough evidence" in text and "+30." in text
    assert "? the interval includes 0" in text and "(of the splits" not in text
    cosines = TaskGroups(found.tasks, (), found.steps, found.values, "conflict", 2)
    assert "by cosine" in str(cosines) and "+0.30" in str(cosines) and "%" not in str(cosines).replace("95%", "")


def test_small_affinities_are_told_in_as_many_digits_as_it_takes(found):
    small = TaskGroups(found.tasks, (), found.steps, found.values * 1e-4, "affinity", 2)
    row = next(line for line in str(small).splitlines() if "train with strength" in line)
    assert "+0.0030 %" in row


def test_it_is_drawn_group_by_group(found, tmp_path):
    pytest.importorskip("matplotlib")
    found.plot(tmp_path / "grouping.svg")
    assert (tmp_path / "grouping.svg").stat().st_size > 5000


# ---- from a recipe ----


def write_recipe(folder: Path, **training) -> Path:
    torch.manual_seed(0)
    BACKBONES["bert"]().save_pretrained(folder / "backbone")
    make_tokenizer().save_pretrained(folder / "backbone")
    for name, rows in make_datasets(0, 80).items():
        rows.to_parquet(folder / f"{name}-train.parquet")
    reviews = str(folder / "reviews-{split}.parquet")
    tasks = [
        {"name": "tone", "type": "single_label_classification", "dataset": reviews},
        {"name": "strength", "type": "regression", "dataset": reviews, "label_column": "strength"},
        {"name": "names", "type": "token_classification", "dataset": str(folder / "names-{split}.parquet")},
        {"name": "fill", "type": "masked_lm", "dataset": reviews, "auxiliary": True},
    ]
    training = {"max_steps": 60, "learning_rate": 2e-3, "use_cpu": True, "disable_tqdm": True, **training}
    recipe = {"model": {"backbone": str(folder / "backbone")}, "tasks": tasks, "training": training}
    (folder / "job.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder / "job.yaml"


def test_a_recipe_is_grouped_by_one_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines: list[str] = []
    path = write_recipe(tmp_path, eval_strategy="steps", save_steps=5, output_dir="out", bf16=True)
    found = group_tasks(path, 2, steps=20, every=2, say=lines.append)
    assert found.tasks == ("tone", "strength", "names", "fill") and found.helpers == ("fill",)
    assert found.steps == tuple(range(1, 20, 2)) and found.values.shape == (10, 4, 4)
    assert len(lines) == 1 and not Path("out").exists()
    assert TaskGroups.load("runs/job-grouping/grouping.json").to_dict() == found.to_dict()
    assert found.settings["recipe"] == load_recipe(path).to_dict() and found.settings["steps"] == 20
    assert found.is_exact and 1 <= len(found.groups) <= 2
    assert sorted(task for group in found.groups for task in group if task != "fill") == ["names", "strength", "tone"]
    again = group_tasks(load_recipe(path), 2, steps=20, every=2, output=tmp_path / "again")
    assert np.array_equal(again.values, found.values) and (tmp_path / "again" / "grouping.json").is_file()
    assert (found.affinity.diagonal() > 0).all()


def test_the_command_prints_the_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_recipe(tmp_path)
    options = ["--groups", "3", "--method", "conflict", "--steps", "20", "--output", "found"]
    done = CliRunner().invoke(app, ["group", str(path), *options, "--set", "training.learning_rate=1e-3"])
    assert done.exit_code == 0, done.output
    found = TaskGroups.load("found/grouping.json")
    assert found.method == "conflict" and found.most == 3 and str(found) in done.stdout
    assert found.settings["recipe"]["training"]["learning_rate"] == 1e-3
    cosines = found.values[np.isfinite(found.values)]
    assert np.abs(cosines).max() <= 1 and found.affinity[0, 1] == pytest.approx(found.affinity[1, 0])
    wrong = CliRunner().invoke(app, ["group", str(path), "--method", "conflicts"])
    assert wrong.exit_code == 1 and "did you mean 'conflict'?" in wrong.output and "Traceback" not in wrong.output


def make_parts(datasets, tokenizer, tmp_path, tasks=None, **arguments) -> RecipeParts:
    torch.manual_seed(0)
    model = HardSharingModel.from_backbone(BACKBONES["bert"](), tasks or make_tasks())
    defaults = {"output_dir": str(tmp_path / "out"), "max_steps": 20, "use_cpu": True, "disable_tqdm": True}
    args = MultiTaskTrainingArguments(**{**defaults, "learning_rate": 2e-3, **arguments})
    return RecipeParts(model, tokenizer, args, {"train": dict(datasets), "validation": {}, "test": {}})


def test_parts_are_not_touched(datasets, tokenizer, tmp_path):
    parts = make_parts(datasets, tokenizer, tmp_path)
    before = {name: value.clone() for name, value in parts.model.state_dict().items()}
    found = group_tasks(parts, 4)
    assert found.served == ("tone", "strength", "traits", "names") and found.settings["recipe"] == {}
    assert all(torch.equal(before[name], value) for name, value in parts.model.state_dict().items())
    assert parts.args.save_strategy == "steps" and not (tmp_path / "out").exists()


def test_bad_input_is_found_before_training(datasets, tokenizer, tmp_path, monkeypatch):
    parts = make_parts(datasets, tokenizer, tmp_path)
    monkeypatch.setattr(hf_multitask.MultiTaskTrainer, "train", lambda self: pytest.fail("it is trained"))
    for groups in (0, -1, 5, 1.5, True):
        with pytest.raises(ValueError, match=r"groups must be a whole number from 1 to 4, the tasks to serve, got"):
            group_tasks(parts, groups)
    with pytest.raises(ValueError, match="method 'affinty' is not known, did you mean 'affinity'"):
        group_tasks(parts, 2, method="affinty")
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1, got 0"):
        group_tasks(parts, 2, steps=0)
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1"):
        group_tasks(parts, 2, confidence=1.0)
    with pytest.raises(ValueError, match="settings change a recipe's file"):
        group_tasks(parts, 2, settings=["training.max_steps=1"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; choose a folder"):
        group_tasks(parts, 2, output=tmp_path / "file")
    with pytest.raises(TypeError, match="got int"):
        group_tasks(3, 2)
    with pytest.raises(FileNotFoundError):
        group_tasks(tmp_path / "none.yaml", 2)
    parts.datasets["train"] = {}
    with pytest.raises(ValueError, match="there is no training data"):
        group_tasks(parts, 2)
    one = make_parts(
        datasets, tokenizer, tmp_path, [Task("names", "token_classification", ("O", "B-person", "B-place"))]
    )
    with pytest.raises(ValueError, match="only 'names' is trained"):
        group_tasks(one, 1)
    helped = [make_tasks()[0], Task("fill", "masked_lm", dataset="reviews", auxiliary=True)]
    with pytest.raises(ValueError, match="'tone' is the only trained task that is not auxiliary"):
        group_tasks(make_parts(datasets, tokenizer, tmp_path, helped), 1)
    frozen = make_parts(datasets, tokenizer, tmp_path)
    frozen.model.backbone.requires_grad_(False)
    with pytest.raises(ValueError, match="train no parameter together"):
        group_tasks(frozen, 2)


def test_a_series_makes_a_result():
    series = AffinitySeries(("a", "b"), (4, 9), np.array([[[1.0, 0.1], [0.2, 1.0]]] * 2))
    found = TaskGroups.from_series(series, (), "affinity", 2, confidence=0.9)
    assert found.groups == (("a", "b"),) and found.split.score == pytest.approx(0.15) and found.confidence == 0.9
    with pytest.raises(ValueError, match="groups must be a whole number from 1 to 2"):
        found.regroup(3)
