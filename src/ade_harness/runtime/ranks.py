"""Lightning does devices, processes and the loop; what is not its own comes in through its extension points.

The sampler (``use_distributed_sampler=False``, runtime/queue.py), signals and progress (a callback), SLURM's requeue
(``SLURMEnvironment(auto_requeue=False)``: ours continues from the ledger). Lightning's epoch-end hooks do not run on a
rank without items, so nothing is reduced in them: the caller sums after ``trainer.test()`` has returned, where the
process group is still there.
"""

from __future__ import annotations

import logging
import os
import re
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

from ade_harness.config.runtime import RuntimeConfig
from ade_harness.errors import HarnessError
from ade_harness.runtime.cluster import (
    cores_per_rank,
    host_name,
    is_rank,
    is_supervised,
    local_rank,
    node_count,
    resolve_devices,
    slurm_first_address,
)
from ade_harness.runtime.coordination import Coordinator, RankLostError, StopRequestedError, is_distributed
from ade_harness.runtime.gpu_errors import is_gpu_lost, is_out_of_memory
from ade_harness.runtime.lifetime import exit_location
from ade_harness.runtime.progress_bar import ProgressReporter
from ade_harness.runtime.queue import SharedItems
from ade_harness.runtime.signals import handled_signals
from ade_harness.runtime.watchdog import Watchdog

_STORE_LINGER_S = 1.0
"""The ranks' store ends with rank 0; the others ask it several times a second why they are to end."""


@dataclass
class Ranks:
    """The ranks, seen from one of them."""

    trainer: pl.Trainer
    coordinator: Coordinator
    watchdog: Watchdog
    install_signals: Callable[..., None]

    def part(self) -> None:
        """Let every rank go its own way: nothing is exchanged after this."""
        if is_distributed():
            self.coordinator.meet("parted")
            self.watchdog.close()
            dist.barrier()
            dist.destroy_process_group()


_SHOWN_EVERY_S = 0.1


class RankCallback(pl.Callback):
    """Says what this rank does: to the watchdog, to the other ranks, and to the user.

    A callback in place of Lightning's progress bar, which knows the number of a rank's batches, and no other rank.

    Args:
        ranks: who gets the report.
        costs: expected, of each item.
        names: of each item, for messages.
        items: this rank's sampler.
        reporter: its progress display, if it has one.
    """

    def __init__(
        self, ranks: Ranks, costs: Sequence[float], names: Sequence[str], items: SharedItems,
        reporter: ProgressReporter | None,
    ) -> None:  # fmt: skip
        self._ranks, self._costs, self._names, self._items, self._reporter = ranks, costs, names, items, reporter
        self._begin = self._shown = 0.0
        self._unsent = 0

    def on_test_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Take signals back from Lightning, whose handler of SIGTERM waits for other ranks; open the display."""
        self._ranks.install_signals()
        pl_module.begin, pl_module.finish = self.begin, self.finish  # a step may take several items
        if self._reporter is not None:
            self._reporter.start()

    def begin(self, number: int) -> None:
        """Say which item is begun."""
        self._begin = time.monotonic()
        self._ranks.watchdog.working_on(self._names[number])

    def finish(self, number: int, progress: int) -> None:
        """Say that it is done, and how much that is."""
        self._items.held -= 1
        self._ranks.watchdog.finished(progress, self._costs[number], time.monotonic() - self._begin)
        self._unsent += progress
        if time.monotonic() - self._shown > _SHOWN_EVERY_S:  # what all have done is asked of the ranks' store
            self._show()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let the other ranks stop: they need not finish what cannot be scored."""
        if isinstance(exception, Exception):
            self._ranks.coordinator.stop()

    def wait_for_all(self) -> None:
        """Wait until all ranks have done their share.

        Raises:
            StopRequestedError: the run is to end before all is done.
            RankLostError: another rank died.
        """
        self._ranks.watchdog.working_on("")
        self._ranks.coordinator.raise_if_ended()
        self._show()  # what the others are to know before they meet this rank
        self._ranks.coordinator.meet("worked", self._show)
        self._show()
        self._ranks.coordinator.raise_if_ended()

    def close(self) -> None:
        """Take the display away."""
        if self._reporter is not None:
            self._reporter.close()

    def _show(self) -> None:
        self._shown = time.monotonic()
        if self._ranks.coordinator.lost is None and (self._unsent or self._reporter is not None):
            self._unsent, unsent = 0, self._unsent
            done = self._ranks.coordinator.done(unsent)
            if self._reporter is not None:
                self._reporter.update(done)


