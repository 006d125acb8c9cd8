"""The order of the rows: a low-discrepancy schedule and the batch sampler.

The schedule turns the probabilities of a mixing strategy into a sequence of datasets. It draws nothing at random: at
every point of the sequence each dataset has had its exact share of the rows to within one row. (A random draw would
be off by tens of rows, and a small task could stay absent for many steps.) This is Tijdeman's chairman assignment
(Discrete Mathematics 32, 1980), an earliest-deadline rule with that bound, for probabilities that change over time
too. Rows of a dataset come in a seeded permutation, a new one for each pass; when a dataset is used up its next pass
begins, so a small task never ends an epoch. Nothing reads the global random state: the order is a function of
(seed, epoch) alone, the same for any number of processes and workers.

Where probabilities follow the training itself, as in `performance_gap`, [`ShareChanges`] says from which optimizer step
on which hold; the order then is a function of (seed, epoch, changes). A change is not seen coming, so shortly after one
a dataset can be off by nearly two rows.
"""

from __future__ import annotations

import heapq
import math
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

__all__ = ["MOST_PERIODS", "MultiTaskBatchSampler", "RowNumber", "Schedule", "ShareChanges", "windows_per_epoch"]


class RowNumber(int):
    """A row's number that remembers in which pass over its dataset it was drawn, from 0: `repeat`."""

    repeat: int

    def __new__(cls, number: int, repeat: int) -> RowNumber:
        """Make the number."""
        result = super().__new__(cls, number)
        result.repeat = repeat
        return result

    def __getnewargs__(self) -> tuple[int, int]:  # type: ignore[override]
        return int(self), self.repeat


@dataclass
class ShareChanges:
    """Probabilities that are found out in the course of training, by the optimizer step from which on they hold.

    The loader draws rows ahead of training, so a change must lie ahead of what has been drawn.

    Args:
        by_step: Probabilities by number of the step, from 0.
        drawn: The last step of which a row was drawn.
    """

    by_step: dict[int, list[float]] = field(default_factory=dict)
    drawn: int = -1

    def at(self, step: int) -> list[float] | None:
        """Return the probabilities that a step begins with, or None where they stay; its rows are drawn now."""
        self.drawn = max(self.drawn, step)
        return self.by_step.get(step)

    def add(self, step: int, probabilities: Sequence[float]) -> None:
        """Change the probabilities from a step on.

        Raises:
            RuntimeError: Rows of that step were drawn already.
        """
        if step <= self.drawn:
            raise RuntimeError(
                f"shares cannot change from step {step} on: rows of step {self.drawn} were drawn already"
            )
        self.by_step[step] = list(probabilities)

    def restart(self, by_step: Mapping[int, Sequence[float]] | None = None) -> None:
        """Begin a run, with the changes of a checkpoint or with none."""
        self.by_step = {step: list(probabilities) for step, probabilities in (by_step or {}).items()}
        self.drawn = -1


