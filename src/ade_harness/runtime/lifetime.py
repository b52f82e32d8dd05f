"""Begin and end a process at once: what Python does beside the imports, and after the work, takes a second."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress


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


class CommandEnded(SystemExit):
    """Ends a command of ours with the exit code of a process that it has started; no model's exit."""


def exit_location(error: SystemExit) -> str:
    """Say where a ``sys.exit`` was called: an evaluation that a model ends has no score, whatever its exit code."""
    frames = traceback.extract_tb(error.__traceback__)
    while frames and frames[-1].name == "exit" and "wandb" in frames[-1].filename:  # which puts its own in its place
        frames.pop()
    place = f" at {frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name}" if frames else ""
    return (
        f"the model, or a library of its, called sys.exit({error.code!r}){place}: the evaluation was not finished. A"
        " model has to return scores or raise an exception."
    )


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
