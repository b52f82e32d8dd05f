"""A data set: pairs of image and annotation in a folder or a zip, and its classes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ade_harness.data.containers import UnreadableError
from ade_harness.data.decode import (
    check_label_kind,
    decode_image,
    decode_labels,
    has_known_palette,
    read_header,
)
from ade_harness.data.labels import Classes, LabelEncoding
from ade_harness.data.source import FileSource
from ade_harness.errors import HarnessError, did_you_mean
from ade_harness.files.escapes import require_utf8

_HEADER_BYTES = 1 << 16


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
    classes: Classes
    encoding: LabelEncoding
    split: str = "validation"
    is_demo: bool = False
    is_official: bool = False
    """Whether these are the images of ADEChallengeData2016, whose sizes are known."""
    apply_exif: bool = True
    """Turn images as their EXIF orientation says."""
    remarks: tuple[str, ...] = ()
    """What a user may want to know of its folders."""

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
        """Return a sha256 of all names and sizes in bytes: it distinguishes copies without reading them."""
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


def check_sizes(image: Sequence[int], annotation: Sequence[int], pair: Pair) -> None:
    """Refuse a pair whose image and annotation differ in size (each is (height, width))."""
    if tuple(image) != tuple(annotation):
        raise HarnessError(
            f"{pair.image} is {image[1]}x{image[0]} (width x height) but {pair.annotation} is"
            f" {annotation[1]}x{annotation[0]}: they must be of equal size. One of them is not the official file."
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


def add_file(
    found: dict[str, str], image_id: str, name: str, advice: str = "dataset.root must hold one copy of the data set"
) -> None:
    """Add a file to those found; raises HarnessError if the id has one already, or its name is not UTF-8."""
    require_utf8(image_id, name)
    if image_id in found:
        raise HarnessError(f"The image id {image_id} occurs twice, as {found[image_id]} and {name}: {advice}.")
    found[image_id] = name
