from __future__ import annotations

import json

import pytest
import torch
from conftest import BACKBONES, make_tasks, make_tokenizer
from language import decoder_tokenizer
from language_models import make_plain
from typer.testing import CliRunner

from hf_multitask import HardSharingModel, Task
from hf_multitask.cli.app import app
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


def test_hidden_words_are_no_answers(bert, tokenizer):
    words = Task("words", "masked_lm")
    tone = Task("tone", "single_label_classification", labels=("negative", "positive"))
    both = Predictor(HardSharingModel.from_backbone(bert, [words, tone]), tokenizer)
    assert [list(answer) for answer in both(TEXTS)] == [["tone"]] * 3
    with pytest.raises(ValueError, match="no task 'words'; tasks are tone"):
        list(both(TEXTS, tasks=["words"]))
    with pytest.raises(ValueError, match="none of the model's tasks says something about a text: they are masked_lm"):
        Predictor(HardSharingModel.from_backbone(bert, [words]), tokenizer)


def test_batches_and_order_do_not_matter(predictor):
    whole, single = list(predictor(TEXTS)), list(predictor(TEXTS, batch_size=1))
    for a, b in zip(whole, single, strict=True):
        assert a["tone"]["label"] == b["tone"]["label"] and a["strength"] == pytest.approx(b["strength"], abs=1e-3)


def trained_on_names(tokenizer, names=("O", "B-person", "I-person", "B-place")) -> Predictor:
    """A model whose token head is set by hand: a word's own embedding decides its tag."""
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


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("O", "B-person", "E-person", "S-place"), [("person", "maria john"), ("place", "paris"), ("place", "paris")]),
        (("O", "B_person", "L_person", "U_place"), [("person", "maria john"), ("place", "paris"), ("place", "paris")]),
        (
            ("O", "I-person", "I-person2", "I-place"),
            [("person", "maria"), ("person2", "john"), ("place", "paris paris")],
        ),
        (("O", "B", "I", "S"), [("names", "maria john"), ("names", "paris"), ("names", "paris")]),
        (
            (".", "NOUN", "OBJ", "O"),
            [(".", "and"), ("NOUN", "maria"), ("OBJ", "john"), ("O", "paris"), ("O", "paris")],
        ),
    ],
)
def test_answers_are_the_entities_that_the_metric_counts(tokenizer, names, expected):
    (answer,) = trained_on_names(tokenizer, names)(["and maria john paris paris"])
    assert [(e["label"], e["text"]) for e in answer["names"]] == expected


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


# ---- questions and choices ----


def by_hand(tokenizer, **options) -> Predictor:
    """A model that answers with `maria`, or `maria john`, and prefers choices that say `good` and little else."""
    tasks = [
        Task("who", "question_answering", head="linear", stride=4, max_length=16, **options),
        Task("next", "multiple_choice", head="linear", text_columns=("sent1", "sent2"), choice_columns=("a", "b")),
        Task("best", "multiple_choice", head="linear", pooling="mean"),
    ]
    torch.manual_seed(0)
    model = HardSharingModel.from_backbone(BACKBONES["bert"](), tasks)
    numbers = {"maria": 0, "john": 1, "good": 2, "[CLS]": 3}

    def mark(input_ids=None, **kwargs):
        hidden = torch.zeros(*input_ids.shape, 32)
        for row, ids in enumerate(input_ids.tolist()):
            for place, word in enumerate(tokenizer.convert_ids_to_tokens(ids)):
                if word in numbers:
                    hidden[row, place, numbers[word]] = 10.0
        return type("Encoded", (dict,), {"last_hidden_state": hidden})()

    model.encode = mark
    with torch.no_grad():
        for head in model.heads.values():
            head.layers[1].weight.zero_()
            head.layers[1].bias.zero_()
        # An answer begins with maria and ends with john or maria; CLS wins where there is neither.
        model.heads["who"].layers[1].weight[0, 0] = model.heads["who"].layers[1].weight[1, 1] = 1.0
        model.heads["who"].layers[1].weight[1, 0] = 0.5
        model.heads["who"].layers[1].weight[:, 3] = 0.3
        for name in ("next", "best"):
            model.heads[name].layers[1].weight[0, 2] = 4.0
    return Predictor(model, tokenizer)


