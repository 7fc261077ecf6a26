"""Index Backpropagation Quantization (arXiv 2412.02692)."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ibq.ops.textbook import index_backprop
from ibq.quantizers.base import Quantizer, QuantizerOutput


@dataclass(frozen=True, kw_only=True)
class IBQConfig:
    """IBQ quantizer; the defaults are the paper's."""

    kind: Literal["ibq"] = "ibq"
    num_codes: int = 16_384
    dim: int = 256
    beta: float = 0.25  # weight of the codebook's pull in the quantization loss
    entropy_temperature: float = 0.01
    sample_entropy_weight: float = 1.0  # each token should be certain of its code
    batch_entropy_weight: float = 1.0  # all codes should be in use
    selection_temperature: float = 1.0  # of the softmax whose gradient reaches the encoder and every code
    l2_normalize: bool = False  # compare and hand on unit vectors; then the selection wants a low temperature
    init: Literal["normal", "uniform"] = "normal"
    init_scale: float = 1.0  # standard deviation (normal) or half-width (uniform) of the codebook's entries

    def __post_init__(self):
        for name in ("num_codes", "dim", "entropy_temperature", "selection_temperature", "init_scale"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}: must be positive, got {value}; the paper's settings are the defaults")
        for name in ("beta", "sample_entropy_weight", "batch_entropy_weight"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name}: must be at least 0 and finite, got {value}; the paper's is the default")
        if self.init not in ("normal", "uniform"):
            raise ValueError(f"init: no initialisation {self.init!r}; use normal or uniform")


class IndexBackpropQuantizer(Quantizer):
    """Inner-product codebook whose every row gets a gradient; losses "quantization" and "entropy".

    Always runs in float32 (float64 stays float64): under autocast the softmax over hundreds of thousands of codes
    would not survive bf16.
    """

    def __init__(self, config: IBQConfig):
        super().__init__()
        self.config = config
        self.num_codes = config.num_codes
        self.dim = config.dim
        self.codebook = nn.Parameter(torch.empty(config.num_codes, config.dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the codebook anew."""
        scale = self.config.init_scale
        match self.config.init:
            case "normal":
                nn.init.normal_(self.codebook, std=scale)
            case "uniform":
                nn.init.uniform_(self.codebook, -scale, scale)

    def code_vectors(self) -> Tensor:
        """The rows [K, D] that codes stand for, in float32 or float64."""
        codebook = self.codebook if self.codebook.dtype == torch.float64 else self.codebook.float()
        return F.normalize(codebook, dim=1) if self.config.l2_normalize else codebook

    def tokens(self, z: Tensor) -> Tensor:
        """The vectors [N, D] that are compared with the codes, of z [B, D, h, w]."""
        dtype = torch.float64 if self.codebook.dtype == torch.float64 else torch.float32
        tokens = z.permute(0, 2, 3, 1).reshape(-1, self.dim).to(dtype)
        return F.normalize(tokens, dim=1) if self.config.l2_normalize else tokens

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize z [B, D, h, w]."""
        self.check_latents(z)
        config = self.config
        batch, _, height, width = z.shape
        with torch.autocast(z.device.type, enabled=False):
            codebook, tokens = self.code_vectors(), self.tokens(z)
            if self.passthrough:
                return self._pass(z, tokens, codebook)
            result = index_backprop(
                tokens,
                codebook,
                beta=config.beta,
                temperature=config.entropy_temperature,
                selection_temperature=config.selection_temperature,
                mean_over_ranks=self.mean_over_ranks,
            )
            entropy = (
                config.sample_entropy_weight * result.sample_entropy
                - config.batch_entropy_weight * result.batch_entropy
            )
        return QuantizerOutput(
            latents=result.latents.view(batch, height, width, self.dim).permute(0, 3, 1, 2),
            codes=result.codes.view(batch, height, width),
            losses={"quantization": result.quantization_loss, "entropy": entropy},
            metrics={
                "sample_entropy": result.sample_entropy.detach(),
                "batch_entropy": result.batch_entropy.detach(),
            },
        )

    def _pass(self, z: Tensor, tokens: Tensor, codebook: Tensor) -> QuantizerOutput:
        batch, _, height, width = z.shape
        nothing = 0.0 * codebook.sum()  # data parallelism wants a gradient for every parameter
        return QuantizerOutput(
            latents=tokens.view(batch, height, width, self.dim).permute(0, 3, 1, 2),
            codes=self._best(tokens.detach(), codebook.detach()).view(batch, height, width),
            losses={"quantization": nothing, "entropy": nothing},
        )

    def _best(self, tokens: Tensor, codebook: Tensor) -> Tensor:
        logits = tokens @ codebook.t()  # [N, K]
        return (logits / self.config.selection_temperature).softmax(dim=1).argmax(dim=1)

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """Codes [B, h, w] of z [B, D, h, w], without the losses."""
        self.check_latents(z)
        batch, _, height, width = z.shape
        with torch.autocast(z.device.type, enabled=False):
            return self._best(self.tokens(z), self.code_vectors()).view(batch, height, width)

    def lookup(self, codes: Tensor) -> Tensor:
        """Latents [B, D, h, w] of codes [B, h, w]."""
        self.check_codes(codes)
        return F.embedding(codes, self.code_vectors()).permute(0, 3, 1, 2)
