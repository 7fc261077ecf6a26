"""Open-MAGVIT2's encoder and decoder (arXiv 2409.04410, section 3.1).

What differs from VQGAN's: no attention; ResBlocks without biases; as many ResBlocks in the middle and per level of the
decoder as per level of the encoder; strided convolutions with padding on all sides; depth-to-space upsampling; and
before every level of the decoder a group normalization whose scale and shift follow from the latents. Parameter names
are those of the published checkpoints.
"""

from torch import Tensor, nn

from ibq.models.tokenizer_config import TokenizerConfig
from ibq.models.vqgan import Level, ResBlock, norm
from ibq.ops.group_norm_silu import group_norm_silu

EPS = 1e-6


class DepthToSpace(nn.Module):
    """Doubles the image: a convolution to four times the channels, which become 2 x 2 pixels."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_space(self.conv1(x))

    def to_space(self, x: Tensor) -> Tensor:
        """[B, 4 C, H, W] -> [B, C, 2 H, 2 W]."""
        batch, channels, height, width = x.shape
        # The channels of the four pixels follow one another, row by row (`pixel_shuffle` has them interleaved).
        x = x.view(batch, 2, 2, channels // 4, height, width)
        return x.permute(0, 3, 4, 1, 5, 2).reshape(batch, channels // 4, 2 * height, 2 * width)


class AdaptiveGroupNorm(nn.Module):
    """Group normalization scaled by the latents' standard deviation and shifted by their mean, each through a layer."""

    def __init__(self, latent_channels: int, channels: int, config: TokenizerConfig):
        super().__init__()
        self.gn = nn.GroupNorm(config.norm_groups, channels, eps=EPS, affine=False)
        self.gamma = nn.Linear(latent_channels, channels)
        self.beta = nn.Linear(latent_channels, channels)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        scale, shift = self.scale_and_shift(latents)
        return scale * self.gn(x) + shift

    def scale_and_shift(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, 1, 1] each, of latents [B, D, h, w]."""
        latents = latents.flatten(2)  # [B, D, hw]
        scale = self.gamma((latents.var(dim=-1) + EPS).sqrt())
        shift = self.beta(latents.mean(dim=-1))
        return scale[:, :, None, None], shift[:, :, None, None]


def _middle(channels: int, config: TokenizerConfig) -> nn.ModuleList:
    return nn.ModuleList(ResBlock(channels, channels, config, bias=False) for _ in range(config.res_blocks))


class Encoder(nn.Module):
    """Image [B, 3, H, W] -> latents [B, latent_channels, h, w]."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        widths = [config.channels * m for m in config.channel_multipliers]
        self.conv_in = nn.Conv2d(config.in_channels, config.channels, 3, padding=1, bias=False)
        self.down = nn.ModuleList()
        previous = config.channels
        for level, width in enumerate(widths):
            module = Level(previous, width, config.res_blocks, False, config, bias=False)
            if level < len(widths) - 1:
                module.downsample = nn.Conv2d(width, width, 3, stride=2, padding=1)
            self.down.append(module)
            previous = width
        self.mid_block = _middle(previous, config)
        self.norm_out = norm(previous, config)
        self.conv_out = nn.Conv2d(previous, config.latent_channels, 1)

    def units(self) -> list[nn.Module]:
        """See `Tokenizer.units`."""
        return [*self.down, *self.mid_block]

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv_in(images)
        for part in self.units():
            h = part(h)
        return self.conv_out(group_norm_silu(h, self.norm_out))


class Decoder(nn.Module):
    """Latents [B, latent_channels, h, w] -> image [B, 3, H, W]."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        widths = [config.channels * m for m in config.channel_multipliers]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid_block = _middle(widths[-1], config)
        levels, norms = [], []
        previous = widths[-1]
        for level in reversed(range(len(widths))):
            module = Level(previous, widths[level], config.res_blocks, False, config, bias=False)
            if level > 0:
                module.upsample = DepthToSpace(widths[level])
            levels.insert(0, module)  # up[0] is the full resolution, as in the published checkpoints
            norms.insert(0, AdaptiveGroupNorm(config.latent_channels, previous, config))
            previous = widths[level]
        self.up = nn.ModuleList(levels)
        self.adaptive = nn.ModuleList(norms)
        self.norm_out = norm(previous, config)
        self.conv_out = nn.Conv2d(previous, config.in_channels, 3, padding=1)

    def units(self) -> list[nn.Module]:
        """See `Tokenizer.units`."""
        return [*self.mid_block, *self.up]

    def in_order(self) -> list[nn.Module]:
        """What runs one after the other between the first and the last convolution."""
        levels = zip(reversed(self.adaptive), reversed(self.up), strict=True)
        return [*self.mid_block, *(part for pair in levels for part in pair)]

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        for part in self.in_order():
            h = part(h, z) if isinstance(part, AdaptiveGroupNorm) else part(h)
        return self.conv_out(group_norm_silu(h, self.norm_out))
