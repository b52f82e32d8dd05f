"""Train a linear head on a frozen backbone: Lightning's loop, crops by number, and a state that resumes bit for bit."""

from __future__ import annotations

import json
import pickle
import re
import shlex
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

from ade_harness.config.overrides import as_override_value, overrides_of
from ade_harness.config.plain import as_dict
from ade_harness.config.probe import ProbeConfig
from ade_harness.config.schema import Config
from ade_harness.data.dataset import SegmentationDataset
from ade_harness.data.labels import IGNORE_INDEX
from ade_harness.data.opening import open_dataset
from ade_harness.errors import HarnessError
from ade_harness.files.atomic import discard, replaced, write_json, write_text
from ade_harness.inference.forward import arithmetic_of
from ade_harness.models.heads.linear import LinearHead, LinearSegmenter
from ade_harness.models.loaded import LoadedModel
from ade_harness.models.loading import load_for_probe
from ade_harness.probe.crops import Crops, Share
from ade_harness.probe.schedule import learning_rate
from ade_harness.runs.directory import (
    LOSS,
    MANIFEST,
    PROBE,
    PROGRESS,
    flatten,
)
from ade_harness.runs.record import RunRecord, start_record
from ade_harness.runtime.console import print_line
from ade_harness.runtime.coordination import agreed, broadcast, broken_connections
from ade_harness.runtime.limits import usable_cores
from ade_harness.runtime.progress import ProgressReporter
from ade_harness.runtime.ranks import Ranks, arithmetic_as_set, started_ranks
from ade_harness.tracking.around import Tracking, tracked

HEAD, STATE = "head.safetensors", "state.pt"
_TELL_EVERY_S = 2.0
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
        model = agreed(ranks.coordinator, "model", lambda: _loaded(cfg, recipe))
        device = ranks.trainer.strategy.root_device.type
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
            training = _Training(cfg, recipe, model, ranks, run_dir, console)
            _fit(training, cfg, recipe, dataset, model)
        finally:
            if record is not None:
                record.lock.release()
        ranks.part()
        return _finish(cfg, training, record.manifest, console, tracking) if record is not None else None


def _loaded(cfg: Config, recipe: ProbeConfig) -> LoadedModel:
    """Load the backbone, and check that it takes the crops; raises HarnessError as :func:`load_for_probe`."""
    model = load_for_probe(cfg.model)
    size = model.fixed_size
    if size is not None and size != (recipe.crop, recipe.crop):
        raise HarnessError(
            f"probe.crop={recipe.crop}: the backbone takes {size[1]}x{size[0]} (width x height) only. Choose"
            f" probe.crop={size[0]} probe.side={size[0]}, and windows of that size when it is evaluated."
        )
    return model


def _on_gpus(cfg: Config) -> bool:
    """Whether batch norm is to see the crops of all ranks; torch has no such norm for the CPU."""
    return cfg.runtime.accelerator != "cpu" and torch.cuda.is_available()


