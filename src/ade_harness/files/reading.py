"""Read files that somebody else made: only regular ones, only so large."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ade_harness.errors import HarnessError


def expanded(path: str | Path) -> Path:
    """Return a path with ``~`` and ``~name`` replaced by home directories.

    Raises:
        HarnessError: there is no such user, or no home directory.
    """
    if not str(path).startswith("~"):
        plain = Path(path)  # of ./~x it keeps ~x alone, which would be replaced if it came here again
        return plain.absolute() if str(plain).startswith("~") else plain
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise HarnessError(
            f"{path}: no home directory is known for {str(path).partition('/')[0]}. Write ./{path} for a file of that"
            " name."
        ) from error


def place_or_id(text: str) -> str:
    """Return a text that is a folder's path or the id of a repository, the former with its ``~`` replaced."""
    return str(expanded(text)) if text.startswith("~") else text


def require_regular(path: Path, shown: str) -> None:
    """Refuse what is no regular file.

    Args:
        path: of the file, or of a link to it.
        shown: begins the message: ``model.path=...`` as it was given.

    Raises:
        HarnessError: it is not there, or a folder, pipe or device.
    """
    if not path.is_file():
        there = "is not a regular file (a folder, pipe or device). Expected a file" if path.exists() else "no such file"
        raise HarnessError(f"{shown}: {there}.")


def require_no_pipes(folder: Path, shown: str) -> None:
    """Refuse a folder of files that a library opens by itself if one is a pipe, for which it would wait, or a device.

    Args:
        folder: nothing is refused if there is none.
        shown: begins the message: ``model.id=...`` as it was given.

    Raises:
        HarnessError: names the file.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.exists() and not path.is_dir():
            require_regular(path, f"{shown}: {path.name}")


def read_regular(path: Path, maximum: int, limit: int | None = None) -> bytes:
    """Return a file's content.

    Args:
        path: of the file, or of a link to it.
        maximum: bytes that such a file may have.
        limit: return only its first bytes.

    Raises:
        HarnessError: it cannot be read, is larger, or is not a regular file: a pipe would be waited for, a device read
            for ever.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise HarnessError(f"{path}: is not a regular file (a folder, pipe or device). Expected a file.")
            if found.st_size > maximum:
                raise HarnessError(f"{path}: has {found.st_size:,} bytes; at most {maximum:,} are read.")
            return file.read() if limit is None else file.read(limit)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise HarnessError(f"{path}: cannot be read ({reason}).") from error
