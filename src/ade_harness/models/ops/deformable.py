"""Sums of samples at computed places: multi-scale deformable attention, DCNv3, and modulated deformable convolution.

The first two are one operation (:func:`aggregate`): a weighted sum of bilinear samples of a map, each head or group
of channels at its own points. It has three implementations with the same result up to the order of additions: torch
(``grid_sample``; every device, differentiable), numba on the CPU and Triton on CUDA, which need no tensor of all the
samples. Sources: Deformable DETR (Zhu et al. 2021), InternImage (Wang et al. 2023), DCNv2 (Zhu et al. 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ade_harness.errors import HarnessError
from ade_harness.kernels.constants import constant
from ade_harness.models.ops.attention import in_reference
from ade_harness.runtime.gpu_errors import is_gpu_lost, is_out_of_memory, tried_twice

Shape = tuple[int, int]

_CHUNK = 2**26
"""Sampled values that the torch implementation holds at a time (256 MiB in float32)."""


def aggregate(values: Tensor, shapes: Sequence[Shape], points: Tensor, weights: Tensor) -> Tensor:
    """Add up bilinear samples of maps; outside of a map everything is 0.

    Args:
        values: float [N, S, G, D], the maps of all levels flattened row by row, one after the other; G groups (or
            heads) of D channels.
        shapes: (height, width) of each level, S in all.
        points: float32 [N, Q, G, K, 2], (x, y), 0..1 from edge to edge of a map; the first K / levels points are in
            the first level, and so on.
        weights: float [N, Q, G, K].

    Returns:
        [N, Q, G * D] in the dtype of `values`.
    """
    if in_reference() or (torch.is_grad_enabled() and any(t.requires_grad for t in (values, points, weights))):
        return aggregate_torch(values, shapes, points, weights)
    sums: Tensor = _aggregate(values, [number for shape in shapes for number in shape], points, weights)
    return sums


def aggregate_torch(values: Tensor, shapes: Sequence[Shape], points: Tensor, weights: Tensor) -> Tensor:
    """See :func:`aggregate`; the same float32 operations in the same order as the official codes' own PyTorch form.

    A few groups at a time where all samples would need much memory, which changes no bit.
    """
    batch, _, groups, channels = values.shape
    queries, taps = points.shape[1], points.shape[3]
    planes = values.float().permute(0, 2, 3, 1).reshape(batch * groups, channels, -1)
    grids = (2 * points.float() - 1).transpose(1, 2).flatten(0, 1)
    factors = weights.float().transpose(1, 2).reshape(batch * groups, 1, queries, taps)
    step = max(1, _CHUNK // (channels * queries * taps))
    sums = [
        _sample_levels(planes[i : i + step], shapes, grids[i : i + step], factors[i : i + step])
        for i in range(0, batch * groups, step)
    ]
    total = sums[0] if len(sums) == 1 else torch.cat(sums)
    return total.view(batch, groups * channels, queries).transpose(1, 2).contiguous().to(values.dtype)


def _sample_levels(planes: Tensor, shapes: Sequence[Shape], grids: Tensor, weights: Tensor) -> Tensor:
    """Return [B, D, Q] of planes [B, D, S], grids [B, Q, K, 2] in -1..1, and weights [B, 1, Q, K]."""
    per_level = grids.shape[2] // len(shapes)
    samples, start = [], 0
    for level, (height, width) in enumerate(shapes):
        plane = planes[:, :, start : start + height * width].unflatten(2, (height, width))
        grid = grids[:, :, level * per_level : (level + 1) * per_level]
        samples.append(F.grid_sample(plane, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
        start += height * width
    return (torch.cat(samples, -1) * weights).sum(-1)


_Aggregate = Callable[[Tensor, Sequence[Shape], Tensor, Tensor], Tensor]


@torch.library.custom_op("ade_harness::aggregate", mutates_args=())
def _aggregate(values: Tensor, shapes: list[int], points: Tensor, weights: Tensor) -> Tensor:
    """What is compiled, as an operator: torch.compile, torch.export and fake tensors know the shape of its result."""
    levels = list(zip(shapes[::2], shapes[1::2], strict=True))
    variant = Variant(points.shape[3], len(levels), values.shape[3], values.dtype)
    return compiled(values.device.type, values.device.index, variant)[0](values, levels, points, weights)


@_aggregate.register_fake
def _(values: Tensor, shapes: list[int], points: Tensor, weights: Tensor) -> Tensor:
    batch, _, groups, channels = values.shape
    return values.new_empty((batch, points.shape[1], groups * channels))


_AGREES = 1e-5
"""Largest difference to torch's result, over its largest value: sums of a dozen products in another order."""


