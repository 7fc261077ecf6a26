"""Published tokenizers written out by tensor names, independently of this project's networks and renaming."""

import re
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ibq.interop import seed_voken
from ibq.interop.lightning_tokenizer import DISCRIMINATOR, EMA, TokenizerParts, Weights, is_buffer, without_dots
from ibq.interop.seed_voken_transformer import transformer_of

State = dict[str, Tensor]


class Names:
    """Collects tensors of random numbers under the names of a published checkpoint."""

    def __init__(self, seed: int = 0):
        self.state: State = {}
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, name: str, *shape: int) -> None:
        scale = 1.0 if len(shape) < 2 else (shape[1] * (9 if len(shape) == 4 and shape[2] == 3 else 1)) ** -0.5
        self.state[name] = torch.randn(shape, generator=self.generator) * scale

    def layer(self, name: str, *shape: int, bias: bool = True) -> None:
        self.add(f"{name}.weight", *shape)
        if bias:
            self.add(f"{name}.bias", shape[0])

    def norm(self, name: str, channels: int) -> None:
        self.layer(name, channels)

    def res_block(self, name: str, before: int, after: int, bias: bool = True) -> None:
        self.norm(f"{name}.norm1", before)
        self.layer(f"{name}.conv1", after, before, 3, 3, bias=bias)
        self.norm(f"{name}.norm2", after)
        self.layer(f"{name}.conv2", after, after, 3, 3, bias=bias)
        if before != after:
            self.layer(f"{name}.nin_shortcut", after, before, 1, 1, bias=bias)

    def attention(self, name: str, channels: int) -> None:
        self.norm(f"{name}.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            self.layer(f"{name}.{part}", channels, channels, 1, 1)


class Computes:
    """Layers that take their weights from a checkpoint by name."""

    def __init__(self, state: State):
        self.state = state

    def conv(self, x: Tensor, name: str, **options) -> Tensor:
        return F.conv2d(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"), **options)

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-6)

    def res_block(self, x: Tensor, name: str) -> Tensor:
        h = self.conv(F.silu(self.norm(x, f"{name}.norm1")), f"{name}.conv1", padding=1)
        h = self.conv(F.silu(self.norm(h, f"{name}.norm2")), f"{name}.conv2", padding=1)
        has_shortcut = f"{name}.nin_shortcut.weight" in self.state
        return h + (self.conv(x, f"{name}.nin_shortcut") if has_shortcut else x)

    def attention(self, x: Tensor, name: str) -> Tensor:
        h = self.norm(x, f"{name}.norm")
        q, k, v = (self.conv(h, f"{name}.{part}").flatten(2) for part in "qkv")
        weights = torch.einsum("bci,bcj->bij", q, k).mul(x.shape[1] ** -0.5).softmax(dim=2)
        return x + self.conv(torch.einsum("bij,bcj->bci", weights, v).view_as(x), f"{name}.proj_out")

    def count(self, pattern: str) -> int:
        return 1 + max((int(m[1]) for name in self.state if (m := re.match(pattern, name))), default=-1)

    def out(self, x: Tensor, part: str, **options) -> Tensor:
        return self.conv(F.silu(self.norm(x, f"{part}.norm_out")), f"{part}.conv_out", **options)


# --- LlamaGen: tokenizer/tokenizer_image/vq_model.py of its repository, commit ce98ec41803a ---


def llamagen_state(multipliers: tuple[int, ...], codes: int = 64, dim: int = 8, channels: int = 128) -> State:
    """All tensors of a VQ-8 or VQ-16 with these widths."""
    names, widths, latent = Names(), [channels * m for m in multipliers], 256
    names.layer("encoder.conv_in", channels, 3, 3, 3)
    names.layer("decoder.conv_in", widths[-1], latent, 3, 3)
    last = len(widths) - 1
    for part, order, blocks, previous in (
        ("encoder", widths, 2, channels),
        ("decoder", widths[::-1], 3, widths[-1]),
    ):
        for place, width in enumerate(order):
            for number in range(blocks):
                names.res_block(f"{part}.conv_blocks.{place}.res.{number}", previous, width)
                previous = width
                if place == (last if part == "encoder" else 0):
                    names.attention(f"{part}.conv_blocks.{place}.attn.{number}", width)
            if place != last:
                step = "downsample" if part == "encoder" else "upsample"
                names.layer(f"{part}.conv_blocks.{place}.{step}.conv", width, width, 3, 3)
        names.res_block(f"{part}.mid.0", widths[-1], widths[-1])
        names.attention(f"{part}.mid.1", widths[-1])
        names.res_block(f"{part}.mid.2", widths[-1], widths[-1])
        names.norm(f"{part}.norm_out", order[-1])
    names.layer("encoder.conv_out", latent, widths[-1], 3, 3)
    names.layer("decoder.conv_out", 3, channels * multipliers[0], 3, 3)
    names.add("quantize.embedding.weight", codes, dim)
    names.state["quantize.codebook_used"] = torch.zeros(65_536)
    names.layer("quant_conv", dim, latent, 1, 1)
    names.layer("post_quant_conv", latent, dim, 1, 1)
    return names.state


def llamagen_reconstruction(state: State, images: Tensor) -> tuple[Tensor, Tensor]:
    """(codes [B, h, w], images) of LlamaGen's tokenizer."""
    net = Computes(state)

    def walk(x: Tensor, part: str, middle_first: bool) -> Tensor:
        def middle(x: Tensor) -> Tensor:
            x = net.res_block(x, f"{part}.mid.0")
            return net.res_block(net.attention(x, f"{part}.mid.1"), f"{part}.mid.2")

        x = net.conv(x, f"{part}.conv_in", padding=1)
        x = middle(x) if middle_first else x
        for level in range(net.count(rf"{part}\.conv_blocks\.(\d+)\.")):
            name = f"{part}.conv_blocks.{level}"
            for number in range(net.count(rf"{name}\.res\.(\d+)\.")):
                x = net.res_block(x, f"{name}.res.{number}")
                if f"{name}.attn.{number}.q.weight" in state:
                    x = net.attention(x, f"{name}.attn.{number}")
            if f"{name}.downsample.conv.weight" in state:
                x = net.conv(F.pad(x, (0, 1, 0, 1)), f"{name}.downsample.conv", stride=2)
            if f"{name}.upsample.conv.weight" in state:
                x = net.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), f"{name}.upsample.conv", padding=1)
        return net.out(x if middle_first else middle(x), part, padding=1)

    latents = net.conv(walk(images, "encoder", False), "quant_conv")
    codebook = F.normalize(state["quantize.embedding.weight"], dim=1)
    codes = torch.einsum("bdhw,kd->bhwk", F.normalize(latents, dim=1), codebook).argmax(dim=3)
    return codes, walk(net.conv(codebook[codes].permute(0, 3, 1, 2), "post_quant_conv"), "decoder", True)


