"""The kernels on CUDA, by Triton: labels of any views straight from the low-resolution scores, nothing of [C, H, W].

Each program holds a tile of output pixels in registers and runs over views and channels with a running maximum; the
few source values of a tile stay in the L1 cache. Nothing waits for the host, which passes the views' geometry in one
small copy from pinned memory. The launches are operators of torch, so that ``torch.compile``, ``torch.export`` and
fake tensors know their results' shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, lru_cache, wraps
from typing import Any, ParamSpec

import numpy as np
import torch
import triton
from torch import Tensor

from ade_harness.data.labels import IGNORE_INDEX
from ade_harness.kernels import reference, triton_jit
from ade_harness.kernels.constants import constant
from ade_harness.kernels.views import PixelStatistics, Placement, Size, View, whole
from ade_harness.runtime.gpu_errors import is_gpu_lost

_P = ParamSpec("_P")

TILES = {"cuda": (4, 32), "cpu": (64, 128)}
"""Rows and columns of a program's pixels; in the interpreter, on the CPU, large ones take less time."""
BLOCKS = {"cuda": (8, 4), "cpu": (16, 16)}
"""Channels at a time in one step and in two (whose four corners need more registers): so many independent loads are
under way."""
MASK_BLOCKS = {"cuda": (8, 2), "cpu": (16, 16)}
"""Queries at a time: of four in two steps, ptxas would spill some registers."""
RUN = 1024
_INVALID_PROGRAMS = 512
EXACT = {"enable_fp_fusion": False}
"""Launch option: products and sums are fused where :mod:`triton_jit` says so, and nowhere else."""
OF_VIEWS: dict[str, Any] = EXACT if torch.version.hip else {**EXACT, "maxnreg": 128}
"""Launch options of the two large kernels: left alone, ptxas spills three registers of one of them to use but 40. AMD's
compiler has no such option."""


def normalise(pixels: Tensor, statistics: PixelStatistics, placement: Placement | None = None) -> Tensor:
    """See :func:`ade_harness.kernels.reference.normalise`."""
    placement = placement or Placement((pixels.shape[0], pixels.shape[1]))
    height, width = placement.canvas
    pad = 0.0 if placement.pad_value is None else placement.pad_value
    padded = placement.pad_value is not None
    numbers = [height, width, *placement.offset, int(statistics.reverse_channels), int(placement.flipped), int(padded)]
    means = constant((tuple(statistics.mean), tuple(statistics.std)), pixels.device, torch.float32)
    canvas: Tensor = _normalise(pixels.contiguous(), means, numbers, 255 / statistics.max_value, pad)
    return canvas


def label_map(scores: Tensor, size: Size) -> Tensor:
    """See :func:`ade_harness.kernels.reference.label_map`; half-precision scores are read as they are."""
    return merge([whole(scores, size)], size, False)


def merge(views: Sequence[View], size: Size, probabilities: bool) -> Tensor:
    """See :func:`ade_harness.kernels.reference.merge`."""
    probabilities = probabilities and len(views) > 1
    if probabilities and not softmax_agrees_with_torch():
        return reference.merge(views, size, True)
    return _merge(views, size, probabilities)


def _merge(views: Sequence[View], size: Size, probabilities: bool) -> Tensor:
    scores = [view.scores.contiguous() for view in views]
    assert len({s.dtype for s in scores}) == 1, "the kernel reads all views as one dtype"
    geometry = _geometry(tuple((v.scores.shape, v.origins, v.window, v.area, v.flipped, v.legacy) for v in views))
    two_steps = any(view.area[2:] != tuple(size) for view in views)
    whole_view = len(views) == 1 and views[0].is_whole
    labels: Tensor = _label_views(scores, geometry, [*size], two_steps, probabilities, whole_view)
    return labels


def mask_probabilities(
    masks: Tensor, canvas: Size, area: tuple[int, int, int, int], size: Size, dtype: torch.dtype
) -> Tensor:
    """See :func:`ade_harness.kernels.reference.mask_probabilities`."""
    if not sigmoid_agrees_with_torch():
        return reference.mask_probabilities(masks, canvas, area, size, dtype)
    return _mask_probabilities(masks, canvas, area, size, dtype)


