"""The kernels on the CPU, compiled by numba; same interface and same bits as :mod:`ade_harness.kernels.reference`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor

from ade_harness.kernels import loops, reference
from ade_harness.kernels.bilinear import axis, part
from ade_harness.kernels.views import PixelStatistics, Placement, Size, View, whole

_CHUNK_BYTES = 4 << 20
"""Memory for the rows that are merged at a time."""
_ROWS_OF_WINDOWS = 16


invalid_share = reference.invalid_share
mask_probabilities = reference.mask_probabilities


@lru_cache(maxsize=8)
def _table(statistics: PixelStatistics) -> np.ndarray:
    """Return float32 [3, 256]: what the reference makes of each pixel value in each of the network's channels."""
    grey = torch.arange(256, dtype=torch.uint8)[None, :, None].expand(1, 256, 3)
    table: np.ndarray = reference.normalise(grey, statistics)[:, 0].contiguous().numpy()
    return table


def normalise(pixels: Tensor, statistics: PixelStatistics, placement: Placement | None = None) -> Tensor:
    """See :func:`ade_harness.kernels.reference.normalise`."""
    out = np.empty((3, pixels.shape[0], pixels.shape[1]), np.float32)
    order = np.array([2, 1, 0] if statistics.reverse_channels else [0, 1, 2])
    pixels = pixels.flip(1) if placement is not None and placement.flipped else pixels
    loops.look_up(pixels.contiguous().numpy(), _table(statistics), order, out)
    return reference.placed(torch.from_numpy(out), statistics, placement)


def label_map(scores: Tensor, size: Size) -> Tensor:
    """See :func:`ade_harness.kernels.reference.label_map`."""
    return merge([whole(scores, size)], size, False)


def merge(views: Sequence[View], size: Size, probabilities: bool) -> Tensor:
    """See :func:`ade_harness.kernels.reference.merge`; probabilities agree with torch's within float rounding."""
    if any(reference.uses_other_kernel(view, size) for view in views):
        return reference.merge(views, size, probabilities)
    arrays = [np.ascontiguousarray(view.scores.float().numpy()) for view in views]
    magnitudes = [loops.largest_magnitude(a) for a in arrays]
    if any(special for _, special in magnitudes):
        return reference.merge(views, size, probabilities)
    labels = np.empty(size, np.uint8 if arrays[0].shape[1] <= 256 else np.int32)
    if len(views) == 1 and views[0].is_whole and not views[0].flipped:
        _label_whole(views[0], arrays[0][0], magnitudes[0][0], labels)
    elif len(views) == 1:
        _label_windows(views[0], arrays[0], labels)
    else:
        _label_merged(views, arrays, probabilities, labels)
    return torch.from_numpy(labels)


def _label_whole(view: View, scores: loops.Floats, magnitude: np.float32, labels: np.ndarray) -> None:
    top, left, height, width = view.area
    y1 = part(axis(scores.shape[1], view.canvas[0], view.legacy), top, height)
    x1 = part(axis(scores.shape[2], view.canvas[1], view.legacy), left, width)
    y2, x2 = axis(height, labels.shape[0]), axis(width, labels.shape[1])
    two_steps = (height, width) != labels.shape
    loops.label_rows(scores, tuple(y1), tuple(x1), tuple(y2), tuple(x2), two_steps, magnitude, labels)


def _label_windows(view: View, scores: np.ndarray, labels: np.ndarray) -> None:
    """One view without softmax: channel by channel, nothing of all channels is held."""
    space = np.empty((1, _ROWS_OF_WINDOWS, labels.shape[1]), np.float32)
    for start in range(0, labels.shape[0], _ROWS_OF_WINDOWS):
        stop = min(start + _ROWS_OF_WINDOWS, labels.shape[0])
        _view_rows(view, scores, start, stop, labels.shape, space, labels[start:stop])
    if view.flipped:
        labels[:] = labels[:, ::-1].copy()


def _label_merged(views: Sequence[View], arrays: Sequence[np.ndarray], probabilities: bool, labels: np.ndarray) -> None:
    """Several views: some rows of all channels at a time."""
    height, width = labels.shape
    channels = arrays[0].shape[1]
    at_once = max(1, min(height, _CHUNK_BYTES // (channels * width * 4)))
    total = np.empty((channels, at_once, width), np.float32)
    values = np.empty_like(total)
    no_labels = np.empty((0, 0), labels.dtype)
    for start in range(0, height, at_once):
        stop = min(start + at_once, height)
        # contiguous also where the last rows are fewer
        part = values.reshape(-1)[: channels * (stop - start) * width].reshape(channels, stop - start, width)
        into = total.reshape(-1)[: part.size].reshape(part.shape)
        into[:] = 0
        for view, scores in zip(views, arrays, strict=True):
            _view_rows(view, scores, start, stop, (height, width), part, no_labels)
            if probabilities:
                loops.softmax_rows(part)
            loops.add_rows(part, view.flipped, into)
        loops.best_rows(into, np.float32(len(views)), labels[start:stop])


def _view_rows(
    view: View, scores: np.ndarray, start: int, stop: int, size: Size, out: np.ndarray, labels: np.ndarray
) -> None:
    area = view.area
    rows, columns = view.overlaps()
    y1, x1 = (axis(old, new, view.legacy) for old, new in zip(scores.shape[2:], view.window, strict=True))
    y2, x2 = axis(area[2], size[0]), axis(area[3], size[1])
    steps = (area[2:] != size, len(view.origins) > 1)
    origins = np.array(view.origins, np.int64)
    loops.view_rows(
        scores,
        origins,
        tuple(y1),
        tuple(x1),
        rows,
        columns,
        area,
        tuple(y2),
        tuple(x2),
        steps,
        start,
        stop,
        out,
        labels,
    )


def count(labels: Tensor, target: Tensor, classes: int) -> Tensor:
    """See :func:`ade_harness.kernels.reference.count`."""
    counts = np.zeros((classes, classes + 1), np.int64)
    loops.count_pixels(labels.contiguous().numpy(), target.contiguous().numpy(), counts)
    return torch.from_numpy(counts)


@cache
def agrees_with_torch() -> bool:
    """Whether this machine's torch rounds as the compiled loops do: decided by comparing bits, once per process.

    Whole images only: windows use the same two functions, and compiling them takes seconds.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(12, 23, 31, generator=generator)
    ties = torch.randint(0, 3, (12, 23, 31), generator=generator).float()
    cases = [[whole(scores, canvas)] for scores in (noise, ties) for canvas in ((92, 124), (70, 100))]
    return all(torch.equal(merge(views, (92, 124), False), reference.merge(views, (92, 124), False)) for views in cases)


def left_to_torch() -> dict[str, str]:
    """See :meth:`ade_harness.kernels.Kernels.left_to_torch`: nothing that rounds otherwise is."""
    return {}
