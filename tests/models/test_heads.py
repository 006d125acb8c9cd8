"""Heads: sums of item losses per row, as torch computes them one by one; pooling over real tokens only."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_multitask import Task, TaskType
from hf_multitask.models.all_heads import HEADS, make_head
from hf_multitask.models.heads import pool

ROWS, LENGTH, WIDTH, CLASSES = 7, 5, 16, 3
LABELS = ("a", "b", "c")
# Those over the vocabulary are the backbone's own, and tested elsewhere.
TYPES = [task_type for task_type in TaskType if not task_type.is_language]
NAMELESS = (TaskType.QUESTION_ANSWERING, TaskType.MULTIPLE_CHOICE)


def make(task_type: TaskType, **changes):
    labels = None if task_type in NAMELESS else LABELS
    return make_head(Task("task", task_type, labels=labels, **changes), WIDTH, "mean", 0.1)


def batch(task_type: TaskType, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return logits and labels; where a type allows it, some labels are -100."""
    draw = torch.Generator().manual_seed(seed)
    if task_type is TaskType.TOKEN_CLASSIFICATION:
        labels = torch.randint(0, CLASSES, (ROWS, LENGTH), generator=draw)
        labels[torch.rand(ROWS, LENGTH, generator=draw) < 0.4] = -100
        labels[3] = -100
        return torch.randn(ROWS, LENGTH, CLASSES, generator=draw) * 3, labels
    if task_type is TaskType.QUESTION_ANSWERING:
        return torch.randn(ROWS, LENGTH, 2, generator=draw) * 3, torch.randint(0, LENGTH, (ROWS, 2), generator=draw)
    logits = torch.randn(ROWS, CLASSES, generator=draw) * 3
    if task_type is TaskType.MULTIPLE_CHOICE:
        return logits, torch.randint(0, CLASSES, (ROWS,), generator=draw)
    if task_type is TaskType.SINGLE_LABEL_CLASSIFICATION:
        return logits, torch.tensor([0, 2, -100, 1, 1, -100, 0])
    if task_type is TaskType.MULTI_LABEL_CLASSIFICATION:
        return logits, (torch.rand(ROWS, CLASSES, generator=draw) < 0.5).float()
    return logits, torch.randn(ROWS, CLASSES, generator=draw)


def item_losses(task_type: TaskType, logits: Tensor, labels: Tensor) -> list[float]:
    """Return the losses of the items of one row."""
    if task_type is TaskType.REGRESSION:
        return [((logits - labels) ** 2).mean().item()]
    if task_type is TaskType.MULTI_LABEL_CLASSIFICATION:
        p = torch.sigmoid(logits.double())
        return [-(labels * p.log() + (1 - labels) * (1 - p).log()).mean().item()]
    if task_type is TaskType.QUESTION_ANSWERING:
        places = zip(logits.double().T, labels, strict=True)
        return [sum(-F.log_softmax(own, -1)[place].item() for own, place in places) / 2]
    pairs = zip(logits.reshape(-1, CLASSES), labels.reshape(-1), strict=True)
    return [-F.log_softmax(own.double(), -1)[label].item() for own, label in pairs if label != -100]


def test_every_type_has_a_head():
    assert set(HEADS) == set(TaskType)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("task_type", TYPES)
def test_row_losses_are_sums_of_item_losses(task_type, seed):
    head, (logits, labels) = make(task_type), batch(task_type, seed)
    expected = [item_losses(task_type, *row) for row in zip(logits, labels, strict=True)]
    found = head.row_losses(logits, labels)
    assert found.shape == (ROWS,) and found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([sum(row) for row in expected]), rtol=1e-5, atol=1e-6)
    assert head.row_items(labels).tolist() == [len(row) for row in expected]
    assert head.row_items(labels).dtype == torch.int64


