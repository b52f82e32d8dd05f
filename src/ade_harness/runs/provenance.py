"""What somebody else needs to know to get the same number: code, environment, command."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import InvalidRequirement, Requirement

import ade_harness
from ade_harness.runtime.cluster import usable_gpus
from ade_harness.runtime.notes import COMMAND

_PACKAGES = (
    "torch", "lightning", "hydra-core", "omegaconf", "transformers", "huggingface-hub", "safetensors", "onnxruntime",
    "numpy", "pillow", "opencv-python-headless", "pyarrow", "matplotlib", "wandb", "timm", "torchvision",
    "triton", "numba",
)  # fmt: skip


_OPTIONAL = ("triton",)
"""Used if it is there."""


def environment() -> dict[str, Any]:
    """Return interpreter, packages, machine and GPUs."""
    import torch

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(usable_gpus())],
        "cuda": torch.version.cuda,
        "driver": _driver() if torch.cuda.is_available() else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


_COMPUTING = (
    "pillow", "opencv-python-headless", "simplejpeg", "transformers", "timm", "segmentation-models-pytorch",
    "onnxruntime", "onnxruntime-gpu",
)  # fmt: skip
"""What makes pixels, networks and scores beside torch: another version may give other labels."""


@cache
def computing_packages() -> dict[str, str]:
    """Return the versions of the installed packages that decide numbers."""
    return {name: version for name in _COMPUTING if (version := _version(name)) is not None}


@cache
def distributions() -> dict[str, dict[str, str | None]]:
    """Return this package's dependencies, and theirs, as they were installed when this process first asked.

    Returns:
        By name: ``version``, and ``sha256`` of the content: of the paths and hashes of all installed files, so two
        installations of one wheel are equal wherever they lie; None if the installer has recorded no hashes.
    """
    found: dict[str, dict[str, str | None]] = {}
    todo = ["ade-harness", *_OPTIONAL]
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        try:
            installed = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # for another platform, or an extra that is not here
        found[name] = {"version": installed.version, "sha256": _content_hash(installed)}
        todo += [r for text in installed.requires or () if (r := _required(text))]
    found.pop("ade-harness", None)  # its commit says more
    return dict(sorted(found.items()))


def _required(text: str) -> str | None:
    """Return the name in a requirement, if it holds here without extras."""
    try:
        requirement = Requirement(text)
    except InvalidRequirement:
        return None
    return None if requirement.marker and not requirement.marker.evaluate({"extra": ""}) else requirement.name


def _content_hash(installed: metadata.Distribution) -> str | None:
    lines = []
    for line in (installed.read_text("RECORD") or "").splitlines():
        path, _, digest = line.rpartition(",")[0].rpartition(",")
        if digest and not path.startswith(("..", "/")) and ".dist-info/" not in path:
            lines.append(f"{path} {digest}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest() if lines else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor()


def _driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None


_DECIDING = ("src", "conf")
"""Folders whose files decide what a run counts; of `conf` the values that it used, which its configuration has."""


def code_state(package: Path | None = None) -> dict[str, Any]:
    """Return version, commit and uncommitted changes of this package's own checkout, or of the one it was built from.

    Args:
        package: the package's folder (tests give another).

    Returns:
        ``version``; in a git checkout also ``commit``, ``origin`` (without credentials), ``dirty``, ``diff``
        (text, also of new files below src/ and conf/), ``diff_sha256`` of what of it lies in these two folders,
        ``tree``, a hash of both at the commit, and ``src``, a hash of src/ as it is: prose, tests and labels of models
        decide no number. An installed package has what its build wrote down (hatch_build.py): the same without
        ``diff``, and ``built`` is true.
    """
    folder = package or Path(ade_harness.__file__).parent
    state: dict[str, Any] = {"version": ade_harness.__version__, "commit": None, "dirty": None}
    top = _git(folder, "rev-parse", "--show-toplevel")
    if top is None or not folder.resolve().is_relative_to(Path(top.strip()).resolve() / "src"):
        return state | _built_from(folder)  # an installed wheel, perhaps inside somebody else's repository
    root = Path(top.strip())
    commit = _git(root, "rev-parse", "HEAD")
    diff = _git(root, "diff", "HEAD", "--no-ext-diff") or ""
    deciding = _git(root, "diff", "HEAD", "--no-ext-diff", "--", *_DECIDING) or ""
    trees = _git(root, "rev-parse", *(f"HEAD:{folder}" for folder in _DECIDING))
    source = (trees or "").partition("\n")[0] + (_git(root, "diff", "HEAD", "--no-ext-diff", "--", "src") or "")
    untracked = (_git(root, "ls-files", "--others", "--exclude-standard", "src", "conf") or "").splitlines()
    for name in untracked:
        if not (root / name).is_file():  # a link that leads nowhere, such as an editor's lock
            continue
        new = f"\n+++ new file {name}\n{(root / name).read_text(encoding='utf-8', errors='replace')}"
        diff, deciding, source = diff + new, deciding + new, source + (new if name.startswith("src/") else "")
    origin = _git(root, "remote", "get-url", "origin")
    state.update(
        commit=commit.strip() if commit else None,
        origin=re.sub(r"//[^/@]*@", "//", origin.strip()) if origin else None,
        dirty=bool(diff),
        diff=diff,
        diff_sha256=hashlib.sha256(deciding.encode()).hexdigest() if deciding else None,
        tree=hashlib.sha256(trees.encode()).hexdigest() if trees else None,
        src=hashlib.sha256(source.encode()).hexdigest() if trees else None,
    )
    return state


_BUILT = ("commit", "origin", "dirty", "diff_sha256", "tree", "src")


def _built_from(folder: Path) -> dict[str, Any]:
    """Return what the build wrote; nothing if it had no git."""
    try:
        found = json.loads((folder / "built_from.json").read_text())
    except (OSError, ValueError):
        return {}
    return {**{key: found.get(key) for key in _BUILT}, "built": True}


def describe_code(state: dict[str, Any]) -> str:
    """Return version and commit in one line."""
    if not state["commit"]:
        return f"ade-harness {state['version']} (of no known commit)"
    changed = ", with uncommitted changes" if state["dirty"] else ""
    return f"ade-harness {state['version']} (commit {state['commit'][:10]}{changed})"


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "-c", "core.quotePath=false", *arguments],
            capture_output=True,
            timeout=30,
            check=True,
            encoding="utf-8",
            errors="replace",
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def command_line() -> list[str]:
    """Return the command that started this process, or its supervisor, as a user would type it."""
    given = os.environ.get(COMMAND)
    return list(map(str, json.loads(given))) if given else [Path(sys.argv[0]).name, *sys.argv[1:]]
