"""How often each kind of interval holds the true score, in a simulation of ADE20K's long tail.

    OMP_NUM_THREADS=1 python benchmarks/interval_coverage.py [--images 2000 200] [--sets 300]

Classes are in as many of the 2,000 images as in the validation set (its quantiles are below); areas and accuracies vary
between images. "Truth" is the mean score of 2,000 other sets of the same size: what the next set of
images of this kind would give on average. The share of sets whose 95 % interval holds it should be 0.95.
"""

from __future__ import annotations

import argparse

import numpy as np

from ade_harness.metrics.areas import ImageAreas, split_areas
from ade_harness.metrics.bootstrap import bootstrap
from ade_harness.metrics.confusion import area_scores

KINDS = ("centred", "percentile", "bca")
OTHER_SETS = 2000
IMAGES_OF_A_CLASS = (3, 6, 12, 18, 24, 30, 36, 44, 53, 61, 75, 108, 153, 239, 411, 1172)
"""In how many of the 2,000 validation images a class is: quantiles from 0 to 1 in steps of 1/15."""


class Population:
    """Images as their class areas."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        places = np.linspace(0, len(IMAGES_OF_A_CLASS) - 1, 150)
        self.presence = np.interp(places, range(len(IMAGES_OF_A_CLASS)), IMAGES_OF_A_CLASS)[::-1] / 2000
        self.area = np.geomspace(60_000, 2_000, 150)
        self.accuracy = np.clip(self.rng.normal(0.62, 0.2, 150), 0.05, 0.97)

    def draw(self, images: int) -> np.ndarray:
        """Return the areas of new images, float64 [images, 450]."""
        rng, shape = self.rng, (images, 150)
        truth = (self.area * rng.lognormal(-0.5, 1, shape) * (rng.random(shape) < self.presence)).astype(np.int64)
        right = (truth * rng.beta(2 * self.accuracy, 2 - 2 * self.accuracy, shape)).astype(np.int64)
        predicted, missed = right.copy(), (truth - right).sum(1)
        shares = rng.dirichlet([1, 1, 0.5], images)
        for column in range(3):  # the rest of an image goes to three classes, rare ones seldom
            taken = rng.choice(150, images, p=self.presence / self.presence.sum())
            predicted[np.arange(images), taken] += (missed * shares[:, column]).astype(np.int64)
        return np.concatenate([right, truth, predicted], 1).astype(np.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[2000, 200])
    parser.add_argument("--sets", type=int, default=300)
    parser.add_argument("--resamples", type=int, default=1000)
    options = parser.parse_args()
    for images in options.images:
        population = Population(0)
        others = [area_scores(*split_areas(population.draw(images).sum(0))) for _ in range(OTHER_SETS)]
        for metric in ("mIoU", "pixel_accuracy"):
            truth = float(np.mean([o[metric] for o in others]))
            held, width = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0.0)
            population = Population(1)
            population.accuracy = Population(0).accuracy
            for number in range(options.sets):
                areas = ImageAreas(tuple(map(str, range(images))), population.draw(images))
                found = bootstrap(areas, options.resamples, number).scores[metric]
                for kind in KINDS:
                    interval = getattr(found, kind)()[0]
                    held[kind] += interval.holds(truth)
                    width[kind] += 100 * (interval.high - interval.low) / options.sets
            shares = ", ".join(f"{k} {held[k] / options.sets:.3f} (width {width[k]:.2f})" for k in KINDS)
            error = np.sqrt(0.95 * 0.05 / options.sets)
            print(f"{images} images, {metric}, truth {100 * truth:.2f}: {shares}; +-{error:.3f}", flush=True)


if __name__ == "__main__":
    main()
