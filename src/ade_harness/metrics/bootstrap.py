"""Intervals by bootstrap over images: what the score would have been on other images of the same kind.

Images are drawn with replacement, their class areas are added up, and every score is computed anew from the sums. The
sums are one matrix product, [resamples, images] counts times [images, 3 C] areas, exact in float64, so a resample's
scores equal those of the naive loop in every bit. Percentile and BCa intervals: Efron and Tibshirani, An Introduction
to the Bootstrap, 1993, chapters 13 and 14.

The interval that is shown first is the percentile interval, moved so that the median of the resamples is the measured
score. A resample has only 63 % of the images, so it lacks rare classes, and its mIoU is not centred on the sample's:
with few images the plain percentile interval may not even hold the measured score, and BCa, which takes that shift for
a bias of the score itself, is too narrow. How often each holds the truth was measured: docs/statistics.md.

The interval is about images, not about training: another seed of the same recipe is another source of change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ade_harness.metrics.areas import ImageAreas, split_areas
from ade_harness.metrics.confusion import Floats, area_iou, area_scores

RESAMPLES = 10_000
MAX_RESAMPLES = 1_000_000
LEVEL = 0.95
_BLOCK = 500
"""Resamples at a time: 8 MB of counts for 2,000 images. The draws are the same in blocks of any size."""
_MIN_DEFINED = 100
"""Resamples in which a class must occur for an interval of its IoU."""


@dataclass(frozen=True)
class Interval:
    """Where a score would fall in `level` of all sets of images like this one; fractions like the score."""

    low: float
    high: float
    level: float = LEVEL

    def holds(self, value: float) -> bool:
        """Whether a value is inside, ends included."""
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Resampled:
    """A statistic on the sample itself, on resamples, and without each image in turn; any number of columns."""

    value: Floats
    """[C]."""
    draws: Floats
    """[B, C]; NaN where it is not defined."""
    without: Floats
    """[N, C], the jackknife."""
    bounds: tuple[float, float] = (0.0, 1.0)
    """What values there can be: an interval that is moved ends there."""

    def percentile(self, level: float = LEVEL) -> list[Interval | None]:
        """Return each column's percentile interval; None where the statistic is too rarely defined."""
        tail = (1 - level) / 2
        return [self._interval(draws, tail, 1 - tail, level) for draws in self.draws.T]

    def centred(self, level: float = LEVEL) -> list[Interval | None]:
        """Return each column's percentile interval, moved so that the resamples' median is the value; None as above."""
        moved: list[Interval | None] = []
        for value, draws, interval in zip(self.value, self.draws.T, self.percentile(level), strict=True):
            if interval is None or not np.isfinite(value):
                moved.append(None)
                continue
            shift = value - float(np.median(draws[np.isfinite(draws)]))
            low, high = (min(max(self.bounds[0], end + shift), self.bounds[1]) for end in (interval.low, interval.high))
            moved.append(Interval(low, high, level))
        return moved

    def bca(self, level: float = LEVEL) -> list[Interval | None]:
        """Return each column's bias-corrected and accelerated interval; None as above."""
        return [self._bca(*column, level) for column in zip(self.value, self.draws.T, self.without.T, strict=True)]

    def _bca(self, value: float, draws: Floats, without: Floats, level: float) -> Interval | None:
        from scipy.special import ndtr, ndtri  # here: pages need intervals, and not this one

        defined = draws[np.isfinite(draws)]
        if not np.isfinite(value) or defined.size < _MIN_DEFINED:
            return None
        # the share below the value; ties count half, and it is kept off 0 and 1, where the normal quantile is infinite
        below = ((defined < value).sum() + (defined == value).sum() / 2) / defined.size
        bias = ndtri(np.clip(below, 1 / (defined.size + 1), defined.size / (defined.size + 1)))
        kept = without[np.isfinite(without)]
        distance = kept.mean() - kept if kept.size else np.zeros(1)
        spread = (distance**2).sum() ** 1.5
        acceleration = (distance**3).sum() / (6 * spread) if spread > 0 else 0.0
        shifted = bias + ndtri(np.array([(1 - level) / 2, (1 + level) / 2]))
        low, high = ndtr(bias + shifted / (1 - acceleration * shifted))
        return self._interval(draws, float(low), float(high), level)

    @staticmethod
    def _interval(draws: Floats, low: float, high: float, level: float) -> Interval | None:
        defined = draws[np.isfinite(draws)]
        if defined.size < _MIN_DEFINED:
            return None
        ends = np.quantile(defined, (low, high))
        return Interval(float(ends[0]), float(ends[1]), level)


@dataclass(frozen=True)
class Bootstrap:
    """All scores and class IoUs of a run, resampled together."""

    scores: dict[str, Resampled]
    """One column each."""
    class_iou: Resampled
    """A column for each class."""

    def intervals(self, level: float = LEVEL, kind: str = "centred") -> dict[str, Interval | None]:
        """Return the interval of each score: centred, percentile or bca."""
        return {name: getattr(resampled, kind)(level)[0] for name, resampled in self.scores.items()}


def draw_counts(images: int, resamples: int, seed: int) -> Iterator[Floats]:
    """Yield how often each image is drawn, float64 [block, images], `resamples` rows in all."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, _BLOCK):
        rows = min(_BLOCK, resamples - start)
        drawn = rng.integers(0, images, (rows, images))
        drawn += np.arange(rows)[:, None] * images
        yield np.bincount(drawn.reshape(-1), minlength=rows * images).reshape(rows, images).astype(np.float64)


def bootstrap(areas: ImageAreas, resamples: int = RESAMPLES, seed: int = 0) -> Bootstrap:
    """Resample images and compute every score and class IoU each time.

    Args:
        areas: of the images; at least two.
        resamples: how many; 10,000 of 2,000 images take 0.6 seconds and 44 MB (benchmarks/bench_statistics.py).
        seed: of numpy's default generator; the same seed gives the same bits.
    """
    names = list(area_scores(*split_areas(areas.stacked[0])))
    draws = {name: np.empty((resamples, 1)) for name in names}
    iou = np.empty((resamples, areas.truth.shape[1]))
    row = 0
    for counts in draw_counts(len(areas.ids), resamples, seed):
        sums = split_areas(counts @ areas.stacked)
        block = slice(row, row := row + len(counts))
        iou[block] = area_iou(*sums)
        for name, values in area_scores(*sums).items():
            draws[name][block, 0] = values
    total = areas.stacked.sum(0)
    whole, without = split_areas(total), split_areas(total - areas.stacked)
    value, jackknife = area_scores(*whole), area_scores(*without)
    scores = {name: Resampled(np.atleast_1d(value[name]), draws[name], jackknife[name][:, None]) for name in names}
    return Bootstrap(scores, Resampled(area_iou(*whole), iou, area_iou(*without)))
