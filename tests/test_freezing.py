"""What is frozen or unfrozen in mid-training stays or trains from that step on, however tasks are balanced."""

from __future__ import annotations

import pytest
import torch
from conftest import BACKBONES, make_tasks
from transformers import TrainerCallback

from hf_multitask import HardSharingModel
from hf_multitask.balancing.combination import COMBINATIONS
from hf_multitask.balancing.elementwise import ELEMENTWISE

CHANGE, STEPS = 2, 4
WAYS = {
    **{method: dict(gradient_combination=method) for method in (*COMBINATIONS, *ELEMENTWISE)},
    "sketch": dict(gradient_combination="upgrad", gradient_memory="sketch"),
    "every second step": dict(gradient_combination="cagrad", combination_every=2),
    "gradnorm": dict(loss_weighting="gradnorm"),
    "db_mtl": dict(loss_weighting="db_mtl"),
    "uncertainty": dict(loss_weighting="uncertainty"),
    "uncertainty, accumulated": dict(loss_weighting="uncertainty", gradient_accumulation_steps=2),
    "uncertainty, sketch": dict(
        loss_weighting="uncertainty", gradient_accumulation_steps=2, gradient_combination="pcgrad",
        gradient_memory="sketch",
    ),
    "conflicts": dict(conflict_logging_steps=1),
}  # fmt: skip
FAST = ("upgrad", "graddrop")
PARTS = {
    "backbone": lambda model: model.backbone.parameters(),
    "embeddings": lambda model: model.backbone.embeddings.parameters(),
    "head": lambda model: model.heads["tone"].parameters(),
}


class Switch(TrainerCallback):
    """Freezes a part, or unfreezes one that was frozen from the beginning, and keeps what it was then."""

    def __init__(self, part: str, trained: bool) -> None:
        self.part, self.trained, self.logs = PARTS[part], trained, []

    def _set(self, model, trained: bool) -> None:
        for parameter in self.part(model):
            parameter.requires_grad_(trained)
        self.kept = [parameter.detach().clone() for parameter in self.part(model)]

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._set(model, not self.trained)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == CHANGE:
            self.before = [not p.equal(kept) for p, kept in zip(self.part(model), self.kept, strict=True)]
            self._set(model, self.trained)

    def after(self, model) -> list[bool]:
        """Return of each parameter whether it has moved since."""
        return [not p.equal(kept) for p, kept in zip(self.part(model), self.kept, strict=True)]


def run(make_trainer, way: dict, part: str, trained: bool, **options):
    torch.manual_seed(0)
    model = HardSharingModel.from_backbone(BACKBONES["bert"](), make_tasks())
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # passes task by task draw other random numbers
    switch = Switch(part, trained)
    arguments = dict(max_steps=STEPS, weight_decay=0.1, learning_rate=0.01, **way) | options
    trainer = make_trainer(model, trainer_kwargs=dict(callbacks=[switch]), **arguments)
    trainer.train()
    return trainer, switch


def without_use(model, part: str) -> list[bool]:
    """Return of each parameter of a part whether no task uses it: BERT's own pooler."""
    used = {id(parameter) for name, parameter in model.named_parameters() if "pooler" not in name}
    return [id(parameter) not in used for parameter in PARTS[part](model)]


@pytest.mark.parametrize(
    ("way", "part"),
    [
        pytest.param(way, part, marks=() if way in FAST and part == "backbone" else pytest.mark.slow)
        for way in WAYS
        for part in PARTS
    ],
)
def test_frozen_stays_and_unfrozen_trains_from_that_step_on(make_trainer, way, part):
    trainer, switch = run(make_trainer, WAYS[way], part, trained=False)
    idle = without_use(trainer.model, part)
    assert any(switch.before) and not any(switch.after(trainer.model))
    trainer, switch = run(make_trainer, WAYS[way], part, trained=True)
    assert not any(switch.before)
    assert [moved or unused for moved, unused in zip(switch.after(trainer.model), idle, strict=True)] == [True] * len(
        idle
    )
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.sample(3)
def test_gradients_taken_task_by_task_train_what_a_plain_step_trains(make_trainer, part, trained):
    """The cosines of a sum change nothing, before and after the change; the logged ones are those of that step."""
    plain, _ = run(make_trainer, {}, part, trained, optim="sgd", learning_rate=0.1)
    by_task, _ = run(make_trainer, WAYS["conflicts"], part, trained, optim="sgd", learning_rate=0.1)
    for (name, one), other in zip(plain.model.named_parameters(), by_task.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6), name
    lines = [line for line in by_task.state.log_history if "loss" in line]
    shared = [part != "backbone" or (step >= CHANGE) == trained for step in range(STEPS)]
    assert [any(key.startswith("conflict/") for key in line) for line in lines] == shared


def test_a_parameter_that_the_optimizer_does_not_hold_cannot_be_unfrozen(make_trainer, model):
    model.backbone.embeddings.requires_grad_(False)
    trainer = make_trainer(model, trainer_kwargs=dict(callbacks=[Switch("embeddings", trained=True)]), max_steps=4)
    with pytest.raises(ValueError, match="embeddings.word_embeddings.weight.*step 2.*on_train_begin"):
        trainer.train()
