"""Processes begin and end at once, and end as Python does in all that others see."""

from __future__ import annotations

import gc
import os
import pstats
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ade_harness.runtime import lifetime
from ade_harness.runtime.lifetime import importing

_ENDING = """
import atexit, sys, threading, time
from ade_harness.runtime.lifetime import leave
class Noisy:
    def __del__(self):
        print("taken apart")
kept = Noisy()
kept.itself = kept
atexit.register(lambda: print("registered"))
threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
print("work")
leave(7)
print("unreachable")
"""


def test_leaving_waits_for_threads_calls_what_is_registered_and_flushes() -> None:
    done = subprocess.run([sys.executable, "-c", _ENDING], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 7
    assert done.stdout.split("\n") == ["work", "thread", "registered", ""]  # in Python's own order
    assert done.stderr == ""


def test_leaving_when_nobody_reads_any_more() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    code = "from ade_harness.runtime.lifetime import leave; print('to nobody'); leave(3)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True, check=False, timeout=60,
        env=environment,
    )  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (3, "")


_INTERRUPTED = """
import signal, sys, time
from ade_harness.runtime.lifetime import watched
signal.signal(signal.SIGINT, signal.default_int_handler)  # which some who start tests ignore
def work():
    try:
        print("ready", flush=True)
        time.sleep(30)
    except KeyboardInterrupt:
        time.sleep(0.5)  # as long as it takes to end well
        print("interrupted", flush=True)
        return 2
sys.exit(watched(work))
"""


def test_a_profiler_sees_the_work(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import sys; from ade_harness.runtime.lifetime import watched\ndef inner(): return 0\nsys.exit(watched(inner))\n"
    )
    command = [sys.executable, "-m", "cProfile", "-o", "seen", "program.py"]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path, timeout=60)
    assert any(name == "inner" for _, _, name in pstats.Stats(str(tmp_path / "seen")).stats)  # type: ignore[attr-defined]


class _Monitoring:
    """As `sys.monitoring` of Python 3.12, by which cProfile and debuggers work there."""

    DEBUGGER_ID, COVERAGE_ID, PROFILER_ID = 0, 1, 2

    def __init__(self, tool: int) -> None:
        self.tool = tool

    def get_tool(self, tool: int) -> str | None:
        """Return the name of who uses it."""
        return "somebody" if tool == self.tool else None


def test_who_looks_on_is_noticed_however_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "getprofile", lambda: None)
    for tool, found in ((0, True), (1, False), (2, True)):
        monkeypatch.setattr(sys, "gettrace", lambda: None)
        monkeypatch.setattr(sys, "monitoring", _Monitoring(tool), raising=False)
        assert lifetime._is_observed() == found
    monkeypatch.setattr(sys, "monitoring", _Monitoring(9), raising=False)
    monkeypatch.setattr(sys, "gettrace", type("CTracer", (), {"__module__": "coverage.tracer"}))
    assert not lifetime._is_observed()  # coverage goes on in children
    monkeypatch.setattr(sys, "gettrace", type("Debugger", (), {"__module__": "pdb"}))
    assert lifetime._is_observed()


def test_who_goes_on_pressing_ctrl_c_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(lifetime.time, "monotonic", lambda: now[0])
    interrupt, heard = lifetime._interrupted_once(), []
    for _ in range(7):  # twice a second, for three seconds
        try:
            interrupt(signal.SIGINT, None)
        except KeyboardInterrupt:
            heard.append(now[0])
        now[0] += 0.5
    assert heard == [100.0, 101.5, 103.0]


def test_who_interrupts_a_whole_group_interrupts_the_work_once() -> None:
    """Service managers do: the work's process is reached by itself, and by way of its parent."""
    process = subprocess.Popen(
        [sys.executable, "-c", _INTERRUPTED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out, errors) == (2, "interrupted\n", "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGSEGV, 139), (signal.SIGKILL, 137)])
def test_a_crash_after_the_work_has_the_code_of_its_signal(number: int, code: int) -> None:
    text = (
        "import atexit, os, sys; from ade_harness.runtime.lifetime import watched;"
        f" atexit.register(lambda: os.kill(os.getpid(), {int(number)}) if os.getppid() == parent else None);"
        " parent = os.getpid(); sys.exit(watched(lambda: 0))"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, check=False, timeout=60)
    assert done.returncode == code


def test_what_is_imported_is_not_looked_at_again() -> None:
    before = gc.get_freeze_count()
    try:
        with pytest.raises(ImportError), importing():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled()
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()


def test_a_command_ends_as_any_program_under_a_profiler(tmp_path: Path) -> None:
    """Which writes what it has seen once the program has ended."""
    overrides = [sys.executable, "-m", "cProfile", "-o", "seen", "-m", "ade_harness", "--version"]
    subprocess.run(overrides, check=True, capture_output=True, cwd=tmp_path, timeout=60)
    assert (tmp_path / "seen").stat().st_size > 0
