"""Parameters, FLOPs and saved activations of the networks of a tokenizer's losses; counted as in `tokenizer.py`."""

from dataclasses import replace
from functools import lru_cache
from typing import Literal

import torch

from ibq.models.discriminator import DiscriminatorConfig, PatchDiscriminatorConfig
from ibq.models.feature_discriminator import FeaturesDiscriminatorConfig
from ibq.models.vision_transformer import VisionTransformer
from ibq.scaling.tokenizer import Layer
from ibq.scaling.transformer import EXACT, Flops, Numerics

GramFeatures = Literal["perceptual", "discriminator"]  # whose Gram matrices a loss compares
# LPIPS: the channels of VGG-16's convolutions before each tap; a 2 x 2 pooling lies between two of them.
VGG_TAPS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


# --- Discriminators -------------------------------------------------------------------------------


def discriminator_layers(config: DiscriminatorConfig, resolution: int, numerics: Numerics) -> list[Layer]:
    """What is trained of a discriminator."""
    match config:
        case PatchDiscriminatorConfig():
            return _patch_layers(config, resolution, numerics)
        case FeaturesDiscriminatorConfig():
            return _head_layers(config, numerics)


def feature_layers(config: DiscriminatorConfig, numerics: Numerics) -> list[Layer]:
    """What is frozen of it: a backbone through which gradients go to the pixels; augmentation counts nothing."""
    return _backbone_layers(config, numerics) if isinstance(config, FeaturesDiscriminatorConfig) else []


def _patch_layers(config: PatchDiscriminatorConfig, resolution: int, numerics: Numerics) -> list[Layer]:
    """Convolutions of 4 x 4: each saves its input, as do the norms and activations."""
    size = numerics.compute
    widths = [config.channels * min(2**layer, 8) for layer in range(config.layers + 1)]
    side, previous, layers = resolution // 2, 3, []
    for number, width in enumerate(widths):
        if number:
            side = side // 2 if number < config.layers else side - 1
        weights = 16 * previous * width
        # The convolution's input, and what the norm and the activation after it save.
        entering = size * 3 * resolution**2 if number == 0 else 0
        maps = 2 if number == 0 else 3
        layers.append(
            Layer(
                parameters=weights + (width if number == 0 else 2 * width),
                flops=2 * weights * side * side,
                saved=entering + maps * size * width * side * side,
                backward=1 if number == 0 else 2,
            )
        )
        previous = width
    side -= 1
    layers.append(Layer(parameters=16 * previous + 1, flops=2 * 16 * previous * side * side))
    return layers


def _head_layers(config: FeaturesDiscriminatorConfig, numerics: Numerics) -> list[Layer]:
    """Each convolution saves its input, the norms that in float32, the activations theirs."""
    size, places, width, inputs = numerics.compute, config.patches, config.width, config.transformer.width
    normed = (4 + size) * width * places
    head = [
        Layer(
            parameters=inputs * width + 3 * width,
            flops=2 * inputs * width * places,
            saved=size * inputs * places + normed,
            backward=1,
        ),
        Layer(
            parameters=config.kernel * width * width + 3 * width,
            flops=2 * config.kernel * width * width * places,
            saved=size * width * (places + config.kernel - 1) + normed,
        ),
        Layer(parameters=width + 1, flops=2 * width * places, saved=size * width * places),
    ]
    return head * len(config.layers)


@lru_cache
def _backbone_parameters(config: FeaturesDiscriminatorConfig) -> int:
    with torch.device("meta"):  # shapes are enough
        backbone = VisionTransformer(config.transformer)
        backbone.fit(config.side)
    return sum(parameter.numel() for parameter in backbone.parameters())


