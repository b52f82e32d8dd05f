"""Fetch large files: resumed after an interruption, checked, and put in place only when whole."""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import requests

from ade_harness.errors import HarnessError
from ade_harness.files.archive import check_member_name
from ade_harness.files.reading import expanded

OFFICIAL_URL = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
OFFICIAL_SHA1 = "219e1696abb36c8ba3a3afe7fb2f4b4606a897c7"
"""As widely published; the archive could not be re-checked when this was written."""

_CHUNK = 1 << 20
_TIMEOUT_S = 60
_ATTEMPTS = 5

OnBytes = Callable[[int, int | None], None]
"""Called with (bytes so far, total or None)."""


def cache_dir() -> Path:
    """Return where synthetic data and downloads are kept: ADE_HARNESS_CACHE, or below the user's cache folder."""
    base = os.environ.get("ADE_HARNESS_CACHE")
    if base:
        return expanded(base)
    return expanded(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "ade_harness"


def file_hash(path: Path, algorithm: str) -> str:
    """Return the hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def fetch(
    url: str,
    destination: Path,
    *,
    algorithm: str = "sha256",
    digest: str | None = None,
    on_bytes: OnBytes | None = None,
    max_bytes: int = 1 << 38,
) -> Path:
    """Download `url` to `destination` unless a checked copy is there already.

    The transfer goes to ``<destination>.part`` and continues there after an interruption (HTTP range
    requests); the file gets its name only after its checksum was right.

    Args:
        url: http or https address.
        destination: file to write.
        algorithm: of `digest`, as hashlib calls it.
        digest: expected hex digest; None accepts what comes.
        on_bytes: progress callback.
        max_bytes: more are not taken, whatever the server sends.

    Raises:
        HarnessError: the server fails, sends more, or the checksum is wrong (the bad file is deleted).
    """
    if destination.exists() and (digest is None or file_hash(destination, algorithm) == digest):
        return destination
    part = destination.with_name(destination.name + ".part")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        _transfer(url, part, on_bytes, max_bytes)
        found = file_hash(part, algorithm)
        if digest is not None and found != digest:
            part.unlink()
            raise HarnessError(
                f"{url}: the {algorithm} of the download is {found}, expected {digest}."
                " The download was deleted: try again, or get the file from another mirror with --url."
            )
        part.replace(destination)
    except OSError as error:
        raise HarnessError(f"{destination}: cannot be written ({error.strerror or error}).") from error
    return destination


def _transfer(url: str, part: Path, on_bytes: OnBytes | None, max_bytes: int) -> None:
    problem = ""
    for _ in range(_ATTEMPTS):
        have = part.stat().st_size if part.exists() else 0
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
        try:
            with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT_S) as response:
                if response.status_code == 416:  # nothing left to send: the part is whole, or longer than the file
                    total = response.headers.get("Content-Range", "").rpartition("/")[2]
                    if total == str(have):
                        return
                    part.unlink(missing_ok=True)
                    problem = "the server answers 416, that nothing of the file is there"
                    continue
                if response.status_code >= 400:
                    raise HarnessError(
                        f"{url}: the server answers {response.status_code} {response.reason}."
                        f" The partial download is kept in {part}; try again later, or use --url with a mirror."
                    )
                resumed = response.status_code == 206
                have = have if resumed else 0
                length = _length_of(url, response)
                total_bytes = have + length if length is not None else None
                with part.open("ab" if resumed else "wb") as file:
                    for chunk in response.iter_content(_CHUNK):
                        have += len(chunk)
                        if have > max_bytes:
                            file.close()
                            part.unlink()
                            raise HarnessError(
                                f"{url}: the server sends more than {max_bytes:,} bytes, so this is not the file. What"
                                " had come was deleted."
                            )
                        file.write(chunk)
                        if on_bytes:
                            on_bytes(have, total_bytes)
                if total_bytes is None or have == total_bytes:
                    return
                problem = f"the connection was closed after {have} of {total_bytes} bytes"
        except requests.ConnectionError:
            problem = f"no connection to {urlsplit(url).hostname}"
        except (requests.RequestException, ValueError) as error:  # of an address in a redirect, too
            problem = str(error)
    kept = f" The partial download is kept in {part}: the same command continues it." if part.exists() else ""
    raise HarnessError(f"{url}: the download stopped {_ATTEMPTS} times ({problem}).{kept}")


def _length_of(url: str, response: requests.Response) -> int | None:
    """Return the bytes that are to come, None if the server does not say; raises HarnessError for odd answers."""
    coding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if coding not in ("identity", ""):
        raise HarnessError(f"{url}: the server sends the file compressed ({coding[:40]}), which was not asked for.")
    given = {part.strip() for part in response.headers.get("Content-Length", "").split(",")} - {""}
    if not given:
        return None
    [length] = given if len(given) == 1 else {""}  # several equal ones are one
    if not (length.isascii() and length.isdigit() and len(length) < 16):
        shown = response.headers["Content-Length"][:60]
        raise HarnessError(f"{url}: the server says {shown!r} as the length of the file. Expected a whole number.")
    return int(length)


def extract(archive: Path, folder: Path, on_bytes: OnBytes | None = None) -> None:
    """Extract a zip into `folder`, after checking every member's name and the free space.

    Raises:
        HarnessError: path traversal, a damaged member, or too little space; nothing is extracted in the first
            and last case.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            members = opened.infolist()
            for member in members:
                check_member_name(member.filename, archive)
            total = sum(m.file_size for m in members)
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
            if total > free:
                raise HarnessError(
                    f"{folder}: extracting needs {total / 1e9:.1f} GB, {free / 1e9:.1f} GB are free."
                    f" dataset.root={archive} reads the zip without extracting it."
                )
            done = 0
            for member in members:
                opened.extract(member, folder)
                done += member.file_size
                if on_bytes:
                    on_bytes(done, total)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, RuntimeError, ValueError) as error:
        raise HarnessError(f"{archive}: not a whole zip file ({error}). Delete it and download again.") from error
    except OSError as error:
        raise HarnessError(f"{folder}: cannot be written ({error.strerror or error}).") from error
