"""The systems by name, and the public door to them: weights of the official code in, the published network out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ade_harness.errors import HarnessError, did_you_mean
from ade_harness.models.backbones.vit import Beit3Trunk
from ade_harness.models.checkpoint.family import Family, Keys
from ade_harness.models.heads.mask_classifier import SemanticScores
from ade_harness.models.systems.beit import BEIT
from ade_harness.models.systems.dinov2 import DINOV2
from ade_harness.models.systems.dinov3 import DINOV3
from ade_harness.models.systems.eomt import EOMT, EOMT_DINOV3
from ade_harness.models.systems.internimage import INTERNIMAGE
from ade_harness.models.systems.mask2former import MASK2FORMER_FAPN, MASK2FORMER_RESNET, MASK2FORMER_SWIN
from ade_harness.models.systems.maskformer import MASKFORMER
from ade_harness.models.systems.oneformer import ONEFORMER
from ade_harness.models.systems.segformer import SEGFORMER
from ade_harness.models.systems.siglip2 import SIGLIP2
from ade_harness.models.systems.upernet import CONVNEXT, SWIN
from ade_harness.models.systems.vit_adapter import (
    VIT_ADAPTER_BEIT,
    VIT_ADAPTER_BEIT3,
    VIT_ADAPTER_DINOV2,
    VIT_ADAPTER_DINOV3,
)

FAMILIES: dict[str, Family] = {
    "segformer": SEGFORMER,
    "upernet_swin": SWIN,
    "upernet_convnext": CONVNEXT,
    "beit": BEIT,
    "dinov2_linear": DINOV2,
    "dinov3_linear": DINOV3,
    "siglip2_linear": SIGLIP2,
    "mask2former_swin": MASK2FORMER_SWIN,
    "mask2former_resnet": MASK2FORMER_RESNET,
    "mask2former_fapn": MASK2FORMER_FAPN,
    "maskformer": MASKFORMER,
    "oneformer": ONEFORMER,
    "eomt": EOMT,
    "eomt_dinov3": EOMT_DINOV3,
    "internimage": INTERNIMAGE,
    "vit_adapter_beit": VIT_ADAPTER_BEIT,
    "vit_adapter_beit3": VIT_ADAPTER_BEIT3,
    "vit_adapter_dinov2": VIT_ADAPTER_DINOV2,
    "vit_adapter_dinov3": VIT_ADAPTER_DINOV3,
}
"""``model.kind`` -> family."""

SYSTEMS: dict[str, str] = {
    **{f"segformer_b{n}": "segformer" for n in range(6)},
    "upernet_swin_l": "upernet_swin",
    "upernet_convnext_xl": "upernet_convnext",
    "beit_l": "beit",
    "mae_b": "beit",
    "mae_l": "beit",
    "mae_h": "beit",
    "dinov2_g_linear": "dinov2_linear",
    "dinov2_g_ms": "dinov2_linear",
    "dinov3_7b_linear": "dinov3_linear",
    "siglip2_g": "siglip2_linear",
    "siglip2_so400m": "siglip2_linear",
    "mask2former_swin_l": "mask2former_swin",
    "mask2former_swin_t": "mask2former_swin",
    "mask2former_r50": "mask2former_resnet",
    "mask2former_swin_l_fapn": "mask2former_fapn",
    "maskformer_swin_t": "maskformer",
    "oneformer_swin_l": "oneformer",
    "eomt_l": "eomt",
    "eomt_dinov3_l": "eomt_dinov3",
    "internimage_h": "internimage",
    "vit_adapter_beitv2_l": "vit_adapter_beit",
    "beit3": "vit_adapter_beit3",
    "dinov2_g_mask2former": "vit_adapter_dinov2",
    "dinov3_7b_mask2former": "vit_adapter_dinov3",
}
"""Name in ``conf/model/`` -> family."""


def from_official(name: str, state_dict: Mapping[str, Any], **architecture: Any) -> nn.Module:
    """Build a system with weights in the names of its official code; the door for checks of parity.

    ::

        network = from_official("segformer_b0", torch.load("segformer.b0.512x512.ade.160k.pth")["state_dict"])
        logits = network(images)  # normalised images float32 [N, 3, H, W] -> [N, 150, h, w]

    The architecture is what the shapes of the weights say, so that reduced networks need no more than their
    state_dict. Pass fields to say what shapes do not: ``out_indices`` (BEiT, MAE: the blocks, from 0, that give the
    features; the published rule otherwise), ``num_attention_heads`` (DINOv2: 64 channels a head otherwise; SigLIP 2:
    16), or any other field of the library's configuration class.

    Args:
        name: of the system, as in ``conf/model/``: see ``SYSTEMS``.
        state_dict: tensors or arrays by name. Systems whose backbone and head are two files take both in one mapping,
            or ``{"backbone": {...}, "head": {...}}``. The names of mmsegmentation and of the hub are known too.
        architecture: fields that go before what shapes say.

    Returns:
        The network in evaluation mode, on the CPU, in float32. Its scores are those of the official head, at the head's
        resolution: bilinear enlargement to the image's size gives the official logits.

    Raises:
        HarnessError: an unknown name, keys that do not fit, another number of classes.
    """
    if name not in SYSTEMS:
        raise HarnessError(f"{name!r}: no such system.{did_you_mean(name, SYSTEMS)} Known: {', '.join(SYSTEMS)}.")
    state: dict[str, Any] = {}
    for key, value in state_dict.items():
        state |= value if isinstance(value, Mapping) else {key: value}
    with torch.inference_mode(False):  # parameters made in that mode could never leave it
        tensors = {key: _tensor(value) for key, value in state.items()}
        family = FAMILIES[SYSTEMS[name]]
        network = family.load(architecture, tensors, Keys(f"{name}'s state_dict"))
    if not family.void or isinstance(network, Beit3Trunk):  # BEiT-3's published files hold the encoder alone
        return network.eval()
    return SemanticScores(network, family.at_mask_size).eval()


def _tensor(value: Any) -> Tensor:
    tensor = torch.as_tensor(value)
    return tensor.clone() if tensor.is_inference() else tensor
