"""The 150 classes of ADE20K, and how its annotation files encode them.

Annotation PNGs of ADEChallengeData2016 hold 0 for "other / unlabelled" and 1..150 for the classes.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from ade_harness.config.dataset import ADE20K_CLASSES
from ade_harness.data.labels import IGNORE_INDEX, Classes, encode_targets

NUM_CLASSES = ADE20K_CLASSES
"""Classes of ADE20K: of its published systems, and of its synthetic images. Other data sets have other numbers."""


@dataclass(frozen=True)
class ClassInfo:
    """What the official list says of one of the 150 classes."""

    index: int
    """0..149."""
    names: tuple[str, ...]
    """Synonyms of the official list, the usual name first."""
    pixel_ratio: float
    """Share of the labelled pixels (official objectInfo150.txt)."""
    color: tuple[int, int, int]
    """RGB of the public 150-colour palette, 0..255."""


@cache
def ade20k_info() -> tuple[ClassInfo, ...]:
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


@cache
def ade20k_classes() -> Classes:
    """Return the 150 classes."""
    info = ade20k_info()
    return Classes(
        "ADE20K", tuple(c.names[0] for c in info), tuple(c.color for c in info), tuple(c.names for c in info)
    )


ADE20K_ENCODING = encode_targets(
    [IGNORE_INDEX, *range(NUM_CLASSES)],
    f"Annotations of this benchmark hold 0 (other) and 1..{NUM_CLASSES}.",
)
"""0 -> 255 (ignored), 1..150 -> 0..149.

Source: ``reduce_zero_label`` of the public code bases, and CSAILVision/sceneparsing, which drops pixels annotated 0 for
prediction and ground truth alike.
"""
