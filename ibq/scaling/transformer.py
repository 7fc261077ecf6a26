"""Parameters, FLOPs and saved activations of a transformer (`ibq/models/transformer.py`), from its config alone.

T tokens, C channels, F hidden channels of the feed-forward part, V codes, h heads of which k hold keys and values,
d channels a head, L blocks. A matrix product [m, i] x [i, o] counts 2 m i o FLOPs; norms, rotations, softmaxes and
dropout count none, as in torch.utils.flop_counter.
"""

import math
from dataclasses import dataclass
from typing import Literal

from ibq.engine.configs import ModelSize
from ibq.models.transformer import TransformerConfig
from ibq.scaling.heads import (
    head_bytes,
    head_flops,
    head_parameters,
    inner_config,
    largest_matrices,
    table_parameters,
)

Device = Literal["cpu", "cuda"]
Checkpointing = Literal["none", "full", "selective"]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Parameters of a part of a network; of `split` tensor parallelism leaves each rank an equal share."""

    split: int = 0
    whole: int = 0
    products: int = 0  # of both: weights of matrix products, of which autocast makes a bf16 copy
    whole_products: int = 0  # those of them that are not split

    @property
    def count(self) -> int:
        """Elements of the unsplit network."""
        return self.split + self.whole

    def local(self, tensor: int) -> float:
        """Elements on one of `tensor` ranks."""
        return self.split / tensor + self.whole

    def local_products(self, tensor: int) -> float:
        """Weights of matrix products on one of `tensor` ranks."""
        return (self.products - self.whole_products) / tensor + self.whole_products


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of one image; `recomputed` are those that the textbook form does not have, in the backward pass."""

    forward: int
    backward: int
    recomputed: int = 0

    @property
    def textbook(self) -> int:
        """Forward and backward pass without recomputation."""
        return self.forward + self.backward


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """Bytes of an element, by where it lies. The engines differ: see `ibq.scaling.layouts.numerics`."""

    stream: int  # the residual stream in the blocks
    compute: int  # what matrix products read and write
    root: int  # the stream before the first block and after the last
    casts: bool = False  # autocast: a bf16 copy of each weight, kept as long as the backward pass may need it
    device: Device = "cuda"

    def mask(self, size: int) -> int:
        """Bytes of an element of a dropout mask over elements of `size` bytes: CUDA keeps booleans."""
        return 1 if self.device == "cuda" else size


