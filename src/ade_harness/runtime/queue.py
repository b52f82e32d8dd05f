"""Which rank does which item: every item exactly once, nothing padded, largest first."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


def largest_first(costs: Sequence[float]) -> list[int]:
    """Return the items in the order in which the shared queue hands them out; equal costs in their own order."""
    return sorted(range(len(costs)), key=lambda i: (-costs[i], i))


def assign(costs: Sequence[float], world_size: int) -> list[list[int]]:
    """Give items to ranks, largest first to the rank with the least work so far (LPT).

    Deterministic, and a partition for any world size: ranks may be empty.

    Args:
        costs: of each item, in any unit.
        world_size: number of ranks, 1 or more.

    Returns:
        For each rank its items, largest first.
    """
    shares: list[list[int]] = [[] for _ in range(world_size)]
    loads = [(0.0, rank) for rank in range(world_size)]
    for item in largest_first(costs):
        load, rank = heapq.heappop(loads)
        shares[rank].append(item)
        heapq.heappush(loads, (load + costs[item], rank))
    return shares


@dataclass(frozen=True)
class Loaders:
    """The processes that load a rank's items."""

    workers: int | None = None
    """None takes the cores that the ranks leave, at most 8 each; 0 loads in the rank itself."""
    ahead: int = 4
    """Items that each may have before it."""
    at_once: int = 1
    """Items of a rank that are worked on at a time: more than one if loaders do the work."""


def most_held(left: int, world_size: int, look_ahead: int, at_once: int = 1) -> int:
    """Return how many items a rank may hold at a time: the one it works on, and those that its loaders prepare.

    Much while much is left, so that loaders never starve; towards the end only what is being worked on, so that no
    item waits on a slow rank while a fast one has nothing to do. ``benchmarks/simulate_sharding.py`` has the figures.

    Args:
        left: items that nobody has taken.
        world_size: number of ranks.
        look_ahead: what the loaders can use, at most.
        at_once: items that the rank works on at a time.
    """
    least = max(at_once, 2 if left > 4 * world_size else 1)
    return min(look_ahead + 1, max(least, left // (8 * world_size)))