def _decided(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a configuration that decide a head, by dotted keys."""
    model = config["model"]
    return flatten(
        {
            "probe": {k: v for k, v in config["probe"].items() if k not in _LOCAL_KEYS},
            "model": {k: model[k] for k in ("name", "kind", "architecture", "input", "dtype")},
            "precision": config["inference"]["precision"],
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
        marks.append("DEMO: synthetic images, this head knows nothing about scenes")
    elif dataset.is_partial:
        marks.append(f"PARTIAL: trained on {len(dataset.pairs):,} of {dataset.expected_images:,} images")
    seeds = {"probe.seed": recipe.seed, "model.seed": cfg.model.seed}
    record = start_record(as_dict(cfg), facts, marks, seeds, console.print, _decided, found)
    print_line(console, f"run directory: {record.path}")
    return record


class _Training(pl.LightningModule):
    """The head alone is a part of this module: the backbone is neither trained, synchronised nor saved."""

    def __init__(
        self, cfg: Config, recipe: ProbeConfig, model: LoadedModel, ranks: Ranks, run_dir: Path, console: Console
    ) -> None:
        super().__init__()
        assert isinstance(model.module, LinearSegmenter)
        self.recipe, self.run_dir = recipe, run_dir
        self.ranks = ranks
        self._frozen = [model.module]  # in a list, so that it is no submodule
        torch.manual_seed(recipe.seed)
        untrained = model.module.head
        self.head = LinearHead(untrained.norm.num_features, untrained.classifier.out_channels, recipe.dropout)
        self._precision: str = cfg.inference.precision
        self._saved = self._load()
        self.first_step: int = self._saved["step"] if self._saved else 0
        self.step = self.first_step
        """Optimiser steps done."""
        self.stopped = False
        self._begun = self._told = time.monotonic()
        self._losses: list[Tensor] = []
        is_first = ranks.coordinator.rank == 0
        self._reporter = (
            ProgressReporter(console, recipe.iterations, self.first_step, unit="iterations", title="training")
            if is_first
            else None
        )
        if self.first_step and is_first:
            console.print(f"continuing after {self.first_step:,} of {recipe.iterations:,} iterations")

    def _load(self) -> dict[str, Any] | None:
        path = self.run_dir / STATE
        if not path.exists():
            return None
        try:
            saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            self.head.load_state_dict(saved["head"])
        except (RuntimeError, OSError, KeyError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise HarnessError(
                f"{path}: is damaged ({str(error).splitlines()[0]}). Delete it to start again."
            ) from error
        return saved

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW as it was left."""
        optimizer = torch.optim.AdamW(
            self.head.parameters(),
            lr=self.recipe.lr,
            betas=(self.recipe.betas[0], self.recipe.betas[1]),
            weight_decay=self.recipe.weight_decay,
        )
        if self._saved is not None:
            optimizer.load_state_dict(self._saved["optimizer"])
        return optimizer

    def on_fit_start(self) -> None:
        """Bring the backbone to the device."""
        self.ranks.install_signals()
        self._frozen[0].backbone.to(self.device).eval()
        self._begun = time.monotonic()
        if self._reporter is not None:
            self._reporter.start()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the learning rate, and the random numbers of dropout: both depend on the step alone."""
        optimizer: Any = self.optimizers()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, self.step)
        torch.manual_seed((self.recipe.seed * 1_000_003 + self.step) * 1024 + self.global_rank)
        self.ranks.watchdog.working_on(f"iteration {self.step + 1}")

    def _autocast(self) -> AbstractContextManager[Any]:
        return arithmetic_of(self._precision, self.device.type)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean over all pixels of the crops, ignored ones as 0 (``avg_non_ignore=False``)."""
        images, targets = batch
        with torch.no_grad(), self._autocast():
            features = self._frozen[0].features(images).float()
        logits = F.interpolate(self.head(features), targets.shape[-2:], mode="bilinear", align_corners=False)
        return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum") / targets.numel()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save, log, and look whether all are to stop."""
        self.step += 1
        self._losses.append(outputs["loss"].detach())
        done = self.step == self.recipe.iterations
        if self.step % self.recipe.log_every == 0 or done:
            self._log()
        stop = self.trainer.strategy.reduce_boolean_decision(self.ranks.coordinator.stopped, all=False)
        self.ranks.watchdog.finished(1, 1.0, 0.0)
        if self._reporter is not None:
            self._reporter.update(self.step - self.first_step)
            self._tell()
        if self.step % self.recipe.save_every == 0 or stop or done:
            self._save()
        if stop and not done:
            self.stopped = True
            self.trainer.should_stop = True

    def _tell(self) -> None:
        """Write progress.json for `status` in other shells, every few seconds; an iteration counts as an image."""
        now = time.monotonic()
        if now - self._told < _TELL_EVERY_S:
            return
        self._told = now
        done = self.step - self.first_step
        rate = done / max(now - self._begun, 1e-9)
        content: dict[str, Any] = {
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
            "images": self.recipe.iterations,
            "done": self.step,
            "images_per_second": rate,
            "seconds_left": (self.recipe.iterations - self.step) / rate,
            "warnings": [],
            "ranks": [],
        }
        with suppress(HarnessError):  # the state's own error says that the disk is full
            write_text(self.run_dir / PROGRESS, json.dumps(content), durable=False)  # a sign of life, not a record

    def _log(self) -> None:
        loss = self.trainer.strategy.reduce(torch.stack(self._losses).mean(), reduce_op="mean")
        self._losses.clear()
        if self.global_rank == 0:
            row = {"step": self.step, "loss": float(loss), "lr": learning_rate(self.recipe, self.step - 1)}
            with (self.run_dir / LOSS).open("a") as file:
                file.write(json.dumps(row) + "\n")

    def _save(self) -> None:
        if self.global_rank != 0:
            return
        optimizer: Any = self.optimizers()
        content = {"head": self.head.state_dict(), "optimizer": optimizer.optimizer.state_dict(), "step": self.step}
        with replaced(self.run_dir / STATE) as temporary, temporary.open("wb") as file:
            torch.save(content, file)

    def close(self) -> None:
        """Take the progress display away."""
        if self._reporter is not None:
            self._reporter.close()
            discard(self.run_dir / PROGRESS)


def _fit(
    training: _Training, cfg: Config, recipe: ProbeConfig, dataset: SegmentationDataset, model: LoadedModel
) -> None:
    ranks = training.ranks
    if training.first_step >= recipe.iterations:
        return
    world = ranks.trainer.world_size
    if recipe.batch % world:
        raise HarnessError(f"probe.batch={recipe.batch}: is shared by {world} ranks, which must divide it.")
    if ranks.coordinator.rank == 0:
        _cut_log(training.run_dir / LOSS, training.first_step)
    workers = cfg.runtime.workers
    spare = max(0, min(8, usable_cores() // max(1, ranks.trainer.num_devices) - 1))
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


def _cut_log(path: Path, step: int) -> None:
    """Drop what an interrupted part has logged after its last saved state."""
    if path.exists():
        rows = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
        write_text(path, "".join(f"{line}\n" for line in rows))


def _finish(cfg: Config, training: _Training, manifest: dict[str, Any], console: Console, tracking: Tracking) -> Path:
    path = training.run_dir / HEAD
    weights = {f"head.{k}": v.detach().cpu().contiguous() for k, v in training.head.state_dict().items()}
    about = {
        "model": cfg.model.name,
        "recipe": training.recipe.name,
        "iterations": training.step,
        "images": manifest["dataset"]["images"],
        "demo": manifest["dataset"]["name"] == "demo",
        "backbone_sha256": manifest["model"].get("sha256"),
    }
    with replaced(path) as temporary:
        save_file(
            weights, temporary, metadata={"probe": json.dumps(about)}
        )  # one entry: the order of several is arbitrary
    rows = [json.loads(line) for line in (training.run_dir / LOSS).read_text().splitlines()]
    now = datetime.now(UTC).isoformat(timespec="seconds")
    manifest |= {"status": "finished", "finished": now, "loss": rows[-1]["loss"], "iterations": training.step}
    write_json(training.run_dir / MANIFEST, manifest)
    for mark in manifest["marks"]:
        print_line(console, mark, style="yellow")
    begin = f"{rows[0]['loss']:.4f} -> " if len(rows) > 1 else ""
    console.print(f"loss: {begin}{rows[-1]['loss']:.4f} in {training.step:,} iterations")
    print_line(console, f"head: {path}")
    print_line(console, f"evaluate it: python -m ade_harness {shlex.join(_evaluation_of(cfg, path))}")
    if cfg.tracking.kind == "wandb":
        facts = {"identity": {**_decided(as_dict(cfg)), **manifest["identity"]}}
        tracking.finish_training(training.run_dir, rows, facts)
    return path


def _evaluation_of(cfg: Config, head: Path) -> list[str]:
    """Return the arguments that evaluate a head on the network and the data set that it was trained on."""
    repeated = overrides_of(cfg) or [f"model={cfg.model.name}"]
    kept = [override for override in repeated if re.match(r"(model|inference)[.=]|dataset=|dataset\.root=", override)]
    return [*kept, f"model.checkpoint={as_override_value(str(head.absolute()))}"]
