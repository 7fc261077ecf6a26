"""The contract that every quantizer keeps."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class QuantizerOutput:
    """What a quantizer makes of a latent."""

    latents: Tensor  # [B, D, h, w], quantized, differentiable
    codes: Tensor  # [B, h, w] int64
    losses: dict[str, Tensor]  # unweighted scalars
    metrics: dict[str, Tensor] = field(default_factory=dict)  # detached scalars for the log


class Quantizer(nn.Module):
    """Maps latents to codes and back.

    `mean_over_ranks` (tensor -> its mean over all ranks, autograd-aware) makes batch statistics global; None keeps
    them per rank.
    """

    num_codes: int
    dim: int
    mean_over_ranks: Callable[[Tensor], Tensor] | None = None
    passthrough: bool = False  # hand on the latents unquantized: before the codebook is initialised from them

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize z [B, D, h, w]."""
        raise NotImplementedError

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """Codes [B, h, w] of z [B, D, h, w]; a kind that can do without the losses overrides this."""
        return self(z).codes

    def lookup(self, codes: Tensor) -> Tensor:
        """Latents [B, D, h, w] of codes [B, h, w]."""
        raise NotImplementedError

    def code_vectors(self) -> Tensor:
        """The latents [K, D] that the codes stand for."""
        raise NotImplementedError

    def tokens(self, z: Tensor) -> Tensor:
        """The vectors [N, D] that are compared with the codes, of z [B, D, h, w]."""
        raise NotImplementedError

    def check_latents(self, z: Tensor) -> None:
        """Raise ValueError unless z is [B, D, h, w] with B >= 1 and the codebook's D."""
        if z.dim() != 4 or z.shape[1] != self.dim:
            raise ValueError(
                f"the quantizer takes latents [B, {self.dim}, h, w] but got {tuple(z.shape)}; "
                "set the quantizer's `dim` to the channels of the latent"
            )
        if z.numel() == 0:
            raise ValueError(f"the batch is empty (latents {tuple(z.shape)}); give at least one image")

    def check_codes(self, codes: Tensor) -> None:
        """Raise ValueError unless codes are integers [B, h, w] in [0, num_codes).

        The range is read only on the CPU: on an accelerator the look-up itself asserts it, without a host sync.
        """
        if codes.dim() != 3 or codes.is_floating_point():
            raise ValueError(f"codes must be integers of shape [B, h, w], got {codes.dtype} {tuple(codes.shape)}")
        if codes.device.type == "cpu" and codes.numel():
            low, high = int(codes.min()), int(codes.max())
            if low < 0 or high >= self.num_codes:
                raise ValueError(
                    f"codes lie in [{low}, {high}] but the codebook has {self.num_codes} codes; "
                    "were they made with another tokenizer?"
                )
