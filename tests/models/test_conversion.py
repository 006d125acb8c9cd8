"""Tasks taken out of a model, models of other schemes made from one, and heads that Transformers has itself."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import BACKBONES, PAD_ID, make_tasks
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
)

from hf_multitask import (
    AdapterModel,
    AutoModelForMultiTask,
    ConditionedModel,
    HardSharingModel,
    MixtureOfExpertsModel,
    PrefixModel,
    SoftSharingModel,
    Task,
)
from hf_multitask.models.conversion import plain_model, select_tasks

NATIVE = [
    Task("tone", "single_label_classification", labels=("negative", "positive"), head="native"),
    Task("strength", "regression", head="native"),
    Task("traits", "multi_label_classification", labels=("long", "happy", "sad"), head="native"),
    Task("names", "token_classification", labels=("O", "B-person", "B-place"), head="native"),
]
EVERY_BACKBONE = pytest.mark.parametrize("backbone", BACKBONES)


def make_batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    ids = torch.randint(5, 90, (5, 7))
    mask = (torch.arange(7) < torch.tensor([7, 5, 7, 2, 6]).unsqueeze(1)).long()
    return {"input_ids": ids.masked_fill(mask == 0, PAD_ID), "attention_mask": mask}


def make_model(backbone: str, tasks=NATIVE) -> HardSharingModel:
    torch.manual_seed(0)
    model = HardSharingModel.from_backbone(BACKBONES[backbone](), tasks)
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@EVERY_BACKBONE
@pytest.mark.parametrize("task", NATIVE, ids=lambda task: task.name)
def test_a_task_with_a_native_head_loads_in_plain_transformers(tmp_path, backbone, task):
    model, batch = make_model(backbone), make_batch()
    model.export_task(task.name, tmp_path)
    auto = AutoModelForTokenClassification if task.name == "names" else AutoModelForSequenceClassification
    plain, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(plain).__module__.startswith("transformers.")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert plain.config.num_labels == task.num_outputs
    if task.labels:
        assert plain.config.id2label == dict(enumerate(task.labels))
    with torch.no_grad():
        expected, found = model(**batch).logits[task.name], plain(**batch).logits
    real = batch["attention_mask"].bool() if task.name == "names" else slice(None)
    assert (found[real] - expected[real]).abs().max() < 1e-6
    assert expected.abs().max() > 1e-3


@EVERY_BACKBONE
def test_native_heads_are_saved_and_loaded(tmp_path, backbone):
    model, batch = make_model(backbone), make_batch()
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForMultiTask.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, logits in model(**batch).logits.items():
        assert torch.equal(logits, loaded(**batch).logits[name])


@EVERY_BACKBONE
def test_native_heads_learn_and_leave_other_tasks_alone(backbone):
    model, batch = make_model(backbone).train(), make_batch()
    labels = {"tone": torch.tensor([0, 1, 0, 1, 1])}
    others = [p.clone() for task in ("strength", "traits", "names") for p in model.task_parameters(task)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    now = [p for task in ("strength", "traits", "names") for p in model.task_parameters(task)]
    assert others and all(torch.equal(a, b) for a, b in zip(others, now, strict=True))


def test_initial_native_heads_are_no_garbage():
    torch.manual_seed(0)
    model = HardSharingModel.from_backbone(BACKBONES["modernbert"](), NATIVE)
    for name, parameter in model.heads.named_parameters():
        assert parameter.isfinite().all() and parameter.abs().max() < 2, name
        assert parameter.numel() == 1 or parameter.std() < 0.5, name


def test_a_head_that_transformers_lacks_is_refused(tmp_path):
    model = make_model("bert", make_tasks())
    with pytest.raises(ValueError, match="task 'tone': its head 'mlp' is none that Transformers has"):
        model.export_task("tone", tmp_path, native=True)
    with pytest.raises(ValueError, match="no task 'tune', did you mean 'tone'"):
        model.export_task("tune", tmp_path)
    with pytest.raises(ValueError, match="pooling and head_dropout of head 'native'"):
        Task("tone", "regression", head="native", pooling="mean")


@pytest.mark.parametrize("native", [None, False])
def test_a_task_without_a_native_head_is_a_model_of_one_task(tmp_path, native):
    model, batch = make_model("bert", make_tasks()), make_batch()
    model.export_task("traits", tmp_path, native)
    alone = AutoModelForMultiTask.from_pretrained(tmp_path)
    assert [task.name for task in alone.tasks] == ["traits"]
    assert not any(name.startswith("heads.") and ".traits" not in name for name in alone.state_dict())
    assert torch.equal(alone(**batch).logits["traits"], model(**batch).logits["traits"])


def test_some_tasks_in_another_order():
    model, batch = make_model("llama", make_tasks()), make_batch()
    chosen = select_tasks(model, ["names", "tone"])
    expected, found = model(**batch).logits, chosen(**batch).logits
    assert list(found) == ["names", "tone"]
    assert all(torch.equal(found[name], expected[name]) for name in found)
    with torch.no_grad():
        next(chosen.backbone.parameters()).add_(1)
    assert torch.equal(model(**batch).logits["tone"], expected["tone"])


def test_plain_model_is_a_copy():
    model = make_model("bert")
    plain = plain_model(model, "tone")
    pointers = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in pointers for p in plain.parameters())


# ---- over a multi-task model ----

SOURCES = {
    "conditioned": (ConditionedModel, {}),
    "prefix": (PrefixModel, {"num_virtual_tokens": 3}),
    "adapter": (AdapterModel, {"rank": 2}),
    "mixture": (MixtureOfExpertsModel, {"num_experts": 2}),
    "soft": (SoftSharingModel, {}),
}


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("scheme", [HardSharingModel, *(model for model, _ in SOURCES.values())])
def test_a_model_over_a_multi_task_model_has_its_encoder_and_its_heads(tmp_path, scheme, folder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_multitask"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    options = {"num_experts": 2} if scheme is MixtureOfExpertsModel else {}
    source, batch = make_model("bert", make_tasks()), make_batch()
    source.save_pretrained(tmp_path)
    before = {name: value.clone() for name, value in source.state_dict().items()}
    tone, strength, *_ = make_tasks()
    other = Task("traits", "multi_label_classification", labels=("long", "sad"))
    tasks = [strength, tone, other, Task("mood", "regression")]
    made = scheme.from_backbone(str(tmp_path) if folder else source, tasks, **options)
    for name in ("tone", "strength"):
        for one, two in zip(source.heads[name].parameters(), made.heads[name].parameters(), strict=True):
            assert torch.equal(one, two) and one is not two
    assert "heads of strength, tone" in caplog.text and "traits, mood at random" in caplog.text
    expected, found = source(**batch).logits, made(**batch).logits
    assert [*found] == ["strength", "tone", "traits", "mood"]
    if scheme is not PrefixModel:  # whose prefixes change what is computed from the start
        assert (found["tone"] - expected["tone"]).abs().max() < 1e-5
    made.train()(**batch, labels={"mood": torch.zeros(5, 1)}).loss.backward()
    made.save_pretrained(tmp_path / "made")
    loaded = AutoModelForMultiTask.from_pretrained(tmp_path / "made")
    assert torch.equal(loaded(**batch).logits["mood"], made.eval()(**batch).logits["mood"])
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("kind", SOURCES)
def test_a_multi_task_model_without_one_encoder_is_refused_by_name(tmp_path, kind):
    scheme, options = SOURCES[kind]
    source = scheme.from_backbone(BACKBONES["bert"](), make_tasks(), **options)
    source.save_pretrained(tmp_path)
    for given in (source, str(tmp_path)):
        with pytest.raises(ValueError, match="model.encoder|add_task"):
            HardSharingModel.from_backbone(given, make_tasks())


def test_one_encoder_of_soft_sharing_is_taken():
    source = SoftSharingModel.from_backbone(BACKBONES["bert"](), make_tasks()[:1])
    made = HardSharingModel.from_backbone(source, make_tasks())
    assert torch.equal(made(**make_batch()).logits["tone"], source(**make_batch()).logits["tone"])


def test_options_of_heads_are_those_of_the_multi_task_model():
    source = HardSharingModel.from_backbone(BACKBONES["bert"](), make_tasks(), pooling="first", head_dropout=0.3)
    assert HardSharingModel.from_backbone(source, make_tasks()).config.pooling == "first"
    assert HardSharingModel.from_backbone(source, make_tasks(), head_dropout=0.0).config.head_dropout == 0.0


def test_heads_over_the_vocabulary_are_kept():
    torch.manual_seed(0)
    tasks = [Task("tone", "regression"), Task("text", "masked_lm")]
    backbone = BertForMaskedLM(
        BertConfig(vocab_size=90, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=False)
    )
    source = HardSharingModel.from_backbone(backbone, tasks)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    made = HardSharingModel.from_backbone(source, [*tasks, Task("mood", "regression")])
    batch = make_batch()
    assert torch.equal(made(**batch).logits["text"], source(**batch).logits["text"])
    source.add_task(Task("mood", "regression"))
    assert torch.equal(made(**batch).logits["text"], source(**batch).logits["text"])
    source.remove_task("text")
    assert source.lm_head is None and not any("lm_head" in name for name in source.state_dict())
