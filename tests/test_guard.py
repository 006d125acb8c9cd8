"""A loss that is NaN or infinite names task, step and rows, and moves nothing."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from conftest import make_datasets
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from hf_multitask import HardSharingModel, Task
from hf_multitask.checkpointing import last_complete_checkpoint
from hf_multitask.guard import LossGuard, NonFiniteLossError
from hf_multitask.models.manifest import write_manifest

BAD_ROW = 13


@pytest.fixture
def spoilt():
    """Rows of which one has a target so large that its squared error overflows float32."""
    datasets = make_datasets()
    rows = datasets["reviews"]
    strength = list(rows["strength"])
    strength[BAD_ROW] = 3e38
    datasets["reviews"] = Dataset.from_dict({**{c: rows[c] for c in ("text", "label")}, "strength": strength})
    return datasets


def training_lines(trainer):
    return [line for line in trainer.state.log_history if "learning_rate" in line]


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("accumulation", [1, 3])
def test_raise_names_task_step_and_row_and_leaves_the_last_checkpoint(make_trainer, model, spoilt, accumulation):
    trainer = make_trainer(
        model,
        spoilt,
        max_steps=30,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulation,
        save_strategy="steps",
        save_steps=1,
    )
    with pytest.raises(NonFiniteLossError) as error:
        trainer.train()
    step = trainer.state.global_step
    assert f"step {step} " in str(error.value) and "task 'strength'" in str(error.value)
    assert f"row(s) {BAD_ROW} of dataset 'reviews'" in str(error.value) and "'tone'" not in str(error.value)
    if step:
        saved = HardSharingModel.from_pretrained(f"{trainer.args.output_dir}/checkpoint-{step}")
        assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), model.parameters(), strict=True))


def test_skip_leaves_the_step_out_counts_it_and_goes_on(make_trainer, model, spoilt):
    trainer = make_trainer(model, spoilt, max_steps=30, per_device_train_batch_size=8, on_nonfinite_loss="skip")
    moved = []

    def before_step(optimizer, args, kwargs):
        moved.append(any(p.grad is not None for group in optimizer.param_groups for p in group["params"]))

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(before_step)
    trainer.train()
    assert trainer.state.global_step == 30 and trainer.guard.skipped == moved.count(False) >= 1
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    lines = training_lines(trainer)
    assert lines[-1]["skipped_steps"] == trainer.guard.skipped
    # A step that was not trained has no loss, for the run and for each task; all others have one.
    assert [("loss" in line, "grad_norm" in line, "loss/tone" in line) for line in lines] == [(m, m, m) for m in moved]
    assert all(math.isfinite(value) for line in lines for key, value in line.items())
    losses = [line["loss"] for line in lines if "loss" in line]
    summary = trainer.state.log_history[-1]
    assert summary["train_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)


class SpoilGradient(TrainerCallback):
    """Makes the gradient of one parameter NaN or infinite in some steps, and notes weights and balancing by step."""

    def __init__(self, parameter: str, value: float, steps) -> None:
        self.parameter, self.value, self.steps, self.on, self.seen = parameter, value, steps, False, []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def spoil(grad):
            return torch.full_like(grad, self.value) if self.on else None

        model.get_parameter(self.parameter).register_hook(spoil)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.on = state.global_step in self.steps
        self.seen.append((weights(model), copy.deepcopy(self.trainer.balancer.state_dict())))


HEAD, SHARED = "heads.strength.layers.1.weight", "backbone.encoder.layer.1.output.dense.weight"
WAYS = {
    "sum": {},
    "accumulated": dict(gradient_accumulation_steps=2),
    "upgrad": dict(gradient_combination="upgrad"),
    "sketch": dict(gradient_combination="upgrad", gradient_memory="sketch"),
    "graddrop": dict(gradient_combination="graddrop"),
    "uncertainty": dict(loss_weighting="uncertainty"),
    "gradnorm": dict(loss_weighting="gradnorm"),
    "not clipped": dict(max_grad_norm=0.0),
}


@pytest.mark.parametrize("parameter", [HEAD, SHARED])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.sample(7)
def test_a_gradient_that_is_not_finite_with_a_finite_loss(make_trainer, model, way, value, parameter):
    given = dict(max_steps=4, optim="adamw_torch", weight_decay=0.1, save_strategy="steps", save_steps=1, **WAYS[way])
    spoil = SpoilGradient(parameter, value, steps=(2,))
    trainer = spoil.trainer = make_trainer(model, trainer_kwargs=dict(callbacks=[spoil]), **given)
    with pytest.raises(NonFiniteLossError) as error:
        trainer.train()
    text = str(error.value)
    assert "gradient of step 2 " in text and ("task 'strength'" in text) == (parameter == HEAD), text
    assert parameter in text and "'tone'" not in text and "good" not in text
    assert "checkpoint-2 holds the weights that led to this" in text and "trained is checkpoint-1." in text
    assert all(torch.equal(a, b) for a, b in zip(weights(model).values(), spoil.seen[2][0].values(), strict=True))

    spoil.on = False
    spoil = SpoilGradient(parameter, value, steps=(2,))
    given |= dict(on_nonfinite_loss="skip", save_strategy="no")
    trainer = spoil.trainer = make_trainer(model, trainer_kwargs=dict(callbacks=[spoil]), **given)
    trainer.train()
    (before, balancing), (after, balanced) = spoil.seen[2:4]
    assert all(torch.equal(a, b) for a, b in zip(before.values(), after.values(), strict=True))
    assert balancing == balanced  # a step that is left out teaches nothing
    assert trainer.guard.skipped == 1 and all(torch.isfinite(value).all() for value in model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(after.values(), weights(model).values(), strict=True))


def test_a_run_whose_steps_are_all_skipped_is_given_up(make_trainer, model):
    spoil = SpoilGradient(SHARED, math.nan, steps=(0, *range(2, 100)))
    given = dict(max_steps=50, on_nonfinite_loss="skip", max_skipped_steps=3)
    trainer = spoil.trainer = make_trainer(model, trainer_kwargs=dict(callbacks=[spoil]), **given)
    with pytest.raises(NonFiniteLossError, match="4 steps in a row.*max_skipped_steps=3"):
        trainer.train()
    assert trainer.state.global_step == 5 and trainer.guard.skipped == 5
    assert ["loss" in line for line in training_lines(trainer)] == [False, True, False, False, False]


def test_a_log_line_is_the_mean_over_the_steps_that_were_trained(make_trainer, model):
    lines = []
    for every in (1, 4):
        torch.manual_seed(0)
        spoil = SpoilGradient(HEAD, math.nan, steps=(1, 2))
        given = dict(max_steps=4, on_nonfinite_loss="skip", logging_steps=every, learning_rate=0.0)
        trainer = spoil.trainer = make_trainer(model, trainer_kwargs=dict(callbacks=[spoil]), **given)
        trainer.train()
        lines.append(training_lines(trainer))
    each, (whole,) = lines
    for key in ("loss", "loss/tone", "loss/names"):
        assert whole[key] == pytest.approx((each[0][key] + each[3][key]) / 2, rel=1e-5)


class TooLarge(TrainerCallback):
    """Takes one step with a learning rate of its own."""

    def __init__(self, step: int, rate: float) -> None:
        self.step, self.rate = step, rate

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step == self.step:
            for group in optimizer.param_groups:
                group["lr"] = self.rate


@pytest.mark.parametrize("saves", [True, False])
def test_weights_that_a_step_spoiled_are_not_saved(make_trainer, model, saves):
    given = dict(max_steps=3, save_strategy="steps" if saves else "no", save_steps=1)
    trainer = make_trainer(model, trainer_kwargs=dict(callbacks=[TooLarge(2, 1e40)]), **given)
    with pytest.raises(NonFiniteLossError) as error:
        trainer.train()
    assert "after 3 steps weights are NaN or infinite" in str(error.value) and "backbone." in str(error.value)
    assert ("checkpoint-2" in str(error.value)) == saves
    assert not Path(trainer.args.output_dir, "checkpoint-3").exists()
    if saves:
        trainer.remove_callback(TooLarge)
        trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-2")


def test_the_checkpoint_after_a_step_that_was_too_large_is_not_called_good(make_trainer, model):
    given = dict(max_steps=9, save_strategy="steps", save_steps=1, optim="sgd")
    trainer = make_trainer(model, trainer_kwargs=dict(callbacks=[TooLarge(2, 1e30)]), **given)
    with pytest.raises(NonFiniteLossError, match="of step 3 ") as error:
        trainer.train()
    assert "checkpoint-3 holds the weights that led to this" in str(error.value)
    assert "finite losses was trained is checkpoint-2." in str(error.value)


def test_a_checkpoint_of_weights_that_are_not_finite_is_passed_over(make_trainer, model):
    given = dict(max_steps=2, save_strategy="steps", save_steps=1)
    trainer = make_trainer(model, **given)
    trainer.train()
    spoilt = Path(trainer.args.output_dir, "checkpoint-2", "model.safetensors")
    tensors = load_file(spoilt)
    tensors[SHARED][0, 0] = math.nan
    save_file(tensors, spoilt, metadata={"format": "pt"})
    write_manifest(spoilt.parent)
    found, passed = last_complete_checkpoint(trainer.args.output_dir)
    assert found == str(spoilt.parents[1] / "checkpoint-1") and SHARED in passed[str(spoilt.parent)]
    with pytest.raises(ValueError, match=f"{SHARED} holds weights that are NaN or infinite"):
        trainer.train(resume_from_checkpoint=str(spoilt.parent))


def test_the_guard_forgets_each_window():
    guard = LossGuard()
    guard.add({"a": torch.tensor([1.0, math.nan, math.inf]), "b": torch.tensor([1.0])})
    guard.add({"b": torch.tensor([-math.inf])})
    assert [tuple(bad) for bad in guard.check(torch.device("cpu")) or []] == [("a", 0, [1, 2]), ("b", 1, [0])]
    guard.add({"a": torch.tensor([1.0])})
    assert guard.check(torch.device("cpu")) is None and guard.check(torch.device("cpu")) is None


def test_a_plain_run_is_not_slowed_by_two_checks(make_trainer, model):
    assert make_trainer(model).args.logging_nan_inf_filter is False


def test_an_unknown_choice_is_named(make_trainer, model):
    with pytest.raises(ValueError, match="on_nonfinite_loss 'skp' is not known, did you mean 'skip'"):
        make_trainer(model, on_nonfinite_loss="skp")


@pytest.mark.parametrize("rates", [(1e-5, 1e-2), (None, 1e-2), (1e-5, None)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.sample(3)
def test_backbone_and_heads_have_learning_rates_of_their_own(make_trainer, bert, rates, decay):
    task = Task("strength", "regression", dataset="reviews", label_column="strength")
    model = HardSharingModel.from_backbone(bert, [task])
    trainer = make_trainer(
        model,
        {"reviews": make_datasets()["reviews"]},
        backbone_learning_rate=rates[0],
        head_learning_rate=rates[1],
        weight_decay=decay,
        learning_rate=1e-3,
    )
    optimizer = trainer.create_optimizer()
    rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decay_of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    backbone, head = (1e-3 if rate is None else rate for rate in rates)
    assert len(rate_of) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert rate_of[id(parameter)] == (head if name.startswith("heads.") else backbone), name
        assert decay_of[id(parameter)] == (0.0 if "bias" in name or "LayerNorm" in name else decay), name
    trainer.train()
    assert all(group["lr"] < group["initial_lr"] for group in trainer.optimizer.param_groups)
