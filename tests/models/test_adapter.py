"""Adapters on a frozen backbone: one pass for the rows of all tasks, PEFT's numbers, and a backbone left as it is."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import BACKBONES, PAD_ID
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2Model, PreTrainedModel

from hf_multitask import Task
from hf_multitask.models.adapter import AdapterConfig, AdapterModel
from hf_multitask.models.low_rank import LowRankHook
from hf_multitask.models.manifest import write_manifest
from hf_multitask.models.passes import Segment

# Neither in alphabetical order nor with labels in it.
TASKS = [
    Task("tone", "single_label_classification", labels=("positive", "negative", "mixed"), weight=0.5, head_dropout=0.0),
    Task("names", "token_classification", labels=("O", "B-place", "B-person"), weight=3.0, head_dropout=0.0),
    Task("helper", "regression", auxiliary=True, head_dropout=0.0),
    Task("a-traits", "multi_label_classification", labels=("sad", "long", "happy"), head_dropout=0.0),
]
SERVED = ["tone", "names", "a-traits"]
# Where PEFT has no default.
TARGETS = {"distilbert": ["q_lin", "v_lin"], "modernbert": ["Wqkv", "Wo"]}
# Rows of unequal number, and of equal number; `a-traits` is absent.
SEGMENTS = {"names": Segment(2, 5, 9), "tone": Segment(0, 2, 9), "helper": Segment(5, 6, 9)}
EQUAL = {"names": Segment(2, 4, 9), "tone": Segment(0, 2, 9), "helper": Segment(4, 6, 9)}
backbones = pytest.mark.parametrize("name", BACKBONES)
shared_ranks = pytest.mark.parametrize("shared_rank", [0, 3])
mixtures = pytest.mark.parametrize("segments", [SEGMENTS, EQUAL], ids=["unequal", "equal"])


def make_backbone(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    backbone = BACKBONES[name]()
    for module in backbone.modules():  # whose draws would differ between passes
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for key, value in vars(backbone.config).items():
        if "dropout" in key and isinstance(value, float):
            setattr(backbone.config, key, 0.0)
    for module in backbone.modules():
        for key in ("attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, key, None), float):
                setattr(module, key, 0.0)
    return backbone.eval()


def make_model(name: str = "bert", backbone: str | PreTrainedModel | None = None, **options) -> AdapterModel:
    """Return a model whose adapters all do something."""
    options = {"rank": 4, "shared_rank": 3, "target_modules": TARGETS.get(name), **options}
    model = AdapterModel.from_backbone(make_backbone(name) if backbone is None else backbone, TASKS, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def make_batch(lengths=(9, 9, 7, 9, 6, 9), seed: int = 2) -> dict[str, Tensor]:
    """Return rows padded on the right."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 90, (len(lengths), max(lengths)), generator=draw)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    return {"input_ids": torch.where(mask.bool(), ids, PAD_ID), "attention_mask": mask}


def make_labels(segments: dict[str, Segment]) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    makers = {
        "tone": lambda s: torch.randint(0, 3, (s.rows,), generator=draw),
        "names": lambda s: torch.randint(0, 3, (s.rows, s.length), generator=draw),
        "helper": lambda s: torch.randn(s.rows, 1, generator=draw),
        "a-traits": lambda s: torch.randint(0, 2, (s.rows, 3), generator=draw).float(),
    }
    return {task: makers[task](segment) for task, segment in segments.items()}


def rows_of(batch: dict[str, Tensor], segment: Segment) -> dict[str, Tensor]:
    return {key: value[segment.start : segment.stop] for key, value in batch.items()}


def count_calls(model: AdapterModel) -> list[int]:
    """Return a list that grows by the rows of each call of the backbone."""
    calls: list[int] = []
    model.backbone.register_forward_pre_hook(lambda *a: calls.append(len(a[2]["input_ids"])), with_kwargs=True)
    return calls


def hidden_of(model: AdapterModel, task: str, batch: dict[str, Tensor]) -> Tensor:
    """Return the last hidden states that a task's head gets."""
    rows, length = batch["input_ids"].shape
    output = model(**batch, segments={task: Segment(0, rows, length)}, output_hidden_states=True)
    return output.hidden_states[-1]


def gradients(model: AdapterModel) -> dict[str, Tensor]:
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


# ---- at the start ----


