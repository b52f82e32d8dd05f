"""The systems of ViT-Adapter and Mask2Former's head: on BEiT, BEiT-3, DINOv2 and DINOv3.

BEiT-3's ADE20K model was never published, nor its code: here its encoder (whose weights are public at large size) takes
the place of BEiT in the published recipe of ViT-Adapter, which its paper follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ade_harness.models.backbones.vit import Beit3Trunk, BeitTrunk, Dinov2Trunk, Dinov3Trunk
from ade_harness.models.backbones.vit_adapter import ADAPTER_FIELDS, build_adapter, read_adapter
from ade_harness.models.checkpoint.family import Family, count, load_hub_names
from ade_harness.models.checkpoint.key_tables import Table
from ade_harness.models.checkpoint.strict import Strictness
from ade_harness.models.heads.linear import LINEAR_HEAD
from ade_harness.models.heads.mask2former import HEAD_FIELDS, build_head, read_head
from ade_harness.models.heads.mask2former_keys import HEAD_DINOV3, HEAD_MMDETECTION
from ade_harness.models.heads.mask_classifier import MaskClassifier, load_own, split
from ade_harness.models.systems.dinov3 import (
    DINOV3_HUB,
    DINOV3_OFFICIAL,
    DINOV3_TIMM,
    PERIODS,
    RotaryPositions,
    dinov3_config,
    read_dinov3,
    with_mask_token,
    with_periods,
)

_TRUNK = "backbone.trunk."
_ADAPTER: Table = tuple(
    (f"backbone.{part}", f"backbone.{part}") for part in ("level_embed", "spm.*", "interactions.*", "up.*", "norm{N}.*")
)
_VIT: Table = (
    ("backbone.cls_token", _TRUNK + "cls_token"),
    ("backbone.pos_embed", _TRUNK + "pos_embed"),
    ("backbone.mask_token", None),  # of pre-training only
    ("backbone.patch_embed.*", _TRUNK + "patch_embed.*"),
    ("backbone.blocks.{B}.attn.relative_position_index", None),
    ("backbone.blocks.{B}.gamma{N}", _TRUNK + "blocks.{B}.gamma_{N}"),  # DINOv2's spelling
    ("backbone.blocks.*", _TRUNK + "blocks.*"),
)
_HEAD_FILE = (
    "backbone.level_embed", "backbone.spm.", "backbone.interactions.", "backbone.up.", "backbone.norm",
    "pixel_decoder.", "decoder.",
)  # fmt: skip
OFFICIAL: Table = (*_VIT, *_ADAPTER, *HEAD_MMDETECTION)

_LAYER = "encoder.layers.{B}."
_BLOCK = _TRUNK + "blocks.{B}."
_TORCHSCALE: Table = (
    ("vision_embed.cls_token", _TRUNK + "cls_token"),
    ("vision_embed.proj.*", _TRUNK + "patch_embed.proj.*"),
    ("vision_embed.mask_token", None),  # of pre-training only
    ("encoder.embed_positions.A.weight", _TRUNK + "embed_positions"),
    *(
        (f"{_LAYER}self_attn.{part}.A.*", f"{_BLOCK}self_attn.{part}.*")
        for part in ("q_proj", "k_proj", "v_proj", "out_proj", "inner_attn_ln")
    ),
    (_LAYER + "self_attn_layer_norm.A.*", _BLOCK + "self_attn_layer_norm.*"),
    (_LAYER + "final_layer_norm.A.*", _BLOCK + "final_layer_norm.*"),
    (_LAYER + "ffn.A.*", _BLOCK + "ffn.*"),
    ("encoder.layer_norm.A.*", _TRUNK + "norm.*"),
    ("text_embed.*", None),  # and all that follows is of the language branch, or of heads for other tasks
    ("encoder.embed_positions.B.weight", None),
    (_LAYER + "self_attn.q_proj.B.*", None),
    (_LAYER + "self_attn.k_proj.B.*", None),
    (_LAYER + "self_attn.v_proj.B.*", None),
    (_LAYER + "self_attn.out_proj.B.*", None),
    (_LAYER + "self_attn.inner_attn_ln.B.*", None),
    (_LAYER + "self_attn_layer_norm.B.*", None),
    (_LAYER + "final_layer_norm.B.*", None),
    (_LAYER + "ffn.B.*", None),
    ("encoder.layer_norm.B.*", None),
    ("mlm_head.*", None),
    ("mim_head.*", None),
    ("language_head.*", None),
    ("vision_head.*", None),
    ("logit_scale", None),
)
BEIT3_ENCODER: Table = (
    *_TORCHSCALE,
    *((f"beit3.{row[0]}", *row[1:]) for row in _TORCHSCALE),
    *((f"backbone.beit3.{row[0]}", *row[1:]) for row in _TORCHSCALE),
    *_ADAPTER,
    *HEAD_MMDETECTION,
)


def _whole(
    make_trunk: Callable[[], nn.Module], depth: int, fields: Mapping[str, Any], state: Mapping[str, Tensor] | None,
    keys: Strictness,
) -> nn.Module:  # fmt: skip
    """Build trunk, adapter and head as one module of ours."""

    def make() -> nn.Module:
        trunk: Any = make_trunk()
        adapter = build_adapter(trunk, depth, fields)
        return MaskClassifier(adapter, build_head([trunk.width] * 4, fields))

    return load_own(make, state, keys)


_COMMON: dict[str, Any] = {
    "adapter_fields": ADAPTER_FIELDS, "head_fields": HEAD_FIELDS, "classifier": "decoder.classes.weight", "void": True,
    "at_mask_size": True,
}  # fmt: skip
"""What all systems with an adapter below Mask2Former's head have."""

