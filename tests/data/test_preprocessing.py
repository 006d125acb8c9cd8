"""Rows of text become model inputs once, in one way, whatever form they come in; bad rows are named."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
from conftest import PAD_ID, make_tokenizer
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from hf_multitask import HardSharingModel, Task
from hf_multitask.data.preprocessing import check_tokenizer, longest_input, prepare
from hf_multitask.data.row_encoding import first_subword_labels
from hf_multitask.data.sources import make_sources

TONE = Task("tone", "single_label_classification", labels=("negative", "positive"))
PAIR = replace(TONE, text_columns=("text", "other"))
SCORE = Task("score", "regression", dataset="tone", label_column="score")
TRAITS = Task("traits", "multi_label_classification", labels=("long", "sad"))
TAGS = Task("tags", "token_classification", labels=("O", "B-person", "B-place"))
# Words of one, three and two subwords.
WORDS, MARKS = ["maria", "xyz", "saw", "qu"], ["B-person", "O", "O", "B-place"]
WORD_TOKENS = ["maria", "x", "##y", "##z", "saw", "q", "##u"]


@pytest.fixture
def run(tokenizer):
    """A function that prepares rows for some tasks that read the same."""

    def run(rows, *tasks, tokenizer=tokenizer, max_length=32, **options):
        rows = rows if isinstance(rows, (Dataset, DatasetDict)) else Dataset.from_list(rows)
        (source,) = make_sources(tasks)
        return prepare(rows, source, tokenizer, max_length=max_length, **options)

    return run


def ids(tokenizer, *tokens: str) -> list[int]:
    return tokenizer.convert_tokens_to_ids(["[CLS]", *tokens, "[SEP]"])


def test_a_text_becomes_its_tokens_between_the_special_ones(run, tokenizer):
    prepared = run([{"text": "Good film", "label": "positive"}, {"text": "a bad abc", "label": "negative"}], TONE)
    assert prepared.features == {"input_ids": List(Value("int32")), "labels_tone": Value("int32")}
    assert prepared[:] == {
        "input_ids": [ids(tokenizer, "[UNK]", "film"), ids(tokenizer, "a", "bad", "a", "##b", "##c")],
        "labels_tone": [1, 0],
    }


def test_one_row_carries_the_labels_of_all_its_tasks(run):
    prepared = run([{"text": "good", "label": "positive", "score": 2, "rest": "unread"}], TONE, SCORE)
    assert prepared.features["labels_score"] == List(Value("float32"))
    assert {key: prepared[0][key] for key in prepared.column_names if key != "input_ids"} == {
        "labels_tone": 1,
        "labels_score": [2.0],
    }


def test_a_pair_has_token_types(run, tokenizer):
    prepared = run([{"text": "good film", "other": "bad", "label": "negative"}], PAIR)
    assert prepared[:] == {
        "input_ids": [ids(tokenizer, "good", "film", "[SEP]", "bad")],
        "token_type_ids": [[0, 0, 0, 0, 1, 1]],
        "labels_tone": [0],
    }


def test_a_pair_has_no_token_types_where_the_tokenizer_knows_none(run, tokenizer):
    plain = make_tokenizer()
    plain.model_input_names = ["input_ids", "attention_mask"]
    prepared = run([{"text": "good film", "other": "bad", "label": "negative"}], PAIR, tokenizer=plain)
    assert prepared.column_names == ["input_ids", "labels_tone"]
    assert prepared["input_ids"][:] == [ids(tokenizer, "good", "film", "[SEP]", "bad")]


def test_words_are_read_like_the_text_they_make(run):
    text = run([{"text": "good film", "other": "a bad xyz", "label": 1}], PAIR)
    words = run([{"text": ["good", "film"], "other": ["a", "bad", "xyz"], "label": 1}], PAIR)
    assert words[:] == text[:]


def test_a_words_tag_stands_at_its_first_subword(run, tokenizer):
    prepared = run([{"tokens": WORDS, "tags": MARKS}, {"tokens": ["it"], "tags": ["O"]}], TAGS)
    assert prepared["input_ids"][:] == [ids(tokenizer, *WORD_TOKENS), ids(tokenizer, "it")]
    assert prepared["labels_tags"][:] == [[-100, 1, 0, -100, -100, 0, 2, -100, -100], [-100, 0, -100]]


def test_repeated_words_keep_their_own_tags():
    assert first_subword_labels([None, 0, 0, 1, 1, 2, None], [4, 5, 4]) == [-100, 4, -100, 5, -100, 4, -100]
    assert first_subword_labels([None, None], []) == [-100, -100]


@pytest.mark.parametrize("max_length", [3, 4, 5, 8, 9, 10])
def test_tags_are_truncated_with_their_tokens(run, tokenizer, max_length):
    prepared = run([{"tokens": WORDS, "tags": MARKS}], TAGS, max_length=max_length)
    kept = min(max_length - 2, len(WORD_TOKENS))
    assert prepared["input_ids"][0] == ids(tokenizer, *WORD_TOKENS[:kept])
    assert prepared["labels_tags"][0] == [-100, *[1, 0, -100, -100, 0, 2, -100][:kept], -100]


def test_a_tasks_own_length_goes_before_the_common_one(run, tokenizer):
    rows = [{"text": "good " * 50, "label": "positive"}]
    assert len(run(rows, TONE, max_length=12)[0]["input_ids"]) == 12
    for length in (5, 20):
        own = run(rows, replace(TONE, max_length=length), max_length=12)[0]["input_ids"]
        assert own == ids(tokenizer, *["good"] * (length - 2))


def test_a_pair_is_truncated_from_its_longer_text(run, tokenizer):
    prepared = run([{"text": "good " * 9, "other": "bad bad", "label": 0}], PAIR, max_length=8)
    assert prepared["input_ids"][0] == ids(tokenizer, "good", "good", "good", "[SEP]", "bad", "bad")


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_tokenized_rows_are_prepared_like_their_text(run, tokenizer, padding_side):
    rows = [
        {"text": "good film", "other": "bad", "label": "negative", "score": 1.5},
        {"text": "a very bad film and", "other": "we saw it", "label": "positive", "score": -1.0},
    ]
    pair_score = replace(SCORE, text_columns=PAIR.text_columns)
    expected = run(rows, PAIR, pair_score)

    def tokenize(row):
        encoded = tokenizer(row["text"], row["other"], padding="max_length", max_length=20, padding_side=padding_side)
        assert PAD_ID in encoded["input_ids"]
        return {**encoded, "label": row["label"], "labels_score": row["score"]}

    prepared = run([tokenize(row) for row in rows], PAIR, pair_score, tokenizer=None)
    assert prepared.features == expected.features
    assert prepared[:] == expected[:]


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_tokenized_tags_lose_their_padding_too(run, padding_side):
    expected = run([{"tokens": WORDS, "tags": MARKS}], TAGS)
    real, gold = expected[0]["input_ids"], expected[0]["labels_tags"]

    def padded(values, with_what):
        pads = [with_what] * 5
        return pads + values if padding_side == "left" else values + pads

    row = {"input_ids": padded(real, PAD_ID), "attention_mask": padded([1] * 9, 0), "labels": padded(gold, -100)}
    assert run([row], TAGS)[:] == expected[:]


@pytest.mark.parametrize("column", ["labels_tone", "label", "labels"])
def test_tokenized_rows_may_name_their_labels_in_any_usual_way(run, column):
    prepared = run([{"input_ids": [1, 5, 2], column: 1}], TONE)
    assert prepared[:] == {"input_ids": [[1, 5, 2]], "labels_tone": [1]}


def test_of_several_label_columns_the_tasks_own_is_read(run):
    prepared = run([{"input_ids": [1, 5, 2], "labels": 0, "label": 0, "labels_tone": 1}], TONE)
    assert prepared["labels_tone"][:] == [1]


def test_labels_may_be_left_out_where_they_are_not_asked_for(run):
    rows = [{"text": "good", "label": "positive"}]
    assert run(rows, TONE, SCORE, labels=None).column_names == ["input_ids", "labels_tone"]
    assert run(rows, TONE, SCORE, labels=False).column_names == ["input_ids"]
    assert run([{"text": "good", "label": "nonsense"}], TONE, labels=False).num_rows == 1


@pytest.mark.parametrize("form", [None, "numpy", "torch"])
def test_the_given_dataset_stays_as_it_is(run, form):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["positive", "negative"])})
    rows = Dataset.from_list([{"text": "good", "label": 0}, {"text": "bad", "label": 1}], features=features)
    rows.set_format(form)
    before = copy.deepcopy((rows.features, rows.format, rows._fingerprint, rows.with_format(None)[:]))
    prepared = run(rows, TONE)
    assert prepared["labels_tone"][:] == [1, 0]
    assert (rows.features, rows.format, rows._fingerprint, rows.with_format(None)[:]) == before


def test_rows_come_in_the_order_of_a_selection(run):
    rows = Dataset.from_list([{"text": "good " * i, "label": i % 2} for i in range(1, 7)])
    prepared = run(rows.select([4, 0, 2]), TONE)
    assert [len(row) - 2 for row in prepared["input_ids"]] == [5, 1, 3]


def test_two_processes_give_the_same_rows(run, datasets, tasks):
    names = Dataset.from_list(datasets["names"].to_list() * 100)
    assert len(names) >= 1000
    one, two = (run(names, tasks[3], num_proc=number) for number in (None, 2))
    assert two.features == one.features and two[:] == one[:]


def test_a_bad_row_is_named_by_its_own_number_in_any_process(run):
    rows = [{"text": "good", "label": "positive" if i != 1234 else "other"} for i in range(1500)]
    for num_proc in (None, 2):
        with pytest.raises(ValueError, match="'other' in row 1234 of column 'label'"):
            run(rows, TONE, num_proc=num_proc)


# ---- caching ----


@pytest.fixture
def on_disk(tmp_path):
    """A dataset that was loaded from a file, and a function that gives the files of its cache and their times."""
    path = tmp_path / "rows.parquet"
    Dataset.from_list([{"text": "a good film", "label": "positive"}, {"text": "bad", "label": "negative"}]).to_parquet(
        path
    )
    folder = tmp_path / "cache"
    rows = Dataset.from_parquet(str(path), cache_dir=str(folder))
    return rows, lambda: {str(path): path.stat().st_mtime_ns for path in folder.rglob("cache-*.arrow")}


def test_a_second_run_reads_the_cache(run, on_disk, tokenizer):
    rows, files = on_disk
    first = run(rows, TONE)
    made = files()
    assert len(made) == 1
    # Calling a tokenizer leaves its settings of padding and truncation behind.
    tokenizer(["good", "a film"], padding="max_length", truncation=True, max_length=7)
    second = run(rows, TONE)
    assert files() == made
    assert second._fingerprint == first._fingerprint and second.cache_files == first.cache_files
    third = run(rows, TONE, tokenizer=make_tokenizer())
    assert files() == made and third[:] == first[:]


def other_words():
    changed = make_tokenizer()
    changed.add_tokens(["zzz"])
    return changed


def other_template():
    changed = make_tokenizer()
    changed.backend_tokenizer.post_processor = None
    return changed


CHANGES = {
    "labels": lambda: {"task": replace(TONE, labels=("positive", "negative"))},
    "name": lambda: {"task": replace(TONE, name="mood")},
    "max_length": lambda: {"max_length": 4},
    "the task's max_length": lambda: {"task": replace(TONE, max_length=3)},
    "the tokenizer's words": lambda: {"tokenizer": other_words()},
    "the tokenizer's template": lambda: {"tokenizer": other_template()},
    "no labels": lambda: {"labels": False},
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_the_rows_changes_the_cache(run, on_disk, change):
    rows, files = on_disk
    options = CHANGES[change]()
    task = options.pop("task", TONE)
    fresh = run(rows.to_list(), task, **options)
    run(rows, TONE)
    again = run(rows, task, **options)
    assert len(files()) == 2
    assert again.features == fresh.features and again[:] == fresh[:]


# ---- bad input ----

TEXT, ROW = {"text": "good", "label": "positive"}, {"tokens": ["it", "was"], "tags": ["O", "O"]}
BAD = {
    "no text column": (
        TONE,
        [{"body": "good", "label": 0}],
        {},
        r"task 'tone': no text column 'text'; columns are body",
    ),
    "no second text": (PAIR, [TEXT], {}, r"task 'tone': no text column 'other'; columns are text, label"),
    "no label column": (
        TONE,
        [{"text": "good"}],
        {},
        r"task 'tone': no column 'label' for the labels; columns are text",
    ),
    "label not in the list": (
        TONE,
        [TEXT, {**TEXT, "label": "postive"}],
        {},
        r"'tone': label 'postive' in row 1 of col",
    ),
    "id not in the list": (TONE, [{**TEXT, "label": 2}], {}, r"task 'tone': label 2 in row 0 of column 'label'"),
    "no label": (
        TONE,
        [TEXT, TEXT, {**TEXT, "label": None}],
        {},
        r"task 'tone': label None in row 2 of column 'label'",
    ),
    "float label": (TONE, [{**TEXT, "label": 1.0}], {}, r"task 'tone': column 'label' has the type Value\('float64'\)"),
    "string number": (
        SCORE,
        [{**TEXT, "score": "1"}],
        {},
        r"task 'score': column 'score' has the type Value\('string'\)",
    ),
    "NaN": (SCORE, [{**TEXT, "score": math.nan}], {}, r"task 'score': label nan in row 0 of column 'score'"),
    "no rows": (TONE, Dataset.from_dict({"text": [], "label": []}), {}, r"has no rows"),
    "all texts empty": (TONE, [{**TEXT, "text": ""}] * 2, {}, r"no row has a token left at max_length=32"),
    "max_length too small": (TONE, [TEXT], {"max_length": 2}, r"max_length=2 leaves no room: .* adds 2 special tokens"),
    "too small for pairs": (
        PAIR,
        [{**TEXT, "other": "a"}],
        {"max_length": 3},
        r"max_length=3 .* adds 3 special tokens",
    ),
    "task's max_length too small": (replace(TONE, max_length=1), [TEXT], {}, r"max_length=1 leaves no room"),
    "more words": (
        TAGS,
        [ROW, {**ROW, "tags": ["O"]}],
        {},
        r"task 'tags': row 1 has 2 words in column 'tokens' and 1 lab",
    ),
    "more tags": (
        TAGS,
        [{**ROW, "tokens": ["it"]}],
        {},
        r"task 'tags': row 0 has 1 words in column 'tokens' and 2 labels",
    ),
    "text for words": (
        TAGS,
        [{**ROW, "tokens": "it was"}],
        {},
        r"task 'tags': column 'tokens' must hold lists of words",
    ),
    "no tags at all": (TAGS, [{"tokens": [], "tags": []}, {**ROW, "tags": []}], {}, r"2 words .* and 0 labels"),
    "no text": (TONE, [TEXT, {**TEXT, "text": None}], {}, r"text None in row 1 of column 'text'"),
    "no second text in a row": (
        PAIR,
        [{**TEXT, "other": "a"}, {**TEXT, "other": None}],
        {},
        r"text None in row 1 of .*'other'",
    ),
    "no word": (TAGS, [{**ROW, "tokens": ["it", None]}], {}, r"text None in row 0 of column 'tokens'"),
    "number for text": (TONE, [{**TEXT, "text": 7}], {}, r"text column 'text' has the type Value\('int64'\)"),
    "numbers for words": (TAGS, [{**ROW, "tokens": [1, 2]}], {}, r"text column 'tokens' has the type List"),
    "text beside words": (PAIR, [{**TEXT, "other": ["a"]}], {}, r"one holds texts, the other lists of words"),
    "no tokenizer": (TONE, [TEXT], {"tokenizer": None}, r"processing_class is missing"),
    "tokenized, no labels": (
        TONE,
        [{"input_ids": [1, 2]}],
        {},
        r"task 'tone': no column 'label'.*columns are input_ids",
    ),
    "tokenized, unknown label": (
        TONE,
        [{"input_ids": [1, 2], "label": 5}],
        {},
        r"'tone': label 5 in row 0 of column 'label'",
    ),
    "tokenized, fewer tags": (TAGS, [{"input_ids": [1, 5, 2], "tags": [0]}], {}, r"row 0 has 3 input_ids and 1 labels"),
    "tokenized, no tag": (
        TAGS,
        [{"input_ids": [1, 2], "tags": [-100, -100]}],
        {},
        r"'tags': no row has a labelled word",
    ),
    "tokenized, empty": (TONE, [{"input_ids": [1], "attention_mask": [0], "label": 0}], {}, r"row 0 has no token"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_named_with_dataset_and_split(run, case):
    task, rows, options, message = BAD[case]
    with pytest.raises(ValueError, match=rf"^dataset '{task.dataset}' \(held-out\):? .*{message}"):
        run(rows, task, split="held-out", **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda rows: DatasetDict(train=rows), r"must be a datasets.Dataset, got DatasetDict"),
        (lambda rows: rows.to_list(), r"must be a datasets.Dataset, got list"),
        (lambda rows: rows.to_pandas(), r"must be a datasets.Dataset, got DataFrame"),
    ],
)
def test_what_is_no_dataset_is_refused(tokenizer, make, message):
    with pytest.raises(TypeError, match=rf"^dataset 'tone' \(train\) {message}"):
        prepare(make(Dataset.from_list([TEXT])), make_sources([TONE])[0], tokenizer, max_length=8)


# ---- tokenizer and model ----


def test_a_tokenizer_that_does_not_fit_is_refused(model):
    check_tokenizer(make_tokenizer(), model)
    with pytest.raises(ValueError, match="processing_class is missing"):
        check_tokenizer(None, model)
    padless = make_tokenizer()
    padless.pad_token = None
    with pytest.raises(ValueError, match="has no pad token"):
        check_tokenizer(padless, model)
    larger = make_tokenizer()
    larger.add_tokens([f"new{i}" for i in range(90 - len(larger))])
    check_tokenizer(larger, model)
    larger.add_tokens(["one more"])
    with pytest.raises(ValueError, match="91 tokens, the backbone embeddings for 90"):
        check_tokenizer(larger, model)


def test_the_longest_input_is_what_tokenizer_and_backbone_allow(model):
    tokenizer = make_tokenizer()
    assert longest_input(tokenizer, model) == 64
    tokenizer.model_max_length = 100
    assert longest_input(tokenizer, model) == 66
    tokenizer.model_max_length = int(1e30)
    assert longest_input(tokenizer, model) == 66
    assert longest_input(tokenizer, model, 66) == 66
    with pytest.raises(ValueError, match="max_length=67 exceeds the backbone's 66 positions"):
        longest_input(tokenizer, model, 67)


def test_prepared_rows_are_what_the_model_takes(run, tokenizer, bert):
    model = HardSharingModel.from_backbone(bert, [TONE]).eval()
    rows = run([{"text": "good film", "label": 1}], TONE)
    by_tokenizer = tokenizer("good film", return_tensors="pt")
    expected = model(**by_tokenizer).logits["tone"]
    found = model(input_ids=by_tokenizer["input_ids"].new_tensor([rows[0]["input_ids"]])).logits["tone"]
    np.testing.assert_allclose(found.detach(), expected.detach(), atol=1e-6)
