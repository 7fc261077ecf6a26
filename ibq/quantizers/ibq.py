"""Index Backpropagation Quantization (arXiv 2412.02692)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ibq.ops.index_backprop import BetaWeighs, Precision, best_codes, index_backprop
from ibq.quantizers.base import (
    CodebookQuantizer,
    Init,
    QuantizerOutput,
    entropy_loss,
    require_choice,
    require_not_negative,
    require_positive,
    to_grid,
)
from ibq.quantizers.projector import ProjectorConfig, build_projector, check_projector


@dataclass(frozen=True, kw_only=True)
class IBQConfig:
    """IBQ quantizer; the defaults are the paper's."""

    kind: Literal["ibq"] = "ibq"
    num_codes: int = 16_384
    dim: int = 256
    beta: float = 0.25  # weight in the quantization loss of one of its one-sided terms:
    beta_weighs: BetaWeighs = "codebook"  # its pull of codes to latents (reference code), or the commitment (the paper)
    entropy_temperature: float = 0.01
    sample_entropy_weight: float = 1.0  # each token should be certain of its code
    batch_entropy_weight: float = 1.0  # all codes should be in use
    selection_temperature: float = 1.0  # of the softmax whose gradient reaches the encoder and every code
    logits: Precision = "float32"  # or bfloat16: of the operands of the matrix products; the sums are float32
    l2_normalize: bool = False  # compare and hand on unit vectors; then the selection wants a low temperature
    init: Init = "normal"
    init_scale: float = 1.0  # standard deviation (normal) or half-width (uniform) of the codebook's entries
    projector: ProjectorConfig | None = None  # makes the codes of the codebook, so that all move together

    def __post_init__(self):
        require_positive(self, "num_codes", "dim", "entropy_temperature", "selection_temperature", "init_scale")
        require_not_negative(self, "beta", "sample_entropy_weight", "batch_entropy_weight")
        require_choice(self, "init", Init)
        require_choice(self, "beta_weighs", BetaWeighs)
        require_choice(self, "logits", Precision)
        check_projector(self.projector, self.num_codes)


class IndexBackpropQuantizer(CodebookQuantizer):
    """Inner-product codebook whose every row gets a gradient; losses "quantization" and "entropy".

    Under autocast too its softmaxes run in float32 (float64 stays float64): over hundreds of thousands of codes they
    would not survive bf16. Only the operands of the matrix products may be rounded to it (`logits: bfloat16`).
    """

    config: IBQConfig

    def __init__(self, config: IBQConfig):
        super().__init__(
            config,
            init_scale=config.init_scale,
            spherical=config.l2_normalize,
            projector=build_projector(config.projector, config.num_codes, config.dim),
        )

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize z [B, D, h, w]."""
        self.check_latents(z)
        config = self.config
        with torch.autocast(z.device.type, enabled=False):
            codebook, tokens = self.code_vectors(), self.tokens(z)
            if self.passthrough:
                return self._pass(z, tokens, codebook, ("quantization", "entropy"))
            result = index_backprop(
                tokens,
                codebook,
                beta=config.beta,
                beta_weighs=config.beta_weighs,
                temperature=config.entropy_temperature,
                selection_temperature=config.selection_temperature,
                mean_over_ranks=self.mean_over_ranks,
                precision=config.logits,
            )
            entropy, metrics = entropy_loss(config, result.sample_entropy, result.batch_entropy)
        return QuantizerOutput(
            latents=to_grid(result.latents, z),
            codes=to_grid(result.codes, z),
            losses={"quantization": result.quantization_loss, "entropy": entropy},
            metrics=metrics,
        )

    def _best(self, tokens: Tensor, codebook: Tensor) -> Tensor:
        return best_codes(tokens, codebook, precision=self.config.logits)
