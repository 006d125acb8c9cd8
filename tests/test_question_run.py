"""Questions and choices train, are evaluated and resumed like all other tasks, under every sharing scheme."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import BACKBONES, make_tokenizer
from questions import answers_in_context, choices, question_datasets, question_tasks
from test_distributed import free_port, run_together
from test_schemes import KINDS, check_close, check_equal, quiet, weights

from hf_multitask import AutoModelForMultiTask, Task
from hf_multitask.answer_metrics import answer_metrics
from hf_multitask.models.auto import SCHEMES
from hf_multitask.models.base import MultiTaskModel
from hf_multitask.models.conversion import select_tasks

EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
SOME_KINDS = pytest.mark.parametrize("kind", ["hard", "soft, cross-stitched", "adapter, shared", "mixture"])


def build(kind: str = "hard", dropout: float = 0.0, backbone: str = "bert", **changes) -> MultiTaskModel:
    scheme, options = KINDS[kind]
    torch.manual_seed(0)
    model = SCHEMES[scheme].from_backbone(
        BACKBONES[backbone](), question_tasks(**changes), **{**options, **quiet(kind)}
    )
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return model


@pytest.fixture
def train(make_trainer, datasets):
    """A function that trains a model on its tasks' rows, and returns the trainer."""

    def run(model, *, resume=None, start=True, **arguments):
        reviews = {"reviews": datasets["reviews"]}
        trainer = make_trainer(
            model,
            {**question_datasets(), **reviews},
            {**question_datasets(1, who=11, next=9), **reviews},
            **{"task_sampling": "uniform", **arguments},
        )
        if start:
            trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def speedless(metrics: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if not k.endswith(("runtime", "per_second", "_time", "epoch"))}


