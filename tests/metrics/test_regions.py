"""Boundaries, bands, objects and calibration against their definitions."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ade_harness.data.labels import CONFIDENCE_BINS
from ade_harness.kernels.confidence import count_confidence
from ade_harness.metrics.areas import image_areas
from ade_harness.metrics.breakdown import confused_pairs, group_images, size_groups
from ade_harness.metrics.calibration import Calibration
from ade_harness.metrics.confusion import scores
from ade_harness.metrics.counts import matrix_of
from ade_harness.metrics.regions import add_regions, boundary_band, boundary_width, find_regions
from tests.metrics.test_statistics import make_rows


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 30), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_a_boundary_is_the_mask_without_its_erosion(seed: int, width: int, height: int, length: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((height // 3 + 1, length // 3 + 1)).repeat(3, 0).repeat(3, 1)[:height, :length] < 0.7
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=width)[1:-1, 1:-1].astype(bool)
    assert np.array_equal(boundary_band(mask, width), mask & ~eroded)


def test_two_classes_side_by_side_have_a_boundary_each() -> None:
    """Eroding the label map as one image would leave nothing of the lower class here."""
    target = np.full((100, 100), 3, np.uint8)
    target[:, 50:] = 5
    width = boundary_width(target.shape)
    assert width == 3
    assert boundary_width((4, 4)) == 1
    same = find_regions(target, target, 150)
    assert same.boundary_iou()[[3, 5]].tolist() == [1, 1]
    assert np.isnan(np.delete(same.boundary_iou(), [3, 5])).all()
    assert same.boundary[1, 3] == 100 * 50 - (100 - 6) * (50 - 6)  # around each half, the image's edge included
    moved = np.full((100, 100), 3, np.uint8)
    moved[:, 54:] = 5  # by more than the width: the inner contours do not meet
    found = find_regions(target, moved, 150)
    inter, truth, predicted = found.boundary[:, 5]
    assert found.boundary_iou()[5] == inter / (truth + predicted - inter)
    assert found.boundary_iou()[5] < 0.65 < scores_iou(target, moved, 5)


def scores_iou(target: np.ndarray, labels: np.ndarray, label: int) -> float:
    one, two = target == label, labels == label
    return float((one & two).sum() / (one | two).sum())


def test_bands_and_objects_count_every_valid_pixel_once() -> None:
    rng = np.random.default_rng(0)
    target = rng.integers(0, 4, (12, 15)).repeat(9, 0).repeat(9, 1).astype(np.uint8)
    target[target == 3] = 255
    labels = np.where(rng.random(target.shape) < 0.8, target, 149).astype(np.uint8)
    found = find_regions(target, labels, 150)
    valid = target != 255
    assert found.bands[:, 0].sum() == valid.sum()
    assert found.bands[:, 1].sum() == (valid & (labels == target)).sum()
    assert found.objects[:, 2].sum() == valid.sum()
    assert found.objects[:, 3].sum() == (valid & (labels == target)).sum()
    both = add_regions([found, found], 150)
    assert np.array_equal(both.objects, 2 * found.objects)
    assert np.array_equal(both.boundary_iou(), found.boundary_iou(), equal_nan=True)


def test_bands_are_distances_from_the_truths_boundaries() -> None:
    target = np.zeros((10, 80), np.uint8)
    target[:, 40:] = 1
    labels = target.copy()
    labels[:, 36:40] = 1  # wrong in the four columns before the boundary
    found = find_regions(target, labels, 150)
    assert found.bands[:, 0].tolist() == [40, 40, 80, 160, 320, 160]  # 2, 4, 8, 16, 32 columns on either side
    assert (found.bands[:, 0] - found.bands[:, 1]).tolist() == [20, 20, 0, 0, 0, 0]
    alone = find_regions(np.zeros((6, 6), np.uint8), np.zeros((6, 6), np.uint8), 150)
    assert alone.bands[:, 0].tolist() == [0, 0, 0, 0, 0, 36]  # no boundary at all


def test_objects_are_connected_parts_by_size() -> None:
    target = np.full((200, 400), 255, np.uint8)
    target[10:20, 10:20] = 7  # 100 pixels: small
    target[20:30, 20:30] = 7  # touches it at a corner: the same object
    target[50:110, 10:110] = 7  # 6,000: medium
    target[0:190, 200:400] = 8  # 38,000: large
    labels = target.copy()
    labels[10:20, 10:20] = 9
    labels[50:100, 10:110] = 9  # less than half of it is found
    found = find_regions(target, labels, 150)
    assert found.objects.tolist() == [[1, 0, 200, 100], [1, 0, 6000, 1000], [1, 1, 38000, 38000], [0, 0, 0, 0]]


def test_confused_pairs_and_groups_of_images() -> None:
    rows = make_rows(12, classes=9)
    matrix = matrix_of(rows, 150)
    pairs = confused_pairs(matrix, 5)
    wrong = matrix - np.pad(np.diag(np.diagonal(matrix)), ((0, 0), (0, 1)))
    assert [p.pixels for p in pairs] == sorted(wrong[wrong > 0].tolist(), reverse=True)[:5]
    assert pairs[0].share_of_truth == pairs[0].pixels / matrix[pairs[0].truth].sum()
    assert sum(p.share_of_errors for p in confused_pairs(matrix, 10**6)) == pytest.approx(1)
    group_of, names = size_groups({r.image_id: i for i, r in enumerate(rows)})
    groups = group_images(image_areas(rows, 150), group_of, names)
    assert [g.name for g in groups] == names
    assert [g.images for g in groups] == [4, 3, 3, 2]
    assert groups[0].scores["mIoU"] == scores(matrix_of(rows[:4], 150)).mIoU
    scenes = {r.image_id: "kitchen" if i % 3 else "street" for i, r in enumerate(rows[:9])}
    assert [(g.name, g.images) for g in group_images(image_areas(rows, 150), scenes)] == [("kitchen", 6), ("street", 3)]
    assert len(set(size_groups({"a": 5, "b": 5})[0].values())) == 1


def test_calibration_is_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((1, 6, 40, 50), generator=generator) * 2
    target = torch.randint(0, 6, (40, 50), generator=generator).to(torch.uint8)
    target[:3] = 255
    probabilities = logits.softmax(1)
    confidence, labels = probabilities[0].max(0)
    counts = count_confidence(confidence, labels.to(torch.uint8), target).numpy()
    found = Calibration(counts)
    from torchmetrics.classification import MulticlassCalibrationError  # imports all metrics, in each worker

    theirs = MulticlassCalibrationError(6, n_bins=CONFIDENCE_BINS, norm="l1", ignore_index=255)
    expected = float(theirs(probabilities, target.long()[None]))
    assert found.ece == pytest.approx(expected, abs=2e-5)  # confidences are added up in steps of 1/65536
    valid = target != 255
    assert counts[:, 0].sum() == valid.sum()
    assert counts[:, 1].sum() == (labels == target)[valid].sum()
    edges = np.digitize(confidence[valid].numpy(), np.linspace(0, 1, CONFIDENCE_BINS + 1)[1:-1], right=True)
    assert np.abs(counts[:, 0] - np.bincount(edges, minlength=CONFIDENCE_BINS)).sum() <= 4  # rounding at the edges


def test_calibration_at_the_ends() -> None:
    sure = torch.tensor([[0.0, 1.0, 1.0]])
    counts = count_confidence(
        sure, torch.zeros((1, 3), dtype=torch.uint8), torch.tensor([[0, 0, 255]], dtype=torch.uint8)
    )
    assert counts[:, 0].tolist() == [1] + [0] * 13 + [1]
    assert Calibration(counts.numpy()).ece == 0.5
    assert Calibration(np.zeros((CONFIDENCE_BINS, 3), np.int64)).ece == 0
