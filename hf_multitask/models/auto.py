"""`AutoModelForMultiTask`, and the registration that lets `AutoConfig` and `AutoModel` find every scheme."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from transformers import AutoConfig, AutoModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass, _LazyAutoMapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.utils import CONFIG_NAME

from .adapter import AdapterModel
from .base import MultiTaskModel
from .conditioned import ConditionedModel
from .hard_sharing import HardSharingModel
from .manifest import check_named
from .mixture_of_experts import MixtureOfExpertsModel
from .prefix import PrefixModel
from .saved_config import check_config_file
from .soft_sharing import SoftSharingModel

__all__ = ["SCHEMES", "AutoModelForMultiTask"]

SCHEMES: dict[str, type[MultiTaskModel]] = {
    "hard": HardSharingModel,
    "soft": SoftSharingModel,
    "conditioned": ConditionedModel,
    "prefix": PrefixModel,
    "adapter": AdapterModel,
    "mixture_of_experts": MixtureOfExpertsModel,
}
"""Sharing schemes by the name that a recipe's `model.sharing` uses."""


def type_of(model: type[MultiTaskModel]) -> str:
    """Return the `model_type` in the configurations of a scheme."""
    return model.config_class.model_type


class AutoModelForMultiTask(_BaseAutoModelClass):
    """Load any multi-task model: `AutoModelForMultiTask.from_pretrained(folder_or_hub_id)` finds its scheme."""

    _model_mapping: Any = _LazyAutoMapping(CONFIG_MAPPING_NAMES, OrderedDict())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Load a saved model of whatever scheme.

        Raises:
            ValueError: The configuration is of no scheme, the weights do not fit it, or a file has changed since it was
                saved.
            OSError: There is no such folder, or it holds no safetensors.
        """
        if kwargs.get("config") is None:
            check_named(pretrained_model_name_or_path, [CONFIG_NAME], kwargs, needed=True)
            check_config_file(pretrained_model_name_or_path, kwargs, known=[type_of(m) for m in SCHEMES.values()])
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)


for _model in SCHEMES.values():
    _config = _model.config_class
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForMultiTask.register(_config, _model, exist_ok=True)
