"""What came from somebody else runs no code, reaches no file outside its folder and fills no memory: it is refused."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import shutil
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from conftest import BACKBONES, make_tasks
from hostile import KINDS, answers, nested, save_model, write_json
from safetensors.torch import load_file, save_file
from test_layout import MODULES, parse
from transformers.utils import logging

from hf_multitask import AutoModelForMultiTask, Task, archives
from hf_multitask.archives import ArchiveError, check_sha256, read_tar, read_zip
from hf_multitask.checkpointing import incompleteness
from hf_multitask.models import saved_config
from hf_multitask.models.auto import SCHEMES
from hf_multitask.models.limits import MOST_LABELS, MOST_TASKS
from hf_multitask.models.manifest import MANIFEST_NAME, write_manifest
from hf_multitask.models.task import check_tasks
from hf_multitask.recipe import load_recipe
from hf_multitask.recipe_file import parse_yaml

EVERY_KIND = pytest.mark.parametrize("kind", KINDS)

# ---- what the source does not use ----

_MODULES = {
    "pickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "subprocess",
    "tarfile",
    "zipfile",
}
_MODULES |= {"ctypes", "pty", "telnetlib", "code", "runpy", "xmlrpc"}
_NAMES = {"eval", "exec", "compile", "__import__", "execfile"}
_ATTRIBUTES = {"torch.load", "torch.save", "np.load", "numpy.load", "pd.read_pickle", "os.system", "os.popen"}
_ATTRIBUTES |= {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "shutil.unpack_archive"}
_METHODS = {"extractall", "extract", "read_pickle", "to_pickle", "unsafe_load"}
# What is used all the same, and why.
ALLOWED = {
    ("quickstart", "subprocess"),  # pip, which fetches what is pinned by version and hash
    ("quickstart", "zipfile"),  # opens a wheel; its members are taken by hf_multitask.archives
    ("archives", "zipfile"),
    ("archives", "tarfile"),
    ("recipe_file", "yaml.load"),  # with a SafeLoader
    ("recipe", "trust_remote_code=True"),  # where whoever runs the recipe has said so, never the recipe itself
}


def dangers(tree: ast.AST) -> set[str]:
    """Return what code uses of what could run other code, or write files by names from an archive."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names} & _MODULES
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {(node.module or "").split(".")[0]} & _MODULES
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & _ATTRIBUTES
        elif isinstance(node, ast.Attribute):
            found |= {ast.unparse(node)} & _ATTRIBUTES
            found |= {node.attr} & _METHODS
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found |= {node.func.id} & _NAMES
        elif (
            isinstance(node, ast.keyword)
            and node.arg in ("allow_pickle", "shell")
            and ast.unparse(node.value) != "False"
        ):
            found.add(f"{node.arg}=")
        elif isinstance(node, ast.keyword) and node.arg == "weights_only" and ast.unparse(node.value) == "False":
            found.add("weights_only=False")
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and ast.unparse(node.value) == "True":
            found.add("trust_remote_code=True")
    return found


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import torch\ntorch.load(p)", {"torch.load"}),
        ("from torch import load", {"torch.load"}),
        ("import pickle as p", {"pickle"}),
        ("from subprocess import run\nrun(x, shell=True)", {"subprocess", "shell="}),
        ("eval(x)\nmodel.eval()", {"eval"}),
        ("archive.extractall(folder)", {"extractall"}),
        ("AutoModel.from_pretrained(x, trust_remote_code=True, weights_only=False)", {"trust_remote_code=True"}),
        ("np.load(x, allow_pickle=True)", {"np.load", "allow_pickle="}),
    ],
)
def test_what_is_dangerous_is_found(code, expected):
    assert expected <= dangers(ast.parse(code))


def test_nothing_in_the_package_reads_pickles_runs_text_or_unpacks_archives():
    assert {(module, danger) for module in MODULES for danger in dangers(parse(module))} == ALLOWED


# ---- pickles ----


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def ran(tmp_path) -> Path:
    """A folder that is there once a payload ran; it is not there yet."""
    path = tmp_path / "ran"
    pickle.loads(pickle.dumps(Payload(path)))
    assert path.is_dir()
    path.rmdir()
    return path


