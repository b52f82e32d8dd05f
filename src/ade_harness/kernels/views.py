"""What the kernels work on: the scores of one view of an image (a scale, maybe flipped), whole or in windows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

Size = tuple[int, int]


@dataclass(frozen=True)
class View:
    """Low-resolution scores, and where they belong.

    Each window's scores are upsampled to the window's size and added up on a canvas; the sum is divided by the
    number of windows over each pixel; the valid part of the canvas is upsampled to the label map's size.
    """

    scores: Tensor
    """float [N, C, h, w], one entry per window."""
    origins: tuple[Size, ...]
    """(top, left) of each window on the canvas: every combination of some tops and some lefts."""
    window: Size
    canvas: Size
    valid: tuple[int, int, int, int] | None = None
    """(top, left, height, width) of the canvas without padding; None is all of it."""
    flipped: bool = False
    """Whether the network saw the image mirrored: the upsampled scores are mirrored back."""
    legacy: bool = False
    """Whether windows are upsampled as TensorFlow 1 did."""

    @property
    def area(self) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the valid part."""
        return self.valid or (0, 0, *self.canvas)

    @property
    def is_whole(self) -> bool:
        """Whether one window is the canvas."""
        return len(self.origins) == 1 and self.window == self.canvas

    def overlaps(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Return how many windows lie over each row and over each column; a pixel has their product."""
        tops, lefts = sorted({t for t, _ in self.origins}), sorted({x for _, x in self.origins})
        rows, columns = np.zeros(self.canvas[0], np.float32), np.zeros(self.canvas[1], np.float32)
        for top in tops:
            rows[top : top + self.window[0]] += 1
        for left in lefts:
            columns[left : left + self.window[1]] += 1
        return rows, columns


def whole(scores: Tensor, canvas: Size, valid: tuple[int, int, int, int] | None = None, flipped: bool = False) -> View:
    """Return the view of one window: scores [C, h, w] of the whole canvas."""
    return View(scores[None], ((0, 0),), canvas, canvas, valid, flipped)


@dataclass(frozen=True)
class PixelStatistics:
    """What pixel values a network wants: ``(value * max_value / 255 - mean) / std``."""

    mean: tuple[float, ...]
    """Three numbers, in the network's channel order."""
    std: tuple[float, ...]
    reverse_channels: bool = False
    """Whether the network wants BGR."""
    max_value: float = 255.0


@dataclass(frozen=True)
class Placement:
    """Where a view's pixels lie on the network's input."""

    canvas: Size
    offset: Size = (0, 0)
    """(top, left) of the pixels."""
    flipped: bool = False
    """Whether they are mirrored first."""
    pad_value: float | None = None
    """What lies around them, as a pixel value that is normalised too; None leaves zeros in the normalised input."""
