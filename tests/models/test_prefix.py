"""Prefixes: PEFT's numbers for every row of a mixed batch, a backbone that stays as it is, and folders PEFT reads."""

from __future__ import annotations

import copy
import json
import math
import warnings

import pytest
import torch
from conftest import BACKBONES, PAD_ID
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AlbertConfig,
    AlbertModel,
    AutoModel,
    DebertaV2Config,
    DebertaV2Model,
    GPTNeoXConfig,
    GPTNeoXModel,
    MistralConfig,
    ModernBertConfig,
    MPNetConfig,
    MPNetModel,
    PreTrainedModel,
    T5Config,
    T5Model,
)
from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb
from transformers.pytorch_utils import Conv1D

from hf_multitask import Task
from hf_multitask.models.manifest import write_manifest
from hf_multitask.models.passes import Segment
from hf_multitask.models.prefix import PrefixConfig, PrefixModel
from hf_multitask.models.prefix_attention import ATTENTION_FAMILIES, CACHE_FAMILIES

TASKS = [
    Task("tone", "single_label_classification", labels=("positive", "negative", "mixed")),
    Task("names", "token_classification", labels=("O", "B-place", "B-person")),
    Task("helper", "regression", auxiliary=True),
    Task("a-score", "regression", head="linear"),
]
SERVED = ["tone", "names", "a-score"]
N = 5
# The rows are not in the order of the tasks, and one task has none.
SEGMENTS = {"names": Segment(2, 4, 6), "tone": Segment(0, 2, 9), "helper": Segment(4, 5, 3)}
OWNERS = ["tone", "tone", "names", "names", "helper"]

