"""Training with weights that follow a schedule, and with auxiliary tasks whose gradients are gated."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from test_distributed import accelerate, check_equal, launch
from transformers import TrainerCallback

from hf_multitask import HardSharingModel, SoftSharingModel, Task
from hf_multitask.balancer import TaskBalancer
from hf_multitask.balancing.combination_methods import upgrad

LAYOUTS = ((8, 1), (2, 4))


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def difference(one: dict, other: dict) -> float:
    """Return the largest difference of any weight, relative to the largest of its tensor."""
    return max(((a - other[n]).abs().max() / a.abs().max().clamp(min=1e-3)).item() for n, a in one.items())


def part(state: dict, prefix: str) -> dict:
    return {name: value for name, value in state.items() if name.startswith(prefix)}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def series(trainer, name: str) -> list[dict[str, float]]:
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return [{key: value for key, value in line.items() if key.startswith(name)} for line in lines]


class EachStep(TrainerCallback):
    """Keeps the weights after every optimizer step, those at the start first."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.seen.append(weights(model))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(weights(model))


def train(make_trainer, model, *, resume=None, train=None, **options):
    """Train without dropout, by plain descent with weight decay; return the trainer and the weights of every step."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    options = {"optim": "sgd", "learning_rate": 0.05, "weight_decay": 0.1, "max_steps": 4, **options}
    steps = EachStep()
    trainer = make_trainer(model, train, trainer_kwargs={"callbacks": [steps]}, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, steps.seen


# ---- weights that follow a schedule ----

SCHEDULES = {
    "strength": {"type": "linear", "end": 0.5, "until": 1.0},
    "traits": {"type": "cosine", "end": 2.0, "until": 3},
    "names": {"type": "off", "after": 0.5},
}
SCHEDULED = ("strength", "traits", "names")


@pytest.fixture
def run(bert, tasks, make_trainer):
    """A function that trains the tasks with some schedules from the same start."""
    start = weights(bert)

    def go(schedules=SCHEDULES, **options):
        bert.load_state_dict(start)
        changed = [replace(task, weight_schedule=schedules.get(task.name)) for task in tasks]
        torch.manual_seed(1)
        return train(make_trainer, HardSharingModel.from_backbone(bert, changed), **options)

    return go


class ByHand:
    """What `SCHEDULES` mean over 4 steps, as a loss weighting."""

    def weights(self, observation):
        step = observation.step
        wave = 2 - (1 + math.cos(math.pi * min(step, 3) / 3)) / 2
        return torch.tensor([1.0, 1 - 0.5 * step / 4, wave, float(step < 2)])


def test_schedules_multiply_the_weights_of_every_step(run):
    by_schedule, found = run()
    by_hand, expected = run({}, loss_weighting=ByHand())
    for one, other in zip(expected, found, strict=True):
        assert difference(one, other) < 1e-6
    assert difference(run({})[1][-1], found[-1]) > 1e-3
    for line, other in zip(series(by_hand, "weight/"), series(by_schedule, "weight/"), strict=True):
        assert len(line) == 4 and other == pytest.approx(line, abs=1e-6)
    losses = [
        [line["loss"] for line in trainer.state.log_history if "loss" in line] for trainer in (by_hand, by_schedule)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_schedule_that_stays_at_1_is_none(run):
    steady = {name: {"type": "linear", "end": 1.0} for name in SCHEDULED}
    constant, expected = run({})
    scheduled, found = run(steady)
    assert all(map(same, expected, found))
    assert series(constant, "weight/") == [{}] * 4
    assert series(scheduled, "weight/") == [dict.fromkeys([f"weight/{name}" for name in ("tone", *SCHEDULED)], 1.0)] * 4


class Ones:
    """A combination that is the plain sum, from an object."""

    def __call__(self, gramian):
        return torch.ones(len(gramian), dtype=torch.float64)


WAYS = {
    "micro-batches": dict(per_device_train_batch_size=2, gradient_accumulation_steps=4),
    "task by task": dict(conflict_logging_steps=1),
    "task by task in micro-batches": dict(
        conflict_logging_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=4
    ),
    "combined": dict(gradient_combination=Ones()),
    "combined every second step": dict(gradient_combination=Ones(), combination_every=2),
    "by sketches": dict(gradient_combination=Ones(), gradient_memory="sketch"),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_stepping_honours_schedules(run, way):
    _, expected = run()
    _, found = run(**WAYS[way])
    for one, other in zip(expected, found, strict=True):
        assert difference(one, other) < 1e-5


@pytest.mark.parametrize("weighting", ["famo", "uncertainty", "gls", "gradnorm"])
def test_learned_weights_come_on_top_in_every_layout(run, weighting):
    ends = []
    for rows, accumulation in LAYOUTS:
        trainer, found = run(
            loss_weighting=weighting, per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation
        )
        ends.append((found[-1], series(trainer, "weight/")))
    assert difference(ends[0][0], ends[1][0]) < 1e-5
    for line, other in zip(ends[0][1], ends[1][1], strict=True):
        assert line == pytest.approx(other, rel=1e-4)
    assert [line["weight/names"] > 0 for line in ends[0][1]] == [True, True, False, False]


def test_a_weighting_does_not_see_a_task_that_weighs_nothing(run):
    class Watching:
        """Notes what it is shown, and adds up to 4 over what is there, as FAMO does."""

        needs_gradient_norms = True

        def __init__(self):
            self.seen = []

        def weights(self, observation):
            numbers = torch.stack([observation.losses, observation.gradient_norms])
            self.seen.append((observation.present.tolist(), numbers.isfinite().all(0).tolist()))
            return 4.0 * observation.present / observation.present.sum()

    watching = Watching()
    trainer, _ = run({"names": {"type": "off", "after": 2}}, loss_weighting=watching, max_steps=6)
    assert any(present[3] for present, _ in watching.seen[:2])
    assert all(present == known for present, known in watching.seen)
    assert not any(present[3] for present, _ in watching.seen[2:])
    for line in series(trainer, "weight/")[2:]:
        assert line["weight/names"] == 0.0


@pytest.mark.parametrize("way", ["plain", "micro-batches", "task by task", "by sketches", "weighed"])
def test_after_off_a_task_s_own_parameters_stay_as_they_are(run, way):
    """Adam's momentum and the weight decay would move what has a gradient, if only of zeros."""
    options = {**WAYS, "plain": {}, "weighed": dict(loss_weighting="famo")}[way]
    off = {"strength": {"type": "off", "after": 2}}
    trainer, seen = run(off, optim="adamw_torch", learning_rate=1e-3, max_steps=5, **options)
    assert trainer.progress.rows_seen["strength"] == 40 - sum(
        trainer.progress.rows_seen[name] for name in ("traits", "names")
    )
    heads = [part(state, "heads.strength") for state in seen]
    assert [same(one, other) for one, other in zip(heads, heads[1:], strict=False)] == [False, False, True, True, True]
    assert not any(
        same(part(one, "heads.tone"), part(other, "heads.tone")) for one, other in zip(seen, seen[1:], strict=False)
    )


