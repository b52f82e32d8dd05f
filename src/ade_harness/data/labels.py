"""What the classes of a data set are, and what the values of its label files mean.

Everywhere in this package a class is 0..C-1, C at most 255. Only a :class:`LabelEncoding` knows how files write that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from ade_harness.errors import HarnessError

Color = tuple[int, int, int]
"""RGB, 0..255."""
MAX_CLASSES = 255
"""Labels are uint8, and one value is needed for pixels that belong to no class."""
IGNORE_INDEX = 255
"""Target value of pixels without ground truth: they are never counted."""
NO_CLASS = 255
"""Label value of a pixel predicted as none of the classes (void): wrong wherever there is ground truth."""


@dataclass(frozen=True)
class Classes:
    """The classes of a data set, in order."""

    dataset: str
    """How messages call the data set."""
    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    """RGB, 0..255."""
    synonyms: tuple[tuple[str, ...], ...] = ()
    """Other names of each class; empty if there are none."""

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def palette(self) -> npt.NDArray[np.uint8]:
        """uint8 [256, 3] RGB: the class colours, black elsewhere (ignored, none)."""
        table = np.zeros((256, 3), np.uint8)
        table[: len(self)] = self.colors
        return table

    def find(self, name: str) -> int | None:
        """Return the class that a name means: its own name, or a synonym that no other class has; None if neither."""
        return self._index_of.get(name.strip().lower())

    @cached_property
    def _index_of(self) -> dict[str, int]:
        """The class of each name in lower case that means one class alone."""
        all_names = self.synonyms or tuple((name,) for name in self.names)
        found: dict[str, int] = {}
        for rank in (slice(1, None), slice(1)):  # own names last: they win
            level: dict[str, set[int]] = {}
            for index, names in enumerate(all_names):
                for name in names[rank]:
                    level.setdefault(name.strip().lower(), set()).add(index)
            for name, owners in level.items():
                found.pop(name, None)
                if len(owners) == 1:
                    found[name] = owners.pop()
        return found

    @property
    def span(self) -> str:
        """The classes as messages write them, such as ``0..149``."""
        return f"0..{len(self) - 1}"

    def as_dict(self) -> dict[str, Any]:
        """Return what a run keeps of them, so that its pages need no data set."""
        return {"names": list(self.names), "colors": [list(color) for color in self.colors]}


def classes_from(dataset: str, stored: Mapping[str, Any]) -> Classes:
    """Return what :meth:`Classes.as_dict` wrote."""
    return Classes(dataset, tuple(map(str, stored["names"])), tuple((r, g, b) for r, g, b in stored["colors"]))


def default_colors(number: int) -> tuple[tuple[int, int, int], ...]:
    """Return the PASCAL VOC colours 1..`number`: bits of the class's number, spread over the channels.

    Source: ``labelcolormap`` of the VOC devkit.
    """
    colors = []
    for value in range(1, number + 1):
        rgb = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                rgb[channel] |= (value >> (3 * bit + channel) & 1) << (7 - bit)
        colors.append((rgb[0], rgb[1], rgb[2]))
    return tuple(colors)


@dataclass(frozen=True)
class LabelStorage:
    """How the values of label files are stored in them."""

    kind: str = "grey"
    """"grey": 8-bit grey, or a palette that is known to show values by their index; "palette_index": a palette's
    indices, whatever its entries; "palette_colour": the grey levels of a palette's entries; "colour": by `colors`;
    "uint16": 16-bit grey."""
    colors: tuple[Color | None, ...] = ()
    """RGB of each value, for "colour" and for palettes that show values so."""
    advice: str = "Save it as 8-bit grey, or restore the official file."
    """What a message proposes for a file that is stored otherwise."""


@dataclass(frozen=True)
class LabelEncoding:
    """What the values of label files mean."""

    target_of: tuple[int | None, ...]
    """For each of the values 0..255: its class, `IGNORE_INDEX`, or None if no file may hold it."""
    refusal: str
    """What a message says of a value that no file may hold: what was expected, and what to do."""
    storage: LabelStorage = LabelStorage()

    @cached_property
    def _table(self) -> npt.NDArray[np.uint8]:
        return np.array([IGNORE_INDEX if t is None else t for t in self.target_of], np.uint8)

    @cached_property
    def _allowed(self) -> npt.NDArray[np.bool_]:
        return np.array([t is not None for t in self.target_of])

    @cached_property
    def _allowed_below(self) -> int:
        """Every value below this is allowed."""
        return next((value for value, target in enumerate(self.target_of) if target is None), 256)

    def targets(self, stored: npt.NDArray[np.uint8], name: str) -> npt.NDArray[np.uint8]:
        """Return the targets of a label file, uint8 [H, W]: classes, and `IGNORE_INDEX`.

        Args:
            stored: uint8 [H, W], the file's own values.
            name: how messages call the file.

        Raises:
            HarnessError: a value that no file may hold.
        """
        if int(stored.max(initial=0)) >= self._allowed_below:
            wrong = np.unique(stored[~self._allowed[stored]])
            if wrong.size:
                more = f"{', '.join(map(str, wrong[1:6]))}{', ...' if wrong.size > 6 else ''}"
                others = f" (and {wrong.size - 1} more: {more})"
                raise HarnessError(
                    f"{name}: holds the label {wrong[0]}{others if wrong.size > 1 else ''}. {self.refusal}"
                )
        targets: npt.NDArray[np.uint8] = cv2.LUT(stored, self._table)
        return targets


def encode_targets(
    classes: Sequence[int | None], refusal: str, storage: LabelStorage = LabelStorage()
) -> LabelEncoding:
    """Return the encoding in which value n means ``classes[n]``; values beyond are refused."""
    return LabelEncoding((*classes, *[None] * (256 - len(classes))), refusal, storage)


_DATASET_OF = {
    19: "Cityscapes", 20: "PASCAL VOC", 21: "PASCAL VOC", 59: "PASCAL Context", 60: "PASCAL Context", 80: "COCO",
    100: "ADE20K instances", 133: "COCO panoptic", 150: "ADE20K", 171: "COCO-Stuff", 172: "COCO-Stuff",
    847: "ADE20K-full", 1000: "ImageNet", 3000: "ADE20K-full",
}  # fmt: skip


def usual_dataset(classes: int) -> str | None:
    """Return the data set that usually has so many classes; None if there is none."""
    return _DATASET_OF.get(classes)


CONFIDENCE_BINS = 15
"""Bins of a prediction's confidence, of equal width (Guo et al. 2017)."""
CONFIDENCE_UNITS = 2**16
"""Confidence is added up in integers of this fraction, so that sums are exact in any order."""
