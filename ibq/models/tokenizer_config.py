"""The architecture of an image tokenizer, as its networks and everyone else read it."""

from dataclasses import dataclass, field
from typing import Literal

from ibq.config import require_least
from ibq.quantizers import IBQConfig, QuantizerConfig
from ibq.quantizers.base import require_choice

Network = Literal["vqgan", "open_magvit2"]
SMALLEST_IMAGE = 7  # pixels: the window of SSIM, which every run measures on its reconstructions


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Architecture of the tokenizer; the defaults are the paper's at 256 px."""

    network: Network = "vqgan"  # or Open-MAGVIT2's: ibq/models/open_magvit2.py
    resolution: int = 256  # nominal: chooses the attention levels; any multiple of the downsampling can be fed
    in_channels: int = 3
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # one a level; each level but the last halves the image
    res_blocks: int = 4  # ResBlocks per level of the encoder; the decoder has one more
    attention_resolutions: tuple[int, ...] = (16,)
    latent_channels: int = 256
    norm_groups: int = 32
    dropout: float = 0.0
    gradient_checkpointing: bool = False  # recompute every ResBlock in the backward pass
    checkpoint_selective: bool = False  # but for its convolutions, whose results are kept
    quantizer: QuantizerConfig = field(default_factory=IBQConfig)

    def __post_init__(self):
        require_least(self, in_channels=1, channels=1, latent_channels=1, norm_groups=1)
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
        self._check_network()

    def _check_network(self) -> None:
        require_choice(self, "network", Network)
        if self.network == "vqgan":
            return
        if self.attention_resolutions:
            raise ValueError("attention_resolutions: Open-MAGVIT2's network has no attention; set it to []")
        if self.latent_channels != self.quantizer.dim:
            raise ValueError(
                f"latent_channels: Open-MAGVIT2's network quantizes what its encoder gives: set it to the quantizer's "
                f"{self.quantizer.dim} channels, not {self.latent_channels}"
            )

    @property
    def downsampling(self) -> int:
        """Pixels per token along a side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def tokens_per_side(self) -> int:
        """Tokens along a side at the nominal resolution."""
        return self.resolution // self.downsampling

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of codes of an image of so many pixels; ValueError if its sides do not divide."""
        factor = self.downsampling
        if height % factor or width % factor or min(height, width) < 1:
            near = [max(round(side / factor), 1) * factor for side in (height, width)]
            raise ValueError(f"{height} x {width} pixels are no multiples of {factor}; use {near[0]} x {near[1]}")
        return height // factor, width // factor

    def has_attention(self, level: int) -> bool:
        """Whether the level (0 = full resolution) has attention blocks."""
        return self.resolution // 2**level in self.attention_resolutions
