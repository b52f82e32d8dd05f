"""The lines below the table in a terminal."""

from __future__ import annotations

import pytest

from ade_harness.report.terminal import _balance
from ade_harness.runtime.balance import Balance, RankShare


@pytest.mark.parametrize(
    ("done", "expected"),
    [
        ((5, 5, 5), "each did 5 images"),
        ((1, 1), "each did 1 image"),
        ((4, 7, 5), "rank 1 did 7 images, rank 0 4"),
        ((2, 1), "rank 0 did 2 images, rank 1 1"),
    ],
)
def test_what_ranks_did(done: tuple[int, ...], expected: str) -> None:
    shares = tuple(RankShare(rank, "host", number, 1.0, 1.0) for rank, number in enumerate(done))
    assert _balance(Balance(shares)).endswith(f"idle for 0.0 s on average; {expected}")
