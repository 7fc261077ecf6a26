"""A draw from logits in Triton: guidance, temperature, softmax and inverse distribution function in two kernels.

The logits are read once, and the part that holds the code once more. Every part of a row is summed in float64 relative
to its own highest logit, so that no kernel waits for the row's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ibq.ops.triton_common import on_device

PART = 4096  # logits of a row that a program reads
PART_WARPS = 8


@triton.jit
def weights_of_part(
    logits_ptr, scales_ptr, position, temperature, rows, row, codes, first, GUIDED: tl.constexpr, PART: tl.constexpr
):
    """exp(logits - their highest) [PART] in float32 of the codes from `first` on, and the highest."""
    code = first + tl.arange(0, PART)
    exists = code < codes
    logits = tl.load(logits_ptr + row * codes + code, mask=exists, other=0.0).to(tl.float32)
    if GUIDED:
        uncond = tl.load(logits_ptr + (rows + row) * codes + code, mask=exists, other=0.0).to(tl.float32)
        logits = uncond + tl.load(scales_ptr + position) * (logits - uncond)
    logits = tl.where(exists, logits / temperature, -float("inf"))
    highest = tl.max(logits)
    below = tl.where(logits == -float("inf"), logits, logits - highest)
    return tl.exp(below), highest


@triton.jit(do_not_specialize=["rows"])
def draw_sums_kernel(
    logits_ptr, scales_ptr, position_ptr, highest_ptr, sums_ptr, temperature, rows, codes,
    GUIDED: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Grid: rows, parts of a row."""
    row = tl.cast(tl.program_id(0), tl.int64)
    weights, highest = weights_of_part(
        logits_ptr, scales_ptr, tl.load(position_ptr), temperature, rows, row, codes, tl.program_id(1) * PART,
        GUIDED, PART,
    )  # fmt: skip
    place = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(highest_ptr + place, highest)
    tl.store(sums_ptr + place, tl.sum(weights.to(tl.float64)))


@triton.jit
def first_beyond(weights, number, SIZE: tl.constexpr):
    """The first place of weights [SIZE] in float64 where their running sum passes a number, and the sum before it.

    What weighs nothing is passed over, and where roundings leave no place, it is the last that weighs something.
    """
    place = tl.arange(0, SIZE)
    weighs = weights > 0
    last = tl.max(tl.where(weighs, place, 0))
    found = tl.min(tl.where(weighs & (tl.cumsum(weights, axis=0) > number), place, last))
    return found, tl.sum(tl.where(place < found, weights, 0.0))


@triton.jit(do_not_specialize=["rows", "parts", "tokens"])
def draw_kernel(
    logits_ptr, scales_ptr, position_ptr, highest_ptr, sums_ptr, numbers_ptr, drawn_ptr, temperature, rows, codes,
    parts, tokens, GUIDED: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Grid: rows."""
    row = tl.cast(tl.program_id(0), tl.int64)
    position = tl.load(position_ptr)
    number = tl.load(numbers_ptr + row * tokens + position)
    part = tl.arange(0, PARTS)
    highest = tl.load(highest_ptr + row * parts + part, mask=part < parts, other=-float("inf"))
    sums = tl.load(sums_ptr + row * parts + part, mask=part < parts, other=0.0)
    factors = tl.exp(highest - tl.max(highest)).to(tl.float64)
    total = tl.sum(sums * factors)
    number *= total
    chosen, before = first_beyond(sums * factors, number, PARTS)
    factor = tl.sum(tl.where(part == chosen, factors, 0.0))
    weights, _ = weights_of_part(
        logits_ptr, scales_ptr, position, temperature, rows, row, codes, chosen * PART, GUIDED, PART
    )
    code, _ = first_beyond(weights.to(tl.float64), (number - before) / factor, PART)
    drawn = tl.where(total > 0, chosen * PART + code, codes - 1)  # of NaN the last one
    tl.store(drawn_ptr + row, drawn.to(tl.int64))


def draw(logits: Tensor, scales: Tensor | None, numbers: Tensor, position: Tensor, temperature: float) -> Tensor:
    """Codes [R] int64 as `pick` of `ibq/sampling.py` draws them, from logits [R, V] in float32 or bfloat16.

    With scales [T] of guidance: [2 R, V], with class before without, and logits uncond + scale * (cond - uncond).
    numbers [R, T] float64 in (0, 1) and scales are taken at the position [1] int64.
    """
    (rows, tokens), codes = numbers.shape, logits.shape[1]
    parts = triton.cdiv(codes, PART)
    highest = torch.empty(rows, parts, dtype=torch.float32, device=logits.device)
    sums = torch.empty(rows, parts, dtype=torch.float64, device=logits.device)
    drawn = torch.empty(rows, dtype=torch.int64, device=logits.device)
    operands = (logits, logits if scales is None else scales, position, highest, sums)
    options = {"GUIDED": scales is not None, "PART": PART, "num_warps": PART_WARPS}
    with on_device(logits):
        draw_sums_kernel[(rows, parts)](*operands, temperature, rows, codes, **options)
        draw_kernel[(rows,)](
            *operands, numbers, drawn, temperature, rows, codes, parts, tokens,
            PARTS=triton.next_power_of_2(parts), **options,
        )  # fmt: skip
    return drawn
