"""What a near-zero score may be due to: reported where the predictions show it, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from ade_harness.data.ade20k_labels import ade20k_classes
from ade_harness.metrics.counts import Row, sparse_counts
from ade_harness.metrics.diagnosis import _best_reading, diagnose, sign_test

Labels = npt.NDArray[np.intp]
CLASSES = ade20k_classes()


def row_of(number: int, truth: Labels, predicted: Labels) -> Row:
    matrix = np.zeros((150, 151), np.int64)
    np.add.at(matrix, (truth.reshape(-1), predicted.reshape(-1)), 1)
    return Row(f"i{number}", *truth.shape, truth.size, 0, *sparse_counts(matrix), "", "", 0.0, 0, "")


def rows_of(predict: Callable[[Labels, np.random.Generator], Labels], images: int = 24, classes: int = 40) -> list[Row]:
    """Return rows of images with a few regions each; common classes are commoner, as in ADE20K."""
    rows = []
    for number in range(images):
        rng = np.random.default_rng(number)
        regions = np.minimum(rng.geometric(0.1, 12), classes)
        truth = np.repeat(regions, 40).reshape(12, 40)
        rows.append(row_of(number, truth, predict(truth, rng)))
    return rows


def noisy(share: float, change: Callable[[Labels], Labels]) -> Callable[[Labels, np.random.Generator], Labels]:
    """Return predictions that are right in `share` of the pixels, then changed."""

    def predict(truth: Labels, rng: np.random.Generator) -> Labels:
        return change(np.where(rng.random(truth.shape) < share, truth, rng.integers(0, 150, truth.shape)))

    return predict


@pytest.mark.parametrize(("shift", "word"), [(1, "one too high: with 1 subtracted"), (-1, "one too low: with 1 added")])
def test_shifted_labels_are_recognised(shift: int, word: str) -> None:
    message = diagnose(rows_of(noisy(0.8, lambda p: np.clip(p + shift, 0, 149))), CLASSES)
    assert message is not None
    assert f"every predicted class may be {word}, 8" in message
    assert "more than a constant prediction in 24 of 24 images (sign test, p = 6e-08)" in message


def test_another_class_order_is_recognised() -> None:
    order = np.random.default_rng(0).permutation(150)
    message = diagnose(rows_of(noisy(0.8, lambda p: order[p])), CLASSES)
    assert message is not None
    assert "the class order may differ" in message
    assert "in the other half 7" in message or "in the other half 8" in message


UNTRAINED = np.random.default_rng(3).integers(0, 150, 150)


@pytest.mark.parametrize(
    "predict",
    [
        lambda truth, rng: rng.integers(0, 150, truth.shape),
        lambda truth, rng: np.zeros_like(truth),
        lambda truth, rng: np.full_like(truth, 2),  # the class after the commonest
        lambda truth, rng: np.where(rng.random(truth.shape) < 0.9, 2, rng.integers(0, 150, truth.shape)),  # collapsed
        lambda truth, rng: np.full_like(truth, rng.integers(0, 150)),  # one class an image
        lambda truth, rng: UNTRAINED[rng.integers(0, 12, (len(truth), 1))].repeat(truth.shape[1], 1),
        noisy(1.0, lambda p: p),
        noisy(0.05, lambda p: np.clip(p + 1, 0, 149)),  # hardly better than noise, whatever the shift
    ],
    ids=["noise", "zero", "constant", "collapsed", "one an image", "regions", "right", "weak"],
)
def test_no_advice_without_evidence(predict: Callable[[Labels, np.random.Generator], Labels]) -> None:
    assert diagnose(rows_of(predict), CLASSES) is None


def test_few_images_or_classes_are_no_evidence() -> None:
    shifted = noisy(0.9, lambda p: np.clip(p + 1, 0, 149))
    assert diagnose(rows_of(shifted, images=9), CLASSES) is None
    assert diagnose(rows_of(shifted, images=10), CLASSES) is not None
    few = rows_of(lambda truth, rng: truth + 1, classes=4)
    assert len({int(v) for row in few for v in row.ground_truth}) == 4
    assert diagnose(few, CLASSES) is None
    assert diagnose(rows_of(lambda truth, rng: truth + 1, classes=5), CLASSES) is not None
    assert diagnose([], CLASSES) is None


@pytest.mark.parametrize(
    ("wins", "trials", "expected"), [(0, 0, 1.0), (10, 10, 2**-10), (9, 10, 11 / 1024), (5, 9, 0.5)]
)
def test_the_sign_test(wins: int, trials: int, expected: float) -> None:
    assert sign_test(wins, trials) == expected


@pytest.mark.parametrize(("lost", "expected"), [(0, True), (5, False)])
def test_a_lead_that_chance_may_give_is_no_evidence(lost: int, expected: bool) -> None:
    """12 of 17 images speak for it, and 5 against it: sign test, p = 0.07."""
    rows = rows_of(noisy(0.8, lambda p: np.clip(p + 1, 0, 149)), images=12)
    commonest = np.full((12, 40), int(np.argmax(sum(np.bincount(r.ground_truth, r.pixels, 150) for r in rows))))
    rows += [row_of(100 + number, commonest, np.full_like(commonest, 149 - number)) for number in range(lost)]
    assert sign_test(12, 12 + lost) == pytest.approx(2**-12 if expected else 0.0717, rel=1e-2)
    assert (diagnose(rows, CLASSES) is not None) is expected


def test_a_class_of_one_pixel_is_matched_too() -> None:
    matrix = np.zeros((3, 4), np.int64)
    matrix[0, 1], matrix[1, 2], matrix[2, 0] = 5, 1, 1
    reading, moved = _best_reading(matrix)
    assert reading.tolist() == [2, 0, 1, -1]
    assert moved == [(0, 1), (1, 2), (2, 0)]


def test_few_classes_on_either_side_are_no_evidence() -> None:
    """Four in the truth and many predicted, and the other way round."""
    scattered = rows_of(
        lambda truth, rng: np.where(rng.random(truth.shape) < 0.6, truth + 1, rng.integers(5, 150, truth.shape)),
        classes=4,
    )
    assert len({int(v) for row in scattered for v in row.prediction}) > 50
    assert diagnose(scattered, CLASSES) is None
    collapsed = rows_of(lambda truth, rng: np.minimum(truth, 4) + 1)
    assert len({int(v) for row in collapsed for v in row.prediction}) <= 4
    assert diagnose(collapsed, CLASSES) is None


def plus_one(images: int, right: int, tied: int = 0, lost: int = 0, common: int = 10, kept: bool = False) -> list[Row]:
    """Return rows of 100 pixels an image whose predictions are one too high, or class 149.

    Args:
        images: of which the other reading, with 1 subtracted, is right in `right` pixels, and a constant in `common`.
        right: pixels.
        tied: more images, in which the constant is right as often as the reading.
        lost: more images, in which the constant is right and the reading is not.
        common: pixels of the commonest class in each of `images`.
        kept: predict the commonest class as it is.
    """
    rows = []
    for number in range(images + tied + lost):
        truth, predicted = np.zeros(100, np.intp), np.full(100, 149)
        if number < images:
            truth[common:] = 10 + number % 7 * 12 + np.arange(100 - common) % 6
            predicted[common : common + right] = truth[common : common + right] + 1
            predicted[:common] = 0 if kept else 149
        elif number < images + tied:
            truth[50:] = 10
            predicted[50:] = 11
        rows.append(row_of(number, truth[None], predicted[None]))
    return rows


def test_ties_between_readings_are_no_trials() -> None:
    message = diagnose(plus_one(12, 80, tied=5), CLASSES)
    assert message is not None
    assert "more than a constant prediction in 12 of 12 images" in message
    assert diagnose(plus_one(9, 80, tied=5), CLASSES) is None


def test_chance_explains_some_leads() -> None:
    assert diagnose(plus_one(12, 80, lost=1), CLASSES) is None  # p = 0.0017
    message = diagnose(plus_one(13, 80, lost=1), CLASSES)
    assert message is not None
    assert "in 13 of 14 images (sign test, p = 0.0009)" in message


def test_another_reading_must_be_right_often_and_far_oftener() -> None:
    assert diagnose(plus_one(12, 8, common=5), CLASSES) is None  # 8 % of the pixels, of none: too few
    assert "10% of the pixels agree instead of 0%" in str(diagnose(plus_one(12, 10, common=5), CLASSES))  # the least
    assert "11% of the pixels agree instead of 0%" in str(diagnose(plus_one(12, 11, common=5), CLASSES))
    assert diagnose(plus_one(12, 25, kept=True), CLASSES) is None  # 25 %, of 10 %: not three times
    assert "35% of the pixels agree instead of 10%" in str(diagnose(plus_one(12, 35, kept=True), CLASSES))


def even(
    classes: list[int], images: int = 24, change: Callable[[Labels, Labels], object] = lambda *_: None
) -> list[Row]:
    """Return rows of these classes, equally common, with predictions one too high, both changed in place."""
    rows = []
    for number in range(images):
        truth = np.random.default_rng(number).choice(classes, (12, 40))
        predicted = truth + 1
        change(truth, predicted)
        rows.append(row_of(number, truth, predicted))
    return rows


def test_five_classes_on_both_sides_are_evidence() -> None:
    assert diagnose(even([1, 2, 3, 4]), CLASSES) is None
    assert diagnose(even([1, 2, 3, 4, 148]), CLASSES) is not None
    rows = even([1, 2, 3, 4])
    truth, predicted = np.array([[1, 2, 3, 4, 9]]), np.array([[2, 3, 4, 5, 10]])  # the fifth in one pixel of all
    assert diagnose([*rows, row_of(24, truth, predicted)], CLASSES) is not None

    def one_prediction_for_all_others(truth: Labels, predicted: Labels) -> None:
        truth[:, :4] = np.arange(20, 32)[:, None]
        predicted[:, :4] = 2

    few_predicted = even([1, 2, 3, 4], change=one_prediction_for_all_others)
    assert len({int(v) for row in few_predicted for v in row.prediction}) == 4
    assert diagnose(few_predicted, CLASSES) is None

    def one_truth_predicted_as_many(truth: Labels, predicted: Labels) -> None:
        predicted[:, :4] = np.arange(20, 32)[:, None]

    few_true = even([1, 2, 3, 4], change=one_truth_predicted_as_many)
    assert len({int(v) for row in few_true for v in row.prediction}) > 5
    assert diagnose(few_true, CLASSES) is None


def test_a_score_that_is_not_near_zero_needs_no_reason() -> None:
    def one_class_right(truth: Labels, predicted: Labels) -> None:
        predicted[truth == 1] = 1

    assert diagnose(even(list(range(1, 11)), change=one_class_right), CLASSES) is None  # mIoU 0.1
    assert diagnose(even(list(range(1, 11))), CLASSES) is not None


def test_an_order_is_fitted_on_every_second_image_and_tested_on_the_others() -> None:
    order = np.random.default_rng(1).permutation(150)

    def rows(classes_of: Callable[[int], list[int]]) -> list[Row]:
        drawn = [np.random.default_rng(n).choice(classes_of(n), (12, 40)) for n in range(24)]
        return [row_of(n, truth, order[truth]) for n, truth in enumerate(drawn)]

    found = str(diagnose(rows(lambda n: [1, 2, 3, 3, 4, 5]), CLASSES))
    assert "in 12 of 12 images" in found
    assert f"what is called {CLASSES.names[order[3]]!r} is mostly {CLASSES.names[3]!r}" in found  # the commonest
    # a fifth class in one image alone: of those that are fitted, or of those that are tested
    assert diagnose(rows(lambda n: [1, 2, 3, 4, *[5] * (n == 2)]), CLASSES) is not None
    assert diagnose(rows(lambda n: [1, 2, 3, 4, *[5] * (n == 3)]), CLASSES) is None


def test_three_times_as_many_pixels_are_far_more() -> None:
    def rows(right: int) -> list[Row]:
        """10 of 80 pixels are right as they are, and `right` with 1 subtracted."""
        made = []
        for number in range(12):
            truth, predicted = np.zeros(80, np.intp), np.full(80, 149)
            truth[10:] = 10 + number % 7 * 12 + np.arange(70) % 6
            predicted[:10] = 0
            predicted[10 : 10 + right] = truth[10 : 10 + right] + 1
            made.append(row_of(number, truth[None], predicted[None]))
        return made

    assert "38% of the pixels agree instead of 12%" in str(diagnose(rows(30), CLASSES))
    assert diagnose(rows(29), CLASSES) is None
