"""Which files of a folder go to the Hub, and why the others do not.

What goes is what a saved model needs, by name: weights as safetensors, configurations, the files of tokenizers, the
model card and its pictures, the parts of tasks in folders of their own, code. Everything else stays: what only training
needs (checkpoints, optimizer, logs), and whatever else lies in the folder, such as data or `credentials.json`. The
folder is walked, and links that lead out of it are not followed.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..models.auto import SCHEMES
from ..models.configuration import MultiTaskConfig
from ..models.frozen import FrozenBackboneConfig, FrozenBackboneModel
from ..models.manifest import MANIFEST_NAME, check_named
from .code import CODE_FOLDER

__all__ = ["PushFile", "PushPlan", "check_saved_model", "format_size", "is_local_folder", "plan_files"]

# Files of a saved model, by name, in its folder itself.
_OF_MODEL = (
    *("config.json", "generation_config.json", "results.json", MANIFEST_NAME),
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("adapter_model.safetensors", "adapter_config.json", "*.onnx", "*.onnx.data", "*.onnx_data"),
    *("README.md", "LICENSE", "LICENSE.*", "NOTICE", "NOTICE.*", ".gitattributes", "handler.py", "requirements.txt"),
    # Code of a model's or a tokenizer's own, as `register_for_auto_class` names it.
    *("configuration_*.py", "modeling_*.py", "tokenization_*.py", "processing_*.py"),
)
# The files of all tokenizers of Transformers.
_OF_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.txt", "vocab.json", "vocab.bpe", "merges.txt", "encoder.json", "dict.txt", "bpe.codes", "emoji.json"),
    *("spiece.model", "spm.model", "spm_char.model", "sentencepiece.model", "sentencepiece.bpe.model"),
    *("source.spm", "target.spm", "vocab-src.json", "vocab-tgt.json", "target_vocab.json", "entity_vocab.json"),
    *("prophetnet.tokenizer", "normalizer.json", "byte_maps.json", "word_pronunciation.json", "word_shape.json"),
    *("tekken.json", "*.tiktoken", "chat_template.jinja", "chat_template.json"),
    *("preprocessor_config.json", "processor_config.json"),
)
_ADAPTER = ("adapter_model.safetensors", "adapter_config.json", "README.md")
# By folder in the folder of a model, at any depth in it, the names of the files that go.
_IN_FOLDERS = {
    "adapters": _ADAPTER,
    "shared_adapter": _ADAPTER,
    CODE_FOLDER: ("*.py",),
    "onnx": ("*.onnx", "*.onnx.data", "*.onnx_data"),
    "additional_chat_templates": ("*.jinja",),
}
_PICTURES = (".svg", ".png", ".jpg", ".jpeg", ".gif", ".webp")  # those that the model card shows
_UNKNOWN = "not known to belong to a model"
# Patterns of names, and why what they fit stays.
_REASONS = (
    (("checkpoint-*/", "last-checkpoint/"), "a checkpoint of the training"),
    (("runs/", "logs/", "wandb/", "mlruns/", "events.out.tfevents*", "*.log"), "a log of the training"),
    (
        ("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "trainer_state.json", "multitask_state.json"),
        "state of the training",
    ),
    (("training_args.bin", "multitask_streams*", "*.distcp", "*.distcp/"), "state of the training"),
    (
        ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.h5", "*.joblib"),
        "could run code where it is loaded; weights go as safetensors",
    ),
    ((".*", "_*"), "hidden"),
)


@dataclass(frozen=True)
class PushFile:
    """A file that goes to the Hub.

    Args:
        path: Its path in the repository, with `/`.
        source: Where it lies.
        size: Its bytes.
    """

    path: str
    source: Path
    size: int


@dataclass(frozen=True)
class PushPlan:
    """What a push would send.

    Args:
        files: The files that go, by path.
        left_out: What stays, by path, and why.
    """

    files: tuple[PushFile, ...]
    left_out: dict[str, str]

    def __str__(self) -> str:
        """Return the list for readers: sizes and paths, and what stays."""
        sizes = [format_size(file.size) for file in self.files]
        width = max(map(len, sizes), default=0)
        lines = [f"{size:>{width}}  {file.path}" for size, file in zip(sizes, self.files, strict=True)]
        total = format_size(sum(file.size for file in self.files))
        lines.append(f"{len(self.files)} files, {total}")
        if self.left_out:
            lines += ["", "not sent:", *(f"  {path}: {why}" for path, why in self.left_out.items())]
        return "\n".join(lines)


def format_size(size: int) -> str:
    """Return bytes as people read them: `1.5 MiB`."""
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def plan_files(folder: Path) -> PushPlan:
    """Walk a folder and sort its files into those that go and those that stay.

    Args:
        folder: A folder with a saved model.
    """
    left_out: dict[str, str] = {}
    root = folder.resolve()
    files = [
        PushFile(path.relative_to(folder).as_posix(), path, path.stat().st_size)
        for path in _walk(folder, folder, root, left_out)
    ]
    return PushPlan(tuple(sorted(files, key=lambda file: file.path)), dict(sorted(left_out.items())))


def _walk(folder: Path, top: Path, root: Path, left_out: dict[str, str]) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        is_folder = path.is_dir()
        place = path.relative_to(top)
        why = _reason(path, place, is_folder, root)
        if why is not None:
            left_out[place.as_posix() + ("/" if is_folder else "")] = why
        elif is_folder:
            yield from _walk(path, top, root, left_out)
        else:
            yield path


def _reason(path: Path, place: Path, is_folder: bool, root: Path) -> str | None:
    """Return why a file or folder stays, or None if it goes."""
    if path.is_symlink() and not path.resolve().is_relative_to(root):
        return "a link that leads out of the folder"
    if not is_folder and _belongs(path, place):
        return None
    name = path.name + ("/" if is_folder else "")
    for patterns, why in _REASONS:
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            return why
    if is_folder and (path / CONFIG_NAME).is_file():
        return "another model"
    return None if is_folder and place.parts[0] in _IN_FOLDERS else _UNKNOWN


def _belongs(path: Path, place: Path) -> bool:
    """Return whether a file belongs to a model, by its place in the model's folder."""
    outer = place.parts[0] if len(place.parts) > 1 else None
    names = (*_OF_MODEL, *_OF_TOKENIZER) if outer is None else _IN_FOLDERS.get(outer, ())
    if any(fnmatch.fnmatchcase(path.name, pattern) for pattern in names):
        return True
    card = path.parent / "README.md"
    shown = outer is None and path.suffix.lower() in _PICTURES and card.is_file()
    return shown and path.name in card.read_text(encoding="utf-8", errors="replace")


