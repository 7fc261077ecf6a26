"""Discriminator on frozen features: heads as in StyleGAN-T (arXiv 2301.09515), which VAR's tokenizer and GigaTok take.

The features come from `ibq.models.frozen_features`, which is not trained and no part of this module.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ibq.config import UserError, require_least
from ibq.models.vision_transformer import BACKBONES, BackboneName, VisionTransformerConfig


@dataclass(frozen=True, kw_only=True)
class FeaturesDiscriminatorConfig:
    """A discriminator on the features of a frozen vision transformer; the defaults are StyleGAN-T's and VAR's."""

    kind: Literal["features"] = "features"
    backbone: BackboneName | VisionTransformerConfig = "dino_vits16"
    weights: str = "download"  # from the Hub, a repository there, "random" (for tests), or a file
    sha256: str | None = None  # checked when `weights` is a file
    layers: tuple[int, ...] = (0, 3, 6, 9, 12)  # features after so many blocks, each with a head; 0: before the first
    side: int = 224  # pixels that the backbone sees
    crop: float = 0.5  # probability that larger images are cropped to that, not shrunk
    augment: float = 1.0  # probability of each part of DiffAugment
    cutout: float = 0.2  # the share of a side that it makes zero
    head_width: int | None = None  # channels of the heads; by default the backbone's
    kernel: int = 9  # patches that a head's residual convolution sees, of all in one row
    norm_images: int = 8  # images whose statistics a normalization takes together
    spectral_norm: bool = True

    def __post_init__(self):
        require_least(self, head_width=1, kernel=1, norm_images=1, side=self.transformer.patch)
        for name in ("crop", "augment", "cutout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: must lie in [0, 1], got {getattr(self, name)}")
        if not self.layers or not all(0 <= layer <= self.transformer.depth for layer in self.layers):
            raise ValueError(
                f"layers: must name numbers of blocks from 0 to {self.transformer.depth}, got {list(self.layers)}"
            )
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel: must be odd, got {self.kernel}")
        if self.patches < self.kernel // 2:
            raise ValueError(
                f"kernel: {self.kernel} is too wide for {self.patches} patches; take less, or a larger side"
            )

    @property
    def transformer(self) -> VisionTransformerConfig:
        """The backbone."""
        return BACKBONES[self.backbone] if isinstance(self.backbone, str) else self.backbone

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return self.transformer.grid(self.side) ** 2

    @property
    def width(self) -> int:
        """Channels of the heads."""
        return self.head_width or self.transformer.width


class SpectralConv1d(nn.Conv1d):
    """A convolution, circular at its ends, whose weight is divided by its largest singular value (arXiv 1802.05957).

    The weight [O, I, k] counts as a matrix [O, I k]. Its first left singular vector is followed by one power iteration
    at every pass in training, in float32 under autocast too; in the gradient the vectors are constants.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, *, normalized: bool = True):
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, padding_mode="circular")
        self.normalized = normalized
        if normalized:
            self.register_buffer("direction", F.normalize(torch.randn(outputs), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, I, L] -> [B, O, L]."""
        weight = self.weight
        if self.normalized:
            with torch.autocast(x.device.type, enabled=False):
                weight = weight / self._largest_singular_value()
        return self._conv_forward(x, weight, self.bias)

    def _largest_singular_value(self) -> Tensor:
        matrix = self.weight.flatten(1)
        with torch.no_grad():
            right = F.normalize(matrix.t() @ self.direction, dim=0)
            left = self.direction
            if self.training:
                left = F.normalize(matrix @ right, dim=0)
                self.direction.copy_(left)
        return left @ (matrix @ right)


def images_of_group(at_most: int, batch: int, world_size: int) -> int:
    """How many images a group of `LocalBatchNorm` has where each rank has `batch`; UserError where none can be."""
    total = batch * world_size
    size = next(size for size in range(min(at_most, total), 0, -1) if total % size == 0)
    if size == total or batch % size == 0:
        return size
    raise UserError(
        f"statistics: world: loss.gan.discriminator.norm_images: groups of {size} images do not fit ranks of "
        f"{batch} in a micro-batch; set it to {batch}, or to {total} or more"
    )


class LocalBatchNorm(nn.Module):
    """Batch normalization by the statistics of groups of images, in training and evaluation; none are remembered.

    A batch makes as few groups, of equally many images next to each other, as keep to `images` each. With
    `use_world_statistics` the groups are those of all ranks' images, one rank's after another's: a group lies on one
    rank, or there is one for all: see `images_of_group`.
    """

    def __init__(self, channels: int, images: int):
        super().__init__()
        self.images = images
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.mean_over_ranks: Callable[[Tensor], Tensor] | None = None
        self.world_size = 1

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, L]."""
        size = images_of_group(self.images, len(x), self.world_size)
        spread = size > len(x)
        values = x if x.dtype == torch.float64 else x.float()  # bf16 would round the statistics
        values = values.unflatten(0, (-1, min(size, len(x))))
        mean = self._over_ranks(values.mean(dim=(1, 3), keepdim=True), spread)
        centered = values - mean
        variance = self._over_ranks(centered.square().mean(dim=(1, 3), keepdim=True), spread)
        scale = self.weight[:, None] * torch.rsqrt(variance + 1e-6)
        return (centered * scale + self.bias[:, None]).flatten(0, 1).to(x.dtype)

    def _over_ranks(self, statistic: Tensor, spread: bool) -> Tensor:
        return self.mean_over_ranks(statistic) if spread else statistic


class _Block(nn.Sequential):
    """Convolution, normalization and activation; `residual` adds the input and keeps the variance."""

    def __init__(self, inputs: int, kernel: int, config: FeaturesDiscriminatorConfig, *, residual: bool = False):
        width = config.width
        super().__init__(
            SpectralConv1d(inputs, width, kernel, normalized=config.spectral_norm),
            LocalBatchNorm(width, config.norm_images),
            nn.LeakyReLU(0.2),
        )
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, L]."""
        out = super().forward(x)
        return (out + x) * math.sqrt(0.5) if self.residual else out


class FeatureDiscriminator(nn.Module):
    """Features [B, C, L] of each layer -> logits [B, layers x L] of their patches."""

    def __init__(self, config: FeaturesDiscriminatorConfig):
        super().__init__()
        self.config = config
        self.heads = nn.ModuleList(
            nn.Sequential(
                _Block(config.transformer.width, 1, config),
                _Block(config.width, config.kernel, config, residual=True),
                SpectralConv1d(config.width, 1, normalized=config.spectral_norm),
            )
            for _ in config.layers
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits of the features of each layer."""
        logits = [head(seen).flatten(1) for head, seen in zip(self.heads, features, strict=True)]
        return torch.cat(logits, dim=1)

    def use_world_statistics(self, mean_over_ranks: Callable[[Tensor], Tensor], world_size: int) -> None:
        """Take the statistics over all ranks' images."""
        for module in self.modules():
            if isinstance(module, LocalBatchNorm):
                module.mean_over_ranks = mean_over_ranks
                module.world_size = world_size
