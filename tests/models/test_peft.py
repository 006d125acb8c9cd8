"""Where PEFT's own adapters meet multi-task models: refused at once, with what to do instead."""

from __future__ import annotations

import pytest
import torch
from conftest import BACKBONES, make_tasks
from language_models import make_plain
from peft import LoraConfig, PeftModel, get_peft_model
from test_schemes import KINDS, check_equal, make_batch, make_model, weights
from transformers import AutoModel

from hf_multitask import AdapterModel, AutoModelForMultiTask, Task
from hf_multitask.models.auto import SCHEMES

ADVICE = "use AdapterModel.*merge_and_unload"
LORA = {"r": 4, "target_modules": ["query", "value"]}


def lora(**more) -> LoraConfig:
    return LoraConfig(**{**LORA, **more})


def peft_model(tmp_path=None) -> PeftModel:
    """A model with an adapter of PEFT that does something."""
    torch.manual_seed(0)
    wrapped = get_peft_model(BACKBONES["bert"](), lora(init_lora_weights=False))
    if tmp_path is not None:
        wrapped.save_pretrained(tmp_path)
    return wrapped.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_own_adapters_are_refused_and_change_nothing(kind):
    model = make_model(kind)
    before, trained = weights(model), [parameter.requires_grad for parameter in model.parameters()]
    for add in (lambda: model.add_adapter(lora()), lambda: model.load_adapter("folder")):
        with pytest.raises(ValueError, match=f"{type(model).__name__} takes no adapter of PEFT.*{ADVICE}"):
            add()
    check_equal(weights(model), before)
    assert [parameter.requires_grad for parameter in model.parameters()] == trained


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("task", ["tone", "words"])
def test_a_wrapped_backbone_is_refused_with_the_way_out(scheme, task):
    tasks = {"tone": Task("tone", "regression"), "words": Task("words", "masked_lm")}
    wrapped = peft_model()
    with pytest.raises(ValueError, match=f"backbone must be .*, got PeftModel; .*{ADVICE}"):
        SCHEMES[scheme].from_backbone(wrapped, [tasks[task]])
    inside = BACKBONES["bert"]()
    inside.add_adapter(lora())
    with pytest.raises(ValueError, match=f"query' has an adapter of PEFT, which a backbone cannot have; .*{ADVICE}"):
        SCHEMES[scheme].from_backbone(inside, [tasks[task]])


