"""A finished run, read back from its directory and checked against its own hashes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ade_harness.data.ade20k_labels import ade20k_classes
from ade_harness.data.labels import Classes, classes_from
from ade_harness.errors import HarnessError
from ade_harness.metrics.areas import ImageAreas, image_areas
from ade_harness.metrics.counts import Row, hash_rows, matrix_of
from ade_harness.runs.directory import LEDGER, read_manifest
from ade_harness.runs.ledger import read_rows


@dataclass(frozen=True)
class FinishedRun:
    """What a run directory holds. Equal ledgers have equal hashes, whatever ranks wrote them."""

    path: Path
    manifest: dict[str, Any]
    config: dict[str, Any]
    """The resolved configuration, from config.yaml."""
    metrics: dict[str, Any]
    """The content of metrics.json."""
    rows: tuple[Row, ...]
    """In the order of image ids."""
    ledger_hash: str

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.path.resolve().name

    @property
    def label(self) -> str:
        """The model, as tables call it."""
        return str(self.config["model"]["label"] or self.config["model"]["name"])

    @property
    def marks(self) -> tuple[str, ...]:
        """What makes the score no score of the model on its data set."""
        return tuple(self.manifest["marks"])

    @property
    def verdict(self) -> str | None:
        """What the run says about the published score; None if nothing was published."""
        judged = self.metrics.get("reproduced")
        return str(judged["sentence"]) if judged else None

    @property
    def classes(self) -> Classes:
        """The classes of the data set; a run does not keep ADE20K's."""
        dataset = self.manifest["dataset"]
        stored = dataset.get("classes")
        return classes_from(str(dataset["name"]), stored) if stored else ade20k_classes()

    @property
    def matrix(self) -> np.ndarray:
        """The confusion matrix, int64 [C, C + 1]."""
        return matrix_of(self.rows, len(self.classes))

    @property
    def areas(self) -> ImageAreas:
        """Pixels of each class in each image."""
        return image_areas(self.rows, len(self.classes))

    @property
    def complete(self) -> bool:
        """Whether every image of the split was counted."""
        return len(self.rows) == int(self.manifest["dataset"]["expected_images"])


def load_run(path: Path) -> FinishedRun:
    """Read a finished run.

    Raises:
        HarnessError: no run, not finished, of another version, or its ledger is not what the run has written
            (truncated, damaged or edited).
    """
    manifest = read_manifest(path)
    if manifest.get("kind") == "probe":
        raise HarnessError(f"{path}: is the training of a probe, not an evaluation.")
    if manifest.get("status") != "finished":
        raise HarnessError(
            f"{path}: the run is not finished ({manifest.get('status')})."
            f" `python -m ade_harness resume {path}` ends it."
        )
    rows, damaged = read_rows(path / LEDGER)
    if damaged:
        raise HarnessError(
            f"{path / LEDGER / damaged[0]}: damaged ({len(damaged)} ledger files in all)."
            f" `python -m ade_harness resume {path}` counts their images again."
        )
    recorded = manifest.get("ledger", {})
    found = hash_rows(rows)
    if recorded.get("sha256") != found:
        raise HarnessError(
            f"{path / LEDGER}: not what the run has written: {len(rows)} images with hash {found[:12]}, the manifest"
            f" has {recorded.get('images')} with {str(recorded.get('sha256'))[:12]}. Files are missing, or were"
            " changed. Restore them, or evaluate again."
        )
    return FinishedRun(
        path, manifest, _read(path / "config.yaml", yaml.safe_load), _read(path / "metrics.json", json.loads),
        tuple(rows), found,
    )  # fmt: skip


def _read(path: Path, parse: Any) -> dict[str, Any]:
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HarnessError(f"{path}: cannot be read ({error.strerror}).") from error
    except (ValueError, yaml.YAMLError) as error:
        raise HarnessError(f"{path}: damaged ({str(error).splitlines()[0]}).") from error
    if not isinstance(content, dict):
        raise HarnessError(f"{path}: damaged: expected a mapping.")
    return content
