"""Train a linear head on a frozen backbone, from its data to its file."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import DataLoader

from ade_harness.config.overrides import as_override_value, overrides_of
from ade_harness.config.plain import as_dict, flatten
from ade_harness.config.probe import ProbeConfig
from ade_harness.config.runtime import Accelerator
from ade_harness.config.schema import Config, TrackingKind
from ade_harness.data.dataset import SegmentationDataset
from ade_harness.data.factory import open_dataset
from ade_harness.data.labels import Classes
from ade_harness.errors import HarnessError
from ade_harness.evaluation.job import agreed_attention, compare_ranks
from ade_harness.files.atomic import write_text
from ade_harness.files.tensors import write_tensors
from ade_harness.models.loaded import LoadedModel
from ade_harness.models.loading import load_for_probe
from ade_harness.probe.crops import Crops, Share
from ade_harness.probe.module import HeadTraining
from ade_harness.runs.directory import (
    LOSS,
    PROBE,
)
from ade_harness.runs.progress import read_losses
from ade_harness.runs.record import RunRecord, start_record
from ade_harness.runtime.cluster import cores_per_rank, local_rank
from ade_harness.runtime.console import print_line
from ade_harness.runtime.coordination import agreed, broadcast, broken_connections
from ade_harness.runtime.ranks import arithmetic_as_set, started_ranks
from ade_harness.tracking.lifecycle import Tracking, tracked

HEAD = "head.safetensors"
_LOCAL_KEYS = ("save_every", "log_every")
"""Fields of a recipe that change no weight."""


def train_probe(cfg: Config, console: Console, on_run_dir: Callable[[Path], None] = lambda _: None) -> Path | None:
    """Train a head; returns its file on rank 0, None on the other ranks.

    Every rank runs this function. ``run.dir`` is new, or that of an earlier part, which is continued: to the same bits,
    on as many ranks as before.

    Args:
        cfg: with a ``probe`` node.
        console: for progress.
        on_run_dir: called with the run directory as soon as it exists.

    Raises:
        HarnessError: nothing to train, or another recipe, model or data set than the directory's.
        StopRequestedError: asked to stop; the state is saved.
    """
    recipe = cfg.probe
    assert recipe is not None
    options: dict[str, Any] = {
        "max_epochs": 1,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "sync_batchnorm": _on_gpus(cfg),
    }
    with tracked(cfg, console) as tracking, started_ranks(cfg.runtime, training=True, **options) as ranks:
        first = ranks.coordinator.rank == 0
        dataset = agreed(ranks.coordinator, "dataset", lambda: open_dataset(cfg.dataset))
        model = agreed(ranks.coordinator, "model", lambda: _loaded(cfg, recipe, dataset.classes))
        device = ranks.trainer.strategy.root_device.type
        attention = agreed_attention(
            ranks.coordinator, model.module, device, cfg.inference.precision, local_rank() == 0
        )
        computes = {"deformable attention": attention}
        compare_ranks(ranks.coordinator, dataset, dataset.ids_hash(), model.facts, local_rank() == 0, computes)
        record = agreed(
            ranks.coordinator, "record", lambda: _open(cfg, recipe, dataset, model, device, console) if first else None
        )
        if record is not None:
            ranks.watchdog.on_beats = lambda beats: record.lock.renew()
            tracking.begin(record.path, record.manifest)
        run_dir: Path = broadcast(record.path if record else None)
        on_run_dir(run_dir)
        ranks.watchdog.note(run=str(run_dir))
        try:
            training = HeadTraining(cfg, recipe, model, ranks, run_dir, console)
            _fit(training, cfg, recipe, dataset, model)
        finally:
            if record is not None:
                record.lock.release()
        ranks.part()
        if record is None:
            return None
        return _finish(cfg, training, record, console, tracking, dataset.classes)


def _loaded(cfg: Config, recipe: ProbeConfig, classes: Classes) -> LoadedModel:
    """Load the backbone, and check that it takes the crops; raises HarnessError as :func:`load_for_probe`."""
    model = load_for_probe(cfg.model, classes)
    size = model.fixed_size
    if size is not None and size != (recipe.crop, recipe.crop):
        raise HarnessError(
            f"probe.crop={recipe.crop}: the backbone takes {size[1]}x{size[0]} (width x height) only. Choose"
            f" probe.crop={size[0]} probe.side={size[0]}, and windows of that size when it is evaluated."
        )
    return model


def _on_gpus(cfg: Config) -> bool:
    """Whether batch norm is to see the crops of all ranks; torch has no such norm for the CPU."""
    return cfg.runtime.accelerator != Accelerator.cpu and torch.cuda.is_available()


def _decided(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a configuration that decide a head, by dotted keys."""
    model = config["model"]
    return flatten(
        {
            "probe": {k: v for k, v in config["probe"].items() if k not in _LOCAL_KEYS},
            "model": {k: model[k] for k in ("name", "kind", "architecture", "input", "dtype")},
            "precision": config["inference"]["precision"],
            "runtime": {k: config["runtime"][k] for k in ("threads", "deterministic")},
            "dataset": {"name": config["dataset"]["name"], "split": config["dataset"]["split"]},
        }
    )


