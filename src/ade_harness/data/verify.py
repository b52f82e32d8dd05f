"""Read every pair of a data set and check it against the packaged list of names and sizes."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ade_harness.data.ade20k import recognise, split_files, validation_sizes
from ade_harness.data.ade20k_labels import ADE20K_ENCODING, NUM_CLASSES, ade20k_classes
from ade_harness.data.dataset import Pair, SegmentationDataset
from ade_harness.data.labels import IGNORE_INDEX
from ade_harness.data.source import open_source
from ade_harness.errors import HarnessError


@dataclass
class VerifyReport:
    """What a check of a data set found."""

    root: Path
    split: str
    pairs: int = 0
    expected: int = 0
    missing: list[str] = field(default_factory=list)
    """Official ids that are not there: a subset, or an archive that was not extracted whole."""
    problems: list[str] = field(default_factory=list)
    """One line per file that is wrong."""
    class_pixels: np.ndarray = field(default_factory=lambda: np.zeros(NUM_CLASSES, np.int64))
    ignored_pixels: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether this is the official split, complete and undamaged."""
        return not self.missing and not self.problems


def verify(root: Path, split: str = "validation", on_pair: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Decode every pair in parallel and compare ids and sizes with the official ones.

    Args:
        root: as for :func:`ade_harness.data.ade20k.open_ade20k`.
        split: "validation" or "training" (sizes are packaged for validation only).
        on_pair: called with (done, total) after each pair.

    Raises:
        HarnessError: `root` holds no ADEChallengeData2016 at all.
    """
    source = open_source(root)
    names = source.names()
    images, annotations = split_files(names, split)
    report = VerifyReport(root, split)
    if not images and not annotations:
        other = recognise(names)
        raise HarnessError(
            f"{root}: no images/{split} and annotations/{split} here"
            + (f": it looks like {other}." if other else f" ({len(names)} files).")
            + " Expected ADEChallengeData2016 (150 classes)."
        )
    report.problems += [f"{images[i]}: no annotation" for i in sorted(set(images) - set(annotations))]
    report.problems += [f"{annotations[i]}: no image" for i in sorted(set(annotations) - set(images))]
    pairs = tuple(Pair(i, images[i], annotations[i]) for i in sorted(set(images) & set(annotations)))
    official = validation_sizes() if split == "validation" else {}
    report.pairs, report.expected = len(pairs), len(official) or len(pairs)
    report.missing = sorted(set(official) - set(images))
    dataset = SegmentationDataset("ade20k", source, pairs, report.expected, ade20k_classes(), ADE20K_ENCODING)

    def check(index: int) -> tuple[str | None, np.ndarray]:
        pair = pairs[index]
        counts = np.zeros(256, np.int64)
        try:
            sample = dataset.load(index)
        except HarnessError as error:
            return str(error), counts
        counts = np.bincount(sample.target.reshape(-1), minlength=256)
        height, width = sample.target.shape
        if official and pair.image_id not in official:
            return f"{pair.image}: this id is not in the official {split} set", counts
        if official and official[pair.image_id] != (height, width):
            expected = official[pair.image_id]
            return (
                f"{pair.image}: {width}x{height} (width x height), the official image is"
                f" {expected[1]}x{expected[0]}: it was resized or renamed"
            ), counts
        return None, counts

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # Pillow decodes without the interpreter lock
        for done, (problem, counts) in enumerate(pool.map(check, range(len(pairs))), start=1):
            if problem:
                report.problems.append(problem)
            report.class_pixels += counts[:NUM_CLASSES]
            report.ignored_pixels += int(counts[IGNORE_INDEX])
            if on_pair:
                on_pair(done, len(pairs))
    return report
