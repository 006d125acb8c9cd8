"""Checks of those fields of a task that only some types have: templates, masking, generation, windows, choices."""

from __future__ import annotations

import itertools
import json
import string
from collections import Counter
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from numbers import Integral
from typing import Any

from transformers import GenerationConfig

from .limits import LONGEST_NAME, MOST_LABELS, check_plain, is_text, shown
from .task_type import TaskType

__all__ = ["check_columns", "check_generation_options", "check_type_options", "settle_labels", "template_fields"]

_GENERATING = (TaskType.CAUSAL_LM, TaskType.SEQ2SEQ_LM)
# By field, its value where it is not used, and the types that use it.
_USED_BY: dict[str, tuple[Any, tuple[TaskType, ...]]] = {
    "prompt": (None, _GENERATING),
    "chat": (False, _GENERATING),
    "held_out": (False, _GENERATING),
    "generation": (None, _GENERATING),
    "mlm_probability": (0.15, (TaskType.MASKED_LM,)),
    "whole_words": (False, (TaskType.MASKED_LM,)),
    "stride": (128, (TaskType.QUESTION_ANSWERING,)),
    "max_answer_length": (30, (TaskType.QUESTION_ANSWERING,)),
    "null_answers": (None, (TaskType.QUESTION_ANSWERING,)),
    "choice_columns": (None, (TaskType.MULTIPLE_CHOICE,)),
}


def settle_labels(labels: Any) -> tuple[str, ...] | None:
    """Return the labels of a task as a tuple of strings, or None where it has none; whole numbers are written out.

    Raises:
        ValueError: They are no list of different names, or more than a model can have.
    """
    if labels is None:
        return None
    if isinstance(labels, str):
        raise ValueError(f"labels must be a list of names, got the string {shown(labels)}")
    if not isinstance(labels, Iterable) or isinstance(labels, Mapping):
        raise ValueError(f"labels must be a list of names, got {shown(labels)}")
    labels = tuple(itertools.islice(labels, MOST_LABELS + 1))
    if len(labels) > MOST_LABELS:
        raise ValueError(f"there are more labels than the {MOST_LABELS:,} that a model can have")
    # Ratings from 1 to 5, say. True would be the name "True", which no column of truth values spells.
    whole = [isinstance(label, Integral) and not isinstance(label, bool) for label in labels]
    labels = tuple(str(int(label)) if number else label for label, number in zip(labels, whole, strict=True))
    for label in labels:
        if not isinstance(label, str) or not label:
            raise ValueError(f"label {shown(label)} is neither a non-empty string nor a whole number")
        if not is_text(label):
            raise ValueError(f"label {shown(label)} is longer than {LONGEST_NAME:,} characters, or holds NUL")
    repeated = sorted(label for label, count in Counter(labels).items() if count > 1)
    if repeated:
        more = ", ..." if len(repeated) > 10 else ""
        raise ValueError(f"labels appear more than once: {', '.join(map(repr, repeated[:10]))}{more}")
    return labels


def template_fields(template: str) -> list[str]:
    """Return the names of the columns that a template asks for, in order.

    Raises:
        ValueError: A brace has no partner, or a field is no plain name (attributes and indices are not looked up:
            a template must not reach into objects).

    Example:
        >>> template_fields("Is {answer} right? {question}")
        ['answer', 'question']
    """
    names = []
    for _, name, form, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        plain = name.replace("_", "").isalnum() and not name.isdecimal()  # a number counts arguments
        if not plain or form or conversion:
            raise ValueError(f"{{{name}}} is no plain name of a column")
        names.append(name)
    return list(dict.fromkeys(names))


def check_type_options(task: Any) -> str | None:
    """Return what is wrong with the fields of a task that only some types have, or None."""
    for field, (unused, types) in _USED_BY.items():
        if getattr(task, field) != unused and task.type not in types:
            return f"{field} is for {' and '.join(map(str, types))}, not for {task.type}"
    probability = task.mlm_probability
    if isinstance(probability, bool) or not isinstance(probability, (int, float)) or not 0 < probability <= 1:
        return f"mlm_probability must lie in (0, 1], got {shown(probability)}"
    if not isinstance(task.choice_columns, (str, list, tuple, type(None))):
        return f"choice_columns must be a list of names, got {shown(task.choice_columns)}"
    for field, least in (("stride", 0), ("max_answer_length", 1)):
        value = getattr(task, field)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            return f"{field} must be a whole number of at least {least}, got {shown(value)}"
    if not isinstance(task.null_answers, (bool, type(None))):
        return f"null_answers must be true, false or left out, got {shown(task.null_answers)}"
    if task.held_out and task.auxiliary:
        return "an auxiliary task cannot be held_out: it is there to be trained"
    for field in ("chat", "whole_words", "held_out"):
        if not isinstance(getattr(task, field), bool):
            return f"{field} must be true or false, got {shown(getattr(task, field))}"
    if (wrong := check_generation_options(task.generation)) is not None:
        return wrong
    if task.prompt is None:
        return None
    templates = task.prompt if isinstance(task.prompt, tuple) else ()
    if not templates or not all(isinstance(template, str) and template for template in templates):
        return f"prompt must be a template or a list of templates, got {shown(task.prompt)}"
    for template in task.prompt:
        try:
            if not template_fields(template):
                return f"prompt {shown(template)} names no column; write one in braces, such as {{text}}"
        except ValueError as error:
            return f"prompt {shown(template)} is no template: {error}"
    return None


def check_generation_options(options: Any) -> str | None:
    """Return what is wrong with settings of `generate`, or None.

    They are those of `GenerationConfig` and no others: `generate` has arguments that load code from the Hub, which a
    configuration must not reach.
    """
    if options is None:
        return None
    if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
        return f"generation must be a dictionary of arguments of generate, got {shown(options)}"
    for name in options:
        if name not in _generation_fields():
            near = get_close_matches(name[:100], list(_generation_fields()), n=1)
            return f"generation has no argument {shown(name)}" + (f", did you mean {near[0]!r}?" if near else "")
    try:
        check_plain(dict(options), "generation")
        json.dumps(dict(options))
    except (ValueError, TypeError, RecursionError) as error:
        return f"generation must be plain JSON: {error}"
    return None


@cache
def _generation_fields() -> frozenset[str]:
    return frozenset(vars(GenerationConfig()))


def check_columns(task: Any) -> str | None:
    """Return what is wrong with the columns of a task of some types, once all are settled, or None."""
    for name in (task.dataset, task.label_column, *task.text_columns):
        if name is not None and not is_text(name):
            return f"{shown(name)} cannot be the name of a column or dataset: a name is a text without NUL"
    texts = len(task.text_columns)
    if task.type is TaskType.TOKEN_CLASSIFICATION and texts != 1:
        return "token_classification takes one text column, not a pair"
    if task.type is TaskType.QUESTION_ANSWERING and texts != 2:
        return f"question_answering takes two text columns, question and context, got {task.text_columns!r}"
    if task.type is not TaskType.MULTIPLE_CHOICE:
        return None
    choices = task.choice_columns or ()
    if not all(isinstance(column, str) and column for column in choices):
        return f"choice_columns must name one column of lists, or one column per choice, got {choices!r}"
    for column in choices:
        if choices.count(column) > 1 or column in (*task.text_columns, task.label_column):
            return f"column {column!r} cannot be a choice and something else at once"
    return None
