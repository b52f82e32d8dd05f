"""Read weight files: safetensors, NumPy archives, detectron2's pickles, torch files. No code in a file is run."""

from __future__ import annotations

import pickle
import re
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ade_harness.errors import HarnessError
from ade_harness.files.archive import check_expansion
from ade_harness.files.atomic import replaced
from ade_harness.models.checkpoint.public import INDEX, shards

StateDict = dict[str, Tensor]


def read_content(path: Path) -> Any:
    """Read what a file holds: a state_dict, or mappings around one (see :mod:`ade_harness.models.checkpoint.parts`).

    Tensors of safetensors and torch files are mapped, not read: all ranks of a node share the pages of one file.

    Raises:
        HarnessError: the file is damaged, or holds pickled code.
    """
    if path.name.endswith(INDEX):
        return {k: v for shard in shards(path) for k, v in read_content(path.with_name(shard)).items()}
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise HarnessError(f"{path}: not a whole safetensors file ({error}). Download it again.") from error
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.suffix == ".pkl" and not zipfile.is_zipfile(path):  # torch.save writes archives, whatever their name
        return _read_pickle(path)
    if path.suffix == ".zip":
        path = _unpacked(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive(path))
    except HarnessError:
        raise
    except pickle.UnpicklingError as error:
        with path.open("rb") as file:
            head = file.read(64)
        if head.startswith(b"version https://git-lfs"):
            raise HarnessError(f"{path}: a Git LFS pointer, not weights. `git lfs pull` fetches them.") from error
        if head[:2] != b"PK" and head[:1] != b"\x80":  # neither torch's zip nor a pickle
            raise HarnessError(
                f"{path}: not a torch file. Expected .safetensors, or a .pth or .bin of tensors."
            ) from error
        raise HarnessError(
            f"{path}: this file holds more than tensors ({_foreign(error)}): loading it would run code from it. Take"
            f" its tensors without running any: python -m ade_harness convert {path} {path.stem}.safetensors"
        ) from error
    except Exception as error:  # its restricted unpickler is a stack machine, and a damaged file any program for it
        raise HarnessError(
            f"{path}: not a readable torch file ({str(error).splitlines()[0] if str(error) else 'empty'})."
            " It may be cut off: fetch it again."
        ) from error


def is_archive(path: Path) -> bool:
    """Whether a file is a zip, as torch writes it: not compressed.

    torch maps the bytes of a member into memory as they lie there: compressed ones, where they are no fewer than the
    weights', would be taken for the weights.

    Raises:
        HarnessError: a member is compressed.
    """
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        # a program of TorchScript, whose code is compressed, is refused by torch's reader
        program = any(name.endswith("/constants.pkl") for name in archive.namelist())
        if not program and any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise HarnessError(
                f"{path}: was packed again, with compression, which torch.save never does. Unpack it and pack it"
                " without (zip -0), or fetch the original."
            )
    return True


def _foreign(error: pickle.UnpicklingError) -> str:
    """Return the class that torch's restricted unpickler refused, out of its message."""
    found = re.search(r"GLOBAL ([\w.]+)|global: ?\S* ?([\w.]+)", str(error))
    return "pickled objects" if found is None else f"objects of {found[1] or found[2]}"


def _unpacked(archive: Path) -> Path:
    """Unpack the only weight file of an archive beside it, once, and return where it is."""
    try:
        with zipfile.ZipFile(archive) as content:
            names = [n for n in content.namelist() if n.endswith((".pth", ".pth.tar", ".pt", ".bin"))]
            if len(names) != 1:
                raise HarnessError(
                    f"{archive}: holds {len(names)} weight files (.pth, .pth.tar, .pt, .bin), expected one."
                )
            check_expansion(content.infolist(), archive)
            member = content.getinfo(names[0])  # of another archive under the same name its content has another sum
            target = archive.with_name(f"{archive.name}.{member.CRC:08x}{member.file_size:x}.{Path(names[0]).name}")
            with FileLock(str(target) + ".lock"):
                if not target.exists():
                    with replaced(target) as part, content.open(names[0]) as source, part.open("wb") as out:
                        shutil.copyfileobj(source, out, 1 << 20)
    except (zipfile.BadZipFile, OSError, EOFError, zlib.error) as error:
        raise HarnessError(
            f"{archive}: cannot be unpacked ({error}). Download it again, or unpack it yourself."
        ) from error
    return target


def _read_npz(path: Path) -> StateDict:
    """Read numpy's archive, such as big_vision's; bfloat16 is kept there as two raw bytes."""
    try:
        with zipfile.ZipFile(path) as archive:
            check_expansion(archive.infolist(), path)
        with np.load(path, allow_pickle=False) as arrays:
            return {key: from_numpy(arrays[key]) for key in arrays.files}
    except HarnessError:
        raise
    except Exception as error:  # of zipfile, zlib, and of Python's parser, which reads the headers
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise HarnessError(f"{path}: not a whole .npz of arrays ({reason}).") from error


def from_numpy(array: np.ndarray[Any, Any]) -> Tensor:
    """Return an array as a tensor; two raw bytes are a bfloat16."""
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).float()
    return torch.from_numpy(np.asarray(array, order="C"))  # ascontiguousarray makes [1] of a single number


ARRAYS_ONLY = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),  # how Python 2's byte strings are kept
}
"""Functions and classes that pickled arrays need."""


class _ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of dicts, lists, numbers, strings and numpy arrays; anything else is refused by name."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        super().__init__(file, encoding="latin1")  # detectron2's model zoo was written by Python 2 and 3
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        """Return the few functions that arrays need."""
        if (module, name) not in ARRAYS_ONLY:
            raise HarnessError(
                f"{self.path}: this pickle names {module}.{name}; only numpy arrays are read from pickles, as anything"
                " else would run code from the file. Take its tensors without running any: python -m ade_harness"
                f" convert {self.path} {self.path.stem}.safetensors"
            )
        return super().find_class(module, name)


def _read_pickle(path: Path) -> StateDict:
    """Read detectron2's .pkl: a dict with ``model``, whose values are numpy arrays."""
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, path).load()
    except HarnessError:
        raise
    except Exception as error:  # a damaged pickle fails in any way
        raise HarnessError(
            f"{path}: not a whole pickle ({type(error).__name__}: {error}). Download it again."
        ) from error
    found = content.get("model", content) if isinstance(content, Mapping) else {}
    arrays = {str(k): from_numpy(np.asarray(v)) for k, v in found.items() if isinstance(v, np.ndarray | np.generic)}
    if not arrays or len(arrays) != len(found):
        raise HarnessError(f"{path}: holds no mapping from names to arrays.")
    return arrays
