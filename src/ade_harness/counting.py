"""One image from file to ledger row: the map of "map, then sum"."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ade_harness import kernels
from ade_harness.data.ade20k import SegmentationDataset
from ade_harness.data.labels import NUM_CLASSES
from ade_harness.errors import HarnessError
from ade_harness.inference.predictor import Predictor, Prepared, label_hash
from ade_harness.report.overlays import save_overlay
from ade_harness.runs.ledger import LedgerWriter, Row, sparse_counts
from ade_harness.runtime.coordination import Coordinator


@dataclass(frozen=True)
class LoadedImage:
    """What a loader process hands over for one image."""

    image_id: str
    prepared: Prepared
    target: Tensor
    """uint8 [H, W]."""
    content_hash: str
    overlay_image: Tensor | None
    """uint8 [H, W, 3], for the few images that are drawn."""


@dataclass(frozen=True)
class Failure:
    """An image that could not be evaluated, and why."""

    image_id: str
    message: str


class ImageItems(Dataset[LoadedImage | Failure]):
    """Decodes and prepares images in loader processes.

    A problem with one file comes back as a value: an exception would lose its message on the way out of a worker.

    Args:
        dataset: the pairs.
        indices: which of them, by item number.
        predictor: prepares the network's input.
        overlay_ids: images to be drawn.
    """

    def __init__(
        self, dataset: SegmentationDataset, indices: list[int], predictor: Predictor, overlay_ids: set[str]
    ) -> None:
        self.dataset = dataset
        self.indices = indices
        self.predictor = predictor
        self.overlay_ids = overlay_ids

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> LoadedImage | Failure:
        """Load one image; never raises for a bad file."""
        index = self.indices[item]
        image_id = self.dataset.pairs[index].image_id
        try:
            sample = self.dataset.load(index)
            prepared = self.predictor.prepare(image_id, sample.image)
        except HarnessError as error:
            return Failure(image_id, str(error))
        overlay = torch.from_numpy(sample.image) if image_id in self.overlay_ids else None
        content_hash = sample.content_hash + self.predictor.source_hash(image_id)
        return LoadedImage(image_id, prepared, torch.from_numpy(sample.target), content_hash, overlay)


@dataclass
class ImageCounter:
    """Predicts, counts, and writes the ledger, on one rank."""

    predictor: Predictor
    writer: LedgerWriter
    coordinator: Coordinator
    overlay_folder: Path
    marks: Sequence[str] = ()
    matrix: np.ndarray = field(default_factory=lambda: np.zeros((NUM_CLASSES, NUM_CLASSES + 1), np.int64))
    """Sum of this rank's images."""
    failures: list[Failure] = field(default_factory=list)

    def process(self, item: LoadedImage | Failure, device: torch.device, rank: int) -> None:
        """Do one image; a failure stops all ranks, since there can be no score without the image."""
        start = time.perf_counter()
        if isinstance(item, Failure):
            self._fail(item)
            return
        try:
            labels = self.predictor.predict(item.prepared, device)
            counts = kernels.count(labels, item.target.to(device, non_blocking=True)).cpu().numpy()
            ground_truth, prediction, pixels = sparse_counts(counts)
            height, width = item.target.shape
            valid = int(pixels.sum())
            seconds = time.perf_counter() - start
            if item.overlay_image is not None:
                path = self.overlay_folder / f"{item.image_id}.png"
                picture, target = item.overlay_image.numpy(), item.target.numpy()
                save_overlay(path, picture, target, labels.cpu().numpy(), self.marks)
            self.writer.append(
                Row(
                    image_id=item.image_id,
                    height=height,
                    width=width,
                    valid_pixels=valid,
                    ignored_pixels=height * width - valid,
                    ground_truth=ground_truth,
                    prediction=prediction,
                    pixels=pixels,
                    label_hash=label_hash(labels),
                    content_hash=item.content_hash,
                    seconds=seconds,
                    rank=rank,
                    host=platform.node(),
                )
            )
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            self._fail(Failure(item.image_id, f"{item.image_id}: out of GPU memory ({reason}). Use a larger GPU."))
            return
        except HarnessError as error:
            self._fail(Failure(item.image_id, str(error)))
            return
        self.matrix += counts

    def close(self, rank: int) -> None:
        """Make the last rows durable; a full disk is a failure like any other."""
        try:
            self.writer.flush()
        except HarnessError as error:
            self._fail(Failure(f"rank {rank}", str(error)))

    def _fail(self, failure: Failure) -> None:
        self.failures.append(failure)
        self.coordinator.stop()


def check_unchanged(rows: Sequence[Row], dataset: SegmentationDataset, predictor: Predictor) -> None:
    """Refuse to add to counts that were made from other files than those that are there now.

    Raises:
        HarnessError: names the first image whose files changed.
    """
    index_of = {image_id: index for index, image_id in enumerate(dataset.ids)}
    for row in rows:
        now = dataset.content_hash(index_of[row.image_id]) + predictor.source_hash(row.image_id)
        if now != row.content_hash:
            raise HarnessError(
                f"{row.image_id}: its files changed since it was counted, so the run cannot be continued."
                " Put the old files back, or start a new run."
            )
