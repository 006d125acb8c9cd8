"""Reading the weights of a saved model: safetensors files alone, whose names and shapes are checked first.

No pickle is read: a folder that holds one in place of `model.safetensors` is refused. The header of a safetensors file
says which tensors it has, so a configuration that does not belong to the weights is found out, and refused, before
memory is taken for what it describes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .limits import shown
from .manifest import check_files
from .saved_config import HUB_OPTIONS, load_json

__all__ = [
    "Headers",
    "check_fits",
    "check_shapes",
    "find_weights",
    "headers_of",
    "meta_model",
    "read_headers",
    "read_tensors",
    "refuse_report",
    "weight_names",
]

Headers = dict[str, tuple[tuple[int, ...], str]]
"""By name of a tensor, its shape and its type as safetensors writes it (`F32`)."""

_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_FLOATING = re.compile(r"B?F\d.*")


def find_weights(folder: Any, options: Mapping[str, Any], variant: str | None = None) -> list[Path]:
    """Return the safetensors files of a saved model.

    Args:
        folder: A folder or a Hub id.
        options: Where on the Hub or disk it lies, arguments of `from_pretrained`.
        variant: As in `from_pretrained`: a part of the files' names.

    Raises:
        OSError: There are none.
        ValueError: The list of several files is broken, or names a file outside the folder; or a file is not the one
            that was saved (see [`manifest`]).
    """
    where: dict[str, Any] = {key: options[key] for key in HUB_OPTIONS if key in options and key != "trust_remote_code"}
    where["_raise_exceptions_for_missing_entries"] = False

    single, listed = weight_names(variant)
    file = cached_file(folder, single, **where)
    if file is not None:
        check_files(folder, {Path(file).name: file}, options)
        return [Path(file)]
    index = cached_file(folder, listed, **where)
    if index is None:
        pickles = [name for name in _PICKLES if cached_file(folder, name, **where) is not None]
        if pickles:
            raise OSError(
                f"{str(folder)!r} has {pickles[0]}, which is a pickle and may run code: it is not read; save the model "
                "again with save_pretrained, which writes safetensors"
            )
        raise OSError(f"{str(folder)!r} has no {single}: it is no saved model")
    check_files(folder, {Path(index).name: index}, options)
    content = load_json(index, f"{Path(index).name} of {str(folder)!r}", 2**30)
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not shards or not isinstance(content.get("metadata"), dict):
        raise ValueError(f"{SAFE_WEIGHTS_INDEX_NAME} of {str(folder)!r} has no weight_map and metadata")
    files = []
    for shard in dict.fromkeys(map(str, shards.values())):
        if not _SHARD.fullmatch(shard):
            raise ValueError(
                f"{SAFE_WEIGHTS_INDEX_NAME} of {str(folder)!r} names the file {shown(shard)}, which is no safetensors "
                "file in that folder; it is not followed"
            )
        found = cached_file(folder, shard, **where)
        if found is None:
            raise OSError(f"{str(folder)!r} has no {shard}, which its {SAFE_WEIGHTS_INDEX_NAME} names")
        files.append(Path(found))
    check_files(folder, {file.name: file for file in files}, options)
    return files


def weight_names(variant: str | None = None) -> tuple[str, str]:
    """Return the names of the weights in one file, and of the list of several files.

    Args:
        variant: As in `from_pretrained`: a part of the names.

    Example:
        >>> weight_names("fp16")
        ('model.fp16.safetensors', 'model.safetensors.index.fp16.json')
    """
    if not variant:
        return SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME
    stem = SAFE_WEIGHTS_INDEX_NAME.removesuffix(".json")
    return f"{SAFE_WEIGHTS_NAME.removesuffix('.safetensors')}.{variant}.safetensors", f"{stem}.{variant}.json"


def read_headers(files: Iterable[Path]) -> Headers:
    """Return names, shapes and types of the tensors in some safetensors files.

    Raises:
        ValueError: A file is cut off, or no safetensors file.
    """
    found: Headers = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no dictionary
                    part = opened.get_slice(name)
                    found[name] = tuple(part.get_shape()), part.get_dtype()
        except SafetensorError as error:
            raise _broken(file, error) from None
    return found


def read_tensors(file: Path | str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        ValueError: It is cut off, or no safetensors file.
    """
    try:
        return load_file(file)
    except SafetensorError as error:
        raise _broken(file, error) from None


