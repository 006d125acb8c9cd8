"""Gradient conflicts: what is there by construction is found, and the measurement leaves no trace."""

from __future__ import annotations

import builtins
import json
import random
import weakref

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import BertConfig, BertModel

from hf_multitask import HardSharingModel, MultiTaskTrainer, Task, gradient_conflicts
from hf_multitask.analysis import conflict
from hf_multitask.analysis.conflict import group_by_layer
from hf_multitask.analysis.conflict_result import GradientConflicts
from hf_multitask.analysis.gradient_sketch import GradientSketch
from hf_multitask.analysis.head_warmup import cache_features, fit_head
from hf_multitask.analysis.rows import draw_batches, without_first
from hf_multitask.balancing.gramian import TaskGradients
from hf_multitask.models.heads import IGNORE_INDEX

SMALL = dict(batches=3, batch_size=8, head_warmup_steps=5, head_warmup_rows=16)


@pytest.fixture(scope="session")
def rows(datasets) -> dict[str, Dataset]:
    """Enough rows for all batches, with a target that is the opposite of another."""
    reviews = datasets["reviews"].to_list() * 4
    coin = random.Random(1)
    reviews = [row | {"negated": -row["strength"], "a": coin.randint(0, 1), "b": coin.randint(0, 1)} for row in reviews]
    return {"reviews": Dataset.from_list(reviews), "traits": datasets["traits"], "names": datasets["names"]}


def regression(name: str, column: str) -> Task:
    return Task(name, "regression", dataset="reviews", label_column=column)


def coin(name: str, column: str) -> Task:
    return Task(name, "single_label_classification", ("h", "t"), dataset="reviews", label_column=column)


@pytest.fixture
def pairs_model(bert) -> HardSharingModel:
    """Copies of a task and its opposite, each with a head of its own or with one and the same."""
    torch.manual_seed(1)
    model = HardSharingModel.from_backbone(
        bert,
        [
            regression("task", "strength"),
            regression("copy", "strength"),
            regression("opposite", "negated"),
            regression("fixed", "strength"),
            regression("fixed_copy", "strength"),
            regression("fixed_opposite", "negated"),
        ],
    )
    for name in ("fixed", "fixed_copy", "fixed_opposite"):
        model.heads[name].load_state_dict(model.heads["fixed"].state_dict())
        model.heads[name].requires_grad_(False)
    return model


def measure(model, datasets, tokenizer, **options) -> GradientConflicts:
    names = {task.dataset for task in model.tasks}
    chosen = {name: part for name, part in datasets.items() if name in names}
    return gradient_conflicts(model, chosen, tokenizer, **{**SMALL, **options})


# What is there by construction


@pytest.mark.parametrize("steps", [0, 100])
def test_equal_heads_conflict_with_opposite_targets_and_agree_with_equal_ones(pairs_model, rows, tokenizer, steps):
    found = measure(pairs_model, rows, tokenizer, head_warmup_steps=steps)
    against = found.pair("fixed", "fixed_opposite")
    assert against.cosine < -0.9 and against.high < -0.9 and against.verdict == "negative" and against.certain
    same = found.pair("fixed", "fixed_copy")
    assert same.cosine > 0.99 and same.verdict == "positive" and same.certain


def test_fitted_heads_show_what_fresh_ones_hide(pairs_model, rows, tokenizer):
    fresh = measure(pairs_model, rows, tokenizer, head_warmup_steps=0)
    fitted = measure(pairs_model, rows, tokenizer, head_warmup_steps=300, head_warmup_rows=64)
    assert fresh.pair("task", "copy").cosine < 0.6
    # With a head of its own, a task of opposite labels is the same task.
    for other in ("copy", "opposite"):
        pair = fitted.pair("task", other)
        assert pair.cosine > 0.8 and pair.verdict == "positive" and pair.certain


