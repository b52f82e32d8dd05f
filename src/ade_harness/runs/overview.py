"""Any number of run directories as one table: finished, running, interrupted and damaged ones."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ade_harness.errors import HarnessError
from ade_harness.files.documents import read_json, read_yaml
from ade_harness.files.reading import expanded
from ade_harness.runs.directory import MANIFEST, read_manifest
from ade_harness.runs.finished import load_run, protocol_text
from ade_harness.runs.progress import state_of
from ade_harness.runs.record import is_own_result, marks_now
from ade_harness.runs.shapes import CONFIG, METRICS

if TYPE_CHECKING:
    import pandas as pd

_DEPTH = 4
"""Folders below the one that is given: sweeps and projects have their own."""


@dataclass(frozen=True)
class RunRow:
    """One run. What is not known is None; scores are fractions 0..1."""

    run: str
    """Its directory."""
    status: str
    """finished, running, incomplete, ..., or damaged with the reason."""
    kind: str
    """evaluation or probe."""
    started: str | None = None
    label: str | None = None
    """The model, as tables call it."""
    model: str | None = None
    checkpoint: str | None = None
    """SHA-256 of the weights' file."""
    dataset: str | None = None
    protocol: str | None = None
    commit: str | None = None
    images: int | None = None
    expected_images: int | None = None
    mIoU: float | None = None
    low: float | None = None
    high: float | None = None
    """Ends of its interval."""
    pixel_accuracy: float | None = None
    mean_accuracy: float | None = None
    mean_dice: float | None = None
    parameters: int | None = None
    flops: int | None = None
    """Floating-point operations for the run's first image."""
    gpu_peak_bytes: int | None = None
    seconds: float | None = None
    marks: str = ""
    """What the score is not: demo, partial, random weights."""


COLUMNS = tuple(field.name for field in fields(RunRow))


def list_runs(folders: Sequence[Path]) -> list[RunRow]:
    """Return the runs in and below some folders, oldest first; one that is damaged is a row that says so.

    Raises:
        HarnessError: a folder that is not there, or no run in any of them.
    """
    folders = [expanded(folder) for folder in folders]
    for folder in folders:
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "no such folder"
            raise HarnessError(f"{folder}: {what}. Give the folder of runs, or of one run.")
    found = dict.fromkeys(path for folder in folders for path in _directories(folder, _DEPTH))
    if not found:
        raise HarnessError(f"{', '.join(map(str, folders))}: contains no run (no {MANIFEST}).")
    return sorted((_row(path) for path in found), key=lambda row: (row.started or "", row.run))


def runs(*folders: str | Path) -> pd.DataFrame:
    """Return a table of all runs below some folders, by default ``runs``; oldest first.

    Returns:
        One row each, with the fields of :class:`RunRow` as columns.

    Raises:
        HarnessError: a folder that is not there, or no run in any.
    """
    import pandas as pd

    for folder in folders:
        if not isinstance(folder, str | os.PathLike):
            raise HarnessError(f"runs: {type(folder).__name__} given, expected folders: runs('a', 'b').")
    paths = [Path(folder) for folder in folders or ("runs",)]
    return pd.DataFrame([asdict(row) for row in list_runs(paths)], columns=list(COLUMNS))


def _directories(folder: Path, depth: int) -> Iterator[Path]:
    """Yield run directories; what is inside one is not searched."""
    if (folder / MANIFEST).is_file():
        yield folder
    elif depth:
        try:
            below = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
        except OSError:
            return
        for path in below:
            yield from _directories(Path(path), depth - 1)


def _row(path: Path) -> RunRow:
    try:
        manifest = read_manifest(path)
        config = read_yaml(path / "config.yaml", CONFIG) if (path / "config.yaml").exists() else {}
        finished = manifest.get("status") == "finished" and manifest.get("kind") != "probe"
        metrics = read_json(path / "metrics.json", METRICS) if finished else {}
        if finished and not is_own_result(path, manifest):
            load_run(path)  # whether its ledger sums to its scores
    except HarnessError as error:
        return RunRow(str(path), f"damaged: {error}", "?")
    model, dataset = manifest.get("model", {}), manifest.get("dataset", {})
    interval: dict[str, Any] = (metrics.get("intervals") or {}).get("mIoU") or {}
    of_config = config.get("model", {})
    return RunRow(
        run=str(path),
        status=state_of(path, str(manifest.get("status", "?"))),
        kind="probe" if manifest.get("kind") == "probe" else "evaluation",
        started=manifest.get("started"),
        label=of_config.get("label") or of_config.get("name"),
        model=of_config.get("name") or model.get("name"),
        checkpoint=model.get("sha256") or model.get("state_sha256"),  # of a network in memory
        dataset=dataset.get("name"),
        protocol=protocol_text(config.get("inference", {}).get("name"), metrics.get("protocol_changes") or []),
        commit=manifest.get("code", {}).get("commit"),
        images=metrics.get("images"),
        expected_images=dataset.get("expected_images"),
        mIoU=metrics.get("mIoU"),
        low=interval.get("low"),
        high=interval.get("high"),
        pixel_accuracy=metrics.get("pixel_accuracy"),
        mean_accuracy=metrics.get("mean_accuracy"),
        mean_dice=metrics.get("mean_dice"),
        parameters=metrics.get("parameters"),
        flops=metrics.get("flops"),
        gpu_peak_bytes=metrics.get("gpu_peak_bytes"),
        seconds=manifest.get("timings", {}).get("seconds"),
        marks="; ".join(marks_now(path, manifest)),
    )
