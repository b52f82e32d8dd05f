"""FaPN's pixel decoder (Huang et al. 2021): a feature pyramid whose coarser maps are moved into place first.

Official code: ShihuaHuang95/FaPN-full @ d59b4cb, its MaskFormer variant ("BasePixelFANDecoder"): without the feature
selection of the paper's detectors. One normalisation serves the offsets and the output of a level there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ade_harness.models.checkpoint.key_tables import Table
from ade_harness.models.heads.mask2former import NormedConv
from ade_harness.models.ops.deformable import modulated_deformable_convolution

DEFORMABLE_GROUPS = 8


class AlignedStep(nn.Module):
    """One level: the coarser map is enlarged, moved by a deformable convolution, and added to this level's."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.lateral = NormedConv(channels, width, 1)
        self.offset = nn.Conv2d(2 * width, width, 1, bias=False)
        self.offset_mask = nn.Conv2d(width, DEFORMABLE_GROUPS * 27, 3, padding=1)
        self.align = nn.Conv2d(width, width, 3, padding=1)  # its weights; the sampling is deformable
        self.output = NormedConv(width, width, 3, relu=True)

    def forward(self, feature: Tensor, coarser: Tensor) -> Tensor:
        """Return [N, C, h, w] of this level's feature [N, F, h, w] and the coarser result [N, C, .., ..]."""
        lateral = self.lateral(feature)
        enlarged = F.interpolate(coarser, lateral.shape[-2:], mode="bilinear", align_corners=False)
        offset = self.output.norm(self.offset(torch.cat([lateral, 2 * enlarged], 1)))
        vertical, horizontal, modulation = self.offset_mask(offset).chunk(3, 1)
        moved = modulated_deformable_convolution(
            enlarged, torch.cat([vertical, horizontal], 1), modulation.sigmoid(), self.align.weight, _bias(self.align)
        )
        summed: Tensor = self.output(moved.relu_() + lateral)
        return summed


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias


class FapnDecoder(nn.Module):
    """Features of strides 4, 8, 16, 32 to mask features at stride 4 and three maps, the smallest first.

    Args:
        channels: of the four features, stride 4 first.
        width: of the maps.
        mask_width: of the mask features.
    """

    def __init__(self, channels: Sequence[int], width: int, mask_width: int) -> None:
        super().__init__()
        self.stem = NormedConv(channels[3], width, 3, relu=True)
        self.steps = nn.ModuleList(AlignedStep(c, width) for c in channels[:3])  # stride 4 first, as in the files
        self.mask_features = nn.Conv2d(width, mask_width, 3, padding=1)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return mask features [N, M, h, w] and the maps of strides 32, 16, 8."""
        maps = [self.stem(features[3])]
        for step, feature in zip(reversed(self.steps), reversed(features[:3]), strict=True):
            maps.append(step(feature, maps[-1]))
        return self.mask_features(maps[-1]), maps[:3]


_STEP = "pixel_decoder.steps.{S-1}."
FAPN: Table = (
    ("sem_seg_head.pixel_decoder.layer_4.norm.*", "pixel_decoder.stem.norm.*"),
    ("sem_seg_head.pixel_decoder.layer_4.*", "pixel_decoder.stem.conv.*"),
    ("sem_seg_head.pixel_decoder.adapter_{S}.norm.*", _STEP + "lateral.norm.*"),
    ("sem_seg_head.pixel_decoder.adapter_{S}.*", _STEP + "lateral.conv.*"),
    ("sem_seg_head.pixel_decoder.align_{S}.offset.norm.*", None),  # the same tensor as layer_{S}.norm
    ("sem_seg_head.pixel_decoder.align_{S}.offset.*", _STEP + "offset.*"),
    ("sem_seg_head.pixel_decoder.align_{S}.dcpack_L2.conv_offset_mask.*", _STEP + "offset_mask.*"),
    ("sem_seg_head.pixel_decoder.align_{S}.dcpack_L2.*", _STEP + "align.*"),
    ("sem_seg_head.pixel_decoder.layer_{S}.norm.*", _STEP + "output.norm.*"),
    ("sem_seg_head.pixel_decoder.layer_{S}.*", _STEP + "output.conv.*"),
    ("sem_seg_head.pixel_decoder.mask_features.*", "pixel_decoder.mask_features.*"),
)
