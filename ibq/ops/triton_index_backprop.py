"""Index backpropagation on GPUs: the softmax of tokens over codes and its gradients, without the N x K tables.

Index Backpropagation Quantization (arXiv 2412.02692, section 3.2); `ibq.ops.textbook` writes the same formulas out.
With logits l = tokens . codebook^T, p = softmax(l / selection_temperature) carries the gradient into every code, and
P = softmax(l / temperature) the entropies.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ibq.ops.index_backprop_tiles import ForwardStatistics
from ibq.ops.triton_common import (
    ONE_PRODUCT_TILES,
    PROGRAMS_PER_PROCESSOR,
    READERS_PER_PROCESSOR,
    TWO_PRODUCT_TILES,
    DotPrecision,
    Tile,
    add_product,
    dot_tile,
    kernel_precision,
    on_device,
    padded,
    split_evenly,
    two_dot_tiles,
    workspace,
)

TABLE_BYTES = 512 * 2**20  # of one table of tokens x codes
MIN_TABLE_ROWS = 16


@triton.jit
def logits_tile(
    a_ptr, b_ptr, first_code, a_rows, b_rows, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile [ROWS, COLUMNS] of a . b^T from `first_code` on, or of a table that holds this product, rows of `width`.

    `a_ptr` is that of the tile's first row, `b_ptr` that of the first code of all.
    """
    first = tl.cast(first_code, tl.int64)
    if PRECISION == "table":
        row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        exists = (row < a_rows)[:, None] & (column < b_rows)[None, :]
        place = tl.cast(row, tl.int64)[:, None] * width + first + column[None, :]
        tile = tl.load(a_ptr + place, mask=exists, other=0.0)
    else:
        tile = dot_tile(a_ptr, b_ptr + first * width, a_rows, b_rows, width, ROWS, COLUMNS, INNER, PRECISION)
    return tile


