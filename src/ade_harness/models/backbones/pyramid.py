"""A transformers backbone as a module that returns its feature maps."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

STAGES = ["stage1", "stage2", "stage3", "stage4"]


class Pyramid(nn.Module):
    """A transformers backbone: images to its feature maps."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return features of strides 4, 8, 16, 32."""
        return list(self.network(images).feature_maps)
