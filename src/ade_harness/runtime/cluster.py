"""Where this process runs: as one of the ranks, or as what starts them; on a laptop, under torchrun, or in SLURM.

Nothing here needs torch, so that the process that only starts ranks stays small and quick.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ade_harness.config.runtime import Accelerator, RuntimeConfig
from ade_harness.errors import HarnessError, require
from ade_harness.runtime.limits import usable_cores, usable_memory

HANDOVER = "ADE_HARNESS_HANDOVER"
"""Environment variable: of a supervised rank, the file that says what to do; it may not be there yet."""
SUPERVISOR = "ADE_HARNESS_SUPERVISOR"
"""Environment variable: the process id of the supervisor."""
SUPERVISED = "ADE_HARNESS_NOTE"
"""Set for ranks that our supervisor has started: the file of their note."""

_FIRST_PORT, _PORTS = 20000, 10000


def host_name() -> str:
    """Return how this machine is called: SLURM's name of the node, if there is one."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def is_supervised() -> bool:
    """Whether this process is a rank that our supervisor has started."""
    return SUPERVISED in os.environ


def in_slurm_step() -> bool:
    """Whether srun has started this process (the batch script itself is not in a step)."""
    return "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_STEP_NUM_TASKS", "").isdigit()


def is_rank() -> bool:
    """Whether somebody else has started one process per rank, and this is one of them."""
    if is_supervised() or "TORCHELASTIC_RUN_ID" in os.environ:
        return True
    if in_slurm_step():
        return int(os.environ["SLURM_STEP_NUM_TASKS"]) > int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
    return "LOCAL_RANK" in os.environ  # mpirun's and others' wrappers


def local_rank() -> int:
    """Return which rank of its node this process is: 0 is the first, which does once what its node needs once."""
    if "LOCAL_RANK" in os.environ:
        return int(os.environ["LOCAL_RANK"])
    if in_slurm_step() and is_rank():
        return int(os.environ.get("SLURM_LOCALID", "0"))
    return 0


_NUMBERS = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "MASTER_PORT")


def check_variables() -> None:
    """Refuse variables of launchers that are no numbers: libraries read them too, the first while it is imported.

    Those that say nothing (empty, or -1) are taken out of the environment. Of a process that no launcher has started
    none is looked at: Kubernetes has a MASTER_PORT=tcp://... of any service that is called so.

    Raises:
        HarnessError: names the variable.
    """
    for name in _NUMBERS:
        if os.environ.get(name, "").strip() in ("", "-1"):
            os.environ.pop(name, None)
    for name in _NUMBERS if is_rank() else ():
        value = os.environ.get(name)
        most = 65535 if name == "MASTER_PORT" else 1_000_000
        fits = value is None or (value.isascii() and value.isdigit() and len(value) < 8 and int(value) <= most)
        require(
            fits,
            f"{name}={value}: this environment variable is expected to be a whole number from 0 to {most:,}. Launchers"
            " set it; unset it where none is used.",
        )


def is_reporting_process() -> bool:
    """Whether this process speaks for the whole run: rank 0, where no supervisor does."""
    return not is_supervised() and os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def node_count(cfg: RuntimeConfig) -> int:
    """Return the number of nodes of a ``runtime`` node: ``auto`` is what SLURM gave this step, or one."""
    if cfg.num_nodes != "auto":
        return int(cfg.num_nodes)
    return int(os.environ.get("SLURM_STEP_NUM_NODES", "1")) if in_slurm_step() else 1


def _has_gpu_files() -> bool:
    others = (Path("/dev/dxg"), Path("/dev/kfd"))  # of WSL, and of AMD's ROCm, whose GPUs torch calls cuda too
    return any(Path("/dev").glob("nvidia[0-9]*")) or any(p.exists() for p in others)


