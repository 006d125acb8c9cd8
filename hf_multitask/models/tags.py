"""Tag schemes: whether the labels of words mark entities, and which words an entity spans.

Entities are marked by BIO tags (`B-person`, `I-person`, `O`) or one of their relatives: IO, IOB1, BIOES, BILOU, BMES,
with `-` or `_` in front of the type, or without types. Other labels of words, such as parts of speech, mark none. Spans
are those of seqeval, which reads tags as the CoNLL evaluation does: an inside tag that continues nothing begins an
entity.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

__all__ = ["entity_spans", "marks_entities", "standard_tags"]

_TAG = re.compile(r"([BIESLUMW])(?:[-_](.+))?", re.DOTALL)
# BILOU and BMES in the letters of BIOES.
_LETTERS = {"L": "E", "U": "S", "M": "I", "W": "S"}


@lru_cache(maxsize=1024)
def marks_entities(labels: tuple[str, ...]) -> bool:
    """Return whether labels of words mark entities.

    Example:
        >>> marks_entities(("O", "B-person", "I-person")), marks_entities(("NOUN", "VERB", "."))
        (True, False)
    """
    tags = [_TAG.fullmatch(label) for label in labels if label != "O"]
    typed = [tag for tag in tags if tag is not None and tag[2] is not None]
    # Single letters may mean anything; those that begin an entity, and nothing but such tags, hardly do.
    return None not in tags and bool(typed or "B" in labels)


def standard_tags(tags: Sequence[str]) -> list[str]:
    """Return the tags of a text in BIOES, as seqeval reads them.

    Example:
        >>> standard_tags(["U-place", "O", "B_person", "L_person"])
        ['S-place', 'O', 'B-person', 'E-person']
    """
    standard = []
    for tag in tags:
        match = _TAG.fullmatch(tag)
        if match is not None:
            letter = _LETTERS.get(match[1], match[1])
            tag = letter if match[2] is None else f"{letter}-{match[2]}"
        standard.append(tag)
    return standard


def entity_spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return the entities of a text: the type (`_` without one), the first word, and the one after the last.

    Example:
        >>> entity_spans(["B-person", "I-person", "O", "B-place"])
        [('person', 0, 2), ('place', 3, 4)]
    """
    from seqeval.metrics.sequence_labeling import get_entities

    return [(kind, first, last + 1) for kind, first, last in get_entities(standard_tags(tags))]
