"""Get a run back from Weights & Biases: its ledger artifact is a run directory that can be read."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ade_harness.errors import HarnessError
from ade_harness.files.fetch import cache_dir
from ade_harness.runs.finished import load_run
from ade_harness.tracking.upload import has_key, limits

PREFIX = "wandb:"
_WORD = re.compile(r"(?!\.+$)[\w.-]{1,128}")
_FILES = re.compile(r"manifest\.json|config\.yaml|metrics\.json|per_class\.csv|ledger/(?!\.)[\w.-]+\.parquet")
_TIMEOUT_S = 15


def pull_run(spec: str) -> Path:
    """Download the ledger artifact of a W&B run into the cache, unless this version of it is there.

    Args:
        spec: ``wandb:entity/project/run_id``.

    Returns:
        A folder that :func:`ade_harness.runs.finished.load_run` reads.

    Raises:
        HarnessError: a bad address, no key, no such run, a run without a ledger, a server that does not answer, an
            artifact that holds other files than a ledger, or a ledger that is damaged.
    """
    entity, project, run_id = parse_spec(spec)
    if not has_key():
        raise HarnessError(f"{spec}: no key of W&B. Set WANDB_API_KEY or run `wandb login`.")
    with limits():
        return _pull(spec, entity, project, run_id)


def parse_spec(spec: str) -> tuple[str, str, str]:
    """Return entity, project and run id.

    Raises:
        HarnessError: it is not of the form ``wandb:entity/project/run_id``.
    """
    parts = spec.removeprefix(PREFIX).split("/")
    if len(parts) != 3 or not spec.startswith(PREFIX) or not all(_WORD.fullmatch(part) for part in parts):
        raise HarnessError(f"{spec}: expected wandb:entity/project/run_id, as in the address of a run's page.")
    return parts[0], parts[1], parts[2]


def refuse_other_files(spec: str, entries: Iterable[tuple[str, str | None]]) -> None:
    """Refuse an artifact that would write anything but a run directory's own files.

    Args:
        spec: for the message.
        entries: path and reference (None: the artifact has the file itself) of each file.

    Raises:
        HarnessError: names the first file that is not a ledger's.
    """
    for path, reference in entries:
        if not _FILES.fullmatch(path) or reference is not None:
            raise HarnessError(
                f"{spec}: its ledger artifact holds {path!r}, which is not a ledger file. Nothing was downloaded."
            )


def _pull(spec: str, entity: str, project: str, run_id: str) -> Path:
    import wandb
    from wandb.errors import Error

    path = f"{entity}/{project}/ledger-{run_id}:latest"
    try:
        api = wandb.Api(timeout=_TIMEOUT_S)
        artifact = api.artifact(path)
        entries = [(str(entry.path), entry.ref) for entry in artifact.manifest.entries.values()]
        refuse_other_files(spec, entries)
        name = re.sub(r"[^\w.-]+", "-", str(artifact.metadata.get("run") or "")).strip(".")[:128] or run_id
        base = cache_dir() / "wandb" / entity / project / run_id
        folder = base / f"{artifact.version}-{artifact.digest[:12]}" / name
        if not folder.is_dir():
            _download(artifact, folder)
    except HarnessError:
        raise
    except OSError as error:
        raise HarnessError(f"{spec}: cannot be stored in {cache_dir()} ({error.strerror or error}).") from error
    except (Error, ValueError, TimeoutError, RuntimeError) as error:
        raise HarnessError(_explain(spec, entity, project, run_id, error)) from error
    try:
        load_run(folder)
    except HarnessError as error:
        shutil.rmtree(folder, ignore_errors=True)  # the next attempt downloads it again
        raise HarnessError(f"{spec}: its ledger artifact cannot be read: {error}") from error
    return folder


def _download(artifact: Any, folder: Path) -> None:
    """Fetch all files into a folder of another name, which gets its own only when it is whole."""
    part = folder.with_name(f".{uuid.uuid4().hex[:8]}.part")
    part.mkdir(parents=True)
    try:
        artifact.download(root=str(part), skip_cache=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _explain(spec: str, entity: str, project: str, run_id: str, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if re.search(r"\b401\b|permission denied|unauthori[sz]ed|not authenticated|Invalid API key", reason, re.IGNORECASE):
        return f"{spec}: W&B does not accept the key ({reason}). Run `wandb login --relogin`."
    if re.search(r"\b404\b|not found|could not find|does not exist", reason, re.IGNORECASE):
        if _has_run(entity, project, run_id):
            return f"{spec}: this run has no artifact ledger-{run_id}: it failed, or another program has logged it."
        return f"{spec}: W&B has no such run ({reason}). The run id is the last part of the address of its page."
    return f"{spec}: W&B does not answer ({reason}). Try again later, or compare run directories."


def _has_run(entity: str, project: str, run_id: str) -> bool:
    import wandb

    try:
        wandb.Api(timeout=_TIMEOUT_S).run(f"{entity}/{project}/{run_id}")
    except Exception:  # of several types; either way there is nothing to read
        return False
    return True
