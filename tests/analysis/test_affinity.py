"""Affinities are what a step does, computed by hand; and a training does not notice that they are measured."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import BACKBONES, make_datasets, make_tasks
from datasets import Dataset

from hf_multitask import HardSharingModel, MultiTaskTrainer, MultiTaskTrainingArguments, Task
from hf_multitask.analysis import lookahead
from hf_multitask.analysis.affinity import AffinityTrainer, choose_every, measured_tasks
from hf_multitask.analysis.isolation import undisturbed
from hf_multitask.analysis.lookahead import lookahead_affinity, window_cosines
from hf_multitask.data.collator import DataCollatorForMultiTask
from hf_multitask.data.dataset import prepare_sources
from hf_multitask.data.sources import make_sources
from hf_multitask.models.auto import SCHEMES
from hf_multitask.window import Window, count_window

NAMES = ("tone", "strength", "traits", "names")
SHARING = {
    "hard": ("hard", {}),
    "cross-stitched": ("soft", {"cross_stitch": True}),
    "conditioned": ("conditioned", {}),
    "adapter": ("adapter", {"rank": 3, "shared_rank": 2}),
    "mixture of experts": ("mixture_of_experts", {"num_experts": 4}),
}


def make_model(kind: str = "hard", tasks: list[Task] | None = None):
    torch.manual_seed(0)
    scheme, options = SHARING[kind]
    return SCHEMES[scheme].from_backbone(BACKBONES["bert"](), tasks or make_tasks(), **options)


def make_window(tokenizer, parts: int = 2) -> tuple[list[dict], Window]:
    """The micro-batches of one window, each of some rows of every dataset."""
    tasks = make_tasks()
    rows = prepare_sources(make_datasets(), make_sources(tasks, True), "rows", tokenizer=tokenizer, max_length=64)
    collate = DataCollatorForMultiTask(tokenizer, tasks)
    by_name: dict[str, list[int]] = {}
    for index in range(len(rows)):
        by_name.setdefault(rows.locate(index)[0], []).append(index)
    batches = [
        collate([rows[index] for own in by_name.values() for index in own[5 * part : 5 * part + 5]])
        for part in range(parts)
    ]
    return batches, count_window(batches, NAMES, torch.device("cpu"))


@pytest.fixture(scope="module")
def window(tokenizer):
    return make_window(tokenizer)


def losses_by_hand(model, batches, window) -> dict[str, torch.Tensor]:
    """Sums of the rows' losses over the items of the window."""
    total = {}
    for batch in batches:
        for name, rows in model(**batch).row_losses.items():
            total[name] = total.get(name, 0.0) + rows.sum() / window.items[name]
    return total


def gradient_by_hand(model, batches, window, name) -> list[torch.Tensor]:
    shared = list(model.shared_parameters())
    found = torch.autograd.grad(losses_by_hand(model, batches, window)[name], shared, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(shared, found, strict=True)]


def moved(model, changes) -> HardSharingModel:
    """A copy of a model whose shared parameters are moved."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, change in zip(other.shared_parameters(), changes, strict=True):
            parameter.add_(change)
    return other


def affinity_by_hand(model, batches, window, step) -> np.ndarray:
    """1 - loss after a step with each task's gradient, over the loss after one without any."""
    zeros = [torch.zeros_like(parameter) for parameter in model.shared_parameters()]
    before = losses_by_hand(moved(model, step(zeros)), batches, window)
    rows = []
    for name in NAMES:
        after = losses_by_hand(moved(model, step(gradient_by_hand(model, batches, window, name))), batches, window)
        rows.append([1 - (after[other] / before[other]).item() for other in NAMES])
    return np.array(rows)


# ---- what a step does ----


