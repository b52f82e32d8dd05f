"""The two kinds of work of a rank, and what its run directory says of the result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ade_harness.config.composed import Composed
from ade_harness.files.documents import read_json
from ade_harness.runs.directory import read_manifest
from ade_harness.runs.shapes import METRICS

Work = Callable[[Composed, Callable[[Path], None]], None]
"""Does a rank's share of what was composed; reports the run directory as soon as it is there."""


def evaluate(composed: Composed, on_run_dir: Callable[[Path], None]) -> None:
    """Evaluate; raises as :func:`ade_harness.evaluation.session.run_session`."""
    from ade_harness.evaluation.session import run_session

    run_session(composed, on_run_dir)


def train(composed: Composed, on_run_dir: Callable[[Path], None]) -> None:
    """Train a head; raises as :func:`ade_harness.probe.training.train_probe`."""
    from ade_harness.probe.training import train_probe
    from ade_harness.runtime.console import make_console

    train_probe(composed.config, make_console(result=False), on_run_dir)


WORK: dict[str, Work] = {"evaluate": evaluate, "probe": train}
"""By the command's name."""


def score_of(run_dir: Path | None) -> dict[str, Any] | None:
    """Return what a finished evaluation found, and where it is; None if it has no score.

    Raises:
        HarnessError: metrics.json is damaged.
    """
    file = run_dir / "metrics.json" if run_dir is not None else None
    if file is None or not file.exists():
        return None
    return {"run": str(run_dir), **read_json(file, METRICS)}


def training_of(run_dir: Path | None) -> dict[str, Any] | None:
    """Return what ``probe --json`` prints; None for a training that is not finished."""
    if run_dir is None:
        return None
    from ade_harness.probe.training import HEAD

    manifest = read_manifest(run_dir)
    if manifest["status"] != "finished":
        return None
    facts = {key: manifest.get(key) for key in ("loss", "iterations")}
    return {"run": str(run_dir), "head": str(run_dir / HEAD), **facts}