# --- Open-MAGVIT2: modules/diffusionmodules/improved_model.py of its repository, commit 21e1f93e14b5 ---


def open_magvit2_state(multipliers: tuple[int, ...], bits: int, blocks: int, channels: int) -> State:
    """All tensors of an encoder and a decoder with these widths."""
    names, widths = Names(1), [channels * m for m in multipliers]
    names.layer("encoder.conv_in", channels, 3, 3, 3, bias=False)
    previous = channels
    for level, width in enumerate(widths):
        for number in range(blocks):
            names.res_block(f"encoder.down.{level}.block.{number}", previous, width, bias=False)
            previous = width
        if level < len(widths) - 1:
            names.layer(f"encoder.down.{level}.downsample", width, width, 3, 3)
    names.layer("decoder.conv_in", previous, bits, 3, 3)
    for part in ("encoder", "decoder"):
        for number in range(blocks):
            names.res_block(f"{part}.mid_block.{number}", previous, previous, bias=False)
    for level in reversed(range(len(widths))):
        for leaf in ("gamma", "beta"):
            names.layer(f"decoder.adaptive.{level}.{leaf}", previous, bits)
        for number in range(blocks):
            names.res_block(f"decoder.up.{level}.block.{number}", previous, widths[level], bias=False)
            previous = widths[level]
        if level > 0:
            names.layer(f"decoder.up.{level}.upsample.conv1", 4 * previous, previous, 3, 3)
    names.norm("encoder.norm_out", widths[-1])
    names.layer("encoder.conv_out", bits, widths[-1], 1, 1)
    names.norm("decoder.norm_out", widths[0])
    names.layer("decoder.conv_out", 3, widths[0], 3, 3)
    return names.state


