"""What an evaluation found, for notebooks and scripts."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ade_harness.data.labels import Classes
from ade_harness.metrics.areas import ImageAreas, image_areas, split_areas
from ade_harness.metrics.confusion import area_scores
from ade_harness.metrics.counts import Row, matrix_of
from ade_harness.report.contents import SCORE_NAMES
from ade_harness.runs.finished import FinishedRun, protocol_text
from ade_harness.runs.result import Result, per_class_rows

if TYPE_CHECKING:
    import pandas as pd

LOGGED = (*SCORE_NAMES, "mean_dice")
"""Names of the scores that the callback logs; of old runs the last is not known."""


@dataclass(frozen=True, repr=False, eq=False)  # one is equal to itself: arrays have no truth
class Evaluation:
    """The scores of one model on one data set, and the counts behind them. Scores are fractions 0..1.

    Shows as a table in a notebook, and as text when printed.
    """

    label: str
    """The model, as tables call it."""
    dataset: str
    classes: Classes
    metrics: Mapping[str, Any]
    """Everything that a run's metrics.json holds."""
    rows: tuple[Row, ...]
    """The counts of each image, in the order of image ids."""
    run_dir: Path | None = None
    """Where it is on disk, if it is."""

    @staticmethod
    def of_result(result: Result, rows: tuple[Row, ...], run_dir: Path | None) -> Evaluation:
        """Return what has just been evaluated."""
        return Evaluation(result.label, result.dataset, result.classes, result.metrics(), rows, run_dir)

    @staticmethod
    def of_run(run: FinishedRun) -> Evaluation:
        """Return what a run directory holds."""
        name = str(run.manifest["dataset"]["name"])
        return Evaluation(run.label, name, run.classes, run.metrics, run.rows, run.path)

    @property
    def mIoU(self) -> float:
        """Mean IoU over the classes in truth or prediction (mmsegmentation's convention), 0..1."""
        return float(self.metrics["mIoU"])

    @property
    def interval(self) -> tuple[float, float] | None:
        """Ends of the bootstrap interval of the mIoU (95 % unless ``metrics.level`` says otherwise); None without."""
        found = (self.metrics.get("intervals") or {}).get("mIoU")
        return (float(found["low"]), float(found["high"])) if found else None

    @property
    def protocol(self) -> str | None:
        """The name of the protocol, and which of its fields are not as its file says; None of runs before that."""
        return protocol_text(self.metrics.get("protocol"), self.metrics.get("protocol_changes") or [])

    @property
    def precision(self) -> str | None:
        """``inference.precision`` of the forward: fp32, tf32, bf16 or fp16; None of runs before that."""
        return self.metrics.get("precision")

    @property
    def scores(self) -> dict[str, float]:
        """Every score by name, 0..1: mIoU by three conventions, accuracies, fwIoU, final score, mean Dice."""
        names = [name for name in LOGGED if name in SCORE_NAMES or self.metrics.get(name) is not None]
        return {name: float(self.metrics[name]) for name in names}

    @property
    def images(self) -> int:
        """Images that were counted."""
        return len(self.rows)

    @property
    def complete(self) -> bool:
        """Whether that is every image of the split."""
        return bool(self.metrics["complete"])

    @property
    def marks(self) -> tuple[str, ...]:
        """What the score is not: demo, partial, random weights."""
        return tuple(self.metrics["marks"])

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the predictions."""
        return tuple(self.metrics["notes"])

    @property
    def verdict(self) -> str | None:
        """What the evaluation says about the published score; None if nothing was published."""
        judged = self.metrics.get("reproduced")
        return str(judged["sentence"]) if judged else None

    @cached_property
    def matrix(self) -> npt.NDArray[np.int64]:
        """The confusion matrix, int64 [C, C + 1]: annotated class, predicted class; the last column is none of them."""
        return matrix_of(self.rows, len(self.classes))

    @cached_property
    def areas(self) -> ImageAreas:
        """Pixels of each class in each image."""
        return image_areas(self.rows, len(self.classes))

    @cached_property
    def per_class(self) -> pd.DataFrame:
        """One row per class: name, IoU and accuracy (0..1, NaN where undefined), pixels of truth and prediction."""
        import pandas as pd

        frame = pd.DataFrame(per_class_rows(self.matrix, self.classes)).set_index("class")
        return frame.astype({"IoU": float, "accuracy": float})

    @cached_property
    def per_image(self) -> pd.DataFrame:
        """One row per image: its own mIoU and pixel accuracy (0..1, NaN without a labelled pixel), size, seconds."""
        import pandas as pd

        found = area_scores(*split_areas(self.areas.stacked))
        empty = np.array([row.valid_pixels == 0 for row in self.rows])
        columns: dict[str, Any] = {name: np.where(empty, np.nan, found[name]) for name in ("mIoU", "pixel_accuracy")}
        for name in ("height", "width", "valid_pixels", "seconds", "label_hash"):
            columns[name] = [getattr(row, name) for row in self.rows]
        return pd.DataFrame(columns, index=pd.Index([row.image_id for row in self.rows], name="image_id"))

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a run's metrics.json: plain values."""
        return copy.deepcopy(dict(self.metrics))

    def _title(self) -> str:
        how = ", ".join(filter(None, [self.protocol, self.precision if self.precision != "fp32" else None]))
        images = f"{self.images:,} of {self.metrics['expected_images']:,} images"
        return f"{self.label} on {self.dataset}, {images}{f', {how}' if how else ''}"

    def _lines(self) -> list[tuple[str, str, str]]:
        intervals = self.metrics.get("intervals") or {}
        lines = []
        for name, text in SCORE_NAMES.items():
            found = intervals.get(name)
            between = f"{100 * found['low']:.2f} to {100 * found['high']:.2f}" if found else ""
            lines.append((text, f"{100 * self.metrics[name]:.2f}", between))
        return lines

    def __repr__(self) -> str:
        """Return one line."""
        between = f" ({100 * self.interval[0]:.2f} to {100 * self.interval[1]:.2f})" if self.interval else ""
        marked = f" [{'; '.join(self.marks)}]" if self.marks else ""
        return f"<Evaluation of {self._title()}: mIoU {100 * self.mIoU:.2f}{between}{marked}>"

    def __str__(self) -> str:
        """Return a table."""
        lines = [f"  {text:45s} {value:>6s}  {between}".rstrip() for text, value, between in self._lines()]
        remarks = [f"  {mark}" for mark in self.marks] + [f"  Note: {note}." for note in self.notes]
        return "\n".join([self._title() + " (percent, with interval)", *lines, *remarks])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td style='text-align:left'>{escape(text)}</td><td>{value}</td><td>{between}</td></tr>"
            for text, value, between in self._lines()
        )
        marks = "".join(f"<div><mark>{escape(mark)}</mark></div>" for mark in self.marks)
        notes = "".join(f"<div><small>Note: {escape(note)}.</small></div>" for note in self.notes)
        head = "<tr><th></th><th>percent</th><th>interval</th></tr>"
        return f"<div><b>{escape(self._title())}</b>{marks}<table>{head}{rows}</table>{notes}</div>"
