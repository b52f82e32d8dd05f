"""What is kept of an image that has been counted, made and written beside the work of the rank's main thread.

On a GPU the main thread has a few milliseconds for each image, and needs them to launch kernels. The ledger row, the
label hash, label maps, overlays and the image's own scores take about as long again, most of it in code that gives up
Python's global lock (hashing, compression, files): one thread makes them, in the order of images.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ade_harness.data.labels import Classes
from ade_harness.evaluation.data import LoadedImage
from ade_harness.metrics.areas import areas_of, split_areas
from ade_harness.metrics.confusion import area_scores
from ade_harness.metrics.counts import Row, label_hash, sparse_counts
from ade_harness.report.overlays import MASKS, save_masks, save_overlay
from ade_harness.runs.label_maps import LabelMaps
from ade_harness.runs.ledger import LedgerWriter
from ade_harness.runtime.cluster import host_name


@dataclass(frozen=True)
class CountedImage:
    """An image whose labels and counts have come to the host."""

    image: LoadedImage
    labels: Tensor
    """uint8 [H, W]."""
    counts: npt.NDArray[np.int64]
    """[C, C + 1]: annotated class, predicted class."""
    confidence: npt.NDArray[np.int64]
    """[15, 3], or [0] if it was not asked for."""
    seconds: float
    """Time of the device and of preparing."""
    rank: int


def row_of(
    image: LoadedImage, labels: Tensor, counts: npt.NDArray[np.int64], confidence: npt.NDArray[np.int64],
    seconds: float, rank: int,
) -> Row:  # fmt: skip
    """Return the ledger row of an image; arguments as the fields of :class:`CountedImage`."""
    ground_truth, prediction, pixels = sparse_counts(counts)
    height, width = image.target.shape
    valid = int(pixels.sum())
    return Row(
        image_id=image.image_id,
        height=height,
        width=width,
        valid_pixels=valid,
        ignored_pixels=height * width - valid,
        ground_truth=ground_truth,
        prediction=prediction,
        pixels=pixels,
        label_hash=label_hash(labels),
        content_hash=image.content_hash,
        seconds=seconds,
        rank=rank,
        host=host_name(),
        calibration=confidence.reshape(-1),
        source_hash=image.source_hash,
    )


def keep_labels(maps: LabelMaps, row: Row, labels: npt.NDArray[np.uint8], counts: npt.NDArray[np.int64]) -> None:
    """Keep an image's label map, if it is wanted.

    Args:
        maps: of this process.
        row: of the image.
        labels: uint8 [H, W].
        counts: int64 [C, C + 1], by which the image is among the best or the worst.

    Raises:
        LedgerError: the file cannot be written.
    """
    if row.valid_pixels or maps.choice != "few":  # an image without a labelled pixel is neither good nor bad
        maps.add(row.image_id, labels, lambda: float(area_scores(*split_areas(areas_of(counts)))["mIoU"]))


class Recorder:
    """Writes what a rank has counted: the reduction of "map, then sum" on one rank.

    Errors come back in :meth:`settled`, in the main thread, where the decision to go on is made. An image is in
    `matrix` exactly if its row went to the writer.

    Args:
        run_dir: of the run.
        classes: of the data set.
        writer: of this rank's ledger files.
        label_maps: what is kept of them.
        marks: what the run's numbers are not.
        keep_masks: keep image, truth and labels beside each overlay, for a tracker that draws masks itself.
        executor: has one worker; a thread of its own by default, begun with the first image.
    """

    def __init__(
        self, run_dir: Path, classes: Classes, writer: LedgerWriter, label_maps: LabelMaps, marks: Sequence[str] = (),
        keep_masks: bool = False, executor: Executor | None = None,
    ) -> None:  # fmt: skip
        self.run_dir, self.classes, self.writer, self.label_maps = run_dir, classes, writer, label_maps
        self.marks, self.keep_masks = marks, keep_masks
        self.matrix = np.zeros((len(classes), len(classes) + 1), np.int64)
        """Sum of this rank's images; the main thread may read it once everything is settled."""
        self.remarks: list[str] = []
        """What went wrong and costs no image: the first overlay that could not be drawn or written."""
        self._executor = executor
        self._pending: deque[tuple[str, Future[float]]] = deque()

    def put(self, counted: CountedImage) -> None:
        """Record an image soon, after those that came before it."""
        if self._executor is None:  # late: loader processes are forked before there is a second thread
            self._executor = ThreadPoolExecutor(1, "recorder")
        self._pending.append((counted.image.image_id, self._executor.submit(self._timed, counted)))

    def settled(self, maximum: int) -> Iterator[tuple[str, Future[float]]]:
        """Wait until at most `maximum` images are pending.

        Yields:
            Ids of images that are no longer pending, in order, and a future that is done: seconds, or the error.
        """
        while self._pending and (len(self._pending) > maximum or self._pending[0][1].done()):
            image_id, future = self._pending[0]
            future.exception()  # waits; a signal's exception leaves the image in the queue
            self._pending.popleft()
            yield image_id, future

    def close(self) -> None:
        """End the thread, after what is pending."""
        if self._executor is not None:
            self._executor.shutdown(wait=not self._pending)

    def _timed(self, counted: CountedImage) -> float:
        start = time.perf_counter()
        self.record(counted)
        return time.perf_counter() - start

    def record(self, counted: CountedImage) -> None:
        """Write an image's files and its ledger row, then add its counts.

        Raises:
            LedgerError: a file cannot be written.
        """
        image, labels, counts = counted.image, counted.labels.numpy(), counted.counts
        row = row_of(image, counted.labels, counts, counted.confidence, counted.seconds, counted.rank)
        if image.overlay_image is not None:
            self._draw(image, image.overlay_image.numpy(), labels)
        keep_labels(self.label_maps, row, labels, counts)
        self.writer.append(row)
        self.matrix += counts

    def _draw(self, image: LoadedImage, pixels: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8]) -> None:
        path = self.run_dir / "overlays" / f"{image.image_id}.png"
        try:
            save_overlay(path, pixels, image.target.numpy(), labels, self.classes, self.marks)
            if self.keep_masks:
                save_masks(path.with_suffix(MASKS), pixels, image.target.numpy(), labels)
        except Exception as error:  # a picture is optional: a full disk, or a fault in drawing, costs no count
            if not self.remarks:
                self.remarks.append(f"overlays are missing: {' '.join(str(error).split())[:300]}")
