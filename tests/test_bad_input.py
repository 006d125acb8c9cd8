"""Bad input is a named error before training starts, and nothing is written."""

from __future__ import annotations

import pytest
import torch
from conftest import BACKBONES, make_tasks, make_tokenizer
from datasets import Dataset

from hf_multitask import HardSharingModel, MultiTaskTrainer, MultiTaskTrainingArguments, Task


def replace(rows: Dataset, column: str, row: int, value) -> list:
    values = list(rows[column])
    values[row] = value
    return values


def changed(datasets, name, column, row, value):
    rows = datasets[name]
    columns = {key: list(rows[key]) for key in rows.column_names}
    columns[column] = replace(rows, column, row, value)
    return {**datasets, name: Dataset.from_dict(columns)}


DATASETS = {
    "a dataset without its task": (lambda d: {**d, "revews": d["reviews"]}, ["'revews'", "feeds no task", "'reviews'"]),
    "a task without its dataset": (lambda d: {"reviews": d["reviews"]}, ["lacks", "traits, names"]),
    "an empty dataset": (lambda d: {**d, "traits": d["traits"].select([])}, ["'traits'", "no rows"]),
    "a missing text column": (
        lambda d: {**d, "reviews": d["reviews"].rename_column("text", "body")},
        ["'tone'", "'text'", "columns are body, label, strength"],
    ),
    "a missing label column": (
        lambda d: {**d, "reviews": d["reviews"].remove_columns("strength")},
        ["'strength'", "columns are text, label"],
    ),
    "a label outside the list": (
        lambda d: changed(d, "reviews", "label", 17, "positiv"),
        ["'tone'", "'positiv'", "row 17", "column 'label'", "did you mean 'positive'", "Task(labels=...)"],
    ),
    "a label of None": (lambda d: changed(d, "reviews", "label", 3, None), ["'tone'", "None", "row 3", "'label'"]),
    "a label of NaN": (
        lambda d: changed(d, "reviews", "strength", 5, float("nan")),
        ["'strength'", "nan", "row 5", "column 'strength'"],
    ),
    "labels of the wrong type": (
        lambda d: {**d, "reviews": d["reviews"].map(lambda row: {"label": 0.5})},
        ["'tone'", "'label'", "float64"],
    ),
    "words and tags of unequal length": (
        lambda d: changed(d, "names", "tags", 2, ["O"]),
        ["'names'", "row 2", "1 labels", "words"],
    ),
    "a tag outside the list": (
        lambda d: changed(d, "names", "tags", 1, ["B-plac"] * len(d["names"][1]["tokens"])),
        ["'names'", "'B-plac'", "row 1", "'tags'"],
    ),
    "a text of None": (lambda d: changed(d, "traits", "text", 4, None), ["None", "row 4", "'text'"]),
    "no dataset at all": (lambda d: {}, ["lacks", "reviews"]),
    "a list for a dataset": (lambda d: {**d, "traits": [1, 2]}, ["'traits'", "datasets.Dataset", "list"]),
}


@pytest.mark.parametrize("case", DATASETS)
def test_a_bad_dataset_is_named_and_nothing_written(make_trainer, model, datasets, tmp_path, case):
    spoil, parts = DATASETS[case]
    with pytest.raises((ValueError, TypeError)) as error:
        make_trainer(model, train=spoil(datasets))
    for part in parts:
        assert part in str(error.value), str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["an empty dataset", "a label outside the list", "a label of NaN"])
def test_a_bad_split_is_found_before_training_too(make_trainer, model, datasets, case):
    spoil, parts = DATASETS[case]
    with pytest.raises(ValueError, match="eval") as error:
        make_trainer(model, evaluation=spoil(datasets))
    assert parts[0] in str(error.value)