# BEiT

_BEIT_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "patch_size",
    "image_size",
)


def _read_vit(state: Mapping[str, Tensor]) -> dict[str, Any]:
    projection = state[_TRUNK + "patch_embed.proj.weight"]
    return {
        "hidden_size": projection.shape[0],
        "patch_size": projection.shape[-1],
        "num_hidden_layers": count(state, _TRUNK + "blocks.{N}."),
    }


def _read_beit(state: Mapping[str, Tensor]) -> dict[str, Any]:
    vit = _read_vit(state)
    table = state[_TRUNK + "blocks.0.attn.relative_position_bias_table"]
    return {
        **vit,
        "num_attention_heads": table.shape[1],
        "intermediate_size": state[_TRUNK + "blocks.0.mlp.fc1.weight"].shape[0],
        "image_size": (math.isqrt(table.shape[0] - 3) + 1) // 2 * vit["patch_size"],
        **read_adapter(state),
        **read_head(state),
    }


def _build_beit(fields: dict[str, Any], state: Mapping[str, Tensor] | None, keys: Strictness) -> nn.Module:
    def trunk() -> nn.Module:
        return BeitTrunk(
            fields["hidden_size"], fields["num_hidden_layers"], fields["num_attention_heads"],
            fields["intermediate_size"], fields["patch_size"], fields["image_size"],
        )  # fmt: skip

    return _whole(trunk, fields["num_hidden_layers"], fields, state, keys)


VIT_ADAPTER_BEIT = Family(
    layouts={"official": OFFICIAL}, read=_read_beit, build=_build_beit, backbone_fields=_BEIT_FIELDS, **_COMMON
)

# DINOv2

_DINOV2_FIELDS = (*_BEIT_FIELDS, "use_swiglu_ffn")


def _read_dinov2(state: Mapping[str, Tensor]) -> dict[str, Any]:
    vit = _read_vit(state)
    swiglu = _TRUNK + "blocks.0.mlp.w1.weight" in state
    side = math.isqrt(state[_TRUNK + "pos_embed"].shape[1] - 1)
    return {
        **vit,
        "num_attention_heads": vit["hidden_size"] // 64,
        "intermediate_size": state[_TRUNK + f"blocks.0.mlp.{'w1' if swiglu else 'fc1'}.weight"].shape[0],
        "image_size": side * vit["patch_size"],
        "use_swiglu_ffn": swiglu,
        **read_adapter(state),
        **read_head(state),
    }


