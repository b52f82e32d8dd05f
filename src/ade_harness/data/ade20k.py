"""ADEChallengeData2016 as a list of image and annotation pairs, from a folder or straight from the zip."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from ade_harness.data.ade20k_labels import ADE20K_ENCODING, ade20k_classes
from ade_harness.data.containers import UnreadableError
from ade_harness.data.decode import (
    check_label_kind,
    decode_image,
    decode_labels,
    has_known_palette,
    read_header,
)
from ade_harness.data.labels import Classes, LabelEncoding
from ade_harness.data.source import FileSource, open_source
from ade_harness.errors import HarnessError, did_you_mean

_HEADER_BYTES = 1 << 16
TRAINING_IMAGES = 20210


@dataclass(frozen=True)
class Pair:
    """One image with its annotation; names are relative to the source."""

    image_id: str
    image: str
    annotation: str


@dataclass(frozen=True)
class Sample:
    """One decoded pair."""

    image_id: str
    image: npt.NDArray[np.uint8]
    """[H, W, 3] RGB."""
    target: npt.NDArray[np.uint8]
    """[H, W], 0..C-1, 255 where nothing is counted."""
    content_hash: str
    """Hash of both files' bytes: the run's record of what was evaluated."""


@dataclass(frozen=True)
class SegmentationDataset:
    """The pairs of one split, in the order of their ids."""

    name: str
    source: FileSource
    pairs: tuple[Pair, ...]
    expected_images: int
    """How many images the whole split has: fewer pairs make a run partial."""
    split: str = "validation"
    is_demo: bool = False
    is_official: bool = False
    """Whether these are the images of ADEChallengeData2016, whose sizes are known."""
    apply_exif: bool = True
    """Turn images as their EXIF orientation says."""
    classes: Classes = field(default_factory=ade20k_classes)
    encoding: LabelEncoding = ADE20K_ENCODING

    @property
    def ids(self) -> list[str]:
        """Image ids in order."""
        return [p.image_id for p in self.pairs]

    @property
    def is_partial(self) -> bool:
        """Whether images of the split are left out."""
        return len(self.pairs) != self.expected_images

    def ids_hash(self) -> str:
        """Return a sha256 of the ids, one per line."""
        return hashlib.sha256("".join(f"{i}\n" for i in self.ids).encode()).hexdigest()

    def labels_hash(self) -> str:
        """Return a sha256 of what the values of label files mean."""
        meaning: list[Any] = [list(self.classes.names), list(self.encoding.target_of)]
        if self.encoding.storage.kind != "grey":
            meaning.append(self.encoding.storage.kind)
        return hashlib.sha256(json.dumps(meaning).encode()).hexdigest()

    def content_hash(self, index: int) -> str:
        """Return a hash of both files' bytes."""
        return self._read(index)[2]

    def _read(self, index: int) -> tuple[bytes, bytes, str]:
        pair = self.pairs[index]
        image, annotation = self.source.read(pair.image), self.source.read(pair.annotation)
        digest = hashlib.blake2b(image, digest_size=16)
        digest.update(annotation)
        return image, annotation, digest.hexdigest()

    def load(self, index: int) -> Sample:
        """Decode one pair and check it.

        Raises:
            HarnessError: a file is damaged, of the wrong kind, holds a label that it may not, or the sizes differ.
        """
        pair = self.pairs[index]
        image_bytes, annotation_bytes, content_hash = self._read(index)
        try:
            image = decode_image(image_bytes, pair.image, self.apply_exif)
            annotation = decode_labels(annotation_bytes, pair.annotation, self.encoding.storage)
        except UnreadableError as error:
            if self.is_official:
                raise UnreadableError(f"{error} `data verify` lists all damaged ones.") from error
            raise
        check_sizes(image.shape[:2], annotation.shape, pair)
        return Sample(pair.image_id, image, self.encoding.targets(annotation, pair.annotation), content_hash)

    def files_hash(self) -> str:
        """Return a sha256 of all names and sizes in bytes: it tells copies apart without reading them."""
        sizes = self.source.sizes()
        lines = (f"{name} {sizes.get(name)}\n" for pair in self.pairs for name in (pair.image, pair.annotation))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def without(self, image_ids: Collection[str]) -> SegmentationDataset:
        """Return the same data set without some images."""
        return replace(self, pairs=tuple(p for p in self.pairs if p.image_id not in image_ids))

    def read_headers(self, annotations: bool = True) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
        """Check size and kind of every pair from the files' headers alone.

        Args:
            annotations: look at annotations too.

        Returns:
            The (height, width) of each sound pair by image id, and what is wrong with each of the others.
        """
        sizes, wrong = {}, {}
        for pair in self.pairs:
            try:
                size = self._size(pair.image)
                if annotations:
                    check_sizes(size, self._label_size(pair.annotation), pair)
                sizes[pair.image_id] = size
            except HarnessError as error:
                wrong[pair.image_id] = str(error)
        return sizes, wrong

    def _label_size(self, name: str) -> tuple[int, int]:
        """Return (height, width) of a label file, once it is known how its values are stored."""
        try:
            header = check_label_kind(self.source.read(name, limit=_HEADER_BYTES), name, self.encoding.storage)
        except HarnessError:  # what other tools write can push the palette behind the first bytes
            header = check_label_kind(self.source.read(name), name, self.encoding.storage)
        if not has_known_palette(header, self.encoding.storage):  # the pixels decide
            decode_labels(self.source.read(name), name, self.encoding.storage)
        return header.height, header.width

    def _size(self, name: str) -> tuple[int, int]:
        try:
            return read_header(self.source.read(name, limit=_HEADER_BYTES), name, self.apply_exif)
        except HarnessError:  # a long EXIF block can push the size behind the first bytes
            return read_header(self.source.read(name), name, self.apply_exif)

    def resized_images(self, sizes: Sequence[tuple[int, int]]) -> list[str]:
        """Return the ids whose image has another (height, width) than the official one."""
        if not self.is_official or self.split != "validation":
            return []
        official = validation_sizes()
        return [i for i, size in zip(self.ids, sizes, strict=True) if official.get(i, size) != tuple(size)]


