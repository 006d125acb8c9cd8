"""Routing: what routers decide is what is counted, and what is there by construction is found."""

from __future__ import annotations

import builtins
import math
import random

import numpy as np
import pytest
import torch
from conftest import PAD_ID, make_datasets
from datasets import Dataset
from torch import nn
from transformers import (
    MixtralConfig,
    MixtralModel,
    OlmoeConfig,
    OlmoeModel,
    Qwen2MoeConfig,
    Qwen2MoeModel,
    SwitchTransformersConfig,
    SwitchTransformersEncoderModel,
)

from hf_multitask import HardSharingModel, Task
from hf_multitask.analysis.routing import find_routers, routing
from hf_multitask.analysis.routing_result import RoutingResult
from hf_multitask.models.mixture_of_experts import MixtureOfExpertsModel

SIZE = dict(
    vocab_size=90,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    pad_token_id=PAD_ID,
    num_experts_per_tok=2,
)
NATIVE = {
    "mixtral": lambda: MixtralModel(MixtralConfig(**SIZE, num_local_experts=4)),
    "qwen2_moe": lambda: Qwen2MoeModel(
        Qwen2MoeConfig(**SIZE, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16)
    ),
    "olmoe": lambda: OlmoeModel(OlmoeConfig(**SIZE, num_experts=4)),
}
SMALL = dict(batches=2, batch_size=8)


def make_tasks(number: int) -> list[Task]:
    return [Task(f"task{i}", "regression", dataset=f"data{i}") for i in range(number)]


def make_rows(number: int, seed: int = 0, rows: int = 40) -> dict[str, Dataset]:
    """Rows of all datasets are drawn alike."""
    draw = random.Random(seed)
    words = "good bad the film was a very and it we saw paris berlin maria john".split()
    return {
        f"data{i}": Dataset.from_list(
            [
                {"text": " ".join(draw.choice(words) for _ in range(draw.randint(3, 12))), "label": draw.random()}
                for _ in range(rows)
            ]
        )
        for i in range(number)
    }


def make_model(bert, tasks, **options) -> MixtureOfExpertsModel:
    torch.manual_seed(1)
    options = {"num_experts": 4, "expert_layers": [0, 1], "router_init_std": 0.5, **options}
    return MixtureOfExpertsModel.from_backbone(bert, tasks, **options)


def send(model: MixtureOfExpertsModel, experts: dict[str, int]) -> None:
    """Let the router of the second layer send each task to an expert of its own."""
    _, layer = model.expert_layers()[1]
    with torch.no_grad():
        for name, expert in experts.items():
            layer.router.tasks[name].weight.copy_(1000.0 * nn.functional.one_hot(torch.tensor(expert), 4))


# ---- by construction ----


@pytest.mark.parametrize("number", [2, 3, 4])
def test_tasks_with_experts_of_their_own_have_the_most_information(bert, tokenizer, number):
    model = make_model(bert, make_tasks(number), router_task_embedding=True, experts_per_token=1)
    send(model, {f"task{i}": 3 - i for i in range(number)})
    result = routing(model, make_rows(number), tokenizer, **SMALL)
    assert list(result.counts) == ["layer.0", "layer.1"]
    assert result.mutual_information("layer.1").estimate == pytest.approx(math.log(number))
    assert result.mutual_information("layer.1").bias == 0.0
    assert result.mutual_information("layer.0").estimate < 0.05
    for i in range(number):
        assert result.shares("layer.1")[i].tolist() == [float(e == 3 - i) for e in range(4)]
    best = result.specialists()
    assert {(one.layer, one.expert, one.task) for one in best[:number]} == {
        ("layer.1", 3 - i, f"task{i}") for i in range(number)
    }
    assert all((one.share, one.lift, one.usage) == (1.0, number, pytest.approx(1 / number)) for one in best[:number])
    assert all(one.lift < 1.5 for one in best[number:])


def test_information_does_not_depend_on_how_much_text_a_task_has(bert, tokenizer):
    model = make_model(bert, make_tasks(2), router_task_embedding=True, experts_per_token=1)
    send(model, {"task0": 0, "task1": 1})
    rows = make_rows(2)
    rows["data0"] = rows["data0"].map(lambda row: {"text": " ".join([row["text"]] * 4)})
    result = routing(model, rows, tokenizer, **SMALL)
    slots = result.counts["layer.1"].sum(1)
    assert slots[0] > 2 * slots[1]
    assert result.mutual_information("layer.1").estimate == pytest.approx(math.log(2))


def test_tasks_that_read_alike_are_routed_alike(bert, tokenizer):
    result = routing(make_model(bert, make_tasks(3)), make_rows(3, rows=200), tokenizer, batches=6, batch_size=32)
    for layer in result.counts:
        assert (result.counts[layer].sum(1) > 2 * 192 * 5).all() and result.shares(layer).max() < 0.9
        assert abs(result.mutual_information(layer).corrected) < 0.003


