"""ViT-Adapter (Chen et al. 2023): a plain ViT's tokens and a small convolutional pyramid exchange what they know.

Official codes: czczup/ViT-Adapter @ fd64a51 (BEiT), facebookresearch/dinov2 (a patch of 14 beside the pyramid's 16),
and facebookresearch/dinov3 @ 6876159 (nothing is injected: the frozen ViT is only read). No library has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ade_harness.errors import HarnessError
from ade_harness.models.checkpoint.family import count
from ade_harness.models.ops.deformable import DeformableAttention, centres

POINTS = 4
_EPS = 1e-6
Shape = tuple[int, int]


class ConvBnRelu(nn.Sequential):
    """A 3 x 3 convolution, batch norm and ReLU."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )


class SpatialPrior(nn.Module):
    """Images to maps of strides 4, 8, 16, 32, by convolutions alone.

    Args:
        planes: channels of the first convolutions.
        width: of the ViT.
    """

    def __init__(self, planes: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *ConvBnRelu(3, planes, 2),
            *ConvBnRelu(planes, planes, 1),
            *ConvBnRelu(planes, planes, 1),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.conv2 = ConvBnRelu(planes, 2 * planes, 2)
        self.conv3 = ConvBnRelu(2 * planes, 4 * planes, 2)
        self.conv4 = ConvBnRelu(4 * planes, 4 * planes, 2)
        for n, channels in enumerate((planes, 2 * planes, 4 * planes, 4 * planes), 1):
            self.add_module(f"fc{n}", nn.Conv2d(channels, width, 1))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return four maps [N, C, h, w]."""
        maps = [self.stem(images)]
        for conv in (self.conv2, self.conv3, self.conv4):
            maps.append(conv(maps[-1]))
        return [self.get_submodule(f"fc{n}")(m) for n, m in enumerate(maps, 1)]


class ConvFfn(nn.Module):
    """Two linear layers with a depthwise convolution between them, on the tokens of three maps."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.dwconv = nn.ModuleDict({"dwconv": nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)})
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor, shapes: Sequence[Shape]) -> Tensor:
        """Return [N, S, C] of [N, S, C]."""
        parts = self.fc1(tokens).split([height * width for height, width in shapes], 1)
        mixed = [
            self.dwconv["dwconv"](part.transpose(1, 2).unflatten(2, shape).contiguous()).flatten(2).transpose(1, 2)
            for part, shape in zip(parts, shapes, strict=True)
        ]
        output: Tensor = self.fc2(F.gelu(torch.cat(mixed, 1)))
        return output


class Extractor(nn.Module):
    """The pyramid's tokens look at the ViT's."""

    def __init__(self, width: int, heads: int, value_width: int, hidden: int) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(width, eps=_EPS)
        self.feat_norm = nn.LayerNorm(width, eps=_EPS)
        self.attn = DeformableAttention(width, heads, 1, POINTS, value_width)
        self.ffn = ConvFfn(width, hidden)
        self.ffn_norm = nn.LayerNorm(width, eps=_EPS)

    def forward(self, pyramid: Tensor, shapes: Sequence[Shape], patches: Tensor, grid: Shape) -> Tensor:
        """Return the pyramid's tokens [N, S, C]; patches [N, h * w, C]."""
        references = centres(shapes, pyramid.device)
        pyramid = pyramid + self.attn(self.query_norm(pyramid), references, self.feat_norm(patches), [grid])
        return pyramid + self.ffn(self.ffn_norm(pyramid), shapes)


class Injector(nn.Module):
    """The ViT's tokens look at the pyramid's."""

    def __init__(self, width: int, heads: int, value_width: int) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(width, eps=_EPS)
        self.feat_norm = nn.LayerNorm(width, eps=_EPS)
        self.attn = DeformableAttention(width, heads, 3, POINTS, value_width)
        self.gamma = nn.Parameter(torch.zeros(width))

    def forward(self, patches: Tensor, grid: Shape, pyramid: Tensor, shapes: Sequence[Shape]) -> Tensor:
        """Return the ViT's tokens [N, h * w, C]; pyramid [N, S, C]."""
        references = centres([grid], patches.device)
        seen = self.attn(self.query_norm(patches), references, self.feat_norm(pyramid), shapes)
        return patches + self.gamma * seen


class Interaction(nn.Module):
    """What happens around some of the ViT's blocks: injection before, if there is one, extraction after."""

    def __init__(
        self, width: int, heads: int, value_width: int, hidden: int, *, injects: bool, extra_extractors: int
    ) -> None:
        super().__init__()
        self.injector = Injector(width, heads, value_width) if injects else None
        self.extractor = Extractor(width, heads, value_width, hidden)
        self.extra_extractors = nn.ModuleList(
            Extractor(width, heads, value_width, hidden) for _ in range(extra_extractors)
        )

    def extract(self, pyramid: Tensor, shapes: Sequence[Shape], patches: Tensor, grid: Shape) -> Tensor:
        """Return the pyramid's tokens [N, S, C]."""
        for extractor in (self.extractor, *self.extra_extractors):
            pyramid = extractor(pyramid, shapes, patches, grid)
        return pyramid