def open_magvit2_reconstruction(state: State, images: Tensor) -> tuple[Tensor, Tensor]:
    """(codes [B, h, w], images) of Open-MAGVIT2's tokenizer."""
    net = Computes(state)

    def blocks(x: Tensor, name: str) -> Tensor:
        for number in range(net.count(rf"{name}\.(\d+)\.")):
            x = net.res_block(x, f"{name}.{number}")
        return x

    x = net.conv(images, "encoder.conv_in", padding=1)
    levels = net.count(r"encoder\.down\.(\d+)\.")
    for level in range(levels):
        x = blocks(x, f"encoder.down.{level}.block")
        if level < levels - 1:
            x = net.conv(x, f"encoder.down.{level}.downsample", stride=2, padding=1)
    latents = net.out(blocks(x, "encoder.mid_block"), "encoder")
    bits = latents > 0
    codes = (bits * 2 ** torch.arange(bits.shape[1])[:, None, None]).sum(dim=1)
    z = bits * 2.0 - 1.0
    x = blocks(net.conv(z, "decoder.conv_in", padding=1), "decoder.mid_block")
    flat = z.flatten(2)
    for level in reversed(range(levels)):
        scale = F.linear((flat.var(dim=2) + 1e-6).sqrt(), *_linear(state, f"decoder.adaptive.{level}.gamma"))
        shift = F.linear(flat.mean(dim=2), *_linear(state, f"decoder.adaptive.{level}.beta"))
        x = F.group_norm(x, 32, eps=1e-6) * scale[:, :, None, None] + shift[:, :, None, None]
        x = blocks(x, f"decoder.up.{level}.block")
        if level > 0:
            x = net.conv(x, f"decoder.up.{level}.upsample.conv1", padding=1)
            # Channel 4 blocks of C: block (i, j) is the pixel in row i and column j of every 2 x 2 square.
            squares = x.unflatten(1, (2, 2, -1))
            x = torch.einsum("bijchw->bchiwj", squares).flatten(4, 5).flatten(2, 3)
    return codes, net.out(x, "decoder", padding=1)


def _linear(state: State, name: str) -> tuple[Tensor, Tensor]:
    return state[f"{name}.weight"], state[f"{name}.bias"]


# --- What goes around a tokenizer in a Lightning checkpoint ---


def patch_discriminator_state(channels: int = 64, layers: int = 3) -> State:
    """The discriminator of most published tokenizers, without its prefix."""
    names, width, place = Names(2), channels, 2
    names.layer("main.0", channels, 3, 4, 4)
    for number in range(1, layers + 1):
        previous, width = width, channels * min(2**number, 8)
        names.layer(f"main.{place}", width, previous, 4, 4, bias=False)
        names.norm(f"main.{place + 1}", width)
        names.add(f"main.{place + 1}.running_mean", width)
        names.state[f"main.{place + 1}.running_var"] = torch.rand(width) + 0.5
        names.state[f"main.{place + 1}.num_batches_tracked"] = torch.tensor(7)
        place += 3
    names.layer(f"main.{place}", 1, width, 4, 4)
    return names.state


def blurring_discriminator_state(channels: int = 32, stages: int = 3) -> State:
    """The discriminator with blurred downsampling of the text-to-image tokenizers, without its prefix."""
    names, width = Names(3), channels
    names.layer("block_in.0", channels, 3, 5, 5)
    for number in range(stages):
        previous, width = width, channels * 2**number
        names.layer(f"blocks.{number}.0", width, previous, 3, 3)
        names.state[f"blocks.{number}.1.kernel"] = torch.ones(1, 1, 4, 4) / 16
        names.norm(f"blocks.{number}.2", width)
    names.layer("to_logits.0", width, width, 1, 1)
    names.layer("to_logits.2", 1, width, 5, 5)
    return names.state


def lightning_state(network: State, discriminator: State) -> State:
    """A whole `state_dict`: the network, the discriminator, and averages that differ from both."""
    state = network | {f"loss.discriminator.{name}": value for name, value in discriminator.items()}
    buffers = ("running_mean", "running_var", "num_batches_tracked", "kernel")
    trained = [name for name in state if not name.endswith(buffers)]
    state |= {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(-1, dtype=torch.int32)}
    return state | {"model_ema." + name.replace(".", ""): state[name] * 0.9 for name in trained}


# --- The tensors of SEED-Voken's checkpoints under our names, without a configuration ---


def read_tokenizer(path: str | Path, weights: Weights = "ema") -> State:
    """For `Tokenizer.load_state_dict(strict=True)`."""
    parts = seed_voken.IMPLEMENTATION.split(seed_voken.read_state(path), str(path))
    return seed_voken._our_names(parts.chosen(weights, str(path)))


def read_transformer(path: str | Path) -> State:
    """For `Transformer.load_state_dict(strict=True)`."""
    return transformer_of(seed_voken.read_state(path), str(path))


def read_discriminator(path: str | Path, weights: Weights = "raw") -> State:
    """For `PatchDiscriminator.load_state_dict(strict=True)`."""
    parts = seed_voken.IMPLEMENTATION.split(seed_voken.read_state(path), str(path))
    return discriminator_of(parts, weights, str(path))


def discriminator_of(parts: TokenizerParts, weights: Weights, source: str) -> State:
    """BatchNorm's statistics exist only once, for both sets of weights."""
    if not parts.discriminator:
        raise ValueError(f"{source}: has no discriminator ({DISCRIMINATOR}*); use a tokenizer checkpoint from training")
    if weights == "raw":
        return dict(parts.discriminator)
    if not parts.averages:
        raise ValueError(f"{source}: has no averaged weights ({EMA}*); use weights='raw'")
    return {
        name: value if is_buffer(name) else parts.averages[without_dots(DISCRIMINATOR + name)]
        for name, value in parts.discriminator.items()
    }
