"""config.yaml and manifest.json: a run directory alone says what was run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from ade_harness.runs.directory import MANIFEST, flatten, open_run, write_json, write_text
from ade_harness.runs.ledger import Row
from ade_harness.runs.provenance import code_state, command_line, environment

SCHEMA_VERSION = 1


@dataclass
class RunRecord:
    """The record of one run, held by rank 0."""

    path: Path
    manifest: dict[str, Any]

    def finish(
        self, rows: Sequence[Row], seconds: float, rate: float, world_size: int, stages: Mapping[str, float]
    ) -> None:
        """Note the end: timings, and a hash of everything that was read."""
        digest = hashlib.sha256()
        for row in rows:
            digest.update(f"{row.image_id} {row.content_hash}\n".encode())
        self.manifest["dataset"]["content_hash"] = digest.hexdigest()
        self.manifest.update(status="finished", finished=_now())
        self.manifest["timings"] = {
            "seconds": round(seconds, 3),
            "images_per_second": round(rate, 3),
            "predict_seconds": round(sum(r.seconds for r in rows), 3),
            "world_size": world_size,
            "stages": {name: round(spent, 3) for name, spent in stages.items()},
        }
        write_json(self.path / MANIFEST, self.manifest)

    def summary(self) -> dict[str, Any]:
        """Return the manifest without what repeats the configuration."""
        return {k: v for k, v in self.manifest.items() if k != "identity"}


def start_record(
    config: dict[str, Any], facts: dict[str, Any], marks: Sequence[str], seeds: dict[str, int]
) -> RunRecord:
    """Open the run directory and write config.yaml, code.diff and a first manifest.json.

    Args:
        config: resolved configuration.
        facts: ``model`` and ``dataset``: origins and hashes.
        marks: what the run's numbers are not.
        seeds: every seed in use.

    Raises:
        HarnessError: the directory cannot be written, or holds a run of something else.
    """
    code = code_state()
    diff = code.pop("diff", "")
    path, continued = open_run(
        config["run"]["dir"], config["run"]["root"], config["model"]["name"], _identity(config, facts, code)
    )
    manifest: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "status": "running",
        "started": _now(),
        "command": command_line(),
        "marks": list(marks),
        "code": code,
        "seeds": seeds,
        "environment": environment(),
        **facts,
        "identity": _identity(config, facts, code),
    }
    if continued:
        before = json.loads((path / MANIFEST).read_text())
        earlier = {"started": before["started"], "command": before["command"]}
        manifest["earlier"] = [*before.get("earlier", []), earlier]
    write_json(path / MANIFEST, manifest)  # first: from now on the directory is known as this run's
    if diff:
        write_text(path / "code.diff", diff)
    header = "".join(f"# {mark}\n" for mark in marks)
    write_text(path / "config.yaml", header + yaml.safe_dump(config, sort_keys=False))
    return RunRecord(path, manifest)


def _identity(config: dict[str, Any], facts: dict[str, Any], code: dict[str, Any]) -> dict[str, Any]:
    """Return what must be equal for counts of two sittings to be added up."""
    kept = {g: config[g] for g in ("model", "dataset", "inference")}
    runtime = {k: config["runtime"][k] for k in ("seed", "threads", "deterministic")}
    return {
        **flatten(kept),
        **flatten({"runtime": runtime}),
        "device": facts["device"],
        "checkpoint.sha256": facts["model"].get("sha256"),
        "checkpoint.origin": facts["model"].get("origin"),
        "environment.torch": torch.__version__,
        "dataset.ids_hash": facts["dataset"]["ids_hash"],
        "code.version": code["version"],
        "code.commit": code["commit"],
        "code.diff_sha256": code.get("diff_sha256"),
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