def test_the_way_out_keeps_what_the_adapter_learned(tmp_path):
    wrapped, batch = peft_model(), make_batch()
    expected = wrapped(**batch).last_hidden_state
    model = SCHEMES["hard"].from_backbone(wrapped.merge_and_unload(), make_tasks())
    torch.testing.assert_close(model.backbone(**batch).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    check_equal(weights(AutoModelForMultiTask.from_pretrained(tmp_path)), weights(model))


def test_folders_of_adapters_are_no_backbones(tmp_path):
    peft_model(tmp_path / "adapter")
    for tasks in (make_tasks(), [Task("words", "masked_lm")]):
        with pytest.raises(ValueError, match=f"adapter' holds an adapter of PEFT and no model.*{ADVICE}"):
            SCHEMES["hard"].from_backbone(str(tmp_path / "adapter"), tasks)
    # A folder with a model and an adapter, which Transformers loads together.
    BACKBONES["bert"]().save_pretrained(tmp_path / "both")
    peft_model(tmp_path / "both")
    with pytest.raises(ValueError, match=f"has an adapter of PEFT, which a backbone cannot have; .*{ADVICE}"):
        SCHEMES["hard"].from_backbone(str(tmp_path / "both"), make_tasks())


@pytest.mark.parametrize("given", [None, 3, torch.nn.Linear(2, 2)], ids=repr)
def test_what_is_no_backbone_is_named(given):
    with pytest.raises(ValueError, match=rf"backbone must be a Hub id, .*, got {type(given).__name__}"):
        SCHEMES["hard"].from_backbone(given, make_tasks())


@pytest.mark.parametrize(
    "modules", [None, [f"heads.{task.name}" for task in make_tasks()]], ids=["alone", "heads saved"]
)
@pytest.mark.parametrize("kind", ["hard", "soft", "adapter", "mixture"])
def test_a_multi_task_model_that_peft_wrapped_is_not_trained_or_saved(kind, modules, make_trainer, tmp_path):
    model = make_model(kind)
    wrapped = get_peft_model(model, lora(modules_to_save=modules, target_modules=["key"]))
    with pytest.raises(ValueError, match=f"model is a PeftModel over {type(model).__name__}.*{ADVICE}"):
        make_trainer(wrapped)
    # PEFT puts its layers into the model itself.
    with pytest.raises(ValueError, match=f"key' has an adapter of PEFT, which a multi-task model.*{ADVICE}"):
        make_trainer(model)
    with pytest.raises(ValueError, match=f"key' has an adapter of PEFT, which a saved multi-task model.*{ADVICE}"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_adapters_put_into_the_backbone_alone_are_found_too(make_trainer, tmp_path):
    for put in (lambda backbone: backbone.add_adapter(lora()), lambda backbone: get_peft_model(backbone, lora())):
        model = make_model("hard")
        put(model.backbone)
        with pytest.raises(ValueError, match=f"query' has an adapter of PEFT.*{ADVICE}"):
            make_trainer(model)
        with pytest.raises(ValueError, match=f"query' has an adapter of PEFT.*{ADVICE}"):
            model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=f"query' has an adapter of PEFT.*{ADVICE}"):
            SCHEMES["conditioned"].from_backbone(model, make_tasks())
    merged = get_peft_model(model.backbone, lora()).merge_and_unload()
    assert merged is model.backbone
    make_trainer(model)
    model.save_pretrained(tmp_path)
    check_equal(weights(AutoModelForMultiTask.from_pretrained(tmp_path)), weights(model))


def test_a_plain_model_of_peft_is_trained_as_by_trainer(make_trainer, tmp_path, tokenizer):
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification

    plain = AutoModelForSequenceClassification.from_config(BACKBONES["bert"]().config)
    wrapped = get_peft_model(plain, lora(task_type="SEQ_CLS"))
    rows = Dataset.from_dict({"input_ids": [[1, 8, 2]] * 8, "labels": [0, 1] * 4})
    trainer = make_trainer(wrapped, train=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "plain"))
    assert (tmp_path / "plain" / "adapter_model.safetensors").is_file()


def test_one_lora_that_all_tasks_share_trains_saves_and_is_read_by_peft(make_trainer, tmp_path):
    torch.manual_seed(0)
    BACKBONES["bert"]().save_pretrained(tmp_path / "plain")
    model = AdapterModel.from_backbone(str(tmp_path / "plain"), make_tasks(), rank=0, shared_rank=4)
    before = weights(model)
    make_trainer(model, learning_rate=1e-2, gradient_combination="pcgrad").train()
    moved = {name for name, value in weights(model).items() if not value.equal(before[name])}
    assert {name.split(".")[0] for name in moved} == {"shared_adapter", "heads"}
    assert {name.split(".")[1] for name in moved if name.startswith("heads")} == {task.name for task in model.tasks}
    model.save_pretrained(tmp_path / "saved")
    check_equal(weights(AutoModelForMultiTask.from_pretrained(tmp_path / "saved")), weights(model))
    peft = PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "plain"), tmp_path / "saved/shared_adapter")
    batch = make_batch()
    found = peft.eval()(**batch).last_hidden_state
    expected = model.eval()(**batch, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_one_lora_writes_for_every_task(tmp_path):
    tasks = [Task("one", "causal_lm", prompt="{text}"), Task("other", "causal_lm", prompt="{text}")]
    model = AdapterModel.from_backbone(make_plain("llama, tied"), tasks, rank=0, shared_rank=4)
    ids = torch.tensor([[5, 6, 7]])
    start = [model.generate(ids, task=name, max_new_tokens=5, pad_token_id=3) for name in ("one", "other")]
    with torch.no_grad():
        for parameter in model.shared_adapter.parameters():
            parameter.add_(torch.randn_like(parameter))
    texts = [model.generate(ids, task=name, max_new_tokens=5, pad_token_id=3) for name in ("one", "other")]
    assert torch.equal(texts[0], texts[1]) and torch.equal(*start) and not torch.equal(texts[0], start[0])
