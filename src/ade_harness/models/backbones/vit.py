"""Plain ViTs below an adapter: BEiT, DINOv2 and BEiT-3, whose blocks run one by one, and DINOv3, which is only read.

Sources: czczup/ViT-Adapter @ fd64a51 (BEiT and BEiTv2), facebookresearch/dinov2 eval/segmentation_m2f, torchscale 0.3.0
as microsoft/unilm's beit3 uses it (Wang et al. 2022), facebookresearch/dinov3 @ 6876159.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ade_harness.errors import HarnessError
from ade_harness.models.ops.attention import attend

_EPS = 1e-6


class PatchEmbedding(nn.Module):
    """Images [N, 3, H, W] to tokens [N, h * w, C]."""

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Return [N, h * w, C]."""
        tokens: Tensor = self.proj(images).flatten(2).transpose(1, 2)
        return tokens


class RelativeAttention(nn.Module):
    """BEiT's attention: a bias for each relative position within one window, and for the class token.

    Args:
        width: of the tokens.
        heads: number of heads.
        side: of the window, in patches.
    """

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads, self.side = heads, side
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * side - 1) ** 2 + 3, heads))
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return [N, 1 + S, C] of [N, 1 + S, C], S = side * side."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = F.linear(tokens, self.qkv.weight, bias)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = attend(q, k, v, self._position_bias().to(q.dtype))
        output: Tensor = self.proj(seen.transpose(1, 2).flatten(2))
        return output

    def _position_bias(self) -> Tensor:
        """Return [1, heads, 1 + S, 1 + S], the class token first."""
        index = relative_positions(self.side, self.relative_position_bias_table.device)
        return self.relative_position_bias_table[index].permute(2, 0, 1)[None].contiguous()


def relative_positions(side: int, device: torch.device) -> Tensor:
    """Return int64 [1 + side^2, 1 + side^2]: rows of BEiT's table of relative positions."""
    place = torch.arange(side, device=device)
    y, x = place.repeat_interleave(side), place.repeat(side)
    rows = (y[:, None] - y + side - 1) * (2 * side - 1) + (x[:, None] - x + side - 1)
    number = (2 * side - 1) ** 2 + 3
    index = F.pad(rows, (1, 0, 1, 0), value=number - 3)  # class token to patch
    index[1:, 0] = number - 2  # patch to class token
    index[:1, 0] = (
        number - 1
    )  # not of one element by itself, to which a number would be copied: the GPU would be waited for
    return index


class Mlp(nn.Module):
    """Two linear layers with GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return [N, S, C] of [N, S, C]."""
        output: Tensor = self.fc2(F.gelu(self.fc1(tokens)))
        return output


class SwiGlu(nn.Module):
    """A gated linear unit."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden)
        self.w2 = nn.Linear(width, hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return [N, S, C] of [N, S, C]."""
        output: Tensor = self.w3(F.silu(self.w1(tokens)) * self.w2(tokens))
        return output