def is_local_folder(name: str | None) -> bool:
    """Return whether a backbone's name is that of a folder on this machine, rather than a Hub id."""
    if not name:
        return False
    if name.startswith((".", "/", "~")) or Path(name).is_dir():
        return True
    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return False


def check_saved_model(folder: str | Path) -> MultiTaskConfig:
    """Return the configuration of the model in a folder, after checking that all its weights are there.

    Raises:
        FileNotFoundError: There is no such folder, no configuration, or weights are missing; they are named.
        ValueError: The model in the folder is no multi-task model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {str(folder)!r} does not exist")
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{str(folder)!r} holds no saved model: {CONFIG_NAME} is missing")
    check_named(folder, [CONFIG_NAME])
    config: Any = AutoConfig.from_pretrained(str(folder))
    if not isinstance(config, MultiTaskConfig):
        raise ValueError(f"{str(folder)!r} holds a {config.model_type!r} model, which is no multi-task model")
    missing = [name for name in _weight_files(folder) if not (folder / name).is_file()]
    model_class = next(one for one in SCHEMES.values() if one.config_class is type(config))
    if isinstance(config, FrozenBackboneConfig) and issubclass(model_class, FrozenBackboneModel):
        with torch.device("meta"):
            parts = model_class(config).adapter_tensors()
        names = [f"{part}/{name}" for part in parts for name in ("adapter_model.safetensors", "adapter_config.json")]
        missing += [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"the model in {str(folder)!r} is not complete: {', '.join(missing)} missing")
    return config


def _weight_files(folder: Path) -> list[str]:
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if (folder / SAFE_WEIGHTS_NAME).is_file() or not index.is_file():
        return [SAFE_WEIGHTS_NAME]
    shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    strange = [name for name in shards if Path(name).name != name]
    if strange:
        raise ValueError(f"{SAFE_WEIGHTS_INDEX_NAME} names {strange[0]!r}, which is no file of its own folder")
    return shards
