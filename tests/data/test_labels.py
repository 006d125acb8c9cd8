"""Labels: every accepted form of a column gives the same encoding, every bad value is named with its row."""

from __future__ import annotations

import math
import pickle

import pytest
from datasets import ClassLabel, Dataset, Features, LargeList, List, Value

from hf_multitask import Task
from hf_multitask.data.labels import LabelEncoder, LabelError, infer_labels, label_feature

NAMES = ("red", "green", "blue")
SINGLE = Task("colour", "single_label_classification", labels=NAMES)
MULTI = Task("colours", "multi_label_classification", labels=NAMES)
TOKENS = Task("marks", "token_classification", labels=NAMES)
SCORE = Task("score", "regression")
SCORES = Task("scores", "regression", labels=("valence", "arousal"))
MIXED_UP = ClassLabel(names=["blue", "red", "green"])
PART = ClassLabel(names=["blue", "green"])


def encode(task: Task, feature, values: list, first_row: int = 0) -> list:
    rows = Dataset.from_dict({"gold": values}, features=Features({"gold": feature}))
    return LabelEncoder(task, "gold", rows.features).encode(rows["gold"][:], first_row)


GOOD = {
    "names": (SINGLE, Value("string"), ["blue", "red", "green"], [2, 0, 1]),
    "large names": (SINGLE, Value("large_string"), ["blue", "red"], [2, 0]),
    "ids": (SINGLE, Value("int64"), [2, 0, 1], [2, 0, 1]),
    "unsigned ids": (SINGLE, Value("uint8"), [2, 0, 1], [2, 0, 1]),
    "ClassLabel in the task's order": (SINGLE, ClassLabel(names=list(NAMES)), [2, 0, 1], [2, 0, 1]),
    "ClassLabel in another order": (SINGLE, MIXED_UP, [0, 1, 2], [2, 0, 1]),
    "ClassLabel of some of the labels": (SINGLE, PART, [0, 1], [2, 1]),
    "lists of names": (
        MULTI,
        List(Value("string")),
        [["blue", "red"], [], ["green"]],
        [[1, 0, 1], [0, 0, 0], [0, 1, 0]],
    ),
    "large lists": (MULTI, LargeList(Value("string")), [["blue", "red"]], [[1, 0, 1]]),
    "a name twice": (MULTI, List(Value("string")), [["blue", "blue"]], [[0, 0, 1]]),
    "lists of a ClassLabel": (MULTI, List(MIXED_UP), [[0, 1], [], [2]], [[1, 0, 1], [0, 0, 0], [0, 1, 0]]),
    "multi-hot of ints": (MULTI, List(Value("int64")), [[1, 0, 1], [0, 0, 0]], [[1, 0, 1], [0, 0, 0]]),
    "multi-hot of floats": (MULTI, List(Value("float32")), [[1.0, 0.0, 1.0]], [[1, 0, 1]]),
    "multi-hot of truth values": (MULTI, List(Value("bool")), [[True, False, True]], [[1, 0, 1]]),
    "numbers": (SCORE, Value("float64"), [0.5, -2.0], [[0.5], [-2.0]]),
    "whole numbers": (SCORE, Value("int64"), [3, -1], [[3.0], [-1.0]]),
    "several numbers": (SCORES, List(Value("float64")), [[0.5, -2.0], [1.0, 0.0]], [[0.5, -2.0], [1.0, 0.0]]),
    "tags as names": (TOKENS, List(Value("string")), [["blue", "red"], []], [[2, 0], []]),
    "tags as ids": (TOKENS, List(Value("int32")), [[2, 0], [1]], [[2, 0], [1]]),
    "tags as a ClassLabel": (TOKENS, List(MIXED_UP), [[0, 1], [2]], [[2, 0], [1]]),
}

STARS = Task("stars", "single_label_classification", labels=[1, 2, 3, 4, 5])
STAR_TAGS = Task("stars", "token_classification", labels=["1", "2", "3"])
STAR_SETS = Task("stars", "multi_label_classification", labels=["1", "2", "3"])
YEARS = Task("year", "single_label_classification", labels=["2019", "02020", "-1", "2.5"])
ORDERED = Task("o", "single_label_classification", labels=["0", "1", "2"])
SOME_NUMBERS = Task("o", "single_label_classification", labels=["none", "1", "2"])

