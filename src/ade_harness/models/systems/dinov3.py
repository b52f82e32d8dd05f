"""DINOv3 with a linear head: transformers' backbone, which computes what the official code does, and our head.

Official code: facebookresearch/dinov3 @ 6876159, dinov3/eval/segmentation. The head of the published 55.9 was never
released; its training code and configuration were (``python -m ade_harness probe``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ade_harness.models.checkpoint.family import Family, count
from ade_harness.models.checkpoint.key_tables import Table
from ade_harness.models.checkpoint.strict import Strictness
from ade_harness.models.heads.linear import LINEAR_HEAD, LinearSegmenter
from ade_harness.models.systems.dinov2 import segmenter

PERIODS = "rope_embed.periods"
_BLOCK = "layer.{B}."


def first_and_last(bias: Tensor) -> Tensor:
    """Return the query's and the value's part of a bias [3 C]: the official code masks the keys' to zero."""
    width = bias.shape[0] // 3
    return bias[[*range(width), *range(2 * width, 3 * width)]]


_BACKBONE: Table = (
    ("cls_token", "embeddings.cls_token"),
    ("storage_tokens", "embeddings.register_tokens"),
    ("mask_token", "embeddings.mask_token", lambda token: token.reshape(1, 1, -1)),
    ("patch_embed.proj.*", "embeddings.patch_embeddings.*"),
    (PERIODS, PERIODS),
    ("blocks.{B}.norm1.*", _BLOCK + "norm1.*"),
    ("blocks.{B}.attn.qkv.weight", _BLOCK + "attention.{q_proj|k_proj|v_proj}.weight"),
    ("blocks.{B}.attn.qkv.bias", _BLOCK + "attention.{q_proj|v_proj}.bias", first_and_last),
    ("blocks.{B}.attn.qkv.bias_mask", None),
    ("blocks.{B}.attn.proj.*", _BLOCK + "attention.o_proj.*"),
    ("blocks.{B}.ls1.gamma", _BLOCK + "layer_scale1.lambda1"),
    ("blocks.{B}.norm2.*", _BLOCK + "norm2.*"),
    ("blocks.{B}.mlp.w1.*", _BLOCK + "mlp.gate_proj.*"),
    ("blocks.{B}.mlp.w2.*", _BLOCK + "mlp.up_proj.*"),
    ("blocks.{B}.mlp.w3.*", _BLOCK + "mlp.down_proj.*"),
    ("blocks.{B}.mlp.fc1.*", _BLOCK + "mlp.up_proj.*"),
    ("blocks.{B}.mlp.fc2.*", _BLOCK + "mlp.down_proj.*"),
    ("blocks.{B}.ls2.gamma", _BLOCK + "layer_scale2.lambda1"),
    ("norm.*", "norm.*"),
    ("local_cls_norm.*", None),  # of training only
)
DINOV3_OFFICIAL: Table = (
    *_BACKBONE,
    *(("segmentation_model.0.feature_model." + row[0], *row[1:]) for row in _BACKBONE),
    *LINEAR_HEAD,
)
DINOV3_HUB: Table = (
    ("embeddings.*", "embeddings.*"),
    ("layer.*", "layer.*"),
    ("model.layer.*", "layer.*"),
    ("norm.*", "norm.*"),
    *LINEAR_HEAD,
)
DINOV3_TIMM: Table = (
    ("cls_token", "embeddings.cls_token"),
    ("reg_token", "embeddings.register_tokens"),
    ("patch_embed.proj.*", "embeddings.patch_embeddings.*"),
    ("blocks.{B}.norm1.*", _BLOCK + "norm1.*"),
    ("blocks.{B}.attn.qkv.weight", _BLOCK + "attention.{q_proj|k_proj|v_proj}.weight"),
    ("blocks.{B}.attn.q_bias", _BLOCK + "attention.q_proj.bias"),
    ("blocks.{B}.attn.v_bias", _BLOCK + "attention.v_proj.bias"),
    ("blocks.{B}.attn.proj.*", _BLOCK + "attention.o_proj.*"),
    ("blocks.{B}.gamma_1", _BLOCK + "layer_scale1.lambda1"),
    ("blocks.{B}.norm2.*", _BLOCK + "norm2.*"),
    ("blocks.{B}.mlp.fc1_g.*", _BLOCK + "mlp.gate_proj.*"),
    ("blocks.{B}.mlp.fc1_x.*", _BLOCK + "mlp.up_proj.*"),
    ("blocks.{B}.mlp.fc1.*", _BLOCK + "mlp.up_proj.*"),
    ("blocks.{B}.mlp.fc2.*", _BLOCK + "mlp.down_proj.*"),
    ("blocks.{B}.gamma_2", _BLOCK + "layer_scale2.lambda1"),
    ("norm.*", "norm.*"),
    ("embeddings.mask_token", "embeddings.mask_token"),
    *LINEAR_HEAD,
)
"""timm's names (timm/models/eva.py, 1.0.31), under which the weights are on the hub without a registration.

timm leaves out the biases of query, key and value where the official ones are zeros (the 7B's), the mask token, and the
periods of the rotary positions.
"""
MASK_TOKEN = "embeddings.mask_token"
"""A weight of pre-training alone, which transformers' class has."""