def check_sizes(image: Sequence[int], annotation: Sequence[int], pair: Pair) -> None:
    """Refuse a pair whose image and annotation differ in size (each is (height, width))."""
    if tuple(image) != tuple(annotation):
        raise HarnessError(
            f"{pair.image} is {image[1]}x{image[0]} (width x height) but {pair.annotation} is"
            f" {annotation[1]}x{annotation[0]}: they must be of equal size. One of them is not the official file."
        )


@cache
def validation_sizes() -> dict[str, tuple[int, int]]:
    """Return the official validation set: image id -> (height, width), 2,000 entries."""
    with files("ade_harness.data").joinpath("ade20k_validation_sizes.csv").open(encoding="utf-8") as file:
        return {row["image_id"]: (int(row["height"]), int(row["width"])) for row in csv.DictReader(file)}


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
        split=split,
        is_official=True,
    )


def select(pairs: tuple[Pair, ...], limit: int | None, ids: Iterable[str] | None, root: Path) -> tuple[Pair, ...]:
    """Keep the pairs named by `ids`, then the first `limit`; raises HarnessError for an id that is not there."""
    if ids is not None:
        wanted = set(ids)
        unknown = sorted(wanted - {p.image_id for p in pairs})
        if unknown:
            hint = did_you_mean(unknown[0], [p.image_id for p in pairs])
            raise HarnessError(f"dataset.ids: {unknown[0]!r} is not in {root} ({len(pairs)} images).{hint}")
        pairs = tuple(p for p in pairs if p.image_id in wanted)
    if limit is not None:
        pairs = pairs[:limit]
    if not pairs:
        raise HarnessError("dataset.limit and dataset.ids leave no image to evaluate.")
    return pairs


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


def add_file(
    found: dict[str, str], image_id: str, name: str, advice: str = "dataset.root must hold one copy of the data set"
) -> None:
    """Add a file to those found; raises HarnessError if the id has one already."""
    if image_id in found:
        raise HarnessError(f"The image id {image_id} occurs twice, as {found[image_id]} and {name}: {advice}.")
    found[image_id] = name


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
    for another in ("validation", "training"):
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
