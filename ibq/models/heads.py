"""Heads of the transformer for vocabularies that are too large for one softmax, and the embeddings that go with them.

`plain` has a logit for every code (`Head` of `transformer_blocks.py`). The others take a code for a number of several
digits, of which the first is the least significant, as in the codes of LFQ and BSQ (`ibq/quantizers/lookup_free.py`):

- `factorised` (Open-MAGVIT2, arXiv 2409.04410): a code is a few sub-codes, by default 2^6 and 2^12 of
  2^18. An inner transformer over the sub-codes of one code predicts each from the hidden state and the sub-codes
  before it, log p(code) = sum_k log p(sub-code k | sub-codes before it, hidden state).
- `bits` (the infinite-vocabulary classifier of Infinity, arXiv 2412.04431): the bits of a code are independent of each
  other given the hidden state.
- `masked_bits` (masked bit modeling, BAR, arXiv 2602.09024): a small network predicts the masked bits of a code from
  the hidden state and the bits that are known.

A code's input embedding is made of its sub-codes' embeddings (their sum), or of its bits (a linear layer of +-1).
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibq.models.transformer_blocks import Block, FeedForward, Head, RMSNorm, embedding, hidden_width, linear

# --- Settings ---


@dataclass(frozen=True, kw_only=True)
class PlainHeadConfig:
    """One softmax over all codes."""

    kind: Literal["plain"] = "plain"

    def digits(self, vocab_size: int) -> tuple[int, ...]:
        """How many values each part has that a code is drawn as."""
        return (vocab_size,)


@dataclass(frozen=True, kw_only=True)
class FactorisedHeadConfig:
    """Sub-codes one after the other, by an inner transformer (Open-MAGVIT2)."""

    kind: Literal["factorised"] = "factorised"
    # Sizes, whose product is vocab_size; the first is code % size. Null: two, of a third and two thirds of the bits.
    sub_codes: tuple[int, ...] | None = None
    layers: int = 2  # blocks of the inner transformer, with plain norms; Open-MAGVIT2 has 2 (B), 3 (L), 4 (XL)

    def __post_init__(self):
        if self.layers < 1:
            raise ValueError(f"layers: {self.layers} is not positive; use at least 1")
        if self.sub_codes is not None and (len(self.sub_codes) < 2 or min(self.sub_codes) < 2):
            raise ValueError(f"sub_codes: {list(self.sub_codes)}; use two sizes or more, each of at least 2")

    def digits(self, vocab_size: int) -> tuple[int, ...]:
        """The sizes of the sub-codes. Errors: ValueError for sizes that do not make the vocabulary."""
        sizes = self.sub_codes
        if sizes is None:
            bits = bits_of(vocab_size, "give head.sub_codes, sizes whose product it is")
            sizes = (2 ** max(1, bits // 3), 2 ** (bits - max(1, bits // 3)))
        product = 1
        for size in sizes:
            product *= size
        if product != vocab_size:
            text = " x ".join(map(str, sizes))
            raise ValueError(f"head.sub_codes: {text} are {product} codes, and vocab_size is {vocab_size}")
        return sizes


@dataclass(frozen=True, kw_only=True)
class BitsHeadConfig:
    """A binary classifier for each bit of a code (Infinity)."""

    kind: Literal["bits"] = "bits"

    def digits(self, vocab_size: int) -> tuple[int, ...]:
        """Two for every bit. Errors: ValueError for a vocabulary that is no power of two."""
        return (2,) * bits_of(vocab_size, "use head.kind=plain or factorised")


@dataclass(frozen=True, kw_only=True)
class MaskedBitsHeadConfig:
    """A network that fills in masked bits, in a few steps (BAR)."""

    kind: Literal["masked_bits"] = "masked_bits"
    layers: int = 3
    width: int | None = None  # channels of the network; null: those of the transformer
    steps: int = 4  # in which the bits of a code are drawn, and its likelihood is measured

    def __post_init__(self):
        for name in ("layers", "width", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value} is not positive; use at least 1")

    def digits(self, vocab_size: int) -> tuple[int, ...]:
        """Two for every bit. Errors: ValueError for no power of two, or more steps than bits."""
        bits = bits_of(vocab_size, "use head.kind=plain or factorised")
        if self.steps > bits:
            raise ValueError(f"head.steps: {self.steps} are more than the {bits} bits of a code; use at most {bits}")
        return (2,) * bits

    def groups(self, bits: int) -> list[slice]:
        """The bits that each step draws, from the first on: equal shares, or nearly."""
        ends = [bits * step // self.steps for step in range(self.steps + 1)]
        return [slice(first, end) for first, end in itertools.pairwise(ends)]


HeadConfig = PlainHeadConfig | FactorisedHeadConfig | BitsHeadConfig | MaskedBitsHeadConfig


def bits_of(vocab_size: int, remedy: str) -> int:
    """Bits of a code; ValueError where the vocabulary is no power of two, or has less than two bits."""
    bits = vocab_size.bit_length() - 1
    if vocab_size != 2**bits or bits < 2:
        raise ValueError(f"head: the {vocab_size} codes of vocab_size are no power of two above 2; {remedy}")
    return bits


# --- Digits ---


def split(codes: Tensor, sizes: Sequence[int]) -> Tensor:
    """Digits [..., K] of codes [...]: code = k_0 + size_0 (k_1 + size_1 (k_2 + ...))."""
    digits = []
    for size in sizes:
        digits.append(codes % size)
        codes = codes // size
    return torch.stack(digits, dim=-1)


def join(digits: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """The codes [...] that have these digits, each [...]."""
    codes = torch.zeros_like(digits[0])
    for digit, size in zip(reversed(digits), reversed(sizes), strict=True):
        codes = codes * size + digit
    return codes


def bits_in(codes: Tensor, bits: int) -> Tensor:
    """Bits [..., D] of codes [...], the least significant first."""
    return codes[..., None] >> torch.arange(bits, device=codes.device) & 1


class Chooser(Protocol):
    """How values are drawn; rows R of a head may be twice those drawn: with class, then without."""

    def code(self, logits: Tensor, number: int) -> Tensor:
        """Values [rows] by logits [R, V], as draw `number` of a code, from 0 on."""

    def bits(self, log_odds: Tensor, first: int) -> Tensor:
        """Bits [rows, m] by their log odds [R, m], as the draws of a code from `first` on."""


# --- Embeddings ---


class SubCodeEmbedding(nn.Module):
    """The sum of the embeddings of a code's sub-codes."""

    def __init__(self, sizes: Sequence[int], width: int):
        super().__init__()
        self.sizes = tuple(sizes)
        self.tables = nn.ModuleList(embedding(size, width) for size in sizes)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes [...] -> [..., C]."""
        digits = split(codes, self.sizes).unbind(-1)
        return sum(table(digit) for table, digit in zip(self.tables, digits, strict=True))


class BitEmbedding(nn.Module):
    """A linear layer of a code's bits, as -1 and +1."""

    def __init__(self, bits: int, width: int):
        super().__init__()
        self.bits = bits
        self.linear = linear(bits, width, bias=True)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes [...] -> [..., C]."""
        return self.linear(2 * bits_in(codes, self.bits).to(self.linear.weight.dtype) - 1)


def embedding_of(head: HeadConfig, digits: Sequence[int], width: int) -> SubCodeEmbedding | BitEmbedding:
    """The embedding of codes that goes with a head that is not plain."""
    return SubCodeEmbedding(digits, width) if head.kind == "factorised" else BitEmbedding(len(digits), width)


# --- Sub-codes ---


class InnerTransformer(nn.Module):
    """The transformer over the sub-codes of one code; its first input is the hidden state, the others are embeddings.

    As in Open-MAGVIT2's code, the first position has a rotation of zero, as the class has in the outer transformer.
    """

    def __init__(self, blocks: Sequence[Block]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, codes: Tensor, tok_emb: SubCodeEmbedding, rope: Tensor) -> Tensor:
        """Before the final norm, [B, T, K, C]: of x [B, T, C] and the codes [B, T] that they predict.

        rope: `rotary_table` of a row of codes, K of its rows.
        """
        digits = split(codes, tok_emb.sizes).unbind(-1)[:-1]
        before = [table(digit) for table, digit in zip(tok_emb.tables, digits, strict=False)]
        inner = torch.stack([x, *before], dim=2).flatten(0, 1)  # [B T, K, C]
        for block in self.blocks:
            inner = block(inner, inner[:1, 0], rope)  # their norms are plain: the condition only says the type
        return inner.unflatten(0, codes.shape)

    def draw(
        self, x: Tensor, head: "SubCodeHead", norm: Callable[[Tensor], Tensor], tok_emb: SubCodeEmbedding, rope: Tensor,
        chooser: Chooser,
    ) -> Tensor:  # fmt: skip
        """Codes [rows] from the stream x [R, C] after the last outer block."""
        drawn, caches = [], [block.attention.new_cache(len(x), len(tok_emb.sizes), x) for block in self.blocks]
        for number, part in enumerate(head.parts):
            for block, (keys, values) in zip(self.blocks, caches, strict=True):
                x = block.decode(x, rope, keys, values, number)
            drawn.append(chooser.code(part(norm(x)), number))
            if number + 1 < len(head.parts):
                again = len(x) // len(drawn[-1])
                x = tok_emb.tables[number](drawn[-1]).repeat(again, 1)
        return join(drawn, tok_emb.sizes)


class SubCodeHead(nn.Module):
    """A plain head for each sub-code."""

    def __init__(self, sizes: Sequence[int], width: int):
        super().__init__()
        self.sizes = tuple(sizes)
        self.parts = nn.ModuleList(Head(width, size) for size in sizes)

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Negative log likelihoods [N] of codes [N] by hidden states [N, K, C]: the sum of their sub-codes'."""
        digits = split(targets, self.sizes).unbind(-1)
        parts = zip(self.parts, hidden.unbind(1), digits, strict=True)
        return sum(part(states, digit) for part, states, digit in parts)


