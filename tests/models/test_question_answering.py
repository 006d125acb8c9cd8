"""The head of `question_answering`: places of first and last token, padding aside, as Transformers' own models have."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKBONES, PAD_ID
from transformers import AutoModelForQuestionAnswering

from hf_multitask import AutoModelForMultiTask, HardSharingModel, Task
from hf_multitask.models.passes import Segment

TASKS = [
    Task("who", "question_answering", head="native"),
    Task("where", "question_answering"),
    Task("tone", "single_label_classification", labels=("negative", "positive")),
]
LENGTHS = [7, 5, 7, 3, 6]


def make_model(backbone: str = "bert", tasks=TASKS) -> HardSharingModel:
    torch.manual_seed(0)
    model = HardSharingModel.from_backbone(BACKBONES[backbone](), tasks)
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def make_batch(length: int = 7) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    ids = torch.randint(5, 90, (5, 7))
    mask = (torch.arange(7) < torch.tensor(LENGTHS).unsqueeze(1)).long()
    batch = {"input_ids": ids.masked_fill(mask == 0, PAD_ID), "attention_mask": mask}
    padding = {"input_ids": PAD_ID, "attention_mask": 0}
    return {key: F.pad(value, (0, length - 7), value=padding[key]) for key, value in batch.items()}


LABELS = torch.tensor([[1, 6], [0, 0], [3, 3], [1, 2], [0, 5]])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_native_head_is_transformers_own(tmp_path, backbone):
    model, batch = make_model(backbone), make_batch()
    model.export_task("who", tmp_path)
    plain, info = AutoModelForQuestionAnswering.from_pretrained(tmp_path, output_loading_info=True)
    assert type(plain).__module__.startswith("transformers.")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        found = plain(**batch)
        expected = model(**batch).logits["who"]
    real = batch["attention_mask"].bool()
    difference = (torch.stack([found.start_logits, found.end_logits], -1) - expected)[real].abs().max()
    assert difference == 0.0 if backbone == "bert" else difference < 1e-6
    assert expected[real].abs().max() > 1e-2


def test_without_padding_the_loss_is_transformers_own(tmp_path):
    model = make_model().eval()
    model.export_task("who", tmp_path)
    plain = AutoModelForQuestionAnswering.from_pretrained(tmp_path)
    batch = {"input_ids": make_batch()["input_ids"][[0, 2]]}
    labels = LABELS[[0, 2]]
    expected = plain(**batch, start_positions=labels[:, 0], end_positions=labels[:, 1]).loss
    output = model(**batch, labels={"who": labels})
    torch.testing.assert_close(output.task_losses["who"], expected)
    assert output.row_losses["who"].shape == (2,)


@pytest.mark.parametrize("name", ["who", "where"])
def test_losses_are_cross_entropies_over_the_real_tokens_of_each_row(name):
    model, batch = make_model().eval(), make_batch(12)
    output = model(**batch, labels={name: LABELS})
    logits = output.logits[name]
    expected = []
    for row, length in enumerate(LENGTHS):
        ends = [F.cross_entropy(logits[row, :length, end], LABELS[row, end]).item() for end in (0, 1)]
        expected.append(sum(ends) / 2)
    torch.testing.assert_close(output.row_losses[name], torch.tensor(expected))
    assert (logits[batch["attention_mask"] == 0] == torch.finfo(torch.float32).min).all()
    assert output.task_losses[name].item() == pytest.approx(sum(expected) / 5)


@pytest.mark.parametrize("name", ["who", "where"])
def test_padding_changes_no_loss_and_gets_no_gradient(name):
    model = make_model().eval()
    runs = []
    for length in (7, 12):
        model.zero_grad()
        loss = model(**make_batch(length), labels={name: LABELS}).loss
        loss.backward()
        runs.append((loss.detach(), [p.grad.clone() for p in model.task_parameters(name)]))
    torch.testing.assert_close(runs[0][0], runs[1][0])
    for one, other in zip(runs[0][1], runs[1][1], strict=True):
        assert one.isfinite().all() and one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_floats_give_finite_losses(dtype):
    model = make_model().to(dtype)
    logits = model.heads["where"](torch.randn(5, 7, 32, dtype=dtype), make_batch()["attention_mask"])
    losses = model.heads["where"].row_losses(logits, LABELS)
    assert losses.dtype == torch.float32 and losses.isfinite().all()


def test_its_rows_go_through_passes_of_their_own_length():
    model, batch = make_model().eval(), make_batch(12)
    alone = model(**make_batch()).logits["where"]
    segments = {"where": Segment(0, 3, 7), "tone": Segment(3, 5, 6)}
    together = model(**batch, segments=segments, labels={"where": LABELS[:3], "tone": torch.tensor([0, 1])})
    torch.testing.assert_close(together.logits["where"][:, :7], alone[:3])
    assert together.loss.isfinite()


def test_saved_and_loaded_it_is_the_same(tmp_path):
    model, batch = make_model().eval(), make_batch()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMultiTask.from_pretrained(tmp_path)
    assert loaded.tasks == model.tasks
    for name, logits in model(**batch).logits.items():
        assert torch.equal(logits, loaded(**batch).logits[name])


def test_a_backbone_that_had_other_labels_has_two_outputs(tmp_path):
    backbone = BACKBONES["distilbert"]()
    backbone.config.num_labels = 5
    model = HardSharingModel.from_backbone(backbone, TASKS)
    model.export_task("who", tmp_path)
    assert AutoModelForQuestionAnswering.from_pretrained(tmp_path).config.num_labels == 2
