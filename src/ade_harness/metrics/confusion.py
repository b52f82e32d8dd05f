"""mIoU and its relatives from one integer confusion matrix, in each convention in use.

M is int64 [C, C + 1], rows ground truth, columns prediction, valid pixels only. The last column holds valid
pixels predicted as none of the C classes: they are in the row's total (so they are errors for accuracy and for
the union of the true class) and in no class's predicted area.

    IoU_c = M[c, c] / (row_c + column_c - M[c, c])

The conventions differ only for classes that are absent from the evaluated images:

| convention | absent from truth and prediction | predicted, but absent from the truth | source |
|---|---|---|---|
| mmseg | left out of the mean | 0 | mmsegmentation IoUMetric, DINOv3, HF evaluate: nanmean |
| detectron2 | left out | left out | detectron2 SemSegEvaluator: mean over classes with truth |
| csail | 0 | 0 | CSAILVision/sceneparsing: intersection / (union + eps), mean of all C |

On the full validation set every class occurs and the three agree.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.int64]
Areas = npt.NDArray[np.int64] | npt.NDArray[np.float64]
Floats = npt.NDArray[np.float64]


class Convention(StrEnum):
    """How absent classes enter the mean."""

    MMSEG = "mmseg"
    DETECTRON2 = "detectron2"
    CSAIL = "csail"


def _areas(matrix: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """Return (intersection, ground-truth area, predicted area), each int64 [C]."""
    if matrix.ndim != 2 or matrix.shape[1] != len(matrix) + 1 or not np.issubdtype(matrix.dtype, np.integer):
        raise ValueError(f"expected an integer confusion matrix [C, C + 1], got {matrix.dtype}{matrix.shape}")
    return np.ascontiguousarray(np.diagonal(matrix)), matrix.sum(1), matrix[:, :-1].sum(0)


def _ratio(numerator: Areas, denominator: Areas) -> Floats:
    """Divide; NaN where the denominator is 0."""
    ratio: Floats = np.full(numerator.shape, np.nan)
    return np.divide(numerator, denominator, out=ratio, where=denominator > 0)


def class_iou(matrix: Matrix) -> Floats:
    """Return IoU per class, float64 [C], 0..1; NaN for a class in neither truth nor prediction."""
    return area_iou(*_areas(matrix))


def area_iou(intersection: Areas, truth: Areas, predicted: Areas) -> Floats:
    """Return IoU, float64 of the areas' shape, 0..1; NaN where a class is in neither truth nor prediction."""
    return _ratio(intersection, truth + predicted - intersection)


def class_accuracy(matrix: Matrix) -> Floats:
    """Return the share of each class's pixels that were found, float64 [C], 0..1; NaN without ground truth."""
    intersection, truth, _ = _areas(matrix)
    return _ratio(intersection, truth)


def class_dice(matrix: Matrix) -> Floats:
    """Return each class's Dice, float64 [C], 0..1; NaN where a class is in neither truth nor prediction.

    It is the F-score too: the harmonic mean of accuracy (recall) and precision, twice the intersection over the sum of
    both areas.
    """
    intersection, truth, predicted = _areas(matrix)
    return _ratio(2 * intersection, truth + predicted)


def mean_dice(matrix: Matrix) -> float:
    """Return the mean of the classes' Dice, 0..1; NaN where no class occurs."""
    known = [float(value) for value in class_dice(matrix) if not np.isnan(value)]
    return sum(known) / len(known) if known else float("nan")


def mean_iou(matrix: Matrix, convention: Convention = Convention.MMSEG) -> float:
    """Return mIoU, 0..1, in a convention of the table above; 0.0 if it has no class to average."""
    return float(area_scores(*_areas(matrix))[_KEYS[convention]])


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


_KEYS = {
    Convention.MMSEG: "mIoU",
    Convention.CSAIL: "mIoU_csail",
    Convention.DETECTRON2: "mIoU_detectron2",
}


def area_scores(intersection: Areas, truth: Areas, predicted: Areas) -> dict[str, Floats]:
    """Return every score of :class:`Scores`, for one or many sets of class areas.

    Args:
        intersection: [..., C] pixels of each class that were predicted right; integers, or floats that hold them.
        truth: [..., C] pixels of each class in the ground truth.
        predicted: [..., C] valid pixels predicted as each class.

    Returns:
        By score, float64 [...], 0..1, NaN where no pixel is counted. A set's scores are bit-identical
        alone and among others.
    """
    iou = area_iou(intersection, truth, predicted)
    counted, present, pixels = ~np.isnan(iou), truth > 0, truth.sum(-1)
    # absent classes are added as 0, not left out, so that sums are in the same order for any set
    filled = np.where(counted, iou, 0.0)
    found = np.nan_to_num(_ratio(intersection, truth))
    weights = np.divide(truth, pixels[..., None], out=np.zeros(iou.shape), where=pixels[..., None] > 0)
    mean = filled.sum(-1) / np.maximum(counted.sum(-1), 1)
    accuracy = np.nan_to_num(_ratio(intersection.sum(-1, keepdims=True), pixels[..., None]))[..., 0]
    found_scores = {
        "mIoU": mean,
        "mIoU_csail": filled.sum(-1) / iou.shape[-1],
        "mIoU_detectron2": np.where(present, filled, 0.0).sum(-1) / np.maximum(present.sum(-1), 1),
        "pixel_accuracy": accuracy,
        "mean_accuracy": found.sum(-1) / np.maximum(present.sum(-1), 1),
        "fwIoU": (weights * filled).sum(-1),
        "final_score": (accuracy + mean) / 2,
    }
    return {name: np.where(pixels > 0, value, np.nan) for name, value in found_scores.items()}


def scores(matrix: Matrix) -> Scores:
    """Return every score of a confusion matrix int64 [C, C + 1]."""
    return Scores(**{name: float(value) for name, value in area_scores(*_areas(matrix)).items()})
