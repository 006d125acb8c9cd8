"""The best span over all windows of a question, as an exhaustive search finds it."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from conftest import make_tokenizer
from datasets import Dataset
from questions import answers_in_context
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hf_multitask import Task
from hf_multitask.data.dataset import MultiTaskDataset
from hf_multitask.data.preprocessing import prepare
from hf_multitask.data.sources import make_sources
from hf_multitask.data.span_answers import (
    QuestionWindows,
    answer_probability,
    decide_null_answers,
    find_answer,
    group_windows,
    predict_answers,
)

TASK = Task("who", "question_answering", stride=5, max_answer_length=4)


def prepared(data: Dataset, tokenizer=None, max_length: int = 20) -> Dataset:
    (source,) = make_sources([TASK])
    return prepare(data, source, tokenizer or make_tokenizer(), max_length=max_length, labels=None)


def padded_logits(table: Dataset, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """Random logits, padded as the evaluation loop pads: with -100, which here would win against most."""
    longest = max(map(len, table["input_ids"]))
    logits = np.full((len(table), longest + 3, 2), -100.0, dtype=np.float32)
    draw = np.random.default_rng(seed)
    for row, ids in enumerate(table["input_ids"]):
        logits[row, : len(ids)] = draw.normal(-150, scale, (len(ids), 2))
    return logits


def candidates(context: str, windows: list[dict], logits: np.ndarray, longest: int) -> dict[tuple[int, int], float]:
    """All spans of all windows with their best scores, one by one; (0, 0) for no answer."""
    scores = {(0, 0): min(float(own[0].astype(np.float64).sum()) for own in logits)}
    for window, own in zip(windows, logits.astype(np.float64), strict=True):
        offsets = list(zip(window["offsets"][::2], window["offsets"][1::2], strict=True))
        for first, last in itertools.product(range(len(offsets)), repeat=2):
            if first <= last < first + longest and offsets[first][0] >= 0 and offsets[last][0] >= 0:
                key = offsets[first][0], offsets[last][1]
                scores[key] = max(scores.get(key, -math.inf), own[first, 0] + own[last, 1])
    return scores


@pytest.mark.parametrize("null_answers", [True, False])
@pytest.mark.parametrize("longest", [1, 4, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_the_best_of_all_spans_wins(seed, longest, null_answers):
    data = answers_in_context(seed, 20)
    table = prepared(data)
    logits = padded_logits(table, seed)
    rows, found_none = list(table), 0
    questions = list(group_windows(table, logits))
    assert len(questions) == len(data)
    for number, (raw, question) in enumerate(zip(data, questions, strict=True)):
        own = [i for i, row in enumerate(rows) if row["question"] == number]
        scores = candidates(raw["context"], [rows[i] for i in own], logits[own], longest)
        if not null_answers:
            del scores[0, 0]
        best = max(scores, key=scores.get)
        answer = find_answer(question, longest, null_answers)
        assert (answer.start, answer.end) == best and answer.text == raw["context"][slice(*best)]
        assert answer.score == pytest.approx(scores[best])
        total = sum(math.exp(score - scores[best]) for score in scores.values())
        assert answer_probability(question, answer, longest, null_answers) == pytest.approx(1 / total)
        found_none += answer.text == ""
    assert longest > 1 or found_none < 10
    assert null_answers or not found_none


def test_the_lowest_score_of_no_answer_counts():
    offsets = [np.array([[-1, -1], [0, 5], [-1, -1]]), np.array([[-1, -1], [6, 10], [-1, -1]])]
    logits = [np.array([[4.0, 4.0], [1.0, 1.0], [9.0, 9.0]]), np.array([[0.0, 0.5], [0.0, 0.4], [9.0, 9.0]])]
    question = QuestionWindows("maria john", offsets, logits)
    assert question.no_answer == 0.5
    answer = find_answer(question, 3)
    assert (answer.text, answer.start, answer.end, answer.score) == ("maria", 0, 5, 2.0)
    parts = [math.exp(score) for score in (0.5, 2.0, 0.4)]
    assert answer_probability(question, answer, 3) == pytest.approx(parts[1] / sum(parts))
    logits[1][0] = 3.0, 3.0
    none = find_answer(QuestionWindows("maria john", offsets, logits), 3)
    assert (none.text, none.start, none.end, none.score) == ("", 0, 0, 6.0)


def test_white_space_alone_is_no_answer():
    """Tokenizers that make a token of the space in front of a word."""
    offsets = [np.array([[-1, -1], [0, 1], [1, 6], [6, 7], [7, 8]])]
    logits = [np.array([[0.0, 0.0], [9.0, 9.0], [1.0, 1.0], [5.0, 5.0], [0.0, 0.0]])]
    question = QuestionWindows(" maria  ", offsets, logits)
    answer = find_answer(question, 1, False)
    assert (answer.text, answer.start, answer.end, answer.score) == ("maria", 1, 6, 2.0)
    assert answer_probability(question, answer, 1, False) == 1
    longer = find_answer(question, 3, False)
    assert (longer.text, longer.start, longer.end, longer.score) == ("maria", 1, 6, 14.0)
    blank = QuestionWindows("  ", [np.array([[-1, -1], [0, 2]])], [np.array([[0.0, 0.0], [3.0, 3.0]])])
    assert find_answer(blank, 3, False).text == "" and find_answer(blank, 3).score == 0.0
    assert answer_probability(blank, find_answer(blank, 3, False), 3, False) == 0.0


ANSWERED = {"question": "who?", "context": "maria", "answers": {"text": ["maria"], "answer_start": [0]}}
UNANSWERED = {"question": "where?", "context": "john", "answers": {"text": [], "answer_start": []}}


@pytest.mark.parametrize("own", [None, True, False])
@pytest.mark.parametrize("rows", [[ANSWERED] * 3, [ANSWERED, UNANSWERED], [UNANSWERED] * 2])
def test_training_data_decide_whether_there_may_be_no_answer(rows, own):
    decided = own if own is not None else UNANSWERED in rows
    task, other = replace(TASK, null_answers=own), Task("tone", "single_label_classification", labels=("a", "b"))
    raw = Dataset.from_list(rows)
    (source,) = make_sources([task])
    every = [raw, {"who": raw, "tone": raw}]
    if own is False and ANSWERED not in rows:
        with pytest.raises(ValueError, match="no question has an answer in column 'answers', but null_answers=False"):
            prepare(raw, source, make_tokenizer(), max_length=20)
    else:
        every.append(MultiTaskDataset([source], {"who": prepare(raw, source, make_tokenizer(), max_length=20)}))
    for data in every:
        assert decide_null_answers([other, task], data) == [other, replace(task, null_answers=decided)]
    for nothing in (None, {}, {"who": raw.remove_columns("answers")}, {"who": raw.select([])}):
        assert decide_null_answers([task], nothing) == [task]


def test_where_nobody_decided_the_right_answers_do():
    table = {name: prepared(Dataset.from_list(rows)) for name, rows in (("all", [ANSWERED]), ("none", [UNANSWERED]))}
    table["both"] = prepared(Dataset.from_list([ANSWERED, UNANSWERED]))

    def answers(name: str, own: bool | None) -> list[str]:
        rows = table[name]
        logits = np.zeros((len(rows), 20, 2))
        logits[:, 0] = 5  # that a window has no answer
        return predict_answers(replace(TASK, null_answers=own), rows, logits)[0]

    assert [bool(text) for text in answers("all", None)] == [True]
    assert [bool(text) for text in answers("both", None)] == [False, False]
    assert [bool(text) for text in answers("both", True)] == [False, False]
    assert [bool(text) for text in answers("both", False)] == [True, True]
    bare = table["all"].remove_columns(["references", "labels_who"])
    assert predict_answers(TASK, bare, np.eye(20, 2)[None] * 9)[0] == [""]  # as it was before there was a choice


def test_answers_and_references_of_a_dataset():
    data = answers_in_context(rows=10)
    table, task = prepared(data), Task("who", "question_answering", stride=5)
    logits = np.full((len(table), 20, 2), -5.0)
    for row, (first, last) in enumerate(table["labels_who"]):
        logits[row, first, 0], logits[row, last, 1] = 5.0, 5.0
    answers, references = predict_answers(task, table, logits)
    assert references == [row["text"] for row in data["answers"]]
    assert answers == [(texts or [""])[0] for texts in references]
    assert "" in answers and len(set(answers)) > 3
    # Of less than all rows, the questions that are there.
    answers, references = predict_answers(task, table, logits[:1])
    assert len(answers) == len(references) == 1
    bare = table.remove_columns(["references", "labels_who"])
    assert predict_answers(task, bare, logits)[1] is None


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and pieces of them; a word's token has the space in front of it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(["we saw maria in paris"] * 3, trainer)
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
            ),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.mark.parametrize("text", ["maria", "in paris", "café", "日本", "saw maria in paris, and 日本"])
def test_answers_are_cut_out_by_characters_whatever_the_tokens(text):
    context = "We saw maria in paris, and 日本 in a café. We saw maria in paris, and 日本 again and again."
    start = context.index(text)
    data = Dataset.from_list(
        [{"question": "where?", "context": context, "answers": {"text": [text], "answer_start": [start]}}]
    )
    table = prepared(data, byte_tokenizer(), max_length=46)
    task = Task("who", "question_answering", stride=5, max_answer_length=60)
    logits = np.full((len(table), 46, 2), -5.0)
    for row, (first, last) in enumerate(table["labels_who"]):
        logits[row, first, 0], logits[row, last, 1] = 5.0, 5.0
    (question,) = group_windows(table, logits)
    answer = find_answer(question, task.max_answer_length)
    assert len(table) > 1 and (answer.text, answer.start, answer.end) == (text, start, start + len(text))
