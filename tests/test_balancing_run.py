"""Training with loss weightings and gradient combinations: what equals what, and what goes on exactly as it was."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from hf_multitask import DataCollatorForMultiTask, HardSharingModel, MixtureOfExpertsModel, MultiTaskTrainer, Task
from hf_multitask.balancer import TaskBalancer
from hf_multitask.balancing.combination import COMBINATIONS, Combination
from hf_multitask.balancing.elementwise import ELEMENTWISE
from hf_multitask.balancing.weighting import WEIGHTINGS

EVERY_COMBINATION = [*COMBINATIONS, *ELEMENTWISE]
LAYOUTS = ((8, 1), (2, 4))


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def difference(one: dict, other: dict) -> float:
    """Return the largest difference of any weight, relative to the largest of its tensor."""
    return max(((a - other[n]).abs().max() / a.abs().max().clamp(min=1e-3)).item() for n, a in one.items())


@pytest.fixture
def run(model, make_trainer):
    """A function that trains from the same start, without dropout, and returns the trainer and the weights."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    before = weights(model)

    def train(resume=None, **options):
        model.load_state_dict(before)
        trainer = make_trainer(model, **{"optim": "sgd", "learning_rate": 0.05, "max_steps": 4, **options})
        trainer.train(resume_from_checkpoint=resume)
        return trainer, weights(model)

    return train


def series(trainer, name: str) -> list[dict[str, float]]:
    return [
        {key: value for key, value in line.items() if key.startswith(name)}
        for line in trainer.state.log_history
        if "loss" in line
    ]


LOGGED = {
    "plain": {},
    "accumulated": dict(per_device_train_batch_size=2, gradient_accumulation_steps=4),
    "weighted": dict(loss_weighting="dwa"),
    "checkpointed": dict(activation_checkpointing=True),
    "in between decisions": dict(gradient_combination="pcgrad", combination_every=3),
    "sketched": dict(gradient_memory="sketch"),
}


