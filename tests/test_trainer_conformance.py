"""Transformers' own tests of its trainer have the same results with our classes in place of `Trainer`.

Neither the wheel nor the source archive of Transformers contains `tests/trainer`. Check out the repository at the tag
of the installed version and name its folder `tests` in the environment variable `TRANSFORMERS_TESTS`:

    TRANSFORMERS_TESTS=transformers/tests python -m pytest -m slow tests/test_trainer_conformance.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import pytest

# Files whose tests run on one process without the Hub; what needs a GPU, a launcher or a download skips or fails alike.
FILES = (
    "test_trainer.py",
    "test_trainer_callback.py",
    "test_trainer_checkpointing.py",
    "test_trainer_data.py",
    "test_trainer_evaluation.py",
    "test_trainer_hyperparameter.py",
    "test_trainer_optimizers.py",
    "test_trainer_resume.py",
    "test_trainer_seq2seq.py",
)

# Loaded with `-p` before the tests are imported, so that their `from transformers import Trainer` finds our classes.
PLUGIN = """
import transformers
import transformers.trainer
import transformers.trainer_seq2seq
import transformers.training_args
import transformers.training_args_seq2seq
import hf_multitask
from hf_multitask import trainer, training_args

REPLACED = {
    "Trainer": trainer.MultiTaskTrainer,
    "Seq2SeqTrainer": trainer.MultiTaskSeq2SeqTrainer,
    "TrainingArguments": training_args.MultiTaskTrainingArguments,
    "Seq2SeqTrainingArguments": training_args.MultiTaskSeq2SeqTrainingArguments,
}
for name, ours in REPLACED.items():
    setattr(transformers, name, ours)
    assert getattr(__import__("transformers", fromlist=[name]), name) is ours
"""


def outcomes(tests: Path, files: list[str], folder: Path, *options: str) -> dict[str, str]:
    """Run the tests in a process of their own, and return passed, failed or skipped by name."""
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    command += [f"tests/trainer/{name}" for name in files]
    done = subprocess.run(command, cwd=tests.parent, env=environment, capture_output=True, text=True)
    assert report.is_file(), done.stdout[-2000:] + done.stderr[-2000:]
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        found[f"{case.get('classname')}::{case.get('name')}"] = kinds.pop() if kinds else "passed"
    return found


@pytest.mark.slow
def test_transformers_own_trainer_tests_have_the_same_results_with_our_classes(tmp_path):
    if "TRANSFORMERS_TESTS" not in os.environ:
        pytest.skip("TRANSFORMERS_TESTS names no checkout of Transformers' tests; its archives do not contain them")
    tests = Path(os.environ["TRANSFORMERS_TESTS"]).resolve()
    files = [name for name in FILES if (tests / "trainer" / name).is_file()]
    assert files, f"{tests} has no folder trainer with {', '.join(FILES)}"
    (tmp_path / "our_trainer_classes.py").write_text(PLUGIN)
    theirs = outcomes(tests, files, tmp_path)
    ours = outcomes(tests, files, tmp_path, "-p", "our_trainer_classes")
    print(
        f"Transformers' trainer tests: {dict(Counter(theirs.values()))} with Trainer, "
        f"{dict(Counter(ours.values()))} with MultiTaskTrainer"
    )
    assert Counter(theirs.values())["passed"] >= 20
    assert ours == theirs