@pytest.mark.parametrize("parts", [1, 2])
def test_with_plain_gradient_descent_it_is_the_formula_of_the_paper(tokenizer, parts):
    batches, window = make_window(tokenizer, parts)
    model = make_model().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=20.0)
    with undisturbed(model):
        found = lookahead_affinity(model, optimizer, batches, window, NAMES)
    by_hand = affinity_by_hand(model, batches, window, lambda gradient: [-20.0 * g for g in gradient])
    # Without momentum and decay, "before" is where the parameters are.
    at_rest = losses_by_hand(model, batches, window)
    assert np.median(np.abs(by_hand)) > 1e-4 and (np.diagonal(by_hand) > 5e-4).all()
    assert found == pytest.approx(by_hand, abs=2e-6)
    step = moved(model, [-20.0 * g for g in gradient_by_hand(model, batches, window, "tone")])
    after = losses_by_hand(step, batches, window)["names"]
    assert found[0, 3] == pytest.approx(1 - (after / at_rest["names"]).item(), abs=2e-6)


def test_it_is_the_optimizers_own_step_and_what_momentum_and_decay_do_anyway_is_left_out(tokenizer, window):
    batches, counts = window
    model = make_model().eval()
    rates = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW(model.parameters(), **rates)
    for _ in range(3):
        sum(losses_by_hand(model, batches, counts).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = 0.02
    shared = list(model.shared_parameters())
    state = [{key: value.clone() for key, value in optimizer.state[p].items()} for p in shared]

    def step(gradient):
        changes = []
        for p, g, known in zip(shared, gradient, state, strict=True):
            count = known["step"].item() + 1
            mean = (0.9 * known["exp_avg"] + 0.1 * g) / (1 - 0.9**count)
            square = (0.99 * known["exp_avg_sq"] + 0.01 * g**2) / (1 - 0.99**count)
            changes.append((-0.02 * (mean / (square.sqrt() + 1e-8) + 0.1 * p)).detach())
        return changes

    with undisturbed(model):
        found = lookahead_affinity(model, optimizer, batches, counts, NAMES)
    assert found == pytest.approx(affinity_by_hand(model, batches, counts, step), abs=2e-6)
    # Were momentum counted, every task would seem to help: the steps of all go on.
    resting = losses_by_hand(model, batches, counts)
    carried = losses_by_hand(moved(model, step([torch.zeros_like(p) for p in shared])), batches, counts)
    assert all(carried[name] < resting[name] for name in NAMES)
    assert (found[~np.eye(4, dtype=bool)] < 0).any()


def test_the_gradient_is_clipped_as_in_training(tokenizer, window):
    batches, counts = window
    model = make_model().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=20.0)

    def step(gradient):
        norm = torch.cat([g.flatten() for g in gradient]).norm()
        return [-20.0 * g * min(1.0, 0.01 / (norm.item() + 1e-6)) for g in gradient]

    with undisturbed(model):
        clipped = lookahead_affinity(model, optimizer, batches, counts, NAMES, 0.01)
        free = lookahead_affinity(model, optimizer, batches, counts, NAMES, None)
    assert clipped == pytest.approx(affinity_by_hand(model, batches, counts, step), abs=2e-6)
    assert np.abs(clipped - free).max() > 1e-4


def test_cosines_are_those_of_the_gradients(tokenizer, window):
    batches, counts = window
    model = make_model().eval()
    with undisturbed(model):
        found = window_cosines(model, batches, counts, NAMES)
    flat = [torch.cat([g.flatten() for g in gradient_by_hand(model, batches, counts, name)]) for name in NAMES]
    by_hand = [[torch.cosine_similarity(a, b, dim=0).item() for b in flat] for a in flat]
    assert found == pytest.approx(np.array(by_hand), abs=1e-4)
    assert np.abs(found[~np.eye(4, dtype=bool)]).max() > 0.02


