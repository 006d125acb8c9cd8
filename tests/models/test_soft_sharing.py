"""Soft sharing: each task has its encoder, the penalty is the sum over pairs, and cross-stitch units mix all."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from conftest import BACKBONES, PAD_ID
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AlbertConfig,
    AlbertModel,
    CamembertConfig,
    CamembertModel,
    MistralConfig,
    MistralModel,
    OPTConfig,
    OPTModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from hf_multitask import HardSharingModel, Task
from hf_multitask.models import cross_stitch, encoder_distance
from hf_multitask.models.cross_stitch import STITCHED_BACKBONES, CrossStitchUnits
from hf_multitask.models.encoder_distance import parameters_by_layer, weighted_deviation
from hf_multitask.models.manifest import write_manifest
from hf_multitask.models.passes import Segment
from hf_multitask.models.soft_sharing import SoftSharingConfig, SoftSharingModel

TASKS = [
    Task("tone", "single_label_classification", labels=("positive", "negative", "mixed"), head_dropout=0.0),
    Task("names", "token_classification", labels=("O", "B-place", "B-person"), head_dropout=0.0),
    Task("strength", "regression", labels=("valence", "arousal"), head="linear", pooling="first", head_dropout=0.0),
    Task("helper", "regression", auxiliary=True, head_dropout=0.0),
]
SERVED = ["tone", "names", "strength"]
SEGMENTS = {
    "names": Segment(2, 4, 6),
    "tone": Segment(0, 2, 9),
    "helper": Segment(4, 5, 3),
    "strength": Segment(0, 2, 9),
}
_MORE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, pad_token_id=PAD_ID)
_DECODER = dict(vocab_size=90, **_MORE, num_key_value_heads=2)
STITCHED = {
    **BACKBONES,
    "camembert": lambda: CamembertModel(CamembertConfig(vocab_size=90, **_MORE)),
    "xlm-roberta": lambda: XLMRobertaModel(XLMRobertaConfig(vocab_size=90, **_MORE)),
    "mistral": lambda: MistralModel(MistralConfig(**_DECODER)),
    "qwen2": lambda: Qwen2Model(Qwen2Config(**_DECODER)),
    "qwen3": lambda: Qwen3Model(Qwen3Config(**_DECODER, head_dim=8)),
}
backbones = pytest.mark.parametrize("name", BACKBONES)
schemes = pytest.mark.parametrize("stitched", [False, True], ids=["penalty", "cross-stitch"])


def make_backbone(name: str = "bert"):
    torch.manual_seed(0)
    return STITCHED[name]().eval()


def spread(model: torch.nn.Module, seed: int = 1, size: float = 0.05) -> torch.nn.Module:
    """Move every parameter at random: the encoders, zeros and ones of layers, mixing matrices."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw).to(parameter.dtype) * size)
    return model


def make_model(name: str = "bert", tasks=TASKS, **options) -> SoftSharingModel:
    torch.manual_seed(1)
    return SoftSharingModel.from_backbone(make_backbone(name), tasks, **options)


def make_batch(lengths=(9, 9, 4, 6, 3), seed: int = 2) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 90, (len(lengths), max(lengths)), generator=draw)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    return {"input_ids": torch.where(mask.bool(), ids, PAD_ID), "attention_mask": mask}


