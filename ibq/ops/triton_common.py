"""What the Triton kernels share: tiles of logits, an accumulating matrix product, tile sizes, how work is split.

Every kernel has the shape of a matrix product: a program owns one tile of logits at a time and walks over the inner
dimension in short steps, so that registers and shared memory depend on the tile alone, never on D, C, N or K. The
gradients go through a bounded buffer of logit gradients (`workspace`) instead of accumulators as wide as a row: that
costs one write and two reads of the buffer, and saves computing the logits again for every slice of a wide row.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

# "torch": PyTorch multiplies, in float32, and kernels read its table of products.
DotPrecision = Literal["ieee", "tf32x3", "tf32", "bfloat16", "torch"]

WORKSPACE_BYTES = 64 * 2**20  # one buffer of logit gradients; large enough that launches cost nothing beside the work
WORKSPACE_ROWS = 4096
ALIGNMENT = 16  # elements; Triton uses wide loads for strides that are known to be multiples of it
# How many programs each streaming multiprocessor should get before work is left unsplit: of those that multiply, and of
# those that only read, which need more of them to keep the memory busy.
PROGRAMS_PER_PROCESSOR, READERS_PER_PROCESSOR = 2, 8


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Sizes of one program's tile: rows x columns of the result, `inner` elements of the dot product at a time."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "INNER": self.inner,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


# Products in full float32 ("ieee") are made of scalar FMAs, whose operands all sit in registers, and three-pass tf32
# holds two halves of each operand: short inner steps there. The inner step of a precision is the same for one product
# and for two, so that logits are added up in the same order everywhere. tests/gpu/test_triton_compile.py holds every
# entry to the registers and the shared memory of compute capabilities 8.0 and 9.0.
TABLE_TILE = Tile(rows=32, columns=128, inner=16, warps=8, stages=1)  # a warp has whole rows of it: sums stay within it
ONE_PRODUCT_TILES: dict[DotPrecision, Tile] = {
    "torch": TABLE_TILE,
    "ieee": Tile(rows=64, columns=64, inner=16, warps=8, stages=2),
    "tf32x3": Tile(rows=128, columns=64, inner=16, warps=8, stages=3),
    "tf32": Tile(rows=128, columns=64, inner=32, warps=8, stages=4),
    "bfloat16": Tile(rows=128, columns=64, inner=64, warps=8, stages=4),
}
TWO_PRODUCT_TILES: dict[DotPrecision, Tile] = {
    "torch": TABLE_TILE,
    "ieee": Tile(rows=64, columns=32, inner=16, warps=4, stages=2),
    "tf32x3": Tile(rows=64, columns=32, inner=16, warps=4, stages=3),
    "tf32": Tile(rows=64, columns=64, inner=32, warps=8, stages=3),
    "bfloat16": Tile(rows=64, columns=64, inner=64, warps=8, stages=3),
}
GRADIENT_TILES: dict[DotPrecision, Tile] = {
    "ieee": Tile(rows=64, columns=64, inner=16, warps=4, stages=2),
    "tf32x3": Tile(rows=64, columns=64, inner=32, warps=8, stages=3),
    "tf32": Tile(rows=64, columns=128, inner=32, warps=8, stages=3),
    "bfloat16": Tile(rows=64, columns=128, inner=64, warps=8, stages=3),
}


@triton.jit
def dot_tile(
    a_ptr, b_ptr, a_rows, b_rows, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile [ROWS, COLUMNS] of a . b^T in float32, for row-major a and b of `width` columns.

    The pointers are those of the tile's first rows; `a_rows` and `b_rows` say how many rows exist from there. Rows
    beyond are read as zeros.
    """
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    product = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, width, INNER):
        inner = start + tl.arange(0, INNER)
        a_mask = (row[:, None] < a_rows) & (inner[None, :] < width)
        b_mask = (inner[:, None] < width) & (column[None, :] < b_rows)
        a = tl.load(a_ptr + row[:, None] * width + inner[None, :], mask=a_mask, other=0.0)
        b = tl.load(b_ptr + column[None, :] * width + inner[:, None], mask=b_mask, other=0.0)
        product = tl.dot(a, b, product, input_precision=PRECISION)
    return product


