"""What a protocol does to an image of a given size: pure arithmetic, known before any pixel is read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ade_harness.config.inference import (
    AugmentationConfig,
    InferenceConfig,
    ResizeConfig,
    ResizeRule,
    ScaleSource,
    Shrink,
    ViewOrder,
    WindowConfig,
)
from ade_harness.inference.resize import padded_size, padding_offset, round_half_up, target_sizes
from ade_harness.kernels.views import Size


@dataclass(frozen=True)
class ViewPlan:
    """One view of an image: a scale, plain or mirrored."""

    sizes: tuple[Size, ...]
    """The uint8 resizes on the way to the network's input, in order; the last is the view's size."""
    canvas: Size
    """With padding."""
    offset: Size
    """(top, left) of the view on the canvas."""
    window: Size
    origins: tuple[Size, ...]
    """(top, left) of each window on the canvas."""
    flipped: bool

    @property
    def size(self) -> Size:
        """Without padding."""
        return self.sizes[-1]

    @property
    def valid(self) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the view on the canvas."""
        return (*self.offset, *self.size)


def plan_views(size: Size, cfg: InferenceConfig) -> list[ViewPlan]:
    """Return the views of an image of (height, width), in the order in which their results are summed."""
    plain = []
    for sizes in _scaled_sizes(size, cfg.resize, cfg.tta):
        canvas = padded_size(sizes[-1], cfg.resize)
        window, origins = window_grid(canvas, cfg.mode, cfg.window)
        offset = padding_offset(sizes[-1], canvas, cfg.resize)
        plain.append(ViewPlan(tuple(sizes), canvas, offset, window, origins, False))
    if not cfg.tta.flip:
        return plain
    mirrored = [replace(view, flipped=True) for view in plain]
    if cfg.tta.order == ViewOrder.flips_last:
        return [*plain, *mirrored]
    return [view for pair in zip(plain, mirrored, strict=True) for view in pair]


def _scaled_sizes(size: Size, rule: ResizeConfig, tta: AugmentationConfig) -> Iterator[list[Size]]:
    """Yield the chain of sizes of each scale."""
    before = target_sizes(size, rule) if tta.source == ScaleSource.resized else []
    source = before[-1] if before else size
    if tta.sides is not None:
        for side in tta.sides:
            cap = tta.max_side
            if cap is None and rule.max_side is not None and rule.side is not None:
                cap = int(rule.max_side * (side / rule.side))
            yield [*before, *target_sizes(source, replace(rule, side=side, max_side=cap))]
        return
    for scale in tta.scales:
        if tta.source == ScaleSource.protocol:
            yield target_sizes(source, _scaled(source, rule, scale, tta))
            continue
        # mmseg 1.x, Resize(scale_factor=r, keep_ratio=True): the scaled size becomes the target of a second rescale
        target = round_half_up(source, scale)
        factor = min(max(target) / max(source), min(target) / min(source))
        exact = round_half_up(source, factor)
        yield [*before, *target_sizes(source, replace(rule, rule=ResizeRule.exact, height=exact[0], width=exact[1]))]


def _scaled(size: Size, rule: ResizeConfig, scale: float, tta: AugmentationConfig) -> ResizeConfig:
    """Return the resize rule with its lengths multiplied, cut to whole pixels as the official configs do."""
    if rule.rule in (ResizeRule.none, ResizeRule.fit) and scale != 1:
        height, width = round_half_up(size, scale)
        return replace(rule, rule=ResizeRule.exact, height=height, width=width)

    def scaled(length: int | None) -> int | None:
        return None if length is None else int(length * scale)

    side, cap = scaled(rule.side), scaled(rule.max_side)
    if side is not None and scale < 1 and tta.round_up > 1:
        side = math.ceil(side / tta.round_up) * tta.round_up
    if side is not None and tta.min_side is not None:
        side, cap = max(side, tta.min_side), None
    return replace(rule, side=side, max_side=cap, height=scaled(rule.height), width=scaled(rule.width))


def window_grid(canvas: Size, mode: str, cfg: WindowConfig) -> tuple[Size, tuple[Size, ...]]:
    """Return the window's (height, width) and each window's (top, left), row by row.

    ``slide`` is the grid of mmseg's ``slide_inference``: the last window of a row is moved back inside. An image side
    shorter than the crop cuts the window there; with shrink=both (DINOv3), if both sides are shorter, the window
    becomes a square of the shorter one. ``long_side`` is EoMT's ``window_imgs_semantic``.
    """
    if mode == "whole":
        return canvas, ((0, 0),)
    height, width = canvas
    assert cfg.crop is not None
    if mode == "long_side":
        short = min(canvas)
        number = math.ceil(max(canvas) / cfg.crop)
        overlap = (number * cfg.crop - max(canvas)) / (number - 1) if number > 1 else 0.0
        starts = [int(i * (cfg.crop - overlap)) for i in range(number)]
        if height > width:
            return (cfg.crop, short), tuple((start, 0) for start in starts)
        return (short, cfg.crop), tuple((0, start) for start in starts)
    assert cfg.stride is not None
    crop = (cfg.crop, cfg.crop)
    if cfg.shrink == Shrink.both and cfg.crop > height and cfg.crop > width:
        crop = (min(canvas), min(canvas))
    tops, lefts = (_starts(side, c, cfg.stride) for side, c in zip(canvas, crop, strict=True))
    window = (min(crop[0], height), min(crop[1], width))
    return window, tuple((top, left) for top in tops for left in lefts)


def _starts(length: int, crop: int, stride: int) -> list[int]:
    number = max(length - crop + stride - 1, 0) // stride + 1
    return [max(min(i * stride + crop, length) - crop, 0) for i in range(number)]


def uncovered(plan: ViewPlan) -> int:
    """Return how many rows and columns of the canvas no window covers."""
    gaps = 0
    for length, crop, starts in (
        (plan.canvas[0], plan.window[0], {top for top, _ in plan.origins}),
        (plan.canvas[1], plan.window[1], {left for _, left in plan.origins}),
    ):
        end = 0
        for start in sorted(starts):
            gaps += max(0, start - end)
            end = start + crop
        gaps += max(0, length - end)
    return gaps


def forward_pixels(plans: list[ViewPlan]) -> int:
    """Return how many pixels go through the network: the image's expected cost."""
    return sum(len(p.origins) * p.window[0] * p.window[1] for p in plans)
