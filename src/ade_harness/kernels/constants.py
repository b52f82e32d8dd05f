"""Small tensors made of numbers that the host knows, once per device: a copy from pageable memory waits for the GPU."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def constant(values: tuple[Any, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a tensor of (nested tuples of) numbers on a device; it is shared, not to be written."""
    if torch.compiler.is_compiling():  # a compiled graph keeps its constants itself
        return torch.tensor(values, device=device, dtype=dtype)
    return _constant(values, device, dtype)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor of the CPU to a device; to CUDA (unless it is a fake one) from pinned memory: nothing waits."""
    if torch.device(device).type != "cuda" or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return tensor.to(device, non_blocking=True)
    return tensor.pin_memory().to(device, non_blocking=True)


@lru_cache(maxsize=1024)
def _constant(values: tuple[Any, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # a tensor made in inference mode could not be used in training
        # not torch.tensor(..., device): of each new size of an image the host would wait once
        return to_device(torch.tensor(values, dtype=dtype), device)
