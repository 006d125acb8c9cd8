"""Sampling that follows the gap to single-task scores: the shares, exact resuming, any layout, what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import BACKBONES, make_tasks
from test_distributed import launch

from hf_multitask import AdapterModel, HardSharingModel, Task
from hf_multitask.data.sampling import mixing_probabilities

# What a model of each task alone is said to reach; tasks on the same rows share their mean gap.
SCORES = {"tone": 1.0, "strength": 0.9, "traits": 1.0, "names": 0.8}


@pytest.fixture
def run(make_trainer, bert, datasets):
    """A function that trains from the same start with shares that follow the gaps, and returns trainer and weights."""

    def train(resume=None, model=None, trainer_kwargs=None, kwargs=None, train=None, **options):
        torch.manual_seed(0)
        model = model or HardSharingModel.from_backbone(BACKBONES["bert"](), make_tasks())
        defaults = dict(
            max_steps=16,
            eval_strategy="steps",
            eval_steps=4,
            save_strategy="steps",
            save_steps=1,
            task_sampling="performance_gap",
            task_sampling_kwargs={"scores": SCORES, "delay": 2, **(kwargs or {})},
        )
        trainer = make_trainer(model, train, datasets, trainer_kwargs=trainer_kwargs, **{**defaults, **options})
        trainer.train(resume_from_checkpoint=resume)
        return trainer, {name: value.detach().clone() for name, value in trainer.model.named_parameters()}

    return train


def lines(trainer, name: str) -> list[dict[str, float]]:
    found = [{k: v for k, v in line.items() if k.startswith(name)} for line in trainer.state.log_history]
    return [line for line in found if line]


def test_shares_follow_the_gaps_of_each_evaluation(run):
    trainer, _ = run(max_steps=20, learning_rate=3e-3)
    changes = trainer.share_changes.by_step
    assert list(changes) == [6, 10, 14, 18, 22]
    evaluations = [line for line in trainer.state.log_history if "eval_average" in line]
    for line, shares in zip(evaluations, changes.values(), strict=True):
        metrics = {"tone": "accuracy", "strength": "pearson", "traits": "micro_f1", "names": "f1"}
        gaps = {
            task: max(0.0, SCORES[task] - line[f"eval_{task}_{metric}"]) / SCORES[task]
            for task, metric in metrics.items()
        }
        by_dataset = [(gaps["tone"] + gaps["strength"]) / 2, gaps["traits"], gaps["names"]]
        expected = [0.1 / 3 + 0.9 * gap / sum(by_dataset) for gap in by_dataset]
        assert shares == pytest.approx(expected, abs=1e-12)
    assert lines(trainer, "probability/") == [
        dict(zip(("probability/reviews", "probability/traits", "probability/names"), shares, strict=True))
        for shares in changes.values()
    ]
    # Rows seen: proportional in the first six steps, then by the shares, to within two rows.
    expected = [6 * 8 * size / 71 for size in (40, 20, 11)]
    for shares, steps in zip(list(changes.values())[:4], (4, 4, 4, 2), strict=True):
        expected = [rows + 8 * steps * share for rows, share in zip(expected, shares, strict=True)]
    seen = trainer.progress.rows_seen
    for task, rows in (("tone", expected[0]), ("traits", expected[1]), ("names", expected[2])):
        assert abs(seen[task] - rows) < 2


def test_metrics_that_are_better_when_smaller_and_plain_differences(run, bert):
    tasks = [Task(**{**task.to_dict(), "metric": "loss"}) for task in make_tasks()]
    scores = {"tone": 0.1, "strength": 0.5, "traits": 0.1, "names": 0.4}
    kwargs = {"scores": scores, "relative": False, "floor": 0.0}
    trainer, _ = run(model=HardSharingModel.from_backbone(bert, tasks), kwargs=kwargs, max_steps=4, save_strategy="no")
    (line,) = [line for line in trainer.state.log_history if "eval_tone_loss" in line]
    gaps = {task: max(0.0, line[f"eval_{task}_loss"] - score) for task, score in scores.items()}
    by_dataset = [(gaps["tone"] + gaps["strength"]) / 2, gaps["traits"], gaps["names"]]
    assert min(by_dataset) > 0
    assert trainer.share_changes.by_step[6] == pytest.approx([gap / sum(by_dataset) for gap in by_dataset])


# Evaluations at 4, 8 and 12, changes at 6, 10 and 14; an epoch is 9 steps long.
@pytest.mark.parametrize("stopped", [3, 4, 5, 6, 9, 11])
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.sample(6)
def test_resumed_equals_uninterrupted(run, tmp_path, stopped, workers):
    options = dict(dataloader_num_workers=workers, kwargs={"delay": 3} if workers else None)
    whole, expected = run(**options)
    assert len({tuple(shares) for shares in whole.share_changes.by_step.values()}) >= 3
    resumed, found = run(resume=str(tmp_path / "out" / f"checkpoint-{stopped}"), **options)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert resumed.share_changes.by_step == whole.share_changes.by_step
    assert resumed.progress.rows_seen == whole.progress.rows_seen


# An epoch is 9 steps long, and ends with an evaluation; the last one ends early.
@pytest.mark.parametrize("stopped", [9, 8, 10, 18, 16])
@pytest.mark.sample(5)
def test_with_evaluations_by_epoch_and_saving_by_steps_resumed_equals_uninterrupted(run, tmp_path, stopped):
    options = dict(eval_strategy="epoch", max_steps=22)
    whole, expected = run(**options)
    assert list(whole.share_changes.by_step) == [11, 20, 24]
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {f"checkpoint-{n}" for n in range(1, 23)}
    resumed, found = run(resume=str(tmp_path / "out" / f"checkpoint-{stopped}"), **options)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert resumed.share_changes.by_step == whole.share_changes.by_step
    logs = [
        [{k: v for k, v in line.items() if not k.endswith(("runtime", "per_second"))} for line in one.state.log_history]
        for one in (whole, resumed)
    ]
    assert logs[0][:-1] == logs[1][:-1]


def test_resuming_with_an_evaluation_at_its_start_changes_nothing(run, tmp_path):
    whole, expected = run(eval_on_start=True)
    assert list(whole.share_changes.by_step) == [2, 6, 10, 14, 18]
    resumed, found = run(resume=str(tmp_path / "out" / "checkpoint-7"), eval_on_start=True)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert resumed.share_changes.by_step == whole.share_changes.by_step


@pytest.mark.slow
def test_accumulation_and_workers_make_no_difference_to_rows(run):
    def without_dropout():
        torch.manual_seed(0)
        model = HardSharingModel.from_backbone(BACKBONES["bert"](), make_tasks())
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model

    options = dict(optim="sgd", learning_rate=0.05, save_strategy="no", kwargs={"delay": 3})
    one, expected = run(model=without_dropout(), **options)
    for layout in (
        dict(per_device_train_batch_size=2, gradient_accumulation_steps=4),
        dict(dataloader_num_workers=1),
    ):
        other, found = run(model=without_dropout(), **options, **layout)
        assert other.progress.rows_seen == one.progress.rows_seen
        for name, value in expected.items():
            assert (value - found[name]).abs().max() <= 1e-5 * value.abs().max().clamp(min=1e-2), name


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    settings = dict(
        task_sampling_kwargs={"scores": SCORES, "delay": 1, "start": "uniform"},
        eval_strategy="steps",
        eval_steps=2,
    )
    arguments = ("mixed", "rows", "performance_gap", "", json.dumps(settings))
    one, two = launch(tmp_path, 1, *arguments), launch(tmp_path, 2, *arguments)
    assert one["rows_seen"] == two["rows_seen"] and len({*one["rows_seen"].values()}) >= 3
    for name, value in one["weights"].items():
        assert (value - two["weights"][name]).abs().max() <= 1e-5 * value.abs().max().clamp(min=1e-3), name


@pytest.mark.parametrize("stopped", [5, 9])
@pytest.mark.slow
def test_streams_follow_too_and_resume(run, datasets, tmp_path, stopped):
    streams = {name: part.to_iterable_dataset(num_shards=2) for name, part in datasets.items()}
    options = dict(train=streams, dataset_sizes={name: len(part) for name, part in datasets.items()})
    whole, expected = run(**options)
    _, found = run(resume=str(tmp_path / "out" / f"checkpoint-{stopped}"), **options)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert len(whole.share_changes.by_step) == 4


@pytest.mark.slow
def test_only_evaluations_of_the_training_loop_count(run):
    trainer, _ = run(save_strategy="no")
    before = dict(trainer.share_changes.by_step)
    trainer.evaluate()
    assert trainer.share_changes.by_step == before
    trainer.train()  # a second run begins anew
    assert list(trainer.share_changes.by_step) == [6, 10, 14, 18]


def test_a_scheme_that_gives_each_task_rows_of_its_own(run, bert):
    model = AdapterModel.from_backbone(bert, make_tasks())
    trainer, _ = run(model=model, save_strategy="no", max_steps=4)
    assert len(trainer.share_changes.by_step[6]) == len(trainer.train_dataset.sizes)


def test_an_auxiliary_task_without_a_score_gets_the_floor(run, bert):
    tasks = make_tasks()
    tasks[2] = Task(**{**tasks[2].to_dict(), "auxiliary": True})
    scores = {name: score for name, score in SCORES.items() if name != "traits"}
    model = HardSharingModel.from_backbone(bert, tasks)
    trainer, _ = run(model=model, kwargs={"scores": scores, "floor": 0.3}, save_strategy="no", max_steps=4)
    assert trainer.share_changes.by_step[6][1] == pytest.approx(0.1)


def comparison(**scores) -> dict:
    metrics = {"tone": "accuracy", "strength": "pearson", "traits": "micro_f1", "names": "f1"}
    found = {**SCORES, **scores}
    return {"tasks": {name: {"metric": metrics[name], "single": found[name]} for name in metrics}}


def test_scores_come_from_a_comparison(run, tmp_path):
    (tmp_path / "comparison.json").write_text(json.dumps(comparison()))
    given, _ = run(save_strategy="no", max_steps=4)
    kwargs = {"scores": None, "comparison": str(tmp_path / "comparison.json")}
    read, _ = run(save_strategy="no", max_steps=4, kwargs=kwargs)
    assert read.share_changes.by_step == given.share_changes.by_step


@pytest.mark.slow
def test_another_score_is_another_run(run, tmp_path):
    file = tmp_path / "comparison.json"
    kwargs = {"scores": None, "comparison": str(file)}
    file.write_text(json.dumps(comparison()))
    run(kwargs=kwargs)
    file.write_text(json.dumps(comparison(tone=0.9)))
    with pytest.raises(ValueError, match="single-task scores.*'tone': 1.0.*'tone': 0.9"):
        run(resume=str(tmp_path / "out" / "checkpoint-4"), kwargs=kwargs)


BAD = {
    "no evaluations": (dict(eval_strategy="no"), "follows the metrics of evaluations, which eval_strategy='no' leaves"),
    "no metrics": (dict(prediction_loss_only=True), "which prediction_loss_only leaves out"),
    "no such task": (dict(kwargs={"scores": {**SCORES, "tine": 1}}), "names no task 'tine', did you mean 'tone'"),
    "a score is missing": (dict(kwargs={"scores": {"tone": 1.0}}), "lacks the single-task score of strength, traits"),
    "two tasks on a dataset": (
        dict(kwargs={"scores": {"reviews": 0.9, "traits": 1, "names": 1}}),
        "dataset 'reviews' in scores is read by tone, strength; give a score for each",
    ),
    "a word": (dict(kwargs={"scores": {**SCORES, "tone": "high"}}), "score of 'tone' must be a number, got 'high'"),
    "not a number": (dict(kwargs={"scores": {**SCORES, "tone": float("nan")}}), "must be a number, got nan"),
    "nothing to be a part of": (dict(kwargs={"scores": {**SCORES, "tone": 0}}), "is 0, of which no gap is a part"),
    "a list": (dict(kwargs={"scores": [1, 2]}), "scores must map tasks to numbers"),
    "no file": (dict(kwargs={"scores": None, "comparison": "no.json"}), "comparison 'no.json' does not exist"),
    "too short for workers": (
        dict(dataloader_num_workers=4, kwargs={"delay": 8}),
        "delay=8 is too short for 4 workers, which draw rows up to 9 optimizer steps ahead; set it to at least 9",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_found_before_training(run, case):
    options, message = BAD[case]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(**options)


def test_tasks_that_are_not_evaluated_are_named(make_trainer, model, datasets):
    kwargs = dict(task_sampling="performance_gap", task_sampling_kwargs={"scores": SCORES}, eval_strategy="steps")
    some = {name: part for name, part in datasets.items() if name != "names"}
    for evaluated, missing in ((some, "names"), (None, "tone")):
        options = dict(kwargs, eval_strategy="no") if evaluated is None else kwargs
        message = f"eval_dataset has no rows of task '{missing}'" if evaluated else "eval_strategy='no'"
        with pytest.raises(ValueError, match=message):
            make_trainer(model, None, evaluated, **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [("[]", "is no comparison.json"), ("{", "is no comparison.json"), ('{"tasks": {"tone": {}}}', "is no comp")]
    + [(json.dumps(comparison()).replace("pearson", "mse"), "has 'mse' of task 'strength', whose metric now is")],
)
def test_a_file_that_is_no_comparison_is_named(run, tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        run(kwargs={"scores": None, "comparison": str(tmp_path / "x.json")})


def test_a_metric_that_is_nan_stops_the_run(run, bert):
    tasks = make_tasks()
    tasks[0] = Task(**{**tasks[0].to_dict(), "metric": "mine", "greater_is_better": True})
    with pytest.raises(ValueError, match="eval_tone_mine is nan in an evaluation"):
        run(
            model=HardSharingModel.from_backbone(bert, tasks),
            trainer_kwargs={"compute_metrics": {"tone": lambda prediction: {"mine": float("nan")}}},
            save_strategy="no",
        )


def test_the_start_is_the_strategy_that_was_asked_for():
    sizes = {"large": 900, "small": 100}
    for start in ("proportional", "temperature", "uniform"):
        kwargs = {"scores": SCORES, "start": start}
        assert mixing_probabilities("performance_gap", sizes, kwargs) == mixing_probabilities(start, sizes)
