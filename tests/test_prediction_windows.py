"""Texts of any length: windows, what is made of them, and how rows share passes of the encoder."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import BACKBONES, NEUTRAL
from test_schemes import KINDS, make_model

from hf_multitask import HardSharingModel, Task
from hf_multitask.models.auto import SCHEMES
from hf_multitask.prediction import Predictor

LONG = "we saw a film in paris and it was very very good , but the film in berlin was sad and bad and poor . " * 4
ONE_OF_EACH = [next(kind for kind, (name, _) in KINDS.items() if name == scheme) for scheme in SCHEMES]


def windows_of(tokenizer, texts, length, stride, truncation="only_first"):
    """The windows as the tokenizer itself makes them, one dictionary of tensors and the number of tokens of each."""
    encoded = tokenizer(*texts, truncation=truncation, max_length=length, stride=stride, return_overflowing_tokens=True)
    for i, ids in enumerate(encoded["input_ids"]):
        part = 1 if truncation == "only_second" else 0
        own = {key: torch.tensor([encoded[key][i]]) for key in ("input_ids", "attention_mask", "token_type_ids")}
        yield own, encoded.sequence_ids(i).count(part), len(ids)


def expected_logits(model, tokenizer, texts, name, length, stride, truncation="only_first"):
    total, weight = 0.0, 0
    for inputs, size, _ in windows_of(tokenizer, texts, length, stride, truncation):
        with torch.no_grad():
            total = total + size * model(**inputs).logits[name][0]
        weight += size
    return total / weight


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_a_long_text_has_the_mean_of_its_windows_logits(kind, tokenizer):
    model = make_model(kind)
    predictor = Predictor(model, tokenizer, max_length=20)
    (answer,) = predictor([LONG], ["tone", "strength", "traits"], stride=6, top_k=3)
    expected = {
        name: expected_logits(predictor.model, tokenizer, [LONG], name, 20, 6)
        for name in ("tone", "strength", "traits")
    }
    assert answer["strength"] == pytest.approx(float(expected["strength"]), abs=1e-4)
    tone = dict(zip(("negative", "positive"), expected["tone"].softmax(-1).tolist(), strict=True))
    assert {one["label"]: one["score"] for one in answer["tone"]} == pytest.approx(tone, abs=1e-4)
    traits = dict(zip(("long", "happy", "sad"), expected["traits"].sigmoid().tolist(), strict=True))
    assert {one["label"]: one["score"] for one in answer["traits"]} == pytest.approx(traits, abs=1e-4)


@pytest.mark.parametrize("longer", [0, 1])
def test_of_a_pair_the_longer_text_is_cut_and_the_other_stands_in_every_window(longer, bert, tokenizer):
    torch.manual_seed(0)
    model = HardSharingModel.from_backbone(bert, [Task("same", "regression", text_columns=("one", "two"))])
    pair = ("a sad film", LONG)[:: -1 if longer == 0 else 1]
    (answer,) = Predictor(model, tokenizer, max_length=20)([pair], stride=3)
    truncation = ("only_first", "only_second")[longer]
    expected = expected_logits(model, tokenizer, pair, "same", 20, 3, truncation)
    assert answer["same"] == pytest.approx(float(expected), abs=1e-4)


def test_pairs_that_are_cut_on_different_sides_keep_their_order(bert, tokenizer):
    model = HardSharingModel.from_backbone(bert, [Task("same", "regression", text_columns=("one", "two"))])
    predictor = Predictor(model, tokenizer, max_length=20)
    pairs = [("a film", LONG), (LONG, "a film"), ("we saw", LONG), ("a", "b"), (LONG, "we saw")]
    together = [answer["same"] for answer in predictor(pairs, stride=3)]
    assert together == pytest.approx([next(predictor([pair], stride=3))["same"] for pair in pairs], abs=1e-3)
    assert len(set(together)) == 5


def test_a_text_that_fits_is_read_as_without_stride(model, tokenizer):
    predictor = Predictor(model, tokenizer)
    texts = ["the film was good", "a", ["we", "saw", "maria"]]
    assert list(predictor(texts, stride=8)) == list(predictor(texts))


def test_where_windows_touch_no_token_counts_twice(model, tokenizer):
    text = "film " * 36  # two windows of 18 equal tokens, and the same text in one
    predictor = Predictor(model, tokenizer, max_length=20)
    half = next(predictor(["film " * 18], ["strength"]))["strength"]
    assert next(predictor([text], ["strength"], stride=0))["strength"] == pytest.approx(half, abs=1e-4)


# ---- words ----

TAGS = {"maria": "B-person", "john": "I-person", "paris": "B-place", "berlin": "B-place"}
NAMES = ("O", "B-person", "I-person", "B-place")


def tagger(tokenizer, max_length: int, context: int = 0) -> Predictor:
    """A model that knows a word by itself, if it sees so many tokens on both sides of it."""
    torch.manual_seed(0)
    model = HardSharingModel.from_backbone(
        BACKBONES["bert"](), [Task("names", "token_classification", labels=NAMES, head="linear")]
    )

    def tag(input_ids=None, attention_mask=None, **kwargs):
        scores = torch.zeros(*input_ids.shape, 32)
        for row, ids in enumerate(input_ids.tolist()):
            last = int(attention_mask[row].sum()) - 2  # behind it stands [SEP]
            for place, word in enumerate(tokenizer.convert_ids_to_tokens(ids)):
                seen = min(place - 1, last - place) >= context
                scores[row, place, NAMES.index(TAGS.get(word, "O")) if seen else 0] = 10.0
        return type("Encoded", (dict,), {"last_hidden_state": scores})()

    model.encode = tag
    with torch.no_grad():
        model.heads["names"].layers[1].weight.copy_(torch.eye(4, 32))
        model.heads["names"].layers[1].bias.zero_()
    return Predictor(model, tokenizer, max_length)


def make_text(seed: int, words: int = 90) -> list[str]:
    draw = random.Random(seed)
    plain = [word for word in NEUTRAL if word not in TAGS]
    return [draw.choice([*TAGS] if draw.random() < 0.3 else [*plain, "xyz", "qqq-qq", ","]) for _ in range(words)]


def entities_by_hand(words: list[str]) -> list[tuple[str, int, int]]:
    found: list[tuple[str, int, int]] = []
    before = "O"
    for number, word in enumerate(words):
        tag = TAGS.get(word, "O")
        if tag == "I-person" and before in ("B-person", "I-person"):
            found[-1] = ("person", found[-1][1], number + 1)
        elif tag != "O":
            found.append((tag[2:], number, number + 1))
        before = tag
    return found


@pytest.mark.parametrize("stride", [0, 1, 5, 15])
@pytest.mark.parametrize("seed", [0, 4])
def test_entities_of_a_long_text_are_found_once_with_their_characters(tokenizer, stride, seed):
    words = make_text(seed)
    text = " ".join(words)
    starts = [sum(len(word) + 1 for word in words[:number]) for number in range(len(words))]
    expected = [(kind, starts[a], starts[b - 1] + len(words[b - 1])) for kind, a, b in entities_by_hand(words)]
    (answer,) = tagger(tokenizer, 18)([text], stride=stride)
    assert [(e["label"], e["start"], e["end"]) for e in answer["names"]] == expected
    assert all(e["text"] == text[e["start"] : e["end"]] for e in answer["names"])
    assert len(expected) > 15 and any(" " in e["text"] for e in answer["names"])


@pytest.mark.parametrize("stride", [0, 5])
def test_entities_of_many_given_words_are_counted_in_words(tokenizer, stride):
    words = make_text(2)
    (answer,) = tagger(tokenizer, 18)([words], stride=stride)
    assert [(e["label"], e["start"], e["end"]) for e in answer["names"]] == entities_by_hand(words)


@pytest.mark.parametrize("given", ["text", "words"])
def test_each_word_is_taken_from_the_window_where_it_has_most_context(tokenizer, given):
    # Windows of 16 tokens that share 8: every token but the outer ones has 4 tokens on both sides in one of them.
    words = [word for word in make_text(3) if word not in ("xyz", "qqq-qq")]
    text = " ".join(words) if given == "text" else words
    (seen,) = tagger(tokenizer, 18, context=3)([text], stride=8)
    inner = ["film"] * 3 + words[3:-3] + ["film"] * 3
    expected = [words[start:end] for _, start, end in entities_by_hand(inner)]
    assert [e["text"].split() for e in seen["names"]] == expected
    (missed,) = tagger(tokenizer, 18, context=3)([text], stride=0)
    assert len(missed["names"]) < len(seen["names"])


def test_a_word_of_many_tokens_has_the_label_of_its_first_wherever_a_window_ends(tokenizer):
    for before in range(12):
        words = ["film"] * before + ["qwertyuiop"] + ["film"] * 9
        predictor = tagger(tokenizer, 12)
        TAGS["q"] = "B-place"
        try:
            (answer,) = predictor([" ".join(words)], stride=3)
        finally:
            del TAGS["q"]
        assert [e["text"] for e in answer["names"]] == ["qwertyuiop"], before


# ---- what is cut is told ----


def test_texts_that_are_cut_are_counted_in_one_message(model, tokenizer, caplog):
    predictor = Predictor(model, tokenizer, max_length=12)
    texts = [LONG, "good", LONG.split(), "bad"] * 3
    for given in (texts, iter(texts)):
        caplog.clear()
        assert len(list(predictor(given, batch_size=2))) == 12
        (message,) = [record.getMessage() for record in caplog.records]
        assert "6 of 12 texts were cut" in message and "12 tokens" in message and "stride" in message
    caplog.clear()
    list(predictor(texts, stride=2))
    list(predictor(["good", "film " * 10]))
    assert not caplog.records


@pytest.mark.parametrize(
    ("text", "stride", "message"),
    [
        ("good", 10, "input 0: stride=10 leaves no token of its own to a window, where max_length=12 has room for 10;"),
        (("a sad sad film", LONG), 5, "input 1: .* has room for 5 beside the 4 of the shorter text; take a smaller"),
        ((LONG, LONG), 0, "input 1: stride=0 .* has room for 0 beside"),
    ],
)
def test_windows_need_tokens_of_their_own(bert, tokenizer, text, stride, message):
    pair = isinstance(text, tuple)
    task = Task("x", "regression", text_columns=("one", "two") if pair else ("one",))
    predictor = Predictor(HardSharingModel.from_backbone(bert, [task]), tokenizer, max_length=12)
    long, short = (("a", LONG), ("a sad sad film", "we saw it")) if pair else (LONG, "a")
    assert len(list(predictor([long, short], stride=7))) == 2
    with pytest.raises(ValueError, match=message):
        list(predictor([long, text] if pair else [text], stride=stride))


# ---- passes ----


def count_passes(model):
    shapes = []
    model.backbone.register_forward_hook(
        lambda module, args, kwargs, output: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def test_tasks_of_other_lengths_share_the_pass_of_texts_that_fit_both(bert, tokenizer):
    tasks = [Task("x", "regression"), Task("y", "regression", max_length=8), Task("z", "regression", max_length=8)]
    model = HardSharingModel.from_backbone(bert, tasks)
    shapes = count_passes(model)
    list(Predictor(model, tokenizer)(["the film was good", "we saw it"]))
    assert shapes == [(2, 6)]
    shapes.clear()
    list(Predictor(model, tokenizer)(["the film was good", "we saw a very very sad and bad film"]))
    assert sorted(shapes) == [(1, 6), (1, 8), (1, 11)]


def test_a_list_is_read_in_full_batches_of_like_lengths_and_answered_in_order(model, tokenizer):
    predictor = Predictor(model, tokenizer)
    draw = random.Random(0)
    texts = [" ".join(draw.choices(NEUTRAL, k=draw.randint(1, 40))) for _ in range(50)]
    shapes = count_passes(model)
    answers = list(predictor(texts, ["strength"], batch_size=8))
    assert [rows for rows, _ in shapes] == [8] * 6 + [2]
    assert [length for _, length in shapes] == sorted(length for _, length in shapes)
    for text, answer in zip(texts, answers, strict=True):
        assert answer["strength"] == pytest.approx(next(predictor([text], ["strength"]))["strength"], abs=2e-4)


def test_a_stream_is_read_batch_by_batch(model, tokenizer):
    taken = []

    def stream():
        for number in range(10):
            taken.append(number)
            yield "good film" if number < 8 else ""

    answers = Predictor(model, tokenizer)(stream(), batch_size=4)
    assert taken == []
    next(answers)
    assert taken == [0, 1, 2, 3]
    assert len([next(answers) for _ in range(7)]) == 7 and len(taken) == 8
    with pytest.raises(ValueError, match="input 8 is ''"):
        next(answers)


def test_a_list_is_checked_before_anything_is_predicted(model, tokenizer):
    shapes = count_passes(model)
    with pytest.raises(ValueError, match="input 40 is ''"):
        next(Predictor(model, tokenizer)(["good"] * 40 + [""], batch_size=1))
    assert not shapes