_SIZE = dict(vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
_COMMON = dict(**_SIZE, max_position_embeddings=70, pad_token_id=PAD_ID, bos_token_id=1, eos_token_id=2)
_DECODER = dict(**_COMMON, num_key_value_heads=2)
_CONFIGS = {
    "gpt2": dict(vocab_size=90, n_embd=32, n_layer=2, n_head=4, n_positions=70, bos_token_id=1, eos_token_id=2),
    "gemma": dict(**_DECODER, head_dim=16),
    "qwen3": dict(**_DECODER, head_dim=16),
}
CAUSAL = CACHE_FAMILIES[CACHE_FAMILIES.index("cohere") :]

backbones = pytest.mark.parametrize("name", BACKBONES)
cached = pytest.mark.parametrize("name", CACHE_FAMILIES)
uncached = pytest.mark.parametrize("name", ATTENTION_FAMILIES)


def make_backbone(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name in BACKBONES:
        return BACKBONES[name]().eval()
    fields = _CONFIGS.get(name, _DECODER if name in CAUSAL else _COMMON)
    return AutoModel.from_config(CONFIG_MAPPING[name](**fields)).eval()


def randomise(model: PrefixModel) -> PrefixModel:
    """Make heads and prefixes random and large, so that all of them count."""
    torch.manual_seed(1)
    with torch.no_grad():
        for module in (model.heads, model.adapters):
            for parameter in module.parameters():
                parameter.copy_(torch.randn_like(parameter))
    return model.eval()


def make_model(backbone: str | PreTrainedModel = "bert", tasks=TASKS, **options) -> PrefixModel:
    source = make_backbone(backbone) if isinstance(backbone, str) else backbone
    return randomise(PrefixModel.from_backbone(source, tasks, **{"num_virtual_tokens": N, **options}))


def make_batch(lengths=(9, 9, 4, 6, 3)) -> dict[str, Tensor]:
    ids = torch.randint(5, 90, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    return {"input_ids": torch.where(mask.bool(), ids, PAD_ID), "attention_mask": mask}


LABELS = {
    "tone": torch.tensor([2, 0]),
    "names": torch.tensor([[0, 1, -100, 2, 1, 0, -100, -100, -100], [1, 0, 0, 2, 2, 1, -100, -100, -100]]),
    "helper": torch.tensor([[0.5]]),
}


def count_calls(model: PrefixModel) -> list[tuple[int, ...]]:
    """Return a list that grows by the shape of the rows of each call of the backbone."""
    calls: list[tuple[int, ...]] = []
    model.backbone.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return calls


def hidden_states(model: PrefixModel, batch, segments=SEGMENTS) -> tuple[Tensor, ...]:
    return model(**batch, segments=segments, output_hidden_states=True).hidden_states


def gradients(model: PrefixModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


# ---- the numbers: PEFT's, or those of attention by hand ----


def read_with_peft(model: PrefixModel, backbone: PreTrainedModel, folder) -> PeftModel:
    """Save a model and load its prefixes with PEFT."""
    model.save_pretrained(folder)
    first, *others = [task.name for task in model.tasks]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of tensors that are missing
        read = PeftModel.from_pretrained(copy.deepcopy(backbone), f"{folder}/adapters/{first}", adapter_name=first)
        for name in others:
            read.load_adapter(f"{folder}/adapters/{name}", adapter_name=name)
    return read.eval()


def assert_rows_are_pefts(model: PrefixModel, read: PeftModel, batch) -> None:
    found = hidden_states(model, batch)
    for row, task in enumerate(OWNERS):
        read.set_adapter(task)
        expected = read(**batch, output_hidden_states=True).hidden_states
        assert len(found) == len(expected) == model.config.backbone_config.num_hidden_layers + 1
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one[row], other[row]), (row, task, float((one[row] - other[row]).abs().max()))


@cached
def test_each_row_of_a_mixed_batch_is_what_peft_gives_for_its_prefix(tmp_path, name):
    backbone = make_backbone(name)
    model = make_model(backbone)
    read = read_with_peft(model, backbone, tmp_path)
    assert type(read).__name__ == "PeftModelForFeatureExtraction"
    calls = count_calls(model)
    with torch.no_grad():
        assert_rows_are_pefts(model, read, make_batch())
        full = {"input_ids": make_batch((9,) * 5)["input_ids"]}
        assert_rows_are_pefts(model, read, full)
        assert_rows_are_pefts(model, read, {**full, "position_ids": torch.arange(3, 12).expand(5, -1)})
    assert calls == [(5, 9)] * 3
    # and the prefixes matter
    states = [hidden_states(model, make_batch(), {task.name: Segment(0, 5, 9)})[-1] for task in TASKS]
    assert all((one - other)[:, 0].abs().max() > 1e-3 for one, other in zip(states, states[1:], strict=False))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "llama", "qwen2", "mistral"])
def test_rows_are_pefts_in_every_precision_and_attention(tmp_path, name, dtype, attention):
    backbone = make_backbone(name).to(dtype)
    backbone.set_attn_implementation(attention)
    model = make_model(backbone)
    assert model.dtype == dtype and model.backbone.config._attn_implementation == attention
    with torch.no_grad():
        assert_rows_are_pefts(model, read_with_peft(model, backbone, tmp_path), make_batch())


def test_rows_are_pefts_behind_a_sliding_window(tmp_path):
    torch.manual_seed(0)
    backbone = AutoModel.from_config(MistralConfig(**_DECODER, sliding_window=4)).eval()
    model = make_model(backbone)
    with torch.no_grad():
        assert_rows_are_pefts(model, read_with_peft(model, backbone, tmp_path), make_batch())


@cached
def test_the_saved_configuration_is_what_peft_fills_in(tmp_path, name):
    backbone = make_backbone(name)
    make_model(backbone).save_pretrained(tmp_path)
    config = PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=N)
    get_peft_model(copy.deepcopy(backbone), config).save_pretrained(tmp_path / "peft")
    expected = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    found = json.loads((tmp_path / "adapters" / "names" / "adapter_config.json").read_text())
    assert {key for key in expected if found.get(key) != expected[key]} <= {"base_model_name_or_path"}
    shapes = [
        {key: value.shape for key, value in load_file(tmp_path / folder / "adapter_model.safetensors").items()}
        for folder in ("peft", "adapters/names")
    ]
    assert shapes[0] == shapes[1]


