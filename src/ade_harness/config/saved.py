"""``inference=as_saved``: the protocol that a transformers folder speaks of, by its two configuration files.

A folder says which sizes its network was made for (``image_size``), how its image processor resizes (``size``,
``crop_size``), and whether label 0 was taken away (``do_reduce_labels``); it does not say by which protocol its
published score was measured. What is derived here is therefore named so in every result:

- a network that takes one size only: windows of that size over an image whose short side is that size; along the long
  side for EoMT (as tue-mps/eomt does), every two thirds of a window for the others (as mmsegmentation does);
- any other: the whole image, its short side as the processor's (of its own size, padded to a multiple of 32, where that
  says ``do_resize: false``); for mask classification resized and padded as detectron2 does.
"""

from __future__ import annotations

import json
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from ade_harness.config.dataset import ADE20K_CLASSES
from ade_harness.config.files import read_choice
from ade_harness.config.inference import InferenceConfig, ResizeConfig
from ade_harness.config.model import NO_CLASS_NAMES, ModelConfig
from ade_harness.errors import HarnessError
from ade_harness.files.documents import read_json
from ade_harness.files.reading import expanded

AS_SAVED = "as_saved"
ONE_SIZE = ("eomt", "eomt_dinov3", "dpt", "data2vec-vision")
"""Kinds of networks whose forward takes squares of ``image_size`` alone."""
_ALONG = ("eomt", "eomt_dinov3")
_QUERIES = ("mask2former", "maskformer", "oneformer", "detr")
_WINDOWED = ("beit",)
"""They take any size, but were trained and published with windows of ``image_size``."""
_USUAL_SIDE = 512
_TIMEOUT_S = 10
CONFIG, PREPROCESSOR, PROCESSOR = "config.json", "preprocessor_config.json", "processor_config.json"


def read_saved(model: ModelConfig, name: str) -> dict[str, Any] | None:
    """Return one of the JSON files of ``model.id``, a folder or a repository of the hub; None if it cannot be read."""
    folder = expanded(model.id or "")
    try:
        here = folder.is_dir()
        content = read_json(folder / name) if here else _of_hub(model.id or "", name, model.revision)
    except Exception:  # not there, or not reachable: the loader of the weights says why, in its own message
        return None
    return content if isinstance(content, dict) else None


def _of_hub(repository: str, name: str, revision: str | None) -> Any:
    """Return a JSON file of the hub: of its cache, else asked for once; its own download tries for half a minute."""
    from huggingface_hub import hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import build_hf_headers, get_session

    cached = try_to_load_from_cache(repository, name, revision=revision)
    if isinstance(cached, str):
        return json.loads(Path(cached).read_text(encoding="utf-8"))
    address = hf_hub_url(repository, name, revision=revision)
    answer = get_session().get(address, headers=build_hf_headers(), timeout=_TIMEOUT_S)
    answer.raise_for_status()
    return answer.json()