@triton.jit
def two_dot_tiles(
    first_ptr, second_ptr, b_ptr, a_rows, b_rows, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles of first . b^T and second . b^T, reading b once; otherwise as `dot_tile`."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    product = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    second_product = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, width, INNER):
        inner = start + tl.arange(0, INNER)
        a_mask = (row[:, None] < a_rows) & (inner[None, :] < width)
        b_mask = (inner[:, None] < width) & (column[None, :] < b_rows)
        a_offset = row[:, None] * width + inner[None, :]
        b = tl.load(b_ptr + column[None, :] * width + inner[:, None], mask=b_mask, other=0.0)
        first = tl.load(first_ptr + a_offset, mask=a_mask, other=0.0)
        product = tl.dot(first, b, product, input_precision=PRECISION)
        second = tl.load(second_ptr + a_offset, mask=a_mask, other=0.0)
        second_product = tl.dot(second, b, second_product, input_precision=PRECISION)
    return product, second_product


@triton.jit
def product_kernel(
    a_ptr, b_ptr, out_ptr, rows, columns, length, a_stride, split_length,
    TRANSPOSED: tl.constexpr, ACCUMULATE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [splits, rows, columns] (+)= a [rows, length] . b [length, columns], one slice of the length per split.

    With TRANSPOSED, a is stored as [length, rows]. It is a chunk of a `workspace`: whole tiles may be read without
    masks, and beyond the length there are zeros. Grid: column tiles (fastest, so that neighbours share a tile of a),
    row tiles, splits.
    """
    first_row = tl.program_id(1) * ROWS
    split = tl.program_id(2)
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    begin = split * split_length
    left = tl.minimum(split_length, length - begin)
    if TRANSPOSED:
        a_ptr += tl.cast(begin, tl.int64) * a_stride + first_row
        a_offset = inner[None, :] * a_stride + row[:, None]
        a_step = INNER * a_stride
    else:
        a_ptr += tl.cast(first_row, tl.int64) * a_stride + begin
        a_offset = row[:, None] * a_stride + inner[None, :]
        a_step = INNER
    b_ptr += tl.cast(begin, tl.int64) * columns
    b_offset = inner[:, None] * columns + column[None, :]
    product = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, left, INNER):
        a = tl.load(a_ptr + a_offset)
        b = tl.load(b_ptr + b_offset, mask=(inner[:, None] < left - start) & (column[None, :] < columns), other=0.0)
        product = tl.dot(a, b, product, input_precision=PRECISION)
        a_ptr += a_step
        b_ptr += INNER * columns
    out_ptr += (tl.cast(split, tl.int64) * rows + first_row) * columns
    out_offset = row[:, None] * columns + column[None, :]
    out_mask = (row[:, None] < rows - first_row) & (column[None, :] < columns)
    if ACCUMULATE:
        product += tl.load(out_ptr + out_offset, mask=out_mask, other=0.0)
    tl.store(out_ptr + out_offset, product, mask=out_mask)


def kernel_precision(dot_precision: DotPrecision) -> str:
    """`input_precision` of tl.dot, always given: Triton's own default on GPUs is tf32. bfloat16 operands ignore it.

    Or "table", where there is nothing to multiply.
    """
    return {"bfloat16": "ieee", "torch": "table"}.get(dot_precision, dot_precision)


def padded(matrix: Tensor) -> Tensor:
    """The matrix [rows, width] with zero columns up to a multiple of 16: loads of 16 bytes, at every width.

    Zero columns change no product. Widths that are multiples of 16 come back as they are.
    """
    return F.pad(matrix, (0, -matrix.shape[1] % ALIGNMENT)) if matrix.shape[1] % ALIGNMENT else matrix


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Context that makes the tensor's GPU current: Triton launches on the current device, not on the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def split_evenly(
    length: int, step: int, programs: int, device: torch.device, per_processor: int = PROGRAMS_PER_PROCESSOR
) -> tuple[int, int]:
    """(number of splits, length of a split): enough splits of whole steps that `programs` x splits fill the device.

    A function of shapes and device alone, so that the order of additions never varies between runs.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    wanted = triton.cdiv(per_processor * processors, max(programs, 1))
    steps = triton.cdiv(length, step)
    steps_per_split = triton.cdiv(steps, min(wanted, steps))
    return triton.cdiv(steps, steps_per_split), steps_per_split * step


def workspace(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A buffer [row chunk, column chunk] for logit gradients, of at most about WORKSPACE_BYTES.

    Chunks are whole multiples of every tile, and of 256 elements, so that slices at their borders stay aligned. Kernels
    that fill it write whole tiles, zeros where there is no token or code: `product_kernel` reads it without masks.
    """
    row_chunk = _even_chunk(rows, WORKSPACE_ROWS)
    column_chunk = _even_chunk(columns, max(WORKSPACE_BYTES // (row_chunk * dtype.itemsize), 256))
    return torch.empty(row_chunk, column_chunk, dtype=dtype, device=device)


def _even_chunk(length: int, limit: int) -> int:
    """Length of equal chunks, in multiples of 256 and up to about `limit`: no small rest that leaves the GPU idle."""
    return triton.cdiv(triton.cdiv(length, triton.cdiv(length, limit)), 256) * 256


def add_product(out: Tensor, a: Tensor, b: Tensor, *, transposed: bool = False, dot_precision: DotPrecision) -> None:
    """out [rows, columns] += a . b, in float32 and always in the same order; a^T . b if `transposed`.

    `a` is a chunk at the start of a `workspace`; b [length, columns] and out are contiguous, and a and b have the same
    dtype.
    """
    assert out.is_contiguous() and out.dtype == torch.float32 and b.is_contiguous() and b.dtype == a.dtype
    tile = GRADIENT_TILES[dot_precision]
    (rows, columns), length = out.shape, b.shape[0]
    column_tiles, row_tiles = triton.cdiv(columns, tile.columns), triton.cdiv(rows, tile.rows)
    splits, split_length = split_evenly(length, 16 * tile.inner, column_tiles * row_tiles, out.device)
    target = out if splits == 1 else out.new_empty(splits, rows, columns)
    product_kernel[(column_tiles, row_tiles, splits)](
        a, b, target, rows, columns, length, a.stride(0), split_length,
        TRANSPOSED=transposed, ACCUMULATE=splits == 1, PRECISION=kernel_precision(dot_precision), **tile.options(),
    )  # fmt: skip
    if splits > 1:
        out += target.sum(dim=0)
