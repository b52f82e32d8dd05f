"""MaskFormer (Cheng et al. 2021) on Swin, with its feature pyramid or FaPN's.

Official code: facebookresearch/MaskFormer @ da3e60d; ShihuaHuang95/FaPN-full @ d59b4cb. DETR's decoder looks at the
coarsest feature alone; its queries make masks of the pixel decoder's features at stride 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ade_harness.models.backbones.swin import SWIN_BACKBONE, SWIN_FIELDS, build_swin, read_swin, swin_channels
from ade_harness.models.checkpoint.family import Family, count
from ade_harness.models.checkpoint.key_tables import Table
from ade_harness.models.checkpoint.strict import Strictness
from ade_harness.models.heads.fapn import FAPN, FapnDecoder
from ade_harness.models.heads.mask2former import Attention, NormedConv, dot_masks, mask_embed, sine_positions
from ade_harness.models.heads.mask_classifier import MaskClassifier, load_own, split
from ade_harness.models.outputs import MaskLogits
from ade_harness.models.systems.mask2former import with_pixel_decoder


class DetrLayer(nn.Module):
    """One layer of DETR's decoder: attention among the queries, to the map, two linear layers; a norm after each."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.self_attention = Attention(width, heads)
        self.self_norm = nn.LayerNorm(width)
        self.cross_attention = Attention(width, heads)
        self.cross_norm = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, queries: Tensor, query_positions: Tensor, memory: Tensor, positions: Tensor) -> Tensor:
        """Return queries [N, Q, C]; memory [N, S, C]; positions [S, C]."""
        placed = queries + query_positions
        queries = self.self_norm(queries + self.self_attention(placed, placed, queries))
        queries = self.cross_norm(queries + self.cross_attention(queries + query_positions, memory + positions, memory))
        normed: Tensor = self.norm(queries + self.linear2(self.linear1(queries).relu_()))
        return normed


