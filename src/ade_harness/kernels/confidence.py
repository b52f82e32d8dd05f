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
    valid = target != IGNORE_INDEX
    units = (confidence[valid].double() * CONFIDENCE_UNITS).round().long().clamp(0, CONFIDENCE_UNITS)
    # a bin is open below and closed above, as in the paper; 0 falls into the first
    bins = ((units * CONFIDENCE_BINS + CONFIDENCE_UNITS - 1) // CONFIDENCE_UNITS - 1).clamp(min=0)
    right = (labels[valid] == target[valid]).long()
    columns = [torch.zeros(CONFIDENCE_BINS, dtype=torch.int64, device=bins.device) for _ in range(3)]
    for column, values in zip(columns, (torch.ones_like(units), right, units), strict=True):
        column.index_add_(0, bins, values)
    return torch.stack(columns, 1)
