from __future__ import annotations

import pytest
import torch
from conftest import BACKBONES, make_tasks, make_tokenizer

from hf_multitask import HardSharingModel, Task
from hf_multitask.models.passes import Segment
from hf_multitask.prediction import Predictor

TEXTS = ["the film was good.", "we saw maria and john", "a very very sad film, and it was bad"]


@pytest.fixture
def predictor(model, tokenizer):
    return Predictor(model, tokenizer)


def test_every_task_is_answered_from_one_pass(predictor):
    passes = []
    predictor.model.backbone.register_forward_hook(lambda *args: passes.append(1))
    answers = list(predictor(TEXTS))
    assert len(passes) == 1 and len(answers) == 3
    assert all(list(answer) == ["tone", "strength", "traits", "names"] for answer in answers)


def test_answers_are_the_model_s(predictor, tokenizer):
    answers = list(predictor(TEXTS))
    for text, answer in zip(TEXTS, answers, strict=True):
        with torch.no_grad():
            logits = predictor.model(**tokenizer(text, return_tensors="pt")).logits
        probabilities = logits["tone"][0].softmax(-1)
        assert answer["tone"]["label"] == ("negative", "positive")[int(probabilities.argmax())]
        assert answer["tone"]["score"] == pytest.approx(float(probabilities.max()), abs=1e-4)
        assert answer["strength"] == pytest.approx(float(logits["strength"]), abs=1e-4)
        likely = {k: p for k, p in zip(("long", "happy", "sad"), logits["traits"][0].sigmoid().tolist(), strict=True)}
        assert {a["label"] for a in answer["traits"]} == {k for k, p in likely.items() if p > 0.5}


def test_batches_and_order_do_not_matter(predictor):
    whole, single = list(predictor(TEXTS)), list(predictor(TEXTS, batch_size=1))
    for a, b in zip(whole, single, strict=True):
        assert a["tone"]["label"] == b["tone"]["label"] and a["strength"] == pytest.approx(b["strength"], abs=1e-3)


def trained_on_names(tokenizer) -> Predictor:
    """A model whose token head is set by hand: a word's own embedding decides its tag."""
    names = ("O", "B-person", "I-person", "B-place")
    torch.manual_seed(0)
    model = HardSharingModel.from_backbone(
        BACKBONES["bert"](), [Task("names", "token_classification", labels=names, head="linear")]
    )
    tags = {"maria": 1, "john": 2, "paris": 3}

    def tag(input_ids=None, **kwargs):
        scores = torch.zeros(*input_ids.shape, 32)
        for row, ids in enumerate(input_ids.tolist()):
            for place, word in enumerate(tokenizer.convert_ids_to_tokens(ids)):
                scores[row, place, tags.get(word, 0)] = 10.0
        return type("Encoded", (dict,), {"last_hidden_state": scores})()

    model.encode = tag
    with torch.no_grad():
        model.heads["names"].layers[1].weight.copy_(torch.eye(4, 32))
        model.heads["names"].layers[1].bias.zero_()
    return Predictor(model, tokenizer)


def test_entities_have_the_characters_they_cover(tokenizer):
    text = "we saw maria john, and paris."
    (answer,) = trained_on_names(tokenizer)([text])
    found = [(e["label"], e["text"], text[e["start"] : e["end"]]) for e in answer["names"]]
    assert found == [("person", "maria john", "maria john"), ("place", "paris", "paris")]
    assert all(0.99 < e["score"] <= 1 for e in answer["names"])


def test_given_words_are_counted_in_words(tokenizer):
    (answer,) = trained_on_names(tokenizer)([["we", "saw", "maria", "john", "zzz", "paris"]])
    assert [(e["text"], e["start"], e["end"]) for e in answer["names"]] == [("maria john", 2, 4), ("paris", 5, 6)]


