"""Which rank does which item: cost-balanced, every item exactly once, nothing padded."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


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
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(loads)
        shares[rank].append(item)
        heapq.heappush(loads, (load + costs[item], rank))
    return shares