@pytest.mark.parametrize(("tasks", "experts", "slots"), [(2, 4, 50), (3, 8, 400)])
def test_the_bias_is_what_independent_draws_are_too_high_by(tasks, experts, slots):
    draw = np.random.default_rng(0)
    p = draw.dirichlet(np.full(experts, 5.0))
    found = [
        RoutingResult(tuple("abc"[:tasks]), {"x": draw.multinomial(slots, p, size=tasks)}).mutual_information("x")
        for _ in range(2000)
    ]
    expected = (experts - 1) * (tasks - 1) / (2 * slots * tasks)
    assert np.mean([one.estimate for one in found]) == pytest.approx(expected, rel=0.1)
    assert np.mean([one.bias for one in found]) == pytest.approx(expected, rel=0.1)
    assert np.mean([one.corrected for one in found]) == pytest.approx(0, abs=0.1 * expected)


def test_information_is_that_of_the_definition():
    counts = np.array([[30, 10, 0], [5, 15, 60]])
    result = RoutingResult(("a", "b"), {"x": counts})
    p = counts / counts.sum(1, keepdims=True) / 2  # joint, each task with 1/2
    marginal = p.sum(0)
    expected = sum(p[t, e] * math.log(p[t, e] / (0.5 * marginal[e])) for t in range(2) for e in range(3) if p[t, e])
    assert result.mutual_information("x").estimate == pytest.approx(expected)


# ---- what is counted ----


@pytest.mark.parametrize("name", NATIVE)
def test_native_mixtures_are_counted_like_by_hand(tokenizer, name):
    torch.manual_seed(0)
    backbone = NATIVE[name]().eval()
    tasks = [*make_tasks(2), Task("same", "regression", dataset="data0")]
    model = HardSharingModel.from_backbone(backbone, tasks)
    with torch.no_grad():
        for router in find_routers(model).values():
            nn.init.normal_(router.weight)
    rows = make_rows(2, rows=8)
    result = routing(model, rows, tokenizer, batches=1, batch_size=8)
    assert list(result.counts) == list(find_routers(model)) == ["layers.0", "layers.1"]
    by_hand = {layer: torch.zeros(3, 4, dtype=torch.long) for layer in result.counts}
    outputs: dict[str, tuple] = {}
    for layer, router in find_routers(model).items():
        router.register_forward_hook(lambda _, args, output, layer=layer: outputs.update({layer: output}))
    for number in (0, 1):
        for text in rows[f"data{number}"]["text"]:
            model.backbone(**tokenizer(text, return_tensors="pt", return_token_type_ids=False))
            for layer, table in by_hand.items():
                table[number] += torch.bincount(outputs[layer][2].flatten(), minlength=4)
    for layer, table in by_hand.items():
        table[2] = table[0]  # two tasks read the same rows
        assert (result.counts[layer] == table.numpy()).all()
        assert (table > 0).sum() > 8


@pytest.mark.parametrize("embedding", [False, True])
def test_our_own_experts_are_counted_without_padding(bert, tokenizer, embedding):
    model = make_model(bert, make_tasks(2), router_task_embedding=embedding)
    rows = make_rows(2, rows=16)
    result = routing(model, rows, tokenizer, **SMALL)
    for number in (0, 1):
        tokens = sum(len(ids) for ids in tokenizer(list(rows[f"data{number}"]["text"]))["input_ids"])
        assert all(table[number].sum() == 2 * tokens for table in result.counts.values())


def test_tasks_of_every_type_are_counted(bert, tokenizer, tasks):
    result = routing(make_model(bert, tasks), make_datasets(), tokenizer, **SMALL)
    assert result.tasks == tuple(task.name for task in tasks)
    assert all((table.sum(1) > 0).all() for table in result.counts.values())
    # tone and strength read the same rows
    assert all((table[0] == table[1]).all() for table in result.counts.values())


def test_the_seed_decides_about_the_rows(bert, tokenizer):
    model, rows = make_model(bert, make_tasks(2)), make_rows(2)
    one, same, other = (routing(model, rows, tokenizer, batches=1, batch_size=4, seed=seed) for seed in (0, 0, 1))
    assert all((one.counts[layer] == same.counts[layer]).all() for layer in one.counts)
    assert any((one.counts[layer] != other.counts[layer]).any() for layer in one.counts)


def test_a_small_dataset_is_read_once(bert, tokenizer, caplog, monkeypatch):
    import logging

    monkeypatch.setattr(logging.getLogger("hf_multitask"), "propagate", True)
    model, rows = make_model(bert, make_tasks(1)), make_rows(1, rows=11)
    result = routing(model, rows, tokenizer, batches=5, batch_size=4)
    lengths = [len(ids) for ids in tokenizer(list(rows["data0"]["text"]))["input_ids"]]
    assert result.counts["layer.0"].sum() <= 2 * sum(sorted(lengths)[3:])
    assert "dataset 'data0' has 11 rows: 2 of 5 batches of 4 are made" in caplog.text
    all_rows = routing(model, rows, tokenizer, batches=1, batch_size=100)
    assert all_rows.counts["layer.0"].sum() == 2 * sum(lengths)
    assert all_rows.mutual_information("layer.0").estimate == 0.0 and "layer.0" in str(all_rows)