@shared_ranks
@backbones
def test_a_fresh_model_equals_its_backbone_bit_for_bit(name, shared_rank):
    backbone = make_backbone(name)
    keys = [key for key in backbone.state_dict() if not key.startswith("pooler.")]
    model = AdapterModel.from_backbone(backbone, TASKS, shared_rank=shared_rank, target_modules=TARGETS.get(name))
    batch = make_batch()
    expected = backbone(**batch).last_hidden_state
    for segments in (SEGMENTS, EQUAL, {"tone": Segment(0, 6, 9)}):
        found = model(**batch, segments=segments, output_hidden_states=True).hidden_states[-1]
        reference = backbone(**batch, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(found, reference)
    assert torch.equal(model.backbone(**batch).last_hidden_state, expected)
    assert list(model.backbone.state_dict()) == keys
    for key, parameter in [*model.adapters.named_parameters()]:
        assert (parameter == 0).all() == key.endswith("lora_B") and parameter.requires_grad
        # Uniform in +-1/sqrt(in), as PEFT has it.
        assert key.endswith("lora_B") or 0.8 < parameter.abs().max() * parameter.shape[1] ** 0.5 <= 1.0
    assert (model.shared_adapter is not None) == bool(shared_rank)


def test_the_backbone_by_itself_is_the_plain_one():
    model, batch = make_model(), make_batch()
    expected = make_backbone("bert")(**batch).last_hidden_state
    model(**batch)
    assert torch.equal(model.backbone(**batch).last_hidden_state, expected)


def test_default_targets_are_pefts_and_are_written_down():
    model = make_model("llama")
    assert model.config.target_modules == ["q_proj", "v_proj"]
    assert list(model.adapters["tone"]) == [f"layers/{i}/self_attn/{p}_proj" for i in (0, 1) for p in "qv"]


# ---- one pass for all ----


@mixtures
@shared_ranks
@backbones
def test_a_mixed_batch_is_one_pass_and_equals_each_tasks_rows_alone(name, shared_rank, segments):
    model, batch = make_model(name, shared_rank=shared_rank), make_batch()
    calls = count_calls(model)
    mixed = model.train()(**batch, segments=segments).logits
    assert calls == [6] and list(mixed) == list(segments)
    for task, segment in segments.items():
        rows = rows_of(batch, segment)
        alone = model(**rows, segments={task: Segment(0, segment.rows, 9)}).logits[task]
        torch.testing.assert_close(mixed[task], alone, rtol=1e-5, atol=1e-5)
    # The tasks differ, else the test would show nothing.
    tone, names = (hidden_of(model, task, batch) for task in ("tone", "names"))
    assert (tone - names).abs().max() > 1e-2


@mixtures
@shared_ranks
@backbones
def test_the_gradients_of_a_mixed_batch_are_those_of_a_pass_per_task(name, shared_rank, segments):
    model, batch = make_model(name, shared_rank=shared_rank).train(), make_batch()
    labels = make_labels(segments)
    model(**batch, segments=segments, labels=labels).loss.backward()
    mixed = gradients(model)
    model.zero_grad()
    for task, segment in segments.items():
        one = {task: Segment(0, segment.rows, 9)}
        weights = {task: segment.rows / 6 * next(t.weight for t in TASKS if t.name == task)}
        own = {task: labels[task]}
        model(**rows_of(batch, segment), segments=one, labels=own, loss_weights=weights).loss.backward()
    assert_close(mixed, gradients(model))
    assert any("adapters." in key for key in mixed)
    assert not any("a-traits" in key for key in mixed) and not any(key.startswith("backbone.") for key in mixed)


def test_serving_gives_each_task_its_own_pass():
    model, batch = make_model(), make_batch()
    calls = count_calls(model)
    logits = model(**batch).logits
    assert calls == [6, 6, 6] and list(logits) == SERVED
    for task in SERVED:
        assert torch.equal(logits[task], model(**batch, segments={task: Segment(0, 6, 9)}).logits[task])


def test_trimmed_passes_are_read_like_one_padded_pass():
    model, batch = make_model(), make_batch(lengths=(60, 60, 6, 5, 3))
    segments = {"tone": Segment(0, 2, 60), "names": Segment(2, 4, 6), "helper": Segment(4, 5, 3)}
    calls = count_calls(model)
    trimmed = model(**batch, segments=segments).logits
    assert len(calls) > 1
    padded = model(**batch, segments=segments, single_pass=True).logits
    for task in segments:
        length = trimmed[task].shape[1] if task == "names" else None
        torch.testing.assert_close(trimmed[task], padded[task][:, :length], rtol=1e-5, atol=1e-5)


def test_packed_rows_are_refused_where_tasks_are_mixed_and_fine_where_they_are_not():
    model = make_model()
    layer = model.backbone.encoder.layer[0].attention.self.query
    from hf_multitask.models.rows import RowTasks

    with model.rows.use(RowTasks((("tone", 0, 2), ("names", 2, 6)))):
        with pytest.raises(ValueError, match="layer.0.attention.self.query' sees 1 rows where the batch has 6"):
            layer(torch.zeros(1, 54, 32))
    with model.rows.use(RowTasks((("tone", 0, 6),))):
        assert layer(torch.zeros(1, 54, 32)).shape == (1, 54, 32)


# ---- whose parameters are whose ----


@shared_ranks
def test_shared_and_task_parameters_are_disjoint_and_complete(shared_rank):
    model = make_model(shared_rank=shared_rank)
    shared = list(model.shared_parameters())
    parts = [shared, *(list(model.task_parameters(task.name)) for task in TASKS)]
    ids = [id(parameter) for part in parts for parameter in part]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert len(shared) == (8 if shared_rank else 0)  # 2 layers, query and value, two matrices
    assert all(len(part) == 8 + 4 for part in parts[1:])
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    with pytest.raises(ValueError, match="task 'nobody' is not one of this model's: tone, names"):
        model.task_modules("nobody")


@backbones
def test_steps_move_only_what_the_rows_tasks_train(name):
    model = make_model(name).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for seed in range(3):
        segments = {"tone": Segment(0, 6, 9)}
        model(**make_batch(seed=seed), segments=segments, labels=make_labels(segments)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    expected = {key for key in before if key.startswith(("shared_adapter.", "adapters.tone.", "heads.tone."))}
    assert moved == expected


# ---- saving, loading, PEFT ----


@shared_ranks
@backbones
def test_a_saved_model_is_loaded_bit_for_bit_without_a_copy_of_the_backbone(tmp_path, name, shared_rank):
    make_backbone(name).save_pretrained(tmp_path / "backbone")
    model = make_model(name, str(tmp_path / "backbone"), shared_rank=shared_rank)
    model.save_pretrained(tmp_path / "model")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert saved and all(key.startswith("heads.") for key in saved)
    files = {str(path.relative_to(tmp_path / "model")) for path in (tmp_path / "model").rglob("*.safetensors")}
    parts = [f"adapters/{task.name}" for task in TASKS] + (["shared_adapter"] if shared_rank else [])
    assert files == {"model.safetensors", *(f"{part}/adapter_model.safetensors" for part in parts)}
    loaded, info = AdapterModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values()) and not loaded.training
    assert_equal(dict(loaded.state_dict()), dict(model.state_dict()))
    assert [key for key, p in loaded.named_parameters() if p.requires_grad] == [
        key for key, p in model.named_parameters() if p.requires_grad
    ]
    assert loaded.config.target_modules == model.config.target_modules
    batch = make_batch()
    assert_equal(loaded(**batch).logits, model(**batch).logits)
    mixed = {"segments": SEGMENTS}
    assert_equal(loaded(**batch, **mixed).logits, model(**batch, **mixed).logits)


def test_a_folder_with_the_backbone_in_it_needs_no_other(tmp_path):
    make_backbone("bert").save_pretrained(tmp_path / "backbone")
    model = make_model("bert", str(tmp_path / "backbone"))
    model.save_pretrained(tmp_path / "model", save_backbone=True)
    shutil.rmtree(tmp_path / "backbone")
    assert_equal(AdapterModel.from_pretrained(tmp_path / "model")(**make_batch()).logits, model(**make_batch()).logits)


def test_a_backbone_in_memory_is_saved_too(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    assert_equal(AdapterModel.from_pretrained(tmp_path)(**make_batch()).logits, model(**make_batch()).logits)


def test_another_backbone_is_refused_and_the_right_one_may_come_by_hand(tmp_path):
    make_backbone("bert").save_pretrained(tmp_path / "backbone")
    model = make_model("bert", str(tmp_path / "backbone"))
    model.save_pretrained(tmp_path / "model")
    other = make_backbone("bert")
    with torch.no_grad():
        other.encoder.layer[0].output.dense.bias[0] += 1
    other.save_pretrained(tmp_path / "other")
    message = f"not the one that this model was trained with.*hash [0-9a-f]{{16}}.*{model.config.backbone_hash[:16]}"
    for source in (other, str(tmp_path / "other")):
        with pytest.raises(ValueError, match=message):
            AdapterModel.from_pretrained(tmp_path / "model", backbone=source)
    loaded = AdapterModel.from_pretrained(tmp_path / "model", backbone=make_backbone("bert"))
    assert_equal(loaded(**make_batch()).logits, model(**make_batch()).logits)


@pytest.fixture
def saved(tmp_path) -> Path:
    make_model().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("part", ["adapters/names", "shared_adapter"])
def test_a_missing_adapter_is_named(saved, part):
    shutil.rmtree(saved / part)
    with pytest.raises(ValueError, match=f"has no {part}/adapter_model.safetensors, .* adapters/tone, adapters/names"):
        AdapterModel.from_pretrained(saved)


@pytest.mark.parametrize(("option", "part"), [("rank", "adapters.tone"), ("shared_rank", "shared_adapter")])
def test_an_adapter_of_another_rank_is_refused(saved, option, part):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, option: 5}))
    write_manifest(saved)
    with pytest.raises(
        ValueError, match=rf"{part}.*lora_A.* has the shape \[\d, 32\]; the configuration says \[5, 32\]"
    ):
        AdapterModel.from_pretrained(saved)


