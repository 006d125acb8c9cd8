"""A small Hub on loopback: models, branches, commits and large files, over the routes that huggingface_hub uses.

It keeps everything in memory, checks tokens, logs what was asked of it, and can break connections.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".onnx")


@dataclass
class File:
    """A file of a commit; `oid` is what the Hub compares: SHA-256 of a large file, git's SHA-1 of another."""

    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.oid


@dataclass
class Repo:
    """A repository: commits by id, each all files by path, and branches."""

    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)}, "initial commit")

    def commit(self, branch: str, files: dict[str, File], message: str) -> str:
        number = f"{len(self.commits)}:{branch}:{message}:" + ",".join(f"{p}={f.oid}" for p, f in files.items())
        sha = hashlib.sha1(number.encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.setdefault(branch, []).append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, File]:
        return self.commits[self.branches[revision]]


class Hub:
    """The server; `with Hub({"token": {"owner"}}) as hub:`.

    Args:
        writers: By token, the namespaces it may write to; it may read their private models, too.
        readers: Tokens that are valid, and may write nowhere.
    """

    def __init__(self, writers: dict[str, set[str]], readers: tuple[str, ...] = ()) -> None:
        self.writers = {**writers, **{token: set() for token in readers}}
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.log: list[tuple[str, str]] = []
        self.sent: list[str] = []  # paths of the objects that arrived, by id
        self.break_uploads: Callable[[int], bool] | None = None  # size of an object -> break while it comes?
        self.break_commits = False
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()


