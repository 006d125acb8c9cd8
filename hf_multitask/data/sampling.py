"""Which dataset the next row comes from: mixing strategies, the schedule and the batch sampler.

**Mixing strategies** are pure functions from dataset sizes to probabilities, listed in `MIXING`. What they do:

- `proportional`: p ∝ n. Every row is equally likely, so *large datasets dominate*: beside 100,000 rows a dataset of
  1,000 gets one row in a hundred. It protects no small task.
- `temperature`: p ∝ n^α (α = 0.75 by default). Exponents below 1 soften the dominance; 1 is proportional, 0 uniform.
  Small datasets are then read more often than large ones; their rows repeat, which can overfit them.
- `uniform`, `round_robin`: every dataset the same share, whatever its size.
- `capped`: p ∝ min(n, K) (Raffel et al. 2020): proportional, but no dataset counts for more than K rows.
- `unimax` (Chung et al. 2023): as uniform as possible while no dataset is read more than a given number of times.
- `weighted`: the shares you give.
- `annealed` (Stickland & Murray 2019): p ∝ n^α with α falling from 1 to 0.2 over the epochs, so that training begins
  proportional and ends nearly uniform.

**The schedule** turns probabilities into a sequence of datasets. It draws nothing at random: at every point of the
sequence each dataset has had its exact share of the rows to within one row. (A random draw would be off by tens of
rows, and a small task could stay absent for many steps.) This is Tijdeman's chairman assignment (Discrete
Mathematics 32, 1980), an earliest-deadline rule with that bound, for probabilities that change over time too. Rows
of a dataset come in a seeded permutation, a new one for each pass; when a dataset is used up its next pass begins,
so a small task never ends an epoch. Nothing reads the global random state: the order is a function of
(seed, epoch) alone, the same for any number of processes and workers.
"""

from __future__ import annotations

import heapq
import inspect
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..models.task import closest

__all__ = ["MIXING", "MultiTaskBatchSampler", "Schedule", "check_mixing", "mixing_probabilities"]


def _normalized(weights: Sequence[float]) -> list[float]:
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def _check_exponent(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise ValueError(f"task_sampling_kwargs: {name} must lie in [0, 1], got {value!r}")


def _check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"task_sampling_kwargs: {name} must be a positive number, got {value!r}")


def proportional(sizes: Sequence[int]) -> list[float]:
    """Return p ∝ n."""
    return _normalized(sizes)


def temperature(sizes: Sequence[int], alpha: float = 0.75) -> list[float]:
    """Return p ∝ n^α, α in [0, 1]."""
    _check_exponent("alpha", alpha)
    return _normalized([size**alpha for size in sizes])


def uniform(sizes: Sequence[int]) -> list[float]:
    """Return equal shares."""
    return [1.0 / len(sizes)] * len(sizes)


def round_robin(sizes: Sequence[int]) -> list[float]:
    """Return equal shares; the schedule then takes the datasets in turn (as it does for `uniform`)."""
    return uniform(sizes)


def capped(sizes: Sequence[int], cap: int) -> list[float]:
    """Return p ∝ min(n, K) with `cap` = K rows (Raffel et al. 2020, section 3.5.2)."""
    _check_positive("cap", cap)
    return _normalized([min(size, cap) for size in sizes])


def unimax(sizes: Sequence[int], max_passes: float = 4.0, *, total_rows: int | None = None) -> list[float]:
    """Return UniMax shares (Chung et al. 2023, algorithm 1).

    The budget of rows is dealt out equally, smallest dataset first; one that would be read more than `max_passes`
    times gets `max_passes * n` rows and what it leaves goes to the others.

    Args:
        sizes: Rows of each dataset.
        max_passes: Most passes over any dataset in the whole training.
        total_rows: The budget: rows of the whole training. The trainer knows it; by default one pass over everything.
    """
    _check_positive("max_passes", max_passes)
    budget = float(sum(sizes) if total_rows is None else total_rows)
    rows = [0.0] * len(sizes)
    for done, index in enumerate(sorted(range(len(sizes)), key=lambda i: sizes[i])):
        rows[index] = min(budget / (len(sizes) - done), max_passes * sizes[index])
        budget -= rows[index]
    return _normalized(rows)


def weighted(sizes: Sequence[int], weights: Mapping[str, float], *, names: Sequence[str]) -> list[float]:
    """Return the given shares, `weights` by name of dataset, normalised to sum to 1; 0 leaves a dataset out."""
    if not isinstance(weights, Mapping):
        raise ValueError(f"task_sampling_kwargs: weights must map dataset names to numbers, got {weights!r}")
    for name in weights:
        if name not in names:
            raise ValueError(
                f"task_sampling_kwargs: weights names no dataset {name!r}{closest(name, names)}; "
                f"datasets are {', '.join(names)}"
            )
    missing = [name for name in names if name not in weights]
    if missing:
        raise ValueError(f"task_sampling_kwargs: weights lacks {', '.join(missing)}; give each dataset a number")
    for name, value in weights.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ValueError(f"task_sampling_kwargs: weight of {name!r} must be a number of at least 0, got {value!r}")
    if not any(weights.values()):
        raise ValueError("task_sampling_kwargs: all weights are 0, no row would be drawn")
    return _normalized([weights[name] for name in names])


