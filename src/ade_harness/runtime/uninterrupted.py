"""A context whose work an exception from a signal's handler does not cut off.

A module of its own: the ledger needs it, and commands that read ledgers do without torch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

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


def interrupt(error: BaseException) -> None:
    """Raise an error from a signal's handler: now, or when the main thread leaves its `uninterrupted` context."""
    if not _held:
        raise error
    _pending.append(error)
