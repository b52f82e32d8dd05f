"""Configuration to objects, with every check that can be made before the first image."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ade_harness import kernels
from ade_harness.config.compose import protocol_changes
from ade_harness.config.overrides import words_of
from ade_harness.config.plain import as_dict
from ade_harness.config.schema import Config
from ade_harness.data.ade20k import SegmentationDataset
from ade_harness.data.opening import open_dataset
from ade_harness.endpoint.predictor import EndpointPredictor, open_endpoint
from ade_harness.errors import HarnessError, require
from ade_harness.inference.folder import FolderPredictor
from ade_harness.inference.predictor import NetworkPredictor
from ade_harness.models.loading import LoadedModel, load_model
from ade_harness.runs.provenance import code_state
from ade_harness.runs.record import RunRecord, start_record
from ade_harness.runtime.cluster import host_name
from ade_harness.runtime.console import print_line
from ade_harness.runtime.coordination import Coordinator, agreed, broadcast, gather
from ade_harness.runtime.queue import Loaders
from ade_harness.runtime.ranks import Ranks, set_arithmetic

AnyPredictor = NetworkPredictor | FolderPredictor | EndpointPredictor


def open_run(cfg: Config, job: Job, ranks: Ranks, console: Console) -> RunRecord | None:
    """Open and lock the run directory, on rank 0; raises as :func:`ade_harness.runs.record.start_record`."""
    if ranks.coordinator.rank != 0:
        return None
    config = as_dict(cfg)
    seeds = {"runtime.seed": cfg.runtime.seed, "model.seed": cfg.model.seed}
    facts = describe_facts(job.dataset, job.ids_hash, job.facts, cfg, ranks.trainer.strategy.root_device.type)
    facts["repeat"] = words_of(cfg)
    record = start_record(config, facts, job.marks, seeds, console.print)
    for line in (*record.manifest["marks"], f"run directory: {record.path}"):
        print_line(console, line)
    return record


@dataclass(frozen=True)
class Job:
    """What is to be evaluated; equal on every rank."""

    dataset: SegmentationDataset
    """Without the images that are skipped already."""
    sizes: dict[str, tuple[int, int]]
    """(height, width) by image id."""
    skipped: dict[str, str]
    """Why images are left out, by image id (``run.on_error=skip``)."""
    ids_hash: str
    """Of the whole data set."""
    predictor: AnyPredictor
    facts: dict[str, Any]
    """Origin and hashes of the weights."""
    loaders: Loaders
    model: LoadedModel | None
    marks: tuple[str, ...]
    """What the run's numbers are not."""
    protocol_changes: tuple[str, ...]
    """Fields of the protocol that are not as its YAML file says."""
    notes: tuple[str, ...] = ()


def build_job(cfg: Config, coordinator: Coordinator) -> Job:
    """Open the data set and load the model on every rank, and compare what the ranks see.

    Raises:
        HarnessError: on every rank, if it fails on one; it names rank and host if they differ.
    """
    is_first = int(os.environ.get("LOCAL_RANK", "0")) == 0

    def open_it() -> SegmentationDataset:
        return open_dataset(cfg.dataset, cfg.inference.exif)

    opened = agreed(coordinator, "dataset of nodes", lambda: open_it() if is_first else None)
    dataset = agreed(coordinator, "dataset", lambda: opened or open_it())  # the first may have had to make it
    headers = agreed(
        coordinator,
        "headers",  # one rank looks at the files for all
        lambda: dataset.read_headers(cfg.dataset.check_headers) if coordinator.rank == 0 else None,
    )
    sizes, wrong = broadcast(headers)
    if wrong and (cfg.run.on_error == "fail" or len(wrong) == len(dataset.ids)):
        more = f" {len(wrong) - 1} more images fail." if len(wrong) > 1 else ""
        raise HarnessError(next(iter(wrong.values())) + more)
    ids_hash, dataset = dataset.ids_hash(), dataset.without(wrong)
    loaders = plan_loaders(cfg, coordinator.rank, coordinator.world_size)
    predictor, model = agreed(coordinator, "model", lambda: build_predictor(cfg, dataset, sizes))
    facts = describe_model(cfg, predictor, model)
    notes = _compare_ranks(coordinator, dataset, ids_hash, facts, is_first)
    marks = describe_marks(cfg, dataset, model, list(sizes.values()))
    changes = tuple(protocol_changes(cfg.inference))
    return Job(dataset, sizes, wrong, ids_hash, predictor, facts, loaders, model, tuple(marks), changes, tuple(notes))


def plan_loaders(cfg: Config, rank: int, world_size: int) -> Loaders:
    """Return a rank's loaders; those of an endpoint each send one request at a time, which shares its limit out.

    Raises:
        HarnessError: there are more ranks than an endpoint may be sent requests.
    """
    if cfg.model.kind != "http":
        return Loaders(cfg.runtime.workers)
    limit: int = cfg.model.http.concurrency
    require(
        limit >= world_size,
        f"model.http.concurrency={limit}: each of the {world_size} ranks needs one request of its own. Set"
        " runtime.devices=1 (an endpoint's images need no GPU here, and one rank sends them all), or a higher limit.",
    )
    share = limit // world_size + (rank < limit % world_size)
    workers = share if cfg.runtime.workers is None else min(cfg.runtime.workers, share)
    return Loaders(workers, ahead=2, at_once=max(1, workers))


