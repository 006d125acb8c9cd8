"""What the benchmarks share: a description of the machine, and where results go."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def describe() -> dict[str, Any]:
    """Return the versions and the size of the machine that a result belongs to."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("hf_multitask", "torch", "transformers", "datasets", "accelerate")},
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def write_result(script: str, result: dict[str, Any], write: bool) -> None:
    """Print a result; with `write`, also put it beside its script as JSON."""
    text = json.dumps(result, indent=2)
    print(text)
    if write:
        Path(script).with_suffix(".json").write_text(text + "\n")
