"""Model cards: facts in, text out. A field without a fact is absent.

A card has metadata (each task's own metrics as `model-index`, backbone, datasets) and text: tasks, results, comparisons
and conflicts where they were measured, code that runs, limits, training. [`hf_multitask.hub.card_sources`] says where
the facts come from.

The cards in `model_cards/` are made from the recorded results of the recipes:

```
python -m hf_multitask.hub.model_card recipes model_cards
```
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from huggingface_hub.utils import yaml_dump

from .card_facts import CardFacts
from .card_metadata import card_metadata
from .card_sections import SECTIONS, summary
from .card_sources import facts_of_folder, facts_of_result
from .card_text import escape
from .card_usage import usage_section

__all__ = ["make_model_card", "recipe_cards", "write_model_card"]


def make_model_card(facts: CardFacts) -> str:
    """Return a model card.

    Args:
        facts: What is known of the model.
    """
    metadata = yaml_dump(card_metadata(facts), sort_keys=False).strip()
    parts = [f"# {escape(facts.name)}", summary(facts)]
    for name, make in SECTIONS.items():
        if name == "limits":
            parts.append(usage_section(facts))
        parts.append(make(facts))
    return f"---\n{metadata}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def write_model_card(
    folder: str | Path,
    path: str | Path,
    *,
    name: str | None = None,
    location: str | None = None,
    has_code: bool | None = None,
) -> None:
    """Write the card of a saved model.

    Args:
        folder: The folder with the model.
        path: The file to write.
        name: The model's name (default: the folder's).
        location: What the card's code loads: a Hub id, or a folder (default: the folder).
        has_code: Whether the modelling code lies beside the model (default: as it is in the folder).

    Raises:
        FileNotFoundError: The folder holds no complete model.
        ValueError: It holds another kind of model, or a file beside it is no JSON.
    """
    facts = facts_of_folder(folder, name)
    facts.location = location or facts.location
    facts.has_code = facts.has_code if has_code is None else has_code
    Path(path).write_text(make_model_card(facts), encoding="utf-8")


def recipe_cards(recipes: str | Path) -> dict[str, str]:
    """Return the card of each recipe's model, by the recipe's name, from the results that lie beside the recipes.

    Args:
        recipes: The folder of the recipes: `NAME.yaml` with `NAME.json`.

    Raises:
        ValueError: A result is no JSON.
    """
    cards = {}
    for file in sorted(Path(recipes).glob("*.json")):
        if not file.with_suffix(".yaml").is_file():
            continue
        try:
            results = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{str(file)!r} is no JSON: {error}") from None
        if "recipe" in results:  # a result of one run; of several there is no model
            cards[file.stem] = make_model_card(facts_of_result(results, file.stem))
    return cards


def main(recipes: str, output: str) -> None:
    """Write the cards of the recipes' models into a folder."""
    Path(output).mkdir(parents=True, exist_ok=True)
    for name, card in recipe_cards(recipes).items():
        Path(output, f"{name}.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("python -m hf_multitask.hub.model_card RECIPES_FOLDER OUTPUT_FOLDER")
    main(*sys.argv[1:])