CONTEXTS = {
    "short": ("we saw maria , it was good", "maria"),
    "two words": ("we saw maria john , it was good", "maria john"),
    "late": (
        "we saw a film and it was very very good . we saw paris and then london and maria john again",
        "maria john",
    ),
    "nobody": ("we saw a film and it was very very good . we saw paris and then london again", ""),
}


@pytest.mark.parametrize("case", CONTEXTS)
def test_answers_lie_in_the_context_however_long_it_is(tokenizer, case):
    context, expected = CONTEXTS[case]
    predictor = by_hand(tokenizer)
    (answer,) = predictor([("we saw", context)], ["who"])
    found = answer["who"]
    assert list(found) == ["answer", "start", "end", "score"] and 0.7 < found["score"] <= 1
    assert found["answer"] == expected == context[found["start"] : found["end"]]
    assert list(predictor([{"question": "we saw", "context": context}])) == [answer]


def test_answers_do_not_depend_on_batches(tokenizer):
    predictor = by_hand(tokenizer)
    inputs = [("we saw", context) for context, _ in CONTEXTS.values()]
    expected = [{"who": answer} for _, answer in CONTEXTS.values()]
    for size in (1, 2, 32):
        found = list(predictor(inputs, batch_size=size))
        assert [{"who": answer["who"]["answer"]} for answer in found] == expected


def test_an_answer_has_no_more_tokens_than_the_task_allows(tokenizer):
    context, _ = CONTEXTS["two words"]
    (answer,) = by_hand(tokenizer, max_answer_length=1)([("we saw", context)])
    assert answer["who"]["answer"] == "maria"


def test_choices_are_chosen_from_lists_and_columns(tokenizer):
    predictor = by_hand(tokenizer)
    choices = ["a film", "good", "a very very good film", "good film"]
    (answer,) = predictor([("we saw", choices)])
    assert list(answer) == ["best"] and answer["best"] == {
        "label": 1,
        "choice": "good",
        "score": answer["best"]["score"],
    }
    assert list(predictor([{"question": "we saw", "choices": choices}])) == [answer]
    row = {"sent1": "we saw a film .", "sent2": "it was", "a": "bad", "b": "good", "label": 0}
    (answer,) = predictor([row])
    assert list(answer) == ["next"] and (answer["next"]["label"], answer["next"]["choice"]) == (1, "good")
    assert list(predictor([("we saw a film .", "it was", ["bad", "good"])])) == [answer]


def test_rows_with_fewer_choices_share_a_batch(tokenizer):
    predictor = by_hand(tokenizer)
    inputs = [("we saw", texts) for texts in (["bad", "good"], ["good", "bad", "sad", "a"], ["sad", "bad", "good"])]
    whole, single = list(predictor(inputs)), list(predictor(inputs, batch_size=1))
    assert [answer["best"]["label"] for answer in whole] == [1, 0, 2]
    assert whole == single
    probabilities = torch.tensor([10.0 * 4 / 5, 0.0]).softmax(-1)  # of five tokens one is `good`
    assert whole[0]["best"]["score"] == pytest.approx(float(probabilities[0]), abs=1e-3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("we saw", ["good"]), "row 1 of column 'choices' holds \\['good'\\]; there must be at least two choices"),
        (("we saw", ["good", " "]), "choice 1 in row 1 of column 'choices' is ' '"),
        (("we saw", []), "input 1 is \\[\\]; a text must be"),
        (("we saw", ["good", 3]), "input 1 is \\['good', 3\\]; a text must be"),
        ((["we"], ["saw"]), "input 1 is \\['we'\\]; task 'who' reads plain strings, not words"),
        ("we saw", "input 1: task 'who' reads a pair of texts, got 1"),
        (("a", "b", "c"), "input 1: task 'who' reads a pair of texts, got 3"),
        (
            {"question": "we saw"},
            "input 1 has the keys \\['question'\\]; the tasks read a, b, choices, context, question",
        ),
        (("we saw " * 9, "maria"), "the question in row 1 of column 'question' has 18 tokens; max_length=16 leaves 0"),
    ],
)
def test_what_is_no_question_is_named(tokenizer, given, message):
    with pytest.raises(ValueError, match=message):
        list(by_hand(tokenizer)([("we saw", "maria"), given]))


