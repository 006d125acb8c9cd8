"""Schemes that train small parts beside a frozen backbone: what is saved, and how it comes back.

A saved folder holds no copy of the backbone (unless asked for): the heads are in `model.safetensors`, and what each
task trains is in a folder of its own, in the format of the PEFT library, so that PEFT reads it too. The configuration
remembers the backbone's id and a hash of its weights; loading checks that the backbone is still the same.

Parameters of the backbone that somebody trains all the same (`requires_grad_(True)`: norms, embeddings) are saved in
`model.safetensors` as well, and the configuration names them in `backbone_trained`. A name is noted when a forward pass
computes gradients for it, so that what was frozen again before saving is not forgotten. A loaded model is frozen as a
new one is; to go on training these parameters, unfreeze them again. PEFT's folders then name no base model, because the
one that they were trained on is not the published one: give PEFT `model.backbone`.
"""

from __future__ import annotations

import copy
import re
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from .backbone import load_backbone, weights_hash
from .base import MultiTaskModel
from .configuration import MultiTaskConfig
from .language_head import CausalLanguageHead
from .limits import is_text, shown
from .manifest import Recording, check_files, saving
from .pretrained_language import load_language_model
from .saved_config import HUB_OPTIONS
from .saved_weights import (
    check_fits,
    check_shapes,
    find_weights,
    headers_of,
    meta_model,
    read_headers,
    read_tensors,
    refuse_report,
)
from .task_type import TaskType

__all__ = ["FrozenBackboneConfig", "FrozenBackboneModel"]

if TYPE_CHECKING:
    from peft import PeftConfig

_OF_BACKBONE = ("backbone.", "lm_head.")  # the tensors that came with the backbone's checkpoint
_SHARES = ("\\\\", "//")  # disks of other machines
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_ADAPTER_CONFIG = "adapter_config.json"


