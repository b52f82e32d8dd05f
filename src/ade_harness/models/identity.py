"""What was really loaded: hashes of the tensors in memory, of files that a model file refers to, and of source code.

A file's hash says what was read, not what came of it: a constructor may load weights by itself, an ONNX graph keeps
its weights beside it, and a module's source decides as much as its weights do. Counts of two sessions are added up only
where all of these are equal.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import mmap
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import ade_harness
from ade_harness.files.fetch import file_hash
from ade_harness.runtime.limits import usable_cores

_KEY, _VALUE = b"\n\x08location", b"\x12"
"""A StringStringEntryProto: its field 1, whole, and the tag of its field 2."""
_MAX_PATH_LENGTH = 4096
_INSTALLED = frozenset(("site-packages", "dist-packages"))
_THIS = Path(ade_harness.__file__).resolve().parent
"""This package: the manifest has its commit."""


def state_hash(module: nn.Module, attributes: bool = False) -> str:
    """Return a sha256 of all parameters and buffers: names, types, shapes and bytes.

    Tensors are hashed side by side, and OpenSSL needs a second of one core for 1 to 2 GB.

    Args:
        module: the network.
        attributes: hash tensors, arrays and numbers too that are plain attributes of modules, and tensors and arrays
            that the Python modules beside them hold (``W = torch.load("w.pt")``), as anybody's code may have them.
            Not of a network that has been called before: it may keep what it has last computed.
    """
    named = list(_tensors(module))
    if attributes:
        named += [*_attributes(module), *_globals(module)]
    named.sort(key=lambda item: item[0])
    with ThreadPoolExecutor(max(1, min(16, usable_cores()))) as pool:
        digests = list(pool.map(_tensor_hash, (tensor for _, tensor in named)))
    lines = [f"{name} {t.dtype} {list(t.shape)} {d}\n" for (name, t), d in zip(named, digests, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors, also buffers that no file holds, and those that two names share."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _attributes(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors, arrays and numbers that are plain attributes of modules, in lists and mappings too."""
    for prefix, part in module.named_modules():
        for name, value in vars(part).items():
            if name == "training" or (name.startswith("_") and name in vars(_EMPTY)):
                continue  # parameters, buffers and hooks
            yield from _tensors_in(value, f"{prefix}:{name}:", 0, set())