@pytest.fixture
def saved(tmp_path):
    """A function that saves a model of some kind and returns its folder."""
    logging.disable_progress_bar()

    def save(kind: str = "hard", **more) -> Path:
        save_model(kind, tmp_path, **more)
        (tmp_path / "model" / MANIFEST_NAME).unlink()  # who sends such files has none, or one that fits them
        return tmp_path / "model"

    yield save
    logging.enable_progress_bar()


def spoil(path: Path, payload: Path) -> None:
    torch.save({"x": Payload(payload)}, path)


@EVERY_KIND
def test_a_folder_with_a_pickle_for_weights_is_refused(saved, ran, kind):
    folder = saved(kind)
    spoil(folder / "pytorch_model.bin", ran)
    spoil(folder / "training_args.bin", ran)
    answers(AutoModelForMultiTask.from_pretrained(folder))  # beside safetensors it is not looked at
    (folder / "model.safetensors").unlink()
    for loader in (AutoModelForMultiTask, SCHEMES[KINDS[kind][0]]):
        with pytest.raises(OSError, match=r"pytorch_model\.bin, which is a pickle.*it is not read.*save_pretrained"):
            loader.from_pretrained(folder)
        for option in ({"use_safetensors": False}, {"weights_only": False}):
            with pytest.raises((OSError, ValueError), match="safetensors"):
                loader.from_pretrained(folder, **option)
    assert not ran.exists()


