"""Reference operations: the same additions in the same order as the official codes' own PyTorch forms.

Attention and deformable sampling have faster forms whose float32 results differ in the last bits, and the decoders of
these systems amplify last bits (the official codes are themselves up to 3.5e-4 of the scores' standard deviation away
from what float64 gives). Checks of parity run inside :func:`reference_operations`; evaluations do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_reference: ContextVar[bool] = ContextVar("reference", default=False)


@contextmanager
def reference_operations() -> Iterator[None]:
    """Compute in the official order of operations inside."""
    token = _reference.set(True)
    try:
        yield
    finally:
        _reference.reset(token)


def in_reference() -> bool:
    """Return whether the official order of operations is asked for; a compiled network has its own."""
    return not torch.compiler.is_compiling() and _reference.get()


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(D) + bias) v.

    Args:
        q: float [N, heads, Q, D].
        k: float [N, heads, S, D].
        v: float [N, heads, S, D].
        bias: float that is added, or bool that says what may be looked at; broadcast to [N, heads, Q, S].

    Returns:
        [N, heads, Q, D].
    """
    if not in_reference():
        return F.scaled_dot_product_attention(q, k, v, bias)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias
    return scores.softmax(-1) @ v


def for_transformers(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **_: Any
) -> tuple[Tensor, None]:
    """Attend, as transformers calls attention functions; registered under the name ``ade_harness``."""
    return attend(query, key, value, attention_mask).transpose(1, 2), None


def register_with_transformers() -> str:
    """Make :func:`attend` known to transformers; returns the name to set."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register("ade_harness", for_transformers)
    AttentionMaskInterface.register("ade_harness", sdpa_mask)
    return "ade_harness"
