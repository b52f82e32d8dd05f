"""SegFormer from transformers, made equal to the official code (NVlabs/SegFormer @ 65fa8cf).

transformers' class differs from it in one point: all its layer norms use eps 1e-5, where the official code has
1e-6 in the blocks and after each stage, and 1e-5 only in patch embeddings and sequence reduction.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ade_harness.data.labels import NUM_CLASSES
from ade_harness.errors import HarnessError
from ade_harness.models.transformers_models import load_into_transformers
from ade_harness.models.weights import StateDict

OFFICIAL_TO_HUB: tuple[tuple[str, str], ...] = (
    # official name (N is counted from 1)                  name in the hub's files (counted from 0)
    (r"backbone\.patch_embed(?P<N>\d)\.proj\.", "segformer.encoder.patch_embeddings.{N}.proj."),
    (r"backbone\.patch_embed(?P<N>\d)\.norm\.", "segformer.encoder.patch_embeddings.{N}.layer_norm."),
    (r"backbone\.norm(?P<N>\d)\.", "segformer.encoder.layer_norm.{N}."),
    (
        r"backbone\.block(?P<N>\d)\.(?P<B>\d+)\.norm(?P<I>\d)\.",
        "segformer.encoder.block.{N}.{B}.layer_norm_{I}.",
    ),
    (
        r"backbone\.block(?P<N>\d)\.(?P<B>\d+)\.attn\.q\.",
        "segformer.encoder.block.{N}.{B}.attention.self.query.",
    ),
    (
        r"backbone\.block(?P<N>\d)\.(?P<B>\d+)\.attn\.kv\.",
        "segformer.encoder.block.{N}.{B}.attention.self.{KV}.",
    ),
    (
        r"backbone\.block(?P<N>\d)\.(?P<B>\d+)\.attn\.sr\.",
        "segformer.encoder.block.{N}.{B}.attention.self.sr.",
    ),
    (
        r"backbone\.block(?P<N>\d)\.(?P<B>\d+)\.attn\.norm\.",
        "segformer.encoder.block.{N}.{B}.attention.self.layer_norm.",
    ),
    (
        r"backbone\.block(?P<N>\d)\.(?P<B>\d+)\.attn\.proj\.",
        "segformer.encoder.block.{N}.{B}.attention.output.dense.",
    ),
    (
        r"backbone\.block(?P<N>\d)\.(?P<B>\d+)\.mlp\.fc(?P<I>\d)\.",
        "segformer.encoder.block.{N}.{B}.mlp.dense{I}.",
    ),
    (r"backbone\.block(?P<N>\d)\.(?P<B>\d+)\.mlp\.dwconv\.", "segformer.encoder.block.{N}.{B}.mlp.dwconv."),
    (r"decode_head\.linear_c(?P<N>\d)\.proj\.", "decode_head.linear_c.{N}.proj."),
    (r"decode_head\.linear_fuse\.conv\.", "decode_head.linear_fuse."),
    (r"decode_head\.linear_fuse\.bn\.", "decode_head.batch_norm."),
    (r"decode_head\.linear_pred\.", "decode_head.classifier."),
)
"""The rest of a name is kept. Keys and values of attention are one matrix officially: its two halves."""

UNUSED_OFFICIAL = re.compile(r"decode_head\.conv_seg\.")
"""In the official files, and in no computation."""


def hub_names(state: Mapping[str, Tensor]) -> StateDict:
    """Rename an official state_dict to the hub's names; other names pass unchanged, so that loading can refuse them."""
    renamed: StateDict = {}
    for key, value in state.items():
        if UNUSED_OFFICIAL.match(key):
            continue
        for pattern, target in OFFICIAL_TO_HUB:
            found = re.match(pattern, key)
            if found:
                parts: dict[str, Any] = found.groupdict()
                parts["N"] = int(parts["N"]) - 1 if "N" in parts else None
                rest = key[found.end() :]
                if "{KV}" in target:
                    for kind, half in zip(("key", "value"), value.chunk(2), strict=True):
                        renamed[target.format(**parts, KV=kind) + rest] = half
                else:
                    renamed[target.format(**parts) + rest] = value
                break
        else:
            renamed[key] = value
    return renamed


class Segformer(nn.Module):
    """Normalised images float32 [N, 3, H, W] to logits [N, 150, H/4, W/4] (sizes rounded up).

    Args:
        architecture: SegformerConfig's fields, such as ``depths`` and ``hidden_sizes``.
        state: weights in the official or the hub's names; None draws random ones.
        origin: how error messages call the weights.
        allow_missing: patterns of keys that `state` may lack.
        allow_unexpected: patterns of keys that `state` may have too many.
    """

    def __init__(
        self,
        architecture: Mapping[str, Any],
        state: Mapping[str, Tensor] | None,
        origin: str = "state_dict",
        allow_missing: tuple[str, ...] = (),
        allow_unexpected: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        from transformers import SegformerConfig, SegformerForSemanticSegmentation

        config = SegformerConfig(num_labels=NUM_CLASSES, **architecture)
        if state is None:
            try:
                self.network = SegformerForSemanticSegmentation(config)
            except (IndexError, ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
                raise HarnessError(
                    f"model.architecture={dict(architecture)}: makes no SegFormer ({error}). Every list needs one entry"
                    " for each of the four stages."
                ) from error
        else:
            self.network = load_into_transformers(
                SegformerForSemanticSegmentation,
                config,
                hub_names(state),
                origin,
                allow_missing,
                allow_unexpected,
            )
        for name, module in self.network.named_modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-5 if "patch_embeddings" in name or ".attention." in name else 1e-6

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [N, 150, h, w] at stride 4."""
        logits: Tensor = self.network(images).logits
        return logits


def random_segformer(architecture: Mapping[str, Any], seed: int) -> Segformer:
    """Return a SegFormer with random weights that depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Segformer(architecture, None)
