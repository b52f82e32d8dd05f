"""Configuration to objects, with every check that can be made before the first image."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ade_harness import kernels
from ade_harness.config.composed import Composed
from ade_harness.config.dataset import Split
from ade_harness.config.kinds import kind_of
from ade_harness.config.plain import as_dict
from ade_harness.config.runtime import Accelerator
from ade_harness.config.schema import Config, OnError
from ade_harness.data.ade20k import resized_images
from ade_harness.data.ade20k_labels import ade20k_classes
from ade_harness.data.dataset import SegmentationDataset
from ade_harness.data.factory import open_dataset
from ade_harness.data.labels import Classes
from ade_harness.errors import HarnessError
from ade_harness.inference.factory import open_predictor
from ade_harness.inference.forward import AUTOCAST
from ade_harness.inference.memory import memory_warning
from ade_harness.inference.predictor import Predictor
from ade_harness.models.identity import state_hash
from ade_harness.models.ops.deformable import FALLBACKS, implementation_of
from ade_harness.runs.provenance import code_state
from ade_harness.runs.record import RunRecord, start_record
from ade_harness.runtime.cluster import cores_per_rank, gpu_of_another_kind, host_name, local_rank, local_ranks
from ade_harness.runtime.console import print_line
from ade_harness.runtime.coordination import Coordinator, agreed, broadcast, gather
from ade_harness.runtime.limits import usable_cores
from ade_harness.runtime.queue import Loaders
from ade_harness.runtime.ranks import Ranks, arithmetic_as_set


def open_run(composed: Composed, job: Job, ranks: Ranks, console: Console) -> RunRecord | None:
    """Open and lock the run directory, on rank 0; raises as :func:`ade_harness.runs.record.start_record`."""
    if ranks.coordinator.rank != 0:
        return None
    cfg = composed.config
    config = as_dict(cfg)
    seeds = {"runtime.seed": cfg.runtime.seed, "model.seed": cfg.model.seed}
    facts = describe_facts(job.dataset, job.ids_hash, job.facts, cfg, ranks.trainer.strategy.root_device.type)
    facts["repeat"] = composed.repeat
    record = start_record(config, facts, job.marks, seeds, console.print)
    known = [f"Note: {note}." for note in job.notes]  # now, and not only after the last image
    for line in (*record.manifest["marks"], *known, f"run directory: {record.path}"):
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
    """Hash of the ids of the whole data set."""
    predictor: Predictor
    facts: dict[str, Any]
    """Origin and hashes of the weights."""
    loaders: Loaders
    marks: tuple[str, ...]
    """What the run's numbers are not."""
    protocol_changes: tuple[str, ...]
    """Fields of the protocol that are not as its YAML file says."""
    notes: tuple[str, ...] = ()


def build_job(composed: Composed, coordinator: Coordinator, device: str) -> Job:
    """Open the data set and load the model on every rank, and compare what the ranks see.

    Args:
        composed: the configuration.
        coordinator: of the ranks.
        device: "cpu" or "cuda".

    Raises:
        HarnessError: on every rank, if it fails on one; it names rank and host if they differ.
    """
    cfg = composed.config
    is_first = local_rank() == 0

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
    if wrong and (cfg.run.on_error == OnError.fail or len(wrong) == len(dataset.ids)):
        more = f" {len(wrong) - 1} more images fail." if len(wrong) > 1 else ""
        raise HarnessError(next(iter(wrong.values())) + more)
    ids_hash, dataset = dataset.ids_hash(), dataset.without(wrong)
    predictor = agreed(coordinator, "model", lambda: _checked_predictor(cfg, dataset.classes, sizes))
    loaders = predictor.loaders(cfg.runtime.workers, coordinator.rank, coordinator.world_size)
    facts = predictor.facts()
    if is_first and predictor.network is not None:  # once on each node: its ranks share the pages of the weights
        begin = time.monotonic()
        facts = {**facts, "state_sha256": state_hash(predictor.network, kind_of(cfg.model.kind).is_code)}
        facts["state_sha256_seconds"] = round(time.monotonic() - begin, 2)

    def select() -> tuple[kernels.Kernels, str | None]:
        return kernels.selection(cfg.runtime.kernels, device)

    # the first of a node compiles them, and the others find what it has compiled
    of_first = agreed(coordinator, "kernels of nodes", lambda: select() if is_first else None)
    chosen, reason = agreed(coordinator, "kernels", lambda: of_first or select())
    # without the reason, which may name a rank's own temporary files
    names = [kernels.name_of(chosen), *(f"plain torch {does}" for does in chosen.left_to_torch())]
    implementations: dict[str, str | None] = {"the label kernels": ", ".join(names)}
    if predictor.network is not None:
        attention = agreed_attention(coordinator, predictor.network, device, cfg.inference.precision, is_first)
        implementations["deformable attention"] = attention
        facts = {**facts, **attention_facts(attention, device)}
    reasons = [why for why in (reason, FALLBACKS.get(device)) if why is not None]
    notes = compare_ranks(coordinator, dataset, ids_hash, facts, is_first, implementations, reasons)
    notes += dataset.remarks
    if reason is not None:
        notes.append(f"runtime.kernels={cfg.runtime.kernels}: {reason}")
    of_ranks = gather(_machine_notes(cfg, device, sizes))  # nodes may have other GPUs
    notes += dict.fromkeys(note for of_rank in of_ranks for note in of_rank)
    marks = describe_marks(cfg, dataset, facts, list(sizes.values()))
    return Job(
        dataset, sizes, wrong, ids_hash, predictor, facts, loaders, tuple(marks), tuple(composed.changes), tuple(notes)
    )


