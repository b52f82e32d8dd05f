"""Plain torch, on any device: exact by construction, and without a tensor of [C, H, W] unless softmax needs it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ade_harness.kernels.bilinear import axis
from ade_harness.kernels.constants import constant, to_device
from ade_harness.kernels.views import PixelStatistics, Placement, Size, View, whole

_CHANNELS_AT_ONCE = 4
"""On a CPU: planes that stay in its caches."""
_GPU_BYTES = 256 << 20
"""Memory of the float32 planes at a time on a GPU, where each pass is a launch: all channels of an ordinary image."""
_SMALL_OUTPUT = 128
_OTHER_CHANNELS = (1, 3)
_ORDINARY = 1e37


def normalise(pixels: Tensor, statistics: PixelStatistics, placement: Placement | None = None) -> Tensor:
    """Make a network's input of pixels: mirror, normalise, pad.

    Args:
        pixels: uint8 [h, w, 3], RGB.
        statistics: mean, standard deviation, channel order, range.
        placement: where they lie on the canvas of (H, W); None is all of it.

    Returns:
        float32 [3, H, W], contiguous: a network may choose its convolutions by the strides of its input.
    """
    planes = (pixels.flip(1) if placement is not None and placement.flipped else pixels).permute(2, 0, 1)
    if statistics.reverse_channels:
        planes = planes.flip(0)
    values = planes.to(torch.float32, memory_format=torch.contiguous_format)
    return placed(normalise_values(values, statistics), statistics, placement)


def placed(planes: Tensor, statistics: PixelStatistics, placement: Placement | None) -> Tensor:
    """Put normalised float32 [3, h, w] on their canvas [3, H, W]; they are returned as they are if they fill it."""
    height, width = planes.shape[1:]
    if placement is None or (height, width) == tuple(placement.canvas):
        return planes
    canvas = planes.new_zeros((3, *placement.canvas))
    if placement.pad_value is not None:
        canvas += normalise_values(planes.new_full((3, 1, 1), placement.pad_value), statistics)
    top, left = placement.offset
    canvas[:, top : top + height, left : left + width] = planes
    return canvas


def normalise_values(values: Tensor, statistics: PixelStatistics) -> Tensor:
    """Normalise float32 [3, H, W] on the 0..255 scale, in the network's channel order, in place."""
    if statistics.max_value != 255:
        values /= 255 / statistics.max_value
    mean, std = (
        constant(tuple(v), values.device, torch.float32)[:, None, None] for v in (statistics.mean, statistics.std)
    )
    return values.sub_(mean).div_(std)


def label_map(scores: Tensor, size: Size) -> Tensor:
    """Upsample scores and take the best channel of each pixel.

    Bit-identical to ``F.interpolate(scores, size, mode="bilinear", align_corners=False).argmax(1)``: a running
    strict maximum over a few channels at a time, since bilinear interpolation treats channels independently.
    The first channel wins ties, and NaN (which interpolating infinities makes) wins over numbers, as in argmax.
    Where an interpolation would not change the size of finite scores it is left out, and the second one of a
    two-step protocol also for infinite ones, which it would turn into NaN.

    Args:
        scores: float [C, h, w], without NaN; half precision is converted to float32 first, because rounding
            each interpolated value flips near-ties.
        size: (H, W) of the label map.

    Returns:
        [H, W], values 0..C-1: uint8 up to 256 channels, else int32.
    """
    return merge([whole(scores, size)], size, False)


def merge(views: Sequence[View], size: Size, probabilities: bool) -> Tensor:
    """Average the views' scores at the label map's size, and take the best channel of each pixel.

    Args:
        views: of one image, in the order of summation.
        size: (H, W) of the label map.
        probabilities: average softmax over channels instead of the scores.

    Returns:
        As :func:`label_map`.
    """
    first = views[0].scores
    channels, device = first.shape[1], first.device
    dtype = torch.uint8 if channels <= 256 else torch.int32
    if probabilities and len(views) > 1:
        total = torch.zeros((channels, *size), device=device)
        for view in views:
            accumulate(total, view, True)
        return total.div_(len(views)).argmax(0).to(dtype)
    labels = torch.zeros(size, dtype=dtype, device=device)
    best = torch.full(size, -torch.inf, device=device)
    # interpolating numbers of ordinary size cannot make NaN, which would have to win
    plain = device.type == "cpu" and all(float(torch.stack(v.scores.aminmax()).abs().max()) < _ORDINARY for v in views)
    for start, end in _chunks(views, size):
        chunk = _planes(views[0], start, end, size)
        for view in views[1:]:
            chunk = chunk + _planes(view, start, end, size)
        if len(views) > 1:
            chunk = chunk / len(views)
        if plain:  # three passes over a plane that stays in the cache: less than max with indices
            for channel, plane in enumerate(chunk, start):
                labels.masked_fill_(plane > best, channel)
                torch.maximum(best, plane, out=best)
            continue
        values, indices = chunk.max(0)
        better = (values > best) | (values.isnan() & ~best.isnan())
        labels = torch.where(better, indices.to(dtype) + start, labels)
        best = torch.where(better, values, best)
    return labels