def set_arithmetic(deterministic: bool) -> dict[str, Any]:
    """Choose float32 arithmetic that is repeatable and is what official code computes; returns it for the record.

    Evaluation runs forwards only, whose kernels are deterministic on CUDA once cuDNN and cuBLAS are set to be.
    ``torch.use_deterministic_algorithms`` is left off on purpose: it replaces every bilinear ``F.interpolate`` on
    CUDA, whose backward alone is nondeterministic, by a decomposition with other bits than the kernel that official
    code calls and with 35 launches instead of one, and integer ``scatter_add_`` by a sort. Training has backwards and
    needs it: see `make_trainer`.

    Args:
        deterministic: of the ``runtime`` node.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    if torch.are_deterministic_algorithms_enabled():  # to set it imports torch's compiler
        torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    # cuDNN's attention, which torch prefers on H100 and later in half precision, is planned anew for every size: a
    # data set has hundreds
    torch.backends.cuda.enable_cudnn_sdp(False)
    return arithmetic_as_set()


def _allows_tf32() -> bool:
    """Say whether float32 may be computed as TF32, by the older switches, or the newer where a model has set those."""
    backends: Any = torch.backends
    try:
        return bool(backends.cuda.matmul.allow_tf32 or backends.cudnn.allow_tf32)
    except RuntimeError:  # torch does not read the older ones then
        return "tf32" in (backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision)


def arithmetic_as_set() -> dict[str, Any]:
    """Return torch's switches as they are."""
    return {
        "use_deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "allow_tf32": _allows_tf32(),
        "cudnn_attention": torch.backends.cuda.cudnn_sdp_enabled(),  # type: ignore[no-untyped-call]
        "CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


class GlooStrategy(DDPStrategy):
    """Lightning's DDP with a process group on the CPU, also for ranks on GPUs.

    An evaluation adds up one matrix of 181 kB. NCCL, Lightning's choice, would make communicators on each GPU for it:
    memory, start-up, and one more thing that can fail in a cluster. Training keeps NCCL. The group is made here because
    Lightning binds it to the rank's GPU, which is meant for NCCL.
    """

    def __init__(self, timeout: timedelta) -> None:
        super().__init__(timeout=timeout, process_group_backend="gloo")

    def setup_distributed(self) -> None:
        """Connect; Lightning then finds the ranks connected."""
        self.set_world_ranks()
        environment = self.cluster_environment
        assert environment is not None
        os.environ["MASTER_ADDR"] = environment.main_address
        os.environ["MASTER_PORT"] = str(environment.main_port)
        if not dist.is_initialized():  # `trainer.test` comes here again
            dist.init_process_group(
                "gloo", rank=environment.global_rank(), world_size=environment.world_size(), timeout=self._timeout
            )
        super().setup_distributed()


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
    # torch.compile starts as many compilers as there are cores, in each rank
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(cores_per_rank()))
    os.environ["OMP_NUM_THREADS"] = str(cfg.threads)  # otherwise Lightning divides the cores by the ranks
    set_arithmetic(cfg.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time, and hides nothing here
    strategy: Any = "auto"
    if devices * nodes > 1:
        timeout = timedelta(minutes=cfg.timeout_min)
        strategy = DDPStrategy(timeout=timeout) if training else GlooStrategy(timeout=timeout)
    return pl.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=nodes,
        strategy=strategy,
        plugins=[_environment()],
        use_distributed_sampler=False,
        deterministic="warn" if training and cfg.deterministic else None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def _environment() -> Any:
    """Return who assigns rank and addresses."""
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
        try:
            launcher.launch(trainer.strategy.setup_environment, trainer=trainer)
        except dist.DistError as missing:
            raise HarnessError(_connection_error(cfg, str(missing))) from missing
        except RuntimeError as failure:
            text = str(failure)
            if _OF_GLOO.search(text):
                raise HarnessError(_gloo_error(text)) from failure
            if is_out_of_memory(failure) or is_gpu_lost(failure):
                raise HarnessError(_gpu_error(text)) from failure
            raise
    coordinator = Coordinator()
    watchdog = Watchdog(coordinator, cfg.dead_after_s)
    watchdog.start()
    try:
        with handled_signals(coordinator) as install:
            yield Ranks(trainer, coordinator, watchdog, install)
    except BaseException as caught:
        error = caught
        # Lightning turns Ctrl-C into an exit, and calls a trainer interrupted after any error
        interrupted = isinstance(caught, KeyboardInterrupt) or isinstance(caught.__context__, KeyboardInterrupt)
        if isinstance(caught, SystemExit) and not interrupted:
            error = HarnessError(exit_location(caught))
        _leave(coordinator, launcher, error)
        if isinstance(error, KeyboardInterrupt | SystemExit):
            if coordinator.lost is not None:
                raise RankLostError(coordinator.lost) from error
            if coordinator.ended != "interrupted":
                raise StopRequestedError(coordinator.ended) from error
            raise KeyboardInterrupt from error
        if error is not caught:
            raise error from caught
        raise
    finally:
        watchdog.close()


def _gpu_error(reason: str) -> str:
    """Say which GPU cannot be used, before anything is on it, and what to do."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    among = "" if visible is None else f" of CUDA_VISIBLE_DEVICES={visible}"
    return (
        f"rank {os.environ.get('RANK', '0')} on {host_name()}: GPU {local_rank()}{among} cannot be used"
        f" ({reason.splitlines()[0]}). Most often another program fills it, or has it to itself: `nvidia-smi` names"
        " that program. CUDA_VISIBLE_DEVICES chooses other GPUs."
    )


def _gloo_error(reason: str) -> str:
    """Say why ranks that have met cannot connect, and what to set."""
    return (
        f"rank {os.environ.get('RANK', '0')} on {host_name()}: the ranks met, and cannot reach each other"
        f" ({' '.join(reason.split())[:200]}). Each offers the address that its own host name means, which may be"
        " 127.0.1.1 (/etc/hosts) or of a network that the others do not have: set GLOO_SOCKET_IFNAME to the interface"
        " that they share (`ip -br addr` lists them)."
    )


_OF_GLOO = re.compile(r"gloo|connectFullMesh|Unable to find address", re.IGNORECASE)


def _connection_error(cfg: RuntimeConfig, reason: str) -> str:
    """Say why ranks did not find each other, and what to look at: the commonest failure of several nodes."""
    rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "?")
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    why = " ".join(reason.split())[:200]
    if "EADDRINUSE" in reason or "already in use" in reason:
        return f"rank {rank} on {host_name()}: the port of {place} is taken ({why}). Set another MASTER_PORT for all."
    if rank == "0":
        return (
            f"not all of the {world_size} ranks came to {place} within runtime.timeout_min={cfg.timeout_min:g} minutes"
            f" ({why}). Is the same command running on every node, with the same MASTER_ADDR and MASTER_PORT, and may"
            f" they reach {host_name()} on this port? Does every node start as many ranks (runtime.devices; auto: its"
            " GPUs)?"
        )
    return (
        f"rank {rank} on {host_name()} cannot reach rank 0 at {place} within runtime.timeout_min={cfg.timeout_min:g}"
        f" minutes ({why}). Does node 0 run the same command, is MASTER_ADDR its address, and may this node reach the"
        " port?"
    )


def _leave(coordinator: Coordinator, launcher: Any, error: BaseException) -> None:
    """Tell the other ranks why this one goes: they would wait for it."""
    with suppress(RankLostError):
        _ = coordinator.stopped  # passes on what a signal asked
    if isinstance(error, Exception) and not isinstance(error, RankLostError | StopRequestedError):
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, HarnessError) else str(error)
        coordinator.lose(f"rank {coordinator.rank} on {host_name()} ended ({reason.splitlines()[0][:200]})")
    if launcher is not None:
        launcher.kill(signal.SIGTERM)
    if coordinator.rank == 0 and coordinator.world_size > 1:
        time.sleep(_STORE_LINGER_S)
