"""Which labels mark entities, and the entities of every scheme."""

from __future__ import annotations

import pytest

from hf_multitask.models.tags import entity_spans, marks_entities

# Two words of a person, a place next to it, another place, and one word of a person.
SCHEMES = {
    "BIO": "B-person I-person B-place O B-place I-place O B-person",
    "IOB1": "I-person I-person I-place O I-place I-place O I-person",
    "BIOES": "B-person E-person S-place O B-place E-place O S-person",
    "BILOU": "B-person L-person U-place O B-place L-place O U-person",
    "BMEWO": "B-person E-person W-place O B-place E-place O W-person",
    "BIO with underscores": "B_person I_person B_place O B_place I_place O B_person",
}
ENTITIES = [("person", 0, 2), ("place", 2, 3), ("place", 4, 6), ("person", 7, 8)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_marks_the_same_entities(scheme):
    tags = SCHEMES[scheme].split()
    assert marks_entities(tuple(sorted(set(tags))))
    assert entity_spans(tags) == ENTITIES


def test_neighbours_of_one_type_are_told_apart_where_the_scheme_can():
    assert entity_spans(["U-place", "U-place", "B-place", "M-place", "L-place", "L-place"]) == [
        ("place", 0, 1),
        ("place", 1, 2),
        ("place", 2, 5),
        ("place", 5, 6),
    ]
    assert entity_spans(["B", "I", "O", "B", "B"]) == [("_", 0, 2), ("_", 3, 4), ("_", 4, 5)]


@pytest.mark.parametrize(
    ("labels", "marked"),
    [
        (("O", "B-person"), True),
        (("I-person", "O"), True),
        (("B", "I", "O"), True),
        (("B-a-b", "I-a-b", "O", "S-x y"), True),
        (("NOUN", "VERB", "."), False),
        (("NN", "NNS", "IN", "."), False),
        (("O", "PER", "LOC"), False),
        (("O",), False),
        (("O", "S", "E"), False),
        (("B-person", "O", "X"), False),
        (("OBJ", "SUBJ"), False),
        (("person-B", "person-I", "O"), False),
    ],
)
def test_labels_that_mark_entities_are_told_from_others(labels, marked):
    assert marks_entities(labels) is marked
