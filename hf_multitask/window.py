"""What one optimizer step holds: rows and items per task, over all its micro-batches and processes.

A task counts as present if the window has labelled items of it. Rows without a single one (a text that the tokenizer
makes nothing of, labels that are all -100) say nothing about the task: their loss of 0 does not mean that it is solved.

The loss of a task is its summed item losses over the items of the *window*, not of the micro-batch they came in, and
its share is its fraction of the window's rows. So the same rows give the same update whether they come as one batch
of 32, as eight of 4, or as 16 on each of two processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["TaskProgress", "WatchedWindow", "Window", "count_window"]


@dataclass(frozen=True)
class Window:
    """Rows and items of each task that has labelled items in a window.

    Args:
        rows: Number of rows by task; a row that two tasks read counts for each.
        items: Number of labelled items by task, at least 1: rows, or tokens for token-level tasks.
        tokens: Number of tokens of all rows, each row counted once.
    """

    rows: dict[str, int]
    items: dict[str, int]
    tokens: int = 0

    def shares(self, reduction: str = "rows") -> dict[str, float]:
        """Return each task's share of the loss; shares sum to 1.

        Args:
            reduction: `rows` for the fraction of the rows, `tasks` for the same share for every task that occurs.

        Example:
            >>> Window(rows={"a": 24, "b": 8}, items={"a": 24, "b": 96}).shares()
            {'a': 0.75, 'b': 0.25}
        """
        if reduction == "tasks":
            return {task: 1 / len(self.rows) for task in self.rows}
        total = sum(self.rows.values())
        return {task: rows / total for task, rows in self.rows.items()}


class WatchedWindow(Window):
    """A window that remembers whether somebody asked what it holds.

    A loss that was made without looking is a mean of its micro-batch, not a part of the window's.
    """

    was_read = False

    def __getattribute__(self, name: str) -> Any:
        if name in ("rows", "items", "tokens", "shares"):
            object.__setattr__(self, "was_read", True)
        return super().__getattribute__(name)


def count_window(
    batches: Iterable[Mapping[str, Any]], tasks: Sequence[str], device: torch.device, num_processes: int = 1
) -> Window:
    """Count rows, items and tokens of this process's micro-batches, and add up over processes.

    Tasks without a labelled item on any process are left out, also if there are rows of them.

    With several processes this is a collective call: all must make it.

    Args:
        batches: The micro-batches, from [`DataCollatorForMultiTask`].
        tasks: Names of all tasks, in the same order on every process.
        device: Device of the one small tensor that the processes exchange.
        num_processes: Number of processes.
    """
    counts = {task: [0, 0] for task in tasks}
    tokens = 0
    for batch in batches:
        tokens += batch.get("num_tokens", 0)
        for task, items in batch.get("num_items", {}).items():
            counts[task][0] += len(batch["labels"][task])  # a segment may hold several rows in one
            counts[task][1] += items
    values = [*counts.values(), [tokens, 0]]
    if num_processes > 1:
        table = torch.tensor(values, dtype=torch.int64, device=device)
        torch.distributed.all_reduce(table)
        values = table.tolist()
    *of_tasks, (tokens, _) = values
    present = {task: value for task, value in zip(tasks, of_tasks, strict=True) if value[1]}
    rows, items = ({task: value[i] for task, value in present.items()} for i in (0, 1))
    return Window(rows, items, tokens)


@dataclass
class TaskProgress:
    """Per-task losses and rows, since the last log line and since the start of training.

    Losses stay on their device until they are logged, so that adding one waits for nothing.

    Args:
        tasks: Names of all tasks.
    """

    tasks: Sequence[str]
    rows_seen: dict[str, int] = field(default_factory=dict)
    _losses: dict[str, Tensor] = field(default_factory=dict)
    _windows: dict[str, int] = field(default_factory=dict)
    _rows: dict[str, int] = field(default_factory=dict)
    _pending: dict[str, Tensor] = field(default_factory=dict)  # losses of the current window
    _present: list[str] = field(default_factory=list)  # tasks of the current window
    steps: int = 0
    trained_steps: int = 0

    def add_window(self, window: Window) -> None:
        """Note the rows of a window that is about to be trained on."""
        for task, rows in window.rows.items():
            self.rows_seen[task] = self.rows_seen.get(task, 0) + rows
            self._rows[task] = self._rows.get(task, 0) + rows
        self._pending, self._present = {}, list(window.rows)

    def add_losses(self, losses: Mapping[str, Tensor]) -> None:
        """Add this micro-batch's part of each task's loss (its summed item losses over the window's items)."""
        for task, loss in losses.items():
            loss = loss.detach()
            self._pending[task] = self._pending[task] + loss if task in self._pending else loss

    def end_window(self, trained: bool) -> None:
        """Count a window and its losses; of a step that was left out the losses count nowhere."""
        self.steps += 1
        self.trained_steps += trained
        if trained:
            for task, loss in self._pending.items():
                self._losses[task] = self._losses[task] + loss if task in self._losses else loss
            for task in self._present:
                self._windows[task] = self._windows.get(task, 0) + 1
        self._pending, self._present = {}, []

    def drain(self, device: torch.device, num_processes: int = 1) -> dict[str, float]:
        """Return `loss/<task>` and `share/<task>`, and begin anew.

        Losses are means over the windows that held the task and were trained; without any there is none.

        With several processes this is a collective call.
        """
        zero = torch.zeros((), device=device)
        # A loss that the user computes has no parts by task: whether any was added is the last number.
        added = torch.full_like(zero, len(self._losses))
        sums = torch.stack([*(self._losses.get(task, zero).float() for task in self.tasks), added])
        if num_processes > 1:
            torch.distributed.all_reduce(sums)
        total = sum(self._rows.values())
        *of_tasks, number = sums.tolist()
        values = zip(self.tasks, of_tasks, strict=True) if number else ()
        logs = {f"loss/{task}": loss / self._windows[task] for task, loss in values if task in self._windows}
        logs |= {f"share/{task}": self._rows.get(task, 0) / total for task in self.tasks} if total else {}
        self._losses, self._windows, self._rows = {}, {}, {}
        self.steps = self.trained_steps = 0
        return logs

    def restart(self, rows_seen: Mapping[str, int]) -> None:
        """Begin a run, from a checkpoint's rows or from none."""
        self.rows_seen = dict(rows_seen)
        self._losses, self._windows, self._rows = {}, {}, {}
        self._pending, self._present = {}, []
        self.steps = self.trained_steps = 0