@pytest.mark.parametrize("kind", ["prefix", "adapter"])
def test_a_pickle_for_an_adapter_is_not_read(saved, ran, kind):
    folder = saved(kind)
    (folder / "adapters" / "tone" / "adapter_model.safetensors").unlink()
    spoil(folder / "adapters" / "tone" / "adapter_model.bin", ran)
    with pytest.raises(ValueError, match=r"has no adapters/tone/adapter_model\.safetensors"):
        AutoModelForMultiTask.from_pretrained(folder)
    assert not ran.exists()


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_pickles_in_a_checkpoint_run_nothing(make_trainer, model, ran, file):
    trainer = make_trainer(model, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    folder = Path(trainer.args.output_dir, "checkpoint-1")
    spoil(folder / file, ran)
    with pytest.raises(ValueError, match=file):
        trainer.train(resume_from_checkpoint=str(folder))
    write_manifest(folder)  # as its author would do
    if file == "training_args.bin":  # Trainer writes it, and nothing reads it
        trainer.train(resume_from_checkpoint=str(folder))
    else:
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            trainer.train(resume_from_checkpoint=str(folder))
    assert not ran.exists()


def test_a_recipe_cannot_ask_for_pickles(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: {backbone: x, backbone_kwargs: {weights_only: false}}\ntasks: [{name: a}]")
    with pytest.raises(ValueError, match="weights_only=false would run what a pickle says"):
        load_recipe(path)


# ---- configurations ----


def change_task(**changes):
    return lambda config: config["tasks"][0].update(changes)


def change(**changes):
    return lambda config: config.update(changes)


def change_backbone(**changes):
    return lambda config: config["backbone_config"].update(changes)


HOSTILE = {
    "a path for a name": (change_task(name="../../x"), r"task name '\.\./\.\./x' cannot be a module and file name"),
    "an absolute path": (change_task(name="/etc/passwd"), "cannot be a module and file name"),
    "a drive": (change_task(name="C:"), "cannot be a module and file name"),
    "a device": (change_task(name="NUL"), "reserved file name"),
    "NUL": (change_task(name="a\0b"), "cannot be a module and file name"),
    "a Cyrillic a": (change_task(name="n\u0430mes"), "cannot be a module and file name"),
    "a wide letter": (change_task(name="\uff54one"), "cannot be a module and file name"),
    "a dot": (change_task(name="."), "cannot be a module and file name"),
    "a long name": (change_task(name="x" * 10**6), r"task name 'xxx.*\.\.\. \(1000002 characters\) cannot be"),
    "another case": (change_task(name="STRENGTH"), "differ only in case"),
    "an attribute": (change_task(name="forward"), "is taken by torch.nn.ModuleDict"),
    "labels that are fractions": (change_task(labels=[1.5, 2]), "label 1.5 is neither a non-empty string nor a whole"),
    "labels twice": (change_task(labels=["a", "a"]), "labels appear more than once: 'a'"),
    "half a character": (change_task(labels=["a", "\ud800"]), "longer than 10,000 characters, or holds NUL"),
    "an endless label": (change_task(labels=["a", "b" * 10**5]), "longer than 10,000 characters"),
    "too many labels": (change_task(labels=[str(i) for i in range(MOST_LABELS + 1)]), "more labels than the 100,000"),
    "too many tasks": (change(tasks=[{"name": "a", "type": "regression"}] * 2000), "more tasks than the 1,000"),
    "a task too much": (
        lambda c: c["tasks"].append({"name": "more", "type": "regression"}),
        "lack|parameters|has no|has the shape",
    ),
    "a task too few": (lambda c: c["tasks"].pop(), "which no part of the model takes|has the shape|of another kind"),
    "tasks in a dictionary": (change(tasks={"a": 1}), "tasks must be list | None, got"),
    "no tasks": (change(tasks=[]), "tasks is empty"),
    "tasks that are text": (change(tasks=["tone"]), "tasks must be Task objects"),
    "an unknown type": (change_task(type="magic"), "type 'magic' is not known"),
    "an unknown field": (change_task(code="import os"), "unknown key 'code'"),
    "a weight of NaN": (change_task(weight=float("nan")), "weight is NaN"),
    "an endless weight": (change_task(weight=float("inf")), "weight must be a finite number"),
    "a weight that is true": (change_task(weight=True), "weight must be a finite number"),
    "dropout of NaN": (change(head_dropout=float("nan")), "head_dropout is NaN"),
    "dropout in words": (change(head_dropout="0.1"), "head_dropout must be float, got '0.1'"),
    "a negative length": (change(max_input_length=-5), "max_input_length must be a positive"),
    "a negative size": (change_backbone(hidden_size=-32), "no .*Model can be built|does not fit"),
    "an endless size": (change_backbone(hidden_size=10**12), "no .*Model can be built|shape"),
    "an endless vocabulary": (change_backbone(vocab_size=10**12), "shape"),
    "a billion layers": (change_backbone(num_hidden_layers=10**9), "num_hidden_layers must lie in 0 ... 1,000"),
    "more layers than there are weights": (
        change_backbone(num_hidden_layers=90),
        "describes a model of .* do not belong|has the shape|is of another kind",
    ),
    "a billion labels": (change_backbone(num_labels=10**9), "num_labels must lie in 0 ... 100,000"),
    "a function for a type": (change(dtype="load"), "dtype 'load' is no type of floating point numbers"),
    "a type of whole numbers": (change_backbone(dtype="int64"), "dtype 'int64' is no type of floating point"),
    "a number for a type": (change(dtype=5), "dtype 5 is no type of floating point"),
    "no code": (change(auto_map=None), "auto_map must say by auto class"),
    "a switch that is text": (
        change_backbone(output_hidden_states="/etc/passwd"),
        "output_hidden_states '/etc/passwd' is neither true nor false",
    ),
    "a chunk of nothing": (
        change_backbone(chunk_size_feed_forward=None),
        "chunk_size_feed_forward None is no whole number",
    ),
    "a method": (change(to_dict="x"), "'to_dict' is no field of a configuration"),
    "a class": (change(__class__="x"), "'__class__' is no field of a configuration"),
    "a method of the backbone's": (change_backbone(to_dict="x"), "'backbone_config.to_dict' is no field"),
    "code from the Hub": (change(attn_implementation="someone/kernels"), "is code on the Hub"),
    "code for the backbone": (change_backbone(_attn_implementation="a/b:c"), "is code on the Hub"),
    "another file": (change(configuration_files=["config.../../../x.json"]), "which no saved model has"),
    "a backbone of no family": (change_backbone(model_type="nothing"), "nothing"),
    "another kind of model": (change(model_type="bert"), "model_type 'bert'"),
    "no kind of model": (lambda c: c.pop("model_type"), "model_type None|model_type"),
    "a scheme of the future": (change(model_type="hf_multitask_telepathy"), "which is no scheme|not 'hf_"),
    "deep nesting": (change(x=nested(200)), "nested deeper than 40 levels"),
    "generation from the Hub": (
        change(generation={"custom_generate": "someone/code", "trust_remote_code": True}),
        "generation has no argument 'custom_generate'",
    ),
}
# What is said of generation, prompts and columns, for tasks that have them.
OF_TASKS = {
    "an attribute of a column": ({"prompt": "{text.__class__}"}, r"\{text.__class__\} is no plain name"),
    "an index": ({"prompt": "{text[0]}"}, r"is no plain name"),
    "a number": ({"prompt": "{0}"}, "is no plain name"),
    "a conversion": ({"prompt": "{text!r}"}, "is no plain name"),
    "a format": ({"prompt": "{text:>99999999}"}, "is no plain name"),
    "a format within": ({"prompt": "{text:{text}}"}, "is no plain name"),
    "a brace": ({"prompt": "{text"}, "is no template"),
    "code from the Hub": (
        {"prompt": "{text}", "generation": {"custom_generate": "a/b"}},
        "generation has no argument 'custom_generate'",
    ),
    "trust": ({"prompt": "{text}", "generation": {"trust_remote_code": True}}, "no argument 'trust_remote_code'"),
    "generation that is no JSON": (
        {"prompt": "{text}", "generation": {"top_k": {1, 2}}},
        "generation must be plain JSON",
    ),
    "NUL in a column": ({"label_column": "a\0b"}, "cannot be the name of a column"),
    "a number for a column": ({"label_column": 5}, "cannot be the name of a column"),
    "no list of columns": ({"text_columns": 5}, "text_columns must name one column"),
    "NUL in a dataset": ({"dataset": "a\0b"}, "cannot be the name of a column or dataset"),
    "a number for a metric": ({"metric": 5}, "metric must be the name of a metric"),
    "a weight beyond all": ({"weight": 10**400}, "weight must be a finite number"),
}


@pytest.mark.parametrize("case", OF_TASKS)
def test_a_hostile_task_is_refused(case):
    values, message = OF_TASKS[case]
    with pytest.raises(ValueError, match=message):
        Task.from_dict({"name": "say", "type": "causal_lm", **values})


def test_what_is_no_description_of_a_task_is_refused():
    for value in ([], "tone", None, 5):
        with pytest.raises(ValueError, match="a task must be a dictionary of its fields"):
            Task.from_dict(value)
    with pytest.raises(ValueError, match="unknown key 5"):
        Task.from_dict({"name": "a", "type": "regression", 5: 1})


@EVERY_KIND
def test_a_hostile_configuration_is_refused(saved, kind):
    folder = saved(kind)
    content = (folder / "config.json").read_text()
    for case, (change, message) in HOSTILE.items():
        config = json.loads(content)
        change(config)
        write_json(folder / "config.json", config)
        for loader in (AutoModelForMultiTask, SCHEMES[KINDS[kind][0]]):
            begin = time.process_time()
            if case == "no kind of model" and loader is not AutoModelForMultiTask:
                continue  # who names the class need not be told
            with pytest.raises(ValueError, match=message):
                loader.from_pretrained(folder)
                pytest.fail(case)
            assert time.process_time() - begin < 20, case
    for text in ("", "{", "[]", "1", '"x"', "null", "[" * 10**5, '{"a": ' * 10**5, "\udcff"):
        (folder / "config.json").write_text(text, errors="surrogateescape")
        for loader in (AutoModelForMultiTask, SCHEMES[KINDS[kind][0]]):
            with pytest.raises(ValueError, match="no JSON file that can be read|it must hold a dictionary"):
                loader.from_pretrained(folder)


def test_limits_are_what_they_say():
    labels = [str(i) for i in range(MOST_LABELS)]
    task = Task("a", "single_label_classification", labels=labels)
    with pytest.raises(ValueError, match="100,002 labels together, more than the 100,000"):
        check_tasks([task, Task("b", "single_label_classification", labels=["x", "y"])])
    many = [Task(f"t{i}", "regression") for i in range(MOST_TASKS)]
    assert len(check_tasks(many)) == MOST_TASKS
    with pytest.raises(ValueError, match="more tasks than the 1,000"):
        check_tasks(Task(f"t{i}", "regression") for i in range(10**12))


def test_a_million_labels_are_refused_quickly(saved):
    folder = saved()
    config = json.loads((folder / "config.json").read_text())
    config["tasks"][0]["labels"] = [str(i) for i in range(10**6)]
    write_json(folder / "config.json", config)
    begin = time.process_time()
    with pytest.raises(ValueError, match="there are more labels than the 100,000 that a model can have"):
        AutoModelForMultiTask.from_pretrained(folder)
    assert time.process_time() - begin < 15


@pytest.mark.parametrize("pattern", ["(a+)+$", "(.*)*x", ".*.*.*.*.*.*.*x", "(?:q|qu)*", "(", "x" * 5000])
def test_a_pattern_that_could_take_for_ever_is_refused(saved, pattern):
    folder = saved("adapter")
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "target_modules": pattern})
    with pytest.raises(ValueError, match="target_modules"):
        AutoModelForMultiTask.from_pretrained(folder)