def test_a_pair_and_a_choice_are_told_apart(tokenizer, bert):
    tasks = [
        Task("same", "regression", text_columns=("one", "two")),
        Task("best", "multiple_choice"),
        Task("who", "question_answering", stride=4),
    ]
    predictor = Predictor(HardSharingModel.from_backbone(bert, tasks), tokenizer)
    assert list(next(predictor([("the film", "a film")]))) == ["same", "who"]
    assert list(next(predictor([("the film", ["a", "b"])]))) == ["best"]
    with pytest.raises(ValueError, match="task 'best' reads one text and a list of choices, got 2"):
        list(predictor([("the film", "a film")], ["best"]))


# ---- options ----


def test_scores_of_all_labels_are_given_on_request(predictor, tokenizer):
    text = "the film was good"
    with torch.no_grad():
        logits = predictor.model(**tokenizer(text, return_tensors="pt")).logits
    (answer,) = predictor([text], top_k=9)
    tone = sorted(zip(logits["tone"][0].softmax(-1).tolist(), ("negative", "positive"), strict=True), reverse=True)
    traits = sorted(zip(logits["traits"][0].sigmoid().tolist(), ("long", "happy", "sad"), strict=True), reverse=True)
    for name, expected in (("tone", tone), ("traits", traits)):
        assert [one["label"] for one in answer[name]] == [label for _, label in expected]
        assert [one["score"] for one in answer[name]] == pytest.approx([score for score, _ in expected], abs=1e-4)
    (plain,) = predictor([text])
    assert answer["strength"] == plain["strength"] and answer["names"] == plain["names"]
    (best,) = predictor([text], top_k=1)
    assert best["tone"] == [plain["tone"]] == answer["tone"][:1] and best["traits"] == answer["traits"][:1]


def test_the_best_choices_are_given_on_request(tokenizer):
    predictor = by_hand(tokenizer)
    first, second = predictor([("we saw", ["bad", "good", "good film"]), ("we saw", ["good", "bad"])], top_k=3)
    assert [one["choice"] for one in first["best"]] == ["good", "good film", "bad"]
    assert [one["label"] for one in second["best"]] == [0, 1]  # in a batch with more choices, of which it has two
    assert sum(one["score"] for one in first["best"]) == pytest.approx(1, abs=1e-3)


def test_questions_take_the_stride_that_is_asked_for(tokenizer):
    predictor = by_hand(tokenizer)
    seen = []
    encode = predictor.model.encode
    predictor.model.encode = lambda input_ids=None, **kwargs: seen.append(len(input_ids)) or encode(input_ids, **kwargs)
    context, expected = CONTEXTS["late"]
    windows = {}
    for stride in (None, 0, 4, 9):
        seen.clear()
        (answer,) = predictor([("we", context)], ["who"], stride=stride)
        assert answer["who"]["answer"] == expected, stride
        windows[stride] = sum(seen)
    assert windows[0] <= windows[4] == windows[None] < windows[9]  # the task's own is 4
    with pytest.raises(ValueError, match="stride"):
        list(predictor([("we", context)], ["who"], stride=12))


def decoder() -> Predictor:
    tasks = [
        Task("say", "causal_lm", prompt="say {text}", label_column="reply", generation={"max_new_tokens": 3}),
        Task("mood", "causal_lm", prompt="mood {text}", label_column="mood", labels=("good", "bad", "sad")),
        Task("tone", "single_label_classification", labels=("negative", "positive")),
    ]
    model = make_plain("llama, tied")
    return Predictor(HardSharingModel.from_backbone(model, tasks), decoder_tokenizer())


def test_what_is_written_follows_generate_kwargs():
    predictor = decoder()
    texts = ["the film", "we saw maria"]
    usual = [answer["say"]["text"].split() for answer in predictor(texts)]
    short = [answer["say"]["text"].split() for answer in predictor(texts, generate_kwargs={"max_new_tokens": 1})]
    longer = [answer["say"]["text"].split() for answer in predictor(texts, generate_kwargs={"max_new_tokens": 9})]
    for one, few, many in zip(usual, short, longer, strict=True):
        assert few == one[:1] and many[: len(one)] == one and len(many) > len(one)
    assert [answer["say"]["text"].split() for answer in predictor(texts)] == usual  # nothing is left behind


