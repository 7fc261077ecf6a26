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
        _logits(codebook, tokens[strip], logits, scratch)
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
    pulls, selection, entropies = None, None, None
    for strip, logits, scratch in _strips(tokens, codebook):
        if grad_latents is not None:
            pulls = torch.empty_like(logits) if pulls is None else _shortened(pulls, logits.shape[1])
            selection = _SelectionGradient(grad_latents[strip], selection_temperature)
        if grad_usage is not None:
            own = (statistics.sample_entropy[strip], statistics.log_sum_entropy[strip], grad_sample_entropy[strip])
            entropies = _EntropiesGradient(*own, grad_usage / len(tokens), temperature)
        # Two loops over the codes: what the softmaxes' gradients subtract is a sum over all of them.
        for chunk in _chunks(logits, scratch):
            x = torch.mm(codebook[chunk], tokens[strip].t(), out=logits[chunk]).sub_(statistics.top[strip])
            if selection is not None:
                selection.add_up(x, codebook[chunk], pulls[chunk], scratch)
            if entropies is not None:
                entropies.add_up(x, chunk, scratch)
        own_tokens = torch.zeros_like(tokens[strip].t())  # [D, n]
        for chunk in _chunks(logits, scratch):
            gradient = logits[chunk]
            if selection is not None:
                selection.finish(gradient, pulls[chunk], scratch)
            if entropies is not None:
                entropies.finish(gradient, chunk, scratch)
            if selection is not None:
                gradient = pulls[chunk] if entropies is None else gradient.add_(pulls[chunk])
            own_tokens.addmm_(codebook[chunk].t(), gradient)
            if for_codebook:
                grad_codebook[chunk].addmm_(gradient, tokens[strip])
        grad_tokens[strip] = own_tokens.t()
    return grad_tokens, grad_codebook


def _operands(dot_precision: str, *matrices: Tensor) -> list[Tensor]:
    """The matrices as they are multiplied."""
    if dot_precision == "bfloat16":
        return [matrix.bfloat16().to(matrix.dtype) for matrix in matrices]
    return list(matrices)


class _SelectionGradient:
    """Gradient of a strip's logits through p, the softmax at the selection's temperature: p (G - sum_k p G) / tau."""

    def __init__(self, grad_latents: Tensor, temperature: float):
        self.grad_latents, self.temperature = grad_latents, temperature
        self.scale = LOG2_E / temperature
        self.total, self.weighted = _zeros(grad_latents[:, 0]), _zeros(grad_latents[:, 0])

    def add_up(self, x: Tensor, codebook: Tensor, pulls: Tensor, scratch: Tensor) -> None:
        """Write G of a chunk of codes into `pulls`; logits x [codes, n] are relative to the largest."""
        torch.mm(codebook, self.grad_latents.t(), out=pulls)
        p = torch.mul(x, self.scale, out=scratch[: len(x)]).exp2_()
        self.total += p.sum(dim=0)
        self.weighted += p.mul_(pulls).sum(dim=0)

    def finish(self, x: Tensor, pulls: Tensor, scratch: Tensor) -> None:
        """Turn G in `pulls` into the gradient, once all chunks are added up."""
        mean = (self.weighted / self.total).to(x.dtype)
        offset = -(self.total.log2() + math.log2(self.temperature)).to(x.dtype)  # log2 of 1 / (tau sum)
        p = torch.add(offset, x, alpha=self.scale, out=scratch[: len(x)]).exp2_()
        pulls.sub_(mean).mul_(p)


class _EntropiesGradient:
    """Gradient of a strip's logits through P, the softmax at the entropies' temperature (see `backward`)."""

    def __init__(self, entropy: Tensor, log_sum: Tensor, grad_entropy: Tensor, weights: Tensor, temperature: float):
        dtype = log_sum.dtype
        self.scale, self.offset = LOG2_E / temperature, -LOG2_E * log_sum
        self.weights = (weights / temperature).to(dtype)[:, None]
        self.slope = (-LN_2 / temperature * grad_entropy).to(dtype)
        self.constant = grad_entropy * entropy / temperature
        self.total, self.weighted = _zeros(log_sum), _zeros(log_sum)

    def add_up(self, x: Tensor, chunk: slice, scratch: Tensor) -> None:
        """Add up a chunk of codes; logits x [codes, n] are relative to the largest."""
        p = torch.mul(x, self.scale, out=scratch[: len(x)]).exp2_()
        self.total += p.sum(dim=0)
        self.weighted += p.mul_(self.weights[chunk]).sum(dim=0)

    def finish(self, x: Tensor, chunk: slice, scratch: Tensor) -> None:
        """Turn the logits x into the gradient, once all chunks are added up."""
        mean = self.weighted / self.total  # exactly the weight of the best code where P is one-hot: it must vanish
        constant = -(self.constant + mean).to(x.dtype)
        log2_p = torch.add(self.offset, x, alpha=self.scale, out=scratch[: len(x)])
        torch.mul(log2_p, self.slope, out=x).add_(constant).add_(self.weights[chunk]).mul_(log2_p.exp2_())


def best_codes(tokens: Tensor, codebook: Tensor, bias: Tensor | None, *, dot_precision: str) -> Tensor:
    """The code [N] with the largest product plus bias [K] for each token; the lowest of equal ones."""
    tokens, codebook = _operands(dot_precision, tokens, codebook)
    found = []
    for strip, logits, scratch in _strips(tokens, codebook):
        _logits(codebook, tokens[strip], logits, scratch)
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


def _logits(codebook: Tensor, tokens: Tensor, out: Tensor, scratch: Tensor) -> None:
    """codebook [K, D] . tokens [n, D] -> out [K, n], by chunks of codes: on a CPU they stay in its cache."""
    for chunk in _chunks(out, scratch):
        torch.mm(codebook[chunk], tokens.t(), out=out[chunk])


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
