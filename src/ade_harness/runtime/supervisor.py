"""The process that starts a node's ranks, keeps their logs, and says what happened when one of them dies.

It is not a rank itself and does not import torch: whatever kills a rank, this process is there to say which one it
was and what it was doing, to end the others in bounded time, and to start all again if it was asked to.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from ade_harness.files.atomic import replaced
from ade_harness.runtime.cluster import HANDOVER, SUPERVISED, SUPERVISOR, Node, host_name
from ade_harness.runtime.lifetime import killed_by
from ade_harness.runtime.notes import (
    DONE,
    EXIT_MESSAGE,
    EXIT_RANK_LOST,
    EXIT_STOPPED,
    NOTE_BYTES,
    SIBLING_DIED,
    Note,
    resume_command,
)

_POLL_S = 0.05
_END_GRACE_S = 12.0
"""From asking ranks to end until they are killed: more than the watchdog's grace."""
_OWN_END_S = 3.0
"""From one rank's orderly end to telling the others, who usually end by themselves."""
_TAIL_LINES = 12

_ORDERLY = (EXIT_MESSAGE, EXIT_STOPPED, EXIT_RANK_LOST)


@dataclass
class RankProcess:
    """A rank that this process has started."""

    rank: int
    process: subprocess.Popen[bytes]
    note: Path
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=_TAIL_LINES))
    forwarded: bool = False
    """Whether its messages were shown as they came."""
    ended_at: float | None = None
    killed_here: bool = False
    _early: list[bytes] = field(default_factory=list)
    _log: IO[bytes] | None = None
    _pumps: list[threading.Thread] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def pump(self, stream: IO[bytes], forward: IO[bytes] | None) -> None:
        """Copy a stream of the rank, line by line, to its log and perhaps to the terminal."""

        def copy() -> None:
            target = forward
            for line in iter(stream.readline, b""):
                self.tail.append(line.decode(errors="replace").rstrip())
                self._write(line)
                if target is not None:
                    try:
                        target.write(line)
                        target.flush()
                    except OSError:
                        target = None  # nobody reads it any more (`| head`); the run goes on

        thread = threading.Thread(target=copy, daemon=True)
        thread.start()
        self._pumps.append(thread)

    def _write(self, line: bytes) -> None:
        """Write to the run directory's log, as soon as the rank has reported where that is."""
        with self._lock:
            if self._log is None:
                self._early.append(line)
                folder = Note.read(self.note).get("run")
                if folder is None:
                    return
                try:
                    path = log_path(Path(folder), self.rank)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    self._log = path.open("ab", buffering=0)
                except OSError:
                    return  # what it says is in `tail` anyway
                line = b"".join(self._early)
            with contextlib.suppress(OSError):  # a full disk: the rank itself says so
                self._log.write(line)

    @property
    def exited_early(self) -> bool:
        """Whether it ended as if all were well, without having come to the end of its work (``os._exit(0)``)."""
        return self.process.returncode == 0 and DONE not in Note.read(self.note)

    @property
    def severity(self) -> tuple[int, float]:
        """How much this rank's end explains what went wrong; of equals the first."""
        code = self.process.returncode
        ranking = {0: -1, -SIBLING_DIED: 0, EXIT_RANK_LOST: 1, EXIT_STOPPED: 2, EXIT_MESSAGE: 3}
        level = 0 if self.killed_here else 4 if self.exited_early else ranking.get(code, 4)
        return level, -(self.ended_at or 0.0)

    def finish(self) -> None:
        """Read what is left of the streams and close the log."""
        for thread in self._pumps:
            thread.join(timeout=2)
        if self._early and self._log is None:
            self._write(b"")
        if self._log is not None:
            self._log.close()


def log_path(run_dir: Path, rank: int) -> Path:
    """Return where a rank's log is."""
    return run_dir / "logs" / f"rank{rank:05d}.log"


@dataclass(frozen=True)
class Ending:
    """How an attempt ended on this node."""

    code: int
    restartable: bool
    message: str = ""
    run_dir: str | None = None


