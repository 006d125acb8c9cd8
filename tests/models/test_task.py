"""A task settles its defaults, survives a configuration file, and names what does not fit."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest
from torch import nn

from hf_multitask import Task, TaskType
from hf_multitask.models.task import check_tasks, closest

# Arguments that a task of each type needs.
NEEDED = {
    TaskType.SINGLE_LABEL_CLASSIFICATION: {"labels": ("no", "yes")},
    TaskType.MULTI_LABEL_CLASSIFICATION: {"labels": ("no", "yes")},
    TaskType.REGRESSION: {},
    TaskType.TOKEN_CLASSIFICATION: {"labels": ("O", "B-x")},
    TaskType.QUESTION_ANSWERING: {},
    TaskType.MULTIPLE_CHOICE: {},
    TaskType.MASKED_LM: {},
    TaskType.CAUSAL_LM: {},
    TaskType.SEQ2SEQ_LM: {},
}


def make(task_type=TaskType.SINGLE_LABEL_CLASSIFICATION, name="task", **changes) -> Task:
    return Task(name, task_type, **{**NEEDED[TaskType(task_type)], **changes})


# ---- names ----


@pytest.mark.parametrize(
    "name", ["a", "A1", "7", "sst2", "tone-of_voice", "_x", "stsb-2017", "x" * 64, "console", "com10"]
)
def test_a_good_name_can_be_a_module(name):
    heads = nn.ModuleDict({make(name=name).name: nn.Identity()})
    assert list(heads) == [name]


BAD_NAMES = {
    "empty": ("", "letters, digits"),
    "dot": ("a.b", "letters, digits"),
    "path": ("../x", "letters, digits"),
    "slash": ("a/b", "letters, digits"),
    "space": ("a b", "letters, digits"),
    "newline": ("a\n", "letters, digits"),
    "accent": ("é", "letters, digits"),
    "dash in front": ("-x", "starts with no '-'"),
    "too long": ("x" * 65, "at most 64 characters"),
    "no string": (7, "letters, digits"),
    "nothing": (None, "letters, digits"),
    "method of ModuleDict": ("keys", "taken by torch.nn.ModuleDict"),
    "another": ("forward", "taken by torch.nn.ModuleDict"),
    "and another": ("type", "taken by torch.nn.ModuleDict"),
    "attribute of ModuleDict": ("training", "taken by torch.nn.ModuleDict"),
    "device": ("con", "reserved file name"),
    "device in capitals": ("NUL", "reserved file name"),
    "numbered device": ("com1", "reserved file name"),
}


@pytest.mark.parametrize("case", BAD_NAMES)
def test_a_bad_name_is_refused(case):
    name, message = BAD_NAMES[case]
    with pytest.raises(ValueError, match=f"^task name .*{message}"):
        make(name=name)


# ---- defaults ----


@pytest.mark.parametrize(
    ("task_type", "text_columns", "label_column"),
    [
        (TaskType.SINGLE_LABEL_CLASSIFICATION, ("text",), "label"),
        (TaskType.MULTI_LABEL_CLASSIFICATION, ("text",), "labels"),
        (TaskType.REGRESSION, ("text",), "label"),
        (TaskType.TOKEN_CLASSIFICATION, ("tokens",), "tags"),
        (TaskType.QUESTION_ANSWERING, ("question", "context"), "answers"),
        (TaskType.MULTIPLE_CHOICE, ("question",), "label"),
    ],
)
def test_defaults_follow_the_type(task_type, text_columns, label_column):
    task = make(task_type, name="mine")
    assert (task.dataset, task.text_columns, task.label_column) == ("mine", text_columns, label_column)
    assert (task.weight, task.auxiliary, task.head, task.label_smoothing) == (1.0, False, "mlp", 0.0)
    assert (task.pooling, task.head_dropout, task.max_length, task.metric) == (None, None, None, None)


def test_every_type_has_its_defaults_tested():
    assert set(NEEDED) == set(TaskType)


def test_an_auxiliary_task_weighs_a_tenth_unless_told():
    assert make(auxiliary=True).weight == 0.1
    assert make(auxiliary=True, weight=2).weight == 2
    assert make(auxiliary=True, weight=0).weight == 0


@pytest.mark.parametrize("task_type", TaskType)
def test_a_type_may_be_its_name(task_type):
    assert make(str(task_type)) == make(task_type)
    assert make(str(task_type)).type is task_type and str(task_type) == task_type.value


def test_one_text_column_needs_no_list():
    assert make(text_columns="body").text_columns == ("body",)
    assert make(text_columns=["premise", "hypothesis"]).text_columns == ("premise", "hypothesis")
    assert make(CHOICE).choice_columns == ("choices",) and make(CHOICE, choice_columns="ends").choice_columns == (
        "ends",
    )


def test_outputs_are_one_per_label_or_value():
    assert make(labels=list("abcde")).num_outputs == 5
    assert make(TaskType.REGRESSION).num_outputs == 1
    assert make(TaskType.REGRESSION, labels=("valence", "arousal")).num_outputs == 2
    assert make(TaskType.QUESTION_ANSWERING).num_outputs == 2 and make(TaskType.MULTIPLE_CHOICE).num_outputs == 1
    assert {t for t in TaskType if not make(t).is_classification} == {TaskType.REGRESSION}


def test_a_task_does_not_change():
    with pytest.raises(FrozenInstanceError):
        make().weight = 2.0
    assert hash(make()) == hash(make())
    writes = Task("say", "causal_lm", prompt="{text}", generation={"max_new_tokens": 5}, weight_schedule="linear")
    assert hash(writes) == hash(Task.from_dict(writes.to_dict()))


# ---- configuration files ----

FULL = dict(
    dataset="rows",
    text_columns=("a", "b"),
    label_column="gold",
    weight=0.25,
    auxiliary=True,
    pooling="last",
    head="linear",
    head_dropout=0.3,
    max_length=99,
    metric="loss",
)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("task_type", TaskType)
def test_a_task_survives_a_configuration_file(task_type, full):
    changes = dict(FULL) if full else {}
    if full and task_type is TaskType.TOKEN_CLASSIFICATION:
        changes |= {"text_columns": ("a",), "label_smoothing": 0.1}
    if full and task_type is TaskType.QUESTION_ANSWERING:
        changes |= {"stride": 9, "max_answer_length": 5}
    if full and task_type is TaskType.MULTIPLE_CHOICE:
        changes |= {"choice_columns": ("c", "d")}
    if full and task_type.is_language:
        head = ("pooling", "head", "head_dropout")
        changes = {key: value for key, value in changes.items() if key not in head} | {"label_column": None}
    task = make(task_type, **changes)
    values = task.to_dict()
    assert values.keys() == {field.name for field in fields(Task)}
    assert Task.from_dict(json.loads(json.dumps(values, sort_keys=True))) == task


def test_labels_keep_their_order_in_a_file():
    labels = ("zebra", "ant", "Bee", "10", "9")
    assert Task.from_dict(json.loads(json.dumps(make(labels=labels).to_dict()))).labels == labels


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "x", "type": "regression", "wieght": 1}, r"task 'x': unknown key 'wieght', did you mean 'weight'\?"),
        ({"name": "x", "type": "regression", "zzzz": 1}, r"task 'x': unknown key 'zzzz'; keys are name, type, labels"),
        ({"name": "x"}, "task 'x': key 'type' is missing"),
        ({"type": "regression"}, "task None: key 'name' is missing"),
    ],
)
def test_an_unknown_or_missing_key_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        Task.from_dict(values)


@pytest.mark.parametrize("labels", [[1, 2, 3], (1, "2", 3), np.array([1, 2, 3]), range(1, 4)])
def test_labels_may_be_whole_numbers_and_are_stored_as_names(labels):
    task = Task("stars", "single_label_classification", labels=labels)
    assert task.labels == ("1", "2", "3")
    assert Task.from_dict(json.loads(json.dumps(task.to_dict()))) == task


# ---- values that do not fit ----

SINGLE, MULTI, SCORE, TOKENS, ANSWERS, CHOICE, *_ = TaskType
BAD = {
    "label a truth value": (
        SINGLE,
        {"labels": ("no", False)},
        r"label False is neither a non-empty string nor a whole number",
    ),
    "fraction as label": (
        SINGLE,
        {"labels": (1.0, 2.5)},
        r"label 1.0 is neither a non-empty string nor a whole number",
    ),
    "null answers of a classifier": (SINGLE, {"null_answers": True}, "null_answers is for question_answering, not"),
    "null answers by number": (ANSWERS, {"null_answers": 1}, "null_answers must be true, false or left out, got 1"),
    "empty label": (SINGLE, {"labels": ("a", "")}, r"label '' is neither a non-empty string nor a whole number"),
    "labels a string": (SINGLE, {"labels": "ab"}, r"labels must be a list of names, got the string 'ab'"),
    "a name and a number that are the same": (SINGLE, {"labels": (1, "1")}, r"labels appear more than once: '1'$"),
    "label twice": (SINGLE, {"labels": ("a", "b", "a")}, r"labels appear more than once: 'a'$"),
    "one of very many labels twice": (
        SINGLE,
        {"labels": (*map(str, range(6000)), "7")},
        r"labels appear more than once",
    ),
    "no labels": (SINGLE, {"labels": None}, r"single_label_classification needs labels=\[...\], at least 2, got None"),
    "one label": (SINGLE, {"labels": ("a",)}, r"single_label_classification needs labels=\[...\], at least 2"),
    "no label of several": (MULTI, {"labels": ()}, r"multi_label_classification needs labels=\[...\], at least 1"),
    "no tags": (TOKENS, {"labels": None}, r"token_classification needs labels"),
    "no values": (SCORE, {"labels": ()}, r"labels is empty; leave it out for one value"),
    "weight negative": (SINGLE, {"weight": -0.1}, r"weight must be a finite number of at least 0, got -0.1"),
    "weight NaN": (SINGLE, {"weight": math.nan}, r"weight must be a finite number of at least 0, got nan"),
    "weight infinite": (SINGLE, {"weight": math.inf}, r"weight must be a finite number of at least 0, got inf"),
    "weight a truth value": (SINGLE, {"weight": True}, r"weight must be a finite number of at least 0, got True"),
    "weight a string": (SINGLE, {"weight": "1"}, r"weight must be a finite number of at least 0, got '1'"),
    "pooling": (SINGLE, {"pooling": "max"}, r"pooling 'max' is not one of mean, first, last"),
    "head": (SINGLE, {"head": "mpl"}, r"head 'mpl' is not one of mlp, linear"),
    "dropout of 1": (SINGLE, {"head_dropout": 1.0}, r"head_dropout must lie in \[0, 1\), got 1.0"),
    "dropout NaN": (SINGLE, {"head_dropout": math.nan}, r"head_dropout must lie in \[0, 1\), got nan"),
    "smoothing negative": (SINGLE, {"label_smoothing": -0.1}, r"label_smoothing must lie in \[0, 1\), got -0.1"),
    "smoothing of sigmoids": (
        MULTI,
        {"label_smoothing": 0.1},
        r"label_smoothing is for losses with a softmax, not for multi",
    ),
    "smoothing of numbers": (SCORE, {"label_smoothing": 0.1}, r"label_smoothing is .* not for regression"),
    "length 0": (SINGLE, {"max_length": 0}, r"max_length must be a positive whole number, got 0"),
    "length a fraction": (SINGLE, {"max_length": 12.5}, r"max_length must be a positive whole number, got 12.5"),
    "three texts": (SINGLE, {"text_columns": ("a", "b", "c")}, r"text_columns must name one column, or two for pairs"),
    "column no name": (SINGLE, {"text_columns": (1,)}, r"text_columns must name one column, or two for pairs"),
    "label in the text": (SINGLE, {"text_columns": ("a", "label")}, r"column 'label' cannot be the text and the label"),
    "pairs of tokens": (
        TOKENS,
        {"text_columns": ("a", "b")},
        r"token_classification takes one text column, not a pair",
    ),
    "answers with labels": (
        ANSWERS,
        {"labels": ("a", "b")},
        r"question_answering has no labels; leave them out, the answers are in 'answers'",
    ),
    "answers without a context": (
        ANSWERS,
        {"text_columns": ("question",)},
        r"question_answering takes two text columns, question and context, got \('question',\)",
    ),
    "stride negative": (ANSWERS, {"stride": -1}, r"stride must be a whole number of at least 0, got -1"),
    "stride a fraction": (ANSWERS, {"stride": 0.5}, r"stride must be a whole number of at least 0, got 0.5"),
    "answers of no length": (
        ANSWERS,
        {"max_answer_length": 0},
        r"max_answer_length must be a whole number of at least 1, got 0",
    ),
    "stride of others": (SINGLE, {"stride": 64}, r"stride is for question_answering, not for single_label"),
    "length of others": (
        CHOICE,
        {"max_answer_length": 9},
        r"max_answer_length is for question_answering, not for mult",
    ),
    "choices of others": (ANSWERS, {"choice_columns": ("a",)}, r"choice_columns is for multiple_choice, not for quest"),
    "choices with labels": (CHOICE, {"labels": ("a", "b")}, r"multiple_choice has no labels"),
    "choices no names": (CHOICE, {"choice_columns": 3}, r"choice_columns must be a list of names, got 3"),
    "choices numbers": (CHOICE, {"choice_columns": (1, 2)}, r"choice_columns must name one column of lists, or one"),
    "choices twice": (CHOICE, {"choice_columns": ("a", "a")}, r"column 'a' cannot be a choice and something else"),
    "choices the question": (CHOICE, {"choice_columns": "question"}, r"column 'question' cannot be a choice and"),
    "choices the label": (CHOICE, {"choice_columns": ("a", "label")}, r"column 'label' cannot be a choice and"),
    "smoothing of choices": (CHOICE, {"label_smoothing": 0.1}, r"label_smoothing is .* not for multiple_choice"),
    "dataset empty": (SINGLE, {"dataset": ""}, r"dataset must be a name, got ''"),
    "dataset no name": (SINGLE, {"dataset": 3}, r"dataset must be a name, got 3"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_value_that_does_not_fit_is_named_with_its_task(case):
    task_type, changes, message = BAD[case]
    with pytest.raises(ValueError, match=f"^task 'mine': {message}"):
        make(task_type, name="mine", **changes)


def test_an_unknown_type_names_the_nearest():
    message = "task 'mine': type 'token_clasification' is not known, did you mean 'token_classification'"
    with pytest.raises(ValueError, match=message):
        Task("mine", "token_clasification")
    with pytest.raises(
        ValueError, match="types are single_label_classification, multi_label_classification, regression"
    ):
        Task("mine", "zzz")


def test_the_nearest_name_is_offered_only_if_near():
    assert closest("topc", ["tone", "topic"]) == ", did you mean 'topic'?"
    assert closest("xyz", ["tone", "topic"]) == closest("x", []) == ""
    assert closest(True, ["True"]) == ", did you mean 'True'?"


# ---- several tasks ----


def test_tasks_may_be_objects_or_dictionaries_and_keep_their_order():
    tasks = [make(name=name) for name in ("zebra", "ant", "middle")]
    assert check_tasks([tasks[0], tasks[1].to_dict(), tasks[2]]) == tasks
    assert check_tasks(iter(tasks)) == tasks


@pytest.mark.parametrize("names", [("a", "a"), ("Tone", "tone"), ("x", "y", "X")])
def test_names_that_a_file_system_could_confuse_are_refused(names):
    with pytest.raises(ValueError, match=f"task names '{names[0]}' and '{names[-1]}' are equal or differ only in case"):
        check_tasks([make(name=name) for name in names])


def test_tasks_that_would_train_nothing_are_refused():
    one, other = make(name="one"), make(name="other")
    with pytest.raises(ValueError, match="tasks is empty"):
        check_tasks([])
    with pytest.raises(ValueError, match="all tasks are auxiliary"):
        check_tasks([replace(one, auxiliary=True), replace(other, auxiliary=True)])
    with pytest.raises(ValueError, match="the weights of all tasks are 0"):
        check_tasks([replace(one, weight=0), replace(other, weight=0.0)])
    assert len(check_tasks([replace(one, weight=0), replace(other, auxiliary=True, weight=0.1)])) == 2


@pytest.mark.parametrize("name", ["_modules", "_parameters", "training", "_buffers"])
def test_names_that_the_heads_container_uses_itself_are_refused(name):
    with pytest.raises(ValueError, match="taken by torch.nn.ModuleDict"):
        Task(name, "regression")


BAD_VALUES = {
    "labels": (3, "list of names"),
    "head_dropout": ("0.1", "head_dropout"),
    "max_length": (True, "max_length"),
    "auxiliary": ("false", "true or false"),
    "text_columns": (("a", "a"), "one column twice"),
}


@pytest.mark.parametrize("field", BAD_VALUES)
def test_values_of_the_wrong_kind_are_named(field):
    value, message = BAD_VALUES[field]
    with pytest.raises(ValueError, match=f"task 'x': .*{message}"):
        Task("x", "regression", **{field: value})


def test_what_is_no_task_is_refused():
    with pytest.raises(ValueError, match="must be Task objects"):
        check_tasks(["a"])
