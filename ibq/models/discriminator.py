"""Discriminators, chosen in a config by `kind`; here PatchGAN (pix2pix, arXiv 1611.07004).

Batch statistics are per rank or over all ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ibq.config import require_least
from ibq.models.feature_discriminator import FeatureDiscriminator, FeaturesDiscriminatorConfig


@dataclass(frozen=True, kw_only=True)
class PatchDiscriminatorConfig:
    """Patch discriminator; the defaults are the paper's."""

    kind: Literal["patch"] = "patch"
    channels: int = 64
    layers: int = 3  # strided convolutions

    def __post_init__(self):
        require_least(self, channels=1, layers=1)

    @property
    def smallest_side(self) -> int:
        """Pixels along a side that leave one patch logit: every layer halves, the last two convolutions take 2."""
        return 3 * 2**self.layers


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalization whose statistics can be taken over all ranks, on any device.

    PyTorch's SyncBatchNorm does not run on the CPU. With `mean_over_ranks` (an autograd-aware mean; every rank has
    the same batch size) the batch mean and the mean square deviation from it are reduced.
    """

    mean_over_ranks: Callable[[Tensor], Tensor] | None = None
    world_size: int = 1

    def forward(self, x: Tensor) -> Tensor:
        if self.mean_over_ranks is None or not self.training:
            return super().forward(x)
        values = x if x.dtype == torch.float64 else x.float()  # bf16 would round the statistics
        mean = self.mean_over_ranks(values.mean(dim=(0, 2, 3)))
        centered = values - mean[:, None, None]
        variance = self.mean_over_ranks(centered.square().mean(dim=(0, 2, 3)))
        self._update_running_statistics(mean, variance, x.numel() // x.shape[1] * self.world_size)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centered * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, variance: Tensor, count: int) -> None:
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        unbiased = variance * (count / max(count - 1, 1))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)


class PatchDiscriminator(nn.Module):
    """Images [B, 3, H, W] -> patch logits [B, 1, h, w].

    4x4 convolutions: `layers` with stride 2, one with stride 1 and one to the logits; channels double up to 8 times.
    """

    def __init__(self, config: PatchDiscriminatorConfig):
        super().__init__()
        self.config = config
        channels = config.channels
        modules: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for layer in range(1, config.layers + 1):
            previous, width = width, channels * min(2**layer, 8)
            stride = 2 if layer < config.layers else 1
            modules += [
                nn.Conv2d(previous, width, 4, stride=stride, padding=1, bias=False),
                BatchNorm2d(width),
                nn.LeakyReLU(0.2),
            ]
        modules.append(nn.Conv2d(width, 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*modules)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initialisation of pix2pix."""
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, BatchNorm2d):
                nn.init.normal_(module.weight, mean=1.0, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Patch logits of images [B, 3, H, W]."""
        return self.main(images)

    def use_world_statistics(self, mean_over_ranks: Callable[[Tensor], Tensor], world_size: int) -> None:
        """Take the batch statistics over all ranks."""
        for module in self.modules():
            if isinstance(module, BatchNorm2d):
                module.mean_over_ranks = mean_over_ranks
                module.world_size = world_size


DiscriminatorConfig = PatchDiscriminatorConfig | FeaturesDiscriminatorConfig


def build_discriminator(config: DiscriminatorConfig) -> PatchDiscriminator | FeatureDiscriminator:
    """The discriminator that `config` describes."""
    match config:
        case PatchDiscriminatorConfig():
            return PatchDiscriminator(config)
        case FeaturesDiscriminatorConfig():
            return FeatureDiscriminator(config)
