"""Begin and end a process at once: what Python does beside the imports, and after the work, takes a second."""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn

from ade_harness.errors import HarnessError


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
