"""Lists of words, as a tokenizer reads them: with the tokens of the same text with spaces.

Byte-level tokenizers (RoBERTa, GPT-2, ModernBERT, Llama 3) and some made by SentencePiece put the space between two
words into the second one's tokens. Given words one by one they would see no space, and make the tokens of one long
word, which no text has. [`spaced`] finds that out by trying, and [`with_spaces`] puts the spaces there; the tokenizer
itself is not changed. One with `add_prefix_space=True` needs none.

The label of a word stands at its first token with a character of it, in training and in predictions: a token that is
nothing but the space in front ([`space_ids`]) is passed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.utils import logging

from .shared_tokenizer import tokenize

__all__ = ["first_tokens", "space_ids", "spaced", "with_spaces"]

logger = logging.get_logger(__name__)

# In several scripts: of a script that a tokenizer does not know it has only one token for all, which tells nothing.
_WORDS = ("a", "the", "1", ".", "и", "的", "و", "の", "है", "in")
_SPACES = ("▁", "Ġ")  # how SentencePiece and byte-level tokenizers write a space


def spaced(tokenizer: Any) -> bool:
    """Return whether words one by one need a space in front of each but the first to have the tokens of a text."""

    def text(given: Any) -> str:
        words = not isinstance(given, str)
        ids = tokenize(tokenizer, given, is_split_into_words=words, add_special_tokens=False)["input_ids"]
        return "".join(map(str, tokenizer.convert_ids_to_tokens(ids)))

    wanted = text(" ".join(_WORDS))
    if text(list(_WORDS)) == wanted:
        return False
    if text(_space(_WORDS)) == wanted:
        logger.warning_once(
            f"{type(tokenizer).__name__} reads a space as a part of the word behind it: words of a list are given one, "
            "save the first, so that they have the tokens of the same text"
        )
        return True
    logger.warning_once(
        f"{type(tokenizer).__name__} makes other tokens of a list of words than of the same text with spaces, so that "
        "answers for the two may differ"
    )
    return False


def with_spaces(words: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return lists of words with a space in front of every word but the first."""
    return [_space(one) for one in words]


def _space(words: Sequence[str]) -> list[str]:
    result, first = [], True
    for word in words:
        # A word that has its own space, or nothing at all, stays as it is.
        result.append(word if first or not word or word[0].isspace() else f" {word}")
        first = first and not word
    return result


def first_tokens(word_ids: Sequence[int | None], blank: Sequence[bool] | None = None) -> list[int]:
    """Return the place of the first token of each word, in order.

    Args:
        word_ids: The number of each token's word, None for tokens of none.
        blank: Of each token, whether it is nothing but a space; it counts where the word has no other.

    Example:
        >>> first_tokens([None, 0, 1, 1, None], [False, False, True, False, False])
        [1, 3]
    """
    places: dict[int, int] = {}
    for place, word in enumerate(word_ids):
        if word is not None and (word not in places or (blank and blank[places[word]] and not blank[place])):
            places[word] = place
    return list(places.values())


def space_ids(tokenizer: Any) -> frozenset[int]:
    """Return the tokens that are nothing but the space in front of a word."""
    ids = zip(_SPACES, tokenizer.convert_tokens_to_ids(list(_SPACES)), strict=True)
    return frozenset(i for text, i in ids if i is not None and tokenizer.convert_ids_to_tokens(i) == text)
