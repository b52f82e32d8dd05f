"""Intervals and paired tests against naive loops, enumeration and SciPy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ade_harness.metrics import comparison
from ade_harness.metrics.areas import ImageAreas, areas_of, image_areas, split_areas
from ade_harness.metrics.bootstrap import Interval, Resampled, bootstrap, draw_counts
from ade_harness.metrics.comparison import compare, holm
from ade_harness.metrics.confusion import area_scores, class_iou, scores
from ade_harness.metrics.counts import Row, matrix_of, sparse_counts
from ade_harness.metrics.verdict import judge


def make_rows(images: int, seed: int = 0, classes: int = 150, right: float = 0.7) -> list[Row]:
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(images):
        matrix = np.zeros((150, 151), np.int64)
        for truth in rng.choice(classes, min(8, classes), replace=False):
            pixels = int(rng.integers(50, 4000))
            good = int(pixels * min(1.0, rng.normal(right, 0.2)) * (rng.random() < 0.9))
            matrix[truth, truth] += max(good, 0)
            matrix[truth, rng.integers(0, classes if classes < 150 else 151)] += pixels - max(good, 0)
        truth_c, prediction, counts = sparse_counts(matrix)
        rows.append(
            Row(f"ADE_val_{index:08d}", 10, 10, int(counts.sum()), 0, truth_c, prediction, counts, f"{seed}", "c" * 32, 0.1, 0, "h")
        )  # fmt: skip
    return rows


def test_areas_are_those_of_the_matrix() -> None:
    rows = make_rows(9)
    areas = image_areas(rows, 150)
    for row, stacked in zip(rows, areas.stacked, strict=True):
        assert np.array_equal(stacked, areas_of(matrix_of([row], 150)))
    assert areas.scores()["mIoU"][3] == scores(matrix_of(rows[3:4], 150)).mIoU


def test_resampled_scores_equal_the_naive_loop_in_every_bit() -> None:
    rows = make_rows(40)
    found = bootstrap(image_areas(rows, 150), 700, seed=3)  # more than one block
    counts = np.concatenate(list(draw_counts(40, 700, seed=3)))
    assert counts.shape == (700, 40)
    assert (counts.sum(1) == 40).all()
    for index in (0, 1, 499, 500, 699):
        matrix = matrix_of(
            [row for row, times in zip(rows, counts[index], strict=True) for _ in range(int(times))], 150
        )
        for name, value in scores(matrix).as_dict().items():
            assert found.scores[name].draws[index, 0] == value, name
        assert np.array_equal(found.class_iou.draws[index], class_iou(matrix), equal_nan=True)
    for index in (0, 39):
        left_out = scores(matrix_of([r for i, r in enumerate(rows) if i != index], 150))
        assert found.scores["mIoU"].without[index, 0] == left_out.mIoU
    for kind in ("centred", "percentile", "bca"):
        one_each = {name: getattr(score, kind)(0.9) for name, score in found.scores.items()}
        assert found.intervals(0.9, kind) == {name: intervals[0] for name, intervals in one_each.items()}
    again = bootstrap(image_areas(rows, 150), 700, seed=3)
    assert np.array_equal(again.class_iou.draws, found.class_iou.draws, equal_nan=True)
    assert not np.array_equal(
        bootstrap(image_areas(rows, 150), 700, seed=4).scores["mIoU"].draws, found.scores["mIoU"].draws
    )


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_intervals_are_scipys(method: str) -> None:
    from scipy import stats

    areas = image_areas(make_rows(60, classes=5), 150)
    resampled = bootstrap(areas, 20_000).scores["pixel_accuracy"]
    found = getattr(resampled, method)()[0]

    def accuracy(right: np.ndarray, pixels: np.ndarray, axis: int = -1) -> np.ndarray:
        return right.sum(axis) / pixels.sum(axis)

    sample = (areas.intersection.sum(1), areas.truth.sum(1))
    expected = stats.bootstrap(
        sample, accuracy, n_resamples=20_000, paired=True, vectorized=True, rng=np.random.default_rng(0),
        method={"percentile": "percentile", "bca": "BCa"}[method],
    ).confidence_interval  # fmt: skip
    width = expected.high - expected.low
    # both are random: the ends' standard error is about 1 % of the width
    assert found.low == pytest.approx(expected.low, abs=0.05 * width)
    assert found.high == pytest.approx(expected.high, abs=0.05 * width)


def test_the_shown_interval_holds_the_measured_score_though_resamples_lack_rare_classes() -> None:
    found = bootstrap(image_areas(make_rows(20), 150), 2000).scores["mIoU_csail"]
    (percentile,), (centred,), (value,) = found.percentile(), found.centred(), found.value
    assert not percentile.holds(value)
    assert centred.holds(value)
    assert centred.high - centred.low == pytest.approx(percentile.high - percentile.low)


def test_bca_moves_towards_the_longer_tail() -> None:
    from scipy import stats

    rng = np.random.default_rng(0)
    sample = rng.exponential(size=40)
    draws = sample[rng.integers(0, 40, (20_000, 40))].mean(1)[:, None]
    without = ((sample.sum() - sample) / 39)[:, None]
    resampled = Resampled(np.array([sample.mean()]), draws, without)
    (percentile,), (bca,) = resampled.percentile(), resampled.bca()
    expected = stats.bootstrap((sample,), np.mean, n_resamples=20_000, method="BCa", rng=rng).confidence_interval
    assert bca.high > percentile.high
    assert bca.low == pytest.approx(expected.low, abs=0.02)
    assert bca.high == pytest.approx(expected.high, abs=0.02)


def test_a_class_of_one_image_has_no_interval_of_its_own() -> None:
    """It is in 63 % of the resamples, always with the same IoU; a class of none has nothing."""
    rows = make_rows(30, classes=4, right=0.5)
    matrix = matrix_of(rows[:1], 150)
    matrix[100, 100], matrix[100, 1] = 60, 40
    truth, prediction, pixels = sparse_counts(matrix)
    rows[0] = Row("ADE_val_00000000", 10, 10, int(pixels.sum()), 0, truth, prediction, pixels, "0", "c", 0.1, 0, "h")
    found = bootstrap(image_areas(rows, 150), 1000).class_iou
    assert found.percentile()[100] == Interval(0.6, 0.6)
    assert np.isnan(found.draws[:, 100]).mean() == pytest.approx(np.exp(-1), abs=0.05)
    assert found.bca()[149] is None
    assert found.percentile()[149] is None


def test_equal_runs_do_not_differ() -> None:
    areas = image_areas(make_rows(25), 150)
    found = compare(areas, areas, 500)
    for difference in (*found.scores.values(), *found.classes.values()):
        assert difference.value == 0
        assert (difference.p_permutation, difference.p_bootstrap, difference.p_corrected) == (1, 1, 1)
        assert not difference.significant()
    assert found.scores["mIoU"].interval == Interval(0, 0)
    assert not found.influence.any()


def shifted(areas: ImageAreas, seed: int, share: float) -> ImageAreas:
    """Make another run on the same images: some errors fixed."""
    rng = np.random.default_rng(seed)
    stacked = areas.stacked.copy()
    intersection, truth, predicted = split_areas(stacked)
    gain = np.floor((truth - intersection) * rng.random(truth.shape) * share)
    intersection += gain
    predicted += gain
    return ImageAreas(areas.ids, stacked)


@pytest.mark.slow
def test_p_values_are_those_of_all_exchanges() -> None:
    first = image_areas(make_rows(7, classes=3), 150)
    second = shifted(first, 0, 0.2)
    found = compare(first, second, 20_000)

    def statistic(stacked: np.ndarray) -> float:
        return float(area_scores(*split_areas(stacked.sum(0)))["mIoU"])

    observed = statistic(second.stacked) - statistic(first.stacked)
    differences = []
    for swap in itertools.product((False, True), repeat=7):
        one = np.where(np.array(swap)[:, None], second.stacked, first.stacked)
        two = np.where(np.array(swap)[:, None], first.stacked, second.stacked)
        differences.append(statistic(two) - statistic(one))
    exact = np.mean(np.abs(differences) >= abs(observed) - 1e-12)
    assert found.scores["mIoU"].value == pytest.approx(observed, abs=1e-15)
    assert found.scores["mIoU"].p_permutation == pytest.approx(exact, abs=4 * np.sqrt(exact / 20_000))


def test_a_clear_difference_is_found_and_a_mean_one_has_its_images() -> None:
    first = image_areas(make_rows(80), 150)
    found = compare(first, shifted(first, 1, 0.6), 2000)
    headline = found.scores["mIoU"]
    assert headline.value > 0
    assert headline.significant()
    assert headline.p_permutation == pytest.approx(1 / 2001)
    assert headline.p_bootstrap == pytest.approx(2 / 2001)  # no resample is below, on either side
    assert headline.interval is not None
    assert headline.interval.low > 0
    # what exchanging single images changes adds up to nearly the whole difference
    assert found.influence.sum() == pytest.approx(headline.value, rel=0.1)
    worse = compare(shifted(first, 1, 0.6), first, 2000)
    assert worse.scores["mIoU"].value == -headline.value


def test_the_same_seed_gives_the_same_numbers_in_every_version() -> None:
    """Reports are compared over years: the order of the random draws is part of the result."""
    first = image_areas(make_rows(30, classes=12), 150)
    found = compare(shifted(first, 4, 0.3), shifted(first, 5, 0.3), 1200, seed=7)
    headline = found.scores["mIoU"]
    assert round(headline.p_permutation * 1201) == 597
    assert round(headline.p_bootstrap * 1201) == 506
    assert headline.interval is not None
    assert (headline.interval.low, headline.interval.high) == pytest.approx(
        (-0.009565017005792511, 0.003644489471839834), abs=1e-12
    )
    (interval,) = bootstrap(first, 1200, seed=7).scores["mIoU"].centred()
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx((0.41052023989595876, 0.4924470118682832), abs=1e-12)
    (interval,) = bootstrap(first, 1200, seed=7).scores["mIoU"].bca()
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx(
        (0.4079435903177459, 0.48991352259743565), abs=1e-9
    )  # SciPy's normal quantiles


def test_a_difference_is_within_minus_one_and_one() -> None:
    """With few images, resamples lie far from the value, and the moved interval would end beyond."""
    matrix_right, matrix_wrong = (np.zeros((150, 151), np.int64) for _ in range(2))
    matrix_right[3, 3] = matrix_wrong[3, 4] = 100
    matrix_right[4, 4] = matrix_wrong[4, 3] = 100

    def run(matrices: list[np.ndarray]) -> ImageAreas:
        rows = [
            Row(f"ADE_val_{i:08d}", 10, 10, 200, 0, *sparse_counts(m), "", "c" * 32, 0.1, 0, "h")
            for i, m in enumerate(matrices)
        ]
        return image_areas(rows, 150)

    right, wrong = run([matrix_right] * 3), run([matrix_wrong] * 3)
    for one, two, value in ((wrong, right, 1.0), (right, wrong, -1.0)):
        difference = compare(one, two, 300).scores["mIoU"]
        assert difference.value == value
        assert difference.interval == Interval(value, value)
    assert comparison._resample(wrong, right, ["mIoU"], 4, 0).bounds == (-1.0, 1.0)


def test_absent_classes_warn_of_no_division() -> None:
    with np.errstate(all="raise"):
        assert np.isnan(class_iou(matrix_of(make_rows(1), 150))).any()


@pytest.mark.slow
def test_false_claims_are_as_rare_as_the_level_says() -> None:
    """Exchangeable runs: about 5 % of the tests are below 0.05, and corrected classes almost never."""
    uncorrected, any_class = [], []
    for seed in range(60):
        first = image_areas(make_rows(30, seed, classes=20), 150)
        one, two = shifted(first, 2 * seed, 0.3), shifted(first, 2 * seed + 1, 0.3)
        found = compare(one, two, 400)
        uncorrected.append(found.scores["mIoU"].p_permutation <= 0.05)
        any_class.append(any(d.significant() for d in found.classes.values()))
    assert sum(uncorrected) <= 9  # binomial(60, 0.05): 10 or more has a chance of 0.1 %
    assert sum(any_class) <= 9


def test_compare_refuses_other_images() -> None:
    with pytest.raises(ValueError, match="different images"):
        compare(image_areas(make_rows(5), 150), image_areas(make_rows(6), 150))


def test_holms_correction() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_corrected_p_values_keep_their_order(p_values: list[float]) -> None:
    corrected = np.array(holm(p_values))
    assert (corrected >= np.array(p_values) - 1e-12).all()
    assert (corrected <= 1).all()
    assert (np.diff(corrected[np.argsort(p_values, kind="stable")]) >= 0).all()


@pytest.mark.parametrize(
    ("measured", "published", "interval", "marks", "answer", "overrides"),
    [
        (0.57312, 57.3, Interval(0.56, 0.58), (), "yes", "57.31 rounds to the published 57.3"),
        (0.5735, 57.3, None, (), "yes", "reproduced"),
        (0.57361, 57.3, None, (), "no", "57.36 is +0.06 from the published 57.3"),
        (0.5749, 57, None, (), "yes", "57.49 rounds to the published 57"),
        (0.5751, 57, None, (), "no", "57.51 is +0.51 from the published 57"),
        # an interval that ends within the rounding of the published figure holds it
        (0.51, 53.5, Interval(0.50, 0.5348), (), "within the interval", "within the interval, not reproduced"),
        (0.51, 53.5, Interval(0.50, 0.5344), (), "no", "outside of the 95% interval 50.00 to 53.44"),
        (0.56, 53.5, Interval(0.5352, 0.57), (), "within the interval", "within the interval, not reproduced"),
        (0.56, 53.5, Interval(0.5356, 0.57), (), "no", "outside of the 95% interval 53.56 to 57.00"),
        (0.5310, 53.53, Interval(0.52, 0.54), (), "within the interval", "-0.43 from the published 53.53"),
        # 62.5 is as near to 62 as to 63
        (0.64, 62, Interval(0.625, 0.66), (), "within the interval", "within the interval, not reproduced"),
        (0.61, 63, Interval(0.60, 0.625), (), "within the interval", "within the interval, not reproduced"),
        (0.50, 53.5, Interval(0.49, 0.51), (), "no", "outside of the 95% interval 49.00 to 51.00"),
        (0.50, 53.5, None, (), "no", "not reproduced"),
        (0.57312, 57.3, None, ("PARTIAL: 33 of 2,000 images",), "not comparable", "PARTIAL"),
    ],
)  # fmt: skip
def test_verdicts(
    measured: float, published: float, interval: Interval | None, marks: tuple[str, ...], answer: str, overrides: str
) -> None:
    verdict = judge(measured, interval, published, marks)
    assert verdict.answer == answer
    assert overrides in verdict.sentence


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 1.0)])
@pytest.mark.parametrize("near", [0, 1])
def test_a_moved_interval_ends_where_values_end(bounds: tuple[float, float], near: int) -> None:
    """Few images: the median of resamples is far from the value, and the interval would end below 0."""
    ends = np.array(bounds)
    inward = 0.1 if near == 0 else -0.1
    draws = np.linspace(ends[near], ends[near] + 4 * inward, 1001)[:, None]
    (moved,) = Resampled(ends[near : near + 1] + inward / 2, draws, np.zeros((3, 1)), bounds).centred()
    assert moved is not None
    assert (moved.low, moved.high)[near] == bounds[near]
    assert not np.signbit(moved.low + 0.0) or bounds[0] < 0
    assert bounds[0] <= moved.low < moved.high <= bounds[1]


def test_an_interval_holds_its_ends() -> None:
    interval = Interval(0.25, 0.5)
    assert [interval.holds(v) for v in (0.2499, 0.25, 0.4, 0.5, 0.5001)] == [False, True, True, True, False]


@pytest.mark.parametrize(("defined", "expected"), [(99, False), (100, True)])
@pytest.mark.parametrize("kind", ["percentile", "centred", "bca"])
def test_a_hundred_resamples_have_to_be_defined(kind: str, defined: int, expected: bool) -> None:
    draws = np.full((500, 1), np.nan)
    draws[:defined, 0] = np.linspace(0.2, 0.4, defined)
    resampled = Resampled(np.array([0.3]), draws, np.linspace(0.29, 0.31, 20)[:, None])
    (interval,) = getattr(resampled, kind)()
    assert (interval is not None) == expected


def test_ties_with_the_value_count_half_in_bca() -> None:
    """A statistic with few values: with no spread beside the ties, the interval is the percentile interval."""
    draws = np.repeat([0.1, 0.2, 0.3], [100, 300, 100])[:, None]
    symmetric = Resampled(np.array([0.2]), draws, np.array([[0.19], [0.2], [0.21]]))
    (bca,), (percentile,) = symmetric.bca(), symmetric.percentile()
    assert bca == percentile


def test_bca_is_the_percentile_interval_where_no_image_has_influence() -> None:
    resampled = Resampled(np.array([0.4]), np.linspace(0.2, 0.6, 1001)[:, None], np.full((5, 1), 0.4))
    (bca,), (percentile,) = resampled.bca(), resampled.percentile()
    assert bca is not None
    assert percentile is not None
    assert (bca.low, bca.high) == pytest.approx((percentile.low, percentile.high), abs=1e-12)


def test_an_interval_needs_a_value_and_enough_resamples() -> None:
    draws, without = np.linspace(0.2, 0.6, 1001)[:, None], np.linspace(0.3, 0.5, 4)[:, None]
    few = np.full_like(draws, np.nan)
    few[:99] = draws[:99]
    for value, drawn in ((np.nan, draws), (0.4, few)):
        resampled = Resampled(np.array([value]), drawn, without)
        assert resampled.bca() == resampled.centred() == [None]


def test_a_p_value_of_just_the_level_is_significant() -> None:
    def difference(p: float) -> comparison.Difference:
        return comparison.Difference(0.1, 0.2, None, 1.0, 1.0, p)

    assert difference(0.05).significant()
    assert not difference(0.0501).significant()
    assert difference(0.01).significant(0.99)


def test_a_class_that_one_run_alone_has_is_not_compared() -> None:
    """Absent from the truth and predicted by the first: an IoU of 0 there, and none in the second."""
    first = image_areas(make_rows(6, classes=4), 150)
    stacked = first.stacked.copy()
    split_areas(stacked)[2][:, 7] += 5
    assert sorted(compare(ImageAreas(first.ids, stacked), first, 200).classes) == [0, 1, 2, 3]
    assert sorted(compare(first, ImageAreas(first.ids, stacked), 200).classes) == [0, 1, 2, 3]


def test_a_class_of_one_image_is_compared_without_an_interval() -> None:
    first = image_areas(make_rows(30, classes=4), 150)
    for images, shown in ((1, False), (2, True)):
        stacked = first.stacked.copy()
        for part in split_areas(stacked):
            part[:images, 100] = 40
        one, better = ImageAreas(first.ids, stacked), ImageAreas(first.ids, stacked.copy())
        split_areas(better.stacked)[2][:images, 100] = 60
        found = compare(one, better, 1000).classes[100]
        assert found.value == 40 / 60 - 1
        assert (found.interval is not None) == shown


def test_only_images_that_differ_are_exchanged() -> None:
    first = image_areas(make_rows(6, classes=4), 150)
    second = shifted(first, 0, 0.3)
    second.stacked[2] = first.stacked[2]
    found = comparison._exchange(first, second, ["mIoU"], 20, 3)[:, 0]
    moved = np.insert(np.random.default_rng([3, 1]).integers(0, 2, (20, 5)), 2, 0, axis=1)
    for value, exchanged in zip(found, moved[:, :, None] == 1, strict=True):
        one, two = (np.where(exchanged, a.stacked, b.stacked).sum(0) for a, b in ((second, first), (first, second)))
        assert value == area_scores(*split_areas(two))["mIoU"] - area_scores(*split_areas(one))["mIoU"]


def test_bca_of_a_value_beyond_all_resamples_is_finite() -> None:
    """The share below it counts as n / (n + 1): the normal quantile of 1 is infinite."""
    from scipy import stats

    draws = np.linspace(0.2, 0.6, 1000)
    for value, share in ((0.7, 1000 / 1001), (0.1, 1 / 1001)):
        (found,) = Resampled(np.array([value]), draws[:, None], np.full((5, 1), 0.4)).bca()
        ends = stats.norm.cdf(2 * stats.norm.ppf(share) + stats.norm.ppf([0.025, 0.975]))
        assert found is not None
        assert (found.low, found.high) == pytest.approx(tuple(np.quantile(draws, ends)), abs=1e-12)


def test_the_same_numbers_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    first = image_areas(make_rows(7, classes=3), 150)
    found = bootstrap(first, 600), comparison._exchange(first, shifted(first, 0, 0.3), ["mIoU"], 600, 0)
    monkeypatch.setattr("ade_harness.metrics.bootstrap._BLOCK", 77)
    monkeypatch.setattr(comparison, "_BLOCK", 77)
    again = bootstrap(first, 600), comparison._exchange(first, shifted(first, 0, 0.3), ["mIoU"], 600, 0)
    assert np.array_equal(found[0].scores["mIoU"].draws, again[0].scores["mIoU"].draws)
    assert np.array_equal(found[1], again[1], equal_nan=True)


def test_ten_thousand_resamples_of_seed_0_unless_others_are_asked_for() -> None:
    first = image_areas(make_rows(4, classes=3), 150)
    assert np.array_equal(bootstrap(first).scores["mIoU"].draws, bootstrap(first, 10_000, 0).scores["mIoU"].draws)
    difference = compare(first, shifted(first, 0, 0.9)).scores["mIoU"]
    assert difference == compare(first, shifted(first, 0, 0.9), 10_000, 0, 0.95).scores["mIoU"]
    assert Resampled(np.zeros(1), np.zeros((1, 1)), np.zeros((1, 1))).bounds == (0.0, 1.0)


def test_runs_of_other_images_or_another_truth_are_not_compared() -> None:
    """Either is enough: the same ids with other annotations, and other ids whose areas happen to be the same."""
    stacked = np.array([[3.0, 1.0, 4.0, 2.0, 5.0, 1.0], [2.0, 2.0, 3.0, 3.0, 2.0, 4.0]])
    areas = ImageAreas(("a", "b"), stacked)
    assert compare(areas, areas, 1000).scores["mIoU"].value == 0
    other_truth = ImageAreas(areas.ids, stacked + np.array([0, 0, 1, 0, 0, 0]))
    for other in (ImageAreas(("a", "c"), stacked), other_truth):
        with pytest.raises(ValueError, match="the runs have different images, or another ground truth"):
            compare(areas, other, 1000)
