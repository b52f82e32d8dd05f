"""Progress over all ranks: a bar in a terminal, plain lines in a log."""

from __future__ import annotations

import os
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from ade_harness.runtime.cluster import is_supervised
from ade_harness.runtime.console import print_line

_LINE_EVERY_S = 10.0


class ProgressReporter:
    """Shows done items, rate and time left.

    Args:
        console: where to.
        total: items of the whole run.
        before: items that an earlier part of the run has done.
        label: what leads the plain lines, such as ``rank 3``.
        unit: plural of what is counted.
        title: leads the bar.
    """

    def __init__(
        self,
        console: Console,
        total: int,
        before: int = 0,
        label: str = "",
        unit: str = "images",
        title: str = "evaluating",
    ) -> None:
        self._console = console
        self._total = total
        self._before = before
        self._label = f"{label}: " if label else ""
        self._unit = unit
        self._title = title
        self._start = self._printed = time.monotonic()
        self._shown = -1
        self._bar: Progress | None = None

    def start(self) -> None:
        """Begin to measure and to show."""
        self._start = self._printed = time.monotonic()
        if self._console.is_terminal:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(self._title, total=self._total, completed=self._before, rate="")
            self._bar.start()

    def update(self, done: int) -> None:
        """Show that `done` items were finished since the start (all ranks)."""
        now = time.monotonic()
        rate = done / max(now - self._start, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._before + done, rate=f"{rate:.1f} {self._unit}/s")
        elif done != self._shown and (now - self._printed >= _LINE_EVERY_S or self._before + done == self._total):
            self._printed, self._shown = now, done
            left = (self._total - self._before - done) / rate if rate else 0.0
            print_line(
                self._console,
                f"{self._label}{self._before + done} of {self._total} {self._unit},"
                f" {rate:.1f} {self._unit}/s, {format_seconds(left)} left",
            )

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()


def format_seconds(seconds: float) -> str:
    """Return h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def reporter_for(rank: int, console: Console, total: int, before: int) -> ProgressReporter | None:
    """Return the display of a rank: rank 0 shows all ranks' progress, the others only where they have a log."""
    if rank == 0:
        return ProgressReporter(console, total, before)
    has_log = is_supervised() or "SLURM_PROCID" in os.environ
    return ProgressReporter(console, total, before, label=f"rank {rank}") if has_log else None
