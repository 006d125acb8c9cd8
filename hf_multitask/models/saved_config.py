"""Reading the `config.json` of a saved model, of which nothing is taken on trust.

A configuration may come from anybody on the Hub. What it says is checked before it is used: that it is one of this
library's, of a version that is known, plain JSON of a sane size, and that no value of it would load code, another
file, or build more than there can be.

The version counts changes of the format. A configuration of an older version is migrated, one step at a time; one of a
newer version is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME, cached_file

from .limits import check_plain, check_sizes, shown

__all__ = ["CONFIG_VERSION", "HUB_OPTIONS", "check_config", "check_config_file", "load_json", "migrate"]

# What says where on the Hub, or on the disk, a checkpoint is; its configuration and tokenizer lie there too.
HUB_OPTIONS = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "trust_remote_code")

CONFIG_VERSION = 1
"""The version that is written."""

# By version, what makes the next one of a configuration. Before the first one configurations named no version.
_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {0: dict}

_LARGEST = 64 * 2**20  # bytes of a configuration
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
_FLOATING = {
    name
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype) and value.is_floating_point and "float" in name
}
# By name of a field, at any depth: what its value must be, and what is said of another one.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("dtype", "torch_dtype"),
        (
            lambda value: value is None or isinstance(value, torch.dtype) or str(value) in _FLOATING,
            "is no type of floating point numbers in torch",
        ),
    ),
    **dict.fromkeys(
        ("output_hidden_states", "output_attentions", "return_dict"),
        (lambda value: isinstance(value, (bool, type(None))), "is neither true nor false"),
    ),
    "chunk_size_feed_forward": (lambda value: type(value) is int, "is no whole number"),
}
# Where a configuration says that another file, or other code, is to be used; nothing of the kind is ever saved.
_ELSEWHERE = ("configuration_files", "custom_generate", "fusion_config", "gguf_file")


def load_json(path: str | os.PathLike, what: str, largest: int = _LARGEST, with_nan: bool = False) -> dict[str, Any]:
    """Return the dictionary that a JSON file holds.

    Args:
        path: The file.
        what: What it is, in front of a message.
        largest: The most bytes that are read.
        with_nan: Numbers may be NaN, as they are in the log of a training that diverged.

    Raises:
        ValueError: It is larger, no JSON, nested too deeply, or no dictionary.
    """
    size = os.path.getsize(path)
    if size > largest:
        raise ValueError(f"{what} has {size:,} bytes, more than the {largest:,} that are read of such a file")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is no JSON file that can be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{what} holds a {type(content).__name__}; it must hold a dictionary")
    check_plain(content, what, with_nan)
    return content


def check_config_file(folder: Any, options: Mapping[str, Any], known: Sequence[str] = ()) -> None:
    """Check the file of a configuration, before Transformers reads it.

    Args:
        folder: A folder, a file or a Hub id; where there is no such file, saying so is left to Transformers.
        options: Arguments of `from_pretrained`.
        known: What its `model_type` may be; empty for any.

    Raises:
        ValueError: The file is no configuration, or wants another file in its place.
    """
    where = {key: options[key] for key in HUB_OPTIONS if key in options and key != "trust_remote_code"}
    file: Any = folder
    if not os.path.isfile(folder):
        file = cached_file(folder, CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **where)
    if file is None:
        return
    what = f"{CONFIG_NAME} of {str(folder)!r}"
    values = load_json(file, what)
    check_elsewhere(values)
    code = values.get("auto_map", {})
    if not isinstance(code, dict):
        raise ValueError(f"{what}: auto_map must say by auto class which code is its own, got {shown(code)}")
    found = values.get("model_type")
    # Code of its own, where somebody trusts it, may bring a scheme of its own.
    if known and found not in known and "auto_map" not in values:
        raise ValueError(f"{what} is of model_type {shown(found)}, which is no scheme; schemes are {', '.join(known)}")


def check_elsewhere(values: Mapping[str, Any]) -> None:
    """Raise ValueError where a configuration wants another file, or code, in its place."""
    for key in _ELSEWHERE:
        if key in values:
            raise ValueError(f"{CONFIG_NAME} has the key {key!r}, which no saved model has: it is not followed")


def check_config(values: Mapping[str, Any], model_type: str) -> None:
    """Check what a configuration says, as a dictionary, before an object is made of it.

    Args:
        values: The configuration.
        model_type: The `model_type` that it should have; empty for any.

    Raises:
        ValueError: It is of another scheme, or a value is not what it can be.
    """
    check_plain({key: value for key, value in values.items() if not _is_object(value)}, CONFIG_NAME)
    check_sizes(values, CONFIG_NAME)
    check_elsewhere(values)
    found = values.get("model_type", model_type)
    if model_type and found != model_type:
        raise ValueError(
            f"{CONFIG_NAME} is of model_type {shown(found)}, not {model_type!r}; load it by "
            "AutoModelForMultiTask.from_pretrained, which finds the class that fits"
        )
    _check_keys(values, "")


def _is_object(value: Any) -> bool:
    """Return whether somebody in Python, and no file, gave a value."""
    return isinstance(value, (PreTrainedConfig, torch.dtype))


def _check_keys(values: Mapping[str, Any], path: str) -> None:
    for key, value in values.items():
        place = f"{path}{key}"
        if not isinstance(key, str):
            continue
        if key.startswith("__") or callable(getattr(PreTrainedConfig, key, None)):
            raise ValueError(f"{CONFIG_NAME}: {shown(place)} is no field of a configuration")
        fits, wrong = _FIELDS.get(key, (None, ""))
        if fits is not None and not fits(value):
            raise ValueError(f"{CONFIG_NAME}: {place} {shown(value)} {wrong}")
        if key.lstrip("_").startswith(_IMPLEMENTATIONS):
            named = value.values() if isinstance(value, dict) else [value]
            if any("/" in str(name) or ":" in str(name) for name in named):
                raise ValueError(
                    f"{CONFIG_NAME}: {place} {shown(value)} is code on the Hub, which a configuration cannot ask for; "
                    "give it to from_pretrained yourself if you trust it"
                )
        if isinstance(value, dict) and (key.endswith("_config") and key != "quantization_config"):
            _check_keys(value, f"{place}.")


def migrate(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration in the present version.

    Raises:
        ValueError: It is of a newer version, or the version is no number.
    """
    version = values.get("config_version", 0)
    if isinstance(version, bool) or not isinstance(version, int) or version < 0:
        raise ValueError(f"config_version must be a whole number from 0, got {shown(version)}")
    if version > CONFIG_VERSION:
        raise ValueError(
            f"{CONFIG_NAME} has config_version {version}; this version of hf_multitask reads versions up to "
            f"{CONFIG_VERSION}: install a newer hf_multitask"
        )
    migrated = dict(values)
    for step in range(version, CONFIG_VERSION):
        migrated = _MIGRATIONS[step](migrated)
    return {**migrated, "config_version": CONFIG_VERSION}