def mask_probabilities(
    masks: Tensor, canvas: Size, area: tuple[int, int, int, int], size: Size, dtype: torch.dtype
) -> Tensor:
    """Upsample the mask logits of queries to the canvas, crop them, upsample them to a size, and take their sigmoid.

    Each step is of the masks' dtype and rounds to it, as the official code's. A step that changes no size is left out.

    Args:
        masks: float [1, Q, h, w].
        canvas: (H, W) of the first step.
        area: (top, left, height, width) of the canvas that is kept.
        size: (H, W) of the second step.
        dtype: of the result.

    Returns:
        [Q, H, W], 0..1.
    """
    top, left, height, width = area
    cropped = _resize_masks(masks, canvas)[:, :, top : top + height, left : left + width]
    return _resize_masks(cropped, size)[0].sigmoid().to(dtype)


def _resize_masks(masks: Tensor, size: Size) -> Tensor:
    if tuple(masks.shape[2:]) == tuple(size):
        return masks
    if masks.device.type != "cpu":  # as below; channels-last masks would be resized by another kernel
        native: Tensor = torch.ops.aten.upsample_bilinear2d(masks.contiguous(), list(size), False)
        return native
    return F.interpolate(masks, size, mode="bilinear", align_corners=False)


def accumulate(total: Tensor, view: View, probabilities: bool) -> None:
    """Add a view's scores, or their softmax over channels, to float32 [C, H, W]."""
    planes = _planes(view, 0, total.shape[0], (total.shape[1], total.shape[2]))
    total += torch.softmax(planes, 0) if probabilities else planes


def _planes(view: View, start: int, end: int, size: Size) -> Tensor:
    """Return channels start..end-1 of a view at the label map's size, float32 [end - start, H, W]."""
    scores = view.scores[:, start:end].float().contiguous()
    resize = legacy_bilinear if view.legacy else _resize
    if view.is_whole:
        canvas = resize(scores, view.canvas)[0]
    else:
        canvas = torch.zeros((end - start, *view.canvas), device=scores.device)
        height, width = view.window
        for (top, left), window in zip(view.origins, scores, strict=True):
            canvas[:, top : top + height, left : left + width].add_(resize(window[None], view.window)[0])
        average_windows(canvas, view.origins, view.window)
    top, left, height, width = view.area
    planes = canvas[:, top : top + height, left : left + width]
    if (height, width) != tuple(size):
        planes = _resize(planes[None], size)[0]
    return planes.flip(-1) if view.flipped else planes


def average_windows(sums: Tensor, origins: tuple[tuple[int, int], ...], window: Size) -> None:
    """Divide sums of windows, float32 [C, h, w], in place by how many windows lie over each pixel."""
    rows, columns = _overlaps(origins, window, (sums.shape[1], sums.shape[2]), str(sums.device))
    if rows is not None and columns is not None:
        sums /= rows * columns
    elif (along_one := rows if columns is None else columns) is not None:
        sums /= along_one


@lru_cache(maxsize=256)
def _overlaps(
    origins: tuple[tuple[int, int], ...], window: Size, canvas: Size, device: str
) -> tuple[Tensor | None, Tensor | None]:
    """Return :meth:`View.overlaps` on a device, [h, 1] and [w]; None where all are 1: it saves a launch."""
    rows, columns = View(torch.empty(0), origins, window, canvas, None, False, False).overlaps()

    def factor(numbers: npt.NDArray[np.float32]) -> Tensor | None:
        return None if (numbers == 1).all() else to_device(torch.from_numpy(numbers), device)

    return factor(rows[:, None]), factor(columns)