def apply_saved(inference: InferenceConfig, model: ModelConfig, of_ade20k: bool) -> None:
    """Fill in what the user left open of ``inference=as_saved``; its name then says what it became.

    A network of 151 channels whose processor does not reduce labels has the background as its channel 0, or where its
    names say so; it is left out (``model.class_map``). Where names say something else, nothing is assumed.

    Args:
        inference: is changed.
        model: is changed.
        of_ade20k: whether the classes to predict are ADE20K's 150.
    """
    config = read_saved(model, CONFIG) or {}
    processor = read_processor(model) if config else {}
    kind = str(config.get("model_type", ""))
    native = _number(config.get("image_size"))
    windows = kind in (*ONE_SIZE, *_WINDOWED) and native is not None
    packaged = read_choice("inference", AS_SAVED)
    wanted: dict[str, Any]
    if windows and kind in _ALONG:
        wanted = {
            "resize": {"rule": "cover", "height": native, "width": native, "backend": "pillow"},
            "mode": "long_side", "window": {"crop": native},
        }  # fmt: skip
        name = f"long_side_{native}"
    elif windows:
        assert native is not None
        wanted = {
            "resize": {"rule": "short_side", "side": native, "max_side": 4 * native},
            "mode": "slide", "window": {"crop": native, "stride": native * 2 // 3},
        }  # fmt: skip
        name = f"slide_{native}"
    elif processor.get("do_resize") is False:
        wanted = {"resize": {"rule": "none", "pad_multiple": 32}}
        name = "whole"
    else:
        try:
            side, cap = _sides(processor, f"model.id={model.id}: its image processor's")
        except HarnessError:
            side, cap = inference.resize.side, None
            if side == packaged.get("resize", {}).get("side", ResizeConfig().side):  # else the user says it
                raise
        side = side or native or _USUAL_SIDE
        wanted = {"resize": {"rule": "short_side", "side": side, "max_side": cap or 4 * side}}
        if kind in _QUERIES:
            wanted["resize"] |= {"rounding": "detectron2", "backend": "pillow", "pad_multiple": 32}
        name = f"whole_{side}"
    _fill(inference, wanted, packaged)
    inference.name = f"{AS_SAVED}_{name}"
    labels = config.get("id2label")
    reduced = processor.get("do_reduce_labels", processor.get("reduce_labels", False))
    of_pixels = kind not in (*_ALONG, *_QUERIES)
    # of other data sets it may be a class
    one_more = of_ade20k and isinstance(labels, dict) and len(labels) == ADE20K_CLASSES + 1
    if one_more and model.class_map is None and of_pixels and not reduced:
        assert isinstance(labels, dict)
        model.class_map = _without_background([str(labels.get(str(n), "")) for n in range(ADE20K_CLASSES + 1)])


def _without_background(names: list[str]) -> list[int | None] | None:
    """Return the class map of ADE20K's classes with one more channel; None where its names leave it open."""
    first, last = (name.strip().lower() in NO_CLASS_NAMES for name in (names[0], names[-1]))
    if last and not first:
        return [*range(ADE20K_CLASSES), None]
    unnamed = all(re.fullmatch(r"\D{0,20}\d+|", name) for name in names)  # LABEL_7, class 7
    return [None, *range(ADE20K_CLASSES)] if first or unnamed else None


def read_processor(model: ModelConfig) -> dict[str, Any]:
    """Return what a folder or repository says of images: its own file, or a part of that of all processors."""
    alone = read_saved(model, PREPROCESSOR)
    if alone is not None:
        return alone
    below = (read_saved(model, PROCESSOR) or {}).get("image_processor")
    return below if isinstance(below, dict) else {}


def _fill(node: Any, wanted: dict[str, Any], default: dict[str, Any]) -> None:
    """Set fields that still are what the packaged choice says, or the schema: what the user set stays."""
    made = type(node)()
    for field in fields(node):
        if field.name not in wanted:
            continue
        value, own = wanted[field.name], getattr(node, field.name)
        below = default.get(field.name, getattr(made, field.name))
        if is_dataclass(own):
            _fill(own, value, below if isinstance(below, dict) else {})
        elif own == below:
            setattr(node, field.name, type(own)(value) if isinstance(own, str) and type(own) is not str else value)


def _sides(processor: dict[str, Any], where: str) -> tuple[int | None, int | None]:
    """Return the short side that a processor resizes to, and its cap of the long side; None is not said.

    Raises:
        HarnessError: a size is said, and not one of these; `where` begins the message.
    """
    name = "crop_size" if processor.get("do_center_crop") else "size"
    size, cap = processor.get(name), _number(processor.get("max_size"))
    if size is None:
        return None, cap
    if isinstance(size, dict):
        sides = [_number(size.get(key)) for key in ("height", "width") if size.get(key) is not None]
        short = _number(size.get("shortest_edge")) or (min((n for n in sides if n), default=None))
        cap, wrong = _number(size.get("longest_edge")) or cap, None in sides
    elif isinstance(size, list) and len(size) == 2:  # height and width
        sides = [_number(one) for one in size]
        short, wrong = min((n for n in sides if n), default=None), None in sides
    else:
        short, wrong = _number(size), False
    if short is None or wrong:
        raise HarnessError(
            f"{where} {name} is {json.dumps(size)[:80]}, expected a number of pixels, height and width, or"
            " shortest_edge. Choose a protocol yourself, such as inference=mmseg_whole_512, or inference.resize.side."
        )
    return short, cap


def _number(value: Any) -> int | None:
    """Return a positive whole number; None for anything else, and for two that differ."""
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return int(value) if whole and not isinstance(value, bool) and value > 0 else None