def test_a_weight_of_0_leaves_a_head_alone_too(bert, tasks, make_trainer):
    model = HardSharingModel.from_backbone(bert, [replace(tasks[0], weight=0), *tasks[1:]])
    _, seen = train(make_trainer, model, optim="adamw_torch")
    assert same(part(seen[0], "heads.tone"), part(seen[-1], "heads.tone"))


@pytest.mark.parametrize("options", [{}, dict(conflict_logging_steps=1), dict(loss_weighting="famo")], ids=str)
def test_a_step_in_which_nothing_counts_changes_nothing(run, options, monkeypatch):
    windows = []
    end_step = TaskBalancer.end_step

    def noting(self, window, step):
        windows.append(set(window.rows))
        return end_step(self, window, step)

    monkeypatch.setattr(TaskBalancer, "end_step", noting)
    off = {name: {"type": "off", "after": 3} for name in ("traits", "names")}
    trainer, seen = run(off, optim="adamw_torch", batch_composition="single_task", max_steps=10, **options)
    moved = [not same(one, other) for one, other in zip(seen, seen[1:], strict=False)]
    counts = [step < 3 or "tone" in window for step, window in enumerate(windows)]
    assert moved == counts and 0 < sum(counts[3:]) < 7
    assert all(math.isfinite(value) for line in series(trainer, "weight/") for value in line.values())


def test_a_scaler_bears_a_step_in_which_nothing_counts(run, monkeypatch):
    from test_precision import scale_gradients

    from hf_multitask import MultiTaskTrainer

    prepare = MultiTaskTrainer._prepare_for_training

    def scaled(self, *args, **kwargs):
        scale_gradients(self)
        return prepare(self, *args, **kwargs)

    monkeypatch.setattr(MultiTaskTrainer, "_prepare_for_training", scaled)
    off = {name: {"type": "off", "after": 1} for name in ("traits", "names")}
    trainer, _ = run(off, fp16=True, batch_composition="single_task", max_steps=8)
    assert trainer.state.global_step == 8 and trainer.accelerator.scaler is not None