def _machine_notes(cfg: Config, device: str, sizes: Mapping[str, tuple[int, int]]) -> list[str]:
    """Say what this machine has too little of for a run on GPUs, or that it has one that is not used."""
    if device != "cuda":
        other = gpu_of_another_kind() if cfg.runtime.accelerator == Accelerator.auto else None
        return [other] if other is not None else []
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    notes = [memory_warning(cfg, total, set(sizes.values()))]
    if cores_per_rank() < 2:
        notes.append(
            f"{local_ranks()} ranks share {usable_cores()} CPU cores, and their GPUs will idle: request at least two"
            " cores per rank (sbatch --cpus-per-gpu=8)"
        )
    return [note for note in notes if note is not None]


def agreed_attention(
    coordinator: Coordinator, network: nn.Module, device: str, precision: str, is_first: bool
) -> str | None:
    """Return what deformable attention runs on, see :func:`implementation_of`; a node's first rank compiles it for all.

    Args:
        coordinator: of the ranks.
        network: of this rank.
        device: "cpu" or "cuda".
        precision: ``inference.precision``.
        is_first: whether this is the first rank of its node.
    """

    def attend() -> str | None:
        return implementation_of(network, device, AUTOCAST.get(precision))

    agreed(coordinator, "deformable attention of nodes", lambda: attend() if is_first else None)
    return agreed(coordinator, "deformable attention", attend)


def attention_facts(attention: str | None, device: str) -> dict[str, str]:
    """Return what the manifest says of deformable attention, if there is any; see :func:`implementation_of`."""
    why = FALLBACKS.get(device)
    return {} if attention is None else {"deformable_attention": attention if why is None else f"{attention}: {why}"}


