"""Members of archives from elsewhere."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from ade_harness.errors import HarnessError


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
