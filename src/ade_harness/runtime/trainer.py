"""Lightning does launch, devices and strategy; the items, their order and the sum are ours.

What is switched off and why: Lightning's sampler repeats items to make shares equal, which counts images twice;
its epoch-end hooks do not run on a rank without items, so nothing is reduced in them: the caller sums after
``trainer.test()`` has returned, where the process group is still there.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from ade_harness.errors import HarnessError
from ade_harness.runtime.coordination import Coordinator
from ade_harness.runtime.plan import assign
from ade_harness.runtime.progress import ProgressReporter

Process = Callable[[Any, torch.device, int], int]
"""Does one loaded item on a device, as a rank; returns how much progress that is."""


class WorkItems(pl.LightningDataModule):
    """Loads each rank's share of the items.

    Args:
        items: maps an index to a loaded item, in worker processes.
        costs: expected cost of each item.
        workers: loader processes per rank; None takes the cores that the ranks leave, at most 8 each.
        coordinator: no item is loaded after any rank has stopped.
    """

    def __init__(
        self, items: Dataset[Any], costs: Sequence[float], workers: int | None, coordinator: Coordinator
    ) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # more ranks than items
        self.items = items
        self.costs = costs
        self.workers = workers
        self.coordinator = coordinator

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the loader of this rank's share, largest item first."""
        trainer = self.trainer
        assert trainer is not None
        share = assign(self.costs, trainer.world_size)[trainer.global_rank]
        spare = max(0, min(8, (os.cpu_count() or 1) // trainer.num_devices - 1))
        workers = min(spare if self.workers is None else self.workers, len(share))
        return DataLoader(
            self.items,
            batch_size=None,
            sampler=_UntilStopped(share, self.coordinator),
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            multiprocessing_context="fork" if workers else None,  # nothing of the network is sent to workers
            pin_memory=trainer.strategy.root_device.type == "cuda",
            worker_init_fn=_quiet_worker,
        )


class _UntilStopped(Sampler[int]):
    """The items of a rank in their order, cut off when a rank has stopped."""

    def __init__(self, share: Sequence[int], coordinator: Coordinator) -> None:
        self._share = share
        self._coordinator = coordinator

    def __len__(self) -> int:
        return len(self._share)

    def __iter__(self) -> Iterator[int]:
        for item in self._share:
            if self._coordinator.stopped:
                return
            yield item


def _quiet_worker(_: int) -> None:
    """Let Ctrl-C reach the main process only, which ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


class WorkLoop(pl.LightningModule):
    """Calls `process` for each item of this rank.

    Args:
        process: does one item.
        network: moved to the device by Lightning; None if there is none.
        coordinator: counts, and stops early.
        reporter: this rank's progress display, if it has one.
    """

    def __init__(
        self,
        process: Process,
        network: nn.Module | None,
        coordinator: Coordinator,
        reporter: ProgressReporter | None,
    ) -> None:
        super().__init__()
        self.network = network
        self._process = process
        self._coordinator = coordinator
        self._reporter = reporter

    def on_test_start(self) -> None:
        """Open the progress display."""
        if self._reporter is not None:
            self._reporter.start()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Do one item."""
        if self._coordinator.stopped:
            return
        try:
            progress = self._process(batch, self.device, self.global_rank)
        except BaseException:
            self._coordinator.stop()  # the other ranks need not finish what cannot be scored
            raise
        done = self._coordinator.done(progress)
        if self._reporter is not None:
            self._reporter.update(done)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave copying to `process`."""
        return batch

    def close(self, total: int) -> None:
        """Keep the display going until all ranks are done or one has stopped, then take it away."""
        if self._reporter is None:
            return
        interrupted = sys.exc_info()[0] is not None
        while not interrupted and not self._coordinator.stopped and (done := self._coordinator.done()) < total:
            self._reporter.update(done)
            time.sleep(0.2)
        if not interrupted and total:
            self._reporter.update(self._coordinator.done())
        self._reporter.close()


def is_main_process() -> bool:
    """Whether this process is rank 0, also before the process group exists."""
    from lightning.fabric.utilities.rank_zero import _get_rank

    return (_get_rank() or 0) == 0


def resolve_device_count(cfg: DictConfig) -> tuple[str, int]:
    """Return (accelerator, ranks per node) of a ``runtime`` node.

    Raises:
        HarnessError: more GPUs asked for than there are.
    """
    gpus = torch.cuda.device_count()
    accelerator = cfg.accelerator if cfg.accelerator != "auto" else ("cuda" if gpus else "cpu")
    if accelerator == "cuda" and not gpus:
        raise HarnessError("runtime.accelerator=cuda: torch sees no GPU. `python -m ade_harness doctor` says why.")
    if cfg.devices == "auto":
        return accelerator, gpus if accelerator == "cuda" else 1
    if accelerator == "cuda" and cfg.devices > gpus:
        raise HarnessError(f"runtime.devices={cfg.devices}: this machine has {gpus} GPUs.")
    return accelerator, int(cfg.devices)


def make_trainer(cfg: DictConfig) -> pl.Trainer:
    """Return a Lightning Trainer with everything off that would change counts or write files."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*")
    accelerator, devices = resolve_device_count(cfg)
    torch.set_num_threads(cfg.threads)
    os.environ["OMP_NUM_THREADS"] = str(cfg.threads)  # otherwise Lightning divides the cores by the ranks
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time, and hides nothing here
    ranks = devices * cfg.num_nodes
    strategy: Any = "auto" if ranks == 1 else DDPStrategy(timeout=timedelta(minutes=cfg.timeout_min))
    # Lightning's requeue saves a training checkpoint and knows nothing of finished images: ours is the ledger.
    on_slurm = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()  # torchrun may run inside a job
    plugins = [SLURMEnvironment(auto_requeue=False)] if on_slurm else None
    return pl.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=cfg.num_nodes,
        strategy=strategy,
        plugins=plugins,
        use_distributed_sampler=False,
        deterministic="warn" if cfg.deterministic else False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@contextmanager
def started_ranks(cfg: DictConfig) -> Iterator[pl.Trainer]:
    """Start all ranks of a ``runtime`` node; inside, every rank runs the same code and they can talk.

    Lightning would start them within ``trainer.test()``; doing it first lets ranks agree on the run directory and
    on what is left to do. ``trainer.test()`` then finds them running.

    Raises:
        KeyboardInterrupt: also where Lightning has turned it into an exit.
    """
    trainer = make_trainer(cfg)
    launcher = trainer.strategy.launcher
    if launcher is not None:
        launcher.launch(trainer.strategy.setup_environment, trainer=trainer)
    try:
        yield trainer
    except BaseException as error:
        if launcher is not None:
            launcher.kill(signal.SIGTERM)
        if isinstance(error, SystemExit) and trainer.interrupted:
            raise KeyboardInterrupt from error  # Lightning turns Ctrl-C into exit(1)
        raise
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
