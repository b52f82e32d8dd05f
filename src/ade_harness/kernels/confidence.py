"""Confidence of predictions, counted on their device; :mod:`ade_harness.metrics.calibration` sums it up."""

from __future__ import annotations

import torch
from torch import Tensor

from ade_harness.data.labels import CONFIDENCE_BINS, CONFIDENCE_UNITS, IGNORE_INDEX


def count_confidence(confidence: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """Count one image.

    Args:
        confidence: float [H, W], 0..1.
        labels: uint8 [H, W].
        target: uint8 [H, W], 255 where nothing is counted.

    Returns:
        int64 [15, 3] as in :class:`Calibration`, on the same device.
    """
    units = (confidence.double() * CONFIDENCE_UNITS).round().long().clamp(0, CONFIDENCE_UNITS)
    # a bin is open below and closed above, as in the paper; 0 falls into the first
    bins = ((units * CONFIDENCE_BINS + CONFIDENCE_UNITS - 1) // CONFIDENCE_UNITS - 1).clamp(min=0)
    # ignored pixels get a bin of their own that is cut off: to pick others out, the host would wait for their number
    bins = torch.where(target != IGNORE_INDEX, bins, CONFIDENCE_BINS).view(-1)
    columns = torch.zeros((3, CONFIDENCE_BINS + 1), dtype=torch.int64, device=bins.device)
    for column, values in zip(columns, (torch.ones_like(units), (labels == target).long(), units), strict=True):
        column.scatter_add_(0, bins, values.view(-1))  # of integers: exact, in any order
    return columns[:, :CONFIDENCE_BINS].T.contiguous()
