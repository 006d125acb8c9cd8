"""Recipes that come with the package, by name, from anywhere: `hf-multitask train quickstart`.

Paths as they stand in the documentation, such as `recipes/quickstart.yaml`, lead to them too where there is no such
file. A file of one's own always comes first.
"""

from __future__ import annotations

from pathlib import Path

from transformers.utils import logging

__all__ = ["find_recipe", "shipped_recipes"]

logger = logging.get_logger(__name__)

# In an installed package, and in a checkout.
_FOLDERS = (Path(__file__).parent / "recipes", Path(__file__).parents[1] / "recipes")


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with the package by name.

    Example:
        >>> "quickstart" in shipped_recipes()
        True
    """
    for folder in _FOLDERS:
        if files := sorted(folder.glob("*.yaml")):
            return {file.stem: file for file in files}
    return {}


def find_recipe(path: str | Path) -> Path:
    """Return the file of a recipe.

    Args:
        path: A file, or the name of a recipe that comes with the package (`quickstart`, `recipes/quickstart.yaml`).

    Returns:
        The path as it is, unless there is no such file and it names a recipe of the package.
    """
    path = Path(path)
    known = shipped_recipes()
    named = path.parent in (Path("."), Path("recipes")) and path.suffix in ("", ".yaml") and path.stem in known
    if path.is_file() or not named:
        return path
    logger.info(f"{str(path)!r} is no file here; the recipe {path.stem!r} of the package is taken")
    return known[path.stem]
