"""The ``runtime`` group: where an evaluation runs, and what SLURM is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from ade_harness.config.fields import MAX_SEED, bounded, place


class Accelerator(StrEnum):
    """What ranks compute on; ``auto``: GPUs if there are any."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Sharding(StrEnum):
    """How images are shared among ranks."""

    queue = "queue"  # from a shared counter, largest first
    static = "static"  # fixed shares of equal cost
    plan = "static"  # its name in configurations of older runs


class KernelChoice(StrEnum):
    """Implementation of upsampling, argmax and counting."""

    auto = "auto"
    torch = "torch"
    numba = "numba"  # CPU
    triton = "triton"  # CUDA


@dataclass
class SlurmConfig:
    """What ``-m hydra/launcher=slurm`` asks SLURM for; null leaves a choice to the cluster."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time_min: int = bounded(240, at_least=1, at_most=525_600)
    nodes: int = bounded(1, at_least=1, at_most=10_000)
    gpus_per_node: int | None = bounded(None, at_least=1, at_most=64)  # null: none asked for
    cpus_per_node: int | None = bounded(None, at_least=1, at_most=10_000)
    mem_gb: int | None = bounded(None, at_least=1, at_most=1_000_000)  # of each node
    constraint: str | None = None
    container: str | None = place()  # image for srun's --container-image (pyxis)
    container_mounts: str | None = place()  # such as /data:/data
    python: str | None = place()  # in the container; null: the one that submits
    setup: list[str] = field(default_factory=list)  # shell lines before the run, such as "module load cuda"
    extra: dict[str, Any] = field(default_factory=dict)  # any other sbatch option, as sbatch calls it
    # before the time limit: the run saves, is requeued and continues
    signal_before_s: int = bounded(120, at_least=1, at_most=86_400)
    most_requeues: int = bounded(20, at_least=0, at_most=10_000)
    folder: str = place("slurm-jobs")  # submitit's scripts and logs


@dataclass
class RuntimeConfig:
    """Ranks, devices and kernels."""

    accelerator: Accelerator = Accelerator.auto
    # Any: a number or "auto"; OmegaConf 2.3 cannot merge a Union in a nested node (check_ranges checks both)
    # of each node; auto: all GPUs, or one CPU rank
    devices: Any = bounded("auto", at_least=1, at_most=4096, also="auto", unit="ranks", whole=True)
    # auto: as many as srun started this on, else one
    num_nodes: Any = bounded("auto", at_least=1, at_most=10_000, also="auto", unit="nodes", whole=True)
    sharding: Sharding = Sharding.queue
    max_restarts: int = bounded(0, at_least=0, at_most=1000)  # how often all ranks are started again after one died
    # a rank that is silent for so long is lost
    dead_after_s: float = bounded(30.0, at_least=5, at_most=86_400, unit="seconds")
    requeue: bool = False  # in SLURM, after the signal before the time limit: scontrol requeue
    supervise: bool = True  # false: one rank, in this very process (debuggers, profilers)
    # of each rank on CPU; fixed, because it can change float results
    threads: int = bounded(1, at_least=1, at_most=1024)
    workers: int | None = bounded(None, at_least=0, at_most=256)  # loader processes per rank; null chooses
    # for ranks to find each other; nothing else has a time limit
    timeout_min: float = bounded(10.0, at_least=0.1, at_most=1440)
    seed: int = bounded(0, at_least=0, at_most=MAX_SEED)
    deterministic: bool = True
    kernels: KernelChoice = KernelChoice.auto
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