@EVERY_KIND
@pytest.mark.sample(4)
def test_layouts_give_one_update(train, kind):
    runs = []
    for rows, accumulation in ((8, 1), (2, 4)):
        model = build(kind)
        trainer = train(
            model,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=0.05,
            max_steps=3,
        )
        runs.append((weights(model), [line for line in trainer.state.log_history if "loss" in line]))
    check_close(runs[0][0], runs[1][0], 1e-4)
    for line, other in zip(runs[0][1], runs[1][1], strict=True):
        assert {"loss/who", "loss/next", "share/who", "share/next"} <= set(line)
        for key, value in line.items():
            assert other[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


def test_shares_are_of_windows_and_of_examples(train):
    trainer = train(build(), per_device_train_batch_size=9, max_steps=5)
    assert trainer.train_dataset.sizes["who"] > 24 and trainer.train_dataset.sizes["next"] == 16
    for line in trainer.state.log_history[:5]:  # three rows of each, however many choices these have
        assert line["share/next"] == line["share/who"] == line["share/tone"] == pytest.approx(1 / 3)


@SOME_KINDS
@pytest.mark.sample(3)
def test_resumed_equals_uninterrupted(train, tmp_path, kind):
    arguments = dict(save_strategy="steps", save_steps=2, max_steps=5)
    whole = build(kind, dropout=0.1)
    train(whole, output_dir=str(tmp_path / "a"), **arguments)
    resumed = build(kind, dropout=0.1)
    train(resumed, output_dir=str(tmp_path / "b"), resume=str(tmp_path / "a" / "checkpoint-2"), **arguments)
    check_equal(weights(whole), weights(resumed))


@EVERY_KIND
def test_saved_and_loaded_the_metrics_are_the_same(train, tmp_path, kind):
    trainer = train(build(kind), max_steps=2)
    metrics = trainer.evaluate()
    trainer.save_model(tmp_path / "model")
    loaded = AutoModelForMultiTask.from_pretrained(tmp_path / "model")
    assert loaded.tasks == trainer.model.tasks
    assert speedless(train(loaded, start=False).evaluate()) == speedless(metrics)


@pytest.mark.parametrize("memory", ["buffer", "sketch"])
@pytest.mark.parametrize("kind", ["hard", "adapter, shared", "mixture"])
@pytest.mark.sample(3)
def test_gradients_of_tasks_are_combined(train, kind, memory):
    runs = []
    for rows, accumulation in ((8, 1), (2, 4)):
        model = build(kind)
        trainer = train(
            model,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulation,
            gradient_combination="upgrad",
            gradient_memory=memory,
            optim="sgd",
            learning_rate=0.05,
        )
        assert any("coefficient/next" in line for line in trainer.state.log_history)
        runs.append(weights(model))
    check_close(*runs, tolerance=1e-4)


@pytest.mark.parametrize("kind", ["hard", "conditioned", "mixture"])
def test_task_by_task_and_summed_it_is_the_plain_step(train, kind):
    runs = []
    for arguments in ({}, {"conflict_logging_steps": 1}):
        model = build(kind)
        train(model, optim="sgd", learning_rate=0.05, **arguments)
        runs.append(weights(model))
    check_close(*runs)


@EVERY_KIND
def test_batch_sizes_and_the_order_of_lengths_do_not_change_what_is_measured(train, kind):
    model = build(kind)
    train(model)
    results = [
        speedless(train(model, start=False, per_device_eval_batch_size=size, **more).evaluate())
        for size, more in ((1, {}), (8, {}), (8, {"train_sampling_strategy": "group_by_length"}))
    ]
    assert {"eval_who_f1", "eval_who_exact_match", "eval_who_loss", "eval_next_accuracy"} <= set(results[0])
    for other in results[1:]:
        for key, value in results[0].items():
            assert other[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


def test_they_are_learned_and_measured_per_question(train):
    trainer = train(build(), max_steps=250, learning_rate=5e-3, per_device_train_batch_size=16, logging_steps=250)
    data = {name: question_datasets()[name] for name in ("who", "next")}
    metrics = trainer.evaluate(data)
    assert metrics["eval_who_f1"] > 0.7 and metrics["eval_next_accuracy"] > 0.9
    assert metrics["eval_average"] == pytest.approx((metrics["eval_who_f1"] + metrics["eval_next_accuracy"]) / 2)
    windows = len(trainer.prepare_datasets(data, "x", "x", complete=False).split()[0])
    assert windows > len(data["who"])  # so an F1 per window would be another number
    from hf_multitask.prediction import Predictor

    predictor = Predictor(trainer.model, make_tokenizer())
    answers = [answer["who"]["answer"] for answer in predictor(list(data["who"]), ["who"])]
    own = answer_metrics(answers, [row["text"] for row in data["who"]["answers"]])
    assert own == {name: pytest.approx(metrics[f"eval_who_{name}"]) for name in own}
    guesses = [answer["next"]["label"] for answer in predictor(list(data["next"]), ["next"])]
    right = [guess == label for guess, label in zip(guesses, data["next"]["label"], strict=True)]
    assert sum(right) / len(right) == metrics["eval_next_accuracy"]


def test_questions_that_all_have_an_answer_are_never_answered_with_nothing(make_trainer, datasets, tmp_path):
    """SQuAD 1.1: the first token learns that most windows hold no answer, and would win everywhere."""
    rows = answers_in_context(rows=30)
    rows = rows.filter(lambda row: row["answers"]["text"])
    data = {"who": rows, "reviews": datasets["reviews"], "next": choices()}
    trainer = make_trainer(build(), data, {"who": rows}, output_dir=str(tmp_path), max_steps=2)
    assert [task.null_answers for task in trainer.tasks] == [None, False, None]

    def prefer_none(module, inputs, output):
        output = output.clone()
        output[:, 0] += 50
        return output

    trainer.model.heads["who"].layers[-1].register_forward_hook(prefer_none)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForMultiTask.from_pretrained(tmp_path / "saved")
    assert loaded.tasks[1].null_answers is False
    loaded.heads["who"].layers[-1].register_forward_hook(prefer_none)
    from hf_multitask.prediction import Predictor

    inputs = [{key: row[key] for key in ("question", "context")} for row in rows]
    answers = [answer["who"]["answer"] for answer in Predictor(loaded, make_tokenizer())(inputs, ["who"])]
    assert all(answers)
    own = answer_metrics(answers, [row["text"] for row in rows["answers"]])
    assert own == {name: pytest.approx(metrics[f"eval_who_{name}"]) for name in own}
    # A model that may answer with nothing always does.
    loaded.tasks[1] = replace(loaded.tasks[1], null_answers=True)
    assert not any(answer["who"]["answer"] for answer in Predictor(loaded, make_tokenizer())(inputs, ["who"]))


def test_predictions_are_logits_of_windows_and_of_choices(train):
    trainer = train(build(), max_steps=1)
    data = question_datasets()
    bare = {"who": data["who"].remove_columns("answers"), "next": data["next"].remove_columns("label")}
    outputs = trainer.predict(bare)
    windows = trainer.prepare_datasets(bare, "x", "x", complete=False, labels=None).split()[0]
    assert outputs["who"].predictions.shape == (len(windows), 24, 2) and outputs["next"].predictions.shape == (16, 4)
    assert outputs["who"].label_ids is None and outputs["next"].label_ids is None
    labelled = trainer.predict(data)
    assert labelled["who"].label_ids.shape == (len(windows), 2) and "test_who_f1" in labelled["who"].metrics
    # A choice that is not there is never chosen, and padding reads the same wherever it comes from.
    for scores, texts in zip(outputs["next"].predictions, data["next"]["choices"], strict=True):
        assert (scores[len(texts) :] == -100).all() and (scores[: len(texts)] != -100).all()
    guesses = outputs["next"].predictions.argmax(-1)
    assert all(guess < len(texts) for guess, texts in zip(guesses, data["next"]["choices"], strict=True))


def test_custom_metrics_see_texts_and_evaluate_modules_squads_form(make_trainer, datasets):
    seen = {}

    class Module:
        add_batch = None

        def compute(self, predictions, references):
            seen.update(predictions=predictions, references=references)
            return {"squad": 1.0}

    def count(prediction):
        seen["texts"] = prediction.predictions, prediction.label_ids
        return {"questions": len(prediction.predictions)}

    data = {**question_datasets(who=7), "reviews": datasets["reviews"]}
    for custom, key, value in ((count, "eval_who_questions", 7), (Module(), "eval_who_squad", 1.0)):
        trainer = make_trainer(build(), data, data, trainer_kwargs={"compute_metrics": {"who": custom}})
        assert trainer.evaluate()[key] == value
    texts, references = seen["texts"]
    assert [type(text) for text in texts] == [str] * 7
    assert references == [row["text"] for row in data["who"]["answers"]]
    assert seen["predictions"] == [{"id": str(i), "prediction_text": text} for i, text in enumerate(texts)]
    assert [row["answers"]["text"] for row in seen["references"]] == references


def test_an_auxiliary_task_changes_no_answer(train):
    tasks = question_tasks()
    tasks[1] = Task("who", "question_answering", max_length=24, stride=6, auxiliary=True)
    torch.manual_seed(0)
    model = SCHEMES["hard"].from_backbone(BACKBONES["bert"](), tasks)
    trainer = train(model)
    alone = select_tasks(model.eval(), ["tone", "next"])
    ids = torch.randint(5, 90, (4, 7))
    check_equal(model(input_ids=ids).logits, alone(input_ids=ids).logits)
    assert "who" not in trainer.predict(trainer.eval_dataset)


@pytest.mark.parametrize("backbone", ["roberta", "modernbert", "llama"])
def test_other_families(train, backbone):
    trainer = train(build(backbone=backbone), max_steps=2)
    assert all(value == value for value in speedless(trainer.evaluate()).values())


def test_native_heads_train_and_leave(train, tmp_path):
    from transformers import AutoModelForMultipleChoice, AutoModelForQuestionAnswering

    model = build(head="native")
    train(model)
    model.export_task("who", tmp_path / "who")
    model.export_task("next", tmp_path / "next")
    ids = torch.randint(5, 90, (4, 7))
    model.eval()
    found = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "who")(ids)
    assert torch.equal(torch.stack([found.start_logits, found.end_logits], -1), model(ids).logits["who"])
    chosen = AutoModelForMultipleChoice.from_pretrained(tmp_path / "next")(ids.view(2, 2, 7)).logits
    assert torch.equal(chosen.view(4, 1), model(ids).logits["next"])


def test_bad_rows_are_found_before_training(make_trainer, datasets):
    bad = choices().map(lambda row, number: {"label": 9 if number == 3 else row["label"]}, with_indices=True)
    with pytest.raises(ValueError, match="dataset 'next' .train.*label 9 in row 3 of column 'label'"):
        make_trainer(build(), {**question_datasets(), "next": bad, "reviews": datasets["reviews"]})


@pytest.mark.parametrize("combination", ["upgrad", pytest.param("sum", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path, combination):
    script = str(Path(__file__).with_name("question_processes.py"))
    results = []
    for processes in (1, 2):
        out = str(tmp_path / f"{processes}.pt")
        address = dict(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
        environments = [address | dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(processes)]
        command = [sys.executable, script, out, combination]
        run_together([command] * processes, environments if processes > 1 else [{}])
        results.append(torch.load(out, weights_only=True))
    one, two = results
    check_close(one["weights"], two["weights"], 1e-4)
    for key, value in speedless(one["metrics"]).items():
        assert two["metrics"][key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    for name, predictions in one["predictions"].items():
        torch.testing.assert_close(two["predictions"][name], predictions, rtol=1e-3, atol=1e-4)