EXACT = Numerics(stream=4, compute=4, root=4)


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A tensor that the backward pass of one image needs."""

    name: str
    bytes: int
    # Split by tensor parallelism ("hidden" only if it divides the hidden channels), by sequence parallelism, never.
    lies: Literal["channels", "hidden", "tokens", "whole"] = "whole"
    dear: bool = False  # kept by selective checkpointing: a result of a matrix product or of attention


def share_of(size: int, tensor: int) -> int:
    """Ranks that share a layer of `size` outputs: all of `tensor`, or each has it whole where they do not divide it."""
    return tensor if size % tensor == 0 else 1


def transformer_weights(config: TransformerConfig, tensor: int = 1) -> dict[str, Weights]:
    """Parameters by part: `embeddings`, `block` (each of `depth`), `inner` (each block of the inner transformer),
    `shared`, `head_norm`, `head`; exact.

    What is split is said for `tensor` ranks: the heads divide by it, other layers that do not stay whole.
    """
    width = config.model_width
    ada, norms = 6 * width * width, 2 * width
    products = _block_products(config)
    hidden = 3 * width * config.ffn_width if share_of(config.ffn_width, tensor) < tensor else 0  # not split
    codes = table_parameters(config)
    splits = config.is_plain and share_of(config.vocab_size, tensor) == tensor
    table = Weights(split=codes) if splits else Weights(whole=codes)
    of_block = {"whole_products": hidden, "products": products}
    shared = Weights()
    if not config.adaln:
        block = Weights(split=products - hidden, whole=norms + hidden, **of_block)
    elif config.shared_adaln:
        block = Weights(split=products - hidden, whole=norms + hidden + 6 * width, **of_block)
        shared = Weights(split=ada + 6 * width, products=ada)
    else:
        of_block["products"] += ada
        block = Weights(split=products - hidden + ada + 6 * width, whole=norms + hidden, **of_block)
    last = 2 * width * width if config.adaln else 0
    inner = inner_config(config)
    rows = config.num_classes + 1 + (math.prod(config.positions) if config.order == "random" else 0)
    return {
        "embeddings": Weights(split=table.split, whole=table.whole + rows * width),
        "block": block,
        "inner": Weights() if inner is None else transformer_weights(inner, tensor)["block"],
        "shared": shared,
        "head_norm": Weights(split=last + (2 * width if config.adaln else 0), whole=width, products=last),
        "head": table if config.is_plain else Weights(whole=head_parameters(config)),
    }


def _repeats(config: TransformerConfig) -> dict[str, int]:
    """How often a part of `transformer_weights` is there that is not there once."""
    inner = inner_config(config)
    return {"block": config.depth, "inner": 0 if inner is None else inner.depth}


def transformer_parameters(config: TransformerConfig) -> int:
    """All parameters."""
    repeats = _repeats(config)
    return sum(part.count * repeats.get(name, 1) for name, part in transformer_weights(config).items())


def model_size(config: TransformerConfig) -> ModelSize:
    """The sizes that ZeRO goes by; a unit is a block."""
    width = config.model_width
    matrices = (
        *largest_matrices(config),
        (config.num_classes + 1) * width,
        6 * width * width if config.adaln else 0,
        (config.num_heads + 2 * config.num_kv_heads) * config.head_dim * width,
        width * config.ffn_width,
    )
    weights = transformer_weights(config)
    unit = max(weights["block"].count, weights["inner"].count)
    return ModelSize(total=transformer_parameters(config), unit=unit, largest=max(matrices))


def checkpointing(config: TransformerConfig) -> Checkpointing:
    """What the backward pass of a block that is recomputed makes again: nothing, all, or what is cheap."""
    if not config.gradient_checkpointing:
        return "none"
    return "selective" if config.checkpoint_selective else "full"


def recomputed_blocks(config: TransformerConfig) -> tuple[bool, ...]:
    """For every block whether it is recomputed."""
    on = checkpointing(config) != "none"
    return tuple(on and number % config.checkpoint_every == 0 for number in range(config.depth))


# --- FLOPs ----------------------------------------------------------------------------------------


def transformer_flops(config: TransformerConfig) -> Flops:
    """FLOPs of one image of T tokens; forward and backward exactly as FlopCounterMode counts the textbook form.

    forward = L (2 T (C (h + 2 k) d + C^2 + 3 C F) + 4 T^2 C + 12 C^2) + 4 C^2 + 2 T V C, where 12 C^2 and 4 C^2 are the
    adaptive norms' layers, once an image; with `shared_adaln` one for all blocks, with plain norms none; 2 T V C are
    the plain head's, see `ibq.scaling.heads` for others. backward = 2 forward: the gradients of both operands of every
    product. An inner transformer has T sequences of K sub-codes. Causality is not deducted, as in the textbook form.

    Recomputed: the logits in the head's backward pass (2 T V C), the scores in that of fused attention (2 T^2 C a
    block), and with full checkpointing the forward pass of every recomputed block.
    """
    tokens, width = config.num_tokens, config.model_width
    ada = 2 * 6 * width * width if config.adaln else 0
    blocks, attention, again = _block_flops(config, tokens)
    forward = blocks + ada * (1 if config.shared_adaln else config.depth) + ada // 3
    if checkpointing(config) == "full" and not config.shared_adaln:
        again += sum(recomputed_blocks(config)) * ada
    if (inner := inner_config(config)) is not None:
        more, its_attention, its_again = _block_flops(inner, len(config.digits))
        forward, attention, again = forward + more, attention + its_attention, again + its_again
    head = head_flops(config)
    forward += head.forward
    return Flops(
        forward=forward, backward=2 * forward - head.inputs, recomputed=head.recomputed + attention // 2 + again
    )


def _block_flops(config: TransformerConfig, length: int) -> tuple[int, int, int]:
    """FLOPs of all blocks without their adaptive norms, of their attention alone, and of what is recomputed in full.

    The tokens attend within sequences of so many.
    """
    attention = 4 * config.num_tokens * length * config.model_width
    block = 2 * config.num_tokens * _block_products(config) + attention
    again = sum(recomputed_blocks(config)) * block if checkpointing(config) == "full" else 0
    return config.depth * block, config.depth * attention, again


def unsplit_flops(config: TransformerConfig, tensor: int) -> int:
    """FLOPs of an image, recomputed ones too, that each of `tensor` ranks makes by itself: of whole layers."""
    logits = 2 * config.num_tokens * config.vocab_size * config.model_width
    hidden = 2 * config.num_tokens * 3 * config.model_width * config.ffn_width
    again = sum(recomputed_blocks(config)) if checkpointing(config) == "full" else 0
    found = 4 * logits if share_of(config.vocab_size, tensor) < tensor else 0
    if share_of(config.ffn_width, tensor) < tensor:
        found += (3 * config.depth + again) * hidden
    return found


def _block_products(config: TransformerConfig) -> int:
    """Elements of the weights that meet every token in a block."""
    width = config.model_width
    packed = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    return width * packed + width * width + 3 * width * config.ffn_width


# --- Activations ----------------------------------------------------------------------------------


def block_saved(config: TransformerConfig, numerics: Numerics) -> list[Saved]:
    """What autograd saves in a block for one image, in the order of `Block._forward`.

    The norms compute in float32 and save their input and its normalized form in it; a float32 stream is its own copy.
    Keys and queries are saved as rotated, the values as a view of the packed projection, which stays as a whole.
    """
    tokens, width, hidden = config.num_tokens, config.model_width, config.ffn_width
    stream, size = tokens * width, numerics.compute
    packed, rotated = ((config.num_heads + groups * config.num_kv_heads) * config.head_dim for groups in (2, 1))
    modulation = [Saved(name="modulation", bytes=size * 6 * width, dear=True)] if config.adaln else []
    if config.adaln and not config.shared_adaln:
        modulation.insert(0, Saved(name="ada_lin input", bytes=size * width))

    return [
        *modulation,
        *_norm_saved("attention_norm", config, numerics),
        Saved(name="wqkv output", bytes=size * tokens * packed, lies="channels", dear=True),
        Saved(name="rotated queries and keys", bytes=size * tokens * rotated, lies="channels"),
        Saved(name="attention output", bytes=size * stream, lies="channels", dear=True),
        Saved(name="log-sum-exp of scores", bytes=4 * tokens * config.num_heads, lies="channels", dear=True),
        *_end_saved("attention", config, numerics, config.residual_dropout),
        # Autocast rounds the float32 output for w1 and once more for w3: it remembers weights alone.
        *_norm_saved("ffn_norm", config, numerics, outputs=2 if numerics.casts and numerics.stream > size else 1),
        Saved(name="w1 output", bytes=size * tokens * hidden, lies="hidden", dear=True),
        Saved(name="silu", bytes=size * tokens * hidden, lies="hidden"),
        Saved(name="w3 output", bytes=size * tokens * hidden, lies="hidden", dear=True),
        Saved(name="gated", bytes=size * tokens * hidden, lies="hidden"),
        *_end_saved("feed_forward", config, numerics, config.ffn_dropout),
    ]


def _norm_saved(name: str, config: TransformerConfig, numerics: Numerics, outputs: int = 1) -> list[Saved]:
    """What an adaptive norm saves, and its output, rounded so many times, for the products after it."""
    tokens, width = config.num_tokens, config.model_width
    scale = [Saved(name=f"{name} scale, with and without weight", bytes=2 * 4 * width)] if config.adaln else []
    return [
        Saved(name=f"{name} input", bytes=4 * tokens * width, lies="tokens"),
        Saved(name=f"{name} normalized", bytes=4 * tokens * width, lies="tokens"),
        Saved(name=f"{name} 1 / rms", bytes=4 * tokens, lies="tokens"),
        *scale,
        Saved(name=f"{name} output", bytes=outputs * numerics.compute * tokens * width),
    ]


def _end_saved(name: str, config: TransformerConfig, numerics: Numerics, dropout: float) -> list[Saved]:
    """What the dropout and the gate at the end of a part of a block save."""
    stream, size = config.num_tokens * config.model_width, numerics.compute
    # The output is for the gate's gradient.
    output = [Saved(name=f"{name} output", bytes=size * stream, lies="tokens", dear=True)] if config.adaln else []
    if not dropout:
        return output
    return [Saved(name=f"{name} dropout mask", bytes=numerics.mask(size) * stream, lies="tokens"), *output]


def block_kept(config: TransformerConfig, numerics: Numerics, *, recomputed: bool) -> list[Saved]:
    """What stays of a block between its forward and its backward pass."""
    saved = block_saved(config, numerics)
    if not recomputed:
        return saved
    stream = config.num_tokens * config.model_width
    kept = [Saved(name="block input", bytes=numerics.stream * stream, lies="tokens")]
    if checkpointing(config) == "selective":
        kept += [tensor for tensor in saved if tensor.dear]
    return kept


def root_saved(config: TransformerConfig, numerics: Numerics) -> list[Saved]:
    """What autograd saves outside the blocks: before the first and in the final norm."""
    tokens, width = config.num_tokens, config.model_width
    stream, root = tokens * width, numerics.root
    mask = []
    if config.token_dropout:
        mask = [Saved(name="token dropout mask", bytes=numerics.mask(root) * stream)]
    orders = []
    if config.order == "random":
        orders = [
            Saved(name="places of the predicted codes", bytes=8 * tokens),
            Saved(name="rotations in the order of the codes", bytes=8 * tokens * config.head_dim // 2),
        ]
    # With an inner transformer, the digits of codes that are seen, of those before the sub-codes, and of the targets.
    parts, digits = (1, 2) if inner_config(config) is None else (len(config.digits), 3 * len(config.digits))
    adaptive = []
    if config.adaln:
        adaptive = [
            Saved(name="class embedding and its activation", bytes=(root + numerics.compute) * width),
            Saved(name="final norm scale, with and without weight", bytes=2 * 4 * width),
        ]
    return [
        *mask,
        *orders,
        Saved(name="codes", bytes=digits * 8 * tokens),
        *adaptive,
        Saved(name="final norm input", bytes=4 * stream * parts),
        Saved(name="final norm normalized", bytes=4 * stream * parts),
        Saved(name="final norm 1 / rms", bytes=4 * tokens * parts),
    ]


def head_saved(config: TransformerConfig, numerics: Numerics) -> list[Saved]:
    """What the head saves: of a lean one its input and two numbers a token, but no logits."""
    size = numerics.root if numerics.root == 2 or numerics.stream == 4 else numerics.stream
    return [Saved(name=name, bytes=size) for name, size in head_bytes(config, numerics.compute, size).items()]


def on_rank(saved: list[Saved], *, tensor: int = 1, hidden: int = 1, sequence: bool = False) -> float:
    """Bytes of one image on one of `tensor` ranks, of which `hidden` share the feed-forward part."""
    parts = {"channels": tensor, "hidden": hidden, "tokens": tensor if sequence else 1, "whole": 1}
    return sum(item.bytes / parts[item.lies] for item in saved)
