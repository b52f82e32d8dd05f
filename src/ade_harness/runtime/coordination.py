"""The few words that ranks exchange while they work: a count of done items, a stop flag, the final sum."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d


def is_distributed() -> bool:
    """Whether there are other ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class Coordinator:
    """Counts done items and carries a stop flag over all ranks, through the process group's key-value store.

    Nothing here waits for another rank, so ranks may have any number of items, also none.
    """

    def __init__(self) -> None:
        self._local = {"done": 0, "stop": 0}
        self._store: Any = None

    def _add(self, key: str, amount: int) -> int:
        if not is_distributed():
            self._local[key] += amount
            return self._local[key]
        if self._store is None:
            # The store has no public accessor; torch's own rendezvous code reads it in the same way.
            self._store = c10d.PrefixStore("ade_harness", c10d._get_default_store())
        return int(self._store.add(key, amount))

    def done(self, items: int = 0) -> int:
        """Add finished items, and return how many all ranks have finished."""
        return self._add("done", items)

    def stop(self) -> None:
        """Ask every rank to leave the rest of its items."""
        self._add("stop", 1)

    @property
    def stopped(self) -> bool:
        """Whether any rank asked to stop."""
        return self._add("stop", 0) > 0


def all_reduce_sum(matrix: npt.NDArray[np.int64], device: torch.device) -> npt.NDArray[np.int64]:
    """Sum an int64 array over all ranks; exact."""
    if not is_distributed():
        return matrix
    tensor = torch.from_numpy(matrix.copy()).to(device)
    dist.all_reduce(tensor)
    summed: npt.NDArray[np.int64] = tensor.cpu().numpy()
    return summed


def gather(value: Any) -> list[Any]:
    """Return every rank's value, in the order of ranks."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Any) -> Any:
    """Return rank 0's value on every rank."""
    if not is_distributed():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
