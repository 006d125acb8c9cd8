"""The Gramian without the gradients: seeded sketches of them, of a size that does not depend on the model.

Every number of a gradient gets a seeded sign, and the signed numbers are added up in K buckets, place by place modulo K
(a count sketch; Charikar, Chen & Farach-Colton 2002). The inner product of two sketches is that of the gradients on
average over the signs, with a standard deviation of at most √(2 / K) times the product of their norms: 0.006 for
K = 65,536. Sketches of sums are sums of sketches, so micro-batches and processes add up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .gramian import local

__all__ = ["SKETCH_SIZE", "TaskSketches"]

SKETCH_SIZE = 1 << 16


class TaskSketches:
    """Sketches of the gradients of T tasks on the shared parameters; see [`TaskGradients`] for what the methods share.

    Memory: K float32 per task, and one byte for each shared number.

    Args:
        parameters: The shared parameters that are trained.
        num_tasks: T.
        num_processes: Number of processes.
        process_index: Rank of this process.
        sharded: Whether the parameters are sharded: then each process's shard has signs of its own.
        size: K, the numbers of a sketch.
        seed: Seed of the signs.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        num_tasks: int,
        num_processes: int = 1,
        process_index: int = 0,
        sharded: bool = False,
        size: int = SKETCH_SIZE,
        seed: int = 0,
    ) -> None:
        self.parameters = list(parameters)
        if not self.parameters:
            raise ValueError("no shared parameter is trained, so there are no gradients to combine")
        self._processes, self._size = num_processes, size
        device = local(self.parameters[0]).device
        generator = torch.Generator().manual_seed(seed * 1_000_003 + (process_index if sharded else 0))
        self._signs = [
            (torch.randint(0, 2, (local(parameter).numel(),), generator=generator, dtype=torch.int8) * 2 - 1).to(device)
            for parameter in self.parameters
        ]
        # Small tensors would all fall into the same first buckets.
        self._starts = torch.randint(0, size, (len(self.parameters),), generator=generator).tolist()
        self._sketches = torch.zeros(num_tasks, size, dtype=torch.float32, device=device)

    def move(self, task: int) -> None:
        """Add a sketch of the shared parameters' `.grad` to a task's, and set it to None."""
        sketch = self._sketches[task]
        for parameter, signs, start in zip(self.parameters, self._signs, self._starts, strict=True):
            if parameter.grad is not None:
                self._add(sketch, local(parameter.grad).reshape(-1), signs, start)
            parameter.grad = None

    def _add(self, sketch: Tensor, values: Tensor, signs: Tensor, start: int) -> None:
        signed = values.float() * signs
        first = min(self._size - start, len(signed))
        sketch[start : start + first] += signed[:first]
        whole = (len(signed) - first) // self._size
        if whole:
            sketch += signed[first : first + whole * self._size].view(whole, self._size).sum(0)
        rest = signed[first + whole * self._size :]
        sketch[: len(rest)] += rest

    def reduce(self, tasks: Sequence[int]) -> None:
        """Add up the sketches over processes; a collective call."""
        if self._processes > 1:
            dist.all_reduce(self._sketches)

    def gramian(self, tasks: Sequence[int]) -> Tensor:
        """Return an estimate of G, `[T', T']` float64 on the CPU."""
        rows = self._sketches[torch.tensor(list(tasks), device=self._sketches.device)].double()
        return (rows @ rows.T).cpu()

    def clear(self) -> None:
        """Forget the gradients of this step."""
        self._sketches.zero_()
