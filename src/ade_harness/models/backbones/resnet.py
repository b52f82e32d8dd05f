"""ResNet (He et al. 2015) with detectron2's names, from transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ade_harness.models.backbones.pyramid import STAGES, Pyramid
from ade_harness.models.checkpoint.family import count, load_hub_names
from ade_harness.models.checkpoint.key_tables import Table
from ade_harness.models.checkpoint.strict import Strictness


def build_resnet(fields: Mapping[str, Any], state: Mapping[str, Tensor] | None, keys: Strictness) -> Pyramid:
    """Build transformers' ResNet with bottlenecks whose stride is in the 3 x 3 convolution."""
    from transformers import ResNetBackbone, ResNetConfig

    config = ResNetConfig(
        depths=fields["depths"],
        hidden_sizes=fields["hidden_sizes"],
        embedding_size=fields["embedding_size"],
        layer_type="bottleneck",
        downsample_in_bottleneck=False,
        out_features=STAGES,
    )
    return Pyramid(load_hub_names(ResNetBackbone, config, state, keys))


RESNET_FIELDS = ("depths", "hidden_sizes", "embedding_size")

_RESIDUAL = "backbone.encoder.stages.{S-2}.layers.{B}."

RESNET_DETECTRON2: Table = (
    ("backbone.stem.conv1.norm.*", "backbone.embedder.embedder.normalization.*"),
    ("backbone.stem.conv1.*", "backbone.embedder.embedder.convolution.*"),
    ("backbone.res{S}.{B}.shortcut.norm.*", _RESIDUAL + "shortcut.normalization.*"),
    ("backbone.res{S}.{B}.shortcut.*", _RESIDUAL + "shortcut.convolution.*"),
    ("backbone.res{S}.{B}.conv{C}.norm.*", _RESIDUAL + "layer.{C-1}.normalization.*"),
    ("backbone.res{S}.{B}.conv{C}.*", _RESIDUAL + "layer.{C-1}.convolution.*"),
)


def read_resnet(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the architecture of a ResNet whose names begin with ``backbone.``."""
    stages = [f"backbone.encoder.stages.{s}.layers." for s in range(4)]
    return {
        "depths": [count(state, stage + "{N}.") for stage in stages],
        "hidden_sizes": [state[stage + "0.layer.2.convolution.weight"].shape[0] for stage in stages],
        "embedding_size": state["backbone.embedder.embedder.convolution.weight"].shape[0],
    }
