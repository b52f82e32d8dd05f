"""Mask2Former (Cheng et al. 2022) on ResNet and Swin, with its own pixel decoder or FaPN's.

Official code: facebookresearch/Mask2Former @ 9b0651c. The row "Mask2Former + Swin-L-FaPN" of its paper has neither
code nor weights: here FaPN's pixel decoder takes the place of the deformable one, and the queries attend its three
coarsest maps, as they do with the official code's plain feature pyramid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ade_harness.models.backbones.resnet import RESNET_DETECTRON2, RESNET_FIELDS, build_resnet, read_resnet
from ade_harness.models.backbones.swin import SWIN_BACKBONE, SWIN_FIELDS, build_swin, read_swin, swin_channels
from ade_harness.models.checkpoint.family import Family, count
from ade_harness.models.checkpoint.key_tables import Table
from ade_harness.models.checkpoint.strict import Strictness
from ade_harness.models.heads.fapn import FAPN, FapnDecoder
from ade_harness.models.heads.mask2former import HEAD_FIELDS, QueryDecoder, build_head, read_head
from ade_harness.models.heads.mask2former_keys import HEAD_DETECTRON2, PIXEL_LEVEL_HUB, query_decoder_detectron2
from ade_harness.models.heads.mask_classifier import assemble, split

_HEAD: Table = (*HEAD_DETECTRON2, *query_decoder_detectron2("sem_seg_head.predictor."))
SWIN_DETECTRON2: Table = (*SWIN_BACKBONE, *_HEAD)
R50_DETECTRON2: Table = (*RESNET_DETECTRON2, *_HEAD)
FAPN_DETECTRON2: Table = (
    *SWIN_BACKBONE, *FAPN, ("criterion.*", None), *query_decoder_detectron2("sem_seg_head.predictor."),
)  # fmt: skip

_LAYER = "model.transformer_module.decoder.layers.{L}."
HUB: Table = (
    *PIXEL_LEVEL_HUB,
    (_LAYER + "cross_attn.in_proj_weight", "decoder.layers.{L}.cross_attention.{q|k|v}.weight"),
    (_LAYER + "cross_attn.in_proj_bias", "decoder.layers.{L}.cross_attention.{q|k|v}.bias"),
    (_LAYER + "cross_attn.out_proj.*", "decoder.layers.{L}.cross_attention.out.*"),
    (_LAYER + "cross_attn_layer_norm.*", "decoder.layers.{L}.cross_norm.*"),
    (_LAYER + "self_attn.q_proj.*", "decoder.layers.{L}.self_attention.q.*"),
    (_LAYER + "self_attn.k_proj.*", "decoder.layers.{L}.self_attention.k.*"),
    (_LAYER + "self_attn.v_proj.*", "decoder.layers.{L}.self_attention.v.*"),
    (_LAYER + "self_attn.out_proj.*", "decoder.layers.{L}.self_attention.out.*"),
    (_LAYER + "self_attn_layer_norm.*", "decoder.layers.{L}.self_norm.*"),
    (_LAYER + "fc{N}.*", "decoder.layers.{L}.linear{N}.*"),
    (_LAYER + "final_layer_norm.*", "decoder.layers.{L}.norm.*"),
    ("model.transformer_module.decoder.layernorm.*", "decoder.norm.*"),
    ("model.transformer_module.queries_features.weight", "decoder.query_features"),
    ("model.transformer_module.queries_embedder.weight", "decoder.query_positions"),
    ("model.transformer_module.level_embed.weight", "decoder.level_embed"),
    ("model.transformer_module.decoder.mask_predictor.mask_embedder.0.0.*", "decoder.mask_embed.0.*"),
    ("model.transformer_module.decoder.mask_predictor.mask_embedder.1.0.*", "decoder.mask_embed.2.*"),
    ("model.transformer_module.decoder.mask_predictor.mask_embedder.2.0.*", "decoder.mask_embed.4.*"),
    ("class_predictor.*", "decoder.classes.*"),
    ("criterion.*", None),
)


def with_pixel_decoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the component that names in old files of (Mask2)MaskFormer lack, and take away what OneFormer doubled."""
    head, inner = "sem_seg_head.", "sem_seg_head.pixel_decoder."
    renamed = {}
    for key, value in state.items():
        if key.startswith(inner + "pixel_decoder."):
            renamed[key.replace("pixel_decoder.", "", 1)] = value
        elif key.startswith(head) and not key.startswith((inner, head + "predictor.")):
            renamed[inner + key.removeprefix(head)] = value
        else:
            renamed[key] = value
    return renamed


