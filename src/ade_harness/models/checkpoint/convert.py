"""Take the tensors out of a file that holds pickled objects, without running any code of it."""

from __future__ import annotations

import pickle
import tarfile
import types
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ade_harness.errors import HarnessError, require
from ade_harness.files.fetch import file_hash
from ade_harness.files.reading import require_regular
from ade_harness.files.tensors import write_tensors
from ade_harness.models.checkpoint.files import ARRAYS_ONLY, StateDict, from_numpy, is_archive
from ade_harness.models.checkpoint.parts import Choice, Part, take_part


class _Left:
    """Stands for an object of a class that is not read; keeps what it would have been made of."""

    content: Any = None
    dump_patches = False
    """Torch's reader of files from before 1.6 asks each class of a module for it."""

    def __new__(cls, *_: Any, **__: Any) -> _Left:
        """Take any arguments."""
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        """Keep the attributes that the object had: a module's parameters are among them."""
        self.content = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Keep the items of a class that was made from dict."""
        if not isinstance(self.content, dict):
            self.content = {}
        self.content[key] = value

    def append(self, value: Any) -> None:
        """Drop the items of a class that was made from list."""

    def extend(self, values: Any) -> None:
        """Likewise."""


_MAKERS = {
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch.nn.parameter", "Parameter"),
    ("torch.storage", "UntypedStorage"),
    ("torch", "Size"),
    ("torch", "device"),
    *(
        (module, name)
        for module in ("builtins", "__builtin__")
        for name in ("set", "frozenset", "complex", "bytearray")
    ),
    ("collections", "defaultdict"),
    *ARRAYS_ONLY,
}
"""What tensors, arrays and containers are made of."""
_SAFE = {"OrderedDict": OrderedDict, "defaultdict": defaultdict}


def _parameter(tensor: Tensor, *_: Any) -> Tensor:
    """Stand in for what torch writes of a parameter that has attributes, which are left."""
    return tensor


class _TensorUnpickler(pickle.Unpickler):
    """Makes tensors, arrays and containers; puts :class:`_Left` in the place of every other class and function."""

    left: set[str]
    ours: Any
    """The module by which torch unpickles what it reads within."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the few functions that tensors need, or the class that stands for all others."""
        if (module, name) == ("torch._utils", "_rebuild_parameter_with_state"):
            return _parameter
        if (module, name) == ("torch.storage", "_load_from_bytes"):  # of tensors that pickle itself has written
            return self._load_from_bytes
        if (module, name) in _MAKERS or (module == "torch" and _is_type(name)):
            return _SAFE.get(name) or super().find_class(module, name)
        self.left.add(f"{module}.{name}")
        return _Left

    def _load_from_bytes(self, content: bytes) -> Any:
        return torch.load(BytesIO(content), map_location="cpu", weights_only=False, pickle_module=self.ours)


def _is_type(name: str) -> bool:
    return name.endswith("Storage") or isinstance(getattr(torch, name, None), torch.dtype)


def convert(file: Path, output: Path, choice: Choice) -> tuple[Part, list[str], str]:
    """Write the weights of a torch or pickle file as safetensors.

    Args:
        file: that holds more than tensors: arguments, optimisers, a whole module.
        output: to write; a file that is there is not replaced.
        choice: which weights, where it holds several.

    Returns:
        The part that was written; the classes that were left out; the sha256 of the output.

    Raises:
        HarnessError: the file is damaged or no such file; it holds no weights, or several that could be meant; the
            output exists or cannot be written.
    """
    require_regular(file, str(file))
    require(output.suffix == ".safetensors", f"{output}: expected a name that ends in .safetensors.")
    require(not output.exists(), f"{output}: exists already. Give another name, or delete it.")
    content, left = _read(file)
    odd = [name for name in left if name.startswith("torch._utils._rebuild_")]
    require(
        not odd,
        f"{file}: holds tensors of a kind that is not read ({', '.join(odd)}): sparse or quantised ones, or subclasses."
        " Save them as plain ones: .to_dense(), .dequantize(), .as_subclass(torch.Tensor).",
    )
    part = take_part(_opened(content), file, choice)
    for name, tensor in part.state.items():
        held = tensor.untyped_storage().nbytes()
        require(
            tensor.numel() * tensor.element_size() <= held,
            f"{file}: {name} says that it has {tensor.numel():,} values, and the file holds {held:,} bytes of them.",
        )
        require(not tensor.is_complex(), f"{file}: {name} is complex, which no network here has.")
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in part.state.items()}  # none share memory
    require(output.absolute().parent.is_dir(), f"{output}: there is no folder {output.parent}. Make it first.")
    write_tensors(output, tensors, {"format": "pt"})
    return part, left, file_hash(output, "sha256")


