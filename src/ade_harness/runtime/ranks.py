"""Lightning does devices and strategy; the items, their order and the sum are ours.

What is switched off and why: Lightning's sampler repeats items to make shares equal, which counts images twice;
its epoch-end hooks do not run on a rank without items, so nothing is reduced in them: the caller sums after
``trainer.test()`` has returned, where the process group is still there. Its handler of SIGTERM waits for other ranks.
"""

from __future__ import annotations

import logging
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from ade_harness.config.runtime import RuntimeConfig
from ade_harness.errors import HarnessError
from ade_harness.runtime.cluster import (
    host_name,
    is_rank,
    is_supervised,
    node_count,
    resolve_devices,
    slurm_first_address,
)
from ade_harness.runtime.coordination import Coordinator, RankLostError, StopRequestedError, is_distributed
from ade_harness.runtime.progress import ProgressReporter
from ade_harness.runtime.queue import Loaders, assign, largest_first, most_held
from ade_harness.runtime.signals import handled_signals
from ade_harness.runtime.watchdog import Watchdog

Process = Callable[[Any, torch.device, int], int]
"""Does one loaded item on a device, as a rank; returns how much progress that is."""

_NOTHING = -1
"""An item that is none: it keeps the loaders turning while the rank may not take more."""


@dataclass(frozen=True)
class Work:
    """What is to be done, by all ranks together."""

    items: Dataset[Any]
    """Maps an index to a loaded item, in loader processes."""
    costs: Sequence[float]
    """Expected, of each item."""
    names: Sequence[str]
    """Of each item, for messages."""
    stop: Callable[[], None] = lambda: None
    """Called when the work breaks off: loaders that wait for something need not wait any more."""


@dataclass
class Ranks:
    """The ranks, seen from one of them."""

    trainer: pl.Trainer
    coordinator: Coordinator
    watchdog: Watchdog
    install_signals: Callable[[], None]

    def part(self) -> None:
        """Let every rank go its own way: no word is exchanged after this."""
        if is_distributed():
            self.coordinator.meet("parted")
            self.watchdog.close()
            dist.barrier()
            dist.destroy_process_group()


class WorkItems(pl.LightningDataModule):
    """Loads this rank's items.

    Args:
        work: of all ranks.
        sharding: ``queue`` (from a shared counter, largest first) or ``plan`` (fixed shares of equal cost).
        loaders: of this rank.
        coordinator: no item is loaded after any rank has stopped.
    """

    def __init__(self, work: Work, sharding: str, loaders: Loaders, coordinator: Coordinator) -> None:
        super().__init__()
        self.work = work
        self.sharding = sharding
        self.loaders = loaders
        self.coordinator = coordinator
        self.held = 0
        """Items that this rank has taken and not finished."""

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the loader."""
        trainer = self.trainer
        assert trainer is not None
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", trainer.num_devices))
        spare = max(0, min(8, (os.cpu_count() or 1) // local_ranks - 1))
        loaders = self.loaders
        if loaders.at_once > 1:  # they mostly wait: more than there are cores are no mistake
            warnings.filterwarnings("ignore", message=r"This DataLoader will create")
        workers = min(spare if loaders.workers is None else loaders.workers, len(self.work.costs))
        return DataLoader(
            _Numbered(self.work.items),
            batch_size=None,
            sampler=_Taken(self._take(trainer.global_rank, trainer.world_size, loaders.ahead * workers)),
            num_workers=workers,
            prefetch_factor=loaders.ahead if workers else None,
            multiprocessing_context="fork" if workers else None,  # nothing of the network is sent to workers
            pin_memory=trainer.strategy.root_device.type == "cuda",
            worker_init_fn=_quiet_worker,
        )

    def on_exception(self, exception: BaseException) -> None:
        """Let loaders end; called by Lightning before it waits for them."""
        self.work.stop()

    def _take(self, rank: int, world_size: int, look_ahead: int) -> Iterator[int]:
        """Yield this rank's items as its loaders ask for them."""
        if self.sharding == "plan":
            for item in assign(self.work.costs, world_size)[rank]:
                if self.coordinator.stopped:
                    return
                self.held += 1
                yield item
            return
        order = largest_first(self.work.costs)
        while not self.coordinator.stopped and (left := len(order) - self.coordinator.taken()) > 0:
            if self.held >= most_held(left, world_size, look_ahead, self.loaders.at_once):
                yield _NOTHING
                continue
            place = self.coordinator.next_item()
            if place >= len(order):
                return
            self.held += 1
            yield order[place]


