"""One tokenizer, called from many threads with a truncation of its own in each."""

from __future__ import annotations

import ast
import multiprocessing
import sys
import threading
from pathlib import Path

import pytest
from conftest import make_tokenizer

import hf_multitask
from hf_multitask.data.shared_tokenizer import exclusive, tokenize

ROOT = Path(hf_multitask.__file__).parent
TEXT = "the film was very good and we saw paris " * 20


def test_threads_get_the_length_they_ask_for():
    tokenizer, wrong, start = make_tokenizer(), [], threading.Barrier(8)

    def call(length: int) -> None:
        start.wait()
        for _ in range(150):
            found = tokenize(tokenizer, TEXT, truncation=True, max_length=length)["input_ids"]
            wrong.extend([len(found)] if len(found) != length else [])

    threads = [threading.Thread(target=call, args=(length,)) for length in range(5, 13)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong


def test_each_tokenizer_has_a_lock_of_its_own_that_its_holder_may_take_again():
    one, other = make_tokenizer(), make_tokenizer()
    assert exclusive(one) is exclusive(one) is not exclusive(other)
    with exclusive(one), exclusive(one), exclusive(other):
        assert tokenize(one, "a film")["input_ids"] == tokenize(other, "a film")["input_ids"]


def _tokenize_in_child(connection, tokenizer) -> None:
    connection.send(tokenize(tokenizer, "a film")["input_ids"])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes are not forked here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_a_thread_of_its_parent():
    tokenizer = make_tokenizer()
    expected = tokenizer("a film")["input_ids"]
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with exclusive(tokenizer):
            held.set()
            done.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(60)
    try:
        ours, theirs = multiprocessing.Pipe()
        child = multiprocessing.get_context("fork").Process(target=_tokenize_in_child, args=(theirs, tokenizer))
        child.start()
        assert ours.poll(30) and ours.recv() == expected
        child.join(30)
    finally:
        done.set()
        holder.join()


def test_nothing_else_calls_a_tokenizer():
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                method = isinstance(node.func, ast.Attribute) and name == "apply_chat_template"
                if name in ("tokenizer", "processing_class") or method:
                    found.append((path.relative_to(ROOT).as_posix(), ast.unparse(node.func)))
    home = "data/shared_tokenizer.py"
    assert found == [(home, "tokenizer"), (home, "tokenizer.apply_chat_template")]
