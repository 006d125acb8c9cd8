"""Mixing strategies: every one gives probabilities, and the ones that its paper or its formula says."""

from __future__ import annotations

import math

import pytest

from hf_multitask.data.sampling import MIXING, check_mixing, mixing_probabilities

SIZES = {"large": 1000, "middle": 100, "small": 10}
SCORES = {"scores": {"large": 0.9, "middle": 0.8, "small": 0.7}}
NEEDED = {
    "capped": {"cap": 150},
    "weighted": {"weights": {"large": 1, "middle": 0.5, "small": 2.5}},
    "performance_gap": SCORES,
}


def shares(*weights: float) -> list[float]:
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("sizes", [SIZES, {"only": 7}, {f"d{i}": 3**i for i in range(12)}, {"a": 1, "b": 10**12}])
@pytest.mark.parametrize("name", MIXING)
def test_probabilities_are_positive_and_sum_to_one(name, sizes):
    kwargs = (
        {"weights": {dataset: i + 1 for i, dataset in enumerate(sizes)}} if name == "weighted" else NEEDED.get(name)
    )
    for progress in (0.0, 0.3, 1.0):
        result = mixing_probabilities(name, sizes, kwargs, progress=progress, total_rows=500)
        assert len(result) == len(sizes)
        assert all(p > 0 for p in result)
        assert math.fsum(result) == pytest.approx(1.0, abs=1e-12)


CLOSED_FORMS = {
    "proportional": ("proportional", {}, shares(1000, 100, 10)),
    "temperature, default 0.75": ("temperature", {}, shares(1000**0.75, 100**0.75, 10**0.75)),
    "temperature 0.5": ("temperature", {"alpha": 0.5}, shares(10**1.5, 10, 10**0.5)),
    "temperature 1 is proportional": ("temperature", {"alpha": 1}, shares(1000, 100, 10)),
    "temperature 0 is uniform": ("temperature", {"alpha": 0.0}, shares(1, 1, 1)),
    "uniform": ("uniform", {}, shares(1, 1, 1)),
    "round_robin": ("round_robin", {}, shares(1, 1, 1)),
    "cap cuts one": ("capped", {"cap": 150}, shares(150, 100, 10)),
    "cap cuts two": ("capped", {"cap": 50}, shares(50, 50, 10)),
    "cap cuts none": ("capped", {"cap": 1e9}, shares(1000, 100, 10)),
    "weighted": ("weighted", NEEDED["weighted"], shares(1, 0.5, 2.5)),
    "weighted by name, not by place": ("weighted", {"weights": {"small": 3, "large": 1, "middle": 0}}, [0.25, 0, 0.75]),
}


@pytest.mark.parametrize("case", CLOSED_FORMS)
def test_strategies_have_their_closed_forms(case):
    name, kwargs, expected = CLOSED_FORMS[case]
    assert mixing_probabilities(name, SIZES, kwargs) == pytest.approx(expected, abs=1e-12)


GAPS = {
    "before the first evaluation": (None, {}, shares(1000, 100, 10)),
    "another start": (None, {"start": "uniform"}, shares(1, 1, 1)),
    "a third of the floor to each": ([0.3, 0.1, 0.0], {}, [0.1 / 3 + 0.9 * 0.75, 0.1 / 3 + 0.9 * 0.25, 0.1 / 3]),
    "without a floor": ([0.3, 0.1, 0.0], {"floor": 0.0}, [0.75, 0.25, 0.0]),
    "all of it floor": ([0.3, 0.1, 0.0], {"floor": 1}, shares(1, 1, 1)),
    "nobody is behind": ([0.0, 0.0, 0.0], {}, shares(1000, 100, 10)),
    "ahead is not behind": ([-0.5, 0.1, 0.1], {"floor": 0}, [0.0, 0.5, 0.5]),
}


