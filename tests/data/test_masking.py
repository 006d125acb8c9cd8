"""What is hidden from an encoder: a pure function of seed, task, pass and row, in the shares of Devlin et al."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from conftest import NEUTRAL, make_tokenizer
from datasets import Dataset

from hf_multitask import DataCollatorForMultiTask, Task
from hf_multitask.data.dataset import prepare_sources
from hf_multitask.data.masking import Masking, make_masking, masking_generator
from hf_multitask.data.row_encoding import word_numbers
from hf_multitask.data.schedule import RowNumber
from hf_multitask.data.sources import make_sources

MASK, SPECIAL = 4, -100
ORDINARY = np.arange(5, 90)


def make(probability: float = 0.15, whole_words: bool = False) -> Masking:
    return Masking(probability, whole_words, MASK, ORDINARY)


def random_row(draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Words of one to four tokens, one text or a pair, with special tokens around them."""
    word_ids: list[int | None] = [None]
    for _ in range(int(draw.integers(1, 3))):
        for word, size in enumerate(draw.integers(1, 5, draw.integers(1, 12))):
            word_ids += [word] * int(size)
        word_ids.append(None)
    words = np.array(word_numbers(word_ids))
    return np.where(words == SPECIAL, 1, draw.integers(5, 90, len(words))), words


