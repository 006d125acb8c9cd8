"""Hard sharing over every backbone: saved is loaded, shared is shared, and slices are read like single rows."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKBONES, PAD_ID
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
)

from hf_multitask import AutoModelForMultiTask, HardSharingConfig, HardSharingModel, Task
from hf_multitask.models.manifest import write_manifest
from hf_multitask.models.passes import Segment

# Neither in alphabetical order nor with labels in it.
TASKS = [
    Task("tone", "single_label_classification", labels=("positive", "negative", "mixed"), weight=0.5),
    Task("names", "token_classification", labels=("O", "B-place", "B-person"), weight=3.0),
    Task("strength", "regression", labels=("valence", "arousal"), head="linear", pooling="first"),
    Task("helper", "regression", auxiliary=True),
    Task("a-traits", "multi_label_classification", labels=("sad", "long", "happy"), pooling="mean"),
]
SERVED = ["tone", "names", "strength", "a-traits"]
backbones = pytest.mark.parametrize("name", BACKBONES)


def make_backbone(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return BACKBONES[name]().eval()


def make_model(name: str = "bert", tasks=TASKS, **options) -> HardSharingModel:
    """Return a model whose parameters are all random: the layers' own zeros and ones would hide what is lost."""
    model = HardSharingModel.from_backbone(make_backbone(name), tasks, **options).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def make_batch(lengths=(9, 9, 4, 6, 3), seed: int = 2) -> dict[str, Tensor]:
    """Return rows padded on the right."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 90, (len(lengths), max(lengths)), generator=draw)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    return {"input_ids": torch.where(mask.bool(), ids, PAD_ID), "attention_mask": mask}


# Rows 0 and 1 feed two tasks; then two rows and one row of a task each.
SEGMENTS = {
    "names": Segment(2, 4, 6),
    "tone": Segment(0, 2, 9),
    "helper": Segment(4, 5, 3),
    "strength": Segment(0, 2, 9),
}


def make_labels(rows: dict[str, int] | None = None, width: int = 9) -> dict[str, Tensor]:
    rows = rows or {"tone": 2, "names": 2, "strength": 2, "helper": 1}
    draw = torch.Generator().manual_seed(3)
    makers = {
        "tone": lambda n: torch.randint(0, 3, (n,), generator=draw),
        "names": lambda n: torch.randint(0, 3, (n, width), generator=draw),
        "strength": lambda n: torch.randn(n, 2, generator=draw),
        "helper": lambda n: torch.randn(n, 1, generator=draw),
        "a-traits": lambda n: torch.randint(0, 2, (n, 3), generator=draw).float(),
    }
    labels = {task: makers[task](n) for task, n in rows.items()}
    if "names" in labels:
        labels["names"][:, ::2] = -100
    return labels


def count_calls(model: HardSharingModel) -> list[int]:
    """Return a list that grows by the rows of each call of the backbone."""
    calls: list[int] = []

    def note(module, args, kwargs):
        calls.append(len(kwargs.get("input_ids", kwargs.get("inputs_embeds"))))

    model.backbone.register_forward_pre_hook(note, with_kwargs=True)
    return calls


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for task in expected:
        assert torch.equal(found[task], expected[task]), task


# ---- saving and loading ----


@pytest.mark.parametrize("loader", [HardSharingModel, AutoModelForMultiTask, AutoModel])
@backbones
def test_a_saved_model_is_loaded_bit_for_bit(tmp_path, name, loader):
    model = make_model(name)
    model.save_pretrained(tmp_path)
    loaded, info = loader.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is HardSharingModel and not loaded.training
    assert not any(info.values()), info
    assert loaded.tasks == TASKS
    assert list(loaded.heads) == [task.name for task in TASKS]
    parameters = dict(loaded.named_parameters())
    assert all(torch.equal(parameters.pop(key), value) for key, value in model.named_parameters()) and not parameters
    assert_equal(loaded(**make_batch()).logits, model(**make_batch()).logits)


@pytest.mark.parametrize("loader", [HardSharingModel, AutoModelForMultiTask, AutoModel])
def test_loaded_weights_lie_in_memory_like_trained_ones(tmp_path, loader):
    # Matrix products can differ in the last bit with the alignment of their operands.
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    model.backbone.save_pretrained(tmp_path / "backbone")
    loaded = loader.from_pretrained(tmp_path / "model")
    begun = HardSharingModel.from_backbone(str(tmp_path / "backbone"), TASKS)
    for one in (model, loaded, begun):
        assert {parameter.data_ptr() % 64 for parameter in one.parameters()} == {0}


@backbones
def test_a_saved_configuration_is_known_to_auto_config(tmp_path, name):
    make_model(name, pooling="first", head_dropout=0.25).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is HardSharingConfig
    assert config.get_tasks() == TASKS
    assert (config.pooling, config.head_dropout) == ("first", 0.25)
    backbone = make_backbone(name)
    assert type(config.backbone_config) is type(backbone.config)
    assert config.get_text_config().vocab_size == 90 and config.get_text_config().pad_token_id == PAD_ID


def test_a_model_loaded_in_a_new_process_gives_the_same_bits(tmp_path):
    model = make_model("bert")
    model.save_pretrained(tmp_path / "model")
    batch = make_batch()
    save_file(batch, tmp_path / "batch.safetensors")
    program = """