def card_errors(content: str) -> list[str]:
    """Return what the Hub would refuse in the metadata of a model card."""
    match = re.match(r"\A---\r?\n(.*?)\r?\n---\r?\n", content, flags=re.S)
    if match is None:
        return ["there is no metadata block"]
    try:
        data = yaml.safe_load(match.group(1))
    except yaml.YAMLError as error:
        return [f"no YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata must be a mapping"]
    errors = [f'"{key}" must not be empty' for key, value in data.items() if value in (None, "", {})]
    for key in ("library_name", "pipeline_tag", "license"):
        if key in data and not isinstance(data[key], str):
            errors.append(f'"{key}" must be a string')
    for key in ("tags", "datasets", "metrics", "language"):
        if key in data and not (isinstance(data[key], list) and all(isinstance(one, str) for one in data[key])):
            errors.append(f'"{key}" must be a list of strings')
    for number, model in enumerate(data.get("model-index", [])):
        place = f"model-index[{number}]"
        if not isinstance(model.get("name"), str) or not model["name"]:
            errors.append(f'"{place}.name" must be a non-empty string')
        if not isinstance(model.get("results"), list) or not model["results"]:
            errors.append(f'"{place}.results" must be a non-empty list')
        for i, result in enumerate(model.get("results") or []):
            where = f"{place}.results[{i}]"
            for part, keys in (("task", ("type",)), ("dataset", ("name", "type"))):
                for key in keys:
                    if not isinstance(result.get(part, {}).get(key), str):
                        errors.append(f'"{where}.{part}.{key}" is required')
            if not result.get("metrics"):
                errors.append(f'"{where}.metrics" is required')
            for metric in result.get("metrics") or []:
                if not isinstance(metric.get("type"), str) or not metric.get("type"):
                    errors.append(f'"{where}.metrics.type" is required')
                value = metric.get("value")
                if isinstance(value, bool) or not isinstance(value, (int, float, str)) or value != value:
                    errors.append(f'"{where}.metrics.value" must be a number')
    return errors


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer goes out in one piece
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        pass

    # ---- answers ----

    def answer(self, code: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        self.send_response(code)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, code: int, message: str, kind: str = "") -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": kind} if kind else {})}
        self.answer(code, {"error": message}, headers)

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    # ---- who asks ----

    @property
    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def known(self) -> bool:
        """Whether the token, if there is one, is valid; answers if it is not."""
        if self.token is not None and self.token not in self.hub.writers:
            self.refuse(401, "Invalid credentials in Authorization header")
            return False
        return True

    def may_write(self, namespace: str) -> bool:
        if self.token is None:
            self.refuse(401, "Invalid username or password.")
            return False
        if namespace not in self.hub.writers[self.token]:
            self.refuse(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
            return False
        return True

    def repo(self, name: str) -> Repo | None:
        """Return a repository that the token may read; answers if there is none."""
        found = self.hub.repos.get(name)
        mine = name.split("/")[0] in self.hub.writers.get(self.token or "", set())
        if found is None or (found.private and not mine):
            self.refuse(404 if self.token else 401, "Repository not found", "RepoNotFound")
            return None
        return found

    # ---- requests ----

    def handle_any(self) -> None:
        split = urlsplit(self.path)
        path, query = unquote(split.path), parse_qs(split.query)
        body = self.rfile if self.command == "PUT" else self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.hub.lock:
            self.hub.log.append((self.command, path))
        if not self.known():
            return
        for method, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, path)
            if method in (self.command, "ANY") and match:
                action(self, body, query, *match.groups())
                return
        self.refuse(404, f"no route {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def create(self, body: bytes, query: Any) -> None:
        wanted = json.loads(body)
        owners = sorted(self.hub.writers.get(self.token or "", ()))
        name = wanted["name"]
        namespace = wanted.get("organization") or (owners[0] if owners else "")
        if not self.may_write(namespace):
            return
        name = f"{namespace}/{name}"
        with self.hub.lock:
            exists = name in self.hub.repos
            if not exists:
                self.hub.repos[name] = Repo(wanted.get("visibility") == "private")
        self.answer(409 if exists else 200, {"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def validate(self, body: bytes, query: Any) -> None:
        errors = card_errors(json.loads(body)["content"])
        self.answer(400 if errors else 200, {"errors": [{"message": e} for e in errors], "warnings": []})

    def branch(self, body: bytes, query: Any, name: str, branch: str) -> None:
        repo = self.repo(name)
        if repo is None or not self.may_write(name.split("/")[0]):
            return
        if branch in repo.branches:
            self.refuse(409, "Reference already exists")
            return
        repo.branches[branch] = repo.branches["main"]
        self.answer(200, {})

    def preupload(self, body: bytes, query: Any, name: str, revision: str) -> None:
        repo = self.repo(name)
        if repo is None or not self.may_write(name.split("/")[0]):
            return
        sha = repo.resolve(revision)
        if sha is None:
            self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return
        files = []
        for asked in json.loads(body)["files"]:
            present = repo.commits[sha].get(asked["path"])
            mode = "lfs" if asked["path"].endswith(LFS_SUFFIXES) else "regular"
            oid = {} if present is None else {"oid": present.oid}
            files.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, **oid})
        self.answer(200, {"files": files})

    def batch(self, body: bytes, query: Any, name: str) -> None:
        if self.repo(name) is None or not self.may_write(name.split("/")[0]):
            return
        objects = []
        for one in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/objects/{one['oid']}", "header": {}}}
            objects.append({**one} if one["oid"] in self.hub.objects else {**one, "actions": upload})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, body: Any, query: Any, oid: str) -> None:
        size = int(self.headers["Content-Length"])
        if self.hub.break_uploads is not None and self.hub.break_uploads(size):
            body.read(size // 2)
            self.hang_up()
            return
        content = body.read(size)
        if hashlib.sha256(content).hexdigest() != oid:
            self.refuse(400, "the object has another SHA-256")
            return
        with self.hub.lock:
            self.hub.objects[oid] = content
            self.hub.sent.append(oid)
        self.answer(200)

    def commit(self, body: bytes, query: Any, name: str, revision: str) -> None:
        repo = self.repo(name)
        if repo is None or not self.may_write(name.split("/")[0]):
            return
        if self.hub.break_commits:
            self.hang_up()
            return
        if revision not in repo.branches:
            self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return
        files, summary = dict(repo.files(revision)), ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                summary = value["summary"]
                if value.get("parentCommit") not in (None, repo.branches[revision]):
                    self.refuse(412, "A commit has happened since. Please refresh and try again.")
                    return
            elif line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                files[value["path"]] = File(self.hub.objects[value["oid"]], True)
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
            else:
                raise AssertionError(line["key"])
        with self.hub.lock:
            sha = repo.commit(revision, files, summary)
        self.answer(200, {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    def info(self, body: bytes, query: Any, name: str, revision: str | None) -> None:
        repo = self.repo(name)
        if repo is None:
            return
        sha = repo.resolve(revision or "main")
        if sha is None:
            self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return
        siblings = [{"rfilename": path} for path in sorted(repo.commits[sha])]
        self.answer(200, {"id": name, "modelId": name, "sha": sha, "private": repo.private, "siblings": siblings})

    def commit_of(self, name: str, revision: str) -> Any:
        """Return a repository and the commit that a revision names; two Nones, and a refusal, where there is none."""
        repo = self.repo(name)
        sha = None if repo is None else repo.resolve(revision)
        if repo is not None and sha is None:
            self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return (None, None) if sha is None else (repo, sha)

    def tree(self, body: bytes, query: Any, name: str, revision: str, folder: str | None) -> None:
        repo, sha = self.commit_of(name, revision)
        if repo is None:
            return
        prefix = f"{folder.strip('/')}/" if folder and folder.strip("/") else ""
        entries, folders = [], set()
        for path, file in sorted(repo.commits[sha].items()):
            if not path.startswith(prefix):
                continue
            parts = path.split("/")
            folders |= {"/".join(parts[:i]) for i in range(1, len(parts))}
            lfs = {"lfs": {"oid": file.oid, "size": len(file.content), "pointerSize": 134}} if file.lfs else {}
            entries.append({"type": "file", "path": path, "size": len(file.content), "oid": file.oid, **lfs})
        entries += [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]
        if query.get("recursive", ["false"])[0].lower() != "true":
            entries = [one for one in entries if "/" not in one["path"].removeprefix(prefix)]
        self.answer(200, entries)

    def resolve(self, body: bytes, query: Any, name: str, revision: str, path: str) -> None:
        repo, sha = self.commit_of(name, revision)
        if repo is None:
            return
        file = repo.commits[sha].get(path)
        if file is None:
            self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        linked = {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))} if file.lfs else {}
        headers = {"ETag": f'"{file.etag}"', "X-Repo-Commit": sha, "Content-Length": str(len(file.content)), **linked}
        self.answer(200, file.content, headers)

    def whoami(self, body: bytes, query: Any) -> None:
        if self.token is None:
            self.refuse(401, "Invalid username or password.")
            return
        owners = sorted(self.hub.writers[self.token])
        self.answer(200, {"type": "user", "name": owners[0] if owners else "reader", "orgs": []})


_ID = r"([^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", rf"/api/models/{_ID}/branch/(.+)", _Handler.branch),
    ("POST", rf"/api/models/{_ID}/preupload/(.+)", _Handler.preupload),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/objects/([0-9a-f]{64})", _Handler.put),
    ("POST", rf"/api/models/{_ID}/commit/(.+)", _Handler.commit),
    ("GET", rf"/api/models/{_ID}/tree/([^/]+)(/.*)?", _Handler.tree),
    ("GET", rf"/api/models/{_ID}(?:/revision/(.+))?", _Handler.info),
    ("GET", rf"/{_ID}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("HEAD", rf"/{_ID}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
