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
def handled_signals(coordinator: Coordinator) -> Iterator[Callable[..., None]]:
    """Handle signals in this context, and give them back after it.

    The reason reaches the other ranks through ``coordinator.asked``. SIGINT and SIGTERM raise KeyboardInterrupt, once:
    a second one must not disturb the saving of counts.

    Yields:
        A function that installs the handlers again: Lightning puts its own in place, whose handler for SIGTERM waits
        for the other ranks in a collective. With ``between_steps=True`` the first SIGINT or SIGTERM from then on lets
        the present step end, after which the caller looks at ``coordinator.stopped``; a second one ends now.
    """
    ending = waits = asked = False

    def end_now(number: int, _: FrameType | None) -> None:
        nonlocal ending, asked
        if ending:
            return
        if waits and not asked:
            asked = True
            coordinator.asked = END_NOW[signal.Signals(number)]
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

    def install(between_steps: bool = False) -> None:
        nonlocal waits
        waits = between_steps
        for number, handler in handlers.items():
            signal.signal(number, handler)

    if threading.current_thread() is not threading.main_thread():  # only there Python takes signals
        yield lambda between_steps=False: None
        return
    before = {number: signal.getsignal(number) for number in handlers}
    install()
    try:
        yield install
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