@pytest.mark.parametrize("measure", ["affinity", "conflict"])
def test_tasks_without_rows_are_not_a_number(tokenizer, measure):
    model = make_model().eval()
    batches, _ = make_window(tokenizer, 1)
    batch = batches[0]
    for key in ("segments", "labels", "num_items"):
        batch[key] = {name: value for name, value in batch[key].items() if name != "traits"}
    counts = count_window([batch], NAMES, torch.device("cpu"))
    with undisturbed(model):
        if measure == "conflict":
            found = window_cosines(model, [batch], counts, NAMES)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            found = lookahead_affinity(model, optimizer, [batch], counts, NAMES)
    missing = np.zeros((4, 4), dtype=bool)
    missing[2], missing[:, 2] = True, True
    assert (np.isnan(found) == missing).all()


def test_a_task_helps_its_copy_and_harms_its_opposite(tokenizer, datasets, tmp_path):
    rows = Dataset.from_list([row | {"negated": -row["strength"]} for row in datasets["reviews"]])
    tasks = [
        Task(name, "regression", dataset="reviews", label_column=column)
        for name, column in (("task", "strength"), ("copy", "strength"), ("opposite", "negated"))
    ]
    model = make_model(tasks=tasks)
    for name in ("task", "copy", "opposite"):  # with heads of their own, the opposite would turn its own around
        model.heads[name].load_state_dict(model.heads["task"].state_dict())
        model.heads[name].requires_grad_(False)
    trainer = make_affinity_trainer(tmp_path, tokenizer, {"reviews": rows}, model, max_steps=20)
    trainer.train()
    mean = trainer.series().values.mean(0)
    assert mean[0, 1] == pytest.approx(mean[0, 0], rel=1e-3) and mean[0, 1] > 0
    assert mean[0, 2] < 0 and mean[2, 0] < 0


# ---- the training does not notice ----


