"""What ranks exchange: a queue of items, a count of done ones, why to stop, and the final sum.

While ranks work nothing here waits for another rank: everything goes through the key-value store of the process
group, so ranks may have any number of items, also none. Collectives run only when all ranks have come to them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from ade_harness.errors import HarnessError
from ade_harness.runtime.cluster import host_name

T = TypeVar("T")

_POLL_S = 0.05
_FIRST_POLL_S = 0.002
FRESH_S = 0.02
"""How old an answer of the ranks' store may be, where a late one costs at most one item."""
_REASON_WITHIN_S = 5.0
"""For a signal that other ranks have had already."""


class RankLostError(Exception):
    """Another rank has died, or does not answer: this one cannot finish, and has kept what it counted."""


class StopRequestedError(Exception):
    """Somebody asked the run to stop: it can be continued. The text is the reason."""


def is_distributed() -> bool:
    """Whether there are other ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


class LocalStore:
    """What one rank alone needs of the process group's store."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def add(self, key: str, amount: int) -> int:
        """Add to a counter and return it."""
        value = int(self._values.get(key, b"0")) + amount
        self._values[key] = str(value).encode()
        return value

    def set(self, key: str, value: str) -> None:
        """Set a value."""
        self._values[key] = value.encode()

    def get(self, key: str) -> bytes:
        """Return a value."""
        return self._values[key]

    def check(self, keys: list[str]) -> bool:
        """Whether all of `keys` are set."""
        return all(key in self._values for key in keys)


def open_store(own_connection: bool = False) -> Any:
    """Return the process group's key-value store, or a local one for one rank.

    Args:
        own_connection: a second connection, for another thread: a waiting call blocks only its own connection.
    """
    if not is_distributed():
        return LocalStore()
    # The store has no public accessor; torch's own rendezvous code reads it in the same way.
    store: Any = c10d._get_default_store()
    return c10d.PrefixStore("ade_harness", store.clone() if own_connection else store)