def _open(
    cfg: Config, recipe: ProbeConfig, dataset: SegmentationDataset, model: LoadedModel, device: str, console: Console
) -> RunRecord:
    """Open and lock the run directory, on rank 0; raises as :func:`ade_harness.runs.record.start_record`."""
    found = {
        "backbone.origin": model.facts["origin"],
        "backbone.sha256": model.facts.get("sha256"),
        **({"backbone.part": place} if (place := model.facts.get("part_place")) else {}),
        "dataset.ids": dataset.ids_hash(),
    }
    facts = {
        "kind": PROBE,
        "device": device,
        "arithmetic": arithmetic_as_set(),
        "model": {"name": cfg.model.name, "weights": model.weights, **model.facts},
        "dataset": {
            "name": dataset.name,
            "root": str(dataset.source.location),
            "split": dataset.split,
            "images": len(dataset.pairs),
            "expected_images": dataset.expected_images,
            "ids_hash": dataset.ids_hash(),
        },
    }
    marks = []
    if dataset.is_demo:
        marks.append("DEMO: synthetic images, not trained on photographs")
    elif dataset.is_partial:
        marks.append(f"PARTIAL: trained on {len(dataset.pairs):,} of {dataset.expected_images:,} images")
    seeds = {"probe.seed": recipe.seed, "model.seed": cfg.model.seed}
    record = start_record(as_dict(cfg), facts, marks, seeds, console.print, _decided, found)
    print_line(console, f"run directory: {record.path}")
    if part := model.facts.get("part"):
        print_line(console, f"Note: of {model.facts['origin']}: {part}.")
    return record


def _fit(
    training: HeadTraining, cfg: Config, recipe: ProbeConfig, dataset: SegmentationDataset, model: LoadedModel
) -> None:
    ranks = training.ranks
    if training.first_step >= recipe.iterations:
        return
    world = ranks.trainer.world_size
    if recipe.batch % world:
        raise HarnessError(f"probe.batch={recipe.batch}: is shared by {world} ranks, which must divide it.")
    if ranks.coordinator.rank == 0:
        cut_log(training.run_dir, training.first_step)
    workers = cfg.runtime.workers
    spare = max(0, min(8, cores_per_rank() - 1))
    workers = spare if workers is None else workers
    loader = DataLoader(
        Crops(dataset, recipe, model.mean, model.std),
        batch_sampler=Share(recipe, training.first_step, ranks.trainer.global_rank, world),
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        pin_memory=ranks.trainer.strategy.root_device.type == "cuda",
    )
    try:
        with broken_connections(ranks.coordinator):
            ranks.trainer.fit(training, loader)
        if training.stopped:
            ranks.coordinator.raise_if_ended()
    finally:
        training.close()


def cut_log(run_dir: Path, step: int) -> None:
    """Drop what an interrupted part has logged after its last saved state, and a row that it could not end.

    Raises:
        HarnessError: another row is damaged.
    """
    if (run_dir / LOSS).exists():
        rows = [row for row in read_losses(run_dir) if row["step"] <= step]
        write_text(run_dir / LOSS, "".join(f"{json.dumps(row)}\n" for row in rows))


def _finish(
    cfg: Config, training: HeadTraining, record: RunRecord, console: Console, tracking: Tracking, classes: Classes
) -> Path:
    manifest = record.manifest
    path = training.run_dir / HEAD
    weights = {f"head.{k}": v.detach().cpu().contiguous() for k, v in training.head.state_dict().items()}
    about = {
        "model": cfg.model.name,
        "recipe": training.recipe.name,
        "iterations": training.step,
        "images": manifest["dataset"]["images"],
        "demo": manifest["dataset"]["name"] == "demo",
        "backbone_sha256": manifest["model"].get("sha256"),
        "backbone_part": manifest["model"].get("part_place", ""),
        "classes": list(classes.names),
    }
    write_tensors(path, weights, {"probe": json.dumps(about)})  # one entry: the order of several is arbitrary
    rows = read_losses(training.run_dir)
    record.finish_training(rows[-1]["loss"], training.step)
    for mark in manifest["marks"]:
        print_line(console, mark, style="yellow")
    begin = f"{rows[0]['loss']:.4f} -> " if len(rows) > 1 else ""
    console.print(f"loss: {begin}{rows[-1]['loss']:.4f} in {training.step:,} iterations")
    print_line(console, f"head: {path}")
    print_line(console, f"evaluate it: python -m ade_harness {shlex.join(_evaluation_of(cfg, path))}")
    if cfg.tracking.kind == TrackingKind.wandb:
        facts = {"identity": {**_decided(as_dict(cfg)), **manifest["identity"]}}
        tracking.finish_training(training.run_dir, rows, facts)
    return path


def _evaluation_of(cfg: Config, head: Path) -> list[str]:
    """Return the arguments that evaluate a head on the network and the data set that it was trained on."""
    repeated = overrides_of(cfg) or [f"model={cfg.model.name}"]
    kept = [override for override in repeated if re.match(r"(model|inference)[.=]|dataset=|dataset\.root=", override)]
    return [*kept, f"model.checkpoint={as_override_value(str(head.absolute()))}"]
