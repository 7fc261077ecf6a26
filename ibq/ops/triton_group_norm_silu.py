"""Group normalization and SiLU of channels-last images in Triton: one pass for sums, one for values, each way.

PyTorch's own kernels take images channel by channel, and so copy what tensor cores' convolutions give and want, four
times for each normalization. Sums over pixels are made per channel, slice by slice, always in the same order; a small
kernel makes of them what the second pass needs: in plain PyTorch that would be a dozen launches.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ibq.ops.triton_common import READERS_PER_PROCESSOR, on_device, split_evenly

TILE_ELEMENTS = 4096  # pixels x channels of a program's tile
WARPS = 8
STEP = 16  # slices that are added up at a time


class Normalization(NamedTuple):
    """What the forward pass finds, all [B, C]: u = scale x + shift is the normalized image, before SiLU.

    The image that is normalized is x, or x + added where a bias [C] has not been added to x yet.
    """

    mean: Tensor  # of the group's image, less the channel's `added`
    rstd: Tensor  # equal within a group
    scale: Tensor
    shift: Tensor
    total: Tensor  # sum of x over the pixels


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
    # Added up place by place: a sum over the rows in each turn would make the warps wait for each other.
    first = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    second = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < end)[:, None] & exists[None, :]
        offset = (image * pixels + row)[:, None] * channels + column[None, :]
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        value = x
        if OF_GRADIENT:
            grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)  # none beyond the end: no share
            value = through_silu(grad, x, scale[None, :], shift[None, :])
        first += value
        second += value * x
    out = (image * splits + split) * 2 * channels + column
    tl.store(sums_ptr + out, tl.sum(first, axis=0), mask=exists)
    tl.store(sums_ptr + out + channels, tl.sum(second, axis=0), mask=exists)


@triton.jit
def statistics_kernel(
    sums_ptr, weight_ptr, bias_ptr, added_ptr, out_ptr, channels, splits, images, pixels, eps,
    HAS_ADDED: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`Normalization` [5, B, C] from sums of x and x^2 [B, splits, 2, C]. Grid: groups, images."""
    image, channel, inside, total, square = group_sums(sums_ptr, channels, splits, STEP, WIDTH)
    first, second = total, square
    added = tl.zeros([WIDTH], dtype=tl.float32)
    if HAS_ADDED:
        added = tl.load(added_ptr + channel, mask=inside, other=0.0)
        first = total + pixels * added
        second = square + added * (total + first)
    count = pixels * (channels // tl.num_programs(0))
    mean = tl.sum(first, axis=0) / count
    variance = tl.sum(second, axis=0) / count - mean * mean
    rstd = 1.0 / tl.sqrt(tl.maximum(variance, 0.0) + eps)
    scale = rstd * tl.load(weight_ptr + channel, mask=inside, other=0.0)
    shift = tl.load(bias_ptr + channel, mask=inside, other=0.0) - (mean - added) * scale
    out_ptr += image * channels + channel
    step = images * channels
    tl.store(out_ptr, mean - added, mask=inside)
    tl.store(out_ptr + step, tl.zeros([WIDTH], dtype=tl.float32) + rstd, mask=inside)
    tl.store(out_ptr + 2 * step, scale, mask=inside)
    tl.store(out_ptr + 3 * step, shift, mask=inside)
    tl.store(out_ptr + 4 * step, total, mask=inside)


@triton.jit
def gradient_statistics_kernel(
    sums_ptr, weight_ptr, mean_ptr, rstd_ptr, total_ptr, out_ptr, channels, splits, images, pixels,
    STEP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """From sums of du and du x [B, splits, 2, C], see `backward`: slope, offset, and of each image the gradients of
    weight, bias and what is added [5, B, C]. Grid: groups, images."""
    image, channel, inside, plain, with_x = group_sums(sums_ptr, channels, splits, STEP, WIDTH)
    count = pixels * (channels // tl.num_programs(0))
    place = image * channels + channel
    mean = tl.load(mean_ptr + place, mask=inside, other=0.0)
    rstd = tl.load(rstd_ptr + place, mask=inside, other=0.0)
    total = tl.load(total_ptr + place, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0)
    with_z = rstd * (with_x - mean * plain)
    slope = -rstd * rstd * (tl.sum(weight * with_z, axis=0) / count)
    middle = -rstd * (tl.sum(weight * plain, axis=0) / count)
    out_ptr += place
    step = images * channels
    tl.store(out_ptr, slope, mask=inside)
    tl.store(out_ptr + step, middle - slope * mean, mask=inside)
    tl.store(out_ptr + 2 * step, with_z, mask=inside)
    tl.store(out_ptr + 3 * step, plain, mask=inside)
    # The sum over the pixels of what `values_kernel` makes.
    tl.store(out_ptr + 4 * step, rstd * weight * plain + slope * (total - pixels * mean) + pixels * middle, mask=inside)


@triton.jit
def group_sums(sums_ptr, channels, splits, STEP: tl.constexpr, WIDTH: tl.constexpr):
    """This program's image, its group's channels, which of them exist, and both sums over the slices, [WIDTH] each."""
    group = tl.program_id(0)
    image = tl.program_id(1)
    width = channels // tl.num_programs(0)
    inside = tl.arange(0, WIDTH) < width
    channel = group * width + tl.arange(0, WIDTH)
    first = tl.zeros([WIDTH], dtype=tl.float32)
    second = tl.zeros([WIDTH], dtype=tl.float32)
    for start in range(0, splits, STEP):
        split = start + tl.arange(0, STEP)
        mask = (split < splits)[:, None] & inside[None, :]
        place = (image * splits + split)[:, None] * 2 * channels + channel[None, :]
        first += tl.sum(tl.load(sums_ptr + place, mask=mask, other=0.0), axis=0)
        second += tl.sum(tl.load(sums_ptr + place + channels, mask=mask, other=0.0), axis=0)
    return image, channel, inside, first, second


@triton.jit
def values_kernel(
    x_ptr, grad_ptr, scale_ptr, shift_ptr, slope_ptr, offset_ptr, shortcut_ptr, out_ptr, pixels, channels,
    OF_GRADIENT: tl.constexpr, HAS_SHORTCUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """silu(scale x + shift), or the gradient of x, scale du + slope x + offset; [B, C] each but x, du and out.

    A gradient that has come to x by a shortcut is added.

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
        if HAS_SHORTCUT:
            result += tl.load(shortcut_ptr + place, mask=mask, other=0.0).to(tl.float32)
    else:
        u = x * scale + shift
        result = u / (1.0 + tl.exp(-u))
    tl.store(out_ptr + place, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def shortcut_kernel(
    x_ptr, bias_ptr, shortcut_ptr, out_ptr, pixels, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """x + bias + shortcut. Grid: tiles of all images' pixels."""
    row = tl.cast(tl.program_id(0), tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    exists = column < channels
    mask = (row < pixels)[:, None] & exists[None, :]
    place = row[:, None] * channels + column[None, :]
    bias = tl.load(bias_ptr + column, mask=exists, other=0.0)
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    shortcut = tl.load(shortcut_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, (x + bias[None, :] + shortcut).to(out_ptr.dtype.element_ty), mask=mask)


def normalization(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, added: Tensor | None = None
) -> Normalization:
    """Of channels-last x [B, C, H, W], with float32 weight, bias and `added` [C]."""
    sums = _channel_sums(x)
    out, launch = _per_group(x, sums, groups)
    with on_device(x):
        statistics_kernel[(groups, len(x))](
            sums, weight, bias, weight if added is None else added, out, *launch.sizes, eps,
            HAS_ADDED=added is not None, **launch.constants,
        )  # fmt: skip
    return Normalization(*out)


def forward(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Normalization]:
    """silu(group_norm(x)) for channels-last x [B, C, H, W] and float32 weight and bias [C], in the precision of x."""
    found = normalization(x, weight, bias, groups, eps)
    return values(x, found), found


class Gradients(NamedTuple):
    """Those of a normalization with SiLU."""

    x: Tensor  # [B, C, H, W]
    weight: Tensor  # [C]
    bias: Tensor  # [C]
    added: Tensor  # [C], of the bias that has not been added to x


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, groups: int, found: Normalization, shortcut: Tensor | None = None
) -> Gradients:
    """Gradients; to that of x comes `shortcut`, of its shape.

    With du the gradient of the normalized image, w the weight and means over the elements of a group,

        dx = rstd (w du - mean(w du) - z mean(w du z)) = scale du + slope x + offset,  z = (x - mean) rstd.
    """
    grad = grad.contiguous(memory_format=torch.channels_last)
    sums = _channel_sums(x, grad, found)
    out, launch = _per_group(x, sums, groups)
    with on_device(x):
        gradient_statistics_kernel[(groups, len(x))](
            sums, weight, found.mean, found.rstd, found.total, out, *launch.sizes, **launch.constants
        )
    slope, offset = out[:2]
    return Gradients(values(x, found, grad, slope, offset, shortcut), *out[2:].sum(dim=1))


def add_shortcut(x: Tensor, bias: Tensor, shortcut: Tensor) -> Tensor:
    """x + bias + shortcut for channels-last x and shortcut [B, C, H, W] and float32 bias [C], rounded once."""
    batch, channels, height, width = x.shape
    tile, pixels, out = _tile(channels), batch * height * width, torch.empty_like(x)
    with on_device(x):
        shortcut_kernel[(triton.cdiv(pixels, tile["ROWS"]),)](x, bias, shortcut, out, pixels, channels, **tile)
    return out


def sum_over_pixels(x: Tensor) -> Tensor:
    """[C] float32: of channels-last x [B, C, H, W]."""
    return _channel_sums(x)[:, :, 0].sum(dim=(0, 1))


class _Launch(NamedTuple):
    sizes: tuple[int, ...]
    constants: dict[str, int]


def _per_group(x: Tensor, sums: Tensor, groups: int) -> tuple[Tensor, _Launch]:
    """Where a kernel of one program per group and image writes its five results [5, B, C], and its sizes."""
    batch, channels, height, width = x.shape
    splits, own = sums.shape[1], channels // groups
    constants = {"STEP": STEP, "WIDTH": triton.next_power_of_2(own)}
    sizes = (channels, splits, batch, height * width)
    return torch.empty(5, batch, channels, device=x.device), _Launch(sizes, constants)


def _tile(channels: int) -> dict[str, int]:
    columns = triton.next_power_of_2(channels)
    return {"ROWS": max(1, TILE_ELEMENTS // columns), "COLUMNS": columns, "num_warps": WARPS}


def _channel_sums(x: Tensor, grad: Tensor | None = None, found: Normalization | None = None) -> Tensor:
    """[B, splits, 2, C]: see the kernel."""
    batch, channels, height, width = x.shape
    tile, pixels = _tile(channels), height * width
    splits, length = split_evenly(pixels, tile["ROWS"], batch, x.device, READERS_PER_PROCESSOR)
    sums = torch.empty(batch, splits, 2, channels, device=x.device)
    scale, shift = (sums, sums) if found is None else (found.scale, found.shift)
    with on_device(x):
        channel_sums_kernel[(splits, batch)](
            x, x if grad is None else grad, scale, shift, sums, pixels, channels, splits, length,
            OF_GRADIENT=grad is not None, **tile,
        )  # fmt: skip
    return sums


def values(
    x: Tensor,
    found: Normalization,
    grad: Tensor | None = None,
    slope: Tensor | None = None,
    offset: Tensor | None = None,
    shortcut: Tensor | None = None,
) -> Tensor:
    """silu of the normalized image, or with `grad` the gradient of x, in the precision of x; see the kernel."""
    batch, channels, height, width = x.shape
    tile, pixels, out = _tile(channels), height * width, torch.empty_like(x)
    unused = found.scale
    with on_device(x):
        values_kernel[(triton.cdiv(pixels, tile["ROWS"]), batch)](
            x, x if grad is None else grad, found.scale, found.shift,
            unused if slope is None else slope, unused if offset is None else offset,
            x if shortcut is None else shortcut, out, pixels, channels,
            OF_GRADIENT=grad is not None, HAS_SHORTCUT=shortcut is not None, **tile,
        )  # fmt: skip
    return out
