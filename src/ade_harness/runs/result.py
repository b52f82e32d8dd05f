"""What a finished run found, and the files that hold it."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ade_harness.config.dataset import DatasetKind
from ade_harness.config.schema import Config, MetricsConfig
from ade_harness.data.dataset import SegmentationDataset
from ade_harness.data.labels import Classes
from ade_harness.files.atomic import replaced, write_json, write_text
from ade_harness.metrics.areas import image_areas
from ade_harness.metrics.bootstrap import Bootstrap, Interval, bootstrap
from ade_harness.metrics.calibration import Calibration, sum_calibration
from ade_harness.metrics.confusion import Matrix, Scores, class_accuracy, class_dice, class_iou, mean_dice, scores
from ade_harness.metrics.counts import Row
from ade_harness.metrics.verdict import Verdict, judge
from ade_harness.runtime.balance import Balance

CONVENTION = (
    "mIoU: IoU from pixels summed over all images (pixels annotated 'other' are ignored), averaged over the classes"
    " that occur in truth or prediction (mmsegmentation's nanmean). mIoU_csail counts absent classes as 0 and"
    " averages {classes}; mIoU_detectron2 averages the classes that occur in the truth."
)


BESIDE = ("decode", "ledger")
"""Stages of loader processes and of the recorder's thread, which work beside the others."""


@dataclass(frozen=True)
class Published:
    """A score from a paper; never ours."""

    mIoU: float
    """Percent, as printed."""
    protocol: str
    source: str
    same_protocol: bool = True
    """Whether the run's protocol is the one behind the score."""


def published_score(cfg: Config) -> Published | None:
    """Return what others published of a configuration's model, by its protocol if they have that number.

    Args:
        cfg: the whole configuration.
    """
    model, name = cfg.model, cfg.inference.name
    published = model.published
    if cfg.dataset.kind != DatasetKind.ade20k:
        return None
    for kind, described in (("ss", "single scale"), ("ms", "multi-scale with flip")):
        score: float | None = getattr(published, kind)
        if getattr(model.protocols, kind) == name and score is not None:
            same = score == published.mIoU
            return Published(score, published.protocol if same else described, published.source)
    if published.mIoU is None:
        return None
    own = all(protocol in (None, name) for protocol in (model.protocols.ss, model.protocols.ms))
    return Published(published.mIoU, published.protocol, published.source, own)


def judge_published(
    cfg: Config,
    published: Published | None,
    value: float,
    interval: Interval | None,
    marks: Sequence[str],
    changed: Sequence[str],
) -> Verdict | None:
    """Say whether a run reproduces what was published; None if nothing was.

    Args:
        cfg: the whole configuration.
        published: the score of others.
        value: of this run, 0..1.
        interval: of this run.
        marks: what the run's numbers are not.
        changed: :func:`ade_harness.config.compose.protocol_changes`.
    """
    if published is None:
        return None
    against = [*marks]
    if not published.same_protocol:
        against.append(f"inference={cfg.inference.name} is another protocol than {published.protocol}")
    if changed:
        against.append(f"inference={cfg.inference.name} was changed ({', '.join(changed)})")
    return judge(value, interval, published.mIoU, against)


@dataclass(frozen=True)
class Result:
    """A finished run."""

    run_dir: Path
    origin: Mapping[str, Any]
    """What a script that reads metrics.json alone must know: model, data set, protocol, commit, and of the weights
    ``checkpoint`` (a file, an id, or how they were made), ``checkpoint_part`` (of the file), ``checkpoint_sha256``."""
    label: str
    """The model, as tables call it."""
    dataset: str
    classes: Classes
    matrix: Matrix
    scores: Scores
    images: int
    expected_images: int
    marks: tuple[str, ...]
    """What makes the score no score of the model on ADE20K: demo, partial, random weights."""
    notes: tuple[str, ...]
    """Warnings about the class map."""
    published: Published | None
    verdict: Verdict | None
    """Whether the run reproduces it."""
    intervals: Mapping[str, Interval | None]
    """By score, centred percentile; empty if they were not asked for."""
    other_intervals: Mapping[str, Mapping[str, Interval | None]]
    """The same by their other names: percentile, bca."""
    calibration: Calibration | None
    seconds: float
    """From start to end, loading included."""
    images_per_second: float
    """Speed of the evaluation alone; 0 if nothing was left to do."""
    balance: Balance
    """What each rank did."""
    stages: Mapping[str, float]
    """Seconds in each stage, added up over ranks; decode happens in loader processes, beside the rest."""
    costs: Mapping[str, Any] = field(default_factory=dict)
    """The network's parameters, flops (of the image of `flops_image`), gpu_peak_bytes; None where it is not known."""

    @property
    def convention(self) -> str:
        """What mIoU means."""
        return CONVENTION.format(classes=len(self.classes))

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.balance.shares)

    @property
    def complete(self) -> bool:
        """Whether every image of the split was evaluated."""
        return self.images == self.expected_images

    @property
    def pixels(self) -> int:
        """Valid pixels."""
        return int(self.matrix.sum())

    @property
    def stage_shares(self) -> dict[str, float]:
        """Time in each stage over the time of the ranks, largest first; those of `BESIDE` come last."""
        total = sum(spent for name, spent in self.stages.items() if name not in BESIDE)
        ordered = sorted(self.stages.items(), key=lambda item: (item[0] in BESIDE, -item[1]))
        return {name: spent / total for name, spent in ordered} if total else {}

    def timings(self) -> dict[str, Any]:
        """Return what the manifest keeps of speed: seconds, rates, and each rank's share."""
        return {
            "seconds": round(self.seconds, 3),
            "images_per_second": round(self.images_per_second, 3),
            "world_size": self.world_size,
            "stages": {name: round(spent, 3) for name, spent in self.stages.items()},
            "balance": round(self.balance.efficiency, 4),
            "idle_seconds": round(self.balance.idle_seconds, 3),
            "ranks": [asdict(share) for share in self.balance.shares],
        }

    def metrics(self) -> dict[str, Any]:
        """Return the content of metrics.json: fractions 0..1 and integers."""
        return {
            **self.origin,
            **self.scores.as_dict(),
            "mean_dice": None if np.isnan(found := mean_dice(self.matrix)) else found,
            **self.costs,
            "images": self.images,
            "expected_images": self.expected_images,
            "pixels": self.pixels,
            "complete": self.complete,
            "intervals": {name: asdict(i) if i else None for name, i in self.intervals.items()},
            "other_intervals": {
                kind: {name: asdict(i) if i else None for name, i in intervals.items()}
                for kind, intervals in self.other_intervals.items()
            },
            "published": asdict(self.published) if self.published else None,
            "reproduced": asdict(self.verdict) if self.verdict else None,
            **({"calibration_error": self.calibration.ece} if self.calibration else {}),
            "marks": list(self.marks),
            "notes": list(self.notes),
            "convention": self.convention,
        }