def make_labels(rows: dict[str, int] | None = None, width: int = 9) -> dict[str, Tensor]:
    rows = rows or {"tone": 2, "names": 2, "strength": 2, "helper": 1}
    draw = torch.Generator().manual_seed(3)
    makers = {
        "tone": lambda n: torch.randint(0, 3, (n,), generator=draw),
        "names": lambda n: torch.randint(0, 3, (n, width), generator=draw),
        "strength": lambda n: torch.randn(n, 2, generator=draw),
        "helper": lambda n: torch.randn(n, 1, generator=draw),
    }
    return {task: makers[task](n) for task, n in rows.items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for task in expected:
        assert torch.equal(found[task], expected[task]), task


def penalty_by_hand(model: SoftSharingModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the penalty and its gradients by the definition, in float64, under autograd."""
    config, total = model.config, torch.zeros((), dtype=torch.float64)
    encoders = [dict(copy.deepcopy(encoder).double().named_parameters()) for encoder in model.encoders.values()]
    for layer, names in parameters_by_layer(next(iter(model.encoders.values()))).items():
        rate = config.penalty
        if config.layer_penalties is not None and layer.isdigit():
            rate = config.layer_penalties[int(layer)]
        for name in names if rate else ():  # what counts nothing gets no gradient, not even one of zeros
            own = [parameters[name] for parameters in encoders]
            if config.distance == "pairs":
                for one, other in itertools.combinations(own, 2):
                    total = total + rate * (one - other).square().sum()
            else:
                mean = sum(own) / len(own)
                total = total + rate * sum((one - mean).square().sum() for one in own)
    flat = {
        f"encoders.{task}.{name}": parameter
        for task, parameters in zip(model.encoders, encoders, strict=True)
        for name, parameter in parameters.items()
    }
    flat = {name: parameter for name, parameter in flat.items() if parameter.requires_grad}
    found = torch.autograd.grad(total, list(flat.values()), allow_unused=True) if total.requires_grad else ()
    return total.detach(), dict(zip(flat, found, strict=False))


# ---- the penalty ----


@pytest.mark.parametrize("size", [0.05, 1e-4])
@pytest.mark.parametrize("rates", [None, [0.5, 0.0], [0.0, 3]])
@pytest.mark.parametrize("distance", ["pairs", "mean"])
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_the_penalty_is_the_sum_over_pairs_or_deviations(number, distance, rates, size):
    model = make_model(tasks=TASKS[:number], distance=distance, layer_penalties=rates, penalty=0.03)
    spread(model, size=size)
    found, (value, gradients) = model.penalty(), penalty_by_hand(model)
    if number == 1:
        assert found is None
        return
    assert value > 0 and found.dtype == torch.float32 and found.shape == ()
    torch.testing.assert_close(found.double(), value, rtol=1e-6, atol=0)
    (found * 2).backward()
    for name, parameter in model.named_parameters():
        gradient = gradients.get(name)
        if gradient is None:
            assert parameter.grad is None, name
        else:
            error = (parameter.grad.double() - 2 * gradient).norm()
            assert error <= 1e-6 * 2 * gradient.norm(), name


def test_parameters_are_cut_and_bundled_without_loss(monkeypatch):
    model = spread(make_model(penalty=0.03, layer_penalties=[0.5, 0.1]))
    value, gradients = penalty_by_hand(model)
    for limit in (7, 1000, 1 << 30):
        monkeypatch.setitem(encoder_distance._PIECE, "cpu", limit)
        model.zero_grad()
        found = model.penalty()
        found.backward()
        torch.testing.assert_close(found.double(), value, rtol=1e-6, atol=0)
        for name, parameter in model.encoders.named_parameters(prefix="encoders"):
            torch.testing.assert_close(parameter.grad.double(), gradients[name], rtol=1e-5, atol=1e-7)
    assert all(type(rate) is int for rate in encoder_distance._PIECE.values())


@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("distance", ["pairs", "mean"])
def test_the_gradient_of_the_penalty_is_added_in_place(number, distance):
    model = spread(make_model(tasks=TASKS[:number], distance=distance, layer_penalties=[0.5, 0.1], penalty=0.03))
    first = next(model.encoders[TASKS[0].name].parameters())
    first.requires_grad_(False)  # frozen in one encoder: it draws the others
    before = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    found = {}
    for way in ("autograd", "in place"):
        for name, parameter in model.named_parameters():
            # Some have no gradient yet, one has a gradient that is laid out in another way.
            parameter.grad = None if not parameter.requires_grad or "value" in name else before[name].clone()
            if parameter.grad is not None and parameter.dim() == 2 and "query" in name:
                parameter.grad = before[name].T.contiguous().T
        if way == "autograd":
            value = model.penalty()
            if value is not None:
                (4.0 * value).backward()
        else:
            value = model.add_penalty_gradient(4.0)
            assert (value is None) == (number == 1)
        found[way] = value, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert first.grad is None
    (one, gradients), (other, in_place) = found["autograd"], found["in place"]
    assert gradients.keys() == in_place.keys()
    torch.testing.assert_close(other, one if one is None else one.detach())
    for name, gradient in gradients.items():
        torch.testing.assert_close(in_place[name], gradient, msg=name)


@pytest.mark.parametrize("number", [2, 3, 4])
def test_equal_encoders_have_no_penalty_and_no_gradient_not_even_by_rounding(number):
    model = make_model(tasks=TASKS[:number])
    spread(model.encoders["tone"])
    for encoder in model.encoders.values():
        encoder.load_state_dict(model.encoders["tone"].state_dict())
    found = model.penalty()
    found.backward()
    assert found == 0
    assert all((p.grad == 0).all() for p in model.encoders.parameters())


def test_the_gradient_is_the_slope():
    torch.manual_seed(0)
    ours = [torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(6)]
    assert torch.autograd.gradcheck(lambda *p: weighted_deviation([p[:3], p[3:]], [0.7, 2.0]), ours)


def test_a_parameter_whose_memory_is_in_another_order_is_read_right():
    torch.manual_seed(0)
    one, other = torch.randn(3, 5, requires_grad=True), torch.randn(5, 3).t().requires_grad_()
    value = weighted_deviation([[one, other]], [2.0])
    torch.testing.assert_close(value, (one - other).square().sum())
    value.backward()
    torch.testing.assert_close(other.grad, 2 * (other - one).detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    model = spread(make_model()).to(dtype)
    found, (value, gradients) = model.penalty(), penalty_by_hand(model)
    torch.testing.assert_close(found.double(), value, rtol=1e-6, atol=0)
    found.backward()
    for name, parameter in model.encoders.named_parameters(prefix="encoders"):
        assert parameter.grad.dtype == dtype
        torch.testing.assert_close(parameter.grad, gradients[name].to(dtype), rtol=1e-2, atol=1e-6)


def test_what_is_frozen_everywhere_does_not_count_and_what_is_frozen_in_one_draws_the_others():
    model = spread(make_model(tasks=TASKS[:2]))
    word, bias = "embeddings.word_embeddings.weight", "encoder.layer.0.output.dense.bias"
    tables = [encoder.get_parameter(word).requires_grad_(False) for encoder in model.encoders.values()]
    held, free = (encoder.get_parameter(bias) for encoder in model.encoders.values())
    held.requires_grad_(False)
    value, _ = penalty_by_hand(model)
    found = model.penalty()
    without = value - 0.01 * (tables[0] - tables[1]).double().square().sum()
    torch.testing.assert_close(found.double(), without, rtol=1e-6, atol=0)
    found.backward()
    assert tables[0].grad is None and held.grad is None
    torch.testing.assert_close(free.grad, 0.02 * (free - held).detach())
    for parameter in model.encoders.parameters():
        parameter.requires_grad_(False)
    assert model.penalty() is None


def test_no_penalty_is_no_term():
    assert spread(make_model(penalty=0.0)).penalty() is None
    assert spread(make_model(penalty=0.0, layer_penalties=[0, 0])).penalty() is None
    assert spread(make_model(cross_stitch=True)).penalty() is None
    assert spread(make_model(cross_stitch=True, penalty=0.1)).penalty() > 0


def test_encoders_of_different_shapes_are_an_error():
    model = make_model(tasks=TASKS[:2])
    model.encoders["names"].resize_token_embeddings(95)
    message = r"'embeddings.word_embeddings.weight' differs in shape .* \(90, 32\) for task 'tone', \(95, 32\) for task"
    for use in (model.penalty, model.divergence):
        with pytest.raises(ValueError, match=message):
            use()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"penalty": -0.1}, "penalty must be a finite number of 0 or more, got -0.1"),
        ({"penalty": float("nan")}, "penalty must be a finite number of 0 or more, got nan"),
        ({"penalty": float("inf")}, "penalty must be a finite number of 0 or more, got inf"),
        ({"layer_penalties": [0.1, -2.0]}, r"layer_penalties\[1\] must be a finite number of 0 or more, got -2.0"),
        ({"layer_penalties": [0.1, True]}, r"layer_penalties\[1\] must be a finite number of 0 or more, got True"),
        ({"layer_penalties": [0.1]}, "layer_penalties has 1 numbers; the backbone has 2 layers"),
        ({"layer_penalties": [0.1] * 3}, "layer_penalties has 3 numbers; the backbone has 2 layers"),
        ({"distance": "cosine"}, "distance must be one of pairs, mean, got 'cosine'"),
        ({"cross_stitch_init": 1.5}, r"cross_stitch_init must lie in \[0, 1\], got 1.5"),
        ({"cross_stitch_init": float("nan")}, r"cross_stitch_init must lie in \[0, 1\], got nan"),
    ],
)
def test_a_wrong_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SoftSharingConfig(backbone_config=make_backbone().config, tasks=TASKS, **options)


def test_the_penalty_is_added_to_the_loss_in_training_only():
    model, batch, labels = spread(make_model()).eval(), make_batch(), make_labels(width=6)
    plain = model(**batch, segments=SEGMENTS, labels=labels)
    assert plain.regularization is None
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trained = model(**batch, segments=SEGMENTS, labels=labels, penalty_scale=0.5)
    torch.testing.assert_close(trained.regularization, 0.5 * model.penalty())
    torch.testing.assert_close(trained.loss, plain.loss + 0.5 * model.penalty())


# ---- whose parameters are whose ----


@schemes
@backbones
def test_shared_and_task_parameters_are_disjoint_and_complete(name, stitched):
    model = make_model(name, cross_stitch=stitched)
    parts = [list(model.shared_parameters()), *(list(model.task_parameters(task.name)) for task in TASKS)]
    ids = [id(parameter) for part in parts for parameter in part]
    assert len(ids) == len(set(ids)) and set(ids) == {id(parameter) for parameter in model.parameters()}
    assert bool(parts[0]) == stitched
    shared = {id(parameter) for parameter in parts[0]}
    assert {id(parameter) for parameter in model.encoders.parameters()} <= shared or not stitched
    assert not hasattr(model, "backbone")
    with pytest.raises(ValueError, match="task 'nobody' is not one of this model's"):
        model.task_modules("nobody")


@pytest.mark.parametrize("trained", [task.name for task in TASKS])
@backbones
def test_without_a_penalty_a_step_leaves_other_tasks_untouched(name, trained):
    model = make_model(name, penalty=0.0).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    rows = Segment(0, 5, 9)
    model(**make_batch(), segments={trained: rows}, labels=make_labels({trained: 5})).loss.backward()
    optimizer.step()
    for key, value in model.state_dict().items():
        if key.split(".")[1] != trained:
            assert torch.equal(value, before[key]), key
    for modules in (model.encoders, model.heads):
        assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters() if f".{trained}." in n), modules


def test_an_absent_task_is_moved_by_the_penalty_alone_and_not_its_head():
    model = spread(make_model(tasks=TASKS[:3], penalty=0.0, layer_penalties=[0.5, 0.0])).train()
    model(**make_batch(), segments={"tone": Segment(0, 5, 9)}, labels=make_labels({"tone": 5})).loss.backward()
    idle = {id(parameter) for parameter in model.idle_parameters("names")}
    moved = {n for n, p in model.named_parameters() if ".names." in n and id(p) not in idle}
    assert moved == {f"encoders.names.{n}" for n, _ in model.encoders["names"].named_parameters() if ".layer.0." in n}
    for key, parameter in model.named_parameters():
        if ".names." in key:
            assert (parameter.grad is not None) == (key in moved), key
    for options in ({"penalty": 0.0}, {"cross_stitch": True}):
        model = make_model(tasks=TASKS[:3], **options)
        assert set(model.idle_parameters("names")) == set(model.task_parameters("names"))
    alone = make_model(tasks=TASKS[:1])
    assert set(alone.idle_parameters("tone")) == set(alone.task_parameters("tone"))


@backbones
def test_an_idle_encoder_takes_part_with_a_gradient_of_0(name):
    model = spread(make_model(name, penalty=0.0)).train()
    labels = make_labels({"tone": 5})
    batch = {**make_batch(), "segments": {"tone": Segment(0, 5, 9)}, "labels": labels}
    model(**batch).loss.backward()
    used = {key.split(".", 2)[2] for key, p in model.encoders.named_parameters("encoders") if p.grad is not None}
    model.zero_grad()
    output = model(**batch, run_every_head=True)
    assert model.rows.value is None
    output.loss.backward()
    for task in ("names", "strength", "helper"):
        for key, parameter in model.encoders[task].named_parameters():
            assert key not in used or (parameter.grad is not None and (parameter.grad == 0).all()), key
        assert all(p.grad is not None for p in model.heads[task].parameters())


# ---- forward ----


@schemes
@backbones
def test_at_the_start_it_is_hard_sharing(name, stitched):
    # Mixtures of equal streams are those streams, up to rounding.
    model = make_model(name, cross_stitch=stitched)
    hard = HardSharingModel.from_backbone(make_backbone(name), TASKS)
    hard.heads.load_state_dict(model.heads.state_dict())
    batch = make_batch()
    for options in ({}, {"segments": SEGMENTS}):
        found, expected = model(**batch, **options).logits, hard(**batch, **options).logits
        assert list(found) == list(expected)
        for task in expected:
            width = min(found[task].shape[1], expected[task].shape[1])  # passes may be cut at other lengths
            torch.testing.assert_close(found[task][:, :width], expected[task][:, :width], rtol=1e-4, atol=1e-5)


@backbones
def test_a_mixed_batch_is_read_by_each_tasks_own_encoder(name):
    model, batch = spread(make_model(name)), make_batch()
    found = model(**batch, segments=SEGMENTS).logits
    assert list(found) == list(SEGMENTS)
    for task, rows in SEGMENTS.items():
        own = {key: value[rows.start : rows.stop, : rows.length] for key, value in batch.items()}
        hidden = model.encoder(task)(**own).last_hidden_state
        assert torch.equal(found[task], model.heads[task](hidden, own["attention_mask"])), task
    served = model(**batch).logits
    assert list(served) == SERVED
    for task in SERVED:
        hidden = model.encoder(task)(**batch).last_hidden_state
        assert torch.equal(served[task], model.heads[task](hidden, batch["attention_mask"])), task


@schemes
def test_embeddings_may_come_in_place_of_ids(stitched):
    model, batch = make_model(cross_stitch=stitched), make_batch()
    embeds = model.get_input_embeddings()(batch["input_ids"])
    assert_equal(model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits, model(**batch).logits)


@schemes
@backbones
def test_gradient_checkpointing_computes_layers_twice_and_changes_no_gradient(name, stitched):
    model, batch = spread(make_model(name, cross_stitch=stitched)).train(), make_batch()
    calls = []
    for module in model.encoders.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda *_: calls.append(1))

    def gradients():
        torch.manual_seed(5)
        calls.clear()
        model.zero_grad()
        model(**batch, segments=SEGMENTS, labels=make_labels(width=6)).loss.backward()
        return len(calls), {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    once, expected = gradients()
    model.activation_checkpointing_enable()
    again, found = gradients()
    assert again > 1.5 * once and found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-7)


# ---- cross-stitch units ----


@pytest.mark.parametrize("name", STITCHED)
def test_units_that_mix_nothing_leave_separate_encoders(name):
    torch.manual_seed(1)
    model = make_model(name, cross_stitch=True, cross_stitch_init=1.0)
    apart = make_model(name)
    for one in (model, apart):
        spread(one.encoders)
        one.heads.load_state_dict(model.heads.state_dict())
    batch = make_batch()
    assert_equal(model(**batch).logits, apart(**batch).logits)
    cut = model(**batch, segments={"helper": Segment(2, 5, 6)}).logits
    assert_equal(cut, apart(**batch, segments={"helper": Segment(2, 5, 6)}).logits)


def test_every_backbone_that_is_said_to_work_is_tested():
    assert sorted(STITCHED) == sorted(STITCHED_BACKBONES)


def test_units_mix_after_every_layer_as_defined():
    model, batch = spread(make_model(cross_stitch=True)), make_batch((6, 6, 6))
    streams = [encoder.embeddings(batch["input_ids"]) for encoder in model.encoders.values()]
    states = [streams]
    for number, alpha in enumerate(model.stitches.weight):
        outputs = [e.encoder.layer[number](x) for e, x in zip(model.encoders.values(), streams, strict=True)]
        streams = [sum(alpha[a, b] * y for b, y in enumerate(outputs)) for a in range(len(TASKS))]
        states.append(streams)
    output = model(**batch, output_hidden_states=True)
    for number, task in enumerate(TASKS):
        if task.name in SERVED:
            expected = model.heads[task.name](streams[number], batch["attention_mask"])
            torch.testing.assert_close(output.logits[task.name], expected, rtol=1e-4, atol=1e-5)
    assert len(output.hidden_states) == 3
    for found, expected in zip(output.hidden_states, states, strict=True):
        assert found.shape == (3, len(TASKS), 6, 32)
        torch.testing.assert_close(found, torch.stack(expected, 1), rtol=1e-4, atol=1e-5)
    assert model(**batch).hidden_states is None


@pytest.mark.parametrize("number, own", [(1, 0.9), (2, 0.9), (4, 0.7)])
def test_units_start_with_rows_that_sum_to_1(number, own):
    weight = make_model(tasks=TASKS[:number], cross_stitch=True, cross_stitch_init=own).stitches.weight
    assert weight.shape == (2, number, number)
    torch.testing.assert_close(weight.sum(-1), torch.ones(2, number))
    for layer in weight:
        torch.testing.assert_close(layer.diagonal(), torch.full((number,), own if number > 1 else 1.0))
        assert len(set(layer[~torch.eye(number, dtype=torch.bool)].tolist())) <= 1


@backbones
def test_one_task_trains_all_encoders_and_the_units(name):
    model = spread(make_model(name, cross_stitch=True)).train()
    model(**make_batch(), segments={"tone": Segment(0, 5, 9)}, labels=make_labels({"tone": 5})).loss.backward()
    assert all((parameter.grad != 0).any() for parameter in model.stitches.parameters())
    for task in TASKS:
        grads = [p.grad for p in model.encoders[task.name].parameters() if p.grad is not None]
        assert sum((grad != 0).any().item() for grad in grads) > 0.8 * len(grads) > 0
        assert (model.heads[task.name].layers[-1].weight.grad is None) == (task.name != "tone")


def test_rows_pass_once_whatever_the_number_of_tasks(monkeypatch):
    model, batch = make_model(cross_stitch=True), make_batch()
    calls = []
    run = cross_stitch.CrossStitchUnits.forward
    monkeypatch.setattr(CrossStitchUnits, "forward", lambda *args: calls.append(len(args[1])) or run(*args))
    model(**batch)
    assert calls == [5 * len(TASKS)] * 2
    calls.clear()
    model(**batch, segments=SEGMENTS)
    assert calls == [5 * len(TASKS)] * 2


def test_positions_of_each_row_go_with_their_rows():
    model, batch = spread(make_model("llama", cross_stitch=True)), make_batch((6, 6))
    positions = torch.stack([torch.arange(6), torch.arange(6) * 3])
    found = model(**batch, position_ids=positions).logits["tone"]
    for row in range(2):
        single = {key: value[row : row + 1] for key, value in batch.items()}
        alone = model(**single, position_ids=positions[row : row + 1]).logits["tone"][0]
        torch.testing.assert_close(found[row], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, model(**batch).logits["tone"])


def test_what_cross_stitch_cannot_do_is_refused():
    torch.manual_seed(0)
    albert = AlbertModel(AlbertConfig(vocab_size=90, embedding_size=16, **_MORE))
    with pytest.raises(ValueError, match="cross_stitch=True does not work with backbone 'albert'; it does with bert"):
        SoftSharingModel.from_backbone(albert, TASKS, cross_stitch=True)
    with pytest.raises(ValueError, match="layers of backbone 'albert' cannot be found"):
        SoftSharingModel.from_backbone(albert, TASKS, layer_penalties=[0.1, 0.1])
    model = SoftSharingModel.from_backbone(albert, TASKS)
    assert set(model.divergence()) == {"embeddings", "other"} and model.penalty() == 0
    with pytest.raises(ValueError, match="output_attentions=True does not work with cross_stitch=True"):
        make_model(cross_stitch=True)(**make_batch(), output_attentions=True)
    with pytest.raises(ValueError, match="encode does not know whose rows these are"):
        make_model().encode(**make_batch())


# ---- divergence ----


@backbones
def test_divergence_is_0_at_the_start_and_is_the_relative_deviation(name):
    model = make_model(name)
    layers = parameters_by_layer(model.encoders["tone"])
    assert list(layers)[:3] == ["embeddings", "0", "1"] and list(layers)[3:] in ([], ["other"])
    assert model.divergence() == dict.fromkeys(layers, 0.0)
    with torch.no_grad():
        for parameter in model.encoders["names"].parameters():
            parameter.mul_(1.1)
    small = model.divergence()
    # One of T encoders is 10 % larger: deviations of 0.1 * (1 - 1 / T) and, T - 1 times, of 0.1 / T.
    number = len(TASKS)
    expected = 0.1 * ((1 - 1 / number) / number) ** 0.5 / (1 + 0.1 / number)
    assert all(value == pytest.approx(expected, rel=1e-3) for value in small.values())
    with torch.no_grad():
        for parameter in model.encoders["names"].parameters():
            parameter.mul_(1.1)
    large = model.divergence()
    assert all(large[layer] > small[layer] for layer in layers)
    assert model.training_logs() == {f"divergence/{layer}": value for layer, value in large.items()}


# ---- saving, loading, embeddings ----


@schemes
@backbones
def test_a_saved_model_is_loaded_bit_for_bit(tmp_path, name, stitched):
    model = spread(make_model(name, cross_stitch=stitched, layer_penalties=[0.5, 1], distance="mean"))
    model.save_pretrained(tmp_path)
    loaded, info = SoftSharingModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    parameters = dict(loaded.named_parameters())
    assert all(torch.equal(parameters.pop(key), value) for key, value in model.named_parameters()) and not parameters
    assert_equal(loaded(**make_batch()).logits, model(**make_batch()).logits)
    assert loaded.tasks == TASKS and list(loaded.encoders) == [task.name for task in TASKS]
    for option in SoftSharingModel.options():
        assert getattr(loaded.config, option) == getattr(model.config, option), option


@pytest.mark.parametrize("lost", ["encoders.names.encoder.layer.1.output.dense.bias", "stitches.weight"])
def test_a_weight_that_a_saved_model_lacks_is_reported_and_initialised(tmp_path, lost):
    model = spread(make_model(cross_stitch=True))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    write_manifest(tmp_path)
    loaded, info = SoftSharingModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {lost}
    fresh = make_model(cross_stitch=True).get_parameter("stitches.weight")
    assert torch.equal(loaded.stitches.weight, fresh if lost == "stitches.weight" else model.stitches.weight)


def test_embeddings_are_told_from_layers_where_one_module_holds_both():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=16)
    layers = parameters_by_layer(OPTModel(OPTConfig(vocab_size=90, max_position_embeddings=66, **sizes)))
    assert list(layers) == ["embeddings", "0", "1", "other"]
    assert layers["embeddings"] == ["decoder.embed_tokens.weight"]
    assert all(name.startswith("decoder.layers.1.") for name in layers["1"])


def test_all_encoders_have_the_models_configuration():
    model = make_model()
    model.set_attn_implementation("eager")
    for encoder in model.encoders.values():
        assert encoder.config is model.config.backbone_config
        assert {m.config._attn_implementation for m in encoder.modules() if hasattr(m, "config")} == {"eager"}


def test_a_model_from_a_configuration_has_equal_encoders():
    config = SoftSharingConfig(backbone_config=make_backbone().config, tasks=TASKS, cross_stitch=True)
    model = SoftSharingModel(config)
    assert set(model.divergence().values()) == {0.0}
    assert config.penalty == 0.0 and SoftSharingConfig(backbone_config=config.backbone_config).penalty == 0.01


@pytest.mark.parametrize("stitched", [False, True])
def test_parameters_may_be_in_bfloat16(stitched):
    backbone = make_backbone().bfloat16()
    model = SoftSharingModel.from_backbone(backbone, TASKS, cross_stitch=stitched, penalty=0.1).train()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    loss = model(**make_batch(), segments=SEGMENTS, labels=make_labels(width=6)).loss
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@schemes
@backbones
def test_resized_embeddings_are_the_same_in_all_encoders_saved_and_loaded(tmp_path, name, stitched):
    model = make_model(name, cross_stitch=stitched)
    model.resize_token_embeddings(95)
    assert set(model.divergence().values()) == {0.0} and model.config.get_text_config().vocab_size == 95
    model.eval().save_pretrained(tmp_path)
    loaded = SoftSharingModel.from_pretrained(tmp_path)
    batch = make_batch()
    batch["input_ids"][0, 0] = 94
    assert_equal(loaded(**batch).logits, model(**batch).logits)


def test_new_input_embeddings_go_to_every_encoder():
    model = make_model()
    other = torch.nn.Embedding(90, 32)
    model.set_input_embeddings(other)
    assert model.get_input_embeddings() is other
    tables = [encoder.get_input_embeddings().weight for encoder in model.encoders.values()]
    assert all(torch.equal(table, other.weight) for table in tables)
    assert len({table.data_ptr() for table in tables}) == len(TASKS)


@schemes
def test_the_parts_that_run_are_compiled(monkeypatch, stitched):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compiled.append((module, options)))
    model = make_model(cross_stitch=stitched)
    model.compile_backbone(backend="eager")
    parts = list(model.encoders.values())
    if stitched:
        parts = [layer for encoder in parts for layer in encoder.encoder.layer]
    assert compiled == [(part, {"backend": "eager"}) for part in parts]