def _backbone_layers(config: FeaturesDiscriminatorConfig, numerics: Numerics) -> list[Layer]:
    """Norms save their input in float32, attention what it reads and gives, GELU its input; products nothing."""
    of, size = config.transformer, numerics.compute
    tokens, pixels = config.patches + 1 + of.registers, 3 * of.patch**2 * config.patches
    maps = tokens * of.width
    block = [
        Layer(parameters=0, flops=24 * maps * of.width, saved=(2 * 4 + 4 * size) * maps + 16 * tokens, backward=1),
        Layer(parameters=0, flops=4 * tokens * maps, saved=4 * size * maps + 4 * of.heads * tokens),
    ]
    first = Layer(
        parameters=_backbone_parameters(config),
        flops=2 * pixels * of.width,
        saved=size * 3 * config.side**2,
        backward=1,
    )
    return [first, *block * max(config.layers)]


def discriminator_flops(config: DiscriminatorConfig, resolution: int) -> Flops:
    """FLOPs of one image: real and reconstruction in its own step, and the reconstruction, frozen, in the tokenizer's.

    In its own step the input of the first convolution, or of each head's, needs no gradient, and frozen features have
    none; frozen, every convolution's input does, and no weight.
    """
    layers, seen = discriminator_layers(config, resolution, EXACT), feature_layers(config, EXACT)
    forward = sum(layer.flops for layer in layers)
    own = sum(layer.backward * layer.flops for layer in layers)
    through = sum(layer.backward * layer.flops for layer in seen)
    return Flops(forward=3 * (forward + sum(layer.flops for layer in seen)), backward=2 * own + forward + through)


# --- LPIPS and Gram matrices ----------------------------------------------------------------------


def perceptual_layers(resolution: int, numerics: Numerics) -> list[Layer]:
    """VGG-16 up to its last tap, and what LPIPS does with each tap, for the reconstruction."""
    size = numerics.compute
    promoted = numerics.compute == 2 and numerics.device == "cuda"  # squares in float32
    side, previous = resolution, 3
    layers = [Layer(parameters=0, saved=size * 3 * side * side)]
    for number, widths in enumerate(VGG_TAPS):
        if number:
            side //= 2
            layers.append(Layer(parameters=0, saved=(8 + size) * previous * side * side))  # indices and values
        for width in widths:
            weights = 9 * previous * width
            layers.append(
                Layer(
                    parameters=weights + width,
                    flops=2 * weights * side * side,
                    saved=size * width * side * side,
                    backward=1,
                )
            )
            previous = width
        pixels = previous * side * side
        tap = (4 + 4 + 2) if promoted else 2 * size
        layers.append(Layer(parameters=previous, flops=2 * pixels, saved=tap * pixels, backward=1))
    return layers


def perceptual_flops(resolution: int) -> Flops:
    """FLOPs of LPIPS for one image: VGG on image and reconstruction, and the gradient of the latter's pixels."""
    layers = perceptual_layers(resolution, EXACT)
    taps = sum(2 * widths[-1] * (resolution // 2**number) ** 2 for number, widths in enumerate(VGG_TAPS))
    vgg = sum(layer.flops for layer in layers) - taps
    return Flops(forward=2 * vgg + taps, backward=vgg + taps)


def gram_layers(
    features: GramFeatures, discriminator: DiscriminatorConfig | None, resolution: int, numerics: Numerics
) -> list[Layer]:
    """Another pass of the reconstruction through the features' network, and the products of channels."""
    if features == "perceptual":
        passes = perceptual_layers(resolution, numerics)
        shapes = [(widths[-1], (resolution // 2**number) ** 2) for number, widths in enumerate(VGG_TAPS)]
    else:
        passes = feature_layers(discriminator, numerics)
        shapes = [(discriminator.transformer.width, discriminator.patches)] * len(discriminator.layers)
    products = [
        Layer(parameters=0, flops=2 * width**2 * places, saved=2 * 4 * width * places) for width, places in shapes
    ]
    return [*(replace(layer, parameters=0) for layer in passes), *products]


def gram_flops(features: GramFeatures, discriminator: DiscriminatorConfig | None, resolution: int) -> Flops:
    """FLOPs of one image: both images' features and matrices, and the gradient of the reconstruction's pixels."""
    layers = gram_layers(features, discriminator, resolution, EXACT)
    return Flops(
        forward=2 * sum(layer.flops for layer in layers), backward=sum(layer.backward * layer.flops for layer in layers)
    )
