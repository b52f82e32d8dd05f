"""What signals mean to a rank: end now and keep what is counted, or finish what is at hand and end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ade_harness.runtime.coordination import Coordinator, RankLostError
from ade_harness.runtime.notes import SIBLING_DIED

END_NOW = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
END_SOON = {signal.SIGUSR1: "asked to stop before a time limit"}


_held = 0
"""How many `uninterrupted` contexts the main thread is in."""
_pending: list[BaseException] = []


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Put off what a signal would raise in the main thread until the end of this context.

    A rank that has noticed the loss of another one and saves its counts may be signalled by its supervisor in the same
    moment; an exception in the middle of the write would cost the counts.
    """
    global _held  # noqa: PLW0603  (handlers have no other way to know where the main thread is)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _held += 1
    try:
        yield
    finally:
        _held -= 1
        if _held == 0 and _pending:
            error = _pending[0]
            _pending.clear()
            raise error


def _interrupt(error: BaseException) -> None:
    if not _held:
        raise error
    _pending.append(error)


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
        _interrupt(KeyboardInterrupt())

    def end_soon(number: int, _: FrameType | None) -> None:
        coordinator.asked = coordinator.asked or END_SOON[signal.Signals(number)]

    def sibling_died(_: int, __: FrameType | None) -> None:
        nonlocal ending
        if ending:
            return
        ending = True
        coordinator.lose("another rank of this node has died")
        _interrupt(RankLostError(coordinator.lost))

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
