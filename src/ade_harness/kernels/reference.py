"""Plain torch, on any device: exact by construction, and without a tensor of [150, H, W]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ade_harness.data.labels import NUM_CLASSES

_CHANNELS_AT_ONCE = 10
_SMALL_OUTPUT = 128
_COLUMNS = NUM_CLASSES + 1


def label_map(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Upsample scores and take the best channel of each pixel.

    Bit-identical to ``F.interpolate(scores, size, mode="bilinear", align_corners=False).argmax(1)``: a running
    strict maximum over a few channels at a time, since bilinear interpolation treats channels independently.
    The first channel wins ties, and NaN (which interpolating infinities makes) wins over numbers, as in argmax.
    When `size` is the scores' own size, the interpolation of finite scores is the identity and is left out.

    Args:
        scores: float [C, h, w], without NaN.
        size: (H, W) of the label map.

    Returns:
        [H, W], values 0..C-1: uint8 up to 256 channels, else int32.
    """
    # half-precision interpolation rounds each output, which flips near-ties
    scores = scores.float().contiguous()
    identity = tuple(scores.shape[-2:]) == tuple(size) and bool(torch.isfinite(scores).all())
    best: Tensor | None = None
    dtype = torch.uint8 if scores.shape[0] <= 256 else torch.int32
    labels = torch.zeros(size, dtype=dtype, device=scores.device)
    for start, end in _chunks(scores.shape[0], tuple(scores.shape[1:]), size):
        chunk = scores[start:end]
        if not identity:
            chunk = F.interpolate(chunk[None], size, mode="bilinear", align_corners=False)[0]
        values, channels = chunk.max(0)
        channels = channels.to(dtype) + start
        if best is None:
            best, labels = values, channels
        else:
            better = (values > best) | (values.isnan() & ~best.isnan())
            labels = torch.where(better, channels, labels)
            best = torch.where(better, values, best)
    return labels


def _chunks(channels: int, size: tuple[int, ...], new_size: tuple[int, int]) -> list[tuple[int, int]]:
    """Return channel ranges whose interpolation equals that of all channels at once, in every bit.

    torch's CPU code has other kernels, whose rounding depends on the number of channels, for outputs of
    height + width <= 128 and for tensors that could be called channels-last (a single pixel or channel). Such
    small outputs are not cut, and a single channel is not made by cutting. (Found by comparing bits, torch 2.13.)
    """
    if sum(new_size) <= _SMALL_OUTPUT or 1 in (*size, *new_size):
        return [(0, channels)]
    starts = list(range(0, channels, _CHANNELS_AT_ONCE))
    if channels - starts[-1] == 1 and len(starts) > 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], channels], strict=True))


def count(labels: Tensor, target: Tensor) -> Tensor:
    """Count pixels by ground truth and prediction.

    The ignored pixels get rows of their own that are cut off afterwards: no boolean gather, no host
    synchronisation. ``torch.bincount`` of integers is exact and deterministic on every device.

    Args:
        labels: uint8 [H, W], 0..149, anything above is "none of the classes".
        target: uint8 [H, W], 0..149, 255 where nothing is counted.

    Returns:
        int64 [150, 151] ``confusion_matrix[ground_truth, prediction]``; the last column is "none".
    """
    keys = target.to(torch.int32).mul_(_COLUMNS).add_(labels.clamp(max=NUM_CLASSES))
    counts = torch.bincount(keys.view(-1), minlength=256 * _COLUMNS)
    return counts[: NUM_CLASSES * _COLUMNS].view(NUM_CLASSES, _COLUMNS)
