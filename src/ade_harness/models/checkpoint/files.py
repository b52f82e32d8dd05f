"""Find, check, read and load weight files: never by running code from a file, never with keys left over."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import logging
import pickle
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ade_harness.errors import HarnessError
from ade_harness.files.atomic import replaced
from ade_harness.files.fetch import OnBytes, fetch, file_hash

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A weight file on this machine, and where it came from."""

    path: Path
    sha256: str
    origin: str
    """The file's path as given, or ``hub id @ revision / file name``."""


def local_checkpoint(path: str, sha256: str | None, key: str = "model.checkpoint") -> Checkpoint:
    """Check a weight file given by the user.

    Raises:
        HarnessError: it is not there, or its hash is not the expected one.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise HarnessError(f"{key}={path}: no such file.")
    return _checked(file, sha256, str(file), f"{key}_sha256")


def url_checkpoint(url: str, folder: Path, sha256: str | None, on_bytes: OnBytes | None = None) -> Checkpoint:
    """Fetch a weight file into `folder`, once for all ranks of a node; continued after an interruption.

    Raises:
        HarnessError: no network, no such file, or a wrong hash.
    """
    file = folder / url.rpartition("/")[2]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(str(file) + ".lock"):
            if not file.exists():
                fetch(url, file, on_bytes=on_bytes)
    except HarnessError as error:
        raise HarnessError(f"{error} {_ADVICE}") from error
    except OSError as error:
        raise HarnessError(
            f"{folder}: cannot be written ({error.strerror or error}). Set ADE_HARNESS_CACHE to a folder of yours."
        ) from error
    return _checked(file, sha256, url, "the configuration")


def hub_checkpoint(hub_id: str, filename: str, revision: str | None, sha256: str | None) -> Checkpoint:
    """Fetch a weight file from the hub into its cache (resumed, and reused without network once it is there).

    Large models are there in several shards with an index: all of them are fetched, and the index is the file. Where
    ``model.safetensors`` is asked for, an older ``pytorch_model.bin`` will do.

    Raises:
        HarnessError: no network, no such file, a gated repository, or a wrong hash.
    """
    from huggingface_hub.errors import EntryNotFoundError

    names = _HUB_FILES if filename == _HUB_FILES[0] else (filename,)
    for name in names:
        try:
            path = _hub_file(hub_id, name, revision)
            break
        except EntryNotFoundError as error:
            if name == names[-1]:
                raise HarnessError(
                    f"{_hub_name(hub_id, filename, revision)}: not found on the hub. {_ADVICE}"
                ) from error
    parts = path.parts  # the cache's snapshot folder is named by the commit
    commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts else revision
    origin = f"{hub_id}@{commit}/{path.name}"
    if not path.name.endswith(INDEX):
        return _checked(path, sha256, origin, "model.hub.sha256")
    digests = [file_hash(_hub_file(hub_id, shard, commit), "sha256") for shard in shards(path)]
    return Checkpoint(path, hashlib.sha256("".join(digests).encode()).hexdigest(), origin)


_HUB_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
INDEX = ".index.json"
_ADVICE = "Download it elsewhere and give model.checkpoint=PATH, or try without weights: model.weights=random."


def shards(index: Path) -> list[str]:
    """Return the files that an index names.

    Raises:
        HarnessError: it is no index, or names files elsewhere.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("it names no files, or files elsewhere")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HarnessError(f"{index}: not an index of weight files ({error}). Fetch it again.") from error
    return names


def _hub_name(hub_id: str, filename: str, revision: str | None) -> str:
    return f"{hub_id}{'@' + revision if revision else ''}/{filename}"


