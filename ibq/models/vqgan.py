"""VQGAN's encoder and decoder (arXiv 2012.09841), and the blocks that other networks share with them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ibq.models.tokenizer_config import TokenizerConfig
from ibq.ops.group_norm_silu import can_fuse, group_norm_silu, res_block


def norm(channels: int, config: TokenizerConfig) -> nn.GroupNorm:
    """The group normalization of all blocks."""
    return nn.GroupNorm(config.norm_groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut.

    With gradient checkpointing the backward pass makes again what is between the block's input and output, or, where
    it is selective, all but the convolutions. On CUDA the block is one operator, which is always selective.
    """

    def __init__(self, in_channels: int, out_channels: int, config: TokenizerConfig, bias: bool = True):
        super().__init__()
        self.recompute = config.gradient_checkpointing
        self.selective = config.checkpoint_selective
        self.norm1 = norm(in_channels, config)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)
        self.norm2 = norm(out_channels, config)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=bias)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1, bias=bias)
        else:
            self.nin_shortcut = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.recompute or not torch.is_grad_enabled():
            return self._block(x)
        if not self.selective:
            return checkpoint(self._block, x, use_reentrant=False)
        if self._fuses(x):
            return self._block(x)
        # Each half keeps what enters it. It is made again up to the convolution, whose result nobody needs.
        h = checkpoint(self._first, x, use_reentrant=False)
        return checkpoint(self._second, h, use_reentrant=False) + self._shortcut(x)

    def _fuses(self, x: Tensor) -> bool:
        dropping = self.training and self.dropout.p > 0
        return not dropping and can_fuse(x, (self.conv1, self.conv2))

    def _block(self, x: Tensor) -> Tensor:
        if self._fuses(x):
            shortcut = None if self.nin_shortcut is None else self._shortcut(x)
            return res_block(x, shortcut, (self.norm1, self.norm2), (self.conv1, self.conv2))
        return self._second(self._first(x)) + self._shortcut(x)

    def _first(self, x: Tensor) -> Tensor:
        return self.conv1(group_norm_silu(x, self.norm1))

    def _second(self, h: Tensor) -> Tensor:
        return self.conv2(self.dropout(group_norm_silu(h, self.norm2)))

    def _shortcut(self, x: Tensor) -> Tensor:
        return x if self.nin_shortcut is None else self.nin_shortcut(x)


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions of a level."""

    def __init__(self, channels: int, config: TokenizerConfig):
        super().__init__()
        self.norm = norm(channels, config)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # [B, C, H, W] -> [B, 1, HW, C]. Fused kernels want rows in one piece, else PyTorch makes a table of all
        # pairs; channels-last maps have them so.
        q, k, v = (proj(h).flatten(2).transpose(1, 2).unsqueeze(1).contiguous() for proj in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        h = h.squeeze(1).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Strided convolution; the padding is asymmetric, right and bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour doubling and a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution: ResBlocks, each followed by attention where the level has it.

    The encoder gives it a `downsample`, the decoder an `upsample`, for its end.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        blocks: int,
        attention: bool,
        config: TokenizerConfig,
        bias: bool = True,
    ):
        super().__init__()
        channels = [in_channels] + [out_channels] * blocks
        self.block = nn.ModuleList(ResBlock(channels[i], channels[i + 1], config, bias) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(out_channels, config) for _ in range(blocks if attention else 0))

    def in_order(self) -> list[nn.Module]:
        """What runs one after the other."""
        blocks = zip(self.block, self.attn, strict=True) if self.attn else zip(self.block, strict=True)
        change = [getattr(self, name) for name in ("downsample", "upsample") if hasattr(self, name)]
        return [*(part for pair in blocks for part in pair), *change]

    def forward(self, x: Tensor) -> Tensor:
        for part in self.in_order():
            x = part(x)
        return x


class Middle(nn.Module):
    """ResBlock, attention, ResBlock at the lowest resolution."""

    def __init__(self, channels: int, config: TokenizerConfig):
        super().__init__()
        self.block_1 = ResBlock(channels, channels, config)
        self.attn_1 = AttnBlock(channels, config)
        self.block_2 = ResBlock(channels, channels, config)

    def in_order(self) -> list[nn.Module]:
        """What runs one after the other."""
        return [self.block_1, self.attn_1, self.block_2]

    def forward(self, x: Tensor) -> Tensor:
        for part in self.in_order():
            x = part(x)
        return x


class Encoder(nn.Module):
    """Image [B, 3, H, W] -> features [B, latent_channels, h, w]."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        widths = [config.channels * m for m in config.channel_multipliers]
        self.conv_in = nn.Conv2d(config.in_channels, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        previous = config.channels
        for level, width in enumerate(widths):
            module = Level(previous, width, config.res_blocks, config.has_attention(level), config)
            if level < len(widths) - 1:
                module.downsample = Downsample(width)
            self.down.append(module)
            previous = width
        self.mid = Middle(previous, config)
        self.norm_out = norm(previous, config)
        self.conv_out = nn.Conv2d(previous, config.latent_channels, 3, padding=1)

    def units(self) -> list[nn.Module]:
        """See `Tokenizer.units`."""
        return [*self.down, self.mid]

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv_in(images)
        for level in self.down:
            h = level(h)
        return self.conv_out(group_norm_silu(self.mid(h), self.norm_out))


class Decoder(nn.Module):
    """Features [B, latent_channels, h, w] -> image [B, 3, H, W]."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        widths = [config.channels * m for m in config.channel_multipliers]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config)
        levels = []
        previous = widths[-1]
        for level in reversed(range(len(widths))):
            module = Level(previous, widths[level], config.res_blocks + 1, config.has_attention(level), config)
            if level > 0:
                module.upsample = Upsample(widths[level])
            levels.insert(0, module)  # up[0] is the full resolution, as in the published checkpoints
            previous = widths[level]
        self.up = nn.ModuleList(levels)
        self.norm_out = norm(previous, config)
        self.conv_out = nn.Conv2d(previous, config.in_channels, 3, padding=1)

    def units(self) -> list[nn.Module]:
        """See `Tokenizer.units`."""
        return [self.mid, *self.up]

    def in_order(self) -> list[nn.Module]:
        """What runs one after the other between the first and the last convolution."""
        return [self.mid, *reversed(self.up)]

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        for part in self.in_order():
            h = part(h)
        return self.conv_out(group_norm_silu(h, self.norm_out))
