"""Pushing a saved model to the Hub: one commit, of what a model needs.

[`push_folder`] is what `hf-multitask push` runs. Large files go first, and are not sent again if the server has them:
an interrupted push goes on where it was. Then one commit publishes everything, so the repository holds the old model
or the new one, never half of each. Weights and parts of tasks of the old model that the new one lacks are deleted in
the same commit: a loader would take them for its own.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..models.auto import AutoModelForMultiTask
from ..models.frozen import FrozenBackboneConfig
from ..models.manifest import MANIFEST_NAME, check_named, manifest_of, read_manifest
from .code import CODE_FOLDER, write_code
from .handler import write_handler
from .model_card import write_model_card
from .push_files import PushFile, PushPlan, check_saved_model, is_local_folder, plan_files

__all__ = ["prepare_push", "push_folder", "readable_errors"]

_CARD = "README.md"
_EDITED = (_CARD, "handler.py", "requirements.txt")  # made for the push, and changed by hand later on
_PART_FOLDERS = ("adapters/", "shared_adapter/", f"{CODE_FOLDER}/")


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    include_code: bool = False,
    include_handler: bool = False,
    token: str | None = None,
) -> CommitInfo:
    """Push a saved model to the Hub, with a model card if the folder has none.

    Args:
        folder: What `save_pretrained`, a trainer or `hf-multitask train` wrote.
        repo_id: `name` or `owner/name`; the repository is made if there is none.
        private: Make the repository private (None: as the owner's settings say). One that exists stays as it is.
        revision: A branch, which is made if there is none (default: `main`).
        message: The commit's message.
        include_code: Let the modelling code go along, see [`hf_multitask.hub.code`].
        include_handler: Let a handler for Inference Endpoints go along, see [`hf_multitask.hub.handler`].
        token: A token with the right to write (default: that of `hf auth login`, or of `HF_TOKEN`).

    Returns:
        The commit; the latest one where nothing has changed.

    Raises:
        FileNotFoundError: The folder holds no complete model, or there is no such owner.
        PermissionError: The Hub refuses the token.
        ConnectionError: The Hub cannot be reached, or the connection broke; nothing has been published.
        ValueError: The folder holds another kind of model, `repo_id` is no name, or `private` was asked for and the
            repository is public.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id {repo_id!r} is no name of a repository: {error}") from None
    api = HfApi(token=token)
    options = {"include_code": include_code, "include_handler": include_handler}
    with prepare_push(folder, repo_id=repo_id, **options) as plan:
        with readable_errors(repo_id, api.endpoint):
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not revision.startswith("refs/pr/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            info = api.model_info(repo_id, revision=revision)
            if private and not info.private:
                raise ValueError(
                    f"{repo_id!r} exists and is public; nothing was sent. Make it private in its settings first, or "
                    "push to another name"
                )
            sent = {file.path for file in plan.files}
            present = [one.rfilename for one in info.siblings or []]
            return api.create_commit(
                repo_id,
                [
                    *(CommitOperationAdd(file.path, str(file.source)) for file in plan.files),
                    *(CommitOperationDelete(path) for path in present if path not in sent and _is_of_model(path)),
                ],
                commit_message=message or "Upload multi-task model",
                revision=revision,
                parent_commit=info.sha,
            )


def _is_of_model(path: str) -> bool:
    """Return whether a file of a repository would be taken for a part of the model."""
    weights = path == SAFE_WEIGHTS_INDEX_NAME or (path.startswith("model") and path.endswith(".safetensors"))
    return path == MANIFEST_NAME or ("/" not in path and weights) or path.startswith(_PART_FOLDERS)


@contextmanager
def prepare_push(
    folder: str | Path, *, include_code: bool = False, include_handler: bool = False, repo_id: str | None = None
) -> Iterator[PushPlan]:
    """Collect what a push sends; the folder itself is not changed.

    What is made for the push lies in a temporary folder while the context lasts: a model card if there is none, the
    code if it is asked for, and the weights of a frozen backbone that came from a folder of this machine, where nobody
    else would find it. The name of such a folder is taken out of the configuration.

    Args:
        folder: A folder with a saved model.
        include_code: Let the modelling code go along.
        include_handler: Let a handler for Inference Endpoints go along; one that the folder has is the one that goes.
        repo_id: Where it will be, for its card.

    Raises:
        FileNotFoundError: The folder holds no complete model.
        ValueError: It holds another kind of model, or a file of it has changed since it was saved.
    """
    folder = Path(folder)
    config = check_saved_model(folder)
    plan = plan_files(folder)
    check_named(folder, [file.path for file in plan.files])
    with tempfile.TemporaryDirectory() as place:
        made = Path(place)
        if isinstance(config, FrozenBackboneConfig) and not config.backbone_saved:
            if is_local_folder(config.backbone_name):
                model = AutoModelForMultiTask.from_pretrained(str(folder))
                model.config.backbone_name = None
                model.save_pretrained(made, save_backbone=True)
        if not (made / CONFIG_NAME).is_file():
            shutil.copyfile(folder / CONFIG_NAME, made / CONFIG_NAME)
        _forget_folder(made / CONFIG_NAME)
        if include_code:
            write_code(made)
        if include_handler:
            for file in write_handler(made):
                if (folder / file.name).is_file():
                    file.unlink()
        if not (folder / _CARD).is_file():
            place_on_hub = repo_id or folder.resolve().name
            write_model_card(
                folder,
                made / _CARD,
                name=place_on_hub.split("/")[-1],
                location=place_on_hub,
                has_code=include_code or (folder / CODE_FOLDER).is_dir(),
            )
        files = {file.path: file for file in plan.files}
        if include_code:  # modules of another version stay
            files = {path: file for path, file in files.items() if not path.startswith(f"{CODE_FOLDER}/")}
        for path in sorted(path for path in made.rglob("*") if path.is_file()):
            own = path.relative_to(made).as_posix()
            files[own] = PushFile(own, path, path.stat().st_size)
        if SAFE_WEIGHTS_NAME in files:  # what is loaded; shards beside it are of an older model
            files = {path: file for path, file in files.items() if not fnmatch(path, "model*-of-*.safetensors")}
            files.pop(SAFE_WEIGHTS_INDEX_NAME, None)
        if MANIFEST_NAME in files:
            manifest = made / MANIFEST_NAME
            manifest.write_text(_new_manifest(folder, made, files), encoding="utf-8")
            files[MANIFEST_NAME] = PushFile(MANIFEST_NAME, manifest, manifest.stat().st_size)
        yield PushPlan(tuple(files[path] for path in sorted(files)), plan.left_out)


def _new_manifest(folder: Path, made: Path, files: Mapping[str, PushFile]) -> str:
    """Return the manifest of what is sent: the files in the manifest of the folder, and those made for the push."""
    before = read_manifest(folder) or {"files": {}, "run": {}}
    written = {path for path in files if (made / path).is_file() and path not in _EDITED}
    recorded = {path: files[path].source for path in files if path in before["files"] or path in written}
    return manifest_of({path: source for path, source in recorded.items() if path != MANIFEST_NAME}, before.get("run"))


def _forget_folder(file: Path) -> None:
    """Take the folder of this machine that a backbone was loaded from out of a configuration."""
    config = json.loads(file.read_text(encoding="utf-8"))
    backbone = config.get("backbone_config")
    if isinstance(backbone, dict) and is_local_folder(backbone.get("_name_or_path")):
        backbone["_name_or_path"] = ""
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def readable_errors(repo_id: str, endpoint: str) -> Iterator[None]:
    """Turn what goes wrong between here and the Hub into errors that say what to do.

    Args:
        repo_id: The repository, for messages.
        endpoint: The Hub's address, for messages.

    Raises:
        PermissionError: The Hub refuses the token.
        FileNotFoundError: The owner, the repository or the revision does not exist.
        ConnectionError: The Hub cannot be reached, or the connection broke.
        OSError: The repository was changed in the meantime.
        ValueError: The Hub refuses the files.
    """
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise PermissionError(f"pushing to {repo_id!r} needs a token: hf auth login, or HF_TOKEN") from error
    except HfHubHTTPError as error:
        raise _explain(error, repo_id, endpoint) from error
    except ValueError:
        raise
    except Exception as error:  # what the client of huggingface_hub raises where a connection breaks has no one base
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, HfHubHTTPError):
            cause = cause.__cause__
        if isinstance(cause, HfHubHTTPError):
            raise _explain(cause, repo_id, endpoint) from error
        if not isinstance(error, (OSError, RuntimeError)) and not type(cause).__module__.startswith(
            ("httpx", "httpcore")
        ):
            raise
        raise ConnectionError(
            f"the connection to {endpoint} broke while {repo_id!r} was pushed ({type(cause).__name__}: {cause}); "
            "nothing is half published. Push again: what has arrived is not sent again"
        ) from error


def _explain(error: HfHubHTTPError, repo_id: str, endpoint: str) -> Exception:
    code = error.response.status_code
    said = error.server_message or str(error).strip().splitlines()[0]
    if code == 401:
        return PermissionError(
            f"{endpoint} does not accept the token for {repo_id!r} (401: {said}); log in with a token that may "
            "write: hf auth login, or HF_TOKEN"
        )
    if code == 403:
        return PermissionError(
            f"the token may not write to {repo_id!r} (403: {said}); take a token with the right to write there, or "
            "another owner"
        )
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(f"{repo_id!r} has no such revision ({said})")
    if isinstance(error, RepositoryNotFoundError) or code == 404:
        return FileNotFoundError(
            f"{repo_id!r} does not exist on {endpoint}, or the token may not see it; check the owner's name"
        )
    if code == 412:
        return OSError(f"{repo_id!r} was changed by somebody else while it was pushed to; push again")
    if code == 400:
        return ValueError(f"{endpoint} refuses the files for {repo_id!r}: {said}")
    return ConnectionError(f"{endpoint} answered {code} while {repo_id!r} was pushed: {said}; push again later")
