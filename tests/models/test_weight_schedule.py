"""Schedules of weights: the factor of every step, and what a task takes, keeps and refuses."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest

from hf_multitask import HardSharingModel, Task
from hf_multitask.models.weight_schedule import depends_on_length, schedule_factor, settle_schedule


def factors(schedule, total: int = 10) -> list[float]:
    return [schedule_factor(schedule, step, total) for step in range(total + 2)]


# ---- the factor ----


def test_without_a_schedule_nothing_changes():
    assert factors(None) == factors("constant") == factors({"type": "constant"}) == [1.0] * 12


def test_a_line_goes_to_the_end_of_training():
    assert factors("linear") == pytest.approx([1 - step / 10 for step in range(11)] + [0.0])
    assert factors({"type": "linear", "end": 3}) == pytest.approx([1 + 2 * step / 10 for step in range(11)] + [3.0])


def test_a_cosine_starts_and_lands_flat():
    found = factors({"type": "cosine", "end": 0.5})
    assert found == pytest.approx([0.75 + 0.25 * math.cos(math.pi * min(step, 10) / 10) for step in range(12)])
    slopes = [one - other for one, other in zip(found, found[1:], strict=False)][:10]
    assert slopes[0] == pytest.approx(slopes[-1]) and slopes[0] < slopes[4] / 4


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("end", [0.0, 0.1, 0.7, 1.0, 2.5])
@pytest.mark.parametrize("until", [1, 4, 1.0, 0.3, 0.7])
def test_a_factor_runs_from_1_to_its_end_and_stays(kind, end, until):
    """Exactly: a weight of nearly 0 is not 0, and one of nearly 1 is another training."""
    found = factors({"type": kind, "end": end, "until": until})
    reached = round(until * 10) if isinstance(until, float) else until
    assert found[0] == 1.0 and set(found[reached:]) == {end}
    inside = found[: reached + 1]
    assert inside == sorted(inside, reverse=end < 1)
    assert end == 1.0 or (len(set(inside)) == len(inside))


@pytest.mark.parametrize(
    ("after", "steps"), [(0, 0), (1, 1), (4, 4), (0.5, 5), (0.7, 7), (0.3, 3), (0.25, 3), (99, 12)]
)
def test_off_is_full_before_its_step_and_nothing_from_it_on(after, steps):
    assert factors({"type": "off", "after": after}) == [1.0] * steps + [0.0] * (12 - steps)


def test_fractions_of_all_steps_are_whole_where_they_should_be():
    """In floating point 0.55 · 100 is above 55, and 0.57 · 100 below 57."""
    for percent in range(1, 100):
        found = factors({"type": "off", "after": percent / 100}, 100)
        assert found.count(1.0) == percent


def test_1_is_a_step_and_1_point_0_the_end_of_training():
    assert factors({"type": "linear", "until": 1})[:2] == [1.0, 0.0]
    assert factors({"type": "linear", "until": 1.0})[:2] == pytest.approx([1.0, 0.9])


def test_only_fractions_depend_on_the_length_of_training():
    for schedule in (None, "constant", {"type": "off", "after": 7}, {"type": "cosine", "until": 7}):
        assert not depends_on_length(schedule)
        assert len({schedule_factor(schedule, 3, total) for total in (4, 100)}) == 1
    for schedule in ("linear", "cosine", {"type": "off", "after": 0.5}):
        assert depends_on_length(schedule)
        assert len({schedule_factor(schedule, 3, total) for total in (4, 100)}) == 2


# ---- the field of a task ----


def make(schedule, **changes) -> Task:
    return Task("topic", "regression", weight_schedule=schedule, **changes)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (None, None),
        ("constant", None),
        ({"type": "constant"}, None),
        ("linear", {"type": "linear", "end": 0.0, "until": 1.0}),
        ("cosine", {"type": "cosine", "end": 0.0, "until": 1.0}),
        ({"until": 30, "type": "linear"}, {"type": "linear", "end": 0.0, "until": 30}),
        ({"type": "cosine", "end": 2}, {"type": "cosine", "end": 2, "until": 1.0}),
        ({"type": "off", "after": 0}, {"type": "off", "after": 0}),
    ],
)
def test_a_task_keeps_all_arguments_of_its_schedule(given, kept):
    before = copy.deepcopy(given)
    task = make(given)
    assert task.weight_schedule == kept == settle_schedule(given) and given == before
    assert task == make(kept) and hash(task) == hash(make(kept))
    assert Task.from_dict(json.loads(json.dumps(task.to_dict(), sort_keys=True))) == task
    assert replace(task, weight=3.0).weight_schedule == kept


def test_steps_and_fractions_stay_what_they_are_in_a_file():
    for until in (1, 1.0):
        again = Task.from_dict(json.loads(json.dumps(make({"type": "linear", "until": until}).to_dict())))
        assert type(again.weight_schedule["until"]) is type(until)


def test_a_task_does_not_change_with_the_dictionary_it_was_given():
    given = {"type": "off", "after": 5}
    task = make(given)
    given["after"] = 6
    assert task.weight_schedule == {"type": "off", "after": 5}


def test_tasks_of_other_schedules_are_other_tasks():
    assert len({make(None), make("linear"), make("cosine"), make({"type": "linear", "end": 0.5})}) == 4


def test_a_saved_model_knows_its_schedules(bert, tmp_path):
    tasks = [make("linear"), Task("tone", "regression", weight_schedule={"type": "off", "after": 0.5}, auxiliary=True)]
    HardSharingModel.from_backbone(bert, tasks).save_pretrained(tmp_path)
    assert HardSharingModel.from_pretrained(tmp_path).tasks == tasks


BAD = {
    "a misspelt name": (
        "liner",
        r"weight_schedule 'liner' is not known, did you mean 'linear'\?; types are constant, ",
    ),
    "a misspelt type": ({"type": "of", "after": 1}, r"weight_schedule 'of' is not known, did you mean 'off'\?"),
    "an off that YAML made a truth value": ({"type": False, "after": 1}, "weight_schedule False is not known"),
    "no type": ({"end": 0.5}, r"weight_schedule \{'end': 0.5\} lacks 'type'; types are constant, linear, cosine, off"),
    "a number": (0.5, "weight_schedule must be a name or a dictionary with 'type', got 0.5"),
    "a misspelt argument": (
        {"type": "linear", "untl": 3},
        r"'linear' takes no 'untl', did you mean 'until'\?; it takes",
    ),
    "another's argument": ({"type": "off", "after": 1, "until": 3}, "'off' takes no 'until'; it takes after"),
    "an argument of none": ({"type": "constant", "end": 3}, "'constant' takes no 'end'; it takes no arguments"),
    "off without a step": ("off", "weight_schedule 'off' needs 'after'"),
    "a negative end": ({"type": "linear", "end": -0.1}, "end must be a finite number of at least 0, got -0.1"),
    "an infinite end": ({"type": "cosine", "end": math.inf}, "end must be a finite number of at least 0, got inf"),
    "an end that is no number": ({"type": "cosine", "end": True}, "end must be .*, got True"),
    "no steps": ({"type": "linear", "until": 0}, "until must be a whole number of steps of at least 1, .*, got 0"),
    "more than all steps": ({"type": "linear", "until": 1.5}, r"or a fraction of all steps in \(0, 1\] .*, got 1.5"),
    "no fraction": ({"type": "linear", "until": 0.0}, "until must be .*, got 0.0"),
    "until NaN": ({"type": "linear", "until": math.nan}, "until must be .*, got nan"),
    "until a truth value": ({"type": "linear", "until": True}, "until must be .*, got True"),
    "off after the end": ({"type": "off", "after": 1.0}, r"after must be .* in \(0, 1\) .*, got 1.0"),
    "off before the start": ({"type": "off", "after": -1}, "after must be a whole number of steps of at least 0"),
    "after a string": ({"type": "off", "after": "5"}, "after must be .*, got '5'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_schedule_is_named_with_its_task(case):
    schedule, message = BAD[case]
    with pytest.raises(ValueError, match=f"^task 'topic': .*{message}"):
        make(schedule)