# ---- no trace ----


def test_it_leaves_no_trace(bert, tokenizer):
    model = make_model(bert, make_tasks(2), router_noise=0.3).train()
    model.heads["task0"].eval()
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    grads = [parameter.grad for parameter in model.parameters()]
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    routing(model, make_rows(2), tokenizer, **SMALL)
    assert (torch.rand(1), random.random(), np.random.rand()) == expected
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is grad for parameter, grad in zip(model.parameters(), grads, strict=True))
    assert all(layer.counts is None and layer.passes == [] for _, layer in model.expert_layers())
    assert torch.is_grad_enabled()


# ---- what comes out ----


@pytest.fixture
def result() -> RoutingResult:
    counts = {"layer.1": np.array([[30, 10, 0], [5, 15, 60]]), "layer.3": np.array([[20, 10, 10], [40, 20, 20]])}
    return RoutingResult(("tone", "names"), counts, {"seed": 0})


def test_a_result_is_saved_and_loaded(tmp_path, result):
    result.save(tmp_path / "routing.json")
    loaded = RoutingResult.load(tmp_path / "routing.json")
    assert loaded.tasks == result.tasks and loaded.settings == result.settings
    assert list(loaded.counts) == list(result.counts)
    assert all((loaded.counts[layer] == result.counts[layer]).all() for layer in result.counts)
    assert str(loaded) == str(result)


def test_tables_say_what_was_found(result):
    row = result.table()[1]
    assert row["layer"] == "layer.1" and row["task"] == "names" and row["slots"] == 80
    assert [row[f"expert_{e}"] for e in range(3)] == [0.0625, 0.1875, 0.75]
    assert len(result.table()) == 4
    lines = str(result).splitlines()
    assert lines[3].split() == ["layer.1", "names", "6", "19", "75"]
    assert any(line.startswith("layer.1, e2") and "names" in line and "2.00" in line for line in lines)
    assert result.specialists(1)[0].expert == 2
    with pytest.raises(ValueError, match=r"no layer 'layer.2'; layers with routers are layer.1, layer.3"):
        result.shares("layer.2")


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_picture_is_drawn(tmp_path, result, suffix):
    pytest.importorskip("matplotlib")
    result.plot(tmp_path / f"routing.{suffix}")
    first = (tmp_path / f"routing.{suffix}").read_bytes()
    result.plot(tmp_path / f"again.{suffix}")
    assert first == (tmp_path / f"again.{suffix}").read_bytes() and len(first) > 1000


def test_without_matplotlib_the_mend_is_named(tmp_path, result, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install hf_multitask\[plots\]"):
        result.plot(tmp_path / "x.svg")


# ---- what does not fit ----


def test_what_does_not_fit_is_named(bert, tokenizer):
    tasks, rows = make_tasks(2), make_rows(2)
    with pytest.raises(TypeError, match="routing needs a MultiTaskModel, got BertModel"):
        routing(bert, rows, tokenizer)
    with pytest.raises(ValueError, match="HardSharingModel over a backbone 'bert' has no routers"):
        routing(HardSharingModel.from_backbone(bert, tasks), rows, tokenizer)
    model = make_model(bert, tasks)
    for options, message in (({"batches": 0}, "batches must be .* got 0"), ({"batch_size": 1.5}, "batch_size .* 1.5")):
        with pytest.raises(ValueError, match=message):
            routing(model, rows, tokenizer, **options)
    with pytest.raises(ValueError, match="'data1'|data1"):
        routing(model, {"data0": rows["data0"]}, tokenizer)


def test_routers_of_an_unknown_kind_are_named(bert, tokenizer):
    class OtherRouter(nn.Linear):
        pass

    model = HardSharingModel.from_backbone(bert, make_tasks(1))
    model.backbone.encoder.layer[1].output.dense.__class__ = OtherRouter
    with pytest.raises(ValueError, match="the router of layer.1, a OtherRouter, returns no logits, weights and"):
        routing(model, make_rows(1), tokenizer)
    assert not model.backbone.encoder.layer[1].output.dense._forward_hooks


def test_the_encoder_of_a_switch_transformer_is_no_backbone():
    config = SwitchTransformersConfig(
        vocab_size=90, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2, num_sparse_encoder_layers=1
    )
    with pytest.raises(ValueError, match="backbone 'switch_transformers' is an encoder-decoder"):
        HardSharingModel.from_backbone(SwitchTransformersEncoderModel(config), make_tasks(1))
