"""Sharing the work: a partition for any world size, balanced by cost."""

from __future__ import annotations

import sys
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ade_harness.config.runtime import Sharding
from ade_harness.data.ade20k import validation_sizes
from ade_harness.runtime.coordination import Coordinator, LocalStore
from ade_harness.runtime.queue import NOTHING, ItemLoader, Numbered, SharedItems, assign, largest_first, max_held
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


class CountingStore(LocalStore):
    """A store that counts what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()

    def add(self, key: str, amount: int) -> int:
        self.asked[key] += 1
        return super().add(key, amount)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def shared(store: LocalStore, number: int, world_size: int = 1, ahead: int = 4) -> SharedItems:
    return SharedItems([1.0] * number, Sharding.queue, Coordinator(store), 0, world_size, ahead, 1)


def test_the_store_is_asked_once_for_an_item_of_a_millisecond(clock: list[float]) -> None:
    """Each question takes the rank's main thread 0.07 ms; five were asked for each image."""
    store = CountingStore()
    items = shared(store, 200)
    taken = []
    for item in items:
        clock[0] += 0.001
        items.held -= 1
        taken.append(item)
    assert sorted(taken) == list(range(200))
    assert store.asked["next"] <= 200 + 1 + 2  # and once more than there are items, and what is left once in 20 ms
    assert store.asked["stop"] <= 200 / 20 + 2


def test_a_rank_that_was_busy_asks_what_others_have_taken(clock: list[float]) -> None:
    store = LocalStore()
    items = shared(store, 400, world_size=2)
    mine = iter(items)
    assert [next(mine) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert next(mine) == NOTHING  # five are as many as its loaders can use
    items.held -= 3
    Coordinator(store)._add("next", 385)  # by the other rank: ten are left
    clock[0] += 1
    assert next(mine) == NOTHING  # two are enough now
    items.held -= 1
    assert next(mine) == 390


def test_a_stop_is_seen_soon_and_ones_own_at_once(clock: list[float]) -> None:
    store = LocalStore()
    mine, other = Coordinator(store), Coordinator(store)
    assert mine.may_begin()
    other.stop()
    assert not other.may_begin()
    clock[0] += 0.01
    assert mine.may_begin()
    clock[0] += 0.02
    assert not mine.may_begin()
    assert mine.stopped
    signalled = Coordinator(LocalStore())
    assert signalled.may_begin()
    signalled.asked = "SIGTERM"
    assert not signalled.may_begin()
    assert signalled.ended == "SIGTERM"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loop_sees_no_items_that_are_none(workers: int) -> None:
    order = [2, NOTHING, NOTHING, 0, NOTHING, 1, NOTHING]
    loader = ItemLoader(Numbered(["a", "b", "c"]), batch_size=None, sampler=order, num_workers=workers)
    assert [(number, item) for number, item in loader] == [(2, "c"), (0, "a"), (1, "b")]