def _mask_probabilities(
    masks: Tensor, canvas: Size, area: tuple[int, int, int, int], size: Size, dtype: torch.dtype
) -> Tensor:
    if tuple(area) == (0, 0, *size) and tuple(size) == tuple(canvas) == masks.shape[2:] and masks.dtype == dtype:
        return masks[0].sigmoid()  # nothing is resized: one launch of torch's own
    shares: Tensor = _enlarge_masks(masks.contiguous(), [*canvas], [*area], [*size], dtype)
    return shares


def count(labels: Tensor, target: Tensor, classes: int) -> Tensor:
    """See :func:`ade_harness.kernels.reference.count`."""
    counts: Tensor = _count_pixels(labels.contiguous(), target.contiguous(), classes)
    return counts


def invalid_share(tensors: Sequence[Tensor]) -> Tensor:
    """See :func:`ade_harness.kernels.reference.invalid_share`."""
    invalid: Tensor = _count_invalid([_in_order_of_memory(t) for t in tensors])
    return invalid / sum(t.numel() for t in tensors)


def _in_order_of_memory(tensor: Tensor) -> Tensor:
    """Return all elements contiguously, in any order: a convolution's channels-last output is not copied."""
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1)
    return tensor.contiguous()


@lru_cache(maxsize=1024)
def _geometry(views: tuple[tuple[Size, tuple[Size, ...], Size, tuple[int, ...], bool, bool], ...]) -> list[int]:
    """Return the table of :mod:`ade_harness.kernels.triton_jit` without its pointers; not to be written."""
    fields: list[int] = []
    origins: list[int] = []
    begin = triton_jit.FIELDS.value * len(views)
    for shape, places, window, area, flipped, legacy in views:
        at = begin + len(origins)
        fields += [0, *shape[2:], *window, *area, int(flipped), int(legacy), len(places), at]
        origins += [number for place in places for number in place]
    return [*fields, *origins]


def _on_device(numbers: Sequence[int], like: Tensor) -> Tensor:
    """Copy numbers to a device; on CUDA from pinned memory, so that nothing waits."""
    table = torch.tensor(numbers, dtype=torch.int64)
    return table.pin_memory().to(like.device, non_blocking=True) if like.device.type == "cuda" else table


def on_its_gpu(launch: Callable[_P, Tensor]) -> Callable[_P, Tensor]:
    """Make a launcher's GPU the current one meanwhile: Triton launches there, wherever the tensors are."""

    @wraps(launch)
    def launched(*arguments: _P.args, **options: _P.kwargs) -> Tensor:
        first: Any = arguments[0]
        with torch.cuda.device_of(first if isinstance(first, Tensor) else first[0]):
            return launch(*arguments, **options)

    return launched


@on_its_gpu
def launch_labels(
    scores: Sequence[Tensor], geometry: Sequence[int], size: Sequence[int], two_steps: bool, probabilities: bool,
    whole_view: bool,
) -> Tensor:  # fmt: skip
    """Launch the label kernel, after that of the softmax's norms where `probabilities` are averaged.

    Args:
        scores: of each view, contiguous [N, C, h, w], all of one dtype.
        geometry: the views' table without pointers.
        size: (H, W) of the label map.
        two_steps: whether any view's area is resized to that size.
        probabilities: average the views' softmax.
        whole_view: whether there is one view of one window that is the canvas.

    Returns:
        [H, W], as :func:`merge`.
    """
    numbers = list(geometry)
    for index, tensor in enumerate(scores):
        numbers[index * triton_jit.FIELDS.value] = tensor.data_ptr()
    first = scores[0]
    table = _on_device(numbers, first)
    height, width = size
    channels = first.shape[1]
    device = first.device.type
    rows, columns = TILES[device]
    options = {"TWO_STEPS": two_steps, "ROWS": rows, "COLUMNS": columns, "CUDA": device == "cuda"}
    grid = (triton.cdiv(height, rows), triton.cdiv(width, columns))
    norms = first
    if probabilities:
        norms = torch.empty((len(scores), 2, height, width), device=first.device)
        triton_jit.view_norms[(*grid, len(scores))](
            table, first, norms, channels, height, width, **options, **OF_VIEWS
        )  # fmt: skip
    labels = torch.empty((height, width), dtype=_dtype(channels), device=first.device)
    triton_jit.label_tile[grid](
        table, first, norms, labels, len(scores), channels, height, width, 1 / len(scores),
        PROBABILITIES=probabilities, BLOCK=1 if probabilities else BLOCKS[device][two_steps], WHOLE=whole_view,
        **options, **OF_VIEWS,
    )  # fmt: skip
    return labels


