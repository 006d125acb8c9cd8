"""`MultiTaskTrainer` is `transformers.Trainer` with all its features: each keeps its meaning with several tasks."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_tasks
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_multitask import HardSharingModel, MultiTaskTrainer, MultiTaskTrainingArguments, Task
from hf_multitask.checkpointing import incompleteness
from hf_multitask.trainer import MultiTaskSeq2SeqTrainer, MultiTaskTrainerMixin
from hf_multitask.training_args import MultiTaskSeq2SeqTrainingArguments

TASKS = ("tone", "strength", "traits", "names")
ROWS = 40 + 20 + 11  # of the three datasets


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max((a[name] - b[name]).abs().max().item() for name in a)


def without_speed(metrics: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if not key.endswith(("runtime", "per_second", "_time"))}


def training_lines(trainer) -> list[dict]:
    return [line for line in trainer.state.log_history if "loss" in line and "learning_rate" in line]


def evaluation_lines(trainer) -> list[dict]:
    return [line for line in trainer.state.log_history if "eval_runtime" in line]


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    return model


@pytest.fixture
def build(bert):
    """A function that makes the same model each time; dropout is off unless asked for."""

    def make(tasks=None, dropout: bool = False, model_class=HardSharingModel):
        torch.manual_seed(1)
        model = model_class.from_backbone(bert, tasks or make_tasks())
        return model if dropout else without_dropout(model)

    return make


@pytest.fixture
def scripted(build, datasets):
    """A model whose task `tone` gets its scores from a list, and the arguments that evaluate it after every step."""

    def make(scores):
        score = {"metric": "score", "greater_is_better": True}
        tasks = [Task(**{**t.to_dict(), **score}) if t.name == "tone" else t for t in make_tasks()]
        remaining = iter(scores)
        arguments = dict(
            evaluation=datasets,
            max_steps=len(scores),
            eval_strategy="steps",
            eval_steps=1,
            primary_task="tone",
            trainer_kwargs={"compute_metrics": {"tone": lambda prediction: {"score": next(remaining)}}},
        )
        return build(tasks), arguments

    return make


# ---- callbacks ----


class Events(TrainerCallback):
    """Writes down which events come, in which order."""

    def __init__(self):
        self.seen = []

    def __getattribute__(self, name):
        if name.startswith("on_") and name != "on_prediction_step":
            return lambda args, state, control, **kwargs: self.seen.append((name, state.global_step))
        return super().__getattribute__(name)


def test_callbacks_see_the_events_of_trainer_in_its_order(make_trainer, build, datasets, tokenizer, tmp_path):
    arguments = dict(
        num_train_epochs=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        logging_steps=2,
        eval_on_start=True,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = datasets["reviews"].select(range(32))
    encoded = rows.map(
        lambda row: {**tokenizer(row["text"]), "labels": int(row["label"] == "positive")},
        remove_columns=rows.column_names,
    )
    expected = Events()
    size = dict(vocab_size=90, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    Trainer(
        BertForSequenceClassification(BertConfig(**size)),
        TrainingArguments(str(tmp_path / "plain"), **arguments),
        train_dataset=encoded,
        eval_dataset=encoded,
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[expected],
    ).train()
    seen = Events()
    train = {name: datasets[name].select(range(n)) for name, n in (("reviews", 14), ("traits", 10), ("names", 8))}
    make_trainer(
        build(), train, datasets, trainer_kwargs={"callbacks": [seen]}, **{**arguments, "max_steps": -1}
    ).train()
    assert seen.seen == expected.seen
    # At the start, every three steps and in the end: once each, though there are three datasets.
    assert [step for name, step in seen.seen if name == "on_evaluate"] == [0, 3, 6, 8]


def test_a_callback_that_stops_training_leaves_what_fewer_steps_leave(make_trainer, build):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    arguments = dict(lr_scheduler_type="constant", per_device_train_batch_size=4, gradient_accumulation_steps=2)
    stopped = make_trainer(build(), max_steps=9, trainer_kwargs={"callbacks": [Stop()]}, **arguments)
    stopped.train()
    short = make_trainer(build(), max_steps=3, **arguments)
    short.train()
    assert stopped.state.global_step == 3 and same(weights(stopped.model), weights(short.model))
    assert stopped.progress.rows_seen == short.progress.rows_seen


# ---- optimizers and schedules ----


def test_own_optimizer_and_scheduler_train_like_a_hand_written_loop(make_trainer, build):
    def make_parts(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.7**step)

    model = build()
    parts = make_parts(model)
    trainer = make_trainer(model, max_steps=5, max_grad_norm=0.0, trainer_kwargs={"optimizers": parts})
    trainer.train()
    assert [line["learning_rate"] for line in training_lines(trainer)] == pytest.approx(
        [0.1 * 0.7**k for k in range(5)]
    )

    own = build().train()
    optimizer, scheduler = make_parts(own)
    for _, batch in zip(range(5), make_trainer(own).get_train_dataloader(), strict=False):
        own(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert largest_difference(weights(model), weights(own)) < 1e-6
    assert largest_difference(weights(model), weights(build())) > 1e-3


class Rates(TrainerCallback):
    """Keeps each parameter group's learning rate and weight decay at every step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.steps.append([(group["lr"], group["weight_decay"]) for group in optimizer.param_groups])


