"""Mask2Former's head (Cheng et al. 2022), once for every system that has it.

A pixel decoder (deformable attention over strides 32, 16, 8, then one step of a feature pyramid to stride 4) and a
decoder whose queries attend within the masks that they predicted a layer before. The published lineages compute the
same under other names: detectron2's (Mask2Former, OneFormer), mmdetection's (InternImage, ViT-Adapter, DINOv2) and
DINOv3's. Only what the last layer predicts is kept: class logits of earlier layers are for training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ade_harness.models.checkpoint.family import count
from ade_harness.models.ops.attention import attend
from ade_harness.models.ops.deformable import DeformableAttention, centres
from ade_harness.models.outputs import MaskLogits

LEVELS = 3
POINTS = 4


def sine_positions(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """Return float32 [H * W, C]: DETR's position encoding, rows in the first half of the channels.

    Args:
        height: of the map.
        width: likewise.
        channels: a multiple of 4.
        device: of the result.
    """
    half = channels // 2
    steps = torch.arange(half, device=device, dtype=torch.float32)
    frequencies = 10000 ** (2 * (steps // 2) / half)
    parts = []
    for size in (height, width):
        place = torch.arange(1, size + 1, device=device, dtype=torch.float32) / (size + 1e-6) * (2 * math.pi)
        angle = place[:, None] / frequencies
        parts.append(torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], 2).flatten(1))
    rows, columns = parts[0][:, None].expand(-1, width, -1), parts[1][None].expand(height, -1, -1)
    return torch.cat([rows, columns], -1).flatten(0, 1)


class NormedConv(nn.Module):
    """Convolution, group normalisation (32 groups), and ReLU if asked for."""

    def __init__(self, width_in: int, width: int, kernel: int, *, bias: bool = False, relu: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width, kernel, padding=kernel // 2, bias=bias)
        self.norm = nn.GroupNorm(32, width)
        self.relu = relu

    def forward(self, maps: Tensor) -> Tensor:
        """Return [N, D, H, W] of [N, C, H, W]."""
        normed: Tensor = self.norm(self.conv(maps))
        return normed.relu_() if self.relu else normed


class PixelLayer(nn.Module):
    """One layer of the pixel decoder: deformable attention, then two linear layers, a norm after each."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = DeformableAttention(width, heads, LEVELS, POINTS)
        self.norm1 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(
        self, tokens: Tensor, positions: Tensor, references: Tensor, shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Return [N, S, C] of tokens [N, S, C] and their position encodings [S, C]."""
        tokens = self.norm1(tokens + self.attention(tokens + positions, references, tokens, shapes))
        normed: Tensor = self.norm2(tokens + self.linear2(self.linear1(tokens).relu_()))
        return normed


class PixelDecoder(nn.Module):
    """Features of strides 4, 8, 16, 32 to mask features at stride 4 and three maps for the queries.

    Args:
        channels: of the four features, stride 4 first.
        width: of everything here.
        mask_width: of the mask features.
        heads: of deformable attention.
        hidden: between the two linear layers.
        layers: number of layers.
    """

    def __init__(
        self, channels: Sequence[int], width: int, mask_width: int, heads: int, hidden: int, layers: int
    ) -> None:
        super().__init__()
        self.input_projections = nn.ModuleList(NormedConv(c, width, 1, bias=True) for c in reversed(channels[1:]))
        self.level_embed = nn.Parameter(torch.randn(LEVELS, width))
        self.layers = nn.ModuleList(PixelLayer(width, heads, hidden) for _ in range(layers))
        self.lateral = NormedConv(channels[0], width, 1)
        self.output = NormedConv(width, width, 3, relu=True)
        self.mask_features = nn.Conv2d(width, mask_width, 1)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return mask features [N, M, h, w], and three maps [N, C, .., ..], the smallest first.

        Always in float32, as the official code's (it switches autocast off), unless the weights are not.
        """
        device = features[0].device.type
        if self.mask_features.weight.dtype == torch.float32 and device in ("cpu", "cuda"):
            with torch.autocast(device, enabled=False):
                return self._decode([f.float() for f in features])
        return self._decode(features)

    def _decode(self, features: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        maps = [project(f) for project, f in zip(self.input_projections, reversed(features[1:]), strict=True)]
        shapes = [(m.shape[2], m.shape[3]) for m in maps]
        tokens = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)
        positions = torch.cat(
            [
                sine_positions(*shape, tokens.shape[2], tokens.device).to(tokens.dtype) + self.level_embed[i]
                for i, shape in enumerate(shapes)
            ]
        )
        references = centres(shapes, tokens.device)
        for layer in self.layers:
            tokens = layer(tokens, positions, references, shapes)
        parts = tokens.split([height * width for height, width in shapes], 1)
        maps = [p.transpose(1, 2).unflatten(2, shape) for p, shape in zip(parts, shapes, strict=True)]
        lateral = self.lateral(features[0])
        finest = F.interpolate(maps[-1], lateral.shape[-2:], mode="bilinear", align_corners=False)
        return self.mask_features(self.output(lateral + finest)), maps


class Attention(nn.Module):
    """Multi-head attention with keys and values of their own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Return [N, Q, C]; `allowed` is bool [N, 1, Q, S]."""
        q, k, v = (
            layer(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer, tokens in ((self.q, queries), (self.k, keys), (self.v, values))
        )
        seen = attend(q, k, v, allowed)
        attended: Tensor = self.out(seen.transpose(1, 2).flatten(2))
        return attended


class QueryLayer(nn.Module):
    """One layer of the decoder: attention to the map, among the queries, two linear layers; a norm after each."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.cross_attention = Attention(width, heads)
        self.cross_norm = nn.LayerNorm(width)
        self.self_attention = Attention(width, heads)
        self.self_norm = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)

    def forward(
        self, queries: Tensor, query_positions: Tensor, memory: Tensor, positions: Tensor, allowed: Tensor | None
    ) -> Tensor:
        """Return queries [N, Q, C]; memory [N, S, C]; positions [S, C]; allowed bool [N, 1, Q, S]."""
        seen = self.cross_attention(queries + query_positions, memory + positions, memory, allowed)
        queries = self.cross_norm(queries + seen)
        placed = queries + query_positions
        queries = self.self_norm(queries + self.self_attention(placed, placed, queries))
        normed: Tensor = self.norm(queries + self.linear2(self.linear1(queries).relu_()))
        return normed


class QueryDecoder(nn.Module):
    """Queries that attend within the masks which they predicted a layer before.

    Args:
        classes: number of classes, without "no object".
        queries: number of queries.
        width: of queries and maps.
        mask_width: of the mask features.
        heads: of attention.
        hidden: between the two linear layers.
        layers: number of layers.
    """

    def __init__(
        self, classes: int, queries: int, width: int, mask_width: int, heads: int, hidden: int, layers: int
    ) -> None:
        super().__init__()
        self.query_features = nn.Parameter(torch.randn(queries, width))
        self.query_positions = nn.Parameter(torch.randn(queries, width))
        self.level_embed = nn.Parameter(torch.randn(LEVELS, width))
        self.layers = nn.ModuleList(QueryLayer(width, heads, hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.classes = nn.Linear(width, classes + 1)
        self.mask_embed = mask_embed(width, mask_width)

    def forward(self, mask_features: Tensor, maps: Sequence[Tensor]) -> MaskLogits:
        """Return the last layer's class and mask logits; maps as :class:`PixelDecoder` returns them."""
        queries = self.query_features.expand(mask_features.shape[0], -1, -1)
        return self.attend(queries, mask_features, maps)

    def attend(self, queries: Tensor, mask_features: Tensor, maps: Sequence[Tensor]) -> MaskLogits:
        """Run the layers from `queries` [N, Q, C] on."""
        memories = [m.flatten(2).transpose(1, 2) + self.level_embed[i] for i, m in enumerate(maps)]
        positions = [sine_positions(m.shape[2], m.shape[3], m.shape[1], m.device).to(m.dtype) for m in maps]
        masks = self._masks(queries, mask_features)
        for i, layer in enumerate(self.layers):
            level = i % LEVELS
            allowed = within(masks, maps[level].shape[2:])
            queries = layer(queries, self.query_positions, memories[level], positions[level], allowed)
            masks = self._masks(queries, mask_features)
        return MaskLogits(self.classes(self.norm(queries)), masks)

    def _masks(self, queries: Tensor, mask_features: Tensor) -> Tensor:
        return dot_masks(self.mask_embed(self.norm(queries)), mask_features)


def mask_embed(width: int, mask_width: int) -> nn.Sequential:
    """Return the three layers that make a query into the weights of its mask."""
    return nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, mask_width)
    )