def test_code_beside_a_configuration_is_not_run_unasked(saved, ran):
    folder = saved()
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForMultiTask": "evil.Model", "AutoModel": "evil.Model"}
    write_json(folder / "config.json", config)
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(ran)!r})\n")
    answers(AutoModelForMultiTask.from_pretrained(folder))
    assert not ran.exists()


# ---- versions ----


def test_a_configuration_of_before_there_were_versions_is_read(saved):
    folder = saved()
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("config_version") == saved_config.CONFIG_VERSION == 1
    expected = answers(AutoModelForMultiTask.from_pretrained(folder))
    write_json(folder / "config.json", config)
    model = AutoModelForMultiTask.from_pretrained(folder)
    assert model.config.config_version == 1
    assert all(torch.equal(value, expected[name]) for name, value in answers(model).items())


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (2, "install a newer hf_multitask"),
        (-1, "whole number from 0"),
        ("1", "must be int, got '1'"),
        (True, "must be int, got True"),
    ],
)
def test_another_version_is_refused(saved, version, message):
    folder = saved()
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "config_version": version})
    with pytest.raises(ValueError, match=message):
        AutoModelForMultiTask.from_pretrained(folder)


def test_older_versions_are_migrated_step_by_step(monkeypatch):
    steps = {0: lambda c: {**c, "order": "a"}, 1: lambda c: {**c, "order": c["order"] + "b"}, 2: lambda c: c | {"x": 1}}
    monkeypatch.setattr(saved_config, "CONFIG_VERSION", 3)
    monkeypatch.setattr(saved_config, "_MIGRATIONS", steps)
    before = {"tasks": []}
    assert saved_config.migrate(before) == {"tasks": [], "order": "ab", "x": 1, "config_version": 3}
    assert before == {"tasks": []}
    assert saved_config.migrate({"order": "-", "config_version": 1})["order"] == "-b"
    assert set(saved_config._MIGRATIONS) == set(range(saved_config.CONFIG_VERSION))


