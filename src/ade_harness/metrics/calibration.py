"""Whether a network is as often right as it says: reliability bins and the expected calibration error.

Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, over valid pixels: bins of equal
width, and the mean distance between a bin's confidence and its accuracy, weighted by its pixels. Confidence is the
largest class probability: softmax of dense scores, the average probability of several views, or, where a network
classifies masks, the best class's share of all classes' scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ade_harness.data.labels import CONFIDENCE_BINS, CONFIDENCE_UNITS
from ade_harness.metrics.confusion import Floats
from ade_harness.metrics.counts import Row


@dataclass(frozen=True)
class Calibration:
    """Sums of all images."""

    counts: npt.NDArray[np.int64]
    """[15, 3]: pixels, right pixels, sum of confidences in 1/65536."""

    @property
    def confidence(self) -> Floats:
        """Mean confidence of each bin, 0..1; NaN if it is empty."""
        confidence: Floats = self._per_pixel(self.counts[:, 2]) / CONFIDENCE_UNITS
        return confidence

    @property
    def accuracy(self) -> Floats:
        """Share of right pixels of each bin, 0..1; NaN if it is empty."""
        return self._per_pixel(self.counts[:, 1])

    @property
    def ece(self) -> float:
        """Expected calibration error, 0..1."""
        pixels = self.counts[:, 0]
        if not pixels.sum():
            return 0.0
        return float((np.nan_to_num(np.abs(self.confidence - self.accuracy)) * pixels).sum() / pixels.sum())

    def _per_pixel(self, sums: npt.NDArray[np.int64]) -> Floats:
        pixels = self.counts[:, 0]
        ratio: Floats = np.full(CONFIDENCE_BINS, np.nan)
        return np.divide(sums, pixels, out=ratio, where=pixels > 0)


def sum_calibration(rows: Sequence[Row]) -> Calibration | None:
    """Add up the ledger's counts; None if the run has none."""
    if not rows or any(row.calibration.size != CONFIDENCE_BINS * 3 for row in rows):
        return None
    return Calibration(np.sum([row.calibration.reshape(CONFIDENCE_BINS, 3) for row in rows], 0))
