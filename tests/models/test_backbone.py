"""What a backbone answers depends on its input alone; a family for which that is not so is refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
from families import tiny_config, tiny_model
from transformers import AutoConfig, AutoModel, LlamaConfig, LlamaModel

from hf_multitask import HardSharingModel, Task
from hf_multitask.models.auto import SCHEMES

TASKS = [Task("tone", "single_label_classification", labels=["bad", "good"]), Task("score", "regression")]
ROPE = {
    "dynamic": dict(rope_type="dynamic", factor=4.0, rope_theta=10000.0),
    "longrope": dict(
        rope_type="longrope", factor=4.0, rope_theta=10000.0, original_max_position_embeddings=8,
        short_factor=[1.0] * 4, long_factor=[3.0] * 4,
    ),
}  # fmt: skip


def rotary_model(kind: str) -> LlamaModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=8 if kind == "dynamic" else 32, rope_parameters=ROPE[kind], pad_token_id=3,
    )  # fmt: skip
    return LlamaModel(config).eval()


def answers(model, length: int) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(4, 4 + length)[None]).logits["tone"].clone()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ROPE)
@pytest.mark.sample(5)
def test_a_long_input_changes_no_later_answer(kind, scheme):
    options = {"num_virtual_tokens": 2} if scheme == "prefix" else {}
    model = SCHEMES[scheme].from_backbone(rotary_model(kind), TASKS, **options).eval()
    state = {name: value.clone() for name, value in model.named_buffers()}
    lengths = (6, 12, 30)
    fresh = {length: answers(copy.deepcopy(model), length) for length in lengths}
    for length in (30, 12, 6, 12, 30):
        assert torch.equal(answers(model, length), fresh[length]), length
    assert all(torch.equal(value, state[name]) for name, value in model.named_buffers())


@pytest.mark.parametrize("kind", ROPE)
@pytest.mark.sample(2)
def test_rotary_embeddings_are_those_of_transformers(tmp_path, kind):
    plain = rotary_model(kind)
    model = HardSharingModel.from_backbone(plain, TASKS).eval()
    model.save_pretrained(tmp_path)
    for own in (model, HardSharingModel.from_pretrained(tmp_path)):
        for length in (6, 12, 30):  # growing, so that Transformers' own model has the right frequencies too
            ids = torch.arange(4, 4 + length)[None]
            with torch.no_grad():
                expected = rotary_model(kind)(ids).last_hidden_state
                assert torch.equal(own.backbone(ids).last_hidden_state, expected)


REFUSED = {
    "big_bird": (dict(attention_type="block_sparse"), "big_bird.*block_sparse.*original_full"),
    "rwkv": (dict(rescale_every=2, attention_hidden_size=32), "rwkv.*rescale_every=2.*rescale_every=0"),
    "recurrent_gemma": (dict(lru_width=32), "recurrent_gemma.*state"),
    "reformer": ({}, "reformer.*hidden_size=32"),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", REFUSED)
@pytest.mark.sample(5)
def test_a_family_that_cannot_serve_is_refused_by_name(family, scheme):
    options, named = REFUSED[family]
    backbone = tiny_model(AutoModel, tiny_config(family, **options))
    named = f"'{family}'" if scheme == "prefix" else named  # which names the few that it works on
    with pytest.raises(ValueError, match=named):
        SCHEMES[scheme].from_backbone(backbone, TASKS)


def test_the_advice_for_bigbird_works(tmp_path):
    tiny_model(AutoModel, tiny_config("big_bird", attention_type="block_sparse")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="block_sparse"):
        HardSharingModel.from_backbone(str(tmp_path), TASKS)
    backbone = AutoModel.from_pretrained(tmp_path, attention_type="original_full")
    model = HardSharingModel.from_backbone(backbone, TASKS)
    model.save_pretrained(tmp_path / "own")
    loaded = HardSharingModel.from_pretrained(tmp_path / "own")
    assert torch.equal(answers(loaded, 12), answers(model, 12))
    assert AutoConfig.from_pretrained(tmp_path).attention_type == "block_sparse"
