"""The package as people get it: a wheel in a new environment, away from the checkout."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = [pytest.mark.slow, pytest.mark.registry]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a new environment in it, which has the wheel that was built from the sdist, and nothing else."""
    place = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "venv", place / "environment"], check=True)
    run(place, "pip", "install", "-q", "build")
    run(place, "python", "-m", "build", "--outdir", str(place / "dist"), str(ROOT))
    assert len(list((place / "dist").glob("*.tar.gz"))) == 1
    (wheel,) = (place / "dist").glob("*.whl")
    run(place, "pip", "install", "-q", f"{wheel}[quickstart,plots]")
    return place


def run(place: Path, program: str, *arguments: str) -> str:
    """Run a program of the environment, away from the checkout."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment["PIP_CONSTRAINT"] = str(ROOT / ".ci" / "constraints.txt")
    path = place / "environment" / "bin" / program
    done = subprocess.run([path, *arguments], cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_it_is_the_wheel(place):
    home = Path(run(place, "python", "-c", "import hf_multitask; print(hf_multitask.__file__)").strip())
    assert place / "environment" in home.parents
    assert (home.parent / "py.typed").is_file()


@pytest.mark.parametrize("page", ["README.md", "recipes/coming_from.md"])
def test_the_examples_run(place, page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for code in re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S):
        run(place, "python", "-c", code)


SHORT = ("training.max_steps=2", "training.eval_strategy=no", "training.max_eval_samples=8")


def test_the_commands_run(place):
    """All of README's, in their order, with two steps of training."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("hf-multitask ")]
    said = {}
    for command in commands:
        short = [part for value in SHORT for part in ("--set", value)] if command[0] in ("train", "compare") else []
        said[command[0]] = run(place, "hf-multitask", *command, *short)
    assert set(said) == {"train", "predict", "preflight", "compare", "report"}
    assert re.search(r"^entities +\d+ ", said["train"], flags=re.M)
    assert [*json.loads(said["predict"].splitlines()[0])] == ["text", "valence", "source", "topic", "entities"]
    assert "deploy" in said["compare"] and (place / "report.html").stat().st_size > 10_000
    for command, part in (
        (("push", "runs/quickstart", "me/my-model", "--dry-run"), "model.safetensors"),
        (("push", "runs/quickstart", "me/my-model", "--dry-run", "--include-code", "--handler"), "handler.py"),
    ):
        assert part in run(place, "hf-multitask", *command)