def test_losses_are_torchs_means_times_their_items():
    for task_type, function in (
        (TaskType.SINGLE_LABEL_CLASSIFICATION, F.cross_entropy),
        (TaskType.MULTI_LABEL_CLASSIFICATION, F.binary_cross_entropy_with_logits),
        (TaskType.REGRESSION, F.mse_loss),
        (TaskType.TOKEN_CLASSIFICATION, lambda x, y: F.cross_entropy(x.flatten(0, 1), y.flatten())),
    ):
        head, (logits, labels) = make(task_type), batch(task_type)
        mean = head.row_losses(logits, labels).sum() / head.row_items(labels).sum()
        torch.testing.assert_close(mean, function(logits, labels))


@pytest.mark.parametrize("cuts", [[7], [3, 4], [1, 1, 5], [1] * 7])
@pytest.mark.parametrize("task_type", TYPES)
def test_parts_of_a_batch_add_up_to_the_whole(task_type, cuts):
    head, (logits, labels) = make(task_type), batch(task_type)
    parts = [
        (head.row_losses(*part), head.row_items(part[1]))
        for part in zip(logits.split(cuts), labels.split(cuts), strict=True)
    ]
    torch.testing.assert_close(torch.cat([losses for losses, _ in parts]), head.row_losses(logits, labels))
    assert sum(int(items.sum()) for _, items in parts) == int(head.row_items(labels).sum())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("task_type", [TaskType.SINGLE_LABEL_CLASSIFICATION, TaskType.TOKEN_CLASSIFICATION])
def test_ignored_labels_have_no_loss_and_no_gradient(task_type, smoothing):
    head, (logits, labels) = make(task_type, label_smoothing=smoothing), batch(task_type)
    logits.requires_grad_()
    losses = head.row_losses(logits, labels)
    ignored = (labels == -100).all(1) if labels.dim() == 2 else labels == -100
    assert ignored.any() and (losses[ignored] == 0).all() and (losses[~ignored] > 0).all()
    losses.sum().backward()
    assert (logits.grad[labels == -100] == 0).all() and (logits.grad[labels != -100] != 0).any()


@pytest.mark.parametrize("task_type", [TaskType.SINGLE_LABEL_CLASSIFICATION, TaskType.TOKEN_CLASSIFICATION])
def test_label_smoothing_is_for_training_only(task_type):
    head, (logits, labels) = make(task_type, label_smoothing=0.3), batch(task_type)
    plain = make(task_type).row_losses(logits, labels)
    assert torch.equal(head.eval().row_losses(logits, labels), plain)
    # 0.7 of the label's own loss and 0.3 of the mean loss over all labels.
    flat, gold = logits.reshape(-1, CLASSES), labels.reshape(-1)
    spread = torch.where(gold == -100, 0.0, -F.log_softmax(flat, -1).mean(-1)).view(labels.shape)
    expected = 0.7 * plain + 0.3 * (spread.sum(-1) if labels.dim() == 2 else spread)
    torch.testing.assert_close(head.train().row_losses(logits, labels), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("task_type", TYPES)
def test_losses_of_short_floats_are_computed_in_float32(task_type, dtype):
    head, (logits, labels) = make(task_type), batch(task_type)
    found = head.row_losses(logits.to(dtype), labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, head.row_losses(logits.to(dtype).float(), labels), rtol=0, atol=0)


def test_labels_of_tokens_may_stop_before_the_logits():
    head, (logits, labels) = make(TaskType.TOKEN_CLASSIFICATION), batch(TaskType.TOKEN_CLASSIFICATION)
    torch.testing.assert_close(head.row_losses(logits, labels[:, :3]), head.row_losses(logits[:, :3], labels[:, :3]))


# ---- the layers ----


@pytest.mark.parametrize("task_type", TYPES)
def test_logits_are_one_per_label_of_each_row_or_token(task_type):
    hidden = torch.randn(ROWS, LENGTH, WIDTH)
    logits = make(task_type)(hidden, torch.ones(ROWS, LENGTH, dtype=torch.long))
    shapes = {
        TaskType.TOKEN_CLASSIFICATION: (ROWS, LENGTH, CLASSES),
        TaskType.QUESTION_ANSWERING: (ROWS, LENGTH, 2),
        TaskType.MULTIPLE_CHOICE: (ROWS, 1),
    }
    assert logits.shape == shapes.get(task_type, (ROWS, CLASSES))


@pytest.mark.parametrize("task_type", TYPES)
def test_a_head_is_the_layers_that_the_task_names(task_type):
    hidden, mask = torch.randn(ROWS, LENGTH, WIDTH), torch.tensor([[1, 1, 1, 0, 0]] * ROWS)
    by_token = task_type in (TaskType.TOKEN_CLASSIFICATION, TaskType.QUESTION_ANSWERING)
    vectors = hidden if by_token else hidden[:, :3].mean(1)
    if task_type is TaskType.QUESTION_ANSWERING:
        mask = None  # what it gives at padding is no output of the layers
    linear = make(task_type, head="linear").eval()
    (layer,) = (module for module in linear.modules() if isinstance(module, nn.Linear))
    torch.testing.assert_close(linear(hidden, mask), vectors @ layer.weight.T + layer.bias)
    mlp = make(task_type, head="mlp").eval()
    one, other = (module for module in mlp.modules() if isinstance(module, nn.Linear))
    assert one.weight.shape == (WIDTH // 2, WIDTH)
    expected = F.gelu(vectors @ one.weight.T + one.bias) @ other.weight.T + other.bias
    torch.testing.assert_close(mlp(hidden, mask), expected)


@pytest.mark.parametrize(("own", "expected"), [(None, 0.1), (0.0, 0.0), (0.4, 0.4)])
def test_a_tasks_own_dropout_and_pooling_go_before_the_models(own, expected):
    head = make(TaskType.REGRESSION, head_dropout=own)
    assert [module.p for module in head.modules() if isinstance(module, nn.Dropout)] == [expected]
    assert head.pooling == "mean"
    assert make(TaskType.REGRESSION, pooling="last").pooling == "last"


# ---- pooling ----

MASKS = {
    "right padding": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]],
    "left padding": [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]],
    "both sides": [[1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 1, 0, 0]],
}