def test_every_group_follows_the_cosine_after_its_warm_up(make_trainer, build):
    rates = Rates()
    make_trainer(
        build(),
        max_steps=8,
        learning_rate=1e-3,
        backbone_learning_rate=2e-4,
        head_learning_rate=5e-3,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        warmup_steps=3,
        trainer_kwargs={"callbacks": [rates]},
    ).train()
    factors = [k / 3 for k in range(3)] + [0.5 * (1 + math.cos(math.pi * k / 5)) for k in range(5)]
    groups = [(2e-4, 0.1), (5e-3, 0.1), (2e-4, 0.0), (5e-3, 0.0)]
    assert len(rates.steps) == 8
    for found, factor in zip(rates.steps, factors, strict=True):
        assert [rate for rate, _ in found] == pytest.approx([factor * rate for rate, _ in groups])
        assert [decay for _, decay in found] == [decay for _, decay in groups]


def test_a_group_s_learning_rate_of_nothing_leaves_its_parameters(make_trainer, build):
    before = weights(build())
    for frozen, rates in (("backbone.", (0.0, 1e-2)), ("heads.", (1e-2, 0.0))):
        model = build()
        make_trainer(model, backbone_learning_rate=rates[0], head_learning_rate=rates[1], weight_decay=0.1).train()
        moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
        assert moved and not any(name.startswith(frozen) for name in moved)


SCORES = [0.5, 0.6, 0.4, 0.7, 0.6, 0.8]
# The rate is halved after each evaluation that brings no better score; each line is logged before its evaluation.
PLATEAU = [1.0, 1.0, 1.0, 0.5, 0.5, 0.25]


@pytest.mark.parametrize("given", [{"mode": "max"}, {}], ids=["direction given", "direction of the metric"])
@pytest.mark.sample(2)
def test_a_plateau_of_a_task_s_metric_lowers_the_learning_rate(make_trainer, scripted, given):
    model, arguments = scripted(SCORES)
    trainer = make_trainer(
        model,
        learning_rate=1e-3,
        lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs={"factor": 0.5, "patience": 0, "threshold": 0.0, **given},
        **arguments,
    )
    trainer.train()
    assert [line["learning_rate"] for line in training_lines(trainer)] == pytest.approx([1e-3 * f for f in PLATEAU])


@pytest.mark.parametrize("scheduler", ["reduce_lr_on_plateau", "greedy"])
def test_a_plateau_of_an_average_without_direction_is_refused_before_training(make_trainer, build, datasets, scheduler):
    tasks = make_tasks()
    tasks[1] = Task("strength", "regression", dataset="reviews", label_column="strength", metric="mse")
    with pytest.raises(ValueError, match="eval_average .*set primary_task"):
        make_trainer(
            build(tasks), evaluation=datasets, lr_scheduler_type=scheduler, eval_strategy="steps", eval_steps=1
        )


