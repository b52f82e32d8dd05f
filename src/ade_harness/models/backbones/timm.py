"""Any timm backbone as feature maps for a head: ``forward_intermediates``, or ``features_only`` where a model lacks it.

Vision transformers give their last block's normed patch tokens, as the linear heads of DINOv2 and DINOv3 take them.
Networks with stages give the last map of each stride from 4 to 32, enlarged bilinearly to the finest and put side by
side, as mmsegmentation's ``resize_concat`` does, on which DINOv2's heads were trained.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ade_harness.errors import HarnessError, did_you_mean
from ade_harness.files.logs import log_level

DEFAULT_SIDE = 512
"""Input of backbones that take one size: the windows of the linear protocols."""
_STRIDES = (4, 8, 16, 32)
_SIZES: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False})
"""Arguments by which timm's families take inputs of any size; the first that a model knows is used."""


class TimmFeatures(nn.Module):
    """Images [N, 3, H, W], sides multiples of `patch_size`, to one or several maps of one size.

    Args:
        network: a timm model.
        indices: of the maps, as ``forward_intermediates`` counts them.
        channels: of all maps together.
        stride: of the coarsest map.
        side: of the only images that it is made for (padded to multiples of `stride`); None: any.
        normed: whether the network's last norm is applied to the maps: a transformer's, as its own head sees them.
    """

    def __init__(
        self, network: nn.Module, indices: list[int], channels: int, stride: int, side: int | None, normed: bool
    ) -> None:
        super().__init__()
        self.network = network
        self.indices = indices
        self.channels = channels
        self.patch_size = stride
        self.side = side
        self.normed = normed

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return maps [N, C_i, h, w], all of the finest one's size."""
        network: Any = self.network
        if hasattr(network, "forward_intermediates"):
            maps = network.forward_intermediates(
                images, indices=self.indices, norm=self.normed, output_fmt="NCHW", intermediates_only=True
            )
        else:
            maps = network(images)
        size = maps[0].shape[-2:]
        return [m if m.shape[-2:] == size else F.interpolate(m, size, mode="bilinear") for m in maps]


def build_timm(name: str, state: Mapping[str, Tensor] | None, maps: int | None, side: int | None) -> TimmFeatures:
    """Make a timm model with these weights, or with random ones.

    Args:
        name: of the model, with or without a tag: ``vit_large_patch14_dinov2.lvd142m``.
        state: in timm's names or in any that timm's own filter for the model knows; every key must fit.
        maps: how many, from the last; None: one of a transformer, one for each stride of a network with stages.
        side: of the input, for models that take one size; None: any size where the model can, else 512.

    Raises:
        HarnessError: timm does not know the name, the model gives no feature maps, or the weights do not fit it.
    """
    settings, fixed = _size_settings(name, side)
    with log_level("timm", logging.ERROR), _explained(name):
        network = _make(name, settings, state)
        if not hasattr(network, "forward_intermediates"):
            return _of_features_only(name, settings, state, fixed)
        info = list(network.feature_info)
        indices = _chosen([int(level["reduction"]) for level in info], maps)
        one = len({info[i]["reduction"] for i in indices}) == 1
        channels = [int(info[i].get("num_chs_norm" if one else "num_chs", info[i]["num_chs"])) for i in indices]
        network.reset_classifier(0)
    return TimmFeatures(network, indices, sum(channels), max(int(info[i]["reduction"]) for i in indices), fixed, one)


def statistics_of(name: str) -> tuple[list[float], list[float]]:
    """Return (mean, std) on the 0..255 scale of the images that a model was trained on; ImageNet's if timm has none."""
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    known = pretrained_cfg(name)
    mean = known.mean if known is not None else IMAGENET_DEFAULT_MEAN
    std = known.std if known is not None else IMAGENET_DEFAULT_STD
    return [255.0 * value for value in mean], [255.0 * value for value in std]


def pretrained_cfg(name: str) -> Any:
    """Return timm's facts of a model: hub id, statistics, licence; None if it has none.

    Raises:
        HarnessError: timm does not know the name, or the tag.
    """
    import timm

    arch = name.partition(".")[0]
    if not timm.is_model(arch):
        hint = did_you_mean(arch, timm.list_models())
        raise HarnessError(f"model.backbone={name}: timm {timm.__version__} has no such model.{hint}")
    with _explained(name):
        return timm.models.get_pretrained_cfg(name)


