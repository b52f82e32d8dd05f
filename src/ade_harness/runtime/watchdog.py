"""Every rank says once a second that it lives, and what it does; a rank that is silent for long is lost.

Times are differences of this machine's monotonic clock, so a clock that jumps, or differs between nodes, changes
nothing. A rank that notices a loss keeps what it has counted and ends, even if it hangs in a collective.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from ade_harness.runtime.cluster import host_name
from ade_harness.runtime.coordination import Coordinator, open_store, rank_and_world_size
from ade_harness.runtime.notes import EXIT_RANK_LOST, open_note
from ade_harness.runtime.orphans import hand_over_to_watchdog, supervisor_exited

BEAT_EVERY_S = 1.0
GRACE_S = 5.0
"""For the main thread to end in order after a loss; then the process ends."""


@dataclass
class Beat:
    """What a rank reports about itself."""

    rank: int
    host: str = field(default_factory=host_name)
    pid: int = field(default_factory=os.getpid)
    item: str = ""
    """What it is working on."""
    done: int = 0
    """Progress so far, such as images."""
    cost: float = 0.0
    """The item that is being processed."""
    busy_seconds: float = 0.0
    """Spent working, not waiting for loaders."""
    number: int = 0


class Watchdog:
    """Two threads beside the work of a rank.

    Args:
        coordinator: stopped after a loss, so that the main thread ends in order.
        silent_s: after how many seconds without a sign a rank is lost.
        on_beats: called on rank 0, about once a second, with the beats of all ranks.
    """

    def __init__(
        self, coordinator: Coordinator, silent_s: float, on_beats: Callable[[Sequence[Beat]], None] | None = None
    ) -> None:
        self.coordinator = coordinator
        self.silent_s = silent_s
        self.on_beats = on_beats
        self.on_loss: Callable[[], None] | None = None
        """Called before the process ends though its main thread hangs: saves what can be saved."""
        self.rank, self.world_size = rank_and_world_size()
        self.beat = Beat(self.rank)
        self._note = open_note()
        self._store: Any = open_store(own_connection=True)
        self._heard = time.monotonic()
        self._looked = self._heard
        self._last: dict[int, tuple[int, float]] = {}
        self._ended = threading.Event()
        self._said = False
        self._threads = [threading.Thread(target=t, daemon=True) for t in (self._report, self._listen)]

    def start(self) -> None:
        """Begin."""
        self._publish()
        for thread in self._threads:
            thread.start()
        hand_over_to_watchdog()

    def working_on(self, item: str) -> None:
        """Say what the main thread does now."""
        self.beat.item = item
        if self._note is not None:
            self._note.write(item=item)

    def note(self, **content: str) -> None:
        """Tell the supervisor something."""
        if self._note is not None:
            self._note.write(**content)

    def finished(self, progress: int, cost: float, seconds: float) -> None:
        """Count a finished item."""
        self.beat.done += progress
        self.beat.cost += cost
        self.beat.busy_seconds += seconds

    def close(self) -> None:
        """End both threads; the main thread ends in order."""
        self._ended.set()
        for thread in self._threads:
            thread.join(timeout=2 * BEAT_EVERY_S)

    def _publish(self) -> None:
        self.beat.number += 1
        self._store.set(f"beat/{self.rank}", json.dumps(asdict(self.beat)))
        self._heard = time.monotonic()

    def _report(self) -> None:
        try:
            while not self._ended.wait(BEAT_EVERY_S):
                self._publish()
                if self.rank == 0:
                    self._look_at_all()
                elif self._store.check(["lost"]):
                    self._lose(bytes(self._store.get("lost")).decode())
        except RuntimeError:  # the store is gone: so is rank 0
            if not self._ended.is_set():
                self._lose("rank 0 is gone")

    def _look_at_all(self) -> None:
        beats = []
        now = time.monotonic()
        if now - self._looked > self.silent_s / 2:  # this process itself was stopped, perhaps with all others
            self._last.clear()
        self._looked = now
        for rank in range(self.world_size):
            key = f"beat/{rank}"
            if not self._store.check([key]):
                continue
            beat = Beat(**json.loads(bytes(self._store.get(key)).decode()))
            number, heard = self._last.get(rank, (-1, now))
            self._last[rank] = (beat.number, now if beat.number != number else heard)
            beats.append(beat)
            if now - self._last[rank][1] > self.silent_s:
                work = f", last processing {beat.item}" if beat.item else ""
                text = f"rank {rank} on {beat.host} (process {beat.pid}) has been silent for {self.silent_s:g} s{work}"
                self._store.set("lost", text)
                self._lose(text)
        if self.on_beats is not None:
            self._show(self.on_beats, beats)

    def _show(self, on_beats: Callable[[Sequence[Beat]], None], beats: Sequence[Beat]) -> None:
        """Call `on_beats`: what fails in showing how far the run is (a console that is closed) ends no run."""
        try:
            on_beats(beats)
        except Exception as error:
            if not self._said:
                self._said = True
                print(f"warning: progress is not shown: {type(error).__name__}: {error}", file=sys.stderr, flush=True)

    def _listen(self) -> None:
        before = time.monotonic()
        while not self._ended.wait(BEAT_EVERY_S / 2):
            now = time.monotonic()
            if now - before > self.silent_s / 2:  # stopped (Ctrl-Z) and continued
                self._heard = now
            before = now
            if supervisor_exited():
                self._lose("the process that started this rank is gone")
            if now - self._heard > self.silent_s:
                self._lose(f"rank 0's store does not answer for {self.silent_s:g} s")

    def _lose(self, text: str) -> None:
        if self.coordinator.lost is None:
            self.coordinator.lost = text
            if self._ended.wait(GRACE_S):
                return
            try:  # a disk that is full, an output that nobody reads any more: this process ends all the same
                with suppress(OSError):
                    print(f"error: {text}", file=sys.stderr, flush=True)
                if self.on_loss is not None:
                    self.on_loss()
            finally:
                os._exit(EXIT_RANK_LOST)
