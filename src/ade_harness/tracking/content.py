"""What a W&B run holds. Names here are an interface: docs/tracking.md lists them.

Each content is data that travels to the process where the run is open, with a method that logs it there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ade_harness.data.labels import IGNORE_INDEX, NO_CLASS, Classes
from ade_harness.files.fetch import OFFICIAL_URL
from ade_harness.files.reading import expanded
from ade_harness.metrics.confusion import Scores, mean_iou
from ade_harness.metrics.counts import Row, matrix_of
from ade_harness.report.overlays import MASKS
from ade_harness.runs.directory import LEDGER, MANIFEST
from ade_harness.runs.ledger import read_rows
from ade_harness.runs.result import Result, per_class_rows
from ade_harness.tracking.figures import save_confusion_matrix
from ade_harness.tracking.wandb_run import Entry

SCORES = tuple(field.name for field in fields(Scores))
"""Fractions 0..1, as in metrics.json."""
LEDGER_TYPE = "ledger"
LEDGER_FILES = (MANIFEST, "config.yaml", "metrics.json", "per_class.csv")
"""With the ledger's own files this is a run directory that can be read."""
REPORT = "report.html"
_TITLE_LENGTH = 63


class Content(Protocol):
    """What a run holds at its end."""

    @property
    def entry(self) -> Entry | None:
        """How the run is found; None if it is another one's."""

    @property
    def exit_code(self) -> int:
        """0, unless the run has failed."""

    def fill(self, run: Any) -> None:
        """Log it to an open run."""


@dataclass(frozen=True)
class FinishedContent:
    """An evaluation with its result, as a run of its own."""

    entry: Entry
    result: Result
    manifest: Mapping[str, Any]
    exit_code: int = 0

    def fill(self, run: Any) -> None:
        """Log it; raises as :func:`log_content`."""
        log_content(run, self.result, self.entry.config, self.manifest)


@dataclass(frozen=True)
class AddedContent:
    """A score that is added to the run of a training."""

    result: Result
    manifest: Mapping[str, Any]
    step: int | None
    """The training's; None takes the next of the run's own steps."""
    entry: None = None
    exit_code: int = 0

    def fill(self, run: Any) -> None:
        """Log scores under the data set's name, over the training's step, and the ledger."""
        name, result = self.result.dataset, self.result
        row: dict[str, Any] = {f"{name}/{key}": value for key, value in result.scores.as_dict().items()}
        row |= {f"{name}/images": result.images, f"{name}/marks": "; ".join(result.marks)}
        interval = result.intervals.get("mIoU")
        if interval is not None:
            row |= {f"{name}/mIoU_low": interval.low, f"{name}/mIoU_high": interval.high}
        if self.step is not None:
            # W&B's own step cannot go back; an axis of its own can
            run.define_metric(f"{name}/*", step_metric=f"{name}/step")
            row[f"{name}/step"] = self.step
        run.log(row)
        run.log_artifact(_ledger(run.id, result, self.manifest))


@dataclass(frozen=True)
class FailedContent:
    """A run that ended without a score."""

    entry: Entry
    why: str
    """The message that the user saw."""
    exit_code: int = 1

    def fill(self, run: Any) -> None:
        """Log the reason, and raise an alert."""
        folder = self.entry.folder
        run.summary.update({"status": "failed", "reason": self.why})
        text = f"{self.why}\n\nWhat was counted is kept in {folder.resolve()}."
        run.alert(f"{folder.name} failed"[:_TITLE_LENGTH], text, level="ERROR")


@dataclass(frozen=True)
class CurveContent:
    """A finished training."""

    entry: Entry
    rows: tuple[Mapping[str, Any], ...]
    """``step`` and what was measured there."""
    exit_code: int = 0

    def fill(self, run: Any) -> None:
        """Log the rows that the run does not have yet."""
        for row in self.rows:
            if row["step"] >= run.step:
                run.log({k: v for k, v in row.items() if k != "step"}, step=row["step"], commit=True)
        run.summary["status"] = "finished"


