"""How far a run is, read from its directory alone: from any shell, on any machine that sees it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ade_harness.cli.answer import Answer
from ade_harness.files.documents import checked, read_json
from ade_harness.files.escapes import one_line
from ade_harness.files.reading import expanded
from ade_harness.runs.directory import LEDGER, MANIFEST, PROBE, SAVED, read_manifest
from ade_harness.runs.finished import load_run
from ade_harness.runs.ledger import read_rows
from ade_harness.runs.lock import LOCK, at_work, owner_state, read_lock
from ade_harness.runs.progress import read_losses, read_progress
from ade_harness.runs.record import marks_now, read_config
from ade_harness.runtime.console import make_console, percent, print_fact, print_line
from ade_harness.runtime.notes import resume_command
from ade_harness.runtime.progress_bar import format_seconds


def run_status(options: argparse.Namespace) -> Answer:
    """Print the state of one run directory.

    Raises:
        HarnessError: it holds no run.
    """
    console = make_console()
    path = expanded(options.run)
    manifest = read_manifest(path)
    if manifest.get("kind") == PROBE:
        return _probe_status(console, path, manifest)
    checked(manifest, {"dataset": {"images": int}}, str(path / MANIFEST))
    progress = read_progress(path)
    total = manifest["dataset"]["images"]
    holder = read_lock(path / LOCK)
    state = run_state(manifest.get("status") or "running", holder, progress)
    run = load_run(path) if state == "finished" else None  # whose ledger sums to its scores
    marks = marks_now(path, manifest)
    rows, damaged = (run.rows, []) if run is not None else read_rows(path / LEDGER)
    miou = None if run is None else run.metrics["mIoU"]
    for mark in marks:
        print_line(console, one_line(mark), style="bold yellow")
    print_fact(console, "state", state)
    print_fact(console, "saved", f"{len(rows)} of {total} images" + (f", {len(damaged)} damaged files" * bool(damaged)))
    for image_id, why in list((manifest.get("failures") or {}).items())[:5]:
        print_fact(console, "failed", why if image_id in why else f"{image_id}: {why}")
    if state.startswith("running") and progress:
        left = progress.get("seconds_left")
        print_fact(
            console,
            "progress",
            f"{progress['done']} of {progress['images']} images, {progress['images_per_second']:.1f} images/s,"
            f" {'unknown' if left is None else format_seconds(left)} left",
        )
        for warning in progress["warnings"]:
            print_line(console, f"warning: {one_line(warning)}", style="yellow")
        console.print(_ranks(progress["ranks"]))
    elif miou is not None:
        print_fact(console, "mIoU", percent(miou))
    else:
        print_fact(console, "continue", resume_command(path))
    content = {
        "run": str(path), "state": state, "saved": len(rows), "images": total, "damaged_files": len(damaged),
        "progress": progress if state.startswith("running") else None, "mIoU": miou,
        "marks": marks, "failures": dict(manifest.get("failures") or {}),
    }  # fmt: skip
    return Answer(content)


def _probe_status(console: Console, path: Path, manifest: dict[str, Any]) -> Answer:
    """Print the state of a training; the manifests of older ones have `finished` and no status."""
    status = manifest.get("status") or ("finished" if manifest.get("finished") else "running")
    state = run_state(status, read_lock(path / LOCK), None)
    last = (read_losses(path, -1) or [{"step": 0, "loss": None}])[0]
    for mark in manifest.get("marks") or ():
        print_line(console, one_line(mark), style="bold yellow")
    print_fact(console, "state", state)
    checked(manifest, {"identity": {"probe.iterations?": int}}, str(path / MANIFEST))
    old = manifest["identity"].get("probe.iterations")  # of a version that kept the configuration there too
    total = old if old is not None else _iterations(path, manifest)
    file = path / SAVED  # trainings of earlier versions have none, and those that have not saved yet
    saved = read_json(file, {"step": int})["step"] if file.exists() and state != "finished" else last["step"]
    print_fact(console, "trained" if state == "finished" else "saved", f"{saved:,} of {total:,} iterations")
    progress = read_progress(path) if state.startswith("running") else None
    if progress is not None:
        left = progress.get("seconds_left")
        print_fact(
            console,
            "progress",
            f"{progress['done']:,} iterations, {progress['images_per_second']:.2f} iterations/s,"
            f" {'unknown' if left is None else format_seconds(left)} left",
        )
    if last["loss"] is not None:
        print_fact(console, "loss", f"{last['loss']:.4f}")
    if not state.startswith(("running", "finished")):
        print_fact(console, "continue", resume_command(path))
    content = {
        "run": str(path),
        "state": state,
        "iterations": saved,
        "of": total,
        "loss": last["loss"],
        "progress": progress,
        "marks": list(manifest.get("marks") or ()),
    }
    return Answer(content)


def _iterations(path: Path, manifest: dict[str, Any]) -> int:
    checked(manifest, {"config_sha256": str}, str(path / MANIFEST))
    content = checked(read_config(path, manifest), {"probe": {"iterations": int}}, str(path / "config.yaml"))
    return int(content["probe"]["iterations"])


def run_state(status: str, holder: dict[str, Any], progress: dict[str, Any] | None) -> str:
    """Return ``running``, ``finished``, ``incomplete`` or ``interrupted``, with what is known of its process.

    Args:
        status: of the manifest.
        holder: the lock's content.
        progress: the content of progress.json.
    """
    if status != "running":
        return status
    where = f"process {holder.get('pid')} on {holder.get('host')}" if holder else ""
    if at_work(holder, progress):
        return f"running ({where})"
    if holder and owner_state(holder) == "unknown" and progress is not None:
        age = (datetime.now(UTC) - datetime.fromisoformat(progress["updated"])).total_seconds()
        return f"interrupted, or silent for {format_seconds(age)} ({where})"
    return "interrupted"


def _ranks(beats: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("rank", "host", "images", "images/s", "processing"):
        table.add_column(name, justify="right" if name in ("rank", "images", "images/s") else "left")
    for beat in beats:
        table.add_row(
            str(beat["rank"]), beat["host"], str(beat["done"]), f"{beat['images_per_second']:.2f}", beat["item"]
        )
    return table
