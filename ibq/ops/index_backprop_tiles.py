"""Index backpropagation in strips of plain PyTorch: the form for CPUs, and the fallback on every device.

A strip of tokens meets the whole codebook at a time, with codes as rows and tokens as columns: matrix products with
few columns are faster that way round, sums over the codes run along contiguous memory, and one buffer serves all
strips. Exponentials are taken to the base 2, which CPUs do several times faster than to the base e, above all where
they underflow. Only differences from a token's largest logit are divided by a temperature: those are exact near the
top, where a logit of 60 over a temperature of 0.01 would lose four digits.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

LOG2_E, LN_2 = math.log2(math.e), math.log(2)
# Per kind of device: bytes of one buffer of codes x tokens, and the elements that elementwise work touches at a time
# (on a CPU they stay in its cache).
STRIP_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}
MIN_STRIP, USUAL_STRIP = 16, 256  # tokens
BLOCK = 256  # codes among which the first best is looked for


class ForwardStatistics(NamedTuple):
    """The softmax of each token over the codes, and of all tokens together."""

    codes: Tensor  # [N] int64, the lowest index among equal logits
    top: Tensor  # [N], largest logit
    log_sum_selection: Tensor | None  # [N], log sum_k exp((l - top) / selection_temperature); only the kernels need it
    log_sum_entropy: Tensor  # [N], log sum_k exp((l - top) / temperature)
    sample_entropy: Tensor  # [N] nats, entropy of P, the softmax at `temperature`
    usage: Tensor  # [K], mean of P over the tokens


def forward(
    tokens: Tensor, codebook: Tensor, *, temperature: float, selection_temperature: float, dot_precision: str
) -> ForwardStatistics:
    """Codes and softmax statistics of tokens [N, D] over a codebook [K, D].

    Of `dot_precision` only "bfloat16" matters here: operands rounded to it, added up in float32. The entropies and the
    usage are float64.
    """
    tokens, codebook = _operands(dot_precision, tokens, codebook)
    usage = tokens.new_zeros(len(codebook), dtype=torch.float64)
    strips = []
    for strip, logits, scratch in _strips(tokens, codebook):
        torch.mm(codebook, tokens[strip].t(), out=logits)
        top, codes = first_best(logits)
        total, weighted = _zeros(top), _zeros(top)
        for chunk in _chunks(logits, scratch):
            x = logits[chunk].sub_(top)
            p = torch.mul(x, LOG2_E / temperature, out=scratch[: len(x)]).exp2_()
            total += p.sum(dim=0)
            weighted += x.mul_(p).sum(dim=0)
            x.copy_(p)
        usage += logits.mv((1 / total).to(logits.dtype))
        strips.append((codes, top, total.log().to(top.dtype), total.log() - weighted / (total * temperature)))
    codes, top, log_sum, entropy = (torch.cat(parts) for parts in zip(*strips, strict=True))
    return ForwardStatistics(codes, top, None, log_sum, entropy, usage / len(tokens))


def backward(
    tokens: Tensor,
    codebook: Tensor,
    statistics: ForwardStatistics,
    grad_latents: Tensor | None,
    grad_sample_entropy: Tensor | None,
    grad_usage: Tensor | None,
    *,
    for_codebook: bool,
    temperature: float,
    selection_temperature: float,
    dot_precision: str,
) -> tuple[Tensor, Tensor]:
    """Gradients [N, D] and [K, D] of what goes through the softmaxes; without the part of the hard one-hot.

    Without `for_codebook` the second is empty. `grad_latents` may be None, and so may the gradients of entropies [N]
    and usage [K], both at once. With p and P the softmaxes at the selection's and the entropies' temperature, tau and
    T, G = grad_latents . codebook^T, and H the sample entropies:

        d logits = p (G - sum_k p G) / tau + P (-grad_H (log P + H) + grad_usage / N - sum_k P grad_usage / N) / T
    """
    tokens, codebook = _operands(dot_precision, tokens, codebook)
    if grad_latents is not None:
        (grad_latents,) = _operands(dot_precision, grad_latents)
    grad_tokens, grad_codebook = torch.empty_like(tokens), torch.zeros_like(codebook[: len(codebook) * for_codebook])
    buffer = None
    for strip, logits, scratch in _strips(tokens, codebook):
        torch.mm(codebook, tokens[strip].t(), out=logits)
        logits.sub_(statistics.top[strip])
        gradient = logits
        if grad_latents is not None:
            buffer = torch.empty_like(logits) if buffer is None else _shortened(buffer, logits.shape[1])
            gradient = torch.mm(codebook, grad_latents[strip].t(), out=buffer)
            _through_selection(gradient, logits, scratch, selection_temperature)
        if grad_usage is not None:
            own = (statistics.sample_entropy[strip], statistics.log_sum_entropy[strip], grad_sample_entropy[strip])
            _through_entropies(logits, scratch, *own, grad_usage / len(tokens), temperature)
            if gradient is not logits:
                gradient.add_(logits)
        torch.mm(gradient.t(), codebook, out=grad_tokens[strip])
        if for_codebook:
            grad_codebook.addmm_(gradient, tokens[strip])
    return grad_tokens, grad_codebook


def _operands(dot_precision: str, *matrices: Tensor) -> list[Tensor]:
    """The matrices as they are multiplied."""
    if dot_precision == "bfloat16":
        return [matrix.bfloat16().to(matrix.dtype) for matrix in matrices]
    return list(matrices)


def _through_selection(gradient: Tensor, logits: Tensor, scratch: Tensor, temperature: float) -> None:
    """Turn G in `gradient` [K, n] into p (G - sum_k p G) / tau; logits [K, n] are relative to the largest."""
    scale = LOG2_E / temperature
    total, weighted = _zeros(logits[0]), _zeros(logits[0])
    for chunk in _chunks(logits, scratch):
        x = logits[chunk]
        p = torch.mul(x, scale, out=scratch[: len(x)]).exp2_()
        total += p.sum(dim=0)
        weighted += p.mul_(gradient[chunk]).sum(dim=0)
    mean = (weighted / total).to(logits.dtype)
    offset = -(total.log2() + math.log2(temperature)).to(logits.dtype)  # log2 of 1 / (tau sum)
    for chunk in _chunks(logits, scratch):
        x = logits[chunk]
        p = torch.add(offset, x, alpha=scale, out=scratch[: len(x)]).exp2_()
        gradient[chunk].sub_(mean).mul_(p)


def _through_entropies(
    logits: Tensor,
    scratch: Tensor,
    entropy: Tensor,
    log_sum: Tensor,
    grad_entropy: Tensor,
    weights: Tensor,
    temperature: float,
) -> None:
    """Turn logits [K, n], relative to the largest, into their gradient through P (see `backward`)."""
    scale, offset, weights = LOG2_E / temperature, -LOG2_E * log_sum, (weights / temperature).to(logits.dtype)[:, None]
    total, weighted = _zeros(log_sum), _zeros(log_sum)
    for chunk in _chunks(logits, scratch):
        x = logits[chunk]
        p = torch.mul(x, scale, out=scratch[: len(x)]).exp2_()
        total += p.sum(dim=0)
        weighted += p.mul_(weights[chunk]).sum(dim=0)
    mean = weighted / total  # exactly the weight of the best code where P is one-hot: the difference must vanish
    slope = (-LN_2 / temperature * grad_entropy).to(logits.dtype)
    constant = -(grad_entropy * entropy / temperature + mean).to(logits.dtype)
    for chunk in _chunks(logits, scratch):
        x = logits[chunk]
        log2_p = torch.add(offset, x, alpha=scale, out=scratch[: len(x)])
        torch.mul(log2_p, slope, out=x).add_(constant).add_(weights[chunk]).mul_(log2_p.exp2_())


def best_codes(tokens: Tensor, codebook: Tensor, bias: Tensor | None, *, dot_precision: str) -> Tensor:
    """The code [N] with the largest product plus bias [K] for each token; the lowest of equal ones."""
    tokens, codebook = _operands(dot_precision, tokens, codebook)
    found = []
    for strip, logits, _ in _strips(tokens, codebook):
        torch.mm(codebook, tokens[strip].t(), out=logits)
        if bias is not None:
            logits += bias[:, None]
        found.append(first_best(logits)[1])
    return torch.cat(found)


def first_best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of logits [K, n] in each column and its row, the first of equal ones.

    Block maxima first: they take a tenth of the time of a search that keeps track of the place.
    """
    num_codes, columns = logits.shape
    whole = num_codes // BLOCK * BLOCK
    tops = logits[:whole].view(-1, BLOCK, columns).amax(dim=1)  # [blocks, n]
    if whole < num_codes:
        tops = torch.cat([tops, logits[whole:].amax(dim=0, keepdim=True)])
    top, block = tops.max(dim=0)
    rows = block[:, None] * BLOCK + torch.arange(BLOCK, device=logits.device)  # [n, BLOCK]
    # Beyond the last row it is looked at again, which comes too late to be first.
    values = logits[rows.clamp_(max=num_codes - 1), torch.arange(columns, device=logits.device)[:, None]]
    return top, rows.gather(1, values.argmax(dim=1, keepdim=True)).squeeze(1)