def attend_by_hand(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """Return attention as its formula has it, `[L, heads * width]`, for one row; `visible` is `[L, n + L]`."""
    scores = torch.einsum("hqd,hkd->hqk", query, keys) / math.sqrt(query.shape[-1])
    weights = torch.exp(scores) * visible
    mixed = torch.einsum("hqk,hkd->qhd", weights / weights.sum(-1, keepdim=True), values)
    return mixed.flatten(1)


def split_heads(states: Tensor, heads: int = 4) -> Tensor:
    return states.view(len(states), heads, -1).transpose(0, 1)


def prefix_by_hand(model: PrefixModel, task: str, layer: int) -> tuple[Tensor, Tensor]:
    """Return keys and values, `[heads, n, width]`: in PEFT's layout a layer's keys come first, then its values."""
    weight = model.state_dict()[f"adapters.{task}.embedding.weight"]
    keys, values = weight[:, 64 * layer : 64 * layer + 32], weight[:, 64 * layer + 32 : 64 * layer + 64]
    return split_heads(keys), split_heads(values)


def distilbert_by_hand(model: PrefixModel, task: str, ids: Tensor) -> Tensor:
    backbone = model.backbone
    hidden = backbone.embeddings(ids.unsqueeze(0))[0]
    for number, layer in enumerate(backbone.transformer.layer):
        keys, values = prefix_by_hand(model, task, number)
        own = [split_heads(linear(hidden)) for linear in (layer.attention.q_lin, layer.attention.k_lin)]
        visible = torch.ones(len(ids), N + len(ids))
        keys, values = (
            torch.cat([keys, own[1]], 1),
            torch.cat([values, split_heads(layer.attention.v_lin(hidden))], 1),
        )
        mixed = layer.attention.out_lin(attend_by_hand(own[0], keys, values, visible))
        hidden = layer.sa_layer_norm(mixed + hidden)
        hidden = layer.output_layer_norm(layer.ffn(hidden) + hidden)
    return hidden


def modernbert_by_hand(model: PrefixModel, task: str, ids: Tensor) -> Tensor:
    backbone = model.backbone
    hidden = backbone.embeddings(ids.unsqueeze(0))[0]
    positions = torch.arange(len(ids))
    for number, layer in enumerate(backbone.layers):
        keys, values = prefix_by_hand(model, task, number)
        parts = layer.attn.Wqkv(layer.attn_norm(hidden)).chunk(3, dim=-1)
        query, key, value = (split_heads(part) for part in parts)
        rotary = backbone.rotary_emb(hidden, positions.unsqueeze(0), layer.attention_type)
        query, key = (part[0] for part in apply_rotary_pos_emb(query[None], key[None], *rotary))
        near = torch.ones(len(ids), len(ids))
        if layer.attention_type == "sliding_attention":
            near = ((positions[:, None] - positions).abs() <= backbone.config.local_attention // 2).float()
        visible = torch.cat([torch.ones(len(ids), N), near], 1)
        mixed = attend_by_hand(query, torch.cat([keys, key], 1), torch.cat([values, value], 1), visible)
        hidden = hidden + layer.attn.Wo(mixed)
        hidden = hidden + layer.mlp(layer.mlp_norm(hidden))
    return backbone.final_norm(hidden)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@uncached
def test_encoders_without_a_cache_attend_to_prefixes_as_computed_by_hand(name, attention):
    backbone = make_backbone(name)
    if name == "modernbert":
        torch.manual_seed(0)
        config = dict(_COMMON, cls_token_id=1, sep_token_id=2, num_hidden_layers=4, local_attention=4)
        backbone = AutoModel.from_config(ModernBertConfig(**config)).eval()
        assert backbone.config.layer_types.count("sliding_attention") == 2
    model = make_model(backbone)
    model.set_attn_implementation(attention)
    batch, by_hand = make_batch(), {"distilbert": distilbert_by_hand, "modernbert": modernbert_by_hand}[name]
    calls = count_calls(model)
    with torch.no_grad():
        found = hidden_states(model, batch)[-1]
        assert calls == [(5, 9)]
        for row, (task, length) in enumerate(zip(OWNERS, batch["attention_mask"].sum(1).tolist(), strict=True)):
            expected = by_hand(model, task, batch["input_ids"][row, :length])
            torch.testing.assert_close(found[row, :length], expected, rtol=1e-5, atol=1e-5)
            other = by_hand(model, "a-score", batch["input_ids"][row, :length])
            assert (other - expected).abs().max() > 1e-2


@uncached
def test_a_backbone_without_a_prefix_computes_what_it_did(name):
    model, backbone, batch = make_model(name), make_backbone(name), make_batch()
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        backbone.set_attn_implementation(attention)
        found, expected = (one(**batch, output_attentions=attention == "eager") for one in (model.backbone, backbone))
        assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    assert all(torch.equal(one, other) for one, other in zip(found.attentions, expected.attentions, strict=True))


@uncached
@pytest.mark.sample(9)
def test_an_attention_that_prefixes_do_not_work_with_is_refused(name):
    model = make_model(name)
    model.backbone.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="need attn_implementation sdpa or eager, got 'flex_attention'"):
        model(**make_batch())
    with pytest.raises(ValueError, match="need attn_implementation sdpa or eager, got 'flex_attention'"):
        PrefixModel.from_backbone(model.backbone, TASKS)


# ---- a mixed batch ----


@backbones
def test_rows_of_several_tasks_go_through_the_backbone_together(name):
    model, batch = make_model(name), make_batch()
    calls = count_calls(model)
    found = model(**batch, segments=SEGMENTS).logits
    assert calls == [(5, 9)]
    for task, segment in SEGMENTS.items():
        for i, row in enumerate(range(segment.start, segment.stop)):
            length = int(batch["attention_mask"][row].sum())
            ids = batch["input_ids"][row : row + 1, :length]
            alone = model(input_ids=ids, segments={task: Segment(0, 1, length)}).logits[task][0]
            own = found[task][i, :length] if task == "names" else found[task][i]
            torch.testing.assert_close(own, alone, rtol=1e-5, atol=1e-5)


@backbones
def test_serving_reads_the_rows_behind_the_prefix_of_every_task_but_auxiliary_ones(name):
    model, batch = make_model(name), make_batch()
    calls = count_calls(model)
    found = model(**batch).logits
    assert list(found) == SERVED and calls == [(5, 9)] * 3
    for task in SERVED:
        expected = model(**batch, segments={task: Segment(0, 5, 9)}).logits
        assert torch.equal(found[task], expected[task])


def test_an_auxiliary_task_changes_nothing_at_inference():
    model = make_model()
    without = make_model(tasks=[task for task in TASKS if not task.auxiliary])
    without.load_state_dict({k: v for k, v in model.state_dict().items() if ".helper." not in k})
    assert_equal(without(**make_batch()).logits, model(**make_batch()).logits)


@pytest.mark.parametrize("name", ["bert", "roberta", "llama", "distilbert", "modernbert"])
def test_embeddings_may_come_in_place_of_ids(name):
    model, ids = make_model(name), make_batch((9,) * 5)["input_ids"]
    found = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    assert_equal(found, model(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert", "llama"])
def test_attentions_cover_the_prefix(name):
    model = make_model(name)
    model.set_attn_implementation("eager")
    attentions = model(**make_batch(), segments=SEGMENTS, output_attentions=True).attentions
    assert [tuple(layer.shape) for layer in attentions] == [(5, 4, 9, N + 9)] * 2
    assert all((layer[..., :N] > 0).all() for layer in attentions)


def test_token_types_are_read():
    model, batch = make_model(), make_batch()
    types = torch.zeros_like(batch["input_ids"])
    assert_equal(model(**batch, token_type_ids=types).logits, model(**batch).logits)
    types[:, 2:] = 1
    assert (model(**batch, token_type_ids=types).logits["tone"] != model(**batch).logits["tone"]).any()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_decoder_may_be_padded_on_the_left_too(name):
    tasks = [task for task in TASKS if task.name != "names"]
    model, batch = make_model(name, tasks), make_batch()
    shifts = (batch["attention_mask"] == 0).sum(1).tolist()
    left = {
        key: torch.stack([row.roll(shift) for row, shift in zip(value, shifts, strict=True)])
        for key, value in batch.items()
    }
    # The positions are the caller's: those of GPT-2 are no differences.
    positions = torch.stack([torch.arange(9).roll(shift) for shift in shifts])
    found, expected = model(**left, position_ids=positions).logits, model(**batch).logits
    for task in expected:
        torch.testing.assert_close(found[task], expected[task], rtol=1e-4, atol=1e-4)


# ---- training ----


@backbones
def test_only_the_prefixes_and_heads_of_the_rows_that_came_get_a_gradient(name):
    model, batch = make_model(name).train(), make_batch()
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    model(**batch, segments=SEGMENTS, labels=LABELS).loss.backward()
    found = gradients(model)
    assert {name.split(".")[1] for name in found} == set(SEGMENTS)
    assert {key for key in found if key.startswith("adapters.")} == {
        f"adapters.{task}.embedding.weight" for task in SEGMENTS
    }
    assert all((value != 0).any() for value in found.values())
    # every layer's keys and values, of every virtual token
    grad = found["adapters.tone.embedding.weight"]
    assert (grad.view(N, -1, 8).abs().sum(-1) > 0).all()


@backbones
def test_every_trainable_parameter_is_one_tasks_own(name):
    model = make_model(name)
    own = [id(p) for task in TASKS for p in model.task_parameters(task.name)]
    assert len(own) == len(set(own)) and list(model.shared_parameters()) == []
    assert set(own) == {id(p) for p in model.parameters() if p.requires_grad}
    assert model.adapters["tone"].embedding.weight in set(model.task_parameters("tone"))


@backbones
def test_steps_leave_the_backbone_and_other_tasks_as_they_were(name):
    model, batch = make_model(name).train(), make_batch()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(
            **batch, segments={"tone": Segment(0, 5, 9)}, labels={"tone": torch.tensor([0, 1, 2, 0, 1])}
        ).loss.backward()
        optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if key.startswith(("heads.tone.", "adapters.tone."))}


def test_heads_and_prefixes_without_rows_may_take_part_with_a_0():
    model, batch = make_model().train(), make_batch()
    model(**batch, segments=SEGMENTS, labels=LABELS, run_every_head=True).loss.backward()
    found = gradients(model)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(value.any() for key, value in found.items() if ".a-score." in key)


def losses_and_gradients(model: PrefixModel, batch, segments) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(5)
    model.zero_grad()
    labels = {**LABELS, "names": LABELS["names"][:, : segments["names"].length]}
    loss = model(**batch, segments=segments, labels=labels).loss
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("name", [*CACHE_FAMILIES, *ATTENTION_FAMILIES])
def test_activation_checkpointing_changes_no_bit_of_the_gradients(name):
    model = make_model(name).train()
    # Long rows take a pass of their own; their layers are computed again after the other pass has gone.
    batch = make_batch((50, 50, 6, 5, 3))
    segments = {"tone": Segment(0, 2, 50), "names": Segment(2, 4, 6), "helper": Segment(4, 5, 3)}
    calls, layers = count_calls(model), []
    for module in model.backbone.modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)):
            module.register_forward_hook(lambda *_: layers.append(1))
    loss, expected = losses_and_gradients(model, batch, segments)
    assert calls == [(2, 50), (3, 6)]
    once = len(layers)
    for reentrant in (False, True):
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        layers.clear()
        again, found = losses_and_gradients(model, batch, segments)
        assert len(layers) > 1.5 * once
        assert torch.equal(loss, again)
        assert_equal(found, expected)


