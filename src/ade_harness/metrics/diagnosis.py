"""Recognise the usual reasons for an mIoU near zero: a wrong class order or an off-by-one in the labels."""

from __future__ import annotations

import numpy as np

from ade_harness.data.labels import Classes
from ade_harness.metrics.confusion import Matrix, scores

_NEAR_ZERO = 0.05
_CLEARLY_BETTER = 3.0
_MOVED_CLASSES = 5


def diagnose(matrix: Matrix, classes: Classes) -> str | None:
    """Return a sentence on what is probably wrong with the class map, or None.

    It speaks only when the score is very low and another reading of the same predictions is far better.

    Args:
        matrix: int64 [C, C + 1].
        classes: their names.
    """
    result = scores(matrix)
    if result.mIoU_detectron2 >= _NEAR_ZERO or matrix.sum() == 0:
        return None
    for shift, reason in (
        (1, f"is one too low: add 1 (zero-based labels read as 1..{len(classes)}, or reduce_zero_label applied twice)"),
        (
            -1,
            "is one too high: subtract 1 (output 0 is 'other' or background, or reduce_zero_label was not applied)",
        ),
    ):
        shifted = np.zeros_like(matrix)
        source = matrix[:, :-1]
        if shift == 1:
            shifted[:, 1:-1] = source[:, :-1]
        else:
            shifted[:, :-2] = source[:, 1:]
        if _is_better(shifted, result.pixel_accuracy):
            return f"The score is near zero and every predicted class {reason}. Check model.class_map or model.encoding"
    pairs = _one_to_one(matrix)
    agreeing = sum(int(matrix[t, p]) for t, p in pairs) / int(matrix.sum())
    moved = [(t, p) for t, p in pairs if t != p]
    if len(moved) >= _MOVED_CLASSES and agreeing > 0.3 and agreeing > _CLEARLY_BETTER * result.pixel_accuracy:
        truth, predicted = moved[0]
        return (
            f"The score is near zero but the predictions are consistent: what is called {classes.names[predicted]!r}"
            f" is mostly {classes.names[truth]!r}. The class order differs: set model.class_map"
        )
    return None


def _one_to_one(matrix: Matrix) -> list[tuple[int, int]]:
    """Match truths and predictions one to one, the largest counts first; pairs without pixels are left out."""
    counts = matrix[:, :-1].copy()
    pairs = []
    while counts.max(initial=0) > 0:
        truth, predicted = divmod(int(counts.argmax()), len(counts))
        pairs.append((truth, predicted))
        counts[truth, :] = 0
        counts[:, predicted] = 0
    return pairs


def _is_better(matrix: Matrix, pixel_accuracy: float) -> bool:
    accuracy = scores(matrix).pixel_accuracy
    return accuracy > 0.1 and accuracy > _CLEARLY_BETTER * max(pixel_accuracy, 1e-9)