def resample_scores(cfg: MetricsConfig, rows: Sequence[Row], classes: int) -> Bootstrap | None:
    """Resample as the ``metrics`` node says; None if it asks for nothing, or of one image."""
    if cfg.resamples == 0 or len(rows) < 2:
        return None
    return bootstrap(image_areas(rows, classes), cfg.resamples, cfg.seed)


def summarise(
    cfg: Config,
    run_dir: Path,
    dataset: SegmentationDataset,
    rows: Sequence[Row],
    matrix: Matrix,
    marks: Sequence[str],
    changed: Sequence[str],
    facts: Mapping[str, Any],
    commit: str | None,
    **rest: Any,
) -> Result:
    """Make the result of checked counts: every score with its interval, and what it says of the published one.

    Args:
        cfg: the whole configuration.
        run_dir: of the run.
        dataset: what was evaluated.
        rows: the ledger.
        matrix: its sum.
        marks: what the run's numbers are not.
        changed: fields of the protocol that are not as its YAML file says.
        facts: of the predictor: where its weights come from.
        commit: of this package.
        rest: the other fields of :class:`Result`.
    """
    found, published = scores(matrix), published_score(cfg)
    resampled, level = resample_scores(cfg.metrics, rows, len(dataset.classes)), cfg.metrics.level
    intervals = resampled.intervals(level) if resampled else {}
    return Result(
        run_dir=run_dir,
        origin={
            "model": cfg.model.name,
            "checkpoint": facts.get("origin"),
            "checkpoint_part": facts.get("part"),
            "checkpoint_sha256": facts.get("sha256"),
            "dataset": dataset.name,
            "protocol": cfg.inference.name,
            "protocol_changes": list(changed),
            "precision": str(cfg.inference.precision),
            "commit": commit,
        },
        label=cfg.model.label or cfg.model.name,
        dataset=dataset.name,
        classes=dataset.classes,
        matrix=matrix,
        scores=found,
        images=len(rows),
        expected_images=dataset.expected_images,
        marks=tuple(marks),
        published=published,
        verdict=judge_published(cfg, published, found.mIoU, intervals.get("mIoU"), marks, changed),
        intervals=intervals,
        other_intervals={k: resampled.intervals(level, k) for k in ("percentile", "bca")} if resampled else {},
        calibration=sum_calibration(rows),
        **rest,
    )


def per_class_rows(matrix: Matrix, classes: Classes) -> list[dict[str, Any]]:
    """Return one row per class; None where a ratio is not defined."""
    iou, accuracy = class_iou(matrix), class_accuracy(matrix)
    truth, predicted = matrix.sum(1), matrix[:, :-1].sum(0)
    both = np.diagonal(matrix)
    with np.errstate(invalid="ignore"):
        precision, dice = both / predicted, class_dice(matrix)
    return [
        {
            "class": c,
            "name": name,
            "IoU": None if np.isnan(iou[c]) else float(iou[c]),
            "accuracy": None if np.isnan(accuracy[c]) else float(accuracy[c]),
            "precision": None if np.isnan(precision[c]) else float(precision[c]),
            "Dice": None if np.isnan(dice[c]) else float(dice[c]),
            "ground_truth_pixels": int(truth[c]),
            "predicted_pixels": int(predicted[c]),
            "intersection_pixels": int(matrix[c, c]),
        }
        for c, name in enumerate(classes.names)
    ]


def write_result(result: Result) -> None:
    """Write confusion_matrix.npy, per_class.csv and metrics.json; the last one last, so that it marks a whole set."""
    with replaced(result.run_dir / "confusion_matrix.npy") as temporary, temporary.open("wb") as file:
        np.save(file, result.matrix)
    rows = per_class_rows(result.matrix, result.classes)
    text = io.StringIO()
    writer = csv.DictWriter(text, [*rows[0], "marks"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "marks": "; ".join(result.marks)} for row in rows)
    write_text(result.run_dir / "per_class.csv", text.getvalue())
    write_json(result.run_dir / "metrics.json", result.metrics())
