"""`handler.py` as the service uses it: imported from the repository, made once, called with JSON."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import pytest
from conftest import make_tokenizer
from test_schemes import KINDS, make_model

from hf_multitask.hub.handler import write_handler
from hf_multitask.hub.pipeline import MultiTaskPipeline
from hf_multitask.models.auto import SCHEMES
from hf_multitask.prediction import Predictor

ONE_OF_EACH = [next(kind for kind, (name, _) in KINDS.items() if name == scheme) for scheme in SCHEMES]
TEXTS = ["the film was good.", "we saw maria and john", "a very sad film"]


def start(folder, monkeypatch):
    """What the service does when it starts: the folder on the path, the file as a module, one handler."""
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    spec = importlib.util.spec_from_file_location("handler.EndpointHandler", folder / "handler.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "handler.EndpointHandler", module)
    spec.loader.exec_module(module)
    handler = module.EndpointHandler(str(folder))
    return lambda body: json.loads(json.dumps(handler(json.loads(json.dumps(body)))))


@pytest.fixture
def folder(tmp_path):
    make_model("hard").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def call(folder, monkeypatch):
    write_handler(folder)
    return start(folder, monkeypatch)


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_requests_are_answered_as_the_predictor_does(kind, tmp_path, tokenizer, monkeypatch):
    model = make_model(kind)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    write_handler(tmp_path)
    call = start(tmp_path, monkeypatch)
    expected = list(Predictor(model, tokenizer)(TEXTS))
    assert call({"inputs": TEXTS}) == expected
    assert call({"inputs": TEXTS[0]}) == expected[:1] == call({"inputs": TEXTS[0], "parameters": None})


def test_inputs_have_the_forms_of_json(call):
    (single,) = call({"inputs": "we saw maria"})
    (row,) = call({"inputs": {"text": "we saw maria"}})
    assert row == {name: single[name] for name in row} and len(row) == 3
    (words,) = call({"inputs": [["we", "saw", "maria"]]})
    assert list(words) == list(single)
    assert call({"inputs": []}) == []


def test_parameters_are_those_of_the_pipeline(call, folder):
    long = "we saw a very very sad film . " * 20
    parameters = {"tasks": ["tone"], "top_k": 2, "stride": 8, "batch_size": 1}
    predictor = Predictor.from_pretrained(folder, "cpu")
    expected = list(predictor([long, "good"], ["tone"], stride=8, top_k=2))
    assert call({"inputs": [long, "good"], "parameters": parameters}) == expected


def test_threads_take_turns(call, monkeypatch):
    answer, inside = MultiTaskPipeline.__call__, []

    def alone(self, *args, **options):
        inside.append(1)
        time.sleep(0.01)
        assert len(inside) == 1
        try:
            return answer(self, *args, **options)
        finally:
            inside.pop()

    monkeypatch.setattr(MultiTaskPipeline, "__call__", alone)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda text: call({"inputs": text}), TEXTS * 4))
    assert results == [call({"inputs": text}) for text in TEXTS] * 4


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, 'a request must be a JSON object with "inputs"'),
        (["good"], 'a request must be a JSON object with "inputs"'),
        ({"inputs": "good", "tasks": ["tone"]}, "not 'tasks'; options go in \"parameters\""),
        ({"inputs": "good", "parameters": ["tone"]}, '"parameters" must be a JSON object, got'),
        ({"inputs": "good", "parameters": {"task": ["tone"]}}, "no parameter 'task', did you mean 'tasks'"),
        ({"inputs": "good", "parameters": {"tasks": ["tune"]}}, "no task 'tune', did you mean 'tone'"),
        ({"inputs": "good", "parameters": {"tasks": "tone"}}, "'tasks' must be a list of names"),
        ({"inputs": "good", "parameters": {"tasks": [3]}}, "'tasks' must be a list of names"),
        ({"inputs": "good", "parameters": {"tasks": {"tone": 1}}}, "'tasks' must be a list of names"),
        ({"inputs": "good", "parameters": {"batch_size": 1.5}}, "'batch_size' must be a whole number"),
        ({"inputs": "good", "parameters": {"batch_size": "8"}}, "'batch_size' must be a whole number"),
        ({"inputs": "good", "parameters": {"batch_size": 10**9}}, "'batch_size' must be a whole number from 1 to 512"),
        ({"inputs": "good", "parameters": {"top_k": True}}, "'top_k' must be a whole number"),
        ({"inputs": "good", "parameters": {"stride": [1]}}, "'stride' must be a whole number"),
        ({"inputs": "good", "parameters": {"generate_kwargs": 3}}, "'generate_kwargs' must be a JSON object"),
        ({"inputs": ["good"] * 1025}, "1,024 inputs, this one has 1,025"),
        ({"inputs": "good " * 10**6}, "4,000,000 characters"),
        ({"inputs": {"text": "good", "more": ["x" * 10**6] * 5}}, "4,000,000 characters"),
        ({"inputs": "good", "parameters": {"generate_kwargs": {"x" * (5 * 10**6): 1}}}, "4,000,000 characters"),
    ],
)
def test_bad_requests_are_named_and_the_next_is_answered(call, body, message):
    with pytest.raises(ValueError, match=message) as error:
        call(body)
    assert len(str(error.value)) < 2000
    assert len(call({"inputs": "good"})) == 1


@pytest.mark.parametrize("bad", ["", None, 3, [3], {"text": 3}, {"wrong": "good"}, [], {}, [[["deep"]]], True])
def test_an_input_that_cannot_be_read_does_not_fail_the_others(call, bad):
    good = call({"inputs": TEXTS})
    answers = call({"inputs": [TEXTS[0], bad, *TEXTS[1:]]})
    assert list(answers[1]) == ["error"] and answers[1]["error"]
    assert [answers[0], *answers[2:]] == good
    assert list(call({"inputs": [bad]})[0]) == ["error"]


def test_numbers_that_json_lacks_are_null(call, monkeypatch):
    odd = {"tone": float("nan"), "all": [{"score": float("inf")}, 1.0]}
    monkeypatch.setattr(MultiTaskPipeline, "__call__", lambda self, inputs, **options: [odd for _ in inputs])
    assert call({"inputs": "good"}) == [{"tone": None, "all": [{"score": None}, 1.0]}]


def test_the_files_are_written_where_a_model_is_and_replace_nothing(folder, tmp_path_factory):
    before = {path.name for path in folder.iterdir()}
    handler, requirements = write_handler(folder)
    assert {path.name for path in folder.iterdir()} - before == {"handler.py", "requirements.txt"}
    assert requirements.read_text() == f"hf_multitask=={version('hf_multitask')}\n"
    assert write_handler(folder) == [handler, requirements]
    requirements.write_text("torch\n")
    handler.unlink()
    with pytest.raises(FileExistsError, match="requirements.txt is there already and says something else"):
        write_handler(folder)
    assert not handler.exists() and requirements.read_text() == "torch\n"
    with pytest.raises(FileNotFoundError, match="holds no model: it has no config.json"):
        write_handler(tmp_path_factory.mktemp("empty"))