@lru_cache(maxsize=256)
def _legacy_axis(old: int, new: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the table of an axis on a device: int64 [new] low and high, float32 [new] weights."""
    table = axis(old, new, legacy=True)
    low, high, w_low, w_high = (
        to_device(torch.from_numpy(values), device)
        for values in (table.low.astype(np.int64), table.high.astype(np.int64), table.w_low, table.w_high)
    )
    return low, high, w_low, w_high


def legacy_bilinear(scores: Tensor, size: Size) -> Tensor:
    """Resize [N, C, h, w] as TensorFlow 1's ``resize_bilinear(align_corners=False)`` did, x first, then y.

    Sums are taken in float64 and rounded once, as the compiled kernels' fused multiply-add does.
    """
    for dim, length in ((3, size[1]), (2, size[0])):
        low, high, *weights = _legacy_axis(scores.shape[dim], length, str(scores.device))
        w_low, w_high = (w.view([-1 if d == dim else 1 for d in range(4)]) for w in weights)
        upper = (scores.index_select(dim, high) * w_high).double()
        scores = (scores.index_select(dim, low).double() * w_low + upper).float()
    return scores


def _resize(scores: Tensor, size: Size) -> Tensor:
    same = tuple(scores.shape[2:]) == tuple(size)
    # torch's CUDA kernel copies in this case; its CPU kernel multiplies by 0, which turns infinities into NaN
    if same and (scores.device.type != "cpu" or bool(torch.isfinite(scores).all())):
        return scores
    if scores.device.type != "cpu":  # F.interpolate has other bits there under torch's global switch of determinism
        native: Tensor = torch.ops.aten.upsample_bilinear2d(scores, list(size), False)
        return native
    return F.interpolate(scores, size, mode="bilinear", align_corners=False)


def _chunks(views: Sequence[View], size: Size) -> list[tuple[int, int]]:
    """Return channel ranges whose interpolation equals that of all channels at once, in every bit."""
    channels = views[0].scores.shape[1]
    if any(uses_other_kernel(view, size) for view in views):
        return [(0, channels)]
    at_once = channels_at_once(views[0].scores.device.type, max(view.canvas[0] * view.canvas[1] for view in views))
    starts = list(range(0, channels, at_once))
    if channels - starts[-1] in _OTHER_CHANNELS and len(starts) > 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], channels], strict=True))


def channels_at_once(device_type: str, pixels: int) -> int:
    """Return how many channels are interpolated at a time, for planes of so many pixels."""
    return _CHANNELS_AT_ONCE if device_type == "cpu" else max(_CHANNELS_AT_ONCE, _GPU_BYTES // (4 * pixels))


def uses_other_kernel(view: View, size: Size) -> bool:
    """Whether torch's CPU code takes one of its other kernels somewhere in this view, so that rounding differs.

    It has others for outputs of height + width <= 128, for tensors that could be called channels-last (a single
    pixel or channel), and for three channels. Their rounding depends on the number of channels, so such tensors are
    not cut, and cutting makes none of them. (Found by comparing bits, torch 2.13: of 5,400 random shapes, every one
    with three channels and none with 2, 4, 5, 6 or 8 differed from the same channels among more.)
    """
    steps = [(view.area[2:], size)]
    if not view.legacy:
        steps.append(((view.scores.shape[2], view.scores.shape[3]), view.window))
    few = view.scores.shape[1] in _OTHER_CHANNELS
    return any(old != tuple(new) and (few or sum(new) <= _SMALL_OUTPUT or 1 in (*old, *new)) for old, new in steps)


def invalid_share(tensors: Sequence[Tensor]) -> Tensor:
    """Return the share of NaN and +inf among the values of some tensors, as a float32 tensor on their device.

    Half precision that overflows makes both, and argmax takes either for the best class. A class of -inf is one that
    cannot be, which some networks say on purpose.
    """
    if tensors[0].device.type == "cpu" and all(t.sum().isfinite() for t in tensors):
        return torch.zeros(())  # one quick pass; a sum may also overflow, or have a class of -inf
    found = torch.stack([(t.isnan() | t.isposinf()).sum() for t in tensors])
    return found.sum() / sum(t.numel() for t in tensors)


def count(labels: Tensor, target: Tensor, classes: int) -> Tensor:
    """Count pixels by ground truth and prediction.

    The ignored pixels get rows of their own that are cut off afterwards: no boolean gather. The sum is of integers,
    so it is exact and does not depend on the order.

    Args:
        labels: uint8 [H, W], 0..C-1, anything above is void.
        target: uint8 [H, W], 0..C-1, 255 where nothing is counted.
        classes: their number C, at most 255.

    Returns:
        int64 [C, C + 1] ``confusion_matrix[ground_truth, prediction]``; the last column is "none".
    """
    columns = classes + 1
    keys = target.to(torch.int32).mul_(columns).add_(labels.clamp(max=classes)).view(-1)
    if keys.device.type == "cuda":  # torch.bincount would wait for the largest value
        counts = torch.zeros(256 * columns, dtype=torch.int64, device=keys.device)
        counts.scatter_add_(0, keys.long(), torch.ones_like(keys, dtype=torch.int64))
    else:
        counts = torch.bincount(keys, minlength=256 * columns)
    return counts[: classes * columns].view(classes, columns)


def left_to_torch() -> dict[str, str]:
    """See :meth:`ade_harness.kernels.Kernels.left_to_torch`: this is plain torch, which stands in for nothing."""
    return {}
