"""Parameters, FLOPs and saved activations of a tokenizer, from its config alone.

A convolution of k x k from i to o channels that gives s x s pixels counts 2 k^2 i o s^2 FLOPs, in the backward pass
once more for the gradient of its weight and once more for that of its input; attention over S positions of C channels
counts 4 S^2 C and twice that. Everything else counts none, as in torch.utils.flop_counter.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from ibq.config import UserError
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.quantizers import IBQConfig, QuantizerConfig, SimVQConfig, VQConfig, build_quantizer
from ibq.scaling.transformer import EXACT, Flops, Numerics


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer, or a few that belong together, for one image."""

    parameters: int
    flops: int = 0  # of the forward pass
    saved: int = 0  # bytes
    inner: bool = False  # saved only where the ResBlock around it is not recomputed
    backward: int = 2  # forward passes that the backward pass counts: 1 where the input needs no gradient


@dataclass(frozen=True, kw_only=True)
class Part:
    """Layers whose weights are gathered together, and what a ResBlock needs on top while it is recomputed.

    Where recomputation is selective, each half of a ResBlock is recomputed by itself.
    """

    name: str
    layers: tuple[Layer, ...]
    inputs: int = 0  # bytes that recomputed ResBlocks keep
    largest: int = 0  # bytes of the largest recomputed ResBlock
    working: int = 0  # bytes of temporaries: three maps of the widest layer

    @property
    def parameters(self) -> int:
        """Elements of the weights."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def forward(self) -> int:
        """FLOPs of the forward pass."""
        return sum(layer.flops for layer in self.layers)

    @property
    def backward(self) -> int:
        """FLOPs of the backward pass."""
        return sum(layer.backward * layer.flops for layer in self.layers)

    @property
    def inside(self) -> int:
        """FLOPs of the forward passes of ResBlocks."""
        return sum(layer.flops for layer in self.layers if layer.inner)

    def kept(self, recomputed: bool) -> int:
        """Bytes between forward and backward pass."""
        if not recomputed:
            return sum(layer.saved for layer in self.layers)
        return self.inputs + sum(layer.saved for layer in self.layers if not layer.inner)


class _Walk:
    """Notes down the layers of one part in the order of the forward pass."""

    def __init__(self, config: TokenizerConfig, numerics: Numerics):
        self.config, self.size = config, numerics.compute
        self.cuda_bf16 = numerics.compute == 2 and numerics.device == "cuda"  # attention's norm gives float32 there
        self.mask = numerics.mask(numerics.compute)
        self.on_cpu = numerics.device == "cpu"
        self.layers: list[Layer] = []
        self.inputs = self.largest = self.working = 0

    def conv(self, inputs: int, outputs: int, kernel: int, side: int, **settings) -> None:
        self.working = max(self.working, 3 * self.size * side * side * max(inputs, outputs))
        weights = kernel * kernel * inputs * outputs
        self.layers.append(Layer(parameters=weights + outputs, flops=2 * weights * side * side, **settings))

    def norm_silu_conv(
        self, inputs: int, outputs: int, side: int, *, inner: bool = False, dropout: float = 0.0
    ) -> None:
        """GroupNorm, SiLU and a 3 x 3 convolution: each saves its input; the first two are one on CUDA."""
        pixels = inputs * side * side
        maps, statistics = (2, 4 * inputs) if self.cuda_bf16 else (3, 2 * self.config.norm_groups)
        saved = maps * self.size * pixels + 4 * statistics + (self.mask * pixels if dropout else 0)
        self.layers.append(Layer(parameters=2 * inputs))
        self.conv(inputs, outputs, 3, side, saved=saved, inner=inner)

    def res_block(self, inputs: int, outputs: int, side: int) -> None:
        first, selective = len(self.layers), self.config.checkpoint_selective
        self.norm_silu_conv(inputs, outputs, side, inner=True)
        second = len(self.layers)
        self.norm_silu_conv(outputs, outputs, side, inner=True, dropout=self.config.dropout)
        if inputs != outputs:
            self.conv(inputs, outputs, 1, side, inner=not selective)  # its input is that of the norm
        self.inputs += self.size * (inputs + (outputs if selective else 0)) * side * side
        together = [self.layers[first:second], self.layers[second:]] if selective else [self.layers[first:]]
        self.largest = max(self.largest, *(sum(layer.saved for layer in part if layer.inner) for part in together))

    def attention(self, channels: int, side: int) -> None:
        positions = side * side
        pixels, size = channels * positions, self.size
        # q, k and v each round the float32 output of the norm.
        normed = 4 + 3 * 2 if self.cuda_bf16 else 2 * size
        inside = 4 * positions  # of the fused form: a number for each row of scores
        saved = (normed + 4 * size) * pixels + inside + 2 * 4 * self.config.norm_groups
        self.layers.append(Layer(parameters=2 * channels, flops=4 * positions * positions * channels, saved=saved))
        for _ in range(4):
            self.conv(channels, channels, 1, side)

    def level(self, inputs: int, outputs: int, blocks: int, side: int, *, attention: bool) -> None:
        for number in range(blocks):
            self.res_block(inputs if number == 0 else outputs, outputs, side)
            if attention:
                self.attention(outputs, side)

    def middle(self, channels: int, side: int) -> None:
        self.res_block(channels, channels, side)
        self.attention(channels, side)
        self.res_block(channels, channels, side)

    def part(self, name: str) -> Part:
        """What was noted since the last part."""
        part = Part(
            name=name, layers=tuple(self.layers), inputs=self.inputs, largest=self.largest, working=self.working
        )
        self.layers, self.inputs, self.largest, self.working = [], 0, 0, 0
        return part


def tokenizer_parts(config: TokenizerConfig, numerics: Numerics) -> list[Part]:
    """The tokenizer in the order of its forward pass; names are `encoder...`, `quantizer...` and `decoder...`.

    UserError for a network that these formulas are not about.
    """
    if config.network != "vqgan":
        raise UserError(f"network: {config.network} cannot be planned; its layers are not VQGAN's: measure a run")
    return [*_encoder(config, numerics), _quantizer(config, numerics), *_decoder(config, numerics)]


def _encoder(config: TokenizerConfig, numerics: Numerics) -> Iterator[Part]:
    walk = _Walk(config, numerics)
    widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
    side, previous, size = config.resolution, config.channels, numerics.compute
    image = config.in_channels * side * side
    walk.conv(config.in_channels, config.channels, 3, side, saved=size * image, backward=1)
    yield walk.part("encoder.conv_in")
    for level, width in enumerate(widths):
        walk.level(previous, width, config.res_blocks, side, attention=config.has_attention(level))
        if level < len(widths) - 1:
            walk.conv(width, width, 3, side // 2, saved=size * width * (side + 1) ** 2)
            side //= 2
        previous = width
        yield walk.part(f"encoder.down.{level}")
    walk.middle(previous, side)
    yield walk.part("encoder.mid")
    walk.norm_silu_conv(previous, config.latent_channels, side)
    dim = config.quantizer.dim
    walk.conv(config.latent_channels, dim, 1, side, saved=size * config.latent_channels * side * side)
    yield walk.part("encoder.conv_out, quant_conv")


def _decoder(config: TokenizerConfig, numerics: Numerics) -> Iterator[Part]:
    walk = _Walk(config, numerics)
    widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
    side, size = config.tokens_per_side, numerics.compute
    # The quantizer's latents are saved already, but in another precision, and on a CPU in another order.
    copied = size if numerics.casts or numerics.device == "cpu" else 0
    walk.conv(config.quantizer.dim, config.latent_channels, 1, side, saved=copied * config.quantizer.dim * side * side)
    walk.conv(config.latent_channels, widths[-1], 3, side, saved=size * config.latent_channels * side * side)
    yield walk.part("decoder.conv_in, post_quant_conv")
    walk.middle(widths[-1], side)
    yield walk.part("decoder.mid")
    previous = widths[-1]
    for level in reversed(range(len(widths))):
        width, attention = widths[level], config.has_attention(level)
        walk.level(previous, width, config.res_blocks + 1, side, attention=attention)
        if level > 0:
            side *= 2
            walk.conv(width, width, 3, side, saved=size * width * side * side)
        previous = width
        yield walk.part(f"decoder.up.{level}")
    walk.norm_silu_conv(previous, config.in_channels, side)
    yield walk.part("decoder.conv_out")


# --- Quantizer ------------------------------------------------------------------------------------


@lru_cache
def quantizer_parameters(config: QuantizerConfig) -> int:
    """Trained elements: the codebook, if there is one, and the projector."""
    with torch.device("meta"):  # shapes are enough
        return sum(parameter.numel() for parameter in build_quantizer(config).parameters())


def quantizer_flops(config: QuantizerConfig, tokens: int) -> Flops:
    """FLOPs of quantizing `tokens` vectors of D channels with K codes, without a projector.

    IBQ's textbook form (`ibq.ops.textbook`): the logits, the straight-through and the hard selection, 2 N K D each, so
    6 N K D forward; backward 10 N K D: both operands of the first two products and the codebook of the third. The lean
    form looks rows up and needs 2 N K D forward and 8 N K D backward, of which 2 N K D are the logits once more: less
    than the textbook form, so nothing counts as recomputed. Other kinds: the search for the nearest code.
    """
    if not isinstance(config, IBQConfig | VQConfig | SimVQConfig):
        return Flops(forward=0, backward=0)
    product = 2 * tokens * config.num_codes * config.dim
    if isinstance(config, IBQConfig):
        return Flops(forward=3 * product, backward=5 * product)
    return Flops(forward=product, backward=0)


def _quantizer(config: TokenizerConfig, numerics: Numerics) -> Part:
    """Tokens, selected rows and latents in float32, and a few numbers a token."""
    quantizer = config.quantizer
    tokens = config.tokens_per_side**2
    vectors = 3 if isinstance(quantizer, IBQConfig) else 2
    vectors += getattr(quantizer, "l2_normalize", False)
    saved = vectors * 4 * tokens * quantizer.dim + 32 * tokens
    flops = quantizer_flops(quantizer, tokens)
    layer = Layer(parameters=quantizer_parameters(quantizer), saved=saved)
    forward = Layer(parameters=0, flops=flops.forward, backward=0)
    return Part(name="quantizer", layers=(layer, forward))


# --- Together -------------------------------------------------------------------------------------


def tokenizer_flops(config: TokenizerConfig) -> Flops:
    """FLOPs of one image through the tokenizer; `recomputed` are the ResBlocks with gradient checkpointing.

    Selective recomputation has no convolution in it.
    """
    whole_blocks = config.gradient_checkpointing and not config.checkpoint_selective
    parts = tokenizer_parts(config, EXACT)
    quantizer = quantizer_flops(config.quantizer, config.tokens_per_side**2)
    return Flops(
        forward=sum(part.forward for part in parts),
        backward=sum(part.backward for part in parts) + quantizer.backward,
        recomputed=sum(part.inside for part in parts) if whole_blocks else 0,
    )


def decoder_flops(config: TokenizerConfig) -> Flops:
    """The same where the decoder is trained alone, on codes: the rest looks for codes, and has no backward pass."""
    parts = tokenizer_parts(config, EXACT)
    decoder = [part for part in parts if part.name.startswith("decoder")]
    quantizer = quantizer_flops(config.quantizer, config.tokens_per_side**2)
    more = quantizer.forward * 2 // 3 if isinstance(config.quantizer, IBQConfig) else 0  # than the search
    first = decoder[0].layers[0].flops  # whose input needs no gradient
    return Flops(
        forward=sum(part.forward for part in parts) - more,
        backward=sum(part.backward for part in decoder) - first,
        recomputed=sum(part.inside for part in decoder) if tokenizer_flops(config).recomputed else 0,
    )