class FrozenBackboneConfig(MultiTaskConfig):
    """Configuration of a model with a frozen backbone; see [`MultiTaskConfig`] for the other fields.

    Args:
        backbone_name: Hub id or folder of the backbone, where it is known.
        backbone_hash: SHA-256 of the backbone's weights, in hexadecimal.
        backbone_saved: Whether the folder that this configuration is in holds the backbone's weights.
        backbone_trained: Names of the backbone's parameters that were trained, as `state_dict` has them.

    Raises:
        ValueError: The name or the hash cannot be one, or the parameters cannot be the backbone's.
    """

    backbone_name: str | None = None
    backbone_hash: str | None = None
    backbone_saved: bool = False
    backbone_trained: list | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Check what describes the backbone."""
        super().__post_init__(**kwargs)
        name = self.backbone_name
        if name is not None and (not is_text(name) or not name.isprintable() or name.startswith(_SHARES)):
            raise ValueError(f"backbone_name must be a Hub id or a folder, got {shown(name)}")
        if self.backbone_hash is not None and not re.fullmatch("[0-9a-f]{64}", self.backbone_hash):
            raise ValueError(f"backbone_hash must be a SHA-256 in hexadecimal, got {shown(self.backbone_hash)}")
        trained = self.backbone_trained
        if trained is not None and not (
            isinstance(trained, list) and all(is_text(one) and one.startswith(_OF_BACKBONE) for one in trained)
        ):
            raise ValueError(
                f"backbone_trained must be a list of names of the backbone's tensors, got {shown(trained)}"
            )


class FrozenBackboneModel(MultiTaskModel):
    """Abstract base of schemes that train parts beside a frozen backbone, each saved in PEFT's format."""

    config_class: type[FrozenBackboneConfig] = FrozenBackboneConfig
    config: FrozenBackboneConfig
    freezes_backbone = True

    def __init__(self, config: FrozenBackboneConfig, backbone: PreTrainedModel | None = None) -> None:
        """Build the backbone, frozen, and the heads."""
        super().__init__(config, backbone)
        self.freeze_backbone()
        self.register_forward_pre_hook(_note_pass)

    # ---- what a scheme implements ----

    @abstractmethod
    def adapter_tensors(self) -> dict[str, dict[str, str]]:
        """Return, by folder in a saved model, the names of our tensors and of the same tensors in PEFT's file."""

    @abstractmethod
    def adapter_config(self, folder: str) -> PeftConfig:
        """Return PEFT's configuration for one of the folders."""

    def peft_layout(self) -> tuple[str, str]:
        """Return the `task_type` of the adapters' configurations, and what comes before names of the backbone's layers.

        Where a task generates, PEFT is to put the adapters, all of them, on an `AutoModelForCausalLM`, which holds the
        backbone under a name; else on the backbone itself.
        """
        for head in self.heads.values():
            if isinstance(head, CausalLanguageHead):
                return "CAUSAL_LM", f"{head.layers.native.base_model_prefix}."
        return "FEATURE_EXTRACTION", ""

    # ---- the backbone's identity ----

    @classmethod
    def options(cls) -> list[str]:
        """Return the options of `from_backbone`; what describes the backbone is found, not given."""
        return [name for name in super().options() if not name.startswith("backbone_")]

    @classmethod
    def describe_backbone(cls, source: str | PreTrainedModel, backbone: PreTrainedModel) -> dict[str, Any]:
        """Return the fields of the configuration that say which backbone this is."""
        # A model in memory may have been trained since it was loaded: where it came from then says nothing.
        name = None if isinstance(source, PreTrainedModel) else str(source)
        return {"backbone_name": name, "backbone_hash": weights_hash(backbone)}

    def note_trained(self) -> set[str]:
        """Write into the configuration which of the backbone's parameters are trained; return all that ever were."""
        known = set(self.config.backbone_trained or ())
        parts = (self.backbone,) if self.lm_head is None else (self.backbone, self.lm_head)
        if any(parameter.requires_grad for part in parts for parameter in part.parameters()):
            trained = {
                name
                for prefix, part in zip(_OF_BACKBONE, parts, strict=False)
                for name, parameter in part.named_parameters(prefix.rstrip("."))
                if parameter.requires_grad
            }
            if not trained <= known:
                known |= trained
                self.config.backbone_trained = sorted(known)
        return known

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Resize the embeddings as `PreTrainedModel` does; the backbone then is another, and saved with the model.

        New rows are frozen, like the others; the trainer refuses tokens that would stay untrained.
        """
        resized = super().resize_token_embeddings(*args, **kwargs)
        self.config.backbone_name = None
        return resized

    # ---- saving ----

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        save_backbone: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Save the model.

        Args:
            save_directory: The folder.
            is_main_process: Whether this process writes.
            state_dict: The tensors (default: the model's).
            save_backbone: Whether to write all of the backbone's weights (default: only where the backbone has no id
                or folder that it could be loaded from). Those that were trained are written in any case.
            **kwargs: Further arguments of `PreTrainedModel.save_pretrained`.
        """
        self._check_saving()
        tensors = dict(self.state_dict() if state_dict is None else state_dict)
        if save_backbone is None:
            save_backbone = self.config.backbone_name is None
        trained = self.note_trained()
        folders = self.adapter_tensors()
        elsewhere = {ours for names in folders.values() for ours in names}
        kept = {
            name: value
            for name, value in tensors.items()
            if name not in elsewhere and (save_backbone or name in trained or not name.startswith(_OF_BACKBONE))
        }
        config, self.config = self.config, copy.deepcopy(self.config)
        self.config.backbone_saved = save_backbone
        with saving(save_directory, is_main_process) as recording:
            try:
                super().save_pretrained(save_directory, is_main_process, kept, **kwargs)
            finally:
                self.config = config
            if is_main_process:
                backbone = None if trained else self.config.backbone_name  # another one is none for PEFT
                self._save_adapters(save_directory, folders, tensors, backbone, recording)

    def _save_adapters(
        self,
        save_directory: Any,
        folders: Mapping[str, dict[str, str]],
        tensors: Mapping[str, Tensor],
        backbone: str | None,
        recording: Recording,
    ) -> None:
        """Write what tasks train in PEFT's format."""
        for folder, names in folders.items():
            place = Path(save_directory, folder)
            if not place.resolve().is_relative_to(Path(save_directory).resolve()):
                raise ValueError(f"{str(place)!r} is a link that leads out of the folder; remove it")
            place.mkdir(parents=True, exist_ok=True)
            adapter = self.adapter_config(folder)
            adapter.base_model_name_or_path = backbone
            adapter.inference_mode = True
            adapter.save_pretrained(str(place))
            own = {peft: tensors[ours].detach().cpu().contiguous() for ours, peft in names.items()}
            save_file(own, place / _ADAPTER_WEIGHTS, metadata={"format": "pt"})
            recording.add(f"{folder}/{_ADAPTER_WEIGHTS}", f"{folder}/{_ADAPTER_CONFIG}")

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **options: Any) -> Any:
        """Upload what `push_to_hub` saved; `PreTrainedModel` looks one folder deep, and adapters lie in two."""
        from huggingface_hub import HfApi

        api, revision = HfApi(token=options.get("token")), options.get("revision")
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        known = ("commit_message", "commit_description", "revision", "create_pr")
        chosen = {key: options[key] for key in known if options.get(key)}
        return api.upload_folder(
            repo_id=repo_id, folder_path=working_dir, **{"commit_message": "Upload model", **chosen}
        )

    # ---- loading ----

    @classmethod
    def from_pretrained(cls, *args: Any, backbone: str | PreTrainedModel | None = None, **kwargs: Any) -> Any:
        """Load a saved model, its adapters, and the backbone from where it came from.

        Args:
            *args: Folder or Hub id.
            backbone: Where the backbone is now, if not where the configuration says; a Hub id, a folder or a model.
            **kwargs: As for `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: The backbone is another one (its hash differs), an adapter is missing or has another shape.
            OSError: There is no such folder.
        """
        if kwargs.get("state_dict") is not None or not args or args[0] is None:
            return super().from_pretrained(*args, **kwargs)
        folder, *rest = args
        where = {key: kwargs.pop(key) for key in HUB_OPTIONS if key in kwargs}
        config = kwargs.pop("config", None)
        if not isinstance(config, PreTrainedConfig):
            config = cls.config_class.from_pretrained(config or folder, **where)
        dtypes = ("dtype", "torch_dtype")  # the older name is still understood
        fields = {key: kwargs.pop(key) for key in list(kwargs) if hasattr(config, key) and key not in dtypes}
        for key, value in fields.items():
            setattr(config, key, value)
        where.pop("trust_remote_code", None)
        cls._check_description(folder, where)
        files = find_weights(folder, where, kwargs.pop("variant", None))
        skeleton = meta_model(cls, config, folder)
        tensors: dict[str, Tensor] = {}
        for file in files:
            tensors |= read_tensors(file)
        for part in skeleton.adapter_tensors():
            tensors |= skeleton._read_adapter(folder, part, where)
        check_shapes(skeleton, headers_of(tensors), folder)
        if not config.backbone_saved:
            if backbone is None:
                _check_source(config.backbone_name, folder)
            _check_trained(config, tensors, folder)
            tensors = _backbone_tensors(config, backbone, skeleton.lm_head is not None) | tensors
        elif backbone is not None:
            raise ValueError(f"{str(folder)!r} holds the backbone's weights; leave out backbone={backbone!r}")
        asked = kwargs.pop("output_loading_info", False)
        packed = bool(getattr(config.backbone_config, "quantization_config", None))
        check_fits(skeleton, headers_of(tensors), folder, packed, asked)
        if not any(key in kwargs for key in dtypes):
            kwargs["dtype"] = config.dtype
        options = {"config": config, "state_dict": tensors, "output_loading_info": True, **kwargs}
        model, info = super().from_pretrained(None, *rest, **options)
        if asked:
            return model, info
        refuse_report(info, folder)
        return model

    def load_adapters(self, folder: str | Path) -> None:
        """Load what `save_pretrained` wrote in PEFT's format into this model; the heads stay as they are.

        So do trained parameters of the backbone, which are with the heads. Those that were not trained yet when the
        folder was written get the backbone's own values back.

        Raises:
            ValueError: An adapter is missing, or has another shape.
        """
        loaded: dict[str, Tensor] = {}
        for part in self.adapter_tensors():
            adapter = self._read_adapter(folder, part, {})
            check_shapes(self, headers_of(adapter), folder)
            loaded |= adapter
        saved = {name for name in read_headers(find_weights(folder, {})) if name.startswith(_OF_BACKBONE)}
        trained = self.note_trained()
        if self.config.backbone_name is not None and saved - trained:
            self.config.backbone_trained = sorted(trained | saved)
        if trained - saved:
            original = _backbone_tensors(self.config, None, self.lm_head is not None)
            loaded |= {name: original[name] for name in trained - saved}
        with torch.no_grad():
            for name, value in loaded.items():
                self.get_parameter(name).copy_(value)

    def tensors_elsewhere(self) -> set[str]:
        """Return the names of the tensors that are not in `model.safetensors`."""
        adapters = {ours for names in self.adapter_tensors().values() for ours in names}
        return adapters | {name for name in self.state_dict() if name.startswith(_OF_BACKBONE)}

    def _read_adapter(self, folder: Any, part: str, where: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the tensors of one adapter of a saved model, by our names."""
        inside = {**where, "subfolder": "/".join(filter(None, (where.get("subfolder", ""), part)))}
        file = cached_file(folder, _ADAPTER_WEIGHTS, _raise_exceptions_for_missing_entries=False, **inside)
        if file is None:
            raise ValueError(
                f"{str(folder)!r} has no {part}/{_ADAPTER_WEIGHTS}, the part of a task in its configuration; "
                f"the parts are {', '.join(self.adapter_tensors())}"
            )
        check_files(folder, {f"{part}/{_ADAPTER_WEIGHTS}": file}, where)
        saved = read_tensors(file)
        names = self.adapter_tensors()[part]
        missing = sorted(set(names.values()) - set(saved))
        extra = sorted(set(saved) - set(names.values()))
        if missing or extra:
            raise ValueError(
                f"{part}/{_ADAPTER_WEIGHTS} in {str(folder)!r} is of another kind: it lacks {missing[:3]} and has "
                f"{extra[:3]} too much"
            )
        return {ours: saved[peft] for ours, peft in names.items()}


def _note_pass(model: FrozenBackboneModel, args: Any) -> None:
    if torch.is_grad_enabled():
        model.note_trained()


def _check_trained(config: FrozenBackboneConfig, tensors: Mapping[str, Tensor], folder: Any) -> None:
    """Raise ValueError where a saved model does not hold the parameters of its backbone that were trained."""
    named, found = set(config.backbone_trained or ()), {name for name in tensors if name.startswith(_OF_BACKBONE)}
    if named != found:
        raise ValueError(
            f"the configuration of {str(folder)!r} names {len(named)} trained tensors of the backbone in "
            f"backbone_trained and its weights hold {len(found)}; lacking are {sorted(named - found)[:3]}, too much "
            f"are {sorted(found - named)[:3]}"
        )


def _check_source(source: str | None, folder: Any) -> None:
    """Check where a configuration says that its backbone is.

    A path on this disk is followed only for a model that lies on this disk itself. It is only read, and only taken if
    its weights have the hash that the configuration names.

    Raises:
        ValueError: It is no Hub id, and the model came from the Hub.
    """
    if source is None or Path(folder).is_dir():
        return
    try:
        validate_repo_id(source)
        relative = source.startswith(".") or Path(source).exists()
    except HFValidationError:
        relative = True
    if relative:
        raise ValueError(
            f"{str(folder)!r} says that its backbone is {shown(source)}, a path on some disk and no Hub id; give the "
            "backbone by from_pretrained(..., backbone=...)"
        )


def _backbone_tensors(
    config: FrozenBackboneConfig, backbone: str | PreTrainedModel | None, with_table: bool
) -> dict[str, Tensor]:
    """Return the backbone's tensors, by our names, after checking that it is the one that was trained with.

    With `with_table` the table that tokens are predicted with is one of them.
    """
    source = config.backbone_name if backbone is None else backbone
    if source is None:
        raise ValueError("the saved model has no backbone and names none; give from_pretrained(..., backbone=...)")
    options: dict[str, Any] = {} if isinstance(source, PreTrainedModel) else {"dtype": config.dtype}
    table = None
    if with_table:
        kind = next(task.type for task in config.get_tasks() if TaskType(task.type).is_language)
        loaded, parts = load_language_model(source, kind, **options)
        table = parts.table
        if table is None:
            raise ValueError(f"backbone {source!r} comes without the table that its tasks predict tokens with")
    else:
        loaded = load_backbone(source, **options)
    found = weights_hash(loaded)
    if found != config.backbone_hash:
        name = type(source).__name__ if isinstance(source, PreTrainedModel) else repr(source)
        raise ValueError(
            f"backbone {name} is not the one that this model was trained with: its weights have the hash "
            f"{found[:16]}, the configuration has {str(config.backbone_hash)[:16]}; give the right one by "
            "from_pretrained(..., backbone=...)"
        )
    tensors = {f"backbone.{name}": value for name, value in loaded.state_dict().items()}
    return tensors if table is None else {**tensors, "lm_head.weight": table}
