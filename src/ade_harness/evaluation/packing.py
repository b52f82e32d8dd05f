"""Several tensors in one piece of shared memory, for the way from a loader process to its rank.

torch hands each tensor over by a file descriptor of its own: the rank's main thread connects to the loader, both prove
that they know a secret, and the memory is mapped. That is about half a millisecond of the main thread for each
(benchmarks/bench_host.py); one piece for an image, its other scales and its annotation takes it once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

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


def unpack(buffer: Tensor, layout: Layout) -> list[Tensor]:
    """Return the tensors in a buffer: views of it."""
    found = []
    for begin, shape, dtype in layout:
        size = math.prod(shape) * dtype.itemsize
        found.append(buffer[begin : begin + size].view(dtype).view(shape))
    return found
