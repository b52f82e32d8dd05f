"""How far a running job is, read from its directory by another process."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from ade_harness.errors import HarnessError
from ade_harness.files.documents import MAX_TEXT_BYTES, checked, parse_json, read_json
from ade_harness.files.reading import read_regular
from ade_harness.runs.directory import LOSS, PROGRESS
from ade_harness.runs.lock import LOCK, at_work, read_lock
from ade_harness.runs.shapes import PROGRESS as PROGRESS_SHAPE


def read_progress(path: Path) -> dict[str, Any] | None:
    """Return the content of progress.json, None if there is none or it cannot be read.

    It is written often, and the ledger says what is saved.
    """
    try:
        content: dict[str, Any] = read_json(path / PROGRESS, PROGRESS_SHAPE)
        has_zone = datetime.fromisoformat(content["updated"]).tzinfo is not None  # else it is no age
    except (HarnessError, ValueError):
        return None
    return content if has_zone else None


def state_of(path: Path, status: str) -> str:
    """Return a manifest's status, but ``interrupted`` for a run on which nobody works any more.

    Args:
        path: the run directory.
        status: by its manifest.
    """
    if status == "running" and not at_work(read_lock(path / LOCK), read_progress(path)):
        return "interrupted"
    return status


def read_losses(path: Path, first: int = 0) -> list[dict[str, Any]]:
    """Return the rows of a training's loss.jsonl: ``step``, ``loss`` and what else was measured there.

    A row that is being written has no end yet, and is left out.

    Args:
        path: the run directory.
        first: rows to leave out at the beginning; below 0 counts from the end.

    Raises:
        HarnessError: a row is damaged.
    """
    file = path / LOSS
    lines = read_regular(file, MAX_TEXT_BYTES).split(b"\n")[:-1] if file.exists() else []
    shape = {"step": int, "loss?": float}
    return [checked(parse_json(line.decode("utf-8", "replace"), str(file)), shape, str(file)) for line in lines[first:]]
