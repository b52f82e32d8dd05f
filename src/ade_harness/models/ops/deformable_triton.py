"""The CUDA kernel, by Triton, for :func:`ade_harness.models.ops.deformable.aggregate`.

A program adds up the samples of a tile of queries for one head or group in registers, in float32 whatever the
values' dtype is; all four corners of a sample are contiguous rows of channels. Nothing of [.., K, D] is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ade_harness.kernels.constants import constant

_USUAL_LANES = 64
_TILE, _MAX_VALUES = 16, 1024
"""Queries per program; and queries times channels, whose sums lie in registers: 16 queries of 128 channels (DINOv3's)
would take 144 registers a thread, 8 take 93 at most."""
EXACT = {"enable_fp_fusion": False}
"""Launch option: the last bits do not depend on what a version of Triton fuses by default."""
WIDE: dict[str, Any] = EXACT if torch.version.hip else {**EXACT, "maxnreg": 128}
"""Launch options for more than 64 channels: left alone, ptxas keeps two values on the stack on sm_100 to use but 48
registers. AMD's compiler has no such option."""


@triton.jit
def _corner(values, row, column, height, width, start, group, share, channel, groups, CHANNELS: tl.constexpr, inside):
    """Return the share of one corner, [TILE, LANES]."""
    valid = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    pixel = (start + row * width + column).to(tl.int64)
    address = values + (pixel[:, None] * groups + group) * CHANNELS + channel[None, :]
    read = tl.load(address, mask=(valid[:, None]) & inside, other=0.0).to(tl.float32)
    return read * share[:, None]


@triton.jit(do_not_specialize=["queries", "groups", "pixels"])
def _aggregate(
    values, levels, points, weights, out, queries, groups, pixels,
    TAPS: tl.constexpr, PER_LEVEL: tl.constexpr, CHANNELS: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Fill a tile of out [N, Q, G, D]; levels int32 [L, 3] are (start, height, width), points and weights float32.

    Under autocast weights are float32 beside values of half precision: one variant takes weights of any model.
    """
    query = tl.program_id(0) * TILE + tl.arange(0, TILE)
    group = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, LANES)
    in_query = query < queries
    inside = in_query[:, None] & (channel[None, :] < CHANNELS)
    values += image * pixels * groups * CHANNELS
    place = (image * queries + query) * groups + group
    total = tl.zeros((TILE, LANES), tl.float32)
    for tap in range(TAPS):
        level = tap // PER_LEVEL
        start = tl.load(levels + level * 3)
        height = tl.load(levels + level * 3 + 1)
        width = tl.load(levels + level * 3 + 2)
        x = tl.load(points + (place * TAPS + tap) * 2, mask=in_query, other=-2.0) * width - 0.5
        y = tl.load(points + (place * TAPS + tap) * 2 + 1, mask=in_query, other=-2.0) * height - 0.5
        weight = tl.load(weights + place * TAPS + tap, mask=in_query, other=0.0)
        weight = tl.where((x == x) & (y == y), weight, float("nan"))  # noqa: PLR0124  (NaN must not get lost)
        near = (x > -1) & (y > -1) & (x < width) & (y < height)
        x, y = tl.where(near, x, -2.0), tl.where(near, y, -2.0)
        left, top = tl.floor(x), tl.floor(y)
        right_part, low_part = x - left, y - top
        column, row = left.to(tl.int32), top.to(tl.int32)
        upper, lower = weight * (1 - low_part), weight * low_part
        total += _corner(values, row, column, height, width, start, group, upper * (1 - right_part), channel, groups,
                         CHANNELS, inside)  # fmt: skip
        total += _corner(values, row, column + 1, height, width, start, group, upper * right_part, channel, groups,
                         CHANNELS, inside)  # fmt: skip
        total += _corner(values, row + 1, column, height, width, start, group, lower * (1 - right_part), channel,
                         groups, CHANNELS, inside)  # fmt: skip
        total += _corner(values, row + 1, column + 1, height, width, start, group, lower * right_part, channel, groups,
                         CHANNELS, inside)  # fmt: skip
    tl.store(out + place[:, None] * CHANNELS + channel[None, :], total.to(out.dtype.element_ty), mask=inside)


def constants_of(taps: int, levels: int, channels: int) -> dict[str, int]:
    """Return the constants of a launch.

    Args:
        taps: samples of each query, of all levels together.
        levels: of the values.
        channels: of a head or group.
    """
    lanes = triton.next_power_of_2(channels)
    return {
        "TAPS": taps, "PER_LEVEL": taps // levels, "CHANNELS": channels, "LANES": lanes,
        "TILE": max(1, min(_TILE, _MAX_VALUES // lanes)),
    }  # fmt: skip


def aggregate_triton(values: Tensor, shapes: Sequence[tuple[int, int]], points: Tensor, weights: Tensor) -> Tensor:
    """See :func:`ade_harness.models.ops.deformable.aggregate`."""
    batch, pixels, groups, channels = values.shape
    queries, taps = points.shape[1], points.shape[3]
    rows, start = [], 0
    for height, width in shapes:
        rows.append((start, height, width))
        start += height * width
    levels = constant(tuple(rows), values.device, torch.int32)
    out = torch.empty((batch, queries, groups, channels), dtype=values.dtype, device=values.device)
    constants = constants_of(taps, len(shapes), channels)
    grid = (triton.cdiv(queries, constants["TILE"]), groups, batch)
    with torch.cuda.device_of(values):  # Triton launches on the current GPU
        _aggregate[grid](
            values.contiguous(), levels, points.float().contiguous(), weights.float().contiguous(), out, queries,
            groups, pixels, **constants, **(WIDE if constants["LANES"] > _USUAL_LANES else EXACT),
        )  # fmt: skip
    return out.flatten(2)
