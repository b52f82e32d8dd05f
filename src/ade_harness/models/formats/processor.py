"""What a transformers folder or hub repository says of pixels: its preprocessor_config.json.

What the file leaves out is what the image processor's class has, as with transformers' ``AutoImageProcessor``: a file
of DPT's without statistics means 0.5, one of SegFormer's ImageNet's. MobileViT's never normalises, whatever
its file says.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Resampling

from ade_harness.config.saved import PREPROCESSOR
from ade_harness.errors import HarnessError

_NUMBERS = ("image_mean", "image_std", "rescale_factor")
_STEPS = ("do_rescale", "do_normalize", "do_flip_channel_order")


@dataclass(frozen=True)
class Pixels:
    """How a network's pixels are made."""

    mean: tuple[float, ...]
    """On the 0..255 scale, in the order in which the network takes channels; so is `std`."""
    std: tuple[float, ...]
    bgr: bool
    resample: str | None = None
    """How its image processor resizes, where that is not bilinear as in the protocols here."""


def read_pixels(model_id: str, revision: str | None, model_type: str) -> Pixels | None:
    """Return what an image processor does with pixels; None if there is no preprocessor_config.json.

    Args:
        model_id: a folder, or an id of the hub.
        revision: of the hub.
        model_type: of the network, whose usual processor is meant by a file that names none.

    Raises:
        HarnessError: the file cannot be read, or a value in it is not of its kind.
    """
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(model_id, revision=revision)
    except (OSError, ValueError) as error:
        if (Path(model_id) / PREPROCESSOR).is_file():
            raise HarnessError(f"model.id={model_id}: its {PREPROCESSOR} cannot be read. Fix or remove it.") from error
        return None
    if not isinstance(values, Mapping):
        raise HarnessError(f"model.id={model_id}: its {PREPROCESSOR} holds no keys and values. Fix or remove it.")
    where = f"model.id={model_id}: its image processor's"
    values = _with_defaults(values, model_type)
    rescaled, normalised, flipped = (_switch(values.get(name), f"{where} {name}") for name in _STEPS)
    factor = _number(values.get("rescale_factor", 1 / 255), f"{where} rescale_factor", above=0)
    scale = 1.0 / factor if rescaled else 1.0
    mean, std = values.get("image_mean"), values.get("image_std")
    filter_ = _filter(values)
    if not normalised or mean is None or std is None:
        return Pixels((0.0,) * 3, (scale,) * 3, flipped, filter_)
    mean, std = _three(mean, f"{where} image_mean"), _three(std, f"{where} image_std", above=0)
    step = -1 if flipped else 1  # channels are flipped after everything else
    return Pixels(tuple(m * scale for m in mean[::step]), tuple(s * scale for s in std[::step]), flipped, filter_)


def _with_defaults(values: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """Return a processor's values, with those of its class where the file has none, without steps that it has not."""
    from transformers.models.auto.image_processing_auto import (
        IMAGE_PROCESSOR_MAPPING_NAMES,
        get_image_processor_class_from_name,
    )

    name = values.get("image_processor_type") or values.get("feature_extractor_type")
    if not isinstance(name, str):
        name = (IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type) or {}).get("torchvision", "")
    processor = get_image_processor_class_from_name(name.replace("FeatureExtractor", "ImageProcessor"))
    if processor is None:
        return {"do_rescale": True, "do_normalize": True, "do_flip_channel_order": False, **values}
    numbers = {key: getattr(processor, key) for key in _NUMBERS if getattr(processor, key, None) is not None}
    steps = {step: bool(getattr(processor, step, False)) for step in _STEPS}  # None is not done, as False
    taken = inspect.signature(processor._preprocess).parameters
    numbers["resample"] = getattr(processor, "resample", None)
    return {**numbers, **steps, **values, **{step: False for step in _STEPS if step not in taken}}


def _filter(values: Mapping[str, Any]) -> str | None:
    """Return the name of Pillow's filter by which a processor resizes, if it is another than the bilinear one."""
    number = values.get("resample")
    if isinstance(number, bool) or not isinstance(number, int) or number not in list(Resampling):
        return None
    if values.get("do_resize") is False or number == Resampling.BILINEAR:
        return None
    return Resampling(number).name.lower()


def _switch(value: Any, what: str) -> bool:
    if not isinstance(value, bool):
        raise HarnessError(f"{what} is {value!r}, expected true or false.")
    return value


def _three(value: Any, what: str, above: float = -math.inf) -> list[float]:
    """Return a processor's number for each of red, green and blue; one number is that of all."""
    numbers = value if isinstance(value, list | tuple) else [value] * 3
    if len(numbers) != 3:
        raise HarnessError(f"{what} has {len(numbers)} numbers, expected three, or one for all channels.")
    return [_number(n, what, above) for n in numbers]


def _number(value: Any, what: str, above: float = -math.inf) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not above < value < math.inf:
        raise HarnessError(f"{what} is {value!r}, expected a number{f' above {above:g}' if above > -math.inf else ''}.")
    return float(value)
