"""Recognise the usual reasons for an mIoU near zero: a wrong class order or an off-by-one in the labels."""

from __future__ import annotations

import numpy as np

from ade_harness.data.labels import NUM_CLASSES, class_names
from ade_harness.metrics.confusion import Matrix, scores

_NEAR_ZERO = 0.05
_CLEARLY_BETTER = 3.0


def diagnose(matrix: Matrix) -> str | None:
    """Return a sentence on what is probably wrong with the class map, or None.

    It speaks only when the score is very low and another reading of the same predictions is far better.
    """
    result = scores(matrix)
    if result.mIoU_detectron2 >= _NEAR_ZERO or matrix.sum() == 0:
        return None
    for shift, reason in (
        (1, "is one too low: add 1 (zero-based labels read as 1..150, or reduce_zero_label applied twice)"),
        (-1, "is one too high: subtract 1 (output 0 is 'other' or background, or reduce_zero_label was not applied)"),
    ):
        shifted = np.zeros_like(matrix)
        source = matrix[:, :NUM_CLASSES]
        if shift == 1:
            shifted[:, 1:NUM_CLASSES] = source[:, :-1]
        else:
            shifted[:, : NUM_CLASSES - 1] = source[:, 1:]
        if _is_better(shifted, result.pixel_accuracy):
            return f"The score is near zero and every predicted class {reason}. Check model.class_map or model.encoding."
    best = matrix[:, :NUM_CLASSES].argmax(0)  # the truth that each predicted class meets most often
    agreeing = int(matrix[best, np.arange(NUM_CLASSES)].sum()) / int(matrix.sum())
    moved = [c for c in range(NUM_CLASSES) if best[c] != c and matrix[best[c], c] > 0]
    if agreeing > 0.3 and agreeing > _CLEARLY_BETTER * max(result.pixel_accuracy, 1e-9) and moved:
        names = class_names()
        heaviest = max(moved, key=lambda c: int(matrix[best[c], c]))
        return (
            f"The score is near zero but the predictions are consistent: what is called {names[heaviest]!r}"
            f" is mostly {names[best[heaviest]]!r}. The class order differs: set model.class_map."
        )
    return None


def _is_better(matrix: Matrix, pixel_accuracy: float) -> bool:
    accuracy = scores(matrix).pixel_accuracy
    return accuracy > 0.1 and accuracy > _CLEARLY_BETTER * max(pixel_accuracy, 1e-9)
