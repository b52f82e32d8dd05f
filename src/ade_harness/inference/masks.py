"""Mask classification to scores per class: softmax of the classes without void, times mask sigmoids, over queries.

Order of steps after Mask2Former (``maskformer_model.py``), OneFormer, EoMT, DINOv3 (``inference.py``), and the
mmsegmentation lineage of InternImage and ViT-Adapter, which stays at the masks' own resolution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ade_harness.config.inference import MaskConfig, MaskResolution
from ade_harness.inference.plan import ViewPlan
from ade_harness.kernels.reference import average_windows
from ade_harness.kernels.views import Size, View, whole
from ade_harness.models.class_map import ClassMap
from ade_harness.models.outputs import MaskLogits


def mask_view(
    plan: ViewPlan, windows: Sequence[MaskLogits], cfg: MaskConfig, class_map: ClassMap, original: Size
) -> View:
    """Merge the queries of each window of a view.

    Args:
        plan: of the view.
        windows: the network's output for each window, N = 1.
        cfg: where the masks are upsampled to.
        class_map: which classes are kept.
        original: (H, W) of the image.

    Returns:
        Scores for the kernels: at the masks' resolution, or on the canvas, or at the original size.
    """
    if cfg.resolution == MaskResolution.scores:
        of_windows = [_scores(w.classes, w.masks, cfg, class_map) for w in windows]
        scores = of_windows[0] if len(of_windows) == 1 else torch.cat(of_windows)  # one is not copied
        return View(scores, plan.origins, plan.window, plan.canvas, plan.valid, plan.flipped)
    if cfg.resolution == MaskResolution.original:
        masks = _resize(windows[0].masks, plan.canvas)
        top, left, height, width = plan.valid
        masks = _resize(masks[:, :, top : top + height, left : left + width], original)
        return whole(_scores(windows[0].classes, masks, cfg, class_map)[0], original, flipped=plan.flipped)
    if len(windows) == 1 and plan.window == plan.canvas:
        scores = _scores(windows[0].classes, _resize(windows[0].masks, plan.window), cfg, class_map)
        return whole(scores[0], plan.canvas, plan.valid, plan.flipped)
    # full-resolution scores of many windows would not fit: they are added up one by one
    canvas: Tensor | None = None
    height, width = plan.window
    for (top, left), window in zip(plan.origins, windows, strict=True):
        scores = _scores(window.classes, _resize(window.masks, plan.window), cfg, class_map)[0]
        if canvas is None:
            canvas = torch.zeros((scores.shape[0], *plan.canvas), device=scores.device)
        canvas[:, top : top + height, left : left + width].add_(scores)  # `+=` would copy the slice to itself after it
    assert canvas is not None
    average_windows(canvas, plan.origins, plan.window)
    return whole(canvas, plan.canvas, plan.valid, plan.flipped)


def _scores(classes: Tensor, masks: Tensor, cfg: MaskConfig, class_map: ClassMap) -> Tensor:
    """Return float32 [1, C, h, w] of class logits [1, Q, C + 1] and mask logits [1, Q, h, w]."""
    dtype = getattr(torch, cfg.einsum)
    weights = class_map.select(classes.softmax(-1)[0, :, :-1].T).to(dtype)
    return torch.einsum("cq,qhw->chw", weights, masks[0].sigmoid().to(dtype)).float()[None]


def _resize(masks: Tensor, size: Size) -> Tensor:
    if tuple(masks.shape[2:]) == tuple(size):
        return masks
    return F.interpolate(masks, size, mode="bilinear", align_corners=False)
