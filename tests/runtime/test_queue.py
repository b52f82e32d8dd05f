"""Sharing the work: a partition for any world size, balanced by cost."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ade_harness.data.ade20k import validation_sizes
from ade_harness.runtime.queue import assign, largest_first, max_held
from tests.conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
from simulate_sharding import COSTS, efficiency


@given(st.lists(st.integers(0, 1000), max_size=60), st.integers(1, 80))
def test_every_item_exactly_once(costs: list[int], world_size: int) -> None:
    shares = assign(costs, world_size)
    assert len(shares) == world_size
    assert sorted(sum(shares, [])) == list(range(len(costs)))
    for share in shares:
        assert [costs[i] for i in share] == sorted((costs[i] for i in share), reverse=True)


@given(st.lists(st.integers(0, 5), max_size=60))
def test_the_queue_holds_every_item_once_largest_first(costs: list[int]) -> None:
    order = largest_first(costs)
    assert sorted(order) == list(range(len(costs)))
    assert [costs[i] for i in order] == sorted(costs, reverse=True)


@given(st.integers(1, 5000), st.integers(1, 1100), st.integers(0, 64))
def test_a_rank_always_may_hold_one_item_and_never_more_than_its_loaders_can_use(
    left: int, world_size: int, look_ahead: int
) -> None:
    held = max_held(left, world_size, look_ahead)
    assert 1 <= held <= look_ahead + 1
    if left <= 4 * world_size:
        assert held == 1  # nothing waits on a slow rank at the end


def test_balance_on_the_real_sizes() -> None:
    costs = [h * w for h, w in validation_sizes().values()]
    for world_size in (2, 3, 7, 8, 64):
        loads = [sum(costs[i] for i in share) for share in assign(costs, world_size)]
        assert sum(costs) / world_size / max(loads) > 0.99


@pytest.mark.parametrize(
    ("cost", "world_size", "least"),
    [
        ("whole image", 8, 0.9985),
        ("whole image", 64, 0.985),
        ("whole image", 256, 0.97),
        ("windows 512/341", 64, 0.985),
    ],
)
def test_the_queue_is_efficient_with_a_slow_rank(cost: str, world_size: int, least: float) -> None:
    assert efficiency(COSTS[cost](), world_size, "queue", slow=1.5) > least
    assert efficiency(COSTS[cost](), world_size, "static", slow=1.5) < 0.72
    assert efficiency(COSTS[cost](), world_size, "DistributedSampler", slow=1.5) < 0.72
