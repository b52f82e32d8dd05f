"""What this machine can run, and what is missing."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import shutil
import socket
import tempfile
from pathlib import Path
from urllib.parse import urlparse

import psutil
import torch

from ade_harness import kernels
from ade_harness.cli.answer import Answer
from ade_harness.config.files import conf_dir, default_data_roots
from ade_harness.errors import HarnessError
from ade_harness.evaluation.packing import in_shared_memory
from ade_harness.files.fetch import OFFICIAL_URL, cache_dir
from ade_harness.files.reading import expanded
from ade_harness.models.ops import deformable
from ade_harness.runs.lock import RunLock
from ade_harness.runs.provenance import code_state, environment
from ade_harness.runtime.cluster import gpu_of_another_kind, unusable_gpus, usable_gpus
from ade_harness.runtime.console import make_console, print_line
from ade_harness.runtime.limits import usable_cores, usable_memory
from ade_harness.tracking.upload import wandb_mode

_CONNECT_TIMEOUT_S = 2.0


def run_doctor(options: argparse.Namespace) -> Answer:
    """Print one line per finding; the exit code is 2 if one of them would end every run."""
    console = make_console()
    found = findings()
    stops = [name for name, finding in found if _STOPS in finding]
    for name, finding in found:
        print_line(console, f"{name + ':':13}{finding}", style="bold red" if name in stops else None)
    return Answer(dict(found), 2 if stops else 0)


def findings() -> list[tuple[str, str]]:
    """Return (what, finding) pairs."""
    facts = environment()
    packages = facts["packages"]
    code = code_state()
    commit = f", commit {code['commit'][:10]}{' with changes' if code['dirty'] else ''}" if code["commit"] else ""
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    cache_parent = next(p for p in (cache_dir(), *cache_dir().parents) if p.exists())
    return [
        ("ade-harness", f"{code['version']}{commit}, configuration in {conf_dir()}"),
        ("python", f"{facts['python']} on {facts['platform']}"),
        (
            "torch",
            f"{packages['torch']} (lightning {packages.get('lightning')}, transformers {packages.get('transformers')})",
        ),
        ("CUDA", _cuda(facts["cuda"], facts["driver"])),
        (
            "GPUs",
            ", ".join(_gpu(i) for i in range(usable_gpus())) or "none: evaluation runs on the CPU",
        ),
        ("imports", _imports()),
        ("kernels", _kernels()),
        ("CPU", f"{facts['cpu_cores']} cores, {facts['cpu']}{_share_of_cores()}"),
        (
            "memory",
            f"{psutil.virtual_memory().available / 2**30:.1f} of {facts['memory_gib']} GiB free{_share_of_memory()};"
            f" {_shared()}",
        ),
        ("ranks", _ranks(max(1, usable_gpus()), usable_cores(), usable_memory())),
        ("runs", _run_place(Path("runs").resolve() if Path("runs").is_dir() else Path.cwd())),
        ("disk", f"{free:.1f} GiB free here; cache in {cache_dir()} ({_writable(cache_parent)})"),
        ("dataset", _dataset()),
        ("W&B", f"{packages.get('wandb', 'not installed')}, mode {wandb_mode(None)}"),
        ("network", _network()),
        ("SLURM", f"job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else _slurm()),
    ]


_STOPS = "BLOCKS ALL RUNS"
"""In a finding: nothing can be evaluated until this is fixed."""
_IMPORTED = (
    "lightning.pytorch", "transformers", "safetensors", "huggingface_hub", "onnxruntime", "cv2", "simplejpeg", "PIL",
    "pyarrow.parquet", "numba", "scipy.special", "hydra", "wandb", "torchvision", "timm",
)  # fmt: skip


def _imports() -> str:
    """Import what runs import, each in this process: an unfitting build fails in any way."""
    wrong = []
    for name in _IMPORTED:
        try:
            importlib.import_module(name)
        except Exception as error:
            wrong.append(f"{name} ({type(error).__name__}: {' '.join(str(error).split())[:160]})")
    if not wrong:
        return f"all {len(_IMPORTED)} libraries of a run"
    fitting = " torchvision has to be of the same release as torch." if "torchvision" in " ".join(wrong) else ""
    return f"{_STOPS}: {'; '.join(wrong)}.{fitting}"


def _run_place(folder: Path) -> str:
    """Write and lock a file where runs go."""
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".ade-harness-") as made:
            lock = RunLock(Path(made))
            lock.acquire()
            lock.release()
    except (HarnessError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        return f"{_STOPS} started here: {folder} cannot be written ({reason}). run.root=PATH chooses another place"
    return f"below {folder}, which can be written and locked"


def _share_of_cores() -> str:
    """Say so where this process may use fewer cores than the machine has."""
    cores, usable = os.cpu_count() or 1, usable_cores()
    return f", of which {usable} may be used here" if usable < cores else ""


def _share_of_memory() -> str:
    """Say so where this process's control group may have less memory than the machine has."""
    usable, total = usable_memory(), psutil.virtual_memory().total
    return f", {usable / 2**30:.1f} GiB may be used here" if usable < 0.95 * total else ""


