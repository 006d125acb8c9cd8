"""Parameters of a frozen backbone that somebody trains all the same: they are saved, and come back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import BACKBONES, make_tasks
from language_models import make_plain
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_schemes import KINDS, check_equal, make_batch, weights
from transformers import AutoModel, TrainerCallback

from hf_multitask import AutoModelForMultiTask, Task
from hf_multitask.hub.model_card import write_model_card
from hf_multitask.hub.push import prepare_push
from hf_multitask.models.auto import SCHEMES
from hf_multitask.models.base import MultiTaskModel
from hf_multitask.models.conversion import select_tasks
from hf_multitask.models.manifest import MANIFEST_NAME

FROZEN = [kind for kind, (scheme, _) in KINDS.items() if SCHEMES[scheme].freezes_backbone]
every_kind = pytest.mark.parametrize("kind", FROZEN)
PARTS = ("LayerNorm", "word_embeddings")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("backbone")
    BACKBONES["bert"]().save_pretrained(folder)
    return str(folder)


def make(kind: str, backbone: str, unfrozen: tuple[str, ...] = PARTS) -> MultiTaskModel:
    scheme, options = KINDS[kind]
    torch.manual_seed(1)
    model = SCHEMES[scheme].from_backbone(backbone, make_tasks(), **options)
    unfreeze(model, unfrozen)
    return model


def unfreeze(model: MultiTaskModel, parts: tuple[str, ...], trained: bool = True) -> None:
    for name, parameter in model.backbone.named_parameters():
        if any(part in name for part in parts):
            parameter.requires_grad_(trained)


def trained_names(model: MultiTaskModel) -> list[str]:
    return sorted(
        f"backbone.{name}" for name, _ in model.backbone.named_parameters() if any(part in name for part in PARTS)
    )


class Freeze(TrainerCallback):
    """Freezes the whole backbone after some steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step >= self.step:
            model.backbone.requires_grad_(False)


@pytest.mark.sample(2)
@pytest.mark.parametrize("frozen_again", [True, False])
@every_kind
def test_what_was_trained_of_the_backbone_is_saved_and_comes_back(kind, frozen_again, backbone, make_trainer, tmp_path):
    callbacks = {"trainer_kwargs": {"callbacks": [Freeze(2)]}} if frozen_again else {}
    arguments = dict(save_strategy="steps", save_steps=3, learning_rate=1e-2, **callbacks)
    trainer = make_trainer(make(kind, backbone), **arguments)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    source = AutoModel.from_pretrained(backbone).state_dict()
    moved = [name for name, value in trainer.model.backbone.state_dict().items() if not value.equal(source[name])]
    assert sorted(f"backbone.{name}" for name in moved) == trained_names(trainer.model)
    saved = load_file(tmp_path / "final" / "model.safetensors")
    assert sorted(name for name in saved if name.startswith("backbone.")) == trained_names(trainer.model)
    loaded = AutoModelForMultiTask.from_pretrained(tmp_path / "final")
    check_equal(weights(loaded), weights(trainer.model))
    assert not any(parameter.requires_grad for parameter in loaded.backbone.parameters())
    loaded.save_pretrained(tmp_path / "again")  # frozen now, and not forgotten
    check_equal(weights(AutoModelForMultiTask.from_pretrained(tmp_path / "again")), weights(loaded))
    # A run that goes on from step 3 ends where this one did.
    again = make_trainer(make(kind, backbone), **arguments, output_dir=str(tmp_path / "resumed"))
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    check_equal(weights(again.model), weights(trainer.model))
    again.save_model(str(tmp_path / "resumed"))
    check_equal(weights(AutoModelForMultiTask.from_pretrained(tmp_path / "resumed")), weights(trainer.model))


def test_a_folder_from_before_they_were_trained_brings_their_first_values_back(backbone, tmp_path):
    model = make("adapter", backbone, ())
    model.save_pretrained(tmp_path)
    before = weights(model)
    unfreeze(model, PARTS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = make_batch()
    model(**batch, labels={"strength": torch.ones(5, 1)}).loss.backward()
    optimizer.step()
    assert not all(value.equal(before[name]) for name, value in weights(model).items())
    # What `Trainer` does with the best checkpoint.
    model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    model.load_adapters(tmp_path)
    check_equal(weights(model), before)


def test_a_resumed_run_keeps_what_an_earlier_one_trained(backbone, make_trainer, tmp_path):
    arguments = dict(save_strategy="steps", save_steps=2, learning_rate=1e-2)
    make_trainer(make("adapter", backbone), **arguments, max_steps=2).train()
    model = make("adapter", backbone, ())
    checkpoint = tmp_path / "out" / "checkpoint-2"
    model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)
    model.load_adapters(checkpoint)
    model.save_pretrained(tmp_path / "again")
    check_equal(weights(AutoModelForMultiTask.from_pretrained(tmp_path / "again")), weights(model))


