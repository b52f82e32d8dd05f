"""Read files from a folder or straight from a zip, by the same two calls.

Zip members are checked before use: a name that would leave the folder is refused, as is a damaged archive.
"""

from __future__ import annotations

import lzma
import os
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from ade_harness.data.containers import MAX_FILE_BYTES
from ade_harness.errors import HarnessError, require
from ade_harness.files.archive import check_member_name
from ade_harness.files.reading import read_regular


class FileSource(Protocol):
    """Where a data set's files are. Names are relative, with forward slashes."""

    location: Path

    def names(self) -> list[str]:
        """Return all file names, sorted."""

    def read(self, name: str, limit: int | None = None) -> bytes:
        """Return a file's content, or its first `limit` bytes."""

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of every file."""


_HELP = "`python -m ade_harness data download` fetches the data set, and dataset.root=PATH says where it is."


def open_source(path: Path, keys: str | None = None) -> FileSource:
    """Open a folder or a zip file.

    Args:
        path: of either.
        keys: where paths of the user's own data are given; None if it is ADE20K.

    Raises:
        HarnessError: `path` is neither.
    """
    if path.is_dir():
        return FolderSource(path)
    if path.is_file():
        return ZipSource(path)
    raise HarnessError(f"{path}: no such folder or zip. {f'{keys} say where the files are.' if keys else _HELP}")


_MAX_VISITS = 16
"""How often one folder may be visited, through links to it."""


class FolderSource:
    """Files below a folder."""

    def __init__(self, location: Path) -> None:
        self.location = location

    def names(self) -> list[str]:
        """Return all file names, sorted; hidden files are left out."""
        found, visits = [], Counter[Path]()
        for folder, folders, files in os.walk(self.location, followlinks=True):
            above = Path(folder).parents[: len(Path(folder).relative_to(self.location).parts)]
            real = Path(folder).resolve()
            if real in {parent.resolve() for parent in above}:  # a link to a folder above it
                folders.clear()
                continue
            visits[real] += 1
            if visits[real] > _MAX_VISITS:  # links between many folders have more paths than anybody can walk
                raise HarnessError(
                    f"{self.location}: links lead to {real} by more than {_MAX_VISITS} paths, such as {folder}. Remove"
                    " links between its folders."
                )
            folders[:] = sorted(f for f in folders if not f.startswith("."))
            relative = Path(folder).relative_to(self.location)
            found += [(relative / f).as_posix() for f in files if not f.startswith(".")]
        return sorted(found)

    def read(self, name: str, limit: int | None = None) -> bytes:
        """Return a file's content, or its first `limit` bytes."""
        return read_regular(self.location / name, MAX_FILE_BYTES, limit)

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of every file; a link that leads nowhere has 0."""
        return {name: _size(self.location / name) for name in self.names()}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


_DAMAGED = (
    zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError, KeyError, IndexError, struct.error,
    lzma.LZMAError,
)  # fmt: skip
"""What Python's reader of a damaged zip may raise; NotImplementedError, of odd versions, is a RuntimeError."""


class ZipSource:
    """Members of a zip file. Each process opens it for itself (a file handle cannot be shared by workers)."""

    def __init__(self, location: Path) -> None:
        self.location = location
        self._archive: zipfile.ZipFile | None = None
        self._owner = -1
        members = sorted(m.filename for m in self._open().infolist() if m.filename and not m.is_dir())
        for name in members:
            check_member_name(name, location)
        self._names = [name for name in members if not _is_hidden(name)]

    def __getstate__(self) -> dict[str, object]:
        return {"location": self.location, "_archive": None, "_owner": -1, "_names": self._names}

    def _open(self) -> zipfile.ZipFile:
        if self._archive is None or self._owner != os.getpid():
            try:
                self._archive, self._owner = zipfile.ZipFile(self.location), os.getpid()
            except _DAMAGED as error:
                require(
                    self.location.suffix.lower() == ".zip",
                    f"{self.location}: is neither a folder nor a zip file. Give the folder ADEChallengeData2016, or its"
                    " zip.",
                )
                raise HarnessError(
                    f"{self.location}: not a whole zip file ({error}). Delete it and download it again:"
                    " `python -m ade_harness data download`."
                ) from error
        return self._archive

    def names(self) -> list[str]:
        """Return all file names, sorted."""
        return self._names

    def read(self, name: str, limit: int | None = None) -> bytes:
        """Return a member's content, or its first `limit` bytes; the zip's own checksum is verified."""
        try:
            with self._open().open(name) as member:
                size = self._open().getinfo(name).file_size
                if size > MAX_FILE_BYTES:  # a few bytes can unpack to anything
                    raise HarnessError(f"{self.location}: {name} unpacks to {size:,} bytes; too large for an image.")
                return member.read() if limit is None else member.read(limit)
        except HarnessError:
            raise
        except _DAMAGED as error:
            raise HarnessError(f"{self.location}: {name} is damaged ({error}). Download the archive again.") from error

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of every member."""
        return {member.filename: member.file_size for member in self._open().infolist()}


class MountedSource:
    """Several sources, each below its own path: names are paths as the user wrote them."""

    def __init__(self, mounts: Mapping[str, FileSource]) -> None:
        self._mounts = dict(mounts)
        self.location = next(iter(self._mounts.values())).location

    def names(self) -> list[str]:
        """Return all file names, sorted."""
        return sorted(f"{prefix}/{name}" for prefix, source in self._mounts.items() for name in source.names())

    def read(self, name: str, limit: int | None = None) -> bytes:
        """Return a file's content, or its first `limit` bytes."""
        prefix = max((p for p in self._mounts if name.startswith(f"{p}/")), key=len)
        return self._mounts[prefix].read(name[len(prefix) + 1 :], limit)

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of every file."""
        return {
            f"{prefix}/{name}": size for prefix, source in self._mounts.items() for name, size in source.sizes().items()
        }


def _is_hidden(name: str) -> bool:
    """Whether a member is what file managers leave behind (.DS_Store, __MACOSX/._x.jpg)."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