@on_its_gpu
def launch_masks(
    masks: Tensor, canvas: Sequence[int], area: Sequence[int], size: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Launch the kernel of :func:`mask_probabilities`: [Q, H, W] of contiguous [1, Q, h, w]."""
    queries, device = masks.shape[1], masks.device.type
    height, width = size
    rows, columns = TILES[device]
    two_steps = list(area[2:]) != list(size)
    shares = torch.empty((queries, height, width), dtype=dtype, device=masks.device)
    triton_jit.mask_tile[(triton.cdiv(height, rows), triton.cdiv(width, columns))](
        masks, shares, queries, *masks.shape[2:], *canvas, *area, height, width, TWO_STEPS=two_steps,
        BLOCK=MASK_BLOCKS[device][two_steps], ROWS=rows, COLUMNS=columns, CUDA=device == "cuda", **OF_VIEWS,
    )  # fmt: skip
    return shares


@on_its_gpu
def launch_count(labels: Tensor, target: Tensor, classes: int) -> Tensor:
    """Launch the count kernel; see :func:`count`."""
    counts = torch.zeros((classes, classes + 1), dtype=torch.int64, device=labels.device)
    pixels = labels.numel()
    triton_jit.count_tile[(triton.cdiv(pixels, RUN),)](labels, target, counts, pixels, classes, SIZE=RUN, **EXACT)
    return counts


@on_its_gpu
def launch_normalise(pixels: Tensor, means: Tensor, numbers: Sequence[int], scale: float, pad: float) -> Tensor:
    """Launch the kernel of :func:`normalise`.

    Args:
        pixels: uint8 [h, w, 3], contiguous.
        means: float32 [2, 3], mean and standard deviation.
        numbers: height and width of the canvas, top, left, and whether BGR, mirrored, padded.
        scale: what pixels are divided by before.
        pad: value of the padding, as of a pixel.

    Returns:
        float32 [3, H, W].
    """
    canvas_height, canvas_width, top, left, reverse, flipped, padded = numbers
    cuda = pixels.device.type == "cuda"
    canvas = torch.empty((3, canvas_height, canvas_width), device=pixels.device)
    triton_jit.normalise_tile[(triton.cdiv(canvas_height * canvas_width, RUN),)](
        pixels, canvas, means, canvas_height, canvas_width, top, left, pixels.shape[0], pixels.shape[1], reverse,
        flipped, padded, reciprocal(scale) if cuda else scale, pad, CUDA=cuda, SIZE=RUN, **EXACT,
    )  # fmt: skip
    return canvas


def reciprocal(scale: float) -> float:
    """Return 1 / scale as torch has it on CUDA, where it divides by a number: of float32, and rounded to it."""
    return float(np.float32(1) / np.float32(scale))


@on_its_gpu
def launch_count_invalid(tensors: Sequence[Tensor]) -> Tensor:
    """Count NaN and +inf: int64 [1], over contiguous tensors of one dtype."""
    first = tensors[0]
    table = _on_device([number for t in tensors for number in (t.data_ptr(), t.numel())], first)
    total = torch.zeros(1, dtype=torch.int64, device=first.device)
    programs = min(_INVALID_PROGRAMS, triton.cdiv(max(t.numel() for t in tensors), RUN))
    triton_jit.count_invalid[(programs, len(tensors))](table, first, total, SIZE=RUN, **EXACT)
    return total


def _dtype(channels: int) -> torch.dtype:
    return torch.uint8 if channels <= 256 else torch.int32


# Operators of torch, so that torch.compile, torch.export and fake tensors know them. Runs on the CPU have others: there
# these are Triton's interpreter, in tests. They are `custom_op`, which stays closed, and not `triton_op`, which
# torch.compile looks into: a table of addresses (`data_ptr`) has no meaning where there are no tensors yet.
@torch.library.custom_op("ade_harness::label_views", mutates_args=(), device_types=("cuda", "cpu"))
def _label_views(
    scores: list[Tensor], geometry: list[int], size: list[int], two_steps: bool, probabilities: bool, whole_view: bool
) -> Tensor:
    return launch_labels(scores, geometry, size, two_steps, probabilities, whole_view)


@_label_views.register_fake
def _(
    scores: list[Tensor], geometry: list[int], size: list[int], two_steps: bool, probabilities: bool, whole_view: bool
) -> Tensor:
    return scores[0].new_empty(size, dtype=_dtype(scores[0].shape[1]))


@torch.library.custom_op("ade_harness::enlarge_masks", mutates_args=(), device_types=("cuda", "cpu"))
def _enlarge_masks(masks: Tensor, canvas: list[int], area: list[int], size: list[int], dtype: torch.dtype) -> Tensor:
    return launch_masks(masks, canvas, area, size, dtype)


@_enlarge_masks.register_fake
def _(masks: Tensor, canvas: list[int], area: list[int], size: list[int], dtype: torch.dtype) -> Tensor:
    return masks.new_empty((masks.shape[1], *size), dtype=dtype)


@torch.library.custom_op("ade_harness::count_pixels", mutates_args=(), device_types=("cuda", "cpu"))
def _count_pixels(labels: Tensor, target: Tensor, classes: int) -> Tensor:
    return launch_count(labels, target, classes)


@_count_pixels.register_fake
def _(labels: Tensor, target: Tensor, classes: int) -> Tensor:
    return labels.new_empty((classes, classes + 1), dtype=torch.int64)


@torch.library.custom_op("ade_harness::normalise_pixels", mutates_args=(), device_types=("cuda", "cpu"))
def _normalise(pixels: Tensor, means: Tensor, numbers: list[int], scale: float, pad: float) -> Tensor:
    return launch_normalise(pixels, means, numbers, scale, pad)


@_normalise.register_fake
def _(pixels: Tensor, means: Tensor, numbers: list[int], scale: float, pad: float) -> Tensor:
    return means.new_empty((3, *numbers[:2]))


@torch.library.custom_op("ade_harness::count_invalid", mutates_args=(), device_types=("cuda", "cpu"))
def _count_invalid(tensors: list[Tensor]) -> Tensor:
    return launch_count_invalid(tensors)


@_count_invalid.register_fake
def _(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty(1, dtype=torch.int64)


_SIZE = (92, 124)


def _sample_views() -> list[View]:
    """Return a whole view, one with padding, a mirrored one of an odd size, and one of windows; noise and ties."""
    generator = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    noise = torch.randn(4, 12, 23, 31, generator=generator).to(device)
    ties = torch.randint(0, 3, (12, 23, 31), generator=generator).float().to(device)
    windows = tuple((top, left) for top in (0, 28) for left in (0, 37))
    return [
        whole(noise[0], _SIZE),
        whole(ties, (76, 100), (2, 3, 70, 93)),
        whole(noise[1], (70, 100), flipped=True),
        View(noise, windows, (64, 72), (92, 109)),
    ]


def _more_cases() -> list[View]:
    """Return what no sample has: windows in one step, a size that stays (with infinities), TensorFlow's upsampling."""
    generator = torch.Generator().manual_seed(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    noise = torch.randn(2, 12, 92, 70, generator=generator)
    still = torch.randn(12, *_SIZE, generator=generator)
    if device == "cuda":  # where torch copies what keeps its size; on the CPU it makes NaN of infinities
        still[3], noise[0, 5] = -torch.inf, -torch.inf
    return [
        View(noise.to(device), ((0, 0), (0, 54)), (92, 70), _SIZE),
        whole(still.to(device), _SIZE),
        replace(whole(noise[1, :, :23, :31].to(device), _SIZE), legacy=True),
    ]


def agrees_with_torch() -> bool:
    """Whether all results equal torch's in every bit on the current GPU; compiles the kernels, once in a process.

    They can: torch's native CUDA kernel rounds as this one does (source index by fma, x first, then y, each step
    ``fma(w0, a, w1 * b)``), which was read from its machine code for sm_80 to sm_120.
    """
    return _agrees(_gpu())


def _gpu() -> int | None:
    """Return the number of the current GPU; None without one, where Triton's interpreter runs."""
    return torch.cuda.current_device() if torch.cuda.is_available() else None


@cache
def _agrees(gpu: int | None) -> bool:
    views = _sample_views()
    alone = [*views, *_more_cases()]
    # in bfloat16 too, as scores come where a protocol sums over queries in it: another variant of the kernel
    halves = [replace(view, scores=view.scores.bfloat16()) for view in alone]
    # of three the average rounds: torch multiplies by a third on CUDA, and divides on the CPU
    for case in (*([view] for view in (*alone, *halves)), views, views[:3]):
        if not torch.equal(_merge(case, _SIZE, False), reference.merge(case, _SIZE, False)):
            return False
    labels = reference.merge(views, _SIZE, False)
    target = reference.merge(views[:1], _SIZE, False)
    target[:3] = IGNORE_INDEX
    pixels = torch.arange(30 * 40 * 3, device=labels.device).remainder(256).to(torch.uint8).view(30, 40, 3)
    of_bytes = PixelStatistics((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), True)
    of_shares = PixelStatistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), False, 1.0)
    for statistics in (of_bytes, of_shares):
        for placement in (Placement((36, 40), (2, 0), True, 0.0), Placement((33, 44), (1, 2)), Placement((30, 40))):
            expected = reference.normalise(pixels, statistics, placement)
            if not torch.equal(normalise(pixels, statistics, placement), expected):
                return False
    return (
        torch.equal(count(labels, target, 12), reference.count(labels, target, 12))
        and float(invalid_share([views[0].scores, torch.full_like(labels, torch.nan, dtype=torch.float32)])) > 0
    )