@triton.jit
def two_logits_tiles(
    first_ptr, second_ptr, b_ptr, first_code, a_rows, b_rows, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Two of them, for the same codes."""
    if PRECISION == "table":
        one = logits_tile(first_ptr, b_ptr, first_code, a_rows, b_rows, width, ROWS, COLUMNS, INNER, PRECISION)
        other = logits_tile(second_ptr, b_ptr, first_code, a_rows, b_rows, width, ROWS, COLUMNS, INNER, PRECISION)
    else:
        b_ptr += tl.cast(first_code, tl.int64) * width
        one, other = two_dot_tiles(first_ptr, second_ptr, b_ptr, a_rows, b_rows, width, ROWS, COLUMNS, INNER, PRECISION)
    return one, other


@triton.jit
def statistics_kernel(
    tokens_ptr, codebook_ptr, codes_ptr, top_ptr, selection_ptr, entropy_ptr, weighted_ptr,
    num_tokens, num_codes, width, split_length, inverse_selection_temperature, inverse_temperature,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Statistics [splits, N] of each token's logits over one slice of the codes. Grid: token tiles, splits.

    An online softmax: sums are kept relative to the largest logit so far, and rescaled when a larger one comes. With
    x = (l - top) / temperature, `entropy` is sum exp(x) and `weighted` sum x exp(x), which give the entropy
    log(entropy) - weighted / entropy.
    """
    first_token = tl.cast(tl.program_id(0), tl.int64) * ROWS
    split = tl.program_id(1)
    begin = split * split_length
    end = tl.minimum(begin + split_length, num_codes)
    column = tl.arange(0, COLUMNS)
    top = tl.full([ROWS], -float("inf"), dtype=tl.float32)
    codes = tl.zeros([ROWS], dtype=tl.int32) + begin  # stays a valid code even if every logit is NaN
    selection = tl.zeros([ROWS], dtype=tl.float32)
    entropy = tl.zeros([ROWS], dtype=tl.float32)
    weighted = tl.zeros([ROWS], dtype=tl.float32)
    for first_code in range(begin, end, COLUMNS):
        codes_left = end - first_code
        logits = logits_tile(
            tokens_ptr + first_token * width, codebook_ptr, first_code,
            num_tokens - first_token, codes_left, width, ROWS, COLUMNS, INNER, PRECISION,
        )  # fmt: skip
        inside = (column < codes_left)[None, :]
        logits = tl.where(inside, logits, -float("inf"))
        tile_top = tl.max(logits, axis=1)
        tile_code = tl.min(tl.where(logits == tile_top[:, None], column[None, :], COLUMNS), axis=1)
        codes = tl.where(tile_top > top, first_code + tile_code, codes)  # strictly larger: an earlier tile wins a tie
        new_top = tl.maximum(top, tile_top)
        fall = top - new_top  # -inf in the first tile, where the sums are zero
        below = logits - new_top[:, None]
        selection = selection * tl.exp(fall * inverse_selection_temperature)
        selection += tl.sum(tl.exp(below * inverse_selection_temperature), axis=1)
        shift = tl.where(top == -float("inf"), 0.0, fall * inverse_temperature)  # 0 x -inf is NaN
        scale = tl.exp(shift)
        x = below * inverse_temperature
        exponential = tl.exp(x)
        weighted = scale * (weighted + shift * entropy) + tl.sum(tl.where(inside, x, 0.0) * exponential, axis=1)
        entropy = scale * entropy + tl.sum(exponential, axis=1)
        top = new_top
    token = first_token + tl.arange(0, ROWS)
    out = tl.cast(split, tl.int64) * num_tokens + token
    tl.store(codes_ptr + out, codes, mask=token < num_tokens)
    tl.store(top_ptr + out, top, mask=token < num_tokens)
    tl.store(selection_ptr + out, selection, mask=token < num_tokens)
    tl.store(entropy_ptr + out, entropy, mask=token < num_tokens)
    tl.store(weighted_ptr + out, weighted, mask=token < num_tokens)


@triton.jit
def usage_kernel(
    tokens_ptr, codebook_ptr, top_ptr, log_sum_ptr, usage_ptr,
    num_tokens, num_codes, width, split_length, inverse_temperature,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums [splits, K] of P over one slice of the tokens. Grid: code tiles, splits."""
    first_code = tl.cast(tl.program_id(0), tl.int64) * COLUMNS
    split = tl.program_id(1)
    begin = split * split_length
    end = tl.minimum(begin + split_length, num_tokens)
    usage = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for first_token in range(begin, end, ROWS):
        row = tl.arange(0, ROWS)
        inside = row < end - first_token
        logits = logits_tile(
            tokens_ptr + tl.cast(first_token, tl.int64) * width, codebook_ptr, first_code,
            end - first_token, num_codes - first_code, width, ROWS, COLUMNS, INNER, PRECISION,
        )  # fmt: skip
        top = tl.load(top_ptr + first_token + row, mask=inside, other=0.0)
        log_sum = tl.load(log_sum_ptr + first_token + row, mask=inside, other=float("inf"))  # exp(-inf): no weight
        usage += tl.exp((logits - top[:, None]) * inverse_temperature - log_sum[:, None])
    code = first_code + tl.arange(0, COLUMNS)
    tl.store(usage_ptr + tl.cast(split, tl.int64) * num_codes + code, tl.sum(usage, axis=0), mask=code < num_codes)


@triton.jit
def centres_kernel(
    tokens_ptr, codebook_ptr, grad_latents_ptr, top_ptr, selection_ptr, entropy_ptr, grad_usage_ptr,
    latents_centre_ptr, usage_centre_ptr,
    num_tokens, num_codes, width, split_length, inverse_selection_temperature, inverse_temperature,
    HAS_LATENTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sum_k p G and sum_k P grad_usage [splits, N] over one slice of the codes: what the softmax gradients subtract.

    Grid: token tiles, splits.
    """
    first_token = tl.cast(tl.program_id(0), tl.int64) * ROWS
    split = tl.program_id(1)
    begin = split * split_length
    end = tl.minimum(begin + split_length, num_codes)
    token = first_token + tl.arange(0, ROWS)
    inside = token < num_tokens
    column = tl.arange(0, COLUMNS)
    top = tl.load(top_ptr + token, mask=inside, other=0.0)
    log_selection = tl.load(selection_ptr + token, mask=inside, other=0.0)
    log_entropy = tl.load(entropy_ptr + token, mask=inside, other=0.0)
    latents_centre = tl.zeros([ROWS], dtype=tl.float32)
    usage_centre = tl.zeros([ROWS], dtype=tl.float32)
    for first_code in range(begin, end, COLUMNS):
        codes_left = end - first_code
        tile_tokens = tokens_ptr + first_token * width
        if HAS_LATENTS:
            logits, pull = two_logits_tiles(
                tile_tokens, grad_latents_ptr + first_token * width, codebook_ptr, first_code,
                num_tokens - first_token, codes_left, width, ROWS, COLUMNS, INNER, PRECISION,
            )  # fmt: skip
            below = logits - top[:, None]
            selection = tl.exp(below * inverse_selection_temperature - log_selection[:, None])
            selection = tl.where((column < codes_left)[None, :], selection, 0.0)  # a missing code's logit is 0
            latents_centre += tl.sum(selection * pull, axis=1)
        else:
            logits = logits_tile(
                tile_tokens, codebook_ptr, first_code,
                num_tokens - first_token, codes_left, width, ROWS, COLUMNS, INNER, PRECISION,
            )  # fmt: skip
            below = logits - top[:, None]
        soft = tl.exp(below * inverse_temperature - log_entropy[:, None])
        soft = tl.where((column < codes_left)[None, :], soft, 0.0)
        grad_usage = tl.load(grad_usage_ptr + first_code + column, mask=column < codes_left, other=0.0)
        usage_centre += tl.sum(soft * grad_usage[None, :], axis=1)
    out = tl.cast(split, tl.int64) * num_tokens + token
    if HAS_LATENTS:
        tl.store(latents_centre_ptr + out, latents_centre, mask=inside)
    tl.store(usage_centre_ptr + out, usage_centre, mask=inside)


@triton.jit
def logit_gradients_kernel(
    tokens_ptr, codebook_ptr, grad_latents_ptr, top_ptr, selection_ptr, entropy_ptr, sample_entropy_ptr,
    latents_centre_ptr, usage_centre_ptr, grad_entropy_ptr, grad_usage_ptr, out_ptr,
    num_tokens, num_codes, width, out_stride, inverse_selection_temperature, inverse_temperature,
    HAS_LATENTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the logits of one chunk of tokens and codes [N, K]; whole tiles of a workspace, with zeros outside.

    Grid: token tiles, code tiles.
    """
    first_token = tl.program_id(0) * ROWS
    first_code = tl.program_id(1) * COLUMNS
    token = first_token + tl.arange(0, ROWS)
    code = first_code + tl.arange(0, COLUMNS)
    inside = token < num_tokens
    tile_tokens = tokens_ptr + tl.cast(first_token, tl.int64) * width
    top = tl.load(top_ptr + token, mask=inside, other=0.0)
    if HAS_LATENTS:
        logits, pull = two_logits_tiles(
            tile_tokens, grad_latents_ptr + tl.cast(first_token, tl.int64) * width, codebook_ptr, first_code,
            num_tokens - first_token, num_codes - first_code, width, ROWS, COLUMNS, INNER, PRECISION,
        )  # fmt: skip
        below = logits - top[:, None]
        log_selection = tl.load(selection_ptr + token, mask=inside, other=0.0)
        centre = tl.load(latents_centre_ptr + token, mask=inside, other=0.0)
        selection = tl.exp(below * inverse_selection_temperature - log_selection[:, None])
        gradient = selection * (pull - centre[:, None]) * inverse_selection_temperature
    else:
        logits = logits_tile(
            tile_tokens, codebook_ptr, first_code,
            num_tokens - first_token, num_codes - first_code, width, ROWS, COLUMNS, INNER, PRECISION,
        )  # fmt: skip
        below = logits - top[:, None]
        gradient = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    log_soft = below * inverse_temperature - tl.load(entropy_ptr + token, mask=inside, other=0.0)[:, None]
    sample_entropy = tl.load(sample_entropy_ptr + token, mask=inside, other=0.0)
    grad_entropy = tl.load(grad_entropy_ptr + token, mask=inside, other=0.0)
    grad_usage = tl.load(grad_usage_ptr + code, mask=code < num_codes, other=0.0)
    usage_centre = tl.load(usage_centre_ptr + token, mask=inside, other=0.0)
    slope = grad_usage[None, :] - usage_centre[:, None] - grad_entropy[:, None] * (log_soft + sample_entropy[:, None])
    gradient += tl.exp(log_soft) * slope * inverse_temperature
    exists = inside[:, None] & (code < num_codes)[None, :]
    place = out_ptr + token[:, None] * out_stride + code[None, :]
    if PRECISION == "table":  # which it may take the place of
        tl.store(place, gradient, mask=exists)
    else:
        tl.store(place, tl.where(exists, gradient, 0.0).to(out_ptr.dtype.element_ty))


@torch.no_grad()
def forward(
    tokens: Tensor, codebook: Tensor, *, temperature: float, selection_temperature: float, dot_precision: DotPrecision
) -> ForwardStatistics:
    """Statistics of the softmax of tokens [N, D] over a codebook [K, D], both float32 and contiguous.

    `dot_precision` is that of the logits: "ieee", "tf32x3" or "tf32", "bfloat16" for operands rounded to bfloat16
    (products are always added up in float32), or "torch" for tables of float32 products that PyTorch makes.
    """
    settings = codebook, temperature, selection_temperature, dot_precision
    with on_device(tokens):
        if dot_precision != "torch":
            operands = _operands(dot_precision, tokens, codebook)
            merged, usage = _forward(*operands, *settings)
            return merged._replace(usage=usage / len(tokens))
        found, usage = [], 0.0
        for strip, (logits,) in _tables(tokens, codebook, 1):
            merged, own = _forward(torch.mm(tokens[strip], codebook.t(), out=logits), logits, *settings)
            found.append(merged)
            usage = usage + own
        parts = [torch.cat(parts) for parts in zip(*found, strict=True)]
        return ForwardStatistics(*parts)._replace(usage=usage / len(tokens))


def _forward(
    a: Tensor,
    b: Tensor,
    codebook: Tensor,
    temperature: float,
    selection_temperature: float,
    dot_precision: DotPrecision,
) -> tuple[ForwardStatistics, Tensor]:
    """Statistics of tokens, and the sum [K] of P over them; logits are a . b^T, or `a` if it is a table of them."""
    (num_tokens, width), num_codes = a.shape, len(codebook)
    tile, readers = ONE_PRODUCT_TILES[dot_precision], _programs(dot_precision)
    constants = {"PRECISION": kernel_precision(dot_precision), **tile.options()}
    token_tiles, code_tiles = triton.cdiv(num_tokens, tile.rows), triton.cdiv(num_codes, tile.columns)
    splits, split_length = split_evenly(num_codes, tile.columns, token_tiles, a.device, readers)
    codes = torch.empty(splits, num_tokens, dtype=torch.int32, device=a.device)
    partial = torch.empty(4, splits, num_tokens, device=a.device)
    statistics_kernel[(token_tiles, splits)](
        a, b, codes, *partial, num_tokens, num_codes, width, split_length,
        1 / selection_temperature, 1 / temperature, **constants,
    )  # fmt: skip
    merged = _merge(codes, *partial, temperature, selection_temperature)
    splits, split_length = split_evenly(num_tokens, tile.rows, code_tiles, a.device, readers)
    sums = torch.empty(splits, num_codes, device=a.device)
    usage_kernel[(code_tiles, splits)](
        a, b, merged.top, merged.log_sum_entropy, sums, num_tokens, num_codes, width, split_length,
        1 / temperature, **constants,
    )  # fmt: skip
    return merged, sums.sum(dim=0)


@torch.no_grad()
def backward(
    tokens: Tensor,
    codebook: Tensor,
    statistics: ForwardStatistics,
    grad_latents: Tensor | None,
    grad_sample_entropy: Tensor | None,
    grad_usage: Tensor | None,
    *,
    for_codebook: bool = True,
    temperature: float,
    selection_temperature: float,
    dot_precision: DotPrecision,
) -> tuple[Tensor, Tensor]:
    """Gradients (tokens [N, D], codebook [K, D]) through the softmax alone, not through the selected rows.

    Without `for_codebook` the second is empty. Takes the gradients of the latents [N, D] (None leaves their term out),
    and of each token's entropy [N] and the usage [K] (None for both leaves theirs out). With
    G = grad_latents . codebook^T, the gradient of the logits is
    p (G - sum_k p G) / selection_temperature
    + P (grad_usage / N - sum_k P grad_usage / N - grad_entropy (log P + entropy)) / temperature.
    Its chunks pass through a buffer (`triton_common.WORKSPACE_BYTES`), or lie in a table (TABLE_BYTES).
    """
    (num_tokens, width), num_codes = tokens.shape, codebook.shape[0]
    tokens, codebook = _operands(dot_precision, tokens, codebook)
    grad_tokens = torch.zeros_like(tokens, dtype=torch.float32)
    grad_codebook = torch.zeros_like(codebook[: num_codes * for_codebook], dtype=torch.float32)
    if grad_latents is not None:
        (grad_latents,) = _operands(dot_precision, grad_latents.contiguous())
    if grad_usage is None or grad_sample_entropy is None:
        grad_usage, grad_sample_entropy = tokens.new_zeros(num_codes), tokens.new_zeros(num_tokens)
    # Gradients of means and sums arrive as one expanded number.
    grad_sample_entropy = grad_sample_entropy.float().contiguous()
    grad_usage = (grad_usage / num_tokens).float().contiguous()
    statistics = statistics._replace(sample_entropy=statistics.sample_entropy.float())
    inverse = 1 / selection_temperature, 1 / temperature
    gradients = grad_latents, grad_sample_entropy, grad_usage
    with on_device(tokens):
        by = _backward_by_tables if dot_precision == "torch" else _backward_by_tiles
        by(tokens, codebook, statistics, *gradients, inverse, dot_precision, grad_tokens, grad_codebook)
    return grad_tokens[:, :width].contiguous(), grad_codebook[:, :width].contiguous()


def _backward_by_tiles(
    tokens, codebook, statistics, grad_latents, grad_sample_entropy, grad_usage, inverse, dot_precision,
    grad_tokens, grad_codebook,
) -> None:  # fmt: skip
    """Add up gradients, the logits' own passing through a workspace; none of the codebook if that is empty."""
    (num_tokens, _), num_codes = tokens.shape, len(codebook)
    centres = _centres(tokens, codebook, statistics, grad_latents, grad_usage, inverse, dot_precision)
    per_token = (*statistics[1:5], *centres, grad_sample_entropy)
    buffer = workspace(num_tokens, num_codes, tokens.dtype, tokens.device)
    for token in range(0, num_tokens, buffer.shape[0]):
        rows = slice(token, token + buffer.shape[0])
        for code in range(0, num_codes, buffer.shape[1]):
            columns = slice(code, code + buffer.shape[1])
            chunk = buffer[: len(tokens[rows]), : len(codebook[columns])]
            _logit_gradients(
                chunk, tokens[rows], codebook[columns], None if grad_latents is None else grad_latents[rows],
                [values[rows] for values in per_token], grad_usage[columns], inverse, dot_precision,
            )  # fmt: skip
            add_product(grad_tokens[rows], chunk, codebook[columns], dot_precision=dot_precision)
            if len(grad_codebook):
                add_product(grad_codebook[columns], chunk, tokens[rows], transposed=True, dot_precision=dot_precision)


def _backward_by_tables(
    tokens, codebook, statistics, grad_latents, grad_sample_entropy, grad_usage, inverse, dot_precision,
    grad_tokens, grad_codebook,
) -> None:  # fmt: skip
    """The same by tables of PyTorch's products, in one of which the logits become their gradients."""
    for strip, (logits, *others) in _tables(tokens, codebook, 1 if grad_latents is None else 2):
        torch.mm(tokens[strip], codebook.t(), out=logits)
        pulls = torch.mm(grad_latents[strip], codebook.t(), out=others[0]) if others else None
        own = ForwardStatistics(*(values[strip] for values in statistics[:5]), usage=statistics.usage)
        centres = _centres(logits, codebook, own, pulls, grad_usage, inverse, dot_precision)
        per_token = [*own[1:5], *centres, grad_sample_entropy[strip]]
        _logit_gradients(logits, logits, codebook, pulls, per_token, grad_usage, inverse, dot_precision)
        torch.mm(logits, codebook, out=grad_tokens[strip])
        if len(grad_codebook):
            grad_codebook.addmm_(logits.t(), tokens[strip])


def _tables(tokens: Tensor, codebook: Tensor, count: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Slices of tokens [n, D], each with so many tables [n, K]; the memory of all slices' tables is the same.

    The forward and the backward pass are cut alike: products of equal shapes give equal logits, to the last bit.
    """
    size = min(len(tokens), max(MIN_TABLE_ROWS, TABLE_BYTES // (4 * len(codebook))))
    buffers = [tokens.new_empty(size, len(codebook)) for _ in range(count)]
    for start in range(0, len(tokens), size):
        strip = slice(start, min(start + size, len(tokens)))
        yield strip, [buffer[: strip.stop - start] for buffer in buffers]


def _programs(dot_precision: DotPrecision) -> int:
    return READERS_PER_PROCESSOR if dot_precision == "torch" else PROGRAMS_PER_PROCESSOR


def _operands(dot_precision: DotPrecision, *matrices: Tensor) -> list[Tensor]:
    """The matrices as the kernels multiply them: padded, and for bfloat16 rounded once rather than in every tile."""
    assert all(matrix.dtype == torch.float32 and matrix.is_contiguous() for matrix in matrices)
    if dot_precision == "torch":
        return list(matrices)
    return [padded(matrix.bfloat16() if dot_precision == "bfloat16" else matrix) for matrix in matrices]


def _backward_tile(grad_latents: Tensor | None, dot_precision: DotPrecision) -> Tile:
    return (ONE_PRODUCT_TILES if grad_latents is None else TWO_PRODUCT_TILES)[dot_precision]


def _merge(
    codes: Tensor, top: Tensor, selection: Tensor, entropy: Tensor, weighted: Tensor,
    temperature: float, selection_temperature: float,
) -> ForwardStatistics:  # fmt: skip
    """Statistics [N] from those of slices of the codes [splits, N], without the usage."""
    total_top = top.amax(dim=0)
    below = top - total_top
    x = below / temperature
    scale = x.exp()
    total = (scale * entropy).sum(dim=0)
    log_total = total.log()
    return ForwardStatistics(
        # Slices are in ascending order of codes. With NaN no slice has the top; the code must stay a valid index.
        codes=codes.where(below == 0, codes[-1]).amin(dim=0).long(),
        top=total_top,
        log_sum_selection=((below / selection_temperature).exp() * selection).sum(dim=0).log(),
        log_sum_entropy=log_total,
        sample_entropy=log_total - (scale * (weighted + x * entropy)).sum(dim=0) / total,
        usage=top.new_empty(0),
    )


def _centres(
    tokens: Tensor, codebook: Tensor, statistics: ForwardStatistics, grad_latents: Tensor | None, grad_usage: Tensor,
    inverse: tuple[float, float], dot_precision: DotPrecision,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(sum_k p G [N], sum_k P grad_usage [N])."""
    (num_tokens, width), num_codes = tokens.shape, codebook.shape[0]
    tile = _backward_tile(grad_latents, dot_precision)
    token_tiles = triton.cdiv(num_tokens, tile.rows)
    readers = _programs(dot_precision)
    splits, split_length = split_evenly(num_codes, tile.columns, token_tiles, tokens.device, readers)
    partial = torch.zeros(2, splits, num_tokens, device=tokens.device)
    centres_kernel[(token_tiles, splits)](
        tokens, codebook, tokens if grad_latents is None else grad_latents,
        statistics.top, statistics.log_sum_selection, statistics.log_sum_entropy, grad_usage, *partial,
        num_tokens, num_codes, width, split_length, *inverse,
        HAS_LATENTS=grad_latents is not None, PRECISION=kernel_precision(dot_precision), **tile.options(),
    )  # fmt: skip
    latents_centre, usage_centre = partial.sum(dim=1)
    return latents_centre, usage_centre


def _logit_gradients(
    out: Tensor, tokens: Tensor, codebook: Tensor, grad_latents: Tensor | None, per_token: list[Tensor],
    grad_usage: Tensor, inverse: tuple[float, float], dot_precision: DotPrecision,
) -> None:  # fmt: skip
    """Write the logits' gradient of one chunk of tokens and codes into out [N, K]."""
    (num_tokens, width), num_codes = tokens.shape, codebook.shape[0]
    tile = _backward_tile(grad_latents, dot_precision)
    logit_gradients_kernel[(triton.cdiv(num_tokens, tile.rows), triton.cdiv(num_codes, tile.columns))](
        tokens, codebook, tokens if grad_latents is None else grad_latents, *per_token, grad_usage, out,
        num_tokens, num_codes, width, out.stride(0), *inverse,
        HAS_LATENTS=grad_latents is not None, PRECISION=kernel_precision(dot_precision), **tile.options(),
    )  # fmt: skip
