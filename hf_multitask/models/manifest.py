"""The manifest of a saved model or checkpoint: size and SHA-256 of every file, checked when a file is loaded.

A disk, a copy or a download may change the bytes of a file, and a process may be killed while it replaces the files of
an older model. Most of this would go unnoticed: other weights of the same shape load without an error. Therefore
[`saving`] marks the folder before the first file is written and records all files after the last one, and
[`check_files`] refuses to load a file that is not the one that was recorded.

```json
{"version": 1, "files": {"config.json": {"size": 1830, "sha256": "..."}}, "run": {}}
```

The marker is the same file with `"saving": true` in place of the files. A folder without a manifest (of version 0.1.0,
or made by hand) is loaded unchecked. Files that are not recorded, like a model card added later, are never looked at,
but weights that are not recorded are refused: they are the remains of another model.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from transformers.utils import cached_file

from .saved_config import HUB_OPTIONS, load_json

__all__ = [
    "MANIFEST_NAME",
    "Recording",
    "active_recording",
    "changed_files",
    "check_files",
    "check_named",
    "fault_in",
    "manifest_of",
    "read_manifest",
    "record_copies",
    "saving",
    "sha256_of",
    "write_manifest",
]

MANIFEST_NAME = "multitask_manifest.json"

_VERSION = 1
_BLOCK = 2**20  # bytes read at a time
_READERS = 4  # files that are read at the same time
_SETTLED = 2.0  # seconds after which a file's time of change tells a later change apart
_LOOSE = (".md",)  # model cards are edited by hand
_HASH = re.compile("[0-9a-f]{64}")

# Digests of files that have not changed since, by path: a run that goes on from a checkpoint opens its files twice.
_known: dict[str, tuple[tuple[int, ...], str]] = {}
_active: ContextVar[Mapping[str, Recording] | None] = ContextVar("saves in progress", default=None)


# ---- reading ----


def read_manifest(folder: Any, options: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """Return the manifest of a saved model, or None where there is none (or where it is just being saved).

    Args:
        folder: A folder or a Hub id.
        options: Where on the Hub or disk it lies, arguments of `from_pretrained`.

    Raises:
        ValueError: It is damaged, of a newer version, or says that saving was interrupted.
    """
    writing = active_recording(folder) if os.path.isdir(folder) else None
    if writing is not None and not writing.is_finished:
        return None  # by this very call
    file = _find(folder, MANIFEST_NAME, options)
    if file is None:
        return None
    what = f"{MANIFEST_NAME} of {str(folder)!r}"
    content = load_json(file, what)
    if content.get("saving") is True:
        raise ValueError(
            f"{str(folder)!r} is not a complete model: saving it was interrupted ({MANIFEST_NAME} says so), and its "
            "files may be of two models; save it again, or take another folder"
        )
    version, files = content.get("version"), content.get("files")
    if isinstance(version, int) and version > _VERSION:
        raise ValueError(
            f"{what} has version {version}; this version of hf_multitask reads versions up to {_VERSION}: install a "
            "newer hf_multitask"
        )
    if version != _VERSION or not isinstance(files, dict) or not all(map(_is_entry, files.items())):
        raise ValueError(f"{what} is damaged: it must list files with their size and SHA-256; {_advice(folder)}")
    return content


def _is_entry(item: tuple[str, Any]) -> bool:
    name, entry = item
    path = PurePosixPath(name)
    inside = not path.is_absolute() and ".." not in path.parts and "\\" not in name and path.name != ""
    if not inside or not isinstance(entry, dict) or type(entry.get("size")) is not int:
        return False
    return isinstance(entry.get("sha256"), str) and bool(_HASH.fullmatch(entry["sha256"]))


def check_files(folder: Any, files: Mapping[str, str | os.PathLike], options: Mapping[str, Any] | None = None) -> None:
    """Check that files are the ones that were saved; without a manifest nothing is checked.

    Args:
        folder: A folder or a Hub id.
        files: By name in the folder (with `/`), the paths of the files that are going to be loaded.
        options: Where on the Hub or disk the folder lies, arguments of `from_pretrained`.

    Raises:
        ValueError: A file has other bytes than the one that was saved, or was not saved with the model; it is named.
    """
    manifest = read_manifest(folder, options)
    if manifest is None:
        return
    for name, path in files.items():
        fault = _fault(name, Path(path), manifest["files"].get(name))
        if fault is not None:
            raise ValueError(f"{str(folder)!r} cannot be loaded: {fault}; {_advice(folder)}")


def check_named(
    folder: Any, names: Iterable[str], options: Mapping[str, Any] | None = None, needed: bool = False
) -> None:
    """Check files as [`check_files`] does, by name; those that are not recorded are passed over.

    Args:
        folder: A folder, a Hub id, or the path of a file, which then is the one that is checked.
        names: The files' names.
        options: Where on the Hub or disk the folder lies, arguments of `from_pretrained`.
        needed: Whether a file that is recorded must be there.

    Raises:
        ValueError: A file has other bytes than the one that was saved, or is missing; it is named.
    """
    if os.path.isfile(folder):
        folder, names = os.path.dirname(folder) or ".", [os.path.basename(folder)]
    manifest = read_manifest(folder, options)
    if manifest is None:
        return
    for name in names:
        path = _find(folder, name, options) if name in manifest["files"] else None
        if path is not None or (needed and name in manifest["files"]):
            check_files(folder, {name: path or name}, options)


def _find(folder: Any, name: str, options: Mapping[str, Any] | None) -> str | None:
    """Return the path of a file of a folder or a repository, or None."""
    where = {key: value for key, value in (options or {}).items() if key in HUB_OPTIONS and key != "trust_remote_code"}
    found: str | None = cached_file(folder, name, _raise_exceptions_for_missing_entries=False, **where)
    return found


def changed_files(folder: str | Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """Return, by name, what is wrong with the recorded files of a folder; empty without a manifest.

    Args:
        folder: The folder.
        names: The files to look at (default: all that are recorded).

    Raises:
        ValueError: The manifest itself is damaged, or says that saving was interrupted.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return {}
    recorded = manifest["files"]
    chosen = [name for name in (recorded if names is None else names) if name in recorded]
    with ThreadPoolExecutor(_READERS) as pool:
        faults = pool.map(lambda name: _fault(name, Path(folder, name), recorded[name]), chosen)
        return {name: fault for name, fault in zip(chosen, faults, strict=True) if fault is not None}


