"""What a micro-batch of each stage puts on a GPU, in the form that `ibq.scaling.memory` walks through."""

from dataclasses import dataclass

from ibq.models.discriminator import DiscriminatorConfig
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.models.transformer import TransformerConfig
from ibq.scaling.heads import inner_config
from ibq.scaling.layouts import Layout, Training, numerics
from ibq.scaling.memory import Block, Network
from ibq.scaling.tokenizer import tokenizer_parts
from ibq.scaling.tokenizer_losses import (
    GramFeatures,
    discriminator_layers,
    feature_layers,
    gram_layers,
    perceptual_layers,
)
from ibq.scaling.transformer import (
    EXACT,
    Numerics,
    Weights,
    block_kept,
    block_saved,
    head_saved,
    on_rank,
    recomputed_blocks,
    root_saved,
    share_of,
    transformer_weights,
)

HEAD_WORKSPACE = 64 * 2**20  # bytes of the buffer of logit gradients on CUDA
HEAD_TILE = (2048, 512)  # codes and tokens of the lean head's tile of logits on the CPU


def transformer_network(config: TransformerConfig, layout: Layout, training: Training) -> Network:
    """A transformer on one rank."""
    values = numerics(layout, training)
    t, rows = layout.tensor, training.micro_batch
    weights = transformer_weights(config, t)
    blocks = _blocks(config, weights["block"], layout, training)
    if (inner := inner_config(config)) is not None:
        blocks += _blocks(inner, weights["inner"], layout, training)
    root = [part.local(t) for name, part in weights.items() if name not in ("block", "inner")]
    head = weights["head"].local(t)
    tokens = rows * config.num_tokens
    forward, backward = _head_working(config, values, tokens, head, t)
    return Network(
        blocks=blocks,
        root=sum(root),
        root_late=weights["embeddings"].local(t) + weights["shared"].local(t),
        root_products=(weights["shared"].products + weights["head_norm"].products) / t,
        root_saved=rows * on_rank(root_saved(config, values)),
        head_saved=rows * on_rank(head_saved(config, values)),
        head_forward=forward,
        head_backward=backward,
    )


def _blocks(config: TransformerConfig, weights: Weights, layout: Layout, training: Training) -> list[Block]:
    """The blocks of a transformer, outer or inner, on one rank."""
    values, t, rows = numerics(layout, training), layout.tensor, training.micro_batch
    share = {"tensor": t, "hidden": share_of(config.ffn_width, t), "sequence": layout.sequence}
    saved = rows * on_rank(block_saved(config, values), **share)
    working = rows * _block_working(config, layout, values)
    return [
        Block(
            elements=weights.local(t),
            products=weights.local_products(t),
            kept=rows * on_rank(block_kept(config, values, recomputed=recomputed), **share),
            saved=saved,
            working=working,
            recomputed=recomputed,
        )
        for recomputed in recomputed_blocks(config)
    ]


def _block_working(config: TransformerConfig, layout: Layout, values: Numerics) -> float:
    """Temporaries in a block's backward pass, at their most around the gated product: bytes of one image.

    The stream's gradient and that of the part's output, and the gradients of the product and of both its factors, less
    the output, its mask and the product itself, whose part is over.
    """
    stream = config.num_tokens * config.model_width
    hidden = config.num_tokens * config.ffn_width / share_of(config.ffn_width, layout.tensor)
    over = values.compute * stream + (values.mask(values.compute) * stream if config.ffn_dropout else 0)
    return values.stream * stream + values.compute * (stream + 2 * hidden) - over


def _head_working(
    config: TransformerConfig, values: Numerics, tokens: int, head: float, tensor: int
) -> tuple[float, float]:
    """Temporaries of the lean head: its input rounded and a tile; backward also both gradients in float32.

    Of a factorised one the largest part's; those of bits are small beside the blocks'.
    """
    stream, size = tokens * config.model_width, values.compute
    vocab = max(config.digits) / share_of(config.vocab_size, tensor)
    tile = min(vocab, HEAD_TILE[0]) * min(tokens, HEAD_TILE[1])
    if values.device == "cuda":
        tile = min(HEAD_WORKSPACE / size, tokens * vocab)
    # On CUDA the whole weight is rounded, on the CPU a slice of it.
    weight = head if values.device == "cuda" else min(head, 2048 * config.model_width)
    operands = 0.0 if size == 4 else size * (stream * (values.root == 4) + weight * (values.root == 4))
    buffers = (size + (4 if size == 2 else 0)) * tile
    returned = 0.0 if values.root == 4 else values.root * (stream + head)
    return operands + buffers, operands + buffers + size * tile + 4 * (stream + head) + returned


