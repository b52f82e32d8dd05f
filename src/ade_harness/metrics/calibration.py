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
import torch
from torch import Tensor

from ade_harness.data.labels import IGNORE_INDEX
from ade_harness.metrics.confusion import Floats
from ade_harness.metrics.counts import Row

BINS = 15
"""As in the paper."""
_UNITS = 2**16
"""Confidence is added up in integers of this fraction, so that sums are exact in any order."""


@dataclass(frozen=True)
class Calibration:
    """Sums of all images."""

    counts: npt.NDArray[np.int64]
    """[15, 3]: pixels, right pixels, sum of confidences in 1/65536."""

    @property
    def confidence(self) -> Floats:
        """Mean confidence of each bin, 0..1; NaN if it is empty."""
        confidence: Floats = self._per_pixel(self.counts[:, 2]) / _UNITS
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
        ratio: Floats = np.full(BINS, np.nan)
        return np.divide(sums, pixels, out=ratio, where=pixels > 0)


def count_confidence(confidence: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """Count one image.

    Args:
        confidence: float [H, W], 0..1.
        labels: uint8 [H, W].
        target: uint8 [H, W], 255 where nothing is counted.

    Returns:
        int64 [15, 3] as in :class:`Calibration`, on the same device.
    """
    valid = target != IGNORE_INDEX
    units = (confidence[valid].double() * _UNITS).round().long().clamp(0, _UNITS)
    # a bin is open below and closed above, as in the paper; 0 falls into the first
    bins = ((units * BINS + _UNITS - 1) // _UNITS - 1).clamp(min=0)
    right = (labels[valid] == target[valid]).long()
    columns = [torch.zeros(BINS, dtype=torch.int64, device=bins.device) for _ in range(3)]
    for column, values in zip(columns, (torch.ones_like(units), right, units), strict=True):
        column.index_add_(0, bins, values)
    return torch.stack(columns, 1)


def sum_calibration(rows: Sequence[Row]) -> Calibration | None:
    """Add up the ledger's counts; None if the run has none."""
    if not rows or any(row.calibration.size != BINS * 3 for row in rows):
        return None
    return Calibration(np.sum([row.calibration.reshape(BINS, 3) for row in rows], 0))
