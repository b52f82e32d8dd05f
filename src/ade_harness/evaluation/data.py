"""Batches of images, decoded and prepared in loader processes: the LightningDataModule of an evaluation."""

from __future__ import annotations

import dataclasses
import shutil
import time
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ade_harness.config.runtime import Sharding
from ade_harness.config.schema import Config
from ade_harness.data.dataset import SegmentationDataset
from ade_harness.errors import EveryImageError, HarnessError
from ade_harness.evaluation.job import Job
from ade_harness.evaluation.packing import Layout, Sent, in_shared_memory, receive, send, unpack
from ade_harness.inference.predictor import Predictor, Prepared
from ade_harness.metrics.counts import Row
from ade_harness.runtime.cluster import cores_per_rank, host_name, local_ranks
from ade_harness.runtime.coordination import Coordinator
from ade_harness.runtime.queue import ItemLoader, Loaders, Numbered, SharedItems


@dataclass(frozen=True)
class LoadedImage:
    """What a loader process hands over for one image."""

    image_id: str
    prepared: Prepared
    target: Tensor
    """uint8 [H, W]."""
    content_hash: str
    """Hash of the image's and the annotation's files."""
    source_hash: str
    """Hash of the file with the prediction, if there is one."""
    overlay_image: Tensor | None
    """uint8 [H, W, 3], for the few images that are drawn."""
    load_seconds: float
    """Reading, decoding and resizing."""
    packed: tuple[Tensor, Layout] | None = None
    """A copy of all tensors in shared memory, which a loader process hands over."""

    def pack(self) -> LoadedImage:
        """Return the image with its copy in shared memory.

        Raises:
            HarnessError: there is no shared memory.
        """
        tensors = [*self.prepared.pixels, self.target, *([] if self.overlay_image is None else [self.overlay_image])]
        return replace(self, packed=in_shared_memory(tensors))

    def __reduce__(self) -> tuple[Any, ...]:
        """Hand all tensors over in one piece of shared memory; called by a thread of a loader process.

        An error in that thread would be printed and lose the image, for which the rank would wait: what can fail has
        been done before, in :meth:`pack`.
        """
        packed = self.packed or self.pack().packed
        assert packed is not None
        buffer, layout = packed
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields |= {"prepared": replace(self.prepared, pixels=()), "target": None, "overlay_image": None, "packed": None}
        return _with_tensors, (fields, self.overlay_image is not None, send(buffer), layout)

    def pin_memory(self) -> LoadedImage:
        """Return a copy from which a GPU can be fed asynchronously; called by torch's DataLoader."""
        prepared = replace(self.prepared, pixels=tuple(p.pin_memory() for p in self.prepared.pixels))
        return replace(self, prepared=prepared, target=self.target.pin_memory())


def _with_tensors(fields: dict[str, Any], has_overlay: bool, sent: Tensor | Sent, layout: Layout) -> LoadedImage:
    """Return what `LoadedImage.__reduce__` has taken apart."""
    tensors = unpack(receive(sent), layout)
    overlay = tensors.pop() if has_overlay else None
    target = tensors.pop()
    prepared = replace(fields["prepared"], pixels=tuple(tensors))
    return LoadedImage(**{**fields, "prepared": prepared, "target": target, "overlay_image": overlay})


@dataclass(frozen=True)
class Failure:
    """An image that could not be evaluated, and why."""

    image_id: str
    message: str
    of_all: bool = False
    """Whether every other image would fail as well, so that the run ends, also with ``run.on_error=skip``."""


def group_images(sizes: Sequence[tuple[int, int]], predictor: Predictor, maximum: int) -> list[list[int]]:
    """Decide which images share a batch: by their sizes and order in the data set alone.

    Args:
        sizes: (height, width) of all images of the data set.
        predictor: knows which sizes go together.
        maximum: images in a batch.

    Returns:
        Indices of the images of each batch.
    """
    groups: list[list[int]] = []
    open_groups: dict[Hashable, list[int]] = {}
    for index, size in enumerate(sizes):
        key = predictor.group_key(size)
        group = open_groups.get(key)
        if key is None or group is None or len(group) == maximum:
            group = open_groups[key] = []
            groups.append(group)
        group.append(index)
    return groups


_SHARED_MEMORY = Path("/dev/shm")


def check_shared_memory(workers: int, ahead: int, item_bytes: float) -> None:
    """Refuse more prefetched images than the shared memory holds, through which loader processes hand them over.

    Args:
        workers: loader processes of this rank.
        ahead: items that each of them prefetches.
        item_bytes: of an item, on average.

    Raises:
        HarnessError: how much there is, how much is needed, what to do. A process would die of a bus error instead.
    """
    if workers == 0:
        return
    in_shared_memory([torch.zeros(1)])
    if not _SHARED_MEMORY.is_dir():  # macOS has others
        return
    free, need = shutil.disk_usage(_SHARED_MEMORY).free, workers * ahead * local_ranks() * item_bytes
    if need > free:
        raise HarnessError(
            f"{_SHARED_MEMORY} on {host_name()} has {free / 2**20:.1f} MiB free, and {workers} loaders for each of"
            f" {local_ranks()} ranks need about {need / 2**20:.1f} to hand images over. Start the container with"
            " --shm-size=8g (or --ipc=host), or use a smaller runtime.workers; 0 needs none."
        )


