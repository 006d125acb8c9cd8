"""Writing text: what Transformers' and PEFT's own `generate` write, for each task of a model and with every option."""

from __future__ import annotations

import copy

import pytest
import torch
from language_models import CONFIGS, make_plain
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from hf_multitask import AutoModelForMultiTask, Task
from hf_multitask.models.auto import SCHEMES
from hf_multitask.models.base import MultiTaskModel
from hf_multitask.models.conversion import select_tasks

TASKS = [
    Task("tone", "single_label_classification", labels=("negative", "positive")),
    Task("first", "causal_lm", prompt="{text}"),
    Task("second", "causal_lm", prompt="{text}", generation={"max_new_tokens": 5}),
]
DECODERS = ("llama", "llama, tied", "gpt2", "gemma", "gemma2, capped")
# What does, before it was trained, what the backbone does.
PLAIN = ("hard", "soft", "conditioned", "adapter", "mixture_of_experts")
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 3}


def make_backbone(name: str, seed: int = 0) -> PreTrainedModel:
    """A decoder that writes other tokens for other prompts, and sometimes ends."""
    return make_plain(name, seed, noise=0.3)


def make_model(name: str, scheme: str, source=None, **options) -> MultiTaskModel:
    return SCHEMES[scheme].from_backbone(source or make_backbone(name), TASKS, **options)


