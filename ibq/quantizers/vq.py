"""Vector quantization by the nearest code: VQGAN's and LlamaGen's, and SimVQ's over a frozen codebook."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ibq.ops.index_backprop import BetaWeighs, best_codes, softmax_entropies
from ibq.quantizers.base import (
    CodebookQuantizer,
    Init,
    QuantizerOutput,
    entropy_loss,
    require_choice,
    require_not_negative,
    require_positive,
    straight_through,
    to_grid,
)
from ibq.quantizers.projector import ProjectorConfig, build_projector, check_projector

Normalize = Literal["none", "search", "vectors"]


@dataclass(frozen=True, kw_only=True)
class VQConfig:
    """Plain VQ; the defaults are VQGAN's as in its public code (arXiv 2012.09841).

    LlamaGen's (arXiv 2406.06525): `{kind: vq, dim: 8, normalize: vectors, beta_weighs: commitment}`, with both entropy
    weights 1 where its entropy loss is wanted.
    """

    kind: Literal["vq"] = "vq"
    num_codes: int = 16_384
    dim: int = 256
    beta: float = 0.25
    beta_weighs: BetaWeighs = "codebook"  # the term that beta weakens: the codes' pull to the latents or its reverse
    normalize: Normalize = "none"  # unit vectors: nowhere, to find the nearest code only, or throughout
    entropy_temperature: float = 0.01
    sample_entropy_weight: float = 0.0  # each token should be certain of its code; without weights no entropy loss
    batch_entropy_weight: float = 0.0  # all codes should be in use
    init: Init = "uniform"
    init_scale: float | None = None  # half-width (uniform) or standard deviation; null: 1 / num_codes, or 1
    projector: ProjectorConfig | None = None

    def __post_init__(self):
        _check(self)
        require_choice(self, "normalize", Normalize)
        require_positive(self, "entropy_temperature")
        require_not_negative(self, "sample_entropy_weight", "batch_entropy_weight")
        check_projector(self.projector, self.num_codes)


@dataclass(frozen=True, kw_only=True)
class SimVQConfig:
    """SimVQ (arXiv 2411.02038): one linear layer over a frozen codebook; the defaults are its public code's."""

    kind: Literal["simvq"] = "simvq"
    num_codes: int = 65_536
    dim: int = 128
    beta: float = 0.25
    beta_weighs: BetaWeighs = "commitment"
    init: Init = "normal"
    init_scale: float | None = None  # standard deviation (normal) or half-width; null: 1 / sqrt(dim)
    codebook_seed: int = 0  # of the frozen codebook

    def __post_init__(self):
        _check(self)
        if not 0 <= self.codebook_seed < 2**63:
            raise ValueError(f"codebook_seed: must lie in [0, 2^63), got {self.codebook_seed}; the default is 0")


def _check(config: VQConfig | SimVQConfig) -> None:
    require_positive(config, "num_codes", "dim")
    if config.init_scale is not None:
        require_positive(config, "init_scale")
    require_not_negative(config, "beta")
    require_choice(config, "beta_weighs", BetaWeighs)
    require_choice(config, "init", Init)


