"""Hundreds of damaged checkpoints and saved models: none gives other weights silently, and errors name the file.

Run it with `-m slow -s` to see the counts.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_datasets, make_tokenizer
from test_schemes import make_model
from transformers.utils import logging

from hf_multitask import AutoModelForMultiTask, MultiTaskTrainer, MultiTaskTrainingArguments
from hf_multitask.checkpointing import last_complete_checkpoint
from hf_multitask.models.manifest import MANIFEST_NAME, write_manifest
from hf_multitask.prediction import Predictor

RUNS = {
    "hard": ("hard", False),
    "hard, streamed": ("hard", True),
    "adapter": ("adapter, shared", False),
    "prefix": ("prefix", False),
    "mixture": ("mixture", False),
}
LAST, BEFORE = 4, 2  # the steps of the checkpoints
Damage = Callable[[Path, Path, random.Random], bytes | None]


def make_trainer(folder: Path, run: str, seed: int = 0) -> MultiTaskTrainer:
    kind, streamed = RUNS[run]
    train: dict[str, Any] = make_datasets()
    if streamed:
        train = {name: part.to_iterable_dataset(num_shards=2) for name, part in train.items()}
    model = make_model(kind)
    torch.manual_seed(seed)
    args = MultiTaskTrainingArguments(
        str(folder),
        max_steps=LAST + 1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        seed=seed,
        save_steps=BEFORE,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        logging_steps=1,
        **({"dataset_sizes": {name: len(part) for name, part in make_datasets().items()}} if streamed else {}),
    )
    return MultiTaskTrainer(model, args, train_dataset=train, processing_class=make_tokenizer())


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(value, other[name]) for name, value in one.items())


def change_number(content: bytes, draw: random.Random) -> bytes | None:
    """Change a digit of a JSON file, so that it is JSON still."""
    places = [i for i, byte in enumerate(content) if chr(byte) in "12345678"]
    if not places:
        return None
    place = draw.choice(places)
    return content[:place] + bytes([content[place] + 1]) + content[place + 1 :]


def flip(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :]


def zero(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(max(len(content) - 64, 1))
    return content[:start] + bytes(min(64, len(content) - start)) + content[start + 64 :]


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "a flipped bit": flip,
    "cut off": lambda content, draw: content[: draw.randrange(1, len(content))],
    "a block of zeros": zero,
    "emptied": lambda content, draw: b"",
}


def damaged(folder: Path, others: dict[str, Path], draw: random.Random) -> Iterator[tuple[str, str]]:
    """Yield name of a file and kind of damage, while the file in the folder is damaged so."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for name in names:
        path, content = folder / name, (folder / name).read_bytes()
        kinds = {kind: make(content, draw) for kind, make in DAMAGES.items()}
        if name.endswith(".json") and name != MANIFEST_NAME:
            kinds["an edited number"] = change_number(content, draw)
        for kind, other in others.items():
            kinds[kind] = (other / name).read_bytes() if (other / name).is_file() else None
        for kind, value in kinds.items():
            if value is not None and value != content:
                path.unlink()
                path.write_bytes(value)
                yield name, kind
        path.unlink()
        if name != MANIFEST_NAME:  # without it a folder is one of version 0.1.0
            yield name, "deleted"
        path.write_bytes(content)
    for name in (
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "optimizer.bin",
        "pytorch_model.bin",
    ):
        if not (folder / name).exists():
            shutil.copy(folder / "model.safetensors", folder / name)
            yield name, "left by an older model"
            (folder / name).unlink()


@pytest.fixture(autouse=True)
def quiet():
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()


def outcome(name: str, load: Callable[[], Any], expected: dict[str, torch.Tensor]) -> str:
    """Return what became of loading a damaged folder."""
    try:
        loaded = load()
    except Exception as error:
        return "named" if name in str(error) else f"unnamed: {type(error).__name__}: {str(error)[:200]}"
    return "right" if equal(weights(loaded), expected) else "silently other weights"


@pytest.mark.slow
def test_hundreds_of_corruptions_none_silent_all_named(tmp_path):
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    total = 0
    draw = random.Random(0)
    for run in RUNS:
        folder, model_folder = tmp_path / run / "a", tmp_path / run / "model"
        trainer = make_trainer(folder, run)
        trainer.train()
        finished = weights(trainer.model)
        trainer.save_model(str(model_folder))
        make_trainer(tmp_path / run / "b", run, seed=1).train()
        shutil.rmtree(folder / f"checkpoint-{LAST + 1}")
        checkpoint = folder / f"checkpoint-{LAST}"
        others = {
            "of another checkpoint": folder / f"checkpoint-{BEFORE}",
            "of another run": tmp_path / run / "b" / f"checkpoint-{LAST}",
        }
        saved = weights(AutoModelForMultiTask.from_pretrained(model_folder))
        reached = weights(AutoModelForMultiTask.from_pretrained(checkpoint))
        resuming = make_trainer(folder, run)
        best = make_trainer(folder, run)

        def load_best(best=best, checkpoint=checkpoint):
            best.state.best_model_checkpoint = str(checkpoint)
            best._load_best_model()
            return best.model

        def resume(resuming=resuming, checkpoint=checkpoint):
            resuming.train(resume_from_checkpoint=str(checkpoint))
            return resuming.model

        def note(entrance: str, name: str, kind: str, found: str, run=run) -> None:
            counts[f"{entrance}: {found.split(':')[0]}"] += 1
            if found.startswith(("unnamed", "silently")):
                wrong.append(f"{run}, {entrance}, {name} {kind}: {found}")

        for number, (name, kind) in enumerate(damaged(checkpoint, others, draw)):
            total += 1
            note("resume explicitly", name, kind, outcome(name, resume, finished))
            newest, skipped = last_complete_checkpoint(folder)
            named = newest == str(folder / f"checkpoint-{BEFORE}") and name in skipped.get(str(checkpoint), "")
            note("resume", name, kind, "passed over" if named else f"unnamed: {newest} {skipped}")
            note("load the best", name, kind, outcome(name, load_best, reached))
            load = lambda checkpoint=checkpoint: AutoModelForMultiTask.from_pretrained(checkpoint)  # noqa: E731
            note("from_pretrained of a checkpoint", name, kind, outcome(name, load, reached))
            if number % 30 == 0:  # the whole way
                kept = tmp_path / run / "kept"
                shutil.copytree(folder, kept)
                again = make_trainer(kept, run)
                again.train(resume_from_checkpoint=True)
                note("resume and train", name, kind, "right" if equal(weights(again.model), finished) else "silently")
                shutil.rmtree(kept)
        for name, kind in damaged(model_folder, {"of another model": checkpoint}, draw):
            if name in ("optimizer.bin", "training_args.bin"):
                continue  # no part of a model
            total += 1
            found = outcome(name, lambda f=model_folder: AutoModelForMultiTask.from_pretrained(f), saved)
            note("from_pretrained", name, kind, found)
            if not name.startswith("tokenizer"):  # a tokenizer may be changed: a warning names it
                found = outcome(name, lambda f=model_folder: Predictor.from_pretrained(f).model, saved)
                note("predict", name, kind, found)
        write_manifest(model_folder)
    print(json.dumps({"corruptions": total, "checks": sum(counts.values()), **dict(sorted(counts.items()))}, indent=1))
    assert not wrong, "\n".join(wrong[:20])
    assert total >= 200 and not any("silently" in key or "unnamed" in key for key in counts)