@dataclass(frozen=True)
class Variant:
    """What a compiled kernel is made for: each other one is compiled for itself."""

    taps: int = 8
    """Samples of each query, of all levels together."""
    levels: int = 2
    channels: int = 8
    """Channels of a head or group."""
    dtype: torch.dtype = torch.float32
    """The values' type."""


FALLBACKS: dict[str, str] = {}
"""Type of device -> why plain torch runs there, once something was computed on it."""


@cache
def compiled(device: str, index: int | None = None, variant: Variant = Variant()) -> tuple[_Aggregate, str | None]:
    """Return the implementation for a type of device, or for one of several, and why it is plain torch if it is.

    Each variant of the compiled one is called once, on a few points, and compared: a compiler that is missing, a cache
    that cannot be written and an architecture that is not known are found before the first image.
    """
    found, reason = _tried(device, device if index is None else f"{device}:{index}", variant)
    if reason is not None:
        FALLBACKS[device] = reason
    return found, reason


def implementation_of(network: nn.Module, device: str, dtype: torch.dtype | None = None) -> str | None:
    """Return what a network's deformable operations run on a type of device; None if it has none.

    Others round otherwise, so the ranks of a run must have the same. All variants that the network needs are tried, so
    that none is compiled for the first image.

    Args:
        network: on any device.
        device: "cpu" or "cuda".
        dtype: of autocast; None: there is none. Heads that switch it off compute in the type of their weights.
    """
    modules: Any = network.modules()
    needed = {
        replace(module.variant, dtype=one)
        for module in modules if getattr(module, "aggregates", False)
        for one in {dtype, next(module.parameters()).dtype} - {None}
    }  # fmt: skip
    index = torch.cuda.current_device() if device == "cuda" else None
    made = "triton" if device == "cuda" else "numba"
    found = {"torch" if compiled(device, index, one)[0] is aggregate_torch else made for one in needed}
    return " and ".join(sorted(found)) or None


def _tried(device: str, place: str, variant: Variant) -> tuple[_Aggregate, str | None]:
    try:
        if device == "cuda":
            from ade_harness.models.ops.deformable_triton import aggregate_triton as fast
        elif device == "cpu":
            from ade_harness.models.ops.deformable_numba import aggregate_numba as fast
        else:
            return aggregate_torch, f"there is none for {device}"
        agrees = tried_twice(lambda: _agrees(fast, place, variant))
        return (fast, None) if agrees else (aggregate_torch, "it gave other values than torch")
    except Exception as error:  # a missing package, or a compiler that fails in any way
        if is_out_of_memory(error) or is_gpu_lost(error):  # the ranks of a run have to have the same
            raise HarnessError(
                f"deformable attention was tried on {place}, which reports {str(error).splitlines()[0]}. Most often"
                " another program uses its memory: `nvidia-smi` names it; CUDA_VISIBLE_DEVICES chooses another GPU."
            ) from error
        return aggregate_torch, f"{type(error).__name__}: {error}".splitlines()[0]


def _agrees(fast: _Aggregate, device: str, variant: Variant) -> bool:
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 7), (3, 4), (2, 2), (6, 1)][: variant.levels]
    pixels = sum(height * width for height, width in shapes)
    with torch.no_grad():
        values = torch.randn(1, pixels, 2, variant.channels, generator=generator).to(device, variant.dtype)
        points = (torch.rand(1, 6, 2, variant.taps, 2, generator=generator) * 1.4 - 0.2).to(device)  # some lie outside
        weights = torch.rand(1, 6, 2, variant.taps, generator=generator).to(device)  # float32, as autocast's softmax
        found, expected = (f(values, shapes, points, weights).float() for f in (fast, aggregate_torch))
        rounding = 0.0 if variant.dtype == torch.float32 else torch.finfo(variant.dtype).eps  # of sums, in the end
        return bool((found - expected).abs().max() <= max(_AGREES, rounding) * expected.abs().max())


