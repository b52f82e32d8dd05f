"""The plain kernels' own choices: how pixels are placed, which channels are interpolated together, old TensorFlow's rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ade_harness.kernels import reference
from ade_harness.kernels.views import PixelStatistics, Placement, View, whole

STATISTICS = PixelStatistics((100.0, 110.0, 120.0), (50.0, 60.0, 70.0))


def test_pixels_are_mirrored_and_placed() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 3)).astype(np.uint8)
    expected = ((pixels.astype(np.float32) - STATISTICS.mean) / STATISTICS.std).astype(np.float32).transpose(2, 0, 1)
    given = torch.from_numpy(pixels)
    assert np.array_equal(reference.normalise(given, STATISTICS).numpy(), expected)
    mirrored = reference.normalise(given, STATISTICS, Placement((3, 5), flipped=True))
    assert np.array_equal(mirrored.numpy(), expected[:, :, ::-1])
    for pad_value, size in ((None, (6, 7)), (0.0, (9, 11)), (127.5, (5, 6))):
        canvas = reference.normalise(given, STATISTICS, Placement(size, (2, 1), pad_value=pad_value)).numpy()
        assert np.array_equal(canvas[:, 2:5, 1:6], expected)
        around = np.zeros(3) if pad_value is None else (pad_value - np.array(STATISTICS.mean)) / STATISTICS.std
        outside = np.ones(size, bool)
        outside[2:5, 1:6] = False
        assert np.array_equal(canvas[:, outside], np.repeat(around.astype(np.float32)[:, None], outside.sum(), 1))


@pytest.mark.parametrize(("channels", "dtype"), [(255, torch.uint8), (256, torch.uint8), (257, torch.int32)])
def test_labels_of_more_channels_than_a_byte_holds(channels: int, dtype: torch.dtype) -> None:
    scores = torch.zeros(channels, 12, 12)
    scores[channels - 1] = 1.0
    labels = reference.label_map(scores, (24, 24))
    assert labels.dtype == dtype
    assert bool((labels == channels - 1).all())


def test_one_view_is_labelled_by_its_scores_whatever_is_averaged() -> None:
    """Softmax rounds scores that differ to equal probabilities, of which the first would win."""
    scores = torch.zeros(2, 8, 8)
    scores[1] = 1e-9
    assert torch.equal(scores.softmax(0)[0], scores.softmax(0)[1])
    assert bool((reference.merge([whole(scores, (8, 8))], (8, 8), True) == 1).all())


def test_legacy_bilinear_is_old_tensorflows() -> None:
    scores = np.random.default_rng(1).normal(size=(1, 2, 3, 4)).astype(np.float32)
    found = reference.legacy_bilinear(torch.from_numpy(scores), (5, 9)).numpy()
    assert found.shape == (1, 2, 5, 9)
    for row in range(5):
        for column in range(9):
            y, x = np.float32(row) * np.float32(3 / 5), np.float32(column) * np.float32(4 / 9)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, 2), min(left + 1, 3)
            upper = scores[0, :, top, left] + (scores[0, :, top, right] - scores[0, :, top, left]) * (x - left)
            lower = scores[0, :, bottom, left] + (scores[0, :, bottom, right] - scores[0, :, bottom, left]) * (x - left)
            assert found[0, :, row, column] == pytest.approx(upper + (lower - upper) * (y - top), abs=1e-6)


def view(channels: int, height: int, width: int, window: tuple[int, int], legacy: bool = False) -> View:
    return View(torch.empty(1, channels, height, width, device="meta"), ((0, 0),), window, window, None, False, legacy)


@pytest.mark.parametrize(
    ("given", "size", "expected"),
    [
        (view(150, 32, 32, (128, 128)), (256, 256), False),
        (view(150, 32, 32, (64, 64)), (256, 256), True),  # height + width of an output is 128
        (view(150, 32, 32, (64, 65)), (256, 256), False),
        (view(150, 32, 32, (256, 256)), (64, 64), True),  # the second step's too
        (view(150, 32, 32, (256, 256)), (64, 65), False),
        (view(150, 64, 64, (64, 64)), (64, 64), False),  # nothing is resized
        (view(150, 64, 64, (64, 64)), (50, 50), True),
        (view(3, 32, 32, (256, 256)), (256, 256), True),
        (view(1, 32, 32, (256, 256)), (256, 256), True),
        (view(2, 32, 32, (256, 256)), (256, 256), False),
        (view(150, 1, 32, (256, 256)), (256, 256), True),  # one row could be called channels-last
        (view(150, 32, 1, (256, 256)), (256, 256), True),
        (view(150, 32, 32, (1, 256)), (256, 256), True),
        (view(150, 32, 32, (256, 256)), (1, 256), True),
        (view(3, 32, 32, (256, 256), legacy=True), (256, 256), False),  # its own code, for any shape
        (view(150, 1, 32, (256, 256), legacy=True), (256, 256), False),
        (view(3, 32, 32, (256, 256), legacy=True), (300, 300), True),
    ],
)
def test_shapes_for_which_torch_takes_another_kernel(given: View, size: tuple[int, int], expected: bool) -> None:
    assert reference.uses_other_kernel(given, size) == expected


def test_channels_at_once_follow_memory_on_a_gpu_and_caches_on_a_cpu() -> None:
    assert reference.channels_at_once("cpu", 10**9) == 4
    assert reference.channels_at_once("cuda", 2**20) == 64
    assert reference.channels_at_once("cuda", 4000 * 6000) == 4  # 256 MiB hold two planes: never below a CPU's
    large = [view(150, 250, 250, (1000, 1000)), view(150, 250, 250, (1000, 2000))]
    assert reference._chunks(large, (1000, 2000)) == [(0, 33), (33, 66), (66, 99), (99, 132), (132, 150)]
    # one or three channels, for which torch has other kernels, are not cut off
    cpu = whole(torch.zeros(7, 32, 32), (256, 256))
    assert reference._chunks([cpu], (256, 256)) == [(0, 7)]
    cpu = whole(torch.zeros(9, 32, 32), (256, 256))
    assert reference._chunks([cpu], (256, 256)) == [(0, 4), (4, 9)]
    cpu = whole(torch.zeros(10, 32, 32), (256, 256))
    assert reference._chunks([cpu], (256, 256)) == [(0, 4), (4, 8), (8, 10)]
    assert reference._chunks([whole(torch.zeros(3, 32, 32), (256, 256))], (256, 256)) == [(0, 3)]


def test_the_share_of_invalid_scores() -> None:
    tensors = [torch.zeros(4, 5), torch.zeros(10)]
    assert float(reference.invalid_share(tensors)) == 0
    tensors[1][3] = torch.nan
    assert float(reference.invalid_share(tensors)) == pytest.approx(1 / 30)
    infinite = [torch.tensor([torch.inf, -torch.inf, 0.0])]  # whose sum is NaN
    assert float(reference.invalid_share(infinite)) == pytest.approx(1 / 3)
    huge = [torch.full((3,), 3e38), torch.tensor([-torch.inf, 1.0, 2.0])]  # sums of inf and -inf
    assert float(reference.invalid_share(huge)) == 0


def test_the_mean_of_views_is_compared_and_not_their_sum() -> None:
    """Sums that differ in their last bit have equal means, of which the first channel wins."""
    one, two = np.float32(3.8052173), np.float32(3.8052175)
    assert one < two
    assert one / np.float32(3) == two / np.float32(3)
    first = torch.from_numpy(np.stack([np.full((8, 8), v) for v in (one, two)]))
    views = [whole(scores, (8, 8)) for scores in (first, torch.zeros_like(first), torch.zeros_like(first))]
    assert int(reference.merge(views, (8, 8), False).sum()) == 0
    assert int(reference.merge(views[:1], (8, 8), False).sum()) == 64
