"""One run at a time writes to an output folder: a lock that names its process and host.

Two runs in one folder overwrite each other's checkpoints and results. The lock is the operating system's, on the file
`.multitask.lock`: it ends with its process, however that ends, so that a killed run never locks anybody out. What the
file holds is for people: which process of which host has the folder, and since when.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from transformers.utils import logging

__all__ = ["LOCK_NAME", "FolderInUseError", "locked", "locked_together"]

LOCK_NAME = ".multitask.lock"
_OWNER = ".multitask.lock.json"

logger = logging.get_logger(__name__)


class FolderInUseError(RuntimeError):
    """Another run writes to the folder; the message names its process and host."""


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold the lock of an output folder, which is made if there is none.

    The thread that holds it may take it again, as a recipe does for the training in it.

    Args:
        folder: The folder.

    Raises:
        FolderInUseError: Another process, or another thread, has it.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> with locked(folder), locked(folder):
        ...     json.loads(Path(folder, ".multitask.lock.json").read_text())["process"] == os.getpid()
        True
        >>> os.listdir(folder)
        []
    """
    place = Path(os.path.realpath(folder))
    place.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place / LOCK_NAME, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise FolderInUseError(_describe(folder)) from None
    except (OSError, NotImplementedError) as error:
        logger.warning(f"{str(folder)!r} cannot be locked ({error}); see to it that no other run writes there")
        yield
        return
    owner = place / _OWNER
    if lock.lock_counter == 1:
        facts = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        owner.write_text(json.dumps({**facts, "command": " ".join(sys.argv)}) + "\n", encoding="utf-8")
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            for path in (owner, place / LOCK_NAME):  # first: once the lock is free, they are another run's
                with suppress(OSError):
                    path.unlink()
        lock.release()


@contextmanager
def locked_together(folder: str | Path, writes: bool) -> Iterator[None]:
    """Hold the lock of an output folder for all processes of one run; a collective call.

    Args:
        folder: The folder.
        writes: Whether this process writes to it; one on each machine does, or one of all.

    Raises:
        FolderInUseError: Another run has it; every process raises it.
    """
    refusal = None
    with ExitStack() as stack:
        if writes:
            try:
                stack.enter_context(locked(folder))
            except FolderInUseError as error:
                refusal = str(error)
        refusal = next(filter(None, gather_object([refusal])), None)
        if refusal is not None:
            raise FolderInUseError(refusal)
        yield


def _describe(folder: str | Path) -> str:
    try:
        owner = json.loads(Path(folder, _OWNER).read_text(encoding="utf-8"))
        who = f"process {owner['process']} on {owner['host']}, since {owner['since']} ({owner['command']})"
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process"
    return (
        f"output folder {str(folder)!r} is in use by {who}; wait until it is through, stop it, or choose another "
        "output folder"
    )
