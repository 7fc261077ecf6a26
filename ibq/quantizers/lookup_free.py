"""Quantizers without a codebook: the code follows from each channel of the latent alone (LFQ, BSQ, FSQ).

A code's index is a number of mixed radix: channel d has the digit k_d in [0, L_d), channel 0 is the least significant,
index = k_0 + L_0 (k_1 + L_1 (k_2 + ...)). The binary kinds have L = 2 and k = 1 for a channel above zero.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ibq.ops.index_backprop import softmax_entropies
from ibq.quantizers.base import (
    Quantizer,
    QuantizerOutput,
    entropy_loss,
    require_not_negative,
    require_positive,
    straight_through,
    to_grid,
)

MAX_BITS = 20  # of a code: usage is counted per code

Losses = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class _BinaryConfig:
    """What LFQ and BSQ share."""

    kind: str = ""
    dim: int = 18  # bits: 2^dim codes
    beta: float = 0.25  # weight of the commitment in the quantization loss
    entropy_temperature: float = 0.01
    sample_entropy_weight: float = 1.0  # each token should be certain of its code
    batch_entropy_weight: float = 1.0  # all codes should be in use

    def __post_init__(self):
        if not 1 <= self.dim <= MAX_BITS:
            raise ValueError(
                f"dim: must lie in [1, {MAX_BITS}], got {self.dim}; "
                "it is the number of bits, and 2^dim codes are counted"
            )
        require_positive(self, "entropy_temperature")
        require_not_negative(self, "beta", "sample_entropy_weight", "batch_entropy_weight")

    @property
    def num_codes(self) -> int:
        """2^dim."""
        return 2**self.dim


@dataclass(frozen=True, kw_only=True)
class LFQConfig(_BinaryConfig):
    """Lookup-free quantization; the defaults are those of Open-MAGVIT2 (arXiv 2409.04410)."""

    kind: Literal["lfq"] = "lfq"


@dataclass(frozen=True, kw_only=True)
class BSQConfig(_BinaryConfig):
    """Binary spherical quantization (arXiv 2406.07548), whose tau is 2 / `entropy_temperature`."""

    kind: Literal["bsq"] = "bsq"
    # Bits whose joint entropy over the batch is exact: 1 takes all for independent as the paper does, dim is exact.
    entropy_group: int = 9

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "entropy_group")


@dataclass(frozen=True, kw_only=True)
class FSQConfig:
    """Finite scalar quantization (arXiv 2309.15505); the default has 1,000 codes."""

    kind: Literal["fsq"] = "fsq"
    levels: tuple[int, ...] = (8, 5, 5, 5)  # values that each channel can take; their product is the number of codes

    def __post_init__(self):
        if not self.levels or min(self.levels) < 2:
            raise ValueError(f"levels: every channel needs at least 2 levels, got {list(self.levels)}; see the default")
        if self.num_codes > 2**MAX_BITS:
            raise ValueError(
                f"levels: their product is {self.num_codes:,} codes, above {2**MAX_BITS:,}; take fewer or smaller ones"
            )

    @property
    def dim(self) -> int:
        """One channel for each entry of `levels`."""
        return len(self.levels)

    @property
    def num_codes(self) -> int:
        """The product of the levels."""
        return math.prod(self.levels)


class LookupFreeQuantizer(Quantizer):
    """What LFQ, BSQ and FSQ share: digits, indices and the straight-through gradient.

    `levels` [D] is a buffer, so that the quantizer has the device and the precision of the model around it.
    """

    def __init__(self, config: LFQConfig | BSQConfig | FSQConfig, levels: Sequence[int]):
        super().__init__()
        self.config = config
        self.num_codes, self.dim = config.num_codes, config.dim
        self.register_buffer("levels", torch.tensor(levels, dtype=torch.float32))

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize z [B, D, h, w]."""
        self.check_latents(z)
        with torch.autocast(z.device.type, enabled=False):
            tokens = self.tokens(z)
            digits = self._digits(tokens.detach())
            rows = self._vectors(digits)
            losses, metrics = self._losses(tokens, rows)
        return QuantizerOutput(
            latents=to_grid(straight_through(tokens, rows), z),
            codes=to_grid(self._index(digits), z),
            losses=losses,
            metrics=metrics,
        )

    def code_vectors(self) -> Tensor:
        """The latents [K, D] that the codes stand for."""
        codes = torch.arange(self.num_codes, device=self.levels.device)[:, None]
        radices = self.levels.long()
        return self._vectors(codes // self._places() % radices)

    def _codes(self, tokens: Tensor) -> Tensor:
        return self._index(self._digits(tokens))

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float64 if self.levels.dtype == torch.float64 else torch.float32

    def _places(self) -> Tensor:
        """What a digit counts [D] int64: the product of the levels before it."""
        radices = self.levels.long()
        return radices.cumprod(dim=0) // radices

    def _index(self, digits: Tensor) -> Tensor:
        """Codes [N] of digits [N, D]."""
        return (digits * self._places()).sum(dim=1)

    def _digits(self, tokens: Tensor) -> Tensor:
        """Digits [N, D] int64 of tokens [N, D]: for the binary kinds whether a channel is above zero."""
        return (tokens > 0).long()

    def _vectors(self, digits: Tensor) -> Tensor:
        """The vectors [N, D] of digits [N, D]."""
        raise NotImplementedError

    def _losses(self, tokens: Tensor, rows: Tensor) -> tuple[Losses, Losses]:
        """Losses and metrics of tokens [N, D] and what became of them."""
        raise NotImplementedError


class LookupFreeBinaryQuantizer(LookupFreeQuantizer):
    """LFQ (MAGVIT-v2, arXiv 2310.05737) as in Open-MAGVIT2: each channel becomes its sign, +1 or -1 (also for zero).

    "quantization" = beta mean((x - sg(code))^2); "entropy" is that of softmax(2 x . c / T) over all 2^D codes c: of
    each token, less that of the batch.
    """

    config: LFQConfig

    def __init__(self, config: LFQConfig):
        super().__init__(config, [2] * config.dim)

    def _vectors(self, digits: Tensor) -> Tensor:
        return (2 * digits - 1).to(self._dtype)

    def _losses(self, tokens: Tensor, rows: Tensor) -> tuple[Losses, Losses]:
        entropies = softmax_entropies(
            2 * tokens,
            self.code_vectors(),
            temperature=self.config.entropy_temperature,
            mean_over_ranks=self.mean_over_ranks,
        )
        entropy, metrics = entropy_loss(self.config, entropies.sample_entropy, entropies.batch_entropy)
        return {"quantization": self.config.beta * F.mse_loss(tokens, rows), "entropy": entropy}, metrics


class BinarySphericalQuantizer(LookupFreeQuantizer):
    """BSQ (arXiv 2406.07548): the latent is projected to the unit sphere, each channel becomes +-1 / sqrt(D).

    "quantization" = beta mean |u - sg(code)|^2, of squared distances, not of their means over channels. "entropy" is
    that of softmax(2 u . c / T) over all codes c. The softmax is a product over the bits, so the entropy of a token is
    exactly a sum of D binary ones; that of the batch is the sum over groups of `entropy_group` bits, an upper bound of
    the exact one.
    """

    config: BSQConfig
    spherical = True

    def __init__(self, config: BSQConfig):
        super().__init__(config, [2] * config.dim)

    def _vectors(self, digits: Tensor) -> Tensor:
        return (2 * digits - 1).to(self._dtype) / math.sqrt(self.dim)

    def _losses(self, tokens: Tensor, rows: Tensor) -> tuple[Losses, Losses]:
        # A bit's two values differ by 2 / sqrt(D) in c, so by 4 u / sqrt(D) in the logit.
        logits = tokens * (4 / (math.sqrt(self.dim) * self.config.entropy_temperature))
        sample = _binary_entropy(logits).sum(dim=1).mean()
        entropy, metrics = entropy_loss(self.config, sample, self._batch_entropy(tokens))
        commitment = (tokens - rows).square().sum(dim=1).mean()
        return {"quantization": self.config.beta * commitment, "entropy": entropy}, metrics

    def _batch_entropy(self, tokens: Tensor) -> Tensor:
        """Entropy of the mean softmax, groups of bits taken for independent of each other."""
        total = tokens.new_zeros(())
        for part in tokens.split(self.config.entropy_group, dim=1):
            bits = part.shape[1]
            places = torch.arange(bits, device=part.device)
            digits = torch.arange(2**bits, device=part.device)[:, None] >> places & 1
            entropies = softmax_entropies(
                2 * part,
                self._vectors(digits),
                temperature=self.config.entropy_temperature,
                mean_over_ranks=self.mean_over_ranks,
            )
            total = total + entropies.batch_entropy
        return total


def _binary_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of a bit with these log-odds, without the overflow of its logarithms."""
    size = logits.abs()
    return F.softplus(-size) + size * torch.sigmoid(-size)


class FiniteScalarQuantizer(LookupFreeQuantizer):
    """FSQ (arXiv 2309.15505, section 3.1 and appendix A.1): each channel is bounded and rounded to one of its L levels.

    The bound is tanh(z + s) (L - 1) / 2 - o, slightly narrower, with o = 1/2 and a shift s for even L; latents are the
    rounded values over floor(L / 2), in [-1, 1]. Their digit is the rounded value plus floor(L / 2). The paper needs no
    loss: "quantization" is zero, with a zero gradient.
    """

    config: FSQConfig
    NARROWER = 1e-3  # so that the outermost values round to the outermost levels

    def __init__(self, config: FSQConfig):
        super().__init__(config, config.levels)

    def tokens(self, z: Tensor) -> Tensor:
        """The bounded latents [N, D], in units of floor(L / 2), of z [B, D, h, w]."""
        levels = self.levels.to(self._dtype)
        half = (levels - 1) * (1 - self.NARROWER) / 2
        offset = (levels + 1) % 2 / 2  # 1/2 for even levels
        # The tangent as the paper prints it: nearly the inverse of tanh, and finite for two levels.
        bounded = (super().tokens(z) + (offset / half).tan()).tanh() * half - offset
        return bounded / self._half_width()

    def _half_width(self) -> Tensor:
        return (self.levels.to(self._dtype) / 2).floor()

    def _digits(self, tokens: Tensor) -> Tensor:
        width = self._half_width()
        return ((tokens * width).round() + width).long()

    def _vectors(self, digits: Tensor) -> Tensor:
        width = self._half_width()
        return (digits - width) / width

    def _losses(self, tokens: Tensor, rows: Tensor) -> tuple[Losses, Losses]:
        return {"quantization": 0.0 * tokens.square().sum()}, {}
