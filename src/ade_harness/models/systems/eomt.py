"""EoMT (Kerssies et al. 2025): queries join a plain ViT's tokens before its last blocks; on DINOv2 and on DINOv3.

Official code: tue-mps/eomt @ 7bd19dd, evaluated with ``masked_attn_enabled False``. transformers' classes compute the
same once their ``attn_mask_probs`` is 0; it is 1 by default, which masks attention as in training (class logits then
differ by 0.11, mask logits by 0.36 with random weights). The norms of DINOv3 have eps 1e-5, as its own configuration
says; transformers' default for EoMT on DINOv3 is 1e-6.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ade_harness.errors import HarnessError
from ade_harness.models.checkpoint.family import Family, count, load_hub_names
from ade_harness.models.checkpoint.key_tables import Table
from ade_harness.models.checkpoint.strict import Strictness
from ade_harness.models.formats.transformers import without_attention_masks
from ade_harness.models.outputs import MaskLogits

_BODY = "network.encoder.backbone."
_HEAD: Table = (
    ("network.attn_mask_probs", None),
    ("network.encoder.pixel_mean", None),  # images come normalised
    ("network.encoder.pixel_std", None),
    (_BODY + "norm.*", "layernorm.*"),
    ("network.q.weight", "query.weight"),
    ("network.class_head.*", "class_predictor.*"),
    ("network.mask_head.0.*", "mask_head.fc1.*"),
    ("network.mask_head.2.*", "mask_head.fc2.*"),
    ("network.mask_head.4.*", "mask_head.fc3.*"),
    ("network.upscale.{I}.norm.*", "upscale_block.block.{I}.layernorm2d.*"),
    ("network.upscale.{I}.conv{N}.*", "upscale_block.block.{I}.conv{N}.*"),
    ("criterion.*", None),  # of training only
)
OFFICIAL: Table = (
    (_BODY + "cls_token", "embeddings.cls_token"),
    (_BODY + "reg_token", "embeddings.register_tokens"),
    (_BODY + "pos_embed", "embeddings.position_embeddings.weight", lambda positions: positions[0]),
    (_BODY + "patch_embed.proj.*", "embeddings.patch_embeddings.projection.*"),
    (_BODY + "blocks.{B}.norm{N}.*", "layers.{B}.norm{N}.*"),
    (_BODY + "blocks.{B}.attn.qkv.*", "layers.{B}.attention.{q_proj|k_proj|v_proj}.*"),
    (_BODY + "blocks.{B}.attn.proj.*", "layers.{B}.attention.out_proj.*"),
    (_BODY + "blocks.{B}.ls{N}.gamma", "layers.{B}.layer_scale{N}.lambda1"),
    (_BODY + "blocks.{B}.mlp.*", "layers.{B}.mlp.*"),
    *_HEAD,
)
OFFICIAL_DINOV3: Table = (
    (_BODY + "patch_embed.*", "embeddings.*"),
    (_BODY + "blocks.*", "layers.*"),
    *_HEAD,
)
HUB_NAMES: Table = tuple(
    (name, name)
    for name in (
        "embeddings.*", "layers.*", "layernorm.*", "query.weight", "class_predictor.*", "mask_head.*",
        "upscale_block.*", "attn_mask_probs", "criterion.*",
    )
)  # fmt: skip
DINOV3_BACKBONE: Table = (
    ("embeddings.mask_token", None),
    ("embeddings.*", "embeddings.*"),
    ("layer.*", "layers.*"),
    ("model.layer.*", "layers.*"),
    ("norm.*", "layernorm.*"),
)
"""From the names of the backbone's own file at the hub."""


