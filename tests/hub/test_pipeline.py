"""`pipeline("multi-task")`: what Predictor answers, through Transformers' own door."""

from __future__ import annotations

import types

import pytest
import torch
from conftest import BACKBONES, make_tokenizer
from datasets import Dataset
from language import decoder_tokenizer
from language_models import make_plain
from test_schemes import KINDS, make_model
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

from hf_multitask import HardSharingModel, Task
from hf_multitask.hub.pipeline import MultiTaskPipeline
from hf_multitask.prediction import Predictor

TEXTS = ["the film was good.", "we saw maria and john", "a very very sad film, and it was bad"]


@pytest.fixture
def ask(model, tokenizer):
    return pipeline("multi-task", model=model, tokenizer=tokenizer, device="cpu")


def save(model, folder, tokenizer=None):
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_every_scheme_answers_from_its_folder_as_the_predictor_does(kind, tmp_path, tokenizer):
    model = make_model(kind)
    loaded = pipeline("multi-task", model=save(model, tmp_path), device="cpu")
    assert isinstance(loaded, MultiTaskPipeline) and loaded.task == "multi-task"
    answers = loaded(TEXTS, batch_size=2)
    assert answers == list(Predictor(model, tokenizer)(TEXTS))
    assert all(list(answer) == ["tone", "strength", "traits", "names"] for answer in answers)
    loaded.save_pretrained(tmp_path / "again")  # and comes back without trust in code
    assert pipeline("multi-task", model=tmp_path / "again", device="cpu")(TEXTS) == answers


def test_all_tasks_take_one_pass_of_the_encoder(ask):
    passes = []
    ask.model.backbone.register_forward_hook(lambda *args: passes.append(1))
    ask(TEXTS)
    assert len(passes) == 1
    ask(TEXTS, batch_size=1)
    assert len(passes) == 4


def test_what_comes_in_says_what_comes_out(ask, bert, tokenizer):
    single, many = ask(TEXTS[0]), ask(TEXTS)
    assert isinstance(single, dict) and isinstance(many, list) and many[0] == single
    assert ask([TEXTS[0]]) == [single] and ask([]) == []
    assert ask({"text": TEXTS[0]}) == {name: single[name] for name in ("tone", "strength", "traits")}
    (words,) = ask([["we", "saw", "maria"]])
    assert list(words) == list(single)
    with torch.no_grad():
        ask.model.heads["names"].layers[-1].bias.copy_(torch.tensor([0.0, 9.0, 0.0]))
    (words,) = ask([["we", "saw", "maria"]], tasks=["names"])
    assert [(e["text"], e["start"], e["end"]) for e in words["names"]] == [("we", 0, 1), ("saw", 1, 2), ("maria", 2, 3)]
    text = "we saw, maria"
    found = ask(text, tasks=["names"])["names"]
    assert [(e["text"], text[e["start"] : e["end"]]) for e in found] == [(w, w) for w in ("we", "saw", ",", "maria")]


def test_pairs_come_as_tuples_and_rows(bert, tokenizer):
    torch.manual_seed(0)
    tasks = [Task("same", "regression", text_columns=("one", "two")), Task("tone", "regression")]
    model = HardSharingModel.from_backbone(bert, tasks)
    ask = pipeline("multi-task", model=model, tokenizer=tokenizer, device="cpu")
    forms = [("the film", "a film"), {"text": "the film", "text_pair": "a film"}, {"one": "the film", "two": "a film"}]
    assert [ask(form) for form in forms] == ask(forms) == [ask(forms[0])] * 3
    assert list(ask(forms[0])) == ["same"] and list(ask("the film")) == ["tone"]


@pytest.mark.parametrize("kind", ["generator", "iterator", "dataset", "column", "torch dataset"])
def test_streams_come_out_as_streams(ask, kind):
    rows = Dataset.from_dict({"text": TEXTS, "label": [0, 1, 2]})
    given = {
        "generator": (text for text in TEXTS),
        "iterator": iter(TEXTS),
        "dataset": rows,
        "column": rows["text"],
        "torch dataset": KeyDataset(rows, "text"),
    }[kind]
    answers = ask(given, tasks=["tone"], batch_size=2)
    assert list(answers) == ask(TEXTS, tasks=["tone"], batch_size=2)
    assert isinstance(answers, (list, types.GeneratorType)) and (kind == "column" or not isinstance(answers, list))


