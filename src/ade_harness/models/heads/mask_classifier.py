"""What the mask-classification systems share: assembling parts, backbones from transformers, and the public door."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ade_harness.models.checkpoint.strict import Strictness, load_strictly
from ade_harness.models.ops.attention import reference_operations
from ade_harness.models.outputs import MaskLogits


class MaskClassifier(nn.Module):
    """Normalised images float32 [N, 3, H, W] to class and mask logits.

    Args:
        backbone: images to features of strides 4, 8, 16, 32.
        head: modules ``pixel_decoder`` and ``decoder``.
    """

    def __init__(self, backbone: nn.Module, head: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.backbone = backbone
        self.pixel_decoder = head["pixel_decoder"]
        self.decoder = head["decoder"]
        self.fixed_size: tuple[int, int] | None = getattr(backbone, "fixed_size", None)
        """(height, width) of the only input it takes."""

    def forward(self, images: Tensor) -> MaskLogits:
        """Return class logits [N, Q, 151] and mask logits [N, Q, H/4, W/4]."""
        mask_features, maps = self.pixel_decoder(self.backbone(images))
        logits: MaskLogits = self.decoder(mask_features, maps)
        return logits


class SemanticScores(nn.Module):
    """What ``from_official`` returns for these systems: scores per pixel, and the logits that they are made of.

    Args:
        network: images to :class:`~ade_harness.models.outputs.MaskLogits`.
        at_mask_size: sum up the queries at the masks' size and enlarge the scores (mmsegmentation's lineage), in
            place of enlarging the masks first (all others).
    """

    def __init__(self, network: nn.Module, at_mask_size: bool) -> None:
        super().__init__()
        self.network = network
        self.at_mask_size = at_mask_size

    def raw_outputs(self, images: Tensor) -> MaskLogits:
        """Return (class logits [N, Q, 151], mask logits [N, Q, h, w]) of normalised images [N, 3, H, W].

        Computed in the official order of additions: evaluations use faster forms, see models/ops/attention.py.
        """
        with reference_operations():
            logits: MaskLogits = self.network(images)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Return scores [N, 150, H, W] of normalised images [N, 3, H, W]: sums of class times mask probabilities."""
        classes, masks = self.raw_outputs(images)
        size = images.shape[-2:]
        weights = classes.softmax(-1)[..., :-1]
        if self.at_mask_size:
            scores = torch.einsum("nqc,nqhw->nchw", weights, masks.sigmoid())
            return F.interpolate(scores, size, mode="bilinear", align_corners=False)
        masks = F.interpolate(masks, size, mode="bilinear", align_corners=False)
        return torch.einsum("nqc,nqhw->nchw", weights, masks.sigmoid())


def load_own(make: Callable[[], nn.Module], state: Mapping[str, Tensor] | None, keys: Strictness) -> nn.Module:
    """Build a module of ours that takes the tensors of `state` for its own, or has random weights.

    Raises:
        HarnessError: keys do not fit.
    """
    if state is None:
        return make().eval()
    with torch.device("meta"):  # no memory, no time for random numbers
        module = make().eval()
    load_strictly(module, state, keys)
    if any(p.is_meta for p in module.parameters()) and not next(iter(state.values())).is_meta:
        module = make().eval()  # keys that may be missing stay random
        load_strictly(module, state, keys)
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_meta and not next(iter(state.values())).is_meta:
                part._buffers[name] = torch.zeros_like(buffer, device="cpu")  # counters of batches, in no file
    return module


def split(state: Mapping[str, Tensor] | None, prefix: str) -> tuple[dict[str, Tensor] | None, dict[str, Tensor] | None]:
    """Return the weights under a prefix, without it, and the others; None if there are none at all."""
    if state is None:
        return None, None
    under = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return under, {key: value for key, value in state.items() if not key.startswith(prefix)}


class Head(nn.Module):
    """Holds the two halves of a head while they are loaded."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.pixel_decoder = parts["pixel_decoder"]
        self.decoder = parts["decoder"]


def assemble(
    backbone: nn.Module,
    make_head: Callable[[], Mapping[str, nn.Module]],
    state: Mapping[str, Tensor] | None,
    keys: Strictness,
) -> MaskClassifier:
    """Put a loaded backbone and the head, with its weights in `state`, together."""
    head: Any = load_own(lambda: Head(make_head()), state, keys)
    return MaskClassifier(backbone, {"pixel_decoder": head.pixel_decoder, "decoder": head.decoder}).eval()
