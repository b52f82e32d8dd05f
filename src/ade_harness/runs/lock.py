"""One job per run directory: a lock that a crash of its owner does not leave behind.

The lock is a file that its owner rewrites every few seconds. Whoever finds it looks whether that process is still
there (on the same machine), or else whether the file still changes: no two clocks are compared, and no file system
needs to know about locks. SLURM never runs two of one job, so a requeued job takes its own lock over at once.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from ade_harness.errors import HarnessError
from ade_harness.files.atomic import discard, write_text
from ade_harness.files.documents import read_json

LOCK = ".lock"
RENEW_EVERY_S = 5.0
LEASE_S = 20.0
"""A lock of another machine that does not change for so long has no owner any more."""

_SETTLE_S = 0.3


class RunLock:
    """Held by rank 0 while a run goes on.

    Args:
        run_dir: of the run.
        say: called with the reason why a start takes longer than usual.
    """

    def __init__(self, run_dir: Path, say: Callable[[str], None] = lambda _: None) -> None:
        self.path = run_dir.absolute() / LOCK  # a model may change the working directory while it predicts
        self._shown = run_dir
        self._say = say
        self._content: dict[str, Any] = {"token": uuid.uuid4().hex, "renewed": 0, **_this_process()}
        self._renewed_at = time.monotonic()

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            HarnessError: another job holds it, or the directory cannot be written.
        """
        while True:
            try:
                descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                self._take_over()
                return
            except OSError as error:
                raise HarnessError(f"{self.path}: cannot be written ({error.strerror}).") from error
            with os.fdopen(descriptor, "w") as file:
                json.dump(self._content, file)
            return

    def _take_over(self) -> None:
        """Wait for a sign of the owner; without one, become the owner."""
        holder = read_lock(self.path)
        state = owner_state(holder)
        if state == "unknown":
            where = f"process {holder.get('pid')} on {holder.get('host')}" if holder else "another process"
            self._say(f"{self._shown} is locked by {where}: checking for {LEASE_S:g} s whether it is still alive")
            end = time.monotonic() + LEASE_S
            while time.monotonic() < end and state == "unknown":
                time.sleep(0.5)
                if not os.path.lexists(self.path):  # a link to nowhere is there too: to open it would fail again
                    return self.acquire()
                state = "alive" if read_lock(self.path) != holder else "unknown"
        if state == "alive":
            raise HarnessError(_refusal(self._shown, holder))
        if self.path.is_dir() and not self.path.is_symlink():
            raise HarnessError(f"{self.path}: is a folder, expected a lock file. Remove it.")
        self._write()
        time.sleep(_SETTLE_S)  # two that take over at once: the later one has it
        if not self.is_mine():
            raise HarnessError(_refusal(self._shown, read_lock(self.path)))
        return None

    def is_mine(self) -> bool:
        """Whether the lock is still this one's."""
        return bool(read_lock(self.path).get("token") == self._content["token"])

    def renew(self) -> None:
        """Show that the owner lives; cheap, and called often.

        Raises:
            HarnessError: another job has taken the lock meanwhile, as if this process had been stopped for long.
        """
        if time.monotonic() - self._renewed_at < RENEW_EVERY_S:
            return
        self._renewed_at = time.monotonic()
        holder = read_lock(self.path)
        if holder and holder.get("token") != self._content["token"]:
            raise HarnessError(_refusal(self._shown, holder))
        self._content["renewed"] += 1
        self._write()

    def release(self) -> None:
        """Give the lock back."""
        _given_back.add(str(self._content["token"]))
        if self.is_mine():
            discard(self.path)

    def _write(self) -> None:
        write_text(self.path, json.dumps(self._content), durable=False)


_given_back: set[str] = set()
"""Tokens of this process's own: a file system that has become read-only keeps the file of a lock that nobody holds."""
LOCK_SHAPE = {"token?": str, "renewed?": int, "pid?": int, "host?": str, "started?": (str, int, float)}


def read_lock(path: Path) -> dict[str, Any]:
    """Return a lock's content; empty if there is none, or not a whole one."""
    try:
        content: dict[str, Any] = read_json(path, LOCK_SHAPE, 1 << 16)
    except HarnessError:
        return {}
    return content


def owner_state(holder: dict[str, Any]) -> str:
    """Return ``alive``, ``dead``, or ``unknown`` (on a machine that cannot be looked into)."""
    me = _this_process()
    if not holder:
        return "unknown"
    if holder.get("token") in _given_back:
        return "dead"
    job = holder.get("slurm_job")
    if job is not None and job == me["slurm_job"] and holder.get("slurm_restart") != me["slurm_restart"]:
        return "dead"  # an earlier life of this very job
    if holder.get("machine") != me["machine"]:
        return "unknown"
    started = _started(int(holder.get("pid", -1)))
    return "alive" if started is not None and started == holder.get("started") else "dead"


def at_work(holder: dict[str, Any], progress: dict[str, Any] | None) -> bool:
    """Whether somebody is working on a run that its manifest calls running: what was killed could not change that.

    Args:
        holder: the lock's content.
        progress: the content of progress.json; of a process on another machine, its age says whether it is alive.
    """
    owner = owner_state(holder) if holder else "dead"
    if owner != "unknown":
        return owner == "alive"
    if progress is None:  # it has not reported yet, and nobody on another machine can tell
        return True
    return (datetime.now(UTC) - datetime.fromisoformat(progress["updated"])).total_seconds() <= LEASE_S


def _refusal(run_dir: Path, holder: dict[str, Any]) -> str:
    job = f", SLURM job {holder['slurm_job']}" if holder.get("slurm_job") else ""
    return (
        f"{run_dir}: another job is working on this run (process {holder.get('pid')} on {holder.get('host')}{job})."
        f" Wait for it, stop it, or choose another run.dir; `python -m ade_harness status {run_dir}` shows how far"
        " it is."
    )


def _this_process() -> dict[str, Any]:
    return {
        "host": os.uname().nodename,
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "machine": _machine(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "slurm_restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def _started(pid: int) -> float | None:
    """Return when a process started, in ticks since boot (a clock that jumps changes nothing); None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else float(fields[19])
    except (OSError, IndexError, ValueError):
        try:
            return psutil.Process(pid).create_time() if psutil.pid_exists(pid) else None
        except (psutil.Error, OverflowError, ValueError):  # no system has such a number
            return None


def _machine() -> str:
    """Return what distinguishes this boot of this machine, and this container, from all others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return os.uname().nodename