@backbones
def test_a_prefix_trains_under_autocast(name):
    model, batch = make_model(name).train(), make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch, segments=SEGMENTS, labels=LABELS).loss
    loss.backward()
    grad = model.adapters["tone"].embedding.weight.grad
    assert grad.dtype == torch.float32 and torch.isfinite(grad).all() and grad.any()


@backbones
def test_a_prefix_trains_in_bfloat16(name):
    model, batch = make_model(make_backbone(name).to(torch.bfloat16)).train(), make_batch()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model(**batch, segments=SEGMENTS, labels=LABELS).loss.backward()
    assert all(torch.isfinite(value).all() for value in gradients(model).values())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@backbones
def test_prefixes_may_be_kept_in_float32_over_a_backbone_in_bfloat16(name, attention):
    model, batch = make_model(make_backbone(name).to(torch.bfloat16)).train(), make_batch()
    model.set_attn_implementation(attention)
    model.adapters.float()
    hidden = hidden_states(model, batch)[-1]
    assert hidden.dtype == torch.bfloat16
    model(**batch, segments=SEGMENTS, labels=LABELS).loss.backward()
    assert model.adapters["tone"].embedding.weight.grad.dtype == torch.float32


def test_prefixes_can_learn_what_heads_cannot():
    # The backbone is random; two tasks want the opposite of the same rows, through heads that are not trained.
    tasks = [Task(name, "regression", head="linear", head_dropout=0.0) for name in ("one", "other")]
    model = make_model(tasks=tasks, prefix_init_std=0.02)
    batch = make_batch((6,) * 8)
    segments = {"one": Segment(0, 4, 6), "other": Segment(4, 8, 6)}
    labels = {"one": torch.ones(4, 1), "other": -torch.ones(4, 1)}
    optimizer = torch.optim.AdamW(model.adapters.parameters(), lr=0.1)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(**batch, segments=segments, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.1 * losses[0]


def test_a_copy_is_independent():
    for name in ("bert", "modernbert"):
        model, batch = make_model(name), make_batch()
        other, before = copy.deepcopy(model), model(**batch).logits
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1.0)
        other.set_attn_implementation("eager")
        assert_equal(model(**batch).logits, before)
        assert model.backbone.config._attn_implementation == "sdpa"
        assert (other(**batch).logits["tone"] != before["tone"]).any()
        attentions = other(**batch, segments=SEGMENTS, output_attentions=True).attentions
        assert attentions[0].shape[-1] == N + 9