def pooled_one_by_one(hidden: Tensor, mask: list[list[int]], pooling: str) -> Tensor:
    rows = []
    for row, real in zip(hidden, mask, strict=True):
        vectors = [vector for vector, is_real in zip(row, real, strict=True) if is_real]
        rows.append({"mean": sum(vectors) / len(vectors), "first": vectors[0], "last": vectors[-1]}[pooling])
    return torch.stack(rows)


@pytest.mark.parametrize("kind", [torch.long, torch.bool, torch.float32])
@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_pooling_reads_real_tokens_only(pooling, padding, kind):
    hidden = torch.randn(3, 5, WIDTH)
    expected = pooled_one_by_one(hidden, MASKS[padding], pooling)
    mask = torch.tensor(MASKS[padding]).to(kind)
    torch.testing.assert_close(pool(hidden, mask, pooling), expected)
    noisy = torch.where(mask.bool().unsqueeze(-1), hidden, 1e3)
    torch.testing.assert_close(pool(noisy, mask, pooling), expected)


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_without_a_mask_all_tokens_are_real(pooling):
    hidden = torch.randn(3, 5, WIDTH)
    torch.testing.assert_close(pool(hidden, None, pooling), pooled_one_by_one(hidden, [[1] * 5] * 3, pooling))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_pooling_keeps_the_dtype(pooling, dtype):
    assert pool(torch.ones(2, 3, 4, dtype=dtype), torch.tensor([[1, 1, 0]] * 2), pooling).dtype == dtype


def test_a_row_without_a_real_token_gives_zeros_for_the_mean():
    assert torch.equal(pool(torch.ones(1, 3, 4), torch.zeros(1, 3, dtype=torch.long), "mean"), torch.zeros(1, 4))
    for pooling in ("first", "last"):
        assert torch.isfinite(pool(torch.ones(1, 3, 4), torch.zeros(1, 3, dtype=torch.long), pooling)).all()
