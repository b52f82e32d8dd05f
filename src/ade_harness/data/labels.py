"""The 150 classes, and the only place that knows how annotation files encode them.

Annotation PNGs of ADEChallengeData2016 hold 0 for "other / unlabelled" and 1..150 for the classes.
Everywhere else in this package a class is 0..149.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
import numpy.typing as npt

NUM_CLASSES = 150
IGNORE_INDEX = 255
"""Target value of pixels without ground truth: they are never counted."""
NO_CLASS = 255
"""Label value of a pixel predicted as none of the 150 classes: wrong wherever there is ground truth."""


def target_from_annotation(annotation: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Map an annotation file's values to targets: 0 -> 255 (ignored), 1..150 -> 0..149.

    Source: ``reduce_zero_label`` of the public code bases, and CSAILVision/sceneparsing, which drops
    pixels annotated 0 for prediction and ground truth alike. Values over 150 must have been refused before.

    Args:
        annotation: uint8 [H, W], values 0..150.

    Returns:
        uint8 [H, W], values 0..149 and 255.
    """
    return annotation - np.uint8(1)  # 0 wraps to 255


@dataclass(frozen=True)
class ClassInfo:
    """One of the 150 classes."""

    index: int
    """0..149."""
    names: tuple[str, ...]
    """Synonyms of the official list, the usual name first."""
    pixel_ratio: float
    """Share of the labelled pixels (official objectInfo150.txt)."""
    color: tuple[int, int, int]
    """RGB of the public 150-colour palette, 0..255."""

    @property
    def name(self) -> str:
        """The usual name."""
        return self.names[0]


@cache
def classes() -> tuple[ClassInfo, ...]:
    """Return the 150 classes in order (names and ratios: the official objectInfo150.txt)."""
    with files("ade_harness.data").joinpath("ade20k_classes.csv").open(encoding="utf-8") as file:
        return tuple(
            ClassInfo(
                index=int(row["class_index"]),
                names=tuple(part.strip() for part in row["names"].split(",")),
                pixel_ratio=float(row["pixel_ratio"]),
                color=(int(row["red"]), int(row["green"]), int(row["blue"])),
            )
            for row in csv.DictReader(file)
        )


def class_names() -> list[str]:
    """Return the 150 usual names in class order."""
    return [c.name for c in classes()]


def palette() -> npt.NDArray[np.uint8]:
    """Return uint8 [256, 3] RGB: the 150 class colours, black elsewhere (ignored, none)."""
    table = np.zeros((256, 3), np.uint8)
    table[:NUM_CLASSES] = [c.color for c in classes()]
    return table


_DATASET_OF = {
    19: "Cityscapes", 20: "PASCAL VOC", 21: "PASCAL VOC", 59: "PASCAL Context", 60: "PASCAL Context", 80: "COCO",
    100: "ADE20K instances", 133: "COCO panoptic", 171: "COCO-Stuff", 172: "COCO-Stuff", 847: "ADE20K-full",
    1000: "ImageNet", 3000: "ADE20K-full",
}  # fmt: skip


def usual_dataset(classes: int) -> str | None:
    """Return the data set that usually has so many classes, other than ADE20K's 150; None if there is none."""
    return _DATASET_OF.get(classes)


CONFIDENCE_BINS = 15
"""Of a prediction's confidence, of equal width (Guo et al. 2017)."""
CONFIDENCE_UNITS = 2**16
"""Confidence is added up in integers of this fraction, so that sums are exact in any order."""
