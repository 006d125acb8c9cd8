"""A loss that is NaN or infinite names task, step and rows, and moves nothing."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import make_datasets
from datasets import Dataset

from hf_multitask import HardSharingModel, Task
from hf_multitask.guard import LossGuard, NonFiniteLossError

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
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert lines[-1]["skipped_steps"] == trainer.guard.skipped
    assert math.isfinite(lines[-1]["loss/tone"]) and all(math.isfinite(line["loss"]) for line in lines)


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
