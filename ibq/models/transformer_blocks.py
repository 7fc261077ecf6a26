"""Layers of the autoregressive transformer: rotary embedding, adaptive norms, attention, feed-forward."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ibq.ops.dropout import dropout
from ibq.ops.linear_cross_entropy import linear_cross_entropy

NORM_EPS = 1e-5
FFN_MULTIPLE = 256
# What "selective" recomputation keeps: the results that are dear to make again.
KEPT = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]
_KEEP_PRODUCTS = partial(create_selective_checkpoint_contexts, KEPT)


def rotary_table(grid: tuple[int, int], head_dim: int, base: float) -> Tensor:
    """Rotation of every channel pair as a complex number, [1 + T, head_dim / 2] complex128, T tokens of h x w.

    The first half of the pairs turns with the row of the token, the second half with its column (2-D RoPE as
    in LlamaGen, arXiv 2406.06525). Row 0 belongs to the class and is zero: its query and key vanish. Rows and columns
    count from 0 whatever the grid: a larger one has the positions of a smaller one, and further ones.
    """
    exponents = torch.arange(0, head_dim // 2, 2, dtype=torch.float64, device="cpu") / (head_dim // 2)
    height, width = grid
    steps = torch.arange(max(grid), dtype=torch.float64, device="cpu")
    angles = torch.outer(steps, base**-exponents)  # [longer side, head_dim / 4]
    rows = angles[:height, None].expand(-1, width, -1)
    columns = angles[None, :width].expand(height, -1, -1)
    grid = torch.cat([rows, columns], dim=-1).flatten(0, 1)  # [T, head_dim / 2]
    table = torch.polar(torch.ones_like(grid), grid)
    return torch.cat([torch.zeros_like(table[:1]), table])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn adjacent channel pairs of x [B, T, heads, head_dim] by `table` [T, head_dim / 2], or one for each image.

    Computed in the precision of the table (float32 or float64), returned in that of x (RoFormer, arXiv
    2104.09864).
    """
    pairs, turns = x.to(table.real.dtype).unflatten(-1, (-1, 2)), table[..., None, :]
    if not torch.compiler.is_compiling():
        return torch.view_as_real(torch.view_as_complex(pairs) * turns).flatten(-2).to(x.dtype)
    # The compiler fuses real numbers and knows no complex ones, which are the faster of the two without it.
    (a, b), (cos, sin) = pairs.unbind(-1), torch.view_as_real(turns).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467), then an adaptive scale and shift; statistics in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """RMSNorm(x) * (1 + scale) + shift for x [B, T, C] and scale, shift [B, 1, C]; or the norm alone."""
        high = x if x.dtype == torch.float64 else x.float()
        normed = high * torch.rsqrt(high.square().mean(-1, keepdim=True) + NORM_EPS)
        if scale is None:
            return (normed * self.weight).to(x.dtype)
        # The learned weight is folded into the scale, which is one row per image instead of one per token.
        scale, shift = scale.to(high.dtype), shift.to(high.dtype)
        return torch.addcmul(shift, normed, self.weight * (1 + scale)).to(x.dtype)

    def after(
        self, x: Tensor, update: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, *, fused: bool
    ) -> tuple[Tensor, Tensor]:
        """(x + gate * update, the norm of it), all [R, C]: what a step of decoding does between two products."""
        if fused:
            from ibq.ops import triton_decode_step  # only where Triton is installed

            return triton_decode_step.residual_norm(x, update, gate, self.weight, scale, shift, NORM_EPS)
        x = x if update is None else torch.addcmul(x, gate, update)
        return x, self(x, scale, shift)