GOOD |= {
    "ratings by name": (STARS, Value("int64"), [1, 4, 5, 2], [0, 3, 4, 1]),
    "ratings without the highest": (STARS, Value("int8"), [1, 4], [0, 3]),
    "ratings as strings": (STARS, Value("string"), ["1", "5"], [0, 4]),
    "ids of a ClassLabel named by numbers": (STARS, ClassLabel(names=["1", "2", "3", "4", "5"]), [0, 3], [0, 3]),
    "a ClassLabel named by numbers in another order": (STARS, ClassLabel(names=["5", "1"]), [0, 1], [4, 0]),
    "numbers of all kinds": (YEARS, Value("int64"), [2019, 2020, -1], [0, 1, 2]),
    "names that are the ids": (ORDERED, Value("int64"), [2, 0, 1], [2, 0, 1]),
    "names of which some are the ids": (SOME_NUMBERS, Value("int64"), [2, 0, 1], [2, 0, 1]),
    "tags by name": (STAR_TAGS, List(Value("int64")), [[3, 1], [2]], [[2, 0], [1]]),
    "lists of numbers by name": (STAR_SETS, List(Value("int64")), [[3, 1], [], [2]], [[1, 0, 1], [0, 0, 0], [0, 1, 0]]),
    "vectors where names are numbers": (STAR_SETS, List(Value("int64")), [[1, 0, 1], [0, 0, 0]], [[1, 0, 1], [0] * 3]),
}


@pytest.mark.parametrize("case", GOOD)
def test_every_form_of_a_column_has_its_encoding(case):
    task, feature, values, expected = GOOD[case]
    result = encode(task, feature, values)
    assert result == expected
    stored = Dataset.from_dict({"labels": result}, features=Features({"labels": label_feature(task)}))
    assert stored["labels"][:] == expected


@pytest.mark.parametrize(
    ("task", "feature"),
    [
        (SINGLE, Value("int32")),
        (TOKENS, List(Value("int32"))),
        (MULTI, List(Value("float32"))),
        (SCORE, List(Value("float32"))),
    ],
)
def test_encoded_labels_have_one_type_per_type_of_task(task, feature):
    assert label_feature(task) == feature


# What came, and what the message must say. Rows are numbered from 100.
BAD_VALUES = {
    "unknown name": (
        SINGLE,
        Value("string"),
        ["red", "gren"],
        r"'gren' in row 101 .* 3 labels, did you mean 'green'\?",
    ),
    "other case": (SINGLE, Value("string"), ["Red"], r"label 'Red' in row 100 of column 'gold' is not one of its 3"),
    "None among names": (SINGLE, Value("string"), ["red", None], r"label None in row 101 of column 'gold'"),
    "None among ids": (SINGLE, Value("int64"), [1, None], r"label None in row 101 of column 'gold'"),
    "None in a ClassLabel": (SINGLE, MIXED_UP, [1, None], r"label None in row 101 of column 'gold'"),
    "only None": (SINGLE, Value("null"), [None], r"label None in row 100 of column 'gold'"),
    "id too large": (SINGLE, Value("int64"), [0, 3], r"label 3 in row 101 of column 'gold' .* 3 labels \(0 to 2\)"),
    "id negative": (SINGLE, Value("int64"), [0, 1, -1], r"label -1 in row 102 of column 'gold' .* filtered out"),
    "unlabelled ClassLabel": (SINGLE, MIXED_UP, [0, -1], r"label -1 in row 101 of column 'gold'"),
    "unknown name in a list": (MULTI, List(Value("string")), [["red"], ["red", "x"]], r"label 'x' in row 101"),
    "None in a list": (MULTI, List(Value("string")), [["red", None]], r"label None in row 100 of column 'gold'"),
    "None for a list": (MULTI, List(Value("string")), [["red"], None], r"label None in row 101 of column 'gold'"),
    "multi-hot too short": (
        MULTI,
        List(Value("int64")),
        [[1, 0, 0], [1, 0]],
        r"row 101 .* \[1, 0\].* 3 numbers, 0 or 1",
    ),
    "ids for multi-hot": (MULTI, List(Value("int64")), [[0, 1, 2]], r"row 100 of column 'gold' holds \[0, 1, 2\]"),
    "multi-hot of fractions": (MULTI, List(Value("float32")), [[0.5, 0, 1]], r"row 100 of column 'gold' holds \[0.5"),
    "multi-hot with NaN": (MULTI, List(Value("float32")), [[math.nan, 0, 1]], r"row 100 of column 'gold' holds \[nan"),
    "multi-hot with None": (MULTI, List(Value("int64")), [[None, 0, 1]], r"row 100 of column 'gold' holds \[None"),
    "NaN": (SCORE, Value("float64"), [1.0, math.nan], r"label nan in row 101 of column 'gold' is not a finite number"),
    "infinity": (SCORE, Value("float64"), [-math.inf], r"label -inf in row 100 of column 'gold' is not a finite"),
    "no number": (SCORE, Value("float64"), [1.0, None], r"row 101 of column 'gold' holds None"),
    "too few numbers": (SCORES, List(Value("float64")), [[1.0, 2.0], [1.0]], r"row 101 .* \[1.0\]; it must hold 2"),
    "too many numbers": (SCORES, List(Value("float64")), [[1.0, 2.0, 3.0]], r"row 100 .* it must hold 2"),
    "no list of numbers": (SCORES, List(Value("float64")), [None], r"row 100 .* holds None; it must hold 2"),
    "NaN among numbers": (SCORES, List(Value("float64")), [[1.0, math.nan]], r"label nan in row 100 of column 'gold'"),
    "unknown tag": (TOKENS, List(Value("string")), [["red"], ["red", "bleu"]], r"label 'bleu' in row 101 .* 'blue'\?"),
    "tag too large": (TOKENS, List(Value("int64")), [[0, 7]], r"label 7 in row 100 of column 'gold'"),
    "no tag": (TOKENS, List(Value("int64")), [[0, None]], r"label None in row 100 of column 'gold'"),
    "no tags": (TOKENS, List(Value("string")), [["red"], None], r"label None in row 101 of column 'gold'"),
}