def test_clipping_bounds_the_step_and_the_norm_that_is_logged_is_the_one_before(make_trainer, build):
    before, model = weights(build()), build()
    trainer = make_trainer(
        model, max_steps=1, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.01
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()
    step = math.sqrt(sum(((value - before[name]) ** 2).sum().item() for name, value in weights(model).items()))
    assert step == pytest.approx(0.1 * 0.01, rel=1e-3)
    own = build().train()
    own(**batch).loss.backward()
    norm = math.sqrt(sum((p.grad**2).sum().item() for p in own.parameters() if p.grad is not None))
    assert norm > 0.1 and training_lines(trainer)[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)


# ---- searches over hyperparameters and batch sizes ----


class Runs(TrainerCallback):
    """Keeps what each run of a trainer begins with, and the rows it has seen in the end."""

    def __init__(self):
        self.trainer, self.arguments, self.weights, self.counts, self.rows_seen = None, [], [], [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.arguments.append((args.head_learning_rate, args.per_device_train_batch_size))
        self.weights.append(weights(model))
        self.counts.append((dict(self.trainer.progress.rows_seen), self.trainer.guard.skipped, state.global_step))

    def on_train_end(self, args, state, control, **kwargs):
        self.rows_seen.append(dict(self.trainer.progress.rows_seen))


def search(trainer, name, values, settings=lambda value: {}):
    """Try each value once; return the best run, and the objectives in the order of the trials."""
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    objectives = []

    def space(trial):
        value = trial.suggest_categorical(name, values)
        return {name: value, **settings(value)}

    def objective(metrics):
        objectives.append(metrics["eval_average"])
        return metrics["eval_average"]

    best = trainer.hyperparameter_search(
        hp_space=space,
        compute_objective=objective,
        n_trials=len(values),
        direction="maximize",
        backend="optuna",
        sampler=optuna.samplers.GridSampler({name: values}, seed=0),
    )
    return best, objectives


@pytest.mark.slow
def test_a_hyperparameter_search_is_as_many_fresh_runs_and_returns_the_best(make_trainer, build, datasets):
    runs, rate_of = Runs(), {4: 1e-2, 8: 1e-5}
    given = dict(evaluation=datasets, max_steps=9)
    init = {"model_init": lambda: build(dropout=True)}
    runs.trainer = make_trainer(None, trainer_kwargs={**init, "callbacks": [runs]}, **given)
    best, objectives = search(
        runs.trainer, "per_device_train_batch_size", list(rate_of), lambda rows: {"head_learning_rate": rate_of[rows]}
    )
    expected, rows_seen = [], []
    for rate, rows in runs.arguments:
        single = make_trainer(
            None, head_learning_rate=rate, per_device_train_batch_size=rows, trainer_kwargs=init, **given
        )
        single.train()
        expected.append(single.evaluate()["eval_average"])
        rows_seen.append(single.progress.rows_seen)
    assert sorted(runs.arguments) == [(1e-5, 8), (1e-2, 4)]
    assert objectives == expected and len(set(expected)) == 2 and runs.rows_seen == rows_seen
    assert best.objective == max(expected)
    assert best.hyperparameters["per_device_train_batch_size"] == runs.arguments[expected.index(max(expected))][1]
    assert runs.counts == [({}, 0, 0)] * 2 and all(same(start, runs.weights[0]) for start in runs.weights)


@pytest.mark.slow
def test_the_model_that_model_init_makes_for_a_trial_brings_its_task_weights(make_trainer, build, datasets):
    def with_weight(weight):
        first, *others = make_tasks()
        return build([Task(**{**first.to_dict(), "weight": weight}), *others])

    def init(trial):
        return with_weight(1.0 if trial is None else trial.suggest_categorical("tone_weight", [1.0, 50.0]))

    class FirstLoss(TrainerCallback):
        losses = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "learning_rate" in logs:
                self.losses.append(logs["loss"])

    seen = FirstLoss()
    trainer = make_trainer(
        None, evaluation=datasets, max_steps=1, trainer_kwargs={"model_init": init, "callbacks": [seen]}
    )
    search(trainer, "tone_weight", [1.0, 50.0])
    expected = []
    for weight in (1.0, 50.0):
        single = make_trainer(with_weight(weight), max_steps=1)
        single.train()
        expected.append(training_lines(single)[0]["loss"])
    assert sorted(seen.losses) == pytest.approx(sorted(expected))


def build_from(bert, tasks):
    return HardSharingModel.from_backbone(bert, tasks)


@pytest.mark.parametrize("by", ["place", "name"])
@pytest.mark.sample(2)
def test_model_init_may_be_a_partial_function(make_trainer, bert, tasks, by):
    init = partial(build_from, bert, tasks) if by == "place" else partial(build_from, bert=bert, tasks=tasks)
    trainer = make_trainer(None, trainer_kwargs={"model_init": init})
    trainer.train()
    assert trainer.state.global_step == 4 and [task.name for task in trainer.model.tasks] == list(TASKS)


class SmallMemory(HardSharingModel):
    """Has no memory for more than four rows when it is trained."""

    def forward(self, input_ids=None, **kwargs):
        if self.training and len(input_ids) > 4:
            raise RuntimeError("CUDA out of memory.")
        return super().forward(input_ids=input_ids, **kwargs)


@pytest.mark.slow
def test_the_batch_size_that_is_found_is_the_one_everything_goes_by(make_trainer, build, tmp_path):
    arguments = dict(
        max_steps=-1, num_train_epochs=1, gradient_accumulation_steps=2, save_strategy="steps", save_steps=5
    )
    # 6 rows are too many, and so are the 5 that are tried next.
    finding = dict(per_device_train_batch_size=6, auto_find_batch_size=True, **arguments)
    found = make_trainer(build(model_class=SmallMemory), output_dir=str(tmp_path / "found"), **finding)
    found.train()
    given = make_trainer(build(), output_dir=str(tmp_path / "given"), per_device_train_batch_size=4, **arguments)
    given.train()
    steps = math.ceil(ROWS / 8)
    assert found.state.train_batch_size == 4 and found.state.global_step == given.state.global_step == steps
    assert same(weights(found.model), weights(given.model))
    assert found.progress.rows_seen == given.progress.rows_seen
    assert sum(found.progress.rows_seen.values()) - found.progress.rows_seen["strength"] == steps * 8
    assert [without_speed(line) for line in training_lines(found)] == [
        without_speed(line) for line in training_lines(given)
    ]
    states = [
        json.loads((tmp_path / name / "checkpoint-5/multitask_state.json").read_text()) for name in ("found", "given")
    ]
    assert states[0] == states[1] and states[0]["run"]["per_device_train_batch_size"] == 4

    # The checkpoint says which size was found: going on from it is the same run.
    resumed = make_trainer(build(model_class=SmallMemory), output_dir=str(tmp_path / "again"), **finding)
    resumed.train(resume_from_checkpoint=str(tmp_path / "found" / "checkpoint-5"))
    assert same(weights(resumed.model), weights(given.model))
    assert resumed.progress.rows_seen == given.progress.rows_seen


# ---- logs ----


def test_tensorboard_draws_each_task_as_its_own_series(make_trainer, build, datasets, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = make_trainer(build(), evaluation=datasets, report_to="tensorboard", eval_strategy="steps", eval_steps=2)
    trainer.train()
    events = accumulator.EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    # Trainer renames "eval_x" to "eval/x", and all else to "train/...".
    expected: dict[str, list] = {}
    for line in training_lines(trainer) + evaluation_lines(trainer):
        for key, value in line.items():
            name = f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"
            if key != "step":
                expected.setdefault(name, []).append((line["step"], value))
    for task in TASKS:
        assert len(expected[f"train/share/{task}"]) == 4 and len(expected[f"eval/{task}_loss"]) == 2
        assert len(expected[f"train/loss/{task}"]) >= 1
    assert len(expected["eval/average"]) == 2 and len(expected["eval/names_f1"]) == 2
    for name, points in expected.items():
        if name != "train/epoch":  # of both kinds of lines
            read = [(event.step, event.value) for event in events.Scalars(name)]
            assert read == [(step, pytest.approx(value, rel=1e-6)) for step, value in points], name


def test_a_log_line_holds_the_means_since_the_line_before(make_trainer, build):
    fine, coarse = (
        make_trainer(build(), max_steps=5),
        make_trainer(build(), max_steps=5, logging_steps=5, logging_first_step=True),
    )
    fine.train()
    coarse.train()
    steps, lines = training_lines(fine), training_lines(coarse)
    assert [line["step"] for line in lines] == [1, 5]
    assert without_speed(lines[0]) == without_speed(steps[0])
    assert lines[1]["loss"] == pytest.approx(np.mean([line["loss"] for line in steps[1:]]), rel=1e-5)
    for task in TASKS:
        own = [line[f"loss/{task}"] for line in steps[1:] if f"loss/{task}" in line]
        assert lines[1][f"loss/{task}"] == pytest.approx(np.mean(own), rel=1e-5)


@pytest.mark.parametrize("kind", ["all", "non_padding"])
@pytest.mark.sample(2)
def test_the_input_tokens_seen_are_those_of_the_batches(make_trainer, build, kind):
    arguments = dict(max_steps=4, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    trainer = make_trainer(build(), include_num_input_tokens_seen=kind, **arguments)
    batches = [batch for _, batch in zip(range(8), trainer.get_train_dataloader(), strict=False)]
    trainer.train()
    tensor = "input_ids" if kind == "all" else "attention_mask"
    expected = sum(b[tensor].numel() if kind == "all" else int(b[tensor].sum()) for b in batches)
    assert trainer.state.num_input_tokens_seen == expected
    assert training_lines(trainer)[-1]["num_input_tokens_seen"] == expected


# ---- what changes the loss ----


def test_label_smoothing_of_a_task_is_in_its_training_loss_alone(make_trainer, build, datasets):
    smoothing = {"tone": 0.2, "names": 0.1}
    tasks = [Task(**{**t.to_dict(), "label_smoothing": smoothing.get(t.name, 0.0)}) for t in make_tasks()]
    trainer = make_trainer(build(tasks), evaluation=datasets, max_steps=1, learning_rate=0.0)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()
    with torch.no_grad():
        logits = build().eval()(**batch).logits
    line = training_lines(trainer)[0]
    for name, amount in smoothing.items():
        labels, scores = batch["labels"][name].flatten(), logits[name].flatten(end_dim=-2)
        if name == "names":
            scores = logits[name][:, : batch["labels"][name].shape[1]].flatten(0, 1)
        scores, labels = scores[labels != -100].log_softmax(-1), labels[labels != -100]
        right = -scores.gather(1, labels[:, None]).squeeze(1)
        expected = ((1 - amount) * right - amount * scores.mean(-1)).mean().item()
        assert line[f"loss/{name}"] == pytest.approx(expected, rel=1e-5)
        assert abs(expected - right.mean().item()) > 1e-5
    strength = F.mse_loss(logits["strength"], batch["labels"]["strength"]).item()
    assert line["loss/strength"] == pytest.approx(strength, rel=1e-5)
    plain = make_trainer(build(), evaluation=datasets)  # its learning rate was 0: the same weights
    assert without_speed(trainer.evaluate())["eval_tone_loss"] == plain.evaluate()["eval_tone_loss"]


@pytest.mark.slow
def test_neftune_disturbs_training_only_and_is_gone_afterwards(make_trainer, build, datasets):
    plain, noisy = (
        make_trainer(build(), evaluation=datasets, learning_rate=0.0, neftune_noise_alpha=alpha)
        for alpha in (None, 50.0)
    )
    for trainer in (plain, noisy):
        trainer.train()
    assert all(
        abs(a["loss"] - b["loss"]) > 1e-6 for a, b in zip(training_lines(plain), training_lines(noisy), strict=True)
    )
    assert not noisy.model.get_input_embeddings()._forward_hooks
    assert without_speed(noisy.evaluate()) == without_speed(plain.evaluate())


@pytest.mark.slow
def test_neftune_is_felt_by_the_update(make_trainer, build):
    trained = []
    for alpha in (None, 0.0, 5.0):
        trainer = make_trainer(build(), neftune_noise_alpha=alpha)
        trainer.train()
        trained.append(weights(trainer.model))
    assert same(trained[0], trained[1]) and not same(trained[0], trained[2])


# ---- what changes nothing ----

HARMLESS = {
    "torch_empty_cache_steps": dict(torch_empty_cache_steps=1),
    "remove_unused_columns": dict(remove_unused_columns=False),
    "label_names": dict(label_names=["labels"]),
    "data_seed": dict(data_seed=42),
    "tokens seen": dict(include_num_input_tokens_seen="non_padding"),
    "logging_first_step": dict(logging_steps=100, logging_first_step=True),
    "progress bars": dict(disable_tqdm=False),
    "saving": dict(save_strategy="steps", save_steps=1, save_total_limit=1),
    "no clipping": dict(max_grad_norm=0.0),
}


@pytest.mark.parametrize("case", HARMLESS)
@pytest.mark.sample(9)
def test_what_does_not_touch_the_update_leaves_it_bit_for_bit(make_trainer, build, case):
    plain = make_trainer(build(dropout=True), seed=42, max_grad_norm=1e6)
    plain.train()
    other = make_trainer(build(dropout=True), **{"seed": 42, "max_grad_norm": 1e6, **HARMLESS[case]})
    other.train()
    assert same(weights(plain.model), weights(other.model))
    assert not same(weights(plain.model), weights(build()))


WATCHED = {
    "eval_on_start": dict(eval_on_start=True),
    "evaluations": dict(eval_strategy="steps", eval_steps=1),
    "eval_accumulation_steps": dict(eval_strategy="steps", eval_steps=2, eval_accumulation_steps=1),
    "load_best_model_at_end": dict(eval_strategy="steps", eval_steps=4, save_strategy="best"),
}


@pytest.mark.parametrize("case", WATCHED)
@pytest.mark.sample(4)
def test_evaluations_on_the_way_do_not_change_the_way(make_trainer, build, datasets, case):
    plain = make_trainer(build())
    plain.train()
    watched = make_trainer(build(), evaluation=datasets, **WATCHED[case])
    watched.train()
    assert evaluation_lines(watched) and same(weights(plain.model), weights(watched.model))


@pytest.mark.parametrize("composition", ["mixed", "single_task"])
@pytest.mark.parametrize(("epochs", "accumulation", "steps"), [(2, 1, 18), (2, 2, 10), (0.5, 1, 5)])
@pytest.mark.sample(5)
def test_steps_and_epochs_of_the_same_length_are_the_same_run(
    make_trainer, build, composition, epochs, accumulation, steps
):
    arguments = dict(gradient_accumulation_steps=accumulation, batch_composition=composition)
    by_epochs = make_trainer(build(dropout=True), max_steps=-1, num_train_epochs=epochs, **arguments)
    by_epochs.train()
    by_steps = make_trainer(build(dropout=True), max_steps=steps, **arguments)
    by_steps.train()
    assert by_epochs.state.global_step == by_steps.state.global_step == steps
    assert same(weights(by_epochs.model), weights(by_steps.model))
    assert by_epochs.progress.rows_seen == by_steps.progress.rows_seen


@pytest.mark.parametrize(("drop_last", "steps"), [(False, 9), (True, 8)])
def test_the_last_window_of_an_epoch_can_be_dropped(make_trainer, build, drop_last, steps):
    trainer = make_trainer(build(), max_steps=-1, num_train_epochs=1, dataloader_drop_last=drop_last)
    trainer.train()
    assert trainer.state.global_step == steps and trainer.state.epoch == 1
    rows = trainer.progress.rows_seen
    assert sum(rows.values()) - rows["strength"] == steps * 8


def test_seed_and_data_seed_decide_about_different_things(make_trainer, build):
    def run(**seeds):
        trainer = make_trainer(build(dropout=True), max_steps=2, **seeds)
        rows = [batch["input_ids"].tolist() for batch in trainer.get_train_dataloader()]
        trainer.train()
        return rows, weights(trainer.model)

    first, other_dropout = run(seed=1, data_seed=5), run(seed=2, data_seed=5)
    other_rows, by_seed = run(seed=1, data_seed=6), run(seed=5)
    assert first[0] == other_dropout[0] == by_seed[0] != other_rows[0]
    assert not same(first[1], other_dropout[1])


# ---- evaluation ----


@pytest.mark.parametrize(
    "arguments", [dict(eval_accumulation_steps=1), dict(label_names=["labels"]), dict(eval_use_gather_object=True)]
)
def test_how_outputs_are_gathered_changes_no_metric(make_trainer, build, datasets, arguments):
    plain = make_trainer(build(), evaluation=datasets, per_device_eval_batch_size=3)
    other = make_trainer(build(), evaluation=datasets, per_device_eval_batch_size=3, **arguments)
    assert other.label_names == ["labels"]
    metrics = without_speed(plain.evaluate())
    assert metrics["eval_average"] != 0 and without_speed(other.evaluate()) == metrics
    expected, found = plain.predict(datasets), other.predict(datasets)
    for task in TASKS:
        assert np.array_equal(expected[task].predictions, found[task].predictions)


def test_the_evaluation_at_the_start_is_of_the_untrained_model(make_trainer, build, datasets):
    trainer = make_trainer(build(), evaluation=datasets, eval_on_start=True)
    trainer.train()
    (line,) = evaluation_lines(trainer)
    expected = without_speed(make_trainer(build(), evaluation=datasets).evaluate())
    assert line["step"] == 0
    assert {key: line[key] for key in expected if key.startswith("eval_")} == {
        key: value for key, value in expected.items() if key.startswith("eval_")
    }


def test_metrics_may_ask_for_inputs_and_losses(make_trainer, build, datasets):
    seen = {}

    def of_tone(prediction):
        seen.update(inputs=prediction.inputs, losses=prediction.losses)
        return {"score": 1.0}

    trainer = make_trainer(
        build(),
        evaluation=datasets,
        per_device_eval_batch_size=7,
        include_for_metrics=["inputs", "loss"],
        trainer_kwargs={"compute_metrics": {"tone": of_tone}},
    )
    metrics = trainer.evaluate()
    rows = trainer.eval_dataset.split()[0]
    for number, tokens in enumerate(seen["inputs"]):
        own = rows[number]["input_ids"]
        assert tokens[: len(own)].tolist() == list(own)
    assert seen["losses"].shape == (40,) and metrics["eval_tone_loss"] == pytest.approx(seen["losses"].mean())


def test_logits_are_preprocessed_per_task(make_trainer, build, datasets):
    shapes, seen = [], {}

    def halve(logits, labels):
        shapes.append((tuple(logits.shape[:1]), tuple(labels.shape[:1])))
        return logits / 2

    def of_strength(prediction):
        seen["half"] = prediction.predictions
        return {"score": 1.0}

    plain = make_trainer(build(), evaluation=datasets)
    expected = plain.evaluate()
    trainer = make_trainer(
        build(),
        evaluation=datasets,
        trainer_kwargs={"compute_metrics": {"strength": of_strength}, "preprocess_logits_for_metrics": halve},
    )
    metrics = trainer.evaluate()
    assert all(rows == labels for rows, labels in shapes) and len(shapes) >= 4
    assert np.array_equal(seen["half"], plain.predict(datasets)["strength"].predictions / 2)
    assert metrics["eval_tone_accuracy"] == expected["eval_tone_accuracy"]  # the best label stays the best
    assert trainer.preprocess_logits_for_metrics is halve


# ---- checkpoints ----


@pytest.mark.parametrize(("limit", "kept"), [(None, [1, 2, 4]), (1, [4])])
@pytest.mark.sample(2)
def test_only_the_best_models_are_saved(make_trainer, scripted, limit, kept):
    model, arguments = scripted([0.1, 0.9, 0.5, 0.95, 0.2])
    trainer = make_trainer(
        model, save_strategy="best", save_total_limit=limit, load_best_model_at_end=True, **arguments
    )
    trainer.train()
    folders = sorted(Path(trainer.args.output_dir).glob("checkpoint-*"))
    assert [folder.name for folder in folders] == [f"checkpoint-{step}" for step in kept]
    assert all(incompleteness(folder) is None for folder in folders)
    best = HardSharingModel.from_pretrained(folders[-1])
    assert same(weights(best), weights(trainer.model)) and trainer.state.best_metric == 0.95


def test_the_limit_of_checkpoints_spares_the_best(make_trainer, scripted):
    model, arguments = scripted([0.1, 0.9, 0.5, 0.4, 0.2])
    trainer = make_trainer(
        model, save_strategy="steps", save_steps=1, save_total_limit=2, load_best_model_at_end=True, **arguments
    )
    trainer.train()
    folders = sorted(Path(trainer.args.output_dir).glob("checkpoint-*"))
    assert [folder.name for folder in folders] == ["checkpoint-2", "checkpoint-5"]
    assert same(weights(HardSharingModel.from_pretrained(folders[0])), weights(trainer.model))
    assert not same(weights(HardSharingModel.from_pretrained(folders[1])), weights(trainer.model))


# ---- other trainers ----


@pytest.mark.slow
def test_the_seq2seq_trainer_is_the_same_trainer_for_several_tasks(make_trainer, build, datasets, tokenizer, tmp_path):
    arguments = dict(
        max_steps=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        head_learning_rate=1e-2,
        task_sampling="uniform",
    )
    results = []
    for trainer_class, args_class in (
        (MultiTaskTrainer, MultiTaskTrainingArguments),
        (MultiTaskSeq2SeqTrainer, MultiTaskSeq2SeqTrainingArguments),
    ):
        trainer = trainer_class(
            build(dropout=True),
            args_class(str(tmp_path / trainer_class.__name__), **arguments),
            train_dataset=datasets,
            eval_dataset=datasets,
            processing_class=tokenizer,
        )
        trainer.train()
        lines = [without_speed(line) for line in trainer.state.log_history if "train_loss" not in line]
        results.append((weights(trainer.model), lines, trainer.predict(datasets)))
    (a, lines, predicted), (b, other_lines, other_predicted) = results
    assert same(a, b) and lines == other_lines and len(lines) == 6
    assert all(np.array_equal(predicted[t].predictions, other_predicted[t].predictions) for t in TASKS)


@pytest.mark.slow
def test_with_a_plain_seq2seq_model_it_is_the_seq2seq_trainer(tokenizer, datasets, tmp_path):
    def encode(row):
        return {"input_ids": tokenizer(row["text"])["input_ids"], "labels": tokenizer(row["label"])["input_ids"]}

    rows = datasets["reviews"].select(range(12))
    rows = rows.map(encode, remove_columns=rows.column_names)
    size = dict(vocab_size=90, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    results = []
    for trainer_class, args_class in (
        (Seq2SeqTrainer, Seq2SeqTrainingArguments),
        (MultiTaskSeq2SeqTrainer, MultiTaskSeq2SeqTrainingArguments),
    ):
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(T5Config(**size, pad_token_id=3, decoder_start_token_id=3))
        args = args_class(
            str(tmp_path / trainer_class.__name__),
            max_steps=3,
            per_device_train_batch_size=4,
            logging_steps=1,
            predict_with_generate=True,
            generation_max_length=6,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = trainer_class(
            model,
            args,
            train_dataset=rows,
            eval_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(tokenizer, model),
            processing_class=tokenizer,
        )
        trainer.train()
        losses = [line["loss"] for line in training_lines(trainer)]
        generation = dict(max_length=5, suppress_tokens=[3])  # an untrained model says nothing but its padding id
        metrics = without_speed(trainer.evaluate(**generation))
        results.append((weights(model), losses, metrics, trainer.predict(rows, **generation).predictions))
    (a, losses, metrics, generated), (b, own_losses, own_metrics, own_generated) = results
    assert losses == own_losses and len(losses) == 3
    assert same(a, b), [(n, (a[n] - b[n]).abs().max()) for n in a if not torch.equal(a[n], b[n])]
    assert metrics == own_metrics
    assert np.array_equal(generated, own_generated) and (generated[:, 1:5] != 3).all() and (generated[:, 5:] == 3).all()


def test_a_trainer_of_one_s_own_keeps_its_overrides(build, datasets, tokenizer, tmp_path):
    class Mine(MultiTaskTrainerMixin, Trainer):
        def log(self, logs, start_time=None):
            super().log({**logs, "mine": 7.0}, start_time)

    arguments = dict(max_steps=2, logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    given = dict(train_dataset=datasets, eval_dataset=datasets, processing_class=tokenizer)
    mine = Mine(build(), MultiTaskTrainingArguments(str(tmp_path / "mine"), save_strategy="no", **arguments), **given)
    mine.train()
    mine.evaluate()
    plain = MultiTaskTrainer(
        build(), MultiTaskTrainingArguments(str(tmp_path / "plain"), save_strategy="no", **arguments), **given
    )
    plain.train()
    plain.evaluate()
    assert same(weights(mine.model), weights(plain.model))
    lines = [without_speed(line) for line in mine.state.log_history if "train_loss" not in line]
    expected = [without_speed(line) for line in plain.state.log_history if "train_loss" not in line]
    assert lines == [{**line, "mine": 7.0} for line in expected] and len(lines) == 3


@pytest.mark.parametrize(
    ("trainer_class", "args_class"),
    [
        (MultiTaskTrainer, MultiTaskTrainingArguments),
        (MultiTaskSeq2SeqTrainer, MultiTaskSeq2SeqTrainingArguments),
    ],
)
def test_without_arguments_there_are_default_ones(
    build, datasets, tokenizer, tmp_path, monkeypatch, trainer_class, args_class
):
    monkeypatch.chdir(tmp_path)
    trainer = trainer_class(build(), train_dataset=datasets, processing_class=tokenizer)
    assert type(trainer.args) is args_class and Path(trainer.args.output_dir).name == "tmp_trainer"
    assert (trainer.args.task_sampling, trainer.args.num_train_epochs) == ("temperature", 3)


# ---- arguments from a command line or a file ----

GIVEN = dict(
    output_dir="runs/out",
    task_sampling="weighted",
    task_sampling_kwargs={"weights": {"reviews": 1, "traits": 2.5, "names": 0}},
    batch_composition="single_task",
    loss_reduction="tasks",
    primary_task="tone",
    on_nonfinite_loss="skip",
    backbone_learning_rate=1e-5,
    head_learning_rate=1e-2,
    max_length=48,
    dataset_num_proc=2,
    learning_rate=3e-4,
    lr_scheduler_kwargs={"num_cycles": 2},
    use_cpu=True,
)


@pytest.mark.parametrize("args_class", [MultiTaskTrainingArguments, MultiTaskSeq2SeqTrainingArguments])
def test_arguments_parse_from_a_command_line_and_from_json(args_class, tmp_path):
    expected = args_class(**GIVEN)
    line = []
    for key, value in GIVEN.items():
        line += [f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value)]
    (parsed,) = HfArgumentParser(args_class).parse_args_into_dataclasses(line)
    path = tmp_path / "args.json"
    path.write_text(json.dumps(GIVEN))
    (read,) = HfArgumentParser(args_class).parse_json_file(str(path))
    for args in (parsed, read):
        assert type(args) is args_class
        assert {**args.to_dict(), "run_name": None} == {**expected.to_dict(), "run_name": None}
        assert args.mixing_kwargs == GIVEN["task_sampling_kwargs"]


def test_a_wrong_value_on_the_command_line_is_named():
    parser = HfArgumentParser(MultiTaskTrainingArguments)
    with pytest.raises(ValueError, match="task_sampling 'temprature' is not known, did you mean 'temperature'"):
        parser.parse_args_into_dataclasses(["--output_dir", "x", "--task_sampling", "temprature"])
