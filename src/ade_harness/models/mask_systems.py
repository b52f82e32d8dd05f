"""What the mask-classification systems share: assembling parts, backbones from transformers, and the public door."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ade_harness.models.families import Keys, count, load_hub_names
from ade_harness.models.keymaps import Table
from ade_harness.models.outputs import MaskLogits
from ade_harness.models.reference import reference_operations, register_with_transformers
from ade_harness.models.weights import load_strictly


class MaskClassifier(nn.Module):
    """Normalised images float32 [N, 3, H, W] to class and mask logits.

    Args:
        backbone: images to features of strides 4, 8, 16, 32.
        head: modules ``pixel_decoder`` and ``decoder``.
    """

    def __init__(self, backbone: nn.Module, head: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.backbone = backbone
        self.pixel_decoder = head["pixel_decoder"]
        self.decoder = head["decoder"]
        self.fixed_size: tuple[int, int] | None = getattr(backbone, "fixed_size", None)
        """(height, width) of the only input it takes."""

    def forward(self, images: Tensor) -> MaskLogits:
        """Return class logits [N, Q, 151] and mask logits [N, Q, H/4, W/4]."""
        mask_features, maps = self.pixel_decoder(self.backbone(images))
        logits: MaskLogits = self.decoder(mask_features, maps)
        return logits


class SemanticScores(nn.Module):
    """What ``from_official`` returns for these systems: scores per pixel, and the logits that they are made of.

    Args:
        network: images to :class:`~ade_harness.models.outputs.MaskLogits`.
        at_mask_size: sum up the queries at the masks' size and enlarge the scores (mmsegmentation's lineage), in
            place of enlarging the masks first (all others).
    """

    def __init__(self, network: nn.Module, at_mask_size: bool) -> None:
        super().__init__()
        self.network = network
        self.at_mask_size = at_mask_size

    def raw_outputs(self, images: Tensor) -> MaskLogits:
        """Return (class logits [N, Q, 151], mask logits [N, Q, h, w]) of normalised images [N, 3, H, W].

        Computed in the official order of additions: evaluations use faster forms, see models/reference.py.
        """
        with reference_operations():
            logits: MaskLogits = self.network(images)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Return scores [N, 150, H, W] of normalised images [N, 3, H, W]: sums of class times mask probabilities."""
        classes, masks = self.raw_outputs(images)
        size = images.shape[-2:]
        weights = classes.softmax(-1)[..., :-1]
        if self.at_mask_size:
            scores = torch.einsum("nqc,nqhw->nchw", weights, masks.sigmoid())
            return F.interpolate(scores, size, mode="bilinear", align_corners=False)
        masks = F.interpolate(masks, size, mode="bilinear", align_corners=False)
        return torch.einsum("nqc,nqhw->nchw", weights, masks.sigmoid())


def load_own(make: Callable[[], nn.Module], state: Mapping[str, Tensor] | None, keys: Keys) -> nn.Module:
    """Build a module of ours that takes the tensors of `state` for its own, or has random weights.

    Raises:
        HarnessError: keys do not fit.
    """
    if state is None:
        return make().eval()
    with torch.device("meta"):  # no memory, no time for random numbers
        module = make().eval()
    load_strictly(module, dict(state), keys.origin, keys.allow_missing, keys.allow_unexpected)
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_meta and not next(iter(state.values())).is_meta:
                part._buffers[name] = torch.zeros_like(buffer, device="cpu")  # counters of batches, in no file
    return module


def split(state: Mapping[str, Tensor] | None, prefix: str) -> tuple[dict[str, Tensor] | None, dict[str, Tensor] | None]:
    """Return the weights under a prefix, without it, and the others; None if there are none at all."""
    if state is None:
        return None, None
    under = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return under, {key: value for key, value in state.items() if not key.startswith(prefix)}


class Head(nn.Module):
    """Holds the two halves of a head while they are loaded."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.pixel_decoder = parts["pixel_decoder"]
        self.decoder = parts["decoder"]


def assemble(
    backbone: nn.Module,
    make_head: Callable[[], Mapping[str, nn.Module]],
    state: Mapping[str, Tensor] | None,
    keys: Keys,
) -> MaskClassifier:
    """Put a loaded backbone and the head, with its weights in `state`, together."""
    head: Any = load_own(lambda: Head(make_head()), state, keys)
    return MaskClassifier(backbone, {"pixel_decoder": head.pixel_decoder, "decoder": head.decoder}).eval()


_STAGES = ["stage1", "stage2", "stage3", "stage4"]


class Pyramid(nn.Module):
    """A transformers backbone: images to its feature maps."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return features of strides 4, 8, 16, 32."""
        return list(self.network(images).feature_maps)


SWIN_FIELDS = ("embed_dim", "depths", "num_heads", "window_size")


def build_swin(fields: Mapping[str, Any], state: Mapping[str, Tensor] | None, keys: Keys) -> Pyramid:
    """Build transformers' Swin; `state` in the hub's names."""
    from transformers import SwinBackbone, SwinConfig

    config = SwinConfig(out_features=_STAGES, **{name: fields[name] for name in SWIN_FIELDS})
    network: Any = load_hub_names(SwinBackbone, config, state, keys)
    network.set_attn_implementation(register_with_transformers())
    body = getattr(network, "swin", None)
    if body is not None:
        body.layernorm = nn.Identity()  # transformers' own, after the last stage: no file has it, nothing reads it
    return Pyramid(network)


def read_swin(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the architecture of a Swin whose names begin with ``backbone.``."""
    table = "backbone.encoder.layers.{}.blocks.0.attention.self.relative_position_bias_table"
    return {
        "embed_dim": state["backbone.embeddings.patch_embeddings.projection.weight"].shape[0],
        "depths": [count(state, f"backbone.encoder.layers.{s}.blocks.{{N}}.") for s in range(4)],
        "num_heads": [state[table.format(s)].shape[1] for s in range(4)],
        "window_size": (math.isqrt(state[table.format(0)].shape[0]) + 1) // 2,
    }


def swin_channels(fields: Mapping[str, Any]) -> Sequence[int]:
    """Return the channels of the four features."""
    return [fields["embed_dim"] * 2**stage for stage in range(4)]


def build_resnet(fields: Mapping[str, Any], state: Mapping[str, Tensor] | None, keys: Keys) -> Pyramid:
    """Build transformers' ResNet with bottlenecks whose stride is in the 3 x 3 convolution."""
    from transformers import ResNetBackbone, ResNetConfig

    config = ResNetConfig(
        depths=fields["depths"],
        hidden_sizes=fields["hidden_sizes"],
        embedding_size=fields["embedding_size"],
        layer_type="bottleneck",
        downsample_in_bottleneck=False,
        out_features=_STAGES,
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
