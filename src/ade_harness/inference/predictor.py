"""What an evaluation needs of a model: `prepare` on the host (worker processes), `predict` on the device."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ade_harness.inference.stopwatch import Stopwatch
from ade_harness.kernels import Size
from ade_harness.runtime.queue import Loaders


@dataclass(frozen=True)
class Prepared:
    """What a worker hands to the device."""

    image_id: str
    pixels: tuple[Tensor, ...]
    """uint8 [h, w, 3], not yet padded, for each scale once; or, without a network, the labels [H, W]."""
    original_size: Size


@dataclass(frozen=True)
class Prediction:
    """What a network makes of an image."""

    labels: Tensor
    """uint8 [H, W], 0..C-1 or 255 for void; on the device, which may still be working on it."""
    invalid_share: Tensor | None = None
    """Share of NaN and +inf among the scores; over 0 the labels are worth nothing."""
    confidence: Tensor | None = None
    """float32 [H, W], 0..1, of the chosen class, if it was asked for; see :mod:`ade_harness.metrics.calibration`."""


class Predictor(Protocol):
    """What evaluation needs of a model; the only thing that it knows of one."""

    @property
    def network(self) -> nn.Module | None:
        """What Lightning moves to the device; None if nothing is computed here."""

    def check(self, sizes: Mapping[str, Size]) -> None:
        """Refuse what could not be predicted, before the first image.

        Args:
            sizes: image id -> (height, width).

        Raises:
            HarnessError: names the first image and what to do.
        """

    def facts(self) -> dict[str, Any]:
        """Return what the manifest keeps: ``origin``, and ``weights`` and ``sha256`` if they are known."""

    def loaders(self, workers: int | None, rank: int, world_size: int) -> Loaders:
        """Return a rank's loader processes.

        Args:
            workers: ``runtime.workers``.
            rank: of this process.
            world_size: number of ranks.

        Raises:
            HarnessError: it cannot serve so many ranks.
        """

    def prepare(self, image_id: str, image: npt.NDArray[np.uint8]) -> Prepared:
        """Make a worker's part of the prediction from uint8 [H, W, 3] RGB."""

    def predict(self, batch: Sequence[Prepared], device: torch.device, watch: Stopwatch) -> list[Prediction]:
        """Return the label map of each image."""

    def prepared_bytes(self, size: Size) -> int:
        """Return the bytes that :meth:`prepare` makes of an image of (height, width)."""

    def cost(self, size: Size) -> float:
        """Return the expected cost of an image of (height, width), in any unit."""

    def group_key(self, size: Size) -> Hashable:
        """Return a value that images share if they may be in one batch; None if not."""

    def source_hash(self, image_id: str) -> str:
        """Return a hash of the files that this image's prediction is read from, empty if there are none."""

    def notes(self) -> list[str]:
        """Return what the user should know about the predictions so far."""

    def changes(self) -> list[str]:
        """Return how what predicts differs from what it was at the start; asked once all images are done."""

    def stop(self) -> None:
        """End what loader processes wait for: the work is over."""


class ReadyLabels:
    """What a predictor does once :meth:`Predictor.prepare` has found the labels: files, and answers of a server."""

    network = None

    def predict(self, batch: Sequence[Prepared], device: torch.device, watch: Stopwatch) -> list[Prediction]:
        """Return the labels that were found."""
        with watch("copy"):
            return [Prediction(p.pixels[0].to(device, non_blocking=True)) for p in batch]

    def prepared_bytes(self, size: Size) -> int:
        """Return the bytes of a label map."""
        return size[0] * size[1]

    def cost(self, size: Size) -> float:
        """Return the expected cost of an image: its pixels."""
        return float(size[0] * size[1])

    def group_key(self, size: Size) -> None:
        """Images are done one by one."""

    def changes(self) -> list[str]:
        """Files are hashed as they are read."""
        return []