class Supervisor:
    """Starts the ranks of this node, as often as allowed.

    Args:
        command: of one rank.
        handover: for a run directory (None: not known yet), the text of the file that ranks wait for; made while they
            start.
        ranks: of this node.
        node: this node among all.
        max_restarts: how often all ranks are started again after one has died.
        say: prints a line for the user.
    """

    def __init__(
        self,
        command: Sequence[str],
        handover: Callable[[str | None], str],
        ranks: int,
        node: Node,
        max_restarts: int,
        say: Callable[[str], None],
    ) -> None:
        self.command = command
        self.handover = handover
        self.ranks = ranks
        self.node = node
        self.max_restarts = max_restarts
        self.say = say
        self.run_dir: str | None = None
        self.received: signal.Signals | None = None
        self._processes: list[RankProcess] = []
        self._asked_at: float | None = None
        self._impatient = False

    def run(self) -> int:
        """Run all attempts; returns the exit code."""
        handled = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = {number: signal.signal(number, self._on_signal) for number in handled}
        try:
            attempt = 0
            while True:
                with tempfile.TemporaryDirectory(prefix="ade-harness-") as folder:
                    ending = self._attempt(attempt, Path(folder))
                self.run_dir = ending.run_dir or self.run_dir
                if ending.message:
                    self.say(ending.message)
                if not ending.restartable or attempt == self.max_restarts or self.received is not None:
                    return self._final(ending)
                attempt += 1
                self.say(f"restart {attempt} of {self.max_restarts}: completed images are saved.")
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _final(self, ending: Ending) -> int:
        if ending.code not in (0, EXIT_MESSAGE) and self.run_dir is not None and self.received is None:
            self.say(f"No score. Completed work is saved; to resume:\n  {resume_command(self.run_dir)}")
        return ending.code

    def _on_signal(self, number: int, _: object) -> None:
        self._impatient = self._impatient or (self.received == signal.SIGINT and number == signal.SIGINT)
        self.received = self.received or signal.Signals(number)
        self._signal_all(signal.Signals(number))
        if number != signal.SIGUSR1:  # before a time limit ranks may finish what they are at
            self._asked_at = self._asked_at or time.monotonic()

    def _signal_all(self, number: signal.Signals) -> None:
        for rank in self._processes:
            if rank.process.poll() is None:
                rank.process.send_signal(number)

    def _kill_all(self) -> None:
        for rank in self._processes:
            if rank.process.poll() is None:
                rank.killed_here = True
                rank.process.kill()

    def _attempt(self, attempt: int, folder: Path) -> Ending:
        self._asked_at = None
        self._processes = [self._start(local, attempt, folder) for local in range(self.ranks)]
        with replaced(folder / "handover.json", durable=False) as temporary:
            temporary.write_text(self.handover(self.run_dir), encoding="utf-8")
        if self.received is not None:  # the signal came while they were being started
            self._signal_all(self.received)
        failed = warned = False
        while any(rank.ended_at is None for rank in self._processes):
            died = False
            for rank in self._processes:
                if rank.ended_at is None and rank.process.poll() is not None:
                    rank.ended_at = time.monotonic()
                    failed = failed or rank.process.returncode != 0 or rank.exited_early
                    # of an orderly end all ranks know
                    died = died or rank.process.returncode not in (0, *_ORDERLY) or rank.exited_early
            if failed:
                self._asked_at = self._asked_at or time.monotonic()
            waited = 0.0 if self._asked_at is None else time.monotonic() - self._asked_at
            if waited > _END_GRACE_S or self._impatient:
                self._kill_all()
            elif failed and not warned and (died or waited > _OWN_END_S):
                warned = True
                self._signal_all(SIBLING_DIED)
            time.sleep(_POLL_S)
        for rank in self._processes:
            rank.finish()
        notes = {rank.rank: Note.read(rank.note) for rank in self._processes}
        run_dir = next((n["run"] for n in notes.values() if "run" in n), None)
        return self._ending(notes, run_dir)

    def _start(self, local: int, attempt: int, folder: Path) -> RankProcess:
        rank = self.node.rank * self.ranks + local
        note = folder / f"rank{rank}"
        note.write_bytes(bytes(NOTE_BYTES))
        world_size = self.ranks * self.node.count
        environment = {
            **os.environ,
            SUPERVISED: str(note),
            SUPERVISOR: str(os.getpid()),
            HANDOVER: str(folder / "handover.json"),
            "LOCAL_RANK": str(local),
            "RANK": str(rank),
            "NODE_RANK": str(self.node.rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(self.ranks),
            "MASTER_ADDR": self.node.address,
            "MASTER_PORT": str(self.node.port + attempt),
            "PYTHONUNBUFFERED": "1",  # what a killed rank has printed must not be lost
        }
        # rank 0 has the terminal; if there is none, its output is kept in its log like everybody's
        shell = sys.stdout is not None and sys.stdout.isatty()
        terminal = shell and rank == 0
        process = subprocess.Popen(
            self.command,
            env=environment,
            stdin=None if rank == 0 else subprocess.DEVNULL,
            stdout=None if terminal else subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=not shell,  # a terminal's Ctrl-Z must stop all; else signals come from here alone
        )
        started = RankProcess(rank, process, note, forwarded=local == 0)
        if process.stdout is not None:
            started.pump(process.stdout, sys.stdout.buffer if rank == 0 else None)
        assert process.stderr is not None
        started.pump(process.stderr, sys.stderr.buffer if local == 0 else None)
        return started

    def _ending(self, notes: dict[int, dict[str, str]], run_dir: str | None) -> Ending:
        worst = max(self._processes, key=lambda rank: rank.severity)
        code = worst.process.returncode
        if code == 0 and not worst.exited_early:
            return Ending(0, False, run_dir=run_dir)
        if self.received is not None:
            return Ending(EXIT_MESSAGE if self.received == signal.SIGINT else EXIT_STOPPED, False, run_dir=run_dir)
        if code in _ORDERLY and not worst.killed_here:  # the rank has reported why
            shown = any(r.forwarded and r.process.returncode == code for r in self._processes)
            return Ending(code, code == EXIT_RANK_LOST, "" if shown else "\n".join(worst.tail), run_dir)
        message = _obituary(worst, notes.get(worst.rank, {}), run_dir)
        if worst.exited_early:
            return Ending(1, False, message, run_dir)
        return Ending(code if code > 0 else 128 - code, True, message, run_dir)


def _obituary(rank: RankProcess, note: dict[str, str], run_dir: str | None) -> str:
    code = rank.process.returncode
    if code < 0:
        how = killed_by(-code)
    elif rank.exited_early:
        how = "exited early with code 0 (the model, or a library it uses, called os._exit)"
    else:
        how = f"ended with exit code {code}"
    work = f" while processing {note['item']}" if note.get("item") else ""
    lines = [f"error: rank {rank.rank} on {host_name()} (process {rank.process.pid}) {how}{work}."]
    if rank.forwarded and code > 0:
        lines.append("Its last lines are above.")
    elif rank.tail:
        where = f" ({log_path(Path(run_dir), rank.rank)})" if run_dir else ""
        lines += [f"Last lines of its log{where}:", *(f"  {line}" for line in rank.tail)]
    else:
        lines.append("Its log is empty.")
    return "\n".join(lines)
