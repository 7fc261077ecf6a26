"""Index Backpropagation Quantization (arXiv 2412.02692) without the tables of tokens x codes.

The same values and gradients as `textbook.index_backprop`, computed in tiles and recomputed in the backward pass:
memory grows with tokens + codes, not with their product. On CUDA by Triton kernels (`triton_index_backprop.py`), which
multiply themselves where tensor cores may, and else read PyTorch's products of some tokens at a time; on CPUs, and
where Triton is missing, in plain PyTorch (`index_backprop_tiles.py`).

What needs all codes of all tokens is one operator with a hand-written gradient, opaque to `torch.compile`; the rest
(the squared distances, the entropy of the batch and its mean over ranks) is plain PyTorch around it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ibq.ops import index_backprop_tiles as tiles
from ibq.ops.backend import Backend, float32_products, use_triton
from ibq.ops.textbook import IndexBackpropResult

Precision = Literal["float32", "bfloat16"]
BetaWeighs = Literal["codebook", "commitment"]


@dataclass(frozen=True, kw_only=True)
class SoftmaxEntropies:
    """Entropies (nats) of the softmax of tokens over codes; unweighted scalars."""

    sample_entropy: Tensor  # mean over the tokens
    batch_entropy: Tensor  # of the mean softmax


def index_backprop(
    tokens: Tensor,
    codebook: Tensor,
    *,
    beta: float,
    temperature: float,
    selection_temperature: float = 1.0,
    beta_weighs: BetaWeighs = "codebook",
    mean_over_ranks: Callable[[Tensor], Tensor] | None = None,
    precision: Precision = "float32",
    backend: Backend = "auto",
) -> IndexBackpropResult:
    """Quantize tokens [N, D] with a codebook [K, D] so that every code receives a gradient.

    Arguments as `textbook.index_backprop`. `beta_weighs` says which of the one-sided terms of the quantization loss
    beta multiplies: `codebook`, the pull of the selected rows towards the tokens, as in the reference code, or
    `commitment`, the pull of the tokens towards the rows, as the paper prints it. `precision` is that of the matrix
    products' operands (sums are always float32, and float64 inputs stay float64). Raises ValueError for an empty
    batch, sizes that do not fit and temperatures that are not positive.
    """
    check_sizes(tokens, codebook)
    check_temperatures(temperature=temperature, selection_temperature=selection_temperature)
    latents, selected, codes, usage, sample_entropy = _quantize(
        tokens, codebook, temperature, selection_temperature, precision, backend
    )
    to_tokens = F.mse_loss(tokens, selected.detach())
    to_codes = F.mse_loss(selected, tokens.detach())
    if beta_weighs == "codebook":
        to_codes = beta * to_codes
    else:
        to_tokens = beta * to_tokens
    return IndexBackpropResult(
        latents=latents,
        codes=codes,
        quantization_loss=F.mse_loss(latents, tokens) + to_tokens + to_codes,
        **_entropies(usage, sample_entropy, latents.dtype, mean_over_ranks),
    )


def softmax_entropies(
    tokens: Tensor, codebook: Tensor, *, temperature: float, mean_over_ranks: Callable[[Tensor], Tensor] | None = None
) -> SoftmaxEntropies:
    """Sample and batch entropy of softmax(tokens [N, D] . codebook [K, D] / temperature), differentiable in both."""
    check_sizes(tokens, codebook)
    check_temperatures(temperature=temperature)
    latents, *_, usage, sample_entropy = _quantize(tokens, codebook, temperature, 1.0, "float32", "auto")
    return SoftmaxEntropies(**_entropies(usage, sample_entropy, latents.dtype, mean_over_ranks))


@torch.no_grad()
def best_codes(
    tokens: Tensor, codebook: Tensor, bias: Tensor | None = None, *, precision: Precision = "float32"
) -> Tensor:
    """The code [N] with the largest tokens . codebook + bias [K] for each token; the lowest index wins a tie."""
    check_sizes(tokens, codebook)
    return tiles.best_codes(tokens, codebook, bias, dot_precision=precision)


def check_sizes(tokens: Tensor, codebook: Tensor) -> None:
    """Raise ValueError unless tokens are [N, D] and the codebook [K, D], none of them empty."""
    if tokens.dim() != 2 or codebook.dim() != 2 or tokens.shape[1] != codebook.shape[1]:
        raise ValueError(
            f"tokens {tuple(tokens.shape)} and codebook {tuple(codebook.shape)} do not fit; they must be [N, D] and "
            "[K, D] with one D: set the quantizer's `dim` to the channels of the latent"
        )
    if tokens.numel() == 0 or codebook.numel() == 0:
        raise ValueError(
            f"nothing to quantize: tokens {tuple(tokens.shape)}, codebook {tuple(codebook.shape)}; "
            "give at least one image and one code"
        )


def check_temperatures(**temperatures: float) -> None:
    """Raise ValueError for a temperature that is not positive."""
    for name, value in temperatures.items():
        if not value > 0:
            raise ValueError(f"{name}: must be positive, got {value}; the paper's entropies use 0.01, its selection 1")


def _entropies(
    usage: Tensor, sample_entropy: Tensor, dtype: torch.dtype, mean_over_ranks: Callable[[Tensor], Tensor] | None
) -> dict[str, Tensor]:
    """The scalars; summed in float64, as they are made of hundreds of thousands of small terms."""
    if mean_over_ranks is not None:
        usage = mean_over_ranks(usage)
    batch_entropy = -(usage * (usage + 1e-5).log()).sum()
    return {"sample_entropy": sample_entropy.mean().to(dtype), "batch_entropy": batch_entropy.to(dtype)}


def _quantize(tokens, codebook, temperature, selection_temperature, precision, backend):
    """The operator on operands of one precision."""
    double = torch.float64 in (tokens.dtype, codebook.dtype)
    dtype = torch.float64 if double else torch.float32
    backend = "triton" if use_triton(tokens, dtype, backend) else "torch"
    settings = (float(temperature), float(selection_temperature), precision, backend)
    return _operator(tokens.to(dtype), codebook.to(dtype), *settings)[:5]


# --- The operator ---------------------------------------------------------------------------


def _kernels(backend: str):
    if backend == "triton":
        from ibq.ops import triton_index_backprop

        return triton_index_backprop
    return tiles


def _dot_precision(precision: str) -> str:
    """That of the kernels, whose own float32 products are a third as fast as PyTorch's (measured on an H200)."""
    if precision != "float32":
        return precision
    return "tf32" if float32_products() == "tf32" else "torch"


