"""Which number picks the best checkpoint, and whether more of it is better: one answer at every entrance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import PAD_ID, make_tasks
from language import decoder_tokenizer
from transformers import EarlyStoppingCallback, LlamaConfig, LlamaForCausalLM

from hf_multitask import HardSharingModel, Task
from hf_multitask.metrics import default_metric_names, greater_is_better, metric_function, primary_direction
from hf_multitask.models.task_type import TaskType


def absolute_error(prediction):
    return {"mae": float(np.abs(prediction.predictions - prediction.label_ids).mean())}


@pytest.fixture
def build(bert):
    """A function that makes a model of `tone` and `strength`, both read `reviews`, with fields of tasks changed."""

    def make(**fields):
        return HardSharingModel.from_backbone(
            bert, [replace(task, **fields.get(task.name, {})) for task in make_tasks()[:2]]
        )

    return make


@pytest.fixture
def reviews(datasets):
    return {"reviews": datasets["reviews"]}


CHOOSING = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True)


# ---- names ----

GREATER = """
accuracy eval_tone_accuracy macro_f1 f1_macro F1 recall@10 rouge1 rougeL rougeLsum bleu4 exact_match rouge_l roc_auc R2
top5_accuracy balanced_accuracy_score pearsonr matthews_correlation neg_mean_squared_error ndcg_at_10 label_accuracy
"""
SMALLER = """
loss eval_a_loss mse star_mae RMSE wer CER brier_score ece expected_calibration_error word_error_rate log_loss
mean_perplexity hamming_loss smape mean_absolute_error
"""
UNKNOWN = """
score stars half error_reduction accuracy_drop negative_f1 inverse_mse accuracy_gap false_positive_rate f1_std
one_minus_f1 loss_ratio mean 1
"""


@pytest.mark.parametrize(("names", "expected"), [(GREATER, True), (SMALLER, False), (UNKNOWN, None)])
def test_a_name_tells_its_direction_or_says_that_it_does_not(names, expected):
    assert {name: greater_is_better(name) for name in names.split()} == dict.fromkeys(names.split(), expected)


def test_every_default_metric_has_a_direction():
    for kind in TaskType:
        task = Task("a", kind, labels=("O", "B-x") if kind.has_labels else None)
        for name in default_metric_names(task):
            assert primary_direction(task, name) is (name not in ("mse", "perplexity")), name


def test_a_module_that_returns_a_number_has_its_name():
    class Rate:
        name = "wer"
        add_batch = None

        def compute(self, predictions, references):
            return 0.25

    prediction = type("Prediction", (), {"predictions": np.zeros((2, 2)), "label_ids": np.zeros(2, int)})
    assert metric_function(make_tasks()[0], Rate())(prediction) == {"wer": 0.25}


# ---- the direction belongs to the metric that is used ----


@pytest.mark.parametrize(
    ("primary", "field", "up"),
    [(None, {}, False), ("strength", {}, False), ("strength", {"greater_is_better": True}, True)],
)
def test_the_direction_is_that_of_the_user_s_metric(make_trainer, build, reviews, primary, field, up):
    model = build(tone={"metric": "loss"} if not up else {}, strength={"metric": "mae", **field})
    custom = {"compute_metrics": {"strength": absolute_error}}
    options = dict(CHOOSING, max_steps=3, save_strategy="best", primary_task=primary)
    trainer = make_trainer(model, reviews, reviews, trainer_kwargs=custom, **options)
    assert trainer.args.greater_is_better is up
    trainer.train()
    key = "eval_average" if primary is None else "eval_strength_mae"
    values = [line[key] for line in trainer.state.log_history if key in line]
    assert len(set(values)) > 1
    assert trainer.state.best_metric == (max if up else min)(values)


ASKS = {
    "the best checkpoint": CHOOSING,
    "checkpoints of the best": dict(eval_strategy="steps", save_strategy="best"),
    "a plateau": dict(eval_strategy="steps", lr_scheduler_type="reduce_lr_on_plateau"),
    "early stopping": dict(eval_strategy="steps", trainer_kwargs={"callbacks": [EarlyStoppingCallback()]}),
    "the metric itself": dict(eval_strategy="steps", metric_for_best_model="strength_stars"),
}


@pytest.mark.parametrize("case", ASKS)
@pytest.mark.parametrize("metric", ["stars", None])
def test_a_metric_of_unknown_direction_is_refused_where_something_asks(make_trainer, build, reviews, case, metric):
    fields = dict(ASKS[case])
    custom = fields.pop("trainer_kwargs", {}) | {"compute_metrics": {"strength": lambda prediction: {"stars": 1.0}}}
    options = dict(train=reviews, evaluation=reviews, trainer_kwargs=custom, **fields)
    with pytest.raises(ValueError, match="greater_is_better"):
        make_trainer(build(strength={"metric": metric}), **options)
    if metric is not None:
        known = build(tone={"metric": "loss"}, strength={"metric": metric, "greater_is_better": False})
        assert make_trainer(known, **options).args.greater_is_better is False
        assert make_trainer(known, **options).args.metric_for_best_model is not None


@pytest.mark.parametrize("arguments", [dict(primary_task="tone"), dict(), dict(metric_for_best_model="tone_accuracy")])
def test_the_direction_that_was_given_counts(make_trainer, build, reviews, arguments):
    # Of the metric itself it would be the other one.
    model = build(strength={"metric": "pearson"})
    trainer = make_trainer(model, reviews, reviews, greater_is_better=False, **CHOOSING, **arguments)
    assert trainer.args.greater_is_better is False
    unknown = build(strength={"metric": "stars"})
    custom = {"compute_metrics": {"strength": absolute_error}}
    arguments = {**arguments, **({"primary_task": "strength"} if arguments.get("primary_task") else {})}
    for up in (True, False):
        trainer = make_trainer(
            unknown, reviews, reviews, trainer_kwargs=custom, greater_is_better=up, **CHOOSING, **arguments
        )
        assert trainer.args.greater_is_better is up


def test_what_trainingarguments_fill_in_is_not_a_direction_that_was_given(make_trainer, build, reviews):
    trainer = make_trainer(build(), reviews, reviews, metric_for_best_model="loss", greater_is_better=False, **CHOOSING)
    assert (trainer.args.metric_for_best_model, trainer.args.greater_is_better) == ("eval_average", True)


@pytest.mark.parametrize(
    ("fields", "arguments", "match"),
    [
        (dict(tone={"greater_is_better": False}), {}, "'tone'.*contradicts.*accuracy"),
        (dict(strength={"metric": "mse", "greater_is_better": True}), {}, "'strength'.*contradicts.*mse"),
        (
            dict(strength={"metric": "mae", "greater_is_better": True}),
            dict(
                primary_task="strength", greater_is_better=False, trainer_kwargs={"compute_metrics": {"strength": len}}
            ),
            "greater_is_better=False contradicts task 'strength'",
        ),
        (
            dict(strength={"metric": "mse"}),
            {},
            "eval_average cannot pick.*tone_accuracy.*larger.*strength_mse.*smaller",
        ),
    ],
)
def test_contradictions_are_named(make_trainer, build, reviews, fields, arguments, match):
    with pytest.raises(ValueError, match=match):
        make_trainer(build(**fields), reviews, reviews, **CHOOSING, **arguments)


@pytest.mark.parametrize("value", ["yes", 1, 0.0, "false"])
def test_a_direction_is_true_or_false(value):
    with pytest.raises(ValueError, match="greater_is_better must be true or false"):
        Task("a", "regression", greater_is_better=value)
    assert Task.from_dict(Task("a", "regression", greater_is_better=False).to_dict()).greater_is_better is False


def test_a_search_goes_in_the_direction_of_the_metric(make_trainer, bert, build, reviews, monkeypatch):
    pytest.importorskip("optuna")
    seen = {}
    monkeypatch.setattr(
        "transformers.Trainer.hyperparameter_search",
        lambda self, space, objective, trials, direction, *args, **kwargs: seen.update(
            direction=direction, value=objective({"eval_strength_mae": 3.0})
        ),
    )
    model = build(strength={"metric": "mae"})
    custom = {"compute_metrics": {"strength": absolute_error}}
    make_trainer(model, reviews, reviews, primary_task="strength", trainer_kwargs=custom).hyperparameter_search()
    assert seen == {"direction": "minimize", "value": 3.0}
    trainer = make_trainer(build(), reviews, reviews, eval_strategy="steps", prediction_loss_only=True)
    with pytest.raises(ValueError, match="hyperparameter_search.*prediction_loss_only"):
        trainer.hyperparameter_search()


# ---- evaluations without the metric ----


def small_llama():
    size = dict(vocab_size=90, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    return LlamaForCausalLM(LlamaConfig(**size, pad_token_id=PAD_ID))


LACKING = {
    "losses alone": (dict(prediction_loss_only=True), "reviews", "prediction_loss_only"),
    "only the auxiliary task": (dict(), "traits", "eval_dataset"),
    "no text is generated": (dict(metric_for_best_model="eval_lm_rouge_l"), "lm", "predict_with_generate"),
}


@pytest.fixture
def lacking(make_trainer, datasets, bert):
    """A function that makes a trainer whose evaluations lack the mean over the tasks."""

    def make(case, **more):
        arguments, evaluated, _ = LACKING[case]
        if evaluated == "lm":
            model = HardSharingModel.from_backbone(
                small_llama(), [Task("lm", "causal_lm", dataset="traits", weight=1.0)]
            )
            rows = {"traits": datasets["traits"]}
            return make_trainer(model, rows, rows, eval_strategy="steps", eval_steps=2, **arguments, **more)
        tasks = [make_tasks()[0], replace(make_tasks()[2], auxiliary=True)]
        model = HardSharingModel.from_backbone(bert, tasks)
        rows = {name: datasets[name] for name in ("reviews", "traits")}
        return make_trainer(
            model, rows, {evaluated: rows[evaluated]}, eval_strategy="steps", eval_steps=2, **arguments, **more
        )

    return make


@pytest.mark.parametrize("case", list(LACKING)[:2])
def test_training_goes_on_where_nothing_asks_for_the_best(lacking, case):
    trainer = lacking(case)
    trainer.train()
    assert trainer.state.global_step == 4 and trainer.state.best_metric is None
    assert not any("eval_average" in line for line in trainer.state.log_history)


@pytest.mark.parametrize("case", LACKING)
def test_evaluations_without_the_metric_are_refused_where_something_asks(lacking, case):
    with pytest.raises(ValueError, match=LACKING[case][2]):
        lacking(case, save_strategy="steps", save_steps=2, load_best_model_at_end=True)


@pytest.mark.parametrize("case", list(LACKING)[:2])
def test_a_callback_that_comes_later_is_refused_before_the_first_step(lacking, case):
    trainer = lacking(case)
    trainer.add_callback(EarlyStoppingCallback())
    with pytest.raises(ValueError, match=f"EarlyStoppingCallback.*{LACKING[case][2]}"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_loss_can_pick_where_there_are_only_losses(lacking):
    options = dict(save_strategy="steps", save_steps=2, load_best_model_at_end=True)
    trainer = lacking("losses alone", metric_for_best_model="tone_loss", **options)
    trainer.train()
    losses = [line["eval_tone_loss"] for line in trainer.state.log_history if "eval_tone_loss" in line]
    assert trainer.state.best_metric == min(losses)


def test_held_out_tasks_alone_can_be_evaluated_and_can_pick(make_trainer, datasets):
    own = {"processing_class": decoder_tokenizer()}
    tasks = [
        Task("a", "causal_lm", prompt="{text}", label_column="label", dataset="reviews"),
        Task("b", "causal_lm", prompt="{text} it", label_column="label", dataset="b", held_out=True),
    ]
    rows = datasets["reviews"]
    model = HardSharingModel.from_backbone(small_llama(), tasks)
    options = dict(train={"reviews": rows}, evaluation={"b": rows}, eval_strategy="steps", eval_steps=2)
    trainer = make_trainer(model, trainer_kwargs=own, **options)
    trainer.train()
    assert trainer.args.metric_for_best_model is None and trainer.state.global_step == 4
    chosen = make_trainer(model, trainer_kwargs=own, **options, metric_for_best_model="held_out_average").args
    assert (chosen.metric_for_best_model, chosen.greater_is_better) == ("eval_held_out_average", True)