def annealed(
    sizes: Sequence[int], start: float = 1.0, end: float = 0.2, *, epoch: int, num_epochs: int
) -> list[float]:
    """Return p ∝ n^α with α going linearly from `start` (first epoch) to `end` (last epoch)."""
    _check_exponent("start", start)
    _check_exponent("end", end)
    progress = min(epoch / (num_epochs - 1), 1.0) if num_epochs > 1 else 0.0
    return temperature(sizes, start + (end - start) * progress)


MIXING: dict[str, Callable[..., list[float]]] = {
    function.__name__: function
    for function in (proportional, temperature, uniform, round_robin, capped, unimax, weighted, annealed)
}
"""Mixing strategies by name: sizes (and the strategy's own arguments) → probabilities that sum to 1."""

# What the trainer tells a strategy that asks for it; all other arguments are the user's.
_CONTEXT = ("names", "epoch", "num_epochs", "total_rows")


def check_mixing(name: str, kwargs: Mapping[str, Any] | None = None) -> None:
    """Check a strategy's name and the names of its arguments.

    Raises:
        ValueError: The strategy or an argument is unknown (the nearest name is given), or one is missing.
    """
    if name not in MIXING:
        raise ValueError(f"task_sampling {name!r} is not known{closest(name, MIXING)}; choose from {', '.join(MIXING)}")
    parameters = inspect.signature(MIXING[name]).parameters
    own = [p for p in list(parameters)[1:] if p not in _CONTEXT]
    for key in kwargs or {}:
        if key not in own:
            raise ValueError(
                f"task_sampling_kwargs: {name!r} takes no {key!r}{closest(key, own)}; "
                f"it takes {', '.join(own) or 'no arguments'}"
            )
    for key in own:
        if parameters[key].default is inspect.Parameter.empty and key not in (kwargs or {}):
            raise ValueError(f"task_sampling {name!r} needs task_sampling_kwargs={{{key!r}: ...}}")


def mixing_probabilities(
    name: str,
    sizes: Mapping[str, int],
    kwargs: Mapping[str, Any] | None = None,
    *,
    epoch: int = 0,
    num_epochs: int = 1,
    total_rows: int | None = None,
) -> list[float]:
    """Return the probabilities of a strategy for one epoch.

    Args:
        name: A key of `MIXING`.
        sizes: Rows by dataset.
        kwargs: The strategy's own arguments.
        epoch: Number of the epoch, from 0.
        num_epochs: Epochs of the whole training.
        total_rows: Rows drawn in the whole training.

    Raises:
        ValueError: A name or value does not fit.

    Example:
        >>> mixing_probabilities("temperature", {"large": 10_000, "small": 100}, {"alpha": 0.5})
        [0.9090909090909091, 0.09090909090909091]
    """
    check_mixing(name, kwargs)
    context = {"names": list(sizes), "epoch": epoch, "num_epochs": num_epochs, "total_rows": total_rows}
    parameters = inspect.signature(MIXING[name]).parameters
    asked = {key: value for key, value in context.items() if key in parameters}
    return MIXING[name](list(sizes.values()), **(kwargs or {}), **asked)


class Schedule:
    """An endless sequence of indices in which each index has its share at every prefix, to within one.

    At place n (from 1), with `X_i(n)` the sum of the probabilities of i so far and `A_i` how often i has come, the
    indices with `X_i(n) - A_i >= 1 / (2T - 2)` may come; of these comes the one whose deadline, the first m with
    `X_i(m) - A_i >= 1 - 1 / (2T - 2)`, is the earliest. Then `|A_i(n) - X_i(n)| <= 1 - 1 / (2T - 2)` for every n.

    Args:
        probabilities: A function from the number of an epoch to the probabilities in it.
        epoch_length: Places per epoch.
    """

    def __init__(self, probabilities: Callable[[int], Sequence[float]], epoch_length: int) -> None:
        self._probabilities = probabilities
        self.epoch_length = epoch_length
        size = len(probabilities(0))
        self._margin = 1.0 / (2 * size - 2) if size > 1 else 0.0
        self._epoch = 0
        self._targets = [0.0] * size  # X_i at the start of the epoch
        self._counts = [0] * size  # A_i at the start of the epoch
        self._next: tuple[list[float], list[int]] | None = None  # the same after it, once known

    def counts_before(self, epoch: int) -> list[int]:
        """Return how often each index has come before the epoch begins."""
        if epoch < self._epoch:
            self.__init__(self._probabilities, self.epoch_length)  # type: ignore[misc]
        while self._epoch < epoch:
            if self._next is None:
                for _ in self.epoch(self._epoch):
                    pass
            assert self._next is not None
            self._targets, self._counts = self._next
            self._next = None
            self._epoch += 1
        return list(self._counts)

    def epoch(self, epoch: int) -> Iterator[int]:
        """Yield the indices of one epoch, in order: O(log T) each."""
        counts = self.counts_before(epoch)
        current, following = self._probabilities(epoch), self._probabilities(epoch + 1)
        start = list(self._targets)
        length = self.epoch_length

        def place(index: int, level: float) -> float:
            # First place n (from 1, in this epoch) at which X_index(n) reaches the level. Probabilities of the
            # epochs after the next one are taken to stay: a deadline further away decides nothing today.
            gap = level - start[index]
            here = current[index] * length
            if gap <= here + _TOLERANCE:
                return max(math.ceil(gap / current[index] - _TOLERANCE), 1) if current[index] else math.inf
            return length + math.ceil((gap - here) / following[index] - _TOLERANCE) if following[index] else math.inf

        waiting = [(place(i, counts[i] + self._margin), i) for i in range(len(counts))]
        heapq.heapify(waiting)
        ready: list[tuple[float, int]] = []
        for n in range(1, length + 1):
            while waiting and waiting[0][0] <= n:
                index = heapq.heappop(waiting)[1]
                heapq.heappush(ready, (place(index, counts[index] + 1 - self._margin), index))
            # Rounding may leave no index ready for one place; the one that is ready next then comes.
            index = heapq.heappop(ready)[1] if ready else heapq.heappop(waiting)[1]
            counts[index] += 1
            heapq.heappush(waiting, (place(index, counts[index] + self._margin), index))
            yield index
        if epoch == self._epoch:
            self._next = ([x + p * length for x, p in zip(start, current, strict=True)], counts)


