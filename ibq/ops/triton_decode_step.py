"""What a step of decoding does between its matrix products, in Triton: three kernels, each one pass over its operands.

The position is read on the device, so that a captured graph serves every position of an image.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ibq.ops.triton_common import on_device

CACHED = 64  # positions of the cache that a program reads at a time
GATES = 1024  # elements of a program of `swiglu`
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def residual_norm_kernel(
    x_ptr, update_ptr, gate_ptr, weight_ptr, scale_ptr, shift_ptr, sum_ptr, out_ptr,
    width, gate_stride, norm_stride, eps, HAS_UPDATE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid: rows. x + gate update, rounded as it is kept; then its root mean square norm, scaled and shifted."""
    row = tl.cast(tl.program_id(0), tl.int64)
    column = tl.arange(0, COLUMNS)
    exists = column < width
    x = tl.load(x_ptr + row * width + column, mask=exists, other=0.0)
    if HAS_UPDATE:
        update = tl.load(update_ptr + row * width + column, mask=exists, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + row * gate_stride + column, mask=exists, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) + gate * update).to(x.dtype)
        tl.store(sum_ptr + row * width + column, x, mask=exists)
    high = x.to(tl.float32)
    normed = high * tl.rsqrt(tl.sum(high * high) / width + eps)
    weight = tl.load(weight_ptr + column, mask=exists, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + row * norm_stride + column, mask=exists, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + row * norm_stride + column, mask=exists, other=0.0).to(tl.float32)
    out = shift + normed * (weight * (1.0 + scale))
    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=exists)


@triton.jit
def attend_kernel(
    qkv_ptr, rope_ptr, keys_ptr, values_ptr, out_ptr, position_ptr, tokens, heads, kv_heads, scale,
    HALF: tl.constexpr, CACHED: tl.constexpr,
):  # fmt: skip
    """Grid: rows, heads. Attention of the new position to itself and to those before it; its key and value are kept.

    Keys lie in the cache with the first channel of every pair before all the second ones: so they are read in one
    piece, and the product with a query in the same order is the same.
    """
    row, head = tl.cast(tl.program_id(0), tl.int64), tl.program_id(1)
    group = heads // kv_heads
    kv_head = head // group
    position = tl.load(position_ptr)
    half = tl.arange(0, HALF)
    whole = tl.arange(0, 2 * HALF)
    new_ptr = qkv_ptr + row * (heads + 2 * kv_heads) * 2 * HALF
    cos = tl.load(rope_ptr + (position * HALF + half) * 2)
    sin = tl.load(rope_ptr + (position * HALF + half) * 2 + 1)

    first = tl.load(new_ptr + head * 2 * HALF + 2 * half).to(tl.float32)
    second = tl.load(new_ptr + head * 2 * HALF + 2 * half + 1).to(tl.float32)
    kind = keys_ptr.dtype.element_ty
    query_first = (first * cos - second * sin).to(kind).to(tl.float32) * scale
    query_second = (first * sin + second * cos).to(kind).to(tl.float32) * scale
    first = tl.load(new_ptr + (heads + kv_head) * 2 * HALF + 2 * half).to(tl.float32)
    second = tl.load(new_ptr + (heads + kv_head) * 2 * HALF + 2 * half + 1).to(tl.float32)
    key_first, key_second = (first * cos - second * sin).to(kind), (first * sin + second * cos).to(kind)
    value = tl.load(new_ptr + (heads + kv_heads + kv_head) * 2 * HALF + whole).to(kind)

    cache = (row * kv_heads + kv_head) * tokens * 2 * HALF
    if head % group == 0:
        place = cache + position * 2 * HALF
        tl.store(keys_ptr + place + half, key_first)
        tl.store(keys_ptr + place + HALF + half, key_second)
        tl.store(values_ptr + place + whole, value)

    # What is new is in registers: the cache is read only before it.
    top = tl.sum(query_first * key_first.to(tl.float32) + query_second * key_second.to(tl.float32))
    total = tl.full([], 1.0, dtype=tl.float32)
    out = value.to(tl.float32)
    for begin in range(0, position, CACHED):
        index = begin + tl.arange(0, CACHED)
        filled = index < position
        line = cache + index[:, None] * (2 * HALF)
        key_a = tl.load(keys_ptr + line + half[None, :], mask=filled[:, None], other=0.0).to(tl.float32)
        key_b = tl.load(keys_ptr + line + HALF + half[None, :], mask=filled[:, None], other=0.0).to(tl.float32)
        scores = tl.sum(key_a * query_first[None, :] + key_b * query_second[None, :], axis=1)
        scores = tl.where(filled, scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores))
        shares = tl.exp2((scores - higher) * LOG2_E)
        before = tl.exp2((top - higher) * LOG2_E)
        value_rows = tl.load(values_ptr + line + whole[None, :], mask=filled[:, None], other=0.0).to(tl.float32)
        out = out * before + tl.sum(shares[:, None] * value_rows, axis=0)
        total = total * before + tl.sum(shares)
        top = higher
    tl.store(out_ptr + (row * heads + head) * 2 * HALF + whole, (out / total).to(out_ptr.dtype.element_ty))


