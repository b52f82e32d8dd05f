"""Image files that a user names, one by one or by folder."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from ade_harness.errors import require

_SUFFIXES = (".jpg", ".jpeg", ".png")
_UNREAD = frozenset([
    ".webp", ".tif", ".tiff", ".bmp", ".gif", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".jfif", ".jpe", ".ppm",
    ".dng",
])  # fmt: skip
"""Endings of pictures that are not read."""


def find_images(given: Sequence[Path], output: Path) -> Iterator[tuple[Path, str]]:
    """Yield each image with the name of what is written for it, the path below its folder; not what is in `output`.

    Raises:
        HarnessError: a path that is not there, a folder without images, or two images of one name.
    """
    seen: dict[str, Path] = {}
    for path in given:
        require(path.exists(), f"{path}: no such image or folder.")
        found = [path]
        if path.is_dir():
            found = _below(path, output, frozenset(_SUFFIXES))
        require(bool(found), f"{path}: contains no image ({', '.join(_SUFFIXES)}).")
        for file in found:
            name = (file.relative_to(path) if path.is_dir() else Path(file.name)).with_suffix("").as_posix()
            require(
                name not in seen,
                f"{file}: would be written to the same files as {seen.get(name)}. Predict them in two commands, with an"
                " --output of its own for each.",
            )
            seen[name] = file
            yield file, name


def unread_pictures(given: Sequence[Path], output: Path) -> list[Path]:
    """Return pictures in these folders that :func:`find_images` passes over: neither JPEG nor PNG by their names."""
    return [file for path in given if path.is_dir() for file in _below(path, output, _UNREAD)]


def _below(folder: Path, output: Path, suffixes: Collection[str]) -> list[Path]:
    """Return the files below a folder with one of these endings, sorted; not what an earlier command made."""
    made = output.resolve()
    below = (p for p in folder.rglob("*") if p.suffix.lower() in suffixes)
    return sorted(p for p in below if made not in p.resolve().parents)
