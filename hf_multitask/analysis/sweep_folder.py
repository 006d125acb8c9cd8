"""What lies in the folder of a sweep: whose it is, and which of its runs are finished, begun, or of other settings.

Beside what a training leaves, the folder of each run holds `sweep_run.json`, written before the run begins: all that
its result depends on, with a SHA-256 of it. A result counts, and a checkpoint is gone on from, only where that is what
the run is going to be now. The rows themselves are not in it, only where they come from.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpointing import last_complete_checkpoint
from ..folder_lock import LOCK_NAME
from ..recipe import Recipe

__all__ = ["RunPlan", "begin_run", "claim_folder", "describe_run", "plan_run", "read_json", "write_json"]

SWEEP_NAME = "sweep.json"
_RUN_NAME = "sweep_run.json"
_RESULTS_NAME = "results.json"


@dataclass(frozen=True)
class RunPlan:
    """What is to be done for a run.

    Args:
        action: `finished` (nothing), `resume` (go on from a checkpoint) or `start`.
        results: Of a finished run, what its `results.json` holds.
        checkpoint: Where to go on from.
        changed: Where an earlier run must be made anew: what it had, and what the run has now.
    """

    action: str
    results: dict[str, Any] | None = None
    checkpoint: str | None = None
    changed: tuple[str, ...] = ()


def describe_run(recipe: Recipe, processes: int) -> dict[str, Any]:
    """Return all that the result of a run depends on, as plain JSON types, with a `sha256` of it.

    Args:
        recipe: The recipe as it is going to be run; its output folder makes no difference.
        processes: Number of processes.
    """
    training = {key: value for key, value in recipe.training.items() if key != "output_dir"}
    content = {"model": recipe.model, "tasks": recipe.tasks, "training": training, "processes": processes}
    text = json.dumps(content, sort_keys=True)
    return json.loads(text) | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


def plan_run(folder: Path, run: Mapping[str, Any], processes: int) -> RunPlan:
    """Look into the folder of a run, without changing anything in it.

    Args:
        folder: The folder; it need not exist.
        run: What [`describe_run`] says of the run now.
        processes: Number of processes.

    Raises:
        ValueError: The folder holds something else than a run of a sweep.
    """
    if not folder.exists() or _is_empty(folder):
        return RunPlan("start")
    before = read_json(folder / _RUN_NAME)
    if before is None:
        raise ValueError(f"{str(folder)!r} is no run of a sweep, and is left as it is; choose another output folder")
    if before.get("sha256") != run["sha256"]:
        return RunPlan("start", changed=tuple(_differences(before, run)))
    results = read_json(folder / _RESULTS_NAME)
    if results is not None:
        return RunPlan("finished", results=results)
    checkpoint, _ = last_complete_checkpoint(folder, processes)
    return RunPlan("start" if checkpoint is None else "resume", checkpoint=checkpoint)


def begin_run(folder: Path, run: Mapping[str, Any]) -> None:
    """Empty the folder of a run that starts, and write down what it is going to be."""
    folder.mkdir(parents=True, exist_ok=True)
    # The old description stays to the end: without it what is left could no longer be told from the user's files.
    (folder / _RESULTS_NAME).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _RUN_NAME:
            path.unlink()
    write_json(folder / _RUN_NAME, run)


def claim_folder(output: Path, sweep: Mapping[str, Any]) -> None:
    """Make the folder of a sweep, or see that it is of this one.

    Args:
        output: The folder.
        sweep: What makes two sweeps the same: recipe, backbone, tasks, and the auxiliary task.

    Raises:
        ValueError: It is the folder of another sweep, or holds something else.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {str(output)!r} is a file; choose a folder")
    before = read_json(output / SWEEP_NAME)
    if before is not None and isinstance(before.get("sweep"), dict):
        differences = list(_differences(before["sweep"], sweep))
        if differences:
            what = "; ".join(differences)
            raise ValueError(f"output {str(output)!r} is of another sweep: {what}; choose another output folder")
    elif output.exists() and not _is_empty(output):
        raise ValueError(f"output {str(output)!r} is not empty, and is no folder of a sweep; choose another one")
    else:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / SWEEP_NAME, {"sweep": sweep, "finished": False})


def read_json(path: Path) -> dict[str, Any] | None:
    """Return what a JSON file holds; None where there is none, or it is cut off or no dictionary."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that is, at any moment, either whole or not there."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(new, path)


def _is_empty(folder: Path) -> bool:
    """Return whether a folder holds nothing but a description that was never finished, and a lock."""
    ignored = (f"{_RUN_NAME}.new", f"{SWEEP_NAME}.new", LOCK_NAME)
    return all(path.name.startswith(ignored) for path in folder.iterdir())


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield, key by key, what was and what is now."""
    old, new = ({key: repr(value) for key, value in _flatten(one) if key != "sha256"} for one in (before, now))
    if old == new and before != now:
        yield "the tasks were in another order"
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) != new.get(key):
            yield f"{key} was {old.get(key, 'not set')} and is {new.get(key, 'not set')}"


def _flatten(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield values with dotted keys; tasks have their names for keys, as in `--set`."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(inner, (*path, str(key)))
    elif isinstance(value, list) and value and all(isinstance(item, dict) and "name" in item for item in value):
        for item in value:
            yield from _flatten(item, (*path, str(item["name"])))
    else:
        yield ".".join(path), value
