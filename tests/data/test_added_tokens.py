"""Tokens that were added to a tokenizer are trained, or the trainer says that they would not be."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import BACKBONES, make_datasets, make_tasks, make_tokenizer
from test_schemes import KINDS, quiet

from hf_multitask import HardSharingModel, MultiTaskTrainer, MultiTaskTrainingArguments
from hf_multitask.data.preprocessing import check_added_tokens
from hf_multitask.models.auto import SCHEMES

FROZEN = [kind for kind, (scheme, _) in KINDS.items() if SCHEMES[scheme].freezes_backbone]


def build(kind: str, resized: str):
    scheme, options = KINDS[kind]
    backbone = BACKBONES["bert"]()
    if resized == "the backbone":
        backbone.resize_token_embeddings(92)
    model = SCHEMES[scheme].from_backbone(backbone, make_tasks(), **{**options, **quiet(kind)})
    if resized == "the model":
        model.resize_token_embeddings(92)
    return model


def extended(*tokens: str, special: bool = False):
    tokenizer = make_tokenizer()
    filling = [f"[unused{i}]" for i in range(90 - len(tokenizer))]  # rows that the backbone has
    tokenizer.add_tokens([*filling, *tokens], special_tokens=special)
    return tokenizer


def trainer_of(model, tokenizer, folder):
    args = MultiTaskTrainingArguments(str(folder), use_cpu=True, report_to="none", max_steps=1, disable_tqdm=True)
    return MultiTaskTrainer(model, args, train_dataset=make_datasets(), processing_class=tokenizer)


@pytest.mark.parametrize("resized", ["the backbone", "the model"])
@pytest.mark.parametrize("kind", KINDS)
def test_new_tokens_under_a_frozen_backbone_are_refused(kind, resized, tmp_path):
    model, tokenizer = build(kind, resized), extended("zzzz", "yyyy", special=resized == "the model")
    if kind not in FROZEN:
        check_added_tokens(tokenizer, model)
        return
    with pytest.raises(ValueError, match=r"2 added token\(s\) .* such as '[zy]{4}', .*requires_grad_\(True\)"):
        trainer_of(model, tokenizer, tmp_path)
    model.get_input_embeddings().weight.requires_grad_(True)
    check_added_tokens(tokenizer, model)


def test_tokens_that_the_backbone_knows_are_left_alone(monkeypatch):
    found: list[str] = []
    monkeypatch.setattr(logging.getLogger("hf_multitask.data.preprocessing"), "warning", found.append)
    model = build("prefix", "nothing")
    check_added_tokens(extended(), model)
    resized = build("prefix", "the model")
    with torch.no_grad():  # somebody gave the rows values
        resized.get_input_embeddings().weight[90:] = resized.get_input_embeddings().weight[5:7]
    check_added_tokens(extended("zzzz", "yyyy"), resized)
    assert not found


def test_embeddings_that_a_user_froze_may_come_loose_later(monkeypatch):
    found: list[str] = []
    monkeypatch.setattr(logging.getLogger("hf_multitask.data.preprocessing"), "warning", found.append)
    backbone = BACKBONES["bert"]()
    backbone.resize_token_embeddings(92)
    model = HardSharingModel.from_backbone(backbone, make_tasks())
    check_added_tokens(extended("zzzz"), model)
    model.get_input_embeddings().weight.requires_grad_(False)
    assert not found
    check_added_tokens(extended("zzzz"), model)
    assert len(found) == 1 and "1 added token(s)" in found[0]


def test_more_tokens_than_embeddings_are_refused(tmp_path):
    model = build("hard", "nothing")
    with pytest.raises(ValueError, match=r"has 92 tokens, the backbone embeddings for 90.*resize_token_embeddings"):
        trainer_of(model, extended("zzzz", "yyyy"), tmp_path)
