"""Scores to label maps to counts: one interface, three implementations.

`reference` is plain torch on any device; `numba_cpu` and `triton_gpu` are compiled. `select` chooses.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ade_harness.errors import HarnessError
from ade_harness.kernels.views import PixelStatistics, Placement, Size, View, whole
from ade_harness.runtime.gpu_errors import is_gpu_lost, is_out_of_memory, tried_twice

__all__ = [
    "Kernels",
    "PixelStatistics",
    "Placement",
    "Size",
    "View",
    "name_of",
    "select",
    "selection",
    "whole",
]


class Kernels(Protocol):
    """What an implementation offers; documented in :mod:`ade_harness.kernels.reference`."""

    def normalise(self, pixels: Tensor, statistics: PixelStatistics, placement: Placement | None = None) -> Tensor:
        """Make float32 [3, H, W] of uint8 [h, w, 3]."""

    def label_map(self, scores: Tensor, size: Size) -> Tensor:
        """Upsample scores [C, h, w] and take the best channel: [H, W]."""

    def merge(self, views: Sequence[View], size: Size, probabilities: bool) -> Tensor:
        """Average views and take the best channel: [H, W]."""

    def mask_probabilities(
        self, masks: Tensor, canvas: Size, area: tuple[int, int, int, int], size: Size, dtype: torch.dtype
    ) -> Tensor:
        """Upsample queries' masks [1, Q, h, w] and take their sigmoid: [Q, H, W]."""

    def count(self, labels: Tensor, target: Tensor, classes: int) -> Tensor:
        """Count pixels: int64 [C, C + 1]."""

    def invalid_share(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the share of NaN and +inf."""

    def left_to_torch(self) -> dict[str, str]:
        """Return what plain torch does instead on this device, such as "enlarges masks", and why."""


def select(choice: str, device_type: str) -> Kernels:
    """Return an implementation for tensors on "cpu" or "cuda".

    Args:
        choice: ``runtime.kernels``; auto takes the compiled one where it gives torch's bits on this machine, and
            plain torch elsewhere.
        device_type: of the tensors.

    Raises:
        HarnessError: what was asked for is not installed, or not for this device, or not exact here.
    """
    return selection(choice, device_type)[0]


def selection(choice: str, device_type: str) -> tuple[Kernels, str | None]:
    """Return what :func:`select` returns, and what had to be left to plain torch, and why; None if nothing.

    Raises:
        HarnessError: as :func:`select`.
    """
    module, device = {"numba": ("numba_cpu", "cpu"), "triton": ("triton_gpu", "cuda")}.get(choice, (None, None))
    if choice == "auto":
        module = {"cpu": "numba_cpu", "cuda": "triton_gpu"}.get(device_type)
    elif module is not None and device != device_type:
        raise HarnessError(f"runtime.kernels={choice}: works on {device} only, this run is on {device_type}. Use auto.")
    reason = None
    if module is not None:
        gpu = torch.cuda.current_device() if device_type == "cuda" and torch.cuda.is_available() else None
        reason = unavailable_reason(module, gpu)
        if reason is None:
            found = importlib.import_module(f"ade_harness.kernels.{module}")
            left = [f"{why}, so plain torch {does}" for does, why in found.left_to_torch().items()]
            return cast(Kernels, found), "; ".join(left) or None
        if choice != "auto":
            raise HarnessError(f"runtime.kernels={choice}: cannot be used ({reason}). runtime.kernels=torch works.")
    plain = cast(Kernels, importlib.import_module("ade_harness.kernels.reference"))
    return plain, f"plain torch is used, which is slower: {reason}" if reason is not None else None


@cache
def unavailable_reason(module: str, gpu: int | None) -> str | None:
    """Return why an implementation cannot be used here; None if it can.

    It is asked once in a process: each attempt would start a compiler anew, and a second answer would change the
    kernels in the middle of a run.

    Args:
        module: of this package.
        gpu: the current one, None for the CPU.

    Raises:
        HarnessError: no memory is left to try it.
    """
    try:
        if tried_twice(importlib.import_module(f"ade_harness.kernels.{module}").agrees_with_torch):
            return None
    except Exception as error:  # a missing package, or a compiler that fails in any way
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        if is_out_of_memory(error):
            free, total = (b / 2**30 for b in torch.cuda.mem_get_info()) if gpu is not None else (0.0, 0.0)
            left = f"GPU {gpu} has {free:.1f} of {total:.1f} GiB free" if gpu is not None else "memory is short"
            raise HarnessError(
                f"{left}, too little to begin with ({first}). Most often another program uses it: `nvidia-smi` names"
                " it; CUDA_VISIBLE_DEVICES chooses another GPU."
            ) from error
        if is_gpu_lost(error):
            raise HarnessError(
                f"{module} was tried on GPU {gpu}, which reports {first}. runtime.kernels=torch does without it; a GPU"
                " that reports such errors again is broken."
            ) from error
        return first
    return "it rounds differently from torch on this machine"


def name_of(kernels: Kernels) -> str:
    """Return the name of an implementation: ``reference``, ``numba_cpu`` or ``triton_gpu``."""
    module: Any = kernels
    return str(module.__name__.rpartition(".")[2])