def _compare_ranks(
    coordinator: Coordinator, dataset: SegmentationDataset, ids_hash: str, facts: Mapping[str, Any], is_first: bool
) -> list[str]:
    """Refuse ranks that would count something else than rank 0 does; returns notes.

    Raises:
        HarnessError: names the rank, its host, and what differs.
    """
    if coordinator.world_size == 1:
        return []
    code = code_state() if is_first else {}
    seen = {
        "the image ids (sha256)": ids_hash,
        "the data set's names and sizes (sha256)": dataset.files_hash() if is_first else None,
        "the checkpoint (sha256)": facts.get("sha256"),
        "the code's commit": code.get("commit"),
        "the code's uncommitted changes (sha256)": code.get("diff_sha256"),
        "torch": torch.__version__,
    }
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    told = gather((host_name(), is_first, seen, device))
    host, _, expected, _ = told[0]
    for rank, (other_host, first, other, _) in enumerate(told):
        for what, value in other.items():
            per_node = what.startswith(("the data set's", "the code's"))
            if value != expected[what] and (first or not per_node):
                raise HarnessError(
                    f"rank {rank} on {other_host} sees something else than rank 0 on {host}: {what} is {value}, not"
                    f" {expected[what]}. Give every node the same files."
                )
    devices = sorted({d for _, _, _, d in told})
    return [] if len(devices) == 1 else [f"the ranks have different devices ({', '.join(devices)}): bits may differ"]


def build_predictor(
    cfg: Config, dataset: SegmentationDataset, sizes: Mapping[str, tuple[int, int]]
) -> tuple[AnyPredictor, LoadedModel | None]:
    """Load the model, and check that it can take what the protocol makes of every image.

    Args:
        cfg: the whole configuration.
        dataset: its images.
        sizes: (height, width) by image id.

    Returns:
        The predictor, and its model if there is one.

    Raises:
        HarnessError: see :mod:`ade_harness.models.loading`; or a protocol that the model cannot take.
    """
    if cfg.model.kind == "predictions":
        folder = FolderPredictor(Path(cfg.model.path or "").expanduser(), cfg.model.encoding)
        missing = folder.missing(dataset.ids)
        if missing:
            raise HarnessError(
                f"{folder.folder}: {len(missing)} of {len(dataset.ids)} label files are missing, the first is"
                f" {missing[0]}.png. Every image needs one; dataset.ids or dataset.limit evaluate fewer."
            )
        return folder, None
    if cfg.model.kind == "http":
        return open_endpoint(cfg.model, cfg.runtime.kernels), None
    model = load_model(cfg.model, cfg.runtime.threads)
    predictor = NetworkPredictor(model, cfg.inference, cfg.model, cfg.runtime.kernels, cfg.metrics.calibration)
    predictor.check_sizes(sizes)
    return predictor, model


def describe_marks(
    cfg: Config, dataset: SegmentationDataset, model: LoadedModel | None, sizes: Sequence[tuple[int, int]]
) -> list[str]:
    """Return what the run's numbers are not; shown on every output."""
    marks = []
    if dataset.is_demo:
        marks.append("DEMO: synthetic images, the score says nothing about scene parsing")
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


def skipped_marks(marks: Sequence[str], counted: int, expected: int, skipped: int) -> list[str]:
    """Return the marks of a run that left out images which failed (``run.on_error=skip``)."""
    partial = f"PARTIAL: {counted:,} of {expected:,} images, {skipped} failed and were skipped"
    return [partial, *(mark for mark in marks if not mark.startswith("PARTIAL"))]


def describe_model(cfg: Config, predictor: AnyPredictor, model: LoadedModel | None) -> dict[str, Any]:
    """Return where the predictions come from: ``origin``, and the weights' ``sha256`` if it is known."""
    if model is not None:
        return {"weights": model.weights, **model.facts}
    return predictor.facts() if isinstance(predictor, EndpointPredictor) else {"origin": cfg.model.path}


def describe_facts(
    dataset: SegmentationDataset, ids_hash: str, facts: Mapping[str, Any], cfg: Config, device: str
) -> dict[str, Any]:
    """Return origins and hashes for the manifest.

    Raises:
        HarnessError: ``runtime.kernels`` cannot be used on this device.
    """
    implementation: Any = kernels.select(cfg.runtime.kernels, device)
    return {
        "device": device,
        "kernels": implementation.__name__.rpartition(".")[2],
        "arithmetic": set_arithmetic(cfg.runtime.deterministic),
        "model": {"name": cfg.model.name, **facts},
        "dataset": {
            "name": dataset.name,
            "root": str(dataset.source.location),
            "images": len(dataset.pairs),
            "expected_images": dataset.expected_images,
            "ids_hash": ids_hash,
        },
    }
