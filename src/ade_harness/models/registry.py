"""The systems by name, and the public door to them: weights of the official code in, the published network out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ade_harness.config.arguments import known_choices
from ade_harness.config.files import choices, read_choice
from ade_harness.config.kinds import KINDS, Gives, Kind
from ade_harness.errors import HarnessError
from ade_harness.models.backbones.vit import Beit3Trunk
from ade_harness.models.checkpoint.family import Family
from ade_harness.models.checkpoint.strict import Strictness
from ade_harness.models.heads.mask_classifier import SemanticScores


def imported(kind: Kind) -> Any:
    """Return the object behind a kind's line."""
    return named(kind.where)


def named(where: str) -> Any:
    """Return the object that ``module:NAME`` names."""
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)


def family_of(kind: str) -> Family:
    """Return the family of a ``model.kind`` that has one."""
    family: Family = imported(KINDS[kind])
    return family


@cache
def systems() -> dict[str, str]:
    """Return the published systems: their names in ``conf/model/``, and the ``kind`` that their files say."""
    kinds = {name: read_choice("model", name).get("kind", "") for name in choices("model")}
    return {name: kind for name, kind in kinds.items() if kind in KINDS and KINDS[kind].gives is Gives.family}


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
        name: of the system, as in ``conf/model/``: see :func:`systems`.
        state_dict: tensors or arrays by name. Systems whose backbone and head are two files take both in one mapping,
            or ``{"backbone": {...}, "head": {...}}``. The names of mmsegmentation and of the hub are known too.
        architecture: fields that take precedence over what shapes say.

    Returns:
        The network in evaluation mode, on the CPU, in float32. Its scores are those of the official head, at the head's
        resolution: bilinear enlargement to the image's size gives the official logits.

    Raises:
        HarnessError: an unknown name, keys that do not fit, another number of classes.
    """
    known = systems()
    if name not in known:
        raise HarnessError(f"{name!r}: no such system.{known_choices('model', name, [*known])}")
    state: dict[str, Any] = {}
    for key, value in state_dict.items():
        state |= value if isinstance(value, Mapping) else {key: value}
    with torch.inference_mode(False):  # parameters made in that mode could never leave it
        tensors = {key: _tensor(value) for key, value in state.items()}
        family = family_of(known[name])
        network = family.load(architecture, tensors, Strictness(f"{name}'s state_dict"))
    if not family.void or isinstance(network, Beit3Trunk):  # BEiT-3's published files hold the encoder alone
        return network.eval()
    return SemanticScores(network, family.at_mask_size).eval()


def _tensor(value: Any) -> Tensor:
    tensor = torch.as_tensor(value)
    return tensor.clone() if tensor.is_inference() else tensor