ARGUMENTS = {
    "an exponent above 1": (dict(task_sampling_kwargs={"alpha": 1.5}), ["alpha", "[0, 1]", "1.5"]),
    "an exponent below 0": (dict(task_sampling_kwargs={"alpha": -0.1}), ["alpha", "[0, 1]"]),
    "a misspelt strategy": (dict(task_sampling="temprature"), ["'temprature'", "'temperature'"]),
    "a misspelt argument": (dict(task_sampling_kwargs={"alfa": 0.5}), ["'alfa'", "'alpha'"]),
    "a negative share": (
        dict(task_sampling="weighted", task_sampling_kwargs={"weights": {"reviews": 1, "traits": -1, "names": 1}}),
        ["'traits'", "-1"],
    ),
    "shares that are all zero": (
        dict(task_sampling="weighted", task_sampling_kwargs={"weights": {"reviews": 0, "traits": 0, "names": 0}}),
        ["all weights are 0"],
    ),
    "a share of no dataset": (
        dict(task_sampling="weighted", task_sampling_kwargs={"weights": {"review": 1, "traits": 1, "names": 1}}),
        ["'review'", "'reviews'"],
    ),
    "a missing argument": (dict(task_sampling="capped"), ["cap"]),
    "a primary task that does not exist": (dict(primary_task="tune"), ["'tune'", "'tone'"]),
    "a metric against the primary task": (
        dict(primary_task="tone", metric_for_best_model="eval_names_f1"),
        ["eval_names_f1", "eval_tone_accuracy"],
    ),
    "all rows truncated away": (dict(max_length=2), ["max_length=2", "special tokens"]),
    "more tokens than positions": (dict(max_length=100), ["max_length=100", "66 positions"]),
    "a max_length that is no number": (dict(max_length=0), ["max_length"]),
    "a composition that is none": (dict(batch_composition="mix"), ["'mix'", "mixed"]),
    "a reduction that is none": (dict(loss_reduction="row"), ["'row'", "rows"]),
    "a metric that no evaluation has": (
        dict(metric_for_best_model="eval_tone_acuracy"),
        ["eval_tone_acuracy", "'eval_tone_accuracy'"],
    ),
    "rows grouped by length": (
        dict(train_sampling_strategy="sequential"),
        ["train_sampling_strategy", "task_sampling"],
    ),
    "metrics in pieces": (dict(eval_do_concat_batches=False), ["eval_do_concat_batches"]),
    "label smoothing for all": (dict(label_smoothing_factor=0.1), ["label_smoothing_factor", "Task(label_smoothing"]),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_a_bad_argument_is_named_and_nothing_written(make_trainer, model, datasets, tmp_path, case):
    arguments, parts = ARGUMENTS[case]
    with pytest.raises(ValueError) as error:
        make_trainer(model, **arguments)
    for part in parts:
        assert part in str(error.value), str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_auxiliary_primary_task_is_refused(make_trainer, bert):
    tasks = make_tasks()
    tasks[0] = Task("tone", "single_label_classification", labels=tasks[0].labels, dataset="reviews", auxiliary=True)
    with pytest.raises(ValueError, match="primary_task 'tone' is auxiliary"):
        make_trainer(HardSharingModel.from_backbone(bert, tasks), primary_task="tone")


def test_a_primary_task_without_eval_rows_is_refused(make_trainer, model, datasets):
    rows = {"names": datasets["names"]}
    with pytest.raises(ValueError, match="eval_dataset lacks the dataset 'reviews' of the primary task 'tone'"):
        make_trainer(model, evaluation=rows, primary_task="tone", eval_strategy="steps")


def test_a_tokenizer_larger_than_the_embedding_is_refused(bert, tasks, datasets, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"extra{i}" for i in range(40)])
    with pytest.raises(ValueError, match=r"tokenizer has \d+ tokens, the backbone embeddings for 90"):
        _trainer(HardSharingModel.from_backbone(bert, tasks), datasets, tokenizer, tmp_path)


def test_a_tokenizer_without_pad_token_is_refused(bert, tasks, datasets, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"no pad token.*tokenizer.pad_token = "):
        _trainer(HardSharingModel.from_backbone(bert, tasks), datasets, tokenizer, tmp_path)


def test_a_missing_tokenizer_is_named(bert, tasks, datasets, tmp_path):
    with pytest.raises(ValueError, match="processing_class is missing"):
        _trainer(HardSharingModel.from_backbone(bert, tasks), datasets, None, tmp_path)


def _trainer(model, datasets, tokenizer, tmp_path, **kwargs):
    args = MultiTaskTrainingArguments(str(tmp_path / "out"), report_to="none", use_cpu=True)
    return MultiTaskTrainer(model, args, train_dataset=datasets, processing_class=tokenizer, **kwargs)


def test_an_output_folder_that_cannot_be_written_is_found_first(make_trainer, model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="output_dir .* is a file"):
        make_trainer(model, output_dir=str(tmp_path / "file" / "out"))


