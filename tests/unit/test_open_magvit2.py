"""Open-MAGVIT2's network as an option of the tokenizer."""

import pytest
import torch

from ibq.config import UserError, config_to_dict, parse_config
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.quantizers import IBQConfig, LFQConfig
from ibq.scaling.tokenizer import tokenizer_flops

SMALL = {
    "network": "open_magvit2",
    "resolution": 32,
    "channels": 32,
    "channel_multipliers": (1, 1, 2),
    "res_blocks": 1,
    "attention_resolutions": (),
    "latent_channels": 6,
    "quantizer": LFQConfig(dim=6),
}


def small() -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(TokenizerConfig(**SMALL))


def test_encodes_decodes_and_trains():
    tokenizer = small()
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    out = tokenizer(images)
    assert out.reconstruction.shape == images.shape and out.codes.shape == (2, 8, 12)
    assert torch.equal(tokenizer.decode(tokenizer.encode(images)), out.reconstruction.detach())
    (out.reconstruction.square().mean() + sum(out.losses.values())).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tokenizer.parameters())


def test_upsampling_puts_four_channels_into_two_by_two_pixels():
    upsample = small().decoder.up[1].upsample
    with torch.no_grad():
        upsample.conv1.weight.zero_()
        upsample.conv1.bias.copy_(torch.arange(4.0).repeat_interleave(32))  # the blocks of channels, in order
    image = upsample(torch.zeros(1, 32, 2, 2))
    assert torch.equal(image[0, 5], torch.tensor([[0.0, 1.0], [2.0, 3.0]]).repeat(2, 2))


def test_latents_scale_and_shift_the_decoder():
    adaptive = small().decoder.adaptive[0]
    x, latents = torch.randn(2, 32, 4, 4), torch.randn(2, 6, 4, 4)
    normalized = torch.nn.functional.group_norm(x, 32, eps=1e-6)
    scale = (latents.flatten(2).std(dim=2).square() + 1e-6).sqrt() @ adaptive.gamma.weight.T + adaptive.gamma.bias
    shift = latents.mean((2, 3)) @ adaptive.beta.weight.T + adaptive.beta.bias
    expected = normalized * scale[..., None, None] + shift[..., None, None]
    assert torch.allclose(adaptive(x, latents), expected, atol=1e-6)


def test_published_names():
    """Those of the published checkpoints."""
    config = TokenizerConfig(
        network="open_magvit2", attention_resolutions=(), latent_channels=18, quantizer=LFQConfig(dim=18)
    )
    with torch.device("meta"):
        tokenizer = Tokenizer(config)
    names = set(tokenizer.state_dict())
    assert {"encoder.mid_block.3.conv2.weight", "decoder.adaptive.4.gamma.bias"} <= names
    assert not any("quant_conv" in name or "attn" in name for name in names)
    assert parse_config(TokenizerConfig, config_to_dict(config)) == config


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attention_resolutions": (8,)}, "attention_resolutions"),
        ({"latent_channels": 7}, "latent_channels"),
        ({"network": "unet"}, "network: there is no 'unet'"),
        ({"quantizer": IBQConfig(num_codes=8, dim=16)}, "latent_channels"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        TokenizerConfig(**(SMALL | changes))


def test_cannot_be_planned():
    with pytest.raises(UserError, match="cannot be planned"):
        tokenizer_flops(TokenizerConfig(**SMALL))
