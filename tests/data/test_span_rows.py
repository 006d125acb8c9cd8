"""Windows of a context cover it, overlap as asked, and are labelled where they hold the whole answer."""

from __future__ import annotations

import random

import pytest
from conftest import NEUTRAL, make_tokenizer
from datasets import Dataset
from questions import answers_in_context

from hf_multitask import Task
from hf_multitask.data.dataset import MultiTaskDataset
from hf_multitask.data.preprocessing import prepare
from hf_multitask.data.sources import make_sources
from hf_multitask.data.streaming import prepare_streams

TASK = Task("who", "question_answering", stride=5)
CONTEXT = "we saw maria , and john was very happy . the film was good"


def prepared(rows: Dataset, task: Task = TASK, tokenizer=None, max_length: int = 20, **options) -> Dataset:
    (source,) = make_sources([task])
    return prepare(rows, source, tokenizer or make_tokenizer(), max_length=max_length, **options)


def rows(*answers: dict, context: str = CONTEXT, question: str = "it was") -> Dataset:
    return Dataset.from_list([{"question": question, "context": context, "answers": answer} for answer in answers])


def answer(*texts: str, context: str = CONTEXT) -> dict:
    return {"text": list(texts), "answer_start": [context.index(text) for text in texts]}


def random_rows(seed: int, count: int = 30) -> Dataset:
    """Contexts of any length, answers anywhere in them, some of which begin inside a word."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        context = " ".join(draw.choice([*NEUTRAL, "films", "inside", ",", "."]) for _ in range(draw.randint(1, 60)))
        start = draw.randrange(len(context))
        while context[start] == " ":
            start -= 1
        text = context[start : start + draw.randint(1, 20)].strip()
        found.append(
            {
                "question": " ".join(draw.choices(NEUTRAL, k=draw.randint(1, 3))),
                "context": context,
                "answers": {"text": [text], "answer_start": [start]},
            }
        )
    return Dataset.from_list(found)


def windows_of(table: Dataset) -> list[list[dict]]:
    """Return the windows of each question, with the context, and without what stands in the first row alone."""
    questions: dict[int, list[dict]] = {}
    for row in table:
        questions.setdefault(row["question"], []).append(row)
    return list(questions.values())


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("seed", range(3))
def test_windows_cover_the_context_and_hold_the_question_whole(seed, side):
    tokenizer, data = make_tokenizer(), random_rows(seed)
    tokenizer.truncation_side = side
    questions = windows_of(prepared(data, tokenizer=tokenizer))
    assert len(questions) == len(data) and max(map(len, questions)) > 3
    for raw, windows in zip(data, questions, strict=True):
        whole = tokenizer(raw["context"], add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        seen: dict[tuple[int, int], int] = {}
        for window in windows:
            ids = window["input_ids"]
            assert (
                len(ids) <= 20 and len(window["offsets"]) == 2 * len(ids) and len(window["token_type_ids"]) == len(ids)
            )
            head = tokenizer(raw["question"])["input_ids"]
            assert ids[: len(head)] == head and ids[-1] == tokenizer.sep_token_id
            offsets = list(zip(window["offsets"][::2], window["offsets"][1::2], strict=True))
            assert offsets[: len(head)] == [(-1, -1)] * len(head) and offsets[-1] == (-1, -1)
            own = offsets[len(head) : -1]
            assert own == whole[whole.index(own[0]) :][: len(own)]
            for offset in own:
                seen[offset] = seen.get(offset, 0) + 1
        assert set(seen) == set(whole)
        # Each neighbour repeats as many tokens as `stride`.
        assert sum(seen.values()) - len(whole) == 5 * (len(windows) - 1)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("seed", range(3))
def test_labels_are_the_answers_tokens_where_the_window_has_all_of_them(seed, side):
    tokenizer, data = make_tokenizer(), random_rows(seed)
    tokenizer.truncation_side = side
    inside = outside = 0
    for raw, windows in zip(data, windows_of(prepared(data, tokenizer=tokenizer)), strict=True):
        (text,), (start,) = raw["answers"]["text"], raw["answers"]["answer_start"]
        end = start + len(text)
        whole = tokenizer(raw["context"], add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        wanted = [offset for offset in whole if offset[0] < end and offset[1] > start]
        for window in windows:
            offsets = list(zip(window["offsets"][::2], window["offsets"][1::2], strict=True))
            first, last = window["labels_who"]
            # A window that begins or ends within a word of the answer does not hold it.
            if min(s for s, _ in offsets if s >= 0) <= start and max(e for _, e in offsets) >= end:
                assert offsets[first : last + 1] == wanted
                inside += 1
            else:
                assert (first, last) == (0, 0)
                outside += 1
    assert inside > len(data) - 5 and outside > 20


def test_a_question_without_an_answer_is_labelled_with_the_first_token():
    table = prepared(rows({"text": [], "answer_start": []}, answer("very happy"), {"text": [], "answer_start": []}))
    labels = [[row["labels_who"] for row in windows] for windows in windows_of(table)]
    assert set(map(tuple, labels[0])) == set(map(tuple, labels[2])) == {(0, 0)}
    assert any(first > 0 for first, _ in labels[1])


def test_all_answers_are_references_and_the_first_is_learned():
    table = prepared(rows(answer("very happy", "happy", "the film")))
    first = table[0]
    assert first["references"] == ["very happy", "happy", "the film"] and first["context"] == CONTEXT
    assert all(row["references"] == [] and row["context"] == "" for row in list(table)[1:])
    ends = {CONTEXT[row["offsets"][2 * row["labels_who"][0]] :][:10] for row in table if row["labels_who"][0]}
    assert ends == {"very happy"}


def test_white_space_around_an_answer_is_no_part_of_it():
    at = CONTEXT.index("very happy")
    padded = {"text": [" very happy "], "answer_start": [at - 1]}
    assert prepared(rows(padded))["labels_who"] == prepared(rows(answer("very happy")))["labels_who"]
    assert prepared(rows(padded))["references"][0] == ["very happy"]


def test_batches_hold_no_texts():
    (source,) = make_sources([TASK])
    row = MultiTaskDataset([source], {source.name: prepared(answers_in_context())})[0]
    assert set(row) == {"source", "place", "input_ids", "token_type_ids", "labels_who", "question", "offsets"}


def test_without_labels_there_are_windows_all_the_same():
    data = answers_in_context()
    table, bare = prepared(data), prepared(data.remove_columns("answers"), labels=None)
    assert set(table.column_names) - set(bare.column_names) == {"labels_who", "references"}
    assert table["input_ids"][:] == bare["input_ids"][:] and table["question"][:] == bare["question"][:]


def test_a_tokenizer_without_token_types_gives_none():
    tokenizer = make_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    assert "token_type_ids" not in prepared(answers_in_context(), tokenizer=tokenizer).column_names


@pytest.mark.parametrize("labelled", [True, False])
def test_what_is_prepared_depends_on_the_stride_and_on_the_side_that_is_cut(labelled):
    data = answers_in_context() if labelled else answers_in_context().remove_columns("answers")
    tables = [prepared(data, Task("who", "question_answering", stride=stride), labels=None) for stride in (2, 8)]
    assert len(tables[0]) < len(tables[1])
    other = make_tokenizer()
    other.truncation_side = "left"
    tables.append(prepared(data, Task("who", "question_answering", stride=8), other, labels=None))
    assert tables[1]["offsets"][:] != tables[2]["offsets"][:]
    assert len({table._fingerprint for table in tables}) == 3


def test_its_rows_are_its_own():
    tasks = [
        TASK,
        Task("same", "regression", dataset="who", text_columns=("question", "context")),
        Task("other", "question_answering", dataset="who"),
    ]
    assert [[task.name for task in source.tasks] for source in make_sources(tasks)] == [["who"], ["same"], ["other"]]


# ---- what is refused ----

GOOD = answer("very happy")
BAD_ROWS = {
    "no context": ({"context": None}, "text None in row 1 of column 'context'"),
    "no question": ({"question": None}, "text None in row 1 of column 'question'"),
    "empty context": (
        {"context": " ", "answers": {"text": [], "answer_start": []}},
        "row 1 of column 'context' is empty",
    ),
    "long question": (
        {"question": "it was " * 7},
        "the question in row 1 of column 'question' has 14 tokens; max_length=20 leaves 3 for the context, of which "
        "neighbouring windows share stride=5",
    ),
    "no answers": ({"answers": None}, "row 1 of column 'answers' holds None; where the context has no answer, both"),
    "one list": (
        {"answers": {"text": ["maria"], "answer_start": []}},
        "row 1 of column 'answers' has 1 text and 0 answer_start",
    ),
    "empty answer": (
        {"answers": {"text": [" "], "answer_start": [2]}},
        "answer ' ' in row 1 of column 'answers' is empty",
    ),
    "elsewhere": (
        {"answers": {"text": ["maria"], "answer_start": [8]}},
        "'maria' in row 1 of column 'answers' is not at answer_start=8 of column 'context', where 'aria ' stands; it",
    ),
    "before the text": (
        {"answers": {"text": ["maria"], "answer_start": [-5]}},
        "is not at answer_start=-5 of column 'context', where '' stands",
    ),
    "second answer": (
        {"answers": {"text": ["maria", "john"], "answer_start": [7, 7]}},
        "answer 'john' in row 1 of column 'answers' is not at answer_start=7",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_named(case):
    change, message = BAD_ROWS[case]
    good = {"question": "it was", "context": CONTEXT, "answers": GOOD}
    with pytest.raises(ValueError, match="^dataset 'who' .train.: ") as error:
        prepared(Dataset.from_list([good, {**good, **change}]))
    assert message in str(error.value)


def test_row_numbers_are_those_of_the_rows_not_of_windows():
    good = [{"question": "it was", "context": CONTEXT, "answers": GOOD}] * 1500
    bad = {"question": "it was", "context": CONTEXT, "answers": {"text": ["x"], "answer_start": [0]}}
    with pytest.raises(ValueError, match="in row 1500 of column 'answers'"):
        prepared(Dataset.from_list([*good, bad]))


BAD_COLUMNS = {
    "no text": ({"context": ["a"], "answers": [GOOD]}, "no text column 'question'; columns are context, answers"),
    "words": ({"question": [["a"]], "context": ["a"], "answers": [GOOD]}, "text column 'question' has the type List"),
    "no answers": ({"question": ["a"], "context": ["a"]}, "no column 'answers' for the labels"),
    "texts": (
        {"question": ["a"], "context": ["a"], "answers": ["a"]},
        "must hold dictionaries with the lists text and",
    ),
    "half": (
        {"question": ["a"], "context": ["a"], "answers": [{"text": ["a"]}]},
        "must hold dictionaries with the lists text and answer_start",
    ),
    "single": (
        {"question": ["a"], "context": ["a"], "answers": [{"text": "a", "answer_start": 0}]},
        "must hold dictionaries with the lists text and answer_start",
    ),
}


@pytest.mark.parametrize("case", BAD_COLUMNS)
def test_bad_columns_are_named(case):
    columns, message = BAD_COLUMNS[case]
    with pytest.raises(ValueError) as error:
        prepared(Dataset.from_dict(columns))
    assert message in str(error.value)


def test_a_stride_that_leaves_no_room_is_refused():
    task = Task("who", "question_answering")  # 128
    with pytest.raises(ValueError, match=r"max_length=64 leaves 61 tokens for the context.*Task\(stride=...\)"):
        prepared(rows(GOOD), task, max_length=64)


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="task 'who': Slow does not tell where its tokens lie"):
        prepared(rows(GOOD), tokenizer=Slow())


def test_streams_are_refused():
    (source,) = make_sources([TASK])
    stream = answers_in_context().to_iterable_dataset()
    with pytest.raises(ValueError, match="question_answering does not go with streamed datasets: a long text gives"):
        prepare_streams({"who": stream}, [source], {"who": 24}, make_tokenizer(), 20)
    # Where the rows are evaluated they are read to their end.
    assert len(prepared(stream, split="eval")) == len(prepared(answers_in_context()))