# ---- initial values ----


def test_prefixes_begin_with_the_spread_that_was_asked_for():
    backbone = make_backbone("bert")
    spread = {std: PrefixModel.from_backbone(backbone, TASKS, prefix_init_std=std) for std in (None, 1.0)}
    for std, model in spread.items():
        weights = torch.cat([parameter.detach().flatten() for parameter in model.adapters.parameters()])
        assert weights.std() == pytest.approx(std or backbone.config.initializer_range, rel=0.05)
        assert abs(weights.mean()) < 0.05 * weights.std()
    assert [tuple(p.shape) for p in spread[None].adapters.parameters()] == [(20, 2 * 2 * 32)] * len(TASKS)


def test_a_prefix_that_a_checkpoint_lacks_is_initialised_and_reported(tmp_path):
    model = make_model()
    tensors = {key: value for key, value in model.state_dict().items() if "adapters.names" not in key}
    loaded, info = PrefixModel.from_pretrained(None, config=model.config, state_dict=tensors, output_loading_info=True)
    assert set(info["missing_keys"]) == {"adapters.names.embedding.weight"}
    assert loaded.adapters["names"].embedding.weight.detach().std() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(loaded.adapters["tone"].embedding.weight, model.adapters["tone"].embedding.weight)


# ---- saving and loading ----