def make_affinity_trainer(tmp_path, tokenizer, rows, model, kind=AffinityTrainer, options=None, **arguments):
    defaults = dict(
        output_dir=str(tmp_path / "out"),
        max_steps=12,
        per_device_train_batch_size=16,
        learning_rate=2e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return kind(
        model=model,
        args=MultiTaskTrainingArguments(**{**defaults, **arguments}),
        train_dataset=rows,
        processing_class=tokenizer,
        **(options or {}),
    )


@pytest.mark.parametrize(
    ("kind", "method", "arguments"),
    [
        ("hard", "affinity", {}),
        ("hard", "conflict", {}),
        ("hard", "affinity", {"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 0.1}),
        ("hard", "affinity", {"optim": "adafactor"}),
        ("hard", "affinity", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8, "warmup_steps": 3}),
        ("hard", "affinity", {"gradient_combination": "pcgrad", "loss_weighting": "dwa"}),
        ("cross-stitched", "affinity", {}),
        ("conditioned", "affinity", {}),
        ("adapter", "conflict", {}),
        ("mixture of experts", "affinity", {}),
    ],
    ids=str,
)
@pytest.mark.sample(4)
def test_the_training_is_the_same_bit_for_bit(tmp_path, tokenizer, datasets, kind, method, arguments):
    runs = []
    for trainer_class, options in ((MultiTaskTrainer, {}), (AffinityTrainer, {"method": method, "every": 1})):
        model = make_model(kind)
        assert any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules())
        trainer = make_affinity_trainer(tmp_path, tokenizer, datasets, model, trainer_class, options, **arguments)
        trainer.train()
        logs = [{k: v for k, v in line.items() if not k.startswith("train_")} for line in trainer.state.log_history]
        states = [state for _, state in sorted(trainer.optimizer.state_dict()["state"].items())]
        runs.append((trainer.model.state_dict(), logs, states, torch.random.get_rng_state(), trainer))
    (weights, logs, states, random, _), (same, same_logs, same_states, same_random, measured) = runs
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert logs == same_logs and torch.equal(random, same_random)
    assert len(states) == len(same_states) > 0
    for one, other in zip(states, same_states, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(torch.as_tensor(one[k]), torch.as_tensor(other[k])) for k in one if one[k] is not None)
    series = measured.series()
    warm_up = 1 if "warmup_steps" in arguments else 0  # its first step goes nowhere
    assert series.tasks == NAMES and series.steps == tuple(range(warm_up, 12))
    assert series.values.shape == (12 - warm_up, 4, 4)
    off = series.values[:, ~np.eye(4, dtype=bool)]
    assert np.isfinite(off).any() and np.nanstd(off) > 0
    assert np.nanmean(series.values, 0).diagonal().min() > 0


def test_a_passing_error_leaves_everything_as_it_was(tokenizer, window, monkeypatch):
    batches, counts = window
    model = make_model().eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    sum(losses_by_hand(model, batches, counts).values()).backward()
    optimizer.step()
    weights = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    monkeypatch.setattr(lookahead, "_losses", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError), undisturbed(model):
        lookahead_affinity(model, optimizer, batches, counts, NAMES)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    for number, known in state["state"].items():
        assert all(torch.equal(known[key], value) for key, value in optimizer.state_dict()["state"][number].items())


# ---- when, and when not ----


def test_every_so_many_steps_are_measured(tmp_path, tokenizer, datasets):
    trainer = make_affinity_trainer(
        tmp_path, tokenizer, datasets, make_model(), options={"method": "conflict", "every": 3}, max_steps=31
    )
    trainer.train()
    assert trainer.series().steps == tuple(range(2, 31, 3))
    assert [choose_every(steps) for steps in (10, 99, 100, 499, 500, 100_000)] == [1, 1, 2, 9, 10, 10]
    assert choose_every(100, 7) == 7


def test_what_cannot_be_measured_is_refused_before_training(tmp_path, tokenizer, datasets):
    def make(model=None, options=None, rows=datasets, **arguments):
        return make_affinity_trainer(tmp_path, tokenizer, rows, model or make_model(), options=options, **arguments)

    with pytest.raises(ValueError, match="method 'afinity' is not known, did you mean 'affinity'"):
        make(options={"method": "afinity"})
    for every in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="every must be a whole number of at least 1"):
            make(options={"every": every})
    with pytest.raises(ValueError, match="no training data"):
        make(rows=None)
    with pytest.raises(ValueError, match="bf16=False"):
        make(bf16=True)
    with pytest.raises(ValueError, match="never come together"):
        make(batch_composition="single_task")
    with pytest.raises(ValueError, match=r"bfloat16.*dtype=torch.float32"):
        make(make_model().to(torch.bfloat16))
    with pytest.raises(ValueError, match="12 steps of which every 2 is measured are 6 measured steps"):
        make(options={"every": 2}).train()
    with pytest.raises(ValueError, match="train for more steps$"):
        make(max_steps=9).train()


def test_tasks_that_share_nothing_or_have_no_company_are_refused(tokenizer):
    frozen = make_model()
    frozen.backbone.requires_grad_(False)
    torch.manual_seed(0)
    apart = SCHEMES["soft"].from_backbone(BACKBONES["bert"](), make_tasks())
    for model in (frozen, apart):
        with pytest.raises(ValueError, match="train no parameter together"):
            measured_tasks(model)
    with pytest.raises(ValueError, match="only 'tone' is trained"):
        measured_tasks(make_model(tasks=make_tasks()[:1]))
    silent = [make_tasks()[0], Task("names", "token_classification", ("O", "B"), weight=0)]
    with pytest.raises(ValueError, match="only 'tone' is trained"):
        measured_tasks(make_model(tasks=silent))
    with pytest.raises(TypeError, match="MultiTaskModel, got Linear"):
        measured_tasks(torch.nn.Linear(2, 2))


def test_tasks_that_never_came_together_are_named(tmp_path, tokenizer, datasets):
    trainer = make_affinity_trainer(
        tmp_path,
        tokenizer,
        datasets,
        make_model(),
        options={"method": "conflict", "every": 1},
        max_steps=10,
        per_device_train_batch_size=1,
    )
    trainer.train()
    with pytest.raises(ValueError, match=r"'tone' and 'traits' came together in none of the 10 measured steps"):
        trainer.series()
