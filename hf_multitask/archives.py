"""Taking single files out of archives that came over a network: by hash, by name, and never more than they should hold.

Nothing is unpacked as a whole and no name in an archive becomes a path: the caller names the members that it wants and
gets their content. What is no plain file (a link, a device) or is larger than its limit is refused.
"""

from __future__ import annotations

import hashlib
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

__all__ = ["ArchiveError", "check_sha256", "read_tar", "read_zip", "zip_names"]

_CHUNK = 2**20
LARGEST = 2**30
"""Bytes of one member, by default, and of all members of a compressed tar file that is searched."""
_MOST_MEMBERS = 100_000


class ArchiveError(ValueError):
    """An archive is not what it should be."""


def check_sha256(path: Path, pinned: str) -> None:
    """Check the hash of a file.

    Raises:
        ArchiveError: It is another one.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != pinned:
        raise ArchiveError(f"{path.name} has the SHA-256 {digest.hexdigest()} instead of {pinned}")


def _pour(source: IO[bytes], name: str, largest: int, take: Callable[[bytes], object]) -> None:
    """Hand over what a stream holds, in pieces; what the archive says of its length is not believed."""
    seen = 0
    while chunk := source.read(_CHUNK):
        seen += len(chunk)
        if seen > largest:
            raise ArchiveError(f"{name!r} holds more than the {largest:,} bytes that it may")
        take(chunk)


def read_zip(archive: zipfile.ZipFile, name: str, largest: int = LARGEST, into: Path | None = None) -> bytes:
    """Return what a member of a zip file (such as a wheel) holds.

    Args:
        archive: The open file.
        name: The member.
        largest: The most bytes that it may hold.
        into: Write it there and return its SHA-256 in place of the content; for large ones.

    Raises:
        ArchiveError: There is no such file in it, it is no plain file, damaged, or too large.
    """
    try:
        member = archive.getinfo(name)
    except KeyError:
        raise ArchiveError(f"{name!r} is not in the archive") from None
    kind = stat.S_IFMT(member.external_attr >> 16)
    if member.is_dir() or kind not in (0, stat.S_IFREG):
        raise ArchiveError(f"{name!r} is no plain file")
    if member.file_size > largest:
        raise ArchiveError(f"{name!r} holds {member.file_size:,} bytes, more than the {largest:,} that it may")
    try:
        with archive.open(member) as source:
            if into is None:
                parts: list[bytes] = []
                _pour(source, name, largest, parts.append)
                return b"".join(parts)
            digest = hashlib.sha256()
            with open(into, "wb") as plain:

                def take(chunk: bytes) -> None:
                    digest.update(chunk)
                    plain.write(chunk)

                _pour(source, name, largest, take)
            return digest.hexdigest().encode()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise ArchiveError(f"{name!r} cannot be read: {error}") from None


def zip_names(archive: zipfile.ZipFile) -> Iterator[str]:
    """Yield the names in a zip file, sorted.

    Raises:
        ArchiveError: There are far too many.
    """
    names = archive.namelist()
    if len(names) > _MOST_MEMBERS:
        raise ArchiveError(f"the archive has {len(names):,} members, more than the {_MOST_MEMBERS:,} that are read")
    yield from sorted(names)


def read_tar(source: Path | IO[bytes], names: list[str], largest: int = LARGEST) -> dict[str, bytes]:
    """Return what some members of a tar file hold, by name; the first of a name counts.

    Args:
        source: The file, compressed or not.
        names: The members.
        largest: The most bytes that they, and all that stands between them, may hold together.

    Raises:
        ArchiveError: One is missing, is no plain file, or the archive is damaged or too large.
    """
    found: dict[str, bytes] = {}
    seen = 0
    try:
        with tarfile.open(source) if isinstance(source, Path) else tarfile.open(fileobj=source) as archive:
            for count, member in enumerate(archive):
                seen += max(0, member.size)
                if seen > largest or count > _MOST_MEMBERS:
                    raise ArchiveError(f"the archive holds more than the {largest:,} bytes that it may")
                if member.name not in names or member.name in found:
                    continue
                file = archive.extractfile(member) if member.isreg() else None
                if file is None:
                    raise ArchiveError(f"{member.name!r} is no plain file")
                parts: list[bytes] = []
                _pour(file, member.name, largest, parts.append)
                found[member.name] = b"".join(parts)
                if len(found) == len(names):
                    break
    except (tarfile.TarError, EOFError, OSError, OverflowError) as error:
        raise ArchiveError(f"the archive cannot be read: {error}") from None
    if missing := [name for name in names if name not in found]:
        raise ArchiveError(f"{missing[0]!r} is not in the archive")
    return found