@pytest.fixture
def saved(tmp_path):
    """Return a function that saves a backbone, and a model over it, and returns the model and both folders."""

    def save(name: str = "bert", **options) -> tuple[PrefixModel, str, str]:
        make_backbone(name).save_pretrained(tmp_path / "backbone")
        source = str(tmp_path / "backbone")
        model = randomise(PrefixModel.from_backbone(source, TASKS, num_virtual_tokens=N))
        model.save_pretrained(tmp_path / "model", **options)
        return model, str(tmp_path / "model"), source

    return save


@backbones
def test_a_saved_model_is_loaded_bit_for_bit_without_a_copy_of_the_backbone(saved, name, tmp_path):
    model, folder, _ = saved(name)
    files = {str(path.relative_to(folder)) for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert files == {"config.json", "model.safetensors", "multitask_manifest.json"} | {
        f"adapters/{task.name}/adapter_{part}" for task in TASKS for part in ("config.json", "model.safetensors")
    }
    kept = load_file(f"{folder}/model.safetensors")
    assert kept.keys() == {key for key in model.state_dict() if key.startswith("heads.")}
    for task in TASKS:
        own = load_file(f"{folder}/adapters/{task.name}/adapter_model.safetensors")
        assert torch.equal(own.pop("prompt_embeddings"), model.adapters[task.name].embedding.weight) and not own
    size = sum((tmp_path / "model" / file).stat().st_size for file in files if file.endswith(".safetensors"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert size < 4 * trained + 8192
    loaded, info = PrefixModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()) and not loaded.training
    assert (loaded.tasks, loaded.config.num_virtual_tokens) == (TASKS, N)
    assert_equal(loaded.state_dict(), model.state_dict())
    assert_equal(loaded(**make_batch()).logits, model(**make_batch()).logits)
    segmented = [one(**make_batch(), segments=SEGMENTS).logits for one in (loaded, model)]
    assert_equal(*segmented)
    own = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert own == {name for name, p in model.named_parameters() if p.requires_grad} and own


def test_a_loaded_model_trains_like_the_one_that_was_saved(saved):
    for name in ("bert", "modernbert"):
        model, folder, _ = saved(name)
        loaded = PrefixModel.from_pretrained(folder)
        results = []
        for one in (model, loaded):
            one.train().activation_checkpointing_enable()
            results.append(losses_and_gradients(one, make_batch(), SEGMENTS))
        assert torch.equal(results[0][0], results[1][0])
        assert_equal(results[1][1], results[0][1])


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_a_folder_with_the_backbone_needs_no_other(saved, tmp_path, name):
    model, folder, _ = saved(name, save_backbone=True)
    (tmp_path / "backbone").rename(tmp_path / "gone")
    assert_equal(PrefixModel.from_pretrained(folder)(**make_batch()).logits, model(**make_batch()).logits)


def test_a_backbone_that_has_moved_is_named(saved, tmp_path):
    model, folder, _ = saved()
    (tmp_path / "backbone").rename(tmp_path / "moved")
    for backbone in (str(tmp_path / "moved"), make_backbone("bert")):
        loaded = PrefixModel.from_pretrained(folder, backbone=backbone)
        assert_equal(loaded(**make_batch()).logits, model(**make_batch()).logits)


def test_another_backbone_is_refused_with_both_hashes(saved):
    model, folder, source = saved()
    torch.manual_seed(7)
    BACKBONES["bert"]().save_pretrained(source)
    with pytest.raises(ValueError, match="not the one that this model was trained with") as caught:
        PrefixModel.from_pretrained(folder)
    assert model.config.backbone_hash[:16] in str(caught.value) and source in str(caught.value)


def test_a_missing_prefix_is_named(saved, tmp_path):
    _, folder, _ = saved()
    (tmp_path / "model" / "adapters" / "names").rename(tmp_path / "lost")
    with pytest.raises(ValueError, match=r"has no adapters/names/adapter_model\.safetensors"):
        PrefixModel.from_pretrained(folder)


def test_a_prefix_of_another_length_or_kind_is_refused(saved):
    model, folder, _ = saved()
    path = f"{folder}/adapters/names/adapter_model.safetensors"
    save_file({"prompt_embeddings": torch.zeros(N + 1, 128)}, path)
    write_manifest(folder)
    with pytest.raises(ValueError, match=r"has the shape \[6, 128\]; the configuration says \[5, 128\]"):
        PrefixModel.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"has the shape \[6, 128\]; the configuration says \[5, 128\]"):
        model.load_adapters(folder)
    save_file({"lora_A": torch.zeros(N, 128)}, path)
    write_manifest(folder)
    with pytest.raises(ValueError, match=r"it lacks \['prompt_embeddings'\] and has \['lora_A'\] too much"):
        PrefixModel.from_pretrained(folder)


def test_a_prefix_that_peft_saved_can_be_put_in_place(saved):
    _, folder, source = saved()
    config = PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=N)
    trained = get_peft_model(AutoModel.from_pretrained(source), config).eval()
    trained.save_pretrained(f"{folder}/adapters/names")
    write_manifest(folder)
    model = PrefixModel.from_pretrained(folder)
    batch = make_batch()
    found = hidden_states(model, batch, {"names": Segment(0, 5, 9)})[-1]
    assert torch.equal(found, trained(**batch).last_hidden_state)


