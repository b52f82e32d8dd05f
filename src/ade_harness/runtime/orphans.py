"""A rank whose supervisor is gone ends at once, also while it starts: nobody would read what it says, or end it."""

from __future__ import annotations

import os
import sys
import threading
import time

from ade_harness.runtime.cluster import SUPERVISOR
from ade_harness.runtime.notes import EXIT_RANK_LOST

_POLL_S = 0.2
_watched = threading.Event()


def supervisor_exited() -> bool:
    """Whether the supervisor that started this rank is gone; False without one."""
    expected = os.environ.get(SUPERVISOR)
    return expected is not None and str(os.getppid()) != expected


def exit_with_supervisor() -> None:
    """Begin to watch, until the rank's watchdog does; before that, nothing has been counted that could be saved."""

    def watch() -> None:
        while not _watched.is_set():
            if supervisor_exited():
                try:  # what reads this rank's output may be gone too
                    print("error: the process that started this rank is gone", file=sys.stderr, flush=True)
                finally:
                    os._exit(EXIT_RANK_LOST)
            time.sleep(_POLL_S)

    threading.Thread(target=watch, daemon=True).start()


def hand_over_to_watchdog() -> None:
    """End what :func:`exit_with_supervisor` began."""
    _watched.set()
