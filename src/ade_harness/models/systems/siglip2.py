"""SigLIP 2's image tower with a linear head: transformers' tower, which computes what big_vision's does, and our head.

Source: arXiv 2502.14786, section 3.3.1: frozen tower, linear layer, and the output of the attention pooling head
concatenated to every patch's feature. No head and no probing code were ever published. Official weights are
google-research/big_vision's .npz files (@ 0127fb6). At other grids than the native one, position embeddings are
resampled as big_vision does it: linearly, corners on corners.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ade_harness.models.checkpoint.family import Family, count
from ade_harness.models.checkpoint.key_tables import Table
from ade_harness.models.checkpoint.strict import Strictness
from ade_harness.models.heads.linear import LINEAR_HEAD, LinearSegmenter
from ade_harness.models.systems.dinov2 import segmenter


def _matrix(kernel: Tensor) -> Tensor:
    """Flax's [in, out] to [out, in]."""
    return kernel.T.contiguous()


def _into_heads(kernel: Tensor) -> Tensor:
    """Flax's [in, heads, width] to [out, in]."""
    return kernel.flatten(1).T.contiguous()


def _out_of_heads(kernel: Tensor) -> Tensor:
    """Flax's [heads, width, out] to [out, in]."""
    return kernel.flatten(0, 1).T.contiguous()


_FLAX = "params/img/Transformer/encoderblock_{B}/"
_LAYER = "vision_model.encoder.layers.{B}."
_POOL = "params/img/MAPHead_0/"
_ATTENTION = "MultiHeadDotProductAttention_0/"


def _attention(there: str, here: str) -> Table:
    rows: list[Any] = []
    for name in ("query", "key", "value"):
        rows += [
            (f"{there}{name}/kernel", f"{here}{name[0]}_proj.weight", _into_heads),
            (f"{there}{name}/bias", f"{here}{name[0]}_proj.bias", torch.flatten),
        ]
    rows += [
        (f"{there}out/kernel", f"{here}out_proj.weight", _out_of_heads),
        (f"{there}out/bias", f"{here}out_proj.bias"),
    ]
    return tuple(rows)


def _norm(there: str, here: str) -> Table:
    return ((f"{there}/scale", f"{here}.weight"), (f"{there}/bias", f"{here}.bias"))


def _dense(there: str, here: str) -> Table:
    return ((f"{there}/kernel", f"{here}.weight", _matrix), (f"{there}/bias", f"{here}.bias"))


BIG_VISION: Table = (
    ("params/img/embedding/kernel", "vision_model.embeddings.patch_embedding.weight", lambda k: k.permute(3, 2, 0, 1)),
    ("params/img/embedding/bias", "vision_model.embeddings.patch_embedding.bias"),
    ("params/img/pos_embedding", "vision_model.embeddings.position_embedding.weight", lambda p: p.flatten(0, 1)),
    *_norm(_FLAX + "LayerNorm_0", _LAYER + "layer_norm1"),
    *_attention(_FLAX + _ATTENTION, _LAYER + "self_attn."),
    *_norm(_FLAX + "LayerNorm_1", _LAYER + "layer_norm2"),
    *_dense(_FLAX + "MlpBlock_0/Dense_0", _LAYER + "mlp.fc1"),
    *_dense(_FLAX + "MlpBlock_0/Dense_1", _LAYER + "mlp.fc2"),
    *_norm("params/img/Transformer/encoder_norm", "vision_model.post_layernorm"),
    (_POOL + "probe", "vision_model.head.probe"),
    *_attention(_POOL + _ATTENTION, "vision_model.head.attention."),
    *_norm(_POOL + "LayerNorm_0", "vision_model.head.layernorm"),
    *_dense(_POOL + "MlpBlock_0/Dense_0", "vision_model.head.mlp.fc1"),
    *_dense(_POOL + "MlpBlock_0/Dense_1", "vision_model.head.mlp.fc2"),
    ("params/txt/*", None),
    ("params/t", None),
    ("params/b", None),
    *LINEAR_HEAD,
)
SIGLIP_HUB: Table = (
    ("vision_model.*", "vision_model.*"),
    ("text_model.*", None),
    ("logit_scale", None),
    ("logit_bias", None),
    *LINEAR_HEAD,
)


def join_pooling(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join the pooling head's queries, keys and values into torch's ``in_proj``."""
    joined, parts = {}, {}
    for key, value in state.items():
        name = key.removeprefix("vision_model.head.attention.")
        if name != key and name[1:].startswith("_proj."):
            parts[name] = value
        else:
            joined[key] = value
    for kind in ("weight", "bias"):
        found = [parts[f"{n}_proj.{kind}"] for n in "qkv" if f"{n}_proj.{kind}" in parts]
        if len(found) == 3:
            joined[f"vision_model.head.attention.in_proj_{kind}"] = torch.cat(found)
    return joined


def unstack_blocks(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut weights of a scanned encoder, ``encoderblock/...`` [depth, ...], into those of single blocks."""
    single = {}
    for key, value in state.items():
        if "/encoderblock/" not in key:
            single[key] = value
            continue
        for number, part in enumerate(value):
            single[key.replace("/encoderblock/", f"/encoderblock_{number}/")] = part
    return single


class Siglip2Features(nn.Module):
    """Images [N, 3, H, W] to patch tokens and, at every patch, the pooled output: one map [N, 2 C, h, w]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        config: Any = network.config
        self.patch_size: int = config.patch_size
        self.channels: int = 2 * config.hidden_size
        self._tower: Any = getattr(network, "vision_model", network)
        self._tower.embeddings.interpolate_pos_encoding = self._positions

    def _positions(self, tokens: Tensor, height: int, width: int) -> Tensor:
        positions: Tensor = self._tower.embeddings.position_embedding.weight
        side = math.isqrt(positions.shape[0])
        grid = (height // self.patch_size, width // self.patch_size)
        if grid == (side, side):
            return positions[None]
        planes = positions.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        return F.interpolate(planes, grid, mode="bilinear", align_corners=True).flatten(2).transpose(1, 2)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the only map in a list."""
        height, width = (side // self.patch_size for side in images.shape[-2:])
        output = self.network(images, interpolate_pos_encoding=True)
        tokens = output.last_hidden_state.transpose(1, 2).reshape(images.shape[0], -1, height, width)
        pooled = output.pooler_output[:, :, None, None].expand(-1, -1, height, width)
        return [torch.cat([tokens, pooled], 1)]


def _build(architecture: dict[str, Any], state: Mapping[str, Tensor] | None, keys: Strictness) -> LinearSegmenter:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(layer_norm_eps=1e-6, **architecture)
    hub = None if state is None else join_pooling(state)
    return segmenter(SiglipVisionModel, config, Siglip2Features, hub, keys, pad=True)


def _read(state: Mapping[str, Tensor]) -> dict[str, Any]:
    projection = state["vision_model.embeddings.patch_embedding.weight"]
    side = math.isqrt(state["vision_model.embeddings.position_embedding.weight"].shape[0])
    return {
        "hidden_size": projection.shape[0],
        "patch_size": projection.shape[-1],
        "num_hidden_layers": count(state, "vision_model.encoder.layers.{N}."),
        "intermediate_size": state["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "image_size": side * projection.shape[-1],
    }


SIGLIP2 = Family(
    layouts={"official": BIG_VISION, "hub": SIGLIP_HUB},
    read=_read,
    build=_build,
    config="SiglipVisionConfig",
    prepare=unstack_blocks,
    classifier="head.classifier.weight",
    head=("head.",),
    defaults={"num_attention_heads": 16},
)
