"""mIoU and its relatives from one integer confusion matrix, in each convention in use.

M is int64 [150, 151], rows ground truth, columns prediction, valid pixels only. The last column holds valid
pixels predicted as none of the 150 classes: they are in the row's total (so they are errors for accuracy and for
the union of the true class) and in no class's predicted area.

    IoU_c = M[c, c] / (row_c + column_c - M[c, c])

The conventions differ only for classes that are absent from the evaluated images:

| convention | absent from truth and prediction | predicted, but absent from the truth | source |
|---|---|---|---|
| mmseg | left out of the mean | 0 | mmsegmentation IoUMetric, DINOv3, HF evaluate: nanmean |
| detectron2 | left out | left out | detectron2 SemSegEvaluator: mean over classes with truth |
| csail | 0 | 0 | CSAILVision/sceneparsing: intersection / (union + eps), mean of 150 |

On the full validation set every class occurs and the three agree.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from ade_harness.data.labels import NUM_CLASSES

Matrix = npt.NDArray[np.int64]


class Convention(StrEnum):
    """How absent classes enter the mean."""

    MMSEG = "mmseg"
    DETECTRON2 = "detectron2"
    CSAIL = "csail"


def _areas(matrix: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """Return (intersection, ground-truth area, predicted area), each int64 [150]."""
    if matrix.shape != (NUM_CLASSES, NUM_CLASSES + 1) or not np.issubdtype(matrix.dtype, np.integer):
        raise ValueError(
            f"expected an integer confusion matrix [{NUM_CLASSES}, {NUM_CLASSES + 1}], got {matrix.dtype}{matrix.shape}"
        )
    return np.diagonal(matrix), matrix.sum(1), matrix[:, :NUM_CLASSES].sum(0)


def _ratio(numerator: Matrix, denominator: Matrix) -> npt.NDArray[np.float64]:
    """Divide; NaN where the denominator is 0."""
    ratio: npt.NDArray[np.float64] = np.full(numerator.shape, np.nan)
    return np.divide(numerator, denominator, out=ratio, where=denominator > 0)


def class_iou(matrix: Matrix) -> npt.NDArray[np.float64]:
    """Return IoU per class, float64 [150], 0..1; NaN for a class in neither truth nor prediction."""
    intersection, truth, predicted = _areas(matrix)
    return _ratio(intersection, truth + predicted - intersection)


def class_accuracy(matrix: Matrix) -> npt.NDArray[np.float64]:
    """Return the share of each class's pixels that were found, float64 [150], 0..1; NaN without ground truth."""
    intersection, truth, _ = _areas(matrix)
    return _ratio(intersection, truth)


def mean_iou(matrix: Matrix, convention: Convention = Convention.MMSEG) -> float:
    """Return mIoU, 0..1, in a convention of the table above; 0.0 if it has no class to average."""
    iou = class_iou(matrix)
    if convention is Convention.CSAIL:
        return float(np.nan_to_num(iou).mean())
    counted = ~np.isnan(iou) if convention is Convention.MMSEG else matrix.sum(1) > 0
    return float(iou[counted].mean()) if counted.any() else 0.0


@dataclass(frozen=True)
class Scores:
    """The figures of a run, fractions 0..1."""

    mIoU: float
    """In mmsegmentation's convention: the headline."""
    mIoU_csail: float
    mIoU_detectron2: float
    pixel_accuracy: float
    mean_accuracy: float
    """Mean over classes with ground truth."""
    fwIoU: float
    """IoU weighted by the classes' share of the valid pixels."""
    final_score: float
    """The scene parsing challenge's: the mean of pixel accuracy and mIoU."""

    def as_dict(self) -> dict[str, float]:
        """Return the scores by name."""
        return asdict(self)


def scores(matrix: Matrix) -> Scores:
    """Return every score of a confusion matrix int64 [150, 151]."""
    intersection, truth, _ = _areas(matrix)
    iou, accuracy = class_iou(matrix), class_accuracy(matrix)
    pixels = int(truth.sum())
    pixel_accuracy = int(intersection.sum()) / pixels if pixels else 0.0
    present = truth > 0
    headline = mean_iou(matrix, Convention.MMSEG)
    return Scores(
        mIoU=headline,
        mIoU_csail=mean_iou(matrix, Convention.CSAIL),
        mIoU_detectron2=mean_iou(matrix, Convention.DETECTRON2),
        pixel_accuracy=pixel_accuracy,
        mean_accuracy=float(accuracy[present].mean()) if pixels else 0.0,
        fwIoU=float((truth[present] / pixels * iou[present]).sum()) if pixels else 0.0,
        final_score=(pixel_accuracy + headline) / 2,
    )