# --- Bits ---


def bits_nll(log_odds: Tensor, bits: Tensor) -> Tensor:
    """-log sigmoid(+-log odds), float32 or float64, of bits [..., m] by their log odds [..., m]."""
    high = log_odds if log_odds.dtype == torch.float64 else log_odds.float()
    return F.softplus((1 - 2 * bits) * high)


class BitsHead(nn.Module):
    """Every bit by itself; the likelihood is exact: sum_d log p(bit d | hidden state)."""

    def __init__(self, bits: int, width: int):
        super().__init__()
        self.bits = bits
        self.linear = linear(width, bits, bias=True)

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Negative log likelihoods [N] of codes [N] by hidden states [N, C]."""
        return bits_nll(self.linear(hidden), bits_in(targets, self.bits)).sum(-1)

    def draw(self, hidden: Tensor, chooser: Chooser) -> Tensor:
        """Codes [rows] by hidden states [R, C]."""
        return join(chooser.bits(self.linear(hidden), 0).unbind(-1), (2,) * self.bits)


class MaskedBitsLayer(nn.Module):
    """x + gate * SwiGLU(RMSNorm(x) * (1 + scale) + shift), where the hidden state gives gate, scale and shift."""

    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.norm = RMSNorm(width)
        self.modulation = nn.Sequential(nn.SiLU(), linear(hidden, 3 * width, bias=True))
        self.feed_forward = FeedForward(width, hidden_width(width), 0.0)

    def forward(self, x: Tensor, modulation: Sequence[Tensor]) -> Tensor:
        """x [N, W] -> [N, W]."""
        gate, scale, shift = modulation
        return torch.addcmul(x, gate, self.feed_forward(self.norm(x, scale, shift)))


class MaskedBitsHead(nn.Module):
    """Bits that are masked, from the hidden state and the bits that are known, by layers without attention.

    In training a number of masked bits is drawn for every token, uniformly of 1 to D, and then which; the result is D
    times the mean negative log likelihood of the masked ones. Its expectation is the negative log likelihood when bits
    are filled in one by one in a random order, averaged over the orders: by Jensen's inequality no less than that of
    their mixture (Hoogeboom et al., arXiv 2110.02037, section 3).

    In evaluation, and when drawing, bits are filled in by `groups`, always the same ones in the same order, a group's
    bits independently of each other: log p(code) = sum_s sum_{d in group s} log p(bit d | groups before s, hidden
    state). This is the exact likelihood of what is drawn, and no bound. An order by the network's confidence, which
    masked models often draw in, would have no likelihood that can be computed.
    """

    def __init__(self, config: MaskedBitsHeadConfig, bits: int, hidden: int):
        super().__init__()
        width = config.width or hidden
        self.bits, self.groups = bits, config.groups(bits)
        self.inputs = linear(2 * bits, width, bias=True)  # of each bit its sign, 0 where masked, and whether it is
        self.layers = nn.ModuleList(MaskedBitsLayer(hidden, width) for _ in range(config.layers))
        self.norm = RMSNorm(width)
        self.outputs = linear(width, bits, bias=True)

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Negative log likelihoods [N] of codes [N] by hidden states [N, C]; see the class for what they are."""
        bits, modulations = bits_in(targets, self.bits), self._modulations(hidden)
        if self.training:
            masked = draw_masks(bits)
            nll = bits_nll(self._log_odds(bits, ~masked, modulations), bits) * masked
            return nll.sum(-1) * self.bits / masked.sum(-1)
        return sum(
            bits_nll(self._log_odds(bits, self._before(group), modulations)[:, group], bits[:, group]).sum(-1)
            for group in self.groups
        )

    def draw(self, hidden: Tensor, chooser: Chooser) -> Tensor:
        """Codes [rows] by hidden states [R, C]."""
        modulations = self._modulations(hidden)
        bits = torch.zeros(len(hidden), self.bits, dtype=torch.int64, device=hidden.device)
        for group in self.groups:
            drawn = chooser.bits(self._log_odds(bits, self._before(group), modulations)[:, group], group.start)
            bits[:, group] = drawn.repeat(len(hidden) // len(drawn), 1)
        return join(bits[: len(drawn)].unbind(-1), (2,) * self.bits)

    def _modulations(self, hidden: Tensor) -> list[tuple[Tensor, ...]]:
        """Of each layer gate, scale and shift [N, W]."""
        return [layer.modulation(hidden).chunk(3, dim=-1) for layer in self.layers]

    def _before(self, group: slice) -> Tensor:
        """The bits [1, D] that are known when a group is filled in."""
        return torch.arange(self.bits, device=self.outputs.weight.device)[None] < group.start

    def _log_odds(self, bits: Tensor, known: Tensor, modulations: Sequence[Sequence[Tensor]]) -> Tensor:
        """Log odds [N, D] of all bits from bits [N, D], of which those that are not known are not looked at."""
        known = known.expand_as(bits)
        signs = (2 * bits - 1) * known
        x = self.inputs(torch.cat([signs, known], dim=-1).to(self.inputs.weight.dtype))
        for layer, modulation in zip(self.layers, modulations, strict=True):
            x = layer(x, modulation)
        return self.outputs(self.norm(x))


def head_of(head: HeadConfig, digits: Sequence[int], width: int) -> SubCodeHead | BitsHead | MaskedBitsHead:
    """A head that is not plain."""
    match head:
        case FactorisedHeadConfig():
            return SubCodeHead(digits, width)
        case BitsHeadConfig():
            return BitsHead(len(digits), width)
        case MaskedBitsHeadConfig():
            return MaskedBitsHead(head, len(digits), width)


def draw_masks(bits: Tensor) -> Tensor:
    """Which of the bits [N, D] are masked: of each row a uniform number of 1 to D, a uniform choice of so many.

    Drawn as dropout is, from the generator of the device.
    """
    numbers = torch.rand(len(bits), bits.shape[1] + 1, dtype=torch.float64, device=bits.device)
    places = numbers[:, 1:].argsort(-1).argsort(-1)
    return places <= (numbers[:, :1] * bits.shape[1]).long()
