"""How multi-task models come to be: from a backbone, from a configuration, from a saved folder."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, logging

from .all_heads import make_head
from .backbone import (
    USE_ADAPTER_MODEL,
    align_memory,
    backbone_options,
    cast_parameters,
    check_no_peft,
    check_supported,
    default_pooling,
    isolate_rotary_embeddings,
    load_backbone,
)
from .configuration import MultiTaskConfig
from .encoder_decoder import drop_decoder
from .language_head import LanguageHead, is_tied
from .limits import shown
from .manifest import Recording, check_named, read_manifest, saving
from .pretrained_head import PretrainedHead, load_heads
from .pretrained_language import LanguageParts, load_language_model
from .rows import CurrentRows
from .saved_config import HUB_OPTIONS
from .saved_weights import check_fits, find_weights, meta_model, read_headers, refuse_report, weight_names
from .scheme import SharingScheme
from .task import Task, check_tasks, closest
from .task_type import TaskType

__all__ = ["ConstructedModel"]

logger = logging.get_logger(__name__)

# Fields of the configuration that come with the backbone's checkpoint, and its version.
_FOUND = ("generation", "untied_vocabulary", "config_version")
_PARTS = ("/adapter_model.safetensors", "/adapter_config.json")
_DYNAMIC = "transformers_modules."  # where Transformers puts code that came with a model
# Arguments of `save_pretrained` that are meant for a push.
_HUB_ARGUMENTS = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr")


class ConstructedModel(SharingScheme):
    """The parts of a multi-task model, where they come from, and what `PreTrainedModel` wants to know of them."""

    config_class: type[MultiTaskConfig] = MultiTaskConfig
    # Empty on purpose: a prefix would make `from_pretrained` read the backbone's configuration as ours.
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # The backbone has the last word; PreTrainedModel only asks whether the wrapper stands in the way.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # The loss is normalised by `num_items`, not by Trainer's keyword arguments.
    accepts_loss_kwargs: ClassVar[bool] = False

    def __init__(self, config: MultiTaskConfig, backbone: PreTrainedModel | None = None) -> None:
        """Build the model; `backbone` is used as it is, without it one is made from the configuration."""
        super().__init__(config)
        self.tasks: list[Task] = check_tasks(config.get_tasks())
        check_supported(config.backbone_config)
        if backbone is None:
            options = backbone_options(type(config.backbone_config))
            backbone = AutoModel.from_config(config.backbone_config, **options)
        if config.backbone_config.is_encoder_decoder:
            self._settle_decoder(backbone)
        isolate_rotary_embeddings(backbone)
        self.backbone = backbone
        self.rows = CurrentRows()
        pooling = config.pooling or default_pooling(config.backbone_config)
        width = getattr(config.get_text_config(), "hidden_size", None)
        if width is None:
            raise ValueError(
                f"backbone {config.backbone_config.model_type!r} has no hidden_size in its configuration, so it gives "
                "no hidden states of tokens; take another backbone"
            )
        self.heads = nn.ModuleDict(
            {
                task.name: make_head(task, width, pooling, config.head_dropout, config.backbone_config)
                for task in self.tasks
            }
        )
        self.lm_head = None
        if config.untied_vocabulary or not is_tied(config.backbone_config):
            self.untie_vocabulary()

    @classmethod
    def from_backbone(
        cls,
        backbone: str | PreTrainedModel,
        tasks: Iterable[Task | dict[str, Any]],
        *,
        backbone_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Make a multi-task model over a pretrained backbone, with freshly initialised heads.

        Heads of Transformers (`Task(head="native")`) start with the pooler that the checkpoint has, and with its
        classifier where that has the labels of the task; a classifier that is left out is reported in the log.

        Of a multi-task model (or its folder) the encoder is taken, and the heads of tasks that have the same name,
        type, labels and kind of head; the log names the heads that start at random.

        Args:
            backbone: A Hub id or folder for `AutoModel.from_pretrained`, or a model in memory, which is copied.
            tasks: The tasks, in order.
            backbone_kwargs: Arguments for `AutoModel.from_pretrained` (`dtype`, `attn_implementation`, ...).
            **options: Fields of the scheme's configuration (`pooling`, `head_dropout`, ...).

        Raises:
            ValueError: A task, an option or the backbone does not fit.

        Example:
            >>> from transformers import BertConfig, BertModel
            >>> bert = BertModel(BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
            >>> from hf_multitask import HardSharingModel
            >>> HardSharingModel.from_backbone(bert, [Task("score", "regression")]).tasks[0].name
            'score'
        """
        conversion = import_module(f"{__package__}.conversion")  # which knows every scheme
        source_model = conversion.as_multi_task(backbone, backbone_kwargs or {})
        if source_model is not None:
            return conversion.over_multi_task(cls, source_model, tasks, options)
        made, lacking = cls.over_backbone(backbone, tasks, backbone_kwargs or {}, options)
        if lacking:
            source = backbone if isinstance(backbone, str) else type(backbone).__name__
            if cls.freezes_backbone and "lm_head.weight" in lacking:
                raise ValueError(
                    f"{source} comes without lm_head.weight, the table that tokens are predicted with, which "
                    f"{cls.__name__} would leave as it starts, at random; give a checkpoint that has it"
                )
            logger.warning(
                f"{source} comes without {', '.join(lacking)} of a language model's head: they start at random"
            )
        return made

    @classmethod
    def over_backbone(
        cls,
        backbone: str | PreTrainedModel,
        tasks: Iterable[Task | dict[str, Any]],
        backbone_kwargs: dict[str, Any],
        options: dict[str, Any],
    ) -> tuple[Any, list[str]]:
        """Return what [`from_backbone`] does, and what of heads over the vocabulary the backbone came without."""
        tasks = check_tasks(tasks)
        for option in options:
            if option not in cls.options():
                raise ValueError(
                    f"{cls.__name__} has no option {option!r}{closest(option, cls.options())}; "
                    f"options are {', '.join(cls.options())}"
                )
        kinds = [task.type for task in tasks if task.type.is_language]
        kinds.sort(key=TaskType.SEQ2SEQ_LM.__ne__)  # first, as it takes other backbones
        parts = LanguageParts()
        if kinds:
            model, parts = load_language_model(backbone, kinds[0], **backbone_kwargs)
        else:
            may = cls.supports_encoder_decoder
            model = load_backbone(backbone, encoder_decoder=may, **backbone_kwargs)
        if isinstance(MODEL_MAPPING.get(type(model.config), None), (list, tuple)):
            # Of several classes (Funnel's) AutoModel takes the one that the configuration names.
            model.config.architectures = [type(model).__name__]
        config = cls.config_class(
            backbone_config=model.config,
            tasks=[task.to_dict() for task in tasks],
            # Said here because a configuration hands its own setting, None by default, to those inside it.
            **{"attn_implementation": model.config._attn_implementation, **options},
            generation=parts.generation,
            untied_vocabulary=parts.untied,
            **cls.describe_backbone(backbone, model),
        )
        wrapped = cls(config, model)
        lacking = wrapped._adopt_language(parts)
        heads, owner = load_heads(backbone, tasks, **backbone_kwargs)
        wrapped._adopt_heads(heads, owner, backbone if isinstance(backbone, str) else type(backbone).__name__)
        wrapped.config.dtype = model.dtype
        cast_parameters(wrapped, model.dtype)
        return wrapped.eval(), lacking

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a saved model; arguments and result are those of `PreTrainedModel.from_pretrained`.

        Only safetensors and JSON are read, and nothing is built of a configuration that its weights do not fit.

        Raises:
            ValueError: The configuration is no model's that can be built, the weights are not all of that model's, or
                more, or a file has changed since it was saved. With `output_loading_info=True` what is missing or too
                much is in the report instead, as in Transformers, and parameters that are missing start at random.
            OSError: There is no such folder, or it holds no safetensors.
        """
        asked = kwargs.pop("output_loading_info", False)
        if kwargs.pop("use_safetensors", True) is False or kwargs.get("weights_only") is False:
            raise ValueError("a saved model is read from safetensors alone; leave out use_safetensors and weights_only")
        folder = args[0] if args else None
        if folder is not None and kwargs.get("gguf_file") is None:
            cls._check_folder(folder, kwargs, asked)
        try:
            loaded: Any = super().from_pretrained(*args, output_loading_info=True, use_safetensors=True, **kwargs)
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise ValueError(f"the weights do not fit the configuration: {error}") from error
        model, info = loaded
        align_memory(model)
        model.freeze_backbone()
        if asked:
            return model, info
        if folder is not None:
            refuse_report(info, folder)
        return model

    @classmethod
    def _check_folder(cls, folder: Any, options: dict[str, Any], gaps: bool) -> None:
        """Check that a saved model is one, before memory is taken for it; see [`saved_weights`]."""
        cls._check_description(folder, options)
        files = find_weights(folder, options, options.get("variant"))
        config = options.get("config")
        if not isinstance(config, PreTrainedConfig):
            where = {key: options[key] for key in HUB_OPTIONS if key in options}
            config = cls.config_class.from_pretrained(folder if config is None else config, **where)
        config = copy.deepcopy(config)
        for key, value in options.items():
            if hasattr(config, key) and key not in ("dtype", "torch_dtype"):
                setattr(config, key, value)
        packed = any(getattr(part, "quantization_config", None) for part in (config, config.backbone_config))
        if options.get("ignore_mismatched_sizes") or options.get("quantization_config") is not None:
            return
        check_fits(meta_model(cls, config, folder), read_headers(files), folder, packed, gaps)

    @classmethod
    def _check_description(cls, folder: Any, options: Mapping[str, Any]) -> None:
        """Raise ValueError where a configuration in a saved model, or the code in it that is used, has changed."""
        manifest = read_manifest(folder, options)
        if manifest is not None:
            endings = _PARTS[1:] + ((".py",) if cls.__module__.startswith(_DYNAMIC) else ())
            check_named(folder, [CONFIG_NAME, *(name for name in manifest["files"] if name.endswith(endings))], options)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save the model as `PreTrainedModel` does, with a manifest of its files (see [`manifest`]).

        Args:
            save_directory: The folder. Files of an older model in it are replaced; until all are, it is marked as
                incomplete.
            is_main_process: Whether this process writes.
            state_dict: The tensors (default: the model's).
            push_to_hub: Whether to push the model afterwards.
            **kwargs: Further arguments of `PreTrainedModel.save_pretrained`.

        Raises:
            ValueError: PEFT has put adapters into the model, which could not be loaded again.
        """
        self._check_saving()
        if os.path.isfile(save_directory) or kwargs.get("distributed_checkpoint"):
            super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, **kwargs)
            return
        hub = {key: kwargs.pop(key) for key in _HUB_ARGUMENTS if push_to_hub and key in kwargs}
        with saving(save_directory, is_main_process) as recording:
            single, index = weight_names(kwargs.get("variant"))
            if is_main_process:  # Transformers deletes old shards, but what lists them would be taken for a new list
                recording.remove(index)
            super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
            if is_main_process:
                self._record(recording, single, index)
        if push_to_hub and is_main_process:
            repo = hub.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(repo, **hub)

    def _check_saving(self) -> None:
        check_no_peft(self, "a saved multi-task model")

    @staticmethod
    def _record(recording: Recording, single: str, index: str) -> None:
        """Record the files that `PreTrainedModel.save_pretrained` wrote."""
        recording.remove(*(name for name in recording.kept if name.endswith(_PARTS)))  # new ones are written after this
        recording.add_known([CONFIG_NAME, GENERATION_CONFIG_NAME, index])
        if (recording.folder / index).is_file():
            content = json.loads((recording.folder / index).read_text(encoding="utf-8"))
            recording.add(*content["weight_map"].values())
            recording.remove(single)  # of an older model; it would be loaded in place of the shards
        else:
            recording.add(single)

    def _settle_decoder(self, backbone: PreTrainedModel) -> None:
        """Take the decoder out of an encoder-decoder, where no task writes.

        Raises:
            ValueError: The scheme cannot have an encoder-decoder.
        """
        if not self.supports_encoder_decoder:
            raise ValueError(
                f"backbone {backbone.config.model_type!r} is an encoder-decoder, which does not go with "
                f"{type(self).__name__}; use HardSharingModel, or another backbone"
            )
        if not any(task.type is TaskType.SEQ2SEQ_LM for task in self.tasks):
            drop_decoder(backbone)

    def untie_vocabulary(self) -> None:
        """Give the model a table of its own to predict tokens with, if a task does and there is none."""
        heads = [head for head in self.heads.values() if isinstance(head, LanguageHead)]
        if heads and self.lm_head is None:
            size, width = heads[0].layers.table_shape
            self.lm_head = nn.Linear(width, size, bias=False)
            self.config.untied_vocabulary = is_tied(self.config.backbone_config)
            self.freeze_backbone()

    @torch.no_grad()
    def _adopt_language(self, parts: LanguageParts) -> list[str]:
        """Take over the pretrained weights of the heads over the vocabulary; return the names of what is not there."""
        lacking: dict[str, None] = {}
        for task in self.tasks:
            head = self._head(task.name)
            if isinstance(head, LanguageHead):
                own = head.layers.native.state_dict()
                for name, value in own.items():
                    if name in parts.layers:
                        value.copy_(parts.layers[name])
                lacking |= dict.fromkeys(name for name in own if name not in parts.layers)
        if self.lm_head is not None and parts.table is not None:
            self.lm_head.weight.copy_(parts.table)
        elif self.lm_head is not None:
            lacking["lm_head.weight"] = None
        return list(lacking)

    @torch.no_grad()
    def _adopt_heads(self, heads: dict[TaskType, PretrainedHead], owner: str, source: str) -> None:
        """Give heads of Transformers the pooler and classifier of the checkpoint, and report a classifier left out."""
        used = False
        for task in self.tasks:
            if task.head != "native" or task.type not in heads:
                continue
            pretrained = heads[task.type]
            tensors, left_out = pretrained.for_task(task, self.config.backbone_config)
            own = self._head(task.name).layers.native.state_dict()  # type: ignore[union-attr]
            for name, value in own.items():
                if name in tensors:
                    value.copy_(tensors[name])
            used |= bool(pretrained.model)
            if left_out and pretrained.model:
                logger.warning(
                    f"task {task.name!r}: the classifier of {source}, a {owner}, is not kept: it predicts "
                    f"{shown(pretrained.labels)} ({pretrained.problem or 'problem_type not set'}), the task "
                    f"{shown(task.labels)} ({task.type}); that of the task starts at random"
                )
        if owner and not used:
            logger.warning(
                f"{source} is a {owner}, whose classifier none of the tasks keeps: a task of that type with "
                "Task(head='native') and the same labels would"
            )

    @classmethod
    def options(cls) -> list[str]:
        """Return the options of `from_backbone`: the fields that the scheme's configuration adds to the common ones."""
        common = {field.name for field in fields(PreTrainedConfig)} | {"backbone_config", "tasks", *_FOUND}
        return [field.name for field in fields(cls.config_class) if field.name not in common]

    # ---- PreTrainedModel's contracts ----

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, every_n_layers: int = 1
    ) -> None:
        """Set how layers are computed again in the backward pass: with the rows of the pass they belong to."""
        super()._set_gradient_checkpointing(enable, self.rows.carry(gradient_checkpointing_func), every_n_layers)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise the layers of the heads; the backbone initialises its own."""
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):  # of new tokens
            std = getattr(self.config.get_text_config(), "initializer_range", self.config.initializer_range)
            init.normal_(module.weight, mean=0.0, std=std)

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what Transformers offers here: an adapter of PEFT would freeze the heads and be saved without them.

        Raises:
            ValueError: Always; it names what to do instead.
        """
        raise ValueError(f"{type(self).__name__} takes no adapter of PEFT; {USE_ADAPTER_MODEL}")

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse what Transformers offers here; see [`add_adapter`].

        Raises:
            ValueError: Always; it names what to do instead.
        """
        self.add_adapter()

    def get_input_embeddings(self) -> nn.Module:
        """Return the backbone's input embeddings."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the backbone's input embeddings."""
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the table that tokens are predicted with, where it is not that of the input embeddings."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Replace the table that tokens are predicted with."""
        self.lm_head = new_embeddings

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> Any:
        """Resize the embeddings as `PreTrainedModel` does, and what heads have for each token."""
        resized = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if self.lm_head is not None and self.lm_head.out_features != resized.num_embeddings:
            trained = self.lm_head.weight.requires_grad
            size = resized.num_embeddings
            self.lm_head = self._get_resized_lm_head(self.lm_head, size, mean_resizing=mean_resizing)
            self.lm_head.requires_grad_(trained)
        for head in self.heads.values():
            if isinstance(head, LanguageHead):
                head.layers.resize(resized.num_embeddings)
        return resized
