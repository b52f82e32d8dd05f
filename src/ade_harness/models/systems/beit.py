"""UperNet on BEiT and on MAE: a plain ViT, whose features at four depths are rescaled to four resolutions.

Official code: microsoft/unilm @ 768a3c8, beit/semantic_segmentation (BEiT); open-mmlab/mmsegmentation 1.2.2 (MAE, as
facebookresearch/mae never published its segmentation code).

Weights and modules are those of transformers' ``BeitForSemanticSegmentation``, but not its forward: that reads
``hidden_states[i - 1]`` for the hub's ``out_indices``, in which 0 is the patch embedding, so two blocks too early
(5, 9, 13, 21 in place of 7, 11, 15, 23 for BEiT-L). Here the outputs of exactly the published blocks go into the
head. Its default layer norm eps is 1e-12 where the official one is 1e-6.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ade_harness.errors import HarnessError
from ade_harness.models.checkpoint.family import Family, count, load_hub_names
from ade_harness.models.checkpoint.key_tables import Table
from ade_harness.models.checkpoint.strict import Strictness

_BLOCK = "beit.encoder.layer.{B}."
_ATTENTION = _BLOCK + "attention.attention."
_TABLE = "relative_position_bias.relative_position_bias_table"

_HEAD: Table = (
    ("decode_head.conv_seg.*", "decode_head.classifier.*"),
    ("decode_head.*", "decode_head.*"),
    ("auxiliary_head.*", None),  # of training only
)

BEIT_OFFICIAL: Table = (
    ("backbone.cls_token", "beit.embeddings.cls_token"),
    ("backbone.patch_embed.proj.*", "beit.embeddings.patch_embeddings.projection.*"),
    ("backbone.blocks.{B}.gamma_{I}", _BLOCK + "lambda_{I}"),
    ("backbone.blocks.{B}.norm1.*", _BLOCK + "layernorm_before.*"),
    ("backbone.blocks.{B}.norm2.*", _BLOCK + "layernorm_after.*"),
    ("backbone.blocks.{B}.attn.qkv.weight", _ATTENTION + "{query|key|value}.weight"),
    ("backbone.blocks.{B}.attn.q_bias", _ATTENTION + "query.bias"),
    ("backbone.blocks.{B}.attn.v_bias", _ATTENTION + "value.bias"),
    ("backbone.blocks.{B}.attn.relative_position_bias_table", _ATTENTION + _TABLE),
    ("backbone.blocks.{B}.attn.relative_position_index", None),
    ("backbone.blocks.{B}.attn.proj.*", _BLOCK + "attention.output.dense.*"),
    ("backbone.blocks.{B}.mlp.fc1.*", _BLOCK + "intermediate.dense.*"),
    ("backbone.blocks.{B}.mlp.fc2.*", _BLOCK + "output.dense.*"),
    ("backbone.fpn1.*", "fpn1.*"),
    ("backbone.fpn2.*", "fpn2.*"),
    *_HEAD,
)


def without_key_bias(bias: Tensor) -> Tensor:
    """Return the query's and the value's part of a bias [3 C].

    A bias of the keys adds the same number to all scores of a query, so the softmax takes it away again.
    """
    query, _, value = bias.chunk(3)
    return torch.cat([query, value])


VIT_MMSEG: Table = (
    ("backbone.cls_token", "beit.embeddings.cls_token"),
    ("backbone.pos_embed", "beit.embeddings.position_embeddings"),
    ("backbone.patch_embed.projection.*", "beit.embeddings.patch_embeddings.projection.*"),
    ("backbone.layers.{B}.gamma_{I}", _BLOCK + "lambda_{I}"),
    ("backbone.layers.{B}.ln1.*", _BLOCK + "layernorm_before.*"),
    ("backbone.layers.{B}.ln2.*", _BLOCK + "layernorm_after.*"),
    ("backbone.layers.{B}.attn.qkv.weight", _ATTENTION + "{query|key|value}.weight"),
    ("backbone.layers.{B}.attn.qkv.bias", _ATTENTION + "{query|value}.bias", without_key_bias),
    ("backbone.layers.{B}.attn.q_bias", _ATTENTION + "query.bias"),
    ("backbone.layers.{B}.attn.v_bias", _ATTENTION + "value.bias"),
    ("backbone.layers.{B}.attn.relative_position_bias_table", _ATTENTION + _TABLE),
    ("backbone.layers.{B}.attn.relative_position_index", None),
    ("backbone.layers.{B}.attn.proj.*", _BLOCK + "attention.output.dense.*"),
    ("backbone.layers.{B}.ffn.layers.0.0.*", _BLOCK + "intermediate.dense.*"),
    ("backbone.layers.{B}.ffn.layers.1.*", _BLOCK + "output.dense.*"),
    ("neck.upsample_4x.*", "fpn1.*"),
    ("neck.upsample_2x.*", "fpn2.*"),
    *_HEAD,
)


class VitUperNet(nn.Module):
    """Normalised images float32 [N, 3, S, S] to logits [N, 150, S/4, S/4], S the size that the position bias is for.

    Args:
        network: transformers' BeitForSemanticSegmentation.
        out_indices: four blocks, counted from 0, whose outputs are the features.
    """

    def __init__(self, network: Any, out_indices: tuple[int, ...]) -> None:
        super().__init__()
        self.network = network
        self.out_indices = out_indices
        self.fixed_size: tuple[int, int] = (network.config.image_size, network.config.image_size)
        """(height, width) of the only input it takes."""

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [N, 150, h, w]."""
        side = self.fixed_size[0]
        if tuple(images.shape[-2:]) != self.fixed_size:
            height, width = images.shape[-2:]
            raise HarnessError(
                f"an input of {height} x {width}: this network's relative positions are for {side} x {side}. Use a"
                f" protocol with windows of that size (inference.mode=slide inference.window.crop={side}) and no"
                " shorter side."
            )
        side //= self.network.config.patch_size
        # 0 is the patch embedding, so block i's output is item i + 1
        hidden = self.network.beit(images, output_hidden_states=True).hidden_states
        maps = [hidden[i + 1][:, 1:].transpose(1, 2).reshape(images.shape[0], -1, side, side) for i in self.out_indices]
        logits: Tensor = self.network.decode_head(self.network.fpn(maps))
        return logits


