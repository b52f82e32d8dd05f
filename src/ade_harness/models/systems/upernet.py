"""UperNet (Xiao et al. 2018) on Swin and ConvNeXt: transformers' classes, which compute what the official code does.

Official code: SwinTransformer/Swin-Transformer-Semantic-Segmentation @ 87e6f90 and open-mmlab/mmsegmentation (Swin),
facebookresearch/ConvNeXt @ 048efce (ConvNeXt). transformers' own ``forward`` also runs the auxiliary head of training
and enlarges all 150 planes to the input's size; here the head's scores at stride 4 are the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ade_harness.models.backbones.pyramid import STAGES
from ade_harness.models.backbones.swin import SWIN_BACKBONE, SWIN_BLOCK
from ade_harness.models.checkpoint.family import Family, count, load_hub_names
from ade_harness.models.checkpoint.key_tables import Table
from ade_harness.models.checkpoint.strict import Strictness

UPERNET_HEAD: Table = (
    ("decode_head.conv_seg.*", "decode_head.classifier.*"),
    ("decode_head.psp_modules.{N}.1.conv.*", "decode_head.psp_modules.{N}.1.conv.*"),
    ("decode_head.psp_modules.{N}.1.bn.*", "decode_head.psp_modules.{N}.1.batch_norm.*"),
    ("decode_head.bottleneck.conv.*", "decode_head.bottleneck.conv.*"),
    ("decode_head.bottleneck.bn.*", "decode_head.bottleneck.batch_norm.*"),
    ("decode_head.lateral_convs.{N}.conv.*", "decode_head.lateral_convs.{N}.conv.*"),
    ("decode_head.lateral_convs.{N}.bn.*", "decode_head.lateral_convs.{N}.batch_norm.*"),
    ("decode_head.fpn_convs.{N}.conv.*", "decode_head.fpn_convs.{N}.conv.*"),
    ("decode_head.fpn_convs.{N}.bn.*", "decode_head.fpn_convs.{N}.batch_norm.*"),
    ("decode_head.fpn_bottleneck.conv.*", "decode_head.fpn_bottleneck.conv.*"),
    ("decode_head.fpn_bottleneck.bn.*", "decode_head.fpn_bottleneck.batch_norm.*"),
    ("auxiliary_head.*", None),  # of training only
)


SWIN_OFFICIAL: Table = (*SWIN_BACKBONE, *UPERNET_HEAD)


def unfold_to_blocks(weight: Tensor) -> Tensor:
    """Reorder what patch merging reads.

    mmsegmentation from 0.20 on unfolds 2 x 2 neighbours channel by channel (channel, row, column); the official code
    and transformers put four blocks of channels after each other, in the order (0, 0), (1, 0), (0, 1), (1, 1).

    Args:
        weight: [..., 4 C], of the reduction or of the norm before it.
    """
    by_channel = weight.reshape(*weight.shape[:-1], weight.shape[-1] // 4, 4)[..., [0, 2, 1, 3]]
    return by_channel.transpose(-1, -2).reshape(weight.shape)


SWIN_MMSEG: Table = (
    ("backbone.patch_embed.projection.*", "backbone.embeddings.patch_embeddings.projection.*"),
    ("backbone.patch_embed.norm.*", "backbone.embeddings.norm.*"),
    ("backbone.stages.{S}.blocks.{B}.norm1.*", SWIN_BLOCK + "layernorm_before.*"),
    ("backbone.stages.{S}.blocks.{B}.attn.w_msa.qkv.*", SWIN_BLOCK + "attention.self.{query|key|value}.*"),
    ("backbone.stages.{S}.blocks.{B}.attn.w_msa.proj.*", SWIN_BLOCK + "attention.output.dense.*"),
    (
        "backbone.stages.{S}.blocks.{B}.attn.w_msa.relative_position_bias_table",
        SWIN_BLOCK + "attention.self.relative_position_bias_table",
    ),
    ("backbone.stages.{S}.blocks.{B}.attn.w_msa.relative_position_index", None),
    ("backbone.stages.{S}.blocks.{B}.norm2.*", SWIN_BLOCK + "layernorm_after.*"),
    ("backbone.stages.{S}.blocks.{B}.ffn.layers.0.0.*", SWIN_BLOCK + "intermediate.dense.*"),
    ("backbone.stages.{S}.blocks.{B}.ffn.layers.1.*", SWIN_BLOCK + "output.dense.*"),
    ("backbone.stages.{S}.downsample.*", "backbone.encoder.layers.{S}.downsample.*", unfold_to_blocks),
    ("backbone.norm{S}.*", "backbone.hidden_states_norms.stage{S+1}.*"),
    *UPERNET_HEAD,
)

_LAYER = "backbone.encoder.stages.{S}.layers.{B}."

CONVNEXT_OFFICIAL: Table = (
    ("backbone.downsample_layers.0.0.*", "backbone.embeddings.patch_embeddings.*"),
    ("backbone.downsample_layers.0.1.*", "backbone.embeddings.layernorm.*"),
    ("backbone.downsample_layers.{S}.{N}.*", "backbone.encoder.stages.{S}.downsampling_layer.{N}.*"),
    ("backbone.stages.{S}.{B}.dwconv.*", _LAYER + "dwconv.*"),
    ("backbone.stages.{S}.{B}.norm.*", _LAYER + "layernorm.*"),
    ("backbone.stages.{S}.{B}.pwconv1.*", _LAYER + "pwconv1.*"),
    ("backbone.stages.{S}.{B}.pwconv2.*", _LAYER + "pwconv2.*"),
    ("backbone.stages.{S}.{B}.gamma", _LAYER + "layer_scale_parameter"),
    ("backbone.norm{S}.*", "backbone.hidden_states_norms.stage{S+1}.*"),
    *UPERNET_HEAD,
)

CONVNEXT_MMSEG: Table = (
    ("backbone.stages.{S}.{B}.depthwise_conv.*", _LAYER + "dwconv.*"),
    ("backbone.stages.{S}.{B}.pointwise_conv1.*", _LAYER + "pwconv1.*"),
    ("backbone.stages.{S}.{B}.pointwise_conv2.*", _LAYER + "pwconv2.*"),
    *CONVNEXT_OFFICIAL,
)


class UperNet(nn.Module):
    """Normalised images float32 [N, 3, H, W] to logits [N, 150, H/4, W/4] (Swin rounds sizes up, ConvNeXt down)."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [N, 150, h, w]."""
        features = self.network.backbone(images).feature_maps
        logits: Tensor = self.network.decode_head(features)
        return logits