def _hub_file(hub_id: str, filename: str, revision: str | None) -> Path:
    """Fetch one file; raises EntryNotFoundError if the repository has none of that name."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = _hub_name(hub_id, filename, revision)
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # its retries; the outcome is reported below
    try:
        return Path(hf_hub_download(hub_id, filename, revision=revision))
    except GatedRepoError as error:
        raise HarnessError(
            f"{where}: this repository is gated. Accept its licence on its page, then log in: `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise HarnessError(f"{where}: this revision is not on the hub any more. {_ADVICE}") from error
    except LocalEntryNotFoundError as error:
        raise HarnessError(f"{where}: not in the cache, and the hub cannot be reached. {_ADVICE}") from error
    except RepositoryNotFoundError as error:
        raise HarnessError(f"{where}: not found on the hub. {_ADVICE}") from error
    except EntryNotFoundError:
        raise
    except (HfHubHTTPError, OSError) as error:
        raise HarnessError(f"{where}: the download failed ({str(error).splitlines()[0]}). {_ADVICE}") from error


def _checked(path: Path, expected: str | None, origin: str, key: str) -> Checkpoint:
    found = file_hash(path, "sha256")
    if expected is not None and not (len(expected) >= 6 and found.startswith(expected.lower())):
        raise HarnessError(
            f"{path}: the sha256 is {found}, {key} expects {expected}."
            " The file is damaged or another version: delete it and fetch it again."
        )
    return Checkpoint(path, found, origin)


def read_state_dict(path: Path) -> StateDict:
    """Read tensors from .safetensors, .npz, detectron2's .pkl, or a torch file, without running any code in it.

    Tensors of safetensors and torch files are mapped, not read: all ranks of a node share the pages of one file.

    The wrappers of training frameworks (``state_dict``, ``model``, ``model_state_dict``) are opened.

    Raises:
        HarnessError: the file is damaged, or holds pickled code.
    """
    if path.name.endswith(INDEX):
        return {k: v for shard in shards(path) for k, v in read_state_dict(path.with_name(shard)).items()}
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise HarnessError(f"{path}: not a whole safetensors file ({error}). Fetch it again.") from error
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.suffix == ".pkl":
        return _read_pickle(path)
    if path.suffix == ".zip":
        path = _unpacked(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        with path.open("rb") as file:
            head = file.read(2)
        if head != b"PK" and head[:1] != b"\x80":  # neither torch's zip nor a pickle
            raise HarnessError(
                f"{path}: not a torch file. Expected .safetensors, or a .pth or .bin of tensors."
            ) from error
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line), "pickled objects")
        raise HarnessError(
            f"{path}: this file holds more than tensors ({reason.strip()}): loading it would run code from it."
            " Convert it to safetensors where you trust it, and give that file."
        ) from error
    except Exception as error:  # its restricted unpickler is a stack machine, and a damaged file any program for it
        raise HarnessError(
            f"{path}: not a readable torch file ({str(error).splitlines()[0] if str(error) else 'empty'})."
            " It may be cut off: fetch it again."
        ) from error
    return _state_dict(content, path)


def _unpacked(archive: Path) -> Path:
    """Unpack the only weight file of an archive beside it, once, and return where it is."""
    try:
        with zipfile.ZipFile(archive) as content:
            names = [n for n in content.namelist() if n.endswith((".pth", ".pth.tar", ".pt", ".bin"))]
            if len(names) != 1:
                raise HarnessError(
                    f"{archive}: holds {len(names)} weight files (.pth, .pth.tar, .pt, .bin), expected one."
                )
            target = archive.with_name(f"{archive.name}.{Path(names[0]).name}")  # never a folder from the archive
            with FileLock(str(target) + ".lock"):
                if not target.exists():
                    with replaced(target) as part, content.open(names[0]) as source, part.open("wb") as out:
                        shutil.copyfileobj(source, out, 1 << 20)
    except (zipfile.BadZipFile, OSError, EOFError, zlib.error) as error:
        raise HarnessError(
            f"{archive}: cannot be unpacked ({error}). Fetch it again, or unpack it yourself."
        ) from error
    return target


def _state_dict(content: Any, path: Path) -> StateDict:
    """Open the wrappers around a state_dict."""
    for wrapper in ("state_dict", "model", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise HarnessError(f"{path}: holds no state_dict (a mapping from names to tensors).")
    if all(key.startswith("module.") for key in content):  # saved from DataParallel
        return {key.removeprefix("module."): value for key, value in content.items()}
    return dict(content)


def _read_npz(path: Path) -> StateDict:
    """Read numpy's archive, such as big_vision's; bfloat16 is kept there as two raw bytes."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {key: _from_numpy(arrays[key]) for key in arrays.files}
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise HarnessError(f"{path}: not a whole .npz of arrays ({str(error).splitlines()[0]}).") from error


def _from_numpy(array: np.ndarray[Any, Any]) -> Tensor:
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).float()
    return torch.from_numpy(np.ascontiguousarray(array))


