"""The parts of preflight by themselves: facts of rows, findings, losses, plans, memory, first steps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import BACKBONES, make_datasets, make_tasks
from datasets import ClassLabel, Dataset, Features, List, Value
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import Parameter

from hf_multitask import HardSharingModel, Task
from hf_multitask.analysis import preflight_memory, preflight_run, preflight_trial
from hf_multitask.analysis.conflict_result import GradientConflicts
from hf_multitask.analysis.preflight_conflict import EFFORTS, choose_effort, conflict_findings
from hf_multitask.analysis.preflight_data import data_findings, data_table
from hf_multitask.analysis.preflight_limits import LIMITS, Limit
from hf_multitask.analysis.preflight_losses import StartLoss, chance_loss, loss_findings, scaled_losses
from hf_multitask.analysis.preflight_memory import MemoryEstimate, memory_findings, optimizer_bytes, saved_bytes
from hf_multitask.analysis.preflight_plan import make_plan, plan_findings
from hf_multitask.analysis.preflight_result import Finding
from hf_multitask.analysis.preflight_rows import read_lengths, read_split
from hf_multitask.analysis.preflight_trial import LossChange, Trial, in_words, time_findings, trial_findings
from hf_multitask.data.sources import make_sources
from hf_multitask.loading import make_sampler

TONE = Task("tone", "single_label_classification", ("bad", "good"), dataset="reviews")
SCORE = Task("score", "regression", dataset="reviews", label_column="score")


def read(rows: list[dict] | Dataset, split: str = "train", tasks: tuple[Task, ...] = (TONE,), **options):
    (source,) = make_sources(tasks)
    return read_split(rows if isinstance(rows, Dataset) else Dataset.from_list(rows), source, split, **options)


def plenty(count: int = 60, start: int = 0) -> list[dict]:
    labels = ("bad", "good")
    return [{"text": f"text {start + i}", "label": labels[i % 2], "score": float(i % 7)} for i in range(count)]


def bad(findings: list[Finding]) -> dict[tuple[str, str], Finding]:
    found = {(f.check, f.about): f for f in findings if f.level != "ok"}
    assert len(found) == sum(f.level != "ok" for f in findings)
    return found


# ---- data ----


@pytest.mark.parametrize(
    "task, feature, values, counts",
    [
        (TONE, Value("string"), ["good", "bad", "good", "other"], {"good": 2, "bad": 1, "other": 1}),
        (TONE, Value("int64"), [1, 0, 1, 7], {"good": 2, "bad": 1, "7": 1}),
        (TONE, ClassLabel(names=["good", "bad"]), [0, 1, 0, 0], {"good": 3, "bad": 1}),
        (Task("tone", "single_label_classification", (1, 2)), Value("int64"), [1, 2, 1, 0], {"1": 2, "2": 1, "0": 1}),
        (
            Task("tone", "multi_label_classification", (1, 2, 3), label_column="label"),
            List(Value("int64")),
            [[3], [1, 2], [], [3]],
            {"3": 2, "1": 1, "2": 1},
        ),
        (
            Task("tone", "multi_label_classification", ("bad", "good"), label_column="label"),
            List(Value("large_string")),
            [["good"], ["bad", "good"], [], ["good"]],
            {"good": 3, "bad": 1},
        ),
        (
            Task("tone", "multi_label_classification", ("bad", "good"), label_column="label"),
            List(Value("string")),
            [["good"], ["bad", "good"], [], ["good"]],
            {"good": 3, "bad": 1},
        ),
        (
            Task("tone", "multi_label_classification", ("bad", "good"), label_column="label"),
            List(Value("float32")),
            [[0, 1], [1, 1], [0, 0], [0, 1]],
            {"good": 3, "bad": 1},
        ),
        (
            Task("tone", "token_classification", ("bad", "good"), text_columns=("text",), label_column="label"),
            List(Value("string")),
            [["good", "good"], ["bad"], [], ["good"]],
            {"good": 3, "bad": 1},
        ),
    ],
)
def test_labels_are_counted_whatever_their_form(task, feature, values, counts):
    texts = ["a", "b", "c", "d"]
    rows = Dataset.from_dict(
        {"text": texts, "label": values}, features=Features({"text": Value("string"), "label": feature})
    )
    found = read(rows, tasks=(task,)).labels["tone"]
    assert dict(found.counts) == counts and len(found.hashes) == 4
    assert found.items == (4 if task.type != "token_classification" else sum(counts.values()))


def test_words_pairs_and_token_ids_are_texts_too():
    words = Task("names", "token_classification", ("O", "B"))
    one = read(Dataset.from_dict({"tokens": [["A", "b"], ["a", "B"], []], "tags": [["O", "O"]] * 3}), tasks=(words,))
    assert one.hashes[0] == one.hashes[1] != one.hashes[2] and one.empty.tolist() == [False, False, True]
    pair = Task("pair", "regression", text_columns=("left", "right"))
    two = read(
        Dataset.from_dict({"left": ["a b", "a", "x"], "right": ["c", "b c", ""], "label": [1.0, 2.0, 3.0]}),
        tasks=(pair,),
    )
    assert len(set(two.hashes.tolist())) == 3 and two.empty.tolist() == [False, False, True]
    ids = read(Dataset.from_dict({"input_ids": [[1, 2], [1, 2], [3]], "labels": [0, 1, 1]}))
    assert ids.hashes[0] == ids.hashes[1] != ids.hashes[2] and dict(ids.labels["tone"].counts) == {"bad": 1, "good": 2}
    assert read(Dataset.from_dict({"other": ["a"]})) is None


def test_lengths_are_those_before_truncation_and_truncation_is_counted(tokenizer):
    (source,) = make_sources([TONE])
    rows = Dataset.from_list(
        [{"text": " ".join(["film"] * (30 if i < 18 else 3)), "label": ("bad", "good")[i % 2]} for i in range(60)]
    )
    facts = read_lengths(read_split(rows, source, "train"), rows, source, tokenizer, 16, 1000)
    assert sorted(facts.lengths.tolist()) == [5] * 42 + [32] * 18 and facts.max_length == 16
    (found,) = [f for f in data_findings([facts]) if f.check == "truncated"]
    assert found.level == "warn" and found.numbers["share"] == pytest.approx(0.3)
    assert found.numbers["tokens_read"] == pytest.approx((42 * 5 + 18 * 16) / (42 * 5 + 18 * 32))
    assert found.numbers["percentile_95"] == 32 and "max_length=32" in found.advice
    assert data_table([facts])[0]["truncated"] == pytest.approx(0.3)
    fewer = read_lengths(read_split(rows, source, "train"), rows, source, tokenizer, 16, 10)
    assert len(fewer.lengths) == 10


def test_good_data_is_left_in_peace_in_one_line_per_check():
    findings = data_findings([read(plenty()), read(plenty(60, 100), "validation"), read(plenty(60, 200), "test")])
    assert not bad(findings) and [f.check for f in findings] == [
        "rows",
        "labels",
        "empty",
        "repeated",
        "leaked",
        "contradicted",
    ]


CASES = {
    "few rows": (plenty(20), plenty(60, 100), ("rows", "reviews (train)"), "warn"),
    "few rows to evaluate": (plenty(), plenty(20, 100), ("rows", "reviews (validation)"), "warn"),
    "no rows to evaluate": (plenty(), None, ("rows", "reviews"), "warn"),
    "an empty text": (
        [*plenty(), {"text": " \n", "label": "bad"}],
        plenty(60, 100),
        ("empty", "reviews (train)"),
        "warn",
    ),
    "texts that come again": ([*plenty(), *plenty(10)], plenty(60, 100), ("repeated", "reviews (train)"), "warn"),
    "a leaked row": (plenty(200), [*plenty(199, 300), *plenty(1)], ("leaked", "reviews (validation)"), "warn"),
    "many leaked rows": (plenty(), plenty(60, 50), ("leaked", "reviews (validation)"), "fail"),
    "another label": (
        plenty(200),
        [*plenty(199, 300), {"text": "Text  300", "label": "good"}],
        ("contradicted", "tone"),
        "warn",
    ),
    "one label nearly always": (
        [*plenty(12), *[{**row, "label": "good"} for row in plenty(90, 300)]],
        plenty(60, 100),
        ("labels", "tone"),
        "warn",
    ),
    "a rare label": (
        [{**row, "label": "good" if i < 4 else ("bad", "odd")[i % 2]} for i, row in enumerate(plenty())],
        plenty(60, 100),
        ("labels", "third"),
        "warn",
    ),
    "a label that is none": ([*plenty(), {"text": "x", "label": "odd"}], plenty(60, 100), ("labels", "tone"), "fail"),
    "no label of a kind at all": (
        [{**row, "label": "bad" if i % 2 else "good"} for i, row in enumerate(plenty())],
        plenty(60, 100),
        ("labels", "third"),
        "warn",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_fault_in_data_is_found_and_nothing_else(case):
    train, validation, key, level = CASES[case]
    tasks = (
        (TONE,)
        if key[1] != "third"
        else (Task("third", "single_label_classification", ("bad", "good", "odd"), dataset="reviews"),)
    )
    facts = [read(train, tasks=tasks)] + ([read(validation, "validation", tasks=tasks)] if validation else [])
    found = bad(data_findings(facts))
    assert {k: f.level for k, f in found.items()} == {key: level}
    assert found[key].advice and found[key].numbers


def test_a_label_that_is_only_evaluated_fails_but_not_in_the_first_rows_of_a_stream():
    three = (Task("tone", "single_label_classification", ("bad", "good", "odd"), dataset="reviews"),)
    train = [{**row, "label": {"good": "odd"}.get(row["label"], row["label"])} for row in plenty()]
    for complete, level in ((True, "fail"), (False, "warn")):
        facts = [read(train, tasks=three, complete=complete), read(plenty(60, 300), "validation", three)]
        found = bad(data_findings(facts))
        assert set(found) == {("labels", "tone")} and found["labels", "tone"].level == level
        assert found["labels", "tone"].numbers == {"labels": 1, "evaluated": 30}


def test_numbers_contradict_each_other_when_they_are_far_apart():
    rows = [{"text": f"t {i}", "score": float(i % 5)} for i in range(100)]
    near, far = {**rows[0], "score": 0.5}, {**rows[0], "score": 4.0}
    assert not [
        f for f in data_findings([read([*rows, near], tasks=(SCORE,))]) if f.check == "contradicted" and f.level != "ok"
    ]
    (found,) = [f for f in data_findings([read([*rows, far], tasks=(SCORE,))]) if f.check == "contradicted"]
    assert found.level == "warn" and found.numbers["rows"] == 2
    constant = [{**row, "score": 2.0} for row in rows]
    (found,) = [f for f in data_findings([read(constant, tasks=(SCORE,))]) if f.check == "labels"]
    assert found.level == "fail" and "all labels are 2" in found.message


def test_only_the_first_of_very_many_rows_are_looked_at_and_it_is_said():
    facts = read(plenty(), most=25)
    assert facts.rows == 25 and not facts.complete and "first 25 rows" in facts.name


def test_every_limit_has_a_reason_and_thresholds_in_order():
    for name, limit in LIMITS.items():
        assert limit.reason, name
        if limit.warn is not None and limit.fail is not None:
            assert (
                limit.warn < limit.fail and limit.level(limit.fail) == "warn" and limit.level(limit.fail + 1) == "fail"
            )
    low = Limit(10, 5, "", below=True)
    assert [low.level(value) for value in (10, 9, 4)] == ["ok", "warn", "fail"]


# ---- losses ----


def test_guessing_costs_what_theory_says():
    assert chance_loss(TONE, None, 0) == math.log(2)
    assert chance_loss(Task("x", "token_classification", tuple("abcd")), None, 0) == math.log(4)
    assert chance_loss(Task("x", "multi_label_classification", tuple("abcd")), None, 0) == math.log(2)
    assert chance_loss(SCORE, 3.5, 0) == 3.5 and chance_loss(SCORE, None, 0) is None
    assert chance_loss(Task("x", "masked_lm"), None, 90) == math.log(90)


def start(task: Task, loss: float, chance: float | None = None) -> StartLoss:
    return StartLoss(task, loss, 0.0, chance)


def test_losses_far_apart_are_found_at_10_and_at_100_and_weights_bring_them_together():
    for ratio, level in ((5, "ok"), (15, "warn"), (150, "fail")):
        losses = [start(TONE, 0.7), start(SCORE, 0.7 * ratio)]
        (found,) = loss_findings(losses, "static")
        assert found.level == level and found.numbers["ratio"] == pytest.approx(ratio)
        assert loss_findings(losses, "uncertainty")[0].level == "ok"
    rows = scaled_losses(losses)
    weighted = [row["loss"] * row["proposed_weight"] for row in rows]
    assert weighted[0] == pytest.approx(weighted[1], rel=0.05) == pytest.approx(0.7 * 150**0.5, rel=0.05)


def test_a_weight_counts_but_that_of_a_helper_is_meant():
    light = Task("score", "regression", dataset="reviews", label_column="score", weight=0.01)
    assert loss_findings([start(TONE, 0.7), start(light, 70.0)], "static")[0].level == "ok"
    helper = Task("help", "regression", auxiliary=True)
    assert helper.weight == 0.1
    # It counts a fiftieth, and may; but it must not drown the others.
    (found,) = loss_findings([start(TONE, 0.7), start(helper, 0.14)], "static")
    assert found.level == "ok" and found.numbers["ratio"] == 1 and "no loss counts more" in found.message
    (found,) = loss_findings([start(TONE, 0.7), start(helper, 140.0)], "static")
    assert found.level == "warn" and found.numbers["ratio"] == pytest.approx(20) and found.about == "help"
    assert scaled_losses([start(TONE, 1.0), start(helper, 1.0)])[1]["proposed_weight"] == 0.1
    assert not loss_findings([start(helper, 1.0), start(helper, 5.0)], "static")


def test_a_head_that_starts_above_chance_or_at_nan_is_found():
    (far, near) = loss_findings([start(SCORE, 40.0, 2.0), start(TONE, 0.7, 0.69)], "normalized")[:2]
    assert far.level == "warn" and "standardize" in far.advice and near.level == "ok"
    assert loss_findings([start(TONE, float("nan"), 0.69)], "static")[0].level == "fail"


# ---- conflict ----


def conflicts(cosine: float, half: float) -> GradientConflicts:
    matrix = np.array([[1, cosine], [cosine, 1.0]])
    spread = np.array([[0, half], [half, 0.0]])
    ones = np.ones(2)
    return GradientConflicts(("a", "b"), matrix, matrix - spread, matrix + spread, ones, ones, ones, {}, 8)


@pytest.mark.parametrize(
    "cosine, half, level, part",
    [
        (-0.4, 0.1, "warn", "apart"),
        (-0.4, 0.5, "ok", "not enough evidence"),
        (-0.05, 0.01, "ok", "-0.05"),
        (0.5, 0.1, "ok", "+0.50"),
    ],
)
def test_only_a_certain_conflict_is_a_warning(cosine, half, level, part):
    (found,) = conflict_findings(conflicts(cosine, half))
    assert found.level == level and part in found.message and found.about == "a, b"


def test_effort_follows_time_and_rows():
    forward, tasks = {"a": 0.01, "b": 0.01}, {"a": 1, "b": 2}
    assert choose_effort(1e6, forward, tasks, 10_000) == EFFORTS[0]
    assert choose_effort(0.1, forward, tasks, 10_000) is None
    for seconds in (10.0, 20.0, 40.0):
        effort = choose_effort(seconds, forward, tasks, 10_000)
        rows = effort.batches * effort.batch_size
        assert 2 * 0.01 * (effort.warmup_rows + rows) < seconds
    assert choose_effort(1e6, forward, tasks, 50).batches * choose_effort(1e6, forward, tasks, 50).batch_size <= 50


# ---- plan ----


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"task_sampling": "proportional"},
        {"task_sampling": "uniform", "max_steps": 30},
        {"task_sampling": "annealed"},
        {"task_sampling": "unimax", "task_sampling_kwargs": {"max_passes": 2}},
        {"gradient_accumulation_steps": 2},
    ],
)
def test_the_plan_is_what_the_sampler_does_over_the_whole_training(model, make_trainer, arguments):
    trainer = make_trainer(model, **{"max_steps": -1, "num_train_epochs": 3, **arguments})
    plan = make_plan(trainer.args, trainer.train_dataset)
    sampler = make_sampler(trainer.args, trainer.train_dataset, 8)
    counts, read_rows, steps = dict.fromkeys(trainer.train_dataset.sizes, 0), {}, 0
    for epoch in range(100):
        sampler.set_epoch(epoch)
        for number, batch in enumerate(sampler):
            if steps >= plan.steps:
                break
            for row in batch:
                name = trainer.train_dataset.locate(row)[0]
                counts[name] += 1
                read_rows.setdefault(name, set()).add(int(row))
            steps += (number + 1) % trainer.args.gradient_accumulation_steps == 0
    for one in plan.sources:
        assert counts[one.source] == pytest.approx(one.rows, abs=1)
        assert 1 - len(read_rows[one.source]) / one.size == pytest.approx(one.unseen, abs=1.01 / one.size)
        assert one.first_error is not None and abs(one.first_error) <= 1
    assert sum(one.share for one in plan.sources) == pytest.approx(1)
    (found,) = [f for f in plan_findings(plan) if f.check == "share_error"]
    assert found.level == "ok"


def test_a_sampler_that_does_not_keep_its_shares_is_found(model, make_trainer, monkeypatch):
    from hf_multitask.analysis import preflight_plan

    trainer = make_trainer(model, max_steps=20)
    other = make_trainer(model, max_steps=20, task_sampling="proportional")
    monkeypatch.setattr(preflight_plan, "make_sampler", lambda args, *rest: make_sampler(other.args, *rest))
    (found,) = [f for f in plan_findings(make_plan(trainer.args, trainer.train_dataset)) if f.check == "share_error"]
    assert found.level == "warn" and found.numbers["reviews"] > 1


def test_batches_of_one_task_may_be_a_batch_off(model, make_trainer):
    trainer = make_trainer(model, max_steps=20, batch_composition="single_task")
    plan = make_plan(trainer.args, trainer.train_dataset)
    assert plan.batch_rows == 8 and [f for f in plan_findings(plan) if f.check == "share_error"][0].level == "ok"


def test_datasets_that_come_too_often_too_seldom_or_never_are_found(model, make_trainer):
    weights = {"reviews": 1.0, "traits": 0.0, "names": 0.01}
    trainer = make_trainer(model, max_steps=4, task_sampling="weighted", task_sampling_kwargs={"weights": weights})
    found = bad(plan_findings(make_plan(trainer.args, trainer.train_dataset)))
    assert found["share", "traits"].level == "fail" and found["rows_per_step", "names"].level == "warn"
    assert found["unseen", "names"].numbers["unseen"] > 0.9
    trainer = make_trainer(model, max_steps=2000, task_sampling="uniform")
    found = bad(plan_findings(make_plan(trainer.args, trainer.train_dataset)))
    assert found["passes", "names"].level == "warn" and found["passes", "names"].numbers["passes"] > 16


# ---- memory ----


def run_sections(trainer):
    run = preflight_run.PreflightRun(60.0, lambda name: None)
    rows = trainer.train_dataset
    preflight_run._memory(run, trainer, rows, make_plan(trainer.args, rows))
    return run.sections["memory"]


class Measured(MemTracker):
    """The most memory that tensors took, by kind."""

    def peak(self) -> dict[str, int]:
        return {
            str(getattr(kind, "value", kind)): size
            for kind, size in self.get_tracker_snapshot("peak")[torch.device("cpu")].items()
        }


@pytest.mark.parametrize("backbone", ["bert", "modernbert", "llama"])
def test_the_estimate_is_what_a_step_takes(backbone, make_trainer, tokenizer):
    torch.manual_seed(0)
    tasks = make_tasks()
    model = HardSharingModel.from_backbone(BACKBONES[backbone](), tasks)
    trainer = make_trainer(model, make_datasets(0, 200), max_steps=2, per_device_train_batch_size=32)
    estimate = run_sections(trainer)
    rows, sampler = trainer.train_dataset, make_sampler(trainer.args, trainer.train_dataset, 32)
    # The longest rows of each source, as many as a batch has.
    plan = make_plan(trainer.args, rows)
    batch = []
    for part, one in zip(rows.split(), plan.sources, strict=True):
        order = np.argsort(-part.lengths[one.source])[: math.ceil(one.share * 32)]
        batch += [part[int(i)] for i in order]
    assert len(sampler) and len(batch) >= 32
    inputs = trainer.data_collator(batch)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # the optimizer's state is there from the second step on
    tracker = Measured()
    tracker.track_external(model, optimizer)
    with tracker:
        step()
    found = tracker.peak()
    assert estimate["parameters"] == pytest.approx(found["Parameter"] + found.get("Buffer", 0), rel=0.01)
    assert estimate["optimizer"] == pytest.approx(found["Optstate"], rel=0.02)
    assert estimate["activations"] == pytest.approx(found["Activation"] + found["Temp"], rel=0.1)
    assert estimate["total"] == pytest.approx(found["Total"], rel=0.05)


def test_what_is_saved_is_counted_once_and_parameters_are_not():
    layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))

    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x):
            return self.layers(x) + self.layers[0](x)[:, :4]

    # Of both calls the input, which is known; the output of tanh, which is the input of the last layer too.
    assert saved_bytes(Twice(), {"x": torch.ones(10, 8)}) == 10 * 16 * 4


def test_buffers_for_the_gradients_of_tasks_are_counted_as_they_are(model, make_trainer):
    trainer = make_trainer(model, max_steps=2, gradient_combination="pcgrad")
    estimate = run_sections(trainer)
    trainer.train()
    gradients = trainer._gradients
    held = gradients._buffer.nbytes + gradients._combined.nbytes + sum(t._dense.nbytes for t in gradients._tables)
    assert estimate["task_buffers"] == held
    plain = run_sections(make_trainer(model, max_steps=2))
    sketched = run_sections(make_trainer(model, max_steps=2, gradient_combination="pcgrad", gradient_memory="sketch"))
    assert plain["task_buffers"] == sketched["task_buffers"] == 0
    # One task after the other: the activations of one at a time.
    assert estimate["activations"] < plain["activations"]


def test_activation_checkpointing_is_counted(model, make_trainer):
    plain = run_sections(make_trainer(model, max_steps=2))
    less = run_sections(make_trainer(model, max_steps=2, activation_checkpointing=True))
    assert less["activations"] < 0.7 * plain["activations"]


@pytest.mark.parametrize("name, numbers", [("adamw_torch_fused", 200), ("sgd", 0), ("lion_32bit", 100)])
def test_the_state_of_an_optimizer_is_counted(name, numbers):
    assert optimizer_bytes(name, [Parameter(torch.zeros(10, 10))]) == 4 * numbers
    assert optimizer_bytes(name, [Parameter(torch.zeros(10, 10, dtype=torch.bfloat16))]) == 2 * numbers


def test_other_optimizers_are_known_or_assumed():
    weight = [Parameter(torch.zeros(10, 10, dtype=torch.bfloat16))]
    assert optimizer_bytes("adamw_8bit", weight) == 200 and optimizer_bytes("adafactor", weight) == 4 * 20
    assert optimizer_bytes("galore_adamw", weight) is None


def test_too_little_memory_is_a_failure_and_the_largest_part_is_named(model, make_trainer, monkeypatch):
    estimate = MemoryEstimate(10, 10, 20, 0, 100, available=1000)
    assert memory_findings(estimate)[0].level == "ok"
    assert memory_findings(MemoryEstimate(10, 10, 20, 0, 100, available=150))[0].level == "warn"
    (found,) = memory_findings(MemoryEstimate(10, 10, 20, 0, 100, available=120))
    assert found.level == "fail" and "activations are the largest part" in found.advice
    assert "does not say" in memory_findings(MemoryEstimate(10, 10, 20, 0, 100, device="tpu"))[0].message
    assert preflight_memory.available_memory(torch.device("meta")) is None
    # With too little memory no step is made.
    monkeypatch.setattr(preflight_run, "available_memory", lambda device, held: 1000)
    trainer = make_trainer(model, max_steps=2)
    run = preflight_run.PreflightRun(60.0, lambda name: None)
    lacking = preflight_run._memory(run, trainer, trainer.train_dataset, make_plan(trainer.args, trainer.train_dataset))
    assert lacking > 0 and run.findings[0].level == "fail"


def test_the_limit_of_a_container_is_read(tmp_path):
    assert preflight_memory._container_limit(tmp_path) is None
    for name, text in (
        ("memory.max", "1000\n"),
        ("memory.current", "700\n"),
        ("memory.stat", "anon 5\ninactive_file 50\n"),
    ):
        (tmp_path / name).write_text(text)
    assert preflight_memory._container_limit(tmp_path) == 350
    (tmp_path / "memory.max").write_text("max\n")
    assert preflight_memory._container_limit(tmp_path) is None


# ---- first steps, time ----


def trial(low: float, high: float, before: float = 1.0, steps: int = 20) -> Trial:
    change = LossChange(before, before + (low + high) / 2, low, high)
    return Trial(steps, (3.0, 2.0, 1.0, 1.0, 1.0, 1.5), {"tone": [1.0]}, {"tone": 1.0}, {"tone": change})


@pytest.mark.parametrize(
    "low, high, level, part",
    [
        (-0.5, -0.1, "ok", "loss 1 before and 0.7 after"),
        (-0.2, 0.1, "ok", "not enough evidence"),
        (0.1, 0.3, "warn", "it rises"),
        (2.5, 3.5, "fail", "it rises"),
    ],
)
def test_a_loss_that_rises_is_found(low, high, level, part):
    (found,) = trial_findings(trial(low, high))
    assert found.level == level and part in found.message
    assert trial_findings(trial(low, high, steps=5))[0].level == "ok"  # too early to say


def test_the_time_of_a_training_follows_from_its_steps():
    assert trial(-1, -0.5).seconds_per_step == 1.0  # without the first two
    (found,), numbers = time_findings(trial(-1, -0.5), 280, 933, 60.0, 2, 30.0)
    assert numbers["training_seconds"] == 280 + 120 + 30 and numbers["seconds_per_epoch"] == 933
    assert "about 7 min for 280 steps" in found.message
    assert [in_words(s) for s in (5, 120, 7200)] == ["5 s", "2 min", "2.0 h"]


def test_a_training_that_stops_by_itself_is_a_failure():
    (found,) = trial_findings(Trial(2, (1.0, 1.0), {}, {}, error="the loss of task 'tone' is nan"))
    assert found.level == "fail" and "'tone' is nan" in found.message
    assert preflight_trial.FEWEST_STEPS == 3
