"""A pass that all tasks take together, with coefficients: what is a task's own gets its plain gradient all the same."""

from __future__ import annotations

import pytest
import torch
from test_schemes import KINDS, make_batch, make_model

from hf_multitask.balancing.scaled_passes import passing_scales, undo_scales
from hf_multitask.models.passes import Segment

COEFFICIENTS = [0.5, 0.0, -1.5, 3.0]


def gradients(model, scales: dict[str, float] | None, only: str | None = None) -> dict[str, torch.Tensor]:
    """Of a batch in which each task has rows of its own; with `only`, of that task's loss."""
    draw = torch.Generator().manual_seed(4)
    parts = make_batch()
    batch = {key: value.repeat(4, 1) for key, value in parts.items()}
    names = [task.name for task in model.tasks]
    labels = {
        "tone": torch.randint(0, 2, (5,), generator=draw),
        "strength": torch.randn(5, 1, generator=draw),
        "traits": torch.randint(0, 2, (5, 3), generator=draw).float(),
        "names": torch.randint(0, 3, (5, 9), generator=draw),
    }
    segments = {name: Segment(5 * i, 5 * i + 5, 9) for i, name in enumerate(names)}
    weights = {name: float(only in (None, name)) for name in names}
    model.zero_grad()
    model(**batch, segments=segments, labels=labels, loss_weights=weights, gradient_scales=scales).loss.backward()
    if scales is not None:
        undo_scales(model, scales)
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["hard", "conditioned", "adapter, shared", "prefix", "soft", "mixture, tasks routed"])
def test_shared_parameters_get_scaled_gradients_and_tasks_their_plain_ones(kind):
    options = {"penalty": 0.0} if kind == "soft" else {"router_noise": 0.0} if kind.startswith("mixture") else {}
    model = make_model(kind, **options).eval()
    names = [task.name for task in model.tasks]
    plain = gradients(model, None)
    alone = {name: gradients(model, None, only=name) for name in names}
    found = gradients(model, passing_scales(model, COEFFICIENTS))
    shared = {id(p) for p in model.shared_parameters()}
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        expected = plain[key]
        if id(parameter) in shared:
            expected = sum(c * alone[name][key] for name, c in zip(names, COEFFICIENTS, strict=True))
        scale = max(float(plain[key].abs().max()), 1e-3)
        assert (found[key] - expected).abs().max() < 1e-4 * scale, key


def test_a_coefficient_of_0_stays_where_nothing_is_to_be_undone():
    assert set(KINDS) >= {"hard", "adapter, shared"}
    hard, adapter = make_model("hard"), make_model("adapter, shared")
    names = [task.name for task in hard.tasks]
    assert passing_scales(hard, COEFFICIENTS) == dict(zip(names, COEFFICIENTS, strict=True))
    scales = passing_scales(adapter, COEFFICIENTS)
    assert scales == dict(zip(names, [0.5, 1e-6, -1.5, 3.0], strict=True))
    undo_scales(adapter, {})  # nothing was scaled
