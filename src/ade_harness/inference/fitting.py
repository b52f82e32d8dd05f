"""A protocol and the inputs that a network takes: whether they fit is found out before the first image is decoded."""

from __future__ import annotations

from collections.abc import Mapping

from ade_harness.config.inference import InferenceConfig, ResizeRule
from ade_harness.errors import HarnessError, did_you_mean, require
from ade_harness.inference.plan import ViewPlan, uncovered
from ade_harness.kernels import Size
from ade_harness.models.loaded import UNBOUNDED, LoadedModel


def fitted(inference: InferenceConfig, fixed_size: Size | None) -> InferenceConfig:
    """Fill in the model's only input size where the protocol leaves it open."""
    if inference.resize.rule == ResizeRule.fit and inference.resize.height is None and fixed_size is not None:
        inference.resize.height, inference.resize.width = fixed_size
    return inference


_MAX_PIXELS = 2**27
"""The most pixels of an input: 1.5 GB in float32, before the network makes anything of it."""


def check_plan(image_id: str, plan: ViewPlan, cfg: InferenceConfig, model: LoadedModel, stride: int) -> None:
    """Refuse a view that the network cannot take.

    Args:
        image_id: whose view it is, for messages.
        plan: of the view.
        cfg: ``inference`` node.
        model: the network.
        stride: of its coarsest features, pixels.

    Raises:
        HarnessError: no pixels, no place in the padded input, pixels in no window, a side below the stride, or one that
            the network's file does not take.
    """
    name = f"inference={cfg.name}"
    if min(min(s) for s in plan.sizes) < 1:
        written = " then ".join(f"{w}x{h}" for h, w in plan.sizes)
        raise HarnessError(f"{image_id}: {name} scales the image to {written} (width x height), which has no pixels.")
    largest = max((*plan.sizes, plan.canvas), key=lambda size: size[0] * size[1])
    if largest[0] * largest[1] > _MAX_PIXELS:
        raise HarnessError(
            f"{image_id}: {name} makes an input of {largest[1]}x{largest[0]} (width x height), over {_MAX_PIXELS:,}"
            " pixels. Choose smaller sides or scales."
        )
    if plan.size[0] > plan.canvas[0] or plan.size[1] > plan.canvas[1]:
        raise HarnessError(
            f"{image_id}: {plan.size[1]}x{plan.size[0]} (width x height) after resizing does not fit"
            f" inference.resize.pad_to={[*plan.canvas]} (height, width)."
        )
    gaps = uncovered(plan)
    if gaps:
        raise HarnessError(
            f"{image_id}: with {name}, {gaps} rows or columns of the {plan.canvas[1]}x{plan.canvas[0]} input"
            f" are not covered by any window ({plan.window[1]}x{plan.window[0]}, stride"
            f" {cfg.window.stride}). Choose a smaller inference.window.stride."
        )
    if min(plan.window) < stride:
        raise HarnessError(
            f"{image_id}: {name} makes a network input of {plan.window[1]}x{plan.window[0]} (width x height),"
            f" smaller than the model's stride of {stride} (model.input.stride)."
        )
    for side, value, limits in zip(("height", "width"), plan.window, model.side_limits or (), strict=False):
        if not limits[0] <= value <= limits[1]:
            maximum = "or more" if limits[1] >= UNBOUNDED else f"to {limits[1]}" if limits[0] < limits[1] else "alone"
            raise HarnessError(
                f"{image_id}: the model takes inputs with a {side} of {limits[0]} {maximum}, {name}"
                f" makes {value}. Choose a protocol whose inputs fit (windows, or inference.resize), or export the"
                " model for more sizes."
            )
    require(
        not model.squares or plan.window[0] == plan.window[1],
        f"{image_id}: the model takes squares only, as it was exported with one size for both sides; {name} makes"
        f" {plan.window[1]}x{plan.window[0]} (width x height). Choose a protocol of windows, or export it with a size"
        ' for each: dynamic_shapes={"x": {2: Dim("height"), 3: Dim("width")}}.',
    )
    fixed = model.fixed_size
    if fixed is not None and fixed != plan.window:
        raise HarnessError(
            f"{image_id}: the model takes {fixed[1]}x{fixed[0]} (width x height) only, {name} makes"
            f" {plan.window[1]}x{plan.window[0]}. Choose inference=fit_512 with inference.resize.side={max(fixed)}"
            f" inference.resize.pad_to=[{fixed[0]},{fixed[1]}], or inference.resize.rule=exact with height and"
            " width, or windows of that size."
        )


def require_backend(backend: str) -> None:
    """Refuse a backend that torch does not have, before the first image needs it.

    Raises:
        HarnessError: names what there is.
    """
    from torch._dynamo import list_backends  # takes a second, for those alone who compile

    usual, every = list_backends(), list_backends(exclude_tags=())
    require(
        backend in every,
        f"inference.compile={backend}: torch has no such backend.{did_you_mean(backend, every)} Backends:"
        f" {', '.join(usual)}.",
    )


def check_one_size(backend: str, inputs: Mapping[Size, str]) -> None:
    """Refuse to compile a network for inputs of several sizes.

    Args:
        backend: ``inference.compile``.
        inputs: sizes (height, width) of all inputs, each with an image that has it.

    Raises:
        HarnessError: there is more than one; names two images.
    """
    if len(inputs) > 1:
        (first, one), (second, two) = list(inputs.items())[:2]
        raise HarnessError(
            f"inference.compile={backend}: needs inputs of one size, since what is compiled for a second one depends on"
            f" the first; {one} has {first[1]}x{first[0]}, {two} {second[1]}x{second[0]} (width x height). Choose a"
            " protocol with windows, or leave it out."
        )
