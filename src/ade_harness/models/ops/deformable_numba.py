"""The CPU's loop for :func:`ade_harness.models.ops.deformable.aggregate`: samples are added up where they are read."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numba as nb
import numpy as np
import torch
from torch import Tensor

Floats = Any  # float32 arrays


@nb.njit(cache=True, nogil=True, boundscheck=False, error_model="numpy", fastmath={"contract", "nsz"})
def _aggregate(values: Floats, levels: Any, points: Floats, weights: Floats, out: Floats) -> None:
    """Fill out [Q, G, D] of values [S, G, D], levels int64 [L, 3] (start, height, width), points [Q, G, K, 2]."""
    queries, groups, taps = weights.shape
    channels = values.shape[2]
    per_level = taps // levels.shape[0]
    for q in range(queries):
        for g in range(groups):
            total = out[q, g]
            for c in range(channels):
                total[c] = np.float32(0)
            for k in range(taps):
                start, height, width = levels[k // per_level]
                x = points[q, g, k, 0] * np.float32(width) - np.float32(0.5)
                y = points[q, g, k, 1] * np.float32(height) - np.float32(0.5)
                if not (x > np.float32(-1) and y > np.float32(-1) and x < width and y < height):
                    if np.isnan(x) or np.isnan(y):  # must not get lost
                        for c in range(channels):
                            total[c] = np.float32(np.nan)
                    continue
                left, top = int(np.floor(x)), int(np.floor(y))
                right_part, low_part = x - np.float32(left), y - np.float32(top)
                for dy in range(2):
                    row = top + dy
                    if row < 0 or row >= height:
                        continue
                    along_y = (low_part if dy else np.float32(1) - low_part) * weights[q, g, k]
                    for dx in range(2):
                        column = left + dx
                        if column < 0 or column >= width:
                            continue
                        share = (right_part if dx else np.float32(1) - right_part) * along_y
                        pixel = values[start + row * width + column, g]
                        for c in range(channels):
                            total[c] += share * pixel[c]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="deformable")


def aggregate_numba(values: Tensor, shapes: Sequence[tuple[int, int]], points: Tensor, weights: Tensor) -> Tensor:
    """See :func:`ade_harness.models.ops.deformable.aggregate`; as many threads as torch has."""
    batch, _, groups, channels = values.shape
    queries = points.shape[1]
    starts = np.cumsum([0, *(height * width for height, width in shapes[:-1])])
    levels = np.array([(start, *shape) for start, shape in zip(starts, shapes, strict=True)], np.int64)
    arrays = [t.detach().float().contiguous().numpy() for t in (values, points, weights)]
    out = np.empty((batch, queries, groups, channels), np.float32)
    threads = torch.get_num_threads()
    step = -(-queries // (threads * 4)) if threads > 1 else queries
    jobs = [
        (arrays[0][n], levels, arrays[1][n, i : i + step], arrays[2][n, i : i + step], out[n, i : i + step])
        for n in range(batch)
        for i in range(0, queries, step)
    ]
    if threads == 1:
        for job in jobs:
            _aggregate(*job)
    else:
        list(_pool(threads).map(lambda job: _aggregate(*job), jobs))
    return torch.from_numpy(out.reshape(batch, queries, groups * channels)).to(values.dtype)
