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


@lru_cache(maxsize=1024)
def _constant(values: tuple[Any, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # a tensor made in inference mode could not be used in training
        return torch.tensor(values, device=device, dtype=dtype)