def with_mask_token(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the mask token that timm's files lack to a state_dict in its names: it takes no part in a forward."""
    if "reg_token" not in state or "blocks.0.gamma_1" not in state or MASK_TOKEN in state:
        return dict(state)
    return {**state, MASK_TOKEN: torch.zeros_like(state["cls_token"])}


class Dinov3Features(nn.Module):
    """Images [N, 3, H, W] to the last block's normed patch tokens, one map [N, C, h, w] at one patch per pixel."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        config: Any = network.config
        self.patch_size: int = config.patch_size
        self.channels: int = config.hidden_size
        self._prefix: int = 1 + config.num_register_tokens

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the only map in a list."""
        height, width = (side // self.patch_size for side in images.shape[-2:])
        tokens: Tensor = self.network(images).last_hidden_state[:, self._prefix :]
        return [tokens.transpose(1, 2).reshape(images.shape[0], -1, height, width)]


def dinov3_config(architecture: Mapping[str, Any]) -> Any:
    """Return transformers' configuration with what all published models have in common."""
    from transformers import DINOv3ViTConfig

    return DINOv3ViTConfig(layer_norm_eps=1e-5, rope_theta=100.0, **architecture)


def _periods(width: int) -> Tensor:
    """Return the periods of a head of `width` channels, float32 [width / 4]."""
    return 100.0 ** (2 * torch.arange(width // 4, dtype=torch.float32) / (width // 2))


def with_periods(hub: Mapping[str, Tensor], architecture: Mapping[str, Any], trunk: str = "") -> dict[str, Tensor]:
    """Add the periods that the hub's and timm's files lack, rounded to bfloat16 as the published files have them.

    Args:
        hub: published weights in the hub's names.
        architecture: what is given of it; its number of heads takes precedence over what the width says.
        trunk: what the backbone's names begin with.
    """
    if trunk + PERIODS in hub or not any(key.startswith(f"{trunk}layer.0.") for key in hub):
        return dict(hub)
    read = read_dinov3({k.removeprefix(trunk): v for k, v in hub.items()})
    heads = architecture.get("num_attention_heads", read["num_attention_heads"])
    width = hub[f"{trunk}embeddings.patch_embeddings.weight"].shape[0] // heads
    return {**hub, trunk + PERIODS: _periods(width).bfloat16().float()}


class RotaryPositions(nn.Module):
    """Rotary positions in the official order of operations, with the periods of an official file if there are any.

    Those are rounded to bfloat16 in the published files (see :func:`with_periods`); transformers computes them anew,
    and multiplies by their inverse.

    Args:
        config: transformers' configuration.
        periods: float [head width / 4]; None computes them.
    """

    periods: Tensor

    def __init__(self, config: Any, periods: Tensor | None) -> None:
        super().__init__()
        self.patch_size: int = config.patch_size
        if periods is None or periods.is_meta or not bool(periods.any()):
            periods = _periods(config.hidden_size // config.num_attention_heads)
        self.register_buffer("periods", periods.float(), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [h * w, head width] of images [N, 3, H, W]."""
        places = []
        for size in (images.shape[2] // self.patch_size, images.shape[3] // self.patch_size):
            places.append(torch.arange(0.5, size, device=images.device, dtype=torch.float32) / size)
        grid = torch.stack(torch.meshgrid(*places, indexing="ij"), -1).flatten(0, 1)
        angles = 2 * math.pi * (2.0 * grid - 1.0)[:, :, None] / self.periods
        angles = angles.flatten(1, 2).tile(2)
        return angles.cos().to(images.dtype), angles.sin().to(images.dtype)


def _build(architecture: dict[str, Any], state: Mapping[str, Tensor] | None, keys: Strictness) -> LinearSegmenter:
    from transformers import DINOv3ViTModel

    weights = None if state is None else {k: v for k, v in state.items() if k != PERIODS}
    whole = segmenter(DINOv3ViTModel, dinov3_config(architecture), Dinov3Features, weights, keys, pad=False)
    network: Any = whole.backbone.network
    network.rope_embeddings = RotaryPositions(network.config, None if state is None else state.get(PERIODS))
    return whole


def read_dinov3(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the architecture of a DINOv3 in the hub's names."""
    projection = state["embeddings.patch_embeddings.weight"]
    gated = "layer.0.mlp.gate_proj.weight" in state
    bias = "layer.0.attention.q_proj.bias" in state
    periods = state.get(PERIODS)  # a quarter of a head's width; the hub's files have none
    head = 4 * len(periods) if periods is not None else (128 if projection.shape[0] >= 4096 else 64)
    return {
        "hidden_size": projection.shape[0],
        "patch_size": projection.shape[-1],
        "num_hidden_layers": count(state, "layer.{N}."),
        "num_attention_heads": projection.shape[0] // head,
        "num_register_tokens": state["embeddings.register_tokens"].shape[1],
        "intermediate_size": state["layer.0.mlp.up_proj.weight"].shape[0],
        "use_gated_mlp": gated,
        "hidden_act": "silu" if gated else "gelu",
        "query_bias": bias,
        "key_bias": False,
        "value_bias": bias,
    }


DINOV3 = Family(
    layouts={"official": DINOV3_OFFICIAL, "hub": DINOV3_HUB, "timm": DINOV3_TIMM},
    prepare=with_mask_token,
    published=with_periods,
    read=read_dinov3,
    build=_build,
    config="DINOv3ViTConfig",
    classifier="head.classifier.weight",
    head=("head.",),
)