class ImageItems(Dataset[list[LoadedImage | Failure]]):
    """Decodes and prepares batches of images in loader processes.

    A problem with one file comes back as a value: an exception would lose its message on the way out of a worker.

    Args:
        dataset: the pairs.
        groups: indices of the images of each batch.
        predictor: prepares the network's input.
        overlay_ids: images to be drawn.
    """

    def __init__(
        self, dataset: SegmentationDataset, groups: list[list[int]], predictor: Predictor, overlay_ids: set[str]
    ) -> None:
        self.dataset = dataset
        self.groups = groups
        self.predictor = predictor
        self.overlay_ids = overlay_ids

    def __len__(self) -> int:
        return len(self.groups)

    def stop(self) -> None:
        """End what loader processes wait for."""
        self.predictor.stop()

    def __getitem__(self, item: int) -> list[LoadedImage | Failure]:
        """Load one batch; never raises for a bad file."""
        return [self._load(index) for index in self.groups[item]]

    def _load(self, index: int) -> LoadedImage | Failure:
        start = time.perf_counter()
        image_id = self.dataset.pairs[index].image_id
        try:
            sample = self.dataset.load(index)
            prepared = self.predictor.prepare(image_id, sample.image)
        except HarnessError as error:
            return Failure(image_id, str(error), isinstance(error, EveryImageError))
        overlay = torch.from_numpy(sample.image) if image_id in self.overlay_ids else None
        source, target = self.predictor.source_hash(image_id), torch.from_numpy(sample.target)
        seconds = time.perf_counter() - start
        image = LoadedImage(image_id, prepared, target, sample.content_hash, source, overlay, seconds)
        try:
            return image if get_worker_info() is None else image.pack()
        except HarnessError as error:
            return Failure(image_id, str(error), of_all=True)


class EvaluationData(pl.LightningDataModule):
    """Loads this rank's batches of images.

    Args:
        items: all batches that are still to be evaluated, by any rank.
        costs: expected, of each batch.
        names: of each batch, for messages.
        sharding: how ranks share them.
        loaders: of this rank.
        coordinator: of the ranks.
        control: batches with images that an earlier session has counted: every rank predicts them again first.
    """

    def __init__(
        self, items: ImageItems, costs: Sequence[float], names: Sequence[str], sharding: Sharding, loaders: Loaders,
        coordinator: Coordinator, control: ImageItems,
    ) -> None:  # fmt: skip
        super().__init__()
        self.items, self.costs, self.names, self.control = items, costs, names, control
        spare = max(0, min(8, cores_per_rank() - 1))
        self.workers = min(spare if loaders.workers is None else loaders.workers, len(costs))
        self.sampler = SharedItems(
            costs, sharding, coordinator, coordinator.rank, coordinator.world_size, loaders.ahead * self.workers,
            loaders.at_once,
        )  # fmt: skip
        self.prefetch = loaders.ahead if self.workers else None
        if loaders.at_once > 1:  # they mostly wait: more than there are cores are no mistake
            warnings.filterwarnings("ignore", message=r"This DataLoader will create")

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the loader of (number, batch)."""
        trainer = self.trainer
        assert trainer is not None
        return ItemLoader(
            Numbered(self.items),
            batch_size=None,
            sampler=self.sampler,
            num_workers=self.workers,
            prefetch_factor=self.prefetch,
            multiprocessing_context="fork" if self.workers else None,  # nothing of the network is sent to workers
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )

    def on_exception(self, exception: BaseException) -> None:
        """End what loader processes wait for; called by Lightning before it waits for them."""
        self.items.stop()


_CONTROLS = 2


def control_groups(groups: Sequence[list[int]], ids: Sequence[str], counted: Mapping[str, Row]) -> list[list[int]]:
    """Choose the batches by which another session's model is distinguished from the one that counted before.

    Args:
        groups: indices of the images of each batch.
        ids: of all images.
        counted: the rows of an earlier session, by image id.

    Returns:
        The two batches whose counted images have the most pairs of annotated and predicted class: they notice most.
        Fewer where fewer have a counted image with a labelled pixel.
    """
    pairs = [sum(len(counted[ids[i]].pixels) for i in group if ids[i] in counted) / len(group) for group in groups]
    telling = sorted((number for number in range(len(groups)) if pairs[number]), key=lambda number: -pairs[number])
    return [groups[number] for number in telling[:_CONTROLS]]


def make_data(cfg: Config, job: Job, counted: Mapping[str, Row], coordinator: Coordinator) -> EvaluationData:
    """Return what is still to be evaluated.

    Args:
        cfg: the whole configuration.
        job: data set, predictor and loaders.
        counted: rows of images that are in the ledger, by image id.
        coordinator: of the ranks.
    """
    ids = job.dataset.ids
    sizes = [job.sizes[i] for i in ids]
    groups = group_images(sizes, job.predictor, cfg.inference.images)  # of all images: batches never depend on the past
    todo = [group for group in groups if any(ids[i] not in counted for i in group)]
    drawn = np.linspace(0, len(ids) - 1, min(cfg.run.overlays, len(ids))).astype(int)
    items = ImageItems(job.dataset, todo, job.predictor, {ids[i] for i in drawn})
    costs = [sum(job.predictor.cost(sizes[i]) for i in group) for group in todo]
    names = [", ".join(ids[i] for i in group) for group in todo]
    control = ImageItems(job.dataset, control_groups(groups, ids, counted), job.predictor, set())
    data = EvaluationData(items, costs, names, cfg.runtime.sharding, job.loaders, coordinator, control)
    if todo:  # what is prepared of an image, and its labels: one byte a pixel
        handed = sum(job.predictor.prepared_bytes(size) + size[0] * size[1] for size in sizes)
        check_shared_memory(data.workers, data.prefetch or 0, handed / len(groups))
    return data