def gradient_by_hand(model, datasets, tokenizer, task, index) -> dict[str, torch.Tensor]:
    """One row at a time, in plain PyTorch."""
    total: torch.Tensor = 0.0  # type: ignore[assignment]
    for i in index.tolist():
        row = datasets[task.dataset][i]
        encoded = tokenizer(row[task.text_columns[0]], return_tensors="pt")
        hidden = model.backbone(encoded["input_ids"], attention_mask=encoded["attention_mask"]).last_hidden_state
        logit = model.heads[task.name].layers(hidden.mean(1))
        if task.type == "regression":
            total = total + (logit[0, 0] - row[task.label_column]) ** 2
        else:
            target = torch.tensor([task.labels.index(row[task.label_column])])
            total = total + torch.nn.functional.cross_entropy(logit, target)
    names, parameters = zip(*model.backbone.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(total / len(index), parameters), strict=True))


def test_cosines_norms_layers_and_intervals_are_those_computed_by_hand(bert, rows, tokenizer, monkeypatch):
    torch.manual_seed(3)
    model = HardSharingModel.from_backbone(
        bert,
        [
            Task("tone", "single_label_classification", ("negative", "positive"), dataset="reviews"),
            regression("strength", "strength"),
        ],
    )
    drawn: list[np.ndarray] = []
    real = draw_batches

    def spy(*arguments):
        for index in real(*arguments):
            drawn.append(index)
            yield index

    monkeypatch.setattr(conflict, "draw_batches", spy)
    found = measure(model, rows, tokenizer, head_warmup_steps=0, confidence=0.9)
    assert len(drawn) == 3 and all(len(index) == 8 for index in drawn)
    assert len(set(np.concatenate(drawn).tolist())) == 24

    model.eval()
    grads = [[gradient_by_hand(model, rows, tokenizer, task, index) for task in model.tasks] for index in drawn]
    flat = [[torch.cat([g.flatten() for g in one.values()]) for one in batch] for batch in grads]
    cosines = [torch.cosine_similarity(a, b, dim=0).item() for a, b in flat]
    assert found.cosines[0, 1] == pytest.approx(np.mean(cosines), abs=1e-4)
    half = 2.919986 * np.std(cosines, ddof=1) / 3**0.5  # Student's t with 2 degrees of freedom, both tails 10 %
    assert found.high[0, 1] - found.low[0, 1] == pytest.approx(2 * half, abs=1e-4)
    assert found.norms == pytest.approx([np.mean([batch[t].norm().item() for batch in flat]) for t in (0, 1)], 1e-4)
    for t in (0, 1):
        own = [torch.cosine_similarity(flat[i][t], flat[j][t], dim=0).item() for i, j in [(0, 1), (0, 2), (1, 2)]]
        assert found.reproducibility[t] == pytest.approx(np.mean(own), abs=0.03)  # from sketches

    assert set(found.layers) == {"embeddings", "layer.0", "layer.1"}
    for layer in found.layers:
        by_layer = []
        for a, b in grads:
            part = [torch.cat([g.flatten() for name, g in one.items() if layer in name]) for one in (a, b)]
            by_layer.append(torch.cosine_similarity(*part, dim=0).item())
        assert found.layers[layer][0, 1] == pytest.approx(np.mean(by_layer), abs=1e-4)


def test_every_type_of_task_is_measured_and_the_result_is_a_function_of_the_seed(model, datasets, tokenizer):
    found = measure(model, datasets, tokenizer)
    again = measure(model, datasets, tokenizer)
    other = measure(model, datasets, tokenizer, seed=1)
    assert found.tasks == ("tone", "strength", "traits", "names")
    assert (found.norms > 0).all() and (found.losses > 0).all() and np.isfinite(found.cosines).all()
    assert found.to_dict() == again.to_dict()
    assert not np.array_equal(found.cosines, other.cosines)
    for matrix in (found.cosines, found.low, found.high, *found.layers.values()):
        assert np.allclose(matrix, matrix.T) and (np.diag(matrix) == 1).all()
    assert (found.low <= found.cosines).all() and (found.cosines <= found.high).all()


