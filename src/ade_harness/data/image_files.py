"""Image files that a user names, one by one or by folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ade_harness.errors import HarnessError, require
from ade_harness.files.documents import read_json

_SUFFIXES = (".jpg", ".jpeg", ".png")
_UNREAD = frozenset([
    ".webp", ".tif", ".tiff", ".bmp", ".gif", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".jfif", ".jpe", ".ppm",
    ".dng",
])  # fmt: skip
"""Endings of pictures that are not read."""
RECORD = "predictions.json"
FOLDERS = ("labels", "pictures")
"""What `predict` writes into its output: which model, and two folders of files."""


def find_images(given: Sequence[Path], output: Path) -> list[tuple[Path, str]]:
    """Return each image once, with the name of what is written for it: the path below its folder.

    Left out are hidden files and folders, and what this or an earlier `predict` wrote. Images of a folder that differ
    in their ending alone keep it: ``a.jpg.png`` and ``a.png.png``.

    Args:
        given: images and folders.
        output: of the command.

    Raises:
        HarnessError: a path that is not there, a folder without images, or two images of one name in two folders.
    """
    found: dict[Path, tuple[Path, Path]] = {}
    for path in given:
        require(path.exists(), f"{path}: no such image or folder. Images are read from files, not from addresses.")
        below = _below(path, output, frozenset(_SUFFIXES)) if path.is_dir() else [path]
        require(bool(below), f"{path}: contains no image ({', '.join(_SUFFIXES)}).")
        for file in below:
            # a link is an image of its own: trees of links to one store of files are common
            found.setdefault(
                file.parent.resolve() / file.name, (file, file.relative_to(path) if path.is_dir() else Path(file.name))
            )
    stems = Counter(name.with_suffix("").as_posix() for _, name in found.values())
    named: dict[str, Path] = {}
    for file, name in found.values():
        stem = name.with_suffix("").as_posix()
        written = stem if stems[stem] == 1 else name.as_posix()
        require(
            written not in named,
            f"{file}: would be written to the same files as {named.get(written)}. Predict them in two commands, with an"
            " --output of its own for each.",
        )
        named[written] = file
    return [(file, name) for name, file in named.items()]


def unread_pictures(given: Sequence[Path], output: Path) -> list[Path]:
    """Return pictures in these folders that :func:`find_images` passes over: neither JPEG nor PNG by their names."""
    return [file for path in given if path.is_dir() for file in _below(path, output, _UNREAD)]


def _is_record(file: Path) -> bool:
    """Whether a file is `predict`'s own: other tools have files of this name too."""
    try:
        content: dict[str, Any] = read_json(file, dict)
    except HarnessError:
        return False
    return {"model", "protocol"} <= content.keys()


def _below(folder: Path, output: Path, suffixes: Collection[str]) -> list[Path]:
    """Return the files below a folder with one of these endings, sorted; not what a `predict` made."""
    outputs = [output, *(record.parent for record in folder.rglob(RECORD) if _is_record(record))]
    made = {(place / name).resolve() for place in outputs for name in FOLDERS}
    below = (path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    shown = (path for path in below if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    return sorted(path for path in shown if made.isdisjoint(path.resolve().parents))
