"""Where the time goes: seconds per stage, without making a GPU wait for the clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Times named stages on a device.

    On CUDA, where calls return before the work is done, stages are marked by events in the stream and read when
    `seconds` is asked for, after the caller has waited for the device. A stream that waits for its host, as that of a
    network of many small kernels does, spends that time in the stage that it waits in: the shares are of what to make
    shorter, not of what the GPU computes, and they may add up to more than the run's time.
    """

    def __init__(self, device: torch.device) -> None:
        self._seconds: dict[str, float] = {}
        self._cuda = device.type == "cuda"
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time the block as part of `stage`."""
        if self._cuda:
            make: Any = torch.cuda.Event
            begin, end = make(enable_timing=True), make(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((stage, begin, end))
            return
        start = time.perf_counter()
        yield
        self.add(stage, time.perf_counter() - start)

    def add(self, stage: str, seconds: float) -> None:
        """Add time that was measured elsewhere."""
        self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds

    def seconds(self) -> dict[str, float]:
        """Return the time of each stage; on CUDA the device must have finished."""
        for stage, begin, end in self._events:
            self.add(stage, begin.elapsed_time(end) / 1000)
        self._events = []
        return dict(self._seconds)
