"""Networks of a user, in a module that ranks can import."""

from __future__ import annotations

import random
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Colours(nn.Module):
    """Scores from colours, through layers whose mode matters: batch statistics and dropout."""

    def __init__(self, channels: int = 150, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layer = nn.Conv2d(3, channels, 3, padding=1, stride=2)
            self.norm = nn.BatchNorm2d(channels)
            self.drop = nn.Dropout2d(0.5)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.drop(self.layer(images)))


class Remembers(Colours):
    """Keeps a tensor that its first forward has made, as networks do with positions, and trains with it later."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Any = None

    def forward(self, images: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = torch.ones(150, 1, 1) * 2
        return super().forward(images) * self.kept


class Draws(Colours):
    """A constructor with random numbers of all three generators, that may end its process."""

    def __init__(self, leave: bool = False) -> None:
        super().__init__()
        random.random(), np.random.rand(), torch.rand(1)
        if leave:
            sys.exit(0)


class Breaks(Colours):
    def forward(self, images: Tensor) -> Tensor:
        raise RuntimeError("no such layer")