def _globals(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors and arrays that are global in the Python files of parts' classes, and in those beside them."""
    files = {name: f for name, m in list(sys.modules.items()) if (f := getattr(m, "__file__", None))}
    names = {type(part).__module__ for part in module.modules()} & files.keys()
    folders = {os.path.dirname(files[n]) for n in names if not _is_installed(Path(files[n]))}  # noqa: PTH120
    for name, file in sorted(files.items()):
        # texts alone of the thousands that are imported: paths and links take a tenth of a second
        if os.path.dirname(file) not in folders or Path(file).resolve().is_relative_to(_THIS):  # noqa: PTH120
            continue
        for key, value in sorted(vars(sys.modules[name]).items()):
            held = isinstance(value, Tensor | np.ndarray)
            inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
            if held or (inside and all(isinstance(v, Tensor | np.ndarray) for v in inside)):
                yield from _tensors_in(value, f"{name}:{key}:", 0, set())


_MAX_NESTING = 8


def _tensors_in(value: Any, name: str, depth: int, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Yield what a value holds; numbers of one list or mapping together, and a container that holds itself once."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "iufb":
        yield name, torch.from_numpy(np.array(value))
    elif isinstance(value, bool | int | float):
        yield name, _written(value)
    elif isinstance(value, Mapping | list | tuple) and depth < _MAX_NESTING and id(value) not in seen:
        seen.add(id(value))
        items = list(value.items() if isinstance(value, Mapping) else enumerate(value))
        numbers = [(str(key), below) for key, below in items if isinstance(below, bool | int | float)]
        if numbers:  # there may be a million
            yield f"{name}{'.' if depth else ''}", _written(numbers)
        for key, below in items:
            if not isinstance(below, bool | int | float):
                yield from _tensors_in(below, f"{name}{'.' if depth else ''}{key}", depth + 1, seen)


def _written(numbers: Any) -> Tensor:
    """Return the text of numbers, which says them to the last bit, as bytes."""
    return torch.frombuffer(bytearray(repr(numbers).encode()), dtype=torch.uint8)


_EMPTY = nn.Module()


def _tensor_hash(tensor: Tensor) -> str:
    values = tensor.detach()
    values = values.resolve_conj().resolve_neg()
    if values.layout != torch.strided:
        values = values.to_dense()
    if values.is_quantized:
        values = values.int_repr()
    flat = values.cpu().contiguous().reshape(-1)
    content: Any = flat.view(torch.uint8).numpy()
    return hashlib.sha256(content).hexdigest()


def companion_hashes(path: Path) -> dict[str, str]:
    """Return the sha256 of every file that holds weights of an ONNX graph, by its path beside the graph.

    The graph names them in its tensors' ``external_data``, as the value of the key ``location``.
    """
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            return {}
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            named = sorted(set(_locations(content)))
    return {name: file_hash(path.parent / name, "sha256") for name in named if (path.parent / name).is_file()}


def _locations(content: mmap.mmap) -> Iterator[str]:
    """Yield the values of all entries ``location``: StringStringEntryProto, whose field 1 is the key and 2 the value.

    Writers put the key first; protobuf allows the other order too.
    """
    place = content.find(_KEY)
    while place >= 0:
        end = place + len(_KEY)
        if content[end : end + 1] == _VALUE:
            length, start = _varint(content, end + 1)
            value = content[start : start + min(length, _MAX_PATH_LENGTH)]
        else:
            value = _value_before(content, place)
        with suppress(UnicodeDecodeError):
            if value:
                yield value.decode()
        place = content.find(_KEY, end)


def _varint(content: mmap.mmap, place: int) -> tuple[int, int]:
    """Return a number of protobuf's, and the place behind it."""
    number, shift = 0, 0
    while place < len(content):
        byte = content[place]
        place, number, shift = place + 1, number | (byte & 127) << shift, shift + 7
        if byte < 128 or shift > 28:
            break
    return number, place


def _value_before(content: mmap.mmap, end: int) -> bytes:
    """Return the value that ends where the key begins; empty if there is none."""
    for length in range(1, min(_MAX_PATH_LENGTH, end)):
        tag = end - length - (2 if length < 128 else 3)
        if tag >= 0 and content[tag : tag + 1] == _VALUE and _varint(content, tag + 1) == (length, end - length):
            return content[end - length : end]
    return b""


def source_hash(module_name: str) -> str | None:
    """Return what says which source a module has: a hash, or the version of an installed package.

    Args:
        module_name: of an imported module.

    Returns:
        A sha256 of its project's files that are imported, or that imported ones name in an import, wherever it stands:
        a forward may import when it is called. Of an installed package ``name==version``. None if it has no file.
    """
    top = module_name.partition(".")[0]
    found = getattr(sys.modules.get(top), "__file__", None) or getattr(sys.modules.get(module_name), "__file__", None)
    if found is None:
        return None
    if _is_installed(Path(found)):
        names = importlib.metadata.packages_distributions().get(top, [])
        return ", ".join(f"{name}=={importlib.metadata.version(name)}" for name in sorted(set(names))) or None
    # the folder that Python looks in: other packages beside it are of the same project
    file = getattr(sys.modules.get(module_name), "__file__", None) or found
    depth = module_name.count(".") + (Path(file).stem == "__init__")
    parents = Path(file).resolve().parents
    root = parents[min(depth, len(parents) - 1)]
    own = {f for f in _imported_files() if f.is_relative_to(root)}
    todo = list(own)
    while todo:
        named = _imports_of(todo.pop(), root) - own
        new = {f for f in named if not (_is_installed(f) or f.is_relative_to(_THIS))}
        own |= new
        todo += new
    lines = [f"{f.relative_to(root).as_posix()} {file_hash(f, 'sha256')}\n" for f in sorted(own)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _imported_files() -> set[Path]:
    """Return the real Python files of imported modules that are neither installed nor of this package."""
    found = set()
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        # texts first: of the thousands of modules of a command, all but a few are installed, and paths are slow
        if not isinstance(file, str) or not file.endswith(".py") or not os.path.isabs(file):  # noqa: PTH117
            continue
        if any(f"{os.sep}{folder}{os.sep}" in file for folder in _INSTALLED):
            continue
        path = Path(file)
        if path.is_file() and not (_is_installed(real := path.resolve()) or real.is_relative_to(_THIS)):
            found.add(real)
    return found


def sources_of(module: nn.Module, others: Iterable[str]) -> list[str]:
    """Return :func:`source_hash` of a network's class and of `others`, and of every part's class that is not installed.

    Args:
        module: the network, whose parts may come from several projects.
        others: names of modules.
    """
    found = [source_hash(name) for name in (type(module).__module__, *others)]
    parts = sorted({type(part).__module__ for part in module.modules()} - {"builtins"})
    hashes = (source_hash(name) for name in parts if not name.startswith(("torch.", f"{ade_harness.__name__}.")))
    return list(dict.fromkeys(h for h in [*found, *(h for h in hashes if h and "==" not in h)] if h))


def _imports_of(file: Path, root: Path) -> set[Path]:
    """Return the files below `root` that a file's import statements can mean, those within functions too."""
    try:
        status = file.stat()
        named = _imported_names(file, status.st_mtime_ns, status.st_size, status.st_ino)
    except (SyntaxError, ValueError, OSError):
        return set()
    found: set[Path] = set()
    parents = file.parents
    for level, name in named:
        start = parents[min(level - 1, len(parents) - 1)] if level else root
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            place = start.joinpath(*parts[:depth])
            found |= {place / "__init__.py", place.with_name(f"{place.name}.py")}
    return {f.resolve() for f in found if f.is_file() and f.resolve().is_relative_to(root)}


@cache
def _imported_names(file: Path, *_: int) -> frozenset[tuple[int, str]]:
    """Return what a file's import statements name, each with the number of its leading dots.

    Every model of a sweep or of a service asks again: a file is parsed once, as its time, size and inode say.
    """
    found: set[tuple[int, str]] = set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {(0, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found |= {(node.level, f"{module}.{alias.name}".strip(".")) for alias in node.names}
    return frozenset(found)


def _is_installed(path: Path) -> bool:
    return not _INSTALLED.isdisjoint(path.parts)