def _read(file: Path) -> tuple[Any, list[str]]:
    """Return what a file holds, with stand-ins for foreign objects, and the names of their classes."""
    left: set[str] = set()
    ours: Any = types.ModuleType("restricted")  # with all that torch.load uses of a pickle module
    unpickler = type("Unpickler", (_TensorUnpickler,), {"left": left, "ours": ours})

    def load(stream: Any, **settings: Any) -> Any:
        return unpickler(stream, **settings).load()

    ours.Unpickler, ours.load = unpickler, load
    try:
        if _is_plain_pickle(file):
            with file.open("rb") as stream:
                return load(stream, encoding="latin1"), sorted(left)
        if is_archive(file):
            with zipfile.ZipFile(file) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    raise HarnessError(
                        f"{file}: a TorchScript program. Evaluate it: model=torchscript model.path={file}"
                    )
        with warnings.catch_warnings():  # it names what stands here for the classes
            warnings.simplefilter("ignore", torch.serialization.SourceChangeWarning)
            return torch.load(file, map_location="cpu", weights_only=False, pickle_module=ours), sorted(left)
    except HarnessError:
        raise
    except Exception as error:  # a damaged file fails in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if _Left.__name__ in reason:  # it was asked for what the object in its place would do
            raise HarnessError(
                f"{file}: its tensors are held by {', '.join(sorted(left)[:5])}, which is not read. Where that is"
                " installed, write the weights alone: torch.save(network.state_dict(), PATH)."
            ) from error
        raise HarnessError(f"{file}: not a readable torch file or pickle ({reason}). Download it again.") from error


def _is_plain_pickle(file: Path) -> bool:
    """Whether Python's pickle has written a file, and not torch.save: whose older format begins with a number."""
    if zipfile.is_zipfile(file):
        return False
    with file.open("rb") as stream:
        start = stream.read(64)
    return not (tarfile.is_tarfile(file) or _MAGIC in start)


_MAGIC = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)[2:-1]
"""With which torch.save began its files before 1.6."""


def _opened(value: Any, depth: int = 0, done: dict[int, Any] | None = None) -> Any:
    """Return containers with modules as their state_dicts, and arrays as tensors; what is shared is opened once."""
    done = {} if done is None else done
    if isinstance(value, _Left | Mapping):
        if id(value) not in done:
            done[id(value)] = None  # a pickle may hold itself
            done[id(value)] = _opened_once(value, depth, done)
        return done[id(value)]
    if isinstance(value, np.ndarray | np.generic) and value.dtype != object:
        return from_numpy(np.asarray(value))
    return value


def _opened_once(value: Any, depth: int, done: dict[int, Any]) -> Any:
    """Return one container, as :func:`_opened`."""
    if isinstance(value, _Left):
        content = value.content
        if isinstance(content, tuple) and content and isinstance(content[0], dict):
            content = content[0]  # (attributes, slots)
        if isinstance(content, Mapping) and "_modules" in content and "_parameters" in content:
            return _state_of(content, [0])
        return _opened(content, depth + 1, done) if isinstance(content, Mapping) and depth < _MAX_DEPTH else None
    if depth >= _MAX_DEPTH:
        return None
    named = {str(key): item for key, item in value.items() if not isinstance(key, _Left)}
    return {name: _opened(item, depth + 1, done) for name, item in named.items()}


_MAX_DEPTH = 8


def _state_of(module: Mapping[str, Any], met: list[int], prefix: str = "", depth: int = 0) -> StateDict:
    """Return what ``state_dict`` of a pickled module would have: parameters and persistent buffers by name.

    Raises:
        HarnessError: more modules than any network has: a file that holds modules in each other.
    """
    met[0] += 1
    if met[0] > _MAX_MODULES:
        raise HarnessError(f"the file holds over {_MAX_MODULES:,} modules, perhaps in each other: that is no network.")
    state: StateDict = {}
    passing = module.get("_non_persistent_buffers_set") or ()
    for tensors, without in ((module.get("_parameters"), ()), (module.get("_buffers"), passing)):
        for name, tensor in (tensors or {}).items():
            if isinstance(tensor, Tensor) and name not in without:
                state[prefix + name] = tensor
    for name, child in (module.get("_modules") or {}).items():
        content = child.content if isinstance(child, _Left) else None
        if isinstance(content, Mapping) and depth < _MAX_NESTED:
            state |= _state_of(content, met, f"{prefix}{name}.", depth + 1)
    return state


_MAX_NESTED = 100
_MAX_MODULES = 100_000
