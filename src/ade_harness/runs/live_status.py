"""What a running job shows to others: progress.json, and a warning about a rank that is much slower than the rest."""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from ade_harness.errors import HarnessError
from ade_harness.files.atomic import discard, write_text
from ade_harness.runs.directory import PROGRESS
from ade_harness.runs.lock import RunLock
from ade_harness.runs.record import RunRecord
from ade_harness.runtime.console import print_line
from ade_harness.runtime.coordination import Coordinator
from ade_harness.runtime.watchdog import Beat

_WRITE_EVERY_S = 2.0
SLOW_FACTOR = 2.0
"""A rank is slow if it takes this much longer than the median rank for the same work."""
_JUDGED_AFTER_S = 5.0
"""Busy seconds of every rank before it is compared with the others."""


class LiveStatus:
    """Fed with what ranks report, on rank 0, about once a second; must never fail.

    Args:
        run_dir: where progress.json goes.
        lock: renewed here.
        total: images of the run.
        warn: prints a line.
        lose: ends all ranks with a reason.
    """

    def __init__(
        self,
        run_dir: Path,
        lock: RunLock,
        total: int,
        warn: Callable[[str], None],
        lose: Callable[[str], None],
    ) -> None:
        self.path = run_dir / PROGRESS
        self.lock = lock
        self.total = total
        self.before = 0
        self.warnings: dict[int, str] = {}
        """About slow ranks, by rank."""
        self._warn = warn
        self._lose = lose
        self._begun = time.monotonic()
        self._written = -_WRITE_EVERY_S
        self._file, self._closed = threading.Lock(), False

    @staticmethod
    def of(record: RunRecord, total: int, console: Console, coordinator: Coordinator) -> LiveStatus:
        """Return the status of a run that starts; arguments as of the class."""

        def warn(text: str) -> None:
            print_line(console, text, style="yellow")

        return LiveStatus(record.path.absolute(), record.lock, total, warn, coordinator.lose)

    def begin(self, before: int) -> float:
        """Note that the work begins, and how many images were counted earlier; return ``time.monotonic()``."""
        self.before, self._begun = before, time.monotonic()
        return self._begun

    def on_beats(self, beats: Sequence[Beat]) -> None:
        """Take the beats of all ranks."""
        try:
            self.lock.renew()
        except HarnessError as error:
            if not self.lock.is_mine():
                self._lose(str(error))
        for rank, text in slow_ranks(beats).items():
            if rank not in self.warnings:
                self.warnings[rank] = text
                self._warn(f"warning: {text}")
        if time.monotonic() - self._written >= _WRITE_EVERY_S:
            self._written = time.monotonic()
            self._write(beats)

    def _write(self, beats: Sequence[Beat]) -> None:
        seconds = max(time.monotonic() - self._begun, 1e-9)
        done = sum(beat.done for beat in beats)
        content: dict[str, Any] = {
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
            "images": self.total,
            "done": self.before + done,
            "images_per_second": done / seconds,
            "seconds_left": (self.total - self.before - done) * seconds / done if done else None,
            "warnings": list(self.warnings.values()),
            "ranks": [{**asdict(beat), "images_per_second": beat.done / seconds} for beat in beats],
        }
        with self._file, suppress(HarnessError):  # the ledger's own error says that the disk is full
            if not self._closed:  # beats go on after the work
                write_text(self.path, json.dumps(content), durable=False)  # a sign of life, not a record

    def close(self) -> tuple[str, ...]:
        """Remove progress.json: the result says all. Returns the warnings about slow ranks."""
        with self._file:
            self._closed = True
            discard(self.path)
        return tuple(self.warnings.values())


def slow_ranks(beats: Sequence[Beat]) -> dict[int, str]:
    """Return a warning for each rank that needs twice the median rank's time for the same work."""
    judged = [beat for beat in beats if beat.busy_seconds >= _JUDGED_AFTER_S and beat.cost > 0]
    if len(judged) < max(2, len(beats)):
        return {}
    pace = {beat.rank: beat.busy_seconds / beat.cost for beat in judged}
    found = {}
    for beat in judged:
        typical = statistics.median([p for rank, p in pace.items() if rank != beat.rank])
        if pace[beat.rank] > SLOW_FACTOR * typical:
            found[beat.rank] = (
                f"rank {beat.rank} on {beat.host} takes {pace[beat.rank] / typical:.1f} times as long as the median"
                " rank for the same work: check for a throttled device, or another job on it"
            )
    return found
