"""Label maps equal interpolate + argmax in every bit; counts equal a loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ade_harness import kernels

SIDES = st.integers(1, 40)


def scores_of(kind: str, shape: tuple[int, int, int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(shape, generator=generator)
    if kind == "tied":
        return scores.round()
    if kind == "peaky":
        return scores * 0.1 + 10 * F.one_hot(torch.arange(shape[1] * shape[2]) % shape[0], shape[0]).T.reshape(shape)
    if kind == "infinite":
        scores[0] = float("-inf")
    return scores


@given(
    st.sampled_from(["random", "tied", "peaky", "infinite"]), st.sampled_from([1, 2, 9, 10, 11, 32, 150]),
    SIDES, SIDES, st.integers(1, 150), st.integers(1, 150), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_label_map_equals_interpolate_and_argmax(
    kind: str, channels: int, h: int, w: int, height: int, width: int, seed: int
) -> None:
    scores = scores_of(kind, (channels, h, w), seed)
    upsampled = F.interpolate(scores[None], (height, width), mode="bilinear", align_corners=False)[0]
    expected = upsampled.argmax(0)
    found = kernels.label_map(scores, (height, width))
    assert found.dtype == torch.uint8
    assert torch.equal(found.long(), expected)


def test_more_than_256_channels() -> None:
    scores = torch.randn(300, 6, 7)
    assert torch.equal(kernels.label_map(scores, (6, 7)).long(), scores.argmax(0))


@pytest.mark.parametrize("seed", range(5))
def test_count_equals_a_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    target = rng.choice(np.array([0, 1, 77, 149, 255], np.uint8), (9, 11))
    labels = rng.choice(np.array([0, 1, 77, 149, 150, 200, 255], np.uint8), (9, 11))
    expected = np.zeros((150, 151), np.int64)
    for t, p in zip(target.flat, labels.flat, strict=True):
        if t != 255:
            expected[t, min(p, 150)] += 1
    found = kernels.count(torch.from_numpy(labels), torch.from_numpy(target))
    assert found.dtype == torch.int64
    assert np.array_equal(found.numpy(), expected)


def test_everything_ignored_counts_nothing() -> None:
    nothing = torch.full((4, 5), 255, dtype=torch.uint8)
    assert kernels.count(torch.zeros(4, 5, dtype=torch.uint8), nothing).sum() == 0
