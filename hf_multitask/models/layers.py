"""Where a backbone keeps its layers: the one list of them that schemes which change layers have to find."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

__all__ = ["find_layers"]

# Families whose layers hand on hidden states that are not `[rows, L, H]`.
_OTHER_SHAPES = {"xlnet": "its hidden states have the positions in front, [L, rows, H]"}


def find_layers(backbone: PreTrainedModel) -> nn.ModuleList:
    """Return the list of a backbone's layers, in the order in which hidden states pass through them.

    It is the one `nn.ModuleList` below the backbone, at any depth, that holds `num_hidden_layers` different modules,
    that number being the text configuration's, and lies in no other list: lists inside layers (experts, the parts of
    a block) do not count. Each layer hands on hidden states `[rows, L, H]`.

    Args:
        backbone: An encoder or a decoder.

    Raises:
        ValueError: There is no such list, or more than one.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> bert = BertModel(BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=2))
        >>> len(find_layers(bert))
        3
    """
    config = backbone.config.get_text_config()
    name = backbone.config.model_type
    if name in _OTHER_SHAPES:
        reason = _OTHER_SHAPES[name]
        raise ValueError(f"the layers of backbone {name!r} cannot be used: {reason}; needed are [rows, L, H]")
    number = getattr(config, "num_hidden_layers", None)
    outermost: list[tuple[str, nn.ModuleList]] = []
    for path, module in backbone.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{other}.") for other, _ in outermost):
            outermost.append((path, module))
    found = [(path, module) for path, module in outermost if len(set(module)) == len(module) == number]
    if len(found) == 1:
        return found[0][1]
    if found:
        reason = f"{', '.join(path for path, _ in found)} are all lists of {number} modules"
    else:
        lists = ", ".join(f"{path} of {len(module)}" for path, module in outermost)
        reason = f"its lists of modules are {lists}" if lists else "it has no list of modules"
    raise ValueError(
        f"the layers of backbone {name!r} cannot be found: {reason}; needed is exactly one nn.ModuleList of "
        f"num_hidden_layers = {number} different modules, which lies in no other list"
    )