class DetrDecoder(nn.Module):
    """DETR's decoder: queries [N, Q, C] look at one map."""

    def __init__(self, width: int, heads: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DetrLayer(width, heads, hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, queries: Tensor, query_positions: Tensor, memory: Tensor, positions: Tensor) -> Tensor:
        """Return the normed queries [N, Q, C]; memory and positions [N, S, C] (or [S, C])."""
        for layer in self.layers:
            queries = layer(queries, query_positions, memory, positions)
        normed: Tensor = self.norm(queries)
        return normed


class PyramidStep(nn.Module):
    """One level of the feature pyramid."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.lateral = NormedConv(channels, width, 1)
        self.output = NormedConv(width, width, 3, relu=True)

    def forward(self, feature: Tensor, coarser: Tensor) -> Tensor:
        """Return [N, C, h, w] of this level's feature [N, F, h, w] and the coarser result."""
        lateral = self.lateral(feature)
        summed: Tensor = self.output(lateral + F.interpolate(coarser, lateral.shape[-2:], mode="nearest"))
        return summed


class PyramidDecoder(nn.Module):
    """Features of strides 4, 8, 16, 32 to mask features at stride 4 and the coarsest feature."""

    def __init__(self, channels: Sequence[int], width: int, mask_width: int) -> None:
        super().__init__()
        self.stem = NormedConv(channels[3], width, 3, relu=True)
        self.steps = nn.ModuleList(PyramidStep(c, width) for c in channels[:3])  # stride 4 first, as in the files
        self.mask_features = nn.Conv2d(width, mask_width, 3, padding=1)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return mask features [N, M, h, w]; no maps: the queries look at the backbone's last feature."""
        finest = self.stem(features[3])
        for step, feature in zip(reversed(self.steps), reversed(features[:3]), strict=True):
            finest = step(feature, finest)
        return self.mask_features(finest), []


class MaskformerDecoder(nn.Module):
    """Queries that look at the backbone's last feature."""

    def __init__(
        self,
        channels: int,
        classes: int,
        queries: int,
        width: int,
        mask_width: int,
        heads: int,
        hidden: int,
        layers: int,
    ) -> None:
        super().__init__()
        self.input_projection = nn.Conv2d(channels, width, 1)
        self.query_positions = nn.Parameter(nn.init.normal_(Tensor(queries, width)))
        self.transformer = DetrDecoder(width, heads, hidden, layers)
        self.classes = nn.Linear(width, classes + 1)
        self.mask_embed = mask_embed(width, mask_width)

    def forward(self, feature: Tensor, mask_features: Tensor) -> MaskLogits:
        """Return class and mask logits."""
        start = feature.new_zeros((feature.shape[0], *self.query_positions.shape))
        memory = self.input_projection(feature)
        positions = sine_positions(memory.shape[2], memory.shape[3], memory.shape[1], memory.device).to(memory.dtype)
        queries = self.transformer(start, self.query_positions, memory.flatten(2).transpose(1, 2), positions)
        return MaskLogits(self.classes(queries), dot_masks(self.mask_embed(queries), mask_features))


class Maskformer(MaskClassifier):
    """Normalised images float32 [N, 3, H, W] to class and mask logits."""

    def forward(self, images: Tensor) -> MaskLogits:
        """Return class logits [N, Q, 151] and mask logits [N, Q, H/4, W/4]."""
        features = self.backbone(images)
        mask_features, _ = self.pixel_decoder(features)
        logits: MaskLogits = self.decoder(features[3], mask_features)
        return logits


_PIXEL = "sem_seg_head.pixel_decoder."
_STEP = "pixel_decoder.steps.{S-1}."
PYRAMID: Table = (
    (_PIXEL + "layer_4.norm.*", "pixel_decoder.stem.norm.*"),
    (_PIXEL + "layer_4.*", "pixel_decoder.stem.conv.*"),
    (_PIXEL + "adapter_{S}.norm.*", _STEP + "lateral.norm.*"),
    (_PIXEL + "adapter_{S}.*", _STEP + "lateral.conv.*"),
    (_PIXEL + "layer_{S}.norm.*", _STEP + "output.norm.*"),
    (_PIXEL + "layer_{S}.*", _STEP + "output.conv.*"),
    (_PIXEL + "mask_features.*", "pixel_decoder.mask_features.*"),
)


def detr_decoder(there: str, here: str) -> Table:
    """Return the table of DETR's decoder as detectron2's lineage names it."""
    layer, own = there + "layers.{L}.", here + "layers.{L}."
    return (
        (layer + "self_attn.in_proj_weight", own + "self_attention.{q|k|v}.weight"),
        (layer + "self_attn.in_proj_bias", own + "self_attention.{q|k|v}.bias"),
        (layer + "self_attn.out_proj.*", own + "self_attention.out.*"),
        (layer + "multihead_attn.in_proj_weight", own + "cross_attention.{q|k|v}.weight"),
        (layer + "multihead_attn.in_proj_bias", own + "cross_attention.{q|k|v}.bias"),
        (layer + "multihead_attn.out_proj.*", own + "cross_attention.out.*"),
        (layer + "norm1.*", own + "self_norm.*"),
        (layer + "norm2.*", own + "cross_norm.*"),
        (layer + "norm3.*", own + "norm.*"),
        (layer + "linear{N}.*", own + "linear{N}.*"),
        (there + "norm.*", here + "norm.*"),
    )


_PREDICTOR = "sem_seg_head.predictor."
_DECODER: Table = (
    *detr_decoder(_PREDICTOR + "transformer.decoder.", "decoder.transformer."),
    (_PREDICTOR + "query_embed.weight", "decoder.query_positions"),
    (_PREDICTOR + "input_proj.*", "decoder.input_projection.*"),
    (_PREDICTOR + "class_embed.*", "decoder.classes.*"),
    (_PREDICTOR + "mask_embed.layers.0.*", "decoder.mask_embed.0.*"),
    (_PREDICTOR + "mask_embed.layers.1.*", "decoder.mask_embed.2.*"),
    (_PREDICTOR + "mask_embed.layers.2.*", "decoder.mask_embed.4.*"),
    ("criterion.*", None),  # of training only
)
OFFICIAL: Table = (*SWIN_BACKBONE, *PYRAMID, *_DECODER)
OFFICIAL_FAPN: Table = (*SWIN_BACKBONE, *FAPN, *_DECODER)

_LAYER = "model.transformer_module.decoder.layers.{L}."
_OURS = "decoder.transformer.layers.{L}."
HUB: Table = (
    ("model.pixel_level_module.encoder.model.*", "backbone.*"),
    ("model.pixel_level_module.encoder.hidden_states_norms.{S}.*", "backbone.hidden_states_norms.stage{S+1}.*"),
    ("model.pixel_level_module.decoder.fpn.stem.0.*", "pixel_decoder.stem.conv.*"),
    ("model.pixel_level_module.decoder.fpn.stem.1.*", "pixel_decoder.stem.norm.*"),
    *(
        (
            f"model.pixel_level_module.decoder.fpn.layers.{i}.{there}.{n}.*",
            f"pixel_decoder.steps.{2 - i}.{here}.{part}.*",
        )
        for i in range(3)
        for there, here in (("proj", "lateral"), ("block", "output"))
        for n, part in enumerate(("conv", "norm"))
    ),
    ("model.pixel_level_module.decoder.mask_projection.*", "pixel_decoder.mask_features.*"),
    (_LAYER + "self_attn.q_proj.*", _OURS + "self_attention.q.*"),
    (_LAYER + "self_attn.k_proj.*", _OURS + "self_attention.k.*"),
    (_LAYER + "self_attn.v_proj.*", _OURS + "self_attention.v.*"),
    (_LAYER + "encoder_attn.q_proj.*", _OURS + "cross_attention.q.*"),
    (_LAYER + "encoder_attn.k_proj.*", _OURS + "cross_attention.k.*"),
    (_LAYER + "encoder_attn.v_proj.*", _OURS + "cross_attention.v.*"),
    (_LAYER + "self_attn_layer_norm.*", _OURS + "self_norm.*"),
    (_LAYER + "encoder_attn_layer_norm.*", _OURS + "cross_norm.*"),
    (_LAYER + "final_layer_norm.*", _OURS + "norm.*"),
    (_LAYER + "fc{N}.*", _OURS + "linear{N}.*"),
    (_LAYER + "self_attn.out_proj.*", _OURS + "self_attention.out.*"),
    (_LAYER + "encoder_attn.out_proj.*", _OURS + "cross_attention.out.*"),
    ("model.transformer_module.decoder.layernorm.*", "decoder.transformer.norm.*"),
    ("model.transformer_module.queries_embedder.weight", "decoder.query_positions"),
    ("model.transformer_module.input_projection.*", "decoder.input_projection.*"),
    ("class_predictor.*", "decoder.classes.*"),
    ("mask_embedder.0.0.*", "decoder.mask_embed.0.*"),
    ("mask_embedder.1.0.*", "decoder.mask_embed.2.*"),
    ("mask_embedder.2.0.*", "decoder.mask_embed.4.*"),
    ("criterion.*", None),
)


def _read(state: Mapping[str, Tensor]) -> dict[str, Any]:
    features = state["pixel_decoder.mask_features.weight"]
    return {
        **read_swin(state),
        "width": features.shape[1],
        "mask_width": features.shape[0],
        "queries": state["decoder.query_positions"].shape[0],
        "query_hidden": state["decoder.transformer.layers.0.linear1.weight"].shape[0],
        "query_layers": count(state, "decoder.transformer.layers.{N}."),
        "fapn": "pixel_decoder.steps.0.offset.weight" in state,
    }


class _Head(nn.Module):
    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__()
        channels = swin_channels(fields)
        width, mask_width = fields["width"], fields.get("mask_width") or fields["width"]
        decoder = FapnDecoder if fields.get("fapn") else PyramidDecoder
        self.pixel_decoder = decoder(channels, width, mask_width)
        self.decoder = MaskformerDecoder(
            channels[3], fields["num_labels"], fields["queries"], width, mask_width, fields["heads"],
            fields["query_hidden"], fields["query_layers"],
        )  # fmt: skip


def _build(fields: dict[str, Any], state: Mapping[str, Tensor] | None, keys: Strictness) -> nn.Module:
    backbone, rest = split(state, "backbone.")
    head: Any = load_own(lambda: _Head(fields), rest, keys)
    parts = {"pixel_decoder": head.pixel_decoder, "decoder": head.decoder}
    return Maskformer(build_swin(fields, backbone, keys), parts).eval()


MASKFORMER = Family(
    layouts={"official": OFFICIAL, "official with FaPN": OFFICIAL_FAPN, "hub": HUB},
    prepare=with_pixel_decoder,
    unused=("*.relative_position_index",),
    read=_read,
    build=_build,
    defaults={"heads": 8},
    backbone_fields=SWIN_FIELDS,
    head_fields=("width", "mask_width", "heads", "queries", "query_hidden", "query_layers", "fapn"),
    classifier="decoder.classes.weight",
    void=True,
)