class Schedule:
    """An endless sequence of indices in which each index has its share at every prefix, to within one.

    At place n (from 1), with `X_i(n)` the sum of the probabilities of i so far and `A_i` how often i has come, the
    indices with `X_i(n) - A_i >= 1 / (2T - 2)` may come; of these comes the one whose deadline, the first m with
    `X_i(m) - A_i >= 1 - 1 / (2T - 2)`, is the earliest. Then `|A_i(n) - X_i(n)| <= 1 - 1 / (2T - 2)` for every n.

    Args:
        probabilities: A function from the number of a period to the probabilities in it.
        epoch_length: Places per epoch.
        changes: Probabilities that take the place of these from some step on; looked up when the step is drawn.
        places_per_step: Places per optimizer step.
        places_per_period: Places per period, counted from the start of training; by default a period is an epoch.
    """

    def __init__(
        self,
        probabilities: Callable[[int], Sequence[float]],
        epoch_length: int,
        changes: ShareChanges | None = None,
        places_per_step: int = 1,
        places_per_period: int | None = None,
    ) -> None:
        self._probabilities = probabilities
        self.epoch_length = epoch_length
        self._period = epoch_length if places_per_period is None else places_per_period
        self._changes = changes
        self._places_per_step = places_per_step
        size = len(probabilities(0))
        self._margin = 1.0 / (2 * size - 2) if size > 1 else 0.0
        self._epoch = 0
        self._targets = [0.0] * size  # X_i at the start of the epoch
        self._counts = [0] * size  # A_i at the start of the epoch
        self._changed: Sequence[float] | None = None  # the last change before the epoch
        self._next: tuple[list[float], list[int], Sequence[float] | None] | None = None  # the same after it, once known

    def counts_before(self, epoch: int) -> list[int]:
        """Return how often each index has come before the epoch begins."""
        if epoch < self._epoch:
            self.__init__(  # type: ignore[misc]
                self._probabilities, self.epoch_length, self._changes, self._places_per_step, self._period
            )
        while self._epoch < epoch:
            if self._next is None:
                for _ in self.epoch(self._epoch):
                    pass
            assert self._next is not None
            self._targets, self._counts, self._changed = self._next
            self._next = None
            self._epoch += 1
        return list(self._counts)

    def _change_at(self, place: int) -> Sequence[float] | None:
        """Return the probabilities that begin at a place, counted from the start of training."""
        if self._changes is None or place % self._places_per_step:
            return None
        return self._changes.at(place // self._places_per_step)

    def epoch(self, epoch: int) -> Iterator[int]:
        """Yield the indices of one epoch, in order: O(log T) each."""
        counts = self.counts_before(epoch)
        targets, changed = self._targets, self._changed
        done, due = 0, None
        while done < self.epoch_length:
            here = epoch * self.epoch_length + done
            due = self._change_at(here) if due is None else due
            changed = changed if due is None else due
            number, offset = divmod(here, self._period)
            shares = self._probabilities(number) if changed is None else changed
            left = self.epoch_length - done
            length = left if changed is not None else min(left, self._period - offset)
            places, due = yield from self._stretch(here, length, targets, counts, changed)
            targets = [x + p * places for x, p in zip(targets, shares, strict=True)]
            done += places
        if epoch == self._epoch:
            self._next = (targets, counts, changed)

    def _stretch(
        self, begin: int, length: int, start: list[float], counts: list[int], changed: Sequence[float] | None
    ) -> Generator[int, None, tuple[int, Sequence[float] | None]]:
        """Yield the indices of a number of places, or of those up to the next change; count them in `counts`.

        Args:
            begin: The first place, counted from the start of training.
            length: Number of places, all of one period.
            start: `X_i` before the first of them.
            counts: `A_i`, kept up to date.
            changed: Probabilities in place of those of the periods.

        Returns:
            The number of places that came, and the change that ended them, or None.
        """
        number, offset = divmod(begin, self._period)
        ahead: list[Sequence[float]] = []

        def place(index: int, level: float) -> float:
            # First place n (from 1, counted here and on into later periods) where X_index(n) reaches the level.
            gap = level - start[index]
            if gap <= _TOLERANCE:
                return 1
            before = 0
            for later in range(_LOOKAHEAD):
                if later == len(ahead):
                    ahead.append(self._probabilities(number + later) if changed is None else changed)
                probability = ahead[later][index]
                places = self._period - (0 if later else offset)
                if gap <= probability * places + _TOLERANCE:
                    return before + max(math.ceil(gap / probability - _TOLERANCE), 1)
                gap -= probability * places
                before += places
            # So far away that it makes no difference how the shares change until then.
            return before + math.ceil(gap / probability) if probability else math.inf

        waiting = [(place(i, counts[i] + self._margin), i) for i in range(len(counts))]
        heapq.heapify(waiting)
        ready: list[tuple[float, int]] = []
        for n in range(1, length + 1):
            due = self._change_at(begin + n - 1) if n > 1 else None
            if due is not None:
                return n - 1, due
            while waiting and waiting[0][0] <= n:
                index = heapq.heappop(waiting)[1]
                heapq.heappush(ready, (place(index, counts[index] + 1 - self._margin), index))
            # Rounding may leave no index ready for one place; the one that is ready next then comes.
            index = heapq.heappop(ready)[1] if ready else heapq.heappop(waiting)[1]
            counts[index] += 1
            heapq.heappush(waiting, (place(index, counts[index] + self._margin), index))
            yield index
        return length, None


_STRETCH = 50  # windows that are sorted by length together, as in `transformers`
_TOLERANCE = 1e-9
MOST_PERIODS = 1000
"""In how many periods of constant shares a training is cut whose shares follow its progress."""
_LOOKAHEAD = MOST_PERIODS + 24  # periods: to the end of training, behind which shares stay


def windows_per_epoch(total_rows: int, window_rows: int, drop_last: bool = False) -> int:
    """Return the optimizer steps of an epoch: whole windows for as many rows as there are, at least one."""
    return max(total_rows // window_rows if drop_last else -(-total_rows // window_rows), 1)


class MultiTaskBatchSampler:
    """Batches of global row numbers for one process, as a pure function of (seed, epoch).

    An epoch is as many whole windows (optimizer steps) as it takes to draw as many rows as the datasets hold
    together. All processes get the same number of batches, all batches are full, and consecutive rows of the
    schedule fill a window: with the same rows per window, 1 process x 1 batch of 32, 8 accumulated batches of 4 and
    2 processes x 16 see the same rows in every step.

    There is no attribute `batch_size` on purpose: Accelerate's wrapper would otherwise drop groups of batches.

    Args:
        sizes: Rows by dataset; a row's global number is its number in the dataset plus the sizes before it.
        probabilities: A function from the number of a period to the probabilities in it.
        rows_per_batch: Rows of one batch on one process.
        accumulation: Batches per process and optimizer step.
        num_processes: Number of processes.
        process_index: Rank of this process.
        seed: Seed of the permutations.
        composition: `mixed` batches, or all rows of a batch from one dataset (`single_task`).
        drop_last: Round the length of an epoch down to whole windows instead of up.
        lengths: By dataset, the length of each row: then rows of similar length come together, which pads less. Each
            pass is cut into stretches, of some fifty windows where there are that many, and each begins with its
            longest rows. Shares, and what a pass holds, stay as they are. None leaves a pass in random order.
        changes: Probabilities that take the place of the first ones from some optimizer step on.
        windows_per_period: Optimizer steps per period; by default a period is an epoch.
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
        lengths: Mapping[str, np.ndarray] | None = None,
        changes: ShareChanges | None = None,
        windows_per_period: int | None = None,
    ) -> None:
        self.sizes = dict(sizes)
        self._lengths = lengths
        self.seed = seed
        self.epoch = 0
        self._rows_per_batch = rows_per_batch
        self._num_processes = num_processes
        self._process_index = process_index
        self._single = composition == "single_task"
        self._offsets = dict(zip(self.sizes, np.cumsum([0, *self.sizes.values()]).tolist(), strict=False))
        window = rows_per_batch * accumulation * num_processes
        self._batches = windows_per_epoch(sum(self.sizes.values()), window, drop_last) * accumulation
        # One place of the schedule is a row, or, in batches of a single task, a whole batch.
        self._rows_per_place = rows_per_batch if self._single else 1
        places = self._batches * num_processes * rows_per_batch // self._rows_per_place
        per_step = window // self._rows_per_place
        period = None if windows_per_period is None else windows_per_period * per_step
        self.schedule = Schedule(probabilities, places, changes, per_step, period)
        self._permutations: dict[str, tuple[int, np.ndarray]] = {}
        windows = self._batches // accumulation
        self._stretches = -(-windows // max(min(_STRETCH, windows // 4), 1))

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
            order = generator.permutation(self.sizes[name])
            if self._lengths is not None:
                size = -(-len(order) // self._stretches)
                parts = [order[start : start + size] for start in range(0, len(order), size)]
                order = np.concatenate([p[np.argsort(-self._lengths[name][p], kind="stable")] for p in parts])
            known = (repeat, order)
            self._permutations[name] = known
        return RowNumber(self._offsets[name] + int(known[1][position]), repeat)
