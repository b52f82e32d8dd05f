"""Make, name and continue run directories; nothing of another run is ever overwritten."""

from __future__ import annotations

import json
import math
import os
import re
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any

from ade_harness.errors import HarnessError

MANIFEST = "manifest.json"
LEDGER = "ledger"


def new_run_name(model: str, now: datetime | None = None) -> str:
    """Return ``<date-time>_<model>_<short id>``; two runs of one second differ in the id."""
    stamp = (now or datetime.now()).strftime("%Y%m%d-%H%M%S")
    return f"{stamp}_{re.sub(r'[^A-Za-z0-9.-]+', '-', model)}_{uuid.uuid4().hex[:6]}"


def open_run(directory: str | None, root: str, model: str, identity: dict[str, Any]) -> tuple[Path, bool]:
    """Create a run directory, or open the one to continue.

    Args:
        directory: ``run.dir``; None makes a new name below `root`.
        root: ``run.root``.
        model: part of the new name.
        identity: what decides the result (configuration, hashes, code); a continued run must have the same.

    Returns:
        The directory, and whether it is continued.

    Raises:
        HarnessError: it cannot be written, is something else than a run, or is a run of something else.
    """
    path = Path(directory).expanduser() if directory else Path(root).expanduser() / new_run_name(model)
    try:
        if path.is_dir() and any(not entry.name.startswith(".") for entry in path.iterdir()):  # not just leftovers
            _check_same(path, identity)
            return path, True
        path.mkdir(parents=True, exist_ok=directory is not None)
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise HarnessError(
            f"{path}: the run directory cannot be written ({error.strerror or error})."
            " Choose another: run.dir=PATH or run.root=PATH."
        ) from error
    return path, False


def _check_same(path: Path, identity: dict[str, Any]) -> None:
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise HarnessError(f"run.dir={path}: this folder is not empty and holds no run. Nothing was changed.")
    try:
        before = json.loads(manifest.read_text())["identity"]
    except (ValueError, KeyError) as error:
        raise HarnessError(f"{manifest}: damaged, or of another version. Start a new run.") from error
    now = _json_safe(identity)
    differences = [
        f"{key}: was {_short(old)}, is {_short(new)}"
        for key in sorted(before.keys() | now.keys())
        if (old := before.get(key)) != (new := now.get(key))
    ]
    if differences:
        raise HarnessError(
            f"run.dir={path} holds a run of something else, so it is not continued. Different: "
            + "; ".join(differences[:8])
            + ". Choose another run.dir."
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(value, dict) and value:
            flat.update(flatten(value, name))
        else:
            flat[name] = value
    return flat


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either whole or not there.

    Raises:
        HarnessError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise HarnessError(f"{path}: cannot be written ({error.strerror or error}).") from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON as :func:`write_text` does; what JSON cannot hold (NaN, infinities) becomes text."""
    write_text(path, json.dumps(_json_safe(content), indent=2, allow_nan=False) + "\n")


def _json_safe(content: Any) -> Any:
    if isinstance(content, dict):
        return {str(k): _json_safe(v) for k, v in content.items()}
    if isinstance(content, list | tuple):
        return [_json_safe(v) for v in content]
    return str(content) if isinstance(content, float) and not math.isfinite(content) else content
