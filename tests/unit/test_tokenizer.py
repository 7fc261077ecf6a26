"""The tokenizer: memory formats, recomputation, precision, round trips and messages."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.models.vqgan import ResBlock
from ibq.ops import group_norm_silu
from ibq.quantizers import IBQConfig

CONFIG = TokenizerConfig(
    resolution=16,
    channels=32,
    channel_multipliers=(1, 2),
    res_blocks=1,
    attention_resolutions=(8,),
    latent_channels=8,
    quantizer=IBQConfig(num_codes=32, dim=4),
)


def build(**changes) -> Tokenizer:
    """The same weights whatever the changes."""
    torch.manual_seed(0)
    return Tokenizer(dataclasses.replace(CONFIG, **changes))


def draw_images(*size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(size or (2, 3, 16, 16), generator=generator) * 2 - 1


def gradients(tokenizer: Tokenizer, images: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)  # dropout
    out = tokenizer(images)
    loss = (out.reconstruction - images).abs().mean() + sum(out.losses.values())
    loss.backward()
    return {name: parameter.grad for name, parameter in tokenizer.named_parameters()}


def assert_same(actual: torch.Tensor, expected: torch.Tensor, relative: float, what: str = "") -> None:
    difference, largest = (float(value.detach().abs().max()) for value in (actual - expected, expected))
    assert difference <= relative * largest + 1e-12, f"{what}: {difference:.2e} of {largest:.2e}"


@pytest.mark.parametrize("selective", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_no_gradient(dropout: float, selective: bool):
    plain = gradients(build(dropout=dropout), draw_images())
    recomputation = {"gradient_checkpointing": True, "checkpoint_selective": selective}
    recomputed = gradients(build(dropout=dropout, **recomputation), draw_images())
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert gradient is not None, name
        assert torch.equal(gradient, recomputed[name]), name


def test_gradient_checkpointing_recomputes_every_resblock():
    """Counted by calls: once in the forward pass, once more in the backward pass."""
    # Recomputation stops at the last tensor that the backward pass needs: count the block's first module.
    tokenizer = build(gradient_checkpointing=True)
    calls = dict.fromkeys((n for n, _ in tokenizer.named_modules() if n.endswith("norm1")), 0)
    for name, module in tokenizer.named_modules():
        if name in calls:
            module.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    gradients(tokenizer, draw_images())
    assert calls and set(calls.values()) == {2}
    calls.update(dict.fromkeys(calls, 0))
    with torch.no_grad():
        tokenizer(draw_images())
    assert set(calls.values()) == {1}


def test_convolutions_with_hooks_are_called(monkeypatch):
    """Stage 3 of ZeRO has the weights of a convolution from NVMe when it is called: kernels may not take its place."""
    monkeypatch.setattr(group_norm_silu, "has_kernels", lambda x: True)
    block = ResBlock(32, 32, CONFIG)
    assert block._fuses(draw_images())
    for register in (block.conv1.register_forward_pre_hook, block.conv2.register_forward_hook):
        hook = register(lambda *_: None)
        assert not block._fuses(draw_images())
        hook.remove()


def test_what_is_compiled_does_not_look_for_kernels(monkeypatch):
    """PyTorch 2.11 does not trace the search for Triton, and left the graph in every block to run the kernels."""
    images = SimpleNamespace(
        is_cuda=True, dtype=torch.bfloat16, shape=(2, 32, 8, 8), is_contiguous=lambda memory_format: True
    )
    looked = []
    monkeypatch.setattr(group_norm_silu, "triton_is_installed", lambda: looked.append(True) or True)
    assert group_norm_silu.has_kernels(images) and looked.pop()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not group_norm_silu.has_kernels(images) and not looked


@pytest.mark.parametrize(("selective", "times"), [(False, 2), (True, 1)])
def test_selective_checkpointing_recomputes_no_convolution(selective: bool, times: int, monkeypatch):
    tokenizer = build(gradient_checkpointing=True, checkpoint_selective=selective)
    weight = tokenizer.decoder.mid.block_1.conv1.weight
    calls, convolve = [], torch.nn.functional.conv2d

    def counted(x, *others):
        result = convolve(x, *others)
        calls.extend([1] if others[0] is weight else [])
        return result

    monkeypatch.setattr(torch.nn.functional, "conv2d", counted)
    gradients(tokenizer, draw_images())
    assert len(calls) == times


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_channels_last_gives_the_same_results(dtype: torch.dtype):
    relative = 1e-4 if dtype == torch.float32 else 1e-10
    images = draw_images().to(dtype)
    plain, other = build().to(dtype), build().to(dtype, memory_format=torch.channels_last)
    expected = plain(images)
    actual = other(images.contiguous(memory_format=torch.channels_last))
    assert actual.reconstruction.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(actual.codes, expected.codes)
    assert_same(actual.reconstruction, expected.reconstruction, relative)
    for name, loss in expected.losses.items():
        assert_same(actual.losses[name], loss, relative, name)
    theirs = gradients(plain, images)
    ours = gradients(other, images.contiguous(memory_format=torch.channels_last))
    # Against the largest gradient of all: a bias ahead of a normalization has none but rounding.
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, gradient in theirs.items():
        assert float((ours[name] - gradient).abs().max()) <= relative * largest, name


@pytest.mark.parametrize("size", [(1, 3, 16, 16), (3, 3, 16, 16), (2, 3, 8, 20), (1, 3, 32, 6)])
def test_round_trip(size: tuple[int, ...]):
    tokenizer, images = build().eval(), draw_images(*size)
    with torch.no_grad():
        out = tokenizer(images)
        latents = tokenizer.encode_latents(images)
        quantized = tokenizer.quantizer(latents)
    codes = tokenizer.encode(images)
    assert codes.dtype == torch.int64
    assert codes.shape == (size[0], size[2] // tokenizer.downsampling, size[3] // tokenizer.downsampling)
    assert latents.shape == (size[0], CONFIG.quantizer.dim, *codes.shape[1:])
    assert torch.equal(codes, out.codes) and torch.equal(codes, quantized.codes)
    assert torch.equal(tokenizer.quantizer.lookup(codes), quantized.latents)
    assert out.reconstruction.shape == images.shape
    assert_same(tokenizer.decode(codes), out.reconstruction, 1e-5)
    assert_same(tokenizer.decode_latents(quantized.latents), out.reconstruction, 1e-5)
    assert out.losses.keys() == quantized.losses.keys() and out.metrics.keys() == quantized.metrics.keys()


@pytest.mark.parametrize("passthrough", [False, True])
def test_without_losses_it_is_the_same_reconstruction(passthrough: bool, monkeypatch):
    """What a discriminator's step is shown of several micro-batches; during the codebook's warm-up, too."""
    tokenizer, images = build(), draw_images()
    tokenizer.quantizer.passthrough = passthrough
    with torch.no_grad():
        whole = tokenizer(images)
        if not passthrough:
            monkeypatch.setattr(type(tokenizer.quantizer), "forward", lambda *_: pytest.fail("losses are computed"))
        alone = tokenizer(images, False)
    assert torch.equal(alone.codes, whole.codes) and (passthrough or not alone.losses)
    assert_same(alone.reconstruction, whole.reconstruction, 1e-5)


def test_codes_and_images_of_encode_and_decode_carry_no_graph():
    tokenizer = build()
    codes = tokenizer.encode(draw_images())
    assert not codes.requires_grad
    assert not tokenizer.decode(codes).requires_grad


def test_sizes():
    tokenizer = build()
    assert tokenizer.downsampling == CONFIG.downsampling == 2
    assert tokenizer.tokens_per_side == CONFIG.tokens_per_side == 8
    assert tokenizer.last_layer is tokenizer.decoder.conv_out.weight
    paper = TokenizerConfig()
    assert (paper.downsampling, paper.tokens_per_side) == (16, 16)
    assert [paper.has_attention(level) for level in range(5)] == [False] * 4 + [True]


@pytest.mark.parametrize("size", [(1, 3, 15, 16), (1, 3, 16, 17)])
def test_image_sizes_that_do_not_divide(size: tuple[int, ...]):
    for call in (build(), build().encode):
        with pytest.raises(ValueError, match=rf"multiples of 2, got {size[2]} x {size[3]}; crop or resize"):
            call(draw_images(*size))


@pytest.mark.parametrize("size", [(1, 1, 16, 16), (3, 16, 16)])
def test_images_of_another_shape(size: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"images must be \[B, 3, H, W\]"):
        build()(torch.zeros(size))


@pytest.mark.parametrize("code", [-1, CONFIG.quantizer.num_codes, 10**6])
def test_codes_out_of_range(code: int):
    codes = torch.zeros(1, 8, 8, dtype=torch.int64)
    codes[0, 3, 4] = code
    with pytest.raises(ValueError, match=f"{CONFIG.quantizer.num_codes} codes"):
        build().decode(codes)


def test_autocast_keeps_the_quantizer_in_float32():
    tokenizer, images = build().eval(), draw_images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latents = tokenizer.encode_latents(images)
        quantized = tokenizer.quantizer(latents)
        out, codes = tokenizer(images), tokenizer.encode(images)
    assert latents.dtype == torch.bfloat16
    assert quantized.latents.dtype == torch.float32
    expected = tokenizer.quantizer(latents.float())  # outside of autocast
    assert torch.equal(quantized.codes, expected.codes) and torch.equal(codes, expected.codes)
    for name, loss in expected.losses.items():
        assert quantized.losses[name].dtype == out.losses[name].dtype == torch.float32
        assert_same(quantized.losses[name], loss, 1e-6, name)
    assert out.reconstruction.dtype == torch.bfloat16


def test_autocast_gradients_reach_every_parameter():
    tokenizer = build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(tokenizer, draw_images())
    for name, gradient in found.items():
        assert gradient is not None and gradient.dtype == torch.float32, name
        assert bool(gradient.isfinite().all()) and float(gradient.abs().max()) > 0, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 48}, "^channels: .*32"),
        ({"resolution": 17}, "^resolution: .*multiple"),
        ({"resolution": 4, "channel_multipliers": (1,)}, "^resolution: .*at least 7"),
        ({"resolution": 0}, "^resolution: .*at least"),
        ({"in_channels": 0}, "^in_channels: .*at least 1"),
        ({"channels": 0}, "^channels: .*at least 1"),
        ({"channels": -32}, "^channels: .*at least 1"),
        ({"latent_channels": 0}, "^latent_channels: .*at least 1"),
        ({"norm_groups": 0}, "^norm_groups: .*at least 1"),
        ({"channel_multipliers": ()}, "^channel_multipliers: "),
        ({"channel_multipliers": (1, 0)}, "^channel_multipliers: "),
        ({"dropout": 1.0}, "^dropout: "),
        ({"res_blocks": 0}, "res_block|ResBlock"),
    ],
)
def test_settings_that_cannot_work(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)
