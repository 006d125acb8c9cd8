"""Push, list, load: over HTTP, against a server that speaks the Hub's routes."""

from __future__ import annotations

import json
import shutil

import pytest
import transformers
from conftest import BACKBONES, make_tasks
from hub_client import (  # noqa: F401
    INPUT_IDS,
    LOGITS,
    Client,
    ClientError,
    client,
    hub,
    logits_of,
    save_model,
)
from hub_server import File, card_errors

from hf_multitask import AutoModelForMultiTask, Task
from hf_multitask.hub.push import prepare_push
from hf_multitask.hub.push_files import plan_files
from hf_multitask.models.auto import SCHEMES

PUSH = "from hf_multitask.hub.push import push_folder\nresult = push_folder(folder, repo, **options).oid"
LOAD = LOGITS + "result = logits_of(AutoModelForMultiTask.from_pretrained(repo, **options))"
LOAD = "from hf_multitask import AutoModelForMultiTask\n" + LOAD
CLI = """
from typer.testing import CliRunner
from hf_multitask.cli.app import app
done = CliRunner().invoke(app, arguments)
result = [done.exit_code, done.output]
"""
NO_WAITING = "import huggingface_hub.utils._http as http\nhttp.time.sleep = lambda seconds: None\n"
every_scheme = pytest.mark.parametrize("sharing", SCHEMES)


def push(client, folder, repo, env=None, before="", **options):  # noqa: F811
    return client.run(before + PUSH, env, folder=str(folder), repo=repo, options=options)


def load(client, repo, env=None, **options):  # noqa: F811
    return client.run(LOAD, env, repo=repo, options=options, input_ids=INPUT_IDS)


