"""The layers of a backbone are found in every family that has a list of them, and refused by name in the others."""

from __future__ import annotations

import pytest
import torch
from conftest import BACKBONES
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModel,
    BertConfig,
    BertModel,
    DebertaV2Config,
    GPT2Config,
    MixtralConfig,
    MPNetConfig,
    Qwen2Config,
    XLMConfig,
    XLNetConfig,
)

from hf_multitask.models.layers import find_layers

_SIZE = dict(vocab_size=90, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
FAMILIES = {
    **BACKBONES,
    "gpt2": lambda: AutoModel.from_config(GPT2Config(vocab_size=90, n_embd=32, n_layer=3, n_head=4, n_positions=66)),
    "deberta-v2": lambda: AutoModel.from_config(DebertaV2Config(**_SIZE, relative_attention=True)),
    "mpnet": lambda: AutoModel.from_config(MPNetConfig(**_SIZE)),
    "qwen2": lambda: AutoModel.from_config(Qwen2Config(**_SIZE, num_key_value_heads=2)),
    # as many experts as layers: the lists in the layers do not count
    "mixtral": lambda: AutoModel.from_config(MixtralConfig(**_SIZE, num_key_value_heads=2, num_local_experts=3)),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_are_found_in_the_order_in_which_hidden_states_pass(name):
    torch.manual_seed(0)
    backbone = FAMILIES[name]().eval()
    layers = find_layers(backbone)
    assert len(layers) == backbone.config.num_hidden_layers and any(layers is module for module in backbone.modules())
    seen: list[tuple[int, torch.Size]] = []

    def note(layer, args, output):
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        seen.append((next(i for i, other in enumerate(layers) if other is layer), hidden.shape))

    for layer in layers:
        layer.register_forward_hook(note)
    backbone(input_ids=torch.randint(5, 90, (2, 7)))
    assert seen == [(i, (2, 7, 32)) for i in range(len(layers))]


def albert(**options) -> AlbertModel:
    return AlbertModel(AlbertConfig(**{**_SIZE, "embedding_size": 16, **options}))


def test_layers_that_share_one_group_are_refused():
    message = (
        r"the layers of backbone 'albert' cannot be found: its lists of modules are encoder.albert_layer_groups of 1; "
        r"needed is exactly one nn.ModuleList of num_hidden_layers = 3 different modules"
    )
    # With three layers inside the group, each of them runs three times.
    for options in ({}, {"inner_group_num": 3}):
        with pytest.raises(ValueError, match=message):
            find_layers(albert(**options))


def test_groups_that_are_not_shared_are_layers():
    assert len(find_layers(albert(num_hidden_groups=3))) == 3


def test_several_lists_of_the_right_length_are_refused():
    xlm = AutoModel.from_config(XLMConfig(vocab_size=90, emb_dim=32, n_layers=2, n_heads=4))
    with pytest.raises(ValueError, match=r"backbone 'xlm' cannot be found: attentions, .* are all lists of 2 modules"):
        find_layers(xlm)


def test_hidden_states_of_another_shape_are_refused():
    xlnet = AutoModel.from_config(XLNetConfig(vocab_size=90, d_model=32, n_layer=2, n_head=4, d_inner=48))
    with pytest.raises(ValueError, match=r"layers of backbone 'xlnet' cannot be used: .* \[L, rows, H\]"):
        find_layers(xlnet)


def test_one_module_under_several_numbers_is_no_list_of_layers():
    bert = BertModel(BertConfig(**_SIZE))
    bert.encoder.layer = nn.ModuleList([bert.encoder.layer[0]] * 3)
    with pytest.raises(ValueError, match="layers of backbone 'bert' cannot be found"):
        find_layers(bert)


def test_a_backbone_without_lists_is_refused():
    bert = BertModel(BertConfig(**_SIZE))
    bert.encoder = nn.Identity()
    with pytest.raises(ValueError, match="'bert' cannot be found: it has no list of modules; needed is exactly one"):
        find_layers(bert)
