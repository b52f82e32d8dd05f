"""A W&B run that is open while its evaluation or training works: ``python -m ade_harness.tracking.session``.

It is a process of its own, of which the rank knows a pipe: wandb and its service take no time of the rank's, a server
that hangs holds nobody up, and whatever ends the rank ends in a run that W&B shows as ended. How far the work is, it
reads from the run directory, as `status` does. The rank sends a :class:`Start`, and at the end what the run holds.
"""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import queue
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from ade_harness.config.schema import TrackingConfig
from ade_harness.errors import HarnessError
from ade_harness.runs.directory import LEDGER
from ade_harness.runs.ledger import read_rows
from ade_harness.runs.progress import read_losses, read_progress
from ade_harness.runtime.progress_bar import format_seconds
from ade_harness.tracking.attaching import attached_run
from ade_harness.tracking.content import Content
from ade_harness.tracking.wandb_run import Entry, open_run, staging, tags_of

_ORPHAN_S = 30
"""How long an evaluation's run may take to end once the evaluation is gone."""
_LOCK_S = 20.0
_MAX_LOG_BYTES = 1 << 20
"""Bytes of one log that are sent between two looks at it."""


@dataclass(frozen=True)
class Start:
    """What a session needs to know."""

    cfg: TrackingConfig
    entry: Entry
    identifier: str
    """The id of the W&B run."""
    watched: int
    """The process whose use of the machine is shown."""
    every_s: float
    """Between two looks at the run directory."""


class Follower:
    """What is new in a run directory.

    Args:
        folder: of the run.
        step: the first of a training that W&B does not have yet; None for an evaluation, which has no steps.
    """

    def __init__(self, folder: Path, step: int | None = None) -> None:
        self.folder = folder
        self._step = step
        self._read: dict[Path, int] = {}
        self._done = -1

    def rows(self) -> Iterator[tuple[dict[str, float], int | None]]:
        """Yield what is to be logged, and its step if it has one of its own."""
        if self._step is None:
            progress = read_progress(self.folder)
            if progress is not None and progress["done"] != self._done:
                self._done = progress["done"]
                yield progress_row(self.folder, progress), None
            return
        # nothing but losses: a row without a step would take W&B's next one, and the loss of that step would be lost
        for row in self._losses():
            if row["step"] >= self._step:  # a training that was killed does its last steps again
                self._step = row["step"] + 1
                yield {k: v for k, v in row.items() if k != "step"}, row["step"]

    def _losses(self) -> list[dict[str, Any]]:
        try:
            return read_losses(self.folder)
        except HarnessError:
            return []  # whoever reads the training says so

    def text(self) -> Iterator[str]:
        """Yield what the ranks have written to their logs, and how far the work is."""
        for log in sorted((self.folder / "logs").glob("rank*.log")):
            with suppress(OSError), log.open("rb") as file:
                file.seek(self._read.get(log, 0))
                new = file.read(_MAX_LOG_BYTES)
                self._read[log] = self._read.get(log, 0) + len(new)
                yield from (f"{log.stem}: {line}" for line in new.decode("utf-8", "replace").splitlines())
        progress = read_progress(self.folder)
        if progress is not None:
            left = progress["seconds_left"]
            yield (
                f"{progress['done']} of {progress['images']}, {progress['images_per_second']:.2f}/s,"
                f" {'unknown' if left is None else format_seconds(left)} left"
            )


def progress_row(folder: Path, progress: dict[str, Any]) -> dict[str, float]:
    """Return what is logged of a running evaluation: pixel accuracy is of the images in the ledger."""
    found = {f"progress/{name}": progress[name] for name in ("images_per_second", "seconds_left")}
    rows, _ = read_rows(folder / LEDGER)
    valid = sum(row.valid_pixels for row in rows)
    accuracy = sum(row.right_pixels for row in rows) / valid if valid else None
    content = {"progress/done": progress["done"], **found, "progress/pixel_accuracy": accuracy}
    return {name: value for name, value in content.items() if value is not None}


def main() -> int:
    """Keep a run open until its content comes, or the process that would send it is gone; return the exit code."""
    channel = _own_output()
    start: Start = pickle.load(sys.stdin.buffer)
    inbox: queue.Queue[Content | None] = queue.Queue()
    threading.Thread(target=_receive, args=(sys.stdin.buffer, inbox), daemon=True).start()
    try:
        with _alone(start.entry.folder / "wandb"), staging(start.entry.folder.resolve() / "wandb"):
            return _session(start, inbox, channel)
    except Exception as error:  # of wandb, of a server, of files: the rank says it and goes on
        _report(channel, problem=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return 1


def _session(start: Start, inbox: queue.Queue[Content | None], channel: TextIO) -> int:
    attached = start.cfg.run_id is not None
    run = attached_run(start.cfg, start.entry.folder) if attached else open_run(
        start.cfg, start.entry, start.identifier, start.watched
    )  # fmt: skip
    _report(channel, url=run.url)
    content = inbox.get() if attached else _follow(run, start, inbox)
    if content is None:
        _end_soon()
        run.mark_preempting()  # of a rank that was killed, Ctrl-C, a time limit: it may go on
        run.finish(exit_code=1)
        return 1
    try:
        if content.entry is not None:  # marks and versions that are known only now
            run.config.update(dict(content.entry.config), allow_val_change=True)
            run.tags = tags_of(content.entry)
        content.fill(run)
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish(exit_code=content.exit_code)
    _report(channel, done=True)
    return 0


def _follow(run: Any, start: Start, inbox: queue.Queue[Content | None]) -> Content | None:
    """Log how far the work is until the end comes."""
    run.define_metric("progress/*", summary="none")
    follower = Follower(start.entry.folder, run.step if start.entry.job_type == "probe" else None)
    content, is_over = None, False
    while not is_over:
        try:
            content, is_over = inbox.get(timeout=start.every_s), True
        except queue.Empty:
            with suppress(HarnessError, OSError):  # it is being written: the next look sees it
                for row, step in follower.rows():
                    run.log(row, step=step, commit=True)
        for line in follower.text():  # also the last ones, which may say why it failed
            print(line)  # W&B shows it as the run's log
    return content


def _receive(pipe: BinaryIO, inbox: queue.Queue[Content | None]) -> None:
    try:
        inbox.put(pickle.load(pipe))
    except Exception:  # EOFError, and what a rank that was killed has sent by half
        inbox.put(None)


def _own_output() -> TextIO:
    """Return the pipe to the rank; what is printed goes to W&B alone."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    with Path(os.devnull).open("w") as nothing:
        os.dup2(nothing.fileno(), 1)
    return channel


def _report(channel: TextIO, **content: Any) -> None:
    with suppress(OSError):  # the rank is gone
        channel.write(json.dumps(content) + "\n")


def _end_soon() -> None:
    """End this process and wandb's service, whatever a server does: nobody waits for them any more."""
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(0, signal.SIGKILL))
    signal.alarm(_ORPHAN_S)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait for an earlier session of the same run, which ends now: W&B takes one writer at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".session").open("w") as file:
        timer = threading.Timer(_LOCK_S, lambda: os.killpg(0, signal.SIGKILL))
        timer.daemon = True
        timer.start()
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        timer.cancel()
        yield


if __name__ == "__main__":
    sys.exit(main())
