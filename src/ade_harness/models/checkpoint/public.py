"""Find and fetch weight files: on this machine, at an address, on the hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from filelock import FileLock

from ade_harness.errors import HarnessError
from ade_harness.files.fetch import OnBytes, fetch, file_hash
from ade_harness.files.hub import hub_explained
from ade_harness.files.reading import expanded, require_regular


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
    file = expanded(path)
    if file.is_dir():
        raise HarnessError(f"{key}={path}: is a folder. {_advice_for(file)}")
    require_regular(file, f"{key}={path}")
    digest = None
    if file.name.endswith(INDEX):  # the weights are in the files that it names
        digest = _joined([_hash_of_shard(file.with_name(name), file) for name in shards(file)])
    return _checked(file, sha256, str(file), f"{key}_sha256", digest)


_WEIGHTS = ("head.safetensors", "model.safetensors", "pytorch_model.bin")
_NO_WEIGHTS = ("optimizer", "scheduler", "sampler", "random_states", "rng_state", "state.", "training_args", "scaler")
"""Begins of what trainers write beside weights."""


def _advice_for(folder: Path) -> str:
    """Return how to get one file of weights from what trainers write as folders."""
    names = {entry.name for entry in folder.iterdir()}
    index = next((name for name in sorted(names) if name.endswith(".index.json")), None)
    if index is not None:
        return f"Its shards are read by their index: {folder / index}"
    if "zero_to_fp32.py" in names:
        return "DeepSpeed wrote it: run `python zero_to_fp32.py . OUT` in it, and give a file of OUT."
    if any(name.endswith(".distcp") for name in names):
        return (
            "torch.distributed.checkpoint (FSDP) wrote it: `python -m torch.distributed.checkpoint.format_utils"
            f" dcp_to_torch {folder} OUT.pth`."
        )
    if "config.json" in names:
        return f"transformers wrote it: model=hf model.id={folder}"
    files = [name for name in names if name.endswith((".safetensors", ".pth", ".pt", ".bin", ".ckpt"))]
    files = [name for name in files if not name.startswith(_NO_WEIGHTS)]
    usual = [name for name in _WEIGHTS if name in files]  # else the newest
    files = usual or sorted(files, key=lambda name: -(folder / name).stat().st_mtime_ns)
    return f"Expected a file of weights{f', such as {folder / files[0]}' if files else ''}."


def url_checkpoint(
    url: str, folder: Path, sha256: str | None, on_bytes: OnBytes | None = None, key: str = "model.checkpoint"
) -> Checkpoint:
    """Fetch a weight file into `folder`, once for all ranks of a node; continued after an interruption.

    `key` is the option by which the user can give the file. A file whose content is not known beforehand lies in a
    folder of its address: two addresses may end in one name.

    Raises:
        HarnessError: no network, no such file, or a wrong hash.
    """
    name = Path(unquote(urlsplit(url).path)).name
    name = name if name.strip(".") else "checkpoint"
    if sha256 is None:
        folder = folder / hashlib.sha256(url.encode()).hexdigest()[:16]
    file = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(str(file) + ".lock"):
            if not file.exists():
                fetch(url, file, on_bytes=on_bytes)
    except HarnessError as error:
        raise HarnessError(f"{error} {_advice(key)}") from error
    except OSError as error:
        raise HarnessError(
            f"{folder}: cannot be written ({error.strerror or error}). Set ADE_HARNESS_CACHE to a folder that you own."
        ) from error
    return _checked(file, sha256, url, "the configuration")


def hub_checkpoint(
    hub_id: str, filename: str, revision: str | None, sha256: str | None, key: str = "model.checkpoint"
) -> Checkpoint:
    """Fetch a weight file from the hub into its cache (resumed, and reused without network once it is there).

    Large models are there in several shards with an index: all of them are fetched, and the index is the file. Where
    ``model.safetensors`` is asked for, an older ``pytorch_model.bin`` will do. `key` as of :func:`url_checkpoint`.

    Raises:
        HarnessError: no network, no such file, a gated repository, or a wrong hash.
    """
    from huggingface_hub.errors import EntryNotFoundError

    names = _HUB_FILES if filename == _HUB_FILES[0] else (filename,)
    for name in names:
        try:
            path = _hub_file(hub_id, name, revision, key)
            break
        except EntryNotFoundError as error:
            if name == names[-1]:
                raise HarnessError(
                    f"{_hub_name(hub_id, filename, revision)}: not found on the hub. {_advice(key)}"
                ) from error
    parts = path.parts  # the cache's snapshot folder is named by the commit
    commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts else revision
    origin = f"{hub_id}@{commit}/{path.name}"
    if not path.name.endswith(INDEX):
        return _checked(path, sha256, origin, "model.hub.sha256")
    digests = [file_hash(_hub_file(hub_id, shard, commit, key), "sha256") for shard in shards(path)]
    return _checked(path, sha256, origin, "model.hub.sha256", _joined(digests))


def _joined(digests: Sequence[str]) -> str:
    """Return the sha256 of a checkpoint in several files: of their own, in the order of their names."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _hash_of_shard(shard: Path, index: Path) -> str:
    require_regular(shard, f"{index}: its shard {shard.name}")
    return file_hash(shard, "sha256")


_HUB_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
INDEX = ".index.json"


def _advice(key: str) -> str:
    return f"Download it elsewhere and give {key}=PATH."


def shards(index: Path) -> list[str]:
    """Return the files that an index names.

    Raises:
        HarnessError: it is no index, or names files elsewhere.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not names or any(Path(name).name != name or name.endswith(INDEX) for name in names):
            raise ValueError("it names no files, or files elsewhere, or an index")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HarnessError(f"{index}: not an index of weight files ({error}). Download it again.") from error
    return names


def _hub_name(hub_id: str, filename: str, revision: str | None) -> str:
    return f"{hub_id}{'@' + revision if revision else ''}/{filename}"


def _hub_file(hub_id: str, filename: str, revision: str | None, key: str) -> Path:
    """Fetch one file; raises EntryNotFoundError if the repository has none of that name."""
    from huggingface_hub import hf_hub_download

    with hub_explained(_hub_name(hub_id, filename, revision), _advice(key)):
        return Path(hf_hub_download(hub_id, filename, revision=revision))


def _checked(path: Path, expected: str | None, origin: str, key: str, digest: str | None = None) -> Checkpoint:
    """Compare a file's hash with the expected one; `digest`: of the files that it names, in place of its own."""
    found = digest or file_hash(path, "sha256")
    if expected is not None and not (len(expected) >= 6 and found.startswith(expected.lower())):
        raise HarnessError(
            f"{path}: the sha256 is {found}, {key} expects {expected}."
            " The file is damaged or another version: delete it and fetch it again."
        )
    return Checkpoint(path, found, origin)