def centres(shapes: Sequence[Shape], device: torch.device) -> Tensor:
    """Return float32 [Q, 2]: (x, y) of all pixels' centres, in 0..1 of their map."""
    points = []
    for height, width in shapes:
        y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
        x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
        points.append(torch.stack([x.repeat(height), y.repeat_interleave(width)], -1))
    return torch.cat(points)


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention: each head of a query looks at a few points of every level.

    Args:
        width: of queries and values.
        heads: number of heads.
        levels: maps that the values consist of.
        points: per head and level.
        value_width: of the projected values; ViT-Adapter has half of `width`.
    """

    aggregates = True
    """Calls :func:`aggregate`, for :func:`implementation_of`."""

    @property
    def variant(self) -> Variant:
        """What it calls it with."""
        return Variant(self.levels * self.points, self.levels, self.value_proj.out_features // self.heads)

    def __init__(self, width: int, heads: int, levels: int, points: int, value_width: int | None = None) -> None:
        super().__init__()
        value_width = value_width or width
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(width, heads * levels * points * 2)
        self.attention_weights = nn.Linear(width, heads * levels * points)
        self.value_proj = nn.Linear(width, value_width)
        self.output_proj = nn.Linear(value_width, width)

    def forward(self, queries: Tensor, references: Tensor, values: Tensor, shapes: Sequence[Shape]) -> Tensor:
        """Attend.

        Args:
            queries: [N, Q, C].
            references: float32 [Q, 2], (x, y) in 0..1, where each query is.
            values: [N, S, C], the levels flattened, one after the other.
            shapes: (height, width) of each level.

        Returns:
            [N, Q, C].
        """
        batch, number, _ = queries.shape
        offsets = self.sampling_offsets(queries).float()
        offsets = offsets.view(batch, number, self.heads, self.levels, self.points, 2)
        weights = self.attention_weights(queries).view(batch, number, self.heads, -1).softmax(-1)
        sizes = constant(tuple((width, height) for height, width in shapes), queries.device, torch.float32)
        points = (references[None, :, None, None, None] + offsets / sizes[:, None]).flatten(3, 4)
        projected = self.value_proj(values).unflatten(2, (self.heads, -1))
        output: Tensor = self.output_proj(aggregate(projected, shapes, points, weights))
        return output


def deformable_convolution_v3(values: Tensor, offsets: Tensor, weights: Tensor, scale: float = 1.0) -> Tensor:
    """DCNv3 with a kernel of 3 x 3, stride 1 and padding 1.

    Args:
        values: [N, H, W, G, D].
        offsets: [N, H, W, G, 9, 2], (x, y) in pixels.
        weights: [N, H, W, G, 9], already normalised. The points are ordered by columns: the second is one row down.
        scale: of kernel and offsets alike.

    Returns:
        [N, H, W, G * D].
    """
    height, width = values.shape[1] + 2, values.shape[2] + 2
    padded = F.pad(values, (0, 0, 0, 0, 1, 1, 1, 1))  # places are fractions of the padded map
    taps = torch.arange(-1, 2, device=values.device, dtype=torch.float32)
    kernel = torch.stack([taps.repeat_interleave(3) / width, taps.repeat(3) / height], -1)  # x is the slow index
    x = (torch.arange(values.shape[2], device=values.device, dtype=torch.float32) + 1.5) / width
    y = (torch.arange(values.shape[1], device=values.device, dtype=torch.float32) + 1.5) / height
    places = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], -1)
    size = constant((width, height), values.device, torch.float32)
    points = (places[:, :, None, None] + kernel * scale) + offsets.float() * scale / size
    sums = aggregate(padded.flatten(1, 2), [(height, width)], points.flatten(1, 2), weights.flatten(1, 2))
    return sums.unflatten(1, values.shape[1:3])


def modulated_deformable_convolution(
    maps: Tensor, offsets: Tensor, modulation: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """DCNv2 with a kernel of 3 x 3, stride 1 and padding 1: what ``torchvision.ops.deform_conv2d`` computes.

    Args:
        maps: [N, C, H, W].
        offsets: [N, G * 18, H, W]: (y, x) of the nine points, row by row, for each of G groups of channels.
        modulation: [N, G * 9, H, W], 0..1.
        weight: [D, C, 3, 3].
        bias: [D].

    Returns:
        [N, D, H, W].
    """
    batch, channels, height, width = maps.shape
    groups = modulation.shape[1] // 9
    taps = torch.arange(-1, 2, device=maps.device, dtype=torch.float32)
    kernel = torch.stack([taps.repeat_interleave(3), taps.repeat(3)], -1)  # (y, x), rows first
    y = torch.arange(height, device=maps.device, dtype=torch.float32)
    x = torch.arange(width, device=maps.device, dtype=torch.float32)
    places = torch.stack([y[:, None].expand(-1, width), x.expand(height, -1)], -1)
    moved = offsets.float().view(batch * groups, 9, 2, height, width).permute(0, 1, 3, 4, 2)
    points = (places + kernel[:, None, None] + moved).flip(-1)  # (x, y)
    grid = (2 * points + 1) / constant((width, height), points.device, points.dtype) - 1
    planes = maps.float().reshape(batch * groups, channels // groups, height, width)
    total = maps.new_zeros((batch, weight.shape[0], height, width), dtype=torch.float32)
    modulation = modulation.float().view(batch * groups, 1, 9, height, width)
    for tap in range(9):  # one at a time: nine sampled maps would need nine times the memory
        samples = F.grid_sample(planes, grid[:, tap], mode="bilinear", padding_mode="zeros", align_corners=False)
        samples = (samples * modulation[:, :, tap]).view(batch, channels, height, width)
        total += F.conv2d(samples, weight[:, :, tap // 3, tap % 3, None, None].float())
    return (total + bias[:, None, None]).to(maps.dtype)