def compare_ranks(
    coordinator: Coordinator,
    dataset: SegmentationDataset,
    ids_hash: str,
    facts: Mapping[str, Any],
    is_first: bool,
    implementations: Mapping[str, str | None],
    reasons: Sequence[str] = (),
) -> list[str]:
    """Refuse ranks that would count, or train, something else than rank 0 does; returns notes.

    Args:
        coordinator: of the ranks.
        dataset: that this rank has opened.
        ids_hash: of the ids of the whole data set.
        facts: of this rank's model.
        is_first: whether this is the first rank of its node, which alone looks at what the node's ranks share.
        implementations: of what has several, by what they make.
        reasons: why this rank does without a kernel.

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
        "the model's weights in memory (sha256)": facts.get("state_sha256"),
        "the model's source": facts.get("source"),
        "the code's commit": code.get("commit"),
        "the code's uncommitted changes (sha256)": code.get("diff_sha256"),
        "torch": torch.__version__,
        "cuDNN": torch.backends.cudnn.version() if torch.cuda.is_available() else None,  # type: ignore[no-untyped-call]
        # others may round otherwise
        **{f"torch's {switch}": value for switch, value in arithmetic_as_set().items()},
        **{f"the implementation of {what}": name for what, name in implementations.items()},
    }
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    reported = gather((host_name(), is_first, seen, device, "; ".join(reasons)))
    host, _, expected, _, of_first = reported[0]
    for rank, (other_host, first, other, _, of_rank) in enumerate(reported):
        for what, value in other.items():
            per_node = what.startswith(("the data set's", "the code's", "the model's weights"))
            if value != expected[what] and (first or not per_node):
                computes = what.startswith(("torch", "cuDNN", "the implementation"))
                advice = "the same software and GPUs; `doctor` there says more" if computes else "the same files"
                why = (
                    next((text for text in (of_rank, of_first) if text), "")
                    if what.startswith("the implementation")
                    else ""
                )
                raise HarnessError(
                    f"rank {rank} on {other_host} differs from rank 0 on {host}: {what} is {value}, not"
                    f" {expected[what]}{why and f' ({why})'}. Give every node {advice}."
                )
    devices = sorted({d for _, _, _, d, _ in reported})
    return [] if len(devices) == 1 else [f"the ranks have different devices ({', '.join(devices)}): bits may differ"]


def _checked_predictor(cfg: Config, classes: Classes, sizes: Mapping[str, tuple[int, int]]) -> Predictor:
    """Load the model, and check that it can take what the protocol makes of every image."""
    predictor = open_predictor(cfg, classes)
    predictor.check(sizes)
    return predictor


def describe_marks(
    cfg: Config, dataset: SegmentationDataset, facts: Mapping[str, Any], sizes: Sequence[tuple[int, int]]
) -> list[str]:
    """Return what the run's numbers are not; shown on every output."""
    marks = []
    if dataset.is_demo:
        marks.append("DEMO: synthetic images, not an ADE20K score")
    if facts.get("weights") == "random":
        marks.append(f"RANDOM WEIGHTS: seed {cfg.model.seed}, not a score of this model")
    random = facts.get("random_keys", ())
    if random:
        named = ", ".join(random[:3]) + (", ..." if len(random) > 3 else "")
        marks.append(
            f"RANDOM LAYERS: {len(random)} weights are not in the checkpoint and stayed random ({named}), not a"
            " score of this model"
        )
    if facts.get("other_backbone"):
        marks.append("OTHER BACKBONE: the head was trained above other weights of the backbone than those used here")
    if facts.get("head_demo") and not dataset.is_demo:
        marks.append("DEMO: the head was trained on synthetic images, not an ADE20K score")
    if dataset.is_partial:
        marks.append(f"PARTIAL: {len(dataset.pairs):,} of {dataset.expected_images:,} images")
    resized = resized_images(dataset, sizes) if sizes else []
    if resized:
        marks.append(f"NOT THE OFFICIAL IMAGES: {len(resized)} of {len(sizes)} have another size, such as {resized[0]}")
    if dataset.is_official and cfg.dataset.split != Split.validation:
        marks.append(f"NOT VALIDATION: the {cfg.dataset.split} images")
    return marks


def skipped_marks(marks: Sequence[str], counted: int, expected: int, skipped: int) -> list[str]:
    """Return the marks of a run that left out images which failed (``run.on_error=skip``)."""
    partial = f"PARTIAL: {counted:,} of {expected:,} images, {skipped} failed and were skipped"
    return [partial, *(mark for mark in marks if not mark.startswith("PARTIAL"))]


def describe_facts(
    dataset: SegmentationDataset, ids_hash: str, facts: Mapping[str, Any], cfg: Config, device: str,
    arithmetic: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return origins and hashes for the manifest; `arithmetic`: torch's switches, None are the present ones.

    Raises:
        HarnessError: ``runtime.kernels`` cannot be used on this device.
    """
    ade20k = dataset.classes is ade20k_classes()
    implementation, reason = kernels.selection(cfg.runtime.kernels, device)
    return {
        "device": device,
        "kernels": kernels.name_of(implementation),
        **({} if reason is None else {"kernels_reason": reason}),
        "arithmetic": dict(arithmetic or arithmetic_as_set()),
        "model": {"name": cfg.model.name, **facts},
        "dataset": {
            "name": dataset.name,
            "root": str(dataset.source.location),
            "images": len(dataset.pairs),
            "expected_images": dataset.expected_images,
            "ids_hash": ids_hash,
            # ADE20K's are packaged; of other data the run is read without its files
            **({} if ade20k else {"classes": dataset.classes.as_dict(), "labels_hash": dataset.labels_hash()}),
        },
    }