@pytest.mark.parametrize("case", GAPS)
def test_performance_gap_has_its_closed_form(case):
    gaps, kwargs, expected = GAPS[case]
    found = mixing_probabilities("performance_gap", SIZES, {**SCORES, **kwargs}, gaps=gaps)
    assert found == pytest.approx(expected, abs=1e-12)


UNIMAX = {
    # A budget of 60 is 20 each: within two passes of all three.
    "no dataset is used up": ({"total_rows": 60}, {"max_passes": 2}, [20, 20, 20]),
    # 30 each is more than two passes of the small one (20): the other two share the remaining 70.
    "one is used up": ({"total_rows": 90}, {"max_passes": 2}, [35, 35, 20]),
    # 300 each: small gets 20, then 440 each: middle gets 200, large the rest.
    "two are used up": ({"total_rows": 900}, {"max_passes": 2}, [680, 200, 20]),
    # More than two passes of everything: all are used up, which is proportional.
    "all are used up": ({"total_rows": 10**6}, {"max_passes": 2}, [2000, 200, 20]),
    # Four passes by default (40 rows of the small one), and as budget one pass over all 1110 rows.
    "defaults": ({}, {}, [670, 400, 40]),
    "a part of a pass": ({"total_rows": 90}, {"max_passes": 0.5}, [42.5, 42.5, 5]),
}


@pytest.mark.parametrize("case", UNIMAX)
def test_unimax_deals_the_budget_out_equally_up_to_its_passes(case):
    context, kwargs, rows = UNIMAX[case]
    assert mixing_probabilities("unimax", SIZES, kwargs, **context) == pytest.approx(shares(*rows), abs=1e-12)
    backwards = dict(reversed(SIZES.items()))
    assert mixing_probabilities("unimax", backwards, kwargs, **context) == pytest.approx(shares(*rows[::-1]), abs=1e-12)


def test_annealed_goes_from_proportional_to_an_exponent_of_a_fifth():
    def at(progress, **kwargs):
        return mixing_probabilities("annealed", SIZES, kwargs, progress=progress)

    assert at(0.0) == pytest.approx(shares(1000, 100, 10), abs=1e-12)
    assert at(0.5) == pytest.approx(shares(1000**0.6, 100**0.6, 10**0.6), abs=1e-12)
    assert at(1.0) == pytest.approx(shares(1000**0.2, 100**0.2, 10**0.2), abs=1e-12)
    small = [at(part / 9)[2] for part in range(10)]
    assert all(before < after for before, after in zip(small, small[1:], strict=False))
    assert at(1.0, start=0.5, end=0.0) == pytest.approx(shares(1, 1, 1), abs=1e-12)
    assert at(0.0, start=0.5, end=0.0) == pytest.approx(shares(1000**0.5, 100**0.5, 10**0.5), abs=1e-12)


@pytest.mark.parametrize("name", [name for name in MIXING if name != "weighted"])
def test_datasets_of_equal_size_get_equal_shares(name):
    result = mixing_probabilities(name, {"a": 30, "b": 30, "c": 30}, NEEDED.get(name), total_rows=90)
    assert result == pytest.approx([1 / 3] * 3, abs=1e-12)


def weights(**changes) -> dict:
    return {"weights": {"large": 1.0, "middle": 1.0, "small": 1.0, **changes}}