def test_options_hold_from_the_beginning_and_for_one_call(model, tokenizer):
    ask = pipeline(
        "multi-task",
        model=model,
        tokenizer=tokenizer,
        device="cpu",
        tasks=["tone"],
        top_k=2,
        batch_size=2,
        max_length=12,
    )
    assert list(ask("good")) == ["tone"] and len(ask("good")["tone"]) == 2
    assert list(ask("good", tasks=["strength"])) == ["strength"]
    assert isinstance(ask("good", top_k=None)["tone"], dict) and len(ask("good")["tone"]) == 2
    passes = []
    ask.model.backbone.register_forward_hook(lambda *args: passes.append(1))
    ask(["good"] * 6)
    assert len(passes) == 3
    long = "we saw a very sad film " * 6
    with torch.no_grad():
        model.heads["strength"].layers[-1].weight.mul_(50)
    cut, whole = (ask(long, tasks=["strength"], stride=stride) for stride in (None, 4))
    assert whole == next(Predictor(model, tokenizer, 12)([long], ["strength"], stride=4)) != cut


def test_text_is_written_with_generate_kwargs():
    task = Task("say", "causal_lm", prompt="say {text}", label_column="reply")
    model = HardSharingModel.from_backbone(make_plain("llama, tied"), [task])
    ask = pipeline("multi-task", model=model, tokenizer=decoder_tokenizer(), device="cpu")
    short, longer = (ask("the film", generate_kwargs={"max_new_tokens": n})["say"]["text"].split() for n in (1, 6))
    assert len(short) == 1 and longer[:1] == short and len(longer) > 1


def test_one_step_after_the_other_gives_the_same(ask):
    steps = ask.postprocess(ask.forward(ask.preprocess(TEXTS[0]), tasks=["tone"]))
    assert steps == ask(TEXTS[0], tasks=["tone"])


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("good", {"tasks": ["tune"]}, "no task 'tune', did you mean 'tone'"),
        ("", {}, "input 0 is ''; a text must be a non-empty string"),
        (["good", "  "], {}, "input 1 is '  '"),
        (["good", None], {}, "input 1 is None"),
        (["good", 3], {}, "input 1 is 3"),
        (["good", b"bad"], {}, "input 1 is b'bad'"),
        (["good", []], {}, r"input 1 is \[\]"),
        (3, {}, "input is 3; it must be a text, a pair as a tuple, a row, or a list"),
        (None, {}, "input is None; it must be"),
        (b"good", {}, "input is b'good'; it must be"),
        ({"title": "good"}, {}, r"input 0 has the keys \['title'\]; the tasks read text, tokens"),
        ("good", {"task": "tone"}, "no option 'task'; it has tasks, batch_size, stride, top_k, generate_kwargs"),
        ("good", {"num_workers": 2}, "num_workers is not for this pipeline"),
        ("good", {"stride": "x"}, "stride must be a whole number from 0, got 'x'"),
        ("good", {"top_k": 0}, "top_k must be a whole number from 1, got 0"),
        ("good", {"generate_kwargs": {"max_new_tokens": 2}}, "generate_kwargs is for tasks that write"),
    ],
)
def test_bad_input_is_named(ask, given, options, message):
    with pytest.raises(ValueError, match=message):
        ask(given, **options)


def test_options_go_by_name(ask):
    with pytest.raises(ValueError, match="options go by name"):
        ask("good", ["tone"])


def test_texts_that_are_cut_are_told_once(ask, caplog):
    ask(["film " * 200, "good", "film " * 90])
    (message,) = [record.getMessage() for record in caplog.records if "cut" in record.getMessage()]
    assert "2 of 3 texts were cut" in message and "stride=..." in message


def test_models_of_other_kinds_are_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="BertModel is no multi-task model"):
        pipeline("multi-task", model=BACKBONES["bert"](), tokenizer=tokenizer, device="cpu")
    folder = save(BACKBONES["bert"](), tmp_path)
    with pytest.raises(ValueError, match="BertModel is no multi-task model"):
        pipeline("multi-task", model=folder, device="cpu")


def test_a_tokenizer_that_is_missing_is_named(model, tmp_path):
    with pytest.raises(Exception, match="Impossible to guess which tokenizer to use"):
        pipeline("multi-task", model=model, device="cpu")
    with pytest.raises(ValueError, match="there is no tokenizer: give the one that the model was trained with"):
        MultiTaskPipeline(model)
    model.save_pretrained(tmp_path)
    with pytest.raises((ValueError, OSError), match="okenizer"):
        pipeline("multi-task", model=str(tmp_path), device="cpu")
