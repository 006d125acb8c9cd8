"""Use of a tokenizer by several threads, one at a time.

A fast tokenizer keeps the truncation and padding of a call as a state of its own: a second thread that calls it with
other settings in between gets texts of the wrong length, or an error. So wherever this library tokenizes, it does it
under a lock that belongs to the tokenizer. Code that calls the same tokenizer directly, while a pipeline uses it in
another thread, should call a copy (`copy.deepcopy(tokenizer)`).
"""

from __future__ import annotations

import os
import threading
from typing import Any
from weakref import WeakKeyDictionary

__all__ = ["apply_chat_template", "exclusive", "tokenize"]

_LOCKS: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()  # type: ignore[valid-type]
_LOOKUP = threading.Lock()


def exclusive(tokenizer: Any) -> Any:
    """Return the lock of a tokenizer, a context manager; the thread that holds it may take it again.

    Example:
        >>> from transformers import BertTokenizerFast
        >>> tokenizer = BertTokenizerFast(vocab={"[PAD]": 0, "[UNK]": 1})
        >>> exclusive(tokenizer) is exclusive(tokenizer)
        True
    """
    with _LOOKUP:
        return _LOCKS.setdefault(tokenizer, threading.RLock())


def tokenize(tokenizer: Any, *args: Any, **kwargs: Any) -> Any:
    """Return what a call of a tokenizer returns; arguments are those of the call."""
    with exclusive(tokenizer):
        return tokenizer(*args, **kwargs)


def apply_chat_template(tokenizer: Any, messages: Any, **kwargs: Any) -> Any:
    """Return the tokens of messages; arguments are those of the tokenizer's `apply_chat_template`."""
    with exclusive(tokenizer):
        return tokenizer.apply_chat_template(messages, **kwargs)


def _after_fork() -> None:
    """Forget locks that threads of the parent process may have held: nobody would release them here."""
    global _LOOKUP
    _LOOKUP = threading.Lock()
    _LOCKS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
