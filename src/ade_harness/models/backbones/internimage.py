"""InternImage (Wang et al. 2023): convolutions (DCNv3) that choose where they look.

Official code: OpenGVLab/InternImage @ 31c962d, segmentation/. No library has it. The published ADE20K models of this
kind are InternImage-H: normalisation after each branch, one more after every sixth block of the third stage, and a
gate per group between the deformable result and the plain projection ("center feature scale").
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ade_harness.models.ops.deformable import Variant, deformable_convolution_v3

_EPS = 1e-6

TAPS = 9


class Dcnv3(nn.Module):
    """Deformable convolution, third version; channels last.

    Args:
        width: channels in and out.
        groups: that have their own points.
        kernel: of the depthwise convolution that points and weights are computed from.
    """

    aggregates = True

    @property
    def variant(self) -> Variant:
        """What :func:`deformable_convolution_v3` is called with."""
        return Variant(TAPS, 1, self.input_proj.out_features // self.groups)

    def __init__(self, width: int, groups: int, kernel: int) -> None:
        super().__init__()
        self.groups = groups
        self.depthwise = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.offset = nn.Linear(width, groups * TAPS * 2)
        self.mask = nn.Linear(width, groups * TAPS)
        self.input_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)
        self.centre = nn.Linear(width, groups)

    def forward(self, maps: Tensor) -> Tensor:
        """Return [N, H, W, C] of [N, H, W, C]."""
        projected = self.input_proj(maps)
        local = self.depthwise(maps.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        local = F.gelu(self.norm(local))
        offsets = self.offset(local).unflatten(3, (self.groups, TAPS, 2))
        weights = self.mask(local).unflatten(3, (self.groups, TAPS)).softmax(-1)
        sampled = deformable_convolution_v3(projected.unflatten(3, (self.groups, -1)), offsets, weights)
        gate = self.centre(local).sigmoid()[..., None]
        sampled = sampled.unflatten(3, (self.groups, -1))
        mixed = sampled * (1 - gate) + projected.unflatten(3, (self.groups, -1)) * gate
        output: Tensor = self.output_proj(mixed.flatten(3))
        return output


class Block(nn.Module):
    """DCNv3 and two linear layers, each normalised before and after."""

    def __init__(self, width: int, groups: int, hidden: int, kernel: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=_EPS)
        self.dcn = Dcnv3(width, groups, kernel)
        self.post_norm1 = nn.LayerNorm(width, eps=_EPS)
        self.norm2 = nn.LayerNorm(width, eps=_EPS)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.post_norm2 = nn.LayerNorm(width, eps=_EPS)

    def forward(self, maps: Tensor) -> Tensor:
        """Return [N, H, W, C] of [N, H, W, C]."""
        maps = maps + self.post_norm1(self.dcn(self.norm1(maps)))
        return maps + self.post_norm2(self.fc2(F.gelu(self.fc1(self.norm2(maps)))))


class Downsample(nn.Module):
    """Half the resolution, another number of channels; channels last in and out."""

    def __init__(self, width_in: int, width: int, *, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width, 3, stride=2, padding=1, bias=bias)
        self.norm = nn.LayerNorm(width, eps=_EPS)

    def forward(self, maps: Tensor) -> Tensor:
        """Return [N, H/2, W/2, D] of [N, H, W, C]."""
        smaller: Tensor = self.norm(self.conv(maps.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return smaller


class Stage(nn.Module):
    """Blocks of one resolution.

    Args:
        width: channels.
        depth: blocks.
        groups: of DCNv3.
        hidden: between the two linear layers of a block.
        kernel: of DCNv3's depthwise convolution.
        extra_norms: blocks (from 0) that are followed by one more norm.
    """

    def __init__(
        self, width: int, depth: int, groups: int, hidden: int, kernel: int, extra_norms: Sequence[int]
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, groups, hidden, kernel) for _ in range(depth))
        self.extra_norms = tuple(extra_norms)
        self.post_norms = nn.ModuleList(nn.LayerNorm(width, eps=_EPS) for _ in extra_norms)
        self.norm = nn.LayerNorm(width, eps=_EPS)

    def forward(self, maps: Tensor) -> Tensor:
        """Return [N, H, W, C] of [N, H, W, C]."""
        for i, block in enumerate(self.blocks):
            maps = block(maps)
            if i in self.extra_norms:
                maps = self.post_norms[self.extra_norms.index(i)](maps)
        normed: Tensor = self.norm(maps)
        return normed


class InternImage(nn.Module):
    """Normalised images [N, 3, H, W] to features of strides 4, 8, 16, 32.

    Args:
        channels: of the first stage; each further one has twice as many.
        depths: blocks of the four stages.
        groups: likewise.
        mlp_ratio: of a block's hidden width.
        kernel: of DCNv3's depthwise convolution.
        post_norm_blocks: of the third stage, that are followed by one more norm.
    """

    def __init__(
        self, channels: int, depths: Sequence[int], groups: Sequence[int], mlp_ratio: float, kernel: int,
        post_norm_blocks: Sequence[int],
    ) -> None:  # fmt: skip
        super().__init__()
        self.stem1 = Downsample(3, channels // 2, bias=True)
        self.stem2 = Downsample(channels // 2, channels, bias=True)
        widths = [channels * 2**i for i in range(len(depths))]
        self.stages = nn.ModuleList(
            Stage(w, depth, g, int(w * mlp_ratio), kernel, post_norm_blocks if i == 2 else ())
            for i, (w, depth, g) in enumerate(zip(widths, depths, groups, strict=True))
        )
        self.downsamples = nn.ModuleList(Downsample(w, 2 * w, bias=False) for w in widths[:-1])

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return four features [N, C, h, w]."""
        stem = self.stem1(images.permute(0, 2, 3, 1))
        maps = self.stem2(F.gelu(stem.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))  # its bits depend on the layout
        features = []
        for i, stage in enumerate(self.stages):
            maps = stage(maps)
            features.append(maps.permute(0, 3, 1, 2).contiguous())
            if i < len(self.downsamples):
                maps = self.downsamples[i](maps)
        return features


def published_post_norms(depth: int, norms: int) -> list[int]:
    """Return the blocks of the third stage that a norm follows: 5, 11, 17, 23, 29 of 32, evenly spread otherwise."""
    step = depth // norms if norms else 0
    return [step * (i + 1) - 1 for i in range(norms)]
