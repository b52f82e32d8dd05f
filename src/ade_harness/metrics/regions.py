"""Where in the image errors are: at boundaries or inside, in small objects or large ones. Needs label maps.

Boundary IoU: Cheng, Girshick, Dollar, Berg, Kirillov, "Boundary IoU: Improving Object-Centric Image Segmentation
Evaluation", CVPR 2021, for each class's mask alone, as the paper defines it (a label map with several classes must not
be eroded as one image: the border between two classes would vanish). The width is 2 % of the image's diagonal, the
authors' default for large objects; the image's own edge counts as a boundary.

Trimaps: Kohli, Ladicky, Torr, "Robust Higher Order Potentials for Enforcing Label Consistency", IJCV 2009: accuracy
within some distance of the ground truth's boundaries.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from ade_harness.data.labels import IGNORE_INDEX
from ade_harness.metrics.confusion import Floats, area_iou

BOUNDARY_RATIO = 0.02
"""Width of the boundary over the image's diagonal."""
BAND_EDGES = (2, 4, 8, 16, 32)
"""Pixels from the nearest boundary of the ground truth; the last band is everything farther inside."""
SIZE_EDGES = (32**2, 96**2, 256**2)
"""Pixels of an object; the first two as COCO divides small, medium and large."""

Labels = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Regions:
    """Integer counts of one image, or of many added up."""

    boundary: Counts
    """[3, C]: boundary pixels of each class: in both maps, in the truth, in the prediction."""
    bands: Counts
    """[6, 2]: valid pixels in each band of `BAND_EDGES` and beyond, and how many of them are right."""
    objects: Counts
    """[4, 4]: by size (`SIZE_EDGES` and larger): objects of the truth, those of which more than half is right, their
    pixels, pixels right. An object is an 8-connected part of one class."""

    def boundary_iou(self) -> Floats:
        """Return the boundary IoU of each class, float64 [C], 0..1; NaN for a class in neither map."""
        both, truth, predicted = self.boundary
        return area_iou(both, truth, predicted)


def find_regions(target: Labels, labels: Labels, classes: int) -> Regions:
    """Count one image.

    Args:
        target: uint8 [H, W], 0..C-1, 255 where nothing is counted: such pixels belong to no class in either map.
        labels: uint8 [H, W], 0..C-1, 255 for void.
        classes: their number.
    """
    valid = target != IGNORE_INDEX
    labels = np.where(valid, labels, IGNORE_INDEX).astype(np.uint8)
    width = boundary_width(target.shape)
    boundary = np.zeros((3, classes), np.int64)
    for label in np.union1d(np.unique(target), np.unique(labels)):
        if label >= classes:
            continue
        truth, predicted = (boundary_band(m == label, width) for m in (target, labels))
        boundary[:, label] = (truth & predicted).sum(), truth.sum(), predicted.sum()
    return Regions(boundary, _bands(target, labels == target, valid), _objects(target, labels == target))


def add_regions(found: Iterable[Regions], classes: int) -> Regions:
    """Add up the counts of images; `classes` is their number."""
    boundary = np.zeros((3, classes), np.int64)
    bands, objects = np.zeros((len(BAND_EDGES) + 1, 2), np.int64), np.zeros((len(SIZE_EDGES) + 1, 4), np.int64)
    for regions in found:
        boundary += regions.boundary
        bands += regions.bands
        objects += regions.objects
    return Regions(boundary, bands, objects)


def boundary_width(size: tuple[int, ...]) -> int:
    """Return the boundary's width in pixels of an image of (height, width): at least one."""
    return max(1, round(BOUNDARY_RATIO * math.hypot(*size)))


def boundary_band(mask: npt.NDArray[np.bool_], width: int) -> npt.NDArray[np.bool_]:
    """Return the pixels of a mask that are within `width` of its contour, [H, W].

    The same as the mask without its erosion by `width` steps of a 3x3 square, with nothing beyond the image's edge.
    """
    band = np.zeros(mask.shape, bool)
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if rows.size:
        part = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        padded = np.pad(mask[part].astype(np.uint8), 1)
        distance = cv2.distanceTransform(padded, cv2.DIST_C, 3)[1:-1, 1:-1]
        band[part] = mask[part] & (distance <= width)
    return band


def _bands(target: Labels, right: npt.NDArray[np.bool_], valid: npt.NDArray[np.bool_]) -> Counts:
    """Count valid and right pixels by their distance from where two classes of the truth meet."""
    edge = np.zeros(target.shape, bool)
    everything, first, last = slice(None), slice(1, None), slice(-1)
    for one, two in (((first, everything), (last, everything)), ((everything, first), (everything, last))):
        meets = (target[one] != target[two]) & valid[one] & valid[two]
        edge[one] |= meets
        edge[two] |= meets
    counts = np.zeros((len(BAND_EDGES) + 1, 2), np.int64)
    if edge.any():  # the distance of a pixel at the edge is 0 in OpenCV: count from 1
        distance = cv2.distanceTransform((~edge).astype(np.uint8), cv2.DIST_L2, 5) + 1
        band = np.digitize(distance, BAND_EDGES, right=True)
    else:
        band = np.full(target.shape, len(BAND_EDGES))
    for column, chosen in enumerate((valid, valid & right)):
        counts[:, column] = np.bincount(band[chosen], minlength=len(counts))
    return counts


def _objects(target: Labels, right: npt.NDArray[np.bool_]) -> Counts:
    """Count objects of the truth by their size."""
    counts = np.zeros((len(SIZE_EDGES) + 1, 4), np.int64)
    for label in np.unique(target):
        if label == IGNORE_INDEX:
            continue
        number, parts = cv2.connectedComponents((target == label).astype(np.uint8), connectivity=8)
        pixels = np.bincount(parts.reshape(-1), minlength=number)[1:]
        found = np.bincount(parts[right], minlength=number)[1:]
        size = np.digitize(pixels, SIZE_EDGES)
        for column, values in enumerate((np.ones_like(pixels), 2 * found > pixels, pixels, found)):
            counts[:, column] += np.bincount(size, weights=values, minlength=len(counts)).astype(np.int64)
    return counts