def test_prefixes_are_loaded_in_place(saved):
    model, folder, _ = saved()
    other = make_model(num_virtual_tokens=N)
    with torch.no_grad():
        other.adapters["tone"].embedding.weight.zero_()
    heads = copy.deepcopy(other.heads.state_dict())
    other.load_adapters(folder)
    assert_equal(other.adapters.state_dict(), model.adapters.state_dict())
    assert_equal(other.heads.state_dict(), heads)
    assert other.tensors_elsewhere() == {
        key for key in model.state_dict() if key.startswith(("adapters.", "backbone."))
    }


@pytest.mark.parametrize("name", ["bert", "llama", "modernbert"])
def test_a_model_in_bfloat16_comes_back_in_bfloat16(tmp_path, name):
    make_backbone(name).to(torch.bfloat16).save_pretrained(tmp_path / "backbone")
    model = randomise(PrefixModel.from_backbone(str(tmp_path / "backbone"), TASKS))
    model.save_pretrained(tmp_path / "model")
    for dtype in ({}, {"dtype": "auto"}, {"torch_dtype": "auto"}, {"torch_dtype": torch.bfloat16}):
        loaded = PrefixModel.from_pretrained(tmp_path / "model", **dtype)
        assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
        assert_equal(loaded(**make_batch()).logits, model(**make_batch()).logits)
    for dtype in ({"dtype": torch.float32}, {"torch_dtype": "float32"}):
        loaded = PrefixModel.from_pretrained(tmp_path / "model", **dtype)
        assert {p.dtype for p in loaded.parameters()} == {torch.float32}


