"""Heads over the vocabulary: what Transformers' own language models compute, loaded, trained, resized and exported."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from conftest import PAD_ID
from language_models import BIDIRECTIONAL, CONFIGS, DECODERS, ENCODERS, auto_of, make_plain
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaModel,
    PreTrainedModel,
)

from hf_multitask import AutoModelForMultiTask, HardSharingConfig, HardSharingModel, Task
from hf_multitask.models.auto import SCHEMES
from hf_multitask.models.backbone import is_causal
from hf_multitask.models.conversion import convert, select_tasks
from hf_multitask.models.heads import IGNORE_INDEX
from hf_multitask.models.passes import Segment

EVERY = pytest.mark.parametrize("name", CONFIGS)
SOME = pytest.mark.parametrize("name", ["bert, untied", "roberta", "llama", "llama, tied"])
LENGTHS = (8, 5, 8, 3)


def make_tasks(name: str) -> list[Task]:
    return [Task("tone", "regression"), Task("words", "masked_lm" if name in ENCODERS else "causal_lm", weight=1.0)]


def make_model(name: str, source: PreTrainedModel | str | None = None, scheme: str = "hard", **options):
    return SCHEMES[scheme].from_backbone(source or make_plain(name), make_tasks(name), **options)


def make_batch() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    mask = (torch.arange(8) < torch.tensor(LENGTHS).unsqueeze(1)).long()
    ids = torch.randint(5, 90, (4, 8), generator=draw)
    return {"input_ids": ids.masked_fill(mask == 0, PAD_ID), "attention_mask": mask}


def make_labels(name: str) -> torch.Tensor:
    """The text itself for a decoder; a third of its tokens for an encoder."""
    batch = make_batch()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE_INDEX)
    if name in ENCODERS:
        labels = labels.masked_fill(torch.rand(4, 8, generator=torch.Generator().manual_seed(4)) < 0.6, IGNORE_INDEX)
    return labels


def words(model, **batch) -> torch.Tensor:
    """Logits at real tokens, `[N, V]`."""
    with torch.no_grad():
        logits = model(**batch).logits
    return (logits if isinstance(logits, torch.Tensor) else logits["words"])[batch["attention_mask"].bool()]


@pytest.fixture
def warnings_of_transformers(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return caplog


# ---- what they compute ----


@EVERY
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_logits_are_those_of_transformers_own_model(tmp_path, name, place):
    plain, batch = make_plain(name), make_batch()
    if place == "disk":
        plain.save_pretrained(tmp_path)
    model = make_model(name, plain if place == "memory" else str(tmp_path))
    expected = words(plain, **batch)
    assert torch.equal(words(model, **batch), expected)
    assert expected.std() > 0.05 and expected.argmax(-1).unique().numel() > 1


@EVERY
def test_losses_and_gradients_are_those_of_transformers_own_model(name):
    plain, batch, labels = make_plain(name), make_batch(), make_labels(name)
    model = make_model(name, plain)
    plain(**batch, labels=labels).loss.backward()
    output = model(**batch, labels={"words": labels})
    output.loss.backward()
    real = labels[:, 1:] if name in DECODERS else labels
    torch.testing.assert_close(output.task_losses["words"], plain(**batch, labels=labels).loss, rtol=1e-5, atol=1e-6)
    total = output.row_losses["words"].sum() / real.ne(IGNORE_INDEX).sum()
    torch.testing.assert_close(output.task_losses["words"], total)
    # Parameters that have another name here have the same gradient: each of theirs is found among ours.
    own = [p.grad for p in model.parameters() if p.grad is not None]
    for key, parameter in plain.named_parameters():
        if parameter.grad is not None:
            near = [g for g in own if g.shape == parameter.grad.shape and torch.allclose(g, parameter.grad, atol=1e-6)]
            assert near, key
    assert len({id(p) for p in model.parameters() if p.grad is not None}) == sum(
        p.grad is not None for p in plain.parameters()
    )


@EVERY
def test_nothing_is_there_twice(name):
    plain = make_plain(name)
    model = select_tasks(make_model(name, plain), ["words"])
    if name == "bert, untied":
        plain.cls.predictions.bias = None  # of no use: only the decoder's own bias counts
    numbers = [sum(p.numel() for p in m.parameters()) for m in (plain, model)]
    assert numbers[0] == numbers[1]
    tied = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert (model.lm_head is None) == tied == (model.vocabulary("words") is model.get_input_embeddings().weight)


@EVERY
def test_the_given_model_stays_as_it_is(name):
    plain = make_plain(name)
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    model = make_model(name, plain).train()
    model(**make_batch(), labels={"words": make_labels(name)}).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())
    assert not torch.equal(words(model.eval(), **make_batch()), words(plain, **make_batch()))


@EVERY
def test_the_same_tokens_have_the_same_loss_at_chosen_places(name):
    """Labels of whole rows, and only those that are there, with their places; in any order and number."""
    model, batch, labels = make_model(name), make_batch(), make_labels(name)
    whole = model(**batch, labels={"words": labels})
    rows = labels.roll(-1, 1).masked_fill(torch.arange(8) == 7, IGNORE_INDEX) if name in DECODERS else labels
    kept = [row.ne(IGNORE_INDEX).nonzero().flatten().flip(0) for row in rows]
    width = max(map(len, kept)) + 2
    chosen = torch.full((4, width), IGNORE_INDEX)
    places = torch.zeros(4, width, dtype=torch.long)
    for row, own in enumerate(kept):
        chosen[row, : len(own)], places[row, : len(own)] = rows[row, own], row * 8 + own
    output = model(**batch, labels={"words": chosen}, label_positions={"words": places})
    assert output.logits["words"].shape == (4, width, 90)
    torch.testing.assert_close(output.row_losses["words"], whole.row_losses["words"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.loss, whole.loss, rtol=1e-5, atol=1e-6)
    for row, own in enumerate(kept):
        found, expected = output.logits["words"][row, : len(own)], whole.logits["words"][row, own]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_places_count_in_the_batch_however_long_a_pass_is():
    """Rows of another task are longer, and in a pass of their own: places are those of the batch all the same."""
    model = make_model("bert")
    batch, labels = make_batch(), make_labels("bert")
    alone = model(**batch, labels={"words": labels})
    long = torch.randint(5, 90, (3, 60), generator=torch.Generator().manual_seed(1))
    wide = {key: F.pad(value, (0, 52), value=PAD_ID * (key == "input_ids")) for key, value in batch.items()}
    lengths = []
    model.backbone.register_forward_hook(lambda module, args, output: lengths.append(output[0].shape[:2]))
    output = model(
        input_ids=torch.cat([long, wide["input_ids"]]),
        attention_mask=torch.cat([torch.ones_like(long), wide["attention_mask"]]),
        segments={"tone": Segment(0, 3, 60), "words": Segment(3, 7, 8)},
        labels={"words": labels},
        label_positions={"words": torch.arange(4).unsqueeze(1) * 60 + torch.arange(8)},
    )
    assert sorted(lengths) == [(3, 60), (4, 8)]
    torch.testing.assert_close(output.row_losses["words"], alone.row_losses["words"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_used_head_holds_nothing_of_its_last_call(name):
    model = make_model(name).train()
    model(**make_batch(), labels={"words": make_labels(name)}).loss.backward()
    again = copy.deepcopy(model)  # with a graph in it, it could not be copied
    assert torch.equal(words(again.eval(), **make_batch()), words(model.eval(), **make_batch()))


@SOME
def test_in_bfloat16_as_in_transformers(tmp_path, name):
    make_plain(name).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    plain = auto_of(name).from_pretrained(tmp_path / "plain")
    batch, labels = make_batch(), make_labels(name)
    for source in (plain, str(tmp_path / "plain")):
        model = make_model(name, source)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert torch.equal(words(model, **batch), words(plain, **batch))
    output = model(**batch, labels={"words": labels})
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(
        output.task_losses["words"], plain(**batch, labels=labels).loss.float(), rtol=1e-2, atol=0
    )
    model.save_pretrained(tmp_path / "own")
    loaded = AutoModelForMultiTask.from_pretrained(tmp_path / "own")
    assert loaded.dtype == torch.bfloat16 and torch.equal(words(loaded, **batch), words(plain, **batch))


# ---- where their weights come from ----


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("name", [*CONFIGS])
def test_what_a_checkpoint_lacks_of_a_head_is_reported(tmp_path, warnings_of_transformers, name, place):
    """A head starts at random, and says so; where nothing is lacking there is nothing to say."""
    whole, bare = make_plain(name), make_plain(name).base_model
    whole.save_pretrained(tmp_path / "whole")
    bare.save_pretrained(tmp_path / "bare")
    make_model(name, whole if place == "memory" else str(tmp_path / "whole"))
    assert "random" not in warnings_of_transformers.text
    torch.manual_seed(7)
    model = make_model(name, bare if place == "memory" else str(tmp_path / "bare"))
    own = [*model.heads["words"].parameters(), *([] if model.lm_head is None else model.lm_head.parameters())]
    assert bool(own) == ("random" in warnings_of_transformers.text)
    for key in [] if model.lm_head is None else ["lm_head.weight"]:
        assert key in warnings_of_transformers.text
    # Random, and nothing that was in memory by chance.
    assert all(p.isfinite().all() and p.abs().max() < 2 for p in own)
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, bare.state_dict()[key])


@pytest.mark.parametrize("scheme", ["adapter", "prefix"])
def test_a_table_that_nothing_would_train_must_be_there(tmp_path, scheme):
    """Under a frozen backbone it would stay random, and a saved model could not be loaded."""
    bare = make_plain("llama").base_model
    bare.save_pretrained(tmp_path)
    for source in (bare, str(tmp_path)):
        with pytest.raises(ValueError, match="comes without lm_head.weight, .* would leave as it starts, at random"):
            make_model("llama", source, scheme)
    make_model("llama, tied", make_plain("llama, tied").base_model, scheme)


def test_a_head_of_which_a_part_is_lacking_is_reported(tmp_path, warnings_of_transformers):
    make_plain("bert").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["cls.predictions.transform.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    make_model("bert", str(tmp_path))
    assert "comes without cls.predictions.transform.dense.weight, " in warnings_of_transformers.text
    assert "of a language model's head: they start at random" in warnings_of_transformers.text


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "electra", "modernbert", "llama", "gpt2", "gemma"])
def test_objectives_that_make_no_sense_are_refused(tmp_path, name):
    kind, message = "masked_lm", f"task 'words': masked_lm needs an encoder; '{name}' reads from left to right"
    if name in ENCODERS:
        kind = "causal_lm"
        message = (
            f"task 'words': causal_lm on '{name}': a bidirectional encoder sees the next token, which is the answer, "
            "and would only learn to copy it; use masked_lm, or a causal decoder"
        )
    tasks = [Task("tone", "regression"), Task("words", kind)]
    plain = make_plain(name)
    plain.save_pretrained(tmp_path)
    for source in (plain, str(tmp_path), plain.base_model):
        with pytest.raises(ValueError, match=message):
            HardSharingModel.from_backbone(source, tasks)
    with pytest.raises(ValueError, match=message):
        HardSharingModel(HardSharingConfig(backbone_config=plain.config, tasks=[task.to_dict() for task in tasks]))


@pytest.mark.parametrize("name", [*CONFIGS, *BIDIRECTIONAL])
def test_decoders_are_those_whose_tokens_see_none_behind_them(name):
    """Tried on the backbone itself: some that Transformers has a causal head for read in both directions."""
    config = (CONFIGS | BIDIRECTIONAL)[name]
    torch.manual_seed(0)
    backbone = AutoModel.from_config(config).eval()
    ids = torch.randint(5, 90, (1, 8))
    other = ids.clone()
    other[0, 6:] = ids[0, 6:] - 4
    with torch.no_grad():
        one, two = (backbone(input_ids=given)[0][:, :6] for given in (ids, other))
    assert is_causal(config) == torch.equal(one, two)
    if name not in DECODERS:
        with pytest.raises(ValueError, match="a bidirectional encoder sees the next token"):
            HardSharingModel.from_backbone(backbone, [Task("words", "causal_lm")])


# ---- saved, resized, exported, turned into other schemes ----


@EVERY
def test_saved_and_loaded_they_compute_the_same(tmp_path, name):
    model, batch = make_model(name), make_batch()
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForMultiTask.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(words(loaded, **batch), words(model, **batch))
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in model.named_parameters()]


@pytest.mark.parametrize("size", [97, 80])
@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *((name, "hard") for name in ("bert, untied", "roberta", "distilbert", "electra", "llama, tied")),
        *((name, "soft") for name in ("bert, untied", "roberta", "llama")),
        *((name, "adapter") for name in ("roberta", "llama")),
    ],
)
def test_a_vocabulary_of_another_size(tmp_path, name, scheme, size):
    plain, batch = make_plain(name), make_batch()
    batch["input_ids"] = batch["input_ids"].clamp(max=79)
    model = make_model(name, plain, scheme)
    before = words(model, **batch)
    for one in (plain, model):
        torch.manual_seed(5)
        one.resize_token_embeddings(size, mean_resizing=False)
    found = words(model, **batch)
    assert found.shape == (sum(LENGTHS), size) and model.config.get_text_config().vocab_size == size
    kept = min(size, 90)
    assert torch.equal(found[:, :kept], before[:, :kept])
    if size > 90:
        # What is new starts as small as with Transformers.
        assert found[:, 90:].std() < 2 * words(plain, **batch)[:, 90:].std()
    labels = make_labels(name).clamp(max=79)
    labels[0, 1] = size - 1
    model.train()
    model(**batch, labels={"words": labels}).loss.backward()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMultiTask.from_pretrained(tmp_path)
    assert torch.equal(words(loaded, **batch), words(model.eval(), **batch))


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *((name, "hard") for name in CONFIGS),
        *((n, s) for n in ("roberta", "gpt2", "llama") for s in ("soft", "adapter")),
    ],
)
def test_an_exported_task_loads_in_plain_transformers(tmp_path, name, scheme):
    model, batch = make_model(name, scheme=scheme), make_batch()
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    model.export_task("words", tmp_path)
    plain, info = auto_of(name).from_pretrained(tmp_path, output_loading_info=True)
    assert type(plain) is type(make_plain(name))
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    difference = (words(plain, **batch) - words(model, **batch)).abs().max()
    assert difference < 1e-5 if scheme == "adapter" else difference == 0
    assert not torch.equal(words(plain, **batch), words(make_plain(name), **batch))


def test_a_scheme_that_computes_more_says_how_to_export(tmp_path):
    model = make_model("llama", scheme="conditioned")
    with pytest.raises(ValueError, match="computes more than its backbone does.*export it with native=False"):
        model.export_task("words", tmp_path)
    model.export_task("words", tmp_path, native=False)
    alone = AutoModelForMultiTask.from_pretrained(tmp_path)
    assert torch.equal(words(alone, **make_batch()), words(model, **make_batch()))


def test_what_a_checkpoint_says_of_generation_is_kept(tmp_path):
    plain = make_plain("llama")
    plain.generation_config = GenerationConfig(eos_token_id=[2, 7], repetition_penalty=1.3, max_length=33)
    plain.save_pretrained(tmp_path / "plain")
    for source in (plain, str(tmp_path / "plain")):
        model = make_model("llama", source)
        model.save_pretrained(tmp_path / "own")
        model = AutoModelForMultiTask.from_pretrained(tmp_path / "own").to_scheme("soft")
        model.export_task("words", tmp_path / "exported")
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").generation_config
        assert (found.eos_token_id, found.repetition_penalty, found.max_length) == ([2, 7], 1.3, 33)


@SOME
@pytest.mark.parametrize("scheme", ["soft", "conditioned", "adapter", "mixture_of_experts"])
def test_another_scheme_goes_on_with_the_same_logits(warnings_of_transformers, name, scheme):
    model, batch = make_model(name), make_batch()
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    other = convert(model, scheme)
    difference = (words(other, **batch) - words(model, **batch)).abs().max()
    assert difference < 1e-5 if scheme == "mixture_of_experts" else difference == 0
    if scheme == "soft":
        back = convert(other, "hard")  # the mean of equal encoders
        assert (words(back, **batch) - words(model, **batch)).abs().max() < 1e-5
    assert "random" not in warnings_of_transformers.text  # every head was copied


def test_a_head_has_what_the_family_puts_between_backbone_and_vocabulary():
    assert set(dict(make_model("bert").heads["words"].named_parameters())) == {
        "layers.native.cls.predictions.transform.dense.weight",
        "layers.native.cls.predictions.transform.dense.bias",
        "layers.native.cls.predictions.transform.LayerNorm.weight",
        "layers.native.cls.predictions.transform.LayerNorm.bias",
        "layers.native.cls.predictions.decoder.bias",
    }
    assert not list(make_model("llama").heads["words"].parameters())


def test_a_model_trained_since_it_was_loaded_is_taken_as_it_is_now(tmp_path):
    make_plain("llama").save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        plain.lm_head.weight.mul_(3)
    assert torch.equal(words(make_model("llama", plain), **make_batch()), words(plain, **make_batch()))
    assert isinstance(make_model("llama", plain).backbone, LlamaModel)