def softmax_agrees_with_torch() -> bool:
    """Whether labels of averaged probabilities equal torch's in every bit on the current GPU; else torch makes them."""
    return _softmax_fault(_gpu()) is None


@cache
def _softmax_fault(gpu: int | None) -> str | None:
    """Return why labels of averaged probabilities are left to torch; None if they are not."""
    views = _sample_views()[:3]
    try:
        if torch.equal(_merge(views, _SIZE, True), reference.merge(views, _SIZE, True)):
            return None
    except Exception as error:  # a compiler that fails in any way, at this kernel alone
        if is_gpu_lost(error):
            raise
        return f"the kernel for the softmax of views fails ({type(error).__name__}: {error})".splitlines()[0]
    return "the softmax of views rounds differently from torch's here"


def sigmoid_agrees_with_torch() -> bool:
    """Whether probabilities of masks equal torch's in every bit on the current GPU; else torch makes them."""
    return _sigmoid_fault(_gpu()) is None


@cache
def _sigmoid_fault(gpu: int | None) -> str | None:
    """Return why probabilities of masks are left to torch; None if they are not."""
    try:
        masks = 4 * _sample_views()[0].scores
        for dtype in (torch.float32, torch.bfloat16):  # of the results; the forward gives float32
            for area, size in (((0, 0, *_SIZE), _SIZE), ((2, 3, 80, 101), (70, 113))):
                given = (masks, _SIZE, area, size, dtype)
                if not torch.equal(_mask_probabilities(*given), reference.mask_probabilities(*given)):
                    return "the sigmoid of masks rounds differently from torch's here"
    except Exception as error:  # a compiler that fails in any way, at this kernel alone
        if is_gpu_lost(error):
            raise
        return f"the kernel for masks fails ({type(error).__name__}: {error})".splitlines()[0]
    return None


def left_to_torch() -> dict[str, str]:
    """See :meth:`ade_harness.kernels.Kernels.left_to_torch`; compares with torch if that has not been done."""
    faults = {"averages probabilities": _softmax_fault(_gpu()), "enlarges masks": _sigmoid_fault(_gpu())}
    return {does: fault for does, fault in faults.items() if fault is not None}