# ---- weights, links, and where files lie ----


@EVERY_KIND
@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff" * 64, None])
def test_weights_that_are_cut_off_are_refused(saved, kind, content):
    folder = saved(kind)
    for file in sorted(folder.rglob("*.safetensors")):
        whole = file.read_bytes()
        file.unlink()
        file.write_bytes(whole[: len(whole) - 40] if content is None else content)
        with pytest.raises(ValueError, match="is cut off, damaged, or no safetensors file"):
            AutoModelForMultiTask.from_pretrained(folder)
        file.unlink()
        file.write_bytes(whole)


@pytest.mark.parametrize("kind", ["hard", "adapter", "prefix"])
def test_weights_of_whole_numbers_are_refused(saved, kind):
    folder = saved(kind)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["heads.strength.layers.1.weight"] = tensors["heads.strength.layers.1.weight"].int()
    file.unlink()
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"heads\.strength\.layers\.1\.weight .* is of type I"):
        AutoModelForMultiTask.from_pretrained(folder)


SHARDS = {
    "outside": ("../outside.safetensors", "is no safetensors file in that folder; it is not followed"),
    "absolute": ("/outside.safetensors", "not followed"),
    "on Windows": ("..\\outside.safetensors", "not followed"),
    "a pickle": ("pytorch_model.bin", "not followed"),
    "hidden": (".x.safetensors", "not followed"),
    "NUL": ("a\0.safetensors", "not followed"),
    "a list": (["a"], "not followed"),
    "absent": ("model-2.safetensors", "which its model.safetensors.index.json names"),
}


