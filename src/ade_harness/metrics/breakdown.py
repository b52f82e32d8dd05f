"""Where errors come from, by counts alone: confused pairs of classes, kinds of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ade_harness.metrics.areas import ImageAreas, split_areas
from ade_harness.metrics.confusion import Matrix, area_scores


@dataclass(frozen=True)
class ConfusedPair:
    """Pixels of one class that were predicted as another."""

    truth: int
    prediction: int
    """0..C-1, and C = void."""
    pixels: int
    share_of_truth: float
    share_of_errors: float


@dataclass(frozen=True)
class ImageGroup:
    """The scores of some of the images, as if there were no others."""

    name: str
    images: int
    pixels: int
    scores: dict[str, float]


def confused_pairs(matrix: Matrix, maximum: int = 20) -> list[ConfusedPair]:
    """Return the pairs that cost most pixels, the largest first."""
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    truth, errors = matrix.sum(1), int(wrong.sum())
    order = np.argsort(-wrong, axis=None, kind="stable")[:maximum]
    pairs = [(int(t), int(p)) for t, p in zip(*np.unravel_index(order, wrong.shape), strict=True) if wrong[t, p] > 0]
    return [
        ConfusedPair(t, p, int(wrong[t, p]), float(wrong[t, p] / truth[t]), float(wrong[t, p] / errors))
        for t, p in pairs
    ]


def group_images(areas: ImageAreas, group_of: Mapping[str, str], order: Sequence[str] = ()) -> list[ImageGroup]:
    """Score groups of images.

    Args:
        areas: of all images.
        group_of: the group of each image id; ids without one are left out.
        order: of the groups; others follow, the largest first.
    """
    members: dict[str, list[int]] = {name: [] for name in order}
    for index, image_id in enumerate(areas.ids):
        if image_id in group_of:
            members.setdefault(group_of[image_id], []).append(index)
    groups = []
    for name, indices in members.items():
        if indices:
            total = areas.stacked[indices].sum(0)
            scores = {key: float(value) for key, value in area_scores(*split_areas(total)).items()}
            groups.append(ImageGroup(name, len(indices), int(split_areas(total)[1].sum()), scores))
    known = list(order)
    return sorted(groups, key=lambda g: (known.index(g.name) if g.name in known else len(known), -g.images, g.name))


def size_groups(pixels: Mapping[str, int]) -> tuple[dict[str, str], list[str]]:
    """Divide images into quarters by their number of pixels.

    Args:
        pixels: height times width of each image.

    Returns:
        The group of each image id, and the names of the groups, smallest images first.
    """
    edges = np.unique(np.quantile(list(pixels.values()), (0.25, 0.5, 0.75), method="higher"))
    names = [f"up to {int(edge):,} pixels" for edge in edges] + [f"over {int(edges[-1]):,} pixels"]
    return {i: names[int(np.searchsorted(edges, p))] for i, p in pixels.items()}, names
