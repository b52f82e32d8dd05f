"""Find, check, read and load weight files: never by running code from a file, never with keys left over."""

from __future__ import annotations

import fnmatch
import logging
import pickle
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ade_harness.data.download import file_hash
from ade_harness.errors import HarnessError

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A weight file on this machine, and where it came from."""

    path: Path
    sha256: str
    origin: str
    """The file's path as given, or ``hub id @ revision / file name``."""


def local_checkpoint(path: str, sha256: str | None) -> Checkpoint:
    """Check a weight file given by the user.

    Raises:
        HarnessError: it is not there, or its hash is not the expected one.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise HarnessError(f"model.checkpoint={path}: no such file.")
    return _checked(file, sha256, str(file), "model.checkpoint_sha256")


def hub_checkpoint(hub_id: str, filename: str, revision: str | None, sha256: str | None) -> Checkpoint:
    """Fetch a weight file from the hub into its cache (resumed, and reused without network once it is there).

    Raises:
        HarnessError: no network, no such file, a gated repository, or a wrong hash.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{hub_id}{'@' + revision if revision else ''}/{filename}"
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # its retries; the outcome is reported below
    advice = "Download it elsewhere and give model.checkpoint=PATH, or try without weights: model.weights=random."
    try:
        path = Path(hf_hub_download(hub_id, filename, revision=revision))
    except GatedRepoError as error:
        raise HarnessError(
            f"{where}: this repository is gated. Accept its licence on its page, then log in: `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise HarnessError(f"{where}: this revision is not on the hub any more. {advice}") from error
    except LocalEntryNotFoundError as error:
        raise HarnessError(f"{where}: not in the cache, and the hub cannot be reached. {advice}") from error
    except (RepositoryNotFoundError, EntryNotFoundError) as error:
        raise HarnessError(f"{where}: not found on the hub. {advice}") from error
    except (HfHubHTTPError, OSError) as error:
        raise HarnessError(f"{where}: the download failed ({str(error).splitlines()[0]}). {advice}") from error
    parts = path.parts  # the cache's snapshot folder is named by the commit
    commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts else revision
    return _checked(path, sha256, f"{hub_id}@{commit}/{filename}", "model.hub.sha256")


def _checked(path: Path, expected: str | None, origin: str, key: str) -> Checkpoint:
    found = file_hash(path, "sha256")
    if expected is not None and found != expected.lower():
        raise HarnessError(
            f"{path}: the sha256 is {found}, {key} expects {expected}."
            " The file is damaged or another version: delete it and fetch it again."
        )
    return Checkpoint(path, found, origin)


def read_state_dict(path: Path) -> StateDict:
    """Read tensors from .safetensors, or from a torch file without running any code in it.

    The tensors are mapped, not read: all ranks of a node share the pages of one file.

    The wrappers of training frameworks (``state_dict``, ``model``, ``model_state_dict``) are opened.

    Raises:
        HarnessError: the file is damaged, or holds pickled code.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise HarnessError(f"{path}: not a whole safetensors file ({error}). Fetch it again.") from error
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
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise HarnessError(
            f"{path}: not a readable torch file ({str(error).splitlines()[0] if str(error) else 'empty'})."
            " It may be cut off: fetch it again."
        ) from error
    for wrapper in ("state_dict", "model", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise HarnessError(f"{path}: holds no state_dict (a mapping from names to tensors).")
    if all(key.startswith("module.") for key in content):  # saved from DataParallel
        return {key.removeprefix("module."): value for key, value in content.items()}
    return dict(content)


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
    require_all_keys(origin, missing, unexpected, shapes, allow_missing, allow_unexpected)
    taken = {k: v.to(own[k].dtype) for k, v in state.items() if k in own}  # no copy where the dtype is the same
    module.load_state_dict(taken, strict=False, assign=True)


def require_all_keys(
    origin: str,
    missing: Iterable[str],
    unexpected: Iterable[str],
    shapes: Sequence[str],
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> None:
    """Raise HarnessError unless every key was used; patterns are shell style (``auxiliary_head.*``)."""
    missing = _not_allowed(missing, allow_missing)
    unexpected = _not_allowed(unexpected, allow_unexpected)
    if missing or unexpected or shapes:
        parts = [
            f"{len(keys)} {what}: {', '.join(keys[:6])}{', ...' if len(keys) > 6 else ''}"
            for what, keys in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("of another shape", list(shapes)),
            )
            if keys
        ]
        raise HarnessError(
            f"{origin}: these weights do not fit the model. {'; '.join(parts)}."
            " Choose the model that the file was made for, or list keys that may differ in"
            " model.allow_missing_keys / model.allow_unexpected_keys."
        )


def _not_allowed(keys: Iterable[str], patterns: Sequence[str]) -> list[str]:
    return sorted(k for k in keys if not any(fnmatch.fnmatchcase(k, p) for p in patterns))