class Attention(nn.Module):
    """Causal self-attention with 2-D rotary embedding; groups of heads may share one key/value head."""

    def __init__(self, width: int, heads: int, kv_heads: int, dropout: float):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.dropout = dropout
        self.wqkv = linear(width, (heads + 2 * kv_heads) * self.head_dim)
        self.wo = linear(width, width)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """Attention over a whole sequence, x [B, T, C] -> [B, T, C]; rope [T, head_dim / 2] or [B, T, head_dim / 2]."""
        q, k, v = self._project(x, rope)
        grouped = self.heads != self.kv_heads
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        out = self.wo(out.transpose(1, 2).flatten(2))
        return dropout(out, self.dropout, self.training)

    def decode(self, x: Tensor, rope: Tensor, keys: Tensor, values: Tensor, position: int | Tensor) -> Tensor:
        """Attention of one new position, x [R, C] -> [R, C]; writes its key and value into the cache.

        keys, values: [R, kv_heads, T, head_dim]; rope as in `rotary_table`. A position [1] on the device is for
        Triton's kernels, in whose cache keys have an order of their own; with a number it is plain PyTorch.
        """
        qkv = self.wqkv(x)
        if isinstance(position, Tensor):
            from ibq.ops import triton_decode_step

            return self.wo(triton_decode_step.attend(qkv, rope, keys, values, position))
        return self.wo(self._attend(qkv, rope[position : position + 1], keys, values, position))

    def new_cache(self, rows: int, tokens: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Empty keys and values [rows, kv_heads, tokens, head_dim], of the precision and the device of `like`."""
        shape = (rows, self.kv_heads, tokens, self.head_dim)
        return like.new_zeros(shape), like.new_zeros(shape)

    def _attend(self, qkv: Tensor, rope: Tensor, keys: Tensor, values: Tensor, position: int) -> Tensor:
        """[R, C] of the new position's queries, keys and values [R, (heads + 2 kv_heads) head_dim]."""
        q, k, v = self._heads(qkv[:, None], rope)
        mask = None
        keys[:, :, position], values[:, :, position] = k[:, :, 0], v[:, :, 0]
        if keys.is_cpu and keys.dtype == torch.bfloat16 and 2 * position >= keys.shape[2]:
            # Products of bf16 on the CPU copy what does not lie in one piece, which costs more than reading all.
            mask = torch.arange(keys.shape[2]) <= position
        else:
            keys, values = keys[:, :, : position + 1], values[:, :, : position + 1]
        # The heads of a group share keys and values: they go where a sequence of queries would.
        q = q.squeeze(2).unflatten(1, (self.kv_heads, -1)).to(keys.dtype)  # [R, kv_heads, group, head_dim]
        if q.is_cpu:
            # The fused CPU kernel with several threads rounds a row differently at different places in the
            # batch; plain products do not (tests/unit/test_sampling.py), and no image may depend on its company.
            scores = (q * self.head_dim**-0.5) @ keys.transpose(-1, -2)
            scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
            out = scores.softmax(-1).to(values.dtype) @ values
        else:
            out = F.scaled_dot_product_attention(q, keys, values)
        return out.flatten(1).to(qkv.dtype)

    def _project(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (both rotated) and values, each [B, heads, T, head_dim]."""
        return self._heads(self.wqkv(x), rope)

    def _heads(self, qkv: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = qkv.unflatten(-1, (-1, self.head_dim))  # [B, T, heads + 2 kv_heads, head_dim]
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=2)
        q, k = rotate(qk, rope).split([self.heads, self.kv_heads], dim=2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def hidden_width(width: int) -> int:
    """Hidden channels of a feed-forward part: 8/3 of the width, rounded up to a multiple of 256."""
    return -(-int(8 * width / 3) // FFN_MULTIPLE) * FFN_MULTIPLE


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): w2(silu(w1 x) * w3 x)."""

    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.w1 = linear(width, hidden)
        self.w3 = linear(width, hidden)
        self.w2 = linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, C] -> [B, T, C]."""
        return dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)), self.dropout, self.training)

    def decode(self, x: Tensor, *, fused: bool) -> Tensor:
        """x [R, C] -> [R, C] of one position; `w13` is w1 and w3 as one product, where a decoder has made it."""
        if not hasattr(self, "w13"):
            return self(x)
        return self.w2(self._gated(self.w13(x), fused=fused))

    def _gated(self, both: Tensor, *, fused: bool) -> Tensor:
        if fused:
            from ibq.ops import triton_decode_step

            return triton_decode_step.swiglu(both)
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate) * up


class Block(nn.Module):
    """Attention and feed-forward part, each behind an adaptive norm and a gate (adaLN-Zero of DiT).

    `adaln`: whether the condition goes through a layer of its own, through one that blocks share, or norms are plain
    and there are no gates. `recompute`: what the backward pass makes again instead of keeping it: nothing, "all", or
    what is "cheap".
    """

    def __init__(
        self,
        width: int,
        attention: Attention,
        feed_forward: FeedForward,
        *,
        adaln: Literal["own", "shared", "none"],
        recompute: Literal["all", "cheap"] | None = None,
    ):
        super().__init__()
        self.recompute = recompute
        if adaln == "shared":
            self.ada_gss = nn.Parameter(torch.empty(1, 1, 6, width))
        elif adaln == "own":
            self.ada_lin = nn.Sequential(nn.SiLU(), linear(width, 6 * width, bias=True))
        self.attention = attention
        self.feed_forward = feed_forward
        self.attention_norm = RMSNorm(width)
        self.ffn_norm = RMSNorm(width)

    def modulation(self, condition: Tensor) -> Tensor:
        """gamma1, gamma2, scale1, scale2, shift1, shift2 as [B, 6, C]; those of plain norms are constant, [1, 6, 1].

        `condition` is the class embedding [B, C], or with `shared_adaln` the shared layer's output [B, 6, C].
        """
        if hasattr(self, "ada_gss"):
            return self.ada_gss[0] + condition
        if not hasattr(self, "ada_lin"):
            return torch.cat([condition.new_ones(1, 2, 1), condition.new_zeros(1, 4, 1)], dim=1)
        return self.ada_lin(condition).unflatten(-1, (6, -1))

    def forward(self, x: Tensor, condition: Tensor, rope: Tensor) -> Tensor:
        """x [B, T, C] -> [B, T, C]; condition as in `modulation`."""
        if self.recompute is None or not torch.is_grad_enabled():
            return self._forward(x, condition, rope)
        # Within this module's call, not around it: engines gather its weights once for both.
        kept = {"context_fn": _KEEP_PRODUCTS} if self.recompute == "cheap" else {}
        return checkpoint(self._forward, x, condition, rope, use_reentrant=False, **kept)

    def _forward(self, x: Tensor, condition: Tensor, rope: Tensor) -> Tensor:
        gamma1, gamma2, scale1, scale2, shift1, shift2 = self.modulation(condition)[:, :, None].unbind(1)
        x = torch.addcmul(x, gamma1, self.attention(self.attention_norm(x, scale1, shift1), rope))
        return torch.addcmul(x, gamma2, self.feed_forward(self.ffn_norm(x, scale2, shift2)))

    def decode(self, x: Tensor, rope: Tensor, keys: Tensor, values: Tensor, position: int) -> Tensor:
        """One new position, x [R, C] -> [R, C], of a block with plain norms; the rest as in `Attention.decode`."""
        x = x + self.attention.decode(self.attention_norm(x), rope, keys, values, position)
        return x + self.feed_forward.decode(self.ffn_norm(x), fused=False)


class HeadNorm(nn.Module):
    """The final norm; where it is adaptive, its scale and shift always come from the class embedding."""

    def __init__(self, width: int, *, adaptive: bool = True):
        super().__init__()
        self.rmsnorm = RMSNorm(width)
        if adaptive:
            self.ada_lin = nn.Sequential(nn.SiLU(), linear(width, 2 * width, bias=True))

    def modulation(self, embedding: Tensor) -> Tensor:
        """Scale and shift [B, 2, C] of the class embedding [B, C]; those of a plain norm are zeros [1, 2, 1]."""
        if not hasattr(self, "ada_lin"):
            return embedding.new_zeros(1, 2, 1)
        return self.ada_lin(embedding).unflatten(-1, (2, -1))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x [B, T, C] -> [B, T, C]."""
        scale, shift = modulation[:, :, None].unbind(1)
        return self.rmsnorm(x, scale, shift)


class Head(nn.Module):
    """The linear head: logits, or with targets their negative log likelihood, without a table of the logits.

    `loss` is head and cross-entropy in one: a callable (hidden [N, C], weight [V, C], targets [N]) -> negative log
    likelihood [N] in float32. Set another where the vocabulary is split over ranks.
    """

    loss: Callable[[Tensor, Tensor, Tensor], Tensor] = staticmethod(linear_cross_entropy)

    def __init__(self, width: int, vocab_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits [..., V] of hidden [..., C], or with targets [N] the negative log likelihoods [N] of hidden [N, C]."""
        return F.linear(hidden, self.weight) if targets is None else self.loss(hidden, self.weight, targets)


def linear(inputs: int, outputs: int, *, bias: bool = False) -> nn.Linear:
    """A linear layer without the default initialisation, which would cost as much again for large models."""
    return nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias, device=torch.get_default_device())


def embedding(rows: int, width: int) -> nn.Embedding:
    """A table without the default initialisation."""
    return nn.utils.skip_init(nn.Embedding, rows, width, device=torch.get_default_device())