BAD_VALUES |= {
    "an id where numbers are names": (STARS, Value("int64"), [1, 0], r"label 0 in row 101 .*as an id .* '1'.* by name"),
    "no rating": (STARS, Value("int64"), [6], r"label 6 in row 100 .* not one of .*'1', '2', '3', '4', '5'"),
    "another spelling": (STARS, Value("string"), ["01"], r"label '01' in row 100"),
    "no number among tags": (STAR_TAGS, List(Value("int64")), [[1, 0]], r"label 0 in row 100 .*by name"),
    "neither names nor a vector": (STAR_SETS, List(Value("int64")), [[0, 2]], r"row 100 .* holds \[0, 2\]"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_a_bad_value_is_named_with_task_column_and_row(case):
    task, feature, values, message = BAD_VALUES[case]
    with pytest.raises(ValueError, match=rf"task '{task.name}': .*{message}"):
        encode(task, feature, values, first_row=100)


BAD_TYPES = {
    "floats for labels": (SINGLE, Value("float64"), "label names"),
    "truth values for labels": (SINGLE, Value("bool"), "label names"),
    "lists for labels": (SINGLE, List(Value("string")), "label names"),
    "one label for tags": (TOKENS, Value("int64"), "lists of label names"),
    "floats for tags": (TOKENS, List(Value("float32")), "lists of label names"),
    "one label for several": (MULTI, Value("string"), "lists of label names, or one 0 or 1 per label"),
    "lists of lists": (MULTI, List(List(Value("string"))), "lists of label names"),
    "strings for numbers": (SCORE, Value("string"), "numbers"),
    "truth values for numbers": (SCORE, Value("bool"), "numbers"),
    "lists for numbers": (SCORE, List(Value("float64")), "numbers"),
    "numbers for lists of them": (SCORES, Value("float64"), "a list of numbers per row"),
    "lists of strings for numbers": (SCORES, List(Value("string")), "a list of numbers per row"),
}


@pytest.mark.parametrize("case", BAD_TYPES)
def test_a_column_of_the_wrong_type_is_named_with_what_is_wanted(case):
    task, feature, wanted = BAD_TYPES[case]
    with pytest.raises(
        ValueError, match=rf"task '{task.name}': column 'gold' has the type .*; {task.type} needs {wanted}"
    ):
        LabelEncoder(task, "gold", Features({"gold": feature}))


@pytest.mark.parametrize(
    ("task", "feature"),
    [
        (SINGLE, ClassLabel(names=["red", "violet"])),
        (MULTI, List(ClassLabel(names=["red", "violet"]))),
        (TOKENS, List(ClassLabel(names=["red", "violet"]))),
    ],
)
def test_a_class_label_with_other_names_is_refused(task, feature):
    with pytest.raises(
        ValueError, match=rf"task '{task.name}': column 'gold' is a ClassLabel .*violet.*labels=\['red'"
    ):
        LabelEncoder(task, "gold", Features({"gold": feature}))


@pytest.mark.parametrize(
    ("feature", "values", "expected"),
    [
        (Value("string"), ["b", "c", "a", "b"], ("a", "b", "c")),
        (Value("string"), ["b", None, "a"], ("a", "b")),
        (List(Value("string")), [["b", "c"], [], ["a"], None], ("a", "b", "c")),
        (List(Value("string")), [["I-x", "B-x"], ["O"]], ("O", "B-x", "I-x")),
        (MIXED_UP, [0], ("blue", "red", "green")),
        (List(MIXED_UP), [[0]], ("blue", "red", "green")),
    ],
)
def test_labels_are_inferred_in_a_settled_order(feature, values, expected):
    rows = Dataset.from_dict({"gold": values}, features=Features({"gold": feature}))
    assert infer_labels(rows, "gold") == expected


@pytest.mark.parametrize("feature", [Value("int64"), Value("float32"), List(Value("int64"))])
def test_numbers_have_no_names_to_infer(feature):
    rows = Dataset.from_dict({"gold": []}, features=Features({"gold": feature}))
    with pytest.raises(ValueError, match=r"column 'gold' holds .*give labels"):
        infer_labels(rows, "gold")


def test_inferring_from_a_missing_column_names_those_that_are_there():
    with pytest.raises(ValueError, match="no column 'gold' .* columns are text, label"):
        infer_labels(Dataset.from_dict({"text": ["a"], "label": ["b"]}), "gold")


EITHER = {
    "another order of the ids": (["1", "0"], r"1 would be '0' as an id, '1' as a name"),
    "some numbers, not at their ids": (["1", "2", "other"], r"1 would be '2' as an id, '1' as a name"),
    "one number twice": (["1", "01", "5"], "two of them spell the same number"),
}


@pytest.mark.parametrize("case", EITHER)
@pytest.mark.parametrize("kind", ["single_label_classification", "token_classification"])
def test_numbers_that_could_be_ids_or_names_are_refused_with_both_readings(kind, case):
    labels, readings = EITHER[case]
    task = Task("stars", kind, labels=labels)
    number, strings = Value("int64"), Value("string")
    if kind == "token_classification":
        number, strings = List(number), List(strings)
    with pytest.raises(ValueError, match=rf"task 'stars': column 'gold' holds whole numbers.*ids or names.*{readings}"):
        LabelEncoder(task, "gold", Features({"gold": number}))
    LabelEncoder(task, "gold", Features({"gold": strings}))
    # Rows that were prepared hold ids in any case.
    encoder = LabelEncoder(task, "gold", Features({"gold": number}), encoded=True)
    assert encoder.encode([[1]] if kind == "token_classification" else [1], 0) in ([1], [[1]])


def test_a_vector_that_could_be_names_is_refused():
    task = Task("stars", "multi_label_classification", labels=["1", "0"])
    assert encode(task, List(Value("int64")), [[1, 1], [0, 0], [1], []]) == [[1, 1], [0, 0], [1, 0], [0, 0]]
    assert encode(task, List(Value("float64")), [[1, 0], [0, 1]]) == [[1, 0], [0, 1]]
    with pytest.raises(ValueError, match=r"row 0 of column 'gold' holds \[0, 1\].*one 0 or 1.*names"):
        encode(task, List(Value("int64")), [[0, 1]])


def test_an_error_about_labels_names_its_task_and_survives_pickling():
    with pytest.raises(LabelError) as caught:
        encode(STARS, Value("int64"), [7])
    copied = pickle.loads(pickle.dumps(caught.value))
    assert copied.task == "stars" and str(copied) == str(caught.value)