@pytest.mark.parametrize("kind", ["hard", "adapter"])
def test_a_list_of_weights_leads_nowhere_else(saved, kind):
    folder = saved(kind)
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    shutil.copy(folder / "model-1.safetensors", folder.parent / "outside.safetensors")
    names = dict.fromkeys(load_file(folder / "model-1.safetensors"), "model-1.safetensors")
    index = folder / "model.safetensors.index.json"
    write_json(index, {"metadata": {}, "weight_map": names})
    answers(AutoModelForMultiTask.from_pretrained(folder))
    for shard, message in SHARDS.values():
        write_json(index, {"metadata": {}, "weight_map": {**names, next(iter(names)): shard}})
        with pytest.raises((ValueError, OSError), match=message):
            AutoModelForMultiTask.from_pretrained(folder)
    for content in ({}, {"weight_map": {}}, {"weight_map": [], "metadata": {}}, {"weight_map": names}, [], 5):
        write_json(index, content)
        with pytest.raises(ValueError, match="has no weight_map and metadata|must hold a dictionary"):
            AutoModelForMultiTask.from_pretrained(folder)


def test_links_are_read_as_the_hubs_cache_has_them_but_saving_does_not_follow_them(saved, tmp_path):
    folder = saved("adapter")
    real = tmp_path / "blob"
    (folder / "model.safetensors").rename(real)
    (folder / "model.safetensors").symlink_to(real)
    model = AutoModelForMultiTask.from_pretrained(folder)
    victim, other = tmp_path / "victim", tmp_path / "other"
    victim.mkdir()
    (other / "adapters").mkdir(parents=True)
    (other / "adapters" / "tone").symlink_to(victim)
    with pytest.raises(ValueError, match="is a link that leads out of the folder; remove it"):
        model.save_pretrained(other)
    assert not list(victim.iterdir())


@pytest.mark.parametrize("name", ["\\\\server\\share", "//server/share", "a\0b", "", "x\ny", "x" * 10**5])
def test_a_backbone_that_is_no_name_is_refused(saved, name):
    folder = saved("prefix")
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "backbone_name": name})
    with pytest.raises(ValueError, match="backbone_name must be a Hub id or a folder"):
        AutoModelForMultiTask.from_pretrained(folder)


@pytest.mark.parametrize("digest", ["", "x", "A" * 64, "0" * 63])
def test_a_hash_that_is_none_is_refused(saved, digest):
    folder = saved("prefix")
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "backbone_hash": digest})
    with pytest.raises(ValueError, match="backbone_hash must be a SHA-256"):
        AutoModelForMultiTask.from_pretrained(folder)


def test_a_model_of_the_hub_names_no_folder_of_this_disk(saved, tmp_path, monkeypatch):
    """As it lies in the Hub's cache, loaded by its id."""
    folder = saved("prefix")
    cache = tmp_path / "hub"
    place = cache / "models--someone--model"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, place / "snapshots" / ("0" * 40))
    for name in (str(tmp_path / "backbone"), "../backbone", "./backbone"):
        file = place / "snapshots" / ("0" * 40) / "config.json"
        write_json(file, {**json.loads(file.read_text()), "backbone_name": name})
        with pytest.raises(ValueError, match="a path on some disk and no Hub id; give the backbone by"):
            AutoModelForMultiTask.from_pretrained("someone/model", cache_dir=cache, local_files_only=True)
    model = SCHEMES["prefix"].from_pretrained(
        "someone/model", cache_dir=cache, local_files_only=True, backbone=str(tmp_path / "backbone")
    )
    assert [task.name for task in model.tasks] == [task.name for task in make_tasks()]


def test_a_chat_template_runs_in_a_sandbox(tokenizer):
    from jinja2.exceptions import TemplateError

    for template in (
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__.__base__ }}{% for c in cycler.__init__.__globals__ %}{% endfor %}",
        "{{ messages.append(1) }}",
    ):
        with pytest.raises(TemplateError):
            tokenizer.apply_chat_template([{"role": "user", "content": "x"}], chat_template=template, tokenize=False)


