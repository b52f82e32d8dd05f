"""What was really loaded: hashes of the tensors in memory, of files that a model file refers to, and of source code.

A file's hash says what was read, not what came of it: a constructor may load weights by itself, an ONNX graph keeps
its weights beside it, and a module's source decides as much as its weights do. Counts of two sessions are added up only
where all of these are equal.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import mmap
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ade_harness.files.fetch import file_hash
from ade_harness.runtime.cluster import usable_cores


def state_hash(module: nn.Module) -> str:
    """Return a sha256 of all parameters and buffers: names, types, shapes and bytes.

    Tensors are hashed side by side, and OpenSSL needs a second of one core for 1 to 2 GB.
    """
    named = sorted(_tensors(module), key=lambda item: item[0])
    with ThreadPoolExecutor(max(1, min(16, usable_cores()))) as pool:
        digests = list(pool.map(_tensor_hash, (tensor for _, tensor in named)))
    lines = [f"{name} {t.dtype} {list(t.shape)} {d}\n" for (name, t), d in zip(named, digests, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors, also buffers that no file holds, and those that two names share."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _tensor_hash(tensor: Tensor) -> str:
    values = tensor.detach()
    if values.layout != torch.strided:
        values = values.to_dense()
    if values.is_quantized:
        values = values.int_repr()
    flat = values.cpu().contiguous().reshape(-1)
    content: Any = flat.view(torch.uint8).numpy()
    return hashlib.sha256(content).hexdigest()


def companion_hashes(path: Path) -> dict[str, str]:
    """Return the sha256 of every file below a model file's folder whose name stands in the model file.

    An ONNX graph names the files that hold its weights. A name that stands there for another reason costs a hash.
    """
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            return {}
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            others = sorted(p for p in path.parent.rglob("*") if p != path and p.is_file())
            named = [p for p in others if content.find(p.name.encode()) >= 0]
    return {p.relative_to(path.parent).as_posix(): file_hash(p, "sha256") for p in named}


def source_hash(module_name: str) -> str | None:
    """Return what says which source a module has: a hash, or the version of an installed package.

    Args:
        module_name: of an imported module.

    Returns:
        A sha256 of its project's imported files: of its package, or of its folder if it is a file alone. Of an
        installed package ``name==version``. None if it has no file.
    """
    top = module_name.partition(".")[0]
    found = getattr(sys.modules.get(top), "__file__", None) or getattr(sys.modules.get(module_name), "__file__", None)
    if found is None:
        return None
    if _is_installed(Path(found)):
        names = importlib.metadata.packages_distributions().get(top, [])
        return ", ".join(f"{name}=={importlib.metadata.version(name)}" for name in sorted(set(names))) or None
    root = Path(found).resolve().parent
    files = {Path(f) for m in list(sys.modules.values()) if (f := getattr(m, "__file__", None))}
    files = {f for f in files if f.is_absolute() and f.suffix == ".py" and not _is_installed(f)}
    real = {f.resolve() for f in files if f.is_file()}
    own = sorted(f for f in real if f.is_relative_to(root) and not _is_installed(f))
    lines = [f"{f.relative_to(root).as_posix()} {file_hash(f, 'sha256')}\n" for f in own]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _is_installed(path: Path) -> bool:
    return bool({"site-packages", "dist-packages"} & set(path.parts))