def gpu_count() -> int:
    """Return how many GPUs there are for ranks.

    The driver is asked where torch is not imported yet, which takes a supervisor seconds before its ranks can begin;
    whether this torch can use them each rank finds out. Torch says it, and why not, where the driver has none.
    """
    if not _has_gpu_files():
        return 0
    return ("torch" not in sys.modules and _driver_gpus()) or usable_gpus()


def _driver_gpus() -> int:
    """Return how many GPUs the CUDA driver gives this process (by CUDA_VISIBLE_DEVICES); 0 if it gives none."""
    number = ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(number))
    return 0 if failed else number.value


def usable_gpus() -> int:
    """Return how many GPUs CUDA can use here.

    ``torch.cuda.device_count`` asks the driver's own library before CUDA has started, which also counts GPUs whose
    driver is too old for this torch, and those behind parts (MIG) of which a process sees one.
    """
    import torch

    return int(torch._C._cuda_getDeviceCount()) if torch.cuda.is_available() else 0


def unusable_gpus() -> str | None:
    """Say why GPUs that are there cannot be used; None if they can, or there are none."""
    import torch

    if torch.cuda.is_available():
        return None
    without = torch.version.cuda is None and torch.version.hip is None  # its own count is 0 whatever is there
    seen = _driver_gpus() if without else torch.cuda.device_count()
    if not seen:
        return None
    if without:
        return f"{seen} GPUs are here, and this torch is built without CUDA: install its CUDA build"
    return (
        f"{seen} GPUs are here that torch, built for CUDA {torch.version.cuda}, cannot use: most often their driver is"
        " too old for it. Update the driver, or install a torch for an older CUDA"
    )


def gpu_of_another_kind() -> str | None:
    """Say that a GPU of AMD's is here and torch no build of ROCm's; None if not.

    It is no error where the CPU was not ruled out: each processor of theirs with graphics has the same file.
    """
    import torch

    if torch.version.hip is not None or torch.cuda.is_available() or not Path("/dev/kfd").exists():
        return None
    built = "without GPUs" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
    return f"a GPU of AMD's is here (/dev/kfd), and this torch is built {built}: its ROCm build would use it"


_LOADER_BYTES = 16 << 20
"""Least memory of a loader process of its own, before it has images (measured: 11 MiB)."""
_RANK_BYTES = 2**29
"""Memory of a process that has imported torch and Lightning, and little else."""


