"""Your own data: a folder of images, a folder of label files, and a YAML file that says what the labels mean.

The YAML file (docs/dataset.md has an example)::

    names: [road, sidewalk, sky]     # class 0, 1, 2
    ignore: [255]                    # label values that are not counted; this is the default
    mapping: {7: road, 8: sidewalk}  # label value -> class; without it, value n is class n
    colors: [[128, 64, 128], ...]    # RGB of each class; without it, PASCAL VOC's
    storage: palette_index           # how label files store values; 8-bit grey without it
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ade_harness.config.dataset import DatasetConfig
from ade_harness.data.dataset import Pair, SegmentationDataset, add_file, select
from ade_harness.data.labels import (
    IGNORE_INDEX,
    MAX_CLASSES,
    Classes,
    Color,
    LabelEncoding,
    LabelStorage,
    default_colors,
    encode_targets,
)
from ade_harness.data.source import MountedSource, open_source
from ade_harness.errors import HarnessError, did_you_mean, require
from ade_harness.files.documents import PlainLoader
from ade_harness.files.reading import expanded, read_regular

_KEYS = ("names", "ignore", "mapping", "colors", "storage")
_STORAGE = ("grey", "palette_index", "palette_colour", "uint16")
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
LABEL_SUFFIX = ".png"
_MAX_BYTES = 1_000_000
_MAX_NAME = 200
"""Characters of a class name; it stands in tables and pictures."""


def read_classes(path: Path, dataset: str) -> tuple[Classes, LabelEncoding]:
    """Read the YAML file of a data set's classes.

    Args:
        path: of the file.
        dataset: how messages call the data set.

    Raises:
        HarnessError: it cannot be read, or says something impossible; the message names the key.
    """
    content = _read(path)
    unknown = next((key for key in content if key not in _KEYS), None)
    if unknown is not None:
        raise HarnessError(
            f"{path}: {unknown}: no such key.{did_you_mean(str(unknown), _KEYS)} Known: {', '.join(_KEYS)}."
        )
    names = _names(content.get("names"), path)
    colors = _colors(content.get("colors"), len(names), path)
    encoding = _encoding(content, names, path)
    return Classes(dataset, names, colors), replace(encoding, storage=_storage(content, encoding, colors, path))


def _storage(content: Mapping[Any, Any], encoding: LabelEncoding, colors: Sequence[Color], path: Path) -> LabelStorage:
    kind = content.get("storage", "grey")
    require(
        isinstance(kind, str) and kind in _STORAGE,
        f"{path}: storage: {kind!r}: expected one of {', '.join(_STORAGE)}.",
    )
    own = tuple(None if t is None or t == IGNORE_INDEX else colors[t] for t in encoding.target_of)
    advice = (
        f"If you know how the labels are stored, say so in {path}: `storage: palette_index` (the indices),"
        " palette_colour (the grey levels of the palette) or uint16 (docs/dataset.md)."
    )
    return LabelStorage(kind, own, advice)


def _read(path: Path) -> dict[Any, Any]:
    try:
        text = read_regular(path, _MAX_BYTES).decode("utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise HarnessError(f"{path}: is not UTF-8. Save the file in that encoding.") from error
    try:
        content = yaml.load(text, PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        raise HarnessError(f"{path}: is not valid YAML ({' '.join(str(error).split())[:200]}).") from error
    if not isinstance(content, dict):
        raise HarnessError(f"{path}: expected a mapping with the key `names`, a list of class names.")
    return content


def _names(given: Any, path: Path) -> tuple[str, ...]:
    require(isinstance(given, list) and bool(given), f"{path}: names: expected a list of class names.")
    names = tuple(str(name).strip() for name in given)
    require(len(names) <= MAX_CLASSES, f"{path}: names: {len(names)} classes; at most {MAX_CLASSES} can be evaluated.")
    for index, (name, original) in enumerate(zip(names, given, strict=True)):
        # YAML reads an unquoted `no` or `on` as a truth value, and nobody means a list
        require(
            isinstance(original, str | int | float) and not isinstance(original, bool) and bool(name),
            f"{path}: names[{index}]: {original!r} is no name: put it in quotes.",
        )
        require(
            len(name) <= _MAX_NAME,
            f"{path}: names[{index}]: {name[:40]!r}... has {len(name):,} characters; at most {_MAX_NAME} are drawn and"
            " written.",
        )
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    require(twice is None, f"{path}: names: {twice!r} occurs twice.")
    return names


def _colors(given: Any, number: int, path: Path) -> tuple[tuple[int, int, int], ...]:
    if given is None:
        return default_colors(number)
    require(
        isinstance(given, list) and len(given) == number,
        f"{path}: colors: expected a list of {number} colours, one for each name.",
    )
    for index, color in enumerate(given):
        require(
            isinstance(color, list) and len(color) == 3 and all(_is_byte(v) for v in color),
            f"{path}: colors[{index}]: {color!r}: expected [red, green, blue], each 0..255.",
        )
    return tuple((red, green, blue) for red, green, blue in given)


def _is_byte(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255


def _encoding(content: Mapping[Any, Any], names: Sequence[str], path: Path) -> LabelEncoding:
    ignored = content.get("ignore", [255])
    if _is_byte(ignored):
        ignored = [ignored]
    require(
        isinstance(ignored, list) and all(_is_byte(v) for v in ignored),
        f"{path}: ignore: expected a list of label values, each 0..255.",
    )
    targets: list[int | None] = [None] * 256
    mapping = content.get("mapping")
    if mapping is None:
        targets[: len(names)] = range(len(names))
    else:
        require(
            isinstance(mapping, dict), f"{path}: mapping: expected label values and their classes, such as {{7: road}}."
        )
        for value, target in mapping.items():
            require(_is_byte(value), f"{path}: mapping: {value!r}: expected a label value 0..255.")
            targets[value] = _class_of(target, names, f"{path}: mapping: {value}: {target!r}")
    for value in ignored:
        require(
            mapping is None or targets[value] in (None, IGNORE_INDEX),
            f"{path}: ignore: {value} is in mapping too ({names[targets[value] or 0]}).",
        )
        targets[value] = IGNORE_INDEX
    missing = sorted(set(range(len(names))) - {t for t in targets if t is not None})
    require(
        not missing,
        f"{path}: no label value is class {missing[:1]} ({names[missing[0]] if missing else ''}): it is ignored, or not"
        " in mapping. Leave it out of names.",
    )
    held = "" if mapping is None else " or mapping"
    return encode_targets(
        targets, f"{path} has this value neither in names{held} nor in ignore: add it to one of them."
    )


def _class_of(target: Any, names: Sequence[str], where: str) -> int:
    """Return the class that a mapping's entry means: a name, a number, or null for "not counted"."""
    if target is None:
        return IGNORE_INDEX
    if isinstance(target, str) and target in names:
        return names.index(target)
    if isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(names):
        return target
    hint = did_you_mean(str(target), names)
    raise HarnessError(f"{where}: no such class.{hint} Expected a name, 0..{len(names) - 1}, or null (not counted).")