_CORES_OF_RANK, _GIB_OF_RANK = 2, 6
"""A judgement: a thread of its own and one loader, and room for a billion weights beside libraries and loaders."""


def _ranks(ranks: int, cores: int, memory: int) -> str:
    """Judge what each rank of an evaluation with default options has here.

    Args:
        ranks: that a run starts by itself.
        cores: which this process may use.
        memory: likewise, in bytes.
    """
    each, gib = cores / ranks, memory / 2**30 / ranks
    found = f"{ranks} by default, with {each:g} core{'' if each == 1 else 's'} and {gib:.1f} GiB each"
    few = []
    if each < _CORES_OF_RANK:
        few.append(
            f"less than {_CORES_OF_RANK} cores each: a rank shares its core with its loaders. Ask for more (SLURM:"
            " --cpus-per-task), or runtime.devices=N for fewer ranks"
        )
    if gib < _GIB_OF_RANK:
        few.append(
            f"less than {_GIB_OF_RANK} GiB each: large networks and their loaders may not fit. Ask for more (SLURM:"
            " --mem), or runtime.devices=N and runtime.workers=N for fewer processes"
        )
    return "; ".join([found, *few])


def _shared() -> str:
    try:
        free = shutil.disk_usage("/dev/shm").free / 2**20
    except OSError:
        return "no /dev/shm"
    try:
        in_shared_memory([torch.zeros(1)])
    except HarnessError as error:
        return str(error)
    return f"/dev/shm {free:.0f} MiB free{'' if free > 256 else ': too little for loaders, see --shm-size'}"


def _cuda(version: str | None, driver: str | None) -> str:
    reason = unusable_gpus()
    if reason is not None:
        return f"{reason}. {_STOPS} here unless it says runtime.accelerator=cpu"
    if (other := gpu_of_another_kind()) is not None:
        return other
    if version is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return f"built for {version}, but no GPU is here"
    return f"{version}, driver {driver}"


def _kernels() -> str:
    """Try the compiled kernels on the CPU and on every GPU."""
    found = [f"CPU: {_tried('cpu', None)}"]
    for index in range(usable_gpus()):
        with torch.cuda.device(index):
            found.append(f"GPU {index}: {_tried('cuda', index)}")
    return "; ".join(found)


def _tried(device: str, index: int | None) -> str:
    try:
        label, reason = kernels.selection("auto", device)
        attention, why = deformable.compiled(device, index)
    except HarnessError as error:  # a GPU that another program fills
        return f"{_STOPS}: {error}"
    parts = [
        f"labels by {kernels.name_of(label)}{f' ({reason})' if reason else ''}",
        f"deformable attention by {attention.__name__.removeprefix('aggregate_')}{f' ({why})' if why else ''}",
    ]
    return ", ".join(parts)


def _gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    return f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB)"


def _writable(folder: Path) -> str:
    return "writable" if os.access(folder, os.W_OK) else "NOT writable: set ADE_HARNESS_CACHE"


def _dataset() -> str:
    root = os.environ.get("ADE20K_ROOT")
    if root is None:
        found = next((path for path in default_data_roots() if path.exists()), None)
        return f"{found} (found)" if found else "ADE20K_ROOT is not set, and ./data has none: give dataset.root=PATH"
    return f"{root} ({'found' if expanded(root).exists() else 'NOT there'})"


def _network() -> str:
    hub = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    hosts = {
        "hub": (hub.hostname or "", hub.port or 443),
        "dataset": (urlparse(OFFICIAL_URL).hostname or "", 80),
    }
    return ", ".join(
        f"{name} {'reachable' if _reaches(*address) else 'not reachable'}" for name, address in hosts.items()
    )


def _reaches(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S):
            return True
    except OSError:
        return False


def _slurm() -> str:
    return "sbatch found" if shutil.which("sbatch") else "not on this machine"
