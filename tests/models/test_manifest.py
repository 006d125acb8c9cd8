"""Bytes that have changed since a model was saved are noticed, and the file is named."""

from __future__ import annotations

import hashlib
import json
import logging as std_logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import BACKBONES, make_tasks
from test_schemes import FROZEN, KINDS, make_model
from transformers import AutoModel
from transformers.utils import logging
from typer.testing import CliRunner

from hf_multitask import AutoModelForMultiTask, HardSharingModel
from hf_multitask.cli.app import app
from hf_multitask.hub.code import write_code
from hf_multitask.hub.push import prepare_push
from hf_multitask.models import manifest
from hf_multitask.models.auto import SCHEMES
from hf_multitask.models.manifest import MANIFEST_NAME, changed_files, saving, sha256_of, write_manifest
from hf_multitask.prediction import Predictor

EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def quiet():
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def recorded(folder: Path) -> dict:
    return json.loads((folder / MANIFEST_NAME).read_text())["files"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()  # it may be mapped
    path.write_bytes(content)


@EVERY_KIND
def test_every_file_is_recorded_with_its_size_and_sha256(tmp_path, kind):
    model = make_model(kind)
    model.save_pretrained(tmp_path)
    files = {path.relative_to(tmp_path).as_posix(): path for path in tmp_path.rglob("*") if path.is_file()}
    del files[MANIFEST_NAME]
    assert recorded(tmp_path) == {
        name: {"size": len(path.read_bytes()), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for name, path in files.items()
    }
    assert any(name.endswith("adapter_model.safetensors") for name in files) == (kind in FROZEN)
    assert not list(tmp_path.glob(".*"))


@EVERY_KIND
def test_a_changed_file_is_named_by_every_way_to_load_it(tmp_path, kind):
    model = make_model(kind)
    model.save_pretrained(tmp_path)
    for name in recorded(tmp_path):
        content = (tmp_path / name).read_bytes()
        for spoil in (flip, Path.unlink):
            spoil(tmp_path / name)
            for load in (AutoModelForMultiTask.from_pretrained, AutoModel.from_pretrained, type(model).from_pretrained):
                if name.endswith("adapter_config.json") and not (tmp_path / name).exists():
                    continue  # PEFT alone reads it
                with pytest.raises((ValueError, OSError), match=name.replace(".", r"\.")):
                    load(tmp_path)
            (tmp_path / name).write_bytes(content)
    AutoModelForMultiTask.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", FROZEN)
def test_adapters_are_checked_where_they_are_loaded_into_a_model(tmp_path, kind):
    model = make_model(kind)
    model.save_pretrained(tmp_path)
    model.load_adapters(tmp_path)
    name = next(name for name in recorded(tmp_path) if name.endswith("adapter_model.safetensors"))
    flip(tmp_path / name)
    with pytest.raises(ValueError, match=name):
        model.load_adapters(tmp_path)


def test_shards_and_variants_are_recorded_and_a_shard_of_another_model_is_refused(tmp_path):
    model = make_model("hard")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(name for name in recorded(tmp_path) if "-of-" in name)
    assert len(shards) > 2 and "model.safetensors.index.json" in recorded(tmp_path)
    torch.testing.assert_close(AutoModelForMultiTask.from_pretrained(tmp_path).state_dict(), model.state_dict())
    for name in (shards[1], "model.safetensors.index.json"):
        content = (tmp_path / name).read_bytes()
        flip(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} has changed"):
            AutoModelForMultiTask.from_pretrained(tmp_path)
        (tmp_path / name).write_bytes(content)
    model.save_pretrained(tmp_path, variant="x")
    assert {"model.x.safetensors", *shards} <= set(recorded(tmp_path))
    AutoModelForMultiTask.from_pretrained(tmp_path, variant="x")
    flip(tmp_path / "model.x.safetensors")
    with pytest.raises(ValueError, match=r"model\.x\.safetensors has changed"):
        AutoModelForMultiTask.from_pretrained(tmp_path, variant="x")
    AutoModelForMultiTask.from_pretrained(tmp_path)


@pytest.mark.parametrize(("before", "after"), [(None, "20KB"), ("20KB", None)])
def test_the_weights_of_an_older_model_are_never_taken_for_the_new_ones(tmp_path, before, after):
    old, new = make_model("hard"), make_model("hard")
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.zero_()
    old.save_pretrained(tmp_path, **({"max_shard_size": before} if before else {}))
    left = {path: path.read_bytes() for path in tmp_path.glob("model*")}
    new.save_pretrained(tmp_path, **({"max_shard_size": after} if after else {}))
    torch.testing.assert_close(AutoModelForMultiTask.from_pretrained(tmp_path).state_dict(), new.state_dict())
    for path, content in left.items():  # a copy of the old folder on top
        if not path.exists():
            path.write_bytes(content)
    try:
        loaded = AutoModelForMultiTask.from_pretrained(tmp_path)
    except ValueError as error:
        assert "model.safetensors was not saved with the rest of the folder" in str(error)
    else:
        torch.testing.assert_close(loaded.state_dict(), new.state_dict())


def test_parts_of_tasks_that_the_new_model_lacks_are_deleted(tmp_path):
    make_model("adapter, shared").save_pretrained(tmp_path)
    model = SCHEMES["adapter"].from_backbone(BACKBONES["bert"](), make_tasks()[:2])
    model.save_pretrained(tmp_path)
    parts = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("adapter_model.safetensors")}
    assert parts == {f"adapters/{task.name}/adapter_model.safetensors" for task in make_tasks()[:2]}
    assert parts <= set(recorded(tmp_path)) and len(recorded(tmp_path)) == 6
    assert not changed_files(tmp_path)


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from transformers import PreTrainedModel
from test_schemes import make_model
from hf_multitask.models import frozen, manifest
model = make_model(sys.argv[1])
when = sys.argv[4]
def die(*args, **kwargs): os._exit(9)
if when == "before the configuration": type(model.config).save_pretrained = die
if when == "before the weights":
    import transformers.modeling_utils
    transformers.modeling_utils.safe_save_file = die
if when == "before the adapters": frozen.save_file = die
if when == "before the manifest": manifest.ThreadPoolExecutor = die
model.save_pretrained(sys.argv[3])
"""


@pytest.mark.parametrize("again", [False, True], ids=["into an empty folder", "over an older model"])
@pytest.mark.parametrize(
    ("kind", "when"),
    [
        ("hard", "before the configuration"),
        ("hard", "before the weights"),
        ("hard", "before the manifest"),
        ("adapter", "before the adapters"),
    ],
)
@pytest.mark.slow
def test_a_process_that_is_killed_while_saving_leaves_no_model(tmp_path, kind, when, again):
    if again:
        make_model(kind).save_pretrained(tmp_path)
    tests = Path(__file__).parent.parent
    run = [sys.executable, "-c", KILLED, kind, str(tests), str(tmp_path), when]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    with pytest.raises((ValueError, OSError), match=r"saving it was interrupted|config\.json"):
        AutoModelForMultiTask.from_pretrained(tmp_path)
    make_model(kind).save_pretrained(tmp_path)
    AutoModelForMultiTask.from_pretrained(tmp_path)


def test_an_error_while_saving_leaves_the_mark_and_the_next_save_removes_it(tmp_path, monkeypatch):
    model = make_model("adapter")
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("hf_multitask.models.frozen.save_file", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="saving it was interrupted"):
        AutoModelForMultiTask.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert not changed_files(tmp_path)


# ---- changes on purpose ----


def test_what_people_add_or_take_away_is_no_fault(tmp_path, tokenizer):
    model = make_model("adapter")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("a card")
    (tmp_path / "runs").mkdir()
    (tmp_path / "adapters" / "README.md").write_text("more")
    (tmp_path / "adapters" / "tone" / "adapter_config.json").unlink()  # a download without it
    torch.testing.assert_close(AutoModelForMultiTask.from_pretrained(tmp_path).state_dict(), model.state_dict())
    (tmp_path / MANIFEST_NAME).unlink()  # of version 0.1.0
    (tmp_path / "config.json").write_text(json.dumps(json.loads((tmp_path / "config.json").read_text())))
    AutoModelForMultiTask.from_pretrained(tmp_path)
    assert not changed_files(tmp_path)


def test_an_edited_configuration_is_refused_until_the_change_is_recorded(tmp_path):
    make_model("hard").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"head_dropout": 0.5}))
    with pytest.raises(ValueError, match=rf"config\.json has changed .*hf-multitask manifest {tmp_path}"):
        AutoModelForMultiTask.from_pretrained(tmp_path)
    before = recorded(tmp_path)["model.safetensors"]
    assert write_manifest(tmp_path) == ["config.json"] and write_manifest(tmp_path) == []
    assert recorded(tmp_path)["model.safetensors"] == before
    assert AutoModelForMultiTask.from_pretrained(tmp_path).config.head_dropout == 0.5


def test_saving_the_configuration_alone_and_writing_code_record_themselves(tmp_path):
    model = make_model("hard")
    model.save_pretrained(tmp_path)
    model.config.head_dropout = 0.25
    model.config.save_pretrained(tmp_path)
    assert AutoModelForMultiTask.from_pretrained(tmp_path).config.head_dropout == 0.25
    written = write_code(tmp_path)
    assert set(written) < set(recorded(tmp_path)) and not changed_files(tmp_path)
    AutoModelForMultiTask.from_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path / "alone")
    assert not (tmp_path / "alone" / MANIFEST_NAME).exists()


def test_a_model_saved_over_another_keeps_the_record_of_what_stays(tmp_path):
    make_model("hard").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    write_manifest(tmp_path, ["tokenizer.json"])
    make_model("hard").save_pretrained(tmp_path)
    assert set(recorded(tmp_path)) == {"config.json", "model.safetensors", "tokenizer.json"}


# ---- manifests ----

BAD = {
    "empty": ("", "no JSON file"),
    "cut off": ('{"version": 1, "fi', "no JSON file"),
    "no files": ('{"version": 1}', "is damaged"),
    "another form": ('{"version": 1, "files": {"config.json": "abc"}}', "is damaged"),
    "no hash": ('{"version": 1, "files": {"config.json": {"size": 1, "sha256": "abc"}}}', "is damaged"),
    "a path elsewhere": (
        json.dumps({"version": 1, "files": {"../x": {"size": 1, "sha256": "0" * 64}}}),
        "is damaged",
    ),
    "a newer version": ('{"version": 2, "files": {}}', "install a newer hf_multitask"),
    "another model's": (
        json.dumps({"version": 1, "files": {"config.json": {"size": 1, "sha256": "0" * 64}}}),
        "config",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_manifest_that_is_none_is_refused_by_name(tmp_path, case):
    make_model("hard").save_pretrained(tmp_path)
    content, message = BAD[case]
    (tmp_path / MANIFEST_NAME).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        HardSharingModel.from_pretrained(tmp_path)
    assert MANIFEST_NAME in str(caught.value) or "config.json" in str(caught.value)


def test_a_file_is_read_once_until_it_changes(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(b"one")
    first = sha256_of(path)
    path.write_bytes(b"two")  # at once, of the same size: the time of change may be the same
    assert sha256_of(path) != first
    os.utime(path, (1, 1))
    known = sha256_of(path)
    monkeypatch.setattr(manifest.hashlib, "sha256", None)
    assert sha256_of(path) == known
    path.write_bytes(b"new")
    with pytest.raises(TypeError):
        sha256_of(path)


def test_a_save_inside_a_save_writes_one_manifest_at_the_end(tmp_path):
    with saving(tmp_path) as outer:
        make_model("adapter").save_pretrained(tmp_path)
        assert json.loads((tmp_path / MANIFEST_NAME).read_text()) == {"version": 1, "saving": True}
        (tmp_path / "more.json").write_text("{}")
        outer.add("more.json")
        outer.run["id"] = "abc"
    assert {"more.json", "config.json", "adapters/tone/adapter_model.safetensors"} < set(recorded(tmp_path))
    assert json.loads((tmp_path / MANIFEST_NAME).read_text())["run"] == {"id": "abc"}
    with saving(tmp_path / "other", writes=False):
        pass
    assert not (tmp_path / "other").exists()


# ---- entrances ----


def test_a_changed_tokenizer_is_told_of_and_used(tmp_path, tokenizer, caplog):
    make_model("hard").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    write_manifest(tmp_path, ["tokenizer.json", "tokenizer_config.json"])
    std_logging.getLogger("transformers").propagate = True
    std_logging.getLogger("hf_multitask").propagate = True
    Predictor.from_pretrained(tmp_path)
    assert "tokenizer_config.json" not in caplog.text
    values = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values | {"model_max_length": 77}))
    Predictor.from_pretrained(tmp_path)
    assert "tokenizer_config.json has changed" in caplog.text


def test_the_command_line_checks_and_records(tmp_path):
    make_model("hard").save_pretrained(tmp_path)

    def call(*words: str):
        return CliRunner().invoke(app, ["manifest", str(tmp_path), *words])

    assert call("--check").exit_code == 0 and "nothing has changed" in call().output
    flip(tmp_path / "config.json")
    checked = call("--check")
    assert checked.exit_code == 1 and "config.json has changed" in checked.output
    assert call().output == "recorded config.json\n" and call("--check").exit_code == 0
    (tmp_path / MANIFEST_NAME).unlink()
    assert "nothing to compare with" in call("--check").output


def test_pushing_refuses_changed_files_and_records_what_it_changes(tmp_path):
    make_model("hard").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("a card")
    with prepare_push(tmp_path / "model", include_code=True, include_handler=True, repo_id="me/x") as plan:
        for file in plan.files:
            (tmp_path / "hub" / file.path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "hub" / file.path).write_bytes(file.source.read_bytes())
    sent = recorded(tmp_path / "hub")
    assert {"config.json", "model.safetensors", "hf_multitask_models/manifest.py"} < set(sent)
    assert not {"README.md", "handler.py", MANIFEST_NAME} & set(sent) and not changed_files(tmp_path / "hub")
    flip(tmp_path / "model" / "model.safetensors")
    with (
        pytest.raises(ValueError, match=r"model\.safetensors has changed"),
        prepare_push(tmp_path / "model", repo_id="me/x"),
    ):
        pass
