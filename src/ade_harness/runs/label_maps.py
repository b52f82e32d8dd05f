"""Label maps that a run keeps: PNG files in the official encoding, so that ``model=predictions`` can read them again.

A file's content is checked by the label hash in the ledger. With ``run.label_maps=few`` each rank keeps its worst and
its best images so far, so that the worst and best of all are among what is kept, whatever rank had them.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from ade_harness.data.containers import MAX_FILE_BYTES
from ade_harness.data.decode import decode_labels
from ade_harness.errors import HarnessError
from ade_harness.files.atomic import discard, replaced
from ade_harness.files.reading import read_regular
from ade_harness.metrics.counts import Row, label_hash
from ade_harness.runs.ledger import LedgerError

FOLDER = "label_maps"
FEW = 12
"""Worst and best images that are kept."""
_COMPRESSION = 3
"""Compression level of zlib, 0..9: label maps shrink well at any level, and 9 takes ten times as long."""


class LabelMaps:
    """Writes the label maps of one rank.

    Args:
        run_dir: of the run.
        choice: ``run.label_maps``: none, few or all.
    """

    def __init__(self, run_dir: Path, choice: str) -> None:
        self.folder = run_dir / FOLDER
        self.choice = choice
        self._worst: list[tuple[float, str]] = []
        self._best: list[tuple[float, str]] = []

    def add(self, image_id: str, labels: npt.NDArray[np.uint8], score: Callable[[], float]) -> None:
        """Keep an image's labels, if they are wanted.

        Args:
            image_id: names the file.
            labels: uint8 [H, W], 0..C-1, 255 for void.
            score: the image's own; images are ordered by it.

        Raises:
            LedgerError: the file cannot be written.
        """
        if self.choice == "none":
            return
        if self.choice == "few":
            value = score()
            pushed_out = set()
            for heap, entry in ((self._worst, (-value, image_id)), (self._best, (value, image_id))):
                heapq.heappush(heap, entry)
                if len(heap) > FEW:
                    pushed_out.add(heapq.heappop(heap)[1])
            kept = {name for heap in (self._worst, self._best) for _, name in heap}
            for name in pushed_out - kept - {image_id}:
                discard(self._path(name))
            if image_id not in kept:
                return
        self._write(self._path(image_id), labels)

    def _path(self, image_id: str) -> Path:
        return self.folder / f"{image_id}.png"

    def _write(self, path: Path, labels: npt.NDArray[np.uint8]) -> None:
        _, content = cv2.imencode(".png", labels + np.uint8(1), [cv2.IMWRITE_PNG_COMPRESSION, _COMPRESSION])
        with replaced(path, durable=False, hint="Free disk space, then resume.", error=LedgerError) as temporary:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content.tobytes())


def read_label_map(run_dir: Path, row: Row) -> npt.NDArray[np.uint8] | None:
    """Return what :class:`LabelMaps` has kept of an image, uint8 [H, W]; None if nothing was kept.

    Raises:
        HarnessError: the file is damaged, or not what was counted.
    """
    path = run_dir / FOLDER / f"{row.image_id}.png"
    if not path.exists():
        return None
    try:
        stored = decode_labels(read_regular(path, MAX_FILE_BYTES), str(path))
    except HarnessError as error:
        raise HarnessError(f"{path}: damaged. Delete it: the report works without it.") from error
    if stored.shape != (row.height, row.width):
        raise HarnessError(f"{path}: damaged. Delete it: the report works without it.")
    labels = np.asarray(stored - np.uint8(1), np.uint8)
    if label_hash(labels) != row.label_hash:
        raise HarnessError(f"{path}: not what the run has counted (its label hash differs). Delete it, or restore it.")
    return labels
