"""Class-conditional autoregressive transformer over codes in raster order, or trained in random ones.

Llama blocks (RMSNorm, SwiGLU, 2-D rotary embedding; LlamaGen, arXiv 2406.06525) with adaptive norms (DiT,
arXiv 2212.09748; VAR, arXiv 2404.02905), as IBQ (arXiv 2412.02692) uses them. The class embedding is both the
start token and the condition of every adaptive norm. Parameter names are those of the reference checkpoints,
without the prefix `transformer.` and with `class_emb.weight` for `class_emb.embedding_table.weight`. With random orders
(RAR, arXiv 2411.00776) a learned embedding of the position that is predicted next is added to every input. What
predicts a code from its hidden state is one of `heads.py`.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibq import initial
from ibq.initial import Initial
from ibq.models.code_order import rotations_in_order
from ibq.models.heads import Chooser, HeadConfig, InnerTransformer, PlainHeadConfig, embedding_of, head_of
from ibq.models.transformer_blocks import (
    Attention,
    Block,
    FeedForward,
    Head,
    HeadNorm,
    embedding,
    hidden_width,
    linear,
    rotary_table,
)
from ibq.ops.dropout import dropout

Grid = tuple[int, int]  # rows and columns of codes
INIT_STD = 0.02
LAST_LAYER = re.compile(r"head\.((parts\.\d+|linear|outputs)\.)?weight")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Size and regularisation of a `Transformer`; published depths are 16 (B), 20 (L), 24 (XL), 30 (XXL).

    `heads` defaults to `depth`, `width` to 64 x `depth`, `kv_heads` to the number of heads (fewer: groups of
    heads share keys and values), `condition_dim` to the width; the resolved numbers are the properties
    `num_heads`, `model_width`, `num_kv_heads`. `grids` take the place of `tokens_per_side` for pictures that
    are no squares, or of several shapes; no weight depends on them but the positions of `order: random`, which makes
    training in random orders possible. Errors: ValueError for sizes that do not fit together.
    """

    vocab_size: int = 16384
    num_classes: int = 1000
    tokens_per_side: int = 16
    grids: tuple[Grid, ...] | None = None  # [[rows, columns], ...]
    depth: int = 16
    heads: int | None = None
    width: int | None = None
    kv_heads: int | None = None
    condition_dim: int | None = None
    residual_dropout: float = 0.1
    ffn_dropout: float = 0.1
    token_dropout: float = 0.1
    class_dropout: float = 0.1
    adaln: bool = True  # false: plain norms; the class is the start token alone, as in LlamaGen and Open-MAGVIT2
    adaln_gamma_init: float = 1e-3
    shared_adaln: bool = False
    head: HeadConfig = field(default_factory=PlainHeadConfig)  # what predicts a code; see `heads.py`
    rope_base: float = 10000.0
    order: Literal["raster", "random"] = "raster"  # random: with embeddings of the position that is predicted next
    gradient_checkpointing: bool = False  # recompute blocks in the backward pass instead of keeping what they made
    checkpoint_every: int = 1  # only every so many-th block
    checkpoint_selective: bool = False  # keep matrix products and attention, recompute the cheap rest

    def __post_init__(self):
        for name in ("vocab_size", "num_classes", "tokens_per_side", "depth", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not positive; use at least 1")
        if self.grids is not None:
            _check_grids(self.grids)
        for name in ("heads", "width", "kv_heads", "condition_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value} is not positive; use at least 1, or leave it out")
        for name in ("residual_dropout", "ffn_dropout", "token_dropout", "class_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}: {getattr(self, name)} is not a probability; use a value in [0, 1)")
        if self.rope_base <= 1.0:
            raise ValueError(f"rope_base: {self.rope_base} must be above 1; the usual value is 10000")
        if self.model_width % self.num_heads:
            raise ValueError(
                f"heads: {self.num_heads} heads do not divide the width {self.model_width}; "
                "choose a width that is a multiple of the number of heads (64 x heads is usual)"
            )
        if self.head_dim % 4:
            raise ValueError(
                f"heads: {self.num_heads} heads give {self.head_dim} channels per head, but the 2-D rotary "
                "embedding needs a multiple of 4; change heads or width (64 channels per head are usual)"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"kv_heads: {self.num_kv_heads} does not divide the {self.num_heads} heads; use a divisor")
        if self.condition_dim not in (None, self.model_width):
            raise ValueError(
                f"condition_dim: {self.condition_dim} differs from the width {self.model_width}, but the "
                "class embedding is start token and condition at once; leave condition_dim out"
            )
        if self.shared_adaln and not self.adaln:
            raise ValueError("shared_adaln: plain norms share nothing; set adaln=true, or leave shared_adaln out")
        _ = self.digits  # errors at once

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.depth if self.heads is None else self.heads

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads."""
        return self.num_heads if self.kv_heads is None else self.kv_heads

    @property
    def model_width(self) -> int:
        """Channels of the residual stream, C."""
        return 64 * self.depth if self.width is None else self.width

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.model_width // self.num_heads

    @property
    def ffn_width(self) -> int:
        """Hidden channels of the feed-forward part: 8/3 of the width, rounded up to a multiple of 256."""
        return hidden_width(self.model_width)

    @cached_property
    def digits(self) -> tuple[int, ...]:
        """How many values each part has that a code is drawn as: (V,) for the plain head."""
        return self.head.digits(self.vocab_size)

    @property
    def is_plain(self) -> bool:
        """Whether it has the plain head and adaptive norms: the only one that tensor parallelism can split."""
        return self.adaln and self.head.kind == "plain"

    @property
    def code_grids(self) -> tuple[Grid, ...]:
        """Rows and columns of codes of the images that it is for; the first is drawn unless another is asked for."""
        return self.grids or ((self.tokens_per_side, self.tokens_per_side),)

    @property
    def num_tokens(self) -> int:
        """Codes per image, T; those of the largest grid, where there are several."""
        return max(height * width for height, width in self.code_grids)

    @property
    def positions(self) -> Grid:
        """Rows and columns of the smallest grid that contains all of them."""
        return max(height for height, _ in self.code_grids), max(width for _, width in self.code_grids)

    @property
    def common_tokens(self) -> int:
        """The largest number that divides every grid's codes: T, where there is one grid."""
        return math.gcd(*(height * width for height, width in self.code_grids))


def _check_grids(grids: Sequence[Grid]) -> None:
    if not grids:
        raise ValueError("grids: is empty; give [[rows, columns], ...], or leave it out for a square")
    for height, width in grids:
        if min(height, width) < 1:
            raise ValueError(f"grids: {height} x {width} codes are none; use at least 1 row and 1 column")
    if len(set(grids)) < len(grids):
        raise ValueError("grids: one is there twice; give each once")


@dataclass(frozen=True)
class KVCache:
    """Keys and values of the positions decoded so far, static buffers [depth, R, kv_heads, T, head_dim].

    `rope`: rows of the rotary table by step, where these are in an order of their own; see `Transformer.rotations`.
    """

    keys: Tensor
    values: Tensor
    grid: Grid
    rope: Tensor | None = None

    @property
    def layers(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Keys and values of each block."""
        return self.keys.unbind(0), self.values.unbind(0)


@dataclass(frozen=True)
class Condition:
    """What decoding needs of the classes, computed once per image."""

    embedding: Tensor  # [R, C], the start token
    blocks: tuple[tuple[Tensor, ...], ...]  # of each block the six [R, C] of `Block.modulation`
    head: tuple[Tensor, ...]  # scale and shift [R, C] of the final norm

    def tensors(self) -> Iterator[Tensor]:
        """All of them, in one order."""
        yield self.embedding
        yield from itertools.chain(*self.blocks, self.head)


class Transformer(nn.Module):
    """Next-code model: position i sees the class and the codes before i, and predicts code i."""

    # How layers may be split over ranks, by name: the rows of a weight (its outputs), its columns (its inputs), the
    # rows of each of the packed projections, or the vocabulary.
    tensor_parallel_layouts: ClassVar[Mapping[str, str]] = {
        "tok_emb": "vocabulary",
        "blocks.*.attention.wqkv": "packed_rows",
        "blocks.*.attention.wo": "columns",
        "blocks.*.feed_forward.w1": "rows",
        "blocks.*.feed_forward.w3": "rows",
        "blocks.*.feed_forward.w2": "columns",
        "blocks.*.ada_lin.1": "rows_gathered",
        "shared_ada_lin.1": "rows_gathered",
        "head_nm.ada_lin.1": "rows_gathered",
        "head": "vocabulary",
    }

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        width = config.model_width
        plain = config.head.kind == "plain"
        self.tok_emb = embedding(config.vocab_size, width) if plain else embedding_of(config.head, config.digits, width)
        self.class_emb = embedding(config.num_classes + 1, width)
        if config.order == "random":
            self.target_emb = embedding(math.prod(config.positions), width)
        self.blocks = nn.ModuleList(_block(config, number) for number in range(config.depth))
        if config.shared_adaln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), linear(width, 6 * width, bias=True))
        if config.head.kind == "factorised":
            self.inner = InnerTransformer([_inner_block(config) for _ in range(config.head.layers)])
        self.head_nm = HeadNorm(width, adaptive=config.adaln)
        self.head = Head(width, config.vocab_size) if plain else head_of(config.head, config.digits, width)
        self._rotary_tables: dict[tuple, Tensor] = {}  # of the grids that were met
        self._initialize()

    def units(self) -> list[nn.Module]:
        """The parts that an engine compiles, and gathers if it shards weights, one at a time."""
        return [*self.blocks, *(self.inner.blocks if hasattr(self, "inner") else ())]

    @property
    def null_class(self) -> int:
        """The class that stands for "no class" in guidance and class dropout."""
        return self.config.num_classes

    def _initialize(self) -> None:
        """Give parameters that have memory their initial values, by a seed of PyTorch's generator."""
        given = [(name, parameter) for name, parameter in self.named_parameters() if not parameter.is_meta]
        seed = int(torch.randint(2**62, ())) if given else 0
        for name, parameter in given:
            key = initial.key_of(seed, name)
            values = torch.empty(parameter.numel(), device=parameter.device)
            initial.fill(values, self.initial_value(name, parameter.shape), key, [(0, parameter.numel(), 1, 0)])
            parameter.data.copy_(values.view(parameter.shape))

    def initial_value(self, name: str, shape: Sequence[int]) -> Initial:
        """The initial value of one parameter; `name` as in `named_parameters`.

        The gates gamma start small, so that every block starts near the identity (VAR, arXiv 2404.02905), and
        the head's last layer at zero, so that the first loss is ln V.
        """
        width, gamma = self.config.model_width, self.config.adaln_gamma_init
        if name.endswith(".bias") or LAST_LAYER.fullmatch(name):
            return Initial()
        if name.endswith(("norm.weight", "rmsnorm.weight")):
            return Initial(mean=1.0)
        if name.endswith("ada_gss"):
            return Initial(std=width**-0.5, scaled=2 * width, factor=gamma)
        if name.endswith("ada_lin.1.weight") and not name.startswith("head_nm."):
            return Initial(std=INIT_STD, scaled=2 * width * shape[-1], factor=gamma)
        return Initial(std=INIT_STD)

    def forward(self, codes: Tensor, classes: Tensor, order: Tensor | None = None) -> Tensor:
        """Negative log likelihood of every code in nats, codes [B, h, w], classes [B] -> [B, T] float32.

        In raster order, or in the order [B, T] that the codes are to be predicted in (`ibq.models.code_order`).
        Any grid will do, unless its positions have embeddings; codes [B, T] are for the model's grid that has T.
        In training mode dropout is active and a class becomes `null_class` with probability `class_dropout`.
        Errors: ValueError for wrong shapes or types and, on the CPU only (elsewhere the check would wait for
        the device), for codes and classes out of range. What the result of a masked head is, `MaskedBitsHead` says.
        """
        x, modulation = self._stream(codes, classes, order)
        targets = (codes.flatten(1) if order is None else codes.flatten(1).gather(1, order)).long()
        if hasattr(self, "inner"):
            inner = self.inner(x, targets, self.tok_emb, self._inner_rope(x))  # [B, T, K, C]
            hidden = self.head_nm(inner.flatten(1, 2), modulation).view(-1, *inner.shape[2:])
        else:
            hidden = self.head_nm(x, modulation).flatten(0, 1)
        nll = self.head(hidden, targets.flatten())
        return nll.view(len(codes), -1).clone()  # not a view: engines put hooks on the output

    def logits(self, codes: Tensor, classes: Tensor, order: Tensor | None = None) -> Tensor:
        """Logits [B, T, V]: those at i predict code i of the order. Codes, modes and errors as in `forward`.

        ValueError for a head that has none.
        """
        if self.config.head.kind != "plain":
            raise ValueError(f"head: of kind {self.config.head.kind} has no logits of all codes; use forward")
        return self.head(self.head_nm(*self._stream(codes, classes, order)))

    def condition(self, classes: Tensor) -> Condition:
        """Everything that decoding needs of classes [R]."""
        self._check_classes(classes)
        embedding = self.class_emb(classes)
        condition = self._block_condition(embedding)
        if self.config.adaln:
            blocks = tuple(block.modulation(condition).unbind(1) for block in self.blocks)
            return Condition(embedding, blocks, self.head_nm.modulation(embedding).unbind(1))
        one, zero = torch.ones_like(embedding), torch.zeros_like(embedding)
        return Condition(embedding, ((one, one, zero, zero, zero, zero),) * len(self.blocks), (zero, zero))

    def new_cache(
        self, rows: int, dtype: torch.dtype | None = None, device=None, *, grid: Grid | None = None
    ) -> KVCache:
        """An empty cache for `rows` sequences of a grid of codes (default: the model's first).

        Precision and device default to those of the weights.
        """
        cfg, weight, grid = self.config, self.class_emb.weight, grid or self.config.code_grids[0]
        shape = (cfg.depth, rows, cfg.num_kv_heads, math.prod(grid), cfg.head_dim)
        dtype, device = dtype or weight.dtype, weight.device if device is None else device
        return KVCache(*(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)), grid)

    def decode_step(self, codes: Tensor | None, condition: Condition, cache: KVCache, position: int) -> Tensor:
        """Logits [R, V] of the code at `position`; `codes` [R] are those at position - 1, None at position 0.

        Of another head than the plain one what `draw` takes. Positions must come in order, as every call adds one to
        the cache. Call `eval()` first: dropout would be active in training mode. Errors: ValueError for a position out
        of range or without its codes.
        """
        tokens = math.prod(cache.grid)
        if (codes is None) != (position == 0) or not 0 <= position < tokens:
            raise ValueError(
                f"position: {position} {'without' if codes is None else 'with'} codes; give no codes at "
                f"position 0 and the previous codes at positions 1 to {tokens - 1}"
            )
        x = condition.embedding if codes is None else self.tok_emb(codes)
        targets = self.target_rows(cache.grid)
        return self.decode(x if targets is None else x + targets[position], condition, cache, position)

    def decode(self, x: Tensor, condition: Condition, cache: KVCache, position: int | Tensor) -> Tensor:
        """The result of `decode_step` for its input x [R, C]: the class embedding, or that of the code before.

        `target_rows` of the position, where there are any, have been added.

        A position [1] on the device runs Triton's kernels between the products, the same at every position.
        """
        fused, update, gate = isinstance(position, Tensor), None, None
        rope = self._rope(x, cache.grid) if cache.rope is None else cache.rope
        for block, modulation, *cached in zip(self.blocks, condition.blocks, *cache.layers, strict=True):
            gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation
            x, normed = block.attention_norm.after(x, update, gate, scale1, shift1, fused=fused)
            update, gate = block.attention.decode(normed, rope, *cached, position), gamma1
            x, normed = block.ffn_norm.after(x, update, gate, scale2, shift2, fused=fused)
            update, gate = block.feed_forward.decode(normed, fused=fused), gamma2
        if hasattr(self, "inner"):
            return torch.addcmul(x, gate, update)
        hidden = self.head_nm.rmsnorm.after(x, update, gate, *condition.head, fused=fused)[1]
        return self.head(hidden) if self.config.head.kind == "plain" else hidden

    def draw(self, decoded: Tensor, condition: Condition, chooser: Chooser) -> Tensor:
        """Codes [rows] from what `decode` gives: logits, hidden states or, before the inner transformer, the stream."""
        if self.config.head.kind == "plain":
            return chooser.code(decoded, 0)
        if not hasattr(self, "inner"):
            return self.head.draw(decoded, chooser)

        def norm(x: Tensor) -> Tensor:
            return self.head_nm.rmsnorm(x, *condition.head)

        return self.inner.draw(decoded, self.head, norm, self.tok_emb, self._inner_rope(decoded), chooser)

    def target_rows(self, grid: Grid, order: Tensor | None = None) -> Tensor | None:
        """What is added to the inputs of a grid's steps in an order [T] (raster): [1 + T, C], the last row none.

        None where positions have no embeddings. Errors: ValueError for a grid that has positions without one.
        """
        if self.config.order == "raster":
            return None
        order = self._raster(grid) if order is None else order
        return F.pad(self.target_emb(self._places(order, grid)), (0, 0, 0, 1))

    def rotations(self, grid: Grid, order: Tensor | None = None) -> Tensor:
        """Rows [T, head_dim / 2] of the rotary table for the inputs of a grid's steps in an order [T] (raster)."""
        order = self._raster(grid) if order is None else order
        return rotations_in_order(self._rope(self.class_emb.weight, grid), order[None])[0]

    def _raster(self, grid: Grid) -> Tensor:
        return torch.arange(math.prod(grid), device=self.class_emb.weight.device)

    def _places(self, indices: Tensor, grid: Grid) -> Tensor:
        """Rows of `target_emb` for raster indices of a grid: the same row and column is the same in all grids."""
        (height, width), (rows, columns) = grid, self.config.positions
        if height > rows or width > columns:
            raise ValueError(
                f"codes: {height} x {width} are beyond the {rows} x {columns} positions that have embeddings; add the "
                "grid to grids before training, or use order: raster"
            )
        return indices // width * columns + indices % width

    def _stream(self, codes: Tensor, classes: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
        """The residual stream [B, T, C] after the last block, and the modulation of the final norm."""
        grid = self._grid_of(codes)
        self._check_classes(classes, len(codes))
        if order is not None and self.config.order == "raster":
            raise ValueError("order: this model has no embeddings of positions; train one with order: random")
        if self.training and self.config.class_dropout > 0:
            dropped = torch.rand(classes.shape, device=classes.device) < self.config.class_dropout
            classes = classes.masked_fill(dropped, self.null_class)
        embedding = self.class_emb(classes)  # [B, C]
        x = self._blocks(codes.flatten(1), grid, embedding, order)
        return x, self.head_nm.modulation(embedding)

    def _blocks(self, codes: Tensor, grid: Grid, embedding: Tensor, order: Tensor | None = None) -> Tensor:
        """The residual stream after the last block, [B, T, C], for codes [B, T] of a grid."""
        codes = codes if order is None else codes.gather(1, order)
        x = torch.cat([embedding[:, None], self.tok_emb(codes[:, :-1])], dim=1)
        x = dropout(x, self.config.token_dropout, self.training)
        if self.config.order == "random":  # RAR, section 3.3; not dropped, so that a position is always known
            predicted = torch.arange(x.shape[1], device=x.device) if order is None else order
            x = x + self.target_emb(self._places(predicted, grid))
        rope = self._rope(x, grid)
        rope = rope[: x.shape[1]] if order is None else rotations_in_order(rope, order)
        condition = self._block_condition(embedding)
        for block in self.blocks:
            x = block(x, condition, rope)
        return x

    def _block_condition(self, embedding: Tensor) -> Tensor:
        """What the blocks are conditioned on: the class embedding [B, C], or the shared layer's [B, 6, C]."""
        if not self.config.shared_adaln:
            return embedding
        return self.shared_ada_lin(embedding).unflatten(-1, (6, -1))

    def _rope(self, like: Tensor, grid: Grid) -> Tensor:
        """The rotary table of a grid on the device of `like`, in float32 or, for float64, in float64.

        Not a buffer: `module.to(bfloat16)` would round it and meta-device construction would lose it.
        """
        key = (grid, like.device, torch.float64 if like.dtype == torch.float64 else torch.float32)
        if key not in self._rotary_tables:
            with torch.inference_mode(False):  # a table made while sampling must serve training too
                table = rotary_table(grid, self.config.head_dim, self.config.rope_base)
                self._rotary_tables[key] = table.to(like.device, key[-1].to_complex())
        return self._rotary_tables[key]

    def _inner_rope(self, like: Tensor) -> Tensor:
        """Rotations of the inner transformer's positions: those of a row of codes, after the class."""
        parts = len(self.config.digits)
        return self._rope(like, (1, parts))[:parts]

    def _grid_of(self, codes: Tensor) -> Grid:
        """The grid of codes [B, h, w], or [B, T] where one of the model's alone has T; ValueError for others."""
        grids = [tuple(codes.shape[1:])]
        if codes.ndim == 2:
            grids = [grid for grid in self.config.code_grids if math.prod(grid) == codes.shape[1]]
        if codes.ndim not in (2, 3) or len(grids) != 1 or 0 in grids[0]:
            known = " or ".join(f"{height} x {width}" for height, width in self.config.code_grids)
            raise ValueError(
                f"codes: shape {tuple(codes.shape)}, expected [B, h, w], or [B, {self.config.num_tokens}] ({known} "
                "codes in raster order); give the code grid, or set tokens_per_side or grids to those of the codes"
            )
        _check_indices("codes", codes, self.config.vocab_size, "vocab_size must be the tokenizer's num_codes")
        return grids[0]

    def _check_classes(self, classes: Tensor, rows: int | None = None) -> None:
        if classes.ndim != 1 or rows not in (None, len(classes)):
            expected = "[B]" if rows is None else f"[{rows}]"
            raise ValueError(f"classes: shape {tuple(classes.shape)}, expected {expected}: one class per image")
        limit = self.config.num_classes + 1
        _check_indices("classes", classes, limit, "num_classes must cover the labels (the last index is no class)")


def _block(config: TransformerConfig, number: int) -> Block:
    recompute = None
    if config.gradient_checkpointing and number % config.checkpoint_every == 0:
        recompute = "cheap" if config.checkpoint_selective else "all"
    adaln = "none" if not config.adaln else "shared" if config.shared_adaln else "own"
    return _layers(config, adaln=adaln, recompute=recompute)


def _inner_block(config: TransformerConfig) -> Block:
    """Of the inner transformer: with plain norms, as the class has come in by the hidden state."""
    return _layers(config, adaln="none", recompute="all" if config.gradient_checkpointing else None)


def _layers(config: TransformerConfig, **settings) -> Block:
    width = config.model_width
    attention = Attention(width, config.num_heads, config.num_kv_heads, config.residual_dropout)
    feed_forward = FeedForward(width, config.ffn_width, config.ffn_dropout)
    return Block(width, attention, feed_forward, **settings)


def _check_indices(name: str, indices: Tensor, limit: int, remedy: str) -> None:
    if indices.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name}: dtype {indices.dtype}; convert to torch.int64")
    if indices.is_cpu and indices.numel() and not torch.compiler.is_compiling():
        low, high = (int(value) for value in indices.aminmax())
        if low < 0 or high >= limit:
            raise ValueError(f"{name}: values {low} to {high} outside 0 to {limit - 1}; {remedy}")
