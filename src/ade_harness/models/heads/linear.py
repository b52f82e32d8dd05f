"""Linear heads on frozen features: batch norm and a 1 x 1 convolution, as DINOv2, DINOv3 and SigLIP 2 publish it.

Sources: facebookresearch/dinov2 @ b8931f7 (BNHead), facebookresearch/dinov3 @ 6876159 (LinearHead).
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ade_harness.models.checkpoint.key_tables import Table

LINEAR_HEAD: Table = (
    # DINOv2's heads
    ("decode_head.bn.*", "head.norm.*"),
    ("decode_head.conv_seg.*", "head.classifier.*"),
    # DINOv3's training code
    ("segmentation_model.1.batchnorm_layer.*", "head.norm.*"),
    ("segmentation_model.1.conv.*", "head.classifier.*"),
    # this package's `probe`
    ("head.*", "head.*"),
)


class Backbone(Protocol):
    """What a linear head needs of a frozen network."""

    channels: int
    """Channels of the features, of all maps together."""
    patch_size: int

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Map normalised images [N, 3, H, W] to feature maps [N, C_i, h, w] of one size, in the head's order."""


class LinearHead(nn.Module):
    """Features [N, C, h, w] to logits [N, K, h, w].

    Args:
        channels: C.
        classes: K.
        dropout: of whole channels before the norm, in training only.
    """

    def __init__(self, channels: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Conv2d(channels, classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(cast(Tensor, self.classifier.bias))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [N, K, h, w]."""
        logits: Tensor = self.classifier(self.norm(self.dropout(features)))
        return logits


class LinearSegmenter(nn.Module):
    """A frozen backbone with a linear head: normalised images float32 [N, 3, H, W] to logits [N, K, h, w].

    Images are padded with zeros to multiples of the patch, on all sides (DINOv2) or not at all; the logits of the
    padded grid stand for the whole image, as in the official code, which enlarges them to the unpadded size.
    """

    def __init__(self, backbone: nn.Module, pad: bool, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = LinearHead(cast(Backbone, backbone).channels, classes, dropout)
        self.pad = pad

    def features(self, images: Tensor) -> Tensor:
        """Return what the head sees, [N, C, h, w]."""
        backbone = cast(Backbone, self.backbone)
        maps = backbone(centre_padded(images, backbone.patch_size) if self.pad else images)
        return maps[0] if len(maps) == 1 else torch.cat(maps, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [N, K, h, w] at one patch per pixel."""
        logits: Tensor = self.head(self.features(images))
        return logits


def centre_padded(images: Tensor, multiple: int) -> Tensor:
    """Pad [N, C, H, W] with zeros to multiples of `multiple`, the odd pixel right and below (dinov2 CenterPadding)."""
    height, width = (-side % multiple for side in images.shape[-2:])
    if height == width == 0:
        return images
    return F.pad(images, (width // 2, width - width // 2, height // 2, height - height // 2))