_TOLERANCE = 1e-9


class MultiTaskBatchSampler:
    """Batches of global row numbers for one process, as a pure function of (seed, epoch).

    An epoch is as many whole windows (optimizer steps) as it takes to draw as many rows as the datasets hold
    together. All processes get the same number of batches, all batches are full, and consecutive rows of the
    schedule fill a window: with the same rows per window, 1 process x 1 batch of 32, 8 accumulated batches of 4 and
    2 processes x 16 see the same rows in every step.

    There is no attribute `batch_size` on purpose: Accelerate's wrapper would otherwise drop groups of batches.

    Args:
        sizes: Rows by dataset; a row's global number is its number in the dataset plus the sizes before it.
        probabilities: A function from the number of an epoch to the probabilities in it.
        rows_per_batch: Rows of one batch on one process.
        accumulation: Batches per process and optimizer step.
        num_processes: Number of processes.
        process_index: Rank of this process.
        seed: Seed of the permutations.
        composition: `mixed` batches, or all rows of a batch from one dataset (`single_task`).
        drop_last: Round the length of an epoch down to whole windows instead of up.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        probabilities: Callable[[int], Sequence[float]],
        *,
        rows_per_batch: int,
        accumulation: int = 1,
        num_processes: int = 1,
        process_index: int = 0,
        seed: int = 0,
        composition: str = "mixed",
        drop_last: bool = False,
    ) -> None:
        self.sizes = dict(sizes)
        self.seed = seed
        self.epoch = 0
        self._rows_per_batch = rows_per_batch
        self._num_processes = num_processes
        self._process_index = process_index
        self._single = composition == "single_task"
        self._offsets = dict(zip(self.sizes, np.cumsum([0, *self.sizes.values()]).tolist(), strict=False))
        window = rows_per_batch * accumulation * num_processes
        total = sum(self.sizes.values())
        self.windows_per_epoch = max(total // window if drop_last else math.ceil(total / window), 1)
        self._batches = self.windows_per_epoch * accumulation
        # One place of the schedule is a row, or, in batches of a single task, a whole batch.
        self._rows_per_place = rows_per_batch if self._single else 1
        self.schedule = Schedule(probabilities, self._batches * num_processes * rows_per_batch // self._rows_per_place)
        self._permutations: dict[str, tuple[int, np.ndarray]] = {}

    def __len__(self) -> int:
        """Return the number of batches of this process in an epoch."""
        return self._batches

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this process's batches of the epoch."""
        names = list(self.sizes)
        drawn = [count * self._rows_per_place for count in self.schedule.counts_before(self.epoch)]
        places = self.schedule.epoch(self.epoch)
        places_per_batch = self._rows_per_batch // self._rows_per_place
        for number in range(self._batches * self._num_processes):
            batch: list[int] = []
            mine = number % self._num_processes == self._process_index
            for _ in range(places_per_batch):
                index = next(places)
                if mine:
                    for row in range(drawn[index], drawn[index] + self._rows_per_place):
                        batch.append(self._row(names[index], row))
                drawn[index] += self._rows_per_place
            if mine:
                yield batch
        # Let the schedule note where the epoch ended.
        next(places, None)

    def _row(self, name: str, number: int) -> int:
        """Return the global row that is drawn as the `number`-th of a dataset."""
        repeat, position = divmod(number, self.sizes[name])
        known = self._permutations.get(name)
        if known is None or known[0] != repeat:
            # Named by the dataset, not by its place: another task beside it does not change its order.
            generator = np.random.Generator(np.random.PCG64([self.seed, zlib.crc32(name.encode()), repeat]))
            known = (repeat, generator.permutation(self.sizes[name]))
            self._permutations[name] = known
        return self._offsets[name] + int(known[1][position])
