"""InternImage (Wang et al. 2023) with Mask2Former's head: convolutions (DCNv3) that choose where they look.

Official code: OpenGVLab/InternImage @ 31c962d, segmentation/. No library has it. The published ADE20K models of this
kind are InternImage-H: normalisation after each branch, one more after every sixth block of the third stage, and a
gate per group between the deformable result and the plain projection ("center feature scale").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ade_harness.models.backbones.internimage import InternImage, published_post_norms
from ade_harness.models.checkpoint.family import Family, count
from ade_harness.models.checkpoint.key_tables import Table
from ade_harness.models.checkpoint.strict import Strictness
from ade_harness.models.heads.mask2former import HEAD_FIELDS, build_head, read_head
from ade_harness.models.heads.mask2former_keys import HEAD_MMDETECTION
from ade_harness.models.heads.mask_classifier import MaskClassifier, load_own

_BLOCK = "backbone.levels.{S}.blocks.{B}."
_OURS = "backbone.stages.{S}.blocks.{B}."
OFFICIAL: Table = (
    ("backbone.patch_embed.conv{N}.*", "backbone.stem{N}.conv.*"),
    ("backbone.patch_embed.norm{N}.1.*", "backbone.stem{N}.norm.*"),
    (_BLOCK + "norm{N}.0.*", _OURS + "norm{N}.*"),
    (_BLOCK + "res_post_norm{N}.0.*", _OURS + "post_norm{N}.*"),
    (_BLOCK + "mlp.fc{N}.*", _OURS + "fc{N}.*"),
    (_BLOCK + "dcn.center_feature_scale_proj_weight", _OURS + "dcn.centre.weight"),
    (_BLOCK + "dcn.center_feature_scale_proj_bias", _OURS + "dcn.centre.bias"),
    (_BLOCK + "dcn.dw_conv.0.*", _OURS + "dcn.depthwise.*"),
    (_BLOCK + "dcn.dw_conv.1.1.*", _OURS + "dcn.norm.*"),
    (_BLOCK + "dcn.*", _OURS + "dcn.*"),
    ("backbone.levels.{S}.norm.0.*", "backbone.stages.{S}.norm.*"),
    ("backbone.levels.{S}.post_norms.{N}.0.*", "backbone.stages.{S}.post_norms.{N}.*"),
    ("backbone.levels.{S}.downsample.conv.*", "backbone.downsamples.{S}.conv.*"),
    ("backbone.levels.{S}.downsample.norm.1.*", "backbone.downsamples.{S}.norm.*"),
    *HEAD_MMDETECTION,
)


def _read(state: Mapping[str, Tensor]) -> dict[str, Any]:
    first = "backbone.stages.{}.blocks.0."
    depths = [count(state, f"backbone.stages.{s}.blocks.{{N}}.") for s in range(4)]
    channels = state["backbone.stem2.conv.weight"].shape[0]
    return {
        "channels": channels,
        "depths": depths,
        "groups": [state[first.format(s) + "dcn.centre.weight"].shape[0] for s in range(4)],
        "mlp_ratio": state[first.format(0) + "fc1.weight"].shape[0] / channels,
        "kernel": state[first.format(0) + "dcn.depthwise.weight"].shape[-1],
        "post_norm_blocks": published_post_norms(depths[2], count(state, "backbone.stages.2.post_norms.{N}.")),
        **read_head(state),
    }


_FIELDS = ("channels", "depths", "groups", "mlp_ratio", "kernel", "post_norm_blocks")


def _build(fields: dict[str, Any], state: Mapping[str, Tensor] | None, keys: Strictness) -> nn.Module:
    channels = [fields["channels"] * 2**i for i in range(4)]

    def make() -> nn.Module:
        return MaskClassifier(InternImage(**{n: fields[n] for n in _FIELDS}), build_head(channels, fields))

    return load_own(make, state, keys)


INTERNIMAGE = Family(
    layouts={"official": OFFICIAL},
    read=_read,
    build=_build,
    backbone_fields=_FIELDS,
    head_fields=HEAD_FIELDS,
    classifier="decoder.classes.weight",
    void=True,
    at_mask_size=True,
)
