"""Mixture of experts over every family: it starts as the dense model, and its router losses are what they claim."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from conftest import BACKBONES, PAD_ID
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    CamembertConfig,
    CamembertModel,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from hf_multitask import Task
from hf_multitask.models.experts import FAMILIES, ExpertLayer, Experts
from hf_multitask.models.manifest import write_manifest
from hf_multitask.models.mixture_of_experts import MixtureOfExpertsConfig, MixtureOfExpertsModel
from hf_multitask.models.passes import Segment

SIZE = dict(
    vocab_size=90,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=70,
    pad_token_id=PAD_ID,
    bos_token_id=1,
    eos_token_id=2,
)
DECODER = dict(**SIZE, num_key_value_heads=2)
FAMILY = {
    **BACKBONES,
    "xlm-roberta": lambda: XLMRobertaModel(XLMRobertaConfig(**SIZE)),
    "camembert": lambda: CamembertModel(CamembertConfig(**SIZE)),
    "mistral": lambda: MistralModel(MistralConfig(**DECODER)),
    "qwen2": lambda: Qwen2Model(Qwen2Config(**DECODER)),
    "qwen3": lambda: Qwen3Model(Qwen3Config(**DECODER, head_dim=8)),
}
TASKS = [
    Task("tone", "single_label_classification", labels=("positive", "negative"), dataset="reviews"),
    Task("names", "token_classification", labels=("O", "B-place")),
    Task("strength", "regression", dataset="reviews"),
    Task("helper", "regression", auxiliary=True),
]
# Rows 0 and 1 feed two tasks; then two rows and one row of a task each.
SEGMENTS = {
    "names": Segment(2, 4, 6),
    "tone": Segment(0, 2, 9),
    "helper": Segment(4, 5, 3),
    "strength": Segment(0, 2, 9),
}
LENGTHS = (9, 7, 4, 6, 3)
families = pytest.mark.parametrize("name", FAMILY)
backbones = pytest.mark.parametrize("name", BACKBONES)


def make_backbone(name: str = "bert") -> PreTrainedModel:
    """Return a backbone with biases and norms that are no longer zeros and ones."""
    torch.manual_seed(0)
    return move(FAMILY[name]().eval())


def move(model: nn.Module, scale: float = 0.05, seed: int = 1) -> nn.Module:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * scale)
    return model


def make_model(name: str = "bert", tasks=TASKS, dropout: bool = False, **options) -> MixtureOfExpertsModel:
    """Return a model with experts that differ and routers that decide, unless it says otherwise."""
    options = {"num_experts": 4, "router_init_std": 0.3, "router_noise": 0.0, **options}
    torch.manual_seed(2)
    model = MixtureOfExpertsModel.from_backbone(make_backbone(name), tasks, **options)
    for module in [] if dropout else model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return move(model, seed=3)


def make_batch(lengths=LENGTHS, seed: int = 2) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 90, (len(lengths), max(lengths)), generator=draw)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    return {"input_ids": torch.where(mask.bool(), ids, PAD_ID), "attention_mask": mask}


def make_labels() -> dict[str, Tensor]:
    return {
        "tone": torch.tensor([0, 1]),
        "names": torch.tensor([[0, 1, 0, 1, -100, -100], [1, 0, 1, 0, 1, 0]]),
        "strength": torch.tensor([[0.5], [-1.0]]),
        "helper": torch.tensor([[2.0]]),
    }


def layers_of(model: MixtureOfExpertsModel) -> list[ExpertLayer]:
    return [layer for _, layer in model.expert_layers()]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def inputs_of(modules) -> list[list[Tensor]]:
    """Return lists that grow by the first argument of each call of each module."""
    seen: list[list[Tensor]] = []
    for module in modules:
        calls: list[Tensor] = []
        module.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args[0].detach()))
        seen.append(calls)
    return seen


# ---- the start ----


def test_every_family_that_is_offered_is_tested():
    assert set(FAMILIES) == set(FAMILY)


@pytest.mark.parametrize("per_token", [1, 2, 4])
@families
def test_it_starts_as_the_dense_backbone(name, per_token):
    backbone, batch = make_backbone(name), make_batch()
    model = MixtureOfExpertsModel.from_backbone(
        backbone, TASKS, num_experts=4, experts_per_token=per_token, expert_layers=[0, 1], router_init_std=0.5
    )
    expected = backbone(**batch).last_hidden_state
    found = model(**batch, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # It is the experts that do this.
    for layer in layers_of(model):
        with torch.no_grad():
            layer.experts.down_proj.mul_(1.5)
    assert (model(**batch, output_hidden_states=True).hidden_states[-1] - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    "make",
    [
        lambda: LlamaModel(LlamaConfig(**DECODER, mlp_bias=True)),
        lambda: ModernBertModel(ModernBertConfig(**SIZE, cls_token_id=1, sep_token_id=2, mlp_bias=True)),
    ],
)
def test_gated_blocks_may_have_biases(make):
    torch.manual_seed(0)
    backbone, batch = move(make().eval()), make_batch()
    model = MixtureOfExpertsModel.from_backbone(backbone, TASKS, num_experts=3)
    (layer,) = layers_of(model)
    assert layer.experts.gate_up_proj_bias.shape == (3, 96) and layer.experts.down_proj_bias.shape == (3, 32)
    found = model(**batch, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(found, backbone(**batch).last_hidden_state, rtol=1e-5, atol=1e-5)


def test_a_dropout_inside_the_block_is_kept():
    config = ModernBertConfig(**SIZE, cls_token_id=1, sep_token_id=2, mlp_dropout=0.5)
    model = MixtureOfExpertsModel.from_backbone(ModernBertModel(config).eval(), TASKS)
    (layer,) = layers_of(model)
    inner = torch.cat([torch.full((1000,), 1e3), torch.ones(1000)])
    assert torch.equal(layer.experts._apply_gate(inner), torch.full((1000,), 1e3))
    dropped = layer.train().experts._apply_gate(inner)
    assert 400 < (dropped == 0).sum() < 600 and set(dropped.tolist()) == {0.0, 2e3}


@families
def test_the_blocks_are_gone_and_the_rest_of_the_layer_stays(name):
    backbone = make_backbone(name)
    model = MixtureOfExpertsModel.from_backbone(backbone, TASKS, num_experts=4)
    (layer,) = layers_of(model)
    own = sum(parameter.numel() for parameter in layer.experts.parameters())
    router = layer.router.weight.numel()
    dense = {key: p for key, p in backbone.named_parameters() if "pooler" not in key}
    total = sum(parameter.numel() for parameter in dense.values())
    assert sum(parameter.numel() for parameter in model.backbone.parameters()) == total - own // 4 + own + router
    kept = dict(model.backbone.named_parameters())
    assert all(torch.equal(kept[key], value) for key, value in dense.items() if key in kept)
    missing = sum(value.numel() for key, value in dense.items() if key not in kept)
    assert missing == own // 4


def test_every_second_layer_has_experts_unless_others_are_named():
    config = dict(backbone_config=make_config(5), tasks=[task.to_dict() for task in TASKS], num_experts=2)
    names = [name for name, _ in MixtureOfExpertsModel(MixtureOfExpertsConfig(**config)).expert_layers()]
    assert names == ["layer_1", "layer_3"]
    model = MixtureOfExpertsModel(MixtureOfExpertsConfig(**config, expert_layers=[4, 0]))
    assert [name for name, _ in model.expert_layers()] == ["layer_0", "layer_4"]
    assert isinstance(model.backbone.encoder.layer[4].intermediate, ExpertLayer)
    assert not isinstance(model.backbone.encoder.layer[1].intermediate, ExpertLayer)


def make_config(depth: int):
    config = copy.deepcopy(make_backbone().config)
    config.num_hidden_layers = depth
    return config


def test_frozen_blocks_give_frozen_experts():
    backbone = make_backbone()
    backbone.requires_grad_(False)
    model = MixtureOfExpertsModel.from_backbone(backbone, TASKS)
    (layer,) = layers_of(model)
    assert not any(parameter.requires_grad for parameter in layer.experts.parameters())
    assert layer.router.weight.requires_grad


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_chunks_of_a_feed_forward_block_change_nothing(name):
    model, batch = make_model(name), make_batch()
    expected = model(**batch, output_hidden_states=True).hidden_states[-1]
    backbone = make_backbone(name)
    for module in backbone.modules():
        if hasattr(module, "chunk_size_feed_forward"):
            module.chunk_size_feed_forward = 3
    other = MixtureOfExpertsModel.from_backbone(backbone, TASKS, num_experts=4)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(**batch, output_hidden_states=True).hidden_states[-1], expected)
    other.train()(**batch)  # the mask is that of whole rows
    assert layers_of(other)[0].counts.sum() == 2 * sum(LENGTHS)


# ---- experts and routers ----


@pytest.mark.parametrize("per_token", [1, 2])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_each_token_gets_the_weighted_sum_of_its_chosen_experts(name, per_token):
    model, batch = make_model(name, experts_per_token=per_token), make_batch()
    (layer,) = layers_of(model)
    (hidden,) = inputs_of([layer])
    outputs = []
    layer.register_forward_hook(lambda _, args, output: outputs.append(output))
    model(**batch)
    tokens, found, experts = hidden[0].flatten(0, 1), outputs[0].flatten(0, 1), layer.experts
    p = (tokens @ layer.router.weight.T).softmax(-1)
    assert p.argmax(-1).unique().numel() > 1
    for token, own, output in zip(tokens, p, found, strict=True):
        order = own.argsort(descending=True)[:per_token]
        total = torch.zeros(32)
        for e in order.tolist():
            if name == "bert":
                inner = nn.functional.gelu(experts.up_proj[e] @ token + experts.up_proj_bias[e])
                result = experts.down_proj[e] @ inner + experts.down_proj_bias[e]
            else:
                gate, up = (experts.gate_up_proj[e] @ token).chunk(2)
                result = experts.down_proj[e] @ (nn.functional.silu(gate) * up)
            total += result * own[e] / own[order].sum()
        torch.testing.assert_close(output, total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("per_token", [1, 2])
@pytest.mark.parametrize("name", ["bert", "modernbert", "llama"])
def test_implementations_of_experts_agree(name, per_token, dtype):
    model, batch = make_model(name, num_experts=9, experts_per_token=per_token).to(dtype), make_batch()
    found = {}
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(implementation)
        assert model.config._experts_implementation == implementation
        model.zero_grad()
        output = model(**batch, segments=SEGMENTS, labels=make_labels())
        output.loss.backward()
        found[implementation] = {**output.logits, **gradients(model)}
    for other in ("grouped_mm", "batched_mm"):
        assert found[other].keys() == found["eager"].keys()
        for key, value in found["eager"].items():
            torch.testing.assert_close(found[other][key], value, rtol=1e-4, atol=1e-6)


def test_grouped_products_are_the_default_and_eager_can_be_asked_for(tmp_path):
    model = make_model()
    assert model.config._experts_implementation == "grouped_mm"
    model.save_pretrained(tmp_path)
    for implementation in ("eager", "grouped_mm"):
        loaded = MixtureOfExpertsModel.from_pretrained(tmp_path, experts_implementation=implementation)
        (layer,) = layers_of(loaded)
        assert layer.experts.config._experts_implementation == implementation
        torch.testing.assert_close(loaded(**make_batch()).logits["tone"], model(**make_batch()).logits["tone"])


@pytest.mark.parametrize("per_token", [1, 2])
@backbones
def test_the_tasks_losses_train_the_router(name, per_token):
    model = make_model(name, experts_per_token=per_token, load_balancing_weight=0.0, router_z_weight=0.0).train()
    output = model(**make_batch(), segments=SEGMENTS, labels=make_labels())
    assert output.regularization is None
    output.loss.backward()
    (layer,) = layers_of(model)
    assert (layer.router.weight.grad.norm(dim=1) > 1e-6).all()


def test_the_gradient_of_a_single_expert_is_that_of_its_log_probability():
    model = make_model(experts_per_token=1)
    router = layers_of(model)[0].router
    hidden = torch.randn(1, 6, 32)
    logits, weights, index = router(hidden, None)
    assert torch.equal(weights, torch.ones(1, 6, 1))
    coefficients = torch.randn(6)
    (found,) = torch.autograd.grad((weights.flatten() * coefficients).sum(), router.weight)
    logp = (hidden[0] @ router.weight.T).log_softmax(-1).gather(1, index[0]).flatten()
    (expected,) = torch.autograd.grad((logp * coefficients).sum(), router.weight)
    torch.testing.assert_close(found, expected)


def test_noise_is_for_training_alone_and_of_the_given_size():
    router = layers_of(make_model(router_noise=0.5))[0].router
    hidden = torch.randn(4, 500, 32)
    clean = router.eval()(hidden, None)[0]
    assert torch.equal(clean, router.logits(hidden, None))
    noise = router.train()(hidden, None)[0] - clean
    assert noise.std().item() == pytest.approx(0.5, rel=0.05) and abs(noise.mean().item()) < 0.03
    router.noise = 0.0
    assert torch.equal(router(hidden, None)[0], clean)


def test_routers_compute_in_float32_under_autocast_and_in_half_precision():
    model, batch = make_model(), make_batch()
    outputs = []
    layers_of(model)[0].router.register_forward_hook(lambda _, args, output: outputs.append((args[0], output)))
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch)
    model.to(torch.bfloat16)(**batch)
    for hidden, (logits, weights, _) in outputs:
        assert logits.dtype == torch.float32 and weights.dtype == hidden.dtype


# ---- the losses of the router ----


def losses_by_hand(model: MixtureOfExpertsModel, hidden: list[Tensor], mask: Tensor) -> Tensor:
    config, total = model.config, 0.0
    for layer, x in zip(layers_of(model), hidden, strict=True):
        tokens = x[mask.bool()]
        logits = tokens @ layer.router.weight.T
        probability = logits.softmax(-1).mean(0)
        balance = config.num_experts * sum(f * p for f, p in zip(layer.usage.tolist(), probability, strict=True))
        z = logits.exp().sum(-1).log().square().mean()
        total = total + config.load_balancing_weight * balance + config.router_z_weight * z
    return total / len(hidden)


def set_usage(model: MixtureOfExpertsModel) -> None:
    for number, layer in enumerate(layers_of(model)):
        layer.usage.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]).roll(number))


@backbones
def test_router_losses_are_those_computed_by_hand(name):
    model = make_model(name, expert_layers=[0, 1], load_balancing_weight=0.7, router_z_weight=0.3).train()
    set_usage(model)
    batch = make_batch()
    hidden = inputs_of(layers_of(model))
    found = model(**batch, segments=SEGMENTS, labels=make_labels(), single_pass=True).regularization
    expected = losses_by_hand(model, [calls[0] for calls in hidden], batch["attention_mask"])
    torch.testing.assert_close(found, expected)
    routers = [layer.router.weight for layer in layers_of(model)]
    by_hand = torch.autograd.grad(expected, routers)
    assert [name for name, p in model.named_parameters() if p.grad is not None] == []
    found.backward()
    for router, gradient in zip(routers, by_hand, strict=True):
        torch.testing.assert_close(router.grad, gradient, rtol=1e-4, atol=1e-7)
        router.grad = None
    assert not gradients(model)


def test_router_losses_do_not_touch_the_gradients_of_anything_else():
    found = {}
    for weight in (0.0, 5.0):
        model = make_model(load_balancing_weight=weight, router_z_weight=weight).train()
        set_usage(model)
        model(**make_batch(), segments=SEGMENTS, labels=make_labels()).loss.backward()
        found[weight] = gradients(model)
    differing = {key for key, value in found[0.0].items() if not torch.equal(found[5.0][key], value)}
    assert differing == {"backbone.encoder.layer.1.intermediate.router.weight"}


@pytest.mark.parametrize("cuts", [[(0, 5)], [(0, 2), (2, 5)], [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]])
@backbones
def test_a_window_gives_the_same_router_gradients_however_it_is_cut(name, cuts):
    model = make_model(name, load_balancing_weight=0.7, router_z_weight=0.3).train()
    set_usage(model)
    batch = make_batch()
    (layer,) = layers_of(model)
    (hidden,) = inputs_of([layer])
    for start, stop in cuts:
        length = max(LENGTHS[start:stop])
        part = {key: value[start:stop, :length] for key, value in batch.items()}
        labels = {"strength": torch.zeros(stop - start, 1)}
        options = {"segments": {"strength": Segment(0, stop - start, length)}, "num_tokens": sum(LENGTHS)}
        model(**part, labels=labels, **options).regularization.backward()
    found = layer.router.weight.grad.clone()
    whole = make_model(name, load_balancing_weight=0.7, router_z_weight=0.3).train()
    set_usage(whole)
    (other,) = inputs_of(layers_of(whole))
    whole(**batch, labels={"strength": torch.zeros(5, 1)})
    loss = losses_by_hand(whole, other, batch["attention_mask"])
    (expected,) = torch.autograd.grad(loss, layers_of(whole)[0].router.weight)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    model.finish_window()
    whole.finish_window()
    torch.testing.assert_close(layer.usage, layers_of(whole)[0].usage, rtol=0, atol=1e-7)


def test_padding_has_no_part_in_losses_and_usage():
    found = []
    for more in (0, 6):
        model, batch = make_model(load_balancing_weight=0.7, router_z_weight=0.3).train(), make_batch()
        set_usage(model)
        batch = {
            "input_ids": nn.functional.pad(batch["input_ids"], (0, more), value=PAD_ID),
            "attention_mask": nn.functional.pad(batch["attention_mask"], (0, more)),
        }
        loss = model(**batch, labels={"strength": torch.zeros(5, 1)}).regularization
        assert layers_of(model)[0].counts.sum() == 2 * sum(LENGTHS)
        model.finish_window()
        found.append((loss, layers_of(model)[0].usage))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


def test_without_a_mask_all_tokens_are_real():
    model, batch = make_model(router_z_weight=0.3).train(), make_batch(lengths=(7, 7))
    labels = {"strength": torch.zeros(2, 1)}
    masked = model(**batch, labels=labels).regularization
    torch.testing.assert_close(model(input_ids=batch["input_ids"], labels=labels).regularization, masked)
    assert layers_of(model)[0].counts.sum() == 2 * 2 * 14


def test_evaluation_adds_no_loss_and_leaves_nothing_behind():
    model, batch = make_model(), make_batch()
    assert model(**batch, labels={"strength": torch.zeros(5, 1)}).regularization is None
    (layer,) = layers_of(model)
    assert layer.counts is None and layer.passes == []
    model.train()
    model(**batch)
    assert layer.passes == []
    model.training = False  # only the model itself, as when its backbone is kept in training mode
    assert model(**batch, labels={"strength": torch.zeros(5, 1)}).regularization is None and layer.passes == []


def test_a_pass_that_broke_off_is_forgotten():
    model, batch = make_model(expert_layers=[0, 1]).train(), make_batch()
    labels = {"strength": torch.zeros(5, 1)}
    expected = model(**batch, labels=labels).regularization

    def fail(*_):
        raise RuntimeError("out of memory")

    handle = layers_of(model)[1].experts.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(**make_batch(seed=7), labels=labels)
    handle.remove()
    torch.testing.assert_close(model(**batch, labels=labels).regularization, expected)


def test_usage_moves_towards_what_a_window_did():
    model, batch = make_model(usage_momentum=0.25, expert_layers=[0, 1]).train(), make_batch()
    assert all(torch.equal(layer.usage, torch.full((4,), 0.25)) for layer in layers_of(model))
    chosen: list[list[Tensor]] = [[], []]
    for layer, calls in zip(layers_of(model), chosen, strict=True):
        layer.router.register_forward_hook(lambda _, args, output, calls=calls: calls.append(output[2]))
    for _ in range(2):
        model(**batch, segments={"tone": Segment(0, 5, 9)}, labels={"tone": torch.zeros(5).long()})
        batch = make_batch(seed=9)
    before = [layer.usage.clone() for layer in layers_of(model)]
    model.finish_window()
    mask = batch["attention_mask"].bool()
    for layer, usage, calls in zip(layers_of(model), before, chosen, strict=True):
        slots = torch.cat([index[mask] for index in calls]).flatten()
        fraction = torch.bincount(slots, minlength=4) / len(slots)
        torch.testing.assert_close(layer.usage, 0.75 * usage + 0.25 * fraction)
        assert fraction.max() > 0.3 and layer.counts is None
    after = [layer.usage.clone() for layer in layers_of(model)]
    model.finish_window()  # a window without a pass
    assert all(torch.equal(layer.usage, usage) for layer, usage in zip(layers_of(model), after, strict=True))
    logs = model.training_logs()
    assert logs == {f"expert_usage_max/layer_{i}": pytest.approx(usage.max().item()) for i, usage in enumerate(after)}


def test_balanced_usage_gives_no_gradient_and_unbalanced_usage_drives_towards_the_idle_experts():
    model = make_model(load_balancing_weight=1.0, router_z_weight=0.0).train()
    (layer,) = layers_of(model)
    options = {**make_batch(), "labels": {"strength": torch.zeros(5, 1)}}
    model(**options).regularization.backward()
    assert layer.router.weight.grad.abs().max() < 1e-6
    layer.usage.copy_(torch.tensor([0.7, 0.1, 0.1, 0.1]))
    first = model(**options).regularization
    first.backward()
    with torch.no_grad():
        layer.router.weight -= 0.1 * layer.router.weight.grad
    assert model(**options).regularization < first - 1e-3


# ---- activation checkpointing, copies, saving ----


@pytest.mark.parametrize("embedding", [False, True])
@backbones
def test_activation_checkpointing_changes_no_gradient_and_no_count(name, embedding):
    found = []
    for enable in (False, True):
        options = {"router_task_embedding": embedding, "load_balancing_weight": 0.7, "router_z_weight": 0.3}
        model = make_model(name, dropout=True, router_noise=0.1, expert_layers=[0, 1], **options).train()
        set_usage(model)
        if enable:
            model.activation_checkpointing_enable()
        calls = []
        layers_of(model)[0].experts.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(4)
        loss = model(**make_batch(), segments=SEGMENTS, labels=make_labels()).loss
        once = len(calls)
        loss.backward()
        assert len(calls) == (2 * once if enable else once)
        found.append({**gradients(model), "counts": layers_of(model)[1].counts.float(), "loss": loss.detach()})
        assert all(layer.passes == [] for layer in layers_of(model))
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-5, atol=1e-6)


def test_reentrant_checkpointing_would_lose_gradients_and_is_replaced(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_multitask"), "propagate", True)
    found = []
    for options in ({"use_reentrant": False}, {"use_reentrant": True}):
        model = make_model(load_balancing_weight=0.7, router_z_weight=0.3).train()
        model.activation_checkpointing_enable(options)
        model(**make_batch(), segments=SEGMENTS, labels=make_labels()).loss.backward()
        found.append(gradients(model))
        assert ("use_reentrant=True would cut" in caplog.text) == options["use_reentrant"]
    assert all(torch.equal(found[1][key], value) for key, value in found[0].items())


@backbones
def test_a_copy_lives_on_its_own(name):
    model = make_model(name).train()
    twin = copy.deepcopy(model)
    assert all(layer.rows is twin.rows for layer in layers_of(twin))
    assert all(layer.rows is model.rows for layer in layers_of(model)) and twin.rows is not model.rows
    assert all(layer.experts.config is twin.config for layer in layers_of(twin))
    labels = {"strength": torch.zeros(5, 1)}
    found = twin(**make_batch(), labels=labels).regularization
    assert layers_of(model)[0].counts is None and layers_of(twin)[0].counts is not None
    torch.testing.assert_close(model(**make_batch(), labels=labels).regularization, found)
    model.activation_checkpointing_enable()
    results = []
    for one in (model, copy.deepcopy(model)):
        one.zero_grad()
        one(**make_batch(), segments=SEGMENTS, labels=make_labels()).loss.backward()
        results.append(gradients(one))
    assert all(torch.equal(results[1][key], value) for key, value in results[0].items())


@pytest.mark.parametrize("embedding", [False, True])
@backbones
def test_saved_is_loaded_bit_for_bit_usage_included(tmp_path, name, embedding):
    model = make_model(name, router_task_embedding=embedding, router_noise=0.3, usage_momentum=0.5)
    set_usage(model)
    model.save_pretrained(tmp_path)
    loaded, info = MixtureOfExpertsModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.config.usage_momentum == 0.5 and loaded.config.router_noise == 0.3
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    for task, logits in model(**make_batch()).logits.items():
        assert torch.equal(loaded(**make_batch()).logits[task], logits)


def test_what_a_checkpoint_lacks_is_initialised_and_reported(tmp_path):
    from safetensors.torch import load_file, save_file

    model = make_model(router_task_embedding=True, router_init_std=0.1)
    set_usage(model)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = [key for key in weights if ".intermediate." in key and "layer.1" in key]
    save_file({key: value for key, value in weights.items() if key not in lost}, tmp_path / "model.safetensors")
    write_manifest(tmp_path)
    loaded, info = MixtureOfExpertsModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == set(lost) and len(lost) == 2 + 4 + len(TASKS)
    (layer,) = layers_of(loaded)
    assert torch.equal(layer.usage, torch.full((4,), 0.25))
    assert all(torch.equal(own.weight, torch.zeros(4)) for own in layer.router.tasks.values())
    assert 0.08 < layer.router.weight.std() < 0.12
    assert 0.018 < layer.experts.up_proj.std() < 0.022 and (layer.experts.up_proj_bias == 0).all()
    assert (layer.experts.up_proj == layer.experts.up_proj[:1]).all()


def test_a_fresh_router_has_the_given_deviation_and_experts_are_copies():
    backbone = make_backbone()
    config = MixtureOfExpertsConfig(
        backbone_config=backbone.config, tasks=[task.to_dict() for task in TASKS], router_init_std=0.05
    )
    given = MixtureOfExpertsModel.from_backbone(backbone, TASKS, router_init_std=0.05)
    for model in (MixtureOfExpertsModel(config), given):
        (layer,) = layers_of(model)
        assert 0.04 < layer.router.weight.std() < 0.06
        assert (
            0.01 < model.heads["tone"].layers[1].weight.std() < 0.03 and (model.heads["tone"].layers[1].bias == 0).all()
        )
        assert (layer.experts.up_proj == layer.experts.up_proj[:1]).all() and layer.experts.up_proj.std() > 0.01
    assert torch.equal(layer.experts.up_proj[5], backbone.encoder.layer[1].intermediate.dense.weight)
    assert torch.equal(layer.experts.down_proj_bias[7], backbone.encoder.layer[1].output.dense.bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_usage_is_kept_in_float32(tmp_path, dtype):
    model = MixtureOfExpertsModel.from_backbone(make_backbone().to(dtype), TASKS, num_experts=4)
    assert layers_of(model)[0].usage.dtype == torch.float32
    set_usage(model)
    usage = layers_of(model)[0].usage
    model.save_pretrained(tmp_path)
    for options in ({}, {"dtype": dtype}, {"dtype": torch.float32}):
        loaded = MixtureOfExpertsModel.from_pretrained(tmp_path, **options)
        assert loaded.dtype == options.get("dtype", dtype)
        assert torch.equal(layers_of(loaded)[0].usage, usage)


# ---- the task as an input of the router ----


@backbones
def test_without_an_embedding_tasks_share_rows_and_experts(name):
    model = make_model(name)
    assert model.shares_rows
    for task in TASKS:
        assert set(model.task_parameters(task.name)) == set(model.heads[task.name].parameters())


@backbones
def test_task_embeddings_send_tasks_to_different_experts(name):
    model, batch = make_model(name, router_task_embedding=True, experts_per_token=1), make_batch()
    assert not model.shares_rows
    (layer,) = layers_of(model)
    with torch.no_grad():
        for number, task in enumerate(TASKS):
            layer.router.tasks[task.name].weight.copy_(100 * nn.functional.one_hot(torch.tensor(number), 4))
    calls = []

    def note(module, args, output):
        calls.extend((name, set(output[2][start:stop].flatten().tolist())) for name, start, stop in args[1].slices)

    layer.router.register_forward_hook(note)
    model(**batch, segments=SEGMENTS)
    assert dict(calls) == {"tone": {0}, "names": {1}, "strength": {2}, "helper": {3}} and len(calls) == 4
    calls.clear()
    model(**batch)
    assert dict(calls) == {"tone": {0}, "names": {1}, "strength": {2}}
    calls.clear()
    segments = {"tone": Segment(0, 2, 9), "names": Segment(2, 4, 6), "helper": Segment(4, 5, 3)}
    model(**batch, segments=segments, single_pass=True)  # three tasks in one pass
    assert dict(calls) == {"tone": {0}, "names": {1}, "helper": {3}}


@pytest.mark.parametrize("trained", [task.name for task in TASKS])
@backbones
def test_a_step_on_one_task_leaves_the_others_parameters_alone(name, trained):
    model = make_model(name, router_task_embedding=True, expert_layers=[0, 1]).train()
    rows = len(make_labels()[trained])
    batch = make_batch(lengths=(6,) * rows)
    parts = [list(model.shared_parameters()), *(list(model.task_parameters(task.name)) for task in TASKS)]
    ids = [id(parameter) for part in parts for parameter in part]
    assert len(ids) == len(set(ids)) == sum(parameter.requires_grad for parameter in model.parameters())
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    labels = {trained: make_labels()[trained]}
    model(**batch, segments={trained: Segment(0, rows, 6)}, labels=labels).loss.backward()
    for task in TASKS:
        own = list(model.task_parameters(task.name))
        assert len(own) == 2 + len(list(model.heads[task.name].parameters()))
        assert all((p.grad is not None) == (task.name == trained) for p in own), task.name
        assert task.name != trained or all((p.grad != 0).any() for p in own)
    optimizer.step()
    own = {id(p) for p in model.task_parameters(trained)} | {id(p) for p in model.shared_parameters()}
    for key, parameter in model.named_parameters():
        assert id(parameter) in own or torch.equal(parameter, before[key]), key


def test_idle_tasks_can_take_part_with_a_gradient_of_zeros():
    model = make_model(router_task_embedding=True).train()
    batch, labels = make_batch(lengths=(6, 6)), {"tone": torch.tensor([0, 1])}
    model(**batch, segments={"tone": Segment(0, 2, 6)}, labels=labels, run_every_head=True).loss.backward()
    for task in ("names", "strength", "helper"):
        assert all((p.grad == 0).all() for p in model.task_parameters(task))


def test_a_router_that_asks_for_tasks_cannot_run_without_them():
    model = make_model(router_task_embedding=True)
    with pytest.raises(ValueError, match="the router asks whose rows it gets: call the multi-task model"):
        model.backbone(**make_batch())


# ---- what does not fit ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 1}, "num_experts must be at least 2, got 1"),
        ({"experts_per_token": 0}, r"experts_per_token must lie in 1 \.\.\. num_experts = 8, got 0"),
        ({"experts_per_token": 5, "num_experts": 4}, r"experts_per_token must lie in 1 \.\.\. num_experts = 4, got 5"),
        ({"expert_layers": [1, 2, 7]}, r"expert_layers: no layers \[2, 7\]; the backbone has the layers 0 \.\.\. 1"),
        ({"expert_layers": [-1]}, r"expert_layers: no layers \[-1\]; the backbone has the layers 0 \.\.\. 1"),
        ({"expert_layers": []}, r"expert_layers must be numbers of layers, each once, got \[\]"),
        ({"expert_layers": [1, 1]}, r"expert_layers must be numbers of layers, each once, got \[1, 1\]"),
        ({"router_noise": -0.1}, "router_noise must be a number of at least 0, got -0.1"),
        ({"load_balancing_weight": -1.0}, "load_balancing_weight must be a number of at least 0, got -1.0"),
        ({"router_z_weight": float("nan")}, "router_z_weight must be a number of at least 0, got nan"),
        ({"router_init_std": float("inf")}, "router_init_std must be a number of at least 0, got inf"),
        ({"usage_momentum": 0.0}, r"usage_momentum must lie in \(0, 1\], got 0.0"),
        ({"num_expert": 4}, "has no option 'num_expert', did you mean 'num_experts'"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MixtureOfExpertsModel.from_backbone(make_backbone(), TASKS, **options)


def test_a_backbone_of_one_layer_has_no_second_one():
    config = MixtureOfExpertsConfig(backbone_config=make_config(1), tasks=[task.to_dict() for task in TASKS])
    with pytest.raises(ValueError, match=r"every second layer of a backbone of one layer is none; give \[0\]"):
        MixtureOfExpertsModel(config)


def test_other_families_are_refused_by_name():
    albert = AlbertModel(AlbertConfig(**{**SIZE, "num_hidden_layers": 1}, embedding_size=16))
    with pytest.raises(ValueError, match="backbone 'albert' cannot be given experts; families .* bert, roberta"):
        MixtureOfExpertsModel.from_backbone(albert, TASKS, expert_layers=[0])


def test_products_that_are_not_plain_are_refused():
    class Wrapped(nn.Module):
        pass

    product = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="experts are copies of a block of plain nn.Linear, got Wrapped"):
        Experts(None, 2, [Wrapped()], product, nn.GELU())