_ARRAYS_ONLY = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),  # how Python 2's byte strings are kept
}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of dicts, lists, numbers, strings and numpy arrays; anything else is refused by name."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        super().__init__(file, encoding="latin1")  # detectron2's model zoo was written by Python 2 and 3
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        """Return the few functions that arrays need."""
        if (module, name) not in _ARRAYS_ONLY:
            raise HarnessError(
                f"{self.path}: this pickle names {module}.{name}; only numpy arrays are read from pickles, as anything"
                " else would run code from the file. Convert it to safetensors where you trust it."
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
        raise HarnessError(f"{path}: not a whole pickle ({type(error).__name__}: {error}). Fetch it again.") from error
    found = content.get("model", content) if isinstance(content, Mapping) else {}
    arrays = {str(k): _from_numpy(np.asarray(v)) for k, v in found.items() if isinstance(v, np.ndarray | np.generic)}
    if not arrays or len(arrays) != len(found):
        raise HarnessError(f"{path}: holds no mapping from names to arrays.")
    return arrays


def load_strictly(
    module: nn.Module,
    state: StateDict,
    origin: str,
    allow_missing: Sequence[str],
    allow_unexpected: Sequence[str],
) -> None:
    """Load every key.

    The module takes the tensors of `state` for its own (which are pages of the file, read when they are needed), so
    there is no second copy of them in memory.

    Raises:
        HarnessError: a missing, unexpected or differently shaped key that no pattern allows.
    """
    own = module.state_dict()
    shapes = [
        f"{key} {list(state[key].shape)} (the model has {list(own[key].shape)})"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
    require_all_keys(origin, missing, unexpected, shapes, allow_missing, allow_unexpected, len(state))
    taken = {k: v.to(own[k].dtype) for k, v in state.items() if k in own}  # no copy where the dtype is the same
    module.load_state_dict(taken, strict=False, assign=True)


_left_random: ContextVar[list[str] | None] = ContextVar("left_random", default=None)


@contextmanager
def noting_random_keys() -> Iterator[list[str]]:
    """Collect the model's keys that no file has filled, from all that is loaded in this context."""
    found: list[str] = []
    token = _left_random.set(found)
    try:
        yield found
    finally:
        _left_random.reset(token)


def require_all_keys(
    origin: str,
    missing: Iterable[str],
    unexpected: Iterable[str],
    shapes: Sequence[str],
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    of_file: int | None = None,
) -> None:
    """Raise HarnessError unless every key was used; patterns are shell style (``auxiliary_head.*``).

    Args:
        origin: how messages call the file.
        missing: keys of the model that the file does not have.
        unexpected: keys of the file that the model does not have.
        shapes: keys of both that differ in shape.
        allow_missing: patterns; what they allow is collected by :func:`noting_random_keys`.
        allow_unexpected: patterns.
        of_file: number of the file's keys, if it is known: of less than half a file nothing can be concluded,
            whatever is allowed.
    """
    missing, unexpected = list(missing), list(unexpected)
    unused = len(unexpected) + len(shapes)
    wrong_missing, wrong_unexpected = _not_allowed(missing, allow_missing), _not_allowed(unexpected, allow_unexpected)
    if wrong_missing or wrong_unexpected or shapes:
        parts = [
            f"{len(keys)} {what}: {', '.join(keys[:6])}{', ...' if len(keys) > 6 else ''}"
            for what, keys in (
                ("missing", wrong_missing),
                ("unexpected", wrong_unexpected),
                ("of another shape", list(shapes)),
            )
            if keys
        ]
        advice = "Choose the model that the file was made for."
        if not wrong_missing and not shapes:
            advice += " Keys that take no part in the forward can be named in model.allow_unexpected_keys."
        raise HarnessError(f"{origin}: these weights do not fit the model. {'; '.join(parts)}. {advice}")
    if of_file is not None and 2 * (of_file - unused) < of_file:
        raise HarnessError(
            f"{origin}: {of_file - unused} of the file's {of_file} keys are the model's, such as it has"
            f" {', '.join(sorted(unexpected)[:3])}. That is another model's file, whatever model.allow_unexpected_keys"
            " allows."
        )
    collected = _left_random.get()
    if collected is not None:
        collected += sorted(missing)


def _not_allowed(keys: Iterable[str], patterns: Sequence[str]) -> list[str]:
    return sorted(k for k in keys if not any(fnmatch.fnmatchcase(k, p) for p in patterns))