class Eomt(nn.Module):
    """Normalised images float32 [N, 3, S, S] to class and mask logits.

    Args:
        network: transformers' EomtForUniversalSegmentation or EomtDinov3ForUniversalSegmentation.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        without_attention_masks(self.network)
        self.fixed_size: tuple[int, int] = (network.config.image_size, network.config.image_size)
        """(height, width) of the only input it takes."""

    def forward(self, images: Tensor) -> MaskLogits:
        """Return class logits [N, Q, 151] and mask logits [N, Q, S/4, S/4]."""
        if tuple(images.shape[-2:]) != self.fixed_size:
            height, width = images.shape[-2:]
            raise HarnessError(
                f"an input of {height} x {width}: this network is for {self.fixed_size[0]} x {self.fixed_size[1]}."
                f" Use a protocol with windows of that size, such as inference=eomt_512."
            )
        output = self.network(pixel_values=images)
        return MaskLogits(output.class_queries_logits, output.masks_queries_logits)


_CONSTANTS = ("attn_mask_probs", "criterion.*", "embeddings.position_ids", "rope_embeddings.*")


def _network(cls: Any, config: Any, state: Mapping[str, Tensor] | None, keys: Strictness) -> Eomt:
    missing, unexpected = (*keys.allow_missing, *_CONSTANTS), (*keys.allow_unexpected, *_CONSTANTS)
    keys = replace(keys, allow_missing=missing, allow_unexpected=unexpected)
    return Eomt(load_hub_names(cls, config, state, keys)).eval()


def _build(fields: dict[str, Any], state: Mapping[str, Tensor] | None, keys: Strictness) -> nn.Module:
    from transformers import EomtConfig, EomtForUniversalSegmentation

    return _network(EomtForUniversalSegmentation, EomtConfig(**fields), state, keys)


def _build_dinov3(fields: dict[str, Any], state: Mapping[str, Tensor] | None, keys: Strictness) -> nn.Module:
    from transformers import EomtDinov3Config, EomtDinov3ForUniversalSegmentation

    config = EomtDinov3Config(layer_norm_eps=1e-5, **fields)
    return _network(EomtDinov3ForUniversalSegmentation, config, state, keys)


def _read_head(state: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        "num_hidden_layers": count(state, "layers.{N}."),
        "num_register_tokens": state["embeddings.register_tokens"].shape[1],
        "num_queries": state["query.weight"].shape[0],
        "num_upscale_blocks": count(state, "upscale_block.block.{N}."),
    }


def _read(state: Mapping[str, Tensor]) -> dict[str, Any]:
    projection = state["embeddings.patch_embeddings.projection.weight"]
    side = math.isqrt(state["embeddings.position_embeddings.weight"].shape[0])
    return {
        **_read_head(state),
        "hidden_size": projection.shape[0],
        "patch_size": projection.shape[-1],
        "image_size": side * projection.shape[-1],
        "num_attention_heads": projection.shape[0] // 64,
        "mlp_ratio": state["layers.0.mlp.fc1.weight"].shape[0] // projection.shape[0],
    }


def _read_dinov3(state: Mapping[str, Tensor]) -> dict[str, Any]:
    projection = state["embeddings.patch_embeddings.weight"]
    return {
        **_read_head(state),
        "hidden_size": projection.shape[0],
        "patch_size": projection.shape[-1],
        "num_attention_heads": projection.shape[0] // 64,
        "intermediate_size": state["layers.0.mlp.up_proj.weight"].shape[0],
        "use_gated_mlp": "layers.0.mlp.gate_proj.weight" in state,
    }


_HEAD_FIELDS = ("num_queries", "num_blocks", "num_upscale_blocks")

EOMT = Family(
    layouts={"official": OFFICIAL, "hub": HUB_NAMES},
    unused=("attn_mask_probs", "criterion.*"),
    read=_read,
    build=_build,
    config="EomtConfig",
    head_fields=_HEAD_FIELDS,
    defaults={"num_blocks": 4},
    classifier="class_predictor.weight",
    void=True,
)
EOMT_DINOV3 = Family(
    layouts={"official": OFFICIAL_DINOV3, "hub": HUB_NAMES, "backbone": DINOV3_BACKBONE},
    unused=("attn_mask_probs", "criterion.*", "embeddings.mask_token"),
    read=_read_dinov3,
    build=_build_dinov3,
    config="EomtDinov3Config",
    head_fields=_HEAD_FIELDS,
    defaults={"num_blocks": 4, "image_size": 512},
    classifier="class_predictor.weight",
    void=True,
)
