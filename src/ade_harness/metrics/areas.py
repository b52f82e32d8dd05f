"""Per-image class areas: all that scores, intervals and tests need of a ledger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ade_harness.data.labels import NUM_CLASSES
from ade_harness.metrics.confusion import Floats, area_scores
from ade_harness.metrics.counts import Row


@dataclass(frozen=True)
class ImageAreas:
    """Pixels of each class in each image."""

    ids: tuple[str, ...]
    stacked: Floats
    """[N, 450]: intersections, truth, predicted areas, one after another. Integers, held as float64 because sums of
    products of integers below 2**53 are exact there, in any order, and matrix products are fast."""

    @property
    def intersection(self) -> Floats:
        """[N, 150]."""
        return self.stacked[:, :NUM_CLASSES]

    @property
    def truth(self) -> Floats:
        """[N, 150]."""
        return self.stacked[:, NUM_CLASSES : 2 * NUM_CLASSES]

    @property
    def predicted(self) -> Floats:
        """[N, 150]."""
        return self.stacked[:, 2 * NUM_CLASSES :]

    def scores(self) -> dict[str, Floats]:
        """Return every score of every image alone, float64 [N]."""
        return area_scores(self.intersection, self.truth, self.predicted)


def split_areas(stacked: Floats) -> tuple[Floats, Floats, Floats]:
    """Return intersection, truth and predicted area of [..., 450]."""
    return stacked[..., :NUM_CLASSES], stacked[..., NUM_CLASSES : 2 * NUM_CLASSES], stacked[..., 2 * NUM_CLASSES :]


def areas_of(matrix: npt.NDArray[np.int64]) -> Floats:
    """Return the areas [450] of a confusion matrix int64 [150, 151]."""
    parts = (np.diagonal(matrix), matrix.sum(1), matrix[:, :NUM_CLASSES].sum(0))
    return np.concatenate(parts).astype(np.float64)


def image_areas(rows: Sequence[Row]) -> ImageAreas:
    """Return the areas of ledger rows, in their order."""
    stacked = np.zeros((len(rows), 3 * NUM_CLASSES))
    for areas, row in zip(stacked, rows, strict=True):
        intersection, truth, predicted = split_areas(areas)
        pixels = row.pixels.astype(np.float64)
        right, known = row.ground_truth == row.prediction, row.prediction < NUM_CLASSES
        intersection[row.ground_truth[right]] = pixels[right]  # each pair occurs once in a row
        np.add.at(truth, row.ground_truth, pixels)
        np.add.at(predicted, row.prediction[known], pixels[known])
    return ImageAreas(tuple(row.image_id for row in rows), stacked)


def matrices(rows: Sequence[Row]) -> npt.NDArray[np.int64]:
    """Return every image's confusion matrix, int64 [N, 150, 151]; 181 kB each, so for few images."""
    total = np.zeros((len(rows), NUM_CLASSES, NUM_CLASSES + 1), np.int64)
    for matrix, row in zip(total, rows, strict=True):
        matrix[row.ground_truth, row.prediction] = row.pixels
    return total
