"""Triton's interpreter with the one rounding that a GPU's fused multiply-add has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest


def fused(x: Any, y: Any, z: Any) -> Any:
    """x * y + z of float32 arrays, rounded once.

    The product is exact in float64. The sum is rounded there to odd (its last bit set where it was not exact), after
    which rounding to float32 gives what rounding the exact sum would: Boldo and Melquiond 2008, "Emulation of a FMA and
    correctly rounded sums: proved algorithms using rounding to odd".
    """
    product, z = np.multiply(x, y, dtype=np.float64), np.asarray(z, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        total = np.asarray(product + z)
        other = total - product
        error = (product - (total - other)) + (z - other)
        odd = total.copy().view(np.int64)
        inexact = np.isfinite(total) & (error != 0) & (odd & 1 == 0)
        odd += np.where(inexact, np.where((error > 0) == (total > 0), 1, -1), 0)
        return odd.view(np.float64).astype(np.float32)


@pytest.fixture(scope="session", autouse=True)
def exact_interpreter() -> Iterator[None]:
    """Triton before 3.9 rounds twice in its interpreter; no GPU does."""
    try:
        from triton.runtime import interpreter
        from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle
    except ImportError:
        yield
        return

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if z.data.dtype == np.float32:
            return TensorHandle(fused(*np.broadcast_arrays(x.data, y.data, z.data)), z.dtype.scalar)
        return original(self, x, y, z)

    patched = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn not in patched:
            patched.add(self.fn)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    original = InterpreterBuilder.create_fma
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_fma", create_fma)
        # A function that a kernel calls: the launch has exchanged the language for the interpreter's, and what the function
        # sees of it beside stays exchanged. To look anew in each call for what is left takes a third of all time.
        patch.setattr(InterpretedFunction, "__call__", call)
        yield


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    """Let each test ask whether kernels can be used, which a process asks once."""
    from ade_harness import kernels

    kernels.unavailable_reason.cache_clear()
    yield
    kernels.unavailable_reason.cache_clear()