def fault_in(folder: str | Path, loaded: Iterable[str] = ()) -> str | None:
    """Return what is wrong with the files of a folder, all of which are read, or None.

    Args:
        folder: The folder. Without a manifest nothing is found.
        loaded: Patterns of names that must be recorded, if there is such a file: a program would load it.
    """
    try:
        faults = changed_files(folder)
        manifest = read_manifest(folder)
    except ValueError as error:
        return str(error)
    if faults:
        return "; ".join(faults.values())
    if manifest is not None:
        for pattern in loaded:
            for path in sorted(Path(folder).glob(pattern)):
                if (name := path.relative_to(folder).as_posix()) not in manifest["files"]:
                    return _fault(name, path, None)
    return None


def _fault(name: str, path: Path, entry: Mapping[str, Any] | None) -> str | None:
    """Return what is wrong with a file, or None."""
    if entry is None:
        return f"{name} was not saved with the rest of the folder ({MANIFEST_NAME} does not list it)"
    if not path.is_file():
        return f"{name} is missing ({entry['size']:,} bytes in {MANIFEST_NAME})"
    size = path.stat().st_size
    if size != entry["size"]:
        return f"{name} has changed since it was saved: {size:,} bytes, not {entry['size']:,} as in {MANIFEST_NAME}"
    found = sha256_of(path)
    if found != entry["sha256"]:
        was = f"{entry['sha256'][:16]}... as in {MANIFEST_NAME}"
        return f"{name} has changed since it was saved: its SHA-256 is {found[:16]}..., not {was}"
    return None