def test_encoders_of_their_own_stay_too(bert, tasks, make_trainer):
    """Under soft sharing a task trains an encoder; without a penalty nothing else moves it."""
    changed = [
        replace(task, weight_schedule={"type": "off", "after": 1} if task.name == "tone" else None) for task in tasks
    ]
    model = SoftSharingModel.from_backbone(bert, changed, penalty=0.0)
    _, seen = train(make_trainer, model, optim="adamw_torch")
    own = [part(state, "encoders.tone") | part(state, "heads.tone") for state in seen]
    assert len(own[0]) > 10
    assert [same(one, other) for one, other in zip(own, own[1:], strict=False)] == [False, True, True, True]


@pytest.mark.parametrize("options", [{}, dict(loss_weighting="famo", gradient_combination="pcgrad")], ids=str)
def test_a_scheduled_run_that_is_resumed_is_the_run_that_was_not_stopped(run, tmp_path, options):
    options = dict(options, save_strategy="steps", save_steps=1, max_steps=5, optim="adamw_torch", learning_rate=1e-3)
    whole, expected = run(**options)
    resumed, found = run(**options, resume=str(tmp_path / "out" / "checkpoint-2"))
    assert same(expected[-1], found[-1])
    assert series(whole, "weight/") == series(resumed, "weight/")
    assert len({json.dumps(line) for line in series(whole, "weight/")}) == 5


def test_another_schedule_or_length_is_another_run(run, tmp_path):
    options = dict(save_strategy="steps", save_steps=2, max_steps=4)
    run(**options)
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    with pytest.raises(
        ValueError, match=r"task 'names', weight_schedule: \{.*0.5.*\} in the checkpoint, \{.*3.*\} now"
    ):
        run({**SCHEDULES, "names": {"type": "off", "after": 3}}, **options, resume=checkpoint)
    with pytest.raises(ValueError, match="steps of the whole training: 4 in the checkpoint, 9 now"):
        run(**{**options, "max_steps": 9}, resume=checkpoint)


def test_a_schedule_in_steps_may_be_trained_on_for_longer(run, tmp_path):
    fixed = {"names": {"type": "off", "after": 1}}
    constant = dict(lr_scheduler_type="constant")
    run(fixed, save_strategy="steps", save_steps=2, max_steps=2, **constant)
    trainer, _ = run(fixed, max_steps=4, resume=str(tmp_path / "out" / "checkpoint-2"), **constant)
    assert trainer.state.global_step == 4


def test_schedules_that_end_all_training_are_refused_before_it(run):
    off = {name: {"type": "off", "after": 2} for name in ("tone", *SCHEDULED)}
    with pytest.raises(ValueError, match="all tasks weigh 0 in the last of 4 optimizer steps"):
        run(off)
    run(off, max_steps=2)


# ---- gates ----


class Fixed:
    """A combination whose coefficients are given; it is asked for the first tasks alone, too."""

    def __init__(self, *coefficients: float) -> None:
        self.coefficients = coefficients

    def __call__(self, gramian):
        return torch.tensor(self.coefficients[: len(gramian)], dtype=torch.float64)


def flip(row):
    return {"flipped": {"positive": "negative", "negative": "positive"}[row["label"]]}


@pytest.fixture
def planted(bert, make_trainer, datasets):
    """A function that trains `main` (and others) with an auxiliary `helper` that has the same head and the same rows.

    The helper's labels are those of `main`, or their opposite: then its gradient is against that of `main`, as long
    as neither head learns (they do not, unless asked for).
    """
    rows = {"reviews": datasets["reviews"].map(flip)}
    start = weights(bert)

    def go(column, *others, heads_learn=False, helper=None, **options):
        bert.load_state_dict(start)
        labels = ("negative", "positive")
        tasks = [
            Task("main", "single_label_classification", labels=labels, dataset="reviews"),
            *others,
            Task(
                "helper",
                "single_label_classification",
                labels=labels,
                dataset="reviews",
                label_column=column,
                auxiliary=True,
                weight=0.6,
                **(helper or {}),
            ),
        ]
        torch.manual_seed(1)
        model = HardSharingModel.from_backbone(bert, tasks)
        for parameter in model.heads.parameters():
            parameter.data *= 5  # fresh heads let little of a gradient through
        model.heads["helper"].load_state_dict(model.heads["main"].state_dict())
        model.heads.requires_grad_(heads_learn)
        return train(make_trainer, model, train=rows, **{"max_grad_norm": 0.0, "weight_decay": 0.0, **options})

    return go


