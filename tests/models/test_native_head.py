"""Heads of Transformers over every family: the same logits, the checkpoint's own layers kept, or refused by name."""

from __future__ import annotations

import logging
from functools import cache

import pytest
import torch
from families import tiny_config, tiny_model
from transformers import (
    AutoModel,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
)
from transformers.models.auto import modeling_auto

from hf_multitask import AutoModelForMultiTask, HardSharingModel, Task

LABELS = ("low", "middle", "high")
TASKS = {
    "SEQUENCE_CLASSIFICATION": (
        AutoModelForSequenceClassification,
        Task("one", "single_label_classification", labels=LABELS, head="native"),
    ),
    "TOKEN_CLASSIFICATION": (
        AutoModelForTokenClassification,
        Task("one", "token_classification", labels=LABELS, head="native"),
    ),
    "QUESTION_ANSWERING": (AutoModelForQuestionAnswering, Task("one", "question_answering", head="native")),
    "MULTIPLE_CHOICE": (AutoModelForMultipleChoice, Task("one", "multiple_choice", head="native")),
}
EVERY = [
    (kind, family) for kind in TASKS for family in sorted(getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES"))
]
SUPPORTED = ["albert", "big_bird", "bert", "roberta", "distilbert", "deberta-v2", "xlnet", "squeezebert", "gpt2"]
# Family and type of task, and the reason that the message gives.
REFUSED = [
    ("longformer", "SEQUENCE_CLASSIFICATION", "global_attention_mask"),
    ("longformer", "QUESTION_ANSWERING", "exactly three separator tokens"),
    ("longformer", "MULTIPLE_CHOICE", "exactly three separator tokens"),
    ("big_bird", "QUESTION_ANSWERING", "reads the token ids"),
    ("canine", "SEQUENCE_CLASSIFICATION", "its pooler reads hidden states of groups of characters"),
    ("funnel", "SEQUENCE_CLASSIFICATION", "not built on the backbone that AutoModel loads"),
]
# Families that cannot run on texts, need a package or their image part, or have no tiny version.
NOT_TRIED = {
    *("bros", "gemma3", "jamba", "layoutlmv2", "lxmert", "modernvbert", "qwen3_5", "qwen3_asr", "ultravbert", "zamba"),
    *("t5gemma", "t5gemma2"),
    *("zamba2", "cohere_compass_text", "axk1", "axk2", "deepseek_v2", "deepseek_v3", "minicpm3", "mistral4"),
}
# Encoder-decoders, all refused, and families that are refused for the type of task.
ENCODER_DECODERS = {
    *("bart", "bigbird_pegasus", "led", "mbart", "mt5", "mvp", "plbart", "t5", "umt5"),
}
ALL_REFUSED = {(family, kind) for family, kind, _ in REFUSED} | {
    *(("canine", kind) for kind in TASKS),
    ("funnel", "MULTIPLE_CHOICE"),
    *(("reformer", kind) for kind in ("QUESTION_ANSWERING", "SEQUENCE_CLASSIFICATION")),
    ("perceiver", "SEQUENCE_CLASSIFICATION"),
}


@cache
def plain_model(kind: str, family: str):
    auto, task = TASKS[kind]
    config = tiny_config(family)
    if task.labels:
        config.id2label = dict(enumerate(LABELS))
        config.label2id = {label: number for number, label in enumerate(LABELS)}
    return tiny_model(auto, config)


def make_batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    mask = (torch.arange(8) < torch.tensor([8, 5, 2]).unsqueeze(1)).long()
    return {"input_ids": torch.randint(5, 60, (3, 8)).masked_fill(mask == 0, 3), "attention_mask": mask}


def logits_of(kind: str, plain, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    if kind == "MULTIPLE_CHOICE":
        batch = {name: value.unsqueeze(1) for name, value in batch.items()}
    with torch.no_grad():
        output = plain(**batch)
    if kind == "QUESTION_ANSWERING":
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    return output.logits


def check_family(kind: str, family: str, folder) -> None:
    """The law: with the checkpoint's own head the logits are the same; it trains, is saved and exported."""
    task, plain, batch = TASKS[kind][1], plain_model(kind, family), make_batch()
    expected = logits_of(kind, plain, batch)
    model = HardSharingModel.from_backbone(plain, [task, Task("score", "regression")])
    own = model.heads["one"].layers.native.state_dict()
    tensors = plain.state_dict()
    assert all(torch.equal(value, tensors[name]) for name, value in own.items())
    real = batch["attention_mask"].bool() if expected.dim() == 3 else slice(None)
    with torch.no_grad():
        found = model(**batch).logits["one"]
    assert (found[real] - expected[real]).abs().max() < 1e-5

    labels = {
        "SEQUENCE_CLASSIFICATION": torch.tensor([0, 1, 2]),
        "TOKEN_CLASSIFICATION": torch.tensor([[0, 1] + [-100] * 6] * 3),
        "QUESTION_ANSWERING": torch.tensor([[0, 1]] * 3),
        "MULTIPLE_CHOICE": torch.tensor([0]),
    }[kind]
    model.train()
    model(**batch, labels={"one": labels}).loss.backward()
    gradients = [parameter.grad for name, parameter in model.named_parameters() if name.startswith("heads.one")]
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.01 * parameter.grad)
    model.zero_grad()
    model.eval()
    with torch.no_grad():
        trained = model(**batch).logits["one"]
    model.save_pretrained(folder / "saved")
    with torch.no_grad():
        assert torch.equal(AutoModelForMultiTask.from_pretrained(folder / "saved")(**batch).logits["one"], trained)
    model.export_task("one", folder / "plain")
    exported = TASKS[kind][0].from_pretrained(folder / "plain")
    assert (logits_of(kind, exported, batch)[real] - trained[real]).abs().max() < 1e-5


@pytest.mark.parametrize("family", SUPPORTED)
def test_a_classifier_of_transformers_is_kept_and_gives_its_logits(tmp_path, family):
    check_family("SEQUENCE_CLASSIFICATION", family, tmp_path)


@pytest.mark.parametrize("family, kind", [("albert", "MULTIPLE_CHOICE"), ("longformer", "TOKEN_CLASSIFICATION")])
def test_other_heads_of_transformers_are_kept_and_give_their_logits(tmp_path, family, kind):
    check_family(kind, family, tmp_path)


@pytest.mark.parametrize("family, kind, reason", REFUSED)
def test_a_family_that_the_encoder_cannot_be_shared_with_is_refused_by_name(family, kind, reason):
    with pytest.raises(ValueError, match=f"task 'one'.*'{family}'.*{reason}"):
        HardSharingModel.from_backbone(plain_model(kind, family).base_model, [TASKS[kind][1]])


@pytest.mark.parametrize("family", ["canine", "markuplm"])
def test_families_without_a_language_model_take_our_own_heads(family):
    backbone = plain_model("SEQUENCE_CLASSIFICATION", family).base_model
    model = HardSharingModel.from_backbone(backbone, [Task("score", "regression")])
    assert model(**make_batch()).logits["score"].shape == (3, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind, family", EVERY)
def test_every_family_is_equal_or_refused(tmp_path, kind, family):
    if family in NOT_TRIED:
        pytest.skip("cannot be built small, or on texts alone")
    if family in ENCODER_DECODERS or (family, kind) in ALL_REFUSED:
        encoder_decoder = family in ENCODER_DECODERS
        backbone = tiny_model(AutoModel, tiny_config(family)) if encoder_decoder else plain_model(kind, family)
        with pytest.raises(ValueError, match=family):
            HardSharingModel.from_backbone(backbone.base_model, [TASKS[kind][1]])
        return
    check_family(kind, family, tmp_path)


# ---- what a checkpoint has ----


def native(name: str, labels=LABELS) -> Task:
    return Task(name, "single_label_classification", labels=labels, head="native")


def classifier() -> BertForSequenceClassification:
    return plain_model("SEQUENCE_CLASSIFICATION", "bert")


@pytest.fixture
def log(caplog, monkeypatch):
    # Transformers' logger hands nothing on to the root, where caplog listens.
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("hf_multitask"), "propagate", True)
    return caplog


@pytest.mark.parametrize("saved", [False, True])
def test_a_classifier_with_the_same_labels_is_kept(tmp_path, saved, log):
    plain = classifier()
    plain.save_pretrained(tmp_path)
    model = HardSharingModel.from_backbone(str(tmp_path) if saved else plain, [native("one"), native("two")])
    for name in ("one", "two"):
        own = model.heads[name].layers.native.state_dict()
        assert torch.equal(own["classifier.weight"], plain.classifier.weight)
        assert torch.equal(own["bert.pooler.dense.weight"], plain.bert.pooler.dense.weight)
    assert "classifier" not in log.text
    with torch.no_grad():  # a copy for each task
        model.heads["one"].layers.native.classifier.weight.add_(1)
    assert torch.equal(model.heads["two"].layers.native.classifier.weight, plain.classifier.weight)


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("labels", [("bad", "good"), ("high", "middle", "low")])
def test_a_classifier_with_other_labels_is_left_out_and_reported(tmp_path, saved, labels, log):
    plain = classifier()
    plain.save_pretrained(tmp_path)
    model = HardSharingModel.from_backbone(str(tmp_path) if saved else plain, [native("one", labels)])
    own = model.heads["one"].layers.native.state_dict()
    assert torch.equal(own["bert.pooler.dense.weight"], plain.bert.pooler.dense.weight)
    assert not torch.equal(own["classifier.weight"][:2], plain.classifier.weight[:2])
    assert "task 'one'" in log.text and "BertForSequenceClassification" in log.text and "'low'" in log.text


def test_a_classifier_that_no_task_has_a_place_for_is_reported(log):
    HardSharingModel.from_backbone(classifier(), [Task("score", "regression")])
    assert "BertForSequenceClassification" in log.text and "native" in log.text
    log.clear()
    HardSharingModel.from_backbone(classifier().bert, [Task("score", "regression")])
    assert "native" not in log.text


@pytest.mark.parametrize("saved", [False, True])
def test_a_classifier_of_tokens_is_not_taken_for_one_of_texts(tmp_path, saved, log):
    plain = plain_model("TOKEN_CLASSIFICATION", "bert")
    plain.save_pretrained(tmp_path)
    model = HardSharingModel.from_backbone(str(tmp_path) if saved else plain, [native("one")])
    assert not torch.equal(model.heads["one"].layers.native.classifier.weight, plain.classifier.weight)
    assert "BertForTokenClassification" in log.text


def test_a_classifier_of_another_problem_is_left_out(log):
    plain = tiny_model(
        AutoModelForSequenceClassification,
        tiny_config("bert", problem_type="multi_label_classification", id2label=dict(enumerate(LABELS))),
    )
    model = HardSharingModel.from_backbone(plain, [native("one")])
    assert not torch.equal(model.heads["one"].layers.native.classifier.weight, plain.classifier.weight)
    assert "multi_label_classification" in log.text


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("plain_class", [BertModel, BertForPreTraining])
def test_a_pooler_is_kept(tmp_path, saved, plain_class):
    torch.manual_seed(0)
    plain = plain_class(tiny_config("bert"))
    plain.save_pretrained(tmp_path)
    pooler = plain.base_model.pooler.dense.weight
    model = HardSharingModel.from_backbone(str(tmp_path) if saved else plain, [native("one")])
    assert torch.equal(model.heads["one"].layers.native.bert.pooler.dense.weight, pooler)
    assert not any("pooler" in name for name, _ in model.backbone.named_parameters())


def test_a_checkpoint_without_a_pooler_starts_one(log):
    model = HardSharingModel.from_backbone(BertForMaskedLM(tiny_config("bert")), [native("one")])
    assert model.heads["one"].layers.native.bert.pooler.dense.weight.std() > 0.001
    assert "classifier" not in log.text
