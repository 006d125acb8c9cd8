"""ONNX graphs compute what their models do, at sizes that they were not traced with."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import BACKBONES, PAD_ID, make_tasks, make_tokenizer
from language_models import make_plain
from test_schemes import KINDS
from typer.testing import CliRunner

from hf_multitask import HardSharingModel, Task
from hf_multitask.cli.app import app
from hf_multitask.hub import onnx as export
from hf_multitask.hub.onnx import export_onnx
from hf_multitask.models.auto import SCHEMES

onnxruntime = pytest.importorskip("onnxruntime")

FAMILIES = ("bert", "roberta", "distilbert", "electra", "modernbert")
SIZES = ((1, 1), (4, 9), (2, 33))
LAYERS = {"distilbert": "n_layers"}


def make_model(kind: str, family: str, tasks: list[Task] | None = None, layers: int = 2):
    """A model of which every part says something: with logits near 0 a wrong one would pass."""
    scheme, options = KINDS[kind]
    if scheme == "adapter" and family in ("distilbert", "modernbert"):
        names = {"distilbert": ["q_lin", "v_lin"], "modernbert": ["Wqkv"]}
        options = {**options, "target_modules": names[family]}
    torch.manual_seed(0)
    config = BACKBONES[family]().config
    setattr(config, LAYERS.get(family, "num_hidden_layers"), layers)
    if family == "modernbert":
        config.layer_types = config.layer_types[:layers]
    backbone = type(BACKBONES[family]())(config)
    model = SCHEMES[scheme].from_backbone(backbone, tasks or make_tasks(), **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def make_batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(rows)
    ids = torch.randint(5, 90, (rows, length), generator=draw)
    lengths = torch.randint(1, length + 1, (rows, 1), generator=draw)
    lengths[-1] = length
    mask = (torch.arange(length) < lengths).long()
    return {
        "input_ids": torch.where(mask.bool(), ids, PAD_ID),
        "attention_mask": mask,
        "token_type_ids": torch.cat([torch.zeros_like(ids)[:, 1:], torch.ones_like(ids)[:, :1]], dim=1),
    }


def run(path, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = {one.name: batch[one.name].numpy() for one in session.get_inputs()}
    names = [one.name for one in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(names, inputs)), strict=True))


def check(model, path, names) -> None:
    model.eval()
    for rows, length in SIZES:
        batch = make_batch(rows, length)
        found = run(path, batch)
        assert list(found) == names
        with torch.no_grad():
            logits = model(**{k: v for k, v in batch.items() if k in takes(path)}).logits
        for name in names:
            ours, theirs = logits[name], found[name]
            if ours.dim() == 3:
                real = batch["attention_mask"].bool()
                ours, theirs = ours[real], theirs[real]
            assert theirs.dtype == torch.float32 and (ours.numel() == 1 or ours.std() > 1e-3)
            torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


def takes(path) -> list[str]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [one.name for one in session.get_inputs()]


def small_tasks() -> list[Task]:
    return [
        Task("tone", "single_label_classification", labels=("negative", "positive"), pooling="first"),
        Task("names", "token_classification", labels=("O", "B-person", "B-place"), head="linear"),
    ]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model, the folder that the command wrote its graph into, and what the command said; tracing takes seconds."""
    folder = tmp_path_factory.mktemp("onnx")
    model = make_model("hard", "bert", small_tasks(), layers=1)
    model.save_pretrained(folder / "saved")
    make_tokenizer().save_pretrained(folder / "saved")
    arguments = ["export", str(folder / "saved"), str(folder / "out"), "--format", "onnx"]
    return model, folder / "out", CliRunner().invoke(app, arguments)


