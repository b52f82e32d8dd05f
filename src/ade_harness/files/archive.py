"""Members of archives from elsewhere."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ade_harness.errors import HarnessError

_MAX_EXPANSION = 100
"""Bytes of a byte in an archive; weights, which are close to noise, have two at most."""
_SMALL_BYTES = 1 << 28
"""What may expand as it likes."""


def check_expansion(members: Sequence[zipfile.ZipInfo], archive: Path) -> None:
    """Refuse an archive of weights that says it holds far more than weights can be packed into, before it is read.

    Raises:
        HarnessError: names the archive and both sizes.
    """
    total, packed = sum(m.file_size for m in members), max(1, sum(m.compress_size for m in members))
    if total > max(_SMALL_BYTES, _MAX_EXPANSION * packed):
        raise HarnessError(f"{archive}: says that it holds {total:,} bytes in {packed:,}, as no weights do. Delete it.")


def check_member_name(name: str, archive: Path) -> None:
    """Refuse a member whose name would be written outside the folder it is extracted to, or that has none."""
    if not name:
        raise HarnessError(f"{archive}: a member has no name. This is not the official file: nothing was extracted.")
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts and ":" in path.parts[0]):
        raise HarnessError(
            f"{archive}: the member {name!r} points outside the archive (path traversal)."
            " This is not the official file: nothing was extracted. Delete it."
        )
