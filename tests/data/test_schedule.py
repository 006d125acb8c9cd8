"""The sampler's laws: exact shares at every prefix, every row once per pass, one order for every layout."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_multitask import MultiTaskTrainingArguments
from hf_multitask.data.collator import DataCollatorForMultiTask
from hf_multitask.data.dataset import prepare_sources
from hf_multitask.data.sampling import MIXING, mixing_probabilities
from hf_multitask.data.schedule import MOST_PERIODS, MultiTaskBatchSampler, Schedule, ShareChanges, windows_per_epoch
from hf_multitask.data.sources import make_sources
from hf_multitask.loading import make_sampler as sampler_of_args
from hf_multitask.loading import total_steps

EPOCHS = 4


def lopsided(count: int) -> dict[str, int]:
    """Sizes between 3 and some hundred rows, no two datasets far apart in the list alike."""
    return {f"d{i}": 3 + (i * 37) % 41 + (400 if i % 7 == 0 else 0) for i in range(count)}


def probabilities_of(name: str, sizes: dict[str, int]):
    kwargs = {
        "capped": {"cap": 60},
        "weighted": {"weights": {dataset: (i % 5 + 1) ** 2 for i, dataset in enumerate(sizes)}},
        "performance_gap": {"scores": {}},
    }.get(name)

    def probabilities(epoch: int) -> list[float]:
        return mixing_probabilities(
            name, sizes, kwargs, progress=min(epoch / (EPOCHS - 1), 1.0), total_rows=EPOCHS * sum(sizes.values())
        )

    return probabilities


def make_sampler(sizes: dict[str, int], probabilities=None, **options) -> MultiTaskBatchSampler:
    return MultiTaskBatchSampler(
        sizes, probabilities or probabilities_of("temperature", sizes), **{"rows_per_batch": 8, **options}
    )


def batches(sampler: MultiTaskBatchSampler, epochs=range(EPOCHS)) -> list[list[list[int]]]:
    """Return the batches of each epoch."""
    result = []
    for epoch in epochs:
        sampler.set_epoch(epoch)
        result.append(list(sampler))
    return result


def dataset_numbers(sizes: dict[str, int], rows) -> np.ndarray:
    return np.searchsorted(np.cumsum(list(sizes.values())), np.asarray(rows), side="right")


def largest_deviation(indices: list[np.ndarray], probabilities) -> float:
    """Return the largest difference, at any prefix of several epochs, between a count and its target."""
    targets = np.concatenate([np.tile(probabilities(epoch), (len(part), 1)) for epoch, part in enumerate(indices)])
    came = np.eye(targets.shape[1])[np.concatenate(indices)]
    return np.abs(np.cumsum(came, 0) - np.cumsum(targets, 0)).max()


def bound(count: int) -> float:
    return 1 - 1 / (2 * count - 2) if count > 1 else 0.0


@pytest.mark.parametrize("count", [1, 2, 3, 16, 100])
@pytest.mark.parametrize("name", MIXING)
def test_every_prefix_has_each_share_to_within_one_row(name, count):
    sizes = lopsided(count)
    probabilities = probabilities_of(name, sizes)
    rows = [np.concatenate(epoch) for epoch in batches(make_sampler(sizes, probabilities))]
    assert all(len(epoch) == -(-sum(sizes.values()) // 8) * 8 for epoch in rows)
    deviation = largest_deviation([dataset_numbers(sizes, epoch) for epoch in rows], probabilities)
    assert deviation <= bound(count) + 1e-6


@pytest.mark.parametrize("count", [2, 3, 16, 100])
def test_shares_that_change_with_each_epoch_are_kept_too(count):
    draw = np.random.default_rng(count)
    table = draw.random((6, count)) + 0.05
    table /= table.sum(1, keepdims=True)
    schedule = Schedule(lambda epoch: table[min(epoch, 5)].tolist(), 3 * count + 1)
    indices = [np.array(list(schedule.epoch(epoch))) for epoch in range(6)]
    assert largest_deviation(indices, lambda epoch: table[epoch]) <= bound(count) + 1e-6


@pytest.mark.parametrize("count", [3, 5])
def test_a_change_of_shares_is_seen_coming(count):
    draw = np.random.default_rng(0)
    for _ in range(150):
        table = draw.random((2, count)) ** 2 + 1e-6
        table /= table.sum(1, keepdims=True)
        schedule = Schedule(lambda epoch, table=table: table[min(epoch, 1)].tolist(), 10 * count)
        indices = [np.array(list(schedule.epoch(epoch))) for epoch in range(2)]
        assert largest_deviation(indices, lambda epoch, table=table: table[epoch]) <= bound(count) + 1e-6


def test_two_equal_shares_take_turns():
    schedule = Schedule(lambda epoch: [0.5, 0.5], 7)
    order = [index for epoch in range(3) for index in schedule.epoch(epoch)]
    assert order == [order[0], 1 - order[0]] * 10 + [order[0]]


def test_an_exact_share_comes_exactly():
    counts = np.bincount(list(Schedule(lambda epoch: [0.7, 0.2, 0.1], 1000).epoch(0)))
    assert counts.tolist() == [700, 200, 100]


@pytest.mark.parametrize("composition", ["mixed", "single_task"])
@pytest.mark.parametrize("name", MIXING)
def test_every_row_comes_once_per_pass(name, composition):
    sizes = {"a": 60, "b": 41, "c": 17, "one": 1, "two": 2}
    sampler = make_sampler(sizes, probabilities_of(name, sizes), composition=composition)
    rows = np.concatenate(sum(batches(sampler, range(30)), []))
    start = 0
    for number, size in enumerate(sizes.values()):
        own = rows[dataset_numbers(sizes, rows) == number] - start
        whole = len(own) // size
        assert whole >= 1
        passes = own[: whole * size].reshape(whole, size)
        assert (np.sort(passes, 1) == np.arange(size)).all()
        assert len(set(own[whole * size :])) == len(own) % size
        if size > 9:
            assert len({tuple(one) for one in passes}) == whole  # a new order in each pass
            assert not (passes[0] == np.arange(size)).all()
        start += size


LAYOUTS = {"1 process x 32": (32, 1, 1), "8 batches x 4": (4, 8, 1), "2 processes x 16": (16, 1, 2), "all": (4, 4, 2)}


def windows(layout: str, sizes: dict[str, int], **options) -> list[list[list[int]]]:
    """Return, per epoch, the sorted rows of each window."""
    rows_per_batch, accumulation, num_processes = LAYOUTS[layout]
    ranks = [
        batches(
            make_sampler(
                sizes,
                probabilities_of("annealed", sizes),
                rows_per_batch=rows_per_batch,
                accumulation=accumulation,
                num_processes=num_processes,
                process_index=rank,
                **options,
            )
        )
        for rank in range(num_processes)
    ]
    result = []
    for epoch in range(EPOCHS):
        parts = [rank[epoch] for rank in ranks]
        assert len({len(part) for part in parts}) == 1
        assert all(len(batch) == rows_per_batch for part in parts for batch in part)
        steps = range(0, len(parts[0]), accumulation)
        result.append(
            [sorted(row for part in parts for batch in part[i : i + accumulation] for row in batch) for i in steps]
        )
    return result


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_every_layout_has_the_same_rows_in_every_window(layout, drop_last):
    sizes = {"a": 310, "b": 47, "c": 5}
    expected = windows("1 process x 32", sizes, drop_last=drop_last)
    assert [len(epoch) for epoch in expected] == [362 // 32 if drop_last else 362 // 32 + 1] * EPOCHS
    assert windows(layout, sizes, drop_last=drop_last) == expected


def test_processes_read_different_places_of_one_sequence():
    sizes = {"a": 50, "b": 30}
    whole = sum(batches(make_sampler(sizes, rows_per_batch=4, num_processes=1))[0], [])
    parts = [batches(make_sampler(sizes, rows_per_batch=4, num_processes=2, process_index=rank))[0] for rank in (0, 1)]
    interleaved = [row for pair in zip(*parts, strict=True) for batch in pair for row in batch]
    assert interleaved == whole


@pytest.mark.parametrize("composition", ["mixed", "single_task"])
@pytest.mark.parametrize("name", MIXING)
def test_an_epoch_does_not_depend_on_what_was_read_before(name, composition):
    sizes = lopsided(3)

    def fresh():
        return make_sampler(sizes, probabilities_of(name, sizes), composition=composition)

    expected = batches(fresh())
    assert batches(fresh(), [3]) == expected[3:]
    assert batches(fresh(), [3, 0, 2, 2, 1]) == [expected[i] for i in (3, 0, 2, 2, 1)]
    interrupted = fresh()
    iterator = iter(interrupted)
    assert [next(iterator) for _ in range(5)] == expected[0][:5]
    assert batches(interrupted, [0, 1]) == expected[:2]
    assert expected[0] != expected[1]


def test_global_random_state_is_neither_read_nor_changed():
    sizes = lopsided(3)

    def run(seed):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        result = batches(make_sampler(sizes))
        assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
        return result

    assert run(1) == run(2)


def test_another_dataset_does_not_change_a_datasets_own_order():
    def order(sizes, name):
        numbers, start = list(sizes), 0
        for before in numbers[: numbers.index(name)]:
            start += sizes[before]
        rows = np.concatenate(sum(batches(make_sampler(sizes)), []))
        return (rows[dataset_numbers(sizes, rows) == numbers.index(name)] - start).tolist()

    alone = order({"a": 60, "b": 20}, "b")
    beside = order({"new": 35, "a": 60, "b": 20}, "b")
    common = min(len(alone), len(beside))
    assert common >= 40 and alone[:common] == beside[:common]


def test_datasets_of_equal_size_have_orders_of_their_own():
    sizes = {"a": 40, "b": 40}
    rows = np.concatenate(batches(make_sampler(sizes))[0])
    assert rows[rows < 40].tolist() != (rows[rows >= 40] - 40).tolist()


@pytest.mark.parametrize("composition", ["mixed", "single_task"])
def test_a_seed_changes_the_rows_but_not_the_datasets(composition):
    sizes = lopsided(3)
    one, same, other = (
        np.concatenate(batches(make_sampler(sizes, seed=seed, composition=composition))[0]) for seed in (1, 1, 2)
    )
    assert (one == same).all() and (one != other).any()
    assert (dataset_numbers(sizes, one) == dataset_numbers(sizes, other)).all()


@pytest.mark.parametrize("count", [1, 2, 3, 16])
@pytest.mark.parametrize("name", MIXING)
def test_single_task_batches_hold_one_dataset_and_keep_its_share_of_batches(name, count):
    sizes = lopsided(count)
    probabilities = probabilities_of(name, sizes)
    indices = []
    for epoch in batches(make_sampler(sizes, probabilities, composition="single_task", accumulation=2)):
        numbers = [set(dataset_numbers(sizes, batch).tolist()) for batch in epoch]
        assert all(len(batch) == 8 for batch in epoch) and all(len(number) == 1 for number in numbers)
        indices.append(np.array([number.pop() for number in numbers]))
    assert largest_deviation(indices, probabilities) <= bound(count) + 1e-6


def test_single_task_batches_are_the_same_for_processes_and_accumulation():
    sizes = lopsided(3)
    one = batches(make_sampler(sizes, composition="single_task", accumulation=2))
    ranks = [batches(make_sampler(sizes, composition="single_task", num_processes=2, process_index=r)) for r in (0, 1)]
    for epoch in range(EPOCHS):
        assert one[epoch] == [batch for pair in zip(ranks[0][epoch], ranks[1][epoch], strict=True) for batch in pair]


@pytest.mark.parametrize("composition", ["mixed", "single_task"])
def test_a_dataset_of_weight_0_never_comes(composition):
    sizes = {"a": 30, "never": 500, "b": 20}
    probabilities = [0.25, 0.0, 0.75]
    sampler = make_sampler(sizes, lambda epoch: probabilities, composition=composition)
    numbers = dataset_numbers(sizes, np.concatenate(sum(batches(sampler), [])))
    assert set(numbers.tolist()) == {0, 2}


def test_a_small_dataset_does_not_end_the_epoch():
    sizes = {"large": 200, "small": 2}
    rows = np.concatenate(batches(make_sampler(sizes, probabilities_of("uniform", sizes)))[0])
    assert len(rows) == 208 and (rows >= 200).sum() == 104


@pytest.mark.parametrize(
    ("options", "drop_last", "windows_expected"),
    [
        ({"rows_per_batch": 10}, False, 11),
        ({"rows_per_batch": 10}, True, 10),
        ({"rows_per_batch": 15}, False, 7),
        ({"rows_per_batch": 15}, True, 7),
        ({"rows_per_batch": 4, "accumulation": 5}, False, 6),
        ({"rows_per_batch": 4, "accumulation": 5}, True, 5),
        ({"rows_per_batch": 4, "accumulation": 3, "num_processes": 2}, False, 5),
        ({"rows_per_batch": 200}, False, 1),
        ({"rows_per_batch": 200}, True, 1),
    ],
)
@pytest.mark.parametrize("composition", ["mixed", "single_task"])
def test_an_epoch_is_whole_windows_for_as_many_rows_as_there_are(options, drop_last, windows_expected, composition):
    sampler = make_sampler({"a": 60, "b": 45}, drop_last=drop_last, composition=composition, **options)
    found = batches(sampler, [0])[0]
    assert len(found) == len(sampler) == windows_expected * options.get("accumulation", 1)
    assert {len(batch) for batch in found} == {options["rows_per_batch"]}
    window = options["rows_per_batch"] * options.get("accumulation", 1) * options.get("num_processes", 1)
    assert windows_per_epoch(105, window, drop_last) == windows_expected


@pytest.mark.parametrize("composition", ["mixed", "single_task"])
def test_workers_load_the_same_batches(datasets, tasks, tokenizer, composition):
    rows = prepare_sources(datasets, make_sources(tasks), "train_dataset", tokenizer=tokenizer, max_length=32)

    def load(workers):
        sampler = make_sampler(rows.sizes, composition=composition)
        sampler.set_epoch(1)
        collator = DataCollatorForMultiTask(tokenizer, tasks)
        return list(DataLoader(rows, batch_sampler=sampler, collate_fn=collator, num_workers=workers))

    here, there = load(0), load(2)
    assert len(here) == len(there) == -(-len(rows) // 8)
    for one, other in zip(here, there, strict=True):
        assert one.keys() == other.keys() and one["segments"] == other["segments"]
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert all(torch.equal(one["labels"][task], other["labels"][task]) for task in one["labels"])


@pytest.mark.parametrize("period", [None, 1, 7, 90])
@pytest.mark.parametrize("seed", range(15))
def test_the_bound_holds_for_any_change_of_shares_between_periods(seed, period):
    draw = random.Random(seed)
    size, length, epochs = draw.choice([2, 3, 5, 9]), draw.choice([3, 20, 57]), 8

    def shares():
        weights = [draw.random() ** draw.choice([1, 8]) if draw.random() < 0.8 else 0.0 for _ in range(size)]
        weights[draw.randrange(size)] += 0.1
        return [weight / sum(weights) for weight in weights]

    places = length if period is None else period
    table = [shares() for _ in range(-(-epochs * length // places))]
    schedule = Schedule(lambda number: table[min(number, len(table) - 1)], length, places_per_period=period)
    targets, counts, worst, place = [0.0] * size, [0] * size, 0.0, 0
    for epoch in range(epochs):
        for index in schedule.epoch(epoch):
            counts[index] += 1
            targets = [x + p for x, p in zip(targets, table[place // places], strict=True)]
            place += 1
            worst = max(worst, *(abs(a - x) for a, x in zip(counts, targets, strict=True)))
    assert worst <= 1 - 1 / (2 * size - 2) + 1e-6


def draw_lengths(sizes: dict[str, int]) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {name: draw.integers(3, 60 if name == "a" else 400, size) for name, size in sizes.items()}


def test_grouping_by_length_keeps_shares_and_passes():
    sizes = {"a": 700, "b": 130, "c": 9}
    grouped = [np.concatenate(epoch) for epoch in batches(make_sampler(sizes, lengths=draw_lengths(sizes)))]
    plain = [np.concatenate(epoch) for epoch in batches(make_sampler(sizes))]
    for one, other in zip(grouped, plain, strict=True):
        assert (dataset_numbers(sizes, one) == dataset_numbers(sizes, other)).all()
        assert (one != other).any()
    rows = np.concatenate(grouped)
    small = rows[dataset_numbers(sizes, rows) == 2]
    for start in range(0, len(small) - 9, 9):
        assert sorted(small[start : start + 9]) == list(range(830, 839))


def test_grouping_by_length_is_the_same_for_every_layout():
    sizes = {"a": 700, "b": 130}
    lengths = draw_lengths(sizes)
    whole = sum(batches(make_sampler(sizes, lengths=lengths))[1], [])
    accumulated = sum(batches(make_sampler(sizes, lengths=lengths, rows_per_batch=2, accumulation=4))[1], [])
    options = dict(lengths=lengths, rows_per_batch=4, num_processes=2)
    ranks = [batches(make_sampler(sizes, **options, process_index=rank))[1] for rank in (0, 1)]
    assert whole == accumulated == sum([row for pair in zip(*ranks, strict=True) for row in pair], [])


@pytest.mark.parametrize("composition", ["mixed", "single_task"])
def test_grouping_by_length_brings_rows_of_like_length_together(composition):
    sizes = {"a": 4000, "b": 3000}
    lengths = draw_lengths(sizes)
    all_lengths = np.concatenate(list(lengths.values()))

    def padding(**options) -> int:
        """Tokens of padding if each dataset's part of a batch is padded to its longest row."""
        total = 0
        for batch in sum(batches(make_sampler(sizes, rows_per_batch=32, composition=composition, **options)), []):
            for number in (0, 1):
                own = all_lengths[np.array(batch)[dataset_numbers(sizes, batch) == number]]
                total += len(own) * own.max(initial=0) - own.sum()
        return total

    assert padding(lengths=lengths) < 0.15 * padding()