def test_the_command_writes_graph_and_tokenizer(exported):
    _, folder, done = exported
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(folder / "model.onnx")
    assert {"model.onnx", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    for arguments, message in (
        (["--format", "tflite"], "format 'tflite' is not known; it must be onnx"),
        (["--task", "tune"], "no task 'tune', did you mean 'tone'"),
    ):
        failed = CliRunner().invoke(app, ["export", str(folder.parent / "saved"), str(folder / "x"), *arguments])
        assert failed.exit_code == 1 and message in failed.output and "Traceback" not in failed.output
    assert not (folder / "x").exists()


def test_the_graph_computes_what_the_model_does(exported):
    model, folder, _ = exported
    check(model, folder / "model.onnx", ["tone", "names"])


def test_the_graph_says_what_it_takes_and_gives(exported):
    session = onnxruntime.InferenceSession(exported[1] / "model.onnx", providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["tasks"]) == [
        {"name": "tone", "type": "single_label_classification", "labels": ["negative", "positive"]},
        {"name": "names", "type": "token_classification", "labels": ["O", "B-person", "B-place"]},
    ]
    assert [one.name for one in session.get_inputs()] == ["input_ids", "attention_mask", "token_type_ids"]
    assert [one.shape for one in session.get_inputs()] == [["batch", "length"]] * 3
    assert [one.shape for one in session.get_outputs()] == [["batch", 2], ["batch", "length", 3]]


def test_a_graph_of_another_model_is_noticed(exported):
    model, folder, _ = exported
    module = export._Logits(model, ["tone", "names"])
    export._compare(module, folder / "model.onnx")
    with torch.no_grad():
        module.model.heads["tone"].layers[-1].bias.add_(torch.tensor([0.0, 1e-2]))
    with pytest.raises(ValueError, match="not compute what HardSharingModel does: .* of 'tone' are up to 0.01 away"):
        export._compare(module, folder / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["weights", "sizes"])
def test_a_graph_that_computes_something_else_gets_no_name(tmp_path, monkeypatch, broken):
    model = make_model("hard", "bert", small_tasks(), layers=1).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = export_onnx(model, tmp_path / "one.onnx", tasks=["tone"])
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    old = path.read_bytes()
    if broken == "weights":
        program = export._trace(export._Logits(model, ["tone"]))
        with torch.no_grad():
            model.heads["tone"].layers[-1].bias.add_(torch.tensor([0.0, 1e-2]))
        monkeypatch.setattr(export, "_trace", lambda module: program)  # of the model as it was
    else:
        forward = export._Logits.forward
        monkeypatch.setattr(
            export._Logits, "forward", lambda self, input_ids, *rest: forward(self, input_ids.view(3, -1), *rest)
        )
    with pytest.raises(ValueError, match="graph does not compute what|rows and does not take|cannot be written"):
        export_onnx(model, path, tasks=["tone"])
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["one.onnx"]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_scheme_over_every_family(kind, family, tmp_path):
    if kind == "soft, cross-stitched" and family in ("roberta", "electra"):
        pytest.skip("the same modules as BERT's")
    model = make_model(kind, family)
    with torch.no_grad():  # fresh heads tell texts hardly apart
        for parameter in model.heads.parameters():
            parameter.mul_(4)
    path = export_onnx(model, tmp_path / "one.onnx")
    check(model, path, ["tone", "strength", "traits", "names"])
    assert ("token_type_ids" in takes(path)) == (family in ("bert", "roberta", "electra"))


@pytest.mark.slow
@pytest.mark.parametrize("head", ["mlp", "native"])
def test_every_task_type_that_reads(head, tmp_path):
    first, last = ({}, {}) if head == "native" else ({"pooling": "first"}, {"pooling": "last"})
    tasks = [
        Task("tone", "single_label_classification", labels=("negative", "positive"), head=head, **first),
        Task("traits", "multi_label_classification", labels=("a", "b", "c"), head=head, **last),
        Task("who", "question_answering", head=head),
        Task("best", "multiple_choice", head=head),
        Task("words", "masked_lm"),
        Task("extra", "regression", auxiliary=True),
    ]
    torch.manual_seed(0)
    model = HardSharingModel.from_backbone(make_plain("bert"), tasks)
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.mul_(8)  # what fresh heads say is near 0, where everything agrees
    path = export_onnx(model, tmp_path / "one.onnx", tokenizer=make_tokenizer())
    check(model, path, ["tone", "traits", "who", "best", "words"])
    assert (tmp_path / "tokenizer.json").is_file()


@pytest.mark.slow
def test_half_precision_models_are_written_in_float32(tmp_path):
    model = make_model("hard", "bert", small_tasks(), layers=1).to(torch.bfloat16)
    path = export_onnx(model, tmp_path / "one.onnx")
    check(model.float(), path, ["tone", "names"])


def test_every_expert_computed_is_what_the_chosen_ones_say():
    model = make_model("mixture", "bert", small_tasks()).eval()
    batch = make_batch(3, 9)
    with torch.no_grad():
        usual = model(**batch).logits
        for module in model.modules():
            if isinstance(module, export.Experts):
                module.config._experts_implementation = export._EVERY_EXPERT
        every = model(**batch).logits
    for name, value in usual.items():
        torch.testing.assert_close(every[name], value, atol=1e-5, rtol=1e-5)


# ---- what is refused ----


def test_tasks_that_write_are_refused(tmp_path):
    tasks = [Task("tone", "regression"), Task("say", "causal_lm")]
    model = HardSharingModel.from_backbone(make_plain("llama, tied"), tasks)
    with pytest.raises(ValueError, match="task 'say' writes text token by token, .*; export the others: tone"):
        export_onnx(model, tmp_path)
    with pytest.raises(ValueError, match="task 'say' writes text token by token, .*; serve it with the pipeline"):
        export_onnx(HardSharingModel.from_backbone(make_plain("llama, tied"), tasks[1:]), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["tune"], "no task 'tune', did you mean 'tone'"),
        (["strength"], "no task 'strength'; tasks are tone, input_ids"),
        (["input_ids"], "task 'input_ids' has the name of an input of the graph; leave it out"),
    ],
)
def test_tasks_are_checked(bert, tmp_path, tasks, message):
    own = [Task("tone", "regression"), Task("strength", "regression", auxiliary=True), Task("input_ids", "regression")]
    with pytest.raises(ValueError, match=message):
        export_onnx(HardSharingModel.from_backbone(bert, own), tmp_path, tasks=tasks)


def test_what_is_no_multi_task_model_is_refused(bert, tmp_path):
    with pytest.raises(ValueError, match="BertModel is no multi-task model; load it with AutoModelForMultiTask"):
        export_onnx(bert, tmp_path)


def test_a_backbone_that_cannot_be_traced_is_named_with_the_reason(model, tmp_path):
    model.backbone.forward = lambda input_ids, **kwargs: 1 / int(input_ids.sum() > 0)
    with pytest.raises(ValueError, match="HardSharingModel over 'bert' cannot be written as an ONNX graph: "):
        export_onnx(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_names_the_extra(model, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r'onnxscript: pip install "hf_multitask\[onnx\]"'):
        export_onnx(model, tmp_path)
