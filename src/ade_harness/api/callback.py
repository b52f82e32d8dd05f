"""A Lightning callback that evaluates on ADE20K while a network is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import nn

from ade_harness.api.arguments import option_overrides, plain, plain_name, refuse_twice, spelt_for_python, whole_number
from ade_harness.api.predictors import network_predictor
from ade_harness.api.result import LOGGED, Evaluation
from ade_harness.api.state import begin, callers_hydra, callers_network, callers_process
from ade_harness.config.compose import compose_config, protocol_changes
from ade_harness.config.composed import Composed
from ade_harness.config.overrides import as_override_value
from ade_harness.config.validate import require_data
from ade_harness.errors import HarnessError, did_you_mean, text_of
from ade_harness.evaluation.inline import Counted, Opened, conclude, count_here, open_here, share_of

_PREFIX = "ade20k/"
_SHARDED = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")


def _is(callback: object, name: str) -> bool:
    """Whether a callback is one of Lightning's, by its name: of `lightning.pytorch`, or of `pytorch_lightning`."""
    packages = ("lightning.pytorch.", "pytorch_lightning.")
    return any(c.__name__ == name and c.__module__.startswith(packages) for c in type(callback).__mro__)


@contextmanager
def _averaged_weights(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    """Have the averaged weights in the network, as for a validation, where Lightning keeps some: it saves those."""
    averages: list[Any] = [c for c in getattr(trainer, "callbacks", ()) if _is(c, "WeightAveraging")]
    for average in averages:
        average.on_validation_epoch_start(trainer, module)
    try:
        yield
    finally:
        for average in averages:
            average.on_validation_epoch_end(trainer, module)


@contextmanager
def _buffers_of_rank_zero(network: nn.Module, world_size: int) -> Iterator[None]:
    """Have rank 0's buffers on every rank: DDP gives them to the others only when the next forward begins."""
    if world_size == 1:
        yield
        return
    own = [(buffer, buffer.clone()) for buffer in network.buffers()]
    with torch.no_grad():
        for buffer, _ in own:
            dist.broadcast(buffer, 0)
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in own:
                buffer.copy_(before)


class ADE20KEvaluation(pl.Callback):
    """Evaluates every N epochs by a named protocol, each image once on all ranks, and logs to the trainer's logger.

    ::

        trainer = pl.Trainer(callbacks=[ADE20KEvaluation(root="data/ADEChallengeData2016", protocol="mmseg_slide_512")])

    It logs ``ade20k/mIoU``, ``ade20k/pixel_accuracy`` and the other scores, fractions 0..1, so that a checkpoint
    callback can monitor them; `result` has the rest. The training goes on as if it had not been there: the network's
    modes, random numbers and torch's switches are as before.

    What is evaluated is what rank 0 would save: its buffers (a BatchNorm without ``sync_batchnorm`` has others on each
    rank), and the average where Lightning's ``WeightAveraging`` keeps one. It computes by ``inference.precision``
    (float32), whatever the trainer's precision is. With ``fast_dev_run`` it predicts one image, and logs nothing.

    Args:
        root: folder or zip of ADEChallengeData2016; None takes ADE20K_ROOT.
        protocol: in ``conf/inference``; None: the image as it is, or fitted into the only size that the network
            takes. One that needs sides of multiples of 32: ``options={"inference.resize.pad_multiple": 32}``.
        every_n_epochs: how often; also after the last epoch.
        limit: only the first images: the score is then one of a part.
        network: which part of the LightningModule maps normalised images to scores: its attribute's name, or a
            function of the LightningModule; None: the LightningModule itself, by its ``forward``.
        dataset: ``ade20k``, ``demo``, or ``folder`` with its `options`.
        prefix: of the logged names.
        workers: threads of each rank that prepare images.
        options: any option of the command line by its dotted key.

    Raises:
        HarnessError: a strategy that shards the network; a mistake in the configuration; an image that fails; a
            callback that monitors a score at times when there is none.
    """

    @spelt_for_python()
    def __init__(
        self, root: str | Path | None = None, protocol: str | None = None, every_n_epochs: int = 1,
        limit: int | None = None, network: str | Callable[[pl.LightningModule], nn.Module] | None = None,
        dataset: str = "ade20k", prefix: str = _PREFIX, workers: int = 2, options: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        whole_number("every_n_epochs", every_n_epochs, 1)
        whole_number("workers", workers, 0)
        if not isinstance(prefix, str):
            raise HarnessError(f"ADE20KEvaluation: prefix={prefix!r}: expected a string.")
        self.every_n_epochs, self.prefix, self.workers, self._network = every_n_epochs, prefix, workers, network
        overrides = ["model=custom", "model._target_=torch.nn.Module", f"dataset={dataset}", "tracking=none"]
        if limit is not None:
            whole_number("limit", limit, 1)
        if not (network is None or isinstance(network, str) or callable(network)):
            raise HarnessError(f"ADE20KEvaluation: network={network!r}: expected a name, a function or None.")
        refuse_twice({"dataset.limit": limit, "dataset.root": root, "inference": protocol}, options)
        for key, name in (("dataset", dataset), ("protocol", protocol)):
            plain_name(key, name)
        given = {"dataset.root": None if root is None else str(root), "dataset.limit": plain(limit)}
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
        self._evaluated: int | None = None
        """How many epochs were done when it was made."""

    @spelt_for_python()
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what cannot work, before hours of training."""
        callbacks: list[Any] = getattr(trainer, "callbacks", [])
        same = [c for c in callbacks if isinstance(c, ADE20KEvaluation) and c.prefix == self.prefix]
        if len(same) > 1:
            raise HarnessError(
                f"ADE20KEvaluation: {len(same)} of the trainer's callbacks log as {self.prefix!r}, and would overwrite"
                " each other's scores. Give each a prefix of its own."
            )
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

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse callbacks that would look for a score when there is none, or an older one, before the first epoch."""
        for scheduler in getattr(trainer, "lr_scheduler_configs", ()):
            watched = scheduler.monitor
            every = scheduler.frequency if scheduler.interval == "epoch" else 1
            mine = self._logs(watched)
            self._require_score("the learning rate's scheduler", watched, trainer)
            if mine and (scheduler.interval != "epoch" or every % self.every_n_epochs):
                raise HarnessError(
                    f"the learning rate's scheduler (monitor={watched!r}) would look when there is no new score. Give"
                    f" it interval='epoch' and frequency={self.every_n_epochs}, as ADE20KEvaluation's every_n_epochs."
                )
        for monitor in getattr(trainer, "callbacks", ()):
            watched = getattr(monitor, "monitor", None)
            self._require_score(type(monitor).__name__, watched, trainer)
            if self._logs(watched):
                remedy = self._missed(monitor, trainer)
                if remedy is not None:
                    raise HarnessError(
                        f"{type(monitor).__name__}(monitor={watched!r}): would look when there is no new score."
                        f" {remedy}"
                    )

    def _logs(self, watched: Any) -> bool:
        return isinstance(watched, str) and watched.startswith(self.prefix) and watched[len(self.prefix) :] in LOGGED

    def _require_score(self, who: str, watched: Any, trainer: pl.Trainer) -> None:
        """Refuse a callback or scheduler that waits for a score of ours whose name is misspelt.

        Names below our prefix that are near none of ours may be the training's own, or another evaluation's.
        """
        if not isinstance(watched, str) or not self.prefix or not watched.startswith(self.prefix):
            return
        name = watched.removeprefix(self.prefix)
        others = [c for c in getattr(trainer, "callbacks", ()) if isinstance(c, ADE20KEvaluation) and c is not self]
        if any(watched.removeprefix(other.prefix) in LOGGED for other in others):
            return
        near = did_you_mean(name, LOGGED)
        if name not in LOGGED and (near or self.prefix == _PREFIX):
            raise HarnessError(
                f"{who}(monitor={watched!r}): no such score.{near} ADE20KEvaluation logs"
                f" {', '.join(self.prefix + known for known in LOGGED)}."
            )

    def _missed(self, monitor: Any, trainer: pl.Trainer) -> str | None:
        """Return what to do about a callback whose looks are not after our evaluations; None if all are."""
        often = self.every_n_epochs
        if _is(monitor, "ModelCheckpoint"):
            # Lightning decides these by more than its arguments, and offers no public way to ask
            if not monitor._should_save_on_train_epoch_end(trainer):
                return "Give it save_on_train_epoch_end=True: the evaluation is at the end of the training's epoch."
            if monitor._every_n_epochs < 1 or monitor._every_n_epochs % often:
                return f"Give it every_n_epochs={often}, as ADE20KEvaluation has, in place of steps or a time."
        if _is(monitor, "EarlyStopping"):
            callbacks: list[Any] = trainer.callbacks
            if callbacks.index(monitor) < callbacks.index(self):
                return "Put it behind ADE20KEvaluation in the list of callbacks."
            if not monitor._check_on_train_epoch_end:
                return "Give it check_on_train_epoch_end=True: the evaluation is at the end of the training's epoch."
            if often > 1 and monitor.strict:
                return "Give it strict=False, with which it waits for a score, or ADE20KEvaluation every_n_epochs=1."
        return None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate, and log the scores of this epoch."""
        if trainer.fast_dev_run:
            return
        last = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs  # asked to, by time or a metric
        last = last or trainer.global_step == trainer.max_steps
        if not last and (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        scores = self._scores(trainer, pl_module)
        self._evaluated = trainer.current_epoch + 1
        # equal on all ranks: Lightning warns of each where it may not compare them, and a mean could round
        pl_module.log_dict(scores, on_step=False, on_epoch=True, sync_dist=True, reduce_fx="max", batch_size=1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate once more if a callback after this one has ended the training: its last epoch has a score too."""
        if trainer.fast_dev_run or trainer.current_epoch in (0, self._evaluated):
            return
        scores = self._scores(trainer, pl_module)
        for logger in trainer.loggers:  # `log_dict` is for epochs that are under way
            logger.log_metrics(scores, step=trainer.global_step)

    @spelt_for_python()
    def _scores(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, float]:
        """Evaluate what would be saved now; return the scores by the names that are logged."""
        network = self._part(module)
        with _averaged_weights(trainer, module), _buffers_of_rank_zero(network, trainer.world_size):
            self.result = self._evaluate(trainer, network, module.device)
        return {self.prefix + name: value for name, value in self.result.scores.items()}

    def _part(self, module: pl.LightningModule) -> nn.Module:
        if self._network is None:
            whole: nn.Module = module
            return whole
        chosen = self._network
        try:
            found: Any = attrgetter(chosen)(module) if isinstance(chosen, str) else chosen(module)
        except Exception as error:  # the function is the caller's
            raise HarnessError(
                f"ADE20KEvaluation: network={self._network!r} failed on a {type(module).__name__}"
                f" ({type(error).__name__}: {text_of(error)}); expected one of its nn.Modules."
            ) from error
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
                failure = str(error) if isinstance(error, HarnessError) else f"{type(error).__name__}: {text_of(error)}"
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