def test_the_gradients_of_one_batch_are_held_at_a_time(model, datasets, tokenizer, monkeypatch):
    alive: weakref.WeakSet = weakref.WeakSet()
    most = 0

    class Counted(TaskGradients):
        def __init__(self, *arguments):
            nonlocal most
            super().__init__(*arguments)
            alive.add(self)
            most = max(most, len(alive))

    monkeypatch.setattr(conflict, "TaskGradients", Counted)
    found = measure(model, datasets, tokenizer)
    assert most == len(found.layers) == 3 and not alive


def test_datasets_may_be_split_streamed_tokenized_or_prepared(model, datasets, tokenizer, make_trainer):
    expected = measure(model, datasets, tokenizer)
    assert measure(model, DatasetDict(datasets), tokenizer).to_dict() == expected.to_dict()
    streams = {name: part.to_iterable_dataset() for name, part in datasets.items()}
    assert measure(model, streams, tokenizer).to_dict() == expected.to_dict()
    trainer: MultiTaskTrainer = make_trainer(model)
    prepared = gradient_conflicts(trainer.model, trainer.train_dataset, tokenizer, **SMALL)
    assert prepared.to_dict() == expected.to_dict()
    tokenized = {
        "reviews": datasets["reviews"].map(lambda row: dict(tokenizer(row["text"])), remove_columns="text"),
        "traits": datasets["traits"].map(lambda row: dict(tokenizer(row["text"])), remove_columns="text"),
        "names": datasets["names"],
    }
    assert np.allclose(measure(model, tokenized, tokenizer).cosines, expected.cosines, atol=1e-5)


def test_rows_of_a_model_that_shares_no_rows_are_the_same(pairs_model, rows, tokenizer, monkeypatch):
    expected = measure(pairs_model, rows, tokenizer)
    monkeypatch.setattr(HardSharingModel, "shares_rows", False)
    assert np.allclose(measure(pairs_model, rows, tokenizer).cosines, expected.cosines, atol=1e-5)


# No trace


def state_of(model) -> dict:
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
        "contents": {
            name: None if parameter.grad is None else parameter.grad.clone()
            for name, parameter in model.named_parameters()
        },
        "trained": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "modules": dict(model.named_modules()),
        "hooks": {name: len(module._forward_pre_hooks) for name, module in model.named_modules()},
        "heads": list(model.heads),
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].copy(),
        "python": random.getstate(),
        "recording": torch.is_grad_enabled(),
    }


def check_unchanged(before: dict, after: dict) -> None:
    for name, value in before["weights"].items():
        assert torch.equal(value, after["weights"][name]), name
    for name, value in before["contents"].items():
        assert after["gradients"][name] is before["gradients"][name], name
        assert value is None or torch.equal(value, after["contents"][name]), name
    for key in ("trained", "modes", "hooks", "heads", "python", "recording"):
        assert before[key] == after[key], key
    assert all(after["modules"][name] is module for name, module in before["modules"].items())
    assert torch.equal(before["torch"], after["torch"])
    assert np.array_equal(before["numpy"], after["numpy"])


@pytest.fixture
def used_model(model) -> HardSharingModel:
    """A model in the middle of something: some gradients, some frozen parameters, mixed modes."""
    generator = torch.Generator().manual_seed(0)
    for i, parameter in enumerate(model.parameters()):
        if i % 2:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    model.train()
    model.backbone.encoder.layer[0].eval()
    model.heads["traits"].eval()
    model.heads["names"].requires_grad_(False)
    model.backbone.embeddings.word_embeddings.requires_grad_(False)
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    return model


@pytest.mark.parametrize("recording", [True, False])
def test_the_model_and_the_random_state_are_as_before(used_model, datasets, tokenizer, recording):
    with torch.set_grad_enabled(recording):
        before = state_of(used_model)
        found = measure(used_model, datasets, tokenizer)
        check_unchanged(before, state_of(used_model))
    assert (found.norms > 0).all()


PLACES = ["fit_head", "cache_features", "GradientSketch", "TaskGradients", "_check_finite", "_backward_of_each"]


