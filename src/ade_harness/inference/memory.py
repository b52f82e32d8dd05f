"""GPU memory that the published systems need: known before a run, so that one that cannot fit is not begun unwarned."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch

from ade_harness.config.model import Dtype
from ade_harness.config.schema import Config

_RESERVE = 1.5
"""GiB beside tensors: the CUDA context, and workspaces of cuDNN and cuBLAS (an estimate)."""


@cache
def peaks() -> dict[str, dict[str, int]]:
    """Return system -> ``fp32`` and ``bf16`` -> MiB of tensors at a time, for an image of 512x683.

    Computed, not measured: each system ran by its own protocol on tensors without values (docs/gpu.md). ``bf16`` is
    with weights in that dtype.
    """
    found: dict[str, dict[str, int]] = json.loads(Path(__file__).with_name("memory.json").read_text())
    return found


def memory_warning(cfg: Config, total: int) -> str | None:
    """Say that a system will not fit into a GPU; None where it should, or where nothing is known.

    Args:
        cfg: the whole configuration.
        total: bytes of the GPU's memory.
    """
    peak = peaks().get(cfg.model.name or "")
    if peak is None:
        return None
    half = cfg.model.dtype != Dtype.fp32
    need = peak["bf16" if half else "fp32"] / 1024 + _RESERVE
    if need <= total / 2**30:
        return None
    less = peak["bf16"] / 1024 + _RESERVE
    other = "" if half else f" With model.dtype=bf16 inference.precision=bf16 it is about {less:.0f}."
    return (
        f"model={cfg.model.name} needs about {need:.0f} GiB of GPU memory for an image of 683x512, up to 8 of whose"
        f" windows or views share a forward; this GPU has {total / 2**30:.0f}.{other} inference.batch=1 needs least."
    )


def gpu_shortages() -> int:
    """Return how often torch found no memory on this process's GPU, also where its second attempt did."""
    stats: dict[str, int] = torch.cuda.memory_stats()
    return int(stats.get("num_ooms", 0)) + int(stats.get("num_alloc_retries", 0))


def shortage_note(times: int) -> tuple[str, ...]:
    """Return what a run says of GPU memory that was short so many times on all its ranks; nothing for 0."""
    note = f"GPU memory was short {times} times: what cuDNN chose, and a float sum's last bit, may have depended on it"
    return (note,) if times else ()