class _Taken(Sampler[int]):
    """A sampler of items that are chosen while the work goes on, so that their number is not known before."""

    def __init__(self, taken: Iterator[int]) -> None:
        self._taken = taken

    def __len__(self) -> int:
        return 1 << 40  # Lightning asks for a bound, and would load one item too early without it

    def __iter__(self) -> Iterator[int]:
        return self._taken


class _Numbered(Dataset[Any]):
    """Items with their numbers."""

    def __init__(self, items: Dataset[Any]) -> None:
        self._items = items

    def __getitem__(self, item: int) -> tuple[int, Any]:
        return item, None if item == _NOTHING else self._items[item]


def _quiet_worker(_: int) -> None:
    """Let signals reach the main process only, which ends its workers."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


class WorkLoop(pl.LightningModule):
    """Calls `process` for each item of this rank.

    Args:
        process: does one item.
        network: moved to the device by Lightning; None if there is none.
        work_items: where the items come from.
        ranks: what this rank tells the others.
        reporter: this rank's progress display, if it has one.
    """

    def __init__(
        self,
        process: Process,
        network: nn.Module | None,
        work_items: WorkItems,
        ranks: Ranks,
        reporter: ProgressReporter | None,
    ) -> None:
        super().__init__()
        self.network = network
        self._process = process
        self._work_items = work_items
        self._ranks = ranks
        self._reporter = reporter
        self.items = 0
        """Done by this rank."""

    def run(self) -> None:
        """Do this rank's share of the work.

        Raises:
            StopRequestedError: the run is to end before all is done.
            RankLostError: another rank died.
        """
        try:
            if self._work_items.work.costs:
                self._ranks.trainer.test(self, self._work_items, verbose=False)
            self._ranks.watchdog.working_on("")
            self._ranks.coordinator.raise_if_ended()
        except BaseException:
            self._close()
            raise

    def wait_for_all(self) -> None:
        """Wait until all ranks have done their share; raises as :meth:`run`."""
        try:
            self._ranks.coordinator.meet("worked", self._show)
            self._show()
            self._ranks.coordinator.raise_if_ended()
        finally:
            self._close()

    def on_test_start(self) -> None:
        """Open the progress display."""
        self._ranks.install_signals()
        if self._reporter is not None:
            self._reporter.start()

    def test_step(self, batch: tuple[int, Any], batch_idx: int) -> None:
        """Do one item."""
        item, loaded = batch
        coordinator = self._ranks.coordinator
        if loaded is None or coordinator.stopped:
            return
        begin = time.monotonic()
        self._ranks.watchdog.working_on(self._work_items.work.names[item])
        try:
            progress = self._process(loaded, self.device, self.global_rank)
        except Exception:
            coordinator.stop()  # the other ranks need not finish what cannot be scored
            raise
        self._work_items.held -= 1
        self.items += 1
        self._ranks.watchdog.finished(progress, self._work_items.work.costs[item], time.monotonic() - begin)
        coordinator.done(progress)
        self._show()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave copying to `process`."""
        return batch

    def _show(self) -> None:
        if self._reporter is not None and self._ranks.coordinator.lost is None:
            self._reporter.update(self._ranks.coordinator.done())

    def _close(self) -> None:
        if self._reporter is not None:
            self._reporter.close()


