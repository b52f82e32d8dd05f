"""Seconds and memory of intervals and paired tests, beside the naive loop over resamples.

    OMP_NUM_THREADS=1 python benchmarks/bench_statistics.py [--images 2000] [--resamples 10000]

The naive loop adds up the chosen images' areas one resample at a time, as ``areas[drawn].sum(0)``; 200 resamples of it
are timed. The limit: each resample reads [images, 450] float64 once, 7.2 MB of 2,000 images; a matrix product reuses
them.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

from ade_harness.metrics.areas import ImageAreas, split_areas
from ade_harness.metrics.bootstrap import bootstrap
from ade_harness.metrics.comparison import compare
from ade_harness.metrics.confusion import area_scores

NAIVE = 200


def make_areas(images: int, seed: int) -> ImageAreas:
    rng = np.random.default_rng(seed)
    truth = rng.integers(1, 60_000, (images, 150)) * (np.random.default_rng(0).random((images, 150)) < 0.06)
    right = (truth * rng.random((images, 150))).astype(np.int64)
    other = rng.integers(0, 5000, (images, 150)) * (rng.random((images, 150)) < 0.1)
    return ImageAreas(
        tuple(map(str, range(images))), np.concatenate([right, truth, right + other], 1).astype(np.float64)
    )


def second_of(first: ImageAreas) -> ImageAreas:
    """Another run on the same images: one in a hundred right pixels lost."""
    stacked = first.stacked.copy()
    lost = np.floor(stacked[:, :150] * 0.01)
    stacked[:, :150] -= lost
    stacked[:, 300:] -= lost
    return ImageAreas(first.ids, stacked)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--resamples", type=int, default=10_000)
    options = parser.parse_args()
    first = make_areas(options.images, 1)
    second = second_of(first)
    start = time.perf_counter()
    rng = np.random.default_rng(0)
    naive = []
    for _ in range(NAIVE):
        drawn = rng.integers(0, options.images, options.images)
        naive.append(float(area_scores(*split_areas(first.stacked[drawn].sum(0)))["mIoU"]))
    naive_s = (time.perf_counter() - start) * options.resamples / NAIVE
    before = peak_mb()
    for name, work in (
        ("bootstrap, with all intervals", lambda: bootstrap(first, options.resamples).intervals()),
        ("two runs: paired bootstrap and permutation test", lambda: compare(first, second, options.resamples)),
    ):
        start = time.perf_counter()
        work()
        spent = time.perf_counter() - start
        print(
            f"{name}: {spent:.2f} s, {spent / naive_s:.3f} of the naive bootstrap ({naive_s:.0f} s),"
            f" peak {peak_mb() - before:.0f} MB over the areas"
        )
    counts = rng.integers(0, 4, (options.resamples // 5, options.images)).astype(np.float64)
    start = time.perf_counter()
    for _ in range(5):
        counts @ first.stacked
    print(f"the limit, the matrix product alone: {time.perf_counter() - start:.2f} s")
    exact = np.array([*bootstrap(first, NAIVE).scores["mIoU"].draws[:, 0]])
    print(f"mean mIoU of {NAIVE} resamples: {np.mean(naive):.6f} naive, {exact.mean():.6f} here")


if __name__ == "__main__":
    main()
