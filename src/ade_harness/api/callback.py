"""A Lightning callback that evaluates on ADE20K while a network is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import nn

from ade_harness.api.arguments import option_overrides, whole_number
from ade_harness.api.predictors import network_predictor
from ade_harness.api.result import Evaluation
from ade_harness.api.state import begin, callers_hydra, callers_network, callers_process
from ade_harness.config.compose import compose_config, protocol_changes
from ade_harness.config.composed import Composed
from ade_harness.config.overrides import as_override_value
from ade_harness.config.validate import require_data
from ade_harness.errors import HarnessError
from ade_harness.evaluation.inline import Counted, Opened, conclude, count_here, open_here, share_of

_SHARDED = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")


class ADE20KEvaluation(pl.Callback):
    """Evaluates every N epochs by a named protocol, each image once on all ranks, and logs to the trainer's logger.

    ::

        trainer = pl.Trainer(callbacks=[ADE20KEvaluation(root="data/ADEChallengeData2016", protocol="mmseg_slide_512")])

    It logs ``ade20k/mIoU``, ``ade20k/pixel_accuracy`` and the other scores, fractions 0..1, so that a checkpoint
    callback can monitor them; `result` has the rest. The training goes on as if it had not been there: the network's
    modes, random numbers and torch's switches are as before.

    Args:
        root: folder or zip of ADEChallengeData2016; None takes ADE20K_ROOT.
        protocol: in ``conf/inference``; None: the image as it is, padded to what the network takes.
        every_n_epochs: how often; also after the last epoch.
        limit: only the first images: the score is then one of a part.
        network: which part of the LightningModule maps normalised images to scores: its attribute's name, or a
            function of the LightningModule; None: the LightningModule itself, by its ``forward``.
        dataset: ``ade20k``, ``demo``, or ``folder`` with its `options`.
        prefix: of the logged names.
        workers: threads of each rank that prepare images.
        options: any option of the command line by its dotted key.

    Raises:
        HarnessError: a strategy that shards the network; a mistake in the configuration; an image that fails.
    """

    def __init__(
        self, root: str | Path | None = None, protocol: str | None = None, every_n_epochs: int = 1,
        limit: int | None = None, network: str | Callable[[pl.LightningModule], nn.Module] | None = None,
        dataset: str = "ade20k", prefix: str = "ade20k/", workers: int = 2, options: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        whole_number("every_n_epochs", every_n_epochs, 1)
        whole_number("workers", workers, 0)
        if not isinstance(prefix, str):
            raise HarnessError(f"ADE20KEvaluation: prefix={prefix!r}: expected a string.")
        self.every_n_epochs, self.prefix, self.workers, self._network = every_n_epochs, prefix, workers, network
        overrides = ["model=custom", "model._target_=torch.nn.Module", f"dataset={dataset}", "tracking=none"]
        given = {"dataset.root": None if root is None else str(root), "dataset.limit": limit}
        overrides += [f"{key}={as_override_value(value)}" for key, value in given.items() if value is not None]
        overrides += [f"inference={protocol}"] if protocol is not None else []
        with callers_hydra():
            config = compose_config(overrides + option_overrides(options, memory=True))
        require_data(config)
        with callers_hydra():
            self._composed = Composed(config, None, protocol_changes(config))
        self._composed.config.model.label = "network in training"
        self.result: Evaluation | None = None
        """The result of the last evaluation, on every rank."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what cannot work, before hours of training."""
        if type(trainer.strategy).__name__ in _SHARDED:
            raise HarnessError(
                f"ADE20KEvaluation: {type(trainer.strategy).__name__} shards the network, and ranks would wait for each"
                " other within a forward, though they have different images. Use DDP, or evaluate a checkpoint."
            )
        network, cfg = self._part(pl_module), self._composed.config
        with callers_process(), callers_network(network, pl_module.device):  # one image, the same on every rank
            begin(str(cfg.inference.precision), cfg.runtime.seed)
            opened = open_here(cfg, lambda classes: network_predictor(network, cfg, classes))
            count_here(opened, [0], pl_module.device, str(cfg.runtime.kernels), 0)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate, and log the scores of this epoch."""
        last = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs  # asked to, by time or a metric
        last = last or trainer.global_step == trainer.max_steps
        if not last and (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        self.result = self._evaluate(trainer, self._part(pl_module), pl_module.device)
        scores = {self.prefix + name: value for name, value in self.result.scores.items()}
        pl_module.log_dict(scores, on_step=False, on_epoch=True, sync_dist=False, batch_size=1)

    def _part(self, module: pl.LightningModule) -> nn.Module:
        if self._network is None:
            whole: nn.Module = module
            return whole
        chosen = self._network
        found: Any = getattr(module, chosen, None) if isinstance(chosen, str) else chosen(module)
        if not isinstance(found, nn.Module):
            raise HarnessError(
                f"ADE20KEvaluation: network={self._network!r} gives a {type(found).__name__}, expected an nn.Module of"
                f" {type(module).__name__}."
            )
        network: nn.Module = found
        return network

    def _evaluate(self, trainer: pl.Trainer, network: nn.Module, device: torch.device) -> Evaluation:
        cfg = self._composed.config
        rank, world_size = trainer.global_rank, trainer.world_size
        opened: Opened | None = None
        failure = ""
        with ExitStack() as stack:
            stack.enter_context(callers_process())
            stack.enter_context(callers_network(network, device))
            counted: Counted | None = None
            try:
                begin(str(cfg.inference.precision), cfg.runtime.seed)
                opened = open_here(cfg, lambda classes: network_predictor(network, cfg, classes))
                numbers = share_of(opened.costs, rank, world_size)
                counted = count_here(opened, numbers, device, str(cfg.runtime.kernels), self.workers, rank=rank)
            except Exception as error:  # of any kind, such as short memory: the others would wait for this rank
                if world_size == 1:
                    raise
                failure = str(error) if isinstance(error, HarnessError) else f"{type(error).__name__}: {error}"
            parts: list[tuple[Counted | None, str]] = [(counted, failure)]
            if world_size > 1:
                parts = [(None, "")] * world_size
                dist.all_gather_object(parts, (counted, failure))
            wrong = next((f"rank {number}: {text}" for number, (_, text) in enumerate(parts) if text), None)
            if wrong is not None:
                raise HarnessError(wrong)
            assert opened is not None
            result, rows = conclude(self._composed, opened, [part for part, _ in parts if part is not None])
        return Evaluation.of_result(result, tuple(rows), None)