def test_an_adapter_of_other_layers_is_refused(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "target_modules": ["query", "key"]}))
    write_manifest(saved)
    with pytest.raises(ValueError, match="adapters/tone/adapter_model.safetensors .* is of another kind: it lacks"):
        AdapterModel.from_pretrained(saved)


def test_adapters_are_loaded_into_a_model_that_is_there(saved):
    other = make_model()
    with torch.no_grad():
        for parameter in other.adapters.parameters():
            parameter.zero_()
    other.load_adapters(saved)
    assert_equal(other(**make_batch()).logits, make_model()(**make_batch()).logits)


@pytest.mark.parametrize(
    "options",
    [{"lora_dropout": 0.5}, {"shared_rank": 0}, {"lora_alpha": 3, "shared_alpha": 5}],
    ids=["both", "own", "alphas"],
)
@backbones
def test_peft_reads_the_folder_and_gets_the_same_hidden_states(tmp_path, name, options):
    model, batch = make_model(name, **options), make_batch()
    model.save_pretrained(tmp_path)
    for task in ("tone", "a-traits"):
        peft = PeftModel.from_pretrained(make_backbone(name), tmp_path / "adapters" / task, adapter_name=task).eval()
        if model.shared_adapter is not None:
            peft.load_adapter(tmp_path / "shared_adapter", "shared")
            peft.base_model.set_adapter([task, "shared"])
        expected = peft(**batch, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(hidden_of(model, task, batch), expected, rtol=1e-6, atol=1e-6)
        config = peft.peft_config[task]
        assert (config.r, config.lora_alpha) == (4, options.get("lora_alpha", 8))
        assert config.lora_dropout == options.get("lora_dropout", 0.0) and not config.fan_in_fan_out
        assert set(config.target_modules) == set(model.config.target_modules) and config.inference_mode


@shared_ranks
def test_peft_trains_to_the_same_gradients(tmp_path, shared_rank):
    model, batch = make_model(shared_rank=shared_rank), make_batch()
    model.save_pretrained(tmp_path)
    peft = PeftModel.from_pretrained(make_backbone("bert"), tmp_path / "adapters/tone", "tone", is_trainable=True)
    if shared_rank:
        peft.load_adapter(tmp_path / "shared_adapter", "shared", is_trainable=True)
        peft.base_model.set_adapter(["tone", "shared"])
    peft.eval()(**batch).last_hidden_state.square().sum().backward()
    hidden_of(model, "tone", batch).square().sum().backward()
    expected = {key: p.grad for key, p in peft.named_parameters() if p.grad is not None}
    names = model.adapter_tensors()
    found = gradients(model)
    for folder, adapter in [("adapters/tone", "tone")] + ([("shared_adapter", "shared")] if shared_rank else []):
        for ours, theirs in names[folder].items():
            gradient = expected.pop(theirs.replace(".weight", f".{adapter}.weight"))
            torch.testing.assert_close(found.pop(ours), gradient, rtol=1e-4, atol=1e-4)
    assert not expected and not found


# ---- one adapter that all tasks share, and no other ----


@backbones
def test_a_shared_adapter_alone_takes_one_pass_and_is_pefts_lora(tmp_path, name):
    model, batch = make_model(name, rank=0), make_batch()
    assert model.shares_rows and not len(model.adapters)
    calls = count_calls(model)
    logits = model(**batch).logits
    assert calls == [6] and list(logits) == SERVED
    mixed = model(**batch, segments=SEGMENTS, single_pass=True).logits
    for task, segment in SEGMENTS.items():
        if task in SERVED:
            torch.testing.assert_close(mixed[task], logits[task][segment.start : segment.stop], rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapters").exists()
    peft = PeftModel.from_pretrained(make_backbone(name), tmp_path / "shared_adapter").eval()
    expected = peft(**batch, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(hidden_of(model, "names", batch), expected, rtol=1e-6, atol=1e-6)
    hard = model.to_scheme("hard")
    for task, values in hard(**batch).logits.items():
        torch.testing.assert_close(values, logits[task], rtol=1e-4, atol=1e-5)


def test_a_shared_adapter_alone_gets_the_gradients_of_all_tasks():
    model, batch = make_model(rank=0).train(), make_batch()
    shared = [id(parameter) for parameter in model.shared_parameters()]
    assert shared == [id(parameter) for parameter in model.shared_adapter.parameters()]
    model(**batch, segments=SEGMENTS, labels=make_labels(SEGMENTS)).loss.backward()
    together = gradients(model)
    model.zero_grad()
    total = sum(segment.rows for segment in SEGMENTS.values())
    for task, segment in SEGMENTS.items():
        own = {task: Segment(0, segment.rows, segment.length)}
        weight = segment.rows / total * next(one.weight for one in model.tasks if one.name == task)
        labels = {task: make_labels(SEGMENTS)[task]}
        model(**rows_of(batch, segment), segments=own, labels=labels, loss_weights={task: weight}).loss.backward()
    assert_close(gradients(model), together)


# ---- merging ----


@shared_ranks
@backbones
def test_a_merged_backbone_gives_what_the_tasks_head_gets(name, shared_rank):
    model, batch = make_model(name, shared_rank=shared_rank).train(), make_batch()
    model.activation_checkpointing_enable()
    before = copy.deepcopy(model.state_dict())
    merged = model.merge_task("names")
    assert type(merged) is type(model.backbone) and not merged.training and not merged.is_activation_checkpointing
    assert list(merged.state_dict()) == list(model.backbone.state_dict())
    assert not any(isinstance(h, LowRankHook) for m in merged.modules() for h in m._forward_hooks.values())
    model.eval()
    expected = hidden_of(model, "names", batch)
    found = merged(**batch, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - hidden_of(model, "tone", batch)).abs().max() > 1e-2
    assert_equal(dict(model.state_dict()), dict(before))
    assert_equal(dict(model.task_backbone("names").state_dict()), dict(merged.state_dict()))
    with pytest.raises(ValueError, match="task 'nobody' is not one of this model's"):
        model.merge_task("nobody")


def test_gpt2s_linear_layers_are_targets_too(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=4, n_positions=66, pad_token_id=PAD_ID)
    backbone = GPT2Model(config).eval()
    model, batch = make_model("gpt2", backbone), make_batch()
    assert model.config.target_modules == ["c_attn"]
    model.save_pretrained(tmp_path)
    assert model.adapter_config("shared_adapter").fan_in_fan_out
    peft = PeftModel.from_pretrained(backbone, tmp_path / "adapters/tone", "tone").eval()
    peft.load_adapter(tmp_path / "shared_adapter", "shared")
    peft.base_model.set_adapter(["tone", "shared"])
    found = hidden_of(model, "tone", batch)
    torch.testing.assert_close(found, peft(**batch).last_hidden_state, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.merge_task("tone")(**batch).last_hidden_state, found, rtol=1e-5, atol=1e-5)


# ---- training in practice ----


@pytest.mark.parametrize("lengths", [(9, 9, 9, 9, 9, 9), (60, 60, 6, 6, 3, 3)], ids=["one pass", "several"])
@backbones
def test_activation_checkpointing_changes_no_gradient(name, lengths):
    model, batch = make_model(name).train(), make_batch(lengths=lengths)
    segments = {
        "names": Segment(2, 4, lengths[2]),
        "tone": Segment(0, 2, lengths[0]),
        "helper": Segment(4, 6, lengths[4]),
    }
    labels = make_labels(segments)
    calls = count_calls(model)
    layers = []
    target = model.backbone.get_submodule(next(iter(model.adapter_tensors()["adapters/tone"].values()))[17:-14])
    target.register_forward_hook(lambda *_: layers.append(1))

    def step() -> dict[str, Tensor]:
        model.zero_grad()
        layers.clear()
        model(**batch, segments=segments, labels=labels).loss.backward()
        return gradients(model)

    expected, once = step(), len(layers)
    assert len(calls) == (1 if lengths[0] == 9 else 2)
    model.activation_checkpointing_enable()
    assert_close(step(), expected, 1e-6)
    assert len(layers) == 2 * once


def test_dropout_falls_on_the_low_rank_path_and_only_in_training():
    model, batch = make_model(lora_dropout=0.5), make_batch()
    kept = {"segments": SEGMENTS, "output_hidden_states": True}
    assert torch.equal(model(**batch, **kept).hidden_states[-1], make_model()(**batch, **kept).hidden_states[-1])
    model.train()
    one, other = (model(**batch, **kept).hidden_states[-1] for _ in range(2))
    assert not torch.equal(one, other)
    with torch.no_grad():
        for pair in model.adapters["tone"].values():
            pair.lora_B.zero_()
        for pair in model.shared_adapter.values():
            pair.lora_B.zero_()
    one, other = (model(**batch, **kept).hidden_states[-1] for _ in range(2))
    assert torch.equal(one[:2], other[:2]) and not torch.equal(one[2:], other[2:])
    # What is kept is scaled up, so that the mean stays.
    layer = model.backbone.encoder.layer[0].attention.self.query
    from hf_multitask.models.rows import RowTasks

    hidden = torch.randn(1, 1, 32).expand(20000, 1, 32)
    with torch.no_grad(), model.rows.use(RowTasks((("names", 0, 20000),))):
        mean = (layer.train()(hidden) - torch.nn.functional.linear(hidden, layer.weight, layer.bias)).mean(0)
        exact = layer.eval()(hidden[:1])[0] - torch.nn.functional.linear(hidden[0], layer.weight, layer.bias)
    torch.testing.assert_close(mean, exact, rtol=0.05, atol=0.02)


@backbones
def test_a_bfloat16_backbone_has_bfloat16_adapters(tmp_path, name):
    backbone = make_backbone(name)
    backbone.to(torch.bfloat16).save_pretrained(tmp_path / "backbone")
    kwargs = {"backbone_kwargs": {"dtype": torch.bfloat16}}
    model = make_model(name, str(tmp_path / "backbone"), **kwargs).train()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    batch, labels = make_batch(), make_labels(SEGMENTS)
    found = model(**batch, segments=SEGMENTS, labels=labels)
    found.loss.backward()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())
    model.eval().save_pretrained(tmp_path / "model")
    loaded = AdapterModel.from_pretrained(tmp_path / "model")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert_equal(loaded(**batch, segments=SEGMENTS).logits, model(**batch, segments=SEGMENTS).logits)
    exact = copy.deepcopy(model).float()(**batch, segments=SEGMENTS).logits
    assert_close({k: v.float() for k, v in found.logits.items()}, exact, 0.1)
    # Adapters in float32 on a backbone in bfloat16.
    model.adapters.float(), model.shared_adapter.float(), model.train().zero_grad()
    wide = model(**batch, segments=SEGMENTS, labels=labels)
    wide.loss.backward()
    assert {p.grad.dtype for p in model.adapters.parameters() if p.grad is not None} == {torch.float32}
    assert_close({k: v.float() for k, v in wide.logits.items()}, exact, 0.1)


@mixtures
def test_autocast_trains_float32_adapters(segments):
    model, batch, labels = make_model().train(), make_batch(), make_labels(segments)
    model(**batch, segments=segments, labels=labels).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch, segments=segments, labels=labels).loss
    loss.backward()
    found = gradients(model)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    for key, value in expected.items():
        assert (found[key] - value).norm() <= 0.05 * value.norm() + 1e-4, key


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_copy_has_adapters_of_its_own(checkpointing):
    model, batch = make_model().train(), make_batch()
    if checkpointing:
        model.activation_checkpointing_enable()
    labels = make_labels(SEGMENTS)
    model(**batch, segments=SEGMENTS, labels=labels).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    copied = copy.deepcopy(model)
    copied(**batch, segments=SEGMENTS, labels=labels).loss.backward()
    assert not gradients(model)
    assert_close(gradients(copied), expected, 1e-6)
    before = {task: logits.detach() for task, logits in model(**batch).logits.items()}
    with torch.no_grad():
        for parameter in [*copied.adapters.parameters(), *copied.shared_adapter.parameters()]:
            parameter.zero_()
    assert_equal(model(**batch).logits, before)
    plain = make_backbone("bert")(**batch, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(hidden_of(copied, "tone", batch), plain)


def test_a_task_without_rows_takes_part_with_a_gradient_of_zero():
    model, batch, labels = make_model().train(), make_batch(), make_labels(SEGMENTS)
    model(**batch, segments=SEGMENTS, labels=labels, run_every_head=True).loss.backward()
    absent = list(model.task_parameters("a-traits"))
    assert absent and all(parameter.grad is not None and (parameter.grad == 0).all() for parameter in absent)


# ---- bad input ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 1.5}, "^rank must be a whole number, 0 for a shared adapter alone .* got 1.5"),
        ({"rank": -1}, "^rank must be a whole number, 0 for a shared adapter alone .* got -1"),
        ({"rank": 0}, "rank=0 and shared_rank=0 leave no adapter"),
        ({"rank": 0, "shared_rank": 2, "lora_alpha": 3}, "lora_alpha=3 is for the tasks' own adapters"),
        ({"shared_rank": -1}, "shared_rank must be a whole number, 0 for no shared adapter .* got -1"),
        ({"lora_dropout": 1.0}, r"lora_dropout must lie in \[0, 1\), got 1.0"),
        ({"lora_alpha": 0}, "lora_alpha must be above 0, got 0"),
        ({"shared_alpha": -2.0}, "shared_alpha must be above 0, got -2.0"),
        ({"target_modules": []}, "target_modules is empty"),
        (
            {"target_modules": ["query", "vallue"]},
            "no layer of BertModel is named 'vallue'; its linear layers are named dense, key, query, value",
        ),
        ({"target_modules": ["uery"]}, "no layer of BertModel is named 'uery'"),
        ({"target_modules": ["word_embeddings"]}, "'embeddings.word_embeddings' is a Embedding; only linear layers"),
        ({"target_modules": ["LayerNorm", "query"]}, "is a LayerNorm; only linear layers"),
        ({"alpha": 8}, "AdapterModel has no option 'alpha'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AdapterModel.from_backbone(make_backbone("bert"), TASKS, **options)


@pytest.mark.parametrize("name", TARGETS)
def test_a_family_without_default_targets_asks_for_them(name):
    with pytest.raises(ValueError, match=f"by default for a backbone of type '{name}'; give target_modules"):
        AdapterModel.from_backbone(make_backbone(name), TASKS)


@pytest.mark.parametrize("targets", [r".*layer\.1\..*(query|key)", ["1.attention.self.query", "1.attention.self.key"]])
def test_targets_are_found_by_expression_or_by_the_ends_of_names(tmp_path, targets):
    model, batch = make_model(target_modules=targets), make_batch()
    assert list(model.adapters["tone"]) == [f"encoder/layer/1/attention/self/{part}" for part in ("query", "key")]
    model.save_pretrained(tmp_path)
    peft = PeftModel.from_pretrained(make_backbone("bert"), tmp_path / "adapters/tone", "tone").eval()
    peft.load_adapter(tmp_path / "shared_adapter", "shared")
    peft.base_model.set_adapter(["tone", "shared"])
    expected = peft(**batch).last_hidden_state
    torch.testing.assert_close(hidden_of(model, "tone", batch), expected, rtol=1e-6, atol=1e-6)


def test_a_configuration_is_saved_and_loaded_with_its_options(tmp_path):
    config = make_model(rank=2, lora_alpha=2.5, lora_dropout=0.25).config
    config.save_pretrained(tmp_path)
    loaded = AdapterConfig.from_pretrained(tmp_path)
    for option in ("rank", "shared_rank", "lora_alpha", "shared_alpha", "lora_dropout", "target_modules"):
        assert getattr(loaded, option) == getattr(config, option)