def _build_dinov2(fields: dict[str, Any], state: Mapping[str, Tensor] | None, keys: Strictness) -> nn.Module:
    def trunk() -> nn.Module:
        return Dinov2Trunk(
            fields["hidden_size"], fields["num_hidden_layers"], fields["num_attention_heads"],
            fields["intermediate_size"], fields["patch_size"], (fields["image_size"] // fields["patch_size"]) ** 2,
            fields["use_swiglu_ffn"],
        )  # fmt: skip

    return _whole(trunk, fields["num_hidden_layers"], fields, state, keys)


VIT_ADAPTER_DINOV2 = Family(
    layouts={"official": OFFICIAL}, read=_read_dinov2, build=_build_dinov2, backbone_fields=_DINOV2_FIELDS,
    shapes_first=True, **_COMMON,
)  # fmt: skip

# BEiT-3


def _read_beit3(state: Mapping[str, Tensor]) -> dict[str, Any]:
    vit = _read_vit(state)
    side = math.isqrt(state[_TRUNK + "embed_positions"].shape[0] - 3)
    found = {
        **vit,
        "num_attention_heads": 16 if vit["hidden_size"] > 768 else vit["hidden_size"] // 64,
        "intermediate_size": state[_TRUNK + "blocks.0.ffn.fc1.weight"].shape[0],
        "image_size": side * vit["patch_size"],
    }
    if _is_encoder(state):
        return found
    return {**found, **read_adapter(state), **read_head(state)}


def _is_encoder(state: Mapping[str, Tensor]) -> bool:
    return all(key.startswith(_TRUNK) for key in state)


def _build_beit3(fields: dict[str, Any], state: Mapping[str, Tensor] | None, keys: Strictness) -> nn.Module:
    def trunk() -> nn.Module:
        return Beit3Trunk(
            fields["hidden_size"], fields["num_hidden_layers"], fields["num_attention_heads"],
            fields["intermediate_size"], fields["patch_size"], (fields["image_size"] // fields["patch_size"]) ** 2,
        )  # fmt: skip

    if state is not None and _is_encoder(state):
        return load_own(trunk, {k.removeprefix(_TRUNK): v for k, v in state.items()}, keys)
    return _whole(trunk, fields["num_hidden_layers"], fields, state, keys)


VIT_ADAPTER_BEIT3 = Family(
    layouts={"official": BEIT3_ENCODER, "adapter": OFFICIAL}, read=_read_beit3, build=_build_beit3,
    backbone_fields=_BEIT_FIELDS, head=_HEAD_FILE, **_COMMON,
)  # fmt: skip

# DINOv3

_D3 = "segmentation_model.0."


def _trunk_rows(table: Table) -> Table:
    """Return the rows of a backbone's table with our trunk on their right, under the official prefix and without."""
    rows = [(row[0], None if row[1] is None else _TRUNK + row[1], *row[2:]) for row in table if row not in LINEAR_HEAD]
    return tuple(rows)


_D3_TRUNK = _trunk_rows(tuple(row for row in DINOV3_OFFICIAL if not row[0].startswith("segmentation_model.")))
DINOV3_M2F: Table = (
    *((f"{_D3}backbone.{row[0]}", *row[1:]) for row in _D3_TRUNK),
    *((_D3 + part, f"backbone.{part}") for part in ("level_embed", "spm.*", "interactions.*", "up.*", "norm{N}.*")),
    *HEAD_DINOV3,
    *_D3_TRUNK,
)
DINOV3_M2F_HUB: Table = (*DINOV3_M2F[: -len(_D3_TRUNK)], *_trunk_rows(DINOV3_HUB))
DINOV3_M2F_TIMM: Table = (*DINOV3_M2F[: -len(_D3_TRUNK)], *_trunk_rows(DINOV3_TIMM))


def _read_dinov3(state: Mapping[str, Tensor]) -> dict[str, Any]:
    trunk = {key.removeprefix(_TRUNK): value for key, value in state.items() if key.startswith(_TRUNK)}
    return {**read_dinov3(trunk), **read_adapter(state), **read_head(state)}


def _build_dinov3(fields: dict[str, Any], state: Mapping[str, Tensor] | None, keys: Strictness) -> nn.Module:
    from transformers import DINOv3ViTModel

    vit, rest = split(state, _TRUNK)
    own = {*ADAPTER_FIELDS, *HEAD_FIELDS, "num_labels"}
    architecture = {name: value for name, value in fields.items() if name not in own}
    periods = None if vit is None else vit.pop(PERIODS, None)
    network: Any = load_hub_names(DINOv3ViTModel, dinov3_config(architecture), vit, keys)
    network.rope_embeddings = RotaryPositions(network.config, periods)
    depth, number = architecture["num_hidden_layers"], fields["interactions"]
    trunk = Dinov3Trunk(network, tuple(depth * (i + 1) // number - 1 for i in range(number)))

    def make() -> nn.Module:
        adapter = build_adapter(trunk, None, fields)
        adapter.trunk = nn.Identity()  # loaded already
        return MaskClassifier(adapter, build_head([trunk.width] * 4, fields))

    whole: Any = load_own(make, rest, keys)
    whole.backbone.trunk = trunk.eval()
    return whole


VIT_ADAPTER_DINOV3 = Family(
    layouts={"official": DINOV3_M2F, "hub": DINOV3_M2F_HUB, "timm": DINOV3_M2F_TIMM},
    prepare=with_mask_token,
    published=lambda hub, given: with_periods(hub, given, _TRUNK),
    read=_read_dinov3,
    build=_build_dinov3,
    config="DINOv3ViTConfig",
    adapter_fields=ADAPTER_FIELDS,
    head_fields=HEAD_FIELDS,
    classifier="decoder.classes.weight",
    void=True,
    head=_HEAD_FILE,
)
