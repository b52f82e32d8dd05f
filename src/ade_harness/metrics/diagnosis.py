"""Recognise the usual reasons for an mIoU near zero: another class order, or labels that are off by one.

Another reading of the same predictions is proposed only if it is far better than theirs, and better than a predictor
that says the commonest class everywhere in so many images that chance would rarely do it (a sign test over images:
pixels of one image are not independent). An untrained network, or one that says one class, gives no reading such a
lead. Even then it is a possibility, and the sentence says what speaks for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ade_harness.data.labels import Classes
from ade_harness.metrics.confusion import Matrix, scores
from ade_harness.metrics.counts import Row, matrix_of

_NEAR_ZERO = 0.05
_CLEARLY_BETTER = 3.0
_MIN_ACCURACY = 0.1
_MIN_CLASSES = 5
"""In the truth, among the predictions, and moved by another order."""
_MIN_IMAGES = 10
"""Images of a sign test: ten of ten is the first result below `_CHANCE`."""
_CHANCE = 1e-3

Reading = npt.NDArray[np.intp]
"""[C + 1]: the class that each predicted class would stand for; for none -1, or C."""


def diagnose(rows: Sequence[Row], classes: Classes) -> str | None:
    """Return a sentence on what may be wrong with the class map, or None.

    Args:
        rows: of the images.
        classes: of the data set.
    """
    matrix = matrix_of(rows, len(classes))
    if min((matrix.sum(1) > 0).sum(), (matrix[:, :-1].sum(0) > 0).sum()) < _MIN_CLASSES:
        return None
    if scores(matrix).mIoU_detectron2 >= _NEAR_ZERO:
        return None
    for shift, reason in (
        (1, f"one too low: with 1 added, {{}}. Zero-based labels read as 1..{len(classes)}, or reduce_zero_label"
            " applied twice, do that"),
        (-1, "one too high: with 1 subtracted, {}. A first output that is 'other' or background, or a missing"
             " reduce_zero_label, does that"),
    ):  # fmt: skip
        reading = np.append(np.arange(len(classes)) + shift, -1)
        evidence = _evidence(rows, reading, matrix)
        if evidence:
            found = f"every predicted class may be {reason.format(evidence)}"
            return f"The score is near zero, and {found}. Check model.class_map and model.encoding"
    fitted, tested = rows[::2], rows[1::2]
    reading, moved = _best_reading(matrix_of(fitted, len(classes)))
    evidence = _evidence(tested, reading, matrix_of(tested, len(classes))) if len(moved) >= _MIN_CLASSES else None
    if evidence is None:
        return None
    truth, predicted = moved[0]
    return (
        "The score is near zero, and the class order may differ: what is called"
        f" {classes.names[predicted]!r} is mostly {classes.names[truth]!r}, and so on for {len(moved)} classes; with"
        f" the order that fits half of the images, in the other half {evidence}. Check model.class_map"
    )


def _evidence(rows: Sequence[Row], reading: Reading, matrix: Matrix) -> str | None:
    """Return how much better another reading of predictions is, in words; None if it is not, or chance would do it."""
    commonest = int(matrix.sum(1).argmax())
    read = [int(row.pixels[reading[row.prediction] == row.ground_truth].sum()) for row in rows]
    constant = [int(row.pixels[row.ground_truth == commonest].sum()) for row in rows]
    wins = sum(a > b for a, b in zip(read, constant, strict=True))
    losses = sum(a < b for a, b in zip(read, constant, strict=True))
    chance, pixels = sign_test(wins, wins + losses), int(matrix.sum())
    accuracy, before = sum(read) / max(pixels, 1), int(np.trace(matrix)) / max(pixels, 1)
    if wins + losses < _MIN_IMAGES or chance > _CHANCE:
        return None
    if accuracy < _MIN_ACCURACY or accuracy < _CLEARLY_BETTER * before:
        return None
    return (
        f"{accuracy:.0%} of the pixels agree instead of {before:.0%}, more than a constant prediction in {wins} of"
        f" {wins + losses} images (sign test, p = {chance:.1g})"
    )


def sign_test(wins: int, trials: int) -> float:
    """Return the probability of so many wins or more if each has the chance 1/2; 1 without trials."""
    return float(sum(math.comb(trials, k) for k in range(wins, trials + 1)) / 2**trials)


def _best_reading(matrix: Matrix) -> tuple[Reading, list[tuple[int, int]]]:
    """Match truths and predictions one to one, the largest counts first.

    Returns:
        The reading, and the (truth, prediction) pairs that differ, those of the most pixels first.
    """
    counts = matrix[:, :-1].copy()
    reading, moved = np.full(matrix.shape[1], -1), []
    while counts.max(initial=0) > 0:
        truth, predicted = divmod(int(counts.argmax()), len(counts))
        reading[predicted] = truth
        if truth != predicted:
            moved.append((truth, predicted))
        counts[truth, :] = 0
        counts[:, predicted] = 0
    return reading, moved
