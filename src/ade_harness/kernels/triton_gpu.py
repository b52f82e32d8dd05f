"""The kernels on CUDA, by Triton: labels straight from the low-resolution scores, nothing of [C, H, W].

Each program holds a tile of output pixels in registers and runs over the channels with a running maximum; the few
source values of a tile stay in the L1 cache. Nothing waits for the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ade_harness.kernels import reference
from ade_harness.kernels.bilinear import axis, part
from ade_harness.kernels.views import Size, View, whole

count = reference.count
normalise = reference.normalise

_TILE_ROWS, _TILE_COLUMNS = 4, 64


@triton.jit
def _mix(a, b, w_a, w_b):
    """Interpolate between two values. Triton compiles annotations too: none but `tl.constexpr` may stand here."""
    return tl.fma(a, w_a, b * w_b)


@triton.jit
def _rows_at(plane, top, bottom, w_top, w_bottom, x_low, x_high, w_x_low, w_x_high, width, mask):
    """One bilinear step at a tile of points: x first, then y."""
    a = tl.load(plane + top * width + x_low, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(plane + top * width + x_high, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(plane + bottom * width + x_low, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(plane + bottom * width + x_high, mask=mask, other=0.0).to(tl.float32)
    return _mix(_mix(a, b, w_x_low, w_x_high), _mix(c, d, w_x_low, w_x_high), w_top, w_bottom)


@triton.jit
def _label_tile(
    scores, labels, y_index, y_weight, x_index, x_weight, y2_index, y2_weight, x2_index, x2_weight,
    channels, low_height, low_width, mid_height, mid_width, height, width,
    TWO_STEPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Label one tile. Index tables hold (low, high) one after the other, weight tables likewise."""
    y = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    x = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    in_y, in_x = y < height, x < width
    mask = in_y & in_x
    if TWO_STEPS:
        m0 = tl.load(y2_index + y, mask=in_y, other=0)
        m1 = tl.load(y2_index + height + y, mask=in_y, other=0)
        n0 = tl.load(x2_index + x, mask=in_x, other=0)
        n1 = tl.load(x2_index + width + x, mask=in_x, other=0)
        wm0 = tl.load(y2_weight + y, mask=in_y, other=0.0)
        wm1 = tl.load(y2_weight + height + y, mask=in_y, other=0.0)
        wn0 = tl.load(x2_weight + x, mask=in_x, other=0.0)
        wn1 = tl.load(x2_weight + width + x, mask=in_x, other=0.0)
    else:
        m0, n0 = y, x
    a0 = tl.load(y_index + m0, mask=in_y, other=0)
    a1 = tl.load(y_index + mid_height + m0, mask=in_y, other=0)
    wa0 = tl.load(y_weight + m0, mask=in_y, other=0.0)
    wa1 = tl.load(y_weight + mid_height + m0, mask=in_y, other=0.0)
    b0 = tl.load(x_index + n0, mask=in_x, other=0)
    b1 = tl.load(x_index + mid_width + n0, mask=in_x, other=0)
    wb0 = tl.load(x_weight + n0, mask=in_x, other=0.0)
    wb1 = tl.load(x_weight + mid_width + n0, mask=in_x, other=0.0)
    if TWO_STEPS:
        c0 = tl.load(y_index + m1, mask=in_y, other=0)
        c1 = tl.load(y_index + mid_height + m1, mask=in_y, other=0)
        wc0 = tl.load(y_weight + m1, mask=in_y, other=0.0)
        wc1 = tl.load(y_weight + mid_height + m1, mask=in_y, other=0.0)
        d0 = tl.load(x_index + n1, mask=in_x, other=0)
        d1 = tl.load(x_index + mid_width + n1, mask=in_x, other=0)
        wd0 = tl.load(x_weight + n1, mask=in_x, other=0.0)
        wd1 = tl.load(x_weight + mid_width + n1, mask=in_x, other=0.0)
    best = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    label = tl.zeros((ROWS, COLUMNS), tl.int32)
    plane_size = tl.cast(low_height, tl.int64) * low_width  # [C, h, w] can have more elements than 32 bits count
    for channel in range(channels):
        plane = scores + channel * plane_size
        value = _rows_at(plane, a0, a1, wa0, wa1, b0, b1, wb0, wb1, low_width, mask)
        if TWO_STEPS:
            right = _rows_at(plane, a0, a1, wa0, wa1, d0, d1, wd0, wd1, low_width, mask)
            left_below = _rows_at(plane, c0, c1, wc0, wc1, b0, b1, wb0, wb1, low_width, mask)
            right_below = _rows_at(plane, c0, c1, wc0, wc1, d0, d1, wd0, wd1, low_width, mask)
            value = _mix(_mix(value, right, wn0, wn1), _mix(left_below, right_below, wn0, wn1), wm0, wm1)
        # NaN, which interpolating infinities makes, wins over numbers as in argmax
        better = (value > best) | ((value != value) & (best == best))  # noqa: PLR0124
        best = tl.where(better, value, best)
        label = tl.where(better, channel, label)
    tl.store(labels + y.to(tl.int64) * width + x, label.to(labels.dtype.element_ty), mask=mask)


