"""Swin (Liu et al. 2021), from transformers: what masks' and UPerNet's systems share of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ade_harness.models.backbones.pyramid import STAGES, Pyramid
from ade_harness.models.checkpoint.family import count, load_hub_names
from ade_harness.models.checkpoint.key_tables import Table
from ade_harness.models.checkpoint.strict import Strictness
from ade_harness.models.ops.attention import register_with_transformers

SWIN_FIELDS = ("embed_dim", "depths", "num_heads", "window_size")


def build_swin(fields: Mapping[str, Any], state: Mapping[str, Tensor] | None, keys: Strictness) -> Pyramid:
    """Build transformers' Swin; `state` in the hub's names."""
    from transformers import SwinBackbone, SwinConfig

    config = SwinConfig(out_features=STAGES, **{name: fields[name] for name in SWIN_FIELDS})
    network: Any = load_hub_names(SwinBackbone, config, state, keys)
    network.set_attn_implementation(register_with_transformers())
    body = getattr(network, "swin", None)
    if body is not None:
        body.layernorm = nn.Identity()  # transformers' own, after the last stage: no file has it, nothing reads it
    return Pyramid(network)


def read_swin(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the architecture of a Swin whose names begin with ``backbone.``."""
    table = "backbone.encoder.layers.{}.blocks.0.attention.self.relative_position_bias_table"
    return {
        "embed_dim": state["backbone.embeddings.patch_embeddings.projection.weight"].shape[0],
        "depths": [count(state, f"backbone.encoder.layers.{s}.blocks.{{N}}.") for s in range(4)],
        "num_heads": [state[table.format(s)].shape[1] for s in range(4)],
        "window_size": (math.isqrt(state[table.format(0)].shape[0]) + 1) // 2,
    }


def swin_channels(fields: Mapping[str, Any]) -> Sequence[int]:
    """Return the channels of the four features."""
    return [fields["embed_dim"] * 2**stage for stage in range(4)]


SWIN_BLOCK = "backbone.encoder.layers.{S}.blocks.{B}."
SWIN_BACKBONE: Table = (
    ("backbone.patch_embed.proj.*", "backbone.embeddings.patch_embeddings.projection.*"),
    ("backbone.patch_embed.norm.*", "backbone.embeddings.norm.*"),
    ("backbone.layers.{S}.blocks.{B}.norm1.*", SWIN_BLOCK + "layernorm_before.*"),
    ("backbone.layers.{S}.blocks.{B}.attn.qkv.*", SWIN_BLOCK + "attention.self.{query|key|value}.*"),
    ("backbone.layers.{S}.blocks.{B}.attn.proj.*", SWIN_BLOCK + "attention.output.dense.*"),
    (
        "backbone.layers.{S}.blocks.{B}.attn.relative_position_bias_table",
        SWIN_BLOCK + "attention.self.relative_position_bias_table",
    ),
    ("backbone.layers.{S}.blocks.{B}.attn.relative_position_index", None),
    ("backbone.layers.{S}.blocks.{B}.norm2.*", SWIN_BLOCK + "layernorm_after.*"),
    ("backbone.layers.{S}.blocks.{B}.mlp.fc1.*", SWIN_BLOCK + "intermediate.dense.*"),
    ("backbone.layers.{S}.blocks.{B}.mlp.fc2.*", SWIN_BLOCK + "output.dense.*"),
    ("backbone.layers.{S}.downsample.*", "backbone.encoder.layers.{S}.downsample.*"),
    ("backbone.norm{S}.*", "backbone.hidden_states_norms.stage{S+1}.*"),
)