def resolve_devices(cfg: RuntimeConfig) -> tuple[str, int]:
    """Return (accelerator, ranks per node) of a ``runtime`` node.

    Raises:
        HarnessError: more GPUs, ranks or loader processes asked for than this machine has or can bear.
    """
    accelerator, ranks = _devices(cfg)
    free = max(0, usable_memory() // max(1, ranks) - _RANK_BYTES) // _LOADER_BYTES
    if cfg.workers is not None and cfg.workers > max(1, free):
        raise HarnessError(
            f"runtime.workers={cfg.workers}: {host_name()} has memory for {free} loader processes of each of its"
            f" {ranks} ranks at most. Leave it out: null starts as many as there are cores for."
        )
    return accelerator, ranks


def _devices(cfg: RuntimeConfig) -> tuple[str, int]:
    gpus = gpu_count() if cfg.accelerator != Accelerator.cpu else 0
    accelerator = str(cfg.accelerator) if cfg.accelerator != Accelerator.auto else ("cuda" if gpus else "cpu")
    reason = unusable_gpus() if cfg.accelerator != Accelerator.cpu and not gpus and _has_gpu_files() else None
    if reason is not None:
        raise HarnessError(
            f"runtime.accelerator={cfg.accelerator}: on {host_name()}, {reason}; runtime.accelerator=cpu uses none."
        )
    if accelerator == Accelerator.cuda and not gpus:
        other = gpu_of_another_kind()
        raise HarnessError(
            f"runtime.accelerator=cuda: torch sees no GPU on {host_name()}{'' if other is None else f' ({other})'}."
            " `python -m ade_harness doctor` says why."
        )
    tasks = _step_tasks_per_node(node_count(cfg))
    started = is_rank() and not is_supervised()  # by srun, torchrun or mpirun: as many ranks as they have started
    if accelerator == Accelerator.cuda and tasks > 1 and started and gpus < tasks:
        raise HarnessError(
            f"{'srun' if in_slurm_step() else 'the launcher'} started {tasks} tasks on {host_name()}, and this one sees"
            f" {gpus} of its GPUs: ranks that see one GPU each cannot be one evaluation. Start one task per node"
            " (--ntasks-per-node=1 --gpus-per-node=N), which starts a rank on each GPU, or let every task see all (srun"
            " --gpu-bind=none, no --gpus-per-task; no CUDA_VISIBLE_DEVICES for each)."
        )
    if cfg.devices == "auto":
        return accelerator, gpus if accelerator == Accelerator.cuda and not started else tasks
    maximum = max(1, usable_memory() // _RANK_BYTES)
    if int(cfg.devices) > maximum:
        raise HarnessError(
            f"runtime.devices={cfg.devices}: {host_name()} has memory for {maximum} ranks at most, each of which needs"
            f" {_RANK_BYTES / 2**30:g} GiB before it has a model."
        )
    if accelerator == Accelerator.cuda and int(cfg.devices) > gpus:
        raise HarnessError(f"runtime.devices={cfg.devices}: {host_name()} has {gpus} GPUs.")
    return accelerator, int(cfg.devices)


def local_ranks() -> int:
    """Return the number of ranks on this node, inside a rank."""
    return _started_locally() or _step_tasks_per_node()


def cores_per_rank() -> int:
    """Return how many cores each rank of this node may use, inside a rank, at least 1.

    Those that this process may use are shared by the node's ranks, unless SLURM has bound each task to its own: then
    they are, together, no more than the job has here.
    """
    cores, ranks = usable_cores(), local_ranks()
    on_node = os.environ.get("SLURM_CPUS_ON_NODE", "")
    bound = (
        in_slurm_step() and is_rank() and not is_supervised() and on_node.isdigit() and cores * ranks <= int(on_node)
    )
    return cores if bound else max(1, cores // ranks)


def _step_tasks_per_node(nodes: int = 1) -> int:
    if in_slurm_step() and is_rank() and not is_supervised():
        return int(os.environ["SLURM_STEP_NUM_TASKS"]) // int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
    number = _started_locally()
    world = os.environ.get("WORLD_SIZE", "")
    if number is None and is_rank() and not is_supervised() and world.isdigit():  # Lightning's own launcher
        return max(1, int(world) // nodes)
    if number is None and is_rank() and not is_supervised() and local_rank() > 0:
        raise HarnessError(
            f"LOCAL_RANK={local_rank()} says that this is one of several ranks on {host_name()}, and nothing says how"
            " many: set LOCAL_WORLD_SIZE (and RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) for each."
        )
    return number or 1


_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE")
"""Where torchrun, Open MPI, MPICH and MVAPICH say how many processes they have started on a node."""


def _started_locally() -> int | None:
    """Return how many processes a launcher has started on this node, by its variables; None if it does not say."""
    given = (os.environ.get(name, "") for name in _LOCAL_SIZES)
    return next((int(text) for text in given if text.isdigit()), None)


@dataclass(frozen=True)
class Node:
    """This node among those of the run, for the process that starts its ranks."""

    rank: int
    count: int
    address: str
    """Address of node 0."""
    port: int
    """Port of rank 0's store, in the first attempt; each attempt takes the next one."""


def find_node(cfg: RuntimeConfig) -> Node:
    """Find out which node this is.

    One node needs nothing. SLURM gives its variables. Anybody else sets NODE_RANK, MASTER_ADDR and MASTER_PORT on
    every node, and gives each the same command.

    Raises:
        HarnessError: several nodes are asked for, and nothing says which one this is.
    """
    count = node_count(cfg)
    if count == 1:
        return Node(0, 1, "127.0.0.1", free_port())
    if in_slurm_step():
        nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
        require(
            nodes == count,
            f"runtime.num_nodes={count}, but srun started this on {nodes} nodes: leave runtime.num_nodes out.",
        )
        port = _FIRST_PORT + 8 * int(os.environ["SLURM_JOB_ID"]) % _PORTS  # room for the attempts of each job
        return Node(int(os.environ["SLURM_NODEID"]), count, slurm_first_address(), port)
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    require(
        not missing,
        f"runtime.num_nodes={count}: {', '.join(missing)} not set. Under SLURM start it with srun"
        " (slurm/evaluate.sbatch); elsewhere give the same command on every node, with NODE_RANK=0, 1, ..., and"
        " MASTER_ADDR and MASTER_PORT of node 0.",
    )
    values = os.environ["NODE_RANK"], os.environ["MASTER_PORT"]
    require(
        all(v.isdigit() and len(v) < 10 for v in values) and int(values[0]) < count and 0 < int(values[1]) < 2**16,
        f"NODE_RANK={values[0]}, MASTER_PORT={values[1]}: expected a rank below {count}, and a port from 1 to 65535.",
    )
    address = os.environ["MASTER_ADDR"]
    _require_host(address, int(values[1]))
    return Node(int(values[0]), count, address, int(values[1]))


_KNOWN_WITHIN_S = 60.0
"""Names of nodes that have just started (Kubernetes) are known after a while."""


def _require_host(address: str, port: int) -> None:
    """Raise HarnessError for a name that nobody knows, also a minute later: ranks would wait for many."""
    end = time.monotonic() + _KNOWN_WITHIN_S
    while True:
        try:
            socket.getaddrinfo(address, port)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() < end and isinstance(error, socket.gaierror):
                time.sleep(1)
                continue
            raise HarnessError(
                f"MASTER_ADDR={address}: {host_name()} knows no such host"
                f" ({getattr(error, 'strerror', None) or error}). Expected the name or address of node 0."
            ) from error


def free_port() -> int:
    """Return a port of this machine that nobody uses now, the first of several for later attempts.

    Not one that the system would choose itself: it gives those to any connection, and rank 0 listens seconds later.
    """
    for _ in range(100):
        port = _FIRST_PORT + 8 * secrets.randbelow(_PORTS // 8)
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise HarnessError(f"{host_name()}: no port from {_FIRST_PORT} to {_FIRST_PORT + _PORTS} is free for the ranks.")


def slurm_first_address() -> str:
    """Return an address of the step's first node: its name if that can be resolved, else what SLURM knows."""
    nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_JOB_NODELIST", ""))
    first = _run("scontrol", "show", "hostnames", nodes).split("\n")[0].strip() or nodes
    try:
        socket.gethostbyname(first)
        return first
    except OSError:
        found = re.search(r"NodeAddr=(\S+)", _run("scontrol", "show", "node", first))
        return found[1] if found else first


def requeue_slurm_job(maximum: int, report: Callable[[str], None]) -> bool:
    """Put this SLURM job back into the queue; returns whether it is there.

    SLURM then ends the job. Who called this should wait for that: a job whose script fails first is not requeued.

    Args:
        maximum: how often a job may have been requeued.
        report: gets a line about it, before SLURM is asked: it may end this process before ``scontrol`` has returned.
    """
    job = os.environ.get("SLURM_JOB_ID", "")
    advice = "submit it again to continue."
    if not job or shutil.which("scontrol") is None:
        report(f"runtime.requeue: this is no SLURM job, or scontrol is not here: {advice}")
        return False
    if int(os.environ.get("SLURM_RESTART_COUNT", "0")) >= maximum:
        report(f"runtime.requeue: job {job} was requeued {maximum} times (runtime.slurm.most_requeues): {advice}")
        return False
    report(f"job {job} is requeued, and continues there.")
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        report(f"runtime.requeue: job {job} could not be requeued ({done.stderr.strip()}): {advice}")
    return done.returncode == 0


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
