"""Answers ranked behind a prompt that is read once: as likely as behind a prompt that is read for each of them."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import BACKBONES
from language import decoder_tokenizer
from language_models import _SIZE, DECODERS, FURTHER, make_plain
from transformers import AutoConfig, AutoModelForCausalLM, RobertaConfig

from hf_multitask import DataCollatorForMultiTask, Task
from hf_multitask.data.sources import make_sources
from hf_multitask.generation import GenerationEvaluator
from hf_multitask.models.auto import SCHEMES
from hf_multitask.models.target_scores import target_scores

TASKS = [
    Task("mood", "causal_lm", prompt="{text} was", labels=("bad", "good")),
    Task("tone", "single_label_classification", labels=("a", "b", "c")),
]
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [20], [30, 31, 32, 33]]
ANSWERS = [[[40, 41, 42], [43], [44, 2]], [[45, 46], [47, 48, 49, 2], [50]], [[40, 41, 42], [43], [44, 2]]]
# Windows shorter than the prompts, and a family that begins to count positions behind the padding id.
MORE = {
    "mistral, window": AutoConfig.for_model("mistral", **_SIZE, sliding_window=4),
    "gemma2, window": AutoConfig.for_model("gemma2", **_SIZE, head_dim=8, sliding_window=4),
    "roberta as decoder": RobertaConfig(**{**BACKBONES["roberta"]().config.to_dict(), "is_decoder": True}),
}
SCHEME_OPTIONS = {
    "hard": {},
    "soft": {},
    "conditioned": {},
    "prefix": {"num_virtual_tokens": 3},
    "adapter": {"rank": 2, "shared_rank": 2},
    "mixture_of_experts": {"num_experts": 4},
}
RECURRENT = "mamba"


def plain_of(name: str):
    if name not in MORE:
        return make_plain(name, noise=0.3)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(MORE[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def make(name: str, scheme: str, **options):
    model = SCHEMES[scheme].from_backbone(plain_of(name), TASKS, **{**SCHEME_OPTIONS[scheme], **options}).eval()
    torch.manual_seed(1)
    with torch.no_grad():  # also what begins as 0 says something
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def read_again(model) -> torch.Tensor:
    tokenizer = decoder_tokenizer()
    evaluator = GenerationEvaluator(model, TASKS[0], tokenizer, DataCollatorForMultiTask(tokenizer, TASKS), 8)
    with torch.no_grad():
        return evaluator._read_again([{"source": make_sources(TASKS[:1])[0]}] * len(PROMPTS), PROMPTS, ANSWERS)


@pytest.mark.parametrize("name", [*DECODERS, *FURTHER, *MORE])
def test_every_family_ranks_as_with_prompts_read_for_each_answer(name):
    model = make(name, "hard")
    found = target_scores(model, "mood", PROMPTS, ANSWERS)
    if name == RECURRENT:
        assert found is None  # a state, and no keys and values
        return
    torch.testing.assert_close(found, read_again(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("scheme", "name"),
    [(scheme, "llama") for scheme in SCHEMES]
    + [(scheme, "gpt2") for scheme in SCHEMES if scheme != "mixture_of_experts"],  # its blocks get no experts
)
def test_every_scheme_ranks_as_with_prompts_read_for_each_answer(scheme, name):
    model = make(name, scheme)
    found = target_scores(model, "mood", PROMPTS, ANSWERS)
    torch.testing.assert_close(found, read_again(model), rtol=1e-4, atol=1e-4)


def test_cross_stitch_units_keep_nothing():
    assert target_scores(make("llama", "soft", cross_stitch=True), "mood", PROMPTS, ANSWERS) is None


def test_a_prompt_is_read_once():
    model, read = make("llama", "hard"), []
    model.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    target_scores(model, "mood", PROMPTS, ANSWERS)
    assert read == [(3, 9), (9, 3)]
    read.clear()
    target_scores(model, "mood", PROMPTS, [[[4], [5]]] * 3)  # answers of one token need no second pass
    assert read == [(3, 9)]


def test_the_mode_of_a_model_stays():
    model = make("gpt2", "hard").train()
    target_scores(model, "mood", PROMPTS, ANSWERS)
    assert all(module.training for module in model.modules())