import sys
import torch
from safetensors.torch import load_file, save_file
from hf_multitask import AutoModelForMultiTask
torch.set_num_threads(int(sys.argv[2]))  # sums are cut differently by another number
model = AutoModelForMultiTask.from_pretrained(sys.argv[1] + "/model")
logits = model(**load_file(sys.argv[1] + "/batch.safetensors")).logits
save_file({k: v.detach() for k, v in logits.items()}, sys.argv[1] + "/logits.safetensors")
print(*model.heads)
"""
    command = [sys.executable, "-c", program, str(tmp_path), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [task.name for task in TASKS]
    found = load_file(tmp_path / "logits.safetensors")
    assert_equal({task: found[task] for task in SERVED}, model(**batch).logits)
    assert found.keys() == set(SERVED)


def test_a_model_saved_twice_is_the_same(tmp_path):
    make_model().save_pretrained(tmp_path / "one")
    HardSharingModel.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "other")
    one, other = (load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "other"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    one, other = (AutoConfig.from_pretrained(tmp_path / folder) for folder in ("one", "other"))
    assert one.tasks == other.tasks and one.get_text_config().hidden_size == other.get_text_config().hidden_size


@pytest.fixture
def warnings_of_transformers(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return caplog


@pytest.mark.parametrize("lost", ["heads.names.layers.1.weight", "backbone.encoder.layer.1.output.dense.bias"])
def test_a_weight_that_a_saved_model_lacks_is_reported(tmp_path, warnings_of_transformers, lost):
    make_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights[lost]
    save_file(weights, path, metadata={"format": "pt"})
    write_manifest(tmp_path)
    _, info = HardSharingModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {lost}
    assert lost in warnings_of_transformers.text


def test_a_weight_that_a_backbone_lacks_is_reported_but_a_pooler_too_much_is_not(tmp_path, warnings_of_transformers):
    make_backbone("bert").save_pretrained(tmp_path)
    HardSharingModel.from_backbone(str(tmp_path), TASKS)
    assert warnings_of_transformers.text == ""
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["encoder.layer.1.output.dense.bias"]
    save_file(weights, path, metadata={"format": "pt"})
    HardSharingModel.from_backbone(str(tmp_path), TASKS)
    assert "encoder.layer.1.output.dense.bias" in warnings_of_transformers.text
    assert "they start at random" in warnings_of_transformers.text


# ---- from a backbone ----


@backbones
def test_the_given_backbone_is_copied_exactly_and_stays_as_it_is(name):
    backbone = make_backbone(name)
    before, config = copy.deepcopy(backbone.state_dict()), copy.deepcopy(backbone.config.to_dict())
    modules = [key for key, _ in backbone.named_modules()]
    model = HardSharingModel.from_backbone(backbone, TASKS)
    copied = model.backbone.state_dict()
    assert set(before) - set(copied) <= {"pooler.dense.weight", "pooler.dense.bias"}
    assert all(torch.equal(copied[key], before[key]) for key in copied)
    model.train()
    model(**make_batch(), segments=SEGMENTS, labels=make_labels(width=6)).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert any((model.backbone.state_dict()[key] != before[key]).any() for key in copied)
    assert backbone.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert [key for key, _ in backbone.named_modules()] == modules
    assert backbone.config.to_dict() == config
    assert not backbone.training and all(parameter.grad is None for parameter in backbone.parameters())


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_the_pooler_is_dropped(tmp_path, name):
    backbone = make_backbone(name)
    assert any("pooler" in key for key in backbone.state_dict())
    backbone.save_pretrained(tmp_path)
    for source in (backbone, str(tmp_path)):
        model = HardSharingModel.from_backbone(source, TASKS)
        assert not any("pooler" in key for key in model.state_dict())
    fresh = HardSharingModel(HardSharingConfig(backbone_config=backbone.config, tasks=TASKS))
    assert not any("pooler" in key for key in fresh.state_dict())


@backbones
def test_a_folder_gives_what_the_model_in_memory_gives(tmp_path, name):
    backbone = make_backbone(name)
    backbone.save_pretrained(tmp_path)
    found, expected = (HardSharingModel.from_backbone(source, TASKS).backbone for source in (str(tmp_path), backbone))
    assert found.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in found.state_dict().items())


def test_a_model_with_a_head_gives_its_backbone():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=90, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    classifier = BertForSequenceClassification(config)
    model = HardSharingModel.from_backbone(classifier, TASKS)
    assert type(model.backbone) is BertModel
    expected = classifier.bert.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.backbone.state_dict().items())
    assert classifier.bert.pooler is not None


@backbones
def test_fresh_heads_are_small_and_random(name):
    model = HardSharingModel.from_backbone(make_backbone(name), TASKS, initializer_range=0.02)
    weights = torch.cat([p.flatten() for n, p in model.heads.named_parameters() if n.endswith("weight")])
    assert 0.018 < weights.std() < 0.022
    assert all((p == 0).all() for n, p in model.heads.named_parameters() if n.endswith("bias"))


def test_a_layer_that_was_put_into_the_backbone_keeps_its_weights():
    backbone = make_backbone("bert")
    own = torch.nn.Linear(48, 32)
    torch.nn.init.constant_(own.weight, 0.5)
    backbone.encoder.layer[0].output.dense = own
    model = HardSharingModel.from_backbone(backbone, TASKS)
    assert (model.backbone.encoder.layer[0].output.dense.weight == 0.5).all()


def test_a_backbones_dtype_is_kept():
    model = HardSharingModel.from_backbone(make_backbone("bert").to(torch.bfloat16), TASKS)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@backbones
def test_pooling_is_by_default_last_for_a_decoder_and_mean_for_an_encoder(name):
    expected = "last" if name == "llama" else "mean"
    pooling = {task: head.pooling for task, head in make_model(name).heads.items()}
    assert pooling == {"tone": expected, "names": expected, "strength": "first", "helper": expected, "a-traits": "mean"}
    assert make_model(name, pooling="first").heads["tone"].pooling == "first"


def test_an_unknown_option_is_named():
    message = r"HardSharingModel has no option 'poolin', did you mean 'pooling'\?; options are pooling, head_dropout"
    with pytest.raises(ValueError, match=message):
        HardSharingModel.from_backbone(make_backbone("bert"), TASKS, poolin="mean")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"head_dropout": 1.0}, r"head_dropout must lie in \[0, 1\), got 1.0"),
        ({"tasks": {"tone": {}}}, "tasks must be a list of tasks, got dict"),
        ({"tasks": [{"name": "x", "type": "regresion"}]}, "task 'x': type 'regresion' is not known"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        HardSharingConfig(**{"backbone_config": BertConfig(), "tasks": [task.to_dict() for task in TASKS], **config})


def test_a_model_needs_tasks():
    with pytest.raises(ValueError, match="tasks is empty"):
        HardSharingModel.from_backbone(make_backbone("bert"), [])


# ---- whose parameters are whose ----


@backbones
def test_shared_and_task_parameters_are_disjoint_and_complete(name):
    model = make_model(name)
    next(model.backbone.parameters()).requires_grad_(False)
    next(model.heads["tone"].parameters()).requires_grad_(False)
    parts = [list(model.shared_parameters()), *(list(model.task_parameters(task.name)) for task in TASKS)]
    ids = [id(parameter) for part in parts for parameter in part]
    assert len(ids) == len(set(ids)) and all(parts)
    assert set(ids) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    with pytest.raises(ValueError, match="task 'nobody' is not one of this model's: tone, names"):
        list(model.task_parameters("nobody"))


@pytest.mark.parametrize("trained", [task.name for task in TASKS])
@backbones
def test_a_step_on_one_task_leaves_the_others_heads_alone(name, trained):
    model = make_model(name).train()
    batch = make_batch()
    labels = make_labels({trained: 5})
    model(**batch, segments={trained: Segment(0, 5, 9)}, labels=labels).loss.backward()
    for task in TASKS:
        grads = [parameter.grad for parameter in model.task_parameters(task.name)]
        assert all((grad is not None and (grad != 0).any()) == (task.name == trained) for grad in grads)
        assert task.name == trained or grads == [None] * len(grads)
    assert all(parameter.grad is not None for parameter in model.shared_parameters())


# ---- forward ----


@backbones
def test_slices_are_read_like_single_rows(name):
    model, batch = make_model(name), make_batch()
    lengths = batch["attention_mask"].sum(1).tolist()
    calls = count_calls(model)
    found = model(**batch, segments=SEGMENTS).logits
    assert list(found) == list(SEGMENTS) and sum(calls) == 5
    for task, segment in SEGMENTS.items():
        for i, row in enumerate(range(segment.start, segment.stop)):
            ids = batch["input_ids"][row : row + 1, : lengths[row]]
            alone = model(input_ids=ids, segments={task: Segment(0, 1, lengths[row])}).logits[task][0]
            own = found[task][i, : lengths[row]] if task == "names" else found[task][i]
            torch.testing.assert_close(own, alone, rtol=1e-5, atol=1e-5)
            if task in SERVED:
                torch.testing.assert_close(model(input_ids=ids).logits[task][0], alone, rtol=1e-5, atol=1e-5)


@backbones
def test_trimmed_passes_are_read_like_one_padded_pass(name):
    model = make_model(name)
    batch = make_batch(lengths=(60, 60, 6, 5, 3))
    segments = {"tone": Segment(0, 2, 60), "names": Segment(2, 4, 6), "helper": Segment(4, 5, 3)}
    calls = count_calls(model)
    trimmed = model(**batch, segments=segments).logits
    assert len(calls) > 1
    calls.clear()
    padded = model(**batch, segments=segments, output_hidden_states=True).logits
    assert calls == [5]
    assert trimmed["names"].shape[1] < padded["names"].shape[1]
    for task in segments:
        length = trimmed[task].shape[1] if task == "names" else None
        torch.testing.assert_close(trimmed[task], padded[task][:, :length], rtol=1e-5, atol=1e-5)


@backbones
def test_padding_does_not_change_logits(name):
    model, batch = make_model(name), make_batch()
    wider = {
        "input_ids": F.pad(batch["input_ids"], (0, 7), value=PAD_ID),
        "attention_mask": F.pad(batch["attention_mask"], (0, 7)),
    }
    found, expected = model(**wider).logits, model(**batch).logits
    for task in SERVED:
        own = found[task][:, :9] if task == "names" else found[task]
        torch.testing.assert_close(own, expected[task], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", ["first", "mean", "last"])
def test_a_decoder_may_be_padded_on_the_left_too(pooling):
    tasks = [replace(task, pooling=pooling) for task in TASKS if task.name != "names"]
    model, batch = make_model("llama", tasks), make_batch()
    shifts = (batch["attention_mask"] == 0).sum(1).tolist()
    left = {
        key: torch.stack([row.roll(shift) for row, shift in zip(value, shifts, strict=True)])
        for key, value in batch.items()
    }
    assert not torch.equal(left["input_ids"], batch["input_ids"])
    found, expected = model(**left).logits, model(**batch).logits
    for task in expected:
        torch.testing.assert_close(found[task], expected[task], rtol=1e-5, atol=1e-5)


@backbones
def test_token_types_are_read_or_left_out_but_never_an_error(name):
    model, batch = make_model(name), make_batch()
    types = torch.zeros_like(batch["input_ids"])
    assert_equal(model(**batch, token_type_ids=types).logits, model(**batch).logits)
    if name in ("bert", "electra"):
        types[:, 4:] = 1
        assert (model(**batch, token_type_ids=types).logits["tone"] != model(**batch).logits["tone"]).any()


@backbones
def test_serving_computes_all_tasks_but_auxiliary_ones_in_one_pass(name):
    model, batch = make_model(name), make_batch()
    calls = count_calls(model)
    output = model(**batch)
    assert calls == [5] and list(output.logits) == SERVED
    assert (output.loss, output.task_losses, output.row_losses) == (None, None, None)
    assert {task: tuple(logits.shape) for task, logits in output.logits.items()} == {
        "tone": (5, 3),
        "names": (5, 9, 3),
        "strength": (5, 2),
        "a-traits": (5, 3),
    }


def test_an_auxiliary_task_is_computed_where_it_has_labels():
    model, batch = make_model(), make_batch()
    calls = count_calls(model)
    output = model(**batch, labels=make_labels({"helper": 5, "tone": 5}))
    assert calls == [5] and set(output.logits) == {*SERVED, "helper"}
    assert set(output.task_losses) == {"helper", "tone"}


@backbones
def test_two_tasks_on_the_same_rows_cost_one_pass(name):
    model, batch = make_model(name), make_batch(lengths=(9, 8))
    calls = count_calls(model)
    both = model(**batch, segments={"tone": Segment(0, 2, 9), "strength": Segment(0, 2, 9)}).logits
    assert calls == [2]
    for task in ("tone", "strength"):
        assert_equal({task: both[task]}, model(**batch, segments={task: Segment(0, 2, 9)}).logits)


def test_embeddings_may_come_in_place_of_ids():
    model, batch = make_model(), make_batch()
    embeds = model.get_input_embeddings()(batch["input_ids"])
    found = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
    assert_equal(found, model(**batch).logits)


def test_without_input_or_with_foreign_names_the_mistake_is_named():
    model, batch = make_model(), make_batch()
    with pytest.raises(ValueError, match="forward needs input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="task 'nobody' is not one of this model's: tone, names"):
        model(**batch, segments={"nobody": Segment(0, 5, 9)})
    with pytest.raises(ValueError, match=r"labels of \['tone'\] came without their rows; rows came for \['names'\]"):
        model(**batch, segments={"names": Segment(0, 5, 9)}, labels=make_labels({"tone": 5}))


# ---- the loss ----


def losses_by_hand(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> tuple[dict, dict]:
    """Return the summed item losses and the number of items of each task."""
    sums, items = {}, {}
    for task, gold in labels.items():
        own = logits[task]
        if task == "names":
            sums[task] = F.cross_entropy(own[:, : gold.shape[1]].flatten(0, 1), gold.flatten(), reduction="sum")
            items[task] = int((gold != -100).sum())
            continue
        items[task] = len(gold)
        if task == "tone":
            sums[task] = F.cross_entropy(own, gold, reduction="sum")
        elif task == "a-traits":
            sums[task] = F.binary_cross_entropy_with_logits(own, gold, reduction="sum") / gold.shape[1]
        else:
            sums[task] = F.mse_loss(own, gold, reduction="sum") / gold.shape[1]
    return sums, items


WEIGHTS = {"tone": 0.5, "names": 3.0, "strength": 1.0, "helper": 0.1, "a-traits": 1.0}
WINDOW = {"tone": 40, "names": 33, "strength": torch.tensor(25), "helper": 7, "a-traits": 11}


@pytest.mark.parametrize("num_items", [None, WINDOW])
@pytest.mark.parametrize("with_segments", [True, False])
def test_the_loss_is_the_sum_of_share_weight_and_mean_item_loss(with_segments, num_items):
    model, batch = make_model(), make_batch()
    if with_segments:
        rows, labels, options = (
            {"tone": 2, "names": 2, "strength": 2, "helper": 1},
            make_labels(width=6),
            {"segments": SEGMENTS},
        )
    else:
        rows, options = dict.fromkeys([*SERVED, "helper"], 5), {}
        labels = make_labels(rows)
    output = model(**batch, labels=labels, num_items=num_items, **options)
    sums, items = losses_by_hand(output.logits, labels)
    total = 0.0
    for task in labels:
        mean = sums[task] / (num_items or items)[task]
        torch.testing.assert_close(output.task_losses[task], mean)
        torch.testing.assert_close(output.row_losses[task].sum(), sums[task])
        assert output.row_losses[task].shape == (rows[task],)
        total = total + rows[task] / sum(rows.values()) * WEIGHTS[task] * mean
    torch.testing.assert_close(output.loss, total)
    assert set(output.task_losses) == set(labels)


def test_a_task_without_a_labelled_item_has_a_loss_of_0():
    model, batch = make_model(), make_batch()
    labels = {"names": torch.full((5, 9), -100), "tone": make_labels({"tone": 5})["tone"]}
    output = model(**batch, labels=labels)
    assert output.task_losses["names"] == 0
    torch.testing.assert_close(output.loss, 0.25 * output.task_losses["tone"])
    output.loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)
    zero = model(**batch, labels=labels, num_items={"names": 0, "tone": 5})
    torch.testing.assert_close(zero.loss, output.loss)


def test_a_weight_of_0_takes_a_task_out_of_the_loss():
    tasks = [replace(task, weight=0) if task.name == "names" else task for task in TASKS]
    model, batch = make_model(tasks=tasks), make_batch()
    labels = make_labels({"names": 5, "tone": 5})
    output = model(**batch, labels=labels)
    assert output.task_losses["names"] > 0
    torch.testing.assert_close(output.loss, 0.5 * 0.5 * output.task_losses["tone"])


# ---- Hugging Face's contracts ----


@backbones
def test_hidden_states_are_the_backbones_own(name):
    model, batch = make_model(name), make_batch()
    output = model(**batch, output_hidden_states=True)
    expected = model.backbone(**batch, output_hidden_states=True).hidden_states
    assert len(output.hidden_states) == len(expected) == 3
    assert all(torch.equal(one, other) for one, other in zip(output.hidden_states, expected, strict=True))
    assert model(**batch).hidden_states is None
    calls = count_calls(model)
    assert model(**batch, segments=SEGMENTS, output_hidden_states=True).hidden_states[-1].shape[:2] == (5, 9)
    assert calls == [5]


def test_attentions_come_from_an_attention_that_computes_them():
    model = make_model()
    model.set_attn_implementation("eager")
    attentions = model(**make_batch(), output_attentions=True).attentions
    assert [tuple(layer.shape) for layer in attentions] == [(5, 4, 9, 9)] * 2


def test_a_tuple_holds_what_the_output_holds():
    model, batch = make_model(), make_batch()
    labels = make_labels({"tone": 5})
    output = model(**batch, labels=labels)
    loss, task_losses, logits, row_losses = model(**batch, labels=labels, return_dict=False)
    assert torch.equal(loss, output.loss)
    for found, expected in (
        (task_losses, output.task_losses),
        (logits, output.logits),
        (row_losses, output.row_losses),
    ):
        assert_equal(found, expected)
    (logits,) = model(**batch, return_dict=False)
    assert_equal(logits, output.logits)
    model.config.return_dict = False
    assert isinstance(model(**batch), tuple)


@backbones
def test_gradient_checkpointing_computes_layers_twice_and_changes_no_gradient(name):
    model, batch = make_model(name).train(), make_batch()
    calls = []
    for module in model.backbone.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda *_: calls.append(1))

    def gradients():
        torch.manual_seed(5)
        calls.clear()
        model.zero_grad()
        model(**batch, labels=make_labels({"tone": 5, "names": 5})).loss.backward()
        return len(calls), {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    once, expected = gradients()
    model.activation_checkpointing_enable()
    again, found = gradients()
    assert again > 1.5 * once
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-7)


@backbones
def test_input_embeddings_are_the_backbones(name):
    model = make_model(name)
    embeddings = model.get_input_embeddings()
    assert embeddings is model.backbone.get_input_embeddings() and embeddings.weight.shape[0] == 90
    other = torch.nn.Embedding(95, embeddings.weight.shape[1])
    model.set_input_embeddings(other)
    assert model.get_input_embeddings() is other and model.backbone.get_input_embeddings() is other


@pytest.mark.parametrize("part", ["the model", "its backbone"])
@backbones
def test_resized_embeddings_are_saved_and_loaded(tmp_path, name, part):
    model = make_model(name)
    (model if part == "the model" else model.backbone).resize_token_embeddings(95)
    model.eval().save_pretrained(tmp_path)
    loaded = HardSharingModel.from_pretrained(tmp_path)
    assert loaded.get_input_embeddings().weight.shape[0] == loaded.config.get_text_config().vocab_size == 95
    batch = make_batch()
    batch["input_ids"][0, 0] = 94
    assert_equal(loaded(**batch).logits, model(**batch).logits)


def test_a_fresh_model_is_ready_to_be_used_like_a_loaded_one(bert, tasks):
    model = HardSharingModel.from_backbone(bert.eval(), tasks)
    assert not any(module.training for module in model.modules())
    with pytest.raises(ValueError, match="segments is empty"):
        model(input_ids=torch.tensor([[1, 2]]), segments={})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mean_over_many_tokens_is_exact_in_half_precision(dtype):
    from hf_multitask.models.heads import pool

    hidden = torch.ones(1, 1001, 4, dtype=dtype)
    mask = torch.ones(1, 1001, dtype=torch.long)
    assert torch.equal(pool(hidden, mask, "mean"), torch.ones(1, 4, dtype=dtype))
