"""What signals mean to a rank: end now and keep what is counted, or finish the current image and end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ade_harness.runtime.coordination import Coordinator, RankLostError
from ade_harness.runtime.notes import SIBLING_DIED
from ade_harness.runtime.uninterrupted import interrupt

END_NOW = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
END_SOON = {signal.SIGUSR1: "asked to stop before a time limit"}


@contextmanager
def handled_signals(coordinator: Coordinator) -> Iterator[Callable[[], None]]:
    """Handle signals in this context, and give them back after it.

    The reason reaches the other ranks through ``coordinator.asked``. SIGINT and SIGTERM raise KeyboardInterrupt, once:
    a second one must not disturb the saving of counts.

    Yields:
        A function that installs the handlers again: Lightning puts its own in place, whose handler for SIGTERM waits
        for the other ranks in a collective.
    """
    ending = False

    def end_now(number: int, _: FrameType | None) -> None:
        nonlocal ending
        if ending:
            return
        ending = True
        coordinator.asked = END_NOW[signal.Signals(number)]
        interrupt(KeyboardInterrupt())

    def end_soon(number: int, _: FrameType | None) -> None:
        coordinator.asked = coordinator.asked or END_SOON[signal.Signals(number)]

    def sibling_died(_: int, __: FrameType | None) -> None:
        nonlocal ending
        if ending:
            return
        ending = True
        coordinator.lose("another rank of this node has died")
        interrupt(RankLostError(coordinator.lost))

    handlers = {**dict.fromkeys(END_NOW, end_now), **dict.fromkeys(END_SOON, end_soon), SIBLING_DIED: sibling_died}

    def install() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    if threading.current_thread() is not threading.main_thread():  # only there Python takes signals
        yield lambda: None
        return
    before = {number: signal.getsignal(number) for number in handlers}
    install()
    try:
        yield install
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
