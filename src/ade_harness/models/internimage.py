"""InternImage (Wang et al. 2023) with Mask2Former's head: convolutions (DCNv3) that choose where they look.

Official code: OpenGVLab/InternImage @ 31c962d, segmentation/. No library has it. The published ADE20K models of this
kind are InternImage-H: normalisation after each branch, one more after every sixth block of the third stage, and a
gate per group between the deformable result and the plain projection ("center feature scale").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ade_harness.models.deformable import deformable_convolution_v3
from ade_harness.models.families import Family, Keys, count
from ade_harness.models.keymaps import Table
from ade_harness.models.mask2former_head import HEAD_FIELDS, HEAD_MMDETECTION, build_head, read_head
from ade_harness.models.mask_systems import MaskClassifier, load_own

_EPS = 1e-6
TAPS = 9


class Dcnv3(nn.Module):
    """Deformable convolution, third version; channels last.

    Args:
        width: channels in and out.
        groups: that have their own points.
        kernel: of the depthwise convolution that points and weights are computed from.
    """

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


_BLOCK = "backbone.levels.{S}.blocks.{B}."
_OURS = "backbone.stages.{S}.blocks.{B}."
OFFICIAL: Table = (
    ("backbone.patch_embed.conv{N}.*", "backbone.stem{N}.conv.*"),
    ("backbone.patch_embed.norm{N}.1.*", "backbone.stem{N}.norm.*"),
    (_BLOCK + "norm{N}.0.*", _OURS + "norm{N}.*"),
    (_BLOCK + "res_post_norm{N}.0.*", _OURS + "post_norm{N}.*"),
    (_BLOCK + "mlp.fc{N}.*", _OURS + "fc{N}.*"),
    (_BLOCK + "dcn.center_feature_scale_proj_weight", _OURS + "dcn.centre.weight"),
    (_BLOCK + "dcn.center_feature_scale_proj_bias", _OURS + "dcn.centre.bias"),
    (_BLOCK + "dcn.dw_conv.0.*", _OURS + "dcn.depthwise.*"),
    (_BLOCK + "dcn.dw_conv.1.1.*", _OURS + "dcn.norm.*"),
    (_BLOCK + "dcn.*", _OURS + "dcn.*"),
    ("backbone.levels.{S}.norm.0.*", "backbone.stages.{S}.norm.*"),
    ("backbone.levels.{S}.post_norms.{N}.0.*", "backbone.stages.{S}.post_norms.{N}.*"),
    ("backbone.levels.{S}.downsample.conv.*", "backbone.downsamples.{S}.conv.*"),
    ("backbone.levels.{S}.downsample.norm.1.*", "backbone.downsamples.{S}.norm.*"),
    *HEAD_MMDETECTION,
)


def _read(state: Mapping[str, Tensor]) -> dict[str, Any]:
    first = "backbone.stages.{}.blocks.0."
    depths = [count(state, f"backbone.stages.{s}.blocks.{{N}}.") for s in range(4)]
    channels = state["backbone.stem2.conv.weight"].shape[0]
    return {
        "channels": channels,
        "depths": depths,
        "groups": [state[first.format(s) + "dcn.centre.weight"].shape[0] for s in range(4)],
        "mlp_ratio": state[first.format(0) + "fc1.weight"].shape[0] / channels,
        "kernel": state[first.format(0) + "dcn.depthwise.weight"].shape[-1],
        "post_norm_blocks": published_post_norms(depths[2], count(state, "backbone.stages.2.post_norms.{N}.")),
        **read_head(state),
    }


_FIELDS = ("channels", "depths", "groups", "mlp_ratio", "kernel", "post_norm_blocks")


def _build(fields: dict[str, Any], state: Mapping[str, Tensor] | None, keys: Keys) -> nn.Module:
    channels = [fields["channels"] * 2**i for i in range(4)]

    def make() -> nn.Module:
        return MaskClassifier(InternImage(**{n: fields[n] for n in _FIELDS}), build_head(channels, fields))

    return load_own(make, state, keys)


INTERNIMAGE = Family(
    layouts={"official": OFFICIAL},
    read=_read,
    build=_build,
    extra=(*_FIELDS, *HEAD_FIELDS),
    classifier="decoder.classes.weight",
    void=True,
    at_mask_size=True,
)
