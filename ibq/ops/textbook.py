"""The formulas as the papers print them, with every table written out: the oracle of the lean kernels."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class IndexBackpropResult:
    """Result of index backpropagation for N tokens of D dimensions; the losses are unweighted scalars (nats)."""

    latents: Tensor  # [N, D], the selected codebook rows with the straight-through gradient
    codes: Tensor  # [N] int64
    quantization_loss: Tensor
    sample_entropy: Tensor
    batch_entropy: Tensor


def index_backprop(
    tokens: Tensor,
    codebook: Tensor,
    *,
    beta: float,
    temperature: float,
    selection_temperature: float = 1.0,
    mean_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> IndexBackpropResult:
    """Quantize tokens [N, D] with a codebook [K, D] so that every code receives a gradient.

    Index Backpropagation Quantization (arXiv 2412.02692, section 3.2): the hard one-hot of the best code plus the
    straight-through softmax selects the latent, and the quantization loss pulls twice ("double quantization").
    `temperature` is that of the entropies; `selection_temperature`, 1 in the paper, that of the softmax whose
    gradient reaches the tokens and every code.
    `mean_over_ranks`, an autograd-aware mean, makes the batch entropy one over all ranks.
    """
    logits = torch.einsum("nd,kd->nk", tokens, codebook)
    probabilities = (logits / selection_temperature).softmax(dim=1)
    codes = probabilities.argmax(dim=1)  # the lowest index wins a tie
    hard = F.one_hot(codes, codebook.shape[0]).to(probabilities.dtype)
    one_hot = hard - probabilities.detach() + probabilities
    latents = torch.einsum("nk,kd->nd", one_hot, codebook)

    selected = torch.einsum("nk,kd->nd", hard, codebook)
    quantization_loss = (
        F.mse_loss(latents, tokens)  # no stop-gradient: reaches the tokens and, through one_hot, every code
        + F.mse_loss(tokens, selected.detach())
        + beta * F.mse_loss(selected, tokens.detach())
    )

    soft = (logits / temperature).softmax(dim=1)
    log_soft = (logits / temperature).log_softmax(dim=1)
    sample_entropy = -(soft * log_soft).sum(dim=1).mean()
    mean = soft.mean(dim=0)
    if mean_over_ranks is not None:
        mean = mean_over_ranks(mean)
    batch_entropy = -(mean * (mean + 1e-5).log()).sum()
    return IndexBackpropResult(
        latents=latents,
        codes=codes,
        quantization_loss=quantization_loss,
        sample_entropy=sample_entropy,
        batch_entropy=batch_entropy,
    )
