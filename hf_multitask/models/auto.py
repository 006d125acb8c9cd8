"""`AutoModelForMultiTask`, and the registration that lets `AutoConfig` and `AutoModel` find every scheme."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from transformers import AutoConfig, AutoModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass, _LazyAutoMapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from .base import MultiTaskModel
from .configuration import MultiTaskConfig
from .hard_sharing import HardSharingConfig, HardSharingModel

__all__ = ["SCHEMES", "AutoModelForMultiTask"]

SCHEMES: dict[str, type[MultiTaskModel]] = {"hard": HardSharingModel}
"""Sharing schemes by the name that a recipe's `model.sharing` uses."""

_CONFIGS: tuple[type[MultiTaskConfig], ...] = (HardSharingConfig,)


class AutoModelForMultiTask(_BaseAutoModelClass):
    """Load any multi-task model: `AutoModelForMultiTask.from_pretrained(folder_or_hub_id)` finds its scheme."""

    _model_mapping: Any = _LazyAutoMapping(CONFIG_MAPPING_NAMES, OrderedDict())


for _config, _model in zip(_CONFIGS, SCHEMES.values(), strict=True):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForMultiTask.register(_config, _model, exist_ok=True)
