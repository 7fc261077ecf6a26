"""The transformer's head and its cross-entropy on GPUs, without the N x V logits.

nll_i = log sum_v exp(hidden_i . weight_v) - hidden_i . weight_target(i): the usual cross-entropy of a linear head,
computed tile by tile as in Cut Cross-Entropy (arXiv 2411.09009).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ibq.ops.triton_common import (
    ONE_PRODUCT_TILES,
    DotPrecision,
    add_product,
    dot_tile,
    kernel_precision,
    on_device,
    padded,
    split_evenly,
    workspace,
)


@triton.jit
def head_statistics_kernel(
    hidden_ptr, weight_ptr, targets_ptr, top_ptr, sum_ptr, target_logit_ptr,
    num_tokens, num_codes, width, split_length,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Largest logit, sum of exponentials relative to it, and the target's logit (or 0): [splits, N] each.

    Grid: token tiles, slices of the vocabulary.
    """
    first_token = tl.cast(tl.program_id(0), tl.int64) * ROWS
    split = tl.program_id(1)
    begin = split * split_length
    end = tl.minimum(begin + split_length, num_codes)
    token = first_token + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    target = tl.load(targets_ptr + token, mask=token < num_tokens, other=-1)
    top = tl.full([ROWS], -float("inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    target_logit = tl.zeros([ROWS], dtype=tl.float32)
    for first_code in range(begin, end, COLUMNS):
        codes_left = end - first_code
        logits = dot_tile(
            hidden_ptr + first_token * width, weight_ptr + tl.cast(first_code, tl.int64) * width,
            num_tokens - first_token, codes_left, width, ROWS, COLUMNS, INNER, PRECISION,
        )  # fmt: skip
        is_target = (first_code + column)[None, :] == target[:, None]
        inside = (column < codes_left)[None, :]
        target_logit += tl.sum(tl.where(is_target & inside, logits, 0.0), axis=1)
        logits = tl.where(inside, logits, -float("inf"))
        new_top = tl.maximum(top, tl.max(logits, axis=1))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(logits - new_top[:, None]), axis=1)
        top = new_top
    out = tl.cast(split, tl.int64) * num_tokens + token
    tl.store(top_ptr + out, top, mask=token < num_tokens)
    tl.store(sum_ptr + out, total, mask=token < num_tokens)
    tl.store(target_logit_ptr + out, target_logit, mask=token < num_tokens)


@triton.jit
def head_logit_gradients_kernel(
    hidden_ptr, weight_ptr, targets_ptr, log_sum_ptr, grad_ptr, out_ptr,
    num_tokens, num_codes, width, out_stride, chunk_start,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_nll (softmax - one-hot) of one chunk of tokens and of codes from `chunk_start` on.

    Writes whole tiles, with zeros outside the chunk. Grid: token tiles, code tiles.
    """
    first_token = tl.program_id(0) * ROWS
    first_code = tl.program_id(1) * COLUMNS
    token = first_token + tl.arange(0, ROWS)
    code = first_code + tl.arange(0, COLUMNS)
    inside = token < num_tokens
    logits = dot_tile(
        hidden_ptr + tl.cast(first_token, tl.int64) * width, weight_ptr + tl.cast(first_code, tl.int64) * width,
        num_tokens - first_token, num_codes - first_code, width, ROWS, COLUMNS, INNER, PRECISION,
    )  # fmt: skip
    target = tl.load(targets_ptr + token, mask=inside, other=-1)
    log_sum = tl.load(log_sum_ptr + token, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + token, mask=inside, other=0.0)
    softmax = tl.exp(logits - log_sum[:, None])
    is_target = (chunk_start + code)[None, :] == target[:, None]
    gradient = grad[:, None] * tl.where(is_target, softmax - 1.0, softmax)
    gradient = tl.where(inside[:, None] & (code < num_codes)[None, :], gradient, 0.0)
    tl.store(out_ptr + token[:, None] * out_stride + code[None, :], gradient.to(out_ptr.dtype.element_ty))


def forward(hidden: Tensor, weight: Tensor, targets: Tensor, *, dot_precision: DotPrecision) -> tuple[Tensor, Tensor]:
    """(nll [N], log_sum [N]), both float32 and in nats, of hidden [N, C], weight [V, C] and targets [N] int64.

    `hidden` and `weight` are contiguous and both float32 or both bfloat16; logits are added up in float32.
    `log_sum` is log sum_v exp(logit_v), which the backward pass needs.
    """
    precision = _precision(hidden, weight, dot_precision)
    hidden, weight = padded(hidden), padded(weight)
    (num_tokens, width), num_codes = hidden.shape, weight.shape[0]
    tile = ONE_PRODUCT_TILES[precision]
    with on_device(hidden):
        token_tiles = triton.cdiv(num_tokens, tile.rows)
        splits, split_length = split_evenly(num_codes, tile.columns, token_tiles, hidden.device)
        partial = torch.empty(3, splits, num_tokens, dtype=torch.float32, device=hidden.device)
        head_statistics_kernel[(token_tiles, splits)](
            hidden, weight, targets, *partial, num_tokens, num_codes, width, split_length,
            PRECISION=kernel_precision(precision), **tile.options(),
        )  # fmt: skip
        top, total, target_logit = partial
        total_top = top.amax(dim=0)
        log_total = ((top - total_top).exp() * total).sum(dim=0).log()
        # The difference of the logits first: both are large where the loss is small.
        return (total_top - target_logit.sum(dim=0)) + log_total, total_top + log_total


def backward(
    hidden: Tensor, weight: Tensor, targets: Tensor, log_sum: Tensor, grad_nll: Tensor, *, dot_precision: DotPrecision
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden [N, C], in its dtype, and of weight [V, C], in float32, from grad_nll [N] float32.

    The logits' gradients, grad_nll (softmax - one-hot), pass through a buffer of bounded size
    (`triton_common.WORKSPACE_BYTES`) in the operands' dtype.
    """
    precision = _precision(hidden, weight, dot_precision)
    (num_tokens, width), num_codes = hidden.shape, weight.shape[0]
    hidden, weight = padded(hidden), padded(weight)
    grad_nll = grad_nll.contiguous()  # the gradient of a mean arrives as one expanded number
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros_like(weight, dtype=torch.float32)
    with on_device(hidden):
        buffer = workspace(num_tokens, num_codes, hidden.dtype, hidden.device)
        for token in range(0, num_tokens, buffer.shape[0]):
            rows = slice(token, token + buffer.shape[0])
            grad_rows = torch.zeros_like(hidden[rows], dtype=torch.float32)
            for code in range(0, num_codes, buffer.shape[1]):
                columns = slice(code, code + buffer.shape[1])
                chunk = buffer[: len(hidden[rows]), : len(weight[columns])]
                _logit_gradients(
                    chunk, hidden[rows], weight[columns], targets[rows], log_sum[rows], grad_nll[rows], code, precision
                )
                add_product(grad_rows, chunk, weight[columns], dot_precision=precision)
                add_product(grad_weight[columns], chunk, hidden[rows], transposed=True, dot_precision=precision)
            grad_hidden[rows] = grad_rows
    return grad_hidden[:, :width].contiguous(), grad_weight[:, :width].contiguous()


def _precision(hidden: Tensor, weight: Tensor, dot_precision: DotPrecision) -> DotPrecision:
    """The precision that goes with the operands: bfloat16 operands leave no choice."""
    assert hidden.dtype == weight.dtype and hidden.is_contiguous() and weight.is_contiguous()
    assert hidden.dtype == torch.bfloat16 or (hidden.dtype == torch.float32 and dot_precision != "bfloat16")
    return "bfloat16" if hidden.dtype == torch.bfloat16 else dot_precision


def _logit_gradients(
    out: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, log_sum: Tensor, grad_nll: Tensor,
    chunk_start: int, dot_precision: DotPrecision,
) -> None:  # fmt: skip
    """Write the logits' gradient of one chunk of tokens and codes into out [N, V]."""
    (num_tokens, width), num_codes = hidden.shape, weight.shape[0]
    tile = ONE_PRODUCT_TILES[dot_precision]
    head_logit_gradients_kernel[(triton.cdiv(num_tokens, tile.rows), triton.cdiv(num_codes, tile.columns))](
        hidden, weight, targets, log_sum, grad_nll, out, num_tokens, num_codes, width, out.stride(0), chunk_start,
        PRECISION=kernel_precision(dot_precision), **tile.options(),
    )  # fmt: skip