def label_map(scores: Tensor, size: Size) -> Tensor:
    """See :func:`ade_harness.kernels.reference.label_map`; half-precision scores are read as they are."""
    return merge([whole(scores, size)], size, False)


def merge(views: Sequence[View], size: Size, probabilities: bool) -> Tensor:
    """See :func:`ade_harness.kernels.reference.merge`; several views or windows are left to it."""
    view = views[0]
    if len(views) > 1 or not view.is_whole or view.flipped:
        return reference.merge(views, size, probabilities)
    scores = view.scores[0].contiguous()
    channels, low_height, low_width = scores.shape
    top, left, height, width = view.area
    device = str(scores.device)
    y1 = _table(low_height, view.canvas[0], top, height, device, view.legacy)
    x1 = _table(low_width, view.canvas[1], left, width, device, view.legacy)
    y2 = _table(height, size[0], 0, size[0], device)
    x2 = _table(width, size[1], 0, size[1], device)
    labels = torch.empty(size, dtype=torch.uint8 if channels <= 256 else torch.int32, device=scores.device)
    grid = (triton.cdiv(size[0], _TILE_ROWS), triton.cdiv(size[1], _TILE_COLUMNS))
    _label_tile[grid](
        scores, labels, *y1, *x1, *y2, *x2,
        channels, low_height, low_width, height, width, size[0], size[1],
        TWO_STEPS=(height, width) != tuple(size), ROWS=_TILE_ROWS, COLUMNS=_TILE_COLUMNS,
    )  # fmt: skip
    return labels


@lru_cache(maxsize=4096)
def _table(old: int, new: int, start: int, length: int, device: str, legacy: bool = False) -> tuple[Tensor, Tensor]:
    """Return indices int32 [2 * length] and weights float32 [2 * length] of part of an axis, on the device."""
    low, high, w_low, w_high = part(axis(old, new, legacy), start, length)
    index = torch.from_numpy(np.concatenate([low, high]).astype(np.int32))
    weight = torch.from_numpy(np.concatenate([w_low, w_high]))
    return index.to(device), weight.to(device)


@cache
def agrees_with_torch() -> bool:
    """Whether labels equal torch's in every bit on this device; compiles the kernel, once per process.

    They can: torch's native CUDA kernel rounds as this one does (source index by fma, x first, then y, each step
    ``fma(w0, a, w1 * b)``), which was read from its machine code for sm_80 to sm_120.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(12, 23, 31, generator=generator)
    ties = torch.randint(0, 3, (12, 23, 31), generator=generator).float()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for scores in (noise.to(device), ties.to(device)):
        for canvas in ((92, 124), (70, 100)):
            views = [whole(scores, canvas)]
            if not torch.equal(merge(views, (92, 124), False), reference.merge(views, (92, 124), False)):
                return False
    return True