@triton.jit
def swiglu_kernel(x_ptr, out_ptr, hidden, COLUMNS: tl.constexpr):
    """Grid: rows, parts of the hidden channels."""
    row = tl.cast(tl.program_id(0), tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = column < hidden
    gate = tl.load(x_ptr + row * 2 * hidden + column, mask=exists, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * hidden + hidden + column, mask=exists, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * hidden + column, out.to(out_ptr.dtype.element_ty), mask=exists)


def residual_norm(
    x: Tensor, update: Tensor | None, gate: Tensor | None, weight: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(x + gate * update, its norm * weight * (1 + scale) + shift), all [R, C] but weight [C].

    gate, scale and shift may be slices of one tensor with rows of their own stride.
    """
    rows, width = x.shape
    total, out = x if update is None else torch.empty_like(x), torch.empty_like(x)
    operands = (x, x if update is None else update, scale if gate is None else gate, weight, scale, shift, total, out)
    strides = (0 if gate is None else gate.stride(0), scale.stride(0))
    columns = triton.next_power_of_2(width)
    with on_device(x):
        residual_norm_kernel[(rows,)](
            *operands, width, *strides, eps, HAS_UPDATE=update is not None, COLUMNS=columns,
            num_warps=min(8, max(1, columns // 256)),
        )  # fmt: skip
    return total, out


def attend(qkv: Tensor, rope: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    """[R, heads * D] of qkv [R, (heads + 2 kv_heads) * D]; rope [1 + T, D / 2] complex64, position [1] int64.

    keys, values: the cache [R, kv_heads, T, D], to which the position's are added. Keys have an order of their own
    there, see the kernel.
    """
    rows, kv_heads, tokens, head_dim = keys.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    out = torch.empty(rows, heads * head_dim, dtype=qkv.dtype, device=qkv.device)
    sizes = (tokens, heads, kv_heads, head_dim**-0.5)
    with on_device(qkv):
        attend_kernel[(rows, heads)](
            qkv, torch.view_as_real(rope), keys, values, out, position, *sizes,
            HALF=head_dim // 2, CACHED=CACHED, num_warps=4,
        )  # fmt: skip
    return out


def swiglu(x: Tensor) -> Tensor:
    """silu(a) * b [R, H] of x = (a, b) [R, 2 H]."""
    rows, hidden = x.shape[0], x.shape[1] // 2
    out = torch.empty(rows, hidden, dtype=x.dtype, device=x.device)
    with on_device(x):
        swiglu_kernel[(rows, triton.cdiv(hidden, GATES))](x, out, hidden, COLUMNS=GATES, num_warps=4)
    return out