GATES = ("cosine", "weighted_cosine")
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def in_layout(layout) -> dict[str, int]:
    return dict(per_device_train_batch_size=layout[0], gradient_accumulation_steps=layout[1])


@pytest.mark.parametrize("gating", GATES)
@pytest.mark.parametrize("memory", ["buffer", "sketch"])
@every_layout
@pytest.mark.sample(5)
def test_a_gradient_that_conflicts_does_not_count(planted, gating, memory, layout):
    options = dict(in_layout(layout), gradient_memory=memory)
    gated, found = planted("flipped", auxiliary_gating=gating, **options)
    _, expected = planted("flipped", gradient_combination=Fixed(1.0, 0.0), **options)
    assert all(map(same, expected, found)) and not same(found[0], found[-1])
    assert series(gated, "gate/") == [{"gate/helper": 0.0}] * 4
    # Nothing of it: as if the helper weighed nothing, on the plain way.
    _, without = planted("flipped", helper={"weight_schedule": {"type": "off", "after": 0}}, **in_layout(layout))
    assert difference(without[-1], found[-1]) < 1e-6
    assert difference(planted("flipped", **in_layout(layout))[1][-1], found[-1]) > 1e-3


@pytest.mark.parametrize("gating", GATES)
@every_layout
def test_a_gradient_that_agrees_counts(planted, gating, layout):
    gated, found = planted("label", auxiliary_gating=gating, **in_layout(layout))
    _, expected = planted("label", gradient_combination=Fixed(1.0, 1.0), **in_layout(layout))
    gates = series(gated, "gate/")
    assert gates == [{"gate/helper": pytest.approx(1.0, abs=1e-6)}] * 4
    if gating == "cosine":
        assert all(map(same, expected, found)) and gates[0] == {"gate/helper": 1.0}
    assert difference(planted("label", **in_layout(layout))[1][-1], found[-1]) < 1e-5


STRENGTH = Task("strength", "regression", dataset="reviews", label_column="strength")


def test_it_is_the_primary_task_that_is_helped(planted):
    """Against `main`, but not against everything: who is helped decides."""
    for primary, shut in (("main", True), ("strength", None)):
        trainer, found = planted("flipped", STRENGTH, auxiliary_gating="cosine", primary_task=primary)
        gates = [line["gate/helper"] for line in series(trainer, "gate/")]
        if shut:
            assert gates == [0.0] * 4
            _, expected = planted("flipped", STRENGTH, gradient_combination=Fixed(1.0, 1.0, 0.0))
            assert all(map(same, expected, found))
    cosines = planted("flipped", STRENGTH, auxiliary_gating="cosine", primary_task="strength", conflict_logging_steps=1)
    for line in (line for line in cosines[0].state.log_history if "loss" in line):
        assert line["gate/helper"] == float(line["conflict/strength|helper"] >= 0)
        assert line["conflict/main|helper"] < 0


@pytest.mark.parametrize("memory", ["buffer", "sketch"])
def test_the_head_of_a_gated_task_takes_its_plain_gradient(planted, memory):
    options = dict(heads_learn=True, max_steps=1)
    _, plain = planted("flipped", **options)
    trainer, gated = planted("flipped", auxiliary_gating="cosine", gradient_memory=memory, **options)
    assert series(trainer, "gate/") == [{"gate/helper": 0.0}]
    for head in ("heads.main", "heads.helper"):
        assert difference(part(plain[-1], head), part(gated[-1], head)) < 1e-6
        assert not same(part(gated[0], head), part(gated[-1], head))
    assert difference(part(plain[-1], "backbone"), part(gated[-1], "backbone")) > 1e-4


class WithoutLast:
    """UPGrad of the first two tasks; the last one counts nothing."""

    def __call__(self, gramian):
        return torch.cat([upgrad(gramian[:2, :2]), torch.zeros(len(gramian) - 2, dtype=torch.float64)])


