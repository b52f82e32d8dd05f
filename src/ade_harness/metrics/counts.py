"""The counts of one image: what everything else is computed from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Row:
    """What is kept of one image. `ground_truth`, `prediction`, `pixels` are the non-zero counts."""

    image_id: str
    height: int
    width: int
    valid_pixels: int
    ignored_pixels: int
    ground_truth: npt.NDArray[np.uint8]
    prediction: npt.NDArray[np.uint8]
    """0..C-1, and C = void."""
    pixels: npt.NDArray[np.int64]
    label_hash: str
    """BLAKE2b of the uint8 label map: equal hashes mean equal predictions in every pixel."""
    content_hash: str
    """BLAKE2b of the image's and the annotation's bytes: equal for two models on the same files."""
    seconds: float
    rank: int
    host: str
    calibration: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """[45], the counts of :mod:`ade_harness.metrics.calibration` row by row; empty if they were not asked for."""
    source_hash: str = ""
    """BLAKE2b of the file that the prediction was read from; empty if a network made it."""

    @property
    def all_files(self) -> str:
        """Both hashes of files, as they stand in digests over many images."""
        return self.content_hash + self.source_hash

    @property
    def right_pixels(self) -> int:
        """Pixels whose prediction is the ground truth."""
        return int(self.pixels[self.ground_truth == self.prediction].sum())


def sparse_counts(
    matrix: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return the non-zero entries of an int64 [C, C + 1] matrix as (row, column, value)."""
    ground_truth, prediction = np.nonzero(matrix)
    return ground_truth.astype(np.uint8), prediction.astype(np.uint8), matrix[ground_truth, prediction]


def matrix_of(rows: Iterable[Row], classes: int) -> npt.NDArray[np.int64]:
    """Sum rows to the confusion matrix, int64 [C, C + 1], C the number of `classes`."""
    total = np.zeros((classes, classes + 1), np.int64)
    for row in rows:
        np.add.at(total, (row.ground_truth, row.prediction), row.pixels)
    return total


def label_hash(labels: Tensor | npt.NDArray[np.uint8]) -> str:
    """Return BLAKE2b (16 bytes, hex) of a uint8 label map [H, W]: equal hashes mean equal labels."""
    array = labels if isinstance(labels, np.ndarray) else labels.cpu().numpy()
    return hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=16).hexdigest()


def hash_rows(rows: Iterable[Row]) -> str:
    """Return the SHA-256 of what was counted: ids, sizes, counts and hashes, without time, rank and host.

    Args:
        rows: in the order of image ids.
    """
    digest = hashlib.sha256()
    for row in rows:
        head = [row.image_id, row.height, row.width, row.valid_pixels, row.ignored_pixels, row.label_hash]
        digest.update(json.dumps([*head, row.all_files]).encode())
        for array, dtype in (
            (row.ground_truth, "<u1"), (row.prediction, "<u1"), (row.pixels, "<i8"), (row.calibration, "<i8"),
        ):  # fmt: skip
            digest.update(np.asarray(array).astype(dtype).tobytes())
    return digest.hexdigest()
