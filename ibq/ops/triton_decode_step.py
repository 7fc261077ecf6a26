"""What a step of decoding does between its matrix products, in Triton: four kernels, each one pass over its operands.

The position is read on the device, so that a captured graph serves every position of an image.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ibq.ops.triton_common import on_device

TILE_BYTES = 4096  # of keys, and of values, that a program of `attend` reads at a time
TILE_WARPS, AHEAD, STAGES = 4, True, 1
GATES = 1024  # elements of a program of `swiglu`


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
def turned(pairs_ptr, first, is_second, cos, sin):
    """A new query or key after its rotation, in the order of the cache: the first channel of every pair, the second."""
    one, other = tl.load(pairs_ptr + first).to(tl.float32), tl.load(pairs_ptr + first + 1).to(tl.float32)
    return tl.where(is_second, one * sin + other * cos, one * cos - other * sin)


@triton.jit(do_not_specialize=["tokens", "heads", "kv_heads"])
def attend_kernel(
    qkv_ptr, rope_ptr, keys_ptr, values_ptr, out_ptr, position_ptr, tokens, heads, kv_heads, scale,
    HEAD_DIM: tl.constexpr, SLOTS: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: rows x heads. Attention of the new position to itself and to those before it; its key and value are kept.

    Bound by reading the cache, so nothing may wait: every SLOTS-th position has a softmax of its own (highest score,
    sum of shares, sum of values) in the threads that read it, and only after the last tile are they put together.
    Keys lie in the cache with the first channel of every pair before all the second ones: a query in the same order
    gives the same product. Scores are in units of ln 2.
    """
    head = tl.program_id(0) % heads  # those of a group side by side: the second finds what the first has read in L2
    row = tl.cast(tl.program_id(0) // heads, tl.int64)
    group = heads // kv_heads
    kv_head = head // group
    position = tl.load(position_ptr).to(tl.int32)
    slot, channel = tl.arange(0, SLOTS), tl.arange(0, HEAD_DIM)
    tile = slot[:, None] * HEAD_DIM + channel[None, :]
    qkv_ptr += row * (heads + 2 * kv_heads) * HEAD_DIM
    keys_ptr += (row * kv_heads + kv_head) * tokens * HEAD_DIM
    values_ptr += (row * kv_heads + kv_head) * tokens * HEAD_DIM
    if AHEAD:  # a tile is read while the one before it is added up, the first while the query is turned
        filled = (slot < position)[:, None]
        key_rows = tl.load(keys_ptr + tile, mask=filled, other=0.0)
        value_rows = tl.load(values_ptr + tile, mask=filled, other=0.0)

    first, is_second = 2 * (channel % (HEAD_DIM // 2)), channel >= HEAD_DIM // 2
    cos = tl.load(rope_ptr + position * HEAD_DIM + first)
    sin = tl.load(rope_ptr + position * HEAD_DIM + first + 1)
    kind = keys_ptr.dtype.element_ty
    query = turned(qkv_ptr + head * HEAD_DIM, first, is_second, cos, sin).to(kind).to(tl.float32) * scale
    key = turned(qkv_ptr + (heads + kv_head) * HEAD_DIM, first, is_second, cos, sin).to(kind)
    value = tl.load(qkv_ptr + (heads + kv_heads + kv_head) * HEAD_DIM + channel).to(kind)
    if head % group == 0:
        tl.store(keys_ptr + position * HEAD_DIM + channel, key)
        tl.store(values_ptr + position * HEAD_DIM + channel, value)

    # What is new is in registers: the cache is read only before it.
    own = tl.sum(query * key.to(tl.float32))
    top = tl.zeros([SLOTS], dtype=tl.float32) + own
    total = tl.zeros([SLOTS], dtype=tl.float32)
    out = tl.zeros([SLOTS, HEAD_DIM], dtype=tl.float32)
    for begin in tl.range(0, position, SLOTS, num_stages=STAGES):
        if AHEAD:
            after = begin + SLOTS
            filled = (after + slot < position)[:, None]
            next_keys = tl.load(keys_ptr + after * HEAD_DIM + tile, mask=filled, other=0.0)
            next_values = tl.load(values_ptr + after * HEAD_DIM + tile, mask=filled, other=0.0)
        else:
            filled = (begin + slot < position)[:, None]
            key_rows = tl.load(keys_ptr + begin * HEAD_DIM + tile, mask=filled, other=0.0)
            value_rows = tl.load(values_ptr + begin * HEAD_DIM + tile, mask=filled, other=0.0)
        scores = tl.sum(key_rows.to(tl.float32) * query[None, :], axis=1)
        scores = tl.where(begin + slot < position, scores, -float("inf"))
        higher = tl.maximum(top, scores)
        before, shares = tl.exp2(top - higher), tl.exp2(scores - higher)
        total = total * before + shares
        out = out * before[:, None] + shares[:, None] * value_rows.to(tl.float32)
        top = higher
        if AHEAD:
            key_rows, value_rows = next_keys, next_values
    highest = tl.max(top)
    own, shares = tl.exp2(own - highest), tl.exp2(top - highest)
    whole = own * value.to(tl.float32) + tl.sum(out * shares[:, None], axis=0)
    whole /= own + tl.sum(total * shares)
    tl.store(out_ptr + (row * heads + head) * HEAD_DIM + channel, whole.to(out_ptr.dtype.element_ty))


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


@triton.jit
def embed_kernel(codes_ptr, table_ptr, targets_ptr, position_ptr, out_ptr, rows, width, COLUMNS: tl.constexpr):
    """Grid: rows of the output, which has those of the codes once or twice. Code and next position as their sum."""
    row = tl.cast(tl.program_id(0), tl.int64)
    column = tl.arange(0, COLUMNS)
    exists = column < width
    code, position = tl.load(codes_ptr + row % rows), tl.load(position_ptr)
    out = tl.load(table_ptr + code * width + column, mask=exists, other=0.0).to(tl.float32)
    out += tl.load(targets_ptr + (position + 1) * width + column, mask=exists, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=exists)


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
    sizes = (tokens, heads, kv_heads, head_dim**-0.5 / math.log(2))
    with on_device(qkv):
        attend_kernel[(rows * heads,)](
            qkv, torch.view_as_real(rope), keys, values, out, position, *sizes,
            HEAD_DIM=head_dim, **tile(head_dim, keys.dtype), num_warps=TILE_WARPS,
        )  # fmt: skip
    return out


def tile(head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """What `attend_kernel` reads at a time: the same for any number of rows, as they may not matter to a row."""
    return {"SLOTS": max(1, TILE_BYTES // (head_dim * dtype.itemsize)), "AHEAD": AHEAD, "STAGES": STAGES}


def swiglu(x: Tensor) -> Tensor:
    """silu(a) * b [R, H] of x = (a, b) [R, 2 H]."""
    rows, hidden = x.shape[0], x.shape[1] // 2
    out = torch.empty(rows, hidden, dtype=x.dtype, device=x.device)
    with on_device(x):
        swiglu_kernel[(rows, triton.cdiv(hidden, GATES))](x, out, hidden, COLUMNS=GATES, num_warps=4)
    return out


def embed(codes: Tensor, table: Tensor, targets: Tensor, position: Tensor, out: Tensor) -> None:
    """out [..., R, C] = table [V, C] of codes [R] + targets [1 + T, C] of the one after position [1] int64."""
    rows, width = len(codes), table.shape[1]
    columns = triton.next_power_of_2(width)
    with on_device(table):
        embed_kernel[(out.numel() // width,)](
            codes, table, targets, position, out, rows, width,
            COLUMNS=columns, num_warps=min(8, max(1, columns // 256)),
        )  # fmt: skip