def test_a_combination_acts_on_what_the_gates_leave(planted):
    options = dict(primary_task="main")
    gated, found = planted("flipped", STRENGTH, auxiliary_gating="cosine", gradient_combination="upgrad", **options)
    _, expected = planted("flipped", STRENGTH, gradient_combination=WithoutLast(), **options)
    assert difference(expected[-1], found[-1]) < 1e-6
    assert all(line["coefficient/helper"] == 0.0 for line in series(gated, "coefficient/"))
    _, ungated = planted("flipped", STRENGTH, gradient_combination="upgrad", **options)
    assert difference(ungated[-1], found[-1]) > 1e-3


def test_numbers_are_dropped_by_sign_among_what_the_gates_leave(planted):
    gated, found = planted("flipped", auxiliary_gating="cosine", gradient_combination="graddrop")
    off = {"weight_schedule": {"type": "off", "after": 0}}
    _, expected = planted("flipped", gradient_combination="graddrop", helper=off)
    assert all(map(same, expected, found))
    assert difference(planted("flipped", gradient_combination="graddrop")[1][-1], found[-1]) > 1e-3


def test_gates_hold_until_the_next_decision(planted):
    options = dict(combination_every=3, max_steps=6)
    decided = []
    decide = TaskBalancer._decide
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskBalancer, "_decide", lambda self, *args: (decided.append(args[-1]), decide(self, *args)))
        gated, found = planted("flipped", auxiliary_gating="cosine", **options)
    assert decided == [0, 3]
    assert series(gated, "gate/") == [{"gate/helper": 0.0}] * 6
    _, expected = planted("flipped", gradient_combination=Fixed(1.0, 0.0), **options)
    assert all(map(same, expected, found))


@pytest.fixture
def helped(bert, tasks, make_trainer):
    """A function that trains tasks of which two are auxiliary and fed now with, now against the others."""
    start = weights(bert)
    changed = [replace(task, auxiliary=task.name in ("strength", "names")) for task in tasks]

    def go(**options):
        bert.load_state_dict(start)
        torch.manual_seed(1)
        return train(make_trainer, HardSharingModel.from_backbone(bert, changed), **options)

    return go


def test_the_log_holds_the_fraction_of_open_steps(helped):
    options = dict(auxiliary_gating="cosine", max_steps=16)
    each, by_four = (series(helped(**options, logging_steps=steps)[0], "gate/") for steps in (1, 4))
    for name in ("gate/strength", "gate/names"):
        values = [[line[name] for line in each[i : i + 4] if name in line] for i in range(0, 16, 4)]
        assert {value for four in values for value in four} == {0.0, 1.0}
        assert [line.get(name) for line in by_four] == [sum(four) / len(four) if four else None for four in values]


def test_without_the_primary_task_in_a_window_gates_are_open(run, tasks, bert, make_trainer):
    helped = [replace(task, auxiliary=task.name == "names", weight=1.0) for task in tasks]
    runs = []
    ones = Fixed(1.0, 1.0, 1.0, 1.0)  # the plain sum, task by task as well
    for options in (dict(auxiliary_gating="cosine", primary_task="tone"), dict(gradient_combination=ones)):
        torch.manual_seed(0)
        model = HardSharingModel.from_backbone(type(bert)(bert.config), helped)
        runs.append(train(make_trainer, model, batch_composition="single_task", max_steps=8, **options))
    assert all(map(same, runs[0][1], runs[1][1]))
    gates = [line for line in series(runs[0][0], "gate/") if line]
    assert gates and len(gates) < 8 and all(line == {"gate/names": 1.0} for line in gates)


@pytest.mark.parametrize("memory", ["buffer", "sketch"])
@pytest.mark.parametrize(
    "options",
    [
        dict(auxiliary_gating="cosine", combination_every=3),
        dict(auxiliary_gating="weighted_cosine", gradient_combination="gradvac", loss_weighting="famo"),
    ],
    ids=str,
)
def test_a_gated_run_that_is_resumed_is_the_run_that_was_not_stopped(planted, tmp_path, options, memory):
    """It is stopped between two decisions, and between two log lines."""
    options = dict(options, heads_learn=True, optim="adamw_torch", learning_rate=1e-3, gradient_memory=memory)
    options |= dict(save_strategy="steps", save_steps=1, max_steps=6, logging_steps=2)
    whole, expected = planted("flipped", **options)
    checkpoint = tmp_path / "out" / "checkpoint-1"
    resumed, found = planted("flipped", **options, resume=str(checkpoint))
    assert same(expected[-1], found[-1])
    for name in ("gate/", "coefficient/", "weight/"):
        assert series(whole, name) == series(resumed, name)
    kept = json.loads((checkpoint / "multitask_state.json").read_text())["balancing"]["gates"]
    assert kept["sums"] == {"helper": [kept["values"][1], 1]}