def run_cli(client, *arguments, env=None):  # noqa: F811
    return client.run(CLI, env, arguments=["push", *map(str, arguments)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved model of each scheme, and its logits."""
    found = {}
    for sharing in SCHEMES:
        folder = tmp_path_factory.mktemp("models") / sharing
        options = {"shared_rank": 2} if sharing == "adapter" else {}
        found[sharing] = folder, logits_of(save_model(sharing, folder, **options))
    return found


@pytest.fixture(scope="module")
def pushed(client, folders):  # noqa: F811
    """Push all of them, with their code."""
    for sharing, (folder, _) in folders.items():
        push(client, folder, f"me/{sharing}", include_code=True)
    return {sharing: logits for sharing, (_, logits) in folders.items()}


# ---- there and back ----


@every_scheme
def test_what_was_pushed_loads_by_its_id_in_a_new_process_bit_for_bit(hub, client, folders, pushed, sharing):  # noqa: F811
    files = hub.repos[f"me/{sharing}"].files()
    local = {
        path.relative_to(folders[sharing][0]).as_posix() for path in folders[sharing][0].rglob("*") if path.is_file()
    }
    assert local <= set(files), "adapters of tasks, in folders of their own, among them"
    if sharing in ("prefix", "adapter"):
        assert all(f"adapters/{task.name}/adapter_model.safetensors" in files for task in make_tasks())
    assert ("shared_adapter/adapter_model.safetensors" in files) == (sharing == "adapter")
    assert hub.repos[f"me/{sharing}"].messages["main"] == ["initial commit", "Upload multi-task model"]
    assert load(client, f"me/{sharing}") == pushed[sharing]


@every_scheme
def test_the_code_that_goes_along_loads_where_the_library_is_not_installed(client, pushed, sharing):  # noqa: F811
    program = LOGITS + (
        "try:\n    import hf_multitask\nexcept ModuleNotFoundError:\n    pass\nelse:\n    raise AssertionError\n"
        "model = AutoModel.from_pretrained(repo, trust_remote_code=True)\n"
        "result = [type(model).__module__.split('.')[0], type(model).__name__, logits_of(model)]"
    )
    module, name, logits = client.run(program, repo=f"me/{sharing}", input_ids=INPUT_IDS, package=False)
    assert (module, name) == ("transformers_modules", SCHEMES[sharing].__name__)
    assert logits == pushed[sharing]


def test_a_folder_with_code_loads_without_the_library_too_and_never_unasked(client, pushed, tmp_path):  # noqa: F811
    program = LOGITS + (
        "from huggingface_hub import snapshot_download\nfolder = snapshot_download(repo, local_dir=folder)\n"
        "result = logits_of(AutoModel.from_pretrained(folder, trust_remote_code=True))"
    )
    folder = str(tmp_path / "copy")
    assert (
        client.run(program, repo="me/adapter", folder=folder, input_ids=INPUT_IDS, package=False) == pushed["adapter"]
    )
    with pytest.raises(ClientError, match="trust_remote_code=True"):
        client.run("AutoModel.from_pretrained(folder, trust_remote_code=False)", folder=folder, package=False)


def test_where_the_library_is_installed_its_own_code_is_used(client, pushed):  # noqa: F811
    program = (
        "import hf_multitask\nresult = type(AutoModel.from_pretrained('me/hard', trust_remote_code=trust)).__module__"
    )
    for trust in (True, None):
        assert client.run(program, trust=trust) == "hf_multitask.models.hard_sharing"


def test_what_was_loaded_with_its_code_is_saved_with_it(client, pushed, tmp_path):  # noqa: F811
    program = LOGITS + (
        "AutoModel.from_pretrained('me/prefix', trust_remote_code=True).save_pretrained(folder)\n"
        "result = logits_of(AutoModel.from_pretrained(folder, trust_remote_code=True))"
    )
    assert client.run(program, folder=str(tmp_path / "again"), input_ids=INPUT_IDS, package=False) == pushed["prefix"]


# ---- revisions and changes ----


def test_a_second_push_sends_what_has_changed_and_revisions_stay(hub, client, tmp_path):  # noqa: F811
    first = logits_of(save_model("adapter", tmp_path / "model"))
    push(client, tmp_path / "model", "me/changing", message="first")
    repo = hub.repos["me/changing"]
    old, sent = repo.branches["main"], len(hub.sent)

    assert push(client, tmp_path / "model", "me/changing") == old, "nothing has changed: no new commit"
    assert repo.messages["main"] == ["initial commit", "first"] and len(hub.sent) == sent

    model = AutoModelForMultiTask.from_pretrained(str(tmp_path / "model"))
    model.adapters["tone"]["encoder/layer/0/attention/self/query"].lora_B.data.add_(1.0)
    model.save_pretrained(tmp_path / "model")
    second = logits_of(model)
    assert second["tone"] != first["tone"] and second["names"] == first["names"]
    push(client, tmp_path / "model", "me/changing", message="second")
    assert len(hub.sent) == sent + 1, "of all weights one adapter has changed"
    changed = {path for path, file in repo.files().items() if file.lfs and repo.commits[old].get(path) != file}
    assert changed == {"adapters/tone/adapter_model.safetensors"}
    assert load(client, "me/changing") == second
    assert load(client, "me/changing", revision=old) == first

    push(client, tmp_path / "model", "me/changing", revision="trial", message="third")
    assert set(repo.branches) == {"main", "trial"}
    save_model("adapter", tmp_path / "model", seed=3)
    push(client, tmp_path / "model", "me/changing", revision="trial", message="fourth")
    assert repo.messages["main"] == ["initial commit", "first", "second"] and load(client, "me/changing") == second
    trial = logits_of(AutoModelForMultiTask.from_pretrained(str(tmp_path / "model")))
    assert load(client, "me/changing", revision="trial") == trial != second


def test_parts_of_the_old_model_that_the_new_one_lacks_go_in_the_same_commit(hub, client, tmp_path):  # noqa: F811
    save_model("adapter", tmp_path / "old", shared_rank=2)
    (tmp_path / "old" / "LICENSE").write_text("mine")
    push(client, tmp_path / "old", "me/shrinking", include_code=True)
    model = save_model("adapter", tmp_path / "whole", tasks=make_tasks()[:2])
    model.save_pretrained(tmp_path / "new", max_shard_size="20KB")
    push(client, tmp_path / "new", "me/shrinking")
    files = set(hub.repos["me/shrinking"].files())
    assert "model.safetensors" not in files and "model.safetensors.index.json" in files
    assert {path for path in files if path.startswith("adapters/traits")} == set()
    assert not any(path.startswith(("shared_adapter", "hf_multitask_models")) for path in files)
    assert {"LICENSE", ".gitattributes"} <= files and len(hub.repos["me/shrinking"].commits) == 3
    assert load(client, "me/shrinking") == logits_of(model)
    # A folder that has both is loaded from the one file.
    shards = {path: path.read_bytes() for path in (tmp_path / "new").glob("model*")}
    model.save_pretrained(tmp_path / "new")
    for path, content in shards.items():
        path.write_bytes(content)
    push(client, tmp_path / "new", "me/shrinking")
    weights = [path for path in hub.repos["me/shrinking"].files() if path.startswith("model")]
    assert weights == ["model.safetensors"] and len(list((tmp_path / "new").glob("model*"))) > 1


# ---- the backbone ----


def test_a_backbone_from_a_folder_of_this_machine_goes_along(hub, client, tmp_path):  # noqa: F811
    BACKBONES["bert"]().save_pretrained(tmp_path / "backbone")
    model = SCHEMES["prefix"].from_backbone(str(tmp_path / "backbone"), make_tasks())
    model.save_pretrained(tmp_path / "model")
    assert not json.loads((tmp_path / "model" / "config.json").read_text())["backbone_saved"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "model").rglob("*")}
    push(client, tmp_path / "model", "me/local")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "model").rglob("*")}
    files = hub.repos["me/local"].files()
    assert not [path for path, file in files.items() if not file.lfs and str(tmp_path).encode() in file.content]
    shutil.rmtree(tmp_path / "backbone")
    assert load(client, "me/local") == logits_of(model)


def test_the_name_of_a_folder_is_taken_out_of_the_configuration_of_any_scheme(hub, client, tmp_path):  # noqa: F811
    BACKBONES["bert"]().save_pretrained(tmp_path / "backbone")
    SCHEMES["hard"].from_backbone(str(tmp_path / "backbone"), make_tasks()).save_pretrained(tmp_path / "model")
    assert str(tmp_path) in (tmp_path / "model" / "config.json").read_text(), "or there is nothing to take out"
    push(client, tmp_path / "model", "me/nameless")
    assert str(tmp_path).encode() not in hub.repos["me/nameless"].files()["config.json"].content


def test_a_backbone_of_the_hub_is_named_and_loaded_from_there(hub, client, tmp_path):  # noqa: F811
    program = LOGITS + (
        "from conftest import BACKBONES, make_tasks\nfrom hf_multitask import AdapterModel\n"
        "BACKBONES['bert']().push_to_hub('me/backbone')\n"
        "model = AdapterModel.from_backbone('me/backbone', make_tasks(), target_modules=['query'])\n"
        "model.save_pretrained(folder)\nresult = logits_of(model)"
    )
    logits = client.run(program, folder=str(tmp_path / "model"), input_ids=INPUT_IDS)
    push(client, tmp_path / "model", "me/small")
    files = hub.repos["me/small"].files()
    assert len(files["model.safetensors"].content) < len(hub.repos["me/backbone"].files()["model.safetensors"].content)
    assert "base_model: me/backbone\n" in files["README.md"].content.decode()
    assert load(client, "me/small") == logits


# ---- rights ----


def test_private_models_are_seen_by_their_owner_alone(hub, client, folders, pushed):  # noqa: F811
    folder, logits = folders["hard"]
    code, said = run_cli(client, folder, "me/secret", "--private")
    assert code == 0 and hub.repos["me/secret"].private, said
    assert load(client, "me/secret") == logits
    for token in ("reader", "other", "wrong"):
        with pytest.raises(ClientError, match=r"(?s)me/secret.*(not a valid model|401)"):
            load(client, "me/secret", env={"HF_TOKEN": token}, cache_dir=str(folder.parent / token))
    sent = hub.repos["me/hard"].branches["main"]
    code, said = run_cli(client, folder, "me/hard", "--private")
    assert code == 1 and "exists and is public; nothing was sent" in said
    assert hub.repos["me/hard"].branches["main"] == sent and not hub.repos["me/hard"].private


@pytest.mark.parametrize(
    ("token", "repo", "part"),
    [
        ("wrong", "me/refused", "does not accept the token for 'me/refused' (401"),
        ("other", "me/refused", "the token may not write to 'me/refused' (403"),
        ("reader", "else/refused", "the token may not write to 'else/refused' (403"),
        ("other", "me/hard", "the token may not write to 'me/hard' (403"),
        ("", "me/refused", "hf auth login, or HF_TOKEN"),
        ("writer", "me/not/a/name", "is no name of a repository"),
    ],
)
def test_a_push_that_is_refused_says_why_in_one_message(hub, client, folders, pushed, token, repo, part):  # noqa: F811
    before = {name: dict(one.branches) for name, one in hub.repos.items()}
    code, said = run_cli(client, folders["hard"][0], repo, env={"HF_TOKEN": token})
    assert code == 1 and part in said and "Traceback" not in said and said.count("\n") <= 3
    assert before == {name: dict(one.branches) for name, one in hub.repos.items()}


def test_a_model_that_is_not_there_is_named(client, pushed):  # noqa: F811
    with pytest.raises(ClientError, match="me/nowhere"):
        load(client, "me/nowhere")
    with pytest.raises(ClientError, match="no-such-branch"):
        load(client, "me/hard", revision="no-such-branch")


# ---- a network that breaks ----


def test_a_connection_that_breaks_publishes_nothing_and_the_next_push_goes_on(hub, client, tmp_path):  # noqa: F811
    model = save_model("adapter", tmp_path / "model", seed=11)
    sizes = sorted(path.stat().st_size for path in (tmp_path / "model").rglob("*.safetensors"))
    sent = len(hub.sent)
    hub.break_uploads = lambda size: size == sizes[-1]  # the weights; the adapters arrive
    try:
        with pytest.raises(
            ClientError, match=r"ConnectionError: .* broke while 'me/broken' was pushed .*nothing is half"
        ):
            push(client, tmp_path / "model", "me/broken", before=NO_WAITING)
    finally:
        hub.break_uploads = None
    repo = hub.repos["me/broken"]
    assert list(repo.files()) == [".gitattributes"] and repo.messages["main"] == ["initial commit"]
    arrived = set(hub.sent[sent:])
    assert len(arrived) == len(sizes) - 1
    push(client, tmp_path / "model", "me/broken")
    assert len(hub.sent) == sent + len(sizes) and not arrived & set(hub.sent[sent + len(arrived) :])
    assert len(repo.commits) == 2 and load(client, "me/broken") == logits_of(model)


def test_what_somebody_else_commits_in_the_meantime_is_not_overwritten(hub, client, tmp_path):  # noqa: F811
    save_model("hard", tmp_path / "model", seed=12)

    def meanwhile(size: int) -> bool:
        repo = hub.repos["me/race"]
        if len(repo.commits) == 1:
            repo.commit("main", {**repo.files(), "config.json": File(b"{}", False)}, "somebody else's")
        return False

    hub.break_uploads = meanwhile
    try:
        with pytest.raises(ClientError, match="OSError: 'me/race' was changed by somebody else"):
            push(client, tmp_path / "model", "me/race")
    finally:
        hub.break_uploads = None
    repo = hub.repos["me/race"]
    assert repo.messages["main"] == ["initial commit", "somebody else's"]
    assert repo.files()["config.json"].content == b"{}"


def test_a_connection_that_breaks_at_the_commit_publishes_nothing(hub, client, folders, pushed):  # noqa: F811
    before = dict(hub.repos["me/soft"].branches)
    hub.break_commits = True
    try:
        with pytest.raises(ClientError, match="ConnectionError: .*Push again"):
            push(client, folders["hard"][0], "me/soft", message="broken", before=NO_WAITING)
    finally:
        hub.break_commits = False
    assert hub.repos["me/soft"].branches == before


def test_no_server_is_one_message(client, folders):  # noqa: F811
    program = f"{NO_WAITING}http.constants.ENDPOINT = 'http://127.0.0.1:9'\n" + PUSH.replace(
        "result =", "import huggingface_hub.hf_api as api\napi.constants.ENDPOINT = 'http://127.0.0.1:9'\nresult ="
    )
    with pytest.raises(ClientError, match="ConnectionError: the connection to http://127.0.0.1:9 broke"):
        client.run(program, folder=str(folders["hard"][0]), repo="me/lost", options={})


# ---- what goes, and what stays ----


# What has the ending of a file of a model, and is none.
PRIVATE = (
    *("credentials.json", "token.txt", "client_secret.json", "service_account.json", "users.json", "train.txt"),
    *("data.json", "notes.md", "settings.py", "private.png", "embeddings.safetensors", "customers.model", "hf.token"),
    *("data/", "images/"),
)


@pytest.fixture
def crowded(tmp_path):
    """A run's folder with all that lies in one."""
    folder = tmp_path / "run"
    save_model("hard", folder)
    outside = tmp_path / "secret.json"
    outside.write_text("{}")
    for name in (
        *("checkpoint-4/model.safetensors", "checkpoint-4/optimizer.pt", "last-checkpoint/config.json"),
        *("runs/events.out.tfevents.1", "train.log", "trainer_state.json", "training_args.bin", "optimizer.pt"),
        *("pytorch_model.bin", ".env", ".git/config", "__pycache__/x.py", "baseline/config.json", "rows.csv", "id_rsa"),
        *("weights.pt", "model.pkl", "head.joblib"),
        *PRIVATE,
        *("adapters/notes.json", "adapters/tone/token.txt", "hf_multitask_models/keys.json", "onnx/rows.json"),
        *("vocab.txt", "spiece.model", "additional_chat_templates/tools.jinja", "modeling_own.py"),
        *("results.json", "chat_template.jinja", "handler.py", "onnx/model.onnx"),
        *("model-00001-of-00002.safetensors", "model.safetensors.index.json"),  # of an older, larger model
    ):
        path = folder / name / "rows.json" if name.endswith("/") else folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    (folder / "alias.json").symlink_to(outside)
    (folder / "shortcut").symlink_to(tmp_path)
    return folder


GOES = {
    *("README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("multitask_manifest.json", "results.json", "chat_template.jinja", "handler.py", "onnx/model.onnx"),
    *("vocab.txt", "spiece.model", "additional_chat_templates/tools.jinja", "modeling_own.py"),
}
STAYS = {
    "checkpoint-4/": "a checkpoint of the training",
    "last-checkpoint/": "a checkpoint of the training",
    "runs/": "a log of the training",
    "train.log": "a log of the training",
    "trainer_state.json": "state of the training",
    "training_args.bin": "state of the training",
    "optimizer.pt": "state of the training",
    **dict.fromkeys(("pytorch_model.bin", "weights.pt", "model.pkl", "head.joblib"), "could run code"),
    ".env": "hidden",
    ".git/": "hidden",
    "__pycache__/": "hidden",
    "baseline/": "another model",
    **dict.fromkeys(("rows.csv", "id_rsa", *PRIVATE), "not known to belong to a model"),
    **dict.fromkeys(("adapters/notes.json", "adapters/tone/token.txt"), "not known to belong to a model"),
    **dict.fromkeys(("hf_multitask_models/keys.json", "onnx/rows.json"), "not known to belong to a model"),
    "alias.json": "a link that leads out of the folder",
    "shortcut/": "a link that leads out of the folder",
}


def test_training_logs_and_what_is_no_part_of_the_model_stay(crowded):
    with prepare_push(crowded, repo_id="me/model") as plan:
        assert {file.path for file in plan.files} == GOES
        assert set(plan.left_out) == set(STAYS)
        assert all(part in plan.left_out[path] for path, part in STAYS.items())
        assert all(file.size == file.source.stat().st_size for file in plan.files)
        card = next(file for file in plan.files if file.path == "README.md")
        assert card_errors(card.source.read_text()) == []
    assert not card.source.exists() and not (crowded / "README.md").exists()


def test_pictures_go_where_the_card_shows_them(crowded):
    (crowded / "README.md").write_text("![curves](shown.png)")
    for name in ("shown.png", "unseen.png", "unseen.svg"):
        (crowded / name).write_bytes(b"")
    plan = plan_files(crowded)
    assert {file.path for file in plan.files if file.path.endswith((".png", ".svg"))} == {"shown.png"}
    assert {"unseen.png", "unseen.svg", "private.png"} <= set(plan.left_out)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_file_that_a_model_and_its_tokenizer_save_goes(scheme, tmp_path):
    save_model(scheme, tmp_path / "saved")
    saved = {
        path.relative_to(tmp_path / "saved").as_posix() for path in (tmp_path / "saved").rglob("*") if path.is_file()
    }
    plan = plan_files(tmp_path / "saved")
    assert {file.path for file in plan.files} == saved and not plan.left_out


def test_the_files_of_tokenizers_go(tmp_path):
    named = set()
    for kind in ("Bert", "Roberta", "T5", "XLMRoberta", "GPT2", "DebertaV2", "Phobert", "Barthez"):
        names = getattr(transformers, f"{kind}Tokenizer").vocab_files_names.values()
        named |= {name for name in names if isinstance(name, str)}
    named |= {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
    assert len(named) > 8
    for name in named:
        (tmp_path / name).write_text("{}")
    assert {file.path for file in plan_files(tmp_path).files} == named


def test_a_handler_goes_along_when_it_is_asked_for_and_one_of_one_s_own_is_kept(crowded):
    def sent() -> dict[str, str]:
        with prepare_push(crowded, include_handler=True, repo_id="me/model") as plan:
            names = ("handler.py", "requirements.txt")
            return {file.path: file.source.read_text() for file in plan.files if file.path in names}

    (crowded / "handler.py").unlink()
    written = sent()
    assert "class EndpointHandler" in written["handler.py"] and written["requirements.txt"].startswith("hf_multitask==")
    assert not (crowded / "handler.py").exists()
    (crowded / "handler.py").write_text("# my own")
    assert sent() == {**written, "handler.py": "# my own"}
    with prepare_push(crowded, repo_id="me/model") as plan:
        assert "requirements.txt" not in {file.path for file in plan.files}


def test_modules_of_another_version_stay(crowded):
    (crowded / "hf_multitask_models").mkdir(exist_ok=True)
    (crowded / "hf_multitask_models" / "old.py").write_text("import nothing")
    for include_code, goes in ((True, False), (False, True)):
        with prepare_push(crowded, include_code=include_code, repo_id="me/model") as plan:
            sent = {file.path for file in plan.files}
        assert ("hf_multitask_models/old.py" in sent) is goes
        assert ("hf_multitask_models/hard_sharing.py" in sent) is include_code


def test_a_dry_run_lists_and_asks_the_hub_nothing(hub, client, crowded):  # noqa: F811
    asked = len(hub.log)
    code, said = run_cli(client, crowded, "me/dry", "--dry-run", "--include-code")
    assert code == 0 and len(hub.log) == asked and "me/dry" not in hub.repos
    size = (crowded / "model.safetensors").stat().st_size / 1024
    assert f"{size:.1f} KiB  model.safetensors" in said and "B  hf_multitask_models/hard_sharing.py" in said
    assert all(f"  {path}: " in said for path in STAYS) and "not sent:" in said


def test_a_card_of_the_users_own_is_kept(hub, client, tmp_path):  # noqa: F811
    save_model("hard", tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    push(client, tmp_path / "model", "me/own")
    assert hub.repos["me/own"].files()["README.md"].content == b"---\nlicense: mit\n---\nMine.\n"
    (tmp_path / "model" / "README.md").write_text("---\nmodel-index:\n- name: x\n---\nMine.\n")
    with pytest.raises(ClientError, match="ValueError: Invalid metadata in README.md"):
        push(client, tmp_path / "model", "me/own")
    assert len(hub.repos["me/own"].commits) == 2


def drop(name):
    return lambda folder: (folder / name).unlink()


def strange_shard(folder):
    drop("model.safetensors")(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../../secret"}}))


def plain_model(folder):
    shutil.rmtree(folder)
    BACKBONES["bert"]().save_pretrained(folder)


BAD_FOLDERS = {
    "no folder": (shutil.rmtree, FileNotFoundError, "does not exist"),
    "no configuration": (drop("config.json"), FileNotFoundError, "config.json is missing"),
    "no weights": (drop("model.safetensors"), FileNotFoundError, "not complete: model.safetensors missing"),
    "no adapter": (
        drop("adapters/tone/adapter_model.safetensors"),
        FileNotFoundError,
        "not complete: adapters/tone/adapter_model.safetensors missing",
    ),
    "a plain model": (plain_model, ValueError, "'bert' model, which is no multi-task model"),
    "a shard elsewhere": (strange_shard, ValueError, "'../../secret', which is no file of its own folder"),
    "a broken result": (
        lambda folder: (folder / "results.json").write_text("{"),
        ValueError,
        r"results.json' is no JSON .*mend or remove it",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_folder_that_is_no_complete_model_is_refused(tmp_path, case):
    damage, error, part = BAD_FOLDERS[case]
    save_model("adapter", tmp_path / "model", tasks=[Task("tone", "regression")])
    damage(tmp_path / "model")
    with pytest.raises(error, match=part), prepare_push(tmp_path / "model"):
        pass