class VectorQuantizer(CodebookQuantizer):
    """Each token becomes its nearest code, with the straight-through gradient; only codes in use get a gradient.

    "quantization" = mean((sg(e) - z)^2) + mean((e - sg(z))^2), beta on one of them (VQ-VAE, arXiv 1711.00937, eq. 3;
    `beta_weighs: codebook` is VQGAN's public code, `commitment` the paper and LlamaGen). With entropy weights,
    "entropy" is that of softmax(-|z - e|^2 / T), of each token less that of the batch, of the vectors that the search
    compares. `normalize: search` compares directions, yet hands on and pulls the vectors themselves.
    """

    config: VQConfig

    def __init__(self, config: VQConfig):
        scale = 1 / config.num_codes if config.init == "uniform" else 1.0
        super().__init__(
            config,
            init_scale=scale if config.init_scale is None else config.init_scale,
            spherical=config.normalize == "vectors",
            projector=build_projector(config.projector, config.num_codes, config.dim),
        )
        self.by_angle = config.normalize != "none"
        self.entropy_weights = (config.sample_entropy_weight, config.batch_entropy_weight)

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize z [B, D, h, w]."""
        self.check_latents(z)
        with torch.autocast(z.device.type, enabled=False):
            codebook, tokens = self.code_vectors(), self.tokens(z)
            if self.passthrough:
                names = ("quantization", "entropy") if any(self.entropy_weights) else ("quantization",)
                return self._pass(z, tokens, codebook, names)
            codes = self._best(tokens.detach(), codebook.detach())
            rows = F.embedding(codes, codebook)  # [N, D]
            losses, metrics = {"quantization": self._quantization_loss(tokens, rows)}, {}
            if any(self.entropy_weights):
                losses["entropy"], metrics = self._entropy_loss(tokens, codebook)
        return QuantizerOutput(
            latents=to_grid(straight_through(tokens, rows), z), codes=to_grid(codes, z), losses=losses, metrics=metrics
        )

    def _quantization_loss(self, tokens: Tensor, rows: Tensor) -> Tensor:
        commitment, pull = F.mse_loss(tokens, rows.detach()), F.mse_loss(rows, tokens.detach())
        beta = self.config.beta
        return commitment + beta * pull if self.config.beta_weighs == "codebook" else beta * commitment + pull

    def _entropy_loss(self, tokens: Tensor, codebook: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        tokens, codebook = self._compared(tokens, codebook)
        if self.by_angle:  # of unit vectors: -|z - e|^2 = 2 z . e - 2, and the softmax does not see the constant
            tokens = 2 * tokens
        else:  # -|z - e|^2 + |z|^2 as one inner product
            tokens = torch.cat([2 * tokens, torch.ones_like(tokens[:, :1])], dim=1)
            codebook = torch.cat([codebook, -codebook.square().sum(dim=1, keepdim=True)], dim=1)
        entropies = softmax_entropies(
            tokens, codebook, temperature=self.config.entropy_temperature, mean_over_ranks=self.mean_over_ranks
        )
        return entropy_loss(self.config, entropies.sample_entropy, entropies.batch_entropy)

    def _compared(self, tokens: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and codes as the search compares them."""
        if self.by_angle and not self.spherical:
            return F.normalize(tokens, dim=1), F.normalize(codebook, dim=1)
        return tokens, codebook

    def _best(self, tokens: Tensor, codebook: Tensor) -> Tensor:
        tokens, codebook = self._compared(tokens, codebook)
        # The nearest: largest z . e - |e|^2 / 2.
        bias = None if self.by_angle else -0.5 * codebook.square().sum(dim=1)
        return best_codes(tokens, codebook, bias)


class SimVectorQuantizer(VectorQuantizer):
    """SimVQ (arXiv 2411.02038): the codes are a linear layer's image of a random codebook that is never trained.

    Search and loss are those of plain VQ. Every step moves the layer and so all codes; if the codebook were trained
    too, the layer would be ignored (remark 1 of the paper). k-means has nothing to set here.
    """

    config: SimVQConfig

    def __init__(self, config: SimVQConfig):
        CodebookQuantizer.__init__(
            self,
            config,
            init_scale=config.dim**-0.5 if config.init_scale is None else config.init_scale,
            projector=nn.Linear(config.dim, config.dim),
            frozen_seed=config.codebook_seed,
        )
        self.by_angle, self.entropy_weights = False, (0.0, 0.0)

    def _unprojected(self) -> VectorQuantizer:
        config = self.config
        return VectorQuantizer(
            VQConfig(num_codes=config.num_codes, dim=config.dim, beta=config.beta, beta_weighs=config.beta_weighs)
        )
