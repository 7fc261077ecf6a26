"""Vision transformers (ViT, arXiv 2010.11929) as DINO, DINOv2 and DINOv3 publish them: names, shapes and arithmetic.

The names of the parameters are those of the published files, so that a file loads as it is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ibq.config import require_least

ROTARY_BASE = 100.0  # of DINOv3's periods

BackboneName = Literal["dino_vits16", "dino_vitb16", "dinov2_vits14", "dinov2_vitb14", "dinov3_vits16", "dinov3_vitb16"]


@dataclass(frozen=True, kw_only=True)
class VisionTransformerConfig:
    """A vision transformer with MLPs of four times its width."""

    width: int
    depth: int
    heads: int
    patch: int  # pixels
    side: int = 224  # pixels of the images that the position embedding is made for
    layer_scale: bool = False  # a trained factor for each channel of what a block adds (CaiT): DINOv2, DINOv3
    registers: int = 0  # tokens beside the class token (arXiv 2309.16588)
    rotary: bool = False  # rotations of queries and keys instead of a position embedding: DINOv3 (arXiv 2508.10104)

    def __post_init__(self):
        require_least(self, width=1, depth=1, heads=1, patch=1, side=self.patch, registers=0)
        if self.width % self.heads or (self.rotary and self.width // self.heads % 4):
            of = "heads times 4, with rotary" if self.rotary else "heads"
            raise ValueError(f"width: {self.width} is no multiple of {of}, {self.heads}; change either")

    @property
    def epsilon(self) -> float:
        """Of the layer normalizations."""
        return 1e-5 if self.rotary else 1e-6

    def grid(self, side: int) -> int:
        """Patches along a side of so many pixels."""
        return side // self.patch


def _published(width: int, patch: int, **settings) -> VisionTransformerConfig:
    return VisionTransformerConfig(width=width, depth=12, heads=width // 64, patch=patch, **settings)


_DINOV2 = {"side": 518, "layer_scale": True}
_DINOV3 = {"layer_scale": True, "registers": 4, "rotary": True}
BACKBONES: dict[BackboneName, VisionTransformerConfig] = {
    "dino_vits16": _published(384, 16),
    "dino_vitb16": _published(768, 16),
    "dinov2_vits14": _published(384, 14, **_DINOV2),
    "dinov2_vitb14": _published(768, 14, **_DINOV2),
    "dinov3_vits16": _published(384, 16, **_DINOV3),
    "dinov3_vitb16": _published(768, 16, **_DINOV3),
}


class LayerScale(nn.Module):
    """A trained factor for each channel (CaiT, arXiv 2103.17239)."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] times the factors."""
        return x * self.gamma


class Attention(nn.Module):
    """Attention of all tokens to all."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """x [B, N, C]; `rotation`: cosines and sines [patches, C / heads] for the last of the tokens."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, N, D] each
        if rotation is not None:
            q, k = _rotated(q, *rotation), _rotated(k, *rotation)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x [B, heads, N, D] with the last tokens, the patches, rotated."""
    first, patches = x.split([x.shape[2] - len(cosine), len(cosine)], dim=2)
    a, b = patches.chunk(2, dim=-1)
    turned = patches * cosine + torch.cat([-b, a], dim=-1) * sine
    return torch.cat([first, turned.to(x.dtype)], dim=2)


class Mlp(nn.Module):
    """Two layers with GELU."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, C]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP, each on normalized tokens and added to them."""

    def __init__(self, config: VisionTransformerConfig):
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width, eps=config.epsilon)
        self.attn = Attention(width, config.heads)
        self.ls1 = LayerScale(width) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=config.epsilon)
        self.mlp = Mlp(width)
        self.ls2 = LayerScale(width) if config.layer_scale else nn.Identity()

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """x [B, N, C]."""
        x = x + self.ls1(self.attn(self.norm1(x), rotation))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbedding(nn.Module):
    """Images [B, 3, S, S] -> patches [B, L, C], row by row."""

    def __init__(self, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        """The patches of the images."""
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Normalized images -> tokens after chosen blocks; the first is the class token, then registers, then patches."""

    def __init__(self, config: VisionTransformerConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        if config.registers:
            self.storage_tokens = nn.Parameter(torch.empty(1, config.registers, width))
        if not config.rotary:
            self.pos_embed = nn.Parameter(torch.empty(1, config.grid(config.side) ** 2 + 1, width))
        self.patch_embed = PatchEmbedding(width, config.patch)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=config.epsilon)
        self.reset_parameters()
        self.fit(config.side)

    def reset_parameters(self) -> None:
        """Normal numbers of standard deviation 0.02 for tokens, positions and matrices, as ViT's."""
        for name, parameter in self.named_parameters():
            if name.endswith(("_token", "_tokens", "pos_embed")) or (parameter.dim() == 2):
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.endswith(("fc1.bias", "fc2.bias", "qkv.bias", "attn.proj.bias")):
                nn.init.zeros_(parameter)

    def fit(self, side: int) -> None:
        """From now on take images of so many pixels a side: positions are resized once, as DINO does."""
        grid = self.config.grid(side)
        if not self.config.rotary:
            self.pos_embed = nn.Parameter(
                resized_positions(self.pos_embed.detach(), grid), requires_grad=self.pos_embed.requires_grad
            )
            return
        cosine, sine = rotations(grid, self.config.width // self.config.heads)
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("sine", sine, persistent=False)

    def forward(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Tokens [B, 1 + registers + patches, C] of images [B, 3, S, S] after so many blocks each, in that order."""
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        if not self.config.rotary:
            x = x + self.pos_embed
        if self.config.registers:
            x = torch.cat([x[:, :1], self.storage_tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        rotation = (self.cosine, self.sine) if self.config.rotary else None
        found = {0: x}
        for number, block in enumerate(self.blocks[: max(layers)], start=1):
            x = block(x, rotation)
            found[number] = x
        return [found[layer] for layer in layers]


def resized_positions(positions: Tensor, grid: int) -> Tensor:
    """Position embeddings [1, 1 + M^2, C] for another grid, [1, 1 + grid^2, C]; that of the class token stays.

    Bicubic; the factor is that of DINO and DINOv2, whose grid is larger by a tenth of a patch.
    """
    old = math.isqrt(positions.shape[1] - 1)
    if old == grid:
        return positions
    table = positions[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)
    factor = (grid + 0.1) / old
    table = F.interpolate(table, scale_factor=(factor, factor), mode="bicubic")
    return torch.cat([positions[:, :1], table.flatten(2).transpose(1, 2)], dim=1)


def rotations(grid: int, dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [grid^2, dim] of DINOv3's rotations (arXiv 2508.10104), by row and column in [-1, 1]."""
    periods = ROTARY_BASE ** (2 * torch.arange(dim // 4) / (dim // 2))
    middle = (torch.arange(grid) + 0.5) / grid * 2 - 1
    places = torch.stack(torch.meshgrid(middle, middle, indexing="ij"), dim=-1).flatten(0, 1)  # [grid^2, 2]
    angles = (2 * math.pi * places[:, :, None] / periods).flatten(1).repeat(1, 2)
    return angles.cos(), angles.sin()