@pytest.mark.parametrize("place", PLACES)
def test_after_an_error_all_is_as_before(used_model, datasets, tokenizer, monkeypatch, place):
    def fail(*arguments, **options):
        random.random(), np.random.rand(), torch.rand(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(conflict, place, fail)
    before = state_of(used_model)
    with pytest.raises(KeyboardInterrupt):
        measure(used_model, datasets, tokenizer)
    check_unchanged(before, state_of(used_model))


@pytest.mark.parametrize("call", range(8))
def test_after_an_error_in_the_model_all_is_as_before(used_model, datasets, tokenizer, call):
    calls = 0

    def fail(module, inputs):
        nonlocal calls
        calls += 1
        if calls > 2 * call:
            raise KeyboardInterrupt

    used_model.backbone.register_forward_pre_hook(fail)
    before = state_of(used_model)
    with pytest.raises(KeyboardInterrupt):
        measure(used_model, datasets, tokenizer)
    check_unchanged(before, state_of(used_model))


def test_dropout_is_off_and_datasets_stay_as_they_are(model, datasets, tokenizer):
    before = {name: part.to_list() for name, part in datasets.items()}
    expected = measure(model.eval(), datasets, tokenizer).to_dict()
    assert measure(model.train(), datasets, tokenizer).to_dict() == expected
    assert {name: part.to_list() for name, part in datasets.items()} == before


# What is refused


def test_what_cannot_be_measured_is_refused(model, bert, datasets, tokenizer):
    reviews = {"reviews": datasets["reviews"]}
    alone = HardSharingModel.from_backbone(bert, [regression("alone", "strength")])
    with pytest.raises(ValueError, match="compares tasks, and the model has only 'alone'"):
        gradient_conflicts(alone, reviews, tokenizer)
    with pytest.raises(TypeError, match="needs a MultiTaskModel, got BertModel"):
        gradient_conflicts(bert, reviews, tokenizer)
    with pytest.raises(ValueError, match="datasets lacks the dataset"):
        gradient_conflicts(model, reviews, tokenizer)
    with pytest.raises(ValueError, match="processing_class is missing"):
        gradient_conflicts(model, datasets, None)
    model.backbone.requires_grad_(False)
    with pytest.raises(ValueError, match=r"unfreeze those .* model\.backbone\.requires_grad_\(True\)"):
        gradient_conflicts(model, datasets, tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": 1}, "batches must be a whole number of at least 2, got 1; one batch has no spread"),
        ({"batches": 2.5}, "batches must be"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        ({"head_warmup_steps": -1}, "head_warmup_steps must be"),
        ({"head_warmup_rows": 0}, "head_warmup_rows must be"),
        ({"thresholds": (0.1, -0.1)}, "thresholds must be two numbers in"),
        ({"thresholds": (0.1,)}, "thresholds must be two numbers in"),
        ({"confidence": 95}, "confidence must lie between 0 and 1, got 95"),
        ({"max_length": 10_000}, "max_length=10000 exceeds"),
    ],
)
def test_bad_arguments_are_named(model, datasets, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        measure(model, datasets, tokenizer, **options)


def test_a_gradient_that_is_not_finite_is_named(model, datasets, tokenizer):
    with torch.no_grad():
        model.heads["traits"].layers[-1].bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="the gradient of traits is not finite"):
        measure(model, datasets, tokenizer, head_warmup_steps=0)


def test_rows_of_other_tasks_are_refused(model, pairs_model, datasets, tokenizer, make_trainer):
    with pytest.raises(ValueError, match="datasets are rows of names, strength, tone, traits; the tasks are task, "):
        gradient_conflicts(pairs_model, make_trainer(model).train_dataset, tokenizer)


def test_a_task_without_gradient_is_at_right_angles_to_all(model, datasets, tokenizer):
    with torch.no_grad():
        model.heads["traits"].layers[-1].weight.zero_()
    found = measure(model, datasets, tokenizer, head_warmup_steps=0)
    assert found.norms[2] == 0 and found.reproducibility[2] == 0 and not found.cosines[2].any()


def test_too_few_rows_are_reported(model, datasets, tokenizer, monkeypatch):
    messages: list[str] = []
    monkeypatch.setattr(conflict.logger, "warning", messages.append)
    measure(model, datasets, tokenizer)
    assert [message.split(",")[0] for message in messages] == [
        "dataset 'traits' has 20 rows",
        "dataset 'names' has 11 rows",
    ]


@pytest.mark.parametrize(("wanted", "read"), [(10, 10), (10**6, 160)])
def test_heads_are_fitted_on_as_many_rows_as_asked_for(pairs_model, rows, tokenizer, monkeypatch, wanted, read):
    counts = []
    real = cache_features

    def spy(model, batches):
        batches = list(batches)
        counts.extend(len(batch["input_ids"]) for batch in batches)
        return real(model, batches)

    monkeypatch.setattr(conflict, "cache_features", spy)
    measure(pairs_model, rows, tokenizer, head_warmup_rows=wanted)
    assert sum(counts) == read and max(counts) <= SMALL["batch_size"]


# Heads on frozen features


@pytest.fixture
def collated(model, datasets, tokenizer, make_trainer):
    """A batch of each source."""
    trainer = make_trainer(model)
    return [trainer.data_collator([part[i] for i in range(6)]) for part in trainer.train_dataset.split()]


def test_cached_features_give_the_loss_of_the_whole_model(model, collated):
    model.eval()
    features = cache_features(model, collated)
    for batch in collated:
        losses = model(**batch).task_losses
        for name, loss in losses.items():
            inputs, labels = features[name]
            head = model.heads[name]
            logits = head(inputs.unsqueeze(1), None)
            again = head.row_losses(logits, labels).sum() / head.row_items(labels).sum()
            assert again.item() == pytest.approx(loss.item(), rel=1e-5), name


def test_cached_features_are_bounded(model, collated, monkeypatch):
    monkeypatch.setattr("hf_multitask.analysis.head_warmup._MOST_ITEMS", 10)
    features = cache_features(model.eval(), [*collated, *collated])
    assert {name: tuple(x.shape) for name, (x, _) in features.items()} == dict.fromkeys(model.heads, (10, 32))
    assert (features["names"][1] != IGNORE_INDEX).all() and features["names"][1].shape == (10, 1)
    assert all(x.dtype == torch.float32 and not x.requires_grad for x, _ in features.values())


def test_a_fitted_head_is_a_copy_with_a_lower_loss(model, collated):
    features = cache_features(model.eval(), collated)
    for name, (inputs, labels) in features.items():
        head = model.heads[name]
        before = {key: value.clone() for key, value in head.state_dict().items()}
        fitted = fit_head(head, (inputs, labels), 400, np.random.default_rng(0))
        loss, new = (h.row_losses(h(inputs.unsqueeze(1), None), labels).sum().item() for h in (head, fitted))
        assert new < 0.7 * loss, name
        assert all(torch.equal(value, before[key]) for key, value in head.state_dict().items())
        assert all(parameter.grad is None for parameter in (*fitted.parameters(), *head.parameters()))


def test_frozen_heads_are_not_fitted_and_halves_keep_their_dtype(model, collated):
    features = cache_features(model.eval(), collated)
    head = model.heads["tone"].requires_grad_(False)
    fitted = fit_head(head, features["tone"], 20, np.random.default_rng(0))
    assert all(torch.equal(value, fitted.state_dict()[key]) for key, value in head.state_dict().items())
    half = fit_head(model.heads["strength"].bfloat16(), features["strength"], 20, np.random.default_rng(0))
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_half_precision_is_measured(model, datasets, tokenizer):
    whole = measure(model, datasets, tokenizer, head_warmup_steps=0)
    half = measure(model.bfloat16(), datasets, tokenizer, head_warmup_steps=0)
    assert np.abs(half.cosines - whole.cosines).max() < 0.05
    assert np.isfinite(measure(model, datasets, tokenizer).cosines).all()


def test_a_head_that_reads_whole_rows_is_refused(model, datasets, tokenizer, monkeypatch):
    kind = type(model.heads["tone"])
    monkeypatch.setattr(kind, "forward", lambda self, hidden, mask: self.layers(hidden.amax(1)))
    with pytest.raises(ValueError, match="task 'tone': the features of a SingleLabelHead cannot be cached"):
        measure(model, datasets, tokenizer)


# Parts


def test_batches_are_disjoint_within_a_pass_and_warmup_rows_are_others():
    drawn = draw_batches(20, 6, np.random.default_rng(0))
    batches = [next(drawn) for _ in range(6)]
    for start in (0, 3):
        assert len(set(np.concatenate(batches[start : start + 3]).tolist())) == 18
    assert np.concatenate(batches[:3]).tolist() != sorted(np.concatenate(batches[:3]).tolist())
    assert set(batches[0].tolist()) != set(batches[3].tolist())
    assert [len(next(draw_batches(4, 6, np.random.default_rng(0)))) for _ in range(2)] == [4, 4]
    used = np.concatenate(batches[:3])
    chosen = without_first(20, used, 5, np.random.default_rng(0))
    assert set(chosen[:2].tolist()).isdisjoint(used.tolist()) and len(set(chosen.tolist())) == 5
    assert len(without_first(20, used, 50, np.random.default_rng(0))) == 20


@pytest.mark.parametrize(
    ("names", "layers"),
    [
        (["backbone.embeddings.w.weight", "backbone.encoder.layer.11.a.weight"], ["embeddings", "layer.11"]),
        (["backbone.embed_tokens.weight", "backbone.layers.0.w", "backbone.norm.weight"], "embed_tokens layers.0 norm"),
        (["backbone.encoder.layer.3.a.weight", "backbone.encoder.layer.3.b.weight"], ["layer.3", "layer.3"]),
        (["m.encoder.layer.0.w", "m.decoder.layer.0.w"], ["m.encoder.layer.0", "m.decoder.layer.0"]),
        (["backbone.base_model.model.embeddings.x.w", "backbone.base_model.model.h.0.w"], ["embeddings", "h.0"]),
        (["weight"], ["weight"]),
        (["norm.weight", "norm.bias"], ["norm", "norm"]),
    ],
)
def test_parameters_are_grouped_by_layer(names, layers):
    layers = layers.split() if isinstance(layers, str) else layers
    assert list(group_by_layer(names).values()) == layers


def test_sketches_have_the_inner_products_of_gradients():
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.empty(shape)) for shape in [(300, 400), (70,), (70,), (123, 17)]]
    sketch = GradientSketch(parameters, width=1 << 12)
    mean, short, whole = torch.randn(122_231, generator=generator), [], []
    for noise in (0.0, 1.0, 3.0):
        flat = mean + noise * torch.randn(len(mean), generator=generator)
        # Few coordinates with most of the norm, as biases have.
        flat[120_000:120_140] *= 50
        start = 0
        for parameter in parameters:
            parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        short.append(sketch())
        whole.append(flat[:start])
    for i in range(3):
        for j in range(3):
            true, near = (torch.cosine_similarity(v[i], v[j], dim=0).item() for v in (whole, short))
            assert near == pytest.approx(true, abs=0.06)
    # Without signs, what is folded onto the same places would look alike.
    for parameter in parameters[1:]:
        parameter.grad = None
    parameters[0].grad = torch.cat([torch.ones(60_000), torch.zeros(60_000)]).view_as(parameters[0])
    one = sketch()
    parameters[0].grad = 1 - parameters[0].grad
    assert abs(torch.cosine_similarity(one, sketch(), dim=0).item()) < 0.06
    parameters[0].grad = None
    assert not sketch().any()


