"""Values that last for one forward pass and belong to the thread that runs it.

A model in inference may be called from many threads, so a forward pass must not write on modules. What a pass has to
tell modules deep inside a backbone, whose code hands nothing on, is kept in a [`PassLocal`]. It is a thread-local
variable rather than a `contextvars.ContextVar`: `torch.compile` traces the former and guards on the value that the
calling thread sees, while it cannot trace the latter. A pass never yields to an event loop, so coroutines of one thread
cannot see each other's values.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["PassLocal"]


class PassLocal(threading.local):
    """A value of the forward pass that the calling thread runs; None outside of passes.

    A copy of the holder (a deep copy of a model, a pickled one) starts without a value and is independent of this one.

    Example:
        >>> one = PassLocal()
        >>> with one.use("rows"):
        ...     print(one.value)
        rows
        >>> print(one.value)
        None
    """

    value: Any = None

    @contextmanager
    def use(self, value: Any) -> Iterator[None]:
        """Set the value for the time of a pass, in the calling thread."""
        before, self.value = self.value, value
        try:
            yield
        finally:
            self.value = before

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()