def rows(count: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    draw = np.random.default_rng(seed)
    return [random_row(draw) for _ in range(count)]


def within(count: int, total: int, share: float) -> bool:
    """Whether a binomial count lies within five standard deviations."""
    return abs(count - share * total) <= 5 * math.sqrt(total * share * (1 - share))


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("probability", [0.01, 0.15, 0.5, 1.0])
def test_what_comes_out_is_the_row_with_some_tokens_hidden(probability, whole_words):
    masking = make(probability, whole_words)
    for number, (ids, words) in enumerate(rows(200)):
        given = ids.copy(), words.copy()
        hidden, places, tokens = masking.apply(ids, words, masking_generator(0, "lm", 0, number))
        assert all((a == b).all() for a, b in zip(given, (ids, words), strict=True))  # nothing is changed in place
        assert hidden.shape == ids.shape and places.shape == tokens.shape
        assert (np.diff(places) > 0).all() and (tokens == ids[places]).all()
        assert (words[places] != SPECIAL).all()
        kept = np.setdiff1d(np.arange(len(ids)), places)
        assert (hidden[kept] == ids[kept]).all()
        assert np.isin(hidden[places], [MASK, *ORDINARY]).all()
        candidates = int((words != SPECIAL).sum())
        wanted = max(round(probability * candidates), 1)
        longest = np.unique(words[words != SPECIAL], return_counts=True)[1].max()
        assert len(places) == wanted if not whole_words else wanted <= len(places) < wanted + longest
        assert probability < 1 or len(places) == candidates


@pytest.mark.parametrize("whole_words", [False, True])
def test_words_are_taken_whole_only_when_asked(whole_words):
    split = 0
    for number, (ids, words) in enumerate(rows(300)):
        _, places, _ = make(0.2, whole_words).apply(ids, words, masking_generator(0, "lm", 0, number))
        for word in np.unique(words[places]):
            split += set(np.flatnonzero(words == word)) > set(places)
    assert (split == 0) == whole_words


def test_words_of_two_texts_are_told_apart():
    """The second text's words go on counting, so that words at the same place of both are two."""
    words = np.array(word_numbers([None, 0, 0, 1, None, 0, 0, 1, None]))
    assert words.tolist() == [-100, 0, 0, 1, -100, 2, 2, 3, -100]
    seen = set()
    for number in range(50):
        _, places, _ = make(0.1, True).apply(np.arange(9) + 5, words, masking_generator(0, "lm", 0, number))
        seen.add(tuple(places.tolist()))
    assert seen == {(1, 2), (3,), (5, 6), (7,)}


@pytest.mark.parametrize("whole_words", [False, True])
def test_every_token_is_as_likely_as_any_other(whole_words):
    """Among words of one length, and with four words in every row."""
    words = np.array([-100, 0, 0, 1, 1, 2, 2, 3, 3, -100])
    counts = np.zeros(10, dtype=int)
    for number in range(2000):
        _, places, _ = make(0.25, whole_words).apply(np.arange(10) + 5, words, masking_generator(1, "lm", 0, number))
        counts[places] += 1
    assert counts[0] == counts[9] == 0
    assert all(within(int(count), 2000, 0.25) for count in counts[1:9])


@pytest.mark.parametrize("whole_words", [False, True])
def test_eight_tenths_are_masked_a_tenth_another_token_a_tenth_stay(whole_words):
    masking = Masking(0.3, whole_words, MASK, np.arange(1000, 2000))
    fates = {"mask": 0, "another": 0, "same": 0}
    others = []
    for number, (ids, words) in enumerate(rows(3000)):
        hidden, places, tokens = masking.apply(ids, words, masking_generator(3, "lm", 0, number))
        fates["mask"] += int((hidden[places] == MASK).sum())
        fates["same"] += int((hidden[places] == tokens).sum())
        another = hidden[places][hidden[places] >= 1000]
        fates["another"] += len(another)
        others += another.tolist()
    total = sum(fates.values())
    assert total > 5000
    for fate, share in (("mask", 0.8), ("another", 0.1), ("same", 0.1)):
        assert within(fates[fate], total, share), fates
    low = sum(token < 1500 for token in others)
    assert within(low, len(others), 0.5) and len(set(others)) > 300


@pytest.mark.parametrize("whole_words", [False, True])
def test_a_row_of_special_tokens_only_predicts_nothing(whole_words):
    for ids in (np.array([1, 2]), np.array([], dtype=int)):
        words = np.full(len(ids), SPECIAL)
        hidden, places, tokens = make(0.15, whole_words).apply(ids, words, masking_generator(0, "lm", 0, 0))
        assert (hidden == ids).all() and len(places) == len(tokens) == 0
        assert places.dtype.kind == "i"


def test_one_token_is_always_hidden():
    for number in range(100):
        ids, words = np.array([1, 7, 2]), np.array([SPECIAL, 0, SPECIAL])
        _, places, tokens = make(0.01).apply(ids, words, masking_generator(0, "lm", 0, number))
        assert places.tolist() == [1] and tokens.tolist() == [7]


def choice(seed=0, task="lm", repeat=0, row=0) -> tuple:
    ids, words = np.arange(5, 65), np.arange(60)
    return tuple(part.tobytes() for part in make(0.3).apply(ids, words, masking_generator(seed, task, repeat, row)))


def test_seed_task_pass_and_row_decide_and_nothing_else():
    expected = choice()
    np.random.seed(1)
    random.seed(2)
    assert choice() == expected
    for change in ({"seed": 1}, {"task": "other"}, {"repeat": 1}, {"row": 1}):
        assert choice(**change) != expected, change
    # A pass more is not a row more, and the like.
    many = {choice(seed, task, repeat, row) for seed in (0, 1) for task in "ab" for repeat in (0, 1) for row in (0, 1)}
    assert len(many) == 16


# ---- from texts ----


def prepared(task: Task, texts: list[str] | list[list[str]], tokenizer=None, **columns):
    return prepare_sources(
        Dataset.from_dict({"text": texts, **columns}),
        make_sources([task]),
        "train_dataset",
        tokenizer=tokenizer or make_tokenizer(),
        max_length=32,
    )


def collate(task: Task, given, seed: int = 0, tokenizer=None):
    return DataCollatorForMultiTask(tokenizer or make_tokenizer(), [task], seed=seed)(given)


def predicted(batch, task: str = "lm") -> list[dict[int, int]]:
    """By row, the tokens that are to be found, by their places in the row."""
    width = batch["input_ids"].shape[1]
    return [
        {int(place) - row * width: int(token) for place, token in zip(places, tokens, strict=True) if token != -100}
        for row, (places, tokens) in enumerate(zip(batch["label_positions"][task], batch["labels"][task], strict=True))
    ]


def test_special_tokens_of_any_kind_are_never_chosen(tokenizer):
    """Those around the text, those written out in the text, and words that the tokenizer does not know."""
    task = Task("lm", "masked_lm", mlm_probability=1.0)
    texts = ["the [MASK] film [SEP] was ~ good", "film", "a [PAD] b [CLS] c [UNK]"]
    rows = prepared(task, texts)
    batch = collate(task, [rows[i] for i in range(3)])
    special = set(tokenizer.all_special_ids)
    assert tokenizer.unk_token_id in tokenizer("~")["input_ids"]
    for row, found in zip(rows.rows[0]["input_ids"], predicted(batch), strict=True):
        assert found == {place: token for place, token in enumerate(row) if token not in special}
    assert all(not set(found.values()) & special for found in predicted(batch))


def test_another_token_is_never_a_special_one(tokenizer):
    masking = make_masking(tokenizer, "lm", 0.15, False)
    assert set(masking.ordinary_ids) == set(range(len(tokenizer))) - set(tokenizer.all_special_ids)
    assert masking.mask_id == tokenizer.mask_token_id and masking.probability == 0.15


def test_a_row_is_hidden_alike_in_every_batch_and_otherwise_in_another_pass():
    task = Task("lm", "masked_lm", mlm_probability=0.4)
    draw = random.Random(0)
    rows = prepared(task, [" ".join(draw.choices(NEUTRAL, k=draw.randint(15, 24))) for _ in range(12)])
    alone = [predicted(collate(task, [rows[i]]))[0] for i in range(12)]
    assert predicted(collate(task, [rows[i] for i in range(12)])) == alone
    assert predicted(collate(task, [rows[i] for i in (7, 3, 11)])) == [alone[i] for i in (7, 3, 11)]
    second = [predicted(collate(task, [rows[RowNumber(i, 1)]]))[0] for i in range(12)]
    assert all(a != b for a, b in zip(alone, second, strict=True))
    again = [predicted(collate(task, [rows[RowNumber(i, 1)]]))[0] for i in range(12)]
    assert again == second
    assert [predicted(collate(task, [rows[i]], seed=1))[0] for i in range(12)] != alone


def test_the_same_words_are_hidden_whole_in_texts_and_pairs(tokenizer):
    task = Task("lm", "masked_lm", mlm_probability=0.3, whole_words=True, text_columns=("text", "other"))
    rows = prepared(task, ["xyz film abc"] * 20, other=["film qqq paris"] * 20)
    ids = rows.rows[0]["input_ids"][0]
    text = tokenizer.convert_ids_to_tokens(ids)
    words = [[1, 2, 3], [4], [5, 6, 7], [9], [10, 11, 12], [13]]
    assert ["".join(text[i] for i in word) for word in words[::2]] == ["x##y##z", "a##b##c", "q##q##q"]
    batch = collate(task, [rows[i] for i in range(20)])
    seen = set()
    for found in predicted(batch):
        parts = [set(word) & set(found) for word in words]
        assert all(part in (set(), set(word)) for part, word in zip(parts, words, strict=True))
        seen |= {number for number, part in enumerate(parts) if part}
    assert seen == set(range(6))
    assert batch["token_type_ids"][0].tolist() == [0] * 9 + [1] * 6


def test_lists_of_words_keep_their_words():
    task = Task("lm", "masked_lm", mlm_probability=0.3, whole_words=True)
    rows = prepared(task, [["xyz", "a.b", "film"]] * 30)
    words = [{1, 2, 3}, {4, 5, 6}, {7}]
    for found in predicted(collate(task, [rows[i] for i in range(30)])):
        assert all(word & set(found) in (set(), word) for word in words)


def test_tokenized_rows_are_hidden_too_but_have_no_words(tokenizer):
    texts = tokenizer(["film was good", "paris and a film"])
    columns = {"input_ids": texts["input_ids"], "attention_mask": texts["attention_mask"]}
    task = Task("lm", "masked_lm", mlm_probability=1.0)
    options = {"tokenizer": tokenizer, "max_length": 32}
    rows = prepare_sources(Dataset.from_dict(columns), make_sources([task]), "train_dataset", **options)
    batch = collate(task, [rows[0], rows[1]])
    assert [list(found) for found in predicted(batch)] == [[1, 2, 3], [1, 2, 3, 4]]
    whole = Task("lm", "masked_lm", whole_words=True)
    with pytest.raises(ValueError, match="task 'lm': whole_words needs texts; in tokenized rows words are not known"):
        prepare_sources(Dataset.from_dict(columns), make_sources([whole]), "train_dataset", **options)


def test_a_tokenizer_without_a_mask_token_is_refused():
    bare = make_tokenizer()
    bare.mask_token = None
    with pytest.raises(ValueError, match="task 'lm': masked_lm needs a mask token, and tokenizer .* has none"):
        DataCollatorForMultiTask(bare, [Task("lm", "masked_lm")])
    DataCollatorForMultiTask(bare, [Task("tone", "regression")])
