"""The head of `multiple_choice`: one score per choice, gathered from rows of the encoder."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKBONES, PAD_ID
from transformers import AutoModelForMultipleChoice

from hf_multitask import AutoModelForMultiTask, HardSharingModel, Task
from hf_multitask.models.passes import Segment, places_in_pass

TASKS = [
    Task("next", "multiple_choice", head="native"),
    Task("best", "multiple_choice"),
    Task("tone", "single_label_classification", labels=("negative", "positive")),
]
ENCODERS = [name for name in BACKBONES if name != "llama"]  # Transformers chooses with encoders only
# Three examples with two, three and one more of two choices, in seven rows.
ROWS = torch.tensor([[0, 1, -1], [2, 3, 4], [5, 6, -1]])
LABELS = torch.tensor([1, 2, 0])
LOWEST = torch.finfo(torch.float32).min


def make_model(backbone: str = "bert", tasks=TASKS) -> HardSharingModel:
    torch.manual_seed(0)
    model = HardSharingModel.from_backbone(BACKBONES[backbone](), tasks)
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def make_batch(length: int = 8, rows: int = 7) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    ids = torch.randint(5, 90, (rows, 8))
    mask = (torch.arange(8) < torch.tensor([8, 5, 7, 3, 6, 4, 8, 2][:rows]).unsqueeze(1)).long()
    batch = {"input_ids": ids.masked_fill(mask == 0, PAD_ID), "attention_mask": mask}
    padding = {"input_ids": PAD_ID, "attention_mask": 0}
    return {key: F.pad(value, (0, length - 8), value=padding[key]) for key, value in batch.items()}


@pytest.mark.parametrize("backbone", ENCODERS)
def test_a_native_head_is_transformers_own(tmp_path, backbone):
    model, batch = make_model(backbone), make_batch(rows=8)
    model.export_task("next", tmp_path)
    plain, info = AutoModelForMultipleChoice.from_pretrained(tmp_path, output_loading_info=True)
    assert type(plain).__module__.startswith("transformers.")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    positions = {"next": torch.arange(8).view(2, 4) * 8}
    with torch.no_grad():
        found = plain(**{key: value.view(2, 4, -1) for key, value in batch.items()}).logits
        expected = model(**batch, segments={"next": Segment(0, 8, 8)}, label_positions=positions).logits["next"]
    difference = (found - expected).abs().max()
    assert difference == 0.0 if backbone == "bert" else difference < 1e-6
    assert expected.shape == (2, 4) and expected.std() > 1e-3


def test_the_loss_is_transformers_own(tmp_path):
    model, batch = make_model().eval(), make_batch(rows=8)
    model.export_task("next", tmp_path)
    plain = AutoModelForMultipleChoice.from_pretrained(tmp_path)
    labels = torch.tensor([3, 0])
    expected = plain(**{key: value.view(2, 4, -1) for key, value in batch.items()}, labels=labels).loss
    positions = {"next": torch.arange(8).view(2, 4) * 8}
    output = model(**batch, segments={"next": Segment(0, 8, 8)}, label_positions=positions, labels={"next": labels})
    torch.testing.assert_close(output.loss, expected, rtol=0, atol=0)


def test_a_decoder_has_no_native_head_for_it():
    with pytest.raises(ValueError, match="AutoModelForMultipleChoice knows no 'llama'.*take 'mlp' or 'linear'"):
        make_model("llama")
    assert make_model("llama", TASKS[1:]).tasks == TASKS[1:]


@pytest.mark.parametrize("backbone", ["bert", "llama"])
@pytest.mark.parametrize("length", [8, 13])
def test_scores_are_those_of_the_rows_by_themselves(backbone, length):
    model, batch = make_model(backbone, TASKS[1:]).eval(), make_batch(length)
    alone = model(**batch).logits["best"]
    assert alone.shape == (7, 1)
    positions = {"best": ROWS * length}
    segments = {"best": Segment(0, 7, 8)}  # so that the pass is trimmed where the batch is longer
    output = model(**batch, segments=segments, label_positions=positions, labels={"best": LABELS})
    logits = output.logits["best"]
    assert logits.shape == (3, 3)
    for example, rows in enumerate(ROWS.tolist()):
        own = torch.stack([alone[row, 0] for row in rows if row >= 0])
        torch.testing.assert_close(logits[example, : len(own)], own, rtol=1e-4, atol=1e-6)
        assert (logits[example, len(own) :] == LOWEST).all()
        expected = F.cross_entropy(own, LABELS[example])
        torch.testing.assert_close(output.row_losses["best"][example], expected, rtol=1e-4, atol=1e-6)
    assert output.row_losses["best"].shape == (3,)
    torch.testing.assert_close(output.task_losses["best"], output.row_losses["best"].mean())


def test_places_below_none_stay_below():
    for length, cut in ((13, 8), (8, 8), (9, 1)):
        places = places_in_pass(ROWS * length, length, cut)
        assert torch.equal(torch.div(places, cut, rounding_mode="floor").clamp(min=-1), ROWS)


def test_missing_choices_get_no_gradient_and_add_no_loss():
    model = make_model().eval()
    batch, segments = make_batch(), {"best": Segment(0, 7, 8)}
    runs = []
    for more in (0, 2):
        model.zero_grad()
        positions = {"best": F.pad(ROWS, (0, more), value=-1) * 8}
        loss = model(**batch, segments=segments, label_positions=positions, labels={"best": LABELS}).loss
        loss.backward()
        runs.append((loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    assert torch.equal(runs[0][0], runs[1][0])
    for one, other in zip(runs[0][1], runs[1][1], strict=True):
        assert one.isfinite().all() and torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_floats_give_finite_losses(dtype):
    head = make_model().to(dtype).heads["best"]
    logits = head(torch.randn(7, 8, 32, dtype=dtype), make_batch()["attention_mask"], ROWS * 8)
    losses = head.row_losses(logits, LABELS)
    assert losses.dtype == torch.float32 and losses.isfinite().all() and logits.isfinite().all()


def test_served_without_positions_each_row_has_a_score_and_even_sets_a_loss():
    model, batch = make_model().eval(), make_batch(rows=8)
    scores = model(**batch).logits["best"]
    labels = torch.tensor([1, 3])
    loss = model(**batch, segments={"best": Segment(0, 8, 8)}, labels={"best": labels}).loss
    torch.testing.assert_close(loss, F.cross_entropy(scores.view(2, 4), labels))


def test_saved_and_loaded_it_is_the_same(tmp_path):
    model, batch = make_model().eval(), make_batch()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMultiTask.from_pretrained(tmp_path)
    assert loaded.tasks == model.tasks and loaded.tasks[0].choice_columns == ("choices",)
    for name, logits in model(**batch).logits.items():
        assert torch.equal(logits, loaded(**batch).logits[name])