def _read_swin(state: Mapping[str, Tensor]) -> dict[str, Any]:
    return {**read_swin(state), **read_head(state)}


def _read_resnet(state: Mapping[str, Tensor]) -> dict[str, Any]:
    return {**read_resnet(state), **read_head(state)}


def _read_fapn(state: Mapping[str, Tensor]) -> dict[str, Any]:
    features = state["pixel_decoder.mask_features.weight"]
    return {
        **read_swin(state),
        "width": features.shape[1],
        "mask_width": features.shape[0],
        "queries": state["decoder.query_positions"].shape[0],
        "query_hidden": state["decoder.layers.0.linear1.weight"].shape[0],
        "query_layers": count(state, "decoder.layers.{N}."),
    }


def _build_swin(fields: dict[str, Any], state: Mapping[str, Tensor] | None, keys: Strictness) -> nn.Module:
    backbone, rest = split(state, "backbone.")
    return assemble(build_swin(fields, backbone, keys), lambda: build_head(swin_channels(fields), fields), rest, keys)


def _build_resnet(fields: dict[str, Any], state: Mapping[str, Tensor] | None, keys: Strictness) -> nn.Module:
    backbone, rest = split(state, "backbone.")
    return assemble(
        build_resnet(fields, backbone, keys), lambda: build_head(fields["hidden_sizes"], fields), rest, keys
    )


def _build_fapn(fields: dict[str, Any], state: Mapping[str, Tensor] | None, keys: Strictness) -> nn.Module:
    backbone, rest = split(state, "backbone.")
    width, mask_width = fields["width"], fields.get("mask_width") or fields["width"]

    def head() -> dict[str, nn.Module]:
        decoder = QueryDecoder(
            fields["num_labels"], fields["queries"], width, mask_width, fields["heads"], fields["query_hidden"],
            fields["query_layers"],
        )  # fmt: skip
        return {"pixel_decoder": FapnDecoder(swin_channels(fields), width, mask_width), "decoder": decoder}

    return assemble(build_swin(fields, backbone, keys), head, rest, keys)


MASK2FORMER_SWIN = Family(
    layouts={"official": SWIN_DETECTRON2, "hub": HUB},
    prepare=with_pixel_decoder,
    unused=("*.relative_position_index",),
    read=_read_swin,
    build=_build_swin,
    backbone_fields=SWIN_FIELDS,
    head_fields=HEAD_FIELDS,
    classifier="decoder.classes.weight",
    void=True,
)
MASK2FORMER_RESNET = Family(
    layouts={"official": R50_DETECTRON2, "hub": HUB},
    prepare=with_pixel_decoder,
    read=_read_resnet,
    build=_build_resnet,
    backbone_fields=RESNET_FIELDS,
    head_fields=HEAD_FIELDS,
    classifier="decoder.classes.weight",
    void=True,
)
MASK2FORMER_FAPN = Family(
    layouts={"official": FAPN_DETECTRON2},
    prepare=with_pixel_decoder,
    unused=("*.relative_position_index",),
    read=_read_fapn,
    build=_build_fapn,
    defaults={"heads": 8},
    backbone_fields=SWIN_FIELDS,
    head_fields=HEAD_FIELDS,
    classifier="decoder.classes.weight",
    void=True,
)
