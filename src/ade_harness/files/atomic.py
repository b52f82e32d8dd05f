"""Write files so that they are either whole or not there: a temporary name first, then a rename.

Temporary names begin with a dot: readers of a folder (pandas, pyarrow, a run that is continued) skip such names, so
nobody takes half a file for a whole one after a kill.
"""

from __future__ import annotations

import errno
import json
import math
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ade_harness.errors import HarnessError


@contextmanager
def replaced(
    path: Path, *, durable: bool = True, hint: str = "", error: type[HarnessError] = HarnessError
) -> Iterator[Path]:
    """Give the path of a temporary file, which takes the name `path` when the block ends.

    Args:
        path: of the file that will be there.
        durable: whether the content is on the disk (fsync) before it gets its name.
        hint: what to do if the disk is full; a sentence, added to the message.
        error: type of what is raised.

    Raises:
        HarnessError: the file cannot be written; no temporary file is left.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex[:12]}.tmp")  # names of 255 bytes are the longest that there are
    try:
        yield temporary
        if durable:
            _sync(temporary)
        temporary.replace(path)
        if durable:
            _sync(path.parent)
    except OSError as problem:
        reason = problem.strerror or problem
        advice = f" {hint}" if hint and problem.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise error(f"{path}: cannot be written ({reason}).{advice}") from problem
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Remove a file that nobody needs any more, if it can be: a disk that has become read-only says so elsewhere."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Write UTF-8 text; raises as :func:`replaced`."""
    with replaced(path, durable=durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON; what JSON cannot hold (NaN, infinities) becomes text. Raises as :func:`replaced`."""
    write_text(path, json.dumps(json_safe(content), indent=2, allow_nan=False) + "\n")


def json_safe(content: Any) -> Any:
    """Return nested mappings and sequences as JSON takes them."""
    if isinstance(content, dict):
        return {str(k): json_safe(v) for k, v in content.items()}
    if isinstance(content, list | tuple):
        return [json_safe(v) for v in content]
    return str(content) if isinstance(content, float) and not math.isfinite(content) else content


def with_folder(path: Path) -> Path:
    """Return a path after its folder was made.

    Raises:
        HarnessError: it cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HarnessError(f"{path.parent}: the folder cannot be made ({error.strerror or error}).") from error
    return path