@torch.library.custom_op("ibq::index_backprop", mutates_args=())
def _operator(
    tokens: Tensor, codebook: Tensor, temperature: float, selection_temperature: float, precision: str, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Latents [N, D], selected rows [N, D], codes [N], usage [K], sample entropies [N] and what else is saved [S, N].

    Latents and selected rows have the same values: the gradient of the first goes through the straight-through one-hot
    to every code, that of the second to the selected rows alone.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        found = _kernels(backend).forward(
            tokens.contiguous(),
            codebook.contiguous(),
            temperature=temperature,
            selection_temperature=selection_temperature,
            dot_precision=_dot_precision(precision),
        )
    selected = codebook.index_select(0, found.codes)
    saved = [found.top, found.log_sum_entropy]
    if found.log_sum_selection is not None:
        saved.append(found.log_sum_selection)
    usage, sample_entropy = found.usage.double(), found.sample_entropy.double()
    return selected.clone(), selected, found.codes, usage, sample_entropy, torch.stack(saved)


@_operator.register_fake
def _(tokens, codebook, temperature, selection_temperature, precision, backend):
    count = len(tokens)
    latents = tokens.new_empty(count, codebook.shape[1])
    saved = tokens.new_empty(3 if backend == "triton" else 2, count)
    codes = tokens.new_empty(count, dtype=torch.int64)
    usage, entropy = (tokens.new_empty(size, dtype=torch.float64) for size in (len(codebook), count))
    return latents, torch.empty_like(latents), codes, usage, entropy, saved


@torch.library.custom_op("ibq::index_backprop_backward", mutates_args=())
def _backward_operator(
    tokens: Tensor,
    codebook: Tensor,
    codes: Tensor,
    sample_entropy: Tensor,
    saved: Tensor,
    grad_latents: Tensor | None,
    grad_selected: Tensor | None,
    grad_usage: Tensor | None,
    grad_sample_entropy: Tensor | None,
    for_codebook: bool,
    temperature: float,
    selection_temperature: float,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of tokens [N, D] and codebook [K, D], which is empty unless `for_codebook`."""
    if grad_latents is None and grad_usage is None:
        grad_tokens, grad_codebook = (
            torch.zeros_like(tokens),
            torch.zeros_like(codebook[: len(codebook) * for_codebook]),
        )
    else:
        top, log_sum, *selection = saved
        statistics = tiles.ForwardStatistics(codes, top, *(selection or [None]), log_sum, sample_entropy, None)
        with torch.autocast(tokens.device.type, enabled=False):
            grad_tokens, grad_codebook = _kernels(backend).backward(
                tokens.contiguous(),
                codebook.contiguous(),
                statistics,
                None if grad_latents is None else grad_latents.contiguous(),
                grad_sample_entropy,
                grad_usage,
                for_codebook=for_codebook,
                temperature=temperature,
                selection_temperature=selection_temperature,
                dot_precision=_dot_precision(precision),
            )
    for hard in (grad_latents, grad_selected):
        if hard is not None and for_codebook:
            grad_codebook.index_add_(0, codes, hard)
    return grad_tokens, grad_codebook


@_backward_operator.register_fake
def _(tokens, codebook, codes, sample_entropy, saved, g1, g2, g3, g4, for_codebook, *_):
    return torch.empty_like(tokens), torch.empty_like(codebook[: len(codebook) * for_codebook])


def _save(ctx, inputs, output) -> None:
    tokens, codebook, *ctx.settings = inputs
    _, _, codes, _, sample_entropy, saved = output
    ctx.mark_non_differentiable(codes, saved)
    ctx.set_materialize_grads(False)  # what has no gradient upstream is left out of the backward pass
    ctx.save_for_backward(tokens, codebook, codes, sample_entropy, saved)


def _differentiate(ctx, grad_latents, grad_selected, _codes, grad_usage, grad_sample_entropy, _saved):
    tokens, codebook, codes, sample_entropy, saved = ctx.saved_tensors
    if grad_usage is None and grad_sample_entropy is not None:
        grad_usage = tokens.new_zeros(len(codebook), dtype=torch.float64)
    if grad_sample_entropy is None and grad_usage is not None:
        grad_sample_entropy = torch.zeros_like(sample_entropy)
    for_codebook = ctx.needs_input_grad[1]
    grad_tokens, grad_codebook = _backward_operator(
        tokens, codebook, codes, sample_entropy, saved,
        grad_latents, grad_selected, grad_usage, grad_sample_entropy, for_codebook, *ctx.settings,
    )  # fmt: skip
    return grad_tokens, grad_codebook if for_codebook else None, None, None, None, None


_operator.register_autograd(_differentiate, setup_context=_save)