def _upernet(backbone: Any, fields: Mapping[str, Any], state: Mapping[str, Tensor] | None, keys: Strictness) -> UperNet:
    from transformers import UperNetConfig, UperNetForSemanticSegmentation

    config = UperNetConfig(
        backbone_config=backbone,
        hidden_size=fields["channels"],
        num_labels=fields["num_labels"],
        use_auxiliary_head=False,
    )
    return UperNet(load_hub_names(UperNetForSemanticSegmentation, config, state, keys))


def _backbone_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in ("channels", "num_labels")}


def _build_swin(architecture: dict[str, Any], state: Mapping[str, Tensor] | None, keys: Strictness) -> nn.Module:
    from transformers import SwinConfig

    backbone = SwinConfig(out_features=STAGES, **_backbone_fields(architecture))
    module = _upernet(backbone, architecture, state, keys)
    module.network.backbone.set_attn_implementation("sdpa")  # UperNet's own class leaves its backbone at eager
    body = getattr(module.network.backbone, "swin", None)
    if body is not None:
        body.layernorm = nn.Identity()  # transformers' own, after the last stage: no file has it, nothing reads it
    return module


def _read_swin(state: Mapping[str, Tensor]) -> dict[str, Any]:
    depths = [count(state, f"backbone.encoder.layers.{s}.blocks.{{N}}.") for s in range(4)]
    table = "backbone.encoder.layers.{}.blocks.0.attention.self.relative_position_bias_table"
    return {
        "embed_dim": state["backbone.embeddings.patch_embeddings.projection.weight"].shape[0],
        "depths": depths,
        "num_heads": [state[table.format(s)].shape[1] for s in range(4)],
        "window_size": (math.isqrt(state[table.format(0)].shape[0]) + 1) // 2,
        "channels": state["decode_head.classifier.weight"].shape[1],
    }


def _build_convnext(architecture: dict[str, Any], state: Mapping[str, Tensor] | None, keys: Strictness) -> nn.Module:
    from transformers import ConvNextConfig

    backbone = ConvNextConfig(out_features=STAGES, **_backbone_fields(architecture))
    return _upernet(backbone, architecture, state, keys)


def _read_convnext(state: Mapping[str, Tensor]) -> dict[str, Any]:
    stages = [f"backbone.encoder.stages.{s}.layers." for s in range(4)]
    return {
        "depths": [count(state, stage + "{N}.") for stage in stages],
        "hidden_sizes": [state[stage + "0.dwconv.weight"].shape[0] for stage in stages],
        "channels": state["decode_head.classifier.weight"].shape[1],
    }


SWIN = Family(
    layouts={"official": SWIN_OFFICIAL, "mmsegmentation": SWIN_MMSEG},
    unused=("auxiliary_head.*", "*.relative_position_index"),
    read=_read_swin,
    build=_build_swin,
    config="SwinConfig",
    head_fields=("channels",),
)
CONVNEXT = Family(
    layouts={"official": CONVNEXT_OFFICIAL, "mmsegmentation": CONVNEXT_MMSEG},
    unused=("auxiliary_head.*",),
    read=_read_convnext,
    build=_build_convnext,
    config="ConvNextConfig",
    head_fields=("channels",),
)
