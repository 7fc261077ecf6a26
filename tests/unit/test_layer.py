"""Layers against the quantizers that configs build; under DDP, FSDP2 and torch.compile: process/test_layer_wrappers."""

import copy
import re

import pytest
import torch
from support import ROOT
from support.layers import LAYERS, Model, batches, layer
from torch import Tensor

from ibq.quantizers import FSQ, IBQ, LFQ, VQ, AsVectorQuantize, IBQConfig, build_quantizer

# What `channels` is, and the shape of an input with 4 channels.
LAYOUTS = {
    "[N, D]": (None, (6, 4)),
    "[B, N, D]": (None, (2, 6, 4)),
    "[B, D, h, w]": (None, (2, 4, 3, 5)),
    "[B, D, t, h, w]": (None, (2, 4, 2, 3, 1)),
    "[B, D, T]": ("first", (2, 4, 6)),
    "[B, h, w, D]": ("last", (2, 3, 5, 4)),
    "[B, N, D], N = D": (None, (2, 4, 4)),
    "[B, D, T], T = D": ("first", (2, 4, 4)),
}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=LAYERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(name: str, layout: str):
    """The same tokens as an image [1, D, N, 1] in the quantizer of a tokenizer, which has the same weights."""
    channels, shape = LAYOUTS[layout]
    own = layer(name, channels=channels)
    plain = build_quantizer(own.config)
    plain.load_state_dict(own.state_dict(), strict=True)
    z = draw(*shape).requires_grad_()
    axis = 1 if channels == "first" or (channels is None and len(shape) > 3) else len(shape) - 1
    image = z.detach().movedim(axis, -1).reshape(1, -1, 1, 4).movedim(-1, 1).requires_grad_()
    out, expected = own(z), plain(image)
    assert out.latents.shape == shape and out.codes.shape == shape[:axis] + shape[axis + 1 :]
    assert torch.equal(out.latents.movedim(axis, -1).flatten(0, -2), expected.latents[0, ..., 0].t())
    assert torch.equal(out.codes.flatten(), expected.codes.flatten())
    assert out.losses == expected.losses and out.metrics == expected.metrics
    assert torch.equal(own.encode(z), out.codes) and torch.equal(own.lookup(out.codes), out.latents)
    upstream = draw(*shape).sin()
    ((out.latents * upstream).sum() + out.losses["quantization"]).backward()
    moved = upstream.movedim(axis, -1).reshape(1, -1, 1, 4).movedim(-1, 1)
    ((expected.latents * moved).sum() + expected.losses["quantization"]).backward()
    assert torch.equal(z.grad.movedim(axis, -1).flatten(), image.grad.movedim(1, -1).flatten())


def test_one_loss():
    z = draw(2, 6, 4)
    own = IBQ(num_codes=16, dim=4)
    for quantization, entropy in ((1.0, 0.05), (2.0, 0.0), (0.5, 3.0)):
        own.quantization_weight, own.entropy_weight = quantization, entropy
        out = own(z)
        assert torch.allclose(out.loss, quantization * out.losses["quantization"] + entropy * out.losses["entropy"])
    without = VQ(num_codes=16, dim=4, quantization_weight=2.0)(z)
    assert without.losses.keys() == {"quantization"}
    assert torch.equal(without.loss, 2 * without.losses["quantization"])


def test_weights_are_those_of_the_tokenizers():
    from ibq.training.tokenizer_config import TokenizerLossConfig

    loss, own = TokenizerLossConfig(), IBQ(num_codes=16, dim=4)
    assert (own.quantization_weight, own.entropy_weight) == (loss.quantization_weight, loss.entropy_weight)


def test_keywords_are_the_configs():
    own = IBQ(num_codes=8, dim=2, l2_normalize=True, beta_weighs="commitment")
    assert own.config == IBQConfig(num_codes=8, dim=2, l2_normalize=True, beta_weighs="commitment")
    assert own.spherical and FSQ(levels=(3, 5)).num_codes == 15 and LFQ(dim=3).num_codes == 8


@pytest.mark.parametrize(
    "channels, shape, remedy",
    [
        (None, (2, 4, 6), "axis 2 .*give channels='first'"),
        ("first", (2, 6, 4), "axis 1 .*give channels='last'"),
        (None, (2, 3, 5, 4), "axis 1 .*give channels='last'"),
        (None, (2, 6, 5), "axis 2 .*set `dim`"),
        (None, (4,), "set `dim`"),
        (None, (0, 6, 4), "the batch is empty"),
    ],
)
def test_inputs_that_do_not_fit(name: str, channels: str | None, shape: tuple[int, ...], remedy: str):
    own = layer(name, channels=channels)
    for call in (own, own.encode):
        with pytest.raises(ValueError, match=remedy):
            call(draw(*shape))


def test_settings_that_are_not_possible():
    with pytest.raises(ValueError, match="channels: there is no 'middle'; use first or last"):
        IBQ(num_codes=16, dim=4, channels="middle")
    with pytest.raises(ValueError, match="entropy_weight: must be at least 0"):
        IBQ(num_codes=16, dim=4, entropy_weight=-1.0)
    with pytest.raises(TypeError, match="codebook_size"):
        IBQ(codebook_size=16, dim=4)


def test_codes_that_are_not_possible(name: str):
    with pytest.raises(ValueError, match="16 codes"):
        layer(name).lookup(torch.tensor([[3, 16]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_latents_have_the_precision_of_the_input(name: str, dtype: torch.dtype):
    """A model in bf16 goes on in bf16; the quantizer itself computes in float32."""
    own, z = layer(name), draw(2, 6, 4).to(dtype)
    out, expected = own.to(dtype)(z), layer(name).to(dtype).float()(z.float())
    assert out.latents.dtype == dtype and torch.equal(out.codes, expected.codes)
    assert out.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_autocast(name: str):
    model, x = Model(name), batches()[0].float()
    with torch.autocast("cpu", torch.bfloat16):
        reconstruction, out = model(x)
        latents = model.encoder(x)
    assert latents.dtype == out.latents.dtype == reconstruction.dtype == torch.bfloat16
    expected = model.quantizer(latents.float())
    assert torch.equal(out.codes, expected.codes) and torch.equal(out.loss, expected.loss)
    (reconstruction.float().square().mean() + out.loss).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32 and bool(parameter.grad.isfinite().all()), key


def test_state_dict_and_copies(name: str):
    model, x = Model(name), batches()[0].float()
    expected = model(x)[0]
    torch.manual_seed(5)
    other = Model(name)
    for parameter in other.parameters():
        parameter.data.normal_()
    assert not torch.equal(other(x)[0], expected)
    other.load_state_dict(model.state_dict(), strict=True)
    for same in (other, copy.deepcopy(model)):
        assert torch.equal(same(x)[0], expected)


def test_the_example_on_the_page(capsys: pytest.CaptureFixture):
    (example,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "ibq/quantizers/README.md").read_text(), re.S | re.M)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert capsys.readouterr().out == "torch.Size([2, 100, 64]) torch.Size([2, 100])\n"
    assert torch.equal(names["latents"], names["out"].latents) and bool(names["features"].grad.any())


def test_returns_of_vector_quantize(name: str):
    z, own = draw(2, 6, 4), layer(name)
    quantized, indices, loss = AsVectorQuantize(own)(z)
    out = own(z)
    assert torch.equal(quantized, out.latents) and torch.equal(indices, out.codes) and torch.equal(loss, out.loss)
