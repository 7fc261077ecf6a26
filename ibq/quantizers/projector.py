"""Projectors: modules that make the codes [K, D] of a codebook [K, D], so that all of them move together."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ibq.quantizers.base import require_positive


@dataclass(frozen=True, kw_only=True)
class LinearProjectorConfig:
    """One linear layer over the trained codebook; `kind: simvq` is the one over a frozen codebook."""

    kind: Literal["linear"] = "linear"


@dataclass(frozen=True, kw_only=True)
class VQBridgeConfig:
    """VQBridge (arXiv 2509.10140); the defaults are this project's choice, those of its code in yaml/base/fvq.yaml."""

    kind: Literal["vqbridge"] = "vqbridge"
    group: int = 64  # consecutive codes that are compressed to one vector of the transformer
    width: int = 512  # of the transformer
    blocks: int = 2
    heads: int = 8
    mlp_ratio: int = 4  # hidden width of a block's MLP over the block's width, as in ViT
    positions: bool = True  # a learned vector is added to each group

    def __post_init__(self):
        require_positive(self, "group", "width", "blocks", "heads", "mlp_ratio")
        if self.width % self.heads:
            raise ValueError(f"heads: {self.heads} heads do not divide the width {self.width}; take a divisor of it")


ProjectorConfig = LinearProjectorConfig | VQBridgeConfig


def check_projector(config: ProjectorConfig | None, num_codes: int) -> None:
    """Raise ValueError unless the projector fits a codebook of `num_codes`."""
    if isinstance(config, VQBridgeConfig) and num_codes % config.group:
        raise ValueError(
            f"projector: its group of {config.group} codes does not divide num_codes {num_codes}; "
            "set projector.group to a divisor"
        )


def build_projector(config: ProjectorConfig | None, num_codes: int, dim: int) -> nn.Module | None:
    """The projector that `config` describes, or None. All of them start as the identity."""
    match config:
        case None:
            return None
        case LinearProjectorConfig():
            return LinearProjector(dim)
        case VQBridgeConfig():
            return VQBridge(config, num_codes, dim)


class LinearProjector(nn.Linear):
    """One linear layer with a bias that starts as the identity."""

    def __init__(self, dim: int):
        super().__init__(dim, dim)

    def reset_parameters(self) -> None:
        """Become the identity."""
        nn.init.eye_(self.weight)
        nn.init.zeros_(self.bias)


class VQBridge(nn.Module):
    """The projector of FVQ (arXiv 2509.10140): compress the codebook, process it, recover all codes.

    Codebook [K, D] -> groups of codes [K / group, group x D] -> a linear layer to [K / group, width], plus a learned
    position -> transformer blocks as in ViT, in which every group attends to all -> a linear layer back to [K, D]. The
    loss of the few codes that a batch selects so reaches every code. The paper's other half, learning annealing, is
    the decay of the learning rate: `schedule: {kind: linear}` of the run, as its public code has it.

    Published: the compress-process-recover pipeline over the codebook, by ViT blocks (a variant has DiT blocks), and in
    the public code a last layer that starts at zero, no positions, an MLP of twice the width, and groups that are
    squares of a codebook laid out as a square: as codes are numbered at random, the same as consecutive ones. A reading
    is that the result is added to the codebook: so the codes start as the codebook itself, and its initialisation, by
    k-means too, means what it says. Here norms have weights, and GELU is exact.
    """

    def __init__(self, config: VQBridgeConfig, num_codes: int, dim: int):
        super().__init__()
        self.config, self.groups, features = config, num_codes // config.group, config.group * dim
        self.compress = nn.Linear(features, config.width)
        if config.positions:
            self.position = nn.Parameter(torch.empty(self.groups, config.width))
        self.blocks = nn.ModuleList(_Block(config.width, config.heads, config.mlp_ratio) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.width)
        self.recover = nn.Linear(config.width, features)
        if config.positions:
            nn.init.normal_(self.position, std=0.02)
        nn.init.zeros_(self.recover.weight)
        nn.init.zeros_(self.recover.bias)

    def forward(self, codebook: Tensor) -> Tensor:
        """The codes [K, D] of a codebook [K, D]."""
        x = self.compress(codebook.reshape(self.groups, -1))  # [K / group, width]
        if self.config.positions:
            x = x + self.position
        for block in self.blocks:
            x = block(x)
        return codebook + self.recover(self.norm(x)).view_as(codebook)


class _Block(nn.Module):
    """Self-attention and MLP, each after a normalization and with a shortcut (ViT, arXiv 2010.11929)."""

    def __init__(self, width: int, heads: int, mlp_ratio: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_ratio * width), nn.GELU(), nn.Linear(mlp_ratio * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """One block on x [T, width]."""
        q, k, v = self.qkv(self.norm1(x)).view(len(x), 3, self.heads, -1).permute(1, 2, 0, 3)[:, None]  # [1, H, T, w]
        attended = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attended[0].transpose(0, 1).reshape_as(x))
        return x + self.mlp(self.norm2(x))
