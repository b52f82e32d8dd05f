"""The ``inference`` group: a protocol, from the image to the network's input and from its outputs to labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from ade_harness.config.fields import MISSING, bounded, bounded_list

MAX_SIDE = 16_384
"""Pixels of a side of any input, window or padding; the packaged protocols go to 4,480."""
MAX_SCALE = 16
"""The largest scale of test-time augmentation; the packaged protocols go to 3."""


class ResizeRule(StrEnum):
    """Which size the network's input has."""

    none = "none"  # the image's own
    exact = "exact"  # height x width
    short_side = "short_side"  # the shorter side is `side`
    longest_side = "longest_side"  # the longer side is `side`
    cover = "cover"  # at least height x width
    fit = "fit"  # at most height x width, then padded to it


class Rounding(StrEnum):
    """short_side: where the cap of the long side is applied, and how sizes are rounded, in each code base."""

    mmseg = "mmseg"
    detectron2 = "detectron2"
    dinov3 = "dinov3"


class ResizeBackend(StrEnum):
    """The library whose bilinear resize is used."""

    opencv = "opencv"  # no antialias
    pillow = "pillow"  # antialias
    torch = "torch"


class MultipleRounding(StrEnum):
    """How a side becomes a multiple of `multiple_of`."""

    up = "up"
    nearest = "nearest"


class PadPosition(StrEnum):
    """Where padding goes."""

    corner = "corner"  # right and bottom
    centre = "centre"  # all sides


@dataclass
class ResizeConfig:
    """How the network's input is made from the image, in uint8."""

    rule: ResizeRule = ResizeRule.none
    # exact; cover: at least this; fit (null: what the model takes, if only one size)
    height: int | None = bounded(None, at_least=1, at_most=MAX_SIDE)
    width: int | None = bounded(None, at_least=1, at_most=MAX_SIDE)
    side: int | None = bounded(None, at_least=1, at_most=MAX_SIDE)  # short_side, longest_side
    max_side: int | None = bounded(None, at_least=1, at_most=MAX_SIDE)  # short_side: cap of the long side
    rounding: Rounding = Rounding.mmseg
    backend: ResizeBackend = ResizeBackend.opencv
    antialias: bool = False  # torch only
    multiple_of: int = bounded(1, at_least=1, at_most=MAX_SIDE)  # then resize both sides to a multiple of this
    multiple_rounding: MultipleRounding = MultipleRounding.up
    # then pad to exactly (height, width)
    pad_to: list[int] | None = bounded_list(None, length=2, at_least=1, at_most=MAX_SIDE, meaning="height, width")
    pad_at_least: int | None = bounded(None, at_least=1, at_most=MAX_SIDE)  # or each side that is shorter, to this
    pad_multiple: int = bounded(1, at_least=1, at_most=MAX_SIDE)  # or each side to a multiple of this
    pad_position: PadPosition = PadPosition.corner
    # 0..255 before normalisation; null pads zeros after it
    pad_value: float | None = bounded(None, at_least=0, at_most=255)


class Mode(StrEnum):
    """What one forward gets: the image, or windows of it."""

    whole = "whole"
    slide = "slide"  # windows
    long_side = "long_side"  # windows along the long side, spread evenly


class Shrink(StrEnum):
    """How an image that is smaller than the crop is handled."""

    each = "each"  # each side alone (mmseg)
    both = "both"  # both to the shorter (dinov3)


@dataclass
class WindowConfig:
    """mode=slide and mode=long_side."""

    crop: int | None = bounded(None, at_least=1, at_most=MAX_SIDE)  # side of a window
    stride: int | None = bounded(None, at_least=1, at_most=MAX_SIDE)  # slide only
    shrink: Shrink = Shrink.each


class ScaleSource(StrEnum):
    """What scales multiply."""

    protocol = "protocol"  # the protocol's sides
    image = "image"  # the image's size
    resized = "resized"  # the input's size


class ViewOrder(StrEnum):
    """The order in which views are summed."""

    scale_first = "scale_first"  # each scale plain, then mirrored
    flips_last = "flips_last"


class Average(StrEnum):
    """What of the views is averaged."""

    probabilities = "probabilities"  # softmax over classes of each view
    scores = "scores"


@dataclass
class AugmentationConfig:
    """Test-time augmentation: the views of an image whose results are averaged."""

    scales: list[float] = bounded_list([1.0], above=0, at_most=MAX_SCALE)
    # short sides in pixels, in place of scales
    sides: list[int] | None = bounded_list(None, at_least=1, at_most=MAX_SIDE)
    source: ScaleSource = ScaleSource.protocol
    # cap of the long side for `sides`; null scales the protocol's
    max_side: int | None = bounded(None, at_least=1, at_most=MAX_SIDE)
    # no scaled short side is below this, and no cap then (BEiT)
    min_side: int | None = bounded(None, at_least=1, at_most=MAX_SIDE)
    # scaled sides below the protocol's go up to a multiple of this (DINOv3)
    round_up: int = bounded(1, at_least=1, at_most=MAX_SIDE)
    flip: bool = False  # each view also mirrored
    order: ViewOrder = ViewOrder.scale_first
    average: Average = Average.probabilities


class MaskResolution(StrEnum):
    """Where masks are upsampled to before the sigmoid."""

    scores = "scores"  # nowhere
    input = "input"
    original = "original"


class MaskSum(StrEnum):
    """Type in which the queries are summed."""

    float32 = "float32"
    bfloat16 = "bfloat16"  # DINOv3


@dataclass
class MaskConfig:
    """How mask classification becomes scores: class softmax without void times mask sigmoid, over all queries."""

    resolution: MaskResolution = MaskResolution.input
    einsum: MaskSum = MaskSum.float32


class Upsample(StrEnum):
    """The way from the scores to the original size."""

    two_step = "two_step"  # to the input's size, then to the original
    one_step = "one_step"  # straight


class FirstStep(StrEnum):
    """How the first step interpolates."""

    bilinear = "bilinear"
    legacy_bilinear = "legacy_bilinear"  # TensorFlow 1: corner-aligned origin, no half pixel


class LabelSize(StrEnum):
    """Where the argmax is taken."""

    original = "original"
    input = "input"  # there, then nearest resize of labels


@dataclass
class OutputConfig:
    """How scores become labels of the original size."""

    upsample: Upsample = Upsample.two_step
    first_step: FirstStep = FirstStep.bilinear
    labels: LabelSize = LabelSize.original


class Precision(StrEnum):
    """Arithmetic of the network's forward; everything after it is float32."""

    fp32 = "fp32"
    tf32 = "tf32"
    bf16 = "bf16"
    fp16 = "fp16"


@dataclass
class InferenceConfig:
    """The protocol."""

    name: str = MISSING
    source: str = ""  # paper or code that defines it
    exif: bool = True  # turn images as their EXIF orientation says
    resize: ResizeConfig = field(default_factory=ResizeConfig)
    mode: Mode = Mode.whole
    window: WindowConfig = field(default_factory=WindowConfig)
    tta: AugmentationConfig = field(default_factory=AugmentationConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    precision: Precision = Precision.fp32
    batch: int | None = bounded(None, at_least=1, at_most=4096)  # windows and views in one forward; null: 8, on CPUs 1
    images: int = bounded(1, at_least=1, at_most=4096)  # images of equal size that may share a forward
    channels_last: bool = False
    compile: str | None = None  # torch.compile backend, such as inductor
