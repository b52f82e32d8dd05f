"""Begin and end a process at once: what Python does beside the imports, and after the work, takes a second."""

from __future__ import annotations

import atexit
import ctypes
import gc
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from ade_harness.errors import HarnessError
from ade_harness.runtime.console import print_error


@contextmanager
def importing() -> Iterator[None]:
    """Import much in a process that is ours alone, without looking for garbage meanwhile.

    Torch and Lightning make half a million objects that stay. Collections look at all of them again and again, which
    is a sixth of the time; afterwards none does, and loaders that are forked share their memory.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, of whatever; on Linux, elsewhere nothing is done."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died in between
            os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def directory_kept() -> Iterator[None]:
    """Go back to the working directory afterwards, if it is still there.

    Modules of models change to their own when they are imported, and forget it: relative paths of a run, its data and
    its results belong to the directory where the command was given.
    """
    before = None
    with suppress(OSError):  # it may be gone: what has absolute paths goes on
        before = os.getcwd()  # noqa: PTH109  # half of what Path.cwd costs, for each image
    try:
        yield
    finally:
        if before is not None:
            with suppress(OSError):
                os.chdir(before)


class CommandEnded(SystemExit):
    """Ends a command of ours with the exit code of a process that it has started; no model's exit."""


def exit_location(error: SystemExit) -> str:
    """Say where a ``sys.exit`` was called: an evaluation that a model ends has no score, whatever its exit code."""
    frames = traceback.extract_tb(error.__traceback__)
    while frames and frames[-1].name == "exit" and "wandb" in frames[-1].filename:  # which puts its own in its place
        frames.pop()
    return _exit_message(f"sys.exit({error.code!r})", frames)


def _exit_message(call: str, frames: Sequence[traceback.FrameSummary]) -> str:
    place = f" at {frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name}" if frames else ""
    return (
        f"the model, or a library it uses, called {call}{place}: the work was not finished. A model has to return"
        " scores or raise an exception."
    )


@contextmanager
def no_silent_exit() -> Iterator[None]:
    """Refuse ``os._exit(0)`` in this process, by which a model would end a command as if all were well.

    For a process without a supervisor, which would notice. Forked children end so as a rule, and may.

    Raises:
        HarnessError: where it is called, with its place.
    """
    process, leave_at_once = os.getpid(), os._exit

    def refused(status: int) -> NoReturn:
        if status == 0 and os.getpid() == process:
            raise HarnessError(_exit_message("os._exit(0)", traceback.extract_stack()[:-1]))
        leave_at_once(status)

    os._exit = refused
    try:
        yield
    finally:
        os._exit = leave_at_once


_SIGNAL_CAUSES = {
    signal.SIGKILL: "often the kernel, when memory runs out: see dmesg",
    signal.SIGSEGV: "a fault in compiled code",
    signal.SIGBUS: "often no space left in /dev/shm",
    signal.SIGABRT: "compiled code gave up: see its log",
}


def killed_by(number: int) -> str:
    """Return "was killed by NAME", and what is often the cause, of a signal's number."""
    name = signal.Signals(number)
    cause = _SIGNAL_CAUSES.get(name)
    return f"was killed by {name.name}{f' ({cause})' if cause else ''}"


_SAME_INTERRUPT_S = 1.0
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def watched(work: Callable[[], int]) -> int:
    """Do `work` in a child of this process; returns its exit code, in both.

    For commands that run a model without ranks and so without a supervisor: what ends the child below Python (``exit``
    in C, an ``exec``, a crash, the kernel's want of memory) is noticed here. Signals of the terminal reach the child by
    themselves; those of other processes are passed on. Called before threads begin; where the system cannot wait for
    signals (macOS), and under a profiler or debugger, `work` is done in this process.
    """
    if not hasattr(signal, "sigwaitinfo") or _is_observed():
        return work()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where a parent ignores it, nobody learns how a child ended
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*_PASSED_ON, signal.SIGCHLD})
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        end_with_parent()
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _interrupted_once())
        try:
            return work()
        finally:
            os.write(writer, b".")  # Python ends it, with whatever code
    os.close(writer)
    passed_on: set[int] = set()
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        info = signal.sigwaitinfo({*_PASSED_ON, signal.SIGCHLD})
        if info.si_signo in _PASSED_ON and info.si_code <= 0:  # else the kernel's, for all of the terminal's group
            passed_on.add(info.si_signo)
            os.kill(child, info.si_signo)
    while signal.sigtimedwait(_PASSED_ON, 0):  # what came after the end was meant for the work
        pass
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    code = os.waitstatus_to_exitcode(found[1])
    os.set_blocking(reader, False)
    try:
        if os.read(reader, 1):
            return 128 - code if code < 0 else code
    except BlockingIOError:  # its own children hold the other end still
        pass
    finally:
        os.close(reader)
    if -code not in passed_on:
        how = killed_by(-code) if code < 0 else f"was ended with code {code} by the model or a library that it uses"
        print_error(f"error: the process of the model {how}: the work was not finished.")
    return 128 - code if code < 0 else code or 1


def _is_observed() -> bool:
    """Whether a profiler or debugger is at work, which would see nothing of a child; coverage follows children."""
    tracer: Any = sys.gettrace()
    if tracer is not None and not type(tracer).__module__.startswith("coverage"):
        return True
    monitoring: Any = getattr(sys, "monitoring", None)  # by which cProfile works from Python 3.12 on
    if monitoring is not None and any(
        monitoring.get_tool(tool) is not None for tool in (monitoring.PROFILER_ID, monitoring.DEBUGGER_ID)
    ):
        return True
    return sys.getprofile() is not None


def _interrupted_once() -> Callable[[int, object], None]:
    """Return a handler of SIGINT that a process has once in a moment.

    Who interrupts a whole group of processes (service managers, ``kill -INT -PGID``) reaches the child itself, and once
    more by way of its parent, who cannot tell.
    """
    last = -math.inf

    def interrupt(number: int, frame: object) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > _SAME_INTERRUPT_S:
            last = now
            raise KeyboardInterrupt

    return interrupt


def leave(code: int) -> None:
    """End a rank as ``sys.exit(code)`` does, but leave its memory to the kernel.

    For processes that we have started alone: under a profiler or debugger, what follows the program would be lost.
    Threads are waited for, then what is registered with `atexit` is called, and the streams are flushed: the order of
    ``Py_FinalizeEx``. It would go on to take all modules apart, object by object: 0.5 to 0.9 seconds with torch.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # there is no public name for it
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # nobody reads it any more, or there is none
            stream.flush()
    os._exit(code)
