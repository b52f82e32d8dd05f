"""SegFormer from transformers, made equal to the official code (NVlabs/SegFormer @ 65fa8cf).

transformers' class differs from it in one point: all its layer norms use eps 1e-5, where the official code has
1e-6 in the blocks and after each stage, and 1e-5 only in patch embeddings and sequence reduction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ade_harness.models.checkpoint.family import Family, count, load_hub_names
from ade_harness.models.checkpoint.key_tables import Table
from ade_harness.models.checkpoint.strict import Strictness

_ENCODER = "segformer.encoder."
_BLOCK = _ENCODER + "block.{S-1}.{B}."

OFFICIAL: Table = (
    # stages are counted from 1 there, from 0 here
    ("backbone.patch_embed{S}.proj.*", _ENCODER + "patch_embeddings.{S-1}.proj.*"),
    ("backbone.patch_embed{S}.norm.*", _ENCODER + "patch_embeddings.{S-1}.layer_norm.*"),
    ("backbone.norm{S}.*", _ENCODER + "layer_norm.{S-1}.*"),
    ("backbone.block{S}.{B}.norm{I}.*", _BLOCK + "layer_norm_{I}.*"),
    ("backbone.block{S}.{B}.attn.q.*", _BLOCK + "attention.self.query.*"),
    ("backbone.block{S}.{B}.attn.kv.*", _BLOCK + "attention.self.{key|value}.*"),
    ("backbone.block{S}.{B}.attn.sr.*", _BLOCK + "attention.self.sr.*"),
    ("backbone.block{S}.{B}.attn.norm.*", _BLOCK + "attention.self.layer_norm.*"),
    ("backbone.block{S}.{B}.attn.proj.*", _BLOCK + "attention.output.dense.*"),
    ("backbone.block{S}.{B}.mlp.fc{I}.*", _BLOCK + "mlp.dense{I}.*"),
    ("backbone.block{S}.{B}.mlp.dwconv.*", _BLOCK + "mlp.dwconv.*"),
    ("decode_head.linear_c{S}.proj.*", "decode_head.linear_c.{S-1}.proj.*"),
    ("decode_head.linear_fuse.conv.*", "decode_head.linear_fuse.*"),
    ("decode_head.linear_fuse.bn.*", "decode_head.batch_norm.*"),
    ("decode_head.linear_pred.*", "decode_head.classifier.*"),
    ("decode_head.conv_seg.*", None),  # in the files, and in no computation
)


class Segformer(nn.Module):
    """Normalised images float32 [N, 3, H, W] to logits [N, 150, H/4, W/4] (sizes rounded up)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        for name, module in self.network.named_modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-5 if "patch_embeddings" in name or ".attention." in name else 1e-6

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [N, 150, h, w] at stride 4."""
        logits: Tensor = self.network(images).logits
        return logits


def _build(architecture: dict[str, Any], state: Mapping[str, Tensor] | None, keys: Strictness) -> Segformer:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    fields = dict(architecture)
    depths, sizes = fields["depths"], fields["hidden_sizes"]
    if len(depths) != 4 or len(sizes) != 4:
        raise ValueError("every list needs one entry for each of the four stages")
    config = SegformerConfig(**fields)
    return Segformer(load_hub_names(SegformerForSemanticSegmentation, config, state, keys))


def _read(state: Mapping[str, Tensor]) -> dict[str, Any]:
    sizes = [state[f"{_ENCODER}patch_embeddings.{s}.proj.weight"].shape[0] for s in range(4)]
    reductions = [state.get(f"{_ENCODER}block.{s}.0.attention.self.sr.weight") for s in range(4)]
    hidden = [state[f"{_ENCODER}block.{s}.0.mlp.dense1.weight"].shape[0] for s in range(4)]
    return {
        "depths": [count(state, f"{_ENCODER}block.{s}.{{N}}.") for s in range(4)],
        "hidden_sizes": sizes,
        "num_attention_heads": [round(size / sizes[0]) for size in sizes],  # one per width of the first stage
        "sr_ratios": [1 if r is None else math.isqrt(r[0, 0].numel()) for r in reductions],
        "mlp_ratios": [h // size for h, size in zip(hidden, sizes, strict=True)],
        "decoder_hidden_size": state["decode_head.classifier.weight"].shape[1],
    }


SEGFORMER = Family(
    layouts={"official": OFFICIAL},
    read=_read,
    build=_build,
    config="SegformerConfig",
    head_fields=("decoder_hidden_size",),
)
