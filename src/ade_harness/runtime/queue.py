"""Which rank does which item: every item exactly once, nothing padded, largest first.

`SharedItems` is the sampler of a rank's DataLoader. Lightning's own (``use_distributed_sampler``) repeats items to make
shares equal, which counts images twice, and knows the shares before the work has begun.
"""

from __future__ import annotations

import heapq
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ade_harness.config.runtime import Sharding
from ade_harness.runtime.coordination import FRESH_S, Coordinator
from ade_harness.runtime.descriptors import Descriptors, open_descriptors
from ade_harness.runtime.lifetime import end_with_parent

NOTHING = -1
"""An item that is none: it keeps the loaders turning while the rank may not take more."""


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


def max_held(left: int, world_size: int, look_ahead: int, at_once: int = 1) -> int:
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


class SharedItems(Sampler[int]):
    """Yields this rank's items as its loaders ask for them.

    Args:
        costs: expected, of every item of all ranks.
        sharding: from a shared counter, largest first, or fixed shares of equal cost.
        coordinator: of the ranks; no item is taken after any of them has stopped.
        rank: this one.
        world_size: number of ranks.
        look_ahead: items that the loaders can use, at most.
        at_once: items that this rank works on at a time.
    """

    def __init__(
        self, costs: Sequence[float], sharding: Sharding, coordinator: Coordinator, rank: int, world_size: int,
        look_ahead: int, at_once: int,
    ) -> None:  # fmt: skip
        self._costs, self._sharding, self._coordinator = costs, sharding, coordinator
        self._rank, self._world_size = rank, world_size
        self._look_ahead, self._at_once = look_ahead, at_once
        self.held = 0
        """Items that this rank has taken and not finished."""

    def __len__(self) -> int:
        return 1 << 40  # not known before the end; Lightning asks for a bound, and would load one item too early

    def __iter__(self) -> Iterator[int]:
        if self._sharding == Sharding.static:
            for item in assign(self._costs, self._world_size)[self._rank]:
                if not self._coordinator.may_begin():
                    return
                self.held += 1
                yield item
            return
        order = largest_first(self._costs)
        left, known_at = len(order), -FRESH_S
        while self._coordinator.may_begin():
            if self.held >= max_held(left, self._world_size, self._look_ahead, self._at_once):
                yield NOTHING  # what is left only becomes less
                continue
            if time.monotonic() - known_at > FRESH_S:  # others may have taken much while this rank was busy
                left, known_at = len(order) - self._coordinator.taken(), time.monotonic()
                if left <= 0:
                    return
                continue
            place, known_at = self._coordinator.next_item(), time.monotonic()
            if place >= len(order):
                return
            left = len(order) - place - 1
            self.held += 1
            yield order[place]


class Numbered(Dataset[Any]):
    """Items with their numbers; None for :data:`NOTHING`."""

    def __init__(self, items: Dataset[Any]) -> None:
        self._items = items

    def __getitem__(self, item: int) -> tuple[int, Any]:
        return item, None if item == NOTHING else self._items[item]


class ItemLoader(DataLoader[Any]):
    """A DataLoader of :class:`Numbered` items, whose loaders are forked.

    It passes over :data:`NOTHING`, which no loop needs to see.
    """

    def __iter__(self) -> Iterator[tuple[int, Any]]:  # type: ignore[override]
        """Yield numbers and items."""
        with open_descriptors(self.num_workers) as descriptors:
            self.worker_init_fn = partial(_begin_loader, descriptors)
            items = super().__iter__()
            try:
                for number, item in items:
                    if number != NOTHING:
                        yield number, item
            finally:
                del items  # ends the loaders, which may still be sending


def _begin_loader(descriptors: Descriptors, worker: int) -> None:
    descriptors.enter(worker)
    ignore_signals(worker)


def ignore_signals(_: int) -> None:
    """Let signals reach the main process only, which ends its workers."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()  # it holds the rank's GPU open: a rank that was killed must leave it free at once
    torch.set_num_threads(1)
    cv2.setNumThreads(0)  # else each loader starts a pool of all cores at its first resize
