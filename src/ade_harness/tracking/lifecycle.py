"""Tracking around the work of rank 0: opened when the run directory is there, ended with what the run found."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ade_harness.config.plain import as_dict
from ade_harness.config.schema import Config, TrackingKind
from ade_harness.runs.record import short_manifest
from ade_harness.runs.result import Result
from ade_harness.runtime.console import print_fact, print_line

if TYPE_CHECKING:
    from ade_harness.tracking.live import LiveRun


class Tracking:
    """What a run reports to tracking from start to end; nothing where it is not tracked.

    Args:
        cfg: the whole configuration.
        console: where addresses and warnings are printed.
    """

    def __init__(self, cfg: Config, console: Console) -> None:
        self.cfg, self.console = cfg, console
        self._live: LiveRun | None = None

    def begin(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        """Open the run, if it is to be open while the work goes on; returns at once, and costs no work if it fails.

        Args:
            folder: the run directory.
            manifest: the run's record.
        """
        if self.cfg.tracking.kind != TrackingKind.wandb:
            return
        from ade_harness.tracking.run import begin_live

        def say(url: str) -> None:
            print_fact(self.console, "watch it", url)

        try:
            with self._warnings_printed():
                self._live = begin_live(self.cfg.tracking, folder, as_dict(self.cfg), short_manifest(manifest), say)
        except Exception as error:  # of files, of starting a process; at the end it is tried again, offline if need be
            print_line(self.console, f"W&B: not open yet: {' '.join(str(error).split())[:400]}", style="yellow")

    def finish(self, result: Result, manifest: Mapping[str, Any]) -> None:
        """Log an evaluation, and print where."""
        from ade_harness.tracking.run import log_result

        self._end(lambda live: log_result(self.cfg.tracking, result, as_dict(self.cfg), short_manifest(manifest), live))

    def finish_training(self, folder: Path, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
        """Log a training, and print where; arguments as of :func:`ade_harness.tracking.run.log_curve`."""
        from ade_harness.tracking.run import log_curve

        self._end(lambda live: log_curve(self.cfg.tracking, folder, rows, facts, live))

    def leave(self) -> None:
        """End what is still open: the work has failed, or was asked to stop."""
        live, self._live = self._live, None
        if live is not None:
            live.leave()

    def _end(self, log: Callable[[LiveRun | None], str | None]) -> None:
        live, self._live = self._live, None
        with self._warnings_printed():
            where = log(live)
        print_fact(self.console, "W&B", where or "not logged")

    @contextmanager
    def _warnings_printed(self) -> Iterator[None]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            yield
        for text in dict.fromkeys(str(warning.message) for warning in caught):
            if text.startswith("W&B"):
                print_line(self.console, text, style="yellow")


@contextmanager
def tracked(cfg: Config, console: Console) -> Iterator[Tracking]:
    """Yield the tracking of a run; what is open at the end is ended."""
    tracking = Tracking(cfg, console)
    try:
        yield tracking
    finally:
        tracking.leave()
