"""Saved models and files, and what could be wrong with them, for the tests of safety and the fuzz test."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from conftest import BACKBONES, PAD_ID, make_tasks
from hypothesis import strategies as st
from safetensors.torch import load_file

from hf_multitask import Task
from hf_multitask.models.auto import SCHEMES
from hf_multitask.models.base import MultiTaskModel

# What a file that is not one of ours may end in: what this library, Transformers and safetensors say on purpose.
NAMED = (ValueError, OSError)

# Every scheme, its options, and whether a folder of it holds the backbone.
KINDS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "hard": ("hard", {}, True),
    "soft": ("soft", {}, True),
    "soft, cross-stitched": ("soft", {"cross_stitch": True}, True),
    "conditioned": ("conditioned", {}, True),
    "prefix": ("prefix", {"num_virtual_tokens": 3}, False),
    "adapter": ("adapter", {"rank": 2, "shared_rank": 2}, True),
    "mixture": ("mixture_of_experts", {"num_experts": 2, "experts_per_token": 1, "router_task_embedding": True}, True),
}
assert {scheme for scheme, *_ in KINDS.values()} == set(SCHEMES)


def save_model(kind: str, folder: Path, tasks: list[Task] | None = None) -> MultiTaskModel:
    """Save a model all of whose parts do something in `folder/model`, and its backbone beside it where it needs one."""
    scheme, options, holds_backbone = KINDS[kind]
    torch.manual_seed(0)
    backbone: Any = BACKBONES["bert"]()
    if not holds_backbone:
        backbone.save_pretrained(folder / "backbone")
        backbone = str(folder / "backbone")
    model = SCHEMES[scheme].from_backbone(backbone, tasks or make_tasks(), **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder / "model")
    return model


def make_batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 90, (3, 7), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(7) < torch.tensor([7, 4, 6]).unsqueeze(1)).long()
    return {"input_ids": torch.where(mask.bool(), ids, PAD_ID), "attention_mask": mask}


@torch.inference_mode()
def answers(model: MultiTaskModel) -> dict[str, torch.Tensor]:
    return model(**make_batch(), return_dict=True).logits


def put_together(model: MultiTaskModel, folder: Path) -> MultiTaskModel:
    """Return what a folder says, without anything that loads models: a model of its configuration, its tensors as they
    stand in the files."""
    made = type(model)(copy.deepcopy(model.config)).eval()
    tensors = load_file(folder / "model.safetensors")
    for part, names in made.adapter_tensors().items() if hasattr(made, "adapter_tensors") else ():
        own = load_file(folder / part / "adapter_model.safetensors")
        tensors |= {ours: own[peft] for ours, peft in names.items()}
    if not getattr(model.config, "backbone_saved", True):
        beside = load_file(Path(model.config.backbone_name) / "model.safetensors")
        tensors |= {f"backbone.{name}": value for name, value in beside.items() if not name.startswith("pooler.")}
    made.load_state_dict(tensors)
    return made


# ---- values that nobody should have written ----

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 10**12, -(10**18), 0.5, -0.5, 1e308),
    *(float("nan"), float("inf"), "", "x", "hard", "tone", "../../x", "/etc/passwd", "C:\\x", "a\0b", "\ud800"),
    *("{text.__class__}", "__class__", "float64", "load", "9" * 400, "x" * 20_000, [], {}, [[]], [None]),
    *({"a": 1}, {"model_type": "llama"}, {"__float__": "NaN"}, list("ab") * 3, ["tone", {"name": "tone"}]),
)


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def paths_of(value: Any, path: tuple = ()) -> list[tuple]:
    """Return the path of each value in a nesting."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += paths_of(item, (*path, key))
    return found


@st.composite
def mutations(draw: st.DrawFn, original: Any, most: int = 3) -> Any:
    """Draw what has become of a JSON value after a few changes at random places."""
    value = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, most))):
        paths = paths_of(value)
        if not paths:
            return value
        path = draw(st.sampled_from(paths))
        place = value
        for key in path[:-1]:
            place = place[key]
        last = path[-1]
        hostile = (st.sampled_from((*VALUES, nested(60))) | st.integers() | st.text(max_size=5)).map(copy.deepcopy)
        change = draw(st.sampled_from(("replace", "replace", "delete", "double", "rename", "copy", "insert")))
        if change == "replace":
            place[last] = draw(hostile)
        elif change == "delete":
            del place[last]
        elif change == "double" and isinstance(place, list):
            place.insert(last, copy.deepcopy(place[last]))
        elif change == "rename" and isinstance(place, dict):
            place[draw(st.sampled_from(("name", "x", "__class__", "to_dict", "num_labels", last.upper())))] = place.pop(
                last
            )
        elif change == "copy":
            other = draw(st.sampled_from(paths))
            source = value
            try:
                for key in other:
                    source = source[key]
            except (KeyError, IndexError, TypeError):
                continue
            place[last] = copy.deepcopy(source)
        elif change == "insert" and isinstance(place, dict):
            known = ("attn_implementation", "config_version", "quantization_config", "auto_map", "use_cache", "dtype")
            place[draw(st.sampled_from(known) | st.text(max_size=5))] = draw(hostile)
    return value


@st.composite
def damages(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw what has become of a file whose bytes were cut, changed, doubled or filled in, mostly in its header."""
    for _ in range(draw(st.integers(1, 3))):
        near = [st.integers(0, min(len(content), last)) for last in (64, 4096, len(content))]
        place = draw(st.one_of(*near, st.just(len(content))))
        change = draw(st.sampled_from(("cut", "flip", "insert", "drop")))
        if change == "cut":
            content = content[:place]
        elif change == "flip" and place < len(content):
            content = content[:place] + bytes([content[place] ^ draw(st.integers(1, 255))]) + content[place + 1 :]
        elif change == "insert":
            content = content[:place] + draw(st.binary(min_size=1, max_size=9)) + content[place:]
        elif change == "drop":
            content = content[:place] + content[place + draw(st.integers(1, 9)) :]
    return content


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
