"""What the page of one run shows: plain values, made from the ledger and the manifest alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import yaml

from ade_harness.data.labels import Classes
from ade_harness.metrics.areas import ImageAreas
from ade_harness.metrics.bootstrap import Bootstrap, Interval, bootstrap
from ade_harness.metrics.breakdown import ConfusedPair, ImageGroup, confused_pairs, group_images, size_groups
from ade_harness.metrics.calibration import Calibration, sum_calibration
from ade_harness.metrics.confusion import Matrix, Scores, scores
from ade_harness.metrics.regions import Regions
from ade_harness.runs.finished import FinishedRun
from ade_harness.runs.result import per_class_rows

SCORE_NAMES = {
    "mIoU": "mIoU",
    "mIoU_csail": "mIoU, absent classes as 0 (CSAIL)",
    "mIoU_detectron2": "mIoU, classes in the ground truth (detectron2)",
    "pixel_accuracy": "pixel accuracy",
    "mean_accuracy": "mean accuracy",
    "fwIoU": "frequency-weighted IoU",
    "final_score": "final score (mean of pixel accuracy and mIoU)",
}


@dataclass(frozen=True)
class RunContents:
    """A run with everything that can be computed of its counts."""

    run: FinishedRun
    areas: ImageAreas
    matrix: Matrix
    scores: Scores
    resampled: Bootstrap | None
    intervals: Mapping[str, Interval | None]
    classes: list[dict[str, Any]]
    """As :func:`ade_harness.runs.result.per_class_rows`, with interval, images and the largest confusion."""
    pairs: list[ConfusedPair]
    sizes: list[ImageGroup]
    scenes: list[ImageGroup]
    calibration: Calibration | None
    regions: Regions | None = None
    notes: tuple[str, ...] = field(default_factory=tuple)
    """What could not be shown, and why."""

    @property
    def image_scores(self) -> Mapping[str, Any]:
        """Every score of every image alone, float64 [N]."""
        return self.areas.scores()


def run_contents(
    run: FinishedRun,
    scenes: Mapping[str, str] | None = None,
    regions: Regions | None = None,
    notes: tuple[str, ...] = (),
) -> RunContents:
    """Compute what a page shows.

    Args:
        run: a finished run.
        scenes: scene category by image id.
        regions: counts of boundaries and objects.
        notes: what the reader must know.
    """
    areas, matrix = run.areas, run.matrix
    metrics = run.config["metrics"]
    resampled = None
    if metrics["resamples"] and len(run.rows) > 1:
        resampled = bootstrap(areas, metrics["resamples"], metrics["seed"])
    level = metrics["level"]
    groups, names = size_groups({row.image_id: row.height * row.width for row in run.rows})
    return RunContents(
        run=run,
        areas=areas,
        matrix=matrix,
        scores=scores(matrix),
        resampled=resampled,
        intervals=resampled.intervals(level) if resampled else {},
        classes=_class_rows(run.classes, matrix, areas, resampled, level, regions),
        pairs=confused_pairs(matrix),
        sizes=group_images(areas, groups, names),
        scenes=group_images(areas, scenes) if scenes else [],
        calibration=sum_calibration(run.rows),
        regions=regions,
        notes=notes,
    )


def _class_rows(
    classes: Classes,
    matrix: Matrix,
    areas: ImageAreas,
    resampled: Bootstrap | None,
    level: float,
    regions: Regions | None,
) -> list[dict[str, Any]]:
    names = [*classes.names, "none"]
    intervals = resampled.class_iou.centred(level) if resampled else [None] * len(matrix)
    images = (areas.truth > 0).sum(0)
    boundary = regions.boundary_iou() if regions else None
    rows = []
    for row, interval in zip(per_class_rows(matrix, classes), intervals, strict=True):
        index = row["class"]
        wrong = matrix[index].copy()
        wrong[index] = 0
        maximum = int(wrong.argmax())
        truth = row["ground_truth_pixels"]
        rows.append(
            {
                **row,
                "low": max(0.0, interval.low) if interval and images[index] > 1 else None,
                "high": min(1.0, interval.high) if interval and images[index] > 1 else None,
                "images": int(images[index]),
                "share": truth / max(int(matrix.sum()), 1),
                "confused_with": names[maximum] if wrong[maximum] else "",
                "confused_share": float(wrong[maximum] / truth) if truth and wrong[maximum] else None,
                "boundary_iou": None if boundary is None or np.isnan(boundary[index]) else float(boundary[index]),
            }
        )
    return rows


def provenance(run: FinishedRun) -> list[tuple[str, str]]:
    """Return what was run, as (name, text)."""
    manifest, config = run.manifest, run.config
    code, environment, dataset = manifest["code"], manifest["environment"], manifest["dataset"]
    model = manifest["model"]
    commit = code.get("commit") or "unknown (installed, not a checkout)"
    dirty = " with uncommitted changes (code.diff)" if code.get("dirty") else ""
    packages = environment["packages"]
    facts = {
        "model": f"{run.label} (model={config['model']['name']})",
        "weights": f"{model.get('weights', 'of the label files')}, {model.get('origin', '')}",
        "weights' SHA-256": model.get("sha256"),
        "protocol": f"inference={run.protocol}: {config['inference'].get('source', '')}",
        "precision": config["inference"].get("precision"),
        "data set": f"{dataset['name']}, {len(run.rows):,} of {dataset['expected_images']:,} images",
        "data's SHA-256": dataset.get("content_hash"),
        "ledger's SHA-256": run.ledger_hash,
        "code": f"{code['version']}, commit {commit}{dirty}",
        "command": " ".join(manifest["command"]),
        "seeds": ", ".join(f"{k}={v}" for k, v in manifest["seeds"].items()),
        "machine": f"{manifest['device']}: {', '.join(environment['gpus']) or environment['cpu']}",
        "software": f"Python {environment['python']}, "
        + ", ".join(f"{name} {packages[name]}" for name in ("torch", "numpy", "transformers") if name in packages),
        "kernels": manifest["kernels"],
        "time": f"{manifest['started']} to {manifest['finished']}",
    }
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]


def configuration(run: FinishedRun) -> str:
    """Return the resolved configuration as YAML."""
    return yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