def frozen_tokenizer(config: TokenizerConfig, training: Training, *, decoder: bool = True) -> float:
    """Bytes of a tokenizer that only encodes: weights, autocast's copies, and the widest layer's maps in float32.

    Also the weights of its `decoder`, unless that is trained.
    """
    parts = [part for part in tokenizer_parts(config, EXACT) if decoder or not part.name.startswith("decoder")]
    weights = (4 + 2 * (training.precision == "bf16")) * sum(part.parameters for part in parts)
    return weights + training.micro_batch * max(part.working for part in parts)


@dataclass(frozen=True, kw_only=True)
class TokenizerLosses:
    """The networks beside the tokenizer: LPIPS and the discriminator, None where the loss is switched off."""

    discriminator: DiscriminatorConfig | None
    perceptual: bool
    gram: GramFeatures | None = None


def tokenizer_network(
    config: TokenizerConfig, losses: TokenizerLosses, layout: Layout, training: Training, *, trained: str = ""
) -> Network:
    """A tokenizer and its losses on one rank; the losses are the "head". The discriminator is on every rank whole.

    `trained`: how the names of the parts begin that are trained; the others are not in it.
    """
    values = numerics(layout, training)
    rows, recomputed = training.micro_batch, config.gradient_checkpointing
    parts = [part for part in tokenizer_parts(config, values) if part.name.startswith(trained)]
    units = [part for part in parts if part.inputs]
    rest = [part for part in parts if not part.inputs]
    blocks = [
        Block(
            elements=part.parameters,
            products=part.parameters,
            kept=rows * part.kept(recomputed),
            saved=rows * (part.kept(recomputed) + (part.largest if recomputed else 0)),
            working=rows * part.working,
            recomputed=recomputed,
        )
        for part in units
    ]
    beside = _losses(config, losses, layout, training)
    codebook = sum(part.parameters for part in parts if part.name == "quantizer")
    root = sum(part.parameters for part in rest)
    return Network(
        blocks=blocks,
        root=root,
        root_late=root - rest[-1].parameters,
        root_products=root - codebook,
        root_saved=rows * sum(part.kept(recomputed) for part in rest),
        **beside,
    )


def _losses(config: TokenizerConfig, losses: TokenizerLosses, layout: Layout, training: Training) -> dict[str, float]:
    """Bytes of LPIPS and of the discriminator, in its own step and frozen in the tokenizer's."""
    values, rows = numerics(layout, training), training.micro_batch
    autocast = 2 if training.precision == "bf16" else 0
    pixels = rows * config.resolution**2
    saved, extra = pixels * config.in_channels * (4 + 4 + values.compute), 0.0
    own_step = 0.0
    if losses.perceptual:
        layers = perceptual_layers(config.resolution, values)
        weights = sum(layer.parameters for layer in layers)
        saved += rows * sum(layer.saved for layer in layers) + autocast * weights
        extra += 4 * weights
    if losses.discriminator is not None:
        layers = discriminator_layers(losses.discriminator, config.resolution, values)
        weights = sum(layer.parameters for layer in layers)
        normalized = getattr(losses.discriminator, "spectral_norm", False)  # then float32 weights are copies too
        one = rows * sum(layer.saved for layer in layers) + (values.compute if normalized else autocast) * weights
        saved += one
        own_step = 2 * one + 4 * weights  # without what the frozen features pass through: it is not kept there
        frozen = feature_layers(losses.discriminator, values)
        frozen_weights = sum(layer.parameters for layer in frozen)
        saved += rows * sum(layer.saved for layer in frozen) + autocast * frozen_weights
        extra += 4 * frozen_weights
        # Weights and moments, a copy of both in case the step must be undone, and DDP's buckets.
        extra += (2 * (4 + training.moments) + (4 if layout.gpus > 1 else 0)) * weights
    if losses.gram is not None:
        layers = gram_layers(losses.gram, losses.discriminator, config.resolution, values)
        saved += rows * sum(layer.saved for layer in layers)
    return {
        "head_saved": saved,
        "head_forward": max(0.0, own_step - saved),
        "head_backward": 3 * 64 * pixels * values.compute,  # gradients of VGG's first maps
        "extra": extra,
    }
