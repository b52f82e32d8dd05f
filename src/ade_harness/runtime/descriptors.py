"""File descriptors on their way from loader processes to their rank, by sockets that are there before the loaders.

multiprocessing, and so torch, opens a connection for each descriptor, on which both sides prove that they know a
secret: a fifth of a millisecond of the thread that takes the items, and the thread that launches kernels waits for its
lock. A pair of sockets for each loader, inherited when it is forked, needs neither connection nor proof.
"""

from __future__ import annotations

import itertools
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_WITHIN_S = 60.0
"""A descriptor is sent before the item that belongs to it, so it is there."""
_NUMBER = struct.Struct("q")


@dataclass(frozen=True)
class Ticket:
    """Says which descriptor belongs to an item."""

    loaders: int
    worker: int
    number: int


class Descriptors:
    """The sockets between a rank and its loaders.

    Args:
        workers: how many loaders there will be.
    """

    def __init__(self, workers: int) -> None:
        self.key = next(_KEYS)
        pairs = workers if sys.platform == "linux" else 0  # where such sockets keep messages apart
        self._pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(pairs)]
        for receiver, _ in self._pairs:
            receiver.settimeout(_WITHIN_S)

    def enter(self, worker: int) -> None:
        """Be a loader: what this process sends from now on comes from `worker`, a number from 0."""
        _SENDERS[:] = [_Sender(self.key, worker, pair[1]) for pair in self._pairs[worker : worker + 1]]
        for number, (receiver, sender) in enumerate(self._pairs):
            receiver.close()
            if number == worker:
                sender.setblocking(False)
            else:
                sender.close()

    def receive(self, ticket: Ticket) -> int:
        """Return the descriptor of a ticket, which the caller has to close.

        Raises:
            RuntimeError: another one came: an item would get the memory of another.
        """
        data, found, _, _ = socket.recv_fds(self._pairs[ticket.worker][0], _NUMBER.size, 1)
        number = _NUMBER.unpack(data)[0] if len(data) == _NUMBER.size else None
        if number != ticket.number or len(found) != 1:
            raise RuntimeError(f"loader {ticket.worker}: descriptor {number} came in place of {ticket.number}")
        return found[0]

    def close(self) -> None:
        """Close the rank's ends, with what nobody has received."""
        for pair in self._pairs:
            for end in pair:
                end.close()


@dataclass
class _Sender:
    loaders: int
    worker: int
    end: socket.socket
    number: int = 0

    def send(self, descriptor: int) -> Ticket | None:
        ticket = Ticket(self.loaders, self.worker, self.number)
        try:
            socket.send_fds(self.end, [_NUMBER.pack(ticket.number)], [descriptor])
        except OSError:
            # The socket is full: the rank takes an item's descriptors when it has the whole item, so waiting could last
            # for ever. Or more are on their way than the user may have open (`ulimit -n`, of all ranks together).
            return None
        self.number += 1
        return ticket


_KEYS = itertools.count()
_OPEN: dict[int, Descriptors] = {}
"""The sockets of this process's loaders, by their key."""
_SENDERS: list[_Sender] = []
"""In a loader, its end."""


@contextmanager
def open_descriptors(workers: int) -> Iterator[Descriptors]:
    """Make the sockets of loaders that will be forked inside; they are closed at the end."""
    made = Descriptors(workers)
    _OPEN[made.key] = made
    try:
        yield made
    finally:
        del _OPEN[made.key]
        made.close()


def is_loader() -> bool:
    """Whether this process has a socket to the rank whose loader it is."""
    return bool(_SENDERS)


def send_descriptor(descriptor: int) -> Ticket | None:
    """Send a descriptor from a loader to its rank; None where too many are on their way."""
    return _SENDERS[0].send(descriptor)


def receive_descriptor(ticket: Ticket) -> int:
    """Return the descriptor of a ticket, which the caller has to close; raises as :meth:`Descriptors.receive`."""
    return _OPEN[ticket.loaders].receive(ticket)