def dot_masks(embedded: Tensor, mask_features: Tensor) -> Tensor:
    """Return mask logits [N, Q, h, w] of [N, Q, M] and [N, M, h, w]."""
    return (embedded @ mask_features.flatten(2)).unflatten(2, mask_features.shape[2:])


def within(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Return where queries may look, bool [N, 1, Q, S]: within their masks, or everywhere if a mask is empty."""
    inside = F.interpolate(masks, tuple(size), mode="bilinear", align_corners=False).sigmoid() >= 0.5
    allowed = inside.flatten(2)
    return (allowed | ~allowed.any(-1, keepdim=True))[:, None]


def read_head(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the head's architecture: fields of :func:`build_head`."""
    offsets = state["pixel_decoder.layers.0.attention.sampling_offsets.weight"]
    features = state["pixel_decoder.mask_features.weight"]
    heads = offsets.shape[0] // (LEVELS * POINTS * 2)
    return {
        "width": features.shape[1],
        "mask_width": features.shape[0],
        "heads": heads,
        "pixel_hidden": state["pixel_decoder.layers.0.linear1.weight"].shape[0],
        "pixel_layers": count(state, "pixel_decoder.layers.{N}."),
        "queries": state["decoder.query_positions"].shape[0],
        "query_hidden": state["decoder.layers.0.linear1.weight"].shape[0],
        "query_layers": count(state, "decoder.layers.{N}."),
    }


HEAD_FIELDS = (
    "width", "mask_width", "heads", "pixel_hidden", "pixel_layers", "queries", "query_hidden", "query_layers",
)  # fmt: skip


def build_head(channels: Sequence[int], fields: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Return the two halves of the head for features of these channels; `fields`: HEAD_FIELDS and ``num_labels``."""
    width, mask_width, heads = fields["width"], fields.get("mask_width") or fields["width"], fields["heads"]
    return {
        "pixel_decoder": PixelDecoder(
            channels, width, mask_width, heads, fields["pixel_hidden"], fields["pixel_layers"]
        ),
        "decoder": QueryDecoder(
            fields["num_labels"],
            fields["queries"],
            width,
            mask_width,
            heads,
            fields["query_hidden"],
            fields["query_layers"],
        ),
    }
