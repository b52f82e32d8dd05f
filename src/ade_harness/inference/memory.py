"""GPU memory that the published systems need: known before a run, so that one that cannot fit is not begun unwarned."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from functools import cache
from pathlib import Path

import torch

from ade_harness.config.dataset import ADE20K_CLASSES
from ade_harness.config.inference import InferenceConfig, MaskResolution
from ade_harness.config.model import Dtype
from ade_harness.config.schema import Config
from ade_harness.inference.plan import plan_views
from ade_harness.kernels.views import Size

_RESERVE = 1.5
"""GiB beside tensors: the CUDA context, and workspaces of cuDNN and cuBLAS (an estimate)."""


@cache
def peaks() -> dict[str, dict[str, int]]:
    """Return what each system needs, by its name, for an image of 512x683.

    ``fp32`` and ``bf16``, with weights in that dtype, are MiB of tensors at a time, and ``weights`` those of the
    weights alone in float32; ``pixels`` are those of all inputs that share a forward. Computed, not measured: each
    system ran by its own protocol on tensors without values (docs/gpu.md).
    """
    found: dict[str, dict[str, int]] = json.loads(Path(__file__).with_name("memory.json").read_text())
    return found


def pixels_at_once(inference: InferenceConfig, size: Size) -> int:
    """Return the pixels of all inputs that share a forward on a GPU, at most, for images of (height, width)."""
    of_size: Counter[Size] = Counter()
    for view in plan_views(size, inference):
        of_size[view.window] += len(view.origins)
    together = inference.batch or 8
    return max(min(together, inference.images * n) * height * width for (height, width), n in of_size.items())


_USUAL = (512, 683)
"""(H, W) that the table of peaks is of."""
_CONFIDENCE_COPIES = 2
"""Float32 scores of the original size that ``metrics.calibration`` holds at a time."""


def memory_warning(cfg: Config, total: int, sizes: Collection[Size] = (_USUAL,)) -> str | None:
    """Say that a system will not fit into a GPU; None where it should, or where nothing is known.

    Args:
        cfg: the whole configuration.
        total: bytes of the GPU's memory.
        sizes: (H, W) of the images, of which the largest needs most.
    """
    peak = peaks().get(cfg.model.name or "")
    if peak is None:
        return None
    half = cfg.model.dtype != Dtype.fp32
    sizes = sizes or (_USUAL,)
    queries = cfg.model.architecture.get("head", {}).get("queries", 0)
    at_original = cfg.inference.masks.resolution == MaskResolution.original
    # float32 planes of the original size in the label step
    planes = (ADE20K_CLASSES + queries) * at_original
    confidence = ADE20K_CLASSES * _CONFIDENCE_COPIES * cfg.metrics.calibration

    def parts(size: Size, dtype: str) -> tuple[float, float, float]:
        """Return MiB of the weights, of the forward, and of the label step's enlarged masks."""
        weights = peak["weights"] / (1 if dtype == "fp32" else 2)
        share = pixels_at_once(cfg.inference, size) / peak["pixels"]
        return weights, share * (peak[dtype] - weights), 4 * planes * size[0] * size[1] / 2**20

    def need(size: Size, dtype: str) -> float:
        weights, forward, enlarged = parts(size, dtype)
        mib = weights + max(forward, enlarged) + 4 * confidence * size[0] * size[1] / 2**20
        return mib / 1024 + _RESERVE

    dtype = "bf16" if half else "fp32"
    largest = max(sizes, key=lambda size: (need(size, dtype), size))
    needed = need(largest, dtype)
    if needed <= total / 2**30:
        return None
    other = "" if half else f" With model.dtype=bf16 inference.precision=bf16 it is about {need(largest, 'bf16'):.0f}."
    _, forward, enlarged = parts(largest, dtype)
    together = f"inference.images={cfg.inference.images}, inference.batch={cfg.inference.batch or 8}"
    why, less = f"{together} windows or views in a forward", " inference.batch=1 needs least."
    if enlarged > forward:  # which no batch changes
        why, less = "whose masks are upsampled to that size", " runtime.accelerator=cpu does without a GPU."
    return (
        f"model={cfg.model.name} needs about {needed:.0f} GiB of GPU memory for an image of"
        f" {largest[1]}x{largest[0]} ({why}); this GPU has {total / 2**30:.0f}.{other}{less}"
    )


def gpu_shortages() -> int:
    """Return how often torch found no memory on this process's GPU, also where its second attempt did."""
    stats: dict[str, int] = torch.cuda.memory_stats()
    return int(stats.get("num_ooms", 0)) + int(stats.get("num_alloc_retries", 0))


def shortage_note(times: int) -> tuple[str, ...]:
    """Return what a run says of GPU memory that was short so many times on all its ranks; nothing for 0."""
    note = f"GPU memory was short {times} times: what cuDNN chose, and a float sum's last bit, may have depended on it"
    return (note,) if times else ()