def test_an_inside_tag_that_continues_nothing_begins_an_entity(tokenizer):
    (answer,) = trained_on_names(tokenizer)(["john and paris john"])
    assert [(e["label"], e["text"]) for e in answer["names"]] == [
        ("person", "john"),
        ("place", "paris"),
        ("person", "john"),
    ]


def test_text_beyond_the_longest_input_is_cut(tokenizer):
    predictor = trained_on_names(tokenizer)
    (answer,) = predictor(["paris " * 200])
    assert len(answer["names"]) == predictor.max_length - 2


def test_pairs_rows_and_words_are_read(tokenizer, bert):
    task = Task("same", "regression", text_columns=("one", "two"))
    predictor = Predictor(HardSharingModel.from_backbone(bert, [task]), tokenizer)
    pair, row = predictor([("the film", "a film"), {"one": "the film", "two": "a film", "extra": 3}])
    assert pair == row
    with pytest.raises(ValueError, match="'same' reads a pair of texts, got 1"):
        list(predictor(["the film"]))
    with pytest.raises(ValueError, match="keys \\['one'\\]; the tasks read one, two"):
        list(predictor([{"one": "the film"}]))


def test_auxiliary_tasks_are_not_predicted(bert, tokenizer):
    tasks = make_tasks()
    tasks[1] = Task("strength", "regression", dataset="reviews", label_column="strength", auxiliary=True)
    (answer,) = Predictor(HardSharingModel.from_backbone(bert, tasks), tokenizer)(["good"])
    assert "strength" not in answer and "tone" in answer


@pytest.mark.parametrize("text", ["", "  ", 3, None, [], ["a", 3]])
def test_what_is_no_text_is_refused(predictor, text):
    with pytest.raises(ValueError, match="input 1 is"):
        list(predictor(["good", text]))


def test_unknown_tasks_are_named(predictor):
    with pytest.raises(ValueError, match="no task 'tune', did you mean 'tone'"):
        list(predictor(TEXTS, ["tune"]))


def test_nothing_gives_nothing(predictor):
    assert list(predictor([])) == []


def test_multi_label_scores_are_probabilities_above_a_half(predictor):
    with torch.no_grad():
        predictor.model.heads["traits"].layers[-1].bias.copy_(torch.tensor([5.0, -5.0, 5.0]))
    (answer,) = predictor(["good"], ["traits"])
    assert [a["label"] for a in answer["traits"]] == ["long", "sad"]
    assert all(0.5 < a["score"] <= 1 for a in answer["traits"])


def test_a_slow_tokenizer_is_refused(model, tokenizer):
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="fast tokenizer"):
        Predictor(model, Slow())
    assert make_tokenizer().is_fast and Segment(0, 1, 1).rows == 1


def test_each_task_reads_its_own_columns_and_the_length_it_was_trained_on(bert, tokenizer):
    torch.manual_seed(0)
    tasks = [
        Task("x", "regression", text_columns=("title",)),
        Task("y", "regression", text_columns=("body",), max_length=6),
        Task("z", "regression", text_columns=("title", "body")),
    ]
    predictor = Predictor(HardSharingModel.from_backbone(bert, tasks), tokenizer)
    title, body = "the film was good", "we saw maria and john and it was very bad"
    (answer,) = predictor([{"title": title, "body": body}])
    alone = {"x": (title,), "y": (body,), "z": (title, body)}
    for name, texts in alone.items():
        length = 6 if name == "y" else 64
        with torch.no_grad():
            inputs = tokenizer(*texts, return_tensors="pt", truncation=True, max_length=length)
            expected = predictor.model(**inputs).logits[name]
        assert answer[name] == pytest.approx(float(expected), abs=1e-4), name
    assert set(next(predictor([(title, body)]))) == {"z"} and set(next(predictor([title]))) == {"x", "y"}
    assert set(next(predictor([{"body": body}]))) == {"y"}
    with pytest.raises(ValueError, match="'z' reads a pair of texts, got 1"):
        list(predictor([title], ["z"]))