def test_a_closed_set_is_ranked(tokenizer):
    (answer,) = decoder()(["the film"], ["mood"], top_k=5)
    assert sorted(one["label"] for one in answer["mood"]) == ["bad", "good", "sad"]
    assert sum(one["score"] for one in answer["mood"]) == pytest.approx(1, abs=1e-3)
    (best,) = decoder()(["the film"], ["mood"])
    assert best["mood"] == answer["mood"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generate_kwargs": {"max_new_tokenz": 3}}, "no argument 'max_new_tokenz', did you mean 'max_new_tokens'"),
        ({"generate_kwargs": {"num_return_sequences": 3}}, "num_return_sequences"),
        (
            {"generate_kwargs": {"max_new_tokens": 3}, "tasks": ["tone", "mood"]},
            "generate_kwargs is for tasks that write, and none of tone, mood does",
        ),
    ],
)
def test_arguments_of_generate_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        list(decoder()(["the film"], **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": -1}, "stride must be a whole number from 0, got -1"),
        ({"stride": True}, "stride must be a whole number from 0, got True"),
        ({"top_k": 0}, "top_k must be a whole number from 1, got 0"),
        ({"top_k": "2"}, "top_k must be a whole number from 1, got '2'"),
        ({"batch_size": 0}, "batch_size must be a whole number from 1, got 0"),
        ({"tasks": "tone"}, r"tasks must be a list of names, got 'tone'; write \['tone'\]"),
    ],
)
def test_options_are_checked(predictor, options, message):
    with pytest.raises(ValueError, match=message):
        list(predictor(["good"], **options))


@pytest.mark.parametrize("texts", ["good", b"good", {"text": "good"}, None, 3])
def test_one_text_is_no_list_of_texts(predictor, texts):
    with pytest.raises(ValueError, match="texts must be a list or another iterable of texts, got"):
        list(predictor(texts))


def test_rows_may_name_texts_as_transformers_does(bert, tokenizer):
    tasks = [Task("x", "regression", text_columns=("title",)), Task("y", "regression", text_columns=("one", "two"))]
    predictor = Predictor(HardSharingModel.from_backbone(bert, tasks), tokenizer)
    pair, single = predictor([{"text": "the film", "text_pair": "a film"}, {"text": "the film"}])
    assert (pair, single) == tuple(predictor([("the film", "a film"), "the film"]))
    assert list(pair) == ["y"] and list(single) == ["x"]


def test_a_model_and_a_tokenizer_that_belong_together_are_needed(model, tokenizer):
    with pytest.raises(ValueError, match="BertModel is no multi-task model; load one with AutoModelForMultiTask"):
        Predictor(BACKBONES["bert"](), tokenizer)
    with pytest.raises(ValueError, match="there is no tokenizer: give the one that the model was trained with"):
        Predictor(model, None)
    with pytest.raises(ValueError, match="max_length must be a whole number from 1, got 0"):
        Predictor(model, tokenizer, 0)
    other = make_tokenizer()
    other.add_tokens([f"word{number}" for number in range(20)])
    with pytest.raises(ValueError, match="the tokenizer has 102 tokens, the backbone embeddings for 90"):
        Predictor(model, other)


def test_what_is_no_saved_multi_task_model_is_named(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Predictor.from_pretrained(tmp_path / "nowhere")
    BACKBONES["bert"]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a 'bert' model, which is no multi-task model"):
        Predictor.from_pretrained(tmp_path)


# ---- the command line ----


def run_predict(*arguments):
    return CliRunner().invoke(app, ["predict", *map(str, arguments)])


def test_the_command_has_the_same_options(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = "we saw a very very sad film . " * 12
    done = run_predict(tmp_path, "--text", text, "--stride", 8, "--top-k", 2, "--device", "cpu", "--task", "tone")
    (expected,) = Predictor(model, tokenizer)([text], ["tone"], stride=8, top_k=2)
    assert json.loads(done.stdout) == {"text": text, **expected} and len(expected["tone"]) == 2
    assert "cut" not in done.stderr
    (cut,) = Predictor(model, tokenizer)([text], ["tone"])
    done = run_predict(tmp_path, "--text", text, "--task", "tone")
    assert json.loads(done.stdout) == {"text": text, **cut}


@pytest.mark.parametrize("device", ["tpu9", "cuda:77"])
def test_a_device_that_is_not_there_is_one_line(model, tokenizer, tmp_path, device):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    done = run_predict(tmp_path, "--text", "good", "--device", device)
    assert done.exit_code == 1 and f"device '{device}' cannot be used" in done.output
    assert "Traceback" not in done.output
