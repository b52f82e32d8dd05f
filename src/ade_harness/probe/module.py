"""Training a linear head as a LightningModule: its state resumes bit for bit."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from ade_harness.config.probe import ProbeConfig
from ade_harness.config.schema import Config
from ade_harness.data.labels import IGNORE_INDEX
from ade_harness.errors import HarnessError, require
from ade_harness.files.atomic import discard, replaced, write_json, write_text
from ade_harness.files.reading import require_regular
from ade_harness.inference.forward import arithmetic_of
from ade_harness.models.heads.linear import LinearHead, LinearSegmenter
from ade_harness.models.loaded import LoadedModel
from ade_harness.probe.schedule import learning_rate
from ade_harness.runs.directory import LOSS, PROGRESS, SAVED
from ade_harness.runtime.coordination import gather
from ade_harness.runtime.progress_bar import ProgressReporter
from ade_harness.runtime.ranks import Ranks
from ade_harness.runtime.uninterrupted import uninterrupted

STATE = "state.pt"
_REPORT_EVERY_S = 2.0


class HeadTraining(pl.LightningModule):
    """Trains the head alone: the backbone is no submodule, so it is neither trained, synchronised nor saved.

    Its state is a file of its own, not a checkpoint of Lightning's, which would hold the loop's counters and loggers'
    too, and is not written at a signal between two steps. The learning rate and the random numbers of dropout follow
    from the step's number, so a scheduler's state need not be saved.
    """

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
        self._begun = self._reported = time.monotonic()
        before = (self._saved or {}).get("losses", [])  # states of earlier versions have none
        mine = before[ranks.coordinator.rank] if ranks.coordinator.rank < len(before) else []
        self._losses = [torch.tensor(loss) for loss in mine]
        is_first = ranks.coordinator.rank == 0
        self._reporter = (
            ProgressReporter(console, recipe.iterations, self.first_step, unit="iterations", title="training")
            if is_first
            else None
        )
        if self.first_step and is_first:
            console.print(f"continuing after {self.first_step:,} of {recipe.iterations:,} iterations")

    def _load(self) -> dict[str, Any] | None:
        """Load the head of an earlier part, if there is one, and return its state."""
        path = self.run_dir / STATE
        if not path.exists():
            return None
        require_regular(path, str(path))
        try:
            saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            self.head.load_state_dict(saved["head"])
            _check_state(saved, [*self.head.parameters()])
        except Exception as error:  # the file may be any that torch has written, and hold anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise HarnessError(f"{path}: is damaged ({reason}). Delete it to start again.") from error
        if saved["step"] > self.recipe.iterations:
            raise HarnessError(
                f"{path}: has {saved['step']:,} iterations already, and probe.iterations={self.recipe.iterations}. Take"
                " at least as many, or another run.dir."
            )
        moments = saved["optimizer"]["state"].values()
        if not all(bool(tensor.isfinite().all()) for state in moments for tensor in state.values()):
            raise HarnessError(
                f"{path}: the training has diverged: its gradients were not finite. Begin anew in another run.dir with"
                " a smaller probe.lr."
            )
        return saved

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW as it was left; its options are the recipe's."""
        optimizer = torch.optim.AdamW(
            self.head.parameters(),
            lr=self.recipe.lr,
            betas=(self.recipe.betas[0], self.recipe.betas[1]),
            weight_decay=self.recipe.weight_decay,
        )
        if self._saved is not None:
            optimizer.load_state_dict({**optimizer.state_dict(), "state": self._saved["optimizer"]["state"]})
        return optimizer

    def on_fit_start(self) -> None:
        """Bring the backbone to the device."""
        self._frozen[0].backbone.to(self.device).eval()
        self._losses = [loss.to(self.device) for loss in self._losses]
        self._begun = time.monotonic()
        if self._reporter is not None:
            self._reporter.start()

    def on_train_start(self) -> None:
        """Take signals back from Lightning, and let the iteration end before: all since the last save would be lost."""
        self.ranks.install_signals(between_steps=True)

    def on_train_end(self) -> None:
        """From now on a signal ends at once again: there is no step to wait for."""
        self.ranks.install_signals()

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
            self._report()
        if self.step % self.recipe.save_every == 0 or stop or done:
            self._save()
        if stop and not done:
            self.stopped = True
            self.trainer.should_stop = True

    def _report(self) -> None:
        """Write progress.json for `status` in other shells, every few seconds; an iteration counts as an image."""
        now = time.monotonic()
        if now - self._reported < _REPORT_EVERY_S:
            return
        self._reported = now
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
        losses = gather([float(loss) for loss in self._losses])  # of each rank, since the last row of the log
        if self.global_rank != 0:
            return
        optimizer: Any = self.optimizers()
        content = {
            "head": self.head.state_dict(), "optimizer": optimizer.optimizer.state_dict(), "step": self.step,
            "losses": losses,
        }  # fmt: skip
        with uninterrupted():
            with replaced(self.run_dir / STATE) as temporary, temporary.open("wb") as file:
                torch.save(content, file)
            write_json(self.run_dir / SAVED, {"step": self.step})  # for `status`, which does without torch

    def close(self) -> None:
        """Take the progress display away."""
        if self._reporter is not None:
            self._reporter.close()
            discard(self.run_dir / PROGRESS)


def _check_state(saved: dict[str, Any], parameters: Sequence[Tensor]) -> None:
    """Refuse a state of which a training could not go on.

    Args:
        saved: the content of the file; its head has been loaded.
        parameters: of the head.
    """
    step, losses, moments = saved["step"], saved.get("losses", []), saved["optimizer"]["state"]
    require(type(step) is int and step >= 0, "step: expected an integer, 0 or more")
    rows = isinstance(losses, list) and all(isinstance(row, list) for row in losses)
    require(
        rows and all(isinstance(loss, float) for row in losses for loss in row), "losses: expected lists of numbers"
    )
    require(moments.keys() == set(range(len(parameters))), "optimizer: expected a state of each parameter")
    for parameter, state in zip(parameters, (moments[n] for n in range(len(parameters))), strict=True):
        for name, shape in (("step", ()), ("exp_avg", parameter.shape), ("exp_avg_sq", parameter.shape)):
            fits = state[name].shape == shape and state[name].dtype == torch.float32
            require(fits, f"optimizer.{name}: expected float32 {list(shape)}")