def log_content(run: Any, result: Result, config: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """Log an evaluation to an open W&B run.

    Args:
        run: of W&B.
        result: the finished run.
        config: the resolved configuration.
        manifest: the run's record.

    Raises:
        Exception: whatever wandb raises, and errors of files that cannot be read.
    """
    import wandb

    folder = result.run_dir
    rows, _ = read_rows(folder / LEDGER)
    for name in SCORES:
        # "none": the summary is set below, once; any other choice here would move it to `mIoU.max` and the like
        run.define_metric(name, summary="none")
    figure = folder / "confusion_matrix.png"
    save_confusion_matrix(
        figure, result.matrix, result.classes, " - ".join([f"{result.label} on {result.dataset}", *result.marks])
    )
    logged: dict[str, Any] = {
        **result.scores.as_dict(),
        "per_class": _table(wandb, per_class_rows(result.matrix, result.classes)),
        "per_image": _table(wandb, per_image_rows(rows, len(result.classes))),
        "confusion_matrix": wandb.Image(str(figure)),
    }
    overlays = folder / "overlays"
    for picture in sorted(overlays.rglob("*.png")):
        image_id = picture.relative_to(overlays).with_suffix("").as_posix()
        logged[f"overlays/{image_id}"] = _overlay(wandb, picture, image_id, result.classes)
    page = folder / REPORT
    if page.is_file():
        logged["report"] = wandb.Html(page.read_text(encoding="utf-8"), inject=False)
    run.log(logged)
    run.summary.update(summary_of(result, manifest))

    run.log_artifact(_ledger(run.id, result, manifest))
    if page.is_file():
        artifact = wandb.Artifact(f"report-{run.id}", "report", metadata={"marks": list(result.marks)})
        artifact.add_file(str(page.resolve()), name=REPORT, policy="immutable", skip_cache=True)
        run.log_artifact(artifact)
    _use(run, _checkpoint(wandb, manifest))
    _use(run, _dataset(wandb, result, config, manifest))


def summary_of(result: Result, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return what stands in the columns of W&B's table of runs: metrics.json, lists as text, and speed."""
    metrics = {k: "; ".join(map(str, v)) if isinstance(v, list) else v for k, v in result.metrics().items()}
    for name in ("other_intervals", *result.origin):  # columns of their own would hide the rest; the config has origins
        del metrics[name]
    return {
        **metrics,
        "status": "finished",
        "seconds": result.seconds,
        "images_per_second": result.images_per_second,
        "predict_seconds": manifest.get("timings", {}).get("predict_seconds"),
        "world_size": result.world_size,
        "ledger_sha256": manifest.get("ledger", {}).get("sha256"),
    }


def per_image_rows(rows: Iterable[Row], classes: int) -> list[dict[str, Any]]:
    """Return one row per image: scores (fractions; None without valid pixels), seconds, rank and label hash."""
    table = []
    for row in rows:
        valid = row.valid_pixels
        table.append(
            {
                "image_id": row.image_id,
                "height": row.height,
                "width": row.width,
                "valid_pixels": valid,
                "pixel_accuracy": row.right_pixels / valid if valid else None,
                "mIoU": mean_iou(matrix_of([row], classes)) if valid else None,
                "seconds": round(row.seconds, 6),
                "rank": row.rank,
                "label_hash": row.label_hash,
            }
        )
    return table


def _overlay(wandb: Any, picture: Path, image_id: str, classes: Classes) -> Any:
    """Return an image whose masks can be shown and hidden, with the names of classes; of older runs the picture."""
    file = picture.with_suffix(MASKS)
    if not file.is_file():
        return wandb.Image(str(picture), caption=image_id)
    names = dict(enumerate(classes.names))
    with np.load(file, allow_pickle=False) as kept:
        masks = {
            "prediction": {"mask_data": kept["prediction"], "class_labels": names | {NO_CLASS: "void (no class)"}},
            "truth": {"mask_data": kept["truth"], "class_labels": names | {IGNORE_INDEX: "not counted"}},
        }
        return wandb.Image(kept["image"], caption=image_id, masks=masks)


def _table(wandb: Any, rows: list[dict[str, Any]]) -> Any:
    return wandb.Table(columns=list(rows[0]) if rows else [], data=[list(row.values()) for row in rows])


def _ledger(run_id: str, result: Result, manifest: Mapping[str, Any]) -> Any:
    """Return the run directory's record as an artifact from which `compare` can read it again."""
    import wandb

    facts = {
        "run": result.run_dir.resolve().name,
        **result.scores.as_dict(),
        "images": result.images,
        "expected_images": result.expected_images,
        "marks": list(result.marks),
        "ledger_sha256": manifest.get("ledger", {}).get("sha256"),
    }
    artifact = wandb.Artifact(f"ledger-{run_id}", LEDGER_TYPE, metadata=facts)
    files = [*sorted((result.run_dir / LEDGER).glob("*.parquet")), *(result.run_dir / name for name in LEDGER_FILES)]
    for file in files:
        # the files are where they stay: no second copy
        name = file.relative_to(result.run_dir).as_posix()
        artifact.add_file(str(file.resolve()), name=name, policy="immutable", skip_cache=True)
    return artifact


def _checkpoint(wandb: Any, manifest: Mapping[str, Any]) -> Any:
    """Return the weights as a reference, None if there is no file of them; nothing is read or fetched."""
    facts = {k: v for k, v in manifest.get("model", {}).items() if v is not None}
    if "sha256" not in facts:
        return None
    artifact = wandb.Artifact(_artifact_name(f"checkpoint-{facts['name']}"), "model", metadata=facts)
    _describe(artifact, "checkpoint.json", facts)
    reference = reference_of(str(facts.get("origin", "")))
    if reference is not None:
        artifact.add_reference(reference, name=reference.rpartition("/")[2] or "weights", checksum=False)
    return artifact


def _dataset(wandb: Any, result: Result, config: Mapping[str, Any], manifest: Mapping[str, Any]) -> Any:
    """Return the data set as a reference with the hashes of its ids and of everything that was read."""
    record = dict(manifest.get("dataset", {}))
    root = record.pop("root", None)  # of one machine: it makes no other data set
    facts = {**record, "split": config["dataset"]["split"]}
    name = _artifact_name(f"dataset-{result.dataset}-{facts['split']}")
    artifact = wandb.Artifact(name, "dataset", metadata={**facts, "root": root})
    _describe(artifact, "dataset.json", facts)
    if config["dataset"]["kind"] == "ade20k":
        artifact.add_reference(OFFICIAL_URL, checksum=False)
    return artifact


def _describe(artifact: Any, name: str, facts: Mapping[str, Any]) -> None:
    """Put the hashes into the artifact itself: its own digest, which distinguishes versions, is made of its files."""
    with artifact.new_file(name) as file:
        json.dump(dict(sorted(facts.items())), file, indent=2)


def reference_of(origin: str) -> str | None:
    """Return the address of a checkpoint's origin (a path, an address, or ``hub id@commit/file``), if it has one."""
    if re.match(r"https?://", origin):
        return origin
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+)@([\w.-]+)/(.+)", origin)
    if hub:
        return f"https://huggingface.co/{hub[1]}/resolve/{hub[2]}/{hub[3]}"
    path = expanded(origin)
    return path.resolve().as_uri() if origin and path.exists() else None


def _use(run: Any, artifact: Any) -> None:
    """Note an input of the run.

    ``run.use_artifact`` refuses to work offline, though the offline file can hold the very record that it makes online.
    If a later wandb has another way to write it, inputs are left out: an artifact logged as the run's own output would
    say something false, and the configuration has the hashes.
    """
    write = getattr(run, "_log_artifact", None)
    if artifact is not None and write is not None:
        write(artifact, aliases=["latest"], is_user_created=True, use_after_commit=True)


def _artifact_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:120]
