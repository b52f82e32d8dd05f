"""Per-image class areas: all that scores, intervals and tests need of a ledger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ade_harness.metrics.confusion import Floats, area_scores
from ade_harness.metrics.counts import Row


@dataclass(frozen=True)
class ImageAreas:
    """Pixels of each class in each image."""

    ids: tuple[str, ...]
    stacked: Floats
    """[N, 3 C]: intersections, truth, predicted areas, one after another. Integers, held as float64 because sums of
    products of integers below 2**53 are exact there, in any order, and matrix products are fast."""

    @property
    def intersection(self) -> Floats:
        """[N, C]."""
        return split_areas(self.stacked)[0]

    @property
    def truth(self) -> Floats:
        """[N, C]."""
        return split_areas(self.stacked)[1]

    @property
    def predicted(self) -> Floats:
        """[N, C]."""
        return split_areas(self.stacked)[2]

    def scores(self) -> dict[str, Floats]:
        """Return every score of every image alone, float64 [N]."""
        return area_scores(self.intersection, self.truth, self.predicted)


def split_areas(stacked: Floats) -> tuple[Floats, Floats, Floats]:
    """Return intersection, truth and predicted area, each [..., C], of [..., 3 C]."""
    classes = stacked.shape[-1] // 3
    return stacked[..., :classes], stacked[..., classes : 2 * classes], stacked[..., 2 * classes :]


def areas_of(matrix: npt.NDArray[np.int64]) -> Floats:
    """Return the areas [3 C] of a confusion matrix int64 [C, C + 1]."""
    parts = (np.diagonal(matrix), matrix.sum(1), matrix[:, :-1].sum(0))
    return np.concatenate(parts).astype(np.float64)


def image_areas(rows: Sequence[Row], classes: int) -> ImageAreas:
    """Return the areas of ledger rows, in their order; `classes` is their number."""
    stacked = np.zeros((len(rows), 3 * classes))
    for areas, row in zip(stacked, rows, strict=True):
        intersection, truth, predicted = split_areas(areas)
        pixels = row.pixels.astype(np.float64)
        right, known = row.ground_truth == row.prediction, row.prediction < classes
        intersection[row.ground_truth[right]] = pixels[right]  # each pair occurs once in a row
        np.add.at(truth, row.ground_truth, pixels)
        np.add.at(predicted, row.prediction[known], pixels[known])
    return ImageAreas(tuple(row.image_id for row in rows), stacked)
