"""One job per run directory, whatever happened to the last one."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ade_harness.errors import HarnessError
from ade_harness.runs import lock as module
from ade_harness.runs.directory import PROGRESS
from ade_harness.runs.live_status import LiveStatus
from ade_harness.runs.lock import LOCK, RunLock, owner_state, read_lock
from ade_harness.runtime.watchdog import Beat


def edit(path: Path, **changes: Any) -> None:
    (path / LOCK).write_text(json.dumps(read_lock(path / LOCK) | changes))


def test_a_second_job_is_refused_and_named_who_has_the_run(tmp_path: Path) -> None:
    first = RunLock(tmp_path)
    first.acquire()
    with pytest.raises(HarnessError, match=rf"another job is working on this run .process {os.getpid()} on .*status"):
        RunLock(tmp_path).acquire()
    assert first.is_mine()
    first.release()
    RunLock(tmp_path).acquire()


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path: Path) -> None:
    code = f"from pathlib import Path; from ade_harness.runs.lock import RunLock; RunLock(Path({str(tmp_path)!r})).acquire()"
    subprocess.run([sys.executable, "-c", code + "; import os; os.kill(os.getpid(), 9)"], check=False)
    assert (tmp_path / LOCK).exists()
    begin = time.monotonic()
    taken = RunLock(tmp_path)
    taken.acquire()
    assert taken.is_mine()
    assert time.monotonic() - begin < 5


def test_a_process_id_that_another_process_has_got_meanwhile_is_no_owner(tmp_path: Path) -> None:
    RunLock(tmp_path).acquire()
    edit(tmp_path, started=1.0)  # this process id, but begun at another time
    assert owner_state(read_lock(tmp_path / LOCK)) == "dead"
    RunLock(tmp_path).acquire()


def test_a_lock_of_another_machine_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sign of life refuses; silence gives the lock away. No clock of the two is compared."""
    monkeypatch.setattr(module, "LEASE_S", 2.0)
    monkeypatch.setattr(module, "RENEW_EVERY_S", 0.2)
    monkeypatch.setattr(time, "time", lambda: 0.0)  # a clock that stands still, or jumps, changes nothing
    owner = RunLock(tmp_path)
    owner._content["machine"] = "another"
    owner.acquire()
    ended = threading.Event()

    def live() -> None:
        while not ended.wait(0.1):
            owner.renew()

    thread = threading.Thread(target=live)
    thread.start()
    printed: list[str] = []
    with pytest.raises(HarnessError, match="another job is working"):
        RunLock(tmp_path, printed.append).acquire()
    assert "whether it is still alive" in printed[0]
    ended.set()
    thread.join()
    taken = RunLock(tmp_path)
    taken.acquire()
    assert taken.is_mine()
    time.sleep(0.3)
    with pytest.raises(HarnessError, match="another job is working"):  # the old owner wakes up, and leaves
        owner.renew()


def test_a_requeued_slurm_job_takes_its_own_lock_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    first = RunLock(tmp_path)
    first._content["machine"] = "another"
    first.acquire()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    begin = time.monotonic()
    RunLock(tmp_path).acquire()
    assert time.monotonic() - begin < 2
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setattr(module, "LEASE_S", 1.0)
    edit(tmp_path, machine="another")
    RunLock(tmp_path).acquire()  # of another job: only after a while
    assert time.monotonic() - begin > 1


def test_a_half_written_lock_has_no_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEASE_S", 0.6)
    (tmp_path / LOCK).write_text('{"pid"')
    RunLock(tmp_path).acquire()


def test_of_two_that_take_over_at_once_one_has_it(tmp_path: Path) -> None:
    RunLock(tmp_path).acquire()
    edit(tmp_path, started=1.0)
    results: list[str] = []

    def take() -> None:
        try:
            RunLock(tmp_path).acquire()
            results.append("mine")
        except HarnessError:
            results.append("refused")

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.count("mine") == 1


@pytest.mark.parametrize("kind", ["garbage", "empty", "fifo", "link to nowhere", "folder"])
def test_a_lock_that_is_none_is_watched_and_then_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(module, "LEASE_S", 0.6)
    path = tmp_path / LOCK
    if kind == "folder":
        path.mkdir()
        with pytest.raises(HarnessError, match=r"\.lock: is a folder, expected a lock file\. Remove it"):
            RunLock(tmp_path).acquire()
        return
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link to nowhere":
        path.symlink_to("/nowhere/at/all")
    else:
        path.write_bytes(b"\xff{[" if kind == "garbage" else b"")
    taken = RunLock(tmp_path)
    taken.acquire()
    assert taken.is_mine()
    assert not path.is_symlink()


def test_a_disk_that_has_become_read_only_hides_no_other_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run removes at its end stays; why it ended is what the user reads."""
    lock = RunLock(tmp_path)
    lock.acquire()
    status = LiveStatus(tmp_path, lock, 3, print, print)
    status.on_beats([Beat(0)])
    assert (tmp_path / PROGRESS).exists()

    def refused(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "unlink", refused)
    assert status.close() == ()
    lock.release()
    monkeypatch.undo()
    (tmp_path / PROGRESS).unlink()
    status.on_beats([Beat(0)])  # a beat that comes late
    status._written = 0.0
    status.on_beats([Beat(0)])
    assert not (tmp_path / PROGRESS).exists()
