"""What an error of a GPU means: memory is short, or the process cannot use its GPU any more; CUDA's and ROCm's."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch

from ade_harness.errors import text_of

_SHORT = (
    "can't allocate memory",  # the CPU's
    "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "HIPBLAS_STATUS_ALLOC_FAILED",
    "DEVICE_ALLOCATION_FAILED", "HOST_ALLOCATION_FAILED",  # of CUDNN_STATUS_INTERNAL_ERROR_..., as cuDNN 9 says it
    "miopenStatusAllocFailed", "hipErrorOutOfMemory",
    "CUBLAS_STATUS_NOT_INITIALIZED", "CUDNN_STATUS_NOT_INITIALIZED", "HIPBLAS_STATUS_NOT_INITIALIZED",
    "unable to find an engine to execute this computation",  # cuDNN, where no plan's workspace fits
    "Failed to allocate memory for requested buffer",  # onnxruntime
)  # fmt: skip
_OF_DEVICE = re.compile(r"\b(CUDA|HIP)\b.{0,20}out of memory")
"""Torch's own, where TorchScript's interpreter has made a plain RuntimeError of it; and the driver's, where the
allocator holds what is left: a library or a kernel that is loaded at its first use."""
_LOST = (
    "CUDA error", "HIP error", "CUDA driver error",
    # Triton adds the driver's text; after other errors, such as that of a launch that does not fit, a GPU is as it was
    *(f"Triton Error [{of}]: {what}" for of in ("CUDA", "HIP") for what in (
        "an illegal memory access", "unspecified launch failure", "misaligned address", "an illegal instruction",
        "uncorrectable ECC error", "the launch timed out", "device-side assert", "hardware stack error",
    )),
)  # fmt: skip
_T = TypeVar("_T")
_LITTLE_BYTES = 2**30
"""Free memory of a GPU: cuBLAS and cuDNN start with less than that."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short: torch's own, the CPU's, and those of the libraries of GPUs."""
    text = text_of(error)
    if "_STATUS_NOT_INITIALIZED" in text and torch.cuda.is_available():
        with suppress(RuntimeError):
            return torch.cuda.mem_get_info()[0] < _LITTLE_BYTES  # else a library is broken, and stays so
        return False
    return (
        isinstance(error, torch.OutOfMemoryError)
        or any(part in text for part in _SHORT)
        or bool(_OF_DEVICE.search(text))
    )


def is_gpu_lost(error: BaseException) -> bool:
    """Whether an error is one after which this process cannot use its GPU any more, such as an illegal access."""
    return not is_out_of_memory(error) and any(part in text_of(error) for part in _LOST)


def tried_twice(attempt: Callable[[], _T]) -> _T:
    """Do something once more where a file failed at first.

    Ranks of several nodes compile the same kernels into one folder (``TRITON_CACHE_DIR``, else ``~/.triton``), often of
    a network's file system, where a file that another rank has just replaced is "stale" for a moment.
    """
    try:
        return attempt()
    except OSError:
        return attempt()
