"""Mask classification to scores per class: softmax of the classes without void, times mask sigmoids, over queries.

Order of steps after Mask2Former (``maskformer_model.py``), OneFormer, EoMT, DINOv3 (``inference.py``), and the
mmsegmentation lineage of InternImage and ViT-Adapter, which stays at the masks' own resolution.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

import torch
from torch import Tensor

from ade_harness.config.inference import MaskConfig, MaskResolution
from ade_harness.inference.plan import ViewPlan
from ade_harness.kernels import Kernels
from ade_harness.kernels.reference import average_windows
from ade_harness.kernels.views import Size, View, whole
from ade_harness.models.class_map import ClassMap
from ade_harness.models.outputs import MaskLogits

_GPU_BYTES = 8 << 30
"""Most memory for the full-size scores of an image's windows and views on a GPU, and a quarter of what it has."""


@cache
def _memory_of(gpu: torch.device) -> int:
    total = torch.cuda.get_device_properties(gpu).total_memory if torch.cuda.is_available() else 4 * _GPU_BYTES
    return min(_GPU_BYTES, total // 4)


def held_together(plans: Sequence[ViewPlan], channels: int, cfg: MaskConfig, original: Size, gpu: torch.device) -> bool:
    """Whether full-size scores of all windows and views of an image, float32 [C, H, W] each, may be held at a time.

    The label kernel then adds them up, in the same order and with the same bits as one by one: fewer launches and less
    traffic. On a CPU that only costs memory.
    """
    if gpu.type == "cpu":
        return False
    sizes = (
        [original] * len(plans) if cfg.resolution == MaskResolution.original
        else [plan.window for plan in plans for _ in plan.origins]
    )  # fmt: skip
    return 4 * channels * sum(height * width for height, width in sizes) <= _memory_of(gpu)


def mask_view(
    kernels: Kernels,
    plan: ViewPlan,
    windows: Sequence[MaskLogits],
    cfg: MaskConfig,
    class_map: ClassMap,
    original: Size,
    frugal: bool = False,
) -> View:
    """Merge the queries of each window of a view.

    Args:
        kernels: that upsample masks.
        plan: of the view.
        windows: the network's output for each window, N = 1.
        cfg: where the masks are upsampled to.
        class_map: which classes are kept.
        original: (H, W) of the image.
        frugal: hold one window's full-size scores at a time, wherever that is.

    Returns:
        Scores for the kernels, of the dtype of ``cfg.einsum``: at the masks' resolution, or on the canvas, or at the
        original size.
    """
    dtype = getattr(torch, cfg.einsum)
    if cfg.resolution == MaskResolution.scores:
        size = (windows[0].masks.shape[2], windows[0].masks.shape[3])
        own = (kernels.mask_probabilities(w.masks, size, (0, 0, *size), size, dtype) for w in windows)
        scores = _scores(windows, own, class_map)
        return View(scores, plan.origins, plan.window, plan.canvas, plan.valid, plan.flipped)
    if cfg.resolution == MaskResolution.original:
        shares = kernels.mask_probabilities(windows[0].masks, plan.canvas, plan.valid, original, dtype)
        return whole(_scores(windows, [shares], class_map)[0], original, flipped=plan.flipped)
    area = (0, 0, *plan.window)
    enlarged = (kernels.mask_probabilities(w.masks, plan.window, area, plan.window, dtype) for w in windows)
    channels, device = windows[0].classes.shape[-1] - 1, windows[0].masks.device
    alone = len(windows) == 1 and plan.window == plan.canvas
    if alone or (not frugal and held_together([plan], channels, cfg, original, device)):
        scores = _scores(windows, enlarged, class_map)
        return View(scores, plan.origins, plan.window, plan.canvas, plan.valid, plan.flipped)
    canvas: Tensor | None = None
    height, width = plan.window
    for (top, left), window, shares in zip(plan.origins, windows, enlarged, strict=True):
        scores = _scores([window], [shares], class_map)[0]
        if canvas is None:
            canvas = torch.zeros((scores.shape[0], *plan.canvas), device=scores.device)
        canvas[:, top : top + height, left : left + width].add_(scores)  # `+=` would copy the slice to itself after it
    assert canvas is not None
    average_windows(canvas, plan.origins, plan.window)
    return whole(canvas, plan.canvas, plan.valid, plan.flipped)


def _scores(windows: Sequence[MaskLogits], masks: Iterable[Tensor], class_map: ClassMap) -> Tensor:
    """Return [N, C, h, w] of class logits [1, Q, C + 1] and mask probabilities [Q, h, w], whose dtype it has.

    Each product is written to its place: it is what ``torch.einsum("cq,qhw->chw", ...)`` calls, without a copy of the
    scores afterwards.
    """
    scores: Tensor | None = None
    for index, (window, shares) in enumerate(zip(windows, masks, strict=True)):
        weights = class_map.select(window.classes.softmax(-1)[0, :, :-1].T).to(shares.dtype)
        if scores is None:
            scores = shares.new_empty((len(windows), weights.shape[0], *shares.shape[1:]))
        torch.bmm(weights[None], shares.flatten(1)[None], out=scores[index : index + 1].flatten(2))
    assert scores is not None
    return scores