def test_grouping_by_length_begins_with_the_longest_rows_of_a_stretch():
    sizes = {"a": 8000}
    lengths = draw_lengths(sizes)
    found = lengths["a"][np.concatenate(batches(make_sampler(sizes, lengths=lengths))[0])]
    stretches = found.reshape(-1, 400)  # fifty windows of eight rows
    assert (np.diff(stretches) <= 0).all() and len(np.unique(stretches, axis=0)) == 20


# Shares that change in the course of training


def draw_shares(draw: random.Random, size: int) -> list[float]:
    weights = [draw.random() ** draw.choice([1, 8]) if draw.random() < 0.8 else 0.0 for _ in range(size)]
    weights[draw.randrange(size)] += 0.1
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("seed", range(40))
def test_around_changes_every_share_is_kept_to_within_two_rows(seed):
    draw = random.Random(seed)
    size, per_step, steps = draw.choice([2, 3, 5, 9]), draw.choice([1, 4, 32]), draw.choice([3, 10, 25])
    first = draw_shares(draw, size)
    changes = ShareChanges({draw.randrange(4 * steps): draw_shares(draw, size) for _ in range(draw.choice([1, 3, 8]))})
    schedule = Schedule(lambda epoch: first, steps * per_step, changes, per_step)
    indices = np.concatenate([list(schedule.epoch(epoch)) for epoch in range(4)])
    shares, targets = first, []
    for place in range(len(indices)):
        shares = changes.by_step.get(place // per_step, shares) if place % per_step == 0 else shares
        targets.append(shares)
    deviation = np.abs(np.cumsum(np.eye(size)[indices], 0) - np.cumsum(targets, 0)).max()
    assert deviation < 2
    counts = [Schedule(lambda epoch: first, steps * per_step, changes, per_step).counts_before(e) for e in range(5)]
    assert (np.diff(counts, axis=0).sum(1) == steps * per_step).all()
    assert counts[-1] == np.bincount(indices, minlength=size).tolist()


SIZES = {"a": 70, "b": 50, "c": 8}
FIRST, SECOND, THIRD = [0.6, 0.3, 0.1], [0.0, 0.2, 0.8], [0.3, 0.4, 0.3]


def train_on(changes: ShareChanges, moments: dict[int, tuple[int, list[float]]], workers: int = 0, **options):
    """Return the batches that a loader hands out; after some steps of training, shares change from a later one on."""
    accumulation = options.get("accumulation", 1)
    sampler = make_sampler(SIZES, lambda epoch: FIRST, changes=changes, **options)
    found, step = [], 0
    for epoch in range(3):
        sampler.set_epoch(epoch)
        loader = DataLoader(range(1000), batch_sampler=sampler, num_workers=workers, collate_fn=list)
        for number, batch in enumerate(loader, 1):
            found.append(batch)
            if number % accumulation == 0:
                step += 1
                if step in moments:
                    changes.add(*moments[step])
    return found


@pytest.mark.parametrize("composition", ["mixed", "single_task"])
@pytest.mark.parametrize("options", [dict(rows_per_batch=8), dict(rows_per_batch=4, accumulation=2)])
def test_a_change_during_training_is_the_same_as_one_known_from_the_start(composition, options):
    moments = {6: (9, SECOND), 15: (16, THIRD), 20: (33, SECOND)}
    options = dict(options, composition=composition)
    found = train_on(ShareChanges(), moments, **options)
    known = ShareChanges(dict(moments.values()))
    assert sum(batches(make_sampler(SIZES, lambda epoch: FIRST, changes=known, **options), range(3)), []) == found
    unchanged = train_on(ShareChanges(), {}, **options)
    first = 9 * options.get("accumulation", 1)
    assert found[:first] == unchanged[:first] and found[first : first + 7] != unchanged[first : first + 7]
    if composition == "mixed":
        counts = np.bincount(dataset_numbers(SIZES, np.concatenate(found[first : first + 7])), minlength=3)
        assert counts[0] <= 1  # its share is 0 there


def test_a_change_is_the_same_for_workers_that_draw_ahead():
    moments = {5: (11, SECOND), 20: (26, THIRD)}
    assert train_on(ShareChanges(), moments) == train_on(ShareChanges(), moments, workers=2)


def test_a_change_is_the_same_for_every_layout():
    known = {9: SECOND, 33: THIRD}
    ends = []
    for rows, accumulation, processes in LAYOUTS.values():
        ranks = [
            sum(
                batches(
                    make_sampler(
                        SIZES,
                        lambda epoch: FIRST,
                        rows_per_batch=rows,
                        accumulation=accumulation,
                        num_processes=processes,
                        process_index=rank,
                        changes=ShareChanges(dict(known)),
                    ),
                    range(10),
                ),
                [],
            )
            for rank in range(processes)
        ]
        flat = [row for i in range(len(ranks[0])) for rank in ranks for row in rank[i]]
        ends.append([sorted(flat[i : i + 32]) for i in range(0, len(flat), 32)])
    assert all(end == ends[0] for end in ends)


def test_a_change_that_comes_too_late_is_an_error_and_not_another_order():
    with pytest.raises(RuntimeError, match="from step 5 on: rows of step 8 were drawn already"):
        train_on(ShareChanges(), {5: (5, SECOND)}, workers=2)
    changes = ShareChanges()
    train_on(changes, {})
    changes.restart({3: SECOND})
    assert changes.by_step == {3: SECOND} and changes.drawn == -1


# ---- shares that follow the progress of the training ----


def annealed_args(tmp_path, **arguments):
    defaults = dict(task_sampling="annealed", per_device_train_batch_size=8, report_to="none", use_cpu=True)
    return MultiTaskTrainingArguments(str(tmp_path), **{**defaults, **arguments})


class Sized:
    """Stands for prepared rows, of which a sampler asks the sizes alone."""

    def __init__(self, **sizes):
        self.sizes = sizes


LENGTHS = {
    "one epoch": dict(num_train_epochs=1),
    "below one epoch": dict(max_steps=90),
    "three epochs": dict(num_train_epochs=3),
    "a part of an epoch more": dict(num_train_epochs=1.5),
    "accumulated": dict(max_steps=60, gradient_accumulation_steps=2),
    "batches of one dataset": dict(max_steps=120, batch_composition="single_task"),
    "more steps than periods": dict(max_steps=2500),
}


@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.sample(3)
def test_annealed_anneals_over_the_steps_of_the_training(case, tmp_path):
    sizes, args = dict(large=1600, middle=160, small=16), annealed_args(tmp_path, **LENGTHS[case])
    sampler = sampler_of_args(args, Sized(**sizes), 8)
    window = 8 * args.gradient_accumulation_steps
    steps = total_steps(args, len(sampler) // args.gradient_accumulation_steps)
    came, epoch = [], 0
    while len(came) < steps * window:
        sampler.set_epoch(epoch)
        came += [row for batch in sampler for row in batch]
        epoch += 1
    came = np.eye(3)[dataset_numbers(sizes, came[: steps * window])]
    length = -(-steps // MOST_PERIODS)
    periods = -(-steps // length)
    progress = [min(step // length / (periods - 1), 1.0) for step in range(steps)]
    shares = [mixing_probabilities("annealed", sizes, progress=part) for part in progress]
    # What it begins and ends with, and the count at every prefix in between.
    assert shares[0] == pytest.approx([n / 1776 for n in sizes.values()])
    assert shares[-1] == pytest.approx(mixing_probabilities("temperature", sizes, {"alpha": 0.2}))
    targets = np.cumsum(np.repeat(shares, window, axis=0), 0)
    per_place = 8 if args.batch_composition == "single_task" else 1
    off = np.abs(np.cumsum(came, 0) - targets)[per_place - 1 :: per_place] / per_place
    assert off.max() <= bound(3) + 1e-6


def test_annealed_does_not_depend_on_what_was_read_before_or_on_the_layout(tmp_path):
    sizes = dict(large=400, middle=90, small=7)

    def read(epoch, **arguments):
        sampler = sampler_of_args(annealed_args(tmp_path, max_steps=170, **arguments), Sized(**sizes), 8)
        sampler.set_epoch(epoch)
        return [row for batch in sampler for row in batch]

    through = sampler_of_args(annealed_args(tmp_path, max_steps=170), Sized(**sizes), 8)
    in_turn = []
    for epoch in range(3):
        through.set_epoch(epoch)
        in_turn.append([row for batch in through for row in batch])
    assert in_turn == [read(epoch) for epoch in range(3)]
    assert len({tuple(np.bincount(dataset_numbers(sizes, rows), minlength=3)) for rows in in_turn}) == 3
    halves = sampler_of_args(
        annealed_args(tmp_path, max_steps=170, per_device_train_batch_size=4, gradient_accumulation_steps=2),
        Sized(**sizes),
        4,
    )
    assert [row for batch in halves for row in batch] == in_turn[0]