def set_arithmetic(deterministic: bool) -> dict[str, Any]:
    """Choose float32 arithmetic that is repeatable and is what official code computes; returns it for the record.

    Evaluation runs forwards only, whose kernels are deterministic on CUDA once cuDNN and cuBLAS are told to be.
    ``torch.use_deterministic_algorithms`` is left off on purpose: it replaces every bilinear ``F.interpolate`` on
    CUDA, whose backward alone is nondeterministic, by a decomposition with other bits than the kernel that official
    code calls and with 35 launches instead of one, and integer ``scatter_add_`` by a sort. Training has backwards and
    needs it: see `make_trainer`.

    Args:
        deterministic: of the ``runtime`` node.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    return {
        "use_deterministic_algorithms": False,
        "cudnn_deterministic": deterministic,
        "cudnn_benchmark": False,
        "allow_tf32": False,
        "CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


def make_trainer(cfg: RuntimeConfig, training: bool = False, **options: Any) -> pl.Trainer:
    """Return a Lightning Trainer with everything off that would change counts or write files.

    Args:
        cfg: the ``runtime`` node.
        training: whether gradients are computed: only then does ``runtime.deterministic`` set torch's global switch.
        options: more of Lightning's Trainer.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*")
    accelerator, devices = resolve_devices(cfg)
    nodes = node_count(cfg)
    torch.set_num_threads(cfg.threads)
    os.environ["OMP_NUM_THREADS"] = str(cfg.threads)  # otherwise Lightning divides the cores by the ranks
    set_arithmetic(cfg.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time, and hides nothing here
    strategy: Any = "auto"
    if devices * nodes > 1:
        strategy = DDPStrategy(timeout=timedelta(minutes=cfg.timeout_min))
    return pl.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=nodes,
        strategy=strategy,
        plugins=[_environment()],
        use_distributed_sampler=False,
        deterministic="warn" if training and cfg.deterministic else False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def _environment() -> Any:
    """Return who tells rank and addresses."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()  # torchrun, also inside a SLURM job
    if is_rank() and not is_supervised() and SLURMEnvironment.detect():
        os.environ.setdefault("MASTER_ADDR", slurm_first_address())  # Lightning needs a name that can be resolved
        # Lightning's requeue saves a training checkpoint and knows nothing of finished images: ours is the ledger.
        return SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment()


@contextmanager
def started_ranks(cfg: RuntimeConfig, **options: Any) -> Iterator[Ranks]:
    """Start this rank of a ``runtime`` node; inside, every rank runs the same code and they can talk.

    Lightning would connect them within ``trainer.test()``; doing it first lets ranks agree on the run directory and
    on what is left to do. ``trainer.test()`` then finds them connected.

    Args:
        cfg: the node.
        options: more of Lightning's Trainer.

    Raises:
        KeyboardInterrupt: Ctrl-C, also where Lightning has turned it into an exit.
        StopRequestedError: SIGTERM, or the signal before a time limit.
        RankLostError: another rank died.
    """
    trainer = make_trainer(cfg, **options)
    launcher = trainer.strategy.launcher
    if launcher is not None:
        launcher.launch(trainer.strategy.setup_environment, trainer=trainer)
    coordinator = Coordinator()
    watchdog = Watchdog(coordinator, cfg.dead_after_s)
    watchdog.start()
    try:
        with handled_signals(coordinator) as install:
            yield Ranks(trainer, coordinator, watchdog, install)
    except BaseException as error:
        _leave(coordinator, launcher, error)
        if isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and trainer.interrupted):
            if coordinator.lost is not None:
                raise RankLostError(coordinator.lost) from error
            if coordinator.ended != "interrupted":
                raise StopRequestedError(coordinator.ended) from error
            raise KeyboardInterrupt from error
        raise
    finally:
        watchdog.close()


def _leave(coordinator: Coordinator, launcher: Any, error: BaseException) -> None:
    """Tell the other ranks why this one goes: they would wait for it."""
    with suppress(RankLostError):
        _ = coordinator.stopped  # passes on what a signal asked
    if isinstance(error, Exception) and not isinstance(error, RankLostError | StopRequestedError):
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, HarnessError) else str(error)
        coordinator.lose(f"rank {coordinator.rank} on {host_name()} ended ({reason.splitlines()[0][:200]})")
    if launcher is not None:
        launcher.kill(signal.SIGTERM)
