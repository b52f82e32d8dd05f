"""How evenly 2,000 real image sizes are shared by 1 to 1,024 ranks: efficiency = ideal time / time of the last rank.

    python benchmarks/simulate_sharding.py

Uses the harness's own rules (runtime/balance.py and queue.py) and its own cost of an image under two
protocols. Loading and the network are left out: this is about sharing alone. "slow" makes one rank 1.5 times slower.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Callable, Sequence
from functools import cache

from rich.console import Console
from rich.table import Table

from ade_harness.config.compose import compose_config
from ade_harness.data.ade20k import validation_sizes
from ade_harness.inference.plan import forward_pixels, plan_views
from ade_harness.runtime.queue import assign, largest_first, max_held

LOOK_AHEAD = 8  # two loader processes, four batches each
WORLD_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@cache
def protocol_costs(inference: str, labels: float = 0.3) -> tuple[float, ...]:
    """Return what the harness expects each image to cost under a protocol."""
    cfg = compose_config([f"inference={inference}"]).inference
    return tuple(
        forward_pixels(plan_views(size, cfg)) + labels * size[0] * size[1] for size in validation_sizes().values()
    )


COSTS: dict[str, Callable[[], Sequence[float]]] = {
    "whole image": lambda: protocol_costs("mmseg_whole_512"),
    "windows 512/341": lambda: protocol_costs("mmseg_slide_512"),
    "original size": lambda: [float(h * w) for h, w in validation_sizes().values()],
}


def efficiency(
    costs: Sequence[float], world_size: int, rule: str, slow: float = 1.0, look_ahead: int = LOOK_AHEAD
) -> float:
    """Return ideal time over the time when the last rank ends."""
    speeds = [1.0] * world_size
    speeds[-1] = 1 / slow
    if rule == "queue":
        longest = _queue(costs, speeds, look_ahead)
    else:
        if rule == "static":
            shares = assign(costs, world_size)
        else:  # torch's DistributedSampler: every world_size-th item, the first ones again to fill up
            padded = [i % len(costs) for i in range(-(-len(costs) // world_size) * world_size)]
            shares = [padded[rank::world_size] for rank in range(world_size)]
        longest = max(sum(costs[i] for i in share) / s for share, s in zip(shares, speeds, strict=True))
    return sum(costs) / sum(speeds) / longest


def _queue(costs: Sequence[float], speeds: Sequence[float], look_ahead: int) -> float:
    order = [costs[i] for i in largest_first(costs)]
    world_size, taken = len(speeds), 0
    held: list[list[float]] = [[] for _ in speeds]
    events: list[tuple[float, int]] = []

    def take(rank: int) -> None:
        nonlocal taken
        while taken < len(order) and len(held[rank]) < max_held(len(order) - taken, world_size, look_ahead):
            held[rank].append(order[taken])
            taken += 1

    for rank in range(min(world_size, len(order))):  # all ranks start together: each gets its first item first
        held[rank].append(order[taken])
        taken += 1
    for rank in range(world_size):
        take(rank)
        if held[rank]:
            heapq.heappush(events, (held[rank][0] / speeds[rank], rank))
    now = 0.0
    while events:
        now, rank = heapq.heappop(events)
        held[rank].pop(0)
        take(rank)
        if held[rank]:
            heapq.heappush(events, (now + held[rank][0] / speeds[rank], rank))
    return now


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=WORLD_SIZES)
    sizes = parser.parse_args().sizes
    for name, costs in COSTS.items():
        table = Table(title=f"efficiency in percent, cost = {name}")
        for column in ("rule", *map(str, sizes)):
            table.add_column(column, justify="right")
        for rule in ("queue", "static", "DistributedSampler"):
            for slow in (1.0, 1.5):
                cells = [f"{100 * efficiency(costs(), size, rule, slow):.1f}" for size in sizes]
                table.add_row(f"{rule}, one slow rank" if slow > 1 else rule, *cells)
        limit = [f"{100 * min(1.0, sum(costs()) / size / max(costs())):.1f}" for size in sizes]
        table.add_row("limit: the largest image", *limit)
        Console(width=150).print(table)


if __name__ == "__main__":
    main()
