"""Open the data set that a configuration names."""

from __future__ import annotations

from dataclasses import replace

from ade_harness.config.dataset import DatasetConfig, DatasetKind
from ade_harness.data.ade20k import open_ade20k
from ade_harness.data.ade20k_labels import ade20k_classes
from ade_harness.data.dataset import SegmentationDataset
from ade_harness.data.demo import open_demo
from ade_harness.data.folder import open_folders, read_classes
from ade_harness.data.labels import Classes
from ade_harness.files.fetch import cache_dir
from ade_harness.files.reading import expanded


def open_dataset(cfg: DatasetConfig, apply_exif: bool = True) -> SegmentationDataset:
    """Open the data set of a ``dataset`` node.

    Args:
        cfg: the node.
        apply_exif: turn images as their EXIF orientation says.

    Raises:
        HarnessError: see :mod:`ade_harness.data.ade20k` and :mod:`ade_harness.data.folder`.
    """
    ids = list(cfg.ids) if cfg.ids is not None else None
    if cfg.kind == DatasetKind.folder:
        return open_folders(cfg, apply_exif)
    if cfg.kind == DatasetKind.demo:
        return open_demo(cache_dir(), cfg.images, cfg.limit, ids, cfg.split)
    dataset = open_ade20k(expanded(cfg.root or ""), cfg.split, cfg.limit, ids)
    return replace(dataset, apply_exif=apply_exif)


def open_classes(cfg: DatasetConfig) -> Classes:
    """Return the classes of a ``dataset`` node, without looking for its images; raises HarnessError as above."""
    if cfg.kind == DatasetKind.folder:
        return read_classes(expanded(cfg.classes or ""), cfg.name)[0]
    return ade20k_classes()