def test_another_gating_or_primary_task_is_another_run(planted, tmp_path):
    options = dict(save_strategy="steps", save_steps=2, auxiliary_gating="cosine", primary_task="main")
    planted("flipped", STRENGTH, **options)
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    for changes, message in (
        (
            dict(auxiliary_gating="weighted_cosine"),
            "auxiliary_gating: 'cosine' in the checkpoint, 'weighted_cosine' now",
        ),
        (dict(primary_task="strength"), "primary_task: 'main' in the checkpoint, 'strength' now"),
    ):
        with pytest.raises(ValueError, match=message):
            planted("flipped", STRENGTH, **{**options, **changes}, resume=checkpoint)


@pytest.mark.parametrize("gating", GATES)
def test_gates_are_the_same_for_every_layout(helped, gating):
    ends = []
    for layout in LAYOUTS:
        trainer, seen = helped(auxiliary_gating=gating, max_steps=6, **in_layout(layout))
        ends.append((seen[-1], series(trainer, "gate/")))
    assert difference(ends[0][0], ends[1][0]) < 1e-5
    for line, other in zip(ends[0][1], ends[1][1], strict=True):
        assert line == pytest.approx(other, abs=1e-4)
    values = [value for line in ends[0][1] for value in line.values()]
    assert min(values) == 0.0 < max(values)


# ---- refusals ----


def test_gates_need_an_auxiliary_task(model, make_trainer):
    with pytest.raises(
        ValueError, match="auxiliary_gating='cosine' has nothing to do: none of the tasks tone, strength"
    ):
        make_trainer(model, auxiliary_gating="cosine")


def test_gates_need_shared_parameters(bert, tasks, make_trainer):
    model = HardSharingModel.from_backbone(bert, [replace(tasks[0], auxiliary=True), *tasks[1:]])
    model.backbone.requires_grad_(False)
    with pytest.raises(
        ValueError, match="no shared parameter is trained .* leave out gradient_combination, auxiliary_gat"
    ):
        make_trainer(model, auxiliary_gating="cosine")


@pytest.mark.parametrize(("name", "near"), [("cosin", ", did you mean 'cosine'?"), ("norm", ""), (True, "")])
def test_gates_of_an_unknown_name_are_refused(model, make_trainer, name, near):
    with pytest.raises(ValueError) as error:
        make_trainer(model, auxiliary_gating=name)
    assert str(error.value) == (
        f"auxiliary_gating {name!r} is not known{near}; choose from cosine, weighted_cosine, or None"
    )


def test_deepspeed_is_refused_with_gates(bert, tasks, make_trainer):
    model = HardSharingModel.from_backbone(bert, [replace(tasks[0], auxiliary=True), *tasks[1:]])
    trainer = make_trainer(model, auxiliary_gating="cosine")
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="auxiliary_gating and conflict_logging_steps do not go with DeepSpeed"):
        trainer._check_balancing()


# ---- several processes ----

TOGETHER = {
    "gated": dict(tasks={"strength": {"auxiliary": True}, "names": {"auxiliary": True}}, auxiliary_gating="cosine"),
    "scheduled": dict(
        tasks={
            "strength": {"weight_schedule": {"type": "off", "after": 0.5}},
            "names": {"weight_schedule": {"type": "cosine", "end": 0.2}},
        }
    ),
    "both": dict(
        tasks={
            "tone": {"weight_schedule": "linear"},
            "strength": {"auxiliary": True, "weight_schedule": {"type": "off", "after": 4}},
            "names": {"auxiliary": True, "weight": 1.0},
        },
        auxiliary_gating="weighted_cosine",
        gradient_combination="upgrad",
        loss_weighting="famo",
        combination_every=2,
        primary_task="tone",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOGETHER)
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_equal_one(tmp_path, kind, sharded):
    arguments = ("mixed", "rows", "weighted", "", json.dumps(TOGETHER[kind]))
    one = launch(tmp_path, 1, *arguments)
    two = accelerate(tmp_path, "fsdp2", *arguments) if sharded else launch(tmp_path, 2, *arguments)
    check_equal(one, two)
    lines = [key for line in one["logs"] for key in line]
    assert any(key.startswith("gate/") for key in lines) == ("auxiliary_gating" in TOGETHER[kind])
    assert any(key.startswith("weight/") for key in lines) == (kind != "gated")
