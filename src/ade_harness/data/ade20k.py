"""ADEChallengeData2016: its official images and sizes, and opening it, from a folder or straight from the zip."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path, PurePosixPath

from ade_harness.config.dataset import Split
from ade_harness.data.ade20k_labels import ADE20K_ENCODING, ade20k_classes
from ade_harness.data.dataset import Pair, SegmentationDataset, add_file, select
from ade_harness.data.source import open_source
from ade_harness.errors import HarnessError

TRAINING_IMAGES = 20210


@cache
def validation_sizes() -> dict[str, tuple[int, int]]:
    """Return the official validation set: image id -> (height, width), 2,000 entries."""
    with files("ade_harness.data").joinpath("ade20k_validation_sizes.csv").open(encoding="utf-8") as file:
        return {row["image_id"]: (int(row["height"]), int(row["width"])) for row in csv.DictReader(file)}


def resized_images(dataset: SegmentationDataset, sizes: Sequence[tuple[int, int]]) -> list[str]:
    """Return the ids of official images whose (height, width), in the order of the data set, is another one."""
    if not dataset.is_official or dataset.split != "validation":
        return []
    official = validation_sizes()
    return [i for i, size in zip(dataset.ids, sizes, strict=True) if official.get(i, size) != tuple(size)]


@cache
def official_ids(split: str) -> frozenset[str]:
    """Return the ids of ADEChallengeData2016's images: 2,000 of "validation", 20,210 of "training"."""
    if split == "validation":
        return frozenset(validation_sizes())
    return frozenset(f"ADE_train_{number:08d}" for number in range(1, TRAINING_IMAGES + 1))


def check_official_ids(ids: Iterable[str], split: str, root: Path) -> None:
    """Refuse images that ADEChallengeData2016 does not have: their score would stand under its name.

    Raises:
        HarnessError: names the first of them.
    """
    foreign = sorted(set(ids) - official_ids(split))
    if foreign:
        raise HarnessError(
            f"{root}: {len(foreign):,} images in {split} are not of ADE20K's official {split} set, the first is"
            f" {foreign[0]}. Expected ids such as {min(official_ids(split))}. Take them out of images/ and"
            " annotations/, or evaluate them as a data set of your own: dataset.kind=folder (docs/dataset.md)."
        )


def open_ade20k(
    root: Path,
    split: str = "validation",
    limit: int | None = None,
    ids: Iterable[str] | None = None,
) -> SegmentationDataset:
    """Open one split of ADEChallengeData2016.

    Args:
        root: the folder ADEChallengeData2016, the folder that holds it, or the official zip (read in place).
        split: "validation" or "training".
        limit: only the first `limit` images, in the order of ids.
        ids: only these image ids.

    Raises:
        HarnessError: nothing there, another data set, images that ADE20K does not have, a pair that is not whole, or
            an unknown id.
    """
    source = open_source(root)
    names = source.names()
    if not names:
        raise HarnessError(
            f"{root}: this folder is empty. Expected ADEChallengeData2016 with images/ and annotations/."
        )
    images, annotations = split_files(names, split)
    if not images and not annotations:
        raise HarnessError(_nothing_here(root, split, names))
    for left, right, kind, missing in (
        (images, annotations, "image", f"annotation annotations/{split}"),
        (annotations, images, "annotation", f"image images/{split}"),
    ):
        alone = sorted(set(left) - set(right))
        if alone:
            suffix = ".png" if kind == "image" else ".jpg"
            raise HarnessError(
                f"{root}: {len(alone)} of {len(left)} {kind}s in {split} have no counterpart, the first is {alone[0]}"
                f" (missing: {missing}/{alone[0]}{suffix}). Extract the archive again; `data verify` lists all."
            )
    check_official_ids(images, split, root)
    pairs = tuple(Pair(i, images[i], annotations[i]) for i in sorted(images))
    return SegmentationDataset(
        name="ade20k",
        source=source,
        pairs=select(pairs, limit, ids, root),
        expected_images=len(official_ids(split)),
        classes=ade20k_classes(),
        encoding=ADE20K_ENCODING,
        split=split,
        is_official=True,
    )


def split_files(names: Iterable[str], split: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return id -> name of images and of annotations of a split, wherever below the root the two folders are."""
    images: dict[str, str] = {}
    annotations: dict[str, str] = {}
    for name in names:
        path = PurePosixPath(name)
        parent = path.parts[-3:-1]
        if parent == ("images", split) and path.suffix.lower() in (".jpg", ".jpeg"):
            add_file(images, path.stem, name)
        elif parent == ("annotations", split) and path.suffix.lower() == ".png":
            add_file(annotations, path.stem, name)
    return images, annotations


_OTHER_DATASETS = (
    (
        "the full ADE20K (3,000 classes)",
        ("_seg.png", "index_ade20k", "/ADE/validation/", "ADE20K_2021", "ADE20K_2016"),
    ),
    ("Cityscapes", ("leftImg8bit", "gtFine")),
    ("COCO or COCO-Stuff", ("val2017", "train2017", "stuffthingmaps", "instances_val")),
    ("PASCAL VOC or Context", ("JPEGImages", "SegmentationClass", "VOCdevkit")),
    ("Mapillary Vistas", ("mapillary", "v2.0/labels", "v1.2/labels")),
    ("the ADE20K instance challenge", ("annotations_instance/",)),
    ("the ADE20K test release (no annotations are public)", ("release_test/", "ADE_test_")),
)


def recognise(names: Iterable[str]) -> str | None:
    """Return what data set a list of file names looks like, if it is one that people mix up with this one."""
    text = "\n".join("/" + name for name in names)
    return next((label for label, marks in _OTHER_DATASETS if any(mark in text for mark in marks)), None)


def _nothing_here(root: Path, split: str, names: list[str]) -> str:
    for another in Split:
        there = split_files(names, another)[0]
        if there:
            return (
                f"{root}: the {split} split of ADEChallengeData2016 is not here, only {len(there):,} images of"
                f" {another}. The official archive has both: `python -m ade_harness data download` fetches it."
            )
    other = recognise(names)
    found = f"it looks like {other}" if other else f"found {len(names)} other files, such as {names[0]}"
    return (
        f"{root}: ADEChallengeData2016 not found: {found}. Expected images/{split}/*.jpg and"
        f" annotations/{split}/*.png (150 classes). `python -m ade_harness data download` fetches it."
    )
