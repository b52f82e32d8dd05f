"""Names of the variants of our kernels: what Triton compiles anew."""

from __future__ import annotations

import json

CHOSEN = ("TAPS", "PER_LEVEL", "CHANNELS", "TWO_STEPS", "PROBABILITIES", "WHOLE")
"""Constants of our kernels that launchers choose by what they get; the others are the same in each launch on a GPU."""


def variant(name: str, **constants: int | bool) -> str:
    """Write down a variant of a kernel: the constants that its launcher chooses by the tensors it gets."""
    return f"{name} {json.dumps(constants, sort_keys=True)}"
