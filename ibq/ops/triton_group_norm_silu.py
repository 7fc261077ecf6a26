"""Group normalization and SiLU of channels-last images in Triton: one pass for sums, one for values, each way.

PyTorch's own kernels take images channel by channel, and so copy what tensor cores' convolutions give and want, four
times for each normalization. Sums over pixels are made per channel, slice by slice, always in the same order; what
is left to do with them, per channel and group, is plain PyTorch on a few thousand numbers.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ibq.ops.triton_common import on_device, split_evenly

TILE_ELEMENTS = 4096  # pixels x channels of a program's tile
WARPS = 8


class Normalization(NamedTuple):
    """What the forward pass finds: u = scale x + shift is the normalized image, before SiLU."""

    mean: Tensor  # [B, C], equal within a group
    rstd: Tensor  # [B, C], likewise
    scale: Tensor  # [B, C]
    shift: Tensor  # [B, C]


@triton.jit
def through_silu(grad, x, scale, shift):
    """Gradient of u = scale x + shift, of which SiLU is taken; all in float32."""
    u = x * scale + shift
    gate = 1.0 / (1.0 + tl.exp(-u))
    return grad * gate * (1.0 + u * (1.0 - gate))


@triton.jit
def channel_sums_kernel(
    x_ptr, grad_ptr, scale_ptr, shift_ptr, sums_ptr, pixels, channels, splits, split_length,
    OF_GRADIENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums [B, splits, 2, C] over a slice of an image's pixels: of x and x^2, or of du and du x for the gradient.

    Grid: splits, images.
    """
    split = tl.program_id(0)
    image = tl.cast(tl.program_id(1), tl.int64)
    begin = split * split_length
    end = tl.minimum(begin + split_length, pixels)
    column = tl.arange(0, COLUMNS)
    exists = column < channels
    scale = tl.zeros([COLUMNS], dtype=tl.float32)
    shift = tl.zeros([COLUMNS], dtype=tl.float32)
    if OF_GRADIENT:
        scale = tl.load(scale_ptr + image * channels + column, mask=exists, other=0.0)
        shift = tl.load(shift_ptr + image * channels + column, mask=exists, other=0.0)
    first = tl.zeros([COLUMNS], dtype=tl.float32)
    second = tl.zeros([COLUMNS], dtype=tl.float32)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < end)[:, None] & exists[None, :]
        offset = (image * pixels + row)[:, None] * channels + column[None, :]
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        value = x
        if OF_GRADIENT:
            grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            value = through_silu(grad, x, scale[None, :], shift[None, :])
        first += tl.sum(value, axis=0)
        second += tl.sum(value * x, axis=0)
    out = (image * splits + split) * 2 * channels + column
    tl.store(sums_ptr + out, first, mask=exists)
    tl.store(sums_ptr + out + channels, second, mask=exists)


@triton.jit
def values_kernel(
    x_ptr, grad_ptr, scale_ptr, shift_ptr, slope_ptr, offset_ptr, out_ptr, pixels, channels,
    OF_GRADIENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """silu(scale x + shift), or the gradient of x, scale du + slope x + offset; [B, C] each but x, du and out.

    Grid: tiles of pixels, images.
    """
    image = tl.cast(tl.program_id(1), tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    exists = column < channels
    mask = (row < pixels)[:, None] & exists[None, :]
    place = (image * pixels + row)[:, None] * channels + column[None, :]
    own = image * channels + column
    scale = tl.load(scale_ptr + own, mask=exists, other=0.0)[None, :]
    shift = tl.load(shift_ptr + own, mask=exists, other=0.0)[None, :]
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if OF_GRADIENT:
        grad = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
        slope = tl.load(slope_ptr + own, mask=exists, other=0.0)[None, :]
        offset = tl.load(offset_ptr + own, mask=exists, other=0.0)[None, :]
        result = scale * through_silu(grad, x, scale, shift) + slope * x + offset
    else:
        u = x * scale + shift
        result = u / (1.0 + tl.exp(-u))
    tl.store(out_ptr + place, result.to(out_ptr.dtype.element_ty), mask=mask)


def forward(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Normalization]:
    """silu(group_norm(x)) for channels-last x [B, C, H, W] and float32 weight and bias [C], in the precision of x."""
    batch, channels, height, width = x.shape
    sums = _channel_sums(x)
    count = height * width * channels // groups
    mean, square = (sums.view(batch, 2, groups, -1).sum(dim=-1) / count).unbind(dim=1)
    rstd = torch.rsqrt((square - mean.square()).clamp_(min=0.0) + eps)
    mean, rstd = (value.repeat_interleave(channels // groups, dim=1) for value in (mean, rstd))
    scale = rstd * weight
    found = Normalization(mean, rstd, scale, bias - mean * scale)
    return _values(x, found), found


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, groups: int, found: Normalization
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias.

    With du the gradient of the normalized image, w the weight and means over the n elements of a group,

        dx = rstd (w du - mean(w du) - z mean(w du z)),  z = (x - mean) rstd.
    """
    batch, channels, height, width = x.shape
    grad = grad.contiguous(memory_format=torch.channels_last)
    plain, with_x = _channel_sums(x, grad, found).unbind(dim=1)  # of du and du x, [B, C] each
    with_z = found.rstd * (with_x - found.mean * plain)
    means = torch.stack([plain, with_z]) * weight / (height * width * channels // groups)
    means = means.view(2, batch, groups, -1).sum(dim=-1).repeat_interleave(channels // groups, dim=2)
    slope = -found.rstd.square() * means[1]
    offset = -found.rstd * means[0] - slope * found.mean
    return _values(x, found, grad, slope, offset), with_z.sum(dim=0), plain.sum(dim=0)


def _tile(channels: int) -> dict[str, int]:
    columns = triton.next_power_of_2(channels)
    return {"ROWS": max(1, TILE_ELEMENTS // columns), "COLUMNS": columns, "num_warps": WARPS}


def _channel_sums(x: Tensor, grad: Tensor | None = None, found: Normalization | None = None) -> Tensor:
    """[B, 2, C]: see the kernel."""
    batch, channels, height, width = x.shape
    tile, pixels = _tile(channels), height * width
    splits, length = split_evenly(pixels, tile["ROWS"], batch, x.device)
    sums = torch.empty(batch, splits, 2, channels, device=x.device)
    scale, shift = (sums, sums) if found is None else (found.scale, found.shift)
    with on_device(x):
        channel_sums_kernel[(splits, batch)](
            x, x if grad is None else grad, scale, shift, sums, pixels, channels, splits, length,
            OF_GRADIENT=grad is not None, **tile,
        )  # fmt: skip
    return sums.sum(dim=1)


def _values(
    x: Tensor,
    found: Normalization,
    grad: Tensor | None = None,
    slope: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    batch, channels, height, width = x.shape
    tile, pixels, out = _tile(channels), height * width, torch.empty_like(x)
    unused = found.scale
    with on_device(x):
        values_kernel[(triton.cdiv(pixels, tile["ROWS"]), batch)](
            x, x if grad is None else grad, found.scale, found.shift,
            unused if slope is None else slope, unused if offset is None else offset, out, pixels, channels,
            OF_GRADIENT=grad is not None, **tile,
        )  # fmt: skip
    return out
