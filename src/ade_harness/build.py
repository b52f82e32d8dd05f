"""Configuration to objects, with every check that can be made before the first image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ade_harness import kernels
from ade_harness.data.ade20k import SegmentationDataset, open_ade20k
from ade_harness.data.synthetic import open_demo
from ade_harness.errors import HarnessError
from ade_harness.inference.folder import FolderPredictor
from ade_harness.inference.predictor import NetworkPredictor
from ade_harness.models.loading import LoadedModel, load_model


def cache_dir() -> Path:
    """Return where made-up data and downloads are kept: ADE_HARNESS_CACHE, or below the user's cache folder."""
    base = os.environ.get("ADE_HARNESS_CACHE")
    if base:
        return Path(base).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ade_harness"


def build_dataset(cfg: DictConfig, apply_exif: bool = True) -> SegmentationDataset:
    """Open the data set of a ``dataset`` node.

    Args:
        cfg: the node.
        apply_exif: turn images as their EXIF orientation says.

    Raises:
        HarnessError: see :mod:`ade_harness.data.ade20k`.
    """
    ids = list(cfg.ids) if cfg.ids is not None else None
    if cfg.kind == "demo":
        return open_demo(cache_dir(), cfg.images, cfg.limit, ids)
    dataset = open_ade20k(Path(cfg.root).expanduser(), cfg.split, cfg.limit, ids)
    return replace(dataset, apply_exif=apply_exif)


def build_predictor(
    cfg: DictConfig, dataset: SegmentationDataset, sizes: Sequence[tuple[int, int]]
) -> tuple[NetworkPredictor | FolderPredictor, LoadedModel | None]:
    """Load the model, and check that it can take what the protocol makes of every image.

    Args:
        cfg: the whole configuration.
        dataset: its images.
        sizes: their (height, width); empty on the ranks that leave the check to another.

    Returns:
        The predictor, and its model if there is one.

    Raises:
        HarnessError: see :mod:`ade_harness.models.loading`; or a protocol that the model cannot take.
    """
    if cfg.model.kind == "predictions":
        folder = FolderPredictor(Path(cfg.model.path).expanduser(), cfg.model.encoding)
        missing = folder.missing(dataset.ids)
        if missing:
            raise HarnessError(
                f"{folder.folder}: {len(missing)} of {len(dataset.ids)} label files are missing, the first is"
                f" {missing[0]}.png. Every image needs one; dataset.ids or dataset.limit evaluate fewer."
            )
        return folder, None
    model = load_model(cfg.model, cfg.runtime.threads)
    predictor = NetworkPredictor(model, cfg.inference, cfg.model, cfg.runtime.kernels)
    predictor.check_sizes(dict(zip(dataset.ids, sizes, strict=False)))
    return predictor, model


def describe_marks(
    cfg: DictConfig, dataset: SegmentationDataset, model: LoadedModel | None, sizes: Sequence[tuple[int, int]]
) -> list[str]:
    """Return what the run's numbers are not; shown on every output. Arguments: as of :func:`build_predictor`."""
    marks = []
    if dataset.is_demo:
        marks.append("DEMO: made-up images, the score says nothing about scene parsing")
    if model is not None and model.weights == "random":
        marks.append(f"RANDOM WEIGHTS: seed {cfg.model.seed}, the score says nothing about the model")
    if dataset.is_partial:
        marks.append(f"PARTIAL: {len(dataset.pairs):,} of {dataset.expected_images:,} images")
    resized = dataset.resized_images(sizes) if sizes else []
    if resized:
        marks.append(f"NOT THE OFFICIAL IMAGES: {len(resized)} of {len(sizes)} have another size, such as {resized[0]}")
    if not dataset.is_demo and cfg.dataset.split != "validation":
        marks.append(f"NOT VALIDATION: the {cfg.dataset.split} images")
    return marks


def describe_facts(
    dataset: SegmentationDataset, model: LoadedModel | None, cfg: DictConfig, device: str
) -> dict[str, Any]:
    """Return origins and hashes for the manifest.

    Raises:
        HarnessError: ``runtime.kernels`` cannot be used on this device.
    """
    facts = {"weights": model.weights, **model.facts} if model is not None else {"origin": cfg.model.path}
    implementation: Any = kernels.select(cfg.runtime.kernels, device)
    return {
        "device": device,
        "kernels": implementation.__name__.rpartition(".")[2],
        "model": {"name": cfg.model.name, **facts},
        "dataset": {
            "name": dataset.name,
            "root": str(dataset.source.location),
            "images": len(dataset.pairs),
            "expected_images": dataset.expected_images,
            "ids_hash": dataset.ids_hash(),
        },
    }