def published_blocks(depth: int) -> tuple[int, ...]:
    """Return the four blocks that give the features: 3, 5, 7, 11 of 12 and 7, 11, 15, 23 of 24, as published."""
    if depth % 12 == 0:
        return (depth // 3 - 1, depth // 2 - 1, 2 * depth // 3 - 1, depth - 1)
    return tuple(depth * i // 4 - 1 for i in (1, 2, 3, 4))


def _build(architecture: dict[str, Any], state: Mapping[str, Tensor] | None, keys: Strictness) -> VitUperNet:
    from transformers import BeitConfig, BeitForSemanticSegmentation

    fields = dict(architecture)
    blocks = tuple(fields.pop("out_indices", None) or published_blocks(fields["num_hidden_layers"]))
    if len(blocks) != 4 or not all(0 <= b < fields["num_hidden_layers"] for b in blocks):
        raise ValueError(f"out_indices={list(blocks)}: four blocks of {fields['num_hidden_layers']} are needed, from 0")
    config = BeitConfig(
        use_relative_position_bias=True,
        use_shared_relative_position_bias=False,
        use_mask_token=False,
        use_mean_pooling=True,  # no norm after the last block
        layer_norm_eps=1e-6,
        layer_scale_init_value=1.0 if state is None else 0.1,  # any but 0: the weights are read
        out_indices=[1, 2, 3, 4],  # ours are used in its place
        use_auxiliary_head=False,
        **fields,
    )
    return VitUperNet(load_hub_names(BeitForSemanticSegmentation, config, state, keys), blocks)


def _read(state: Mapping[str, Tensor]) -> dict[str, Any]:
    projection = state["beit.embeddings.patch_embeddings.projection.weight"]
    first = "beit.encoder.layer.0."
    table = state[first + f"attention.attention.{_TABLE}"]
    side = (math.isqrt(table.shape[0] - 3) + 1) // 2  # (2 s - 1) squared, and 3 for the class token
    return {
        "hidden_size": projection.shape[0],
        "patch_size": projection.shape[-1],
        "num_hidden_layers": count(state, "beit.encoder.layer.{N}."),
        "num_attention_heads": table.shape[1],
        "intermediate_size": state[first + "intermediate.dense.weight"].shape[0],
        "image_size": side * projection.shape[-1],
        "use_absolute_position_embeddings": "beit.embeddings.position_embeddings" in state,
    }


BEIT = Family(
    layouts={"official": BEIT_OFFICIAL, "mmsegmentation": VIT_MMSEG},
    unused=("auxiliary_head.*", "*.relative_position_index"),
    read=_read,
    build=_build,
    config="BeitConfig",
    backbone_fields=("out_indices",),
)
"""BEiT and MAE; MAE has absolute position embeddings as well."""