def _broken(file: Path | str, error: Exception) -> ValueError:
    return ValueError(
        f"{str(file)!r} is cut off, damaged, or no safetensors file ({error}); copy or download it once more"
    )


def check_fits(model: nn.Module, saved: Headers, folder: Any, packed: bool = False, gaps: bool = False) -> None:
    """Check that tensors can be the weights of a model, which is on the meta device and takes no memory.

    Names that either side lacks are left to the loading, which may convert them; it reports what it could not find.

    Args:
        model: The model that the configuration describes.
        saved: What the files hold.
        folder: Where they are, for the message.
        packed: The weights are quantised: several numbers stand in one, so shapes say nothing.
        gaps: Parts may be missing, as many as there are.

    Raises:
        ValueError: A tensor has another shape or kind, or there are fewer numbers than the model has.
    """
    if not packed:
        check_shapes(model, saved, folder)
    numbers = sum(math.prod(shape) for shape, _ in saved.values())
    described = sum(parameter.numel() for parameter in model.parameters())
    if not gaps and described > numbers * (16 if packed else 1):
        raise ValueError(
            f"the configuration of {str(folder)!r} describes a model of {described:,} parameters, its files hold "
            f"{numbers:,} numbers: they do not belong together, or a part is missing; the files lack "
            f"{_named(set(model.state_dict()) - set(saved)) or 'no name'}"
        )


def check_shapes(model: nn.Module, saved: Headers, folder: Any) -> None:
    """Raise ValueError where tensors have another shape or kind than those of a model that have their names."""
    wanted = model.state_dict()
    for name, (shape, kind) in saved.items():
        if name not in wanted:
            continue
        if shape != tuple(wanted[name].shape):
            raise ValueError(
                f"{name} in {str(folder)!r} has the shape {list(shape)}; the configuration says "
                f"{list(wanted[name].shape)}"
            )
        if wanted[name].is_floating_point() != bool(_FLOATING.fullmatch(kind)):
            raise ValueError(f"{name} in {str(folder)!r} is of type {kind}, not {wanted[name].dtype}")


def headers_of(tensors: Mapping[str, Tensor]) -> Headers:
    """Return names, shapes and types of tensors in memory."""
    return {
        name: (tuple(value.shape), "F" + str(value.element_size()) if value.dtype.is_floating_point else "I")
        for name, value in tensors.items()
    }


def refuse_report(info: Mapping[str, Any], folder: Any) -> None:
    """Raise where weights that were loaded are not all of a model's, or more.

    Args:
        info: Transformers' report, with `missing_keys` and `unexpected_keys`.
        folder: What was loaded.

    Raises:
        ValueError: Parameters would start at random, or weights go unused.
    """
    missing, extra = info["missing_keys"], info["unexpected_keys"]
    if missing or extra:
        wrong = [f"lack {_named(missing)}"] * bool(missing)
        wrong += [f"have {_named(extra)}, which no part of the model takes"] * bool(extra)
        raise ValueError(
            f"the weights in {str(folder)!r} are not those of its configuration, they {' and '.join(wrong)}; to load "
            "what there is, ask for the report: from_pretrained(..., output_loading_info=True)"
        )


def _named(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(shown(name, 100).strip("'") for name in names[:3]) + more


def meta_model(model_class: Any, config: Any, folder: Any) -> Any:
    """Return a model without weights, on the meta device, of a configuration that may be nonsense.

    Raises:
        ValueError: No such model can be built.
    """
    try:
        with torch.device("meta"):
            return model_class(config)
    except ValueError:
        raise
    # The configuration is data from outside, and each backbone's code fails in its own way where it is nonsense.
    except Exception as error:
        raise ValueError(
            f"no {model_class.__name__} can be built of the configuration of {str(folder)!r}: "
            f"{type(error).__name__}: {shown(str(error))}"
        ) from error