@pytest.mark.parametrize("value, error", [({"tune": len}, ValueError), (len, TypeError), ({"tone": 3}, TypeError)])
def test_bad_compute_metrics_are_named(model, datasets, tokenizer, tmp_path, value, error):
    with pytest.raises(error, match="compute_metrics"):
        _trainer(model, datasets, tokenizer, tmp_path, compute_metrics=value)


def test_a_metric_that_is_not_computed_is_named(bert, datasets, tokenizer, tmp_path):
    task = Task("tone", "single_label_classification", labels=("negative", "positive"), metric="acuracy")
    model = HardSharingModel.from_backbone(bert, [task])
    with pytest.raises(ValueError, match="'acuracy'.*'accuracy'"):
        _trainer(model, {"tone": datasets["reviews"]}, tokenizer, tmp_path)


def test_metric_names_that_would_collide_are_refused(bert, datasets, tokenizer, tmp_path):
    names = ("O", "B-person", "B-place")
    tasks = [
        Task("x", "single_label_classification", labels=("negative", "positive"), dataset="reviews"),
        Task("x_macro", "token_classification", labels=names, dataset="names"),
    ]
    with pytest.raises(ValueError, match="eval_x_macro_f1"):
        _trainer(HardSharingModel.from_backbone(bert, tasks), datasets, tokenizer, tmp_path)


def test_a_plain_model_with_many_datasets_is_told_what_it_needs(datasets, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="no multi-task model"):
        _trainer(BACKBONES["bert"](), datasets, tokenizer, tmp_path)


def test_plain_arguments_are_told_apart(model, datasets, tokenizer, tmp_path):
    from transformers import TrainingArguments

    with pytest.raises(TypeError, match="MultiTaskTrainingArguments"):
        MultiTaskTrainer(model, TrainingArguments(str(tmp_path)), train_dataset=datasets, processing_class=tokenizer)


def test_compute_loss_func_is_refused(model, datasets, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="compute_loss_func"):
        _trainer(model, datasets, tokenizer, tmp_path, compute_loss_func=lambda *args, **kwargs: torch.zeros(()))


def test_one_dataset_for_several_is_refused(model, datasets, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="dictionary of datasets by name; the tasks read reviews, traits, names"):
        _trainer(model, datasets["reviews"], tokenizer, tmp_path)


def test_an_average_of_opposite_directions_cannot_pick_a_checkpoint(make_trainer, bert, datasets):
    tasks = make_tasks()
    tasks[1] = Task("strength", "regression", dataset="reviews", label_column="strength", metric="mse")
    model = HardSharingModel.from_backbone(bert, tasks)
    choosing = dict(eval_strategy="steps", save_strategy="steps", load_best_model_at_end=True)
    with pytest.raises(ValueError, match="eval_average cannot pick.*primary_task"):
        make_trainer(model, evaluation=datasets, **choosing)
    assert make_trainer(model, evaluation=datasets, primary_task="strength", **choosing).args.greater_is_better is False
    assert make_trainer(model, evaluation=datasets).args.metric_for_best_model is None
    chosen = make_trainer(model, evaluation=datasets, metric_for_best_model="strength_mse", **choosing).args
    assert (chosen.metric_for_best_model, chosen.greater_is_better) == ("eval_strength_mse", False)


@pytest.mark.parametrize("arguments", [dict(save_strategy="best"), dict(metric_for_best_model="loss"), dict()])
def test_the_average_decides_unless_something_else_was_said(make_trainer, model, datasets, arguments):
    args = make_trainer(model, evaluation=datasets, eval_strategy="steps", **arguments).args
    assert (args.metric_for_best_model, args.greater_is_better) == ("eval_average", True)


def test_a_transform_that_would_be_passed_over_is_refused(make_trainer, model, datasets):
    rows = datasets["traits"].with_transform(lambda batch: batch)
    with pytest.raises(ValueError, match="'traits' .train. has a transform.*map"):
        make_trainer(model, train={**datasets, "traits": rows})


def test_an_optimizer_of_one_s_own_has_its_own_learning_rates(model, datasets, tokenizer, tmp_path):
    args = MultiTaskTrainingArguments(str(tmp_path / "out"), report_to="none", use_cpu=True, head_learning_rate=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="an optimizer of your own"):
        MultiTaskTrainer(model, args, train_dataset=datasets, processing_class=tokenizer, optimizers=(optimizer, None))