def _storable(text: str) -> str:
    """Return a text that UTF-8 can hold: names of files may have other bytes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class Coordinator:
    """A rank's view of what all ranks do."""

    def __init__(self, store: Any = None) -> None:
        self._store: Any = open_store() if store is None else store
        self.rank, self.world_size = rank_and_world_size()
        self.lost: str | None = None
        """Which rank is lost, once that is known; set by the watchdog."""
        self.asked: str | None = None
        """Why this rank was asked to stop (a signal); sent to the others when it is seen."""
        self.ended = "interrupted"
        """Why this rank was asked to stop, once that was sent."""
        self._unstopped_at = -FRESH_S

    def _add(self, key: str, amount: int) -> int:
        self._check_alive()
        with self._store_errors():
            return int(self._store.add(key, amount))

    @contextmanager
    def _store_errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch's DistError is one
            raise RankLostError(self.lost or "rank 0, which keeps the ranks' store, is gone") from error

    def _check_alive(self) -> None:
        if self.lost is not None:
            raise RankLostError(self.lost)

    def lose(self, text: str) -> None:
        """Tell every rank that one is lost; each keeps what it counted and ends."""
        if self.lost is None:
            self.lost = text
            with contextlib.suppress(RuntimeError):  # with rank 0 the store is lost too, and the others notice that
                self._store.set("lost", _storable(text))

    def next_item(self) -> int:
        """Take the next place in the shared queue: 0, 1, 2, ..., each given out once."""
        return self._add("next", 1) - 1

    def taken(self) -> int:
        """Return how many places of the queue are given out."""
        return self._add("next", 0)

    def done(self, items: int = 0) -> int:
        """Add finished items, and return how many all ranks have finished."""
        return self._add("done", items)

    def stop(self, reason: str = "") -> None:
        """Ask every rank to leave the rest of its items.

        Args:
            reason: why the run as a whole ends here; empty if what is done is still to be collected.
        """
        if reason:
            with self._store_errors():
                self._store.set("why", _storable(reason))
        self._unstopped_at = -FRESH_S
        self._add("stop", 1)

    @property
    def stopped(self) -> bool:
        """Whether any rank asked to stop."""
        if self.asked is not None:
            self.ended, self.asked = self.asked, None
            self.stop(self.ended)
        return self._add("stop", 0) > 0

    def may_begin(self) -> bool:
        """Whether another item may be begun: no rank had asked to stop, a moment ago at most.

        An item may take a millisecond, and a question to the store 0.07 of one, half of it the thread's own.
        """
        now = time.monotonic()
        if self.asked is not None or now - self._unstopped_at > FRESH_S:
            if self.stopped:
                return False
            self._unstopped_at = now
        self._check_alive()
        return True

    def raise_if_ended(self) -> None:
        """Leave, if the run was asked to end.

        Raises:
            StopRequestedError: with the reason.
        """
        if not self.stopped:
            return
        with self._store_errors():
            why = bytes(self._store.get("why")).decode() if self._store.check(["why"]) else None
        if why is not None:
            raise StopRequestedError(why)

    def meet(self, place: str, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait until every rank has come to `place`.

        Unlike a collective it has no time limit, and does not wait for a rank that is lost, nor after a stop.

        Args:
            place: each name is used once.
            meanwhile: called several times a second.

        Raises:
            RankLostError: a rank was lost while waiting.
            StopRequestedError: the run is to end.
        """
        arrived, pause, longest = self._add(place, 1), _FIRST_POLL_S, _POLL_S * max(1.0, self.world_size / 32)
        while arrived < self.world_size:
            self.raise_if_ended()
            meanwhile()
            time.sleep(pause)
            pause = min(2 * pause, longest)  # ranks meet several times before the first image; many ask one store
            arrived = self._add(place, 0)


def agreed(coordinator: Coordinator, place: str, work: Callable[[], T]) -> T:
    """Run `work` on every rank; if it fails on one, it fails on all, with a message that names rank and host.

    Args:
        coordinator: of this rank.
        place: a name for this piece of work, unlike any other's.
        work: what may fail with a HarnessError.

    Raises:
        HarnessError: what went wrong on the first rank that failed.
    """
    failure, result = "", None
    try:
        result = work()
    except HarnessError as error:
        if coordinator.world_size == 1:
            raise
        failure = str(error)
    coordinator.meet(place)
    failures = [(rank, host, text) for rank, (host, text) in enumerate(gather((host_name(), failure))) if text]
    if failures:
        rank, host, text = failures[0]
        everywhere = len(failures) == coordinator.world_size and len({text for _, _, text in failures}) == 1
        raise HarnessError(text if everywhere else f"rank {rank} on {host}: {text}")
    return result  # type: ignore[return-value]


def all_reduce_sum(matrix: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Sum an int64 array over all ranks; exact. On the CPU: the group of an evaluation is gloo's."""
    if not is_distributed():
        return matrix
    tensor = torch.from_numpy(matrix.copy())
    _collective(lambda: dist.all_reduce(tensor))
    summed: npt.NDArray[np.int64] = tensor.numpy()
    return summed


def gather(value: Any) -> list[Any]:
    """Return every rank's value, in the order of ranks."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    _collective(lambda: dist.all_gather_object(values, value))
    return values


def broadcast(value: Any) -> Any:
    """Return rank 0's value on every rank."""
    if not is_distributed():
        return value
    values = [value]
    _collective(lambda: dist.broadcast_object_list(values, src=0))
    return values[0]


@contextmanager
def broken_connections(coordinator: Coordinator) -> Iterator[None]:
    """Turn the broken collective of a training into the reason for it.

    Ranks are asked to end one after another: one that has ended already breaks the step that another is in, before
    that one's own signal has come.

    Raises:
        StopRequestedError: the run is to end; the reason is waited for.
        RankLostError: no reason came.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        broken = isinstance(error, dist.DistError) or "onnection" in text or "Broken pipe" in text
        if coordinator.world_size == 1 or not broken:
            raise
        end = time.monotonic() + _REASON_WITHIN_S
        while time.monotonic() < end:
            coordinator.raise_if_ended()
            time.sleep(_POLL_S)
        raise RankLostError(f"the connection to another rank broke ({text})") from error


def _collective(call: Callable[[], Any]) -> None:
    try:
        call()
    except RuntimeError as error:  # a broken connection
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise RankLostError(f"the connection to another rank broke ({str(error).splitlines()[0]})") from error