BAD = {
    "unknown strategy": ("temperture", {}, r"task_sampling 'temperture' is not known, did you mean 'temperature'\?"),
    "nothing like it": ("zzz", {}, r"'zzz' is not known; choose from proportional, temperature, uniform"),
    "unknown argument": ("temperature", {"alfa": 0.5}, r"'temperature' takes no 'alfa', did you mean 'alpha'\?"),
    "argument of none": ("uniform", {"alpha": 0.5}, r"'uniform' takes no 'alpha'; it takes no arguments"),
    "the trainer's argument": ("unimax", {"total_rows": 5}, r"'unimax' takes no 'total_rows'"),
    "the trainer's progress": ("annealed", {"progress": 1}, r"'annealed' takes no 'progress'"),
    "alpha above 1": ("temperature", {"alpha": 1.5}, r"alpha must lie in \[0, 1\], got 1.5"),
    "alpha below 0": ("temperature", {"alpha": -0.1}, r"alpha must lie in \[0, 1\], got -0.1"),
    "alpha NaN": ("temperature", {"alpha": math.nan}, r"alpha must lie in \[0, 1\], got nan"),
    "alpha a string": ("temperature", {"alpha": "0.5"}, r"alpha must lie in \[0, 1\], got '0.5'"),
    "alpha a truth value": ("temperature", {"alpha": True}, r"alpha must lie in \[0, 1\], got True"),
    "start above 1": ("annealed", {"start": 2}, r"start must lie in \[0, 1\], got 2"),
    "end below 0": ("annealed", {"end": -1}, r"end must lie in \[0, 1\], got -1"),
    "no cap": ("capped", {}, r"'capped' needs task_sampling_kwargs=\{'cap': ...\}"),
    "no scores": ("performance_gap", {}, r"needs task_sampling_kwargs=\{'scores': .* or \{'comparison': "),
    "scores twice": ("performance_gap", {**SCORES, "comparison": "x.json"}, r"'comparison': .*, not both"),
    "another start": ("performance_gap", {**SCORES, "start": "proportionl"}, r"did you mean 'proportional'"),
    "floor above 1": ("performance_gap", {**SCORES, "floor": 1.5}, r"floor must lie in \[0, 1\], got 1.5"),
    "delay 0": ("performance_gap", {**SCORES, "delay": 0}, r"delay must be a whole number of at least 1, got 0"),
    "relative a word": ("performance_gap", {**SCORES, "relative": "no"}, r"relative must be true or false, got 'no'"),
    "cap 0": ("capped", {"cap": 0}, r"cap must be a positive number, got 0"),
    "cap negative": ("capped", {"cap": -5}, r"cap must be a positive number, got -5"),
    "cap NaN": ("capped", {"cap": math.nan}, r"cap must be a positive number, got nan"),
    "passes 0": ("unimax", {"max_passes": 0}, r"max_passes must be a positive number, got 0"),
    "no weights": ("weighted", {}, r"'weighted' needs task_sampling_kwargs=\{'weights': ...\}"),
    "weights a list": (
        "weighted",
        {"weights": [1, 2, 3]},
        r"weights must map dataset names to numbers, got \[1, 2, 3\]",
    ),
    "weight negative": ("weighted", weights(middle=-1), r"weight of 'middle' must be a number of at least 0, got -1"),
    "weight NaN": ("weighted", weights(small=math.nan), r"weight of 'small' must be a number of at least 0, got nan"),
    "weight infinite": ("weighted", weights(small=math.inf), r"weight of 'small' .* got inf"),
    "weight a string": ("weighted", weights(small="1"), r"weight of 'small' .* got '1'"),
    "all weights 0": ("weighted", weights(large=0, middle=0, small=0), r"all weights are 0"),
    "dataset missing": ("weighted", {"weights": {"large": 1}}, r"weights lacks middle, small"),
    "dataset unknown": ("weighted", weights(smal=1), r"names no dataset 'smal', did you mean 'small'\?.*large, middle"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    name, kwargs, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        mixing_probabilities(name, SIZES, kwargs)


@pytest.mark.parametrize("case", ["unknown strategy", "unknown argument", "no cap", "no weights"])
def test_names_are_checked_before_there_are_datasets(case):
    name, kwargs, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        check_mixing(name, kwargs)


@pytest.mark.parametrize("name", MIXING)
def test_every_strategy_passes_its_own_check(name):
    check_mixing(name, NEEDED.get(name))
    with pytest.raises(ValueError, match="no_such_argument"):
        check_mixing(name, {**(NEEDED.get(name) or {}), "no_such_argument": 1})