# The result


def made_result(**changes) -> GradientConflicts:
    cosines = np.array([[1.0, 0.4, -0.3], [0.4, 1.0, 0.05], [-0.3, 0.05, 1.0]])
    half = np.array([[0, 0.1, 0.25], [0.1, 0, 0.01], [0.25, 0.01, 0]])
    values = dict(
        tasks=("a", "b", "c"),
        cosines=cosines,
        low=cosines - half,
        high=cosines + half,
        norms=np.array([1.0, 20.0, 0.003]),
        losses=np.array([0.7, 4.0, 1e-3]),
        reproducibility=np.array([0.5, 0.25, 1 / 3]),
        layers={"embeddings": cosines, "layer.0": cosines - 0.2},
        batches=4,
        settings={"confidence": 0.9},
    )
    return GradientConflicts(**{**values, **changes})


def test_verdicts_follow_the_thresholds_and_the_interval_says_how_certain_they_are():
    result = made_result()
    assert [(p.a, p.b, p.verdict, p.certain) for p in result.pairs()] == [
        ("a", "b", "positive", True),
        ("a", "c", "negative", False),
        ("b", "c", "neutral", True),
    ]
    assert result.verdict("c", "a") == "negative" and result.pair("b", "a").cosine == 0.4
    strict = made_result(thresholds=(-0.6, 0.04))
    assert [(p.verdict, p.certain) for p in strict.pairs()] == [
        ("positive", True),
        ("neutral", True),
        ("positive", False),
    ]
    with pytest.raises(ValueError, match="no task 'd'; tasks are a, b, c"):
        result.verdict("a", "d")


