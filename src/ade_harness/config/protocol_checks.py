"""Ranges and combinations of an ``inference`` node, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from omegaconf import DictConfig

from ade_harness.errors import did_you_mean, require

_CHOICES = {
    "mode": ("whole", "slide", "long_side"),
    "precision": ("fp32", "tf32", "bf16", "fp16"),
    "resize.rule": ("none", "exact", "short_side", "longest_side", "cover", "fit"),
    "resize.rounding": ("mmseg", "detectron2", "dinov3"),
    "resize.backend": ("opencv", "pillow", "torch"),
    "resize.multiple_rounding": ("up", "nearest"),
    "resize.pad_position": ("corner", "centre"),
    "window.shrink": ("each", "both"),
    "tta.source": ("protocol", "image", "resized"),
    "tta.order": ("scale_first", "flips_last"),
    "tta.average": ("probabilities", "scores"),
    "masks.resolution": ("scores", "input", "original"),
    "masks.einsum": ("float32", "bfloat16"),
    "output.upsample": ("two_step", "one_step"),
    "output.first_step": ("bilinear", "legacy_bilinear"),
    "output.labels": ("original", "input"),
}
_NEEDED_LENGTHS = {
    "exact": ("height", "width"),
    "cover": ("height", "width"),
    "short_side": ("side",),
    "longest_side": ("side",),
}
_RUN_THEIR_OWN_WAY = ("onnx", "torchscript")


def check_protocol(cfg: DictConfig) -> None:
    """Check the ``inference`` node of a whole configuration.

    Raises:
        HarnessError: names the key, what it is, and what was expected.
    """
    inference = cfg.inference
    for key, allowed in _CHOICES.items():
        group, _, name = key.rpartition(".")
        value = (inference[group] if group else inference)[name]
        require(
            value in allowed,
            f"inference.{key}={value}: expected one of {', '.join(allowed)}.{did_you_mean(str(value), allowed)}",
        )
    for name in ("batch", "images"):
        _positive(f"inference.{name}", inference[name])
    _check_resize(inference.resize)
    _check_windows(inference)
    _check_views(inference)
    _check_output(inference)
    kind = cfg.model.kind
    require(
        kind not in _RUN_THEIR_OWN_WAY or (inference.precision in ("fp32", "tf32") and inference.compile is None),
        f"inference.precision={inference.precision}, inference.compile={inference.compile}: a model of kind {kind} runs"
        " as it was exported. Use fp32 and null.",
    )


def _positive(key: str, value: float | None) -> None:
    require(value is None or value >= 1, f"{key}={value}: expected 1 or more.")


def _check_resize(resize: DictConfig) -> None:
    for name in _NEEDED_LENGTHS.get(resize.rule, ()):
        value = resize[name]
        require(
            value is not None and value >= 1,
            f"inference.resize.{name}={value}: the rule {resize.rule} needs a length of 1 pixel or more.",
        )
    for name in ("multiple_of", "pad_multiple", "pad_at_least", "max_side"):
        _positive(f"inference.resize.{name}", resize[name])
    require(
        resize.pad_to is None or (len(resize.pad_to) == 2 and min(resize.pad_to) >= 1),
        f"inference.resize.pad_to={resize.pad_to}: expected [height, width] in pixels.",
    )
    require(
        not resize.antialias or resize.backend == "torch",
        f"inference.resize.antialias=true: is for backend=torch; {resize.backend} always has"
        f" {'it' if resize.backend == 'pillow' else 'none'}.",
    )
    require(
        resize.rounding != "dinov3" or resize.max_side is None,
        f"inference.resize.max_side={resize.max_side}: the rounding dinov3 has no cap. Use null.",
    )


def _check_windows(inference: DictConfig) -> None:
    window = inference.window
    if inference.mode == "whole":
        return
    require(
        window.crop is not None and window.crop >= 1,
        f"inference.window.crop={window.crop}: mode={inference.mode} needs the side of a window in pixels.",
    )
    if inference.mode == "slide":
        require(
            window.stride is not None and window.stride >= 1,
            f"inference.window.stride={window.stride}: mode=slide needs a step of 1 pixel or more.",
        )
        require(
            window.stride <= window.crop,
            f"inference.window.stride={window.stride}: is over inference.window.crop={window.crop}, so pixels between"
            " windows would have no scores. Choose a stride up to the crop.",
        )
    for key, value, plain in (
        ("output.labels", inference.output.labels, "original"),
        ("output.first_step", inference.output.first_step, "bilinear"),
        ("masks.resolution", inference.masks.resolution != "original", True),
    ):
        require(value == plain, f"inference.{key}: needs inference.mode=whole.")


def _check_views(inference: DictConfig) -> None:
    tta, resize = inference.tta, inference.resize
    views: Sequence[float] = tta.scales if tta.sides is None else tta.sides
    key = "scales" if tta.sides is None else "sides"
    require(len(views) > 0, f"inference.tta.{key}: is empty. [1.0] is a single scale.")
    above_zero: Callable[[float], bool] = (lambda v: v > 0) if tta.sides is None else (lambda v: v >= 1)
    wrong = [v for v in views if not above_zero(v)]
    require(not wrong, f"inference.tta.{key}={list(views)}: {wrong[:1]} makes no image. Expected numbers over 0.")
    for name in ("round_up", "min_side", "max_side"):
        _positive(f"inference.tta.{name}", tta[name])
    require(
        tta.sides is None or resize.rule == "short_side",
        f"inference.tta.sides: are short sides, the protocol's rule is {resize.rule}. Use tta.scales.",
    )
    many = len(views) > 1 or tta.flip
    require(
        not (many and inference.output.labels == "input"),
        "inference.output.labels=input: labels cannot be averaged over views. Use original.",
    )
    require(
        not (many and resize.rule == "fit"),
        "inference.resize.rule=fit: has one size only. Use another rule for test-time augmentation.",
    )


def _check_output(inference: DictConfig) -> None:
    resize, output = inference.resize, inference.output
    padded = (
        resize.pad_to is not None or resize.pad_multiple > 1 or resize.pad_at_least is not None or resize.rule == "fit"
    )
    require(
        not (padded and output.upsample == "one_step"),
        "inference.output.upsample=one_step does not go with padding: the padding is cut off at the input's size."
        " Use two_step.",
    )
    require(
        output.upsample == "two_step" or inference.mode == "whole",
        "inference.output.upsample=one_step: windows are put together at the input's size. Use two_step.",
    )
