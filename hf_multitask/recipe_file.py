"""Reading YAML as people expect it, and as little of it as a recipe needs.

Only plain values are made (no tag makes an object), `no` and `off` are words, `1e-4` is a number. A file that is large,
deep, or short but stands for far more than it holds (aliases of aliases) is refused before it is spelt out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from .models.limits import DEEPEST, check_plain, shown

__all__ = ["parse_yaml", "read_yaml"]

_CHANGED = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
_LONGEST = 2**20  # characters of a recipe
_MOST_VALUES = 100_000  # of a recipe, each alias counted as what it stands for
_BROKEN = (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError, AttributeError)


class _Loader(yaml.SafeLoader):
    """Makes plain values only."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _CHANGED]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def get_single_node(self) -> Any:
        """Return the document, once it is known to be no larger than it may be."""
        node = super().get_single_node()
        if node is not None:
            _count(node, {}, 0)
        return node


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"([-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+.0123456789"),
)


def _count(node: Any, known: dict[int, int], depth: int) -> int:
    """Return the number of values that a node stands for.

    Raises:
        ValueError: There are too many, they are nested too deeply, or one holds itself.
    """
    if depth > DEEPEST:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels")
    if id(node) in known:
        if known[id(node)] < 0:
            raise ValueError("an alias stands for what it is a part of")
        return known[id(node)]
    known[id(node)] = -1
    parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
    total = 1 if isinstance(node, yaml.ScalarNode) else 1 + sum(_count(part, known, depth + 1) for part in parts)
    if total > _MOST_VALUES:
        raise ValueError(f"with its aliases spelt out it has more than {_MOST_VALUES:,} values")
    known[id(node)] = total
    return total


def parse_yaml(text: str) -> Any:
    """Return a YAML value, of the types that JSON has too.

    Raises:
        ValueError: It is no YAML, or larger than a recipe can be.

    Example:
        >>> parse_yaml("[no, 1e-4, {rank: 8}]")
        ['no', 0.0001, {'rank': 8}]
    """
    if len(text) > _LONGEST:
        raise ValueError(f"it has {len(text):,} characters, more than the {_LONGEST:,} that are read")
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
        check_plain(value, "it")
    except _BROKEN as error:
        raise ValueError(str(error) or type(error).__name__) from None
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping that a recipe's file holds.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no YAML, or holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"recipe {str(path)!r} does not exist, and none of this name comes with the package")
    if path.stat().st_size > 4 * _LONGEST:
        raise ValueError(f"recipe {str(path)!r} has {path.stat().st_size:,} bytes, far more than a recipe has")
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"recipe {str(path)!r} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"recipe {str(path)!r} must be a mapping with model, tasks and training, got {shown(content)}")
    return content
