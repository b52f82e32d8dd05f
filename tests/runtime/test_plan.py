"""Sharding: a partition for any world size, balanced by cost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ade_harness.data.ade20k import validation_sizes
from ade_harness.runtime.plan import assign


@given(st.lists(st.integers(0, 1000), max_size=60), st.integers(1, 80))
def test_every_item_exactly_once(costs: list[int], world_size: int) -> None:
    shares = assign(costs, world_size)
    assert len(shares) == world_size
    assert sorted(sum(shares, [])) == list(range(len(costs)))
    for share in shares:
        assert [costs[i] for i in share] == sorted((costs[i] for i in share), reverse=True)


def test_balance_on_the_real_sizes() -> None:
    costs = [h * w for h, w in validation_sizes().values()]
    for world_size in (2, 3, 7, 8, 64):
        loads = [sum(costs[i] for i in share) for share in assign(costs, world_size)]
        assert sum(costs) / world_size / max(loads) > 0.99