@pytest.mark.sample(3)
@every_kind
def test_exports_selections_and_pushes_have_it(kind, backbone, tmp_path):
    model = make(kind, backbone)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "saved")
    batch = make_batch()
    expected = {name: value.detach() for name, value in model.eval()(**batch).logits.items()}
    alone = select_tasks(model, ["names"])
    assert torch.equal(alone(**batch).logits["names"], expected["names"])
    model.export_task("names", tmp_path / "alone", native=False)
    exported = AutoModelForMultiTask.from_pretrained(tmp_path / "alone")
    assert torch.equal(exported(**batch).logits["names"], expected["names"])
    with prepare_push(tmp_path / "saved") as plan:
        pushed = tmp_path / "pushed"
        for file in plan.files:
            target = pushed / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(Path(file.source).read_bytes())
    check_equal(AutoModelForMultiTask.from_pretrained(pushed)(**batch).logits, expected)


def test_the_card_says_so(backbone, tmp_path):
    model = make("adapter", backbone)
    model.save_pretrained(tmp_path)
    write_model_card(tmp_path, tmp_path / "README.md")
    sentence = f"{len(trained_names(model))} tensors of the backbone were trained"
    assert sentence in (tmp_path / "README.md").read_text()
    make("adapter", backbone, ()).save_pretrained(tmp_path / "frozen")
    write_model_card(tmp_path / "frozen", tmp_path / "frozen" / "README.md")
    assert "tensors of the backbone" not in (tmp_path / "frozen" / "README.md").read_text()


@pytest.mark.sample(3)
@every_kind
def test_peft_reads_the_adapters_over_the_backbone_as_it_was_trained(kind, backbone, tmp_path):
    for unfrozen in ((), PARTS):
        model = make(kind, backbone, unfrozen).eval()
        model.save_pretrained(tmp_path / str(len(unfrozen)))
        for config in (tmp_path / str(len(unfrozen))).glob("*adapter*/**/adapter_config.json"):
            base = json.loads(config.read_text())["base_model_name_or_path"]
            assert base == (None if unfrozen else backbone)
            assert PeftModel.from_pretrained(AutoModel.from_pretrained(backbone), config.parent)


def test_the_table_of_a_language_model_is_part_of_it(tmp_path):
    make_plain("llama").save_pretrained(tmp_path / "plain")
    model = SCHEMES["adapter"].from_backbone(str(tmp_path / "plain"), [Task("say", "causal_lm")])
    model.lm_head.requires_grad_(True)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    model.save_pretrained(tmp_path / "saved")
    assert "lm_head.weight" in model.config.backbone_trained
    loaded = AutoModelForMultiTask.from_pretrained(tmp_path / "saved")
    check_equal(weights(loaded), weights(model))
    assert not loaded.lm_head.weight.requires_grad


def test_a_folder_that_lost_them_is_refused(backbone, tmp_path):
    model = make("adapter", backbone)
    model.save_pretrained(tmp_path)
    (tmp_path / MANIFEST_NAME).unlink()  # it would notice first
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    lost = next(name for name in tensors if "word_embeddings" in name)
    kept = {name: value for name, value in tensors.items() if name != lost}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=lost):
        AutoModelForMultiTask.from_pretrained(tmp_path)
    other = "backbone.encoder.layer.0.attention.self.query.bias"
    save_file(tensors | {other: torch.zeros(32)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=other):
        AutoModelForMultiTask.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", ["LayerNorm", ["heads.tone"], [1]])
def test_names_that_cannot_be_the_backbones_are_refused(value, backbone, tmp_path):
    make("prefix", backbone).save_pretrained(tmp_path)
    (tmp_path / MANIFEST_NAME).unlink()
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"backbone_trained": value}))
    with pytest.raises(ValueError, match="backbone_trained"):
        AutoModelForMultiTask.from_pretrained(tmp_path)