@pytest.mark.parametrize("case", LOGGED)
def test_logging_conflicts_changes_no_weight(model, make_trainer, case):
    before, found = weights(model), {}
    for every in (0, 2):
        model.load_state_dict(before)  # with its dropout
        torch.manual_seed(3)
        trainer = make_trainer(model, max_steps=6, conflict_logging_steps=every, **LOGGED[case])
        trainer.train()
        found[every] = trainer, weights(model)
    assert all(torch.equal(value, found[2][1][name]) for name, value in found[0][1].items())
    logged = [line for line in found[2][0].state.log_history if any(key.startswith("conflict/") for key in line)]
    assert logged and all(-1.001 <= v <= 1.001 for line in logged for k, v in line.items() if k.startswith("conflict/"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_conflicts_of_a_plain_step_are_those_of_a_step_task_by_task(run, layout, monkeypatch):
    options = dict(
        per_device_train_batch_size=layout[0],
        gradient_accumulation_steps=layout[1],
        conflict_logging_steps=1,
        max_steps=2,
    )
    beside, _ = run(**options)
    monkeypatch.setattr(MultiTaskTrainer, "_can_measure_beside", False)
    by_task, _ = run(**options)
    expected = series(by_task, "conflict/")
    assert expected and len(expected[-1]) >= 3
    for line, other in zip(series(beside, "conflict/"), expected, strict=True):
        assert line == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize("reduction", ["rows", "tasks"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_task_by_task_and_summed_it_is_the_plain_step(run, layout, reduction):
    options = dict(
        per_device_train_batch_size=layout[0], gradient_accumulation_steps=layout[1], loss_reduction=reduction
    )
    plain, expected = run(**options)
    by_task, found = run(**options, conflict_logging_steps=1)
    assert difference(expected, found) < 1e-6
    for line, other in zip(plain.state.log_history, by_task.state.log_history, strict=True):
        for key, value in line.items():
            if not key.endswith(("runtime", "per_second")):
                assert other[key] == pytest.approx(value, rel=1e-4), key


@pytest.mark.parametrize("method", EVERY_COMBINATION)
@pytest.mark.sample(5)
def test_combinations_are_the_same_for_every_layout(run, method):
    ends = [
        run(gradient_combination=method, per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation)
        for rows, accumulation in LAYOUTS
    ]
    assert difference(ends[0][1], ends[1][1]) < 1e-5
    plain = run()[1]
    if method not in ("sum", "dual_proj"):  # without conflict, projecting the sum leaves it as it is
        assert difference(plain, ends[0][1]) > 1e-5


@pytest.mark.parametrize("method", WEIGHTINGS)
def test_weightings_are_the_same_for_every_layout(run, method):
    ends = [
        run(loss_weighting=method, per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation)
        for rows, accumulation in LAYOUTS
    ]
    assert difference(ends[0][1], ends[1][1]) < 1e-5
    for one, other in zip(*(series(trainer, "weight/") for trainer, _ in ends), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
        assert bool(one) == (method != "static")


# Those with the most to keep are always run; the others are longer proofs.
KEPT = ("uncertainty", "famo", "gradnorm", "random", "pcgrad", "gradvac", "graddrop")


def or_slow(**options):
    """Return options as a case; one whose method is not among `KEPT` is slow."""
    method = next(iter(options.values()))
    return pytest.param(options, id=method, marks=[] if method in KEPT else pytest.mark.slow)


@pytest.mark.parametrize(
    "options",
    [
        *[or_slow(loss_weighting=method) for method in WEIGHTINGS],
        *[or_slow(gradient_combination=method) for method in EVERY_COMBINATION],
        pytest.param(dict(gradient_combination="gradvac", loss_weighting="famo", combination_every=3), id="both"),
    ],
)
def test_resumed_equals_uninterrupted(run, tmp_path, options):
    options = dict(options, save_strategy="steps", save_steps=1, max_steps=5, optim="adamw_torch", learning_rate=1e-3)
    whole, expected = run(**options)
    resumed, found = run(**options, resume=str(tmp_path / "out" / "checkpoint-2"))
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    for name in ("weight/", "coefficient/"):
        assert series(whole, name) == series(resumed, name)


@pytest.mark.parametrize("method", ["pcgrad", "upgrad"])
@pytest.mark.parametrize("memory", ["buffer", "sketch"])
def test_heads_take_their_plain_gradient(run, method, memory):
    """After one step from the same start, only what is shared differs from the plain step."""
    plain, combined = (
        run(max_steps=1, max_grad_norm=0.0)[1],
        run(max_steps=1, max_grad_norm=0.0, gradient_combination=method, gradient_memory=memory)[1],
    )
    for name, value in plain.items():
        if name.startswith("heads"):
            assert torch.allclose(value, combined[name], rtol=1e-5, atol=1e-8), name


@pytest.fixture
def moved(bert, tasks, make_trainer):
    """A function that takes one plain step, and returns by how much what is shared and what is not has moved."""
    start = weights(bert)

    def step(weight, **options):
        bert.load_state_dict(start)
        changed = [*tasks[:3], replace(tasks[3], auxiliary=True, weight=weight)]
        torch.manual_seed(1)
        model = HardSharingModel.from_backbone(bert, changed)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        before = weights(model)
        arguments = dict(optim="sgd", learning_rate=1.0, max_grad_norm=0.0, max_steps=1, lr_scheduler_type="constant")
        make_trainer(model, **{"task_sampling": "uniform", **arguments, **options}).train()
        change = {name: value - before[name] for name, value in weights(model).items()}
        return [
            torch.cat([value.flatten() for name, value in change.items() if name.startswith(part)])
            for part in ("backbone", "heads.names")
        ]

    return step


class InverseNorms:
    """A combination of the user's own."""

    def __call__(self, gramian):
        return 1 / gramian.diagonal().sqrt()


@pytest.mark.parametrize(
    "options",
    [
        *[pytest.param(dict(gradient_combination=method), id=method) for method in COMBINATIONS],
        pytest.param(dict(gradient_combination=InverseNorms()), id="an object"),
        pytest.param(dict(gradient_combination="mgda", loss_reduction="tasks"), id="equal shares"),
        pytest.param(dict(gradient_combination="fairgrad", gradient_memory="sketch"), id="by sketches"),
        pytest.param(
            dict(gradient_combination="mgda", per_device_train_batch_size=2, gradient_accumulation_steps=4),
            id="in micro-batches",
        ),
    ],
)
@pytest.mark.sample(6)
def test_an_auxiliary_weight_of_a_tenth_is_a_tenth_of_the_way_from_without_the_task_to_with_it(moved, options):
    """So the part of the task in the shared update falls with its weight and vanishes with it, for every method."""
    (without, none), (part, own), (full, whole) = (moved(weight, **options) for weight in (0.0, 0.1, 1.0))
    tolerance = 2e-2 if "gradient_memory" in options else 1e-4
    assert (part - (0.9 * without + 0.1 * full)).norm() <= tolerance * full.norm()
    assert (full - without).norm() > 1e-3 * full.norm()
    assert not none.any() and torch.allclose(own, 0.1 * whole, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("weighting", ["random", "gls"])
def test_weights_that_find_the_unit_of_a_loss_are_part_of_it_and_others_are_not(run, monkeypatch, weighting):
    seen = []
    weighted = Combination.weighted

    def noting(self, gramian, shares, weights, **options):
        seen.append((gramian.diagonal().sqrt(), weights))
        return weighted(self, gramian, shares, weights, **options)

    monkeypatch.setattr(Combination, "weighted", noting)
    aware = weighting == "gls"
    options = dict(gradient_combination="mgda", max_steps=1, task_sampling="uniform")
    trainer, _ = run(loss_weighting=weighting, **options)
    found = torch.tensor(trainer.balancer.weights, dtype=torch.float64)
    run(**options)
    (lengths, weights), (plain, ones) = seen
    assert (ones == 1).all()
    torch.testing.assert_close(lengths, plain * found if aware else plain, rtol=1e-4, atol=0)
    torch.testing.assert_close(weights, ones if aware else found)
    assert (found.max() / found.min()) > 1.2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [
        dict(gradient_combination="upgrad"),
        dict(loss_weighting="gls"),
        dict(gradient_combination="cagrad", loss_weighting="gradnorm"),
    ],
    ids=str,
)
def test_sketches_give_nearly_what_the_buffer_gives(run, options, layout):
    """A model this small has fewer numbers than a sketch, which makes the sketch nearly exact."""
    options |= dict(per_device_train_batch_size=layout[0], gradient_accumulation_steps=layout[1])
    exact, expected = run(**options)
    sketched, found = run(**options, gradient_memory="sketch")
    for name in ("coefficient/", "weight/"):
        for line, other in zip(series(exact, name), series(sketched, name), strict=True):
            assert other == pytest.approx(line, rel=0.05)
    assert difference(expected, found) < 2e-2
    assert [line["loss"] for line in exact.state.log_history if "loss" in line] == pytest.approx(
        [line["loss"] for line in sketched.state.log_history if "loss" in line], rel=1e-2
    )


def test_coefficients_are_used_again_in_between(run):
    """With a learning rate of 0 every step sees the same model; the coefficients still come from step 0 and 3 only."""
    trainer, _ = run(gradient_combination="upgrad", combination_every=3, max_steps=6)
    found = series(trainer, "coefficient/")
    assert found[0] == found[1] == found[2] and found[3] == found[4] == found[5] != found[0]


def test_a_step_with_old_coefficients_gives_the_same_as_one_with_new_ones(run, model):
    """The coefficients of step 0 again in step 1: the heads' gradients plain, the shared ones scaled per task."""
    decide = TaskBalancer._decide
    kept: list[list[float]] = []

    def first_only(self, *args):
        if not kept:
            decide(self, *args)
            kept.append(list(self.coefficients))
        self.coefficients = list(kept[0])

    options = dict(gradient_combination="upgrad", max_steps=3)
    every = run(**options, combination_every=3)[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskBalancer, "_decide", first_only)
        assert difference(every, run(**options)[1]) < 1e-5


def test_conflicts_are_logged_and_cost_nothing_but_a_log_line(run):
    trainer, found = run(gradient_combination="pcgrad", conflict_logging_steps=2)
    lines = series(trainer, "conflict/")
    assert all(-1.000001 <= value <= 1.000001 for line in lines for value in line.values())
    assert set(lines[-1]) <= {f"conflict/{a}|{b}" for a in NAMES for b in NAMES} and lines[-1]
    assert all(torch.equal(value, found[name]) for name, value in run(gradient_combination="pcgrad")[1].items())


NAMES = ("tone", "strength", "traits", "names")


class Favourite:
    """A user's own weighting: one method."""

    def weights(self, observation):
        return torch.tensor([2.0, 0.5, 1.0, 1.0])


def test_an_object_of_the_user_s_weighs(run, make_trainer, model, tasks):
    trainer, found = run(loss_weighting=Favourite())
    assert series(trainer, "weight/")[0] == {
        "weight/tone": 2.0,
        "weight/strength": 0.5,
        "weight/traits": 1.0,
        "weight/names": 1.0,
    }
    json.dumps(trainer.args.to_dict())
    assert trainer.args.to_dict()["loss_weighting"] == "Favourite"


@pytest.mark.parametrize(
    ("result", "message"),
    [([1.0, float("nan"), 1.0, 1.0], "finite"), ([1.0, 1.0], "shape"), ([1.0, -1.0, 1.0, 1.0], "at least 0")],
)
def test_bad_weights_are_named(run, result, message):
    class Bad:
        def weights(self, observation):
            return torch.tensor(result)

    with pytest.raises(ValueError, match=message):
        run(loss_weighting=Bad())


def test_weights_multiply_what_task_weights_do(run, model, make_trainer, bert, tasks):
    class Half:
        def weights(self, observation):
            return torch.tensor([0.5, 0.5, 0.5, 0.5])

    by_weighting = run(loss_weighting=Half(), max_grad_norm=0.0)[1]
    by_rate = run(learning_rate=0.025, max_grad_norm=0.0)[1]
    assert difference(by_weighting, by_rate) < 1e-6


@pytest.mark.parametrize("method", ["pcgrad", "mgda", "sum"])
def test_one_task_is_trained_as_plainly(bert, make_trainer, datasets, method):
    task = [Task("names", "token_classification", labels=("O", "B-person", "B-place"))]
    ends = []
    for options in ({}, dict(gradient_combination=method, conflict_logging_steps=1)):
        torch.manual_seed(0)
        model = HardSharingModel.from_backbone(bert, task)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        make_trainer(model, {"names": datasets["names"]}, optim="sgd", learning_rate=0.05, **options).train()
        ends.append(weights(model))
    assert difference(*ends) < 1e-6


def test_without_shared_parameters_there_is_nothing_to_combine(model, make_trainer):
    model.backbone.requires_grad_(False)
    with pytest.raises(ValueError, match="no shared parameter is trained"):
        make_trainer(model, gradient_combination="pcgrad").train()


@pytest.mark.parametrize("composition", ["mixed", "single_task"])
@pytest.mark.parametrize("method", ["nash_mtl", "cagrad"])
def test_activation_checkpointing_makes_no_difference(run, model, method, composition):
    options = dict(gradient_combination=method, batch_composition=composition, gradient_accumulation_steps=2)
    plain = run(**options)[1]
    assert difference(plain, run(**options, gradient_checkpointing=True)[1]) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(gradient_combination="pcgrd"), "did you mean 'pcgrad'"),
        (dict(loss_weighting="uncertianty"), "did you mean 'uncertainty'"),
        (dict(gradient_combination="cagrad", gradient_combination_kwargs={"d": 1}), "takes no 'd'"),
        (dict(gradient_combination="cagrad", gradient_combination_kwargs={"c": -1}), "c must be"),
        (dict(loss_weighting="stch", loss_weighting_kwargs={"nu": 1}), "takes no 'nu'"),
        (dict(combination_every=0), "combination_every"),
        (dict(gradient_memory="sketches"), "did you mean 'sketch'"),
        (dict(gradient_memory="sketch", gradient_combination="graddrop"), "needs the gradients themselves"),
        (dict(conflict_logging_steps=-1), "conflict_logging_steps"),
        (
            dict(gradient_combination="upgrad", gradient_combination_kwargs={"preference": {"tone": 1}}),
            "name every task",
        ),
    ],
)
def test_bad_arguments_are_named_before_training(model, make_trainer, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(model, **options)


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_loss_that_is_not_finite_reaches_no_method(model, make_trainer, datasets, policy):
    rows = datasets["reviews"].to_list()
    rows[3]["strength"] = 1e30
    broken = {**datasets, "reviews": Dataset.from_list(rows)}
    options = dict(gradient_combination="cagrad", on_nonfinite_loss=policy, max_steps=16)
    trainer = make_trainer(model, broken, **options)
    if policy == "raise":
        with pytest.raises(RuntimeError, match="row.s. 3 of dataset 'reviews'"):
            trainer.train()
    else:
        trainer.train()
        assert trainer.guard.skipped >= 1
        assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_without_a_solution_a_step_takes_the_plain_sum_and_says_so(run, caplog):
    class Stubborn:
        """A method that finds no solution in the second step."""

        def __init__(self):
            self.calls = 0

        def __call__(self, gramian):
            self.calls += 1
            if self.calls == 2:
                raise RuntimeError("no solution")
            return torch.ones(len(gramian), dtype=torch.float64)

    trainer, found = run(gradient_combination=Stubborn())
    assert difference(run()[1], found) < 1e-6
    counts = [line.get("combination_fallbacks") for line in trainer.state.log_history if "loss" in line]
    assert counts == [None, 1, 1, 1]
    assert trainer.balancer.state_dict()["fallbacks"] == 1


def test_a_state_that_is_no_json_is_refused_before_training(model, make_trainer):
    class Tensors(Favourite):
        def state_dict(self):
            return {"scale": torch.ones(3)}

        def load_state_dict(self, state):
            pass

    with pytest.raises(ValueError, match="loss_weighting Tensors: its state_dict goes into checkpoints as JSON"):
        make_trainer(model, loss_weighting=Tensors())


# ---- rows of a task, and no labelled item among them ----

NO_ITEMS = (0, 1, 3)


class Without(DataCollatorForMultiTask):
    """A collator that takes the labels away from `names` in some batches, or the rows altogether."""

    def __init__(self, *args, rows: bool, **kwargs):
        super().__init__(*args, **kwargs)
        self.takes_rows, self.calls = rows, 0

    def __call__(self, rows):
        here, self.calls = self.calls in NO_ITEMS, self.calls + 1
        if here and self.takes_rows:
            rows = [row for row in rows if row["source"].name != "names"]
        batch = super().__call__(rows)
        if here and not self.takes_rows:
            assert "names" in batch["labels"]
            batch["labels"]["names"] = torch.full_like(batch["labels"]["names"], -100)
            batch["num_items"]["names"] = 0
        return batch


def without_items(run, tokenizer, tasks, rows: bool, **options):
    collator = Without(tokenizer, tasks, rows=rows)
    options = {"task_sampling": "uniform", "weight_decay": 0.1, "max_steps": 6, **options}
    return run(trainer_kwargs={"data_collator": collator}, **options)


@pytest.mark.parametrize(
    "options",
    [
        *[pytest.param(dict(loss_weighting=method), id=method) for method in WEIGHTINGS],
        *[pytest.param(dict(gradient_combination=method), id=method) for method in EVERY_COMBINATION],
        pytest.param(dict(loss_reduction="tasks"), id="equal shares"),
        pytest.param(dict(conflict_logging_steps=1), id="task by task"),
        pytest.param(dict(gradient_combination="upgrad", gradient_memory="sketch"), id="by sketches"),
        pytest.param(dict(gradient_combination="mgda", loss_weighting="gradnorm"), id="both"),
    ],
)
@pytest.mark.sample(7)
def test_a_task_without_a_labelled_item_is_absent_as_one_without_rows(run, tokenizer, tasks, options):
    """Its head stays as it is, nothing of it is logged, and nothing takes it for a solved task."""
    absent, expected = without_items(run, tokenizer, tasks, True, **options)
    unlabelled, found = without_items(run, tokenizer, tasks, False, **options)
    assert difference(expected, found) < 2e-5
    for line, other in zip(absent.state.log_history[:-1], unlabelled.state.log_history[:-1], strict=True):
        assert other == pytest.approx(line, rel=1e-4, abs=1e-6)
    lines = [line for line in unlabelled.state.log_history if "loss" in line]
    assert ["loss/names" in line for line in lines] == [step not in NO_ITEMS for step in range(6)]
    assert [line["share/names"] > 0 for line in lines] == [step not in NO_ITEMS for step in range(6)]
    assert absent.progress.rows_seen == unlabelled.progress.rows_seen


@pytest.mark.parametrize("options", [{}, dict(gradient_combination="mgda"), dict(loss_weighting="gradnorm")], ids=str)
def test_a_window_without_any_labelled_item_changes_nothing(run, model, tokenizer, options):
    class Nothing(DataCollatorForMultiTask):
        def __call__(self, rows):
            batch = super().__call__(rows)
            batch["labels"] = {name: torch.full_like(value, -100) for name, value in batch["labels"].items()}
            batch["num_items"] = dict.fromkeys(batch["labels"], 0)
            return batch

    before = weights(model)
    options = {"task_sampling": "weighted", "optim": "adamw_torch", "weight_decay": 0.1, **options}
    trainer, after = run(
        trainer_kwargs={"data_collator": Nothing(tokenizer, model.tasks)},
        task_sampling_kwargs={"weights": {"reviews": 0, "traits": 0, "names": 1}},
        **options,
    )
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(key.startswith("loss/") for line in trainer.state.log_history for key in line)


# ---- losses of the same rows after the step ----


class Recording(DataCollatorForMultiTask):
    """Keeps all batches, in order."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches = []

    def __call__(self, rows):
        self.batches.append(super().__call__(rows))
        return self.batches[-1]


@pytest.mark.parametrize("options", [{}, dict(gradient_combination="mgda"), dict(gradient_memory="sketch")], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.sample(2)
def test_famo_sees_the_losses_of_the_same_rows_after_the_step(run, tokenizer, tasks, monkeypatch, layout, options):
    """As in algorithm 1 of its paper; they are computed here by plain passes over the rows of the step."""
    rows, accumulation = layout
    collator, expected, found = Recording(tokenizer, tasks), [], []
    after_step = TaskBalancer.after_step
    monkeypatch.setattr(TaskBalancer, "after_step", lambda self, x: (found.append(x), after_step(self, x)))

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            total, items = {}, {}
            start = (state.global_step - 1) * accumulation
            for batch in collator.batches[start : start + accumulation]:
                with torch.no_grad():
                    losses = model(**batch).row_losses
                for name, values in losses.items():
                    total[name] = total.get(name, 0.0) + values.sum().item()
                    items[name] = items.get(name, 0) + batch["num_items"][name]
            expected.append({name: value / items[name] for name, value in total.items()})

    trainer, _ = run(
        loss_weighting="famo",
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        trainer_kwargs={"data_collator": collator, "callbacks": [Look()]},
        **options,
    )
    assert len(found) == len(expected) == 4
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert max(map(abs, trainer.balancer.weighting.state_dict()["logits"])) > 0.05


class Twice(Favourite):
    """As [`Favourite`], but it looks at the rows of each step again."""

    needs_losses_after_step = True

    def __init__(self):
        self.seen = []

    def after_step(self, losses):
        self.seen.append(losses)


@pytest.mark.parametrize("kind", [HardSharingModel, MixtureOfExpertsModel])
def test_looking_at_the_rows_again_changes_nothing_else(bert, tasks, make_trainer, kind):
    """Neither what dropout draws afterwards, nor what experts remember of their tokens, nor gradients."""
    start, ends = weights(bert), []
    options = {"router_noise": 0.5} if kind is MixtureOfExpertsModel else {}
    twice = Twice()
    for weighting in (Favourite(), twice):
        bert.load_state_dict(start)
        torch.manual_seed(1)
        model = kind.from_backbone(copy.deepcopy(bert), tasks, **options)
        make_trainer(model, loss_weighting=weighting, max_steps=4).train()
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert len(twice.seen) == 4


def test_after_a_step_that_is_skipped_no_rows_are_looked_at_again(model, make_trainer, datasets):
    rows = datasets["reviews"].to_list()
    rows[3]["strength"] = 1e30
    twice = Twice()
    options = dict(loss_weighting=twice, on_nonfinite_loss="skip", max_steps=16)
    trainer = make_trainer(model, {**datasets, "reviews": Dataset.from_list(rows)}, **options)
    trainer.train()
    assert trainer.guard.skipped >= 1 and len(twice.seen) == 16 - trainer.guard.skipped


def test_an_object_that_wants_losses_after_the_step_has_a_method_for_them(model, make_trainer):
    class Mute(Favourite):
        needs_losses_after_step = True

    with pytest.raises(ValueError, match="Mute needs losses after the step, and has no after_step"):
        make_trainer(model, loss_weighting=Mute())