# ---- checkpoints ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("run"), "run is None, which no trainer writes"),
        (lambda s: s.update(balancing=[]), "balancing is "),
        (lambda s: s["balancing"].pop("weights"), "balancing in the checkpoint is .* not of the form"),
        (lambda s: s["balancing"]["weights"].pop(), "balancing.weights in the checkpoint"),
        (lambda s: s["balancing"].update(weights=["a"] * 4), "balancing.weights in the checkpoint"),
        (lambda s: s["balancing"].update(weighting=None), "balancing.weighting in the checkpoint is None"),
        (lambda s: s["rows_seen"].update(tone=-1), "rows_seen of 'tone' is -1"),
        (lambda s: s.update(sampling=[[1, [0.5, 0.1]]]), "sampling has"),
        (lambda s: s.update(sampling=[1]), "sampling has 1"),
        (lambda s: s.update(skipped_steps=-3), "skipped_steps is -3"),
        (lambda s: s["run"].update(tasks=5), "the run's tasks are 5"),
        (lambda s: s.update(x=nested(90)), "cut off"),
    ],
)
def test_a_state_that_no_trainer_wrote_is_refused(checkpoint, change, message):
    folder, trainer = checkpoint
    path = folder / "multitask_state.json"
    before = path.read_text()
    state = json.loads(before)
    change(state)
    write_json(path, state)
    write_manifest(folder)  # as who edited it would do
    try:
        with pytest.raises(ValueError, match=message):
            trainer.train(resume_from_checkpoint=str(folder))
    finally:
        path.write_text(before)
        write_manifest(folder)
    assert incompleteness(folder) is None


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer, datasets):
    from hf_multitask import HardSharingModel, MultiTaskTrainer, MultiTaskTrainingArguments

    arguments = MultiTaskTrainingArguments(
        output_dir=str(tmp_path_factory.mktemp("run")),
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    model = HardSharingModel.from_backbone(BACKBONES["bert"](), make_tasks())
    trainer = MultiTaskTrainer(model=model, args=arguments, train_dataset=datasets, processing_class=tokenizer)
    trainer.train()
    return Path(arguments.output_dir, "checkpoint-1"), trainer


# ---- archives ----


def zip_with(*members: tuple[zipfile.ZipInfo | str, bytes], compression: int = zipfile.ZIP_STORED) -> zipfile.ZipFile:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return zipfile.ZipFile(memory)


def tar_with(*members: tarfile.TarInfo, content: bytes = b"", mode: str = "w:gz") -> io.BytesIO:
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode=mode) as archive:
        for member in members:
            archive.addfile(member, io.BytesIO(content if member.isreg() else b""))
    memory.seek(0)
    return memory


