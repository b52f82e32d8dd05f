"""Make, name and continue run directories; nothing of another run is ever overwritten."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import time
import uuid
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from ade_harness.config.fields import PATHS
from ade_harness.errors import HarnessError
from ade_harness.files.atomic import json_safe
from ade_harness.files.documents import checked, read_json
from ade_harness.files.escapes import escaped
from ade_harness.files.reading import expanded
from ade_harness.runs.shapes import MANIFEST as MANIFEST_SHAPE

MANIFEST = "manifest.json"
LEDGER = "ledger"
LOGS = "logs"
PROGRESS = "progress.json"
LOSS = "loss.jsonl"
"""Losses of a training: a line of JSON for each logged iteration."""
SAVED = "saved.json"
"""In a training's manifest: the step of its saved state."""
PROBE = "probe"
"""``kind`` in the manifest of a training; an evaluation's has none."""
SCHEMA_VERSION = 1
_SEEN_WITHIN_S = 30.0


def new_run_name(model: str, now: datetime | None = None) -> str:
    """Return ``<date-time>_<model>_<short id>``; two runs of one second differ in the id."""
    stamp = (now or datetime.now()).strftime("%Y%m%d-%H%M%S")
    return f"{stamp}_{re.sub(r'[^A-Za-z0-9.-]+', '-', model)}_{uuid.uuid4().hex[:6]}"


def make_run_dir(directory: str | None, root: str, model: str) -> Path:
    """Create a run directory, or find the one to continue; nothing in it is changed.

    Args:
        directory: ``run.dir``; None makes a new name below `root`.
        root: ``run.root``.
        model: part of the new name.

    Raises:
        HarnessError: it cannot be written, or is something else than a run.
    """
    path = expanded(directory) if directory else expanded(root) / new_run_name(model)
    try:
        path.mkdir(parents=True, exist_ok=directory is not None)
        if not is_new(path) and not (path / MANIFEST).is_file():
            raise HarnessError(
                f"run.dir={path}: this folder is not empty and is not a run directory. Nothing was changed."
            )
        _refuse_links(path)
        probe = path / f".writable-{uuid.uuid4().hex[:8]}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise HarnessError(
            f"{path}: the run directory cannot be written ({error.strerror or error})."
            " Choose another: run.dir=PATH or run.root=PATH."
        ) from error
    return path


def _refuse_links(path: Path) -> None:
    """Refuse a run directory in which a link or a pipe has the name of something that is written.

    What goes on in somebody else's run directory would be written wherever their link points.
    """
    inside = [*path.iterdir(), path / "wandb" / ".session"]  # wandb itself makes links below its own folder
    for folder in (path / LOGS, path / "ledger", *(path / "wandb").glob("data-*")):
        inside += [folder, *(folder.iterdir() if folder.is_dir() and not folder.is_symlink() else ())]
    for images in ("label_maps", "overlays"):  # whose files may lie in folders of their own
        inside += [Path(where) / n for where, folders, files in os.walk(path / images) for n in (*folders, *files)]
    for entry in inside:
        if entry.is_symlink() or (os.path.lexists(entry) and not (entry.is_file() or entry.is_dir())):
            raise HarnessError(
                f"{escaped(str(entry))}: is a link, or neither a file nor a folder. What the run writes there would be"
                " elsewhere: put the file or folder itself in its place."
            )


def wait_to_see(path: Path) -> None:
    """Wait until a run directory that another rank has made can be seen here; network file systems take their time.

    Raises:
        HarnessError: it does not come.
    """
    end = time.monotonic() + _SEEN_WITHIN_S
    while not (path / MANIFEST).is_file():
        if time.monotonic() > end:
            raise HarnessError(
                f"the run directory {path} cannot be seen from here. All nodes need one file system: give run.dir=PATH."
            )
        time.sleep(0.2)


def is_new(path: Path) -> bool:
    """Whether a directory holds nothing, or only what a kill left behind before there was a manifest.

    A log that this process writes there does not count: Hydra opens it first (``hydra/job_logging=default``).
    """
    handlers = logging.getLogger().handlers
    logs = {LOGS, *(Path(h.baseFilename).name for h in handlers if isinstance(h, logging.FileHandler))}
    return all(entry.name.startswith(".") or entry.name in logs for entry in path.iterdir())


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a run directory.

    Raises:
        HarnessError: there is none, or it is damaged, or of another version.
    """
    manifest = path / MANIFEST
    if not os.path.lexists(manifest):
        shown, below = escaped(str(path)), next(path.glob(f"*/{MANIFEST}"), None) if path.is_dir() else None
        where = f" Runs are below it: `python -m ade_harness runs {shlex.quote(shown)}` lists them." if below else ""
        there = f"holds no run (no {MANIFEST})" if path.exists() else "no such folder"
        raise HarnessError(f"{shown}: {there}.{where}")
    content: dict[str, Any] = read_json(manifest, {"schema": int})
    version = content["schema"]
    if version != SCHEMA_VERSION:
        raise HarnessError(
            f"{path}: a run of another version of this package (schema {version}, this one reads {SCHEMA_VERSION})."
            " Continue it with the version that started it, or start a new run."
        )
    checked(content, MANIFEST_SHAPE, str(manifest))
    return content


_PROSE = (
    "model.label", "model.about.", "model.parity.", "model.published.", "model.missing", "model.protocols.",
    "model.probe", "model.official.license", "model.hub.license", "model.backbone.license", "inference.source",
)  # fmt: skip
"""Keys of an identity that describe a run and decide no number in it."""
_DECIDE_NOTHING = (*PATHS, "dataset.check_headers", "dataset.name")
"""Where files lie, how early they are looked at, and what a data set is called: hashes of files, ids and classes are
compared instead."""
_SECTION = re.compile(r"^model\.architecture\.(backbone|adapter|head)\.")
"""Configurations of before sections had the same fields without them."""


def decisive(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of an identity decides numbers, by keys that all versions share."""
    plain: dict[str, Any] = json_safe(dict(identity))
    places = {*_DECIDE_NOTHING, *(["checkpoint.origin"] if plain.get("checkpoint.sha256") is not None else [])}
    kept = {key: v for key, v in plain.items() if not key.startswith(_PROSE) and key not in places}
    return {_SECTION.sub("model.architecture.", key): value for key, value in kept.items()}


IN_MEMORY = "in the memory of a Python process"
"""How the origin of a model ends that no command can make again."""


def is_of_memory(manifest: Mapping[str, Any]) -> bool:
    """Whether a run's model was an object of the process that evaluated it."""
    return str((manifest.get("model") or {}).get("origin", "")).endswith(IN_MEMORY)


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Return what decides numbers and differs between two identities (configuration, hashes, code), one line each."""
    before, now = decisive(first), decisive(second)
    return [
        f"{key}: was {_short(old)}, is {_short(new)}"
        for key in sorted(before.keys() | now.keys())
        if (old := before.get(key)) != (new := now.get(key))
    ]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