def test_it_prints_as_tables():
    lines = str(made_result()).splitlines()
    assert lines[0].split("  ")[0] == "task" and "90% interval" in lines[0]
    assert lines[2].split() == "a b +0.400 +0.30 to +0.50 positive layer.0 (+0.20)".split()
    assert lines[3].split() == "a c -0.300 -0.55 to -0.05 negative ? layer.0 (-0.50)".split()
    assert "? the interval crosses a threshold (-0.1 or 0.1)" in lines
    assert lines[-2].split() == ["b", "4", "20", "0.25"]
    assert "disagree" not in str(made_result())
    noisy = str(made_result(reproducibility=np.array([0.05, 0.5, -0.1]))).splitlines()
    assert noisy[-1] == "batches disagree about a, c: on different rows, neutral may just be noise"
    assert "?" not in str(made_result(low=made_result().cosines, high=made_result().cosines))


def test_it_comes_back_from_its_file(model, datasets, tokenizer, tmp_path):
    found = measure(model, datasets, tokenizer, thresholds=(-0.2, 0.3))
    found.save(tmp_path / "conflicts.json")
    again = GradientConflicts.load(tmp_path / "conflicts.json")
    assert again.to_dict() == found.to_dict() and str(again) == str(found)
    assert again.thresholds == (-0.2, 0.3) and again.settings["seed"] == 0
    written = json.loads((tmp_path / "conflicts.json").read_text())
    assert written["pairs"][0].keys() == {"a", "b", "cosine", "low", "high", "verdict", "certain"}


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_it_is_drawn(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    first, second = tmp_path / f"one.{suffix}", tmp_path / f"two.{suffix}"
    made_result().plot(first)
    made_result().plot(second)
    assert first.read_bytes() == second.read_bytes() and first.stat().st_size > 2000


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *arguments, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install hf_multitask\[plots\]"):
        made_result().plot(tmp_path / "conflicts.svg")


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_cosines_are_those_of_the_cpu(model, datasets, tokenizer):
    expected = measure(model, datasets, tokenizer)
    model.cuda()
    state = torch.cuda.get_rng_state()
    found = measure(model, datasets, tokenizer)
    assert np.abs(found.cosines - expected.cosines).max() < 0.01
    assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.slow
def test_tasks_of_random_labels_are_neutral(rows, tokenizer):
    torch.manual_seed(0)
    wider = BertModel(BertConfig(vocab_size=90, hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    model = HardSharingModel.from_backbone(wider, [coin("a", "a"), coin("b", "b")])
    found = measure(model, rows, tokenizer, batches=8, batch_size=16, head_warmup_steps=100)
    assert abs(found.pair("a", "b").cosine) < 0.3  # few rows; the real measurement is a benchmark