def open_folders(cfg: DatasetConfig, apply_exif: bool = True) -> SegmentationDataset:
    """Open the data set of ``dataset.kind=folder``.

    Image ids are paths below the image folder, without the suffix.

    Raises:
        HarnessError: nothing there, a pair that is not whole, an unknown id, or a mistake in the classes' file.
    """
    image_dir, label_dir = (expanded(p or "") for p in (cfg.image_dir, cfg.label_dir))
    classes, encoding = read_classes(expanded(cfg.classes or ""), cfg.name)
    sources = {
        str(path): open_source(path, "dataset.image_dir and dataset.label_dir") for path in (image_dir, label_dir)
    }
    source = MountedSource(sources)
    suffixes = (cfg.image_suffix,) if cfg.image_suffix else _IMAGE_SUFFIXES
    label_suffix = cfg.label_suffix or LABEL_SUFFIX
    own = image_dir == label_dir and cfg.image_suffix is None
    names = [n for n in sources[str(image_dir)].names() if not (own and n.endswith(label_suffix))]
    images = _by_id(names, str(image_dir), suffixes)
    labels = _by_id(sources[str(label_dir)].names(), str(label_dir), (label_suffix,))
    _check_whole(images, labels, image_dir, label_dir, suffixes, label_suffix)
    pairs = tuple(Pair(i, images[i], labels[i]) for i in sorted(images))
    return SegmentationDataset(
        name=cfg.name,
        source=source,
        pairs=select(pairs, cfg.limit, cfg.ids, image_dir),
        expected_images=len(pairs),
        split=cfg.split,
        apply_exif=apply_exif,
        classes=classes,
        encoding=encoding,
        remarks=_labels_alone(images, labels, label_dir),
    )


def _labels_alone(images: Collection[str], labels: Mapping[str, str], label_dir: Path) -> tuple[str, ...]:
    """Return a remark on labels of no image: a copy of the images may have broken off."""
    alone = sorted(set(labels) - set(images))
    if not alone:
        return ()
    return (
        f"{label_dir}: {len(alone):,} of {len(labels):,} label files have no image, the first is {labels[alone[0]]}:"
        " are they of another split, or are images missing? Only images are counted",
    )


def _by_id(names: Collection[str], folder: str, suffixes: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        suffix = next((s for s in suffixes if name.lower().endswith(s.lower())), None)
        if suffix is not None and len(name) > len(suffix):
            add_file(found, name[: -len(suffix)], f"{folder}/{name}", "dataset.image_suffix says which files are meant")
    return found


def _check_whole(
    images: Mapping[str, str],
    labels: Mapping[str, str],
    image_dir: Path,
    label_dir: Path,
    suffixes: Sequence[str],
    label_suffix: str,
) -> None:
    """Refuse folders without files, and images without labels; labels without images may be of another split."""
    for found, key, folder, endings in (
        (images, "image", image_dir, suffixes),
        (labels, "label", label_dir, (label_suffix,)),
    ):
        require(
            bool(found),
            f"dataset.{key}_dir={folder}: no files that end in {', '.join(endings)} are there. dataset.{key}_suffix"
            f" says how the {key} files end.",
        )
    alone = sorted(set(images) - set(labels))
    if alone:
        raise HarnessError(
            f"{label_dir}: {len(alone)} of {len(images)} images have no label file, the first is"
            f" {alone[0]}{label_suffix} (for {images[alone[0]]}). dataset.image_suffix and dataset.label_suffix say how"
            f" the names end, such as _leftImg8bit.png and _gtFine_labelIds.png."
        )
