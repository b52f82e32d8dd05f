"""The metric for training loops beside torchmetrics' own: `python benchmarks/bench_metric.py`.

Time and peak memory of one batch, with labels and with scores that are smaller than the target (which torchmetrics'
metrics do not take: they get ``F.interpolate(...).argmax(1)``), and whether counts stay exact beyond 2^24 pixels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from images import stride4_logits
from measure import add_peaks, interleave, machine_line, one_thread, show
from torch import Tensor
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.segmentation import MeanIoU

from ade_harness.metrics import SegmentationScores

CLASSES = 150


def upsampled(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Return labels as training loops make them."""
    return F.interpolate(scores[None], size, mode="bilinear", align_corners=False).argmax(1)


def updates() -> dict[str, Callable[[Tensor, Tensor], Any]]:
    """Return one update of each metric: labels [1, H, W] and target [1, H, W]."""
    ours = SegmentationScores(CLASSES)
    unchecked = SegmentationScores(CLASSES, validate_args=False)
    jaccard = MulticlassJaccardIndex(CLASSES, ignore_index=255)
    mean_iou = MeanIoU(CLASSES, input_format="index")
    return {
        "ade-harness, SegmentationScores": ours.update,
        "the same, validate_args=False": unchecked.update,
        "torchmetrics, MulticlassJaccardIndex": jaccard.update,
        "torchmetrics, MeanIoU (no pixel ignored)": lambda labels, target: mean_iou.update(labels, target % CLASSES),
    }


def exactness() -> None:
    """Print how far one more pixel moves each metric's counts when a class has 2^24 already."""
    ours, jaccard, mean_iou = SegmentationScores(2), MulticlassJaccardIndex(2), MeanIoU(2, input_format="index")
    ours.matrix[0, 0] = jaccard.confmat[0, 0] = 2**24
    one = torch.zeros(1, 1, 1, dtype=torch.int64)
    ours.update(one, one)
    jaccard.update(one, one)
    mean_iou.update(one.repeat(1, 2, 2), one.repeat(1, 2, 2))
    counted = int(ours.matrix[0, 0]) - 2**24, int(jaccard.confmat[0, 0]) - 2**24
    print(f"one pixel more than 2^24 counts: ade-harness {counted[0]}, MulticlassJaccardIndex {counted[1]}")
    print(f"MeanIoU keeps {mean_iou.score.dtype} of means of images, not the areas of the whole set")


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", type=int, nargs=2, default=(512, 683), help="of the target (height, width)")
    options = parser.parse_args()
    print(machine_line())
    one_thread()
    size = (options.size[0], options.size[1])
    draw = np.random.default_rng(0)
    target = torch.from_numpy(draw.integers(0, CLASSES, (1, *size)))
    target[torch.from_numpy(draw.random((1, *size)) < 0.1)] = 255
    scores = stride4_logits(size, "confident")
    labels = upsampled(scores, size)
    calls = {name: partial(update, labels, target) for name, update in updates().items()}
    bytes_of_labels = (labels.nbytes + target.nbytes) / 1e6
    title = f"labels {list(labels.shape)}; the bytes of labels and target: {bytes_of_labels:.1f} MB"
    show(title, add_peaks(interleave(calls, options.rounds), calls))
    ours = SegmentationScores(CLASSES)
    calls = {"ade-harness, SegmentationScores": lambda: ours.update(scores[None], target)}
    for name, update in list(updates().items())[2:]:
        calls[f"interpolate, argmax, {name}"] = lambda update=update: update(upsampled(scores, size), target)
    moved = (scores.nbytes + target.nbytes) / 1e6
    title = f"scores {list(scores.shape)} for {list(size)}; the bytes of scores and target: {moved:.1f} MB"
    show(title, add_peaks(interleave(calls, options.rounds), calls))
    exactness()


if __name__ == "__main__":
    main()