class Block(nn.Module):
    """A block of a plain ViT: norms before the branches, learned scales after."""

    def __init__(self, width: int, attn: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=_EPS)
        self.attn = attn
        self.gamma_1 = nn.Parameter(torch.ones(width))
        self.norm2 = nn.LayerNorm(width, eps=_EPS)
        self.mlp = mlp
        self.gamma_2 = nn.Parameter(torch.ones(width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return [N, S, C] of [N, S, C]."""
        tokens = tokens + self.gamma_1 * self.attn(self.norm1(tokens))
        return tokens + self.gamma_2 * self.mlp(self.norm2(tokens))


class BeitTrunk(nn.Module):
    """BEiT without absolute positions: takes windows of one size.

    Args:
        width: of the tokens.
        depth: number of blocks.
        heads: of attention.
        hidden: of the MLP.
        patch_size: in pixels.
        image_size: side of the window in pixels.
    """

    def __init__(self, width: int, depth: int, heads: int, hidden: int, patch_size: int, image_size: int) -> None:
        super().__init__()
        self.width, self.patch_size = width, patch_size
        self.fixed_size = (image_size, image_size)
        self.patch_embed = PatchEmbedding(width, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        side = image_size // patch_size
        self.blocks = nn.ModuleList(
            Block(width, RelativeAttention(width, heads, side), Mlp(width, hidden)) for _ in range(depth)
        )

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return class token [N, 1, C] and patches [N, h * w, C]."""
        if tuple(images.shape[-2:]) != self.fixed_size:
            height, width = images.shape[-2:]
            raise HarnessError(
                f"an input of {height} x {width}: this network's relative positions are for {self.fixed_size[0]} x"
                f" {self.fixed_size[1]}. Use a protocol with windows of that size (inference=ss)."
            )
        return self.cls_token.expand(len(images), -1, -1), self.patch_embed(images)


class PlainAttention(nn.Module):
    """Multi-head self-attention with biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return [N, S, C] of [N, S, C]."""
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        output: Tensor = self.proj(attend(q, k, v).transpose(1, 2).flatten(2))
        return output


def resampled(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return positions [1, h * w, C] of a square grid's [1, n * n, C], bicubic to a size, as ViT-Adapter does."""
    side = math.isqrt(positions.shape[1])
    if grid == (side, side):
        return positions
    maps = positions.reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
    maps = F.interpolate(maps, grid, mode="bicubic", align_corners=False)
    return maps.flatten(2).transpose(1, 2).to(positions.dtype)


class Dinov2Trunk(nn.Module):
    """DINOv2 with resampled absolute positions.

    Args:
        width: of the tokens.
        depth: number of blocks.
        heads: of attention.
        hidden: of the MLP, or of the gated unit.
        patch_size: in pixels.
        positions: number of patches that positions were learned for.
        swiglu: whether the MLP is a gated unit.
    """

    def __init__(
        self, width: int, depth: int, heads: int, hidden: int, patch_size: int, positions: int, swiglu: bool
    ) -> None:
        super().__init__()
        self.width, self.patch_size = width, patch_size
        self.patch_embed = PatchEmbedding(width, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + positions, width))
        mlp = SwiGlu if swiglu else Mlp
        self.blocks = nn.ModuleList(
            Block(width, PlainAttention(width, heads), mlp(width, hidden)) for _ in range(depth)
        )

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return class token [N, 1, C] and patches [N, h * w, C]."""
        grid = (images.shape[2] // self.patch_size, images.shape[3] // self.patch_size)
        patches = self.patch_embed(images) + resampled(self.pos_embed[:, 1:], grid)
        return (self.cls_token + self.pos_embed[:, :1]).expand(len(images), -1, -1), patches


class Beit3Attention(nn.Module):
    """Attention with a norm before its output ("Magneto")."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.inner_attn_ln = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return [N, S, C] of [N, S, C]."""
        q, k, v = (
            project(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        output: Tensor = self.out_proj(self.inner_attn_ln(attend(q, k, v).transpose(1, 2).flatten(2)))
        return output


class Beit3Mlp(nn.Module):
    """Two linear layers with a norm before the second."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.ffn_layernorm = nn.LayerNorm(hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return [N, S, C] of [N, S, C]."""
        output: Tensor = self.fc2(self.ffn_layernorm(F.gelu(self.fc1(tokens))))
        return output


class Beit3Block(nn.Module):
    """A block of BEiT-3's vision branch."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.self_attn = Beit3Attention(width, heads)
        self.final_layer_norm = nn.LayerNorm(width)
        self.ffn = Beit3Mlp(width, hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return [N, S, C] of [N, S, C]."""
        tokens = tokens + self.self_attn(self.self_attn_layer_norm(tokens))
        return tokens + self.ffn(self.final_layer_norm(tokens))


class Beit3Trunk(nn.Module):
    """The vision branch of BEiT-3's encoder; called, it returns the official encoder's output.

    Args:
        width: of the tokens.
        depth: number of blocks.
        heads: of attention.
        hidden: of the MLP.
        patch_size: in pixels.
        positions: number of patches that positions were learned for.
    """

    def __init__(self, width: int, depth: int, heads: int, hidden: int, patch_size: int, positions: int) -> None:
        super().__init__()
        self.width, self.patch_size = width, patch_size
        self.patch_embed = PatchEmbedding(width, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.embed_positions = nn.Parameter(torch.zeros(positions + 3, width))
        self.blocks = nn.ModuleList(Beit3Block(width, heads, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return class token [N, 1, C] and patches [N, h * w, C]."""
        grid = (images.shape[2] // self.patch_size, images.shape[3] // self.patch_size)
        positions = self.embed_positions[None, 2:]  # the first two are of torchscale's padding
        patches = self.patch_embed(images) + resampled(positions[:, 1:], grid)
        return (self.cls_token + positions[:, :1]).expand(len(images), -1, -1), patches

    def forward(self, images: Tensor) -> Tensor:
        """Return the normed tokens [N, 1 + h * w, C], the class token first."""
        tokens = torch.cat(self.embed(images), 1)
        for block in self.blocks:
            tokens = block(tokens)
        normed: Tensor = self.norm(tokens)
        return normed


class Dinov3Trunk(nn.Module):
    """A frozen DINOv3, read after a few of its blocks.

    Args:
        network: transformers' DINOv3ViTModel.
        taps: blocks, counted from 0, whose output is read.
    """

    def __init__(self, network: Any, taps: tuple[int, ...]) -> None:
        super().__init__()
        self.network = network
        self.taps = taps
        config: Any = network.config
        self.width: int = config.hidden_size
        self.patch_size: int = config.patch_size
        self._prefix: int = 1 + config.num_register_tokens

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the normed patches [N, h * w, C] after each tap.

        On a GPU the ViT runs under bfloat16 autocast whatever the rest does, as in the official code.
        """
        with torch.autocast("cuda", torch.bfloat16, enabled=images.is_cuda):
            hidden = self.network(images, output_hidden_states=True).hidden_states
            return [self.network.norm(hidden[tap + 1])[:, self._prefix :] for tap in self.taps]