def trained(model: MultiTaskModel) -> MultiTaskModel:
    """What training may have made of a model: every trained parameter is another, and tasks differ."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.7 * torch.randn_like(parameter))
    return model


def make_prompts(padded: bool = True) -> dict[str, torch.Tensor]:
    """Prompts of three lengths, padded on the left."""
    ids = torch.randint(5, 90, (3, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = mask[1, :1] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 3), "attention_mask": mask}


OPTIONS = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "temperature": 2.0, "top_k": 20},
    "penalty": {"repetition_penalty": 1.5},
}


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *((name, "hard") for name in (*DECODERS, "opt", "mixtral", "bert as decoder")),
        *(("llama, tied", scheme) for scheme in PLAIN[1:]),
        *(("gpt2", scheme) for scheme in ("soft", "conditioned", "adapter")),  # its blocks get no experts
        *(("gemma2, capped", scheme) for scheme in ("soft", "conditioned", "adapter")),
    ],
)
def test_an_untrained_scheme_writes_what_the_backbone_writes(name, scheme):
    plain, prompts = make_backbone(name), make_prompts()
    model = make_model(name, scheme, plain)
    written = {}
    for key in OPTIONS if scheme == "hard" else ("greedy", "beams"):
        options, results = OPTIONS[key], []
        for one in (plain, model):
            torch.manual_seed(4)
            task = {"task": "first"} if one is model else {}
            results.append(one.generate(**prompts, **task, **{**GREEDY, **options}))
        assert torch.equal(*results)
        written[key] = results[0]
    assert len({tuple(row) for row in written["greedy"][:, 7:].tolist()}) > 1
    assert scheme != "hard" or not torch.equal(written["greedy"], written["sampled"])


@pytest.mark.parametrize("name", ["bloom", "falcon", "gptj", "gpt_neo"])
def test_families_that_hand_on_how_they_want_their_output(name):
    plain = make_backbone(name)
    model = make_model(name, "hard", plain)
    prompts = make_prompts()
    assert torch.equal(plain.generate(**prompts, **GREEDY), model.generate(**prompts, task="first", **GREEDY))


# ---- PEFT ----


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *((name, scheme) for name in ("llama, tied", "gpt2", "gemma") for scheme in ("prefix", "adapter")),
        ("llama", "prefix"),
        ("gemma2, capped", "adapter"),
    ],
)
def test_tasks_write_what_peft_writes_with_their_adapters(tmp_path, name, scheme):
    options = {"num_virtual_tokens": 3} if scheme == "prefix" else {"rank": 3}
    make_backbone(name).save_pretrained(tmp_path / "backbone")
    model = trained(make_model(name, scheme, str(tmp_path / "backbone"), **options))
    model.save_pretrained(tmp_path / "model")
    adapters = tmp_path / "model" / "adapters"
    peft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "backbone"), adapters / "first", adapter_name="first"
    ).eval()
    assert type(peft).__name__ == "PeftModelForCausalLM"
    peft.load_adapter(adapters / "second", "second")
    written = {}
    for task in ("first", "second"):
        peft.set_adapter(task)
        for padded in (False, True):
            prompts = make_prompts(padded)
            for key in ("greedy", "beams"):
                found = model.generate(**prompts, task=task, **{**GREEDY, **OPTIONS[key]})
                assert torch.equal(found, peft.generate(**prompts, **{**GREEDY, **OPTIONS[key]})), (task, padded, key)
            written[task, padded] = model.generate(**prompts, task=task, **GREEDY)
            assert torch.equal(model.generate(**prompts, task=task, use_cache=False, **GREEDY), written[task, padded])
    assert not torch.equal(written["first", False], written["second", False])
    plain = make_backbone(name).generate(**make_prompts(False), **GREEDY)
    assert not torch.equal(written["first", False], plain)


def test_a_shared_adapter_takes_part(tmp_path):
    make_backbone("llama").save_pretrained(tmp_path / "backbone")
    model = trained(make_model("llama", "adapter", str(tmp_path / "backbone"), rank=2, shared_rank=2))
    model.save_pretrained(tmp_path / "model")
    peft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "backbone"), tmp_path / "model/adapters/first", "first"
    ).eval()
    peft.load_adapter(tmp_path / "model/shared_adapter", "shared")
    peft.base_model.set_adapter(["first", "shared"])
    prompts = make_prompts()
    assert torch.equal(model.generate(**prompts, task="first", **GREEDY), peft.generate(**prompts, **GREEDY))


# ---- trained models ----


@pytest.mark.parametrize("scheme", [*PLAIN, "prefix"])
def test_text_is_written_as_it_is_read(scheme):
    """Each token that is written is the likeliest one behind those before it, as `forward` has it for the task."""
    model = trained(make_model("llama", scheme))
    prompts = make_prompts(padded=False)["input_ids"]
    for task in ("first", "second"):
        written = model.generate(prompts, task=task, **{**GREEDY, "eos_token_id": None})
        with torch.no_grad():
            guessed = model(input_ids=written).logits[task].argmax(-1)
        assert torch.equal(written[:, 7:], guessed[:, 6:-1])
    if scheme not in ("hard", "mixture_of_experts"):
        assert not torch.equal(written, model.generate(prompts, task="first", **{**GREEDY, "eos_token_id": None}))


@pytest.mark.parametrize("scheme", [*PLAIN, "prefix"])
def test_prompts_beside_each_other_are_continued_as_alone(scheme):
    model, prompts = trained(make_model("llama", scheme)), make_prompts()
    together = model.generate(**prompts, task="first", **GREEDY)[:, 7:]
    for row, mask in enumerate(prompts["attention_mask"].bool()):
        alone = model.generate(prompts["input_ids"][row : row + 1, mask], task="first", **GREEDY)
        own = alone[0, int(mask.sum()) :]
        assert torch.equal(own, together[row, : len(own)]) and (together[row, len(own) :] == 3).all()


@pytest.mark.parametrize("scheme", [*PLAIN, "prefix"])
def test_saved_and_loaded_or_alone_a_model_writes_the_same(tmp_path, scheme):
    model, prompts = trained(make_model("llama, tied", scheme)), make_prompts()
    model.save_pretrained(tmp_path)
    expected = model.generate(**prompts, task="first", **GREEDY)
    for other in (
        AutoModelForMultiTask.from_pretrained(tmp_path),
        copy.deepcopy(model),
        select_tasks(model, ["first"]),
    ):
        assert torch.equal(other.generate(**prompts, task="first", **GREEDY), expected)
    if scheme in ("hard", "soft"):
        model.export_task("first", tmp_path / "alone")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "alone")
        assert torch.equal(plain.generate(**prompts, **GREEDY), expected)


@pytest.mark.parametrize("scheme", [*PLAIN, "prefix"])
def test_a_model_is_left_as_it_was(scheme):
    model, prompts = trained(make_model("llama", scheme)), make_prompts()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        logits = model(**prompts).logits
    for training in (True, False):
        model.train(training)
        model.backbone.eval() if scheme == "prefix" else None  # a part that was set apart stays so
        modes = {name: module.training for name, module in model.named_modules()}
        names = [name for name, _ in model.named_parameters()]
        written = model.generate(**prompts, task="first", **GREEDY)
        assert modes == {name: module.training for name, module in model.named_modules()}
        with pytest.raises(ValueError, match="num_return_sequences"):
            model.generate(**prompts, task="first", num_return_sequences=2, **GREEDY)
        assert modes == {name: module.training for name, module in model.named_modules()}
        assert names == [name for name, _ in model.named_parameters()] and model.rows.value is None
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        again = model(**prompts).logits
    assert all(torch.equal(value, again[key]) for key, value in logits.items())
    assert torch.equal(written, model.generate(**prompts, task="first", **GREEDY))


def test_dropout_is_off_while_text_is_written():
    model = trained(make_model("gpt2", "hard"))
    assert any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
    prompts = make_prompts()
    expected = model.eval().generate(**prompts, task="first", **GREEDY)
    assert torch.equal(model.train().generate(**prompts, task="first", **GREEDY), expected)


def test_a_seed_decides_what_is_sampled():
    model, prompts = trained(make_model("llama", "prefix")), make_prompts()
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(model.generate(**prompts, task="first", **{**GREEDY, "do_sample": True}))
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


def test_embeddings_in_place_of_ids():
    model, prompts = trained(make_model("llama", "prefix")), make_prompts()
    embeds = model.get_input_embeddings()(prompts["input_ids"]).detach()
    expected = model.generate(**prompts, task="first", **GREEDY)[:, 7:]
    found = model.generate(inputs_embeds=embeds, attention_mask=prompts["attention_mask"], task="first", **GREEDY)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("scheme", ["hard", "prefix"])
def test_in_bfloat16(scheme):
    model = make_model("llama", scheme, make_backbone("llama").to(torch.bfloat16))
    written = model.generate(**make_prompts(), task="first", **GREEDY)
    assert written.shape[1] > 7
    if scheme == "hard":
        plain = make_backbone("llama").to(torch.bfloat16)
        assert torch.equal(written, plain.generate(**make_prompts(), **GREEDY))


@pytest.mark.parametrize("scheme", ["hard", "soft", "prefix"])
def test_after_new_tokens_came_they_can_be_written(scheme):
    model = make_model("llama, tied", scheme)
    model.resize_token_embeddings(95, mean_resizing=False)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and len(module.weight) == 95:
                module.weight[94] = 40 * module.weight[50:60].mean(0)
    for options in ({}, {"num_beams": 2}, {"bad_words_ids": [[93]]}, {"suppress_tokens": [92]}):
        written = model.generate(**make_prompts(), task="first", **{**GREEDY, **options})
        assert written.max() < 95
    tokens = model.generate(**make_prompts(), task="first", num_beams=3, **GREEDY)[:, 7:]
    assert scheme == "prefix" or (tokens == 94).any()


# ---- options ----


def test_options_of_the_call_go_before_the_task_s_and_these_before_the_checkpoint_s(tmp_path):
    backbone = make_backbone("llama")
    backbone.generation_config = GenerationConfig(max_new_tokens=3, pad_token_id=3, eos_token_id=None)
    backbone.save_pretrained(tmp_path / "backbone")
    for source in (backbone, str(tmp_path / "backbone")):
        model, prompts = make_model("llama", "hard", source), make_prompts()
        model.save_pretrained(tmp_path / "model")
        for one in (model, AutoModelForMultiTask.from_pretrained(tmp_path / "model")):
            calls = ({"task": "first"}, {"task": "second"}, {"task": "second", "max_new_tokens": 2})
            assert [one.generate(**prompts, **call).shape[1] for call in calls] == [7 + 3, 7 + 5, 7 + 2]


def test_text_ends_where_the_checkpoint_or_the_configuration_says():
    """A backbone alone has no settings of `generate`: those of its configuration hold then."""
    plain = make_backbone("llama")
    prompts = make_prompts(padded=False)
    free = plain.generate(**prompts, **{**GREEDY, "eos_token_id": None})
    end = int(free[0, 9])  # the third token that is written
    plain.config.eos_token_id = end
    plain.generation_config.eos_token_id = end
    expected = plain.generate(**prompts, **GREEDY)
    assert (expected[0, 10:] == 3).all()
    assert torch.equal(make_model("llama", "hard", plain).generate(**prompts, task="first", **GREEDY), expected)
    bare = make_model("llama, tied", "hard", make_backbone("llama, tied").base_model)
    tied = make_backbone("llama, tied")
    assert torch.equal(bare.generate(**prompts, task="first", **GREEDY), tied.generate(**prompts, **GREEDY))


def test_an_output_object_may_be_asked_for():
    plain, prompts = make_backbone("llama"), make_prompts()
    model = make_model("llama", "hard", plain)
    options = {**GREEDY, "return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True}
    expected, found = plain.generate(**prompts, **options), model.generate(**prompts, task="first", **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.scores, expected.scores, strict=True))
    assert len(found.hidden_states) == len(expected.hidden_states)


# ---- what cannot be ----


def test_only_tasks_that_write_can_be_asked_to():
    model, prompts = make_model("llama", "hard"), make_prompts()
    for options, message in (
        ({"task": "frist"}, r"no task 'frist', did you mean 'first'\?; tasks that generate are first, second"),
        ({"task": "tone"}, "task 'tone' is single_label_classification and does not generate text; .* first, second"),
        ({}, r"generate needs task=\.\.\.; tasks that generate are first, second"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(**prompts, **options, **GREEDY)
    alone = select_tasks(model, ["tone", "second"])
    assert torch.equal(alone.generate(**prompts, **GREEDY), model.generate(**prompts, task="second", **GREEDY))
    with pytest.raises(ValueError, match="tasks that generate are none"):
        select_tasks(model, ["tone"]).generate(**prompts)


def test_an_encoder_writes_nothing():
    encoder = SCHEMES["hard"].from_backbone(make_plain("bert"), [TASKS[0], Task("words", "masked_lm")])
    with pytest.raises(
        ValueError, match="task 'words' is masked_lm and does not generate text; tasks that do are none"
    ):
        encoder.generate(**make_prompts(), task="words")
    with pytest.raises(ValueError, match=r"generate needs task=\.\.\.; tasks that generate are none"):
        encoder.generate(**make_prompts())


def test_cross_stitched_encoders_write_nothing():
    model = make_model("llama", "soft", cross_stitch=True)
    with pytest.raises(ValueError, match="generate does not go with cross-stitch units"):
        model.generate(**make_prompts(), task="first", **GREEDY)
    assert model.rows.value is None


def test_a_prefix_needs_a_cache_that_grows():
    model = make_model("llama", "prefix")
    with pytest.raises(ValueError, match="needs a cache that grows.*leave out cache_implementation"):
        model.generate(**make_prompts(), task="first", cache_implementation="static", **GREEDY)


def test_options_that_generate_does_not_know_are_named():
    with pytest.raises(ValueError, match="max_new_token"):
        make_model("llama", "hard").generate(**make_prompts(), task="first", max_new_token=3)


def test_every_decoder_that_is_tested_is_one_of_the_configurations():
    assert set(DECODERS) <= set(CONFIGS)
