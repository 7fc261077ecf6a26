"""The image tokenizer: VQGAN encoder and decoder (arXiv 2012.09841) around a quantizer."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import register_dataclass
from torch.utils.checkpoint import checkpoint

from ibq.quantizers import IBQConfig, QuantizerConfig, build_quantizer

SMALLEST_IMAGE = 7  # pixels: the window of SSIM, which every run measures on its reconstructions


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Architecture of the tokenizer; the defaults are the paper's at 256 px."""

    resolution: int = 256  # nominal: chooses the attention levels; any multiple of the downsampling can be fed
    in_channels: int = 3
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (
        1,
        1,
        2,
        2,
        4,
    )  # one entry a level; each level but the last halves the image
    res_blocks: int = 4  # ResBlocks per level of the encoder; the decoder has one more
    attention_resolutions: tuple[int, ...] = (16,)
    latent_channels: int = 256
    norm_groups: int = 32
    dropout: float = 0.0
    gradient_checkpointing: bool = False  # recompute every ResBlock in the backward pass
    quantizer: QuantizerConfig = field(default_factory=IBQConfig)

    def __post_init__(self):
        for name in ("in_channels", "channels", "latent_channels", "norm_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.resolution < SMALLEST_IMAGE:
            raise ValueError(
                f"resolution: must be at least {SMALLEST_IMAGE}, the pixels that SSIM needs, got {self.resolution}"
            )
        if not self.channel_multipliers or min(self.channel_multipliers) < 1 or self.res_blocks < 1:
            raise ValueError("channel_multipliers: need at least one level of at least one ResBlock; see the defaults")
        for multiplier in self.channel_multipliers:
            if self.channels * multiplier % self.norm_groups:
                raise ValueError(
                    f"channels: {self.channels} x {multiplier} channels do not divide into {self.norm_groups} "
                    f"normalization groups; use a multiple of {self.norm_groups}, or fewer `norm_groups`"
                )
        if self.resolution % self.downsampling:
            raise ValueError(
                f"resolution: {self.resolution} is not a multiple of the downsampling {self.downsampling} "
                "(2 ** (levels - 1)); change it or `channel_multipliers`"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: must lie in [0, 1), got {self.dropout}")

    @property
    def downsampling(self) -> int:
        """Pixels per token along a side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def tokens_per_side(self) -> int:
        """Tokens along a side at the nominal resolution."""
        return self.resolution // self.downsampling

    def has_attention(self, level: int) -> bool:
        """Whether the level (0 = full resolution) has attention blocks."""
        return self.resolution // 2**level in self.attention_resolutions


@dataclass(frozen=True, kw_only=True)
class TokenizerOutput:
    """What one pass through the tokenizer gives."""

    reconstruction: Tensor  # [B, 3, H, W], about [-1, 1], not clamped
    codes: Tensor  # [B, h, w]
    losses: dict[str, Tensor]  # unweighted scalars of the quantizer
    metrics: dict[str, Tensor]  # detached scalars of the quantizer


# So that hooks on a module's output, as engines have them, find the tensors in it.
register_dataclass(TokenizerOutput)


def _norm(channels: int, config: TokenizerConfig) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut, recomputed in the backward pass with gradient checkpointing."""

    def __init__(self, in_channels: int, out_channels: int, config: TokenizerConfig):
        super().__init__()
        self.recompute = config.gradient_checkpointing
        self.norm1 = _norm(in_channels, config)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, config)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        else:
            self.nin_shortcut = None

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._block, x, use_reentrant=False)
        return self._block(x)

    def _block(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions of a level."""

    def __init__(self, channels: int, config: TokenizerConfig):
        super().__init__()
        self.norm = _norm(channels, config)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # [B, C, H, W] -> [B, 1, HW, C]
        q, k, v = (proj(h).flatten(2).transpose(1, 2).unsqueeze(1) for proj in (self.q, self.k, self.v))
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

    def __init__(self, in_channels: int, out_channels: int, blocks: int, attention: bool, config: TokenizerConfig):
        super().__init__()
        channels = [in_channels] + [out_channels] * blocks
        self.block = nn.ModuleList(ResBlock(channels[i], channels[i + 1], config) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(out_channels, config) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


class Middle(nn.Module):
    """ResBlock, attention, ResBlock at the lowest resolution."""

    def __init__(self, channels: int, config: TokenizerConfig):
        super().__init__()
        self.block_1 = ResBlock(channels, channels, config)
        self.attn_1 = AttnBlock(channels, config)
        self.block_2 = ResBlock(channels, channels, config)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


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
        self.norm_out = _norm(previous, config)
        self.conv_out = nn.Conv2d(previous, config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv_in(images)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


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
        self.norm_out = _norm(previous, config)
        self.conv_out = nn.Conv2d(previous, config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Tokenizer(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] <-> codes [B, h, w]."""

    # Besides `forward`, for engines that gather weights for a call: (path of a module, method).
    forward_methods = (("", "encode_latents"), ("", "encode"), ("", "decode"))

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantizer = build_quantizer(config.quantizer)
        self.quant_conv = nn.Conv2d(config.latent_channels, self.quantizer.dim, 1)
        self.post_quant_conv = nn.Conv2d(self.quantizer.dim, config.latent_channels, 1)

    @property
    def downsampling(self) -> int:
        """Pixels per token along a side."""
        return self.config.downsampling

    @property
    def tokens_per_side(self) -> int:
        """Tokens along a side at the nominal resolution."""
        return self.config.tokens_per_side

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight whose gradients balance the adaptive GAN weight."""
        return self.decoder.conv_out.weight

    def gathered_together(self) -> list[nn.Module]:
        """The modules whose weights an engine that shards them gathers one module at a time."""
        return [*self.encoder.down, self.encoder.mid, self.decoder.mid, *self.decoder.up]

    def kept_whole(self) -> list[nn.Parameter]:
        """The weights that are not to be sharded: losses ask for their gradients."""
        return [self.last_layer]

    def forward(self, images: Tensor) -> TokenizerOutput:
        """Reconstruct images [B, 3, H, W]."""
        out = self.quantizer(self.encode_latents(images))
        return TokenizerOutput(
            reconstruction=self.decode_latents(out.latents),
            codes=out.codes,
            losses=out.losses,
            metrics=out.metrics,
        )

    def encode_latents(self, images: Tensor) -> Tensor:
        """Latents [B, D, h, w] before the quantizer."""
        self._check_images(images)
        return self.quant_conv(self.encoder(images))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] of quantized latents [B, D, h, w]."""
        return self.decoder(self.post_quant_conv(latents))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Codes [B, h, w] int64 of images [B, 3, H, W] in [-1, 1]; ValueError if H or W do not divide."""
        return self.quantizer.encode(self.encode_latents(images))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Images [B, 3, H, W], about [-1, 1], of codes [B, h, w]; ValueError for codes out of range."""
        return self.decode_latents(self.quantizer.lookup(codes))

    def _check_images(self, images: Tensor) -> None:
        factor = self.downsampling
        if images.dim() != 4 or images.shape[1] != self.config.in_channels:
            raise ValueError(
                f"images must be [B, {self.config.in_channels}, H, W] in [-1, 1], got {tuple(images.shape)}"
            )
        if images.shape[2] % factor or images.shape[3] % factor:
            raise ValueError(
                f"image height and width must be multiples of {factor}, got {images.shape[2]} x {images.shape[3]}; "
                "crop or resize first"
            )
