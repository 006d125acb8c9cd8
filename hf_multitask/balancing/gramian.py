"""Per-task gradients on the shared parameters → one flat row per task → their Gramian and their combination.

One buffer `[T, P]` holds the gradients of T tasks on P shared numbers, in float32. Gradients are moved into it task by
task, over as many micro-batches as an optimizer step has. At its end the rows are added up over processes: each process
gets an equal part of the columns (reduce-scatter), so that T rows cost half of what T all-reduces would. The parts give
the Gramian (T² numbers are added up), and the combined gradient is put together from all parts (all-gather). All
processes then hold the same Gramian, bit for bit.

Under FSDP2 gradients come reduced and sharded already, and each process's shards are its part.

The gradient of an embedding table is zero but for the rows of the tokens that came. On one process it may come as a
sparse tensor: the rows that came are kept, and the table costs neither time nor memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .elementwise import uniform_blocks

__all__ = ["TaskGradients", "local"]

_COLUMNS = 1 << 17  # of the buffer that are multiplied at once: what fits into a cache


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor, or the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class TaskGradients:
    """The gradients of T tasks on the shared parameters.

    Args:
        parameters: The shared parameters that are trained, in an order that is the same on every process.
        num_tasks: T.
        num_processes: Processes whose gradients are added up; 1 also where parameters are sharded.
        process_index: Rank of this process.
        sharded: Whether the parameters are sharded (FSDP2): gradients then are reduced, and each process holds a part.
        tables: Parameters `[V, H]` whose gradients come as sparse rows; on one process only.
        device: Where the buffer is, if there is no shared parameter: tasks then have nothing to combine, but may
            still be weighted.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        num_tasks: int,
        num_processes: int = 1,
        process_index: int = 0,
        sharded: bool = False,
        tables: Iterable[nn.Parameter] = (),
        device: torch.device | None = None,
    ) -> None:
        every = list(parameters)
        ends = [0, *itertools.accumulate(local(parameter).numel() for parameter in every)]
        sparse = {id(table) for table in tables}
        self.parameters = [parameter for parameter in every if id(parameter) not in sparse]
        # Where a parameter begins if all are laid out in a row: what is drawn for it depends on nothing else.
        starts = {id(parameter): start for parameter, start in zip(every, ends, strict=False)}
        self._starts = [starts[id(parameter)] for parameter in self.parameters]
        self._tables = [SparseRows(p, num_tasks, starts[id(p)]) for p in every if id(p) in sparse]
        self._processes, self._rank, self._sharded = (1 if sharded else num_processes), process_index, sharded
        shapes = [local(parameter).shape for parameter in self.parameters]
        size = sum(shape.numel() for shape in shapes)
        padded = -(-size // self._processes) * self._processes
        device = local(every[0]).device if every else device
        self._buffer = torch.zeros(num_tasks, padded, dtype=torch.float32, device=device)
        self._views = [_cut(row, shapes) for row in self._buffer]
        self._filled = [False] * num_tasks
        self._part = slice(0, padded)
        self._columns = self._buffer
        self._combined: Tensor | None = None

    def move(self, task: int) -> None:
        """Add the shared parameters' `.grad` to a task's row, and set it to None.

        Args:
            task: Index of the task.
        """
        for table in self._tables:
            table.move(task)
        views, grads, empty = [], [], []
        for parameter, view in zip(self.parameters, self._views[task], strict=True):
            if parameter.grad is None:
                empty.append(view)
            else:
                views.append(view)
                grads.append(local(parameter.grad))
            parameter.grad = None
        if self._filled[task]:
            if views:
                torch._foreach_add_(views, [grad.float() for grad in grads])
            return
        if views:
            torch._foreach_copy_(views, grads)
        if empty:
            torch._foreach_zero_(empty)
        self._filled[task] = True

    def reduce(self, tasks: Sequence[int]) -> None:
        """Add up the rows of some tasks over processes, 0 for a task without gradients here; a collective call."""
        for task in tasks:
            if not self._filled[task]:
                self._buffer[task].zero_()
                self._filled[task] = True
        if self._processes == 1:
            return
        width = self._buffer.shape[1] // self._processes
        self._part = slice(self._rank * width, (self._rank + 1) * width)
        part = torch.empty(width, dtype=torch.float32, device=self._buffer.device)
        for task in tasks:
            _reduce_scatter(part, self._buffer[task])
            self._buffer[task, self._part] = part
        self._columns = self._buffer[:, self._part]

    def gramian(self, tasks: Sequence[int]) -> Tensor:
        """Return G, `[T', T']` float64 on the CPU: inner products of the rows of T' tasks; a collective call."""
        rows = self._columns if len(tasks) == len(self._buffer) else None
        index = torch.tensor(list(tasks), device=self._buffer.device)
        total = torch.zeros(len(tasks), len(tasks), dtype=torch.float64, device=self._buffer.device)
        for start in range(0, self._columns.shape[1], _COLUMNS):
            chunk = (self._columns if rows is None else rows)[:, start : start + _COLUMNS]
            if rows is None:
                chunk = chunk.index_select(0, index)
            if chunk.device.type == "cuda":
                chunk = chunk.double()  # TF32 would round the products
            total += (chunk @ chunk.T).double()
        for table in self._tables:
            matrix = table.matrix(tasks).double()
            total += matrix @ matrix.T
        if self._processes > 1 or (self._sharded and dist.is_initialized()):
            dist.all_reduce(total)
        total = total.cpu()
        return (total + total.T) / 2

    def write(self, tasks: Sequence[int], coefficients: Tensor) -> None:
        """Set the shared parameters' `.grad` to `Σ_t c_t g_t`, and begin anew; a collective call.

        Args:
            tasks: Indices of the tasks.
            coefficients: `[T']`, float64.
        """
        for table in self._tables:
            table.write(coefficients.to(self._buffer.device, torch.float32) @ table.matrix(tasks))
        factors = torch.zeros(len(self._buffer), dtype=torch.float64)
        factors[list(tasks)] = coefficients.double().cpu()
        factors = factors.to(self._buffer.device, torch.float32)
        for task in range(len(self._buffer)):
            if not self._filled[task]:
                self._buffer[task].zero_()  # what is left of another step must not come back as NaN times 0
        combined = self._make_room()
        for start in range(0, len(combined), _COLUMNS):
            stop = start + _COLUMNS
            torch.mv(self._columns[:, start:stop].T, factors, out=combined[start:stop])
        self._write_flat(combined)

    def _make_room(self) -> Tensor:
        """Return where this process's part of the combined gradient goes: memory that is kept, new pages cost time."""
        if self._combined is None:
            self._combined = torch.empty(self._buffer.shape[1], dtype=torch.float32, device=self._buffer.device)
        return self._combined[: self._columns.shape[1]]

    def write_elementwise(
        self, tasks: Sequence[int], weights: Tensor, function: Callable[[Tensor, Tensor], Tensor], seed: int
    ) -> None:
        """Set the shared parameters' `.grad` to what a function makes of every number; a collective call.

        Args:
            tasks: Indices of the T' tasks.
            weights: `[T']`, what the rows are multiplied with.
            function: Weighted gradients `[T', n]` and uniform draws `[n]` → `[n]`.
            seed: Seed of the draws; with replicated parameters they do not depend on the number of processes.
        """
        factors = weights.to(self._buffer.device, torch.float32)[:, None]
        index = torch.tensor(list(tasks), device=self._buffer.device)
        combined = self._make_room()
        seed += self._rank if self._sharded else 0
        for table in self._tables:
            table.write(function(table.matrix(tasks) * factors, table.draws(seed)))
        begin = 0  # of a parameter in the buffer
        for parameter, place in zip(self.parameters, self._starts, strict=True):
            size = local(parameter).numel()
            first, last = max(begin, self._part.start), min(begin + size, self._part.stop)
            offset = place - begin
            begin += size
            if first >= last:
                continue  # none of it lies in this process's part
            for start, stop, draws in uniform_blocks(first + offset, last + offset, seed, self._buffer.device):
                columns = slice(start - offset, stop - offset)
                rows = self._buffer[:, columns].index_select(0, index) * factors
                part = self._part.start
                combined[columns.start - part : columns.stop - part] = function(rows, draws)
        self._write_flat(combined)

    def clear(self) -> None:
        """Forget the gradients of this step."""
        for table in self._tables:
            table.clear()
        self._filled = [False] * len(self._filled)
        self._columns, self._part = self._buffer, slice(0, self._buffer.shape[1])

    def _write_flat(self, combined: Tensor) -> None:
        """Set the shared parameters' `.grad` to a flat gradient (this process's part of it), and begin anew."""
        if self._processes > 1:
            whole = torch.empty(self._buffer.shape[1], dtype=torch.float32, device=combined.device)
            _all_gather(whole, combined)
            combined = whole
        start = 0
        for parameter in self.parameters:
            shard = local(parameter)
            value = combined[start : start + shard.numel()].view(shard.shape).to(parameter.dtype)
            start += shard.numel()
            parameter.grad = _like(parameter, value)
        self.clear()


class SparseRows:
    """The gradients of T tasks on an embedding table, as the rows that came.

    Args:
        table: The table, `[V, H]`.
        num_tasks: T.
        start: Its place if all parameters are laid out in a row.
    """

    def __init__(self, table: nn.Parameter, num_tasks: int, start: int) -> None:
        self._table, self._start = table, start
        self._came: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(num_tasks)]
        self._dense: Tensor | None = None  # the combined gradient: zeros but for some rows
        self._written: Tensor | None = None  # these
        self._rows = torch.empty(0, dtype=torch.long, device=table.device)

    def move(self, task: int) -> None:
        """Take the table's `.grad`, sparse or not."""
        grad = self._table.grad
        if grad is not None:
            grad = (grad if grad.is_sparse else grad.to_sparse(1)).coalesce()
            self._came[task].append((grad.indices()[0], grad.values().float()))
        self._table.grad = None

    def matrix(self, tasks: Sequence[int]) -> Tensor:
        """Return `[T', U * H]`: the gradients of some tasks on the U rows that any of them has."""
        pieces = [piece for task in tasks for piece in self._came[task]]
        width = self._table.shape[1]
        if not pieces:
            self._rows = self._rows[:0]
            return torch.zeros(len(tasks), 0, device=self._table.device)
        self._rows = torch.cat([rows for rows, _ in pieces]).unique()
        result = torch.zeros(len(tasks), len(self._rows), width, device=self._table.device)
        for number, task in enumerate(tasks):
            for rows, values in self._came[task]:
                result[number].index_add_(0, torch.searchsorted(self._rows, rows), values)
        return result.flatten(1)

    def draws(self, seed: int) -> Tensor:
        """Return uniform draws, `[U * H]`, for the rows of the last matrix."""
        size = self._table.numel()
        blocks = uniform_blocks(self._start, self._start + size, seed, self._table.device)
        return torch.cat([draws for *_, draws in blocks]).view(-1, self._table.shape[1])[self._rows].flatten()

    def write(self, combined: Tensor) -> None:
        """Set the table's `.grad` to a gradient on the rows of the last matrix, `[U * H]`."""
        if self._dense is None:
            self._dense = torch.zeros_like(self._table)
        elif self._written is not None:
            self._dense[self._written] = 0
        self._dense[self._rows] = combined.view(-1, self._table.shape[1]).to(self._dense.dtype)
        self._written = self._rows
        self._table.grad = self._dense

    def clear(self) -> None:
        """Forget the gradients of this step."""
        self._came = [[] for _ in self._came]
        self._rows = self._rows[:0]


def _cut(row: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Return views of a row in the shapes of the parameters."""
    sizes = [shape.numel() for shape in shapes]
    parts = row[: sum(sizes)].split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """Return a local gradient as what the parameter is: sharded, if it is."""
    if not hasattr(parameter, "to_local"):
        return value
    from torch.distributed.tensor import DTensor

    sharded: Any = parameter.data
    return DTensor.from_local(
        value, sharded.device_mesh, sharded.placements, run_check=False, shape=sharded.shape, stride=sharded.stride()
    )


# The names changed with torch 2.13.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