class Trunk(Protocol):
    """A plain ViT whose blocks can be run one by one."""

    patch_size: int
    width: int
    blocks: nn.ModuleList

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return class token [N, 1, C] and patches [N, h * w, C], with positions."""


class FrozenTrunk(Protocol):
    """A plain ViT whose features are read at a few depths."""

    patch_size: int
    width: int

    def features(self, images: Tensor) -> list[Tensor]:
        """Return patches [N, h * w, C] at each depth."""


class VitAdapter(nn.Module):
    """Normalised images [N, 3, H, W], sides multiples of 32, to features of strides 4, 8, 16, 32.

    Args:
        trunk: a :class:`Trunk`, or a :class:`FrozenTrunk` for DINOv3's form without injection.
        groups: blocks between interactions, such as [6, 6, 6, 6]; their number for a frozen trunk.
        heads: of deformable attention.
        value_width: of its values.
        hidden: of the convolutional feed-forward.
        planes: of the spatial prior's first convolutions.
    """

    def __init__(
        self, trunk: Any, groups: Sequence[int] | int, heads: int, value_width: int, hidden: int, planes: int
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.groups = None if isinstance(groups, int) else tuple(groups)
        number = groups if isinstance(groups, int) else len(groups)
        width = trunk.width
        self.level_embed = nn.Parameter(torch.randn(3, width))
        self.spm = SpatialPrior(planes, width)
        self.interactions = nn.ModuleList(
            Interaction(
                width, heads, value_width, hidden,
                injects=self.groups is not None, extra_extractors=2 if i == number - 1 else 0,
            )
            for i in range(number)
        )  # fmt: skip
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2)
        for n in range(1, 5):
            self.add_module(f"norm{n}", nn.BatchNorm2d(width))
        self.fixed_size: Shape | None = getattr(trunk, "fixed_size", None)
        """(height, width) of the only input it takes."""

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return four features [N, C, h, w]."""
        height, width = images.shape[-2:]
        patch = self.trunk.patch_size
        if height % 32 or width % 32 or height % patch or width % patch:
            raise HarnessError(
                f"an input of {height} x {width}: ViT-Adapter needs sides that are multiples of 32 (and of the ViT's"
                f" patch, {patch}). Use a protocol with such windows, as the model's own are (inference=ss)."
            )
        grid = (height // patch, width // patch)
        shapes = [(height // stride, width // stride) for stride in (8, 16, 32)]
        finest, *coarser = self.spm(images)
        pyramid = torch.cat([m.flatten(2).transpose(1, 2) + self.level_embed[i] for i, m in enumerate(coarser)], 1)
        patches_at, pyramid = self._interact(images, pyramid, shapes, grid)
        parts = pyramid.split([h * w for h, w in shapes], 1)
        maps = [p.transpose(1, 2).unflatten(2, shape).contiguous() for p, shape in zip(parts, shapes, strict=True)]
        maps = [self.up(maps[0]) + finest, *maps]
        features = []
        for n, (m, patches) in enumerate(zip(maps, patches_at, strict=True), 1):
            tokens = patches.transpose(1, 2).unflatten(2, grid).contiguous()
            if tokens.shape[2:] != m.shape[2:]:
                tokens = F.interpolate(tokens, m.shape[2:], mode="bilinear", align_corners=False)
            features.append(self.get_submodule(f"norm{n}")(m + tokens))
        return features

    def _interact(
        self, images: Tensor, pyramid: Tensor, shapes: Sequence[Shape], grid: Shape
    ) -> tuple[list[Tensor], Tensor]:
        """Return the ViT's patches after each interaction and the pyramid's tokens at the end."""
        if self.groups is None:
            patches_at = self.trunk.features(images)
            for interaction, patches in zip(self.interactions, patches_at, strict=True):
                pyramid = interaction.extract(pyramid, shapes, patches, grid)  # type: ignore[operator]
            return patches_at, pyramid
        token, patches = self.trunk.embed(images)
        patches_at, first = [], 0
        for interaction, number in zip(self.interactions, self.groups, strict=True):
            patches = interaction.injector(patches, grid, pyramid, shapes)  # type: ignore[operator]
            tokens = torch.cat([token, patches], 1)
            for block in self.trunk.blocks[first : first + number]:
                tokens = block(tokens)
            token, patches = tokens[:, :1], tokens[:, 1:]
            pyramid = interaction.extract(pyramid, shapes, patches, grid)  # type: ignore[operator]
            patches_at.append(patches)
            first += number
        return patches_at, pyramid


def read_adapter(state: Mapping[str, Tensor], prefix: str = "backbone.") -> dict[str, Any]:
    """Return the adapter's architecture."""
    first = prefix + "interactions.0.extractor."
    return {
        "deform_heads": state[first + "attn.attention_weights.weight"].shape[0] // POINTS,
        "deform_width": state[first + "attn.value_proj.weight"].shape[0],
        "adapter_hidden": state[first + "ffn.fc1.weight"].shape[0],
        "planes": state[prefix + "spm.stem.0.weight"].shape[0],
        "interactions": count(state, prefix + "interactions.{N}."),
    }


ADAPTER_FIELDS = ("deform_heads", "deform_width", "adapter_hidden", "planes", "interactions")


def build_adapter(trunk: Any, depth: int | None, fields: Mapping[str, Any]) -> VitAdapter:
    """Return an adapter whose interactions divide `depth` blocks evenly; None for a frozen trunk."""
    number = fields["interactions"]
    if depth is not None and depth % number:
        raise ValueError(f"interactions={number}: {depth} blocks cannot be divided evenly")
    return VitAdapter(
        trunk, number if depth is None else [depth // number] * number, fields["deform_heads"],
        fields["deform_width"], fields["adapter_hidden"], fields["planes"],
    )  # fmt: skip
