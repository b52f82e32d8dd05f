"""Two runs on the same images: is the difference larger than chance among images would make it?

Both runs are resampled with the same images, so what makes an image hard for both cancels out. The p-values are of a
permutation test: if the runs were equally good, which of the two made which prediction of an image would not matter, so
they are exchanged at random, image by image (Fisher's exchange test; Edgington, Randomization Tests, 1995).
Classes are C tests at once: their p-values are corrected after Holm (1979), which bounds the chance of any false
claim. The paired bootstrap's own p-value stands beside the permutation's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ade_harness.metrics.areas import ImageAreas, split_areas
from ade_harness.metrics.bootstrap import LEVEL, RESAMPLES, Interval, Resampled, draw_counts
from ade_harness.metrics.confusion import Floats, area_iou, area_scores

_BLOCK = 500
_ROUNDING = 1e-12
"""Differences of scores below this are the same score: float64 rounds sums of C terms to about 1e-15."""


@dataclass(frozen=True)
class Difference:
    """The difference of one score, second run minus first; fractions."""

    first: float
    second: float
    interval: Interval | None
    """Centred percentile, of the paired bootstrap."""
    p_bootstrap: float
    """Two-sided: twice the smaller share of resamples on either side of 0."""
    p_permutation: float
    """Two-sided: the share of exchanges that differ at least as much. Never below 1 / (exchanges + 1)."""
    p_corrected: float
    """The same after correction, where several are tested together; else equal."""

    @property
    def value(self) -> float:
        """Second minus first."""
        return self.second - self.first

    def significant(self, level: float = LEVEL) -> bool:
        """Whether the corrected permutation test says that they differ."""
        return self.p_corrected <= 1 - level + 1e-12


@dataclass(frozen=True)
class Comparison:
    """Two runs on the same images."""

    ids: tuple[str, ...]
    scores: dict[str, Difference]
    classes: dict[int, Difference]
    """By class 0..C-1, of those that occur in the truth or in either prediction of both runs."""
    influence: Floats
    """[N]: how much of the mIoU's difference an image makes: what exchanging its predictions alone would change, the
    mean of putting the second's into the first run and the first's into the second. The sum is nearly the whole."""


def compare(
    first: ImageAreas, second: ImageAreas, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> Comparison:
    """Compare two runs image by image.

    Args:
        first: areas of the first run.
        second: of the second, with the same images in the same order and the same truth.
        resamples: of the bootstrap, and as many exchanges; 10,000 of 2,000 images take 1.6 seconds.
        seed: of both.
        level: of the intervals.

    Raises:
        ValueError: other images, or another truth: see :func:`ade_harness.runs.matching.match_runs`.
    """
    if first.ids != second.ids or not np.array_equal(first.truth, second.truth):
        raise ValueError("the runs have different images, or another ground truth")
    names = list(area_scores(*split_areas(first.stacked[0])))
    resampled = _resample(first, second, names, resamples, seed)
    value = resampled.value
    scale = _exchange(first, second, names, resamples, seed)
    intervals = resampled.centred(level)
    one, two = (np.array([*_statistics(areas.stacked.sum(0), names)]) for areas in (first, second))
    differences = []
    seldom = [len(first.ids) < 2] * len(names) + [bool(n < 2) for n in (first.truth > 0).sum(0)]
    for column, difference in enumerate(value):
        draws = resampled.draws[:, column]
        draws = draws[np.isfinite(draws)]
        below, above = (draws <= _ROUNDING).sum(), (draws >= -_ROUNDING).sum()
        p_bootstrap = min(1.0, 2 * (min(below, above) + 1) / (draws.size + 1))
        exchanged = scale[:, column]
        exchanged = exchanged[np.isfinite(exchanged)]
        extreme = (np.abs(exchanged) >= abs(difference) - _ROUNDING).sum()
        p = float((extreme + 1) / (exchanged.size + 1))
        differences.append(
            Difference(
                float(one[column]),
                float(two[column]),
                None if seldom[column] else intervals[column],  # of one image: nothing to resample
                float(p_bootstrap),
                p,
                p,
            )
        )
    scores = dict(zip(names, differences, strict=False))
    classes = {c: d for c, d in enumerate(differences[len(names) :]) if np.isfinite(d.first) and np.isfinite(d.second)}
    corrected = holm([d.p_permutation for d in classes.values()])
    classes = {
        c: Difference(d.first, d.second, d.interval, d.p_bootstrap, d.p_permutation, p)
        for (c, d), p in zip(classes.items(), corrected, strict=True)
    }
    one_sum, two_sum, change = first.stacked.sum(0), second.stacked.sum(0), second.stacked - first.stacked
    gains = (two_sum, two_sum - change), (one_sum + change, one_sum)
    with_second, with_first = ([area_scores(*split_areas(sums))["mIoU"] for sums in pair] for pair in gains)
    influence = (with_second[0] - with_second[1] + with_first[0] - with_first[1]) / 2
    return Comparison(first.ids, scores, classes, influence)


def _statistics(stacked: Floats, names: list[str]) -> Floats:
    """Return scores, then class IoUs, [..., 7 + C], of summed areas [..., 3 C]."""
    parts = split_areas(stacked)
    values = area_scores(*parts)
    return np.concatenate([np.stack([values[n] for n in names], -1), area_iou(*parts)], -1)


def _resample(first: ImageAreas, second: ImageAreas, names: list[str], resamples: int, seed: int) -> Resampled:
    """Resample the difference of every statistic."""

    def difference(sums_first: Floats, sums_second: Floats) -> Floats:
        return _statistics(sums_second, names) - _statistics(sums_first, names)

    one, two = first.stacked.sum(0), second.stacked.sum(0)
    value = difference(one, two)
    draws = np.empty((resamples, value.size))
    row = 0
    for counts in draw_counts(len(first.ids), resamples, seed):
        draws[row : (row := row + len(counts))] = difference(counts @ first.stacked, counts @ second.stacked)
    return Resampled(value, draws, np.empty((0, value.size)), (-1.0, 1.0))  # only BCa needs the jackknife


def _exchange(first: ImageAreas, second: ImageAreas, names: list[str], exchanges: int, seed: int) -> Floats:
    """Return the differences [exchanges, statistics] after exchanging the runs in a random half of the images."""
    rng = np.random.default_rng([seed, 1])
    one, two = first.stacked.sum(0), second.stacked.sum(0)
    change = second.stacked - first.stacked
    moving = np.flatnonzero(np.any(change != 0, axis=1))  # exchanging equal predictions changes nothing
    change = change[moving]
    found = np.empty((exchanges, len(names) + first.truth.shape[1]))
    for start in range(0, exchanges, _BLOCK):
        block = slice(start, min(start + _BLOCK, exchanges))
        moved = rng.integers(0, 2, (block.stop - block.start, len(moving))).astype(np.float64) @ change
        found[block] = _statistics(two - moved, names) - _statistics(one + moved, names)
    return found


def holm(p_values: list[float]) -> list[float]:
    """Return p-values corrected for testing all of them (Holm, 1979)."""
    order = np.argsort(p_values, kind="stable")
    steps = np.asarray(p_values)[order] * np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0) if len(p_values) else steps
    return [float(p) for p in corrected]