def _strips(tokens: Tensor, codebook: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Slices of tokens, each with a buffer [K, n] for its logits and a scratch tile for a chunk of them.

    The forward and the backward pass are cut alike: products of equal shapes give equal logits, to the last bit.
    """
    count, num_codes = len(tokens), len(codebook)
    kind = "cuda" if tokens.is_cuda else "cpu"
    fitting = STRIP_BYTES[kind] // (num_codes * tokens.element_size())
    usual = max(USUAL_STRIP, CHUNK_ELEMENTS[kind] // num_codes)
    size = min(count, max(MIN_STRIP, min(usual, fitting)))
    logits = tokens.new_empty(num_codes, size)
    scratch = tokens.new_empty(min(num_codes, max(1, CHUNK_ELEMENTS[kind] // size)), size)
    for start in range(0, count, size):
        strip = slice(start, min(start + size, count))
        if strip.stop - start < size:  # the last one: the same memory, with shorter rows
            logits, scratch = (_shortened(buffer, strip.stop - start) for buffer in (logits, scratch))
        yield strip, logits, scratch


def _shortened(buffer: Tensor, columns: int) -> Tensor:
    return buffer.flatten()[: len(buffer) * columns].view(len(buffer), columns)


def _chunks(logits: Tensor, scratch: Tensor) -> Iterator[slice]:
    """Slices of the codes, as long as the scratch tile."""
    for start in range(0, len(logits), len(scratch)):
        yield slice(start, min(start + len(scratch), len(logits)))


def _zeros(like: Tensor) -> Tensor:
    """Sums over chunks are kept in float64: they cost nothing and lose nothing."""
    return torch.zeros_like(like, dtype=torch.float64)