def known_names(name: str) -> Callable[[Mapping[str, Tensor]], int]:
    """Return what counts the names of a state_dict that are a model's own; raises as :func:`pretrained_cfg`."""
    import timm

    pretrained_cfg(name)
    with log_level("timm", logging.ERROR), _explained(name), torch.device("meta"):
        own = timm.create_model(name.partition(".")[0]).state_dict().keys()
    return lambda state: len(state.keys() & own)


def _size_settings(name: str, side: int | None) -> tuple[dict[str, Any], int | None]:
    """Return the arguments that set the input's size, and the only size then taken; tried on the meta device."""
    known = pretrained_cfg(name)
    wanted = side or DEFAULT_SIDE
    if side is None:
        for settings in _SIZES:
            if _takes(name, settings, 224) and _takes(name, settings, 448):
                return settings, None
    for step in (1, 14, 16, 32, 7):  # of patches and windows, which sides must be multiples of
        padded = wanted + -wanted % step
        if _takes(name, {"img_size": padded}, padded):
            return {"img_size": padded}, wanted
    if not (known is not None and known.fixed_input_size) and _takes(name, {}, wanted):
        if side is not None:
            raise HarnessError(f"model.backbone={name}: takes any size. Leave architecture.backbone.img_size out.")
        return {}, None
    return {}, known.input_size[-1] if known is not None and known.input_size else None


def _takes(name: str, settings: Mapping[str, Any], side: int) -> bool:
    """Whether a model can be made with `settings` and takes squares of `side`, as far as shapes alone say it."""
    import timm

    try:
        with torch.device("meta"), log_level("timm", logging.ERROR), torch.inference_mode():
            network: Any = timm.create_model(name, **settings).eval()
            images = torch.empty(1, 3, side, side)
            if hasattr(network, "forward_intermediates"):
                network.forward_intermediates(images, output_fmt="NCHW", intermediates_only=True)
            else:
                network(images)
    except NotImplementedError:  # an operator that needs values: nothing is known
        return True
    except Exception:  # of the many kinds that constructors and shapes raise
        return False
    return True


def _make(name: str, settings: Mapping[str, Any], state: Mapping[str, Tensor] | None, **more: Any) -> Any:
    """Make a model; timm's loading is strict where the file's number of classes is the model's."""
    import timm

    if state is None:
        return timm.create_model(name, **settings, **more).eval()
    classes = _classes_of(name, state)
    overlay = {"state_dict": dict(state), "num_classes": classes}
    network = timm.create_model(
        name, pretrained=True, num_classes=classes, pretrained_cfg_overlay=overlay, **settings, **more
    ).eval()
    for facts in ("pretrained_cfg", "default_cfg"):
        if isinstance(getattr(network, facts, None), dict):
            getattr(network, facts).pop("state_dict", None)  # a second copy of the weights
    return network


def _classes_of(name: str, state: Mapping[str, Tensor]) -> int:
    """Return of how many classes the classifier in a file is; 0 if it has none."""
    known = pretrained_cfg(name)
    named = known.classifier if known is not None else None
    for prefix in (named,) if isinstance(named, str) else tuple(named or ()):
        weight = state.get(f"{prefix}.weight")
        if weight is not None:
            return int(weight.shape[0])
    return 0


def _of_features_only(
    name: str, settings: Mapping[str, Any], state: Mapping[str, Tensor] | None, fixed: int | None
) -> TimmFeatures:
    if state is not None:
        _make(name, settings, state)  # strictly; what follows leaves out what is not needed
    network = _make(name, settings, state, features_only=True)
    reductions = [int(r) for r in network.feature_info.reduction()]
    return TimmFeatures(network, [], sum(network.feature_info.channels()), max(reductions), fixed, normed=False)


def _chosen(reductions: list[int], maps: int | None) -> list[int]:
    """Return which maps a head takes: the last ones, or the last of each stride from 4 to 32."""
    if maps is not None:
        if maps > len(reductions):
            raise HarnessError(f"model.architecture.head.maps={maps}: the backbone has {len(reductions)} maps.")
        return list(range(len(reductions) - maps, len(reductions)))
    last = {stride: i for i, stride in enumerate(reductions)}
    if len(last) == 1:
        return [len(reductions) - 1]
    return [i for stride, i in sorted(last.items()) if stride in _STRIDES] or [len(reductions) - 1]


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn the many exceptions of timm's constructors and loaders into one message."""
    try:
        yield
    except HarnessError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:400]
        raise HarnessError(f"model.backbone={name}: timm cannot make or load it ({text}).") from error
