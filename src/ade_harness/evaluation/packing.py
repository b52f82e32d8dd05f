"""Several tensors in one piece of shared memory, for the way from a loader process to its rank.

torch hands each tensor over by a file descriptor of its own, for which it opens a connection: about half a millisecond
of the rank's main thread for each (benchmarks/bench_host.py). One piece for an image, its other scales and its
annotation needs one descriptor, and that comes by a socket that is open already (runtime/descriptors.py).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ade_harness.errors import EveryImageError
from ade_harness.runtime.cluster import host_name
from ade_harness.runtime.descriptors import Ticket, is_loader, receive_descriptor, send_descriptor

_ALIGNMENT = 64
"""Bytes; torch's own allocator aligns so."""

Layout = tuple[tuple[int, tuple[int, ...], torch.dtype], ...]
"""Where each tensor begins, in bytes, its shape and dtype."""


def pack(tensors: Sequence[Tensor]) -> tuple[Tensor, Layout]:
    """Copy tensors of the CPU into one new piece of shared memory.

    Returns:
        uint8 [N], which `unpack` makes the tensors of, and where they lie in it.
    """
    layout, end = [], 0
    for tensor in tensors:
        layout.append((end, tuple(tensor.shape), tensor.dtype))
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    memory = torch.UntypedStorage._new_shared(max(end, 1))  # type: ignore[no-untyped-call]
    buffer = torch.empty(0, dtype=torch.uint8).set_(memory)
    for place, tensor in zip(unpack(buffer, tuple(layout)), tensors, strict=True):
        place.copy_(tensor)
    return buffer, tuple(layout)


def in_shared_memory(tensors: Sequence[Tensor]) -> tuple[Tensor, Layout]:
    """Return a copy of tensors in new shared memory, and where they lie in it.

    Raises:
        HarnessError: there is none, or it cannot be written.
    """
    try:
        return pack(tensors)
    except (RuntimeError, OSError) as error:
        raise EveryImageError(
            f"/dev/shm on {host_name()}: no shared memory can be made, by which loaders hand images over"
            f" ({' '.join(str(error).split())[:200]}). Make it writable (containers: --shm-size=8g or --ipc=host), or"
            " use runtime.workers=0, which needs none."
        ) from error


@dataclass(frozen=True)
class Sent:
    """Memory that is on its way by a descriptor."""

    ticket: Ticket
    size: int


def send(buffer: Tensor) -> Tensor | Sent:
    """Return what a loader process hands over for a packed buffer; the buffer itself takes torch's own way."""
    if not is_loader():
        return buffer
    descriptor, size = buffer.untyped_storage()._share_fd_cpu_()
    ticket = send_descriptor(descriptor)
    return buffer if ticket is None else Sent(ticket, size)


def receive(sent: Tensor | Sent) -> Tensor:
    """Return the buffer that was sent: uint8 [N]."""
    if isinstance(sent, Tensor):
        return sent
    descriptor = receive_descriptor(sent.ticket)
    try:
        memory = torch.UntypedStorage._new_shared_fd_cpu(descriptor, sent.size)  # type: ignore[attr-defined]
    finally:
        os.close(descriptor)  # torch keeps one of its own
    return torch.empty(0, dtype=torch.uint8).set_(memory)


def unpack(buffer: Tensor, layout: Layout) -> list[Tensor]:
    """Return the tensors in a buffer: views of it."""
    found = []
    for begin, shape, dtype in layout:
        size = math.prod(shape) * dtype.itemsize
        found.append(buffer[begin : begin + size].view(dtype).view(shape))
    return found