def _advice(folder: Any) -> str:
    return f"copy or download it again, or, if the change is meant, record it: hf-multitask manifest {folder}"


def sha256_of(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file, in hexadecimal; what was read once is not read again until it changes."""
    place = os.path.realpath(path)
    state = os.stat(place)
    identity = (state.st_size, state.st_mtime_ns, state.st_ino)
    if _known.get(place, ((), ""))[0] == identity:
        return _known[place][1]
    digest = hashlib.sha256()
    with open(place, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    # Times of change are coarse: a file that was written just now may be written again within the same tick.
    if time.time() - state.st_mtime > _SETTLED:
        _known[place] = identity, digest.hexdigest()
    return digest.hexdigest()


# ---- writing ----


def manifest_of(files: Mapping[str, str | os.PathLike], run: Mapping[str, Any] | None = None) -> str:
    """Return the text of a manifest.

    Args:
        files: By name in the folder that the manifest is for (with `/`), where the files are now.
        run: Facts about the run that made them, as plain JSON types.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        hashes = pool.map(sha256_of, files.values())
        entries = {
            name: {"size": os.path.getsize(path), "sha256": digest}
            for (name, path), digest in zip(files.items(), hashes, strict=True)
        }
    return _text({"version": _VERSION, "run": dict(run or {}), "files": dict(sorted(entries.items()))})


class Recording:
    """The files of a save in progress; made by [`saving`].

    Args:
        folder: The folder.
        kept: What is recorded of files that the save may leave as they are.
    """

    def __init__(self, folder: Path, kept: Mapping[str, Any]) -> None:
        self.folder = folder
        self.run: dict[str, Any] = {}
        self.is_finished = False
        self.kept = dict(kept)
        self._names: set[str] = set()
        self._removed: set[str] = set()

    def add(self, *names: str) -> None:
        """Record files that were written, by name in the folder."""
        self._names.update(names)

    def add_all(self) -> None:
        """Record every file that is in the folder, other than model cards."""
        found = (path for path in self.folder.rglob("*") if path.is_file())
        names = (path.relative_to(self.folder).as_posix() for path in found)
        self.add(*(name for name in names if not _is_own(name) and not name.endswith(_LOOSE)))

    def add_known(self, names: Iterable[str]) -> None:
        """Record those of some files that are in the folder."""
        self.add(*(name for name in names if (self.folder / name).is_file()))

    def remove(self, *names: str) -> None:
        """Delete files of an older model that the new one does not replace."""
        for name in names:
            (self.folder / name).unlink(missing_ok=True)
            self._removed.add(name)

    def finish(self) -> None:
        """Write the manifest; from now on the folder counts as complete."""
        if self.is_finished:
            return
        names = sorted(self._names)
        paths = [self.folder / name for name in names]
        with ThreadPoolExecutor(_READERS) as pool:
            hashes = list(pool.map(sha256_of, paths))
            list(pool.map(_flush, paths))
        for folder in {path.parent for path in paths}:
            _flush(folder)
        kept = {name: entry for name, entry in self.kept.items() if (self.folder / name).is_file()}
        new = {
            name: {"size": path.stat().st_size, "sha256": digest}
            for name, path, digest in zip(names, paths, hashes, strict=True)
        }
        files = {name: entry for name, entry in sorted({**kept, **new}.items()) if name not in self._removed - {*names}}
        _write(self.folder, {"version": _VERSION, "run": self.run, "files": files})
        self.is_finished = True


@contextlib.contextmanager
def saving(
    folder: str | os.PathLike,
    writes: bool = True,
    only_changes: bool = False,
    close: Callable[[Recording], Any] = Recording.finish,
) -> Iterator[Recording]:
    """Mark a folder while its files are written, and write its manifest when all are there.

    Where the block is left by an error, or the process is killed, the mark stays and the folder is not loaded. Inside
    another `saving` of the same folder the files are added to that one.

    Args:
        folder: The folder; made if there is none.
        writes: Whether this process writes; otherwise nothing happens.
        only_changes: Some files of a saved model are changed. Where it has no manifest none is written.
        close: What is done at the end; it may finish the recording later, in another thread.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> with saving(folder) as recording:
        ...     size = Path(folder, "config.json").write_text("{}")
        ...     recording.add("config.json")
        >>> changed_files(folder)
        {}
        >>> size = Path(folder, "config.json").write_text("[]")
        >>> changed_files(folder)  # doctest: +ELLIPSIS
        {'config.json': 'config.json has changed since it was saved: its SHA-256 is ...
    """
    place = os.path.realpath(folder)
    outer = active_recording(place)
    if outer is not None:
        yield outer
        return
    kept: Mapping[str, Any] = {}
    known = _stored(place) if writes else None
    if known is not None:
        kept = known.get("files", {})
    recording = Recording(Path(place), kept)
    if not writes or (only_changes and (known is None or known.get("saving") is True)):
        yield recording
        return
    recording.run = known.get("run", {}) if known is not None and only_changes else {}
    os.makedirs(place, exist_ok=True)
    _write(Path(place), {"version": _VERSION, "saving": True})
    before = _active.set({**(_active.get() or {}), place: recording})
    try:
        yield recording
    finally:
        _active.reset(before)
    close(recording)


def record_copies(source: str | Path, target: str | Path, leave_out: Iterable[str]) -> None:
    """Write the manifest of a folder that gets copies of the files of another one, which may still be being saved.

    Args:
        source: The folder with the files; if it is being saved, its files are all there by now.
        target: Where the copies go.
        leave_out: Patterns of names of files that are not copied.
    """
    recording = active_recording(source)
    if recording is not None:
        recording.add_all()
        recording.finish()
    content = read_manifest(source)
    if content is not None:
        files = content["files"].items()
        copied = {name: entry for name, entry in files if not any(fnmatch(name, pattern) for pattern in leave_out)}
        _write(Path(target), {**content, "files": copied})


def active_recording(folder: str | os.PathLike) -> Recording | None:
    """Return the save in progress of a folder, or None."""
    return (_active.get() or {}).get(os.path.realpath(folder))


def write_manifest(folder: str | Path, names: Iterable[str] | None = None) -> list[str]:
    """Record the files of a folder as they are, after they were changed on purpose.

    Args:
        folder: A folder with a saved model, or a checkpoint.
        names: The files (default: those in the manifest that are there; without a manifest, all files).

    Returns:
        The names of the files whose record is new or has changed.

    Raises:
        FileNotFoundError: There is no such folder or file.
    """
    place = Path(folder)
    if not place.is_dir():
        raise FileNotFoundError(f"folder {str(folder)!r} does not exist")
    stored = _stored(place) or {}
    before = stored.get("files", {})
    recording = Recording(place, before)
    recording.run = stored.get("run", {})
    if names is not None:
        recording.add(*names)
    elif before:
        recording.add_known(before)
    else:
        recording.add_all()
    recording.finish()
    after = (_stored(place) or {}).get("files", {})
    return [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]


def _stored(folder: str | os.PathLike) -> dict[str, Any] | None:
    """Return what a folder's manifest holds, a marker too; None where it has none that can be read."""
    try:
        content = json.loads(Path(folder, MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict):
        return None
    files = content.get("files", {})
    entries = files.items() if isinstance(files, dict) else ()
    return {**content, "files": dict(filter(_is_entry, entries))}


def _is_own(name: str) -> bool:
    return name == MANIFEST_NAME or name.startswith(f".{MANIFEST_NAME}")


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"


def _write(folder: Path, content: Mapping[str, Any]) -> None:
    """Replace a manifest in one step, so that it is the old one or the new one at any time."""
    scratch = folder / f".{MANIFEST_NAME}.{os.getpid()}-{threading.get_ident()}"
    try:
        with open(scratch, "w", encoding="utf-8") as file:
            file.write(_text(content))
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, folder / MANIFEST_NAME)
    finally:
        scratch.unlink(missing_ok=True)
    _flush(folder)


def _flush(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk; not every file system can tell."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