def member(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info


def test_members_of_a_zip_are_taken_by_name_alone(tmp_path):
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    archive = zip_with(
        ("a/b.txt", b"yes"), ("../escaped", b"no"), ("/absolute", b"no"), (link, b"/etc/passwd"), ("d/", b"")
    )
    assert read_zip(archive, "a/b.txt") == b"yes"
    assert read_zip(archive, "a/b.txt", into=tmp_path / "b").decode() and (tmp_path / "b").read_bytes() == b"yes"
    for name, message in (("link", "no plain file"), ("d/", "no plain file"), ("absent", "is not in the archive")):
        with pytest.raises(ArchiveError, match=message):
            read_zip(archive, name)
    assert os.listdir(tmp_path) == ["b"]


def test_a_zip_bomb_is_cut_short(tmp_path):
    bomb = zip_with(("x", b"\0" * 10**7), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ArchiveError, match="holds 10,000,000 bytes, more than the 1,000"):
        read_zip(bomb, "x", largest=1000)
    bomb.getinfo("x").file_size = 10  # an archive may say less than it holds
    with pytest.raises(ArchiveError, match="more than the|cannot be read"):
        read_zip(bomb, "x", largest=1000, into=tmp_path / "x")
    assert (tmp_path / "x").stat().st_size <= 2**20


def test_a_damaged_zip_is_named():
    archive = zip_with(("x", b"some text"))
    archive.getinfo("x").CRC ^= 1
    with pytest.raises(ArchiveError, match="'x' cannot be read: Bad CRC"):
        read_zip(archive, "x")


def test_members_of_a_tar_are_taken_by_name_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    links = [member("s", 0, tarfile.SYMTYPE, "/etc/passwd"), member("h", 0, tarfile.LNKTYPE, "../x")]
    links += [member("../up", 3), member("/abs", 3), member("fifo", 0, tarfile.FIFOTYPE), member("ok", 3)]
    archive = tar_with(*links, content=b"yes")
    assert read_tar(archive, ["ok"]) == {"ok": b"yes"}
    for name in ("s", "h", "fifo"):
        archive.seek(0)
        with pytest.raises(ArchiveError, match=f"'{name}' is no plain file"):
            read_tar(archive, [name])
    archive.seek(0)
    with pytest.raises(ArchiveError, match="'absent' is not in the archive"):
        read_tar(archive, ["absent"])
    assert not os.listdir(tmp_path)


def test_a_tar_bomb_and_a_broken_tar_are_refused():
    begin = time.process_time()
    with pytest.raises(ArchiveError, match="more than the 1,000,000 bytes"):
        read_tar(tar_with(member("x", 10**7), member("ok", 0), content=b"\0" * 10**7), ["ok"], largest=10**6)
    whole = tar_with(member("ok", 3), content=b"yes").getvalue()
    for content in (b"", b"nothing", whole[:40], whole[:-20]):
        with pytest.raises(ArchiveError, match="cannot be read|is not in the archive"):
            read_tar(io.BytesIO(content), ["ok", "more"])
    assert time.process_time() - begin < 5


def test_what_an_archive_says_of_a_length_is_not_believed():
    taken = []
    with pytest.raises(ArchiveError, match="'much' holds more than the 10 bytes that it may"):
        archives._pour(io.BytesIO(b"x" * 11), "much", 10, taken.append)
    assert taken == []


def test_an_archive_is_known_by_its_hash(tmp_path):
    path = tmp_path / "a.zip"
    path.write_bytes(b"x")
    check_sha256(path, "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881")
    with pytest.raises(ArchiveError, match=r"a\.zip has the SHA-256 2d71.* instead of 000"):
        check_sha256(path, "0" * 64)


# ---- recipes ----


def bomb(levels: int = 12) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(lines)


def merges(levels: int = 12) -> str:
    lines = ["a0: &a0 {x: 1, y: 2}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, levels)]
    return "\n".join(lines)


BROKEN = {
    "a billion laughs": (bomb(), "with its aliases spelt out it has more than 100,000 values"),
    "a billion merges": (merges(), "with its aliases spelt out"),
    "itself": ("model: &a [*a]", "an alias stands for what it is a part of"),
    "itself in a mapping": ("model: &a {b: *a}", "an alias stands for what it is a part of"),
    "deep": ("model: " + "[" * 100 + "]" * 100, "nested deeper than 40"),
    "very deep": ("[" * 10**5, "is not valid YAML"),
    "large": ("# " + "x" * (2**20), "more than the 1,048,576"),
    "an object": ("model: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    "a name of Python's": ("model: !!python/name:os.system ''", "could not determine a constructor"),
    "bytes": ("model: !!binary aGk=", "of type bytes, not of JSON's"),
    "a set": ("model: !!set {a, b}", "of type set, not of JSON's"),
    "a date": ("model: 2020-01-01", "of type date, not of JSON's"),
    "no date": ("model: 2020-99-99", "is not valid YAML"),
    "NUL": ("a: \0", "is not valid YAML"),
    "a list": ("- a", "must be a mapping with model, tasks and training"),
    "nothing": ("", "must be a mapping"),
    "a key that is a list": ("? [a]\n: b", "is not valid YAML"),
    "NaN": ("model: .nan", "is NaN"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_hostile_recipe_is_refused_at_once(tmp_path, case):
    text, message = BROKEN[case]
    path = tmp_path / "r.yaml"
    path.write_text(text)
    begin = time.process_time()
    with pytest.raises(ValueError, match=message):
        load_recipe(path)
    assert time.process_time() - begin < 5


def test_aliases_of_a_sane_size_stay():
    text = "a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]"
    assert parse_yaml(text) == yaml.safe_load(text)


def test_a_recipe_names_what_is_no_name(tmp_path):
    path = tmp_path / "r.yaml"
    good = {"model": {"backbone": "x"}, "tasks": [{"name": "a", "type": "regression", "dataset": "d"}]}
    cases = [
        ({**good, "model": {"backbone": ["x"]}}, "model.backbone must be a Hub id or a folder"),
        ({**good, "model": {"backbone": "x", "sharing": ["hard"]}}, r"model.sharing: \['hard'\] is not known"),
        ({**good, "model": {"backbone": "x", "backbone_kwargs": [1]}}, "backbone_kwargs must be a mapping"),
        ({**good, "tasks": [{**good["tasks"][0], "dataset": 5}]}, "dataset must be a name or a mapping"),
        ({**good, "tasks": [{**good["tasks"][0], "dataset": {"path": [1]}}]}, "dataset.path is"),
        ({**good, "tasks": [{**good["tasks"][0], "name": {"a": 1}, "x": 1}]}, "unknown key 'x'"),
    ]
    for content, message in cases:
        path.write_text(yaml.dump(content))
        with pytest.raises(ValueError, match=message):
            load_recipe(path)