# ---- what is refused ----


REFUSED = {
    "mpnet": lambda: MPNetModel(MPNetConfig(**_SIZE)),
    "albert": lambda: AlbertModel(AlbertConfig(**_SIZE, embedding_size=16)),
    "deberta-v2": lambda: DebertaV2Model(DebertaV2Config(**_SIZE)),
    "gpt_neox": lambda: GPTNeoXModel(GPTNeoXConfig(**_SIZE)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_take_no_prefix_are_refused_by_name(name):
    backbone = REFUSED[name]()
    for make in (
        lambda: PrefixModel.from_backbone(backbone, TASKS),
        lambda: PrefixModel(PrefixConfig(backbone_config=backbone.config, tasks=TASKS)),
    ):
        with pytest.raises(ValueError, match=f"backbone '{name}'; they work on bert, bert-generation, .*modernbert"):
            make()


def test_an_encoder_decoder_is_refused_by_name():
    t5 = T5Model(T5Config(vocab_size=90, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4))
    with pytest.raises(ValueError, match="'t5' is an encoder-decoder"):
        PrefixModel.from_backbone(t5, TASKS)
    with pytest.raises(ValueError, match="backbone 't5'"):
        PrefixModel(PrefixConfig(backbone_config=t5.config, tasks=TASKS))


@pytest.mark.parametrize("number", [0, -1, 2.5, "20", True])
def test_a_prefix_has_a_whole_number_of_tokens_from_1(number):
    with pytest.raises(ValueError, match=f"num_virtual_tokens must be a whole number from 1, got {number!r}"):
        PrefixConfig(num_virtual_tokens=number)


@pytest.mark.parametrize("std", [0, -0.1, float("nan")])
def test_a_prefix_has_a_spread_above_0(std):
    with pytest.raises(ValueError, match="prefix_init_std must be above 0"):
        PrefixConfig(prefix_init_std=std)


@pytest.mark.parametrize(("name", "positions"), [("bert", 66), ("roberta", 66), ("llama", 66), ("gpt2", 70)])
def test_a_prefix_must_leave_room_for_the_input(name, positions):
    backbone = make_backbone(name)
    with pytest.raises(ValueError, match=f"num_virtual_tokens={positions} leaves no room .* has {positions} positions"):
        PrefixModel.from_backbone(backbone, TASKS, num_virtual_tokens=positions)
    model = make_model(backbone, num_virtual_tokens=positions - 3)
    assert model.reserved_positions == positions - 3
    assert torch.isfinite(model(**make_batch((3, 2))).logits["tone"]).all()
    if name != "llama":
        with pytest.raises(
            ValueError, match=f"rows of 4 tokens are too long: .* {positions} positions .* cut them to 3"
        ):
            model(**make_batch((4, 2)))


@uncached
def test_encoders_without_a_cache_lose_no_positions(name):
    model = make_model(name, num_virtual_tokens=70)
    assert model.reserved_positions == 0
    assert torch.isfinite(model(**make_batch((66, 3))).logits["tone"]).all()


def test_rows_must_come_through_the_model():
    with pytest.raises(ValueError, match="call the model"):
        make_model().encode(**make_batch())
