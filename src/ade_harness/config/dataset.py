"""The ``dataset`` group: which images and annotations."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ade_harness.config.fields import MISSING, bounded, place

ADE20K_CLASSES = 150
"""How many classes ADE20K scene parsing has, and the synthetic images, which are drawn from them."""


class DatasetKind(StrEnum):
    """Where images come from."""

    demo = "demo"  # synthetic
    ade20k = "ade20k"
    folder = "folder"  # your own images, labels and classes

    @property
    def num_classes(self) -> int | None:
        """How many classes there are; None of your own data, whose file `dataset.classes` says it."""
        return None if self is DatasetKind.folder else ADE20K_CLASSES


class Split(StrEnum):
    """Which part of ADE20K."""

    validation = "validation"
    training = "training"


@dataclass
class DatasetConfig:
    """The data set."""

    name: str = MISSING
    kind: DatasetKind = MISSING
    root: str | None = place()  # kind=ade20k: folder or zip
    image_dir: str | None = place()  # kind=folder: folder or zip of images
    label_dir: str | None = place()  # of label PNGs; a name is its image's but for the suffix
    classes: str | None = place()  # YAML file: names, ignored values, mapping, colours
    image_suffix: str | None = None  # null: .jpg, .jpeg or .png
    label_suffix: str | None = None  # null: .png
    split: Split = Split.validation
    images: int = bounded(200, at_least=1, at_most=20_000, unit="synthetic images")  # kind=demo
    limit: int | None = bounded(None, at_least=1)  # only the first N: marks the run as partial
    ids: list[str] | None = None  # only these: marks the run as partial
    check_headers: bool = True  # look at every file's header before the first forward
