"""DINOv2 with its linear and multi-scale ("ms") heads: transformers' backbone, made equal to the official code.

Official code: facebookresearch/dinov2 @ b8931f7. transformers resamples position embeddings to the wanted size; the
official code by a factor of (n + 0.1) / 37, without antialiasing, which changes features by about a quarter of their
range where the grid is not 37 x 37. A window of 512 is padded to 518 = 37 patches, so the linear protocol never
resamples; the windows of 640 of the ms protocol always do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ade_harness.models.checkpoint.family import Family, count, load_hub_names
from ade_harness.models.checkpoint.key_tables import Table
from ade_harness.models.checkpoint.strict import Strictness, load_strictly
from ade_harness.models.heads.linear import LINEAR_HEAD, LinearSegmenter

_BLOCK = "encoder.layer.{B}."

DINOV2_OFFICIAL: Table = (
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("mask_token", "embeddings.mask_token"),
    ("patch_embed.proj.*", "embeddings.patch_embeddings.projection.*"),
    ("blocks.{B}.norm1.*", _BLOCK + "norm1.*"),
    ("blocks.{B}.attn.qkv.*", _BLOCK + "attention.attention.{query|key|value}.*"),
    ("blocks.{B}.attn.proj.*", _BLOCK + "attention.output.dense.*"),
    ("blocks.{B}.ls1.gamma", _BLOCK + "layer_scale1.lambda1"),
    ("blocks.{B}.norm2.*", _BLOCK + "norm2.*"),
    ("blocks.{B}.mlp.fc1.*", _BLOCK + "mlp.fc1.*"),
    ("blocks.{B}.mlp.fc2.*", _BLOCK + "mlp.fc2.*"),
    ("blocks.{B}.mlp.w12.*", _BLOCK + "mlp.weights_in.*"),
    ("blocks.{B}.mlp.w3.*", _BLOCK + "mlp.weights_out.*"),
    ("blocks.{B}.ls2.gamma", _BLOCK + "layer_scale2.lambda1"),
    ("norm.*", "layernorm.*"),
    *LINEAR_HEAD,
)

DINOV2_HUB: Table = (
    ("embeddings.*", "embeddings.*"),
    ("encoder.*", "encoder.*"),
    ("layernorm.*", "layernorm.*"),
    *LINEAR_HEAD,
)


def official_positions(positions: Tensor, height: int, width: int) -> Tensor:
    """Return position embeddings [1, 1 + height * width, C] for a grid, resampled as the official code does.

    Args:
        positions: [1, 1 + n * n, C], the class token's first.
        height: of the grid, in patches.
        width: likewise.
    """
    side = math.isqrt(positions.shape[1] - 1)
    if (height, width) == (side, side):
        return positions
    grid = positions[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    factors = ((height + 0.1) / side, (width + 0.1) / side)  # the offset is official: it decides where samples lie
    grid = F.interpolate(grid, scale_factor=factors, mode="bicubic")
    patches = grid.permute(0, 2, 3, 1).reshape(1, height * width, -1).to(positions.dtype)
    return torch.cat([positions[:, :1], patches], 1)


class Dinov2Features(nn.Module):
    """Images [N, 3, H, W], sides multiples of the patch, to the normed patch tokens of blocks, [N, C, h, w] each."""

    def __init__(self, network: nn.Module, maps: int) -> None:
        super().__init__()
        self.network = network
        config: Any = network.config
        self.patch_size: int = config.patch_size
        self.channels: int = config.hidden_size * maps
        embeddings: Any = network.embeddings
        embeddings.interpolate_pos_encoding = lambda tokens, height, width: official_positions(
            embeddings.position_embeddings, height // config.patch_size, width // config.patch_size
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return one map per block, the last block's last."""
        return list(self.network(images).feature_maps)


def _build(architecture: dict[str, Any], state: Mapping[str, Tensor] | None, keys: Strictness) -> LinearSegmenter:
    from transformers import Dinov2Backbone, Dinov2Config

    fields = dict(architecture)
    maps = int(fields.pop("maps", 1))
    depth = fields["num_hidden_layers"]
    config = Dinov2Config(
        out_indices=list(range(depth - maps + 1, depth + 1)),  # 0 is the patch embedding
        apply_layernorm=True,
        reshape_hidden_states=True,
        layer_norm_eps=1e-6,
        **fields,
    )
    return segmenter(Dinov2Backbone, config, lambda n: Dinov2Features(n, maps), state, keys, pad=True)


def segmenter(
    cls: Any, config: Any, wrap: Any, state: Mapping[str, Tensor] | None, keys: Strictness, *, pad: bool
) -> LinearSegmenter:
    """Build a transformers backbone and its linear head, each with its part of `state`.

    Names of the head begin with ``head.``; the number of classes is the configuration's ``num_labels``.
    """
    parts = split_head(state)
    network = load_hub_names(cls, config, parts[0], keys)
    whole = LinearSegmenter(wrap(network), pad, config.num_labels)
    if parts[1] or (state is not None and not keys.headless):
        load_strictly(whole.head, parts[1], keys)
    return whole


def split_head(
    state: Mapping[str, Tensor] | None,
) -> tuple[dict[str, Tensor] | None, dict[str, Tensor]]:
    """Return the backbone's weights (None if there are none at all) and the head's, without their prefix."""
    if state is None:
        return None, {}
    head = {k.removeprefix("head."): v for k, v in state.items() if k.startswith("head.")}
    return {k: v for k, v in state.items() if not k.startswith("head.")}, head


def _read(state: Mapping[str, Tensor]) -> dict[str, Any]:
    projection = state["embeddings.patch_embeddings.projection.weight"]
    width = projection.shape[0]
    swiglu = "encoder.layer.0.mlp.weights_in.weight" in state
    found = {
        "hidden_size": width,
        "patch_size": projection.shape[-1],
        "num_hidden_layers": count(state, "encoder.layer.{N}."),
        "num_attention_heads": width // 64,
        "image_size": math.isqrt(state["embeddings.position_embeddings"].shape[1] - 1) * projection.shape[-1],
        "use_swiglu_ffn": swiglu,
    }
    if not swiglu:
        found["mlp_ratio"] = state["encoder.layer.0.mlp.fc1.weight"].shape[0] // width
    if "head.norm.weight" in state:
        found["maps"] = state["head.norm.weight"].shape[0] // width
    return found


DINOV2 = Family(
    layouts={"official": DINOV2_OFFICIAL, "hub": DINOV2_HUB},
    read=_read,
    build=_build,
    config="Dinov2Config",
    head_fields=("maps",),
    classifier="head.classifier.weight",
    head=("head.",),
)
