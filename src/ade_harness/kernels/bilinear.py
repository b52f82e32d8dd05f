"""Source indices and weights of torch's bilinear interpolation (``align_corners=False``), to the last bit.

torch's CPU code computes, for output index d: ``source = fma(scale, d + 0.5, -0.5)`` in float32, at least 0, with
``scale = old / new``; the lower index is its integer part, the upper weight its fraction. Found by comparing bits
with torch 2.13; the implementations that rely on it compare themselves with torch before they are used.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Axis(NamedTuple):
    """Linear interpolation along one axis: ``value[d] = source[low[d]] * w_low[d] + source[high[d]] * w_high[d]``."""

    low: npt.NDArray[np.uint32]
    high: npt.NDArray[np.uint32]
    w_low: npt.NDArray[np.float32]
    w_high: npt.NDArray[np.float32]


@lru_cache(maxsize=256)
def axis(old: int, new: int, legacy: bool = False) -> Axis:
    """Return the table for resizing `old` samples to `new`; the arrays are shared, not to be written.

    With `legacy`, as TensorFlow 1's ``resize_bilinear(align_corners=False)``: ``source = d * old / new``, whose pixels
    have their origin in the corner.
    """
    index = np.arange(new)
    if legacy:
        position = index.astype(np.float32) * np.float32(old / new)
        low = np.minimum(position.astype(np.int64), old - 1)
        weight = position - low.astype(np.float32)
        return Axis(
            low.astype(np.uint32), np.minimum(low + 1, old - 1).astype(np.uint32), np.float32(1) - weight, weight
        )
    if old == new:
        low = index.astype(np.uint32)
        return Axis(low, low, np.ones(new, np.float32), np.zeros(new, np.float32))
    scale = np.float64(np.float32(old) / np.float32(new))
    # the product and sum are exact in float64, so one rounding to float32 is what fma does
    source = np.maximum((scale * (index + 0.5) - 0.5).astype(np.float32), np.float32(0))
    whole = np.minimum(source.astype(np.int64), old - 1)
    w_high = np.clip(source - whole.astype(np.float32), np.float32(0), np.float32(1))
    high = np.minimum(whole + 1, old - 1)
    return Axis(whole.astype(np.uint32), high.astype(np.uint32), np.float32(1) - w_high, w_high)


def part(whole: Axis, start: int, length: int) -> Axis:
    """Return `length` outputs of an axis, from `start` on."""
    piece = slice(start, start + length)
    return Axis(whole.low[piece], whole.high[piece], whole.w_low[piece], whole.w_high[piece])
