"""Sizes, scales and windows of the official code bases, by cases worked out from their own lines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ade_harness.config.inference import (
    AugmentationConfig,
    InferenceConfig,
    Mode,
    PadPosition,
    ResizeConfig,
    ResizeRule,
    Rounding,
    ScaleSource,
    Shrink,
    ViewOrder,
    WindowConfig,
)
from ade_harness.inference.plan import forward_pixels, plan_views, uncovered, window_grid
from ade_harness.inference.resize import padded_size, padding_offset, resize_image, target_sizes
from ade_harness.kernels.views import Size


def short_side(side: int, cap: int | None = None, rounding: str = "mmseg", **more: Any) -> ResizeConfig:
    return ResizeConfig(rule=ResizeRule.short_side, side=side, max_side=cap, rounding=Rounding(rounding), **more)


def sizes_of(size: Size, resize: ResizeConfig, **tta: Any) -> list[Size]:
    cfg = InferenceConfig(resize=resize, tta=AugmentationConfig(**tta))
    return [view.size for view in plan_views(size, cfg)]


@pytest.mark.parametrize(
    ("rounding", "size", "cap", "expected"),
    [
        ("mmseg", (333, 500), 2048, (512, 769)),
        ("mmseg", (500, 333), 2048, (769, 512)),
        ("mmseg", (100, 1000), 2048, (205, 2048)),  # the cap decides, both sides by its factor
        ("mmseg", (100, 1000), None, (512, 5120)),
        ("dinov3", (333, 500), 600, (512, 769)),  # no cap
        ("dinov3", (500, 333), 600, (769, 512)),
        ("dinov3", (400, 400), None, (512, 512)),
        ("dinov3", (97, 131), None, (512, 691)),  # 691.46
        ("dinov3", (131, 97), None, (691, 512)),
        ("detectron2", (333, 500), 2048, (512, 769)),
        ("detectron2", (500, 333), 2048, (769, 512)),
        ("detectron2", (400, 400), 2048, (512, 512)),
        ("detectron2", (300, 1000), 1000, (300, 1000)),  # 512 x 1706.7, times 1000 / 1706.7
        ("detectron2", (1000, 300), 1000, (1000, 300)),
        ("detectron2", (300, 1000), None, (512, 1707)),
        ("detectron2", (512, 1024), 1024, (512, 1024)),  # at the cap
    ],
)
def test_a_short_side_is_rounded_as_each_code_base_does(
    rounding: str, size: Size, cap: int | None, expected: Size
) -> None:
    assert target_sizes(size, short_side(512, cap, rounding)) == [expected]


def test_multiples_and_padding() -> None:
    assert target_sizes((333, 500), short_side(512, 2048, multiple_of=32)) == [(512, 769), (512, 800)]
    to_nearest: Any = {"multiple_of": 32, "multiple_rounding": "nearest"}
    assert target_sizes((333, 500), short_side(512, 2048, **to_nearest))[-1] == (512, 768)
    assert target_sizes((10, 500), ResizeConfig(**to_nearest))[-1] == (32, 512)  # never to nothing
    assert padded_size((300, 500), ResizeConfig(pad_multiple=32)) == (320, 512)
    assert padded_size((300, 500), ResizeConfig(pad_at_least=400)) == (400, 500)
    assert padded_size((300, 500), ResizeConfig()) == (300, 500)
    assert padded_size((300, 500), ResizeConfig(pad_to=[640, 700])) == (640, 700)
    centred = ResizeConfig(pad_position=PadPosition.centre)
    assert padding_offset((300, 500), (320, 512), centred) == (10, 6)
    assert padding_offset((300, 500), (320, 512), ResizeConfig()) == (0, 0)


def test_fitting_and_covering_take_the_smaller_and_the_larger_factor() -> None:
    for rule, wide, tall in (("fit", (128, 512), (512, 128)), ("cover", (512, 2048), (2048, 512))):
        both = ResizeConfig(rule=ResizeRule(rule), height=512, width=512)
        assert target_sizes((100, 400), both) == [wide]
        assert target_sizes((400, 100), both) == [tall]
    # EoMT rounds halves to even: 5 x 2.5 and 7 x 2.5
    assert target_sizes((4, 5), ResizeConfig(rule=ResizeRule.cover, height=10, width=10)) == [(10, 12)]
    assert target_sizes((4, 7), ResizeConfig(rule=ResizeRule.cover, height=10, width=10)) == [(10, 18)]
    assert target_sizes((30, 40), ResizeConfig(rule=ResizeRule.longest_side, side=100)) == [(75, 100)]
    assert target_sizes((30, 40), ResizeConfig(rule=ResizeRule.exact, height=7, width=9)) == [(7, 9)]
    assert target_sizes((30, 40), ResizeConfig(rule=ResizeRule.fit)) == [(30, 40)]  # the model takes any size


def test_torchs_resize_has_no_antialias_unless_asked_for() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    planes = torch.from_numpy(image).permute(2, 0, 1)[None]
    for options, antialias in (({}, False), ({"antialias": True}, True)):
        expected = F.interpolate(planes, (15, 20), mode="bilinear", align_corners=False, antialias=antialias)
        found = resize_image(image, (15, 20), "torch", **options)  # type: ignore[arg-type]
        assert np.array_equal(found, expected[0].permute(1, 2, 0).numpy())


def test_scales_of_a_protocol() -> None:
    rule = short_side(500, 2000)
    assert sizes_of((400, 600), rule, scales=[0.5, 1.0, 1.5]) == [(250, 375), (500, 750), (750, 1125)]
    # DINOv3: scaled sides below the protocol's go up to a multiple; the protocol's own does not
    assert sizes_of((400, 400), rule, scales=[0.5, 1.0, 1.1], round_up=32) == [(256, 256), (500, 500), (550, 550)]
    assert sizes_of((400, 400), short_side(502, 2000), scales=[0.5], round_up=2) == [(252, 252)]
    # BEiT: no short side below a limit, and no cap then
    assert sizes_of((400, 4000), rule, scales=[0.5], min_side=300) == [(300, 3000)]
    assert sizes_of((101, 203), ResizeConfig(), scales=[1.0, 0.5]) == [(101, 203), (51, 102)]


def test_short_sides_in_pixels_scale_the_protocols_cap() -> None:
    rule = short_side(512, 2048)
    # 256 has the cap 1024: of 100 x 1000 the long side decides
    assert sizes_of((100, 1000), rule, sides=[256, 512]) == [(102, 1024), (205, 2048)]
    assert sizes_of((100, 1000), rule, sides=[256], max_side=500) == [(50, 500)]
    assert sizes_of((100, 1000), short_side(512), sides=[256]) == [(256, 2560)]


def test_views_are_summed_in_the_order_of_the_protocol() -> None:
    """Sums of float32 depend on it."""

    def order(**more: Any) -> list[tuple[Size, bool]]:
        tta = AugmentationConfig(scales=[1.0, 0.5], flip=True, **more)
        return [(view.size, view.flipped) for view in plan_views((100, 200), InferenceConfig(tta=tta))]

    one, half = (100, 200), (50, 100)
    assert order() == [(one, False), (one, True), (half, False), (half, True)]
    assert order(order=ViewOrder.flips_last) == [(one, False), (half, False), (one, True), (half, True)]


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        ((103, 3000), 0.75, (77, 2243)),  # 103 * 0.75 is 77.25: the second rescale's factor is 77 / 103
        ((3000, 103), 0.75, (2243, 77)),
        ((512, 683), 0.75, (384, 512)),  # of 683 it is 512.25, and 512 / 683 the factor
        ((512, 683), 1.75, (896, 1195)),
    ],
)
def test_mmseg_1_rescales_to_the_rounded_scaled_size(size: Size, scale: float, expected: Size) -> None:
    """``Resize(scale_factor=r, keep_ratio=True)``: mmcv.imrescale to the size that rounding has made."""
    assert sizes_of(size, ResizeConfig(), scales=[scale], source=ScaleSource.image) == [expected]


def grid(canvas: Size, crop: int, stride: int | None = None, mode: str = "slide", shrink: str = "each") -> Any:
    return window_grid(canvas, Mode(mode), WindowConfig(crop, stride, Shrink(shrink)))


def test_windows_of_mmsegs_slide_inference() -> None:
    window, origins = grid((512, 683), 512, 341)
    assert (window, origins) == ((512, 512), ((0, 0), (0, 171)))  # the last one is moved back
    assert grid((512, 512), 512, 341) == ((512, 512), ((0, 0),))
    assert grid((300, 1000), 512, 341) == ((300, 512), ((0, 0), (0, 341), (0, 488)))
    assert grid((853, 853), 512, 341)[1] == ((0, 0), (0, 341), (341, 0), (341, 341))  # exactly two, no third


def test_dinov3_makes_small_canvases_one_square_only_if_both_sides_are_smaller() -> None:
    assert grid((300, 400), 512, 341, shrink="both") == ((300, 300), ((0, 0), (0, 100)))
    assert grid((300, 400), 512, 341) == ((300, 400), ((0, 0),))
    assert grid((300, 512), 512, 341, shrink="both") == ((300, 512), ((0, 0),))
    assert grid((512, 300), 512, 341, shrink="both") == ((512, 300), ((0, 0),))


def test_windows_along_the_long_side() -> None:
    """EoMT, ``window_imgs_semantic``: as many as needed, spread evenly."""
    assert grid((512, 1200), 512, mode="long_side") == ((512, 512), ((0, 0), (0, 344), (0, 688)))
    assert grid((1200, 512), 512, mode="long_side") == ((512, 512), ((0, 0), (344, 0), (688, 0)))
    assert grid((512, 512), 512, mode="long_side") == ((512, 512), ((0, 0),))
    assert grid((512, 1024), 512, mode="long_side")[1] == ((0, 0), (0, 512))


def test_costs_and_gaps_of_a_plan() -> None:
    cfg = InferenceConfig(mode=Mode.slide, window=WindowConfig(512, 341))
    plans = plan_views((512, 683), cfg)
    assert forward_pixels(plans) == 2 * 512 * 512
    assert forward_pixels([*plans, *plan_views((100, 50), cfg)]) == 2 * 512 * 512 + 100 * 50
    assert [uncovered(plan) for plan in plans] == [0]
    gaps = plan_views((512, 1300), InferenceConfig(mode=Mode.slide, window=WindowConfig(512, 600)))
    assert [plan.origins for plan in gaps] == [((0, 0), (0, 600), (0, 788))]
    assert uncovered(gaps[0]) == 600 - 512
    # official arithmetic in floats: (4 - 1) * (100 - 97 / 3) is a little less than 203, so the last pixel has no window
    for size in ((100, 303), (303, 100)):
        (short,) = plan_views(size, InferenceConfig(mode=Mode.long_side, window=WindowConfig(100, 100)))
        assert max(short.origins) in ((0, 202), (202, 0))
        assert uncovered(short) == 1
