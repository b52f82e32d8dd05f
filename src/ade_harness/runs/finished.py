"""A finished run, read back from its directory and checked against its own hashes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ade_harness.data.ade20k_labels import ade20k_classes
from ade_harness.data.labels import MAX_CLASSES, Classes, classes_from
from ade_harness.errors import HarnessError
from ade_harness.files.documents import checked, damaged, read_json, read_yaml
from ade_harness.files.escapes import one_line
from ade_harness.metrics.areas import ImageAreas, image_areas
from ade_harness.metrics.confusion import scores
from ade_harness.metrics.counts import Row, hash_rows, matrix_of
from ade_harness.runs.directory import LEDGER, MANIFEST, is_of_memory, read_manifest
from ade_harness.runs.exactness import check_rows
from ade_harness.runs.ledger import read_rows
from ade_harness.runs.progress import state_of
from ade_harness.runs.record import marks_now
from ade_harness.runs.shapes import CONFIG, FINISHED, METRICS
from ade_harness.runtime.notes import resume_command


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
        return one_line(str(self.config["model"]["label"] or self.config["model"]["name"]))

    @property
    def marks(self) -> tuple[str, ...]:
        """What makes the score no score of the model on its data set, or no score of this run."""
        return tuple(one_line(mark) for mark in marks_now(self.path, self.manifest))

    @property
    def verdict(self) -> str | None:
        """What the run says about the published score; None if nothing was published."""
        judged = self.metrics.get("reproduced")
        return str(judged["sentence"]) if judged else None

    @property
    def protocol(self) -> str:
        """The name of the protocol, and which of its fields are not as its file says."""
        name = str(self.config["inference"]["name"])
        return one_line(protocol_text(name, self.metrics.get("protocol_changes") or []) or name)

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


def protocol_text(name: str | None, changed: Sequence[str]) -> str | None:
    """Return how tables call a protocol: its name, and which of its fields are not as its file says."""
    return f"{name}, changed: {', '.join(changed)}" if changed else name


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
        completes = f"`{resume_command(path)}` completes it."
        if is_of_memory(manifest):
            completes = "Its model was in memory: evaluate it again, into another folder."
        raise HarnessError(
            f"{path}: the run is not finished ({state_of(path, str(manifest.get('status')))}). {completes}"
        )
    checked(manifest, FINISHED, str(path / MANIFEST))
    rows, broken = read_rows(path / LEDGER)
    if broken:
        raise HarnessError(
            f"{path / LEDGER / broken[0]}: damaged ({len(broken)} ledger files in all)."
            f" `{resume_command(path)}` counts their images again."
        )
    recorded = manifest.get("ledger", {})
    found = hash_rows(rows)
    if recorded.get("sha256") != found:
        raise HarnessError(
            f"{path / LEDGER}: not what the run has written: {len(rows)} images with hash {found[:12]}, the manifest"
            f" has {recorded.get('images')} with {str(recorded.get('sha256'))[:12]}. Files are missing, or were"
            " changed. Restore them, or evaluate again."
        )
    run = FinishedRun(
        path, manifest, read_yaml(path / "config.yaml", CONFIG), read_json(path / "metrics.json", METRICS), tuple(rows),
        found,
    )  # fmt: skip
    _check_classes(run)
    _check_pixels(run)
    _check_scores(run)
    return run


_ROUNDING = 1e-9
"""Versions of NumPy may add up 150 numbers in another order."""


def _check_scores(run: FinishedRun) -> None:
    """Refuse a run whose metrics.json does not say what its ledger sums to."""
    found = {**scores(run.matrix).as_dict(), "images": len(run.rows)}
    for name, value in found.items():
        stored = run.metrics.get(name, value)
        if stored != value and not (isinstance(stored, int | float) and abs(stored - value) <= _ROUNDING):
            raise damaged(str(run.path / "metrics.json"), f"{name}: is {stored}, the ledger sums to {value}")


def _check_pixels(run: FinishedRun) -> None:
    """Refuse a ledger in which an image has other pixels than those of its size."""
    negative = next((row.image_id for row in run.rows if row.pixels.min(initial=0) < 0), None)
    if negative is not None:
        raise damaged(str(run.path / LEDGER), f"{negative}: negative counts")
    try:
        check_rows(run.rows, {})
    except HarnessError as error:
        raise damaged(str(run.path / LEDGER), str(error).partition(": no score")[0]) from error


def _check_classes(run: FinishedRun) -> None:
    """Refuse a run whose ledger counts classes that its data set does not have."""
    stored = run.manifest["dataset"].get("classes")
    if stored and not (
        len(stored["names"]) == len(stored["colors"]) <= MAX_CLASSES
        and all(len(color) == 3 and all(0 <= v <= 255 for v in color) for color in stored["colors"])
    ):
        raise damaged(str(run.path / MANIFEST), "dataset.classes: expected a name and an RGB colour for each class")
    number = len(run.classes)
    for row in run.rows:
        if row.ground_truth.max(initial=0) >= number or row.prediction.max(initial=0) > number:
            raise damaged(str(run.path / LEDGER), f"{row.image_id}: a class beyond the {number} of the data set")
